//! Why a config.json is refused.

use std::io;
use std::path::PathBuf;

use super::families::FAMILIES;
use crate::exit::{self, Coded};

/// Why a config.json cannot be used.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages say it
pub enum Error {
    #[error("cannot read {path}; a model folder holds config.json beside its safetensors files")]
    Read { path: PathBuf, source: io::Error },
    #[error("{path} is not a model's configuration: {message}")]
    NotJson { path: PathBuf, message: String },
    #[error("{path}: the model_type {found} is not supported; moewarden knows {}", known())]
    ModelType { path: PathBuf, found: String },
    #[error("{path}: {key}: {message}")]
    Invalid { path: PathBuf, key: String, message: String },
    #[error("{path}: {key}: {message}")]
    Unsupported { path: PathBuf, key: String, message: String },
    #[error(
        "sequences of {length} tokens are longer than the {limit} for which the model's rotary embedding keeps its \
         frequencies; lower --max-length"
    )]
    TooLong { length: usize, limit: usize },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            Error::Read { .. } => exit::IO,
            Error::NotJson { .. } | Error::Invalid { .. } => exit::DATA,
            Error::ModelType { .. } | Error::Unsupported { .. } | Error::TooLong { .. } => exit::CONFIG,
        }
    }
}

/// The families' names, for messages.
pub(crate) fn known() -> String {
    FAMILIES.map(|family| family.model_type).join(", ")
}
