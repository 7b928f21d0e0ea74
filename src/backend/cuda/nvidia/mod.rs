//! NVIDIA GPUs: [`Nvidia`] is a [`Gpu`] over the driver, NVRTC and cuBLAS, all found at run time.
//!
//! Everything that decides anything lies above the [`Gpu`] seam, or is a pure function tested beside it; what is left here
//! are calls, one or two for each method. Driver calls follow the CUDA Driver API manual,
//! <https://docs.nvidia.com/cuda/cuda-driver-api/>, function by function.

mod cache;
mod cublas;
mod driver;
mod error;
pub mod library;
mod nvrtc;
mod staging;

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use cudarc::driver::{CudaContext, DriverError, result, sys};
use rayon::prelude::*;

use self::cache::Cache;
use self::cublas::Cublas;
pub use self::driver::Driver;
use self::driver::driver_says;
pub use self::error::Error;
use self::library::{Library, Surroundings};
pub use self::nvrtc::{Compiled, Nvrtc, options};
use self::staging::Staging;
use super::gpu::{self, Address, Architecture, Arg, Gemm, Gpu, Grid, Kernel, MemoryInfo, Module};
use super::kernels::{self, MODULES};

/// The oldest GPUs with bf16.
const OLDEST_SM: u32 = 80;
/// Shared memory that a block may have without asking (CUDA C++ Programming Guide, "Compute Capabilities").
const SHARED_WITHOUT_ASKING: usize = 48 << 10;
/// Copies of no more than this go without staging.
const SMALL: usize = 64 << 10;

/// One GPU: a context, and one stream that all its work goes to.
pub struct Nvidia {
    name: String,
    /// Driver and libraries, for the log.
    software: String,
    architecture: Architecture,
    /// Whether it reads the host's memory without staging, as on Grace Hopper.
    reads_pageable: bool,
    stream: sys::CUstream,
    cublas: Option<Cublas>,
    workspace: Address,
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: Mutex<HashMap<(&'static str, &'static str), Function>>,
    staging: Mutex<Option<Staging>>,
    /// Dropped last: it holds the context.
    context: Arc<CudaContext>,
}

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    /// Dynamic shared memory that it may be launched with.
    shared: usize,
}

// SAFETY: the driver's handles may be used from any thread in which the context is current, which every method sees to.
unsafe impl Send for Nvidia {}
unsafe impl Sync for Nvidia {}

impl Nvidia {
    /// Opens GPU `index` of those that the driver shows and makes all kernels ready, from `kernel_cache` where that folder
    /// has them.
    ///
    /// # Errors
    /// What is missing or too old, and where it was looked for.
    pub fn open(index: usize, surroundings: &Surroundings, kernel_cache: Option<&Path>) -> Result<Self, Error> {
        let Driver { version, devices } = Driver::start(surroundings)?;
        if index >= devices {
            return Err(Error::NoSuchDevice { index, devices });
        }
        // Before the context, so that what is missing is said within a moment.
        let nvrtc = Nvrtc::new(&library::open(Library::Nvrtc, version.0, surroundings)?)?;
        let cublas = library::open(Library::Cublas, version.0, surroundings)?;

        let context = CudaContext::new(index).map_err(refused("cuDevicePrimaryCtxRetain"))?;
        let name = context.name().map_err(refused("cuDeviceGetName"))?;
        let architecture = architecture(&context).map_err(refused("cuDeviceGetAttribute"))?;
        if architecture.sm < OLDEST_SM {
            return Err(Error::OldGpu { name, sm: architecture.sm });
        }
        let attribute = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS;
        let reads_pageable = context.attribute(attribute).map_err(refused("cuDeviceGetAttribute"))? != 0;
        let modules: Vec<_> = MODULES.iter().copied().filter(|module| module.runs_on(architecture.sm)).collect();
        let cubins = cubins(&nvrtc, &Cache::new(kernel_cache), &modules, architecture.sm)?;

        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(refused("cuStreamCreate"))?;
        let software =
            format!("driver for CUDA {}.{}, {nvrtc}, cuBLAS ({})", version.0, version.1, cublas.path.display());
        let mut gpu = Self {
            name,
            software,
            architecture,
            reads_pageable,
            stream,
            cublas: None,
            workspace: Address::NULL,
            modules: HashMap::new(),
            functions: Mutex::default(),
            staging: Mutex::default(),
            context,
        };
        for (module, cubin) in modules.iter().zip(cubins) {
            // SAFETY: NVRTC's output (or the same from the cache, whose hash was right) is a whole cubin.
            let loaded = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
            gpu.modules.insert(module.stem, loaded.map_err(refused("cuModuleLoadData"))?);
        }
        // SAFETY: freed once, on drop.
        let workspace = unsafe { result::malloc_sync(cublas::WORKSPACE) }.map_err(refused("cuMemAlloc"))?;
        gpu.workspace = Address(workspace);
        gpu.cublas = Some(Cublas::new(&cublas, stream.cast(), gpu.workspace)?);
        Ok(gpu)
    }

