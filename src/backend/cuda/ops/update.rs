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

/// Σ x² of each part of a buffer; waits for all of them once.
pub fn sums_of_squares(cuda: &Cuda, b: &Buffer, parts: &[Range<usize>]) -> Vec<f64> {
    // A function of the length alone, so that a sum does not depend on the GPU, nor on the other parts.
    let blocks_of = |len: usize| len.div_ceil(256 * 16).min(1024);
    let (mut jobs, mut blocks) = (Vec::with_capacity(3 * parts.len() + 1), 0);
    for part in parts {
        assert!(part.end <= b.len, "elements {part:?} of a buffer of {}", b.len);
        jobs.extend([blocks as u64, part.start as u64, part.len() as u64]);
        blocks += blocks_of(part.len());
    }
    if blocks == 0 {
        return vec![0.0; parts.len()];
    }
    jobs.push(blocks as u64);
    let jobs = cuda.table(jobs);
    let (mut partial, mut sums) = (cuda.array::<f64>(blocks), cuda.array::<f64>(parts.len()));
    let (x, grid) = (b.input(0, b.len), Grid::row(blocks, 256));
    kernels::sums_of_squares(cuda, grid, x, jobs.input(), partial.output(), parts.len());
    kernels::totals_of_parts(cuda, Grid::row(parts.len(), 512), partial.input(), jobs.input(), sums.output());
    cuda.copy_out(sums.address(), parts.len())
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
    let Some(mut staged) = cuda.stage(w) else {
        cast(cuda, values.input(at.start, n).any(), w.output(), n);
        return;
    };
    cast(cuda, values.input(at.start, n).any(), staged.weight_mut().output(), n);
    Cuda::store(staged);
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
