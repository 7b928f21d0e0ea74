//! Files that are either whole or absent.
//!
//! An output is written aside in its own folder, synced, and renamed over its name; then the folder is synced, so that
//! after a crash a reader finds the old file or the new one, never a part.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::exit::{self, Coded};

/// What could not be done to which file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be begun: its folder is missing or not writable.
    #[error("{path}: cannot be created (does its folder exist, and may it be written to?)")]
    Create {
        /// The file that was to be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Writing, syncing or renaming failed midway; the file is as it was before.
    #[error("{path}: writing failed, the file is as it was before (is the disk full?)")]
    Write {
        /// The file that was to be.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Create { source, .. } if !is_full(source) => exit::CANNOT_CREATE,
            Error::Create { .. } | Error::Write { .. } => exit::IO,
        }
    }
}

/// Whether a disk is full, or has no room for one more entry: a fault midway, not a wrong place.
pub fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// A file on its way: what is written to it appears under its name at [`AtomicFile::commit`], or never.
/// Dropped without a commit, it leaves nothing behind.
pub struct AtomicFile {
    path: PathBuf,
    aside: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Begins a file beside `path`, in the same folder, with the permissions that the user's umask gives new files.
    ///
    /// # Errors
    /// [`Error::Create`] if the folder is missing or not writable.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let prefix = format!(".{name}.");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".part");
        // tempfile's own default, 0600, would hide a finished model from the rest of the group.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        match builder.tempfile_in(folder_of(&path)) {
            Ok(aside) => Ok(Self { path, aside: BufWriter::new(aside) }),
            Err(source) => Err(Error::Create { path, source }),
        }
    }

    /// The name under which it will appear.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs the contents, gives the file its name (replacing what was there) and syncs the folder.
    ///
    /// # Errors
    /// [`Error::Write`]; the file under that name is then as it was before.
    pub fn commit(self) -> Result<(), Error> {
        let Self { path, aside } = self;
        let done = || -> io::Result<()> {
            let aside = aside.into_inner().map_err(|e| e.into_error())?;
            aside.as_file().sync_all()?;
            aside.persist(&path).map_err(|e| e.error)?;
            sync_folder(folder_of(&path))
        }();
        done.map_err(|source| Error::Write { path, source })
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.aside.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.aside.flush()
    }
}

/// The file that a killed process left this of: `metrics.jsonl` of `.metrics.jsonl.qX3f9a.part`.
pub fn is_left_of(name: &str) -> Option<&str> {
    Some(name.strip_prefix('.')?.strip_suffix(".part")?.rsplit_once('.')?.0)
}

/// Writes a whole file by `fill`: see [`AtomicFile`].
///
/// # Errors
/// Those of [`AtomicFile::create`] and [`AtomicFile::commit`], and [`Error::Write`] for what `fill` returns.
pub fn write_with(path: impl Into<PathBuf>, fill: impl FnOnce(&mut AtomicFile) -> io::Result<()>) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    match fill(&mut file) {
        Ok(()) => file.commit(),
        Err(source) => Err(Error::Write { path: file.path, source }),
    }
}

/// Writes `bytes` as a whole file: see [`AtomicFile`].
///
/// # Errors
/// Those of [`write_with`].
pub fn write(path: impl Into<PathBuf>, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
    write_with(path, |file| file.write_all(bytes.as_ref()))
}

/// Makes the names in a folder (created, renamed, removed files) survive a crash.
///
/// # Errors
/// What the system says, bare.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some network file systems cannot do this for folders; their servers order renames themselves.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// The folder that holds `path`; `.` for a bare name.
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(folder: &Path) -> Vec<String> {
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect()
    }

    #[test]
    fn a_commit_replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write(&path, "old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        file.flush().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old", "nothing shows before the commit");
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn without_a_commit_nothing_happened() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write(&path, "old").unwrap();
        let error = write_with(&path, |file| {
            file.write_all(b"half of the new")?;
            Err(io::Error::from(io::ErrorKind::StorageFull))
        })
        .unwrap_err();
        assert_eq!(error.exit_code(), exit::IO);
        assert!(error.to_string().contains("a.json"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn a_missing_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let error = write(dir.path().join("absent/a.json"), "x").unwrap_err();
        assert_eq!(error.exit_code(), exit::CANNOT_CREATE);
        assert!(error.to_string().contains("absent/a.json"), "{error}");
    }

    #[cfg(unix)]
    #[test]
    fn others_may_read_what_the_umask_lets_them() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        write(&ours, "x").unwrap();
        std::fs::write(&plain, "x").unwrap();
        let mode = |p: &Path| p.metadata().unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
