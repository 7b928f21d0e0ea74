//! A GPU emulated on the CPU: kernels compiled as C++ with `gpu.h`, `mma.h` and `wgmma.h`, memory with guards and
//! poison, and dense products that round as cuBLAS does.

pub mod device;

use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ffi::{CStr, CString, c_char};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use gemm::Parallelism;
use libloading::{Library, Symbol};
use moewarden::backend::cuda::gpu::{
    Address, Architecture, Arg, Error, Gemm, Gpu, Grid, HostAddress, Imported, Kernel, Load, LoadPart, MemoryInfo,
    Module, Operand, Source,
};
use moewarden::backend::cuda::kernels::COMMON;
use moewarden::backend::{Dtype, decode_into, encode_into};

const COMPILER: &str = "c++";
const HEADER: &str = include_str!("gpu.h");
/// What stands in for the kernels' files of PTX instructions.
const MMA: &str = include_str!("mma.h");
const WGMMA: &str = include_str!("wgmma.h");

/// Guard bytes before and after each allocation, and the alignment of allocations.
const GUARD: usize = 256;
/// NaN in every format, and a huge integer.
const POISON: u8 = 0xff;

/// An emulated GPU with `limit` bytes of memory.
pub struct Emulated {
    /// 0: blocks and threads run in order. Else their order is shuffled, differently in each launch.
    seed: u64,
    limit: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Bytes of each allocation.
    blocks: BTreeMap<u64, usize>,
    used: usize,
    launches: u64,
    /// Pinned host memory: bytes by address.
    pinned: BTreeMap<u64, Vec<u8>>,
    /// Loads that nothing has waited for yet. They run as late as allowed, so that premature reads are detected.
    waiting: VecDeque<Vec<LoadPart>>,
    /// Loads that have run.
    loaded: u64,
    /// Kernels that were launched while a load was waiting.
    beside_loads: u64,
}

impl Emulated {
    pub fn new() -> Self {
        Self::shuffled(0)
    }

    /// With blocks and threads in an order that depends on the seed, unless it is 0.
    pub fn shuffled(seed: u64) -> Self {
        Self { seed, limit: 1 << 34, state: Mutex::default() }
    }

    /// With `limit` bytes of memory.
    pub fn with_room(limit: usize) -> Self {
        Self { seed: 0, limit, state: Mutex::default() }
    }

    /// Number of loads so far, and of kernels that were launched before a queued load was needed.
    pub fn loads(&self) -> (u64, u64) {
        let state = self.lock();
        (state.loaded + state.waiting.len() as u64, state.beside_loads)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + 2 * GUARD, GUARD).expect("a size")
}

impl State {
    /// Panics unless these bytes are within one allocation.
    #[track_caller]
    fn check(&self, at: Address, bytes: usize) {
        let found = self.blocks.range(..=at.0).next_back();
        let inside = found.is_some_and(|(start, len)| at.0 + bytes as u64 <= start + *len as u64);
        assert!(inside, "{bytes} bytes at {at:?} are not allocated");
    }

    /// Panics unless these bytes are within one allocation of pinned host memory.
    #[track_caller]
    fn pinned(&mut self, at: HostAddress, len: usize) -> &mut [u8] {
        let found = self.pinned.range_mut(..=at.0).next_back();
        let (start, bytes) = found.expect("pinned host memory");
        let start = (at.0 - start) as usize;
        &mut bytes[start..start + len]
    }

    /// Runs the first `count` loads.
    fn run_loads(&mut self, count: u64) {
        while self.loaded < count {
            for LoadPart { from, to, bytes: len } in self.waiting.pop_front().expect("a load") {
                self.check(to, len);
                let source = match from {
                    Source::Host(from) => self.pinned(from, len).to_vec(),
                    // SAFETY: its owner keeps it as long as another rank may read it.
                    Source::Gpu(from) => unsafe { bytes(from, len) }.to_vec(),
                };
                // SAFETY: checked.
                unsafe { bytes(to, len) }.copy_from_slice(&source);
            }
            self.loaded += 1;
        }
    }

    fn run_all_loads(&mut self) {
        self.run_loads(self.loaded + self.waiting.len() as u64);
    }

    /// Panics if a guard was overwritten.
    #[track_caller]
    fn check_guards(&self, after: &str) {
        for (&start, &len) in &self.blocks {
            for (at, where_) in [(start - GUARD as u64, "before"), (start + len as u64, "behind")] {
                // SAFETY: the guards are part of the allocation.
                let guard = unsafe { std::slice::from_raw_parts(at as *const u8, GUARD) };
                assert!(guard == [POISON; GUARD], "{after} wrote {where_} an allocation of {len} bytes");
            }
        }
    }
}

