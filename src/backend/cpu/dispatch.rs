//! Dispatch of tokens to their experts' rows, and the combination back to tokens.

use std::sync::Arc;

use half::bf16;
use rayon::prelude::*;

use super::Cpu;
use super::element::{Element, by_element};
use super::parallel::{CHUNK, chunk_rows};
use super::simd::simd;
use super::tensor::Tensor;
use crate::backend::Dtype;

/// A stable counting sort of the routed rows (t, k) by expert. The slot of (t, k) is t·K + k.
pub struct Dispatch {
    /// Row offsets: expert `e` has sorted rows `offsets[e]..offsets[e + 1]`; `[E + 1]`.
    pub(super) offsets: Vec<usize>,
    /// Sorted row of each slot, `[T·K]`.
    row_of: Vec<u32>,
    /// Slot of each sorted row, `[R]`.
    pub(super) slot_of: Vec<u32>,
    /// Token of each sorted row, `[R]`.
    token_of: Arc<[u32]>,
    pub(super) top_k: usize,
    /// Whether all rows are in one group, in their order.
    pub(super) single: bool,
}

impl Dispatch {
    pub(super) fn new(ids: &[u32], top_k: usize, num_experts: usize) -> Self {
        let mut offsets = vec![0; num_experts + 1];
        for &id in ids {
            assert!((id as usize) < num_experts, "expert {id} of {num_experts}");
            offsets[id as usize + 1] += 1;
        }
        for e in 0..num_experts {
            offsets[e + 1] += offsets[e];
        }
        let mut next = offsets.clone();
        let mut slot_of = vec![0; ids.len()];
        let row_of = (0u32..)
            .zip(ids)
            .map(|(slot, &id)| {
                let row = next[id as usize];
                next[id as usize] += 1;
                slot_of[row] = slot;
                row as u32
            })
            .collect();
        let token_of = slot_of.iter().map(|&slot| slot / top_k as u32).collect();
        Self { offsets, row_of, slot_of, token_of, top_k, single: false }
    }

    /// All rows in one group, in their order. For grouped products only: the rows belong to no tokens.
    pub(super) fn single_expert_dispatch(rows: usize) -> Self {
        Self {
            offsets: vec![0, rows],
            row_of: Vec::new(),
            slot_of: Vec::new(),
            token_of: [].into(),
            top_k: 1,
            single: true,
        }
    }

    pub(super) fn tokens_per_expert(&self) -> Vec<usize> {
        self.offsets.windows(2).map(|w| w[1] - w[0]).collect()
    }

    pub(super) fn tokens(&self) -> usize {
        self.row_of.len() / self.top_k
    }
}

/// Each token's row of x, once for each of its experts. In bf16 where products are of bf16 values, which then read the rows of
/// the tokens themselves, so that nothing is copied but the rounded values.
pub(super) fn dispatch_rows(cpu: &Cpu, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    let d = x.cols();
    x.expect_shape("x to be dispatched", dispatch.tokens(), d);
    if cpu.products().is_some() {
        let mut rounded = cpu.pool.take_as(Dtype::Bf16, x.rows(), d);
        let parts = rounded.stored_mut::<bf16>().par_chunks_mut(CHUNK).zip(x.values().par_chunks(CHUNK));
        parts.for_each(|(rounded, x)| simd!(Element::store(x, rounded)));
        return rounded.with_index(dispatch.token_of.clone());
    }
    let mut y = cpu.pool.take(dispatch.token_of.len(), d);
    y.values_mut()
        .par_chunks_mut(d)
        .zip(&*dispatch.token_of)
        .with_min_len(chunk_rows(d))
        .for_each(|(row, &token)| row.copy_from_slice(x.row(token as usize)));
    y
}

/// `y[t] = Σ_k x[row of (t, k)]`, k ascending, in f32.
pub(super) fn combine_rows(cpu: &Cpu, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    fn combine<E: Element>(x: &Tensor, dispatch: &Dispatch, y: &mut Tensor) {
        let (d, k, index, x) = (x.cols(), dispatch.top_k, x.index(), x.stored::<E>());
        y.values_mut().par_chunks_mut(d).enumerate().with_min_len(chunk_rows(d * k)).for_each(|(t, y)| {
            simd!({
                y.fill(0.0);
                for &row in &dispatch.row_of[t * k..(t + 1) * k] {
                    let row = index.map_or(row, |index| index[row as usize]);
                    for (y, x) in y.iter_mut().zip(&x[row as usize * d..][..d]) {
                        *y += x.get();
                    }
                }
            });
        });
    }
    x.expect_shape("x to be combined", dispatch.row_of.len(), x.cols());
    let mut y = cpu.pool.take(dispatch.tokens(), x.cols());
    by_element!(x.dtype(), combine(x, dispatch, &mut y));
    y
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn the_sort_is_a_stable_permutation(
            top_k in 1usize..5,
            tokens in 0usize..60,
            num_experts in 1usize..20,
            seed in proptest::collection::vec(any::<u32>(), 240),
        ) {
            let ids: Vec<u32> = seed[..top_k * tokens].iter().map(|x| x % num_experts as u32).collect();
            let d = Dispatch::new(&ids, top_k, num_experts);
            prop_assert_eq!(d.offsets[0], 0);
            prop_assert_eq!(d.offsets[num_experts], ids.len());
            for (slot, &row) in d.row_of.iter().enumerate() {
                prop_assert_eq!(d.slot_of[row as usize] as usize, slot);
            }
            for (e, range) in d.offsets.windows(2).enumerate() {
                let slots = &d.slot_of[range[0]..range[1]];
                prop_assert!(slots.is_sorted(), "expert {} keeps the order of its tokens", e);
                prop_assert!(slots.iter().all(|&s| ids[s as usize] as usize == e));
            }
            prop_assert_eq!(d.tokens_per_expert().iter().sum::<usize>(), ids.len());
        }
    }
}
