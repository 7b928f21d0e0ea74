//! Why a model could not be downloaded.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use hf_hub::api::sync::ApiError;

use super::disk::free_space;
use crate::exit::{self, Coded};
use crate::files::is_disk_full;
use crate::launch::memory::human;
use crate::model::HubId;
use crate::quote::quote;

/// Each error names the hub id, the file where one is concerned, the cause and the way out.
#[derive(Debug, thiserror::Error)]
#[allow(missing_docs)] // the messages are the documentation
pub enum Error {
    #[error(
        "`{id}` is not in the cache, and {variable} forbids to download it: unset {variable}, or copy the model into {cache}"
    )]
    Offline { id: HubId, variable: &'static str, cache: PathBuf },
    #[error(
        "{endpoint} refused {what} (HTTP {status}): the model does not exist, or it is private or gated. Check the spelling; for a \
         gated model accept its conditions at {endpoint}/{} and give a token in HF_TOKEN or by `hf auth login` ({token})", .id.id
    )]
    Denied { id: HubId, what: String, endpoint: String, status: u16, token: &'static str },
    #[error("{endpoint} does not have {what} (HTTP 404): check the spelling of the model and its revision")]
    NotFound { what: String, endpoint: String },
    #[error("{endpoint} answered {what} with HTTP {status}: wait some minutes, then {AGAIN}")]
    Busy { what: String, endpoint: String, status: u16 },
    #[error(
        "cannot fetch {what} from {endpoint}: {cause}. Check the network (HF_ENDPOINT names another server), then {AGAIN}"
    )]
    Network { what: String, endpoint: String, cause: String },
    #[error(
        "cannot fetch {what} from {endpoint}: nothing arrived for {} seconds (HF_HUB_DOWNLOAD_TIMEOUT). Check the network, then {AGAIN}",
        .waited.as_secs()
    )]
    Stalled { what: String, endpoint: String, waited: Duration },
    #[error("{what} arrived damaged from {endpoint}: {cause}. It was deleted; {AGAIN}")]
    Torn { what: String, endpoint: String, cause: String },
    #[error(
        "`{id}` lacks {file}: moewarden needs a model in safetensors with a tokenizer.json, such as `save_pretrained` writes"
    )]
    Lacks { id: HubId, file: String },
    #[error(
        "no room for {what} in {path}: {} are free{}. Free space or set HF_HUB_CACHE to a larger disk, then {AGAIN}",
        human(*.free), .needed.map_or_else(String::new, |needed| format!(", {} are needed", human(needed)))
    )]
    DiskFull { what: String, path: PathBuf, needed: Option<u64>, free: u64 },
    #[error("cannot write {what} into the cache {path}: is it writable? HF_HUB_CACHE or HF_HOME name another one")]
    Cache { what: String, path: PathBuf, source: io::Error },
    #[error("HF_ENDPOINT is {}: expected an address that begins with https:// or http://, or leave it unset", quote(.0))]
    Endpoint(String),
    #[error("the answer of {endpoint} about {what} is not understood: {cause}; is HF_ENDPOINT a Hugging Face hub?")]
    NotAHub { what: String, endpoint: String, cause: String },
    #[error("stopped by a signal while `{id}` was downloaded: what has arrived stays in the cache; {AGAIN}")]
    Stopped { id: HubId },
}

const AGAIN: &str = "repeat the command: it continues where it stopped";

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Offline { .. } | Error::Denied { .. } | Error::NotFound { .. } | Error::Lacks { .. } => {
                exit::NO_INPUT
            }
            Error::Endpoint(_) => exit::CONFIG,
            Error::Stopped { .. } => exit::REQUEUE,
            Error::Cache { source, .. } if !is_disk_full(source) => exit::CANNOT_CREATE,
            _ => exit::IO,
        }
    }
}

/// Where a request failed, for messages.
pub struct Request<'a> {
    /// The model.
    pub id: &'a HubId,
    /// The file or list that was asked for, with its model.
    pub what: String,
    /// The server.
    pub endpoint: &'a str,
    /// The folder that it is written to.
    pub cache: PathBuf,
    /// Whether a token was sent.
    pub with_token: bool,
}

impl Request<'_> {
    /// The cause of an error of the client.
    pub fn failed(self, error: ApiError) -> Error {
        let endpoint = self.endpoint.to_owned();
        match error {
            ApiError::TooManyRetries(error) => self.failed(*error),
            ApiError::RequestError(error) => self.refused(*error),
            ApiError::IoError(source) => self.interrupted(source),
            ApiError::LockAcquisition(path) => {
                let source = io::Error::other("another program holds its lock");
                Error::Cache { what: self.what, path, source }
            }
            error @ (ApiError::MissingHeader(_) | ApiError::InvalidHeader(_) | ApiError::ParseIntError(_)) => {
                Error::NotAHub { what: self.what, endpoint, cause: error.to_string() }
            }
            error => Error::Torn { what: self.what, endpoint, cause: error.to_string() },
        }
    }

    /// The cause of an error of the HTTP client.
    pub fn refused(self, error: ureq::Error) -> Error {
        let (what, endpoint) = (self.what.clone(), self.endpoint.to_owned());
        match error {
            ureq::Error::StatusCode(status @ (401 | 403)) => {
                let token = if self.with_token { "one was sent" } else { "none was sent" };
                Error::Denied { id: self.id.clone(), what, endpoint, status, token }
            }
            ureq::Error::StatusCode(404) => Error::NotFound { what, endpoint },
            ureq::Error::StatusCode(status) => Error::Busy { what, endpoint, status },
            ureq::Error::Io(source) => self.interrupted(source),
            ureq::Error::Json(error) => Error::NotAHub { what, endpoint, cause: error.to_string() },
            error => Error::Network { what, endpoint, cause: error.to_string() },
        }
    }

    /// The cause of an error of reading from the network or writing to the disk.
    pub fn interrupted(self, source: io::Error) -> Error {
        let of_the_disk = matches!(
            source.kind(),
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotADirectory
        );
        match is_disk_full(&source) {
            true => {
                let free = free_space(&self.cache).unwrap_or(0);
                Error::DiskFull { what: self.what, path: self.cache, needed: None, free }
            }
            false if of_the_disk => Error::Cache { what: self.what, path: self.cache, source },
            false => Error::Network { what: self.what, endpoint: self.endpoint.into(), cause: source.to_string() },
        }
    }
}
