//! NVRTC: compiles CUDA C++ to machine code, in this process and without a GPU.
//!
//! The functions are documented in the NVRTC manual, <https://docs.nvidia.com/cuda/nvrtc/index.html>.

use std::ffi::{CString, c_char, c_int, c_void};
use std::fmt;
use std::path::PathBuf;
use std::ptr;

use super::Error;
use super::library::Open;
use crate::backend::cuda::gpu::Module;
use crate::backend::cuda::kernels;

type Handle = *mut c_void;
type Size = unsafe extern "C" fn(Handle, *mut usize) -> c_int;
type Fill = unsafe extern "C" fn(Handle, *mut c_char) -> c_int;

/// The compiler.
pub struct Nvrtc {
    functions: Functions,
    version: (i32, i32),
    path: PathBuf,
}

/// Status codes are plain integers, because a newer library may return codes that an enum would lack.
struct Functions {
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> c_int,
    log_size: Size,
    log: Fill,
    cubin_size: Size,
    cubin: Fill,
    destroy: unsafe extern "C" fn(*mut Handle) -> c_int,
}

/// The result of a compilation.
pub struct Compiled {
    /// Machine code, an ELF file.
    pub cubin: Vec<u8>,
    /// The compiler's log, with warnings.
    pub log: String,
}

impl Nvrtc {
    /// The compiler in this library.
    ///
    /// # Errors
    /// The library lacks a function.
    pub fn new(library: &Open) -> Result<Self, Error> {
        // SAFETY: the types are those of nvrtc.h.
        unsafe {
            let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = library.function(c"nvrtcVersion")?;
            let functions = Functions {
                create: library.function(c"nvrtcCreateProgram")?,
                compile: library.function(c"nvrtcCompileProgram")?,
                log_size: library.function(c"nvrtcGetProgramLogSize")?,
                log: library.function(c"nvrtcGetProgramLog")?,
                cubin_size: library.function(c"nvrtcGetCUBINSize")?,
                cubin: library.function(c"nvrtcGetCUBIN")?,
                destroy: library.function(c"nvrtcDestroyProgram")?,
            };
            let (mut major, mut minor) = (0, 0);
            version(&mut major, &mut minor);
            Ok(Self { functions, version: (major, minor), path: library.path.clone() })
        }
    }

    /// The CUDA version that it belongs to: (13, 0).
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// Compiles `common.cuh` followed by a module. It may be called from several threads at once.
    ///
    /// # Errors
    /// [`Error::Compile`] with the compiler's log.
    pub fn compile(&self, module: &Module, options: &[String]) -> Result<Compiled, Error> {
        let compiled = Program::new(&self.functions, module).and_then(|program| program.compile(options));
        compiled.map_err(|(code, log)| Error::Compile {
            file: format!("{}.cu", module.stem),
            compiler: self.to_string(),
            options: options.join(" "),
            code,
            log: log.trim_end().to_owned(),
        })
    }
}

impl fmt::Display for Nvrtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NVRTC {}.{} ({})", self.version.0, self.version.1, self.path.display())
    }
}

/// A program that is destroyed on drop. Its errors are the status code and the compiler's log.
struct Program<'a> {
    functions: &'a Functions,
    handle: Handle,
}

impl<'a> Program<'a> {
    fn new(functions: &'a Functions, module: &Module) -> Result<Self, (c_int, String)> {
        let (text, file) = (c_string(&kernels::source(module)), c_string(module.stem));
        let mut handle = ptr::null_mut();
        // SAFETY: both strings outlive the call, which copies them. No headers are given.
        let code =
            unsafe { (functions.create)(&mut handle, text.as_ptr(), file.as_ptr(), 0, ptr::null(), ptr::null()) };
        if code == 0 { Ok(Self { functions, handle }) } else { Err((code, String::new())) }
    }

    fn compile(&self, options: &[String]) -> Result<Compiled, (c_int, String)> {
        let options: Vec<_> = options.iter().map(|option| c_string(option)).collect();
        let options: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let count = c_int::try_from(options.len()).expect("a few options");
        let Functions { compile, cubin_size, cubin, log_size, log, .. } = self.functions;
        // SAFETY: the program and the options are alive.
        let code = unsafe { compile(self.handle, count, options.as_ptr()) };
        let log = self.bytes(*log_size, *log).unwrap_or_default();
        let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
        if code != 0 {
            return Err((code, log));
        }
        match self.bytes(*cubin_size, *cubin) {
            Ok(cubin) => Ok(Compiled { cubin, log }),
            Err(code) => Err((code, log)),
        }
    }

    /// Reads a result by a pair of functions: one returns the size, the other fills a buffer of that size.
    fn bytes(&self, size: Size, fill: Fill) -> Result<Vec<u8>, c_int> {
        let mut len = 0;
        // SAFETY: the program is alive, and the buffer has the requested size.
        match unsafe { size(self.handle, &mut len) } {
            0 => {}
            code => return Err(code),
        }
        let mut bytes = vec![0u8; len];
        // SAFETY: `bytes` has the length that NVRTC asked for, and the program is alive.
        match unsafe { fill(self.handle, bytes.as_mut_ptr().cast()) } {
            0 => Ok(bytes),
            code => Err(code),
        }
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: it was created by this library and is not used again.
        unsafe { (self.functions.destroy)(&mut self.handle) };
    }
}

/// The options for a GPU of this compute capability (90 for 9.0). 9.0 is compiled as `sm_90a`, the only architecture
/// with wgmma. No fast math, so that results equal those of the CPU up to rounding.
pub fn options(sm: u32) -> Vec<String> {
    let architecture = if sm == 90 { "sm_90a".into() } else { format!("sm_{sm}") };
    vec![format!("--gpu-architecture={architecture}"), "--std=c++17".into()]
}

fn c_string(text: &str) -> CString {
    CString::new(text).expect("sources and options hold no NUL")
}
