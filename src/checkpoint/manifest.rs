//! `manifest.json`: size and blake3 hash of every other file of a folder. One flipped bit in any file is detected.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::error::Error;
use crate::files;
use crate::input;

/// Value of the key `schema`.
const SCHEMA: &str = "moewarden.manifest/1";

/// The content of `manifest.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    schema: String,
    files: BTreeMap<String, ManifestEntry>,
}

/// Size and hash of one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestEntry {
    /// Size in bytes.
    pub bytes: u64,
    /// blake3 hash of the content, hexadecimal.
    pub blake3: String,
}

impl ManifestEntry {
    /// Reads the size and computes the hash of a file.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn of(path: &Path) -> Result<Self, Error> {
        let bytes = fs::metadata(path).map_err(Error::read(path))?.len();
        let hash = input::hash(path).map_err(Error::read(path))?;
        Ok(Self { bytes, blake3: hash.to_string() })
    }
}

impl Manifest {
    /// The name of the file.
    pub const FILE: &'static str = "manifest.json";

    /// The manifest of files by name.
    pub fn new(files: BTreeMap<String, ManifestEntry>) -> Self {
        Self { schema: SCHEMA.into(), files }
    }

    /// The bytes of `manifest.json`.
    fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec_pretty(self).expect("strings and numbers serialize")
    }

    /// Writes `manifest.json` into the folder. Call it after all other files are written.
    ///
    /// # Errors
    /// A write that fails.
    pub fn write(&self, folder: &Path) -> Result<(), Error> {
        Ok(files::write(folder.join(Manifest::FILE), self.to_json())?)
    }

    /// Checks that the folder holds exactly the files of its manifest, with their sizes and hashes.
    ///
    /// # Errors
    /// [`Error::Damaged`] with the file and the difference; a file that cannot be read.
    pub fn verify(folder: &Path) -> Result<(), Error> {
        let path = folder.join(Manifest::FILE);
        let damaged = |name: &str, message: String| Err(Error::Damaged { file: folder.join(name), message });
        let text = input::read(&path).map_err(Error::read(&path))?;
        let manifest: Self = match serde_json::from_slice(&text) {
            Ok(manifest) => manifest,
            Err(e) => return damaged(Manifest::FILE, format!("it is damaged: {}", input::json_problem(&e))),
        };
        // Compare the bytes, so that a changed bit of white space is detected too.
        if manifest.schema != SCHEMA || manifest.to_json() != text {
            return damaged(Manifest::FILE, "it is damaged, or from another version of moewarden".into());
        }
        for (name, entry) in &manifest.files {
            let path = folder.join(name);
            if !path.is_file() {
                return damaged(name, "it is missing".into());
            }
            let found = ManifestEntry::of(&path)?;
            if found.bytes != entry.bytes {
                return damaged(name, format!("it has {} bytes, not {}", found.bytes, entry.bytes));
            }
            if found != *entry {
                return damaged(name, "it is damaged: its hash is not the one in the manifest".into());
            }
        }
        for file in fs::read_dir(folder).map_err(Error::read(folder))? {
            let name = file.map_err(Error::read(folder))?.file_name().to_string_lossy().into_owned();
            if name != Manifest::FILE && !manifest.files.contains_key(&name) {
                return damaged(&name, "it is not in the manifest".into());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let mut entries = BTreeMap::new();
        for (name, text) in [("a.bin", "some bytes"), ("b.bin", "same bytes"), ("c.json", "{}")] {
            fs::write(dir.path().join(name), text).unwrap();
            entries.insert(name.to_owned(), ManifestEntry::of(&dir.path().join(name)).unwrap());
        }
        Manifest::new(entries).write(dir.path()).unwrap();
        dir
    }

    #[test]
    fn every_flipped_bit_of_every_file_is_detected() {
        let dir = folder();
        Manifest::verify(dir.path()).unwrap();
        for name in ["a.bin", "b.bin", "c.json", Manifest::FILE] {
            let path = dir.path().join(name);
            let good = fs::read(&path).unwrap();
            for bit in 0..8 * good.len() {
                let mut bad = good.clone();
                bad[bit / 8] ^= 1 << (bit % 8);
                fs::write(&path, bad).unwrap();
                assert!(Manifest::verify(dir.path()).is_err(), "bit {bit} of {name}");
            }
            fs::write(&path, &good[..good.len() - 1]).unwrap();
            assert!(Manifest::verify(dir.path()).is_err(), "{name} cut");
            fs::remove_file(&path).unwrap();
            assert!(Manifest::verify(dir.path()).is_err(), "{name} deleted");
            fs::write(&path, good).unwrap();
        }
        Manifest::verify(dir.path()).unwrap();
    }

    #[test]
    fn swapped_and_added_files_are_detected() {
        let dir = folder();
        let [a, b] = ["a.bin", "b.bin"].map(|name| dir.path().join(name));
        let (of_a, of_b) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
        fs::write(&a, &of_b).unwrap();
        fs::write(&b, &of_a).unwrap();
        let error = Manifest::verify(dir.path()).unwrap_err().to_string();
        assert!(error.contains("a.bin") && error.contains("hash"), "{error}");
        fs::write(&a, of_a).unwrap();
        fs::write(&b, of_b).unwrap();
        fs::write(dir.path().join("d.bin"), "").unwrap();
        assert!(Manifest::verify(dir.path()).unwrap_err().to_string().contains("d.bin"));
    }
}
