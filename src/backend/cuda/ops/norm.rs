//! RMS norm over groups of columns.

use super::linear::add_column_sums;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::launch::{Any, In, OrNull, Out};
use crate::backend::cuda::ops::elements::weight_in;
use crate::backend::cuda::{Buffer, Cuda, Tensor, Weight, kernels};

/// Groups up to this many columns are reduced by a warp, as in `norm.cu`.
const WARP_GROUP: usize = 1024;

/// (groups, columns of a group)
fn groups(x: &Tensor, w: &Weight) -> (usize, usize) {
    let n = w.len();
    let fits = n > 0 && x.cols().is_multiple_of(n);
    assert!(fits, "x [{}, {}] does not consist of groups of {n}", x.rows(), x.cols());
    (x.len() / n, n)
}

fn grid(groups: usize, n: usize) -> Grid {
    Grid::row(if n <= WARP_GROUP { groups.div_ceil(8) } else { groups }, 256)
}

/// y = w · x / sqrt(mean(x²) + eps)
pub fn rms_norm(cuda: &Cuda, x: &Tensor, w: &Weight, eps: f32) -> Tensor {
    let (groups, n) = groups(x, w);
    let w = weight_in(cuda, w, x.dtype());
    let mut y = cuda.tensor(x.rows(), x.cols(), x.dtype());
    kernels::rms_norm(cuda, grid(groups, n), x.input(), w.input(), y.output(), groups, n, eps);
    y
}

/// x += y, then the norm of x.
pub fn add_rms_norm(cuda: &Cuda, x: &mut Tensor, y: &Tensor, w: &Weight, eps: f32) -> Tensor {
    let (groups, n) = groups(x, w);
    y.expect_shape("y to be added", x.rows(), x.cols());
    let w = weight_in(cuda, w, x.dtype());
    let mut normed = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let (grid, out) = (grid(groups, n), normed.output());
    kernels::add_rms_norm(cuda, grid, x.inout(), y.input(), w.input(), out, groups, n, eps);
    normed
}

/// dx; if `dw` is given, dw += Σ dy · x / sqrt(mean(x²) + eps) too.
pub fn backward(
    cuda: &Cuda,
    dy: &Tensor,
    x: &Tensor,
    w: &Weight,
    eps: f32,
    dw: Option<(&mut Buffer, usize)>,
) -> Tensor {
    let mut dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    run_backward(cuda, dy, x, w, dw, |grid, w, rs, groups, n| {
        kernels::rms_norm_backward(cuda, grid, dy.input(), x.input(), w, dx.output(), rs, groups, n, eps);
    });
    dx
}

/// The same, but the gradient is added to `dx`.
pub fn add_backward(
    cuda: &Cuda,
    dy: &Tensor,
    x: &Tensor,
    w: &Weight,
    eps: f32,
    dw: Option<(&mut Buffer, usize)>,
    dx: &mut Tensor,
) {
    dx.expect_shape("dx of the norm", x.rows(), x.cols());
    run_backward(cuda, dy, x, w, dw, |grid, w, rs, groups, n| {
        kernels::add_rms_norm_backward(cuda, grid, dy.input(), x.input(), w, dx.inout(), rs, groups, n, eps);
    });
}

/// Calls `launch` with the grid, w in x's format, the place of each group's factor if `dw` is given, the number of groups and their
/// columns; then adds to `dw`.
fn run_backward(
    cuda: &Cuda,
    dy: &Tensor,
    x: &Tensor,
    w: &Weight,
    dw: Option<(&mut Buffer, usize)>,
    launch: impl FnOnce(Grid, In<'_, Any>, OrNull<Out<'_, f32>>, usize, usize),
) {
    let (groups, n) = groups(x, w);
    dy.expect_shape("dy of the norm", x.rows(), x.cols());
    assert!(dy.dtype() == x.dtype(), "dy in {:?}, x in {:?}", dy.dtype(), x.dtype());
    let w = weight_in(cuda, w, x.dtype());
    let mut sink = dw.map(|(dw, offset)| (dw.inout(offset, n), cuda.array::<f32>(groups)));
    let rs = sink.as_mut().map_or(OrNull::null(()), |(_, rs)| rs.output().into());
    launch(grid(groups, n), w.input(), rs, groups, n);
    if let Some((dw, rs)) = sink {
        add_column_sums(cuda, dy, Some((x.input(), rs.input())), groups, n, dw);
    }
}
