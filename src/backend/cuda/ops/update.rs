//! What changes parameters: norms, AdamW, and copies between stored weights and buffers.

use std::ops::Range;

use super::flat_grid;
use crate::backend::cuda::gpu::{Grid, Kernel};
use crate::backend::cuda::kernels::kernel;
use crate::backend::cuda::ops::elements::cast;
use crate::backend::cuda::{Buffer, Cuda, Weight};
use crate::backend::{AdamwStep, Dtype};

const SUM_SQUARES: Kernel = kernel!(UPDATE, "sum_squares");
const TOTAL: Kernel = kernel!(UPDATE, "total");
const ADAMW: Kernel = kernel!(UPDATE, "adamw");

/// Σ x² of part of a buffer.
pub fn sum_squares(cuda: &Cuda, b: &Buffer, range: Range<usize>) -> f64 {
    let n = range.len();
    if n == 0 {
        return 0.0;
    }
    // By the length alone, so that the sum does not depend on the GPU.
    let blocks = n.div_ceil(256 * 16).min(1024);
    let partial = cuda.scratch(8 * (blocks + 1));
    let args = [b.at(range.start, n).into(), partial.address().into(), n.into()];
    cuda.launch(&SUM_SQUARES, Grid::row(blocks, 256), &args);
    let sum = partial.address().offset(8 * blocks);
    cuda.launch(&TOTAL, Grid::row(1, 512), &[partial.address().into(), sum.into(), blocks.into()]);
    cuda.copy_out::<f64>(sum, 1)[0]
}

/// One AdamW step, with the scalars and roundings of the CPU's.
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
    let args = [
        master.at(at.start, n).into(),
        m.at(at.start, n).into(),
        v.at(at.start, n).into(),
        grad.at(grad_at, n).into(),
        n.into(),
        grad_scale.into(),
        ((1.0 - beta1) as f32).into(),
        (beta2 as f32).into(),
        ((1.0 - beta2) as f32).into(),
        ((1.0 - lr * weight_decay) as f32).into(),
        ((lr / correct1) as f32).into(),
        (correct2.sqrt() as f32).into(),
        (eps as f32).into(),
    ];
    cuda.launch(&ADAMW, flat_grid(n, 4), &args);
}

/// Overwrites a parameter, rounded to nearest even.
pub fn set_weight(cuda: &Cuda, w: &mut Weight, values: &Buffer, at: Range<usize>) {
    assert!(at.len() == w.len(), "{} values for a parameter [{}, {}]", at.len(), w.rows(), w.cols());
    cast(cuda, values.at(at.start, at.len()), Dtype::F32, w.address(), w.dtype(), w.len());
}

/// The same for part of a parameter, from element `start` on.
pub fn set_weight_part(cuda: &Cuda, w: &mut Weight, start: usize, values: &Buffer, at: Range<usize>) {
    assert!(start + at.len() <= w.len(), "elements {start}..{} of {}", start + at.len(), w.len());
    let to = w.address().offset(start * w.dtype().size());
    cast(cuda, values.at(at.start, at.len()), Dtype::F32, to, w.dtype(), at.len());
}

/// Reads elements of a parameter as f32.
pub fn read_weight(cuda: &Cuda, w: &Weight, elements: Range<usize>, into: &mut Buffer, offset: usize) {
    let n = elements.len();
    assert!(elements.end <= w.len(), "elements {elements:?} of {}", w.len());
    let from = w.address().offset(elements.start * w.dtype().size());
    cast(cuda, from, w.dtype(), into.at(offset, n), Dtype::F32, n);
}
