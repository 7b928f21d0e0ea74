//! Folders written aside: `.NAME.partial` beside the final place, brought to the disk, then renamed. (Single files:
//! [`crate::files`].)
//!
//! The name is fixed, so that what a killed process left behind is found and cleared by the next one.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::error::Error;
use crate::files::{folder_of, sync_folder};

/// A folder that appears under its final name only when it is whole.
///
/// Dropped before [`AsideDir::finish`], it takes everything written with it.
pub struct AsideDir {
    partial: PathBuf,
    target: PathBuf,
    done: bool,
}

impl AsideDir {
    /// An empty folder beside `target`.
    ///
    /// # Errors
    /// A `target` without a name, and a place that cannot be written.
    pub fn create(target: &Path) -> Result<Self, Error> {
        let partial = partial_path(target)?;
        clear(&partial)?;
        fs::create_dir_all(folder_of(&partial)).map_err(Error::create(folder_of(&partial)))?;
        fs::create_dir(&partial).map_err(Error::create(&partial))?;
        Ok(Self { partial, target: target.into(), done: false })
    }

    /// Where to write until then.
    pub fn path(&self) -> &Path {
        &self.partial
    }

    /// Writes one file of the folder and brings it to the disk.
    ///
    /// # Errors
    /// Those of `fill` and of the disk, with the file's path.
    pub fn write(&self, name: &Path, fill: impl FnOnce(&mut dyn Write) -> io::Result<()>) -> Result<(), Error> {
        let path = self.partial.join(name);
        fs::create_dir_all(folder_of(&path)).map_err(Error::write(&path))?;
        write_synced(&path, fill).map_err(Error::write(&self.target.join(name)))
    }

    /// Gives the folder its final name. With `replace`, what stands there goes; without, only an empty folder may.
    ///
    /// # Errors
    /// A place that is taken, or a failing disk.
    pub fn finish(mut self, replace: bool) -> Result<(), Error> {
        sync_tree(&self.partial).map_err(Error::write(&self.target))?;
        let old = partial_path(&self.target)?.with_extension("old");
        if replace && fs::symlink_metadata(&self.target).is_ok() {
            clear(&old)?;
            fs::rename(&self.target, &old).map_err(Error::create(&self.target))?;
        }
        fs::rename(&self.partial, &self.target).map_err(|source| match source.kind() {
            io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::AlreadyExists | io::ErrorKind::NotADirectory => {
                Error::Exists(self.target.clone())
            }
            _ => Error::Create { path: self.target.clone(), source },
        })?;
        self.done = true;
        sync_folder(folder_of(&self.target)).map_err(Error::write(&self.target))?;
        clear(&old)
    }
}

impl Drop for AsideDir {
    fn drop(&mut self) {
        if !self.done {
            // On an error path already: the next run clears what this cannot.
            let _ = fs::remove_dir_all(&self.partial);
        }
    }
}

/// The folder that a killed process left this of: `final_model` of `.final_model.partial` and `.final_model.old`.
pub fn is_left_of(name: &str) -> Option<&str> {
    let name = name.strip_prefix('.')?;
    name.strip_suffix(".partial").or_else(|| name.strip_suffix(".old"))
}

/// Where the folder `target` is written until it is whole.
///
/// # Errors
/// [`Error::NoName`].
pub fn partial_path(target: &Path) -> Result<PathBuf, Error> {
    let name = target.file_name().ok_or_else(|| Error::NoName(target.into()))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(".partial");
    Ok(target.with_file_name(partial))
}

/// Removes a folder that was written here. Killed on the way, it leaves nothing under the folder's name.
///
/// # Errors
/// A failing disk.
pub fn remove(target: &Path) -> Result<(), Error> {
    let old = partial_path(target)?.with_extension("old");
    clear(&old)?;
    fs::rename(target, &old).map_err(Error::write(target))?;
    clear(&old)
}

/// Removes what killed processes left in a folder of folders, except `aside`, which is being written.
///
/// # Errors
/// A failing disk.
pub fn clear_left(folder: &Path, aside: &AsideDir) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(Error::read(folder))? {
        let entry = entry.map_err(Error::read(folder))?;
        let left = entry.file_name().to_str().and_then(is_left_of).is_some();
        if left && entry.path() != aside.path() {
            clear(&entry.path())?;
        }
    }
    Ok(())
}

/// Removes a folder of ours if it is there.
fn clear(path: &Path) -> Result<(), Error> {
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
    out.into_inner()?.sync_all() // the disk's last chance to say no
}

/// Brings the entries of a folder and of those in it to the disk.
fn sync_tree(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            sync_tree(&entry.path())?;
        }
    }
    sync_folder(dir)
}
