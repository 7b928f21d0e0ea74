//! Gated activations: SwiGLU (Shazeer, arXiv 2002.05202) and the shared expert's sigmoid gate.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::chunk_rows;
use super::simd::{dot, sigmoid, simd};
use super::tensor::Tensor;

pub(super) fn swiglu(cpu: &Cpu, gate_up: &Tensor) -> Tensor {
    let f = half(gate_up);
    let mut y = cpu.pool.take(gate_up.rows(), f);
    let step = chunk_rows(2 * f);
    let inputs = gate_up.values().par_chunks((step * 2 * f).max(1));
    y.values_mut().par_chunks_mut((step * f).max(1)).zip(inputs).for_each(|(y, gate_up)| {
        simd!({
            for (y, gate_up) in y.chunks_exact_mut(f).zip(gate_up.chunks_exact(2 * f)) {
                let (gate, up) = gate_up.split_at(f);
                for ((y, &g), &u) in y.iter_mut().zip(gate).zip(up) {
                    *y = g * sigmoid(g) * u;
                }
            }
        });
    });
    y
}

/// A separate function, because function arguments are known not to alias: otherwise a loop over this many slices does
/// not vectorise.
#[inline(always)]
fn backward_row(dgate: &mut [f32], dup: &mut [f32], dy: &[f32], gate: &[f32], up: &[f32]) {
    let f = dgate.len();
    let (dup, dy, gate, up) = (&mut dup[..f], &dy[..f], &gate[..f], &up[..f]);
    for i in 0..f {
        let (g, s) = (gate[i], sigmoid(gate[i]));
        dgate[i] = dy[i] * up[i] * s * (1.0 + g * (1.0 - s));
        dup[i] = dy[i] * g * s;
    }
}

/// silu′(g) = σ(g) · (1 + g · (1 − σ(g)))
pub(super) fn backward(cpu: &Cpu, dy: &Tensor, gate_up: &Tensor) -> Tensor {
    let f = half(gate_up);
    dy.expect_shape("dy of swiglu", gate_up.rows(), f);
    let mut dx = cpu.pool.take(gate_up.rows(), 2 * f);
    let step = chunk_rows(2 * f);
    let inputs = gate_up.values().par_chunks((step * 2 * f).max(1)).zip(dy.values().par_chunks((step * f).max(1)));
    dx.values_mut().par_chunks_mut((step * 2 * f).max(1)).zip(inputs).for_each(|(dx, (gate_up, dy))| {
        simd!({
            let rows = gate_up.chunks_exact(2 * f).zip(dy.chunks_exact(f));
            for (dx, (gate_up, dy)) in dx.chunks_exact_mut(2 * f).zip(rows) {
                let (gate, up) = gate_up.split_at(f);
                let (dgate, dup) = dx.split_at_mut(f);
                backward_row(dgate, dup, dy, gate, up);
            }
        });
    });
    dx
}

fn half(gate_up: &Tensor) -> usize {
    assert!(gate_up.cols().is_multiple_of(2), "gate and up need an even number of columns, not {}", gate_up.cols());
    gate_up.cols() / 2
}

pub(super) fn sigmoid_gate(cpu: &Cpu, x: &Tensor, gate: &Tensor) -> Tensor {
    let d = x.cols();
    gate.expect_shape("the gate", x.rows(), 1);
    let mut y = cpu.pool.take(x.rows(), d);
    let rows = x.values().par_chunks(d).zip(gate.values());
    y.values_mut().par_chunks_mut(d).zip(rows).with_min_len(chunk_rows(d)).for_each(|(y, (x, &gate))| {
        simd!({
            let s = sigmoid(gate);
            for (y, x) in y.iter_mut().zip(x) {
                *y = s * x;
            }
        });
    });
    y
}

/// dx = σ·dy, dgate = σ·(1 − σ) · ⟨dy, x⟩.
pub(super) fn sigmoid_gate_backward(cpu: &Cpu, dy: &Tensor, x: &Tensor, gate: &Tensor) -> (Tensor, Tensor) {
    let d = x.cols();
    gate.expect_shape("the gate", x.rows(), 1);
    dy.expect_shape("dy of the gated rows", x.rows(), d);
    let mut dx = cpu.pool.take(x.rows(), d);
    let mut dgate = cpu.pool.take(x.rows(), 1);
    let rows = dy.values().par_chunks(d).zip(x.values().par_chunks(d)).zip(gate.values());
    let outputs = dx.values_mut().par_chunks_mut(d).zip(dgate.values_mut());
    outputs.zip(rows).with_min_len(chunk_rows(d)).for_each(|((dx, dgate), ((dy, x), &gate))| {
        simd!({
            let s = sigmoid(gate);
            for (dx, dy) in dx.iter_mut().zip(dy) {
                *dx = s * dy;
            }
            *dgate = s * (1.0 - s) * dot(dy, x) as f32;
        });
    });
    (dx, dgate)
}
