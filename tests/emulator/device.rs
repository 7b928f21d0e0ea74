//! The device of a test: the emulator, or the GPU with the index in `MOEWARDEN_TEST_GPU`. On a GPU new memory is filled
//! with NaN and guarded, unless `MOEWARDEN_TEST_PLAIN_MEMORY` is set, for checkers of uninitialized memory.

use std::collections::HashMap;
use std::ops::Deref;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use moewarden::backend::DeviceFault;
use moewarden::backend::cuda::gpu::{
    Address, Architecture, Arg, Error, Gemm, Gpu, Grid, HostAddress, Imported, Kernel, Load, LoadPart, MemoryInfo,
};
use moewarden::backend::cuda::nvidia::Nvidia;
use moewarden::backend::cuda::nvidia::library::Surroundings;
use moewarden::launch::kernel_cache;

use super::{Emulated, GUARD, POISON};

/// The index of the real GPU, if the tests run on one.
fn index() -> Option<usize> {
    let index = std::env::var("MOEWARDEN_TEST_GPU").ok()?;
    Some(index.parse().unwrap_or_else(|_| panic!("MOEWARDEN_TEST_GPU={index} is no index of a GPU")))
}

/// Whether the tests run on a real GPU.
pub fn is_real() -> bool {
    index().is_some()
}

/// A device whose new memory contains NaN, and that detects writes outside allocations.
pub fn gpu() -> Arc<dyn Gpu> {
    shuffled(0)
}

/// The same, with blocks and threads in an order that depends on the seed if it is emulated.
pub fn shuffled(seed: u64) -> Arc<dyn Gpu> {
    show_faults();
    match index() {
        Some(index) => {
            let guarded = Guarded::new(Lent::open(index));
            let plain = std::env::var_os("MOEWARDEN_TEST_PLAIN_MEMORY").is_some();
            Arc::new(Guarded { guard: if plain { 0 } else { guarded.guard }, ..guarded })
        }
        None => Arc::new(Emulated::shuffled(seed)),
    }
}

/// Operations fail by unwinding with a [`DeviceFault`], whose text the default hook does not print.
fn show_faults() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if let Some(fault) = info.payload().downcast_ref::<DeviceFault>() {
                eprintln!("{fault}");
            }
            usual(info);
        }));
    });
}

/// Whether the device is emulated. If not, prints that `what` is skipped.
pub fn emulator_only(what: &str) -> bool {
    if is_real() {
        use std::io::Write;
        _ = writeln!(std::io::stderr(), "skipped on the GPU: {what}"); // unlike eprintln!, not captured
    }
    !is_real()
}

