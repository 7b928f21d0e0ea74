//! Parameter updates: sums of squares, AdamW, and copies between stored weights and buffers.

use std::ops::Range;

use super::flat_grid;
use crate::backend::AdamwStep;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::ops::elements::cast;
use crate::backend::cuda::tensor::Array;
use crate::backend::cuda::{Buffer, Cuda, Weight, kernels};

/// Σ of the values; waits for it.
pub fn total(cuda: &Cuda, values: &Array<f64>) -> f64 {
    let mut sum = cuda.array::<f64>(1);
    kernels::total(cuda, Grid::row(1, 512), values.input(), sum.output(), values.len());
    cuda.copy_out::<f64>(sum.address(), 1)[0]
}

/// Σ x² of part of a buffer.
pub fn sum_squares(cuda: &Cuda, b: &Buffer, range: Range<usize>) -> f64 {
    let n = range.len();
    if n == 0 {
        return 0.0;
    }
    // A function of the length alone, so that the sum does not depend on the GPU.
    let blocks = n.div_ceil(256 * 16).min(1024);
    let mut partial = cuda.array::<f64>(blocks);
    kernels::sum_squares(cuda, Grid::row(blocks, 256), b.input(range.start, n), partial.output(), n);
    total(cuda, &partial)
}

/// One AdamW step, with the same scalars and roundings as the CPU backend.
#[allow(clippy::too_many_arguments)]
pub fn adamw(
    cuda: &Cuda,
    master: &mut Buffer,
    m: &mut Buffer,
    v: &mut Buffer,
    at: Range<usize>,
    grad: &Buffer,
    grad_at: usize,
    step: &AdamwStep,
) {
    let &AdamwStep { lr, beta1, beta2, eps, weight_decay, step: t, grad_scale } = step;
    assert!(t >= 1, "AdamW's steps count from 1");
    let n = at.len();
    let (correct1, correct2) = (1.0 - beta1.powf(t as f64), 1.0 - beta2.powf(t as f64));
    kernels::adamw(
        cuda,
        flat_grid(n, 4),
        master.inout(at.start, n),
        m.inout(at.start, n),
        v.inout(at.start, n),
        grad.input(grad_at, n),
        n,
        grad_scale,
        (1.0 - beta1) as f32,
        beta2 as f32,
        (1.0 - beta2) as f32,
        (1.0 - lr * weight_decay) as f32,
        (lr / correct1) as f32,
        correct2.sqrt() as f32,
        eps as f32,
    );
}

/// Overwrites a parameter, rounded to nearest even.
pub fn set_weight(cuda: &Cuda, w: &mut Weight, values: &Buffer, at: Range<usize>) {
    assert!(at.len() == w.len(), "{} values for a parameter [{}, {}]", at.len(), w.rows(), w.cols());
    let n = w.len();
    cast(cuda, values.input(at.start, n).any(), w.output(), n);
}

/// The same for part of a parameter, from element `start` on.
pub fn set_weight_part(cuda: &Cuda, w: &mut Weight, start: usize, values: &Buffer, at: Range<usize>) {
    assert!(start + at.len() <= w.len(), "elements {start}..{} of {}", start + at.len(), w.len());
    cast(cuda, values.input(at.start, at.len()).any(), w.output().skip(start), at.len());
}

/// Reads elements of a parameter as f32.
pub fn read_weight(cuda: &Cuda, w: &Weight, elements: Range<usize>, into: &mut Buffer, offset: usize) {
    let n = elements.len();
    assert!(elements.end <= w.len(), "elements {elements:?} of {}", w.len());
    cast(cuda, w.input().skip(elements.start), into.output(offset, n).any(), n);
}
