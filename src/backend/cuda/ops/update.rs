//! Parameter updates: sums of squares, AdamW, and copies between stored weights and buffers.

use std::ops::Range;

use super::flat_grid;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::ops::elements::cast;
use crate::backend::cuda::tensor::Array;
use crate::backend::cuda::{Buffer, Cuda, Weight, kernels};
use crate::backend::{AdamwStep, Dtype};

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

/// The scalars of a step as the kernels take them, with the same roundings as in the CPU backend.
struct Scalars {
    grad_scale: f32,
    one_minus_beta1: f32,
    beta2: f32,
    one_minus_beta2: f32,
    decay: f32,
    step_size: f32,
    bias_correction2_sqrt: f32,
    eps: f32,
}

impl Scalars {
    fn of(step: &AdamwStep) -> Self {
        let &AdamwStep { lr, beta1, beta2, eps, weight_decay, step: t, grad_scale } = step;
        assert!(t >= 1, "AdamW's steps count from 1");
        let (correct1, correct2) = (1.0 - beta1.powf(t as f64), 1.0 - beta2.powf(t as f64));
        Self {
            grad_scale,
            one_minus_beta1: (1.0 - beta1) as f32,
            beta2: beta2 as f32,
            one_minus_beta2: (1.0 - beta2) as f32,
            decay: (1.0 - lr * weight_decay) as f32,
            step_size: (lr / correct1) as f32,
            bias_correction2_sqrt: correct2.sqrt() as f32,
            eps: eps as f32,
        }
    }
}

/// One AdamW step.
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
    let (n, s) = (at.len(), Scalars::of(step));
    kernels::adamw(
        cuda,
        flat_grid(n, 4),
        master.inout(at.start, n),
        m.inout(at.start, n),
        v.inout(at.start, n),
        grad.input(grad_at, n),
        n,
        s.grad_scale,
        s.one_minus_beta1,
        s.beta2,
        s.one_minus_beta2,
        s.decay,
        s.step_size,
        s.bias_correction2_sqrt,
        s.eps,
    );
}

/// Elements per block of `adamw_weights`.
const SPAN: usize = 256 * 8;

/// One AdamW step that writes the parameters, too: one launch for all that lie on the GPU in the same format.
#[allow(clippy::too_many_arguments)]
pub fn adamw_weights(
    cuda: &Cuda,
    master: &mut Buffer,
    m: &mut Buffer,
    v: &mut Buffer,
    at: Range<usize>,
    grad: &Buffer,
    grad_at: usize,
    step: &AdamwStep,
    weights: Vec<(Range<usize>, &mut Weight)>,
) {
    let mut end = at.start;
    for (part, w) in &weights {
        assert!(part.start == end && part.len() == w.len(), "elements {part:?} for a parameter of {}", w.len());
        end = part.end;
    }
    assert!(end == at.end, "parameters of elements {}..{end} of {at:?}", at.start);
    let (n, s) = (at.len(), Scalars::of(step));
    let (mut fused, mut others) = ([(Dtype::Bf16, Vec::new()), (Dtype::F32, Vec::new())], Vec::new());
    for (part, w) in weights {
        let same = fused.iter_mut().find(|(dtype, _)| *dtype == w.dtype() && w.in_block().is_none());
        match same {
            Some((_, parts)) => parts.push((part, w)),
            None => others.push((part, w)),
        }
    }
    for (dtype, mut parts) in fused {
        let (mut jobs, mut blocks) = (Vec::with_capacity(3 * parts.len() + 1), 0);
        for (part, _) in &parts {
            jobs.extend([blocks as u64, (part.start - at.start) as u64, part.len() as u64]);
            blocks += part.len().div_ceil(SPAN);
        }
        if blocks == 0 {
            continue;
        }
        jobs.push(blocks as u64);
        let addresses = cuda.table(parts.iter_mut().map(|(_, w)| w.output().address().0).collect());
        kernels::adamw_weights(
            cuda,
            Grid::row(blocks, 256),
            master.inout(at.start, n),
            m.inout(at.start, n),
            v.inout(at.start, n),
            grad.input(grad_at, n),
            addresses.input().targets(dtype),
            cuda.table(jobs).input(),
            parts.len(),
            s.grad_scale,
            s.one_minus_beta1,
            s.beta2,
            s.one_minus_beta2,
            s.decay,
            s.step_size,
            s.bias_correction2_sqrt,
            s.eps,
        );
    }
    // F16, which has no kernel of its own, and parameters whose place on the GPU is not theirs.
    for (part, w) in others {
        let grad_at = grad_at + part.start - at.start;
        adamw(cuda, master, m, v, part.clone(), grad, grad_at, step);
        set_weight(cuda, w, master, part);
    }
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
