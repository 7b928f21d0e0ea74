//! Errors of writing and reading models, deltas and the optimizer state.

use std::io;
use std::path::{Path, PathBuf};

use crate::exit::{self, Coded};
use crate::files;
use crate::model::{ClaimError, ConfigError, NotFinite, WeightsError};

/// Why a model, a delta or the optimizer state could not be written or read.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages describe the variants
pub enum Error {
    #[error("{0} exists and is not an empty folder; choose another folder or move it away")]
    Exists(PathBuf),
    #[error("{0} does not end with a folder name")]
    NoName(PathBuf),
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot write {path}; no incomplete file or folder was left")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is a broken symbolic link: remove it, or fetch the file that it stands for")]
    BrokenLink { path: PathBuf, source: io::Error },
    #[error("{file}: not a moewarden delta: {message}")]
    NotADelta { file: PathBuf, message: String },
    #[error("{file}: tensor `{tensor}`: {message}")]
    DeltaTensor { file: PathBuf, tensor: String, message: String },
    #[error("{file}: {message}")]
    Damaged { file: PathBuf, message: String },
    #[error("{file} was made from another base model than {base}: {message}")]
    OtherBase { file: PathBuf, base: PathBuf, message: String },
    #[error("{file} holds a weight that no model can compute with: nothing was exported")]
    NotFinite { file: PathBuf, source: NotFinite },
    #[error(transparent)]
    File(#[from] files::Error),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Weights(#[from] WeightsError),
    #[error(transparent)]
    Claim(#[from] ClaimError),
}

impl Error {
    pub(super) fn create(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Create { path: path.into(), source }
    }

    pub(super) fn write(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Write { path: path.into(), source }
    }

    pub(super) fn read(path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Read { path: path.into(), source }
    }
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Exists(_) | Error::NoName(_) => exit::CANNOT_CREATE,
            Error::Create { source, .. } if files::is_disk_full(source) => exit::IO,
            Error::Create { .. } => exit::CANNOT_CREATE,
            Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            Error::BrokenLink { .. } => exit::NO_INPUT,
            Error::Write { .. } | Error::Read { .. } => exit::IO,
            Error::NotFinite { source, .. } => source.exit_code(),
            Error::File(e) => e.exit_code(),
            Error::Damaged { .. } | Error::NotADelta { .. } | Error::DeltaTensor { .. } | Error::OtherBase { .. } => {
                exit::DATA
            }
            Error::Config(error) => error.exit_code(),
            Error::Weights(error) => error.exit_code(),
            Error::Claim(error) => error.exit_code(),
        }
    }
}