    /// Driver and libraries, with versions and files, for the log.
    pub fn software(&self) -> &str {
        &self.software
    }

    /// What tells this GPU from all others, on this machine and elsewhere.
    ///
    /// # Errors
    /// A driver that does not answer.
    pub fn uuid(&self) -> Result<Vec<u8>, gpu::Error> {
        let uuid = self.context.uuid().map_err(fault("cuDeviceGetUuid"))?;
        Ok(uuid.bytes.map(|byte| byte as u8).to_vec())
    }

    /// The stream, for work of others that has to be ordered with it: `collective::nccl`.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes this GPU the calling thread's.
    ///
    /// # Errors
    /// A fault of the GPU.
    pub fn bind(&self) -> Result<(), gpu::Error> {
        self.context.bind_to_thread().map_err(fault("cuCtxSetCurrent"))
    }

    fn function(&self, kernel: &Kernel) -> Result<Function, gpu::Error> {
        let mut functions = lock(&self.functions);
        let key = (kernel.module.stem, kernel.name);
        if let Some(&function) = functions.get(&key) {
            return Ok(function);
        }
        let name = CString::new(kernel.name).expect("names of kernels hold no NUL");
        // SAFETY: modules stay loaded as long as this value.
        let found = unsafe {
            result::module::get_function(self.modules[kernel.module.stem], name).and_then(|raw| {
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
                Ok((raw, result::function::get_function_attribute(raw, attribute)?))
            })
        };
        let (raw, statically) = found.map_err(|e| gpu::Error::Fault {
            call: format!("kernel {} of kernels/{}.cu", kernel.name, kernel.module.stem),
            message: driver_says(e),
        })?;
        let function = Function { raw, shared: SHARED_WITHOUT_ASKING.saturating_sub(statically as usize) };
        functions.insert(key, function);
        Ok(function)
    }

    /// Allows a kernel more dynamic shared memory than it has without asking, once; of the cache that serves as shared memory it
    /// then prefers all, so that a second block finds room.
    fn allow(&self, kernel: &Kernel, function: Function, shared: usize) -> Result<(), gpu::Error> {
        use sys::CUfunction_attribute as Attribute;
        let bytes = i32::try_from(shared).expect("shared memory is small");
        let (most, carveout) = (
            Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            Attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT,
        );
        // SAFETY: the function's module stays loaded.
        let set =
            |attribute, value| unsafe { result::function::set_function_attribute(function.raw, attribute, value) };
        set(most, bytes).and_then(|()| set(carveout, 100)).map_err(|e| gpu::Error::Fault {
            call: format!("{shared} bytes of shared memory for {}", kernel.name),
            message: driver_says(e),
        })?;
        lock(&self.functions).insert((kernel.module.stem, kernel.name), Function { shared, ..function });
        Ok(())
    }

    fn with_staging(&self, copy: impl FnOnce(&mut Staging) -> Result<(), DriverError>) -> Result<(), DriverError> {
        let mut staging = lock(&self.staging);
        let staging = match &mut *staging {
            Some(staging) => staging,
            none => none.insert(Staging::new()?),
        };
        copy(staging)
    }
}

fn architecture(context: &CudaContext) -> Result<Architecture, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let (major, minor) = context.compute_capability()?;
    let processors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let shared = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    Ok(Architecture { sm: (10 * major + minor) as u32, processors: processors as u32, shared: shared as usize })
}

