//! Resolves a model name: a folder, or a hub id in the local Hugging Face cache. Nothing is downloaded.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::exit::{self, Coded};

/// The folder of the Hugging Face cache that holds `models--ORG--NAME` folders.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubCache {
    /// Usually `~/.cache/huggingface/hub`.
    pub root: PathBuf,
}

/// Why a model was not found.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum Error {
    #[error("the model `{0}` is a file; give the folder that holds config.json and the weights")]
    IsFile(String),
    #[error("`{0}` is neither a folder nor a hub id such as `allenai/OLMoE-1B-7B-0125-Instruct`")]
    NotAName(String),
    #[error(
        "the model `{name}` is neither a folder here nor in the Hugging Face cache (looked in {looked}); \
         moewarden never downloads: fetch it with `hf download {name}`, or set HF_HUB_CACHE or HF_HOME to the right cache"
    )]
    Missing { name: String, looked: PathBuf },
    #[error("the cached model `{name}` is incomplete: {file} {problem}; fetch it again with `hf download {name}`")]
    Incomplete { name: String, file: PathBuf, problem: &'static str },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::IsFile(_) | Error::NotAName(_) | Error::Missing { .. } => exit::NO_INPUT,
            Error::Incomplete { .. } => exit::DATA,
        }
    }
}

impl HubCache {
    /// The cache folder by the environment variables and precedence of `huggingface_hub`: `HF_HUB_CACHE`, the older
    /// `HUGGINGFACE_HUB_CACHE`, `HF_HOME`/hub, `XDG_CACHE_HOME`/huggingface/hub, `HOME`/.cache/huggingface/hub.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Self {
        let home = var("HOME").map(PathBuf::from).unwrap_or_default();
        let path = |name: &str| {
            let path = PathBuf::from(var(name).filter(|value| !value.is_empty())?);
            Some(path.strip_prefix("~").map(|rest| home.join(rest)).unwrap_or(path))
        };
        let root = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(path("HF_HOME")?.join("hub")))
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface/hub")))
            .unwrap_or_else(|| home.join(".cache/huggingface/hub"));
        Self { root }
    }

    /// The folder of the model `name`: a path to a folder unchanged, or the snapshot that `refs/main` of a hub id names.
    ///
    /// # Errors
    /// A name that is neither a folder nor a hub id, a model that is not in the cache, an incomplete download.
    pub fn resolve(&self, name: &str) -> Result<PathBuf, Error> {
        let folder = Path::new(name);
        if folder.is_dir() {
            return Ok(folder.to_path_buf());
        }
        if folder.is_file() {
            return Err(Error::IsFile(name.into()));
        }
        if !is_hub_id(name) {
            return Err(Error::NotAName(name.into()));
        }
        let model = self.root.join(format!("models--{}", name.replace('/', "--")));
        if !model.is_dir() {
            return Err(Error::Missing { name: name.into(), looked: model });
        }
        let incomplete = |file: PathBuf, problem| Error::Incomplete { name: name.into(), file, problem };
        let main = model.join("refs/main");
        let Ok(commit) = std::fs::read_to_string(&main) else {
            return Err(incomplete(main, "cannot be read"));
        };
        let commit = commit.trim();
        // The content becomes part of a path.
        if commit.is_empty() || !commit.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(incomplete(main, "does not hold a commit"));
        }
        let snapshot = model.join("snapshots").join(commit);
        if !snapshot.is_dir() {
            return Err(incomplete(snapshot, "does not exist"));
        }
        Ok(snapshot)
    }
}

/// Whether it is `NAME` or `ORG/NAME` in the characters that the hub allows.
fn is_hub_id(name: &str) -> bool {
    let plain = |part: &str| {
        !part.is_empty()
            && part.len() <= 96
            && !part.starts_with(['.', '-'])
            && !part.contains("..")
            && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
    };
    let mut parts = name.split('/');
    parts.by_ref().take(2).all(plain) && parts.next().is_none() && !name.contains("--")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::fs;

    use super::*;

    fn cache(vars: &[(&str, &str)]) -> PathBuf {
        let vars: HashMap<_, _> = vars.iter().copied().collect();
        HubCache::from_vars(|name| vars.get(name).map(OsString::from)).root
    }

    #[test]
    fn the_variables_have_the_precedence_of_huggingface_hub() {
        let all = [
            ("HOME", "/h"),
            ("XDG_CACHE_HOME", "/x"),
            ("HF_HOME", "/hf"),
            ("HUGGINGFACE_HUB_CACHE", "/old"),
            ("HF_HUB_CACHE", "/new"),
        ];
        let expected = ["/h/.cache/huggingface/hub", "/x/huggingface/hub", "/hf/hub", "/old", "/new"];
        for (n, want) in expected.iter().enumerate() {
            assert_eq!(cache(&all[..=n]), Path::new(want));
        }
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "~/hf")]), Path::new("/h/hf/hub"));
    }

    #[test]
    fn a_cached_model_is_found_through_refs_main() {
        let dir = tempfile::tempdir().unwrap();
        let hub = HubCache { root: dir.path().into() };
        let model = dir.path().join("models--org--some.name");
        fs::create_dir_all(model.join("snapshots/abc123")).unwrap();
        fs::create_dir_all(model.join("refs")).unwrap();
        fs::write(model.join("refs/main"), "abc123\n").unwrap();
        assert_eq!(hub.resolve("org/some.name").unwrap(), model.join("snapshots/abc123"));

        for commit in ["../../..", "", "abc124"] {
            fs::write(model.join("refs/main"), commit).unwrap();
            let error = hub.resolve("org/some.name").unwrap_err();
            assert!(matches!(error, Error::Incomplete { .. }), "{commit:?}: {error}");
        }
    }

    #[test]
    fn a_missing_model_names_the_cache_and_the_download_command() {
        let dir = tempfile::tempdir().unwrap();
        let error = HubCache { root: dir.path().into() }.resolve("org/name").unwrap_err();
        assert_eq!(error.exit_code(), exit::NO_INPUT);
        let message = error.to_string();
        assert!(message.contains("hf download org/name"), "{message}");
        assert!(message.contains(&*dir.path().join("models--org--name").to_string_lossy()), "{message}");
    }

    #[test]
    fn a_name_cannot_leave_the_cache() {
        for name in ["../x", "a/../b", "a/b/c", "/no/such/folder", "a--b/c", "", "a b", "org/.."] {
            let error = HubCache { root: "/nowhere".into() }.resolve(name).unwrap_err();
            assert!(matches!(error, Error::NotAName(_)), "{name:?}: {error}");
        }
    }
}
