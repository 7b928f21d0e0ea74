//! NVIDIA GPUs: [`Nvidia`] implements [`Gpu`] with the driver, NVRTC and cuBLAS, all found at run time.
//!
//! Decisions are made above the [`Gpu`] trait, or in pure functions with tests; here each method makes one or two
//! calls. The driver's functions are documented in the CUDA Driver API manual,
//! <https://docs.nvidia.com/cuda/cuda-driver-api/>.

mod cache;
mod cublas;
mod driver;
mod error;
pub mod library;
mod loads;
mod names;
mod nvrtc;
mod sharing;
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
use self::loads::Loads;
pub use self::nvrtc::{Compiled, Nvrtc, options};
use self::staging::Staging;
use super::gpu::{
    self, Address, Architecture, Arg, Gemm, Gpu, Grid, HostAddress, Imported, Kernel, Load, LoadPart, MemoryInfo,
    Module,
};
use super::kernels::{self, MODULES};

/// The oldest compute capability with bf16.
const OLDEST_SM: u32 = 80;
/// Shared memory per block that needs no opt-in, in bytes (CUDA C++ Programming Guide, "Compute Capabilities").
const SHARED_WITHOUT_OPT_IN: usize = 48 << 10;
/// Copies of at most this many bytes do not use the large staging buffers.
const SMALL: usize = 64 << 10;

/// One GPU: a context, one stream for all its work, and one for loads.
pub struct Nvidia {
    name: String,
    /// Versions of the driver and the libraries, for the log.
    software: String,
    architecture: Architecture,
    stream: sys::CUstream,
    cublas: Option<Cublas>,
    workspace: Address,
    modules: HashMap<&'static str, sys::CUmodule>,
    functions: Mutex<HashMap<(&'static str, &'static str), Function>>,
    staging: Mutex<Option<Staging>>,
    loads: Mutex<Option<Loads>>,
    /// Dropped last, because it owns the context.
    context: Arc<CudaContext>,
}

/// A loaded kernel.
#[derive(Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    /// The most dynamic shared memory that it may be launched with, in bytes.
    shared: usize,
}

// SAFETY: the driver's handles may be used from any thread in which the context is current; every method makes it
// current.
unsafe impl Send for Nvidia {}
// SAFETY: as for Send.
unsafe impl Sync for Nvidia {}

/// How a GPU is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Opening<'a> {
    /// The folder of compiled kernels.
    pub kernel_cache: Option<&'a Path>,
    /// Macros for all kernels, by which benchmarks compare variants.
    pub defines: &'a [String],
}

impl Nvidia {
    /// Opens GPU `index` and loads all kernels, from the folder `kernel_cache` or compiled.
    ///
    /// # Errors
    /// A library or the GPU is missing or too old; a kernel does not compile.
    pub fn open(index: usize, surroundings: &Surroundings, kernel_cache: Option<&Path>) -> Result<Self, Error> {
        Self::open_with(index, surroundings, &Opening { kernel_cache, defines: &[] })
    }

    /// The same with more options.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_with(index: usize, surroundings: &Surroundings, opening: &Opening<'_>) -> Result<Self, Error> {
        let Driver { version, devices } = Driver::start(surroundings)?;
        if index >= devices {
            return Err(Error::NoSuchDevice { index, devices });
        }
        // Before the context, so that a missing library is reported immediately.
        let nvrtc = Nvrtc::new(&library::open(Library::Nvrtc, version.0, surroundings)?)?;
        let cublas = library::open(Library::Cublas, version.0, surroundings)?;

