//! Who keeps which part of the optimizer's state, and in which pieces gradients and weights travel between ranks.

use std::ops::Range;

/// The piece of a parameter of `len` elements that a rank keeps: contiguous, and as even as can be. It depends on nothing
/// else that is trained, so a parameter that is trained again finds its state where it was.
pub fn piece(len: usize, rank: usize, world_size: usize) -> Range<usize> {
    assert!(rank < world_size, "rank {rank} of {world_size}");
    rank * len / world_size..(rank + 1) * len / world_size
}

/// Parameters laid one after another, as in a flat gradient, each cut into one [`piece`] a rank (ZeRO stage 1, arXiv
/// 1910.02054). A rank's *shard* is its pieces, one after another. They travel in *buckets* of whole parameters, the last
/// parameters first, because a backward pass finishes those first; in a bucket, the pieces of one rank stand together
/// (*packed*), so that one reduce-scatter or all-gather moves it.
///
/// With one rank, the shard is the whole and packed is flat.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Where each parameter begins in the flat whole, and the end of the last.
    starts: Vec<usize>,
    world_size: usize,
    buckets: Vec<Range<usize>>,
}

impl ShardPlan {
    /// Plans for parameters of these lengths, in this order. A bucket ends where it holds `bucket_len` elements or more.
    pub fn new(lens: impl IntoIterator<Item = usize>, world_size: usize, bucket_len: usize) -> Self {
        assert!(world_size > 0, "a plan for no rank");
        let lens: Vec<usize> = lens.into_iter().collect();
        let mut buckets = Vec::new();
        let (mut end, mut held) = (lens.len(), 0);
        for (param, len) in lens.iter().enumerate().rev() {
            held += len;
            if held >= bucket_len || param == 0 {
                buckets.push(param..end);
                (end, held) = (param, 0);
            }
        }
        let mut starts = vec![0];
        starts.extend(lens.iter().scan(0, |end, len| {
            *end += len;
            Some(*end)
        }));
        Self { starts, world_size, buckets }
    }

    /// Number of ranks.
    pub fn world_size(&self) -> usize {
        self.world_size
    }

    /// The parameters of each bucket; the buckets in the order in which they travel.
    pub fn buckets(&self) -> &[Range<usize>] {
        &self.buckets
    }

    /// The piece of a parameter that a rank keeps.
    pub fn piece(&self, param: usize, rank: usize) -> Range<usize> {
        piece(self.starts[param + 1] - self.starts[param], rank, self.world_size)
    }

    /// Elements of each rank's pieces of these parameters.
    pub fn counts(&self, params: Range<usize>) -> Vec<usize> {
        (0..self.world_size).map(|rank| params.clone().map(|param| self.piece(param, rank).len()).sum()).collect()
    }

    /// Elements of the shard of a rank.
    pub fn shard_len(&self, rank: usize) -> usize {
        self.shard_start(self.starts.len() - 1, rank)
    }

    /// Where the piece of a parameter begins in the shard of a rank.
    pub fn shard_start(&self, param: usize, rank: usize) -> usize {
        (0..param).map(|before| self.piece(before, rank).len()).sum()
    }

    /// Where these parameters lie in the flat whole.
    pub fn flat(&self, params: Range<usize>) -> Range<usize> {
        self.starts[params.start]..self.starts[params.end]
    }

    /// Puts the flat values of a bucket's parameters into packed order.
    pub fn pack(&self, params: Range<usize>, flat: &[f32]) -> Vec<f32> {
        let mut packed = Vec::with_capacity(flat.len());
        for rank in 0..self.world_size {
            for param in params.clone() {
                let (start, piece) = (self.starts[param] - self.starts[params.start], self.piece(param, rank));
                packed.extend_from_slice(&flat[start + piece.start..start + piece.end]);
            }
        }
        packed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_rank_keeps_everything_in_order() {
        let plan = ShardPlan::new([3, 0, 2], 1, 1);
        assert_eq!(plan.buckets(), [2..3, 0..2], "the empty parameter fills no bucket");
        assert_eq!((plan.shard_len(0), plan.shard_start(2, 0)), (5, 3));
        assert_eq!(plan.pack(0..3, &[1.0, 2.0, 3.0, 4.0, 5.0]), [1.0, 2.0, 3.0, 4.0, 5.0]);
    }

    #[test]
    fn a_bucket_is_packed_rank_by_rank() {
        let plan = ShardPlan::new([4, 2], 2, 100);
        assert_eq!(plan.pack(0..2, &[0.0, 1.0, 2.0, 3.0, 10.0, 11.0]), [0.0, 1.0, 10.0, 2.0, 3.0, 11.0]);
        assert_eq!(plan.counts(0..2), [3, 3]);
    }

    proptest! {
        #[test]
        fn shards_are_even_and_cover_everything_once(
            lens in proptest::collection::vec(0usize..40, 0..12),
            world_size in 1usize..9,
            bucket_len in 1usize..60,
        ) {
            let plan = ShardPlan::new(lens.iter().copied(), world_size, bucket_len);
            for (param, len) in lens.iter().enumerate() {
                let pieces: Vec<_> = (0..world_size).map(|rank| plan.piece(param, rank)).collect();
                prop_assert_eq!(pieces.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..*len).collect::<Vec<_>>());
                let longest = pieces.iter().map(Range::len).max().unwrap();
                prop_assert!(pieces.iter().all(|p| p.len() + 1 >= longest));
            }
            let shards: usize = (0..world_size).map(|rank| plan.shard_len(rank)).sum();
            prop_assert_eq!(shards, lens.iter().sum::<usize>());

            let mut backwards: Vec<usize> = plan.buckets().iter().rev().flat_map(Clone::clone).collect();
            backwards.sort_unstable();
            prop_assert_eq!(backwards, (0..lens.len()).collect::<Vec<_>>());
            for (i, bucket) in plan.buckets().iter().enumerate() {
                let last = i + 1 == plan.buckets().len();
                prop_assert!(last || plan.flat(bucket.clone()).len() >= bucket_len);
                prop_assert!(lens[bucket.start + 1..bucket.end].iter().sum::<usize>() < bucket_len, "as few as can be");
            }
        }

        #[test]
        fn each_rank_finds_its_shard_in_a_packed_bucket(
            lens in proptest::collection::vec(0usize..40, 1..12),
            world_size in 1usize..9,
            bucket_len in 1usize..60,
        ) {
            let plan = ShardPlan::new(lens.iter().copied(), world_size, bucket_len);
            let whole: Vec<f32> = (0..lens.iter().sum::<usize>()).map(|i| i as f32).collect();
            for bucket in plan.buckets() {
                let flat = &whole[plan.flat(bucket.clone())];
                let packed = plan.pack(bucket.clone(), flat);
                let mut start = 0;
                for (rank, count) in plan.counts(bucket.clone()).into_iter().enumerate() {
                    let mine = &packed[start..start + count];
                    let from = plan.shard_start(bucket.start, rank);
                    for param in bucket.clone() {
                        let piece = plan.piece(param, rank);
                        let at = plan.shard_start(param, rank) - from;
                        let expected = &whole[plan.flat(param..param + 1)][piece.clone()];
                        prop_assert_eq!(&mine[at..at + piece.len()], expected);
                    }
                    start += count;
                }
            }
        }
    }
}
