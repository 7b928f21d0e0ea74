//! Elementwise operations: sums, clamps, conversions of the number format, random values.

use super::flat_grid;
use crate::backend::Dtype;
use crate::backend::cuda::gpu::Address;
use crate::backend::cuda::launch::{Any, In, Out, Pointer};
use crate::backend::cuda::pool::Memory;
use crate::backend::cuda::tensor::Place;
use crate::backend::cuda::{Cuda, Tensor, Weight, kernels};
use crate::backend::random::uniform_step;

/// x += y
pub fn add_assign(cuda: &Cuda, x: &mut Tensor, y: &Tensor) {
    y.expect_shape("y", x.rows(), x.cols());
    let y = in_dtype(cuda, y, x.dtype());
    let grid = flat_grid(x.len(), 16 / x.dtype().size());
    let n = x.len();
    kernels::add(cuda, grid, x.inout(), y.input(), n);
}

/// x clamped to [-limit, limit]
pub fn clamp(cuda: &Cuda, x: &mut Tensor, limit: f32) {
    let grid = flat_grid(x.len(), 16 / x.dtype().size());
    let n = x.len();
    kernels::clamp(cuda, grid, x.inout(), n, limit);
}

/// Sets dy to 0 where the clamped y is not strictly inside its limits.
pub fn clamp_backward(cuda: &Cuda, dy: &mut Tensor, y: &Tensor, limit: f32) {
    y.expect_shape("y", dy.rows(), dy.cols());
    assert!(y.dtype() == dy.dtype(), "y in {:?}, dy in {:?}", y.dtype(), dy.dtype());
    let grid = flat_grid(dy.len(), 16 / dy.dtype().size());
    kernels::clamp_backward(cuda, grid, dy.inout(), y.input(), y.len(), limit);
}

/// Elements in a requested number format: the original ones, or a converted copy.
pub enum InDtype<'a> {
    /// Already in this format.
    Original(In<'a, Any>),
    /// A copy in scratch memory.
    Converted(Memory, Dtype),
}

impl InDtype<'_> {
    /// The elements, for a kernel that reads them.
    pub fn input(&self) -> In<'_, Any> {
        match self {
            InDtype::Original(elements) => *elements,
            InDtype::Converted(memory, dtype) => Pointer::new(memory.address(), *dtype),
        }
    }

    /// The first element.
    pub fn address(&self) -> Address {
        self.input().address()
    }
}

/// A tensor's elements in this format.
pub fn in_dtype<'a>(cuda: &Cuda, x: &'a Tensor, dtype: Dtype) -> InDtype<'a> {
    converted(cuda, x.input(), dtype, x.len())
}

/// A parameter's elements in this format. Models are usually stored in the activations' format and then not converted.
pub fn weight_in<'a>(cuda: &Cuda, w: &'a Weight, dtype: Dtype) -> InDtype<'a> {
    converted(cuda, w.input(), dtype, w.len())
}

fn converted<'a>(cuda: &Cuda, from: In<'a, Any>, to: Dtype, n: usize) -> InDtype<'a> {
    if from.dtype() == to {
        return InDtype::Original(from);
    }
    let memory = cuda.scratch(n * to.size());
    cast(cuda, from, Pointer::new(memory.address(), to), n);
    InDtype::Converted(memory, to)
}

/// Copies `n` elements, rounded to nearest even if the new format is narrower.
pub fn cast(cuda: &Cuda, from: In<'_, Any>, to: Out<'_, Any>, n: usize) {
    use Dtype::{Bf16, F16, F32};
    let grid = flat_grid(n, 8);
    match (from.dtype(), to.dtype()) {
        (F32, Bf16) => kernels::cast_f32_bf16(cuda, grid, from.of(), to.of(), n),
        (F32, F16) => kernels::cast_f32_f16(cuda, grid, from.of(), to.of(), n),
        (Bf16, F32) => kernels::cast_bf16_f32(cuda, grid, from.of(), to.of(), n),
        (Bf16, F16) => kernels::cast_bf16_f16(cuda, grid, from.of(), to.of(), n),
        (F16, F32) => kernels::cast_f16_f32(cuda, grid, from.of(), to.of(), n),
        (F16, Bf16) => kernels::cast_f16_bf16(cuda, grid, from.of(), to.of(), n),
        (F32, F32) | (Bf16, Bf16) | (F16, F16) => cuda.copy(from.address(), to.address(), n * to.dtype().size()),
    }
}

/// A parameter of random values, generated on the GPU.
pub fn random_weight(cuda: &Cuda, dtype: Dtype, shape: Vec<usize>, seed: u64, std: f32) -> Weight {
    let n: usize = shape.iter().product();
    let mut w = Weight { dtype, shape, place: Place::Gpu(cuda.scratch(n * dtype.size())) };
    let (grid, to, step) = (flat_grid(n, 16 / dtype.size()), w.output(), uniform_step(std));
    match dtype {
        Dtype::F32 => kernels::random_f32(cuda, grid, to.of(), n, seed, step),
        Dtype::Bf16 => kernels::random_bf16(cuda, grid, to.of(), n, seed, step),
        Dtype::F16 => kernels::random_f16(cuda, grid, to.of(), n, seed, step),
    }
    w
}
