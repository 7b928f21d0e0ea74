//! RMS norm over groups of columns.

use super::linear::add_column_sums;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::{Address, Grid};
use crate::backend::cuda::kernels::{Typed, typed};
use crate::backend::cuda::ops::elements::weight_in;
use crate::backend::cuda::{Buffer, Cuda, Tensor, Weight};

const FORWARD: Typed = typed!(NORM, "rms_norm");
const BACKWARD: Typed = typed!(NORM, "rms_norm_backward");
/// Groups up to this many columns belong to a warp, as in `norm.cu`.
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
    let y = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let args = [x.address().into(), w.address().into(), y.address().into(), groups.into(), n.into(), eps.into()];
    cuda.launch(FORWARD.of(x.dtype()), grid(groups, n), &args);
    y
}

/// dx; with a sink, dw += Σ dy · x / sqrt(mean(x²) + eps) too.
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
    let dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let roots = dw.is_some().then(|| cuda.tensor(groups, 1, Dtype::F32));
    let roots_at = roots.as_ref().map_or(Address::NULL, Tensor::address);
    let args = [
        dy.address().into(),
        x.address().into(),
        w.address().into(),
        dx.address().into(),
        roots_at.into(),
        groups.into(),
        n.into(),
        eps.into(),
    ];
    cuda.launch(BACKWARD.of(x.dtype()), grid(groups, n), &args);
    if let Some((dw, offset)) = dw {
        add_column_sums(cuda, dy, Some((x, roots_at)), groups, n, dw.at(offset, n));
    }
    dx
}
