//! The interface to a GPU.
//!
//! Everything above this trait (launchers, offsets, heuristics, the pool) is plain Rust, and tests run it on an
//! emulated GPU. Everything below is a thin layer over the driver and cuBLAS.

use crate::backend::Dtype;
use crate::exit::{self, Coded};

/// An address in the GPU's memory. Null is never allocated; kernels take it as "not given".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address(pub u64);

impl Address {
    /// The null pointer.
    pub const NULL: Address = Address(0);

    /// The address plus `bytes`.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// An address in pinned memory of the host: pages that stay where they are, so that the GPU copies them by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct HostAddress(pub u64);

impl HostAddress {
    /// The address plus `bytes`.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// A copy of a [`Gpu::load`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadPart {
    /// The first byte that is read.
    pub from: Source,
    /// Where it goes.
    pub to: Address,
    /// Number of bytes.
    pub bytes: usize,
}

/// Where a [`Gpu::load`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Pinned memory of the host.
    Host(HostAddress),
    /// Memory of this GPU, memory of another one after [`Gpu::reach`], or memory of another process after [`Gpu::import`].
    Gpu(Address),
}

/// Memory of another process, opened in this one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The exported address, as this process sees it.
    pub at: Address,
    /// The first byte of the allocation that contains it.
    pub base: Address,
}

/// The number of a [`Gpu::load`], counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Load(pub u64);

/// One argument of a kernel, of exactly the type that the kernel declares.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// A pointer.
    Pointer(Address),
    /// `int`
    I32(i32),
    /// `u32`
    U32(u32),
    /// `u64`: every size and every index of an element.
    U64(u64),
    /// `float`
    F32(f32),
    /// `double`
    F64(f64),
}

/// A source file of kernels.
#[derive(Debug, PartialEq, Eq)]
pub struct SourceFile {
    /// Its name in `kernels/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
}

/// A compilation unit: `common.cuh`, then these files.
#[derive(Debug, PartialEq, Eq)]
pub struct Module {
    /// The name of the module.
    pub stem: &'static str,
    /// Its files, in order.
    pub files: &'static [SourceFile],
    /// The only compute capability that it runs on (90 for 9.0); `None`: any.
    pub only: Option<u32>,
}

impl Module {
    /// Whether it runs on GPUs of this compute capability.
    pub fn runs_on(&self, sm: u32) -> bool {
        self.only.is_none_or(|only| only == sm)
    }
}

/// A kernel of a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernel {
    /// The module that contains it.
    pub module: &'static Module,
    /// Its `extern "C"` name.
    pub name: &'static str,
}

/// The launch configuration of a kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Blocks in x, y and z.
    pub blocks: [u32; 3],
    /// Threads per block, in x.
    pub threads: u32,
    /// Bytes of dynamic shared memory per block.
    pub shared: usize,
}

impl Grid {
    /// A one-dimensional grid. Panics if there are more blocks than a launch can have, 2^31 - 1.
    pub fn row(blocks: usize, threads: u32) -> Self {
        let blocks = i32::try_from(blocks).expect("fewer than 2^31 blocks");
        Self { blocks: [blocks as u32, 1, 1], threads, shared: 0 }
    }

    /// The same with `bytes` of dynamic shared memory per block.
    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes, ..self }
    }
}

/// One operand of a product: a row-major matrix as it is stored.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Operand {
    /// The first element.
    pub at: Address,
    /// Elements from one stored row to the next.
    pub stride: usize,
    /// Whether the product uses its transpose.
    pub transposed: bool,
}

/// `c = alpha · op(a) · op(b) + beta · c`, all row-major, accumulated in f32.
///
/// With `beta` 0, c is not read. a and b have the same number format (F32 or BF16); c is F32 or has their format. F32
/// operands are multiplied as F32, not rounded to TF32.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gemm {
    /// Rows of c.
    pub m: usize,
    /// Columns of c.
    pub n: usize,
    /// Columns of op(a), rows of op(b).
    pub k: usize,
    /// `[m, k]`, or stored `[k, m]`.
    pub a: Operand,
    /// `[k, n]`, or stored `[n, k]`.
    pub b: Operand,
    /// Number format of a and b.
    pub dtype: Dtype,
    /// The first element of c.
    pub c: Address,
    /// Elements from one row of c to the next.
    pub c_stride: usize,
    /// Number format of c.
    pub c_dtype: Dtype,
    /// Factor of the product.
    pub alpha: f32,
    /// Factor of the previous value of c.
    pub beta: f32,
}

/// The properties of a GPU by which kernels are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Architecture {
    /// Compute capability, 90 for 9.0; 0: no GPU, so no tensor cores.
    pub sm: u32,
    /// Streaming multiprocessors.
    pub processors: u32,
    /// The most shared memory per block, in bytes.
    pub shared: usize,
}

/// The GPU's memory, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryInfo {
    /// Unused by any process.
    pub free: usize,
    /// All memory of the GPU.
    pub total: usize,
}