/// # Safety
/// The bytes must be allocated.
unsafe fn bytes<'a>(at: Address, len: usize) -> &'a mut [u8] {
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts_mut(at.0 as *mut u8, len) }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let state = self.lock();
        for (&start, &len) in &state.blocks {
            // SAFETY: allocated with this layout, and not freed.
            unsafe { dealloc((start - GUARD as u64) as *mut u8, layout(len)) };
        }
    }
}

impl Gpu for Emulated {
    fn name(&self) -> String {
        "emulated".into()
    }

    fn architecture(&self) -> Architecture {
        Architecture { sm: 0, processors: 4, shared: 227 * 1024 }
    }

    fn memory(&self) -> Result<MemoryInfo, Error> {
        Ok(MemoryInfo { free: self.limit - self.lock().used, total: self.limit })
    }

    fn allocate(&self, len: usize) -> Result<Option<Address>, Error> {
        assert!(len > 0, "an empty allocation");
        let mut state = self.lock();
        if state.used + len > self.limit {
            return Ok(None);
        }
        // SAFETY: the layout is not empty; all of it is written before it is read.
        let at = unsafe {
            let start = alloc(layout(len));
            assert!(!start.is_null());
            start.write_bytes(POISON, len + 2 * GUARD);
            start.add(GUARD) as u64
        };
        state.blocks.insert(at, len);
        state.used += len;
        Ok(Some(Address(at)))
    }

    fn free(&self, at: Address) -> Result<(), Error> {
        let mut state = self.lock();
        let waiting = state.waiting.iter().flatten();
        assert!(waiting.into_iter().all(|part| part.to != at), "freed before a load into it has run");
        let len = state.blocks.remove(&at.0).expect("an allocation");
        state.used -= len;
        // SAFETY: as it was allocated.
        unsafe { dealloc((at.0 - GUARD as u64) as *mut u8, layout(len)) };
        Ok(())
    }

    fn copy_in(&self, to: Address, from: &[u8]) -> Result<(), Error> {
        self.lock().check(to, from.len());
        // SAFETY: checked.
        unsafe { bytes(to, from.len()) }.copy_from_slice(from);
        Ok(())
    }

    fn copy_out(&self, from: Address, to: &mut [u8]) -> Result<(), Error> {
        self.lock().check(from, to.len());
        // SAFETY: checked.
        to.copy_from_slice(unsafe { bytes(from, to.len()) });
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, len: usize) -> Result<(), Error> {
        let state = self.lock();
        state.check(from, len);
        state.check(to, len);
        // SAFETY: checked.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0 as *mut u8, len) };
        Ok(())
    }

    fn zero(&self, at: Address, len: usize) -> Result<(), Error> {
        self.lock().check(at, len);
        // SAFETY: checked.
        unsafe { bytes(at, len) }.fill(0);
        Ok(())
    }

    fn allocate_host(&self, len: usize) -> Result<Option<HostAddress>, Error> {
        let mut block = vec![POISON; len];
        let at = block.as_mut_ptr() as u64;
        self.lock().pinned.insert(at, block);
        Ok(Some(HostAddress(at)))
    }

    fn free_host(&self, at: HostAddress) -> Result<(), Error> {
        let mut state = self.lock();
        state.run_all_loads();
        state.pinned.remove(&at.0).expect("pinned host memory");
        Ok(())
    }

    fn write_host(&self, to: HostAddress, from: &[u8]) -> Result<(), Error> {
        let mut state = self.lock();
        state.run_all_loads();
        state.pinned(to, from.len()).copy_from_slice(from);
        Ok(())
    }

    fn read_host(&self, from: HostAddress, to: &mut [u8]) -> Result<(), Error> {
        to.copy_from_slice(self.lock().pinned(from, to.len()));
        Ok(())
    }

    fn store(&self, from: Address, to: HostAddress, len: usize) -> Result<(), Error> {
        let mut state = self.lock();
        state.check(from, len);
        // SAFETY: checked.
        state.pinned(to, len).copy_from_slice(unsafe { bytes(from, len) });
        Ok(())
    }

    fn load(&self, parts: &[LoadPart]) -> Result<Load, Error> {
        let mut state = self.lock();
        state.waiting.push_back(parts.to_vec());
        Ok(Load(state.loaded + state.waiting.len() as u64 - 1))
    }

