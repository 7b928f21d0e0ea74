//! The optimizer's shard plan: which rank keeps which part of each parameter's state, and the buckets in which
//! gradients and weights are exchanged.

use std::ops::Range;

/// The piece (range of elements) of a parameter with `len` elements whose state a rank keeps: contiguous, with lengths
/// that differ by at most 1 between ranks. It does not depend on the other trained parameters, so a parameter that is
/// trained again keeps its pieces.
pub fn piece(len: usize, rank: usize, world_size: usize) -> Range<usize> {
    assert!(rank < world_size, "rank {rank} of {world_size}");
    rank * len / world_size..(rank + 1) * len / world_size
}

/// Sharding of the optimizer state over ranks (ZeRO stage 1, arXiv 1910.02054).
///
/// The parameters are concatenated (*flat* order, as in a flat gradient). Each is split into one [`piece`] per rank; a
/// rank's *shard* is the concatenation of its pieces. Gradients and weights are exchanged in *buckets* of whole
/// parameters, the last parameters first because a backward pass finishes them first. In *packed* order, the pieces of
/// a bucket are grouped by rank, so that one reduce-scatter or all-gather exchanges the bucket.
///
/// With one rank, the shard is everything, and packed order equals flat order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Flat offset of each parameter, followed by the total length.
    starts: Vec<usize>,
    world_size: usize,
    buckets: Vec<Range<usize>>,
}

impl ShardPlan {
    /// A plan for parameters of these lengths, in this order. A bucket is complete once it has at least `bucket_len`
    /// elements.
    pub fn new(lens: impl IntoIterator<Item = usize>, world_size: usize, bucket_len: usize) -> Self {
        assert!(world_size > 0, "a plan needs at least one rank");
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

    /// The parameters of each bucket, in the order in which the buckets are exchanged.
    pub fn buckets(&self) -> &[Range<usize>] {
        &self.buckets
    }

    /// The elements of a parameter that a rank keeps, see [`piece`].
    pub fn piece(&self, param: usize, rank: usize) -> Range<usize> {
        piece(self.starts[param + 1] - self.starts[param], rank, self.world_size)
    }

    /// Number of elements of each rank's pieces of these parameters, by rank.
    pub fn counts(&self, params: Range<usize>) -> Vec<usize> {
        (0..self.world_size).map(|rank| params.clone().map(|param| self.piece(param, rank).len()).sum()).collect()
    }

    /// Number of elements of a rank's shard.
    pub fn shard_len(&self, rank: usize) -> usize {
        self.shard_start(self.starts.len() - 1, rank)
    }

    /// Offset of a parameter's piece in a rank's shard.
    pub fn shard_start(&self, param: usize, rank: usize) -> usize {
        (0..param).map(|before| self.piece(before, rank).len()).sum()
    }

    /// The range of these parameters in flat order.
    pub fn flat(&self, params: Range<usize>) -> Range<usize> {
        self.starts[params.start]..self.starts[params.end]
    }

    /// Copies the values of a bucket's parameters from flat into packed order.
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
                prop_assert!(lens[bucket.start + 1..bucket.end].iter().sum::<usize>() < bucket_len, "a bucket is no longer than needed");
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
