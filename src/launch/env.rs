//! What the program reads from environment variables, besides the launcher's.

use std::path::PathBuf;

use crate::backend::cuda::nvidia::library::Surroundings;
use crate::model::HubCache;

use super::{Launch, LaunchError};

impl Launch {
    /// The launcher of this process, detected from its environment variables: see [`Launch::detect`].
    ///
    /// # Errors
    /// As [`Launch::detect`].
    pub fn from_env() -> Result<Self, LaunchError> {
        Self::detect(|name| std::env::var(name).ok())
    }
}

/// The local Hugging Face hub cache: `HF_HUB_CACHE`, `HF_HOME` and their defaults.
pub fn hub_cache() -> HubCache {
    HubCache::from_vars(|name| std::env::var_os(name))
}

/// Folders in which this machine may have the CUDA libraries: `LD_LIBRARY_PATH`, `CUDA_HOME`, Python environments.
pub fn cuda_search_paths() -> Surroundings {
    Surroundings::read(|name| std::env::var_os(name))
}

/// The folder that caches compiled kernels: `moewarden/kernels` in `XDG_CACHE_HOME` or `~/.cache`. `None` if neither
/// `XDG_CACHE_HOME` nor `HOME` is set.
pub fn kernel_cache() -> Option<PathBuf> {
    let folder = |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = folder("XDG_CACHE_HOME").filter(|cache| cache.is_absolute());
    cache.or_else(|| Some(folder("HOME")?.join(".cache"))).map(|cache| cache.join("moewarden/kernels"))
}

/// The environment variable of [`cpu_instructions`].
pub const CPU_INSTRUCTIONS: &str = "MOEWARDEN_CPU_INSTRUCTIONS";

/// The instructions that multiply bf16 values on the CPU, instead of the fastest ones. For comparisons: they give different
/// roundings.
pub fn cpu_instructions() -> Option<String> {
    std::env::var(CPU_INSTRUCTIONS).ok().filter(|name| !name.is_empty())
}

/// The fault to inject for a test: `MOEWARDEN_FAULT`.
pub fn fault() -> Option<String> {
    std::env::var("MOEWARDEN_FAULT").ok()
}
