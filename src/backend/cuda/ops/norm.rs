//! RMS norm over groups of columns.

use super::linear::add_column_sums;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::launch::OrNull;
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

/// dx; if `dw` is given, dw += Σ dy · x / sqrt(mean(x²) + eps) too.
pub fn backward(
    cuda: &Cuda,
    dy: &Tensor,
    x: &Tensor,
    w: &Weight,
    eps: f32,
    dw: Option<(&mut Buffer, usize)>,
) -> Tensor {
    let (groups, n) = groups(x, w);
    dy.expect_shape("dy of the norm", x.rows(), x.cols());
    assert!(dy.dtype() == x.dtype(), "dy in {:?}, x in {:?}", dy.dtype(), x.dtype());
    let w = weight_in(cuda, w, x.dtype());
    let mut dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let mut sink = dw.map(|(dw, offset)| (dw.inout(offset, n), cuda.array::<f32>(groups)));
    let rs = sink.as_mut().map_or(OrNull::null(()), |(_, rs)| rs.output().into());
    kernels::rms_norm_backward(
        cuda,
        grid(groups, n),
        dy.input(),
        x.input(),
        w.input(),
        dx.output(),
        rs,
        groups,
        n,
        eps,
    );
    if let Some((dw, rs)) = sink {
        add_column_sums(cuda, dy, Some((x.input(), rs.input())), groups, n, dw);
    }
    dx
}