/// Open GPUs that no test uses now. Each test has its own, with a stream of its own. A static is never dropped, so
/// nothing is freed while the driver shuts down.
static IDLE: Mutex<Vec<Nvidia>> = Mutex::new(Vec::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A real GPU that returns to [`IDLE`] on drop.
struct Lent(Option<Nvidia>);

impl Lent {
    fn open(index: usize) -> Self {
        let idle = lock(&IDLE).pop();
        let cache = kernel_cache();
        let open = || Nvidia::open(index, &Surroundings::read(|name| std::env::var_os(name)), cache.as_deref());
        Self(Some(idle.unwrap_or_else(|| open().unwrap_or_else(|error| panic!("{error}")))))
    }
}

impl Deref for Lent {
    type Target = Nvidia;
    fn deref(&self) -> &Nvidia {
        self.0.as_ref().expect("there until it is dropped")
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        lock(&IDLE).extend(self.0.take());
    }
}

/// A device that fills new memory with NaN and, when memory is freed, detects writes outside it.
pub struct Guarded<G> {
    /// The device.
    gpu: G,
    /// Bytes of each guard; 0: no guards and no NaN.
    guard: usize,
    /// Bytes of each allocation.
    blocks: Mutex<HashMap<Address, usize>>,
}

impl<G: Deref<Target: Gpu>> Guarded<G> {
    pub fn new(gpu: G) -> Self {
        Self { gpu, guard: GUARD, blocks: Mutex::default() }
    }

    fn poison(&self, at: Address, bytes: usize) -> Result<(), Error> {
        let mut done = bytes.min(1 << 16);
        self.gpu.copy_in(at, &vec![POISON; done])?;
        while done < bytes {
            let more = done.min(bytes - done);
            self.gpu.copy(at, at.offset(done), more)?;
            done += more;
        }
        Ok(())
    }
}

impl<G: Deref<Target: Gpu> + Send + Sync + 'static> Gpu for Guarded<G> {
    fn name(&self) -> String {
        self.gpu.name()
    }

    fn architecture(&self) -> Architecture {
        self.gpu.architecture()
    }

    fn memory(&self) -> Result<MemoryInfo, Error> {
        self.gpu.memory()
    }

    fn allocate(&self, bytes: usize) -> Result<Option<Address>, Error> {
        let Some(start) = self.gpu.allocate(bytes + 2 * self.guard)? else { return Ok(None) };
        if self.guard > 0 {
            self.poison(start, bytes + 2 * self.guard)?;
        }
        let at = start.offset(self.guard);
        lock(&self.blocks).insert(at, bytes);
        Ok(Some(at))
    }

    fn free(&self, at: Address) -> Result<(), Error> {
        let bytes = lock(&self.blocks).remove(&at).expect("an allocation");
        let start = Address(at.0 - self.guard as u64);
        if self.guard > 0 {
            for (guard, place) in [(start, "before"), (at.offset(bytes), "behind")] {
                let mut found = vec![0; self.guard];
                self.gpu.copy_out(guard, &mut found)?;
                // Not in a panic: a second one would abort.
                let whole = found.iter().all(|&byte| byte == POISON) || std::thread::panicking();
                assert!(whole, "something wrote {place} an allocation of {bytes} bytes");
            }
        }
        self.gpu.free(start)
    }

    fn copy_in(&self, to: Address, bytes: &[u8]) -> Result<(), Error> {
        self.gpu.copy_in(to, bytes)
    }

    fn copy_out(&self, from: Address, bytes: &mut [u8]) -> Result<(), Error> {
        self.gpu.copy_out(from, bytes)
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), Error> {
        self.gpu.copy(from, to, bytes)
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), Error> {
        self.gpu.zero(at, bytes)
    }

    fn allocate_host(&self, bytes: usize) -> Result<Option<HostAddress>, Error> {
        self.gpu.allocate_host(bytes)
    }

    fn free_host(&self, at: HostAddress) -> Result<(), Error> {
        self.gpu.free_host(at)
    }

    fn write_host(&self, to: HostAddress, bytes: &[u8]) -> Result<(), Error> {
        self.gpu.write_host(to, bytes)
    }

    fn read_host(&self, from: HostAddress, bytes: &mut [u8]) -> Result<(), Error> {
        self.gpu.read_host(from, bytes)
    }

    fn store(&self, from: Address, to: HostAddress, bytes: usize) -> Result<(), Error> {
        self.gpu.store(from, to, bytes)
    }

    fn load(&self, parts: &[LoadPart]) -> Result<Load, Error> {
        self.gpu.load(parts)
    }

    fn await_load(&self, load: Load) -> Result<(), Error> {
        self.gpu.await_load(load)
    }

    fn reach(&self, at: Address) -> Result<(), Error> {
        self.gpu.reach(at)
    }

    fn export(&self, at: Address) -> Result<Vec<u8>, Error> {
        self.gpu.export(at)
    }

    fn import(&self, exported: &[u8]) -> Result<Imported, Error> {
        self.gpu.import(exported)
    }

    fn close(&self, imported: Imported) -> Result<(), Error> {
        self.gpu.close(imported)
    }

    unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) -> Result<(), Error> {
        // SAFETY: the caller's contract.
        unsafe { self.gpu.launch(kernel, grid, args) }
    }

    fn gemm(&self, gemm: &Gemm) -> Result<(), Error> {
        self.gpu.gemm(gemm)
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.gpu.synchronize()
    }
}