        let context = CudaContext::new(index).map_err(refused("cuDevicePrimaryCtxRetain"))?;
        let name = context.name().map_err(refused("cuDeviceGetName"))?;
        let architecture = architecture(&context).map_err(refused("cuDeviceGetAttribute"))?;
        if architecture.sm < OLDEST_SM {
            return Err(Error::OldGpu { name, sm: architecture.sm });
        }
        let modules: Vec<_> = MODULES.iter().copied().filter(|module| module.runs_on(architecture.sm)).collect();
        let cubins = cubins(&nvrtc, opening, &modules, architecture.sm)?;

        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(refused("cuStreamCreate"))?;
        let software =
            format!("driver for CUDA {}.{}, {nvrtc}, cuBLAS ({})", version.0, version.1, cublas.path.display());
        let mut gpu = Self {
            name,
            software,
            architecture,
            stream,
            cublas: None,
            workspace: Address::NULL,
            modules: HashMap::new(),
            functions: Mutex::default(),
            staging: Mutex::default(),
            loads: Mutex::default(),
            context,
        };
        for (module, cubin) in modules.iter().zip(cubins) {
            // SAFETY: NVRTC's output, or the same from the cache with a matching hash, is a complete cubin.
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

    /// The UUID of the GPU, unique across machines.
    ///
    /// # Errors
    /// An error of the driver.
    pub fn uuid(&self) -> Result<Vec<u8>, gpu::Error> {
        let uuid = self.context.uuid().map_err(fault("cuDeviceGetUuid"))?;
        Ok(uuid.bytes.map(|byte| byte as u8).to_vec())
    }

    /// The stream, so that `collective::nccl` can order its work with it.
    pub fn stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Makes this GPU's context current in the calling thread.
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
        // SAFETY: modules stay loaded as long as `self` lives.
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
        let function = Function { raw, shared: SHARED_WITHOUT_OPT_IN.saturating_sub(statically as usize) };
        functions.insert(key, function);
        Ok(function)
    }

    /// Raises the limit of a kernel's dynamic shared memory, once. The carveout is set to 100 %, so that a second block
    /// fits on a multiprocessor.
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

    fn with_loads<T>(&self, run: impl FnOnce(&mut Loads) -> Result<T, DriverError>) -> Result<T, DriverError> {
        let mut loads = lock(&self.loads);
        let loads = match &mut *loads {
            Some(loads) => loads,
            none => none.insert(Loads::new()?),
        };
        run(loads)
    }

    /// Waits for both streams.
    fn synchronize_all(&self) -> Result<(), gpu::Error> {
        self.synchronize()?;
        let loads = lock(&self.loads);
        loads.as_ref().map_or(Ok(()), Loads::synchronize).map_err(fault("cuStreamSynchronize"))
    }
}

fn architecture(context: &CudaContext) -> Result<Architecture, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    let (major, minor) = context.compute_capability()?;
    let processors = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let shared = context.attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
    Ok(Architecture { sm: (10 * major + minor) as u32, processors: processors as u32, shared: shared as usize })
}

