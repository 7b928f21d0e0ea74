//! Gated activations.

use super::row_grid;
use crate::backend::cuda::kernels::{Typed, typed};
use crate::backend::cuda::{Cuda, Tensor};

const SWIGLU: Typed = typed!(SWIGLU, "swiglu");
const SWIGLU_BACKWARD: Typed = typed!(SWIGLU, "swiglu_backward");
const SIGMOID_GATE: Typed = typed!(SWIGLU, "sigmoid_gate");
const SIGMOID_GATE_BACKWARD: Typed = typed!(SWIGLU, "sigmoid_gate_backward");

fn half(gate_up: &Tensor) -> usize {
    assert!(gate_up.cols().is_multiple_of(2), "gate and up side by side in {} columns", gate_up.cols());
    gate_up.cols() / 2
}

/// silu(gate) · up
pub fn swiglu(cuda: &Cuda, gate_up: &Tensor) -> Tensor {
    let (rows, f, dtype) = (gate_up.rows(), half(gate_up), gate_up.dtype());
    let y = cuda.tensor(rows, f, dtype);
    let args = [gate_up.address().into(), y.address().into(), f.into()];
    cuda.launch(SWIGLU.of(dtype), row_grid(rows, f, dtype), &args);
    y
}

/// d gate_up
pub fn backward(cuda: &Cuda, dy: &Tensor, gate_up: &Tensor) -> Tensor {
    let (rows, f, dtype) = (gate_up.rows(), half(gate_up), gate_up.dtype());
    dy.expect_shape("dy of swiglu", rows, f);
    let dx = cuda.tensor(rows, 2 * f, dtype);
    let args = [dy.address().into(), gate_up.address().into(), dx.address().into(), f.into()];
    cuda.launch(SWIGLU_BACKWARD.of(dtype), row_grid(rows, f, dtype), &args);
    dx
}

/// `y[t] = sigmoid(gate[t]) · x[t]`
pub fn sigmoid_gate(cuda: &Cuda, x: &Tensor, gate: &Tensor) -> Tensor {
    gate.expect_shape("the gate", x.rows(), 1);
    let y = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let args = [x.address().into(), gate.address().into(), y.address().into(), x.cols().into()];
    cuda.launch(SIGMOID_GATE.of(x.dtype()), row_grid(x.rows(), x.cols(), x.dtype()), &args);
    y
}

/// (dx, dgate)
pub fn sigmoid_gate_backward(cuda: &Cuda, dy: &Tensor, x: &Tensor, gate: &Tensor) -> (Tensor, Tensor) {
    gate.expect_shape("the gate", x.rows(), 1);
    dy.expect_shape("dy of the gated rows", x.rows(), x.cols());
    let dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    let dgate = cuda.tensor(x.rows(), 1, x.dtype());
    let args = [
        dy.address().into(),
        x.address().into(),
        gate.address().into(),
        dx.address().into(),
        dgate.address().into(),
        x.cols().into(),
    ];
    cuda.launch(SIGMOID_GATE_BACKWARD.of(x.dtype()), row_grid(x.rows(), x.cols(), x.dtype()), &args);
    (dx, dgate)
}