    fn await_load(&self, load: Load) -> Result<(), Error> {
        self.lock().run_loads(load.0 + 1);
        Ok(())
    }

    /// The memory of all emulated GPUs is that of the process.
    fn reach(&self, _: Address) -> Result<(), Error> {
        Ok(())
    }

    fn export(&self, _: Address) -> Result<Vec<u8>, Error> {
        panic!("an emulated GPU belongs to one process")
    }

    fn import(&self, _: &[u8]) -> Result<Imported, Error> {
        panic!("an emulated GPU belongs to one process")
    }

    fn close(&self, _: Imported) -> Result<(), Error> {
        panic!("an emulated GPU belongs to one process")
    }

    /// It checks the argument list and, as far as it can, the pointers.
    unsafe fn launch(&self, kernel: &Kernel, grid: Grid, args: &[Arg]) -> Result<(), Error> {
        assert!(grid.shared <= self.architecture().shared, "{}: {} bytes of shared memory", kernel.name, grid.shared);
        assert!(grid.blocks.iter().all(|&n| n > 0), "{}: an empty grid", kernel.name);
        assert!(grid.blocks[1].max(grid.blocks[2]) <= 65535, "{}: too many blocks in y or z", kernel.name);
        let mut state = self.lock();
        state.launches += 1;
        state.beside_loads += u64::from(!state.waiting.is_empty());
        for arg in args {
            if let &Arg::Pointer(at) = arg
                && at != Address::NULL
            {
                state.check(at, 0);
            }
        }
        let (signature, bits): (Vec<u8>, Vec<u64>) = args.iter().map(encoded).unzip();
        let (name, signature) = (CString::new(kernel.name).unwrap(), CString::new(signature).unwrap());
        let seed = if self.seed == 0 { 0 } else { self.seed.wrapping_add(state.launches) };
        let compiled = compiled(kernel.module);
        let _one_at_a_time = compiled.running.lock().unwrap_or_else(PoisonError::into_inner);
        // SAFETY: the function has this type in gpu.h; kernels get memory that lives (checked as far as it can be).
        let error = unsafe {
            let run: Symbol<Launch> = compiled.library.get(b"emulator_launch\0").expect("gpu.h exports it");
            let shared = grid.shared;
            let blocks = grid.blocks.as_ptr();
            let error = run(name.as_ptr(), blocks, grid.threads, shared, signature.as_ptr(), bits.as_ptr(), seed);
            (!error.is_null()).then(|| CStr::from_ptr(error).to_string_lossy().into_owned())
        };
        // On a GPU the behavior would be undefined: a bug, not an `Error`.
        if let Some(error) = error {
            panic!("{}.cu: {error}", kernel.module.stem);
        }
        state.check_guards(kernel.name);
        Ok(())
    }

