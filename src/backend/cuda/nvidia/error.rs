//! Why there is no GPU to work with, and the way out of each.

use std::path::PathBuf;

use super::library::Library;
use crate::exit::{self, Coded};

/// Why there is no GPU to work with. All of them end the process with [`exit::LAUNCHER`].
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A library is nowhere, or nothing that could be loaded.
    #[error(
        "{library} ({names}) was not found; {remedy}. Looked in: {}.{}",
        .looked_in.join("; "),
        .refused.iter().map(|why| format!(" Not usable: {why}.")).collect::<String>()
    )]
    Missing {
        /// Which.
        library: Library,
        /// Its file's names.
        names: String,
        /// Every place.
        looked_in: Vec<String>,
        /// Files that were there but could not be loaded, and why.
        refused: Vec<String>,
        /// How one gets it.
        remedy: &'static str,
    },
    /// A library is too old.
    #[error("{}: {library} lacks the function {name}: a newer one is needed", .path.display())]
    Function {
        /// Which.
        library: Library,
        /// Its file.
        path: PathBuf,
        /// What it lacks.
        name: String,
    },
    /// The driver is too old.
    #[error(
        "the NVIDIA driver is for CUDA {}.{}; CUDA {oldest}.0 or later is needed: update the driver to version 525 or later \
         (580 for CUDA 13), or use --device cpu", version.0, version.1
    )]
    OldDriver {
        /// The CUDA version that it is for.
        version: (u32, u32),
        /// The one that is needed.
        oldest: u32,
    },
    /// The driver shows no GPU.
    #[error(
        "the NVIDIA driver shows no GPU: does nvidia-smi list one? CUDA_VISIBLE_DEVICES may hide it, a SLURM job needs \
         --gpus, a container --gpus all or --nv; without a GPU use --device cpu"
    )]
    NoDevice,
    /// The toolkit's stand-in for linking was loaded in the driver's place.
    #[error("the libcuda that was loaded is the CUDA toolkit's stub: take its folder `stubs` out of LD_LIBRARY_PATH")]
    Stub,
    /// A GPU that does not exist was asked for.
    #[error("there is no GPU {index}: the driver shows {devices}, counted from 0")]
    NoSuchDevice {
        /// The one that was asked for.
        index: usize,
        /// Those that are there.
        devices: usize,
    },
    /// The GPU is too old.
    #[error("{name} has compute capability {}.{}; 8.0 or later (A100, RTX 30) is needed for bf16: use --device cpu", sm / 10, sm % 10)]
    OldGpu {
        /// Its name.
        name: String,
        /// Its compute capability, 75 for 7.5.
        sm: u32,
    },
    /// The driver refused.
    #[error("the NVIDIA driver: {call}: {message}")]
    Driver {
        /// What was called.
        call: &'static str,
        /// What it answered.
        message: String,
    },
    /// cuBLAS refused.
    #[error("{call}: status {code}, {why}")]
    Cublas {
        /// What was called.
        call: String,
        /// What it answered.
        code: i32,
        /// In words.
        why: &'static str,
    },
    /// A kernel does not compile.
    #[error("kernels/{file}: {compiler} with {options} refuses it (code {code}): {log}")]
    Compile {
        /// The source.
        file: String,
        /// Name, version and file of the compiler.
        compiler: String,
        /// What it was told; a GPU newer than the compiler shows here.
        options: String,
        /// Its code.
        code: i32,
        /// Its words.
        log: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        exit::LAUNCHER
    }
}
