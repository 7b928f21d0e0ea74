//! What a run leaves behind besides the model: logs, scores, metadata, and pages for people.
//!
//! Whole files are written aside and renamed ([`crate::files`]); `metrics.jsonl` alone grows.

mod compare;
mod curve;
mod eval;
mod heatmap;
mod metadata;
mod metrics;
mod page;
mod pickle;
mod scores_json;

pub use compare::{Overlap, RunChoice, overlap, overlap_tables, spearman};
pub use curve::{Series, curve_svg};
pub use eval::{
    EVAL_SCHEMA, EvalReport, EvaluatedModel, FinishReason, GENERATION_SCHEMA, GenerationRow, MeanLoss, PromptSide,
    RefusalRate, RoutingDifference, Sampling, eval_tables,
};
pub use heatmap::heatmap_svg;
pub use metadata::{IdentifiedExperts, TrainingLog, TrainingMetadata, TrainingStep};
pub use metrics::{MetricsLog, MetricsRow, log_line};
pub use page::{Page, Table, escape};
pub use pickle::{RoundGradients, gradients_pickle};
pub use scores_json::{RoundScores, SCORES_SCHEMA, ScoresFile};

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::exit::{self, Coded};
use crate::files;

/// Why an output could not be written, or one of an earlier run not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A whole file could not be written.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The log could not be opened or appended to.
    #[error("{path}: {action} failed (is the disk full, may the folder be written to?)")]
    Log {
        /// The log.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// The log is shorter than the checkpoint that is resumed remembers.
    #[error(
        "{path}: it has {found} bytes and the checkpoint was taken after {expected}: it belongs to another run, or was cut"
    )]
    LogCut {
        /// The log.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// Its length at the checkpoint.
        expected: u64,
    },
    /// A file of an earlier run is missing.
    #[error("{path}: cannot be read")]
    Missing {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file of an earlier run does not hold what it should.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::File(e) => e.exit_code(),
            Error::Log { .. } => exit::IO,
            Error::LogCut { .. } | Error::Invalid { .. } => exit::DATA,
            Error::Missing { .. } => exit::NO_INPUT,
        }
    }
}

/// Writes a value as indented JSON, as a whole file. A number that is not finite becomes null.
///
/// # Errors
/// [`Error::File`].
pub fn write_json(path: impl Into<PathBuf>, value: &impl Serialize) -> Result<(), Error> {
    let mut bytes = serde_json::to_vec_pretty(value).expect("outputs have string keys and no failing serializer");
    bytes.push(b'\n');
    Ok(files::write(path, bytes)?)
}

/// Reads a JSON file of an earlier run.
///
/// # Errors
/// [`Error::Missing`], or [`Error::Invalid`] with line and column.
pub fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let bytes = std::fs::read(path).map_err(|source| Error::Missing { path: path.to_owned(), source })?;
    serde_json::from_slice(&bytes).map_err(|e| Error::Invalid { path: path.to_owned(), reason: e.to_string() })
}
