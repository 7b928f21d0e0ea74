//! Rows of the embedding, rows of activations by number, and rows appended.

use super::row_grid;
use crate::backend::cuda::gpu::{Address, Kernel};
use crate::backend::cuda::kernels::{Typed, kernel, typed};
use crate::backend::cuda::{Buffer, Cuda, Indices, Tensor, Weight};
use crate::backend::{Dtype, cuda::ops::elements::cast};

const GATHER: Kernel = kernel!(ROWS, "gather_rows");
const ADD_ROWS: Typed = typed!(ROWS, "add_rows");
const EMBEDDING_BACKWARD: Typed = typed!(ROWS, "embedding_backward");

/// `to[i] = from[index[i] / divide]` for `n` rows of `cols` elements of `dtype`.
#[allow(clippy::too_many_arguments)]
pub fn gather(
    cuda: &Cuda,
    from: Address,
    index: Address,
    divide: u32,
    to: Address,
    n: usize,
    cols: usize,
    dtype: Dtype,
) {
    let args = [from.into(), index.into(), divide.into(), to.into(), (cols * dtype.size()).into()];
    cuda.launch(&GATHER, row_grid(n, cols, dtype), &args);
}

/// Rows `ids` of w, in the compute type.
pub fn embedding(cuda: &Cuda, ids: &Indices, w: &Weight) -> Tensor {
    check_range(ids, w.rows(), "token id");
    let (n, d) = (ids.len(), w.cols());
    let rows = cuda.tensor(n, d, w.dtype());
    gather(cuda, w.address(), ids.address(), 1, rows.address(), n, d, w.dtype());
    if w.dtype() == cuda.compute() {
        return rows;
    }
    let y = cuda.tensor(n, d, cuda.compute());
    cast(cuda, rows.address(), w.dtype(), y.address(), y.dtype(), n * d);
    y
}

/// dw += dy at the rows `ids`, in the order of the tokens.
pub fn embedding_backward(cuda: &Cuda, dy: &Tensor, ids: &Indices, dw: &mut Buffer, offset: usize) {
    let d = dy.cols();
    dy.expect_shape("dy of the embedding", ids.len(), d);
    let Some(&highest) = ids.host.iter().max() else { return };
    // The tokens of each id, found by a stable sort on the host, where the ids came from.
    let mut order: Vec<u32> = (0..ids.len() as u32).collect();
    order.sort_by_key(|&t| ids.host[t as usize]);
    let mut starts = vec![0u32];
    for same in order.chunk_by(|&a, &b| ids.host[a as usize] == ids.host[b as usize]) {
        starts.push(starts[starts.len() - 1] + same.len() as u32);
    }
    let (order, starts_there) = (cuda.uploaded(&order), cuda.uploaded(&starts));
    let to = dw.at(offset, (highest as usize + 1) * d);
    let args = [
        dy.address().into(),
        ids.address().into(),
        order.address().into(),
        starts_there.address().into(),
        to.into(),
        d.into(),
    ];
    cuda.launch(EMBEDDING_BACKWARD.of(dy.dtype()), row_grid(starts.len() - 1, d, Dtype::F32), &args);
}

/// Rows `rows` of x.
pub fn gather_rows(cuda: &Cuda, x: &Tensor, rows: &Indices) -> Tensor {
    check_range(rows, x.rows(), "row");
    let y = cuda.tensor(rows.len(), x.cols(), x.dtype());
    gather(cuda, x.address(), rows.address(), 1, y.address(), y.rows(), y.cols(), y.dtype());
    y
}

/// `dx[rows[i]] += dy[i]` for distinct rows.
pub fn gather_rows_backward(cuda: &Cuda, dy: &Tensor, rows: &Indices, dx: &mut Tensor) {
    dy.expect_shape("dy of gathered rows", rows.len(), dx.cols());
    check_range(rows, dx.rows(), "row");
    assert!(dy.dtype() == dx.dtype(), "dy in {:?}, dx in {:?}", dy.dtype(), dx.dtype());
    let args = [dx.address().into(), rows.address().into(), dy.address().into(), dx.cols().into()];
    cuda.launch(ADD_ROWS.of(dx.dtype()), row_grid(rows.len(), dx.cols(), dx.dtype()), &args);
}

/// The rows of y below those of x. Memory at least doubles when it is too small, so that a growing key/value cache costs
/// amortised O(1) a row.
pub fn append_rows(cuda: &Cuda, x: &mut Tensor, y: &Tensor) {
    assert!(x.cols() == y.cols(), "appending rows of {} columns to rows of {}", y.cols(), x.cols());
    assert!(x.dtype() == y.dtype(), "appending {:?} to {:?}", y.dtype(), x.dtype());
    let row = x.cols() * x.dtype().size();
    let (old, new) = (x.rows() * row, (x.rows() + y.rows()) * row);
    if new > x.memory.bytes() {
        let grown = cuda.scratch(new.max(2 * old));
        cuda.copy(x.address(), grown.address(), old);
        x.memory = grown;
    }
    cuda.copy(y.address(), x.address().offset(old), new - old);
    x.rows += y.rows();
}

/// Kernels do not check; the numbers came from the host, so they are checked there.
fn check_range(ids: &Indices, end: usize, what: &str) {
    let bad = ids.host.iter().find(|&&id| id as usize >= end);
    assert!(bad.is_none(), "{what} {} of {end}", bad.unwrap_or(&0));
}
