//! Gated activations: SwiGLU (Shazeer, arXiv 2002.05202) and the shared expert's sigmoid gate.

use rayon::prelude::*;

use super::Cpu;
use super::dispatch::Dispatch;
use super::element::{Element, by_element};
use super::parallel::{Scratch, SharedSlice, chunk_rows};
use super::route::Routing;
use super::simd::{dot, sigmoid, simd};
use super::tensor::Tensor;

/// `y[r] = silu(gate[r]) · up[r]`, in the element type of its input.
pub(super) fn swiglu(cpu: &Cpu, gate_up: &Tensor) -> Tensor {
    by_element!(gate_up.dtype(), forward(cpu, gate_up, |_| 1.0))
}

/// The same, with each routed row multiplied by its routing weight.
pub(super) fn weighted(cpu: &Cpu, gate_up: &Tensor, routing: &Routing, dispatch: &Dispatch) -> Tensor {
    let weights = weights(gate_up, routing, dispatch);
    by_element!(gate_up.dtype(), forward(cpu, gate_up, |row| weights[dispatch.slot_of[row] as usize]))
}

fn weights<'r>(gate_up: &Tensor, routing: &'r Routing, dispatch: &Dispatch) -> &'r [f32] {
    routing.weights.expect_shape("routing weights", dispatch.tokens(), dispatch.top_k);
    assert!(gate_up.rows() == dispatch.slot_of.len(), "{} rows of {} slots", gate_up.rows(), dispatch.slot_of.len());
    routing.weights.values()
}

fn forward<E: Element>(cpu: &Cpu, gate_up: &Tensor, weight: impl Fn(usize) -> f32 + Sync) -> Tensor {
    let f = half(gate_up);
    let mut y = cpu.pool.take_as(E::DTYPE, gate_up.rows(), f);
    let step = chunk_rows(2 * f);
    let inputs = gate_up.stored::<E>().par_chunks((step * 2 * f).max(1));
    y.stored_mut::<E>().par_chunks_mut((step * f).max(1)).zip(inputs).enumerate().for_each(|(chunk, (y, gate_up))| {
        simd!({
            for (i, (y, gate_up)) in y.chunks_exact_mut(f).zip(gate_up.chunks_exact(2 * f)).enumerate() {
                let (gate, up) = gate_up.split_at(f);
                let weight = weight(chunk * step + i);
                for ((y, g), u) in y.iter_mut().zip(gate).zip(up) {
                    let g = g.get();
                    *y = E::of(weight * (g * sigmoid(g) * u.get()));
                }
            }
        });
    });
    y
}

/// One row of SwiGLU and of its backward.
struct Row<'a, E> {
    /// Of the output, times its weight.
    dy: &'a [f32],
    gate: &'a [E],
    up: &'a [E],
    dgate: &'a mut [E],
    dup: &'a mut [E],
    /// The output, without its weight.
    y: &'a mut [f32],
}

impl<E: Element> Row<'_, E> {
    /// dgate, dup and y: silu′(g) = σ(g) · (1 + g · (1 − σ(g))).
    ///
    /// Slices of one length, so that the loop vectorises.
    #[inline(always)]
    fn backward(self, weight: f32) {
        let f = self.dy.len();
        let (gate, up) = (&self.gate[..f], &self.up[..f]);
        let (dgate, dup, y) = (&mut self.dgate[..f], &mut self.dup[..f], &mut self.y[..f]);
        for i in 0..f {
            let (dy, g, u) = (weight * self.dy[i], gate[i].get(), up[i].get());
            let s = sigmoid(g);
            dgate[i] = E::of(dy * u * s * (1.0 + g * (1.0 - s)));
            dup[i] = E::of(dy * g * s);
            y[i] = g * s * u;
        }
    }
}

/// The gradient of `gate_up`, in its element type.
pub(super) fn backward(cpu: &Cpu, dy: &Tensor, gate_up: &Tensor) -> Tensor {
    by_element!(gate_up.dtype(), backward_rows(cpu, dy, gate_up, |_| 1.0, |_, _, _| ()))
}

/// The gradients of `gate_up` and, `[T, K]`, of the routing weights: with r = row of (t, k) and y that of [`swiglu`],
/// `dweight(t, k) = ⟨dy[r], y[r]⟩`.
pub(super) fn weighted_backward(
    cpu: &Cpu,
    dy: &Tensor,
    gate_up: &Tensor,
    routing: &Routing,
    dispatch: &Dispatch,
) -> (Tensor, Tensor) {
    let weights = weights(gate_up, routing, dispatch);
    let mut dweights = cpu.pool.take(dispatch.tokens(), dispatch.top_k);
    let out = SharedSlice::new(dweights.values_mut());
    let weight = |row| weights[dispatch.slot_of[row] as usize];
    let dx = by_element!(
        gate_up.dtype(),
        backward_rows(
            cpu,
            dy,
            gate_up,
            weight,
            #[inline(always)]
            |row, dy, y| {
                // SAFETY: every row has a slot of its own.
                unsafe { out.slice(dispatch.slot_of[row] as usize, 1)[0] = dot(dy, y) as f32 };
            },
        )
    );
    (dx, dweights)
}

/// `reduce` gets the number of each row, and its dy and y, both without the weight.
fn backward_rows<E: Element>(
    cpu: &Cpu,
    dy: &Tensor,
    gate_up: &Tensor,
    weight: impl Fn(usize) -> f32 + Sync,
    reduce: impl Fn(usize, &[f32], &[f32]) + Sync,
) -> Tensor {
    let f = half(gate_up);
    dy.expect_shape("dy of swiglu", gate_up.rows(), f);
    let mut dx = cpu.pool.take_as(E::DTYPE, gate_up.rows(), 2 * f);
    let step = chunk_rows(2 * f);
    let inputs = gate_up.stored::<E>().par_chunks((step * 2 * f).max(1));
    dx.stored_mut::<E>().par_chunks_mut((step * 2 * f).max(1)).zip(inputs).enumerate().for_each(
        |(chunk, (dx, gate_up))| {
            let (mut read, mut y) = (Scratch::take(f), Scratch::take(f));
            simd!({
                for (i, (dx, gate_up)) in dx.chunks_exact_mut(2 * f).zip(gate_up.chunks_exact(2 * f)).enumerate() {
                    let row = chunk * step + i;
                    dy.read_row(row, &mut read);
                    let ((gate, up), (dgate, dup)) = (gate_up.split_at(f), dx.split_at_mut(f));
                    Row { dy: &read, gate, up, dgate, dup, y: &mut y }.backward(weight(row));
                    reduce(row, &read, &y);
                }
            });
        },
    );
    dx
}

fn half(gate_up: &Tensor) -> usize {
    assert!(gate_up.index().is_none(), "gate and up with an index");
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
