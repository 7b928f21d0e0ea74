//! Cross-entropy of a linear head, in chunks of rows. One kernel computes the losses of a chunk's logits and their
//! gradient, which goes back through the head immediately, so that logits exist only for one chunk at a time.

use super::linear::operand;
use crate::backend::cuda::gpu::{Address, Gemm, Grid};
use crate::backend::cuda::launch::OrNull;
use crate::backend::cuda::ops::elements::weight_in;
use crate::backend::cuda::ops::update::total;
use crate::backend::cuda::tensor::Array;
use crate::backend::cuda::{Buffer, Cuda, Indices, Tensor, Weight, kernels};
use crate::backend::{Dtype, RowLoss};

/// Bytes of a chunk's logits and their gradient. Each product reads the head once per chunk, so that the arithmetic of a
/// thousand rows hides it.
const BUDGET: usize = 1 << 30;
/// Rows of a tile of a product: a chunk that is no multiple of them would compute more than it has.
const TILE: usize = 256;

/// Rows of a chunk for a vocabulary of `v`: within the budget, in whole tiles, at least one.
pub fn chunk_rows(v: usize, dtype: Dtype) -> usize {
    (BUDGET / (v * (4 + dtype.size())) / TILE * TILE).max(TILE)
}

/// The losses of all rows; `None` without rows. The gradient is computed if `dx` is given, and whether each target has the
/// highest logit if `greedy` is.
#[allow(clippy::too_many_arguments)]
fn run(
    cuda: &Cuda,
    x: &Tensor,
    w: &Weight,
    targets: &Indices,
    scale: f32,
    dx: Option<&Tensor>,
    dw: Option<(&mut Buffer, usize)>,
    mut greedy: Option<&mut Array<u32>>,
) -> Option<Array<f64>> {
    let (n, v, d, dtype) = (x.rows(), w.rows(), w.cols(), x.dtype());
    assert!(x.cols() == d, "x [{n}, {}], head [{v}, {d}]", x.cols());
    assert!(targets.len() == n, "{n} rows, {} targets", targets.len());
    let bad = targets.host.iter().find(|&&t| t as usize >= v);
    assert!(bad.is_none(), "target {} of {v} classes", bad.unwrap_or(&0));
    if n == 0 {
        return None;
    }
    let dw = dw.map(|(dw, offset)| dw.sum(offset, w.len()));
    let w = weight_in(cuda, w, dtype);
    let chunk = chunk_rows(v, dtype).min(n);
    let stride = v.next_multiple_of(8);
    let logits = cuda.array::<f32>(chunk * stride);
    let mut grad = dx.is_some().then(|| cuda.tensor(chunk, stride, dtype));
    let grad_at = grad.as_ref().map_or(Address::NULL, Tensor::address);
    let mut losses = cuda.array::<f64>(n);
    for start in (0..n).step_by(chunk) {
        let rows = chunk.min(n - start);
        let product = Gemm {
            m: rows,
            n: v,
            k: d,
            a: operand(x.row(start), d, false),
            b: operand(w.address(), d, true),
            dtype,
            c: logits.address(),
            c_stride: stride,
            c_dtype: Dtype::F32,
            alpha: 1.0,
            beta: 0.0,
        };
        cuda.gemm(&product);
        kernels::cross_entropy(
            cuda,
            Grid::row(rows, 512),
            logits.input(),
            targets.input().skip(start),
            losses.output().skip(start),
            grad.as_mut().map_or(OrNull::null(dtype), |grad| grad.output().into()),
            v,
            stride,
            scale,
        );
        if let Some(greedy) = &mut greedy {
            let (targets, greedy) = (targets.input().skip(start), greedy.output().skip(start));
            kernels::greedy(cuda, Grid::row(rows, 512), logits.input(), targets, greedy, v, stride);
        }
        if let Some(dx) = dx {
            let (a, b) = (operand(grad_at, stride, false), operand(w.address(), d, false));
            cuda.gemm(&Gemm { n: d, k: v, a, b, c: dx.row(start), c_stride: d, c_dtype: dtype, ..product });
        }
        if let Some((c, beta)) = dw {
            let (a, b) = (operand(grad_at, stride, true), operand(x.row(start), d, false));
            let beta = if start == 0 { beta } else { 1.0 };
            cuda.gemm(&Gemm { m: v, n: d, k: rows, a, b, c, c_stride: d, beta, ..product });
        }
    }
    Some(losses)
}

/// Σ over rows of −log softmax(x · wᵀ)\[target\].
pub fn forward(cuda: &Cuda, x: &Tensor, w: &Weight, targets: &Indices) -> f64 {
    run(cuda, x, w, targets, 0.0, None, None, None).map_or(0.0, |losses| total(cuda, &losses))
}

/// The terms of that sum, and whether each target has the highest logit.
pub fn rows(cuda: &Cuda, x: &Tensor, w: &Weight, targets: &Indices) -> Vec<RowLoss> {
    let n = targets.len();
    let mut greedy = cuda.array::<u32>(n);
    let Some(losses) = run(cuda, x, w, targets, 0.0, None, None, Some(&mut greedy)) else { return Vec::new() };
    let losses = cuda.copy_out::<f64>(losses.address(), n);
    let greedy = cuda.copy_out::<u32>(greedy.address(), n);
    losses.into_iter().zip(greedy).map(|(loss, greedy)| RowLoss { loss, greedy: greedy != 0 }).collect()
}

/// The same sum, and the gradient of `scale` times the sum: returns dx, and adds to `dw` if it is given.
pub fn backward(
    cuda: &Cuda,
    x: &Tensor,
    w: &Weight,
    targets: &Indices,
    scale: f32,
    dw: Option<(&mut Buffer, usize)>,
) -> (f64, Tensor) {
    let dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let losses = run(cuda, x, w, targets, scale, Some(&dx), dw, None);
    (losses.map_or(0.0, |losses| total(cuda, &losses)), dx)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_chunk_is_whole_tiles_near_the_budget() {
        for (v, dtype, rows) in [(50_304, Dtype::Bf16, 3328), (151_936, Dtype::Bf16, 1024), (32_000, Dtype::F32, 4096)]
        {
            assert_eq!(chunk_rows(v, dtype), rows);
            assert!(rows * v * (4 + dtype.size()) <= BUDGET);
        }
        assert_eq!(chunk_rows(1 << 30, Dtype::Bf16), 256);
    }
}
