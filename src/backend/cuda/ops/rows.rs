//! Embedding lookup, gathered rows and written rows.

use super::row_grid;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::launch::{Any, In};
use crate::backend::cuda::ops::elements::cast;
use crate::backend::cuda::{Buffer, Cuda, Indices, Tensor, Weight, kernels};

/// `y[i] = x[index[i] / divide]`: `n` rows of `cols` elements.
pub fn gather(cuda: &Cuda, x: In<'_, Any>, index: In<'_, u32>, divide: u32, n: usize, cols: usize) -> Tensor {
    let mut y = cuda.tensor(n, cols, x.dtype());
    let (grid, bytes) = (row_grid(n, cols, x.dtype()), cols * x.dtype().size());
    kernels::gather_rows(cuda, grid, x.bytes(), index, divide, y.output().bytes(), bytes);
    y
}

/// Rows `ids` of w, in the compute type.
pub fn embedding(cuda: &Cuda, ids: &Indices, w: &Weight) -> Tensor {
    check_range(ids, w.rows(), "token id");
    let (n, d) = (ids.len(), w.cols());
    let rows = gather(cuda, w.input(), ids.input(), 1, n, d);
    if w.dtype() == cuda.compute() {
        return rows;
    }
    let mut y = cuda.tensor(n, d, cuda.compute());
    cast(cuda, rows.input(), y.output(), n * d);
    y
}

/// dw += dy at the rows `ids`, in the order of the tokens.
pub fn embedding_backward(cuda: &Cuda, dy: &Tensor, ids: &Indices, dw: &mut Buffer, offset: usize) {
    let d = dy.cols();
    dy.expect_shape("dy of the embedding", ids.len(), d);
    let Some(&highest) = ids.host.iter().max() else { return };
    // Group the tokens by id with a stable sort on the host, which has the ids.
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids.host[t as usize]);
    let mut starts = vec![0u32];
    for same in order.chunk_by(|&a, &b| ids.host[a as usize] == ids.host[b as usize]) {
        starts.push(starts[starts.len() - 1] + same.len() as u32);
    }
    let grid = row_grid(starts.len() - 1, d, Dtype::F32);
    let (order, starts) = (cuda.uploaded(&order), cuda.uploaded(&starts));
    let dw = dw.inout(offset, (highest as usize + 1) * d);
    kernels::embedding_backward(cuda, grid, dy.input(), ids.input(), order.input(), starts.input(), dw, d);
}

/// Rows `rows` of x.
pub fn gather_rows(cuda: &Cuda, x: &Tensor, rows: &Indices) -> Tensor {
    check_range(rows, x.rows(), "row");
    gather(cuda, x.input(), rows.input(), 1, rows.len(), x.cols())
}

/// `dx[rows[i]] += dy[i]` for distinct rows.
pub fn gather_rows_backward(cuda: &Cuda, dy: &Tensor, rows: &Indices, dx: &mut Tensor) {
    dy.expect_shape("dy of gathered rows", rows.len(), dx.cols());
    check_range(rows, dx.rows(), "row");
    assert!(dy.dtype() == dx.dtype(), "dy in {:?}, dx in {:?}", dy.dtype(), dx.dtype());
    let (grid, cols) = (row_grid(rows.len(), dx.cols(), dx.dtype()), dx.cols());
    kernels::add_rows(cuda, grid, dx.inout(), rows.input(), dy.input(), cols);
}

/// `x[rows[i]] = y[i]` for distinct rows.
pub fn write_rows(cuda: &Cuda, x: &mut Tensor, rows: &Indices, y: &Tensor) {
    y.expect_shape("y of written rows", rows.len(), x.cols());
    check_range(rows, x.rows(), "row");
    assert!(x.dtype() == y.dtype(), "writing {:?} into {:?}", y.dtype(), x.dtype());
    let (grid, bytes) = (row_grid(rows.len(), x.cols(), x.dtype()), x.cols() * x.dtype().size());
    kernels::write_rows(cuda, grid, x.inout().bytes(), rows.input(), y.input().bytes(), bytes);
}

/// See [`crate::backend::Backend::fill_columns`].
pub fn fill_columns(cuda: &Cuda, x: &mut Tensor, columns: &Indices, value: f32) {
    check_range(columns, x.cols(), "column");
    if columns.is_empty() {
        return;
    }
    let (rows, cols) = (x.rows(), x.cols());
    kernels::fill_columns(cuda, Grid::row(rows, 32), x.inout(), columns.input(), columns.len(), cols, value);
}

/// Kernels do not check indices; the host has them, so it does.
fn check_range(ids: &Indices, end: usize, what: &str) {
    let bad = ids.host.iter().find(|&&id| id as usize >= end);
    assert!(bad.is_none(), "{what} {} of {end}", bad.unwrap_or(&0));
}
