//! Sorts routed rows by expert, and moves rows to the experts and back. The sort runs on the GPU, and the host does not
//! wait for it.

use std::ops::Range;
use std::sync::OnceLock;

use super::row_grid;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::launch::OrNull;
use crate::backend::cuda::ops::rows::gather;
use crate::backend::cuda::tensor::RowOrder;
use crate::backend::cuda::{Cuda, Dispatch, Routing, Tensor, kernels};

/// Slots per block of the sort, as in `dispatch.cu`.
const CHUNK: usize = 256;

/// Sorts the routed rows by expert, stably.
pub fn dispatch(cuda: &Cuda, routing: &Routing, num_experts: usize) -> Dispatch {
    let known = routing.probabilities.cols();
    assert!(known == num_experts, "routed among {known} experts, sorted into {num_experts}");
    let slots = routing.tokens() * routing.top_k();
    let chunks = slots.div_ceil(CHUNK);
    let mut counts = cuda.array::<u32>(num_experts * chunks);
    let mut offsets = cuda.array::<u32>(num_experts + 1);
    let (mut row_of, mut slot_of) = (cuda.array::<u32>(slots), cuda.array::<u32>(slots));
    let (ids, experts, grid) = (routing.ids.input(), num_experts as u32, Grid::row(chunks, CHUNK as u32));

    kernels::dispatch_count(cuda, grid.shared(4 * num_experts), ids, counts.output(), slots, experts);
    let by_expert = Grid::row(num_experts, 32);
    kernels::dispatch_scan_chunks(cuda, by_expert, counts.inout(), offsets.output(), chunks as u32);
    kernels::dispatch_scan_experts(cuda, Grid::row(1, 32), offsets.inout(), experts);
    let (counts, starts) = (counts.input(), offsets.input());
    kernels::dispatch_place(cuda, grid, ids, counts, starts, row_of.output(), slot_of.output(), slots);
    let order = Some(RowOrder { row_of, slot_of });
    Dispatch { rows: slots, num_experts, top_k: routing.top_k(), offsets, host_offsets: OnceLock::new(), order }
}

/// All rows in one group, in their order. For grouped products only: these rows do not belong to tokens.
pub fn single_expert_dispatch(cuda: &Cuda, rows: usize) -> Dispatch {
    let end = u32::try_from(rows).expect("fewer than 2^32 rows");
    let (offsets, host_offsets) = (cuda.uploaded(&[0, end]), vec![0, end].into());
    Dispatch { rows, num_experts: 1, top_k: 1, offsets, host_offsets, order: None }
}

/// The sorted rows of each expert. The first call for a dispatch waits for the sort.
pub fn group_rows(cuda: &Cuda, dispatch: &Dispatch) -> Vec<Range<usize>> {
    let read = || cuda.copy_out(dispatch.offsets.address(), dispatch.num_experts + 1);
    dispatch.host_offsets.get_or_init(read).windows(2).map(|w| w[0] as usize..w[1] as usize).collect()
}

/// Routed rows of each expert; waits for the sort.
pub fn tokens_per_expert(cuda: &Cuda, dispatch: &Dispatch) -> Vec<usize> {
    group_rows(cuda, dispatch).into_iter().map(|rows| rows.len()).collect()
}

/// Copies each token's row of x to its sorted rows.
pub fn dispatch_rows(cuda: &Cuda, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    x.expect_shape("x to be dispatched", dispatch.tokens(), x.cols());
    gather(cuda, x.input(), dispatch.order().slot_of.input(), dispatch.top_k as u32, dispatch.rows, x.cols())
}

/// `y[t] = Σ_k x[row of (t, k)]`, k ascending.
pub fn combine_rows(cuda: &Cuda, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    x.expect_shape("x to be combined", dispatch.rows, x.cols());
    let mut y = cuda.tensor(dispatch.tokens(), x.cols(), x.dtype());
    let grid = row_grid(y.rows(), y.cols(), y.dtype());
    let row_of = dispatch.order().row_of.input();
    kernels::combine_rows(cuda, grid, x.input(), row_of, y.output(), dispatch.top_k as u32, x.cols());
    y
}

/// `y[t] = Σ_k x[row of (t, k)] + sigmoid(gate[t]) · shared[t] + residual[t]`, the second term if (shared, gate) are given.
pub fn combine_rows_onto(
    cuda: &Cuda,
    x: &Tensor,
    dispatch: &Dispatch,
    shared: Option<(&Tensor, &Tensor)>,
    residual: &Tensor,
) -> Tensor {
    let (rows, cols, dtype) = (dispatch.tokens(), x.cols(), x.dtype());
    x.expect_shape("x to be combined", dispatch.rows, cols);
    residual.expect_shape("the residual", rows, cols);
    if let Some((shared, gate)) = shared {
        shared.expect_shape("the shared expert's output", rows, cols);
        gate.expect_shape("its gate", rows, 1);
    }
    let mut y = cuda.tensor(rows, cols, dtype);
    let (shared, gate) = match shared {
        Some((shared, gate)) => (shared.input().into(), gate.input().into()),
        None => (OrNull::null(dtype), OrNull::null(dtype)),
    };
    kernels::combine_rows_onto(
        cuda,
        row_grid(rows, cols, dtype),
        x.input(),
        dispatch.order().row_of.input(),
        shared,
        gate,
        residual.input(),
        y.output(),
        dispatch.top_k as u32,
        cols,
    );
    y
}
