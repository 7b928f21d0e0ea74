//! NVIDIA's libraries: their file names, and how to get them.

use std::ffi::CStr;
use std::fmt;

/// One of NVIDIA's libraries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Library {
    /// libcuda, which comes with the kernel's driver.
    Driver,
    /// The run-time compiler.
    Nvrtc,
    /// Dense products.
    Cublas,
    /// Collectives between GPUs.
    Nccl,
}

impl Library {
    /// Its sonames that work with a driver for CUDA `major`, the best first. A driver runs libraries built for its own
    /// or an earlier major version of CUDA (CUDA Compatibility, "Backward Compatibility"). NCCL's soname does not
    /// contain the CUDA version.
    pub(super) fn names(self, major: u32) -> Vec<String> {
        let versioned = |stem: &str| (12..=major.clamp(12, 13)).rev().map(|n| format!("{stem}.so.{n}")).collect();
        match self {
            Library::Driver => vec!["libcuda.so.1".into()],
            Library::Nvrtc => versioned("libnvrtc"),
            Library::Cublas => versioned("libcublas"),
            Library::Nccl => vec!["libnccl.so.2".into()],
        }
    }

    /// A library that it loads by name, although it may be in a folder unknown to the loader: NVRTC's built-in
    /// declarations, at the first compilation, and cuBLASLt. If loaded first, it is found.
    pub(super) fn companion(self) -> Option<&'static str> {
        match self {
            Library::Nvrtc => Some("libnvrtc-builtins.so."),
            Library::Cublas => Some("libcublasLt.so."),
            Library::Driver | Library::Nccl => None,
        }
    }

    /// A function that every version has.
    pub(super) fn probe(self) -> &'static CStr {
        match self {
            Library::Driver => c"cuInit",
            Library::Nvrtc => c"nvrtcVersion",
            Library::Cublas => c"cublasCreate_v2",
            Library::Nccl => c"ncclGetVersion",
        }
    }

    /// How to install it for this CUDA version.
    pub(super) fn remedy(self, major: u32) -> &'static str {
        match self {
            Library::Nvrtc if major == 12 => "it comes with the CUDA toolkit, or: pip install nvidia-cuda-nvrtc-cu12",
            Library::Cublas if major == 12 => "it comes with the CUDA toolkit, or: pip install nvidia-cublas-cu12",
            Library::Nccl if major == 12 => {
                "get it as a package of your system (libnccl2), or: pip install nvidia-nccl-cu12"
            }
            Library::Driver => {
                "it comes with NVIDIA's driver: install that, in a container pass the GPU in \
                 (docker run --gpus all, apptainer --nv), or use --device cpu"
            }
            Library::Nvrtc => "it comes with the CUDA toolkit, or: pip install nvidia-cuda-nvrtc",
            Library::Cublas => "it comes with the CUDA toolkit, or: pip install nvidia-cublas",
            Library::Nccl => "get it as a package of your system (libnccl2), or: pip install nvidia-nccl-cu13",
        }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Library::Driver => "the NVIDIA driver's library",
            Library::Nvrtc => "NVRTC",
            Library::Cublas => "cuBLAS",
            Library::Nccl => "NCCL",
        })
    }
}
