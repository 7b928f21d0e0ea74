//! The GPU backend: custom kernels (`kernels/*.cu`) and cuBLAS products, above the [`Gpu`] trait.
//!
//! Activations have one number format, BF16 or F32. Router logits, routing weights, losses, gradients of parameters,
//! master weights and moments are F32, scores and statistics F64. Everything runs on one stream, except for copies of
//! offloaded parameters (`ring.rs`); only operations that return host values wait for it. `ops/` has the launchers,
//! one file per family of operations, with the same names as in `backend/cpu`.

mod backend;
pub mod gpu;
pub mod kernels;
mod launch;
pub mod nvidia;
mod ops;
pub mod plan;
pub mod pool;
pub mod profile;
mod ranges;
mod ring;
mod shares;
mod tables;
mod tensor;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use self::gpu::{Address, Architecture, Arg, Error, Gemm, Gpu, Grid, Kernel};
use self::launch::Element;
use self::plan::{AttentionForm, Form, Grouped, Operation};
use self::pool::{Memory, Pool, Reuse};
use self::profile::Times;
use self::ring::Ring;
pub use self::ring::SLOTS;
pub use self::shares::Peers;
use self::tables::Tables;
use self::tensor::{Angles, Array};
pub use self::tensor::{Buffer, Dispatch, Indices, Normaliser, Routing, Scores, Sequences, Staged, Tensor, Weight};
use super::{DeviceFault, Dtype};

/// One GPU.
pub struct Cuda {
    gpu: Arc<dyn Gpu>,
    pool: Arc<Pool>,
    /// The room of parameters that lie in blocks.
    ring: Arc<Ring>,
    /// Number format of the activations.
    compute: Dtype,
    /// The limit that `free_memory` plans with, in bytes.
    room: usize,
    /// Chooses the form of grouped products.
    forms: fn(&Grouped, Architecture) -> Form,
    /// Chooses the form of attention by the head width.
    attention_forms: fn(usize, Dtype, Architecture) -> AttentionForm,
    tables: Tables,
    /// The rotary angles of the last batch.
    angles: Mutex<Option<Arc<Angles>>>,
    /// The profile, if the GPU is profiled.
    times: Option<Arc<Times>>,
}

/// Operations return no errors: an error of the GPU unwinds as a [`DeviceFault`].
fn must<T>(result: Result<T, Error>) -> T {
    result.unwrap_or_else(|error| DeviceFault::new(error).raise())
}

impl Cuda {
    /// A backend on this GPU with activations in `compute`, F32 or BF16; the range of F16 is too small, and it panics.
    /// It plans with the memory that is free now.
    pub fn new(gpu: Arc<dyn Gpu>, compute: Dtype, reuse: Reuse) -> Self {
        let free = must(gpu.memory()).free;
        Self::with_room(gpu, compute, reuse, free)
    }

    /// The same, but it plans with `room` bytes: for backends that share a GPU.
    pub fn with_room(gpu: Arc<dyn Gpu>, compute: Dtype, reuse: Reuse, room: usize) -> Self {
        assert!(compute != Dtype::F16, "activations are F32 or BF16");
        let pool = Pool::new(gpu.clone(), reuse);
        Self {
            room,
            ring: Ring::new(gpu.clone(), pool.clone(), None),
            pool,
            gpu,
            compute,
            forms: Grouped::form,
            attention_forms: plan::attention,
            tables: Tables::default(),
            angles: Mutex::default(),
            times: None,
        }
    }

    /// The same on a [`Profiled`](profile::Profiled) GPU with these times.
    pub fn with_times(self, times: Arc<Times>) -> Self {
        Self { times: Some(times), ..self }
    }

    /// The same, but what is offloaded is divided among the GPUs of these ranks, not in the host's memory.
    pub fn with_peers(self, peers: Arc<dyn Peers>) -> Self {
        Self { ring: Ring::new(self.gpu.clone(), self.pool.clone(), Some(peers)), ..self }
    }

    /// The same with another choice of the form of grouped products, to compare forms.
    pub fn with_forms(self, forms: fn(&Grouped, Architecture) -> Form) -> Self {
        Self { forms, ..self }
    }

    /// The same with another choice of the form of attention.
    pub fn with_attention_forms(self, attention_forms: fn(usize, Dtype, Architecture) -> AttentionForm) -> Self {
        Self { attention_forms, ..self }
    }

