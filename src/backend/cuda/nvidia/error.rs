//! The reasons why no GPU can be used, each with its remedy.

use std::path::PathBuf;

use super::names::Library;
use crate::exit::{self, Coded};

/// Why no GPU can be used. The exit code is [`exit::LAUNCHER`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A library was not found, or the files found could not be loaded.
    #[error(
        "{library} ({names}) was not found; {remedy}. Looked in: {}.{}",
        .looked_in.join("; "),
        .refused.iter().map(|why| format!(" Not usable: {why}.")).collect::<String>()
    )]
    Missing {
        /// The library.
        library: Library,
        /// The file names that were tried.
        names: String,
        /// The places that were searched.
        looked_in: Vec<String>,
        /// Files that exist but could not be loaded, with the loader's error.
        refused: Vec<String>,
        /// How to install it.
        remedy: &'static str,
    },
    /// A library is too old.
    #[error("{}: {library} lacks the function {name}: install a newer version", .path.display())]
    Function {
        /// The library.
        library: Library,
        /// The file that was loaded.
        path: PathBuf,
        /// The missing function.
        name: String,
    },
    /// The driver is too old.
    #[error(
        "the NVIDIA driver is for CUDA {}.{}; CUDA {oldest}.0 or later is needed: update the driver to version 525 or later \
         (580 for CUDA 13), or use --device cpu", version.0, version.1
    )]
    OldDriver {
        /// The CUDA version that it supports.
        version: (u32, u32),
        /// The oldest version that works.
        oldest: u32,
    },
    /// The driver shows no GPU.
    #[error(
        "the NVIDIA driver shows no GPU: does nvidia-smi list one? CUDA_VISIBLE_DEVICES may hide it, a SLURM job needs \
         --gpus, a container --gpus all or --nv; without a GPU use --device cpu"
    )]
    NoDevice,
    /// The toolkit's stub library was loaded instead of the driver.
    #[error("the loaded libcuda is the CUDA toolkit's stub: remove its folder `stubs` from LD_LIBRARY_PATH")]
    Stub,
    /// The requested GPU does not exist.
    #[error("there is no GPU {index}: the driver shows {devices}, counted from 0")]
    NoSuchDevice {
        /// The requested GPU.
        index: usize,
        /// Number of GPUs.
        devices: usize,
    },
    /// The GPU is too old.
    #[error("{name} has compute capability {}.{}; 8.0 or later (A100, RTX 30) is needed for bf16: use --device cpu", sm / 10, sm % 10)]
    OldGpu {
        /// The GPU's name.
        name: String,
        /// Its compute capability, 75 for 7.5.
        sm: u32,
    },
    /// A call of the driver failed.
    #[error("the NVIDIA driver: {call}: {message}")]
    Driver {
        /// The function.
        call: &'static str,
        /// The driver's error.
        message: String,
    },
    /// A call of cuBLAS failed.
    #[error("{call}: status {code}, {why}")]
    Cublas {
        /// The function.
        call: String,
        /// The status code.
        code: i32,
        /// The meaning of the code.
        why: &'static str,
    },
    /// A kernel does not compile.
    #[error("kernels/{file}: {compiler} with {options} fails (code {code}): {log}")]
    Compile {
        /// The module.
        file: String,
        /// Name, version and file of the compiler.
        compiler: String,
        /// The options, including the architecture: the compiler may be older than the GPU.
        options: String,
        /// The compiler's status code.
        code: i32,
        /// The compiler's log.
        log: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        exit::LAUNCHER
    }
}
