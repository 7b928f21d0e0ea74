//! Why a config.json is refused.

use std::io;
use std::path::{Path, PathBuf};

use super::families::FAMILIES;
use crate::exit::{self, Coded};
use crate::model::folder;
use crate::quote::quote;

/// Why a config.json cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum Error {
    #[error("cannot read {path}; a model folder contains config.json and safetensors files")]
    Read { path: PathBuf, source: io::Error },
    #[error("{folder} holds no config.json: {message}")]
    NotAModel { folder: PathBuf, message: String },
    #[error("{path} is not a valid model configuration: {message}")]
    NotJson { path: PathBuf, message: String },
    #[error("{path}: the model_type {} is not supported; moewarden knows {}", quote(.found), known())]
    ModelType { path: PathBuf, found: String },
    #[error("{path}: {key}: {message}")]
    Invalid { path: PathBuf, key: String, message: String },
    #[error("{path}: {key}: {message}")]
    Unsupported { path: PathBuf, key: String, message: String },
    #[error(
        "a sequence of {length} tokens is longer than {limit}, above which the model's rotary embedding changes its \
         frequencies, which moewarden does not support; lower --max-length"
    )]
    TooLong { length: usize, limit: usize },
}

impl Error {
    /// The error for a config.json that cannot be read: where it is missing, the folder may be something else than a model.
    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        let folder = path.parent().unwrap_or(path);
        match folder::not_a_model(folder).filter(|_| source.kind() == io::ErrorKind::NotFound) {
            Some(message) => Self::NotAModel { folder: folder.into(), message },
            None => Self::Read { path: path.into(), source },
        }
    }
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            Error::Read { .. } => exit::IO,
            Error::NotAModel { .. } | Error::NotJson { .. } | Error::Invalid { .. } => exit::DATA,
            Error::ModelType { .. } | Error::Unsupported { .. } | Error::TooLong { .. } => exit::CONFIG,
        }
    }
}

/// The supported values of `model_type`, for messages.
pub(crate) fn known() -> String {
    FAMILIES.map(|family| family.model_type).join(", ")
}