    /// Describes the forms chosen for grouped products of this shape and for heads of width `dim`.
    pub fn choices(&self, shape: &Grouped, dim: usize) -> String {
        let (form, scores) = (self.form(shape), self.form(&Grouped { operation: Operation::Scores, ..*shape }));
        let scores = if scores == form { String::new() } else { format!("; their scores: {scores}") };
        format!("experts: {shape}: {form}{scores}; attention: {}", self.attention_form(dim))
    }

    fn form(&self, shape: &Grouped) -> Form {
        (self.forms)(shape, self.gpu.architecture())
    }

    fn attention_form(&self, dim: usize) -> AttentionForm {
        (self.attention_forms)(dim, self.compute, self.gpu.architecture())
    }

    /// The GPU it runs on.
    pub fn gpu(&self) -> &Arc<dyn Gpu> {
        &self.gpu
    }

    /// The pool that its tensors are allocated from.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Number format of the activations.
    pub fn compute(&self) -> Dtype {
        self.compute
    }

    /// Overwrites elements of a parameter, from `start` on, with the elements `at` of a buffer, rounded to nearest
    /// even.
    pub fn set_weight_part(&self, w: &mut Weight, start: usize, values: &Buffer, at: Range<usize>) {
        ops::update::set_weight_part(self, w, start, values, at);
    }

    /// Room on the GPU for a new value of `w`, if `w` is offloaded.
    pub fn stage(&self, w: &Weight) -> Option<Staged> {
        ops::offload::stage(self, w)
    }

    /// Queues the copy of a new value to the place of its parameter.
    pub fn store(staged: Staged) {
        ops::offload::store(staged);
    }

    /// Bytes per second from pinned memory of the host to the GPU, measured now; `None` if the memory of either is full.
    ///
    /// # Errors
    /// A fault of the GPU.
    pub fn measure_bus(&self) -> Result<Option<f64>, Error> {
        ops::offload::measure_bus(self)
    }

    /// Uninitialized memory.
    pub(in crate::backend::cuda) fn scratch(&self, bytes: usize) -> Memory {
        must(self.pool.take(bytes))
    }

    /// An uninitialized tensor.
    pub(in crate::backend::cuda) fn tensor(&self, rows: usize, cols: usize, dtype: Dtype) -> Tensor {
        Tensor { rows, cols, dtype, memory: self.scratch(rows * cols * dtype.size()) }
    }

    /// Queues a kernel, unless its grid is empty. Only the functions generated by [`launch::kernels!`] call it.
    ///
    /// # Safety
    /// As [`Gpu::launch`].
    unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) {
        if grid.blocks.iter().all(|&n| n > 0) {
            // SAFETY: the caller's contract.
            must(unsafe { self.gpu.launch(kernel, grid, args) });
        }
    }

    /// Queues a product. Nothing is queued if c is empty. If k is 0, c is only scaled by `beta`, which must be 0 or 1.
    pub(in crate::backend::cuda) fn gemm(&self, gemm: &Gemm) {
        if gemm.m == 0 || gemm.n == 0 {
            return;
        }
        if gemm.k > 0 {
            must(self.gpu.gemm(gemm));
        } else if gemm.beta == 0.0 {
            assert!(gemm.c_stride == gemm.n, "k = 0, and c is part of a matrix");
            self.zero(gemm.c, gemm.m * gemm.n * gemm.c_dtype.size());
        }
    }

    fn zero(&self, at: Address, bytes: usize) {
        if bytes > 0 {
            must(self.gpu.zero(at, bytes));
        }
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) {
        if bytes > 0 {
            must(self.gpu.copy(from, to, bytes));
        }
    }

    /// Copies host values to the GPU.
    fn copy_in<T: bytemuck::NoUninit>(&self, to: Address, values: &[T]) {
        if !values.is_empty() {
            must(self.gpu.copy_in(to, bytemuck::cast_slice(values)));
        }
    }

    /// Copies `n` values to the host, after everything queued.
    fn copy_out<T: bytemuck::AnyBitPattern + bytemuck::NoUninit>(&self, from: Address, n: usize) -> Vec<T> {
        let mut out = vec![T::zeroed(); n];
        if n > 0 {
            must(self.gpu.copy_out(from, bytemuck::cast_slice_mut(&mut out)));
        }
        out
    }

    /// An uninitialized array of `n` numbers.
    fn array<T: Element<Format = ()>>(&self, n: usize) -> Array<T> {
        Array::new(self.scratch(n * size_of::<T>()), n)
    }

    /// A new array with these values.
    fn uploaded<T: Element<Format = ()> + bytemuck::NoUninit>(&self, values: &[T]) -> Array<T> {
        let array = self.array(values.len());
        self.copy_in(array.address(), values);
        array
    }
}
