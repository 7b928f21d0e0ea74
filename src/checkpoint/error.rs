//! Why a model could not be written.

use std::io;
use std::path::{Path, PathBuf};

use crate::exit::{self, Coded};
use crate::files;
use crate::model::{ClaimError, ConfigError, WeightsError};

/// Why a model or a delta could not be written or applied.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error("{0} exists and is not an empty folder; choose another place or move it away")]
    Exists(PathBuf),
    #[error("{0} has no name that a folder can be written under")]
    NoName(PathBuf),
    #[error("cannot create {path}")]
    Create { path: PathBuf, source: io::Error },
    #[error("cannot write {path}; nothing was left behind")]
    Write { path: PathBuf, source: io::Error },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: io::Error },
    #[error("{file}: it is not a moewarden delta: {message}")]
    NotADelta { file: PathBuf, message: String },
    #[error("{file}: tensor `{tensor}`: {message}")]
    DeltaTensor { file: PathBuf, tensor: String, message: String },
    #[error("{file}: {message}")]
    NotWhole { file: PathBuf, message: String },
    #[error("{file} was made from another base model than {base}: {message}")]
    OtherBase { file: PathBuf, base: PathBuf, message: &'static str },
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
            // A disk that is full, or has no room for one more entry, is a fault midway, not a wrong place.
            Error::Create { source, .. } if is_full(source) => exit::IO,
            Error::Create { .. } => exit::CANNOT_CREATE,
            Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            Error::Write { .. } | Error::Read { .. } => exit::IO,
            Error::File(e) => e.exit_code(),
            Error::NotWhole { .. } | Error::NotADelta { .. } | Error::DeltaTensor { .. } | Error::OtherBase { .. } => exit::DATA,
            Error::Config(error) => error.exit_code(),
            Error::Weights(error) => error.exit_code(),
            Error::Claim(error) => error.exit_code(),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
