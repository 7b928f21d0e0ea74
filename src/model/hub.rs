//! Resolves a model name: a folder, or a hub id in the local Hugging Face cache. Nothing is downloaded here.

use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::exit::{self, Coded};
use crate::input;

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
    #[error(
        "`{name}` is neither a folder nor a hub id such as `allenai/OLMoE-1B-7B-0125-Instruct` (with a revision: `ORG/NAME@REVISION`){}",
        in_address(name).map_or_else(String::new, |id| format!("; for the model of this address give {id}"))
    )]
    NotAName { name: String },
    #[error(
        "the model `{id}` is neither a folder here nor in the Hugging Face cache (looked in {looked}). To download it, repeat the \
         command with --download, or run `{}`; or set HF_HUB_CACHE or HF_HOME to the cache that has it", .id.command()
    )]
    Missing { id: HubId, looked: PathBuf },
    #[error(
        "the cached model `{id}` is incomplete: {file} {problem}; repeat the command with --download, or run `{}`", .id.command()
    )]
    Incomplete { id: HubId, file: PathBuf, problem: &'static str },
}

/// A model on the hub: `NAME` or `ORG/NAME`, with `@REVISION` for another revision than `main`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubId {
    /// `ORG/NAME`, or `NAME` alone.
    pub id: String,
    /// A branch, a tag or a commit.
    pub revision: String,
}

impl HubId {
    /// The hub id that a model's name spells; `None` where it spells none.
    pub fn parse(name: &str) -> Option<Self> {
        let (id, revision) = name.split_once('@').unwrap_or((name, "main"));
        // Both become parts of paths.
        let good = |part: &str| is_plain(part) && !part.contains("--");
        let is_id = id.split('/').count() <= 2 && id.split('/').all(good);
        let is_revision = revision.split('/').all(is_plain);
        (is_id && is_revision).then(|| Self { id: id.into(), revision: revision.into() })
    }

    /// The folder of the model in the cache.
    pub fn folder(&self) -> String {
        format!("models--{}", self.id.replace('/', "--"))
    }

    /// The command of `huggingface_hub` that downloads it.
    fn command(&self) -> String {
        match &*self.revision {
            "main" => format!("hf download {}", self.id),
            revision => format!("hf download {} --revision {revision}", self.id),
        }
    }
}

/// The hub id in the address of a model's page, or of one of its files.
fn in_address(name: &str) -> Option<HubId> {
    let path = ["huggingface.co/", "hf.co/", "hf://"].iter().find_map(|server| Some(name.split_once(server)?.1))?;
    let path = path.split(['?', '#']).next()?.trim_matches('/');
    let (id, rest) = match path.match_indices('/').nth(1) {
        Some((end, _)) => (&path[..end], path[end + 1..].split_once('/')),
        None => (path, None),
    };
    let of_revision = ["tree", "blob", "resolve"];
    let revision = rest.filter(|(kind, _)| of_revision.contains(kind)).and_then(|(_, rest)| rest.split('/').next());
    HubId::parse(&revision.map_or_else(|| id.to_owned(), |revision| format!("{id}@{revision}")))
}

impl fmt::Display for HubId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.revision {
            "main" => write!(f, "{}", self.id),
            revision => write!(f, "{}@{revision}", self.id),
        }
    }
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::IsFile(_) | Error::NotAName { .. } | Error::Missing { .. } => exit::NO_INPUT,
            Error::Incomplete { .. } => exit::DATA,
        }
    }
}

impl HubCache {
    /// The cache folder by the environment variables and precedence of `huggingface_hub`: `HF_HUB_CACHE`, the older
    /// `HUGGINGFACE_HUB_CACHE`, `HF_HOME`/hub, `XDG_CACHE_HOME`/huggingface/hub, `HOME`/.cache/huggingface/hub.
    pub fn from_vars(var: impl Fn(&str) -> Option<OsString>) -> Self {
        let folder = |name| folder(&var, name);
        let root = folder("HF_HUB_CACHE").or_else(|| folder("HUGGINGFACE_HUB_CACHE"));
        Self { root: root.unwrap_or_else(|| Self::home(&var).join("hub")) }
    }

    /// The folder of all that Hugging Face's libraries keep, such as the token: `HF_HOME` and its defaults.
    pub fn home(var: impl Fn(&str) -> Option<OsString>) -> PathBuf {
        folder(&var, "HF_HOME")
            .or_else(|| Some(folder(&var, "XDG_CACHE_HOME")?.join("huggingface")))
            .unwrap_or_else(|| var("HOME").map(PathBuf::from).unwrap_or_default().join(".cache/huggingface"))
    }