/// The cubins of these modules, in order, for a GPU of compute capability `sm`.
fn cubins(nvrtc: &Nvrtc, opening: &Opening<'_>, modules: &[&Module], sm: u32) -> Result<Vec<Vec<u8>>, Error> {
    let cache = Cache::new(opening.kernel_cache);
    let mut options = options(sm);
    options.extend(opening.defines.iter().map(|name| format!("--define-macro={name}")));
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
                ": the GPU's memory is already full at the start; nvidia-smi shows which processes use it, CUDA_VISIBLE_DEVICES selects another GPU"
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

/// The arguments in the layout of cuLaunchKernel: each at an address of its own, with as many bytes as the kernel's
/// type has.
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
        // SAFETY: the caller frees it after its last use.
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
            let copied = self.with_staging(|staging| staging.copy_in_small(to.0, bytes, self.stream));
            return copied.map_err(fault("copy to the GPU"));
        }
        self.with_staging(|staging| staging.copy_in(to.0, bytes, self.stream)).map_err(fault("copy to the GPU"))
    }

    fn copy_out(&self, from: Address, bytes: &mut [u8]) -> Result<(), gpu::Error> {
        self.bind()?;
        if bytes.len() <= SMALL {
            // SAFETY: the range is in the caller's allocation, and `bytes` is not used before the stream is
            // synchronized.
            unsafe { result::memcpy_dtoh_async(bytes, from.0, self.stream) }.map_err(fault("cuMemcpyDtoHAsync"))?;
            return self.synchronize();
        }
        self.with_staging(|staging| staging.copy_out(from.0, bytes, self.stream)).map_err(fault("copy from the GPU"))
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), gpu::Error> {
        self.bind()?;
        // SAFETY: the ranges are in the caller's allocations and do not overlap.
        unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, self.stream) }.map_err(fault("cuMemcpyDtoDAsync"))
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), gpu::Error> {
        self.bind()?;
        // SAFETY: the range is in the caller's allocation.
        unsafe { result::memset_d8_async(at.0, 0, bytes, self.stream) }.map_err(fault("cuMemsetD8Async"))
    }

    fn allocate_host(&self, bytes: usize) -> Result<Option<HostAddress>, gpu::Error> {
        self.bind()?;
        // SAFETY: the caller frees it after its last use.
        match unsafe { result::malloc_host(bytes, 0) } {
            Ok(at) => Ok(Some(HostAddress(at as u64))),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
            Err(e) => Err(fault("cuMemHostAlloc")(e)),
        }
    }

    fn free_host(&self, at: HostAddress) -> Result<(), gpu::Error> {
        self.synchronize_all()?;
        // SAFETY: it came from `allocate_host`, and the work that used it is done.
        unsafe { result::free_host(at.0 as *mut c_void) }.map_err(fault("cuMemFreeHost"))
    }

    fn write_host(&self, to: HostAddress, bytes: &[u8]) -> Result<(), gpu::Error> {
        self.synchronize_all()?;
        // SAFETY: the range is in the caller's allocation, and no queued work uses it.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
        Ok(())
    }

    fn read_host(&self, from: HostAddress, bytes: &mut [u8]) -> Result<(), gpu::Error> {
        self.synchronize()?;
        // SAFETY: the range is in the caller's allocation, and no queued work writes it: loads only read.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    fn store(&self, from: Address, to: HostAddress, bytes: usize) -> Result<(), gpu::Error> {
        self.bind()?;
        // SAFETY: the ranges are in the caller's allocations; every access of the host waits for the stream first.
        unsafe {
            let to = std::slice::from_raw_parts_mut(to.0 as *mut u8, bytes);
            result::memcpy_dtoh_async(to, from.0, self.stream)
        }
        .map_err(fault("cuMemcpyDtoHAsync"))
    }

    fn load(&self, parts: &[LoadPart]) -> Result<Load, gpu::Error> {
        self.bind()?;
        // SAFETY: the ranges are in the caller's allocations, or in those of ranks that keep them; freeing and writing wait for all
        // loads.
        let load = |loads: &mut Loads| unsafe { loads.load(parts, self.stream) };
        self.with_loads(load).map_err(fault("copy of parameters to the GPU"))
    }

    fn await_load(&self, load: Load) -> Result<(), gpu::Error> {
        self.bind()?;
        self.with_loads(|loads| loads.await_load(load, self.stream)).map_err(fault("cuStreamWaitEvent"))
    }

    fn reach(&self, at: Address) -> Result<(), gpu::Error> {
        self.bind()?;
        sharing::reach(&self.context, at)
    }

    fn export(&self, at: Address) -> Result<Vec<u8>, gpu::Error> {
        self.bind()?;
        sharing::export(at)
    }

    fn import(&self, exported: &[u8]) -> Result<Imported, gpu::Error> {
        self.bind()?;
        sharing::import(exported)
    }

    fn close(&self, imported: Imported) -> Result<(), gpu::Error> {
        self.synchronize_all()?;
        sharing::close(imported)
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
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(self.stream) }.map_err(fault("cuStreamSynchronize"))
    }
}

impl Drop for Nvidia {
    /// Errors are ignored: a fault has been reported before. Other clones of the context may live on.
    fn drop(&mut self) {
        _ = self.synchronize();
        self.cublas = None;
        *lock(&self.staging) = None;
        *lock(&self.loads) = None;
        // SAFETY: the queued work is complete, and nothing else uses them.
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
    fn arguments_are_packed_as_the_driver_reads_them() {
        let args =
            [Arg::Pointer(Address(0x1122_3344_5566_7788)), Arg::I32(-2), Arg::F32(1.5), Arg::F64(-0.5), Arg::U32(7)];
        let slots = packed(&args);
        // Read as many bytes from each address as the driver does.
        let read = |i: usize| slots[i].as_ptr();
        // SAFETY: there are 8 bytes at each address, and the reads are unaligned.
        unsafe {
            assert_eq!(read(0).cast::<u64>().read_unaligned(), 0x1122_3344_5566_7788);
            assert_eq!(read(1).cast::<i32>().read_unaligned(), -2);
            assert_eq!(read(2).cast::<f32>().read_unaligned(), 1.5);
            assert_eq!(read(3).cast::<f64>().read_unaligned(), -0.5);
            assert_eq!(read(4).cast::<u32>().read_unaligned(), 7);
        }
    }

    #[test]
    fn without_a_driver_the_message_lists_the_searched_places() {
        let surroundings = Surroundings::read(|name| (name == "LD_LIBRARY_PATH").then(|| "/some/where".into()));
        match Nvidia::open(usize::MAX, &surroundings, None) {
            // No machine has this many GPUs.
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
