//! Poisson bootstrap over micro-batches: the share of resamples of the data in which an expert is selected.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::score::add_sums;
use super::{Error, ExpertScores, Selected};
use crate::collective::{self, Collective};

/// e⁻¹
const INV_E: f64 = 0.367_879_441_171_442_33;

/// Weighted sums of the scores of micro-batches, for N resamples b:
///
/// ```text
/// s_b(l,e) = Σ_i w(b,i) s_i(l,e) / Σ_i w(b,i),    w(b,i) ~ Poisson(1) for micro-batch i of the global order
/// ```
///
/// The weights of a Poisson bootstrap are independent of each other (a bootstrap by drawing with replacement fixes their sum), so
/// that each rank can add its own micro-batches. They are a function of (seed, b, i) only: the world size does not change them.
/// Memory: N·L·E·8 bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Bootstrap {
    seed: u64,
    /// Σ_i w(b,i), `[N]`; exact in f64.
    #[serde(with = "exact")]
    weights: Vec<f64>,
    /// Σ_i w(b,i) s_i(l,e), `[N, L · E]`.
    #[serde(with = "exact")]
    sums: Vec<f64>,
}

impl Bootstrap {
    /// Without micro-batches. `experts`: L·E.
    pub fn new(seed: u64, resamples: usize, experts: usize) -> Self {
        Self { seed, weights: vec![0.0; resamples], sums: vec![0.0; resamples * experts] }
    }

    /// Adds a micro-batch. `index`: its place in the global order; `scores`: its scores, `[L · E]`.
    pub fn add(&mut self, index: usize, scores: &[f64]) {
        for (b, sums) in self.sums.chunks_exact_mut(scores.len()).enumerate() {
            let weight = f64::from(poisson(self.seed, b as u64, index as u64));
            if weight > 0.0 {
                self.weights[b] += weight;
                sums.iter_mut().zip(scores).for_each(|(sum, score)| *sum += weight * score);
            }
        }
    }

    /// Adds another rank's sums of the same run.
    pub fn absorb(&mut self, other: &Self) {
        add_sums(&mut self.weights, &other.weights);
        add_sums(&mut self.sums, &other.sums);
    }

    /// All-reduces the sums over the ranks.
    ///
    /// # Errors
    /// Those of [`Collective::barrier`].
    pub fn merge(&mut self, collective: &dyn Collective) -> Result<(), collective::Error> {
        collective.all_reduce_f64(&mut self.weights)?;
        collective.all_reduce_f64(&mut self.sums)
    }

    /// The share of resamples in which `select` selects each expert, `[L · E]`. `like`: the layers and experts of the scores. A
    /// resample without any micro-batch has no scores, and does not count; with none that counts, all shares are 0.
    ///
    /// # Errors
    /// Those of `select`.
    pub fn inclusion(
        &self,
        like: &ExpertScores,
        select: impl Fn(ExpertScores) -> Result<Selected, Error>,
    ) -> Result<Vec<f64>, Error> {
        let num_experts = like.num_experts;
        let mut times = vec![0_u64; like.values.len()];
        let mut resamples = 0_u64;
        for (weight, sums) in self.weights.iter().zip(self.sums.chunks_exact(like.values.len())) {
            if *weight == 0.0 {
                continue;
            }
            resamples += 1;
            let values = sums.iter().map(|sum| rounded(sum / weight)).collect();
            for id in select(ExpertScores { layers: like.layers.clone(), num_experts, values })?.experts {
                let row = like.layers.binary_search(&id.layer).expect("an expert of these layers");
                times[row * num_experts + id.expert] += 1;
            }
        }
        Ok(times.into_iter().map(|n| n as f64 / resamples.max(1) as f64).collect())
    }
}

/// A score with 24 significant bits. Experts whose scores are equal up to the rounding of sums then tie, and the order in which ranks
/// add micro-batches does not decide which of them is selected.
fn rounded(value: f64) -> f64 {
    const DROPPED: u32 = 53 - 24;
    f64::from_bits(value.to_bits().wrapping_add(1 << (DROPPED - 1)) & !((1 << DROPPED) - 1)) // to nearest; the sign bit stays
}

/// A Poisson(1) variate by inversion of its distribution function, from a hash of (seed, b, i).
fn poisson(seed: u64, b: u64, i: u64) -> u32 {
    let hash = mix(mix(mix(seed) ^ b) ^ i);
    let uniform = (hash >> 11) as f64 / (1_u64 << 53) as f64;
    let (mut k, mut probability, mut below) = (0, INV_E, INV_E);
    while uniform >= below && k < 20 {
        k += 1;
        probability /= f64::from(k);
        below += probability;
    }
    k
}

/// The output function of SplitMix64 (Steele, Lea, Flood 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

/// Numbers as the hexadecimal digits of their bits, 16 each: exact, and shorter than decimals.
mod exact {
    use super::{Deserialize, Deserializer, Serialize, Serializer};
    use std::fmt::Write;

