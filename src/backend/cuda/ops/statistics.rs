//! Sums for the router objective and the reports, in f64 and a fixed order.

use std::ops::Range;

use super::{flat_grid, row_grid};
use crate::backend::Dtype;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::launch::{In, Out};
use crate::backend::cuda::ops::elements::in_dtype;
use crate::backend::cuda::{Cuda, Tensor, kernels};

/// Rows per partial sum, as in `statistics.cu`.
const ROWS: usize = 64;

/// `into[c] = Σ over rows of x[row, c]`, or of its softmax; x F32 `[rows, cols]`.
fn sum_rows(cuda: &Cuda, x: In<'_, f32>, rows: usize, cols: usize, softmax: bool, into: Out<'_, f64>) {
    let chunks = rows.div_ceil(ROWS);
    let mut partial = cuda.array::<f64>(chunks * cols);
    kernels::sum_rows(cuda, Grid::row(chunks, 256), x, partial.output(), rows, cols, softmax);
    kernels::sum_partials(cuda, flat_grid(cols, 1), partial.input(), into, chunks, cols);
}

fn check_rows(x: &Tensor, rows: &Range<usize>) {
    assert!(rows.start <= rows.end && rows.end <= x.rows(), "rows {rows:?} of {}", x.rows());
}

/// Σ over `rows` of softmax(logits).
pub fn softmax_sum(cuda: &Cuda, logits: &Tensor, rows: Range<usize>) -> Vec<f64> {
    check_rows(logits, &rows);
    let e = logits.cols();
    let x = in_dtype(cuda, logits, Dtype::F32);
    let mut sums = cuda.array::<f64>(e);
    sum_rows(cuda, x.input().of().skip(rows.start * e), rows.len(), e, true, sums.output());
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
    let grid = Grid::row(rows.len().div_ceil(4), 128);
    let (x, dlogits) = (x.input().of().skip(rows.start * e), dlogits.inout().of().skip(rows.start * e));
    kernels::softmax_sum_backward(cuda, grid, dy.input(), x, dlogits, rows.len(), e);
}

/// Σ of the rows of each segment.
pub fn segment_sum(cuda: &Cuda, x: &Tensor, segments: &[Range<usize>]) -> Vec<f64> {
    let cols = x.cols();
    let values = in_dtype(cuda, x, Dtype::F32);
    let mut sums = cuda.array::<f64>(segments.len() * cols);
    for (i, rows) in segments.iter().enumerate() {
        check_rows(x, rows);
        let from = values.input().of().skip(rows.start * cols);
        sum_rows(cuda, from, rows.len(), cols, false, sums.output().skip(i * cols));
    }
    cuda.copy_out(sums.address(), segments.len() * cols)
}

/// `dx[row] += dy[segment of row]`, one segment after another, since segments may overlap.
pub fn segment_sum_backward(cuda: &Cuda, dy: &[f32], segments: &[Range<usize>], dx: &mut Tensor) {
    let cols = dx.cols();
    assert!(dy.len() == segments.len() * cols, "dy of {} for {} segments of {cols}", dy.len(), segments.len());
    let dy = cuda.uploaded(dy);
    for (i, rows) in segments.iter().enumerate() {
        check_rows(dx, rows);
        let grid = row_grid(rows.len(), cols, dx.dtype());
        let dx = dx.inout().skip(rows.start * cols);
        kernels::segment_sum_backward(cuda, grid, dy.input().skip(i * cols), dx, cols);
    }
}
