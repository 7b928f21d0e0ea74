//! The difference between two evaluations on the same items: paired bootstrap, exact tests, and Holm's correction.

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Resamples of a paired bootstrap.
const RESAMPLES: usize = 10_000;
/// Its seed: the same outcomes give the same interval.
const SEED: u64 = 42;

/// How much more often the second of two evaluations says yes, on items that both have.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PairedDifference {
    /// Items.
    pub of: usize,
    /// Yes of the first alone, and of the second alone.
    pub alone: [usize; 2],
    /// Share of yes in the second minus that in the first.
    pub difference: f64,
    /// 95 % percentile interval of the difference over resamples of the items; `None` where no item differs or all have the same
    /// pair of outcomes, so that resampling changes nothing.
    pub interval: Option<[f64; 2]>,
}

impl PairedDifference {
    /// Of the outcomes of items; `None` without items.
    pub fn of(pairs: &[(bool, bool)]) -> Option<Self> {
        let n = pairs.len();
        if n == 0 {
            return None;
        }
        let count = |pair| pairs.iter().filter(|p| **p == pair).count();
        let alone = [count((true, false)), count((false, true))];
        let difference = (alone[1] as f64 - alone[0] as f64) / n as f64;
        if pairs.iter().all(|pair| *pair == pairs[0]) || alone == [0, 0] {
            return Some(Self { of: n, alone, difference, interval: None });
        }
        // A resample draws n items; only those count on which the outcomes differ.
        let mut rng = ChaCha8Rng::seed_from_u64(SEED);
        let mut draw = || {
            let mut sum = 0i64;
            for _ in 0..n {
                let item = rng.random_range(0..n);
                sum += i64::from(item < alone[1]) - i64::from(item >= alone[1] && item < alone[0] + alone[1]);
            }
            sum
        };
        let mut sums: Vec<i64> = (0..RESAMPLES).map(|_| draw()).collect();
        sums.sort_unstable();
        let at = |q: f64| sums[(q * (RESAMPLES - 1) as f64).round() as usize] as f64 / n as f64;
        Some(Self { of: n, alone, difference, interval: Some([at(0.025), at(0.975)]) })
    }
}

/// Two-sided p of McNemar's exact test: of the items on which two evaluations differ, `alone[0]` are yes of the first alone and
/// `alone[1]` of the second alone; if neither says yes more often, the former is Binomial(n, 1/2). (Q. McNemar, 1947, in its
/// conditional exact form.) 1 if no item differs.
pub fn mcnemar_p(alone: [usize; 2]) -> f64 {
    let (n, least) = (alone[0] + alone[1], alone[0].min(alone[1]));
    // ln C(n, k) - n ln 2, from one k to the next: C(n, k + 1) = C(n, k) (n - k) / (k + 1).
    let mut log = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=least {
        tail += log.exp();
        log += ((n - k) as f64 / (k + 1) as f64).ln();
    }
    (2.0 * tail).min(1.0)
}

/// Two-sided p of a paired permutation test of the mean: the sign of each difference is drawn anew, and p is
/// (1 + #{|sum| of the draw ≥ |sum|}) / (1 + draws). There are 9,999 draws, and more until 100 of them are as large, at most 999,999: a
/// correction for hundreds of tests multiplies the smallest p by their number (after J. Besag and P. Clifford, 1991). 1 if all
/// differences are 0 or one is not finite.
pub fn sign_flip_p(differences: &[f64]) -> f64 {
    const DRAWS: [usize; 2] = [9_999, 999_999];
    const ENOUGH: usize = 100;
    let observed = differences.iter().sum::<f64>().abs();
    if !observed.is_finite() || differences.iter().all(|d| *d == 0.0) {
        return 1.0;
    }
    // Sums of the same differences in another order must count as equal.
    let slack = 1e-12 * differences.iter().map(|d| d.abs()).sum::<f64>();
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    // The sums of each eight differences, by their signs.
    let signed = |eight: &[f64], signs: usize| -> f64 {
        eight.iter().enumerate().map(|(i, d)| if signs >> i & 1 == 0 { *d } else { -d }).sum()
    };
    let sums: Vec<[f64; 256]> =
        differences.chunks(8).map(|eight| std::array::from_fn(|signs| signed(eight, signs))).collect();
    let mut signs = vec![0u8; sums.len()];
    let (mut draws, mut as_large) = (0, 0);
    while draws < DRAWS[0] || draws < DRAWS[1] && as_large < ENOUGH {
        rng.fill(&mut signs[..]);
        let sum: f64 = sums.iter().zip(&signs).map(|(sums, signs)| sums[usize::from(*signs)]).sum();
        draws += 1;
        as_large += usize::from(sum.abs() >= observed - slack);
    }
    (1 + as_large) as f64 / (1 + draws) as f64
}