    pub fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        let mut text = String::with_capacity(16 * values.len());
        for value in values {
            write!(text, "{:016x}", value.to_bits()).expect("a string takes any text");
        }
        text.serialize(serializer)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        let text = String::deserialize(deserializer)?;
        let number = |digits: &[u8]| {
            let digits = std::str::from_utf8(digits).ok().filter(|digits| digits.len() == 16)?;
            u64::from_str_radix(digits, 16).ok().map(f64::from_bits)
        };
        let values: Option<Vec<f64>> = text.as_bytes().chunks(16).map(number).collect();
        values.ok_or_else(|| serde::de::Error::custom("not 16 hexadecimal digits a number"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::conformance::on_threads;
    use crate::experts::{Ranking, SelectionLimits, select};

    fn like() -> ExpertScores {
        ExpertScores { layers: vec![1, 3], num_experts: 3, values: vec![0.0; 6] }
    }

    fn first_two(scores: ExpertScores) -> Result<Selected, Error> {
        select(&scores, &SelectionLimits { top_k: 2, per_layer: None, layers: None }, &Ranking::default())
    }

    #[test]
    fn weights_are_poisson_and_independent() {
        let n = 40_000_u64;
        let mut counts = [0_u32; 21];
        let mut neighbours = [0.0; 2];
        for i in 0..n {
            let w = poisson(42, i % 200, i / 200);
            counts[w as usize] += 1;
            let centred = f64::from(w) - 1.0;
            neighbours[0] += centred * (f64::from(poisson(42, i % 200 + 1, i / 200)) - 1.0);
            neighbours[1] += centred * (f64::from(poisson(42, i % 200, i / 200 + 1)) - 1.0);
        }
        // Σ (observed − expected)² / expected over w = 0..=5: chi-square with 6 degrees of freedom, below 22.5 with
        // probability 0.999.
        let mut expected = INV_E * n as f64;
        let mut chi_square = 0.0;
        for (w, count) in counts.iter().enumerate().take(6) {
            expected /= if w == 0 { 1.0 } else { w as f64 };
            chi_square += (f64::from(*count) - expected).powi(2) / expected;
        }
        assert!(chi_square < 22.5, "{chi_square}, {counts:?}");
        // Covariances have a standard deviation of 1/sqrt(n) = 0.005.
        assert!(neighbours.iter().all(|sum| (sum / n as f64).abs() < 0.02), "{neighbours:?}");
        assert_eq!(poisson(7, 3, 5), poisson(7, 3, 5));
    }

    #[test]
    fn inclusion_tells_stable_experts_from_chance() {
        let mut bootstrap = Bootstrap::new(1, 400, 6);
        for i in 0..40 {
            // One expert is always the best; two others take turns in being the second.
            let turn = [1.0, 0.0];
            bootstrap.add(i, &[9.0, turn[i % 2], turn[(i + 1) % 2], 0.1, 0.0, 0.0]);
        }
        let inclusion = bootstrap.inclusion(&like(), first_two).unwrap();
        assert_eq!((inclusion[0], &inclusion[3..]), (1.0, &[0.0; 3][..]));
        assert!((inclusion[1] + inclusion[2] - 1.0).abs() < 1e-12, "{inclusion:?}");
        assert!((inclusion[1] - 0.5).abs() < 0.15, "{inclusion:?}"); // six standard deviations of 400 resamples
        assert_eq!(Bootstrap::new(1, 9, 6).inclusion(&like(), first_two).unwrap(), [0.0; 6], "no micro-batch");
    }

    #[test]
    fn ranks_and_resumed_runs_have_the_same_inclusion() {
        let scores = |i: usize| -> Vec<f64> { (0..6).map(|e| ((i * 7 + e * 5) % 11) as f64 / 7.0).collect() };
        let inclusion = |ranks: usize| {
            on_threads(ranks, move |c| {
                let mut own = Bootstrap::new(42, 50, 6);
                for i in (0..13).filter(|i| i % ranks == c.rank()) {
                    let saved = serde_json::to_string(&own).unwrap();
                    own = serde_json::from_str(&saved).unwrap();
                    own.add(i, &scores(i));
                }
                own.merge(&c).unwrap();
                own.inclusion(&like(), first_two).unwrap()
            })
        };
        let one = inclusion(1).remove(0);
        assert!(one.iter().any(|p| *p > 0.0 && *p < 1.0), "{one:?}");
        for ranks in 2..=4 {
            assert!(inclusion(ranks).iter().all(|several| *several == one), "{ranks} ranks");
        }
        let [mut a, mut b, mut both] = [0; 3].map(|_| Bootstrap::new(42, 50, 6));
        a.add(3, &scores(3));
        b.add(4, &scores(4));
        both.add(3, &scores(3));
        both.add(4, &scores(4));
        a.absorb(&b);
        assert_eq!(a, both);
    }

    #[test]
    fn rounding_keeps_24_bits() {
        for (value, expected) in [(0.25 - 1e-17, 0.25), (-0.25 + 1e-17, -0.25), (0.0, 0.0), (1.0 + 1e-9, 1.0)] {
            assert_eq!(rounded(value), expected);
        }
        assert_eq!(rounded(0.1_f64), f64::from(0.1_f32));
        assert!(rounded(1.0 + 1e-6) > 1.0 && rounded(f64::NAN).is_nan() && rounded(f64::INFINITY).is_infinite());
    }

    #[test]
    fn the_saved_form_is_exact() {
        let saved = Bootstrap { seed: 1, weights: vec![3.0, 0.0], sums: vec![-0.0, 0.1, f64::MAX, 5e-324] };
        let text = serde_json::to_string(&saved).unwrap();
        let read: Bootstrap = serde_json::from_str(&text).unwrap();
        assert!(saved.sums.iter().zip(&read.sums).all(|(a, b)| a.to_bits() == b.to_bits()));
        for damaged in ["\"3ff\"", "\"zzzzzzzzzzzzzzzz\"", "3"] {
            let text = format!("{{\"seed\":1,\"weights\":{damaged},\"sums\":\"\"}}");
            assert!(serde_json::from_str::<Bootstrap>(&text).is_err(), "{damaged}");
        }
    }
}
