//! A lock file in the output folder: two runs in one folder would overwrite each other's files.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use super::LaunchError;

/// Name of the lock file.
pub const LOCK_FILE: &str = ".moewarden.lock";

/// Exclusive use of an output folder, released on drop.
#[derive(Debug)]
pub struct OutputLock {
    path: PathBuf,
    file: File,
    /// Content of the lock file: process id, host name and time.
    pub holder: String,
}

impl OutputLock {
    /// Creates the folder if necessary and locks it.
    ///
    /// # Errors
    /// [`LaunchError::OutputDir`] if another process holds the lock; the message names the process.
    /// [`LaunchError::OutputIo`] if the lock file cannot be written.
    pub fn take(dir: &Path) -> Result<Self, LaunchError> {
        let path = dir.join(LOCK_FILE);
        let failed = |source| LaunchError::OutputIo { what: "lock", path: path.clone(), source };
        std::fs::create_dir_all(dir).map_err(failed)?;
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path).map_err(failed)?;
        match file.try_lock() {
            // Between opening and locking, another process may have deleted the file on its exit.
            Ok(()) if is_at(&file, &path).map_err(failed)? => {}
            Ok(()) | Err(TryLockError::WouldBlock) => {
                let mut holder = String::new();
                _ = file.read_to_string(&mut holder);
                return Err(LaunchError::OutputDir {
                    path: dir.into(),
                    message: format!(
                        "another run works here ({}): wait for it to end, stop it, or give another --output-dir",
                        if holder.is_empty() { "it has just started or ended" } else { holder.trim() }
                    ),
                });
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let since = std::time::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        let holder = format!("process {} on {}, {since}", std::process::id(), host.trim());
        let mut lock = Self { path: path.clone(), file, holder };
        lock.file.set_len(0).and_then(|()| lock.file.write_all(lock.holder.as_bytes())).map_err(failed)?;
        Ok(lock)
    }
}

impl Drop for OutputLock {
    fn drop(&mut self) {
        _ = std::fs::remove_file(&self.path); // while locked, so that no other process holds it
        _ = self.file.unlock();
    }
}

/// Whether `path` still refers to this open file.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let (ours, there) = (file.metadata()?, std::fs::metadata(path));
    Ok(there.is_ok_and(|there| (there.dev(), there.ino()) == (ours.dev(), ours.ino())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_one_holder_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let lock = OutputLock::take(&run).unwrap();
        let error = OutputLock::take(&run).unwrap_err().to_string();
        assert!(error.contains(&format!("process {}", std::process::id())), "{error}");
        drop(lock);
        assert!(!run.join(LOCK_FILE).exists());
        OutputLock::take(&run).unwrap();
    }

    #[test]
    fn a_dead_holder_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK_FILE), "process 1 on a machine that crashed").unwrap();
        OutputLock::take(dir.path()).unwrap();
    }
}
