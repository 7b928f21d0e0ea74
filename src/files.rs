//! Atomic file writes: temporary file, fsync, rename.
//!
//! An output is written to a temporary file in its own folder, synced to disk, and renamed to its final name; then the
//! folder is synced. So after a crash a reader finds the old file or the new one, never a partial one.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::exit::{self, Coded};

/// Why an output file could not be written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The temporary file cannot be created: the folder is missing or not writable.
    #[error("{path}: cannot be created (does its folder exist, and is it writable?)")]
    Create {
        /// The output file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
    /// Writing, syncing or renaming failed. An existing file is unchanged.
    #[error("{path}: writing failed, an existing file is unchanged ({})", why_not_written(source))]
    Write {
        /// The output file.
        path: PathBuf,
        /// The operating system's error.
        source: io::Error,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Create { source, .. } if !is_disk_full(source) => exit::CANNOT_CREATE,
            Error::Create { .. } | Error::Write { .. } => exit::IO,
        }
    }
}

/// Whether the error says that the disk is full or a quota is exceeded, in contrast to a wrong path or missing
/// permissions.
pub fn is_disk_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// What to look at where a file cannot be written.
pub fn why_not_written(error: &io::Error) -> &'static str {
    match error.kind() {
        _ if is_disk_full(error) => "free space, or give another folder",
        io::ErrorKind::IsADirectory | io::ErrorKind::InvalidInput => {
            "something else is in the place of the file: move it away"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => "is the folder writable?",
        _ => "is the disk full, or is the folder not writable?",
    }
}

/// A file that appears under its name, complete, at [`AtomicFile::commit`]. Dropped without a commit, it leaves nothing
/// behind.
pub struct AtomicFile {
    path: PathBuf,
    temporary: BufWriter<NamedTempFile>,
}

impl AtomicFile {
    /// Creates a temporary file in the folder of `path`, with the permissions of any new file under the user's umask.
    ///
    /// # Errors
    /// [`Error::Create`] if the folder is missing or not writable.
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, Error> {
        let path = path.into();
        let mut prefix = OsString::from(".");
        prefix.push(shortened(path.file_name().unwrap_or_default()));
        prefix.push(".");
        let mut builder = tempfile::Builder::new();
        builder.prefix(&prefix).suffix(".part");
        // The default mode of tempfile, 0600, would keep a shared folder's other users from reading the output.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        match builder.tempfile_in(folder_of(&path)) {
            Ok(temporary) => Ok(Self { path, temporary: BufWriter::new(temporary) }),
            Err(source) => Err(Error::Create { path, source }),
        }
    }

    /// The final path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Syncs the file, renames it to its final path, replacing an existing file, and syncs the folder.
    ///
    /// # Errors
    /// [`Error::Write`]. An existing file is then unchanged.
    pub fn commit(self) -> Result<(), Error> {
        let Self { path, temporary } = self;
        let done = || -> io::Result<()> {
            let temporary = temporary.into_inner().map_err(|e| e.into_error())?;
            temporary.as_file().sync_all()?;
            temporary.persist(&path).map_err(|e| e.error)?;
            sync_folder(folder_of(&path))
        }();
        done.map_err(|source| Error::Write { path, source })
    }
}

impl Write for AtomicFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.temporary.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.temporary.flush()
    }
}

/// A name that stays within the 255 bytes of a file system when a temporary name is made of it: cut, with a hash of the whole name in
/// place of the end, where it is longer than 200 bytes.
pub fn shortened(name: &OsStr) -> Cow<'_, OsStr> {
    const LONGEST: usize = 200;
    if name.len() <= LONGEST {
        return name.into();
    }
    let hash = blake3::hash(name.as_encoded_bytes()).to_hex();
    let name = name.to_string_lossy();
    let cut = (0..=LONGEST - 17).rev().find(|end| name.is_char_boundary(*end)).unwrap_or(0);
    OsString::from(format!("{}-{}", &name[..cut], &hash[..16])).into()
}

/// The output file of which `name` is a temporary file, left by a killed process: `metrics.jsonl` for
/// `.metrics.jsonl.qX3f9a.part`. `None` if `name` is not such a temporary file.
pub fn target_of_temporary(name: &str) -> Option<&str> {
    Some(name.strip_prefix('.')?.strip_suffix(".part")?.rsplit_once('.')?.0)
}

/// Writes a file atomically, with the content that `fill` writes: see [`AtomicFile`].
///
/// # Errors
/// Those of [`AtomicFile::create`] and [`AtomicFile::commit`], and [`Error::Write`] for an error of `fill`.
pub fn write_with(path: impl Into<PathBuf>, fill: impl FnOnce(&mut AtomicFile) -> io::Result<()>) -> Result<(), Error> {
    let mut file = AtomicFile::create(path)?;
    match fill(&mut file) {
        Ok(()) => file.commit(),
        Err(source) => Err(Error::Write { path: file.path, source }),
    }
}

/// Writes `bytes` to a file atomically: see [`AtomicFile`].
///
/// # Errors
/// Those of [`write_with`].
pub fn write(path: impl Into<PathBuf>, bytes: impl AsRef<[u8]>) -> Result<(), Error> {
    write_with(path, |file| file.write_all(bytes.as_ref()))
}

/// Syncs a folder (fsync), so that created, renamed and removed entries survive a crash.
///
/// # Errors
/// The operating system's error.
pub fn sync_folder(folder: &Path) -> io::Result<()> {
    match File::open(folder)?.sync_all() {
        // Some network file systems cannot sync folders; their servers order renames themselves.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
        other => other,
    }
}

/// The folder that contains `path`; `.` for a bare file name.
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
    fn a_commit_replaces_the_file_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write(&path, "old").unwrap();
        let mut file = AtomicFile::create(&path).unwrap();
        file.write_all(b"new").unwrap();
        file.flush().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old", "the old file is unchanged before the commit");
        file.commit().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(names(dir.path()), ["a.json"]);
    }

    #[test]
    fn without_a_commit_the_file_is_unchanged() {
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
    fn the_longest_names_are_written() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a".repeat(255), "é".repeat(127)] {
            write(dir.path().join(&name), "x").unwrap();
            assert_eq!(std::fs::read(dir.path().join(&name)).unwrap(), b"x");
        }
        let short = "b".repeat(200);
        assert_eq!(&*shortened(short.as_ref()), short.as_str());
        let [one, other] = ["c", "d"].map(|end| shortened(("é".repeat(120) + end).as_ref()).into_owned());
        assert!(one.len() <= 200 && one != other);
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
    fn new_files_have_the_permissions_of_the_umask() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let (ours, plain) = (dir.path().join("ours"), dir.path().join("plain"));
        write(&ours, "x").unwrap();
        std::fs::write(&plain, "x").unwrap();
        let mode = |p: &Path| p.metadata().unwrap().permissions().mode();
        assert_eq!(mode(&ours), mode(&plain));
    }
}
