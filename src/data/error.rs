//! Errors of data files, tokenizers and chat templates.

use std::io;
use std::path::{Component, Path, PathBuf};

use crate::exit::{self, Coded};

/// Why a data file, tokenizer or chat template cannot be used. Every message names the file (and the line, for a row),
/// the cause and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read.
    #[error("{}: cannot be read; {hint}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
        /// What the user can try.
        hint: &'static str,
    },
    /// The content of a file is invalid as a whole.
    #[error("{}: {message}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Cause and way out.
        message: String,
    },
    /// One row is invalid.
    #[error("{}:{line}: {message}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// 1-based line.
        line: usize,
        /// Cause and way out.
        message: String,
    },
    /// An option gives a variable that the chat template does not read.
    #[error(
        "--chat-template-kwargs gives {name}, which the chat template does not read: leave it out, or give a template that reads it \
         with --chat-template"
    )]
    Kwargs {
        /// The variable.
        name: String,
    },
    /// The model folder has no chat template, or several without a default.
    #[error("{}: {message}; name a template with --chat-template FILE", folder.display())]
    NoTemplate {
        /// The model folder.
        folder: PathBuf,
        /// What was found instead.
        message: String,
    },
}

impl Error {
    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        let hint = match source.kind() {
            io::ErrorKind::InvalidData => "is the file damaged?",
            io::ErrorKind::NotFound
                if path.to_string_lossy().split_once(":/").is_some_and(|(scheme, _)| is_scheme(scheme)) =>
            {
                "it is an address: fetch the file first, such as by `curl -LO ADDRESS`, and give its path"
            }
            io::ErrorKind::NotFound if is_like_an_id(path) => {
                "is the path right? A data set of the hub is fetched with `hf download ID --repo-type dataset --local-dir FOLDER`: give a \
                 file of it"
            }
            _ => "is the path right, and is it a file that you may read?",
        };
        Self::Read { path: path.to_owned(), source, hint }
    }

    pub(super) fn file(path: &Path, message: impl ToString) -> Self {
        Self::File { path: path.to_owned(), message: message.to_string() }
    }

    pub(super) fn row(path: &Path, line: usize, message: impl ToString) -> Self {
        Self::Row { path: path.to_owned(), line, message: message.to_string() }
    }
}

/// Whether this is a scheme of addresses, as in `https://`.
fn is_scheme(text: &str) -> bool {
    text.len() > 1 && text.bytes().all(|b| b.is_ascii_alphanumeric())
}

/// Whether a path has the form of a hub id: `ORG/NAME`.
fn is_like_an_id(path: &Path) -> bool {
    let names = path.components().filter(|part| matches!(part, Component::Normal(_))).count();
    names == 2 && path.components().count() == 2 && path.extension().is_none()
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            // Text in another encoding.
            Self::Read { source, .. } if source.kind() == io::ErrorKind::InvalidData => exit::DATA,
            Self::Read { .. } => exit::IO,
            Self::File { .. } | Self::Row { .. } => exit::DATA,
            Self::NoTemplate { .. } | Self::Kwargs { .. } => exit::CONFIG,
        }
    }
}
