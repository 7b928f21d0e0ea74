//! The difference between two evaluations on the same items, by paired bootstrap.

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

#[cfg(test)]
mod tests {
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
}