    fn gemm(&self, g: &Gemm) -> Result<(), Error> {
        assert!(g.m > 0 && g.n > 0 && g.k > 0, "an empty product: {g:?}");
        let state = self.lock();
        let read = |at: Address, dtype: Dtype, rows: usize, cols: usize, stride: usize| {
            assert!(stride >= cols, "{g:?}");
            let len = ((rows - 1) * stride + cols) * dtype.size();
            state.check(at, len);
            let mut values = vec![0f32; len / dtype.size()];
            // SAFETY: checked.
            decode_into(dtype, unsafe { bytes(at, len) }, &mut values);
            values
        };
        let factor = |o: &Operand, rows: usize, cols: usize| {
            let (r, c) = if o.transposed { (cols, rows) } else { (rows, cols) };
            let strides = if o.transposed { (o.stride as isize, 1) } else { (1, o.stride as isize) };
            (read(o.at, g.dtype, r, c, o.stride), strides)
        };
        let (a, (a_col, a_row)) = factor(&g.a, g.m, g.k);
        let (b, (b_col, b_row)) = factor(&g.b, g.k, g.n);
        let mut y = vec![0f32; g.m * g.n];
        // SAFETY: the sizes of the slices are those of the strided matrices.
        unsafe {
            let n = g.n as isize;
            ::gemm::gemm(
                g.m,
                g.n,
                g.k,
                y.as_mut_ptr(),
                1,
                n,
                false,
                a.as_ptr(),
                a_col,
                a_row,
                b.as_ptr(),
                b_col,
                b_row,
                0.0,
                g.alpha,
                false,
                false,
                false,
                Parallelism::None,
            );
        }
        let size = g.c_dtype.size();
        state.check(g.c, ((g.m - 1) * g.c_stride + g.n) * size);
        for (i, row) in y.chunks_exact_mut(g.n).enumerate() {
            // SAFETY: checked.
            let c = unsafe { bytes(g.c.offset(i * g.c_stride * size), g.n * size) };
            if g.beta != 0.0 {
                let mut old = vec![0f32; g.n];
                decode_into(g.c_dtype, c, &mut old);
                row.iter_mut().zip(old).for_each(|(y, c)| *y += g.beta * c);
            }
            encode_into(g.c_dtype, row, c);
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<(), Error> {
        Ok(())
    }
}

/// The code of an argument's type in a signature, and its bits.
fn encoded(arg: &Arg) -> (u8, u64) {
    match *arg {
        Arg::Pointer(at) => (b'p', at.0),
        Arg::I32(x) => (b'i', u64::from(x as u32)),
        Arg::U32(x) => (b'u', x.into()),
        Arg::U64(x) => (b'l', x),
        Arg::F32(x) => (b'f', x.to_bits().into()),
        Arg::F64(x) => (b'd', x.to_bits()),
    }
}

type Launch =
    unsafe extern "C" fn(*const c_char, *const u32, u32, usize, *const c_char, *const u64, u64) -> *const c_char;

/// A module as a shared library. It runs one launch at a time.
struct Compiled {
    library: Library,
    running: Mutex<()>,
}

/// The compiled module. Modules are compiled once into files named by a hash of the source, and kept for later test
/// runs.
fn compiled(module: &'static Module) -> &'static Compiled {
    static ALL: OnceLock<Mutex<HashMap<&'static str, &'static OnceLock<Compiled>>>> = OnceLock::new();
    let cell = {
        let mut all = ALL.get_or_init(Mutex::default).lock().unwrap_or_else(PoisonError::into_inner);
        *all.entry(module.stem).or_insert_with(|| Box::leak(Box::default()))
    };
    cell.get_or_init(|| {
        let path = build(module);
        // SAFETY: it was built here; loading it runs constructors that register the kernels.
        let library = unsafe { Library::new(&path) }.unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Compiled { library, running: Mutex::default() }
    })
}

/// CUDA C++ for a GPU of compute capability 9.0 after its preprocessor.
pub fn preprocessed(source: &str) -> String {
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    std::fs::write(&file, source).expect("it can be written");
    let output = Command::new(COMPILER)
        .args(["-E", "-P", "-x", "c++", "-D__CUDA_ARCH__=900"])
        .arg(file.path())
        .output()
        .unwrap_or_else(|e| panic!("these tests need the C++ compiler `{COMPILER}`: {e}"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// Compiles a module to a shared library.
pub fn build(module: &Module) -> PathBuf {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("emulator");
    std::fs::create_dir_all(&folder).expect("a folder below target/");
    let mut source = HEADER.to_owned();
    for file in std::iter::once(&COMMON).chain(module.files) {
        let (name, text) = match file.name {
            "mma.cuh" => ("mma.h", MMA),
            "wgmma.cuh" => ("wgmma.h", WGMMA),
            _ => (file.name, file.text),
        };
        source += &format!("\n#line 1 \"{name}\"\n{text}");
    }
    let hash = blake3::hash(source.as_bytes()).to_hex();
    let library = folder.join(format!("{}-{}.so", module.stem, &hash[..16]));
    if library.exists() {
        return library;
    }
    let name = |ending: &str| folder.join(format!("{}-{}.{}.{ending}", module.stem, &hash[..16], std::process::id()));
    let (text, made) = (name("cc"), name("so"));
    std::fs::write(&text, source).expect("a file below target/");
    // No contraction to fused multiply-adds, so that results are the same on every machine. No fortified longjmp,
    // because fibers jump between stacks.
    let output = Command::new(COMPILER)
        .args(["-std=c++17", "-O2", "-shared", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing", "-Wall"])
        .args(["-Wno-unknown-pragmas", "-Wno-clobbered", "-U_FORTIFY_SOURCE", "-o"])
        .arg(&made)
        .arg(&text)
        .output()
        .unwrap_or_else(|e| panic!("these tests need the C++ compiler `{COMPILER}`: {e}"));
    let messages = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}.cu does not compile as C++:\n{messages}", module.stem);
    std::fs::rename(&made, &library).expect("a rename below target/");
    std::fs::remove_file(&text).expect("its source");
    library
}
