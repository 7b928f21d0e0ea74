//! The shuffled order of records in an epoch, and its micro-batches.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// The order of `n` records in an epoch: file order, or a shuffle seeded by `seed` and `epoch`.
///
/// The shuffle is Fisher-Yates from the last position down. Its random numbers come from a ChaCha8 stream whose key is
/// the little-endian bytes of `seed`, `epoch` and sixteen zeros; a number below a bound is drawn from 64-bit words by
/// rejection. So the order does not depend on the machine, the world size or a library's choice of algorithm.
pub fn order(n: usize, shuffle: bool, seed: u64, epoch: u64) -> Vec<usize> {
    let mut out: Vec<usize> = (0..n).collect();
    if shuffle {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&epoch.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        for last in (1..n).rev() {
            out.swap(last, below(&mut rng, last as u64 + 1) as usize);
        }
    }
    out
}

/// A uniform random number in `0..bound`.
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    // Reject words from the last multiple of `bound` on: they would make small remainders more likely.
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let word = rng.next_u64();
        if word < limit {
            return word % bound;
        }
    }
}

/// Splits the global order into micro-batches of `batch_size` records; the last one may be shorter. Micro-batch i
/// belongs to rank i mod world size.
///
/// # Panics
/// If `batch_size` is 0.
pub fn micro_batches(order: &[usize], batch_size: usize) -> Vec<Vec<usize>> {
    order.chunks(batch_size).map(<[usize]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn file_order_without_shuffle() {
        assert_eq!(order(4, false, 7, 3), [0, 1, 2, 3]);
        assert!(order(0, true, 7, 3).is_empty());
        assert_eq!(order(1, true, 7, 3), [0]);
    }

    #[test]
    fn the_order_is_pinned() {
        // These values must never change: a resumed or repeated run must see the same batches.
        assert_eq!(order(10, true, 42, 0), PINNED[0]);
        assert_eq!(order(10, true, 42, 1), PINNED[1]);
        assert_eq!(order(10, true, 43, 0), PINNED[2]);
    }

    /// From an implementation of ChaCha8 and of the shuffle in another language.
    const PINNED: [[usize; 10]; 3] =
        [[2, 1, 4, 3, 7, 0, 5, 8, 6, 9], [2, 6, 1, 5, 4, 3, 0, 9, 8, 7], [0, 2, 6, 9, 1, 5, 3, 4, 7, 8]];

    #[test]
    fn every_position_is_equally_likely() {
        let mut counts = [[0_usize; 4]; 4];
        for seed in 0..4000 {
            for (position, record) in order(4, true, seed, 0).into_iter().enumerate() {
                counts[position][record] += 1;
            }
        }
        // 1000 expected, standard deviation 27: 150 is more than five of them for each of the sixteen.
        assert!(counts.iter().flatten().all(|c| c.abs_diff(1000) < 150), "{counts:?}");
    }

    proptest! {
        #[test]
        fn an_order_is_a_permutation(n in 0_usize..300, seed: u64, epoch: u64) {
            let mut sorted = order(n, true, seed, epoch);
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..n).collect::<Vec<_>>());
        }

        #[test]
        fn micro_batches_keep_the_order(n in 0_usize..100, batch_size in 1_usize..20, seed: u64) {
            let order = order(n, true, seed, 0);
            let batches = micro_batches(&order, batch_size);
            prop_assert_eq!(batches.concat(), order);
            prop_assert_eq!(batches.len(), n.div_ceil(batch_size));
        }
    }
}
