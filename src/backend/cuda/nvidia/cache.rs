//! Compiled kernels on disk, so that a second start compiles nothing.
//!
//! An entry's name holds a hash of all that decides its content; the entry begins with a hash of that content, so that one
//! that a full disk or another program damaged is seen and made again. Ranks that start together may write the same entry:
//! each writes aside and renames. A folder that cannot be written costs time at each start, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use crate::files;

/// The folder, or none.
pub(super) struct Cache {
    folder: Option<PathBuf>,
}

impl Cache {
    pub(super) fn new(folder: Option<&Path>) -> Self {
        Self { folder: folder.map(Path::to_owned) }
    }

    /// The content of entry `stem` as decided by `parts`, made by `make` if it is not there.
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

/// A hash of parts that cannot run into each other.
fn key(parts: &[&str]) -> String {
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part.as_bytes());
    }
    hasher.finalize().to_hex()[..32].to_owned()
}

/// The content of an entry whose hash is right.
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
        // The same text, cut elsewhere.
        get(&["sourceo", "ptions"]);
        assert_eq!(made.get(), 2);

        let entries = || fs::read_dir(folder.path().join("kernels")).unwrap().map(|entry| entry.unwrap().path());
        assert_eq!(entries().count(), 2, "entries, and nothing left aside");
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
