//! Dispatch of tokens to their experts' rows, and the combination back to tokens.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::chunk_rows;
use super::route::Routing;
use super::simd::{axpy, dot, simd};
use super::tensor::Tensor;

/// A stable counting sort of the routed rows (t, k) by expert. The slot of (t, k) is t·K + k.
pub struct Dispatch {
    /// Row offsets: expert `e` has sorted rows `offsets[e]..offsets[e + 1]`; `[E + 1]`.
    pub(super) offsets: Vec<usize>,
    /// Sorted row of each slot, `[T·K]`.
    row_of: Vec<u32>,
    /// Slot of each sorted row, `[R]`.
    slot_of: Vec<u32>,
    top_k: usize,
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
        Self { offsets, row_of, slot_of, top_k }
    }

    /// All rows in one group, in their order. For grouped products only: the rows belong to no tokens.
    pub(super) fn single_expert_dispatch(rows: usize) -> Self {
        Self { offsets: vec![0, rows], row_of: Vec::new(), slot_of: Vec::new(), top_k: 1 }
    }

    pub(super) fn tokens_per_expert(&self) -> Vec<usize> {
        self.offsets.windows(2).map(|w| w[1] - w[0]).collect()
    }

    fn tokens(&self) -> usize {
        self.row_of.len() / self.top_k
    }
}

pub(super) fn dispatch_rows(cpu: &Cpu, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    let d = x.cols();
    x.expect_shape("x to be dispatched", dispatch.tokens(), d);
    let mut y = cpu.pool.take(dispatch.slot_of.len(), d);
    y.values_mut()
        .par_chunks_mut(d)
        .zip(&dispatch.slot_of)
        .with_min_len(chunk_rows(d))
        .for_each(|(row, &slot)| row.copy_from_slice(x.row(slot as usize / dispatch.top_k)));
    y
}

/// `y[t] = Σ_k x[row of (t, k)]`, k ascending.
pub(super) fn combine_rows(cpu: &Cpu, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    let (d, k) = (x.cols(), dispatch.top_k);
    x.expect_shape("x to be combined", dispatch.row_of.len(), d);
    let mut y = cpu.pool.take(dispatch.tokens(), d);
    y.values_mut().par_chunks_mut(d).enumerate().with_min_len(chunk_rows(d * k)).for_each(|(t, y)| {
        simd!({
            y.fill(0.0);
            for &row in &dispatch.row_of[t * k..(t + 1) * k] {
                axpy(y, 1.0, x.row(row as usize));
            }
        });
    });
    y
}

/// `y[row of (t, k)] = weight(t, k) · x[row of (t, k)]`.
pub(super) fn weight_rows(cpu: &Cpu, x: &Tensor, routing: &Routing, dispatch: &Dispatch) -> Tensor {
    let f = x.cols();
    routing.weights.expect_shape("routing weights", dispatch.tokens(), dispatch.top_k);
    x.expect_shape("x to be weighted", dispatch.slot_of.len(), f);
    let mut y = cpu.pool.take(x.rows(), f);
    let rows = y.values_mut().par_chunks_mut(f).zip(x.values().par_chunks(f)).zip(&dispatch.slot_of);
    rows.with_min_len(chunk_rows(f)).for_each(|((y, x), &slot)| {
        let weight = routing.weights.values()[slot as usize];
        simd!({
            for (y, x) in y.iter_mut().zip(x) {
                *y = weight * x;
            }
        });
    });
    y
}

/// With r = row of (t, k): `dx[r] = weight(t, k) · dy[r]`, `dweight(t, k) = ⟨dy[r], x[r]⟩`.
pub(super) fn weight_rows_backward(
    cpu: &Cpu,
    dy: &Tensor,
    x: &Tensor,
    routing: &Routing,
    dispatch: &Dispatch,
) -> (Tensor, Tensor) {
    let f = x.cols();
    dy.expect_shape("dy of weighted rows", x.rows(), f);
    let dx = weight_rows(cpu, dy, routing, dispatch);
    let mut dweights = cpu.pool.take(dispatch.tokens(), dispatch.top_k);
    let slots = dweights.values_mut().par_iter_mut().zip(&dispatch.row_of);
    slots.with_min_len(chunk_rows(f)).for_each(|(dw, &row)| {
        *dw = simd!(dot(dy.row(row as usize), x.row(row as usize))) as f32;
    });
    (dx, dweights)
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
