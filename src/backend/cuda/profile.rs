//! A profile of GPU operations: synchronizes after every operation and adds up the times by name.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::gpu::{
    Address, Architecture, Arg, Error, Gemm, Gpu, Grid, HostAddress, Imported, Kernel, Load, LoadPart, MemoryInfo,
    Source,
};

/// A GPU that waits for each operation before the next. This slows a run down by some microseconds per operation, and
/// nothing overlaps.
pub struct Profiled {
    gpu: Arc<dyn Gpu>,
    times: Arc<Times>,
}

/// Counts and times by the name of the operation.
#[derive(Default)]
pub struct Times(Mutex<HashMap<String, Time>>);

/// All operations with one name.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Time {
    count: u64,
    total: Duration,
}

impl Profiled {
    /// Adds the operations of this GPU to `times`.
    pub fn new(gpu: Arc<dyn Gpu>, times: Arc<Times>) -> Self {
        Self { gpu, times }
    }

    fn timed<T>(&self, name: impl FnOnce() -> String, run: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        let start = Instant::now();
        let out = run()?;
        self.gpu.synchronize()?;
        self.times.add(name(), start.elapsed());
        Ok(out)
    }
}

impl Times {
    fn add(&self, name: String, time: Duration) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = times.entry(name).or_default();
        entry.count += 1;
        entry.total += time;
    }
}

/// One line per name, the longest time first: share, seconds, count, name.
impl fmt::Display for Times {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rows: Vec<_> = times.iter().collect();
        rows.sort_by(|a, b| b.1.total.cmp(&a.1.total).then_with(|| a.0.cmp(b.0)));
        let all: Duration = rows.iter().map(|(_, time)| time.total).sum();
        write!(f, "where the GPU's time went, of {:.3} s", all.as_secs_f64())?;
        for (name, Time { count, total }) in rows {
            let share = 100.0 * total.as_secs_f64() / all.as_secs_f64().max(f64::MIN_POSITIVE);
            write!(f, "\n  {share:5.1} % {:10.3} s {count:9} x {name}", total.as_secs_f64())?;
        }
        Ok(())
    }
}

impl Gpu for Profiled {
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
        self.timed(|| "allocation".into(), || self.gpu.allocate(bytes))
    }

    fn free(&self, at: Address) -> Result<(), Error> {
        self.gpu.free(at)
    }

    fn copy_in(&self, to: Address, bytes: &[u8]) -> Result<(), Error> {
        self.timed(|| "copy from the host".into(), || self.gpu.copy_in(to, bytes))
    }

    fn copy_out(&self, from: Address, bytes: &mut [u8]) -> Result<(), Error> {
        self.timed(|| "copy to the host".into(), || self.gpu.copy_out(from, bytes))
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), Error> {
        self.timed(|| "copy".into(), || self.gpu.copy(from, to, bytes))
    }

    fn zero(&self, at: Address, bytes: usize) -> Result<(), Error> {
        self.timed(|| "zero".into(), || self.gpu.zero(at, bytes))
    }

    fn allocate_host(&self, bytes: usize) -> Result<Option<HostAddress>, Error> {
        self.timed(|| "allocation of pinned host memory".into(), || self.gpu.allocate_host(bytes))
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
        self.timed(|| "parameters to the host".into(), || self.gpu.store(from, to, bytes))
    }

    /// Timed to its end, so that it does not overlap with anything.
    fn load(&self, parts: &[LoadPart]) -> Result<Load, Error> {
        let run = || {
            let load = self.gpu.load(parts)?;
            self.gpu.await_load(load)?;
            Ok(load)
        };
        let from = match parts.first().map(|part| part.from) {
            Some(Source::Gpu(_)) => "GPUs",
            _ => "the host",
        };
        self.timed(|| format!("experts of a layer from {from}"), run)
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
        // SAFETY: the caller's contract is the same.
        let launch = || unsafe { self.gpu.launch(kernel, grid, args) };
        self.timed(|| format!("{} ({}.cu)", kernel.name, kernel.module.stem), launch)
    }

    fn gemm(&self, gemm: &Gemm) -> Result<(), Error> {
        // Named by the shape of the weight, not by the number of rows.
        let name = || match gemm.a.transposed {
            true => format!("cuBLAS, {:?}, gradient of a weight [{}, {}]", gemm.dtype, gemm.m, gemm.n),
            false => format!("cuBLAS, {:?}, rows of {} to rows of {}", gemm.dtype, gemm.k, gemm.n),
        };
        self.timed(name, || self.gpu.gemm(gemm))
    }

    fn synchronize(&self) -> Result<(), Error> {
        self.gpu.synchronize()
    }
}
