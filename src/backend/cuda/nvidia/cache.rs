//! The cache of compiled kernels on disk, so that only the first start compiles.
//!
//! The name of an entry contains a hash of its inputs (source, options, compiler). The entry starts with a hash of its
//! content, so that a damaged one is detected and compiled again. Ranks that start together may write the same entry:
//! each writes a temporary file and renames it. If the folder is not writable, every start compiles.

use std::fs;
use std::path::{Path, PathBuf};

use crate::files;

/// The cache folder, or `None` for no cache.
pub(super) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    pub(super) fn new(folder: Option<&Path>) -> Self {
        Self { folder: folder.map(Path::to_owned) }
    }

    /// The content of entry `stem` for the inputs `parts`. Calls `make` if the entry is absent or damaged.
    pub(super) fn get<E>(
        &self,
        stem: &str,
        parts: &[&str],
        make: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        let Some(folder) = &self.folder else { return make() };
        let path = folder.join(format!("{stem}-{}.cubin", key(parts)));
        if let Some(content) = fs::read(&path).ok().and_then(checked) {
            return Ok(content);
        }
        let content = make()?;
        if fs::create_dir_all(folder).is_ok() {
            let entry = [blake3::hash(&content).as_bytes().as_slice(), &content].concat();
            _ = files::write(&path, &entry);
        }
        Ok(content)
    }
}

/// A hash of the parts with their lengths, so that the boundaries count.
fn key(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// The content of an entry, if its hash matches.
fn checked(mut entry: Vec<u8>) -> Option<Vec<u8>> {
    let content = entry.split_off(entry.len().min(blake3::OUT_LEN));
    (blake3::hash(&content).as_bytes().as_slice() == entry).then_some(content)
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    #[test]
    fn made_once_until_its_parts_change_or_it_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(&folder.path().join("kernels")));
        let made = Cell::new(0);
        let get = |parts: &[&str]| {
            let make = || {
                made.set(made.get() + 1);
                Ok::<_, ()>(parts.concat().into_bytes())
            };
            cache.get("op", parts, make).unwrap()
        };
        assert_eq!(get(&["source", "options"]), b"sourceoptions");
        assert_eq!(get(&["source", "options"]), b"sourceoptions");
        assert_eq!(made.get(), 1);
        // The same text with another boundary.
        get(&["sourceo", "ptions"]);
        assert_eq!(made.get(), 2);

        let entries = || fs::read_dir(folder.path().join("kernels")).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(entries().count(), 2, "entries, and no temporary files");
        for damage in [&b""[..], b"short", &[0; 40]] {
            entries().for_each(|path| fs::write(path, damage).unwrap());
            let before = made.get();
            assert_eq!(get(&["source", "options"]), b"sourceoptions");
            get(&["source", "options"]);
            assert_eq!(made.get(), before + 1, "made again, once");
        }
    }

    #[test]
    fn a_failure_is_not_kept() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::new(Some(folder.path()));
        assert_eq!(cache.get("op", &[], || Err("wrong")), Err("wrong"));
        assert_eq!(cache.get("op", &[], || Ok::<_, &str>(vec![1])), Ok(vec![1]));
    }

    #[test]
    fn works_without_a_folder() {
        let occupied = tempfile::NamedTempFile::new().unwrap();
        for folder in [None, Some(occupied.path())] {
            assert_eq!(Cache::new(folder).get("op", &[], || Ok::<_, ()>(vec![7])), Ok(vec![7]));
        }
    }
}
