//! Element by element: sums, clamps, changes of number format, random values.

use super::flat_grid;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::{Address, Kernel};
use crate::backend::cuda::kernels::{Typed, kernel, typed};
use crate::backend::cuda::pool::Memory;
use crate::backend::cuda::{Cuda, Tensor, Weight};
use crate::backend::random::uniform_step;

const ADD: Typed = typed!(ELEMENTS, "add");
const CLAMP: Typed = typed!(ELEMENTS, "clamp");
const CLAMP_BACKWARD: Typed = typed!(ELEMENTS, "clamp_backward");

/// x += y
pub fn add_assign(cuda: &Cuda, x: &mut Tensor, y: &Tensor) {
    y.expect_shape("y", x.rows(), x.cols());
    let y = in_dtype(cuda, y, x.dtype());
    let grid = flat_grid(x.len(), 16 / x.dtype().size());
    cuda.launch(ADD.of(x.dtype()), grid, &[x.address().into(), y.address().into(), x.len().into()]);
}

/// x clamped to [-limit, limit]
pub fn clamp(cuda: &Cuda, x: &mut Tensor, limit: f32) {
    let grid = flat_grid(x.len(), 16 / x.dtype().size());
    cuda.launch(CLAMP.of(x.dtype()), grid, &[x.address().into(), x.len().into(), limit.into()]);
}

/// dy where the clamped y is strictly inside its limits, else 0
pub fn clamp_backward(cuda: &Cuda, dy: &mut Tensor, y: &Tensor, limit: f32) {
    y.expect_shape("y", dy.rows(), dy.cols());
    assert!(y.dtype() == dy.dtype(), "y in {:?}, dy in {:?}", y.dtype(), dy.dtype());
    let grid = flat_grid(dy.len(), 16 / dy.dtype().size());
    let args = [dy.address().into(), y.address().into(), dy.len().into(), limit.into()];
    cuda.launch(CLAMP_BACKWARD.of(dy.dtype()), grid, &args);
}

/// Elements in the number format that was asked for: where they are, or converted in scratch.
pub enum InDtype {
    /// As they lie.
    There(Address),
    /// In scratch, which lives as long as this.
    Converted(Memory),
}

impl InDtype {
    /// The first element.
    pub fn address(&self) -> Address {
        match self {
            InDtype::There(at) => *at,
            InDtype::Converted(memory) => memory.address(),
        }
    }
}

/// A tensor's elements in this format.
pub fn in_dtype(cuda: &Cuda, x: &Tensor, dtype: Dtype) -> InDtype {
    converted(cuda, x.address(), x.dtype(), dtype, x.len())
}

/// A parameter's elements in this format. Real models are stored in the activations' and are never converted.
pub fn weight_in(cuda: &Cuda, w: &Weight, dtype: Dtype) -> InDtype {
    converted(cuda, w.address(), w.dtype(), dtype, w.len())
}

/// `n` elements in this format.
pub fn converted(cuda: &Cuda, at: Address, from: Dtype, to: Dtype, n: usize) -> InDtype {
    if from == to {
        return InDtype::There(at);
    }
    let memory = cuda.scratch(n * to.size());
    cast(cuda, at, from, memory.address(), to, n);
    InDtype::Converted(memory)
}

/// Copies `n` elements, rounded to nearest even where the new format is narrower.
pub fn cast(cuda: &Cuda, from: Address, from_dtype: Dtype, to: Address, to_dtype: Dtype, n: usize) {
    use Dtype::{Bf16, F16, F32};
    const F32_BF16: Kernel = kernel!(ELEMENTS, "cast_f32_bf16");
    const F32_F16: Kernel = kernel!(ELEMENTS, "cast_f32_f16");
    const BF16_F32: Kernel = kernel!(ELEMENTS, "cast_bf16_f32");
    const BF16_F16: Kernel = kernel!(ELEMENTS, "cast_bf16_f16");
    const F16_F32: Kernel = kernel!(ELEMENTS, "cast_f16_f32");
    const F16_BF16: Kernel = kernel!(ELEMENTS, "cast_f16_bf16");
    let kernel = match (from_dtype, to_dtype) {
        (F32, Bf16) => F32_BF16,
        (F32, F16) => F32_F16,
        (Bf16, F32) => BF16_F32,
        (Bf16, F16) => BF16_F16,
        (F16, F32) => F16_F32,
        (F16, Bf16) => F16_BF16,
        _ => return cuda.copy(from, to, n * to_dtype.size()),
    };
    cuda.launch(&kernel, flat_grid(n, 8), &[from.into(), to.into(), n.into()]);
}

/// A parameter of random values that never were on the host.
pub fn random_weight(cuda: &Cuda, dtype: Dtype, shape: Vec<usize>, seed: u64, std: f32) -> Weight {
    const F32: Kernel = kernel!(ELEMENTS, "random_f32");
    const BF16: Kernel = kernel!(ELEMENTS, "random_bf16");
    const F16: Kernel = kernel!(ELEMENTS, "random_f16");
    let n: usize = shape.iter().product();
    let w = Weight { dtype, shape, memory: cuda.scratch(n * dtype.size()) };
    let kernel = match dtype {
        Dtype::F32 => F32,
        Dtype::Bf16 => BF16,
        Dtype::F16 => F16,
    };
    let args = [w.address().into(), n.into(), seed.into(), uniform_step(std).into()];
    cuda.launch(&kernel, flat_grid(n, 16 / dtype.size()), &args);
    w
}
