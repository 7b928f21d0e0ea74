//! Gated activations.

use super::row_grid;
use crate::backend::Dtype;
use crate::backend::cuda::{Cuda, Dispatch, Routing, Tensor, kernels};

fn half(gate_up: &Tensor) -> usize {
    assert!(gate_up.cols().is_multiple_of(2), "gate and up side by side in {} columns", gate_up.cols());
    gate_up.cols() / 2
}

/// silu(gate) · up
pub fn swiglu(cuda: &Cuda, gate_up: &Tensor) -> Tensor {
    let (rows, f, dtype) = (gate_up.rows(), half(gate_up), gate_up.dtype());
    let mut y = cuda.tensor(rows, f, dtype);
    kernels::swiglu(cuda, row_grid(rows, f, dtype), gate_up.input(), y.output(), f);
    y
}

/// d gate_up
pub fn backward(cuda: &Cuda, dy: &Tensor, gate_up: &Tensor) -> Tensor {
    let (rows, f, dtype) = (gate_up.rows(), half(gate_up), gate_up.dtype());
    dy.expect_shape("dy of swiglu", rows, f);
    let mut dx = cuda.tensor(rows, 2 * f, dtype);
    kernels::swiglu_backward(cuda, row_grid(rows, f, dtype), dy.input(), gate_up.input(), dx.output(), f);
    dx
}

/// silu(gate) · up of every routed row, times its routing weight.
pub fn weighted(cuda: &Cuda, gate_up: &Tensor, routing: &Routing, dispatch: &Dispatch) -> Tensor {
    let (rows, f, dtype) = (gate_up.rows(), half(gate_up), gate_up.dtype());
    check(gate_up, routing, dispatch);
    let mut y = cuda.tensor(rows, f, dtype);
    let (weights, slot_of) = (routing.weights.input().of(), dispatch.order().slot_of.input());
    kernels::weighted_swiglu(cuda, row_grid(rows, f, dtype), gate_up.input(), weights, slot_of, y.output(), f);
    y
}

/// (d gate_up, d routing weights F32 `[T, K]`)
pub fn weighted_backward(
    cuda: &Cuda,
    dy: &Tensor,
    gate_up: &Tensor,
    routing: &Routing,
    dispatch: &Dispatch,
) -> (Tensor, Tensor) {
    let (rows, f, dtype) = (gate_up.rows(), half(gate_up), gate_up.dtype());
    check(gate_up, routing, dispatch);
    dy.expect_shape("dy of the weighted rows", rows, f);
    let mut dx = cuda.tensor(rows, 2 * f, dtype);
    let mut dweights = cuda.tensor(dispatch.tokens(), dispatch.top_k, Dtype::F32);
    kernels::weighted_swiglu_backward(
        cuda,
        row_grid(rows, f, dtype),
        dy.input(),
        gate_up.input(),
        routing.weights.input().of(),
        dispatch.order().slot_of.input(),
        dx.output(),
        dweights.output().of(),
        f,
    );
    (dx, dweights)
}

fn check(gate_up: &Tensor, routing: &Routing, dispatch: &Dispatch) {
    routing.weights.expect_shape("routing weights", dispatch.tokens(), dispatch.top_k);
    gate_up.expect_shape("routed rows of gate and up", dispatch.rows, gate_up.cols());
}

/// `y[t] = sigmoid(gate[t]) · x[t]`
pub fn sigmoid_gate(cuda: &Cuda, x: &Tensor, gate: &Tensor) -> Tensor {
    gate.expect_shape("the gate", x.rows(), 1);
    let mut y = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let grid = row_grid(x.rows(), x.cols(), x.dtype());
    kernels::sigmoid_gate(cuda, grid, x.input(), gate.input(), y.output(), x.cols());
    y
}

/// (dx, dgate)
pub fn sigmoid_gate_backward(cuda: &Cuda, dy: &Tensor, x: &Tensor, gate: &Tensor) -> (Tensor, Tensor) {
    gate.expect_shape("the gate", x.rows(), 1);
    dy.expect_shape("dy of the gated rows", x.rows(), x.cols());
    let mut dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let mut dgate = cuda.tensor(x.rows(), 1, x.dtype());
    let grid = row_grid(x.rows(), x.cols(), x.dtype());
    let (dy, x, gate, cols) = (dy.input(), x.input(), gate.input(), x.cols());
    kernels::sigmoid_gate_backward(cuda, grid, dy, x, gate, dx.output(), dgate.output(), cols);
    (dx, dgate)
}