    /// The folder of the model `name`: a path to a folder unchanged, or the snapshot of a hub id.
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
        self.snapshot(&HubId::parse(name).ok_or_else(|| Error::NotAName { name: name.into() })?)
    }

    /// The snapshot of a hub id: of the commit that `refs/REVISION` names, or of the commit that is the revision.
    ///
    /// # Errors
    /// A model that is not in the cache, an incomplete download.
    pub fn snapshot(&self, id: &HubId) -> Result<PathBuf, Error> {
        let model = self.root.join(id.folder());
        if !model.is_dir() {
            return Err(Error::Missing { id: id.clone(), looked: model });
        }
        let incomplete = |file: PathBuf, problem| Error::Incomplete { id: id.clone(), file, problem };
        let named = model.join("snapshots").join(&id.revision);
        if is_hash(&id.revision) && named.is_dir() {
            return Ok(named);
        }
        let reference = model.join("refs").join(&id.revision);
        let Ok(commit) = input::read_text(&reference) else {
            return Err(incomplete(reference, "cannot be read"));
        };
        let commit = commit.trim();
        // The content becomes part of a path.
        if !is_hash(commit) {
            return Err(incomplete(reference, "does not hold a commit"));
        }
        let snapshot = model.join("snapshots").join(commit);
        if !snapshot.is_dir() {
            return Err(incomplete(snapshot, "does not exist"));
        }
        Ok(snapshot)
    }
}

/// The folder that a variable names; `~` is the home folder.
fn folder(var: impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    let path = PathBuf::from(var(name).filter(|value| !value.is_empty())?);
    let home = || var("HOME").map(PathBuf::from).unwrap_or_default();
    Some(path.strip_prefix("~").map(|rest| home().join(rest)).unwrap_or(path))
}

/// Whether it can be the hash of a commit or of a file's content.
pub fn is_hash(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Whether it is one path component, in the characters that the hub allows in names.
fn is_plain(part: &str) -> bool {
    !part.is_empty()
        && part.len() <= 96
        && !part.starts_with(['.', '-'])
        && !part.contains("..")
        && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
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
    fn a_revision_is_a_branch_a_tag_or_a_commit() {
        let dir = tempfile::tempdir().unwrap();
        let hub = HubCache { root: dir.path().into() };
        let model = dir.path().join("models--org--name");
        for commit in ["aaa1", "bbb2", "ccc3"] {
            fs::create_dir_all(model.join("snapshots").join(commit)).unwrap();
        }
        fs::create_dir_all(model.join("refs/refs/pr")).unwrap();
        fs::write(model.join("refs/main"), "aaa1").unwrap();
        fs::write(model.join("refs/refs/pr/1"), "bbb2").unwrap();
        for (name, commit) in [("org/name", "aaa1"), ("org/name@refs/pr/1", "bbb2"), ("org/name@ccc3", "ccc3")] {
            assert_eq!(hub.resolve(name).unwrap(), model.join("snapshots").join(commit));
        }
        let error = hub.resolve("org/name@v2").unwrap_err().to_string();
        assert!(error.contains("hf download org/name --revision v2"), "{error}");
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
    fn an_address_is_answered_with_its_hub_id() {
        for (name, id) in [
            ("https://huggingface.co/allenai/OLMoE-1B-7B-0924", Some("allenai/OLMoE-1B-7B-0924")),
            ("https://huggingface.co/org/name/", Some("org/name")),
            ("huggingface.co/org/name/tree/main", Some("org/name")),
            ("https://hf.co/org/name/blob/v2/config.json?download=true", Some("org/name@v2")),
            ("hf://org/name", Some("org/name")),
            ("https://huggingface.co/org/name/discussions/3", Some("org/name")),
            ("https://huggingface.co/../name", None),
            ("https://example.org/org/name", None),
        ] {
            assert_eq!(in_address(name).map(|id| id.to_string()).as_deref(), id, "{name}");
        }
        let error = Error::NotAName { name: "https://huggingface.co/org/name".into() }.to_string();
        assert!(error.ends_with("; for the model of this address give org/name"), "{error}");
    }

    #[test]
    fn a_name_cannot_leave_the_cache() {
        for name in [
            "../no-such-folder",
            "a/../no-such-folder",
            "a/b/c",
            "/no/such/folder",
            "a--b/c",
            "",
            "a b",
            "org/..",
            "a/b@",
            "a@../b",
            "a@/b",
            "@x",
        ] {
            let error = HubCache { root: "/nowhere".into() }.resolve(name).unwrap_err();
            assert!(matches!(error, Error::NotAName { .. }), "{name:?}: {error}");
        }
    }
}
