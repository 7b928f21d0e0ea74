//! KL divergence from a base model: of a linear head's distributions, in chunks of rows like the cross-entropy, and of
//! router logits.

use super::linear::operand;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::{Address, Gemm, Grid};
use crate::backend::cuda::launch::OrNull;
use crate::backend::cuda::ops::elements::{in_dtype, weight_in};
use crate::backend::cuda::ops::update::total;
use crate::backend::cuda::{Buffer, Cuda, Tensor, Weight, kernels};

/// Bytes of a chunk's logits, of those of the base and of the gradient: less than those of the cross-entropy, by which a
/// run's memory is forecast.
const BUDGET: usize = 256 << 20;

/// Rows of a chunk for `v` classes, in whole tiles of a product, at least one tile.
fn chunk_rows(v: usize, dtype: Dtype) -> usize {
    (BUDGET / (v * (8 + dtype.size())) / 64 * 64).max(64)
}

/// A head and its inputs.
#[derive(Clone, Copy)]
pub struct Head<'a> {
    /// `[n, D]`
    pub x: &'a Tensor,
    /// `[V, D]`
    pub w: &'a Weight,
}

/// Σ KL(p₀ ‖ p) and the number of rows with the same most probable class. The gradient is computed if `dx` is given.
fn run(
    cuda: &Cuda,
    head: Head<'_>,
    base: Head<'_>,
    scale: f32,
    dx: Option<&Tensor>,
    dw: Option<Address>,
) -> (f64, usize) {
    let (x, w) = (head.x, head.w);
    let (n, v, d, dtype) = (x.rows(), w.rows(), w.cols(), x.dtype());
    for Head { x, w } in [head, base] {
        assert!(x.cols() == w.cols(), "x [{}, {}], head [{}, {}]", x.rows(), x.cols(), w.rows(), w.cols());
    }
    assert!(base.x.rows() == n, "{n} rows, {} of the base", base.x.rows());
    assert!(base.w.rows() == v, "{v} classes, {} of the base", base.w.rows());
    assert!(base.x.dtype() == dtype, "x is {dtype:?}, that of the base {:?}", base.x.dtype());
    if n == 0 {
        return (0.0, 0);
    }
    let (w, base_w) = (weight_in(cuda, w, dtype), weight_in(cuda, base.w, dtype));
    let chunk = chunk_rows(v, dtype).min(n);
    let stride = v.next_multiple_of(8);
    let [logits, base_logits] = [0, 1].map(|_| cuda.array::<f32>(chunk * stride));
    let mut grad = dx.is_some().then(|| cuda.tensor(chunk, stride, dtype));
    let grad_at = grad.as_ref().map_or(Address::NULL, Tensor::address);
    let (mut kl, mut same) = (cuda.array::<f64>(n), cuda.array::<f64>(n));
    for start in (0..n).step_by(chunk) {
        let rows = chunk.min(n - start);
        let product = |x: &Tensor, w: Address, k: usize, into: Address| Gemm {
            m: rows,
            n: v,
            k,
            a: operand(x.row(start), k, false),
            b: operand(w, k, true),
            dtype,
            c: into,
            c_stride: stride,
            c_dtype: Dtype::F32,
            alpha: 1.0,
            beta: 0.0,
        };
        let of_head = product(x, w.address(), d, logits.address());
        cuda.gemm(&of_head);
        cuda.gemm(&product(base.x, base_w.address(), base.x.cols(), base_logits.address()));
        kernels::linear_kl(
            cuda,
            Grid::row(rows, 512),
            logits.input(),
            base_logits.input(),
            kl.output().skip(start),
            same.output().skip(start),
            grad.as_mut().map_or(OrNull::null(dtype), |grad| grad.output().into()),
            v,
            stride,
            scale,
        );
        if let Some(dx) = dx {
            let (a, b) = (operand(grad_at, stride, false), operand(w.address(), d, false));
            cuda.gemm(&Gemm { n: d, k: v, a, b, c: dx.row(start), c_stride: d, c_dtype: dtype, ..of_head });
        }
        if let Some(dw) = dw {
            let (a, b) = (operand(grad_at, stride, true), operand(x.row(start), d, false));
            cuda.gemm(&Gemm { m: v, n: d, k: rows, a, b, c: dw, c_stride: d, beta: 1.0, ..of_head });
        }
    }
    (total(cuda, &kl), total(cuda, &same) as usize)
}

/// Σ over rows of KL(p₀ ‖ p), and the number of rows with the same most probable class.
pub fn forward(cuda: &Cuda, head: Head<'_>, base: Head<'_>) -> (f64, usize) {
    run(cuda, head, base, 0.0, None, None)
}

/// The same sum, and the gradient of `scale` times the sum: returns dx, and adds to `dw` if it is given.
pub fn backward(
    cuda: &Cuda,
    head: Head<'_>,
    base: Head<'_>,
    scale: f32,
    dw: Option<(&mut Buffer, usize)>,
) -> (f64, Tensor) {
    let dx = cuda.tensor(head.x.rows(), head.x.cols(), head.x.dtype());
    let dw = dw.map(|(dw, offset)| dw.at(offset, head.w.len()));
    let (kl, _) = run(cuda, head, base, scale, Some(&dx), dw);
    (kl, dx)
}

fn check_base(logits: &Tensor, base: &[f32]) {
    let (n, e) = (logits.rows(), logits.cols());
    assert!(base.len() == n * e, "{} base logits for [{n}, {e}]", base.len());
}

/// Σ over rows of KL(softmax(base) ‖ softmax(logits)).
pub fn softmax(cuda: &Cuda, logits: &Tensor, base: &[f32]) -> f64 {
    check_base(logits, base);
    let (rows, e) = (logits.rows(), logits.cols());
    if rows == 0 {
        return 0.0;
    }
    let x = in_dtype(cuda, logits, Dtype::F32);
    let base = cuda.uploaded(base);
    let mut kl = cuda.array::<f64>(rows);
    kernels::softmax_kl(cuda, Grid::row(rows.div_ceil(4), 128), x.input().of(), base.input(), kl.output(), rows, e);
    total(cuda, &kl)
}

/// dlogits += the gradient of `scale` times [`softmax`].
pub fn softmax_backward(cuda: &Cuda, base: &[f32], logits: &Tensor, scale: f32, dlogits: &mut Tensor) {
    check_base(logits, base);
    let (rows, e) = (logits.rows(), logits.cols());
    dlogits.expect_shape("dlogits", rows, e);
    assert!(dlogits.dtype() == Dtype::F32, "gradients of router logits are F32");
    let x = in_dtype(cuda, logits, Dtype::F32);
    let base = cuda.uploaded(base);
    let grid = Grid::row(rows.div_ceil(4), 128);
    kernels::softmax_kl_backward(cuda, grid, base.input(), x.input().of(), dlogits.inout().of(), rows, e, scale);
}
