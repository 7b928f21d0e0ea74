//! Parameter updates: AdamW, gradient norms, random initialisation, and copies between stored weights and f32 buffers.

use rayon::prelude::*;

use super::parallel::{CHUNK, Scratch};
use super::simd::simd;
use super::tensor::Tensor;
use super::weight::Weight;
use crate::backend::random::{uniform, uniform_step};
use crate::backend::{AdamwStep, Dtype, HostTensor, encode_into};

/// In f64, where the square of a finite f32 does not overflow: the sum is finite exactly if every entry is.
pub(super) fn sum_squares(values: &[f32]) -> f64 {
    let partial: Vec<f64> = values
        .par_chunks(CHUNK)
        .map(|chunk| {
            simd!({
                // Enough lanes that the compiler vectorises the loop over them, see `simd::LANES`.
                let mut lanes = [0f64; 128];
                for group in chunk.chunks(128) {
                    for (lane, &x) in lanes.iter_mut().zip(group) {
                        *lane += f64::from(x) * f64::from(x);
                    }
                }
                let mut sum = 0.0;
                for lane in lanes {
                    sum += lane;
                }
                sum
            })
        })
        .collect();
    partial.iter().sum()
}

pub(super) fn adamw(master: &mut [f32], m: &mut [f32], v: &mut [f32], grad: &[f32], step: &AdamwStep) {
    let &AdamwStep { lr, beta1, beta2, eps, weight_decay, step: t, grad_scale } = step;
    assert!(t >= 1, "AdamW's step numbers start at 1");
    // Scalars are computed in f64, as in PyTorch, and rounded once, for the arithmetic with elements.
    let (bias_correction1, bias_correction2) = (1.0 - beta1.powf(t as f64), 1.0 - beta2.powf(t as f64));
    let decay_factor = (1.0 - lr * weight_decay) as f32;
    let step_size = (lr / bias_correction1) as f32;
    let bias_correction2_sqrt = bias_correction2.sqrt() as f32;
    let (one_minus_beta1, one_minus_beta2) = ((1.0 - beta1) as f32, (1.0 - beta2) as f32);
    let (beta2, eps) = (beta2 as f32, eps as f32);
    let moments = m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK));
    let chunks = master.par_chunks_mut(CHUNK).zip(moments).zip(grad.par_chunks(CHUNK));
    chunks.for_each(|((w, (m, v)), grad)| {
        simd!({
            for (((w, m), v), g) in w.iter_mut().zip(m).zip(v).zip(grad) {
                let g = g * grad_scale;
                *m += (g - *m) * one_minus_beta1;
                *v = *v * beta2 + one_minus_beta2 * (g * g);
                *w = *w * decay_factor - step_size * (*m / (v.sqrt() / bias_correction2_sqrt + eps));
            }
        });
    });
}

pub(super) fn set_weight(w: &mut Weight, values: &[f32]) {
    assert!(values.len() == w.len(), "{} values for a parameter [{}, {}]", values.len(), w.rows(), w.cols());
    let dtype = w.dtype();
    let chunks = w.bytes_mut().par_chunks_mut(CHUNK * dtype.size());
    chunks.zip(values.par_chunks(CHUNK)).for_each(|(bytes, values)| encode_into(dtype, values, bytes));
}

pub(super) fn random_weight(dtype: Dtype, shape: Vec<usize>, seed: u64, std: f32) -> Weight {
    let mut w = Weight::new(HostTensor::absent(dtype, shape));
    let step = uniform_step(std);
    w.bytes_mut().par_chunks_mut(CHUNK * dtype.size()).enumerate().for_each(|(i, bytes)| {
        let mut scratch = Scratch::take(bytes.len() / dtype.size());
        let values = &mut *scratch;
        simd!({
            for (index, x) in values.iter_mut().enumerate() {
                *x = uniform(seed, (i * CHUNK + index) as u64, step);
            }
        });
        encode_into(dtype, values, bytes);
    });
    w
}

pub(super) fn read_weight(w: &Weight, start: usize, into: &mut [f32]) {
    into.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| w.read_into(start + i * CHUNK, chunk));
}

/// Elementwise x = f(x, y).
pub(super) fn zip_assign(x: &mut [f32], y: &[f32], f: impl Fn(f32, f32) -> f32 + Sync) {
    assert!(x.len() == y.len(), "{} and {} elements", x.len(), y.len());
    x.par_chunks_mut(CHUNK).zip(y.par_chunks(CHUNK)).for_each(|(x, y)| {
        simd!({
            for (x, y) in x.iter_mut().zip(y) {
                *x = f(*x, *y);
            }
        });
    });
}

/// Sets these columns of x to `value`.
pub(super) fn fill_columns(x: &mut Tensor, columns: &[u32], value: f32) {
    let cols = x.cols();
    for row in x.values_mut().chunks_exact_mut(cols.max(1)) {
        for &column in columns {
            row[column as usize] = value;
        }
    }
}
