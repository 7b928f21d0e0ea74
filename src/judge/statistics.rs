//! Rates with intervals, the spread over random sets, and permutation p.

use serde::{Deserialize, Serialize};

/// A share of yes among n, with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Rate {
    /// Number of yes.
    pub hits: usize,
    /// n
    pub of: usize,
    /// `hits` / `of`; null if `of` is 0.
    pub rate: Option<f64>,
    /// Wilson's 95 % interval.
    pub interval: [f64; 2],
}

impl Rate {
    /// Counts the yes.
    pub fn of(answers: impl IntoIterator<Item = bool>) -> Self {
        let (mut hits, mut of) = (0, 0);
        for yes in answers {
            hits += usize::from(yes);
            of += 1;
        }
        Self { hits, of, rate: (of > 0).then(|| hits as f64 / of as f64), interval: wilson(hits, of) }
    }
}

/// Mean, least and most of a number over random sets.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The mean.
    pub mean: f64,
    /// The least.
    pub least: f64,
    /// The most.
    pub most: f64,
}

impl Spread {
    /// `None` without values.
    pub fn of(values: &[f64]) -> Option<Self> {
        (!values.is_empty()).then(|| Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            least: values.iter().copied().fold(f64::INFINITY, f64::min),
            most: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        })
    }
}

/// One-sided p of a statistic among those of random sets: (1 + #{random ≥ observed}) / (1 + N) (Phipson and Smyth, 2010). 1 if
/// the statistic is NaN.
pub fn permutation_p(observed: f64, random: &[f64]) -> f64 {
    let as_large = random.iter().filter(|r| observed.is_nan() || **r >= observed).count();
    (1 + as_large) as f64 / (1 + random.len()) as f64
}

/// Wilson's 95 % confidence interval of the rate `hits` / `n` (E. B. Wilson, 1927); [0, 1] if `n` is 0.
pub fn wilson(hits: usize, n: usize) -> [f64; 2] {
    const Z: f64 = 1.959_963_984_540_054; // 97.5 % quantile of the normal distribution
    if n == 0 {
        return [0.0, 1.0];
    }
    let (p, n) = (hits as f64 / n as f64, n as f64);
    let centre = (p + Z * Z / (2.0 * n)) / (1.0 + Z * Z / n);
    let half = Z / (1.0 + Z * Z / n) * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    [(centre - half).max(0.0), (centre + half).min(1.0)]
}

#[cfg(test)]
pub(super) mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn wilson_intervals() {
        // Computed by another program, six digits.
        let cases = [((0, 10), [0.0, 0.277533]), ((5, 10), [0.236593, 0.763407]), ((10, 10), [0.722467, 1.0])];
        for ((hits, n), wanted) in cases {
            let found = wilson(hits, n);
            assert!(found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6), "{hits}/{n}: {found:?}");
        }
        assert_eq!(wilson(0, 0), [0.0, 1.0]);
        let widths: Vec<_> = [10, 100, 1000].map(|n| wilson(n / 2, n)).iter().map(|[a, b]| b - a).collect();
        assert!(widths.is_sorted_by(|a, b| a > b), "intervals shrink with the number of answers: {widths:?}");
    }

    #[test]
    fn p_counts_ties_and_itself() {
        assert_eq!(permutation_p(3.0, &[1.0, 3.0, 5.0]), 0.75);
        assert_eq!(permutation_p(6.0, &[1.0, 3.0, 5.0]), 0.25);
        assert_eq!(permutation_p(f64::NAN, &[1.0, 3.0, 5.0]), 1.0);
        assert_eq!(permutation_p(0.0, &[]), 1.0);
        assert_eq!(Spread::of(&[2.0, 1.0, 6.0]), Some(Spread { mean: 3.0, least: 1.0, most: 6.0 }));
        let rate = Rate::of([true, false, true, true]);
        assert_eq!((rate.hits, rate.of, rate.rate), (3, 4, Some(0.75)));
        assert_eq!(Rate::of([]).rate, None);
    }

    /// p of the Kolmogorov-Smirnov distance between values and the uniform distribution, by its asymptotic series.
    pub fn ks_p(mut values: Vec<f64>) -> f64 {
        values.sort_by(f64::total_cmp);
        let n = values.len() as f64;
        let distance = values.iter().enumerate().fold(0f64, |d, (i, &x)| {
            let i = i as f64;
            d.max((x - i / n).abs()).max(((i + 1.0) / n - x).abs())
        });
        let t = (n.sqrt() + 0.12 + 0.11 / n.sqrt()) * distance;
        (1..100).map(f64::from).map(|k| 2.0 * (-1f64).powf(k - 1.0) * (-2.0 * k * k * t * t).exp()).sum()
    }

    #[test]
    fn p_of_exchangeable_statistics_is_uniform() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let mut p = Vec::new();
        for _ in 0..200 {
            // A skewed distribution that differs from run to run.
            let scale: f64 = rng.random();
            let mut draw = || -scale * rng.random::<f64>().max(1e-12).ln();
            let observed = draw();
            let random: Vec<f64> = (0..199).map(|_| draw()).collect();
            p.push(permutation_p(observed, &random));
        }
        assert!(ks_p(p.clone()) > 0.05, "{}", ks_p(p));
        // The test sees a deviation: of p too small by a third.
        let shifted = p.iter().map(|p| p * 0.67).collect();
        assert!(ks_p(shifted) < 0.001);
    }
}