/// Machine code of these modules, in their order, for a GPU of compute capability `sm`.
fn cubins(nvrtc: &Nvrtc, cache: &Cache, modules: &[&Module], sm: u32) -> Result<Vec<Vec<u8>>, Error> {
    let options = options(sm);
    let compiler = format!("{:?}", nvrtc.version());
    let cubin = |module: &&Module| {
        let source = kernels::source(module);
        let mut parts = vec![source.as_str(), &compiler];
        parts.extend(options.iter().map(String::as_str));
        let stem = format!("{}-sm_{sm}", module.stem);
        cache.get(&stem, &parts, || Ok(nvrtc.compile(module, &options)?.cubin))
    };
    modules.par_iter().map(cubin).collect()
}

fn refused(call: &'static str) -> impl Fn(DriverError) -> Error {
    move |e| {
        let hint = match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                ": no room even to begin with; nvidia-smi shows who has it, CUDA_VISIBLE_DEVICES chooses another GPU"
            }
            _ => "",
        };
        Error::Driver { call, message: driver_says(e) + hint }
    }
}

fn fault(call: &'static str) -> impl Fn(DriverError) -> gpu::Error {
    move |e| gpu::Error::Fault { call: call.to_owned(), message: driver_says(e) }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The most arguments of a kernel.
const MAX_ARGS: usize = 32;

/// The arguments as cuLaunchKernel reads them: each from an address of its own, as many bytes as the kernel's type has.
fn packed(args: &[Arg]) -> [[u8; 8]; MAX_ARGS] {
    let mut slots = [[0; 8]; MAX_ARGS];
    for (slot, arg) in slots.iter_mut().zip(args) {
        match arg {
            Arg::Pointer(at) => *slot = at.0.to_ne_bytes(),
            Arg::U64(x) => *slot = x.to_ne_bytes(),
            Arg::F64(x) => *slot = x.to_ne_bytes(),
            Arg::I32(x) => slot[..4].copy_from_slice(&x.to_ne_bytes()),
            Arg::U32(x) => slot[..4].copy_from_slice(&x.to_ne_bytes()),
            Arg::F32(x) => slot[..4].copy_from_slice(&x.to_ne_bytes()),
        }
    }
    slots
}

impl Gpu for Nvidia {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn architecture(&self) -> Architecture {
        self.architecture
    }

    fn memory(&self) -> Result<MemoryInfo, gpu::Error> {
        let (free, total) = self.context.mem_get_info().map_err(fault("cuMemGetInfo"))?;
        Ok(MemoryInfo { free, total })
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>, gpu::Error> {
        self.bind()?;
        // SAFETY: the caller's pool frees it, after its last use.
        match unsafe { result::malloc_sync(bytes) } {
            Ok(at) => Ok(Some(Address(at))),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
            Err(e) => Err(fault("cuMemAlloc")(e)),
        }
    }

    fn free(&self, at: Address) -> Result<(), gpu::Error> {
        self.synchronize()?;
        // SAFETY: it came from `allocate`, and the work that used it is done.
        unsafe { result::free_sync(at.0) }.map_err(fault("cuMemFree"))
    }

    fn copy_in(&self, to: Address, bytes: &[u8]) -> Result<(), gpu::Error> {
        self.bind()?;
        if bytes.len() <= SMALL {
            // SAFETY: the range lies in the caller's allocation.
            unsafe { result::memcpy_htod_async(to.0, bytes, self.stream) }.map_err(fault("cuMemcpyHtoDAsync"))?;
            // Pageable memory is staged before the call returns (CUDA Driver API, "API synchronization behavior"), so that the
            // stream may go on, but where the GPU can read it as it is.
            return if self.reads_pageable { self.synchronize() } else { Ok(()) };
        }
        self.with_staging(|staging| staging.copy_in(to.0, bytes, self.stream)).map_err(fault("a copy to the GPU"))
    }

    fn copy_out(&self, from: Address, bytes: &mut [u8]) -> Result<(), gpu::Error> {
        self.bind()?;
        if bytes.len() <= SMALL {
            // SAFETY: the range lies in the caller's allocation, and `bytes` is not touched before the stream is done.
            unsafe { result::memcpy_dtoh_async(bytes, from.0, self.stream) }.map_err(fault("cuMemcpyDtoHAsync"))?;
            return self.synchronize();
        }
        self.with_staging(|staging| staging.copy_out(from.0, bytes, self.stream)).map_err(fault("a copy from the GPU"))
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), gpu::Error> {
        self.bind()?;
        // SAFETY: the ranges lie in the caller's allocations and do not overlap.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream) }.map_err(fault("cuMemcpyDtoDAsync"))
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), gpu::Error> {
        self.bind()?;
        // SAFETY: the range lies in the caller's allocation.
        unsafe { result::memset_d8_async(at.0, 0, bytes, self.stream) }.map_err(fault("cuMemsetD8Async"))
    }

    unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) -> Result<(), gpu::Error> {
        assert!(args.len() <= MAX_ARGS, "{} arguments for {}", args.len(), kernel.name);
        self.bind()?;
        let function = self.function(kernel)?;
        if grid.shared > function.shared {
            self.allow(kernel, function, grid.shared)?;
        }
        let mut slots = packed(args);
        let mut pointers = slots.each_mut().map(|slot| slot.as_mut_ptr().cast::<c_void>());
        let [x, y, z] = grid.blocks;
        // SAFETY: the arguments are the kernel's, by the caller's contract; the driver copies them before it returns.
        let launched = unsafe {
            let params = &mut pointers[..args.len()];
            result::launch_kernel(
                function.raw,
                (x, y, z),
                (grid.threads, 1, 1),
                grid.shared as u32,
                self.stream,
                params,
            )
        };
        launched.map_err(|e| gpu::Error::Fault {
            call: format!("kernel {} with {grid:?}", kernel.name),
            message: driver_says(e),
        })
    }

    fn gemm(&self, gemm: &Gemm) -> Result<(), gpu::Error> {
        self.bind()?;
        self.cublas.as_ref().expect("set in `open`").gemm(gemm)
    }

    fn synchronize(&self) -> Result<(), gpu::Error> {
        self.bind()?;
        // SAFETY: the stream lives as long as this value.
        unsafe { result::stream::synchronize(self.stream) }.map_err(fault("cuStreamSynchronize"))
    }
}

impl Drop for Nvidia {
    /// A fault has shown before. The context may live on in another value.
    fn drop(&mut self) {
        _ = self.synchronize();
        self.cublas = None;
        *lock(&self.staging) = None;
        // SAFETY: the queued work is done, and nothing else uses them.
        unsafe {
            if self.workspace != Address::NULL {
                _ = result::free_sync(self.workspace.0);
            }
            for module in self.modules.values() {
                _ = result::module::unload(*module);
            }
            _ = result::stream::destroy(self.stream);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{self, Coded};

    #[test]
    fn arguments_lie_where_the_kernel_reads_them() {
        let args =
            [Arg::Pointer(Address(0x1122_3344_5566_7788)), Arg::I32(-2), Arg::F32(1.5), Arg::F64(-0.5), Arg::U32(7)];
        let slots = packed(&args);
        // As the GPU does: so many bytes from each address.
        let read = |i: usize| slots[i].as_ptr();
        // SAFETY: 8 bytes lie at each; types of any alignment are read unaligned.
        unsafe {
            assert_eq!(read(0).cast::<u64>().read_unaligned(), 0x1122_3344_5566_7788);
            assert_eq!(read(1).cast::<i32>().read_unaligned(), -2);
            assert_eq!(read(2).cast::<f32>().read_unaligned(), 1.5);
            assert_eq!(read(3).cast::<f64>().read_unaligned(), -0.5);
            assert_eq!(read(4).cast::<u32>().read_unaligned(), 7);
        }
    }

    #[test]
    fn without_a_driver_the_message_says_where_it_was_looked_for() {
        let surroundings = Surroundings::read(|name| (name == "LD_LIBRARY_PATH").then(|| "/some/where".into()));
        match Nvidia::open(usize::MAX, &surroundings, None) {
            // No machine has so many.
            Err(Error::NoSuchDevice { .. } | Error::NoDevice | Error::OldDriver { .. } | Error::Driver { .. }) => {}
            Err(error @ Error::Missing { .. }) => {
                let message = error.to_string();
                for part in ["libcuda.so.1", "/some/where", "/usr/lib/wsl/lib", "--device cpu"] {
                    assert!(message.contains(part), "{part} is not in: {message}");
                }
                assert_eq!(error.exit_code(), exit::LAUNCHER);
            }
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("GPU {} was opened", usize::MAX),
        }
    }
}
