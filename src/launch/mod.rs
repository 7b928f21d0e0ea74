//! What this process is, and where it may write: its launcher, ranks and devices, its environment, its output folder.
//!
//! Only this module and `ui` read environment variables. A run writes to its output folder, for compiled kernels to the
//! kernel cache and, with `--download`, to the hub cache.

mod device;
pub mod download;
mod env;
mod launcher;
mod lock;
pub mod memory;
mod output_dir;
mod outputs;
mod peers;
mod ranks;
mod signals;
mod start;

use std::path::PathBuf;

use crate::exit::{self, Coded};

pub use device::{Device, Opened, Workload};
pub use env::{HubAccess, cuda_search_paths, fault, hub_access, hub_cache, kernel_cache};
pub use launcher::{Launch, Launcher};
pub use lock::{LOCK_FILE, OutputLock};
pub use output_dir::{
    Existing, check_model_dir, check_output_dir, prepare_dir, prepare_dir_keeping, prepare_output_dir,
    remove_output_folders,
};
pub use ranks::{Rank, Ranks, catch_panic};
pub use signals::stop_on_signals;
pub use start::Started;

/// A launcher that this process cannot join, or an output folder that it cannot use.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The launcher's environment variables contradict each other, the options, MPI or this build.
    #[error("{0}")]
    Launcher(String),
    /// The contents of the output folder do not allow the command.
    #[error("{}: {message}", path.display())]
    OutputDir {
        /// The output folder.
        path: PathBuf,
        /// The cause and the way out.
        message: String,
    },
    /// The output folder cannot be read, created or emptied.
    #[error("cannot {what} {}", path.display())]
    OutputIo {
        /// The verb.
        what: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
}

impl Coded for LaunchError {
    fn exit_code(&self) -> u8 {
        match self {
            LaunchError::Launcher(_) => exit::LAUNCHER,
            LaunchError::OutputIo { source, .. } if crate::files::is_disk_full(source) => exit::IO,
            LaunchError::OutputDir { .. } | LaunchError::OutputIo { .. } => exit::CANNOT_CREATE,
        }
    }
}
