//! Sums that the router objective and the reports are made of, in f64 and a fixed order.

use std::ops::Range;

use super::{flat_grid, row_grid};
use crate::backend::Dtype;
use crate::backend::cuda::gpu::{Address, Grid, Kernel};
use crate::backend::cuda::kernels::{Typed, kernel, typed};
use crate::backend::cuda::ops::elements::in_dtype;
use crate::backend::cuda::{Cuda, Tensor};

const SUM_ROWS: Kernel = kernel!(STATISTICS, "sum_rows");
const SUM_PARTIALS: Kernel = kernel!(STATISTICS, "sum_partials");
const SOFTMAX_BACKWARD: Kernel = kernel!(STATISTICS, "softmax_sum_backward");
const SEGMENT_BACKWARD: Typed = typed!(STATISTICS, "segment_sum_backward");
/// Rows of a partial sum, as in `statistics.cu`.
const ROWS: usize = 64;

/// `into[c] = Σ over rows of x[row, c]`, or of its softmax; x F32 `[rows, cols]`.
fn sum_rows(cuda: &Cuda, x: Address, rows: usize, cols: usize, softmax: bool, into: Address) {
    let chunks = rows.div_ceil(ROWS);
    let partial = cuda.scratch(8 * chunks * cols);
    let args = [x.into(), partial.address().into(), rows.into(), cols.into(), i32::from(softmax).into()];
    cuda.launch(&SUM_ROWS, Grid::row(chunks, 256), &args);
    let args = [partial.address().into(), into.into(), chunks.into(), cols.into()];
    cuda.launch(&SUM_PARTIALS, flat_grid(cols, 1), &args);
}

fn check_rows(x: &Tensor, rows: &Range<usize>) {
    assert!(rows.start <= rows.end && rows.end <= x.rows(), "rows {rows:?} of {}", x.rows());
}

/// Σ over `rows` of softmax(logits).
pub fn softmax_sum(cuda: &Cuda, logits: &Tensor, rows: Range<usize>) -> Vec<f64> {
    check_rows(logits, &rows);
    let e = logits.cols();
    let x = in_dtype(cuda, logits, Dtype::F32);
    let sums = cuda.scratch(8 * e);
    sum_rows(cuda, x.address().offset(4 * rows.start * e), rows.len(), e, true, sums.address());
    cuda.copy_out(sums.address(), e)
}

/// `dlogits[rows]` += the gradient through softmax of `dy`.
pub fn softmax_sum_backward(cuda: &Cuda, dy: &[f32], logits: &Tensor, rows: Range<usize>, dlogits: &mut Tensor) {
    let e = logits.cols();
    assert!(dy.len() == e, "dy of {} for {e} experts", dy.len());
    check_rows(logits, &rows);
    dlogits.expect_shape("dlogits", logits.rows(), e);
    assert!(dlogits.dtype() == Dtype::F32, "gradients of router logits are F32");
    let x = in_dtype(cuda, logits, Dtype::F32);
    let dy = cuda.uploaded(dy);
    let args = [
        dy.address().into(),
        x.address().offset(4 * rows.start * e).into(),
        dlogits.row(rows.start).into(),
        rows.len().into(),
        e.into(),
    ];
    cuda.launch(&SOFTMAX_BACKWARD, Grid::row(rows.len().div_ceil(4), 128), &args);
}

/// Σ of the rows of each segment.
pub fn segment_sum(cuda: &Cuda, x: &Tensor, segments: &[Range<usize>]) -> Vec<f64> {
    let cols = x.cols();
    let values = in_dtype(cuda, x, Dtype::F32);
    let sums = cuda.scratch(8 * segments.len() * cols);
    for (i, rows) in segments.iter().enumerate() {
        check_rows(x, rows);
        let from = values.address().offset(4 * rows.start * cols);
        sum_rows(cuda, from, rows.len(), cols, false, sums.address().offset(8 * i * cols));
    }
    cuda.copy_out(sums.address(), segments.len() * cols)
}

/// `dx[row] += dy[segment of row]`, one segment after another: they may overlap.
pub fn segment_sum_backward(cuda: &Cuda, dy: &[f32], segments: &[Range<usize>], dx: &mut Tensor) {
    let cols = dx.cols();
    assert!(dy.len() == segments.len() * cols, "dy of {} for {} segments of {cols}", dy.len(), segments.len());
    let dy = cuda.uploaded(dy);
    for (i, rows) in segments.iter().enumerate() {
        check_rows(dx, rows);
        let args = [dy.address().offset(4 * i * cols).into(), dx.row(rows.start).into(), cols.into()];
        cuda.launch(SEGMENT_BACKWARD.of(dx.dtype()), row_grid(rows.len(), cols, dx.dtype()), &args);
    }
}