/// Adjusted p of a family of tests (S. Holm, 1979): where those of at most α are called significant, the probability that a true null
/// hypothesis is among them is at most α.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|a, b| p[*a].total_cmp(&p[*b]));
    let mut adjusted = vec![1.0; p.len()];
    let mut largest = 0.0f64;
    for (rank, &i) in order.iter().enumerate() {
        largest = largest.max((p[i] * (p.len() - rank) as f64).min(1.0));
        adjusted[i] = largest;
    }
    adjusted
}

/// Mean of paired differences with a 95 % percentile interval over resamples of the items; the interval is `None` where resampling
/// changes nothing.
pub fn mean_difference(differences: &[f64]) -> Option<(f64, Option<[f64; 2]>)> {
    let n = differences.len();
    let mean = (n > 0).then(|| differences.iter().sum::<f64>() / n as f64)?;
    if differences.iter().all(|d| *d == differences[0]) {
        return Some((mean, None));
    }
    let mut rng = ChaCha8Rng::seed_from_u64(SEED);
    let mut draw = || (0..n).map(|_| differences[rng.random_range(0..n)]).sum::<f64>() / n as f64;
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| draw()).collect();
    means.sort_unstable_by(f64::total_cmp);
    let at = |q: f64| means[(q * (RESAMPLES - 1) as f64).round() as usize];
    Some((mean, Some([at(0.025), at(0.975)])))
}

#[cfg(test)]
mod tests {
    use super::super::statistics::tests::ks_p;
    use super::*;

    fn pairs(counts: [usize; 4]) -> Vec<(bool, bool)> {
        let kinds = [(true, true), (true, false), (false, true), (false, false)];
        kinds.into_iter().zip(counts).flat_map(|(pair, n)| std::iter::repeat_n(pair, n)).collect()
    }

    #[test]
    fn the_interval_is_that_of_a_normal_for_many_items() {
        let found = PairedDifference::of(&pairs([300, 40, 100, 560])).unwrap();
        assert_eq!((found.of, found.alone), (1000, [40, 100]));
        assert!((found.difference - 0.06).abs() < 1e-12);
        // Variance of one item: 0.14 - 0.06²; of the mean a thousandth of it.
        let half = 1.96 * ((0.14 - 0.06f64 * 0.06) / 1000.0).sqrt();
        let wanted = [0.06 - half, 0.06 + half];
        // The interval moves in steps of 0.001, and 10000 resamples leave an error of its ends of about that.
        assert!(
            found.interval.unwrap().iter().zip(wanted).all(|(a, b)| (a - b).abs() < 0.0021),
            "{:?} {wanted:?}",
            found.interval
        );
    }

    #[test]
    fn equal_outcomes_have_no_interval_and_order_does_not_matter() {
        let none = PairedDifference::of(&pairs([5, 0, 0, 7])).unwrap();
        assert_eq!((none.difference, none.interval), (0.0, None));
        let all = PairedDifference::of(&pairs([0, 3, 0, 0])).unwrap();
        assert_eq!((all.difference, all.interval), (-1.0, None));
        let mut mixed = pairs([3, 4, 2, 5]);
        let found = PairedDifference::of(&mixed);
        mixed.reverse();
        assert_eq!(PairedDifference::of(&mixed), found);
        assert_eq!(PairedDifference::of(&[]), None);
    }

