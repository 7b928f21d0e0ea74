//! How attention is split: a task for each sequence and key head, and in it blocks of queries with the keys that they attend to.

use std::ops::Range;

use super::rope::Sequences;
use crate::backend::Heads;

/// Query rows per block: four AVX-512 vectors.
pub(super) const BLOCK: usize = 64;

/// One (sequence, key head).
pub(super) struct Task {
    /// The sequence's query rows.
    pub(super) queries: Range<usize>,
    /// The sequence's key rows.
    pub(super) keys: Range<usize>,
    pub(super) key_head: usize,
}

/// A block of queries of one sequence.
pub(super) struct Block {
    /// Query rows, relative to the sequence's first query.
    pub(super) rows: Range<usize>,
    /// Keys that some row attends to, relative to the sequence's first key.
    pub(super) keys: Range<usize>,
    /// Position of the block's first row in the sequence.
    pub(super) position: usize,
    /// Size of the sliding window; `usize::MAX` without one.
    pub(super) window: usize,
}

impl Task {
    /// All tasks, the most expensive first, so that no long one starts last.
    pub(super) fn all(seqs: &Sequences, heads: &Heads) -> Vec<Task> {
        let p = &seqs.packing;
        let mut tasks: Vec<Task> = (0..p.len())
            .flat_map(|s| {
                (0..heads.keys).map(move |key_head| Task {
                    queries: p.queries[s]..p.queries[s + 1],
                    keys: p.keys[s]..p.keys[s + 1],
                    key_head,
                })
            })
            .filter(|t| !t.keys.is_empty())
            .collect();
        for t in &tasks {
            assert!(t.queries.len() <= t.keys.len(), "{} queries, but only {} keys", t.queries.len(), t.keys.len());
        }
        tasks.sort_by_key(|t| std::cmp::Reverse(t.queries.len() * t.keys.len()));
        tasks
    }

    pub(super) fn blocks(&self, heads: &Heads) -> impl Iterator<Item = Block> {
        let (n, first_position) = (self.queries.len(), self.keys.len() - self.queries.len());
        let window = heads.window.unwrap_or(usize::MAX);
        assert!(window > 0, "a sliding window of 0 positions");
        (0..n).step_by(BLOCK).map(move |start| {
            let rows = start..n.min(start + BLOCK);
            let position = first_position + start;
            Block { keys: (position + 1).saturating_sub(window)..first_position + rows.end, rows, position, window }
        })
    }
}

impl Block {
    /// Rows, relative to the block, that attend to key `j`.
    #[inline(always)]
    pub(super) fn rows_of_key(&self, j: usize) -> Range<usize> {
        let first = j.saturating_sub(self.position);
        let end = j.saturating_add(self.window).saturating_sub(self.position).min(self.rows.len());
        first..end.max(first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_attend_to_the_keys_of_the_definition() {
        for (queries, keys, window) in
            [(5, 5, None), (130, 130, Some(3)), (70, 200, Some(64)), (1, 90, None), (3, 9, Some(1))]
        {
            let heads = Heads { queries: 1, keys: 1, dim: 2, window };
            let task = Task { queries: 0..queries, keys: 0..keys, key_head: 0 };
            let mut rows = 0;
            for block in task.blocks(&heads) {
                assert_eq!(block.rows.start, rows);
                rows = block.rows.end;
                for i in block.rows.clone() {
                    let position = keys - queries + i;
                    for j in 0..keys {
                        let want = j <= position && window.is_none_or(|w| position - j < w);
                        let got = block.keys.contains(&j) && block.rows_of_key(j).contains(&(i - block.rows.start));
                        assert_eq!(got, want, "query {i} of {queries}, key {j} of {keys}, window {window:?}");
                    }
                }
            }
            assert_eq!(rows, queries);
        }
    }
}
