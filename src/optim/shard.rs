//! Who keeps which part of the optimizer's state.

use std::ops::Range;

/// A part of one parameter, in one rank's shard.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Place of the parameter in the list that was planned for.
    pub param: usize,
    /// Its elements.
    pub elements: Range<usize>,
    /// Where they begin in the shard.
    pub at: usize,
}

/// Parameters laid one after another and cut into one contiguous shard a rank, as even as can be (ZeRO stage 1, arXiv
/// 1910.02054): lengths differ by at most one element. With one rank, the shard is the whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardPlan {
    /// Where each parameter begins in the whole, and where the last ends.
    starts: Vec<usize>,
    world_size: usize,
}

impl ShardPlan {
    /// Plans for parameters of these lengths, in this order.
    pub fn new(lens: impl IntoIterator<Item = usize>, world_size: usize) -> Self {
        assert!(world_size > 0, "a plan for no rank");
        let mut starts = vec![0];
        for len in lens {
            starts.push(starts[starts.len() - 1] + len);
        }
        Self { starts, world_size }
    }

    /// Elements of all parameters.
    pub fn total(&self) -> usize {
        self.starts[self.starts.len() - 1]
    }

    /// Where a parameter lies in the whole.
    pub fn param(&self, param: usize) -> Range<usize> {
        self.starts[param]..self.starts[param + 1]
    }

    /// Where a rank's shard lies in the whole.
    pub fn shard(&self, rank: usize) -> Range<usize> {
        let (each, longer) = (self.total() / self.world_size, self.total() % self.world_size);
        let start = |r: usize| r * each + r.min(longer);
        start(rank)..start(rank + 1)
    }

    /// Elements of each rank's shard.
    pub fn counts(&self) -> Vec<usize> {
        (0..self.world_size).map(|rank| self.shard(rank).len()).collect()
    }

    /// The parts of parameters in a rank's shard, in order.
    pub fn pieces(&self, rank: usize) -> Vec<Piece> {
        let shard = self.shard(rank);
        let first = self.starts.partition_point(|s| *s <= shard.start).saturating_sub(1);
        (first..self.starts.len() - 1)
            .map(|param| (param, self.param(param)))
            .take_while(|(_, whole)| whole.start < shard.end)
            .filter_map(|(param, whole)| {
                let (from, to) = (whole.start.max(shard.start), whole.end.min(shard.end));
                let elements = from.saturating_sub(whole.start)..to.saturating_sub(whole.start);
                (from < to).then(|| Piece { param, elements, at: from - shard.start })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn one_rank_keeps_everything_in_order() {
        let plan = ShardPlan::new([3, 0, 2], 1);
        assert_eq!(plan.counts(), [5]);
        let piece = |param, elements, at| Piece { param, elements, at };
        assert_eq!(plan.pieces(0), [piece(0, 0..3, 0), piece(2, 0..2, 3)]);
        assert_eq!(plan.param(2), 3..5);
    }

    proptest! {
        #[test]
        fn shards_are_even_and_cover_everything_once(
            lens in proptest::collection::vec(0usize..40, 0..12),
            world_size in 1usize..9,
        ) {
            let plan = ShardPlan::new(lens.iter().copied(), world_size);
            let counts = plan.counts();
            prop_assert_eq!(counts.iter().sum::<usize>(), lens.iter().sum::<usize>());
            prop_assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);

            let mut seen = Vec::new();
            for (rank, count) in counts.into_iter().enumerate() {
                let mut at = 0;
                for piece in plan.pieces(rank) {
                    prop_assert_eq!(piece.at, at);
                    prop_assert!(!piece.elements.is_empty());
                    at += piece.elements.len();
                    seen.extend(piece.elements.map(|i| (piece.param, i)));
                }
                prop_assert_eq!(at, count);
            }
            let all: Vec<_> = lens.iter().enumerate().flat_map(|(p, len)| (0..*len).map(move |i| (p, i))).collect();
            prop_assert_eq!(seen, all);
        }
    }
}
