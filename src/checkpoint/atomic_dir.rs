//! Folders that are written under a temporary name (`.NAME.partial` beside the target), synced, and renamed. For single
//! files see [`crate::files`].
//!
//! The temporary name is fixed, so the next process finds and removes the folder of a killed one.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::error::Error;
use crate::files::{folder_of, shortened, sync_folder};

/// A folder that gets its final name only when it is complete.
///
/// If it is dropped before [`AtomicDir::finish`], the temporary folder is removed with its content.
pub struct AtomicDir {
    partial: PathBuf,
    target: PathBuf,
    finished: bool,
}

impl AtomicDir {
    /// Creates an empty temporary folder beside `target`; removes one that a killed process left.
    ///
    /// # Errors
    /// A `target` without a file name, or a parent folder that cannot be written.
    pub fn create(target: &Path) -> Result<Self, Error> {
        // A link stays one: a folder cannot be renamed to its name.
        let without_slash = target.components().as_path();
        let linked = fs::canonicalize(target).ok().filter(|_| without_slash.is_symlink());
        let target = linked.as_deref().unwrap_or(target);
        let partial = partial_path(target)?;
        remove_if_exists(&partial)?;
        fs::create_dir_all(folder_of(&partial)).map_err(Error::create(folder_of(&partial)))?;
        fs::create_dir(&partial).map_err(Error::create(&partial))?;
        Ok(Self { partial, target: target.into(), finished: false })
    }

    /// The path of the temporary folder.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Writes one file of the folder by `fill` and syncs it. `name`: its path relative to the folder.
    ///
    /// # Errors
    /// Those of `fill` and of writing, with the file's final path.
    pub fn write(&self, name: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
        let path = self.partial.join(name);
        fs::create_dir_all(folder_of(&path)).map_err(Error::write(&path))?;
        write_synced(&path, fill).map_err(Error::write(&self.target.join(name)))
    }

    /// Syncs the folder and renames it to `target`. With `replace`, an existing `target` is removed; without, it must
    /// not exist or be an empty folder.
    ///
    /// # Errors
    /// A `target` that exists, or an I/O error.
    pub fn finish(mut self, replace: bool) -> Result<(), Error> {
        sync_tree(&self.partial).map_err(Error::write(&self.target))?;
        let old = partial_path(&self.target)?.with_extension("old");
        if replace && fs::symlink_metadata(&self.target).is_ok() {
            remove_if_exists(&old)?;
            fs::rename(&self.target, &old).map_err(Error::create(&self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(|source| match source.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                Error::Exists(self.target.clone())
            }
            _ => Error::Create { path: self.target.clone(), source },
        })?;
        self.finished = true;
        sync_folder(folder_of(&self.target)).map_err(Error::write(&self.target))?;
        remove_if_exists(&old)
    }
}

impl Drop for AtomicDir {
    fn drop(&mut self) {
        if !self.finished {
            // Already on an error path: the next run removes what is left.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// The target's name if `name` is a temporary folder of this module: `final_model` for `.final_model.partial` and
/// `.final_model.old`.
pub fn target_of_temporary(name: &str) -> Option<&str> {
    let name = name.strip_prefix('.')?;
    name.strip_suffix(".partial").or_else(|| name.strip_suffix(".old"))
}

/// The temporary path of the folder `target`.
///
/// # Errors
/// [`Error::NoName`].
pub fn partial_path(target: &Path) -> Result<PathBuf, Error> {
    let name = target.file_name().ok_or_else(|| Error::NoName(target.into()))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(shortened(name));
    partial.push(".partial");
    Ok(target.with_file_name(partial))
}

/// Removes a folder atomically: renames it before deleting its content, so a killed process leaves no incomplete folder
/// under its name.
///
/// # Errors
/// An I/O error.
pub fn remove(target: &Path) -> Result<(), Error> {
    let old = partial_path(target)?.with_extension("old");
    remove_if_exists(&old)?;
    fs::rename(target, &old).map_err(Error::write(target))?;
    remove_if_exists(&old)
}

/// Removes the temporary folders that killed processes left in `folder`, except `aside`, which is being written.
///
/// # Errors
/// An I/O error.
pub fn remove_temporaries(folder: &Path, aside: &AtomicDir) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(Error::read(folder))? {
        let entry = entry.map_err(Error::read(folder))?;
        let is_temporary = entry.file_name().to_str().and_then(target_of_temporary).is_some();
        if is_temporary && entry.path() != aside.path() {
            remove_if_exists(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a folder, if it exists.
fn remove_if_exists(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::Create { path: path.into(), source: error })
        }
        _ => Ok(()),
    }
}

fn write_synced(path: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> io::Result<()> {
    let mut out = BufWriter::with_capacity(1 << 20, File::create(path)?);
    fill(&mut out)?;
    out.into_inner()?.sync_all() // reports write errors that the page cache has delayed
}

/// Syncs the directory entries of a folder and of its subfolders.
fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_folder(dir)
}
