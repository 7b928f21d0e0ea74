//! What the program reads from environment variables, besides the launcher's.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

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

/// How the Hugging Face hub is reached, by the environment variables of `huggingface_hub`.
#[derive(Clone)]
pub struct HubAccess {
    /// The server, without a slash at its end.
    pub endpoint: String,
    /// The access token.
    pub token: Option<String>,
    /// The variable that forbids every request.
    pub offline: Option<&'static str>,
    /// How long nothing may arrive.
    pub patience: Duration,
}

impl HubAccess {
    /// `HF_ENDPOINT`; the token in `HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN` or a file (`HF_TOKEN_PATH`, or `token` beside the hub
    /// cache's default place); `HF_HUB_OFFLINE` and `TRANSFORMERS_OFFLINE`; `HF_HUB_DOWNLOAD_TIMEOUT`.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Self {
        let text = |name: &str| {
            let value = var(name)?.into_string().ok()?;
            Some(value.trim().to_owned()).filter(|value| !value.is_empty())
        };
        let is_set =
            |name: &&str| text(name).is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&&*value.to_uppercase()));
        let token_file = || {
            let path = text("HF_TOKEN_PATH").map_or_else(|| HubCache::home(&var).join("token"), PathBuf::from);
            let token = std::fs::read_to_string(path).ok()?;
            Some(token.trim().to_owned()).filter(|token| !token.is_empty())
        };
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into());
        let seconds = text("HF_HUB_DOWNLOAD_TIMEOUT").and_then(|seconds| seconds.parse().ok()).unwrap_or(60);
        Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token: text("HF_TOKEN").or_else(|| text("HUGGING_FACE_HUB_TOKEN")).or_else(token_file),
            offline: ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"].into_iter().find(is_set),
            patience: Duration::from_secs(seconds),
        }
    }
}

/// How this process reaches the hub.
pub fn hub_access() -> HubAccess {
    HubAccess::from_vars(|name| std::env::var_os(name))
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

#[cfg(test)]
mod tests {
    use super::*;

    fn access(vars: &[(&str, &str)]) -> HubAccess {
        HubAccess::from_vars(|name| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
    }

    #[test]
    fn the_hub_is_reached_by_the_variables_of_huggingface_hub() {
        let dir = tempfile::tempdir().unwrap();
        let home = dir.path().to_str().unwrap();
        assert_eq!(access(&[]).endpoint, "https://huggingface.co");
        assert_eq!(access(&[("HF_ENDPOINT", "http://mirror/")]).endpoint, "http://mirror");
        assert_eq!(access(&[("HF_HOME", home)]).token, None);
        std::fs::write(dir.path().join("token"), "in-home\n").unwrap();
        std::fs::write(dir.path().join("other"), "\nin-file").unwrap();
        let other = dir.path().join("other");
        let all = [
            ("HF_HOME", home),
            ("HF_TOKEN_PATH", other.to_str().unwrap()),
            ("HUGGING_FACE_HUB_TOKEN", "old"),
            ("HF_TOKEN", "new\n"),
        ];
        for (n, token) in ["in-home", "in-file", "old", "new"].into_iter().enumerate() {
            assert_eq!(access(&all[..=n]).token.as_deref(), Some(token));
        }
        assert_eq!(access(&[("HF_HUB_OFFLINE", "0")]).offline, None);
        assert_eq!(access(&[("TRANSFORMERS_OFFLINE", "true")]).offline, Some("TRANSFORMERS_OFFLINE"));
        assert_eq!(access(&[("HF_HUB_DOWNLOAD_TIMEOUT", "7")]).patience.as_secs(), 7);
    }
}