/// An error of a GPU or one of its libraries.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An allocation was refused.
    #[error(
        "the GPU's memory is full: {} requested, {} in use by this process, {} of {} free. \
         Try a smaller --batch-size, a smaller --max-length, --recompute always, a smaller --top-k-experts, \
         more ranks, or --offload host or --shard-frozen if the model has experts that are on the GPU (a judge's stay there)",
        gib(*.asked), gib(*.used), gib(.info.free), gib(.info.total)
    )]
    OutOfMemory {
        /// Bytes of the allocation.
        asked: usize,
        /// Bytes that this process holds for tensors.
        used: usize,
        /// Free and total memory, as the GPU reports them.
        info: MemoryInfo,
    },
    /// Pinned memory of the host was refused.
    #[error(
        "the host's memory is full: {} of pinned memory requested for experts that are not on the GPU, {} pinned by this \
         rank. Use a machine with more memory, fewer ranks on it, or a GPU with more memory and --offload none",
        gib(*.asked), gib(*.used)
    )]
    OutOfHostMemory {
        /// Bytes of the allocation.
        asked: usize,
        /// Bytes that this process has pinned for parameters.
        used: usize,
    },
    /// Anything else: a kernel's fault, a lost device, an error of a library.
    #[error("{call}: {message}")]
    Fault {
        /// The failed call.
        call: String,
        /// The reported error.
        message: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        exit::LAUNCHER
    }
}

fn gib(bytes: usize) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}

/// A GPU, or an emulation of one. All work goes to one stream, so that it runs in the order of the calls. Only
/// [`Self::load`] runs beside it.
pub trait Gpu: Send + Sync + 'static {
    /// The product name, such as "NVIDIA H200".
    fn name(&self) -> String;
    /// The properties by which kernels are chosen.
    fn architecture(&self) -> Architecture;
    /// Free and total memory.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn memory(&self) -> Result<MemoryInfo, Error>;
    /// Allocates `bytes` > 0 bytes of uninitialized memory, aligned to 256 bytes; `None` if the memory is full.
    ///
    /// # Errors
    /// Any other failure.
    fn allocate(&self, bytes: usize) -> Result<Option<Address>, Error>;
    /// Frees memory, after the work queued so far.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn free(&self, at: Address) -> Result<(), Error>;
    /// Copies from the host. The host's bytes may change as soon as this returns.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn copy_in(&self, to: Address, bytes: &[u8]) -> Result<(), Error>;
    /// Copies to the host, after the work queued so far. Faults of that work are reported here.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn copy_out(&self, from: Address, bytes: &mut [u8]) -> Result<(), Error>;
    /// Copies between ranges that do not overlap.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), Error>;
    /// Fills `bytes` bytes with zero.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn zero(&self, at: Address, bytes: usize) -> Result<(), Error>;
    /// Allocates `bytes` > 0 bytes of pinned host memory; `None` if the host's memory is full.
    ///
    /// # Errors
    /// Any other failure.
    fn allocate_host(&self, bytes: usize) -> Result<Option<HostAddress>, Error>;
    /// Frees pinned host memory, after all work queued so far and all loads.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn free_host(&self, at: HostAddress) -> Result<(), Error>;
    /// Overwrites pinned host memory, after all work queued so far and all loads.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn write_host(&self, to: HostAddress, bytes: &[u8]) -> Result<(), Error>;
    /// Reads pinned host memory, after the work queued so far.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn read_host(&self, from: HostAddress, bytes: &mut [u8]) -> Result<(), Error>;
    /// Queues a copy to pinned host memory.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn store(&self, from: Address, to: HostAddress, bytes: usize) -> Result<(), Error>;
    /// Queues copies beside the stream: they begin after the work queued so far, and only [`Self::await_load`] makes later
    /// work wait for them. Loads run in the order of the calls.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn load(&self, parts: &[LoadPart]) -> Result<Load, Error>;
    /// Makes the work that is queued from now on wait for a load, and those before it. The host does not wait.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn await_load(&self, load: Load) -> Result<(), Error>;
    /// Lets loads read memory of another GPU of this process, from GPU to GPU where the hardware can.
    ///
    /// # Errors
    /// A fault of a GPU.
    fn reach(&self, at: Address) -> Result<(), Error>;
    /// What another process on this machine needs to [`Self::import`] this address of an allocation. It must have closed
    /// it before the allocation is freed.
    ///
    /// # Errors
    /// The driver cannot share memory between processes.
    fn export(&self, at: Address) -> Result<Vec<u8>, Error>;
    /// Lets loads read memory that another process exported.
    ///
    /// # Errors
    /// The GPU cannot read that memory.
    fn import(&self, exported: &[u8]) -> Result<Imported, Error>;
    /// Closes imported memory, after all loads.
    ///
    /// # Errors
    /// A fault of the GPU.
    fn close(&self, imported: Imported) -> Result<(), Error>;
    /// Queues a kernel. No dimension of the grid is zero.
    ///
    /// # Safety
    /// `args` must be the kernel's parameters: as many, of the same types, in the same order. Each pointer must point
    /// to memory of this GPU with room for everything that the kernel, with this grid and these sizes, reads and writes
    /// there; only where the kernel checks for it, it may be null. Nothing but this stream may use that memory until
    /// the kernel has run.
    ///
    /// # Errors
    /// A kernel that cannot be launched.
    unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) -> Result<(), Error>;
    /// Queues a product. No dimension is zero.
    ///
    /// # Errors
    /// A fault of the library.
    fn gemm(&self, gemm: &Gemm) -> Result<(), Error>;
    /// Waits for all queued work.
    ///
    /// # Errors
    /// A fault of that work.
    fn synchronize(&self) -> Result<(), Error>;
}
