//! What can be wrong with data, a tokenizer or a template.

use std::io;
use std::path::{Path, PathBuf};

use crate::exit::{self, Coded};

/// Why data cannot be used. Every message names the file, and the line where there is one, the cause and the way out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that cannot be read.
    #[error("{}: cannot be read; {hint}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system answered.
        source: io::Error,
        /// The way out.
        hint: &'static str,
    },
    /// A file that is not what it should be as a whole.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Cause and way out.
        what: String,
    },
    /// A row that cannot be used.
    #[error("{}:{line}: {what}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// 1-based line.
        line: usize,
        /// Cause and way out.
        what: String,
    },
    /// The model brings no chat template, or none that can be chosen.
    #[error("{}: {what}; name a template with --chat-template FILE", folder.display())]
    NoTemplate {
        /// The model folder.
        folder: PathBuf,
        /// What was found instead.
        what: String,
    },
}

impl Error {
    pub(super) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source, hint: "is the path right, and is it a file that you may read?" }
    }

    pub(super) fn file(path: &Path, what: impl ToString) -> Self {
        Self::File { path: path.to_owned(), what: what.to_string() }
    }

    pub(super) fn row(path: &Path, line: usize, what: impl ToString) -> Self {
        Self::Row { path: path.to_owned(), line, what: what.to_string() }
    }
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => exit::NO_INPUT,
            Self::Read { .. } => exit::IO,
            Self::File { .. } | Self::Row { .. } => exit::DATA,
            Self::NoTemplate { .. } => exit::CONFIG,
        }
    }
}
