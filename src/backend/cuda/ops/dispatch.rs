//! Routed rows sorted by expert, to the experts and back. The sort runs on the GPU and nothing waits for its counts.

use std::ops::Range;
use std::sync::OnceLock;

use super::row_grid;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::{Grid, Kernel};
use crate::backend::cuda::kernels::{Typed, kernel, typed};
use crate::backend::cuda::ops::rows::gather;
use crate::backend::cuda::tensor::RowOrder;
use crate::backend::cuda::{Cuda, Dispatch, Routing, Tensor};

const COUNT: Kernel = kernel!(DISPATCH, "dispatch_count");
const SCAN_CHUNKS: Kernel = kernel!(DISPATCH, "dispatch_scan_chunks");
const SCAN_EXPERTS: Kernel = kernel!(DISPATCH, "dispatch_scan_experts");
const PLACE: Kernel = kernel!(DISPATCH, "dispatch_place");
const COMBINE: Typed = typed!(DISPATCH, "combine_rows");
const WEIGHT: Typed = typed!(DISPATCH, "weight_rows");
const WEIGHT_BACKWARD: Typed = typed!(DISPATCH, "weight_rows_backward");
/// Slots of a block of the sort.
const CHUNK: usize = 256;

/// Sorts the routed rows by expert, stably.
pub fn dispatch(cuda: &Cuda, routing: &Routing, num_experts: usize) -> Dispatch {
    let known = routing.probabilities.cols();
    assert!(known == num_experts, "routed among {known} experts, sorted into {num_experts}");
    let slots = routing.tokens() * routing.top_k();
    let chunks = slots.div_ceil(CHUNK);
    let counts = cuda.scratch(4 * num_experts * chunks);
    let offsets = cuda.scratch(4 * (num_experts + 1));
    let (row_of, slot_of) = (cuda.scratch(4 * slots), cuda.scratch(4 * slots));
    let (ids, counts_at, offsets_at) = (routing.ids.address(), counts.address(), offsets.address());
    let experts = num_experts as u32;

    let args = [ids.into(), counts_at.into(), slots.into(), experts.into()];
    cuda.launch(&COUNT, Grid::row(chunks, CHUNK as u32).shared(4 * num_experts), &args);
    let args = [counts_at.into(), offsets_at.into(), (chunks as u32).into()];
    cuda.launch(&SCAN_CHUNKS, Grid::row(num_experts, 32), &args);
    cuda.launch(&SCAN_EXPERTS, Grid::row(1, 32), &[offsets_at.into(), experts.into()]);
    let args = [
        ids.into(),
        counts_at.into(),
        offsets_at.into(),
        row_of.address().into(),
        slot_of.address().into(),
        slots.into(),
    ];
    cuda.launch(&PLACE, Grid::row(chunks, CHUNK as u32), &args);
    let order = Some(RowOrder { row_of, slot_of });
    Dispatch { rows: slots, num_experts, top_k: routing.top_k(), offsets, host_offsets: OnceLock::new(), order }
}

/// All rows in one group, in their order. For grouped products only: there are no tokens behind these rows.
pub fn one_group(cuda: &Cuda, rows: usize) -> Dispatch {
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

/// x copied to the sorted rows.
pub fn dispatch_rows(cuda: &Cuda, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    x.expect_shape("x to be dispatched", dispatch.tokens(), x.cols());
    let y = cuda.tensor(dispatch.rows, x.cols(), x.dtype());
    let slots = dispatch.order().slot_of.address();
    gather(cuda, x.address(), slots, dispatch.top_k as u32, y.address(), y.rows(), y.cols(), y.dtype());
    y
}

/// `y[t] = Σ_k x[row of (t, k)]`, k ascending.
pub fn combine_rows(cuda: &Cuda, x: &Tensor, dispatch: &Dispatch) -> Tensor {
    x.expect_shape("x to be combined", dispatch.rows, x.cols());
    let y = cuda.tensor(dispatch.tokens(), x.cols(), x.dtype());
    let args = [
        x.address().into(),
        dispatch.order().row_of.address().into(),
        y.address().into(),
        (dispatch.top_k as u32).into(),
        x.cols().into(),
    ];
    cuda.launch(COMBINE.of(x.dtype()), row_grid(y.rows(), y.cols(), y.dtype()), &args);
    y
}

fn check(x: &Tensor, routing: &Routing, dispatch: &Dispatch) {
    routing.weights.expect_shape("routing weights", dispatch.tokens(), dispatch.top_k);
    x.expect_shape("x to be weighted", dispatch.rows, x.cols());
}

/// Every routed row times its own routing weight.
pub fn weight_rows(cuda: &Cuda, x: &Tensor, routing: &Routing, dispatch: &Dispatch) -> Tensor {
    check(x, routing, dispatch);
    let y = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let args = [
        x.address().into(),
        routing.weights.address().into(),
        dispatch.order().slot_of.address().into(),
        y.address().into(),
        x.cols().into(),
    ];
    cuda.launch(WEIGHT.of(x.dtype()), row_grid(x.rows(), x.cols(), x.dtype()), &args);
    y
}

/// (dx, d routing weights F32 `[T, K]`)
pub fn weight_rows_backward(
    cuda: &Cuda,
    dy: &Tensor,
    x: &Tensor,
    routing: &Routing,
    dispatch: &Dispatch,
) -> (Tensor, Tensor) {
    check(x, routing, dispatch);
    dy.expect_shape("dy of the weighted rows", x.rows(), x.cols());
    let dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let dweights = cuda.tensor(dispatch.tokens(), dispatch.top_k, Dtype::F32);
    let args = [
        dy.address().into(),
        x.address().into(),
        routing.weights.address().into(),
        dispatch.order().slot_of.address().into(),
        dx.address().into(),
        dweights.address().into(),
        x.cols().into(),
    ];
    cuda.launch(WEIGHT_BACKWARD.of(x.dtype()), row_grid(x.rows(), x.cols(), x.dtype()), &args);
    (dx, dweights)
}