    #[test]
    fn mcnemar_is_the_binomial_test_of_a_half() {
        // 2 Σ C(n, i) / 2^n in exact integers.
        let cases = [([0, 5], 0.0625), ([1, 9], 0.021484375), ([3, 7], 0.34375), ([40, 60], 0.05688793), ([5, 5], 1.0)];
        for (alone, wanted) in cases {
            let found = mcnemar_p(alone);
            assert!((found - wanted).abs() < 1e-7 && found == mcnemar_p([alone[1], alone[0]]), "{alone:?}: {found}");
        }
        assert_eq!(mcnemar_p([0, 0]), 1.0);
        let tiny = mcnemar_p([0, 900]);
        assert!(tiny > 0.0 && tiny < 1e-200, "2^-899, no underflow: {tiny:e}");
        assert!((mcnemar_p([5000, 5000]) - 1.0).abs() < 1e-12);
        assert!((mcnemar_p([225, 275]) - 0.028326160766).abs() < 1e-9, "{}", mcnemar_p([225, 275]));
    }

    #[test]
    fn holm_steps_down() {
        let close = |a: &[f64], b: &[f64]| assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-12), "{a:?} {b:?}");
        // R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
        close(&holm(&[0.01, 0.04, 0.03, 0.005]), &[0.03, 0.06, 0.06, 0.02]);
        close(&holm(&[0.5, 0.9]), &[1.0, 1.0]);
        assert_eq!(holm(&[]), Vec::<f64>::new());
    }

    #[test]
    fn sign_flips_are_uniform_under_the_null_and_see_a_shift() {
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        let mut p_of = |shift: f64| {
            // Skewed sizes with random signs: symmetric about the shift.
            let mut one = || {
                let size = -rng.random::<f64>().max(1e-12).ln();
                shift + if rng.random::<bool>() { size } else { -size }
            };
            let differences: Vec<f64> = (0..30).map(|_| one()).collect();
            sign_flip_p(&differences)
        };
        let p: Vec<f64> = (0..60).map(|_| p_of(0.0)).collect();
        assert!(ks_p(p.clone()) > 0.05, "{}", ks_p(p));
        assert!((0..20).filter(|_| p_of(1.5) < 0.05).count() >= 18);
        assert_eq!((sign_flip_p(&[0.0; 9]), sign_flip_p(&[]), sign_flip_p(&[f64::NAN, 1.0])), (1.0, 1.0, 1.0));
        // All eight have one sign: 2 of 256 sign patterns reach the sum.
        assert!((sign_flip_p(&[1.0; 8]) - 2.0 / 256.0).abs() < 0.003);
        assert!((sign_flip_p(&[1.0; 17]) - 0.5f64.powi(16)).abs() < 1.2e-5);
        // What no draw reaches is significant in a large family, too.
        let mut family = vec![0.5; 800];
        family[0] = sign_flip_p(&(1..=40).map(f64::from).collect::<Vec<_>>());
        assert!(family[0] <= 2e-6 && holm(&family)[0] < 0.01, "{}", family[0]);
    }

    #[test]
    fn the_interval_of_a_mean_difference_is_that_of_a_normal() {
        let differences: Vec<f64> = (0..400).map(|i| f64::from(i % 20) / 19.0).collect();
        let (mean, interval) = mean_difference(&differences).unwrap();
        let variance = differences.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / 400.0;
        let half = 1.96 * (variance / 400.0).sqrt();
        let [low, high] = interval.unwrap();
        assert!((mean - 0.5).abs() < 1e-12 && (low - 0.5 + half).abs() < 0.003 && (high - 0.5 - half).abs() < 0.003);
        assert_eq!((mean_difference(&[2.0, 2.0]), mean_difference(&[])), (Some((2.0, None)), None));
    }
}
