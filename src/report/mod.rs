//! The outputs of a run besides the model: the metrics log, scores, metadata, and HTML reports.
//!
//! Files are written under a temporary name and renamed ([`crate::files`]), except `metrics.jsonl`, which is appended
//! to.

mod ablation;
mod comparison;
mod curve;
mod drawing;
mod drift;
mod estimates;
mod eval;
mod eval_rows;
mod experts_file;
mod heatmap;
mod histogram;
mod markup;
mod metadata;
mod metrics;
mod onset;
mod other_routing;
mod page;
mod paired;
mod pickle;
mod questions;
mod rankings;
mod rates;
mod replies;
mod rerouting;
mod row_log;
mod scale;
mod scores_json;
mod selections;
mod speed;
mod table;
mod tensorboard;
mod verdicts;

pub use ablation::{ABLATION_SCHEMA, AblationReport, CausalRowCounts, RandomSet};
pub use comparison::{
    COMPARE_SCHEMA, CompareReport, Contrast, CutAnswers, Estimate, Evaluated, LowerBound, Measure, MeasureUnit,
    ORIGINAL, OverlapReport, PairedTest, SelectionReport, TrainingResult, VariantError, VariantReport, paired_tests,
};
pub use curve::{Series, curve_svg};
pub use drawing::standalone;
pub use drift::drift_tables;
pub use estimates::{Group, Named, Positions, dots_svg, points_svg};
pub use eval::{
    DriftReport, EVAL_SCHEMA, EvalReport, EvaluatedModel, ExactRate, GENERATION_SCHEMA, GenerationRow, MeanLoss,
    RefusalRate, RoutingDifference, Sampling, eval_tables,
};
pub use eval_rows::{CutOff, FinishReason, PromptSide, REPLY_LOSS_SCHEMA, REPLY_LOSSES, ReplyLossRow};
pub use experts_file::ExpertsFile;
pub use heatmap::{Cells, heatmap_svg};
pub use histogram::histogram_svg;
pub use markup::escape;
pub use metadata::{IdentifiedExperts, RetentionLog, TrainingLog, TrainingMetadata};
pub use metrics::{MetricsLog, MetricsRow, log_line};
pub use onset::{RefusalOnset, cut_off_warning};
pub use other_routing::{OtherRouting, RoutingFrom};
pub use page::Page;
pub use paired::{Measured, Outcomes, drift_by_reply, outcomes, paired_table};
pub use pickle::{RoundGradients, gradients_pickle};
pub use questions::{QUESTION_SCHEMA, QuestionResult, QuestionRow, QuestionsReport};
pub use rankings::{NamedRanking, RANKINGS_SCHEMA, RankingsFile};
pub use rates::{RateRow, rates_svg};
pub use replies::{OWN_REPLIES, OwnReply, REPLY_SCHEMA};
pub use rerouting::rerouting_table;
pub use row_log::{RowLog, Rows, json_lines, read_rows};
pub use scores_json::{RoundScores, SCORES_SCHEMA, ScoresFile};
pub use selections::{DistinctSelection, Overlap, RunSelection, distinct_selections, overlap, overlap_table, spearman};
pub use speed::{AnswerTimes, EvalTimes, GenerationSpeed, TIMES_SCHEMA, TokenSpeed};
pub use table::Table;
pub use tensorboard::EventLog;
pub use verdicts::{
    Compared, JudgeModel, JudgeReport, JudgedAnswer, ListAgreement, SideVerdicts, VERDICT_SCHEMA, VerdictRow,
};

use std::io;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::exit::{self, Coded};
use crate::files::{self, why_not_written};
use crate::input;

/// Why an output could not be written, or an output of an earlier run could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be written.
    #[error(transparent)]
    File(#[from] files::Error),
    /// The metrics log could not be opened, truncated, appended to or synced.
    #[error("{path}: {action} failed ({})", why_not_written(source))]
    Log {
        /// The log.
        path: PathBuf,
        /// The operation that failed: `opening`, `truncating`, `appending`, `syncing`.
        action: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The metrics log is shorter than it was when the checkpoint was saved.
    #[error(
        "{path}: it has {found} bytes, but had {expected} when the checkpoint was saved: it belongs to another run, or was truncated. Put the log back, or start again with --overwrite"
    )]
    LogTruncated {
        /// The log.
        path: PathBuf,
        /// Its length in bytes.
        found: u64,
        /// Its length in bytes at the checkpoint.
        expected: u64,
    },
    /// A file of an earlier run is missing or cannot be read.
    #[error("{path}: cannot be read")]
    Missing {
        /// The file.
        path: PathBuf,
        /// The error of the operating system.
        source: io::Error,
    },
    /// A line of a file of JSON lines is not a row that this version writes.
    #[error("{path}:{line}: is no row that moewarden wrote: {reason}. Without this line the other rows can be read")]
    Row {
        /// The file.
        path: PathBuf,
        /// The line, from 1.
        line: usize,
        /// The error.
        reason: String,
    },
    /// The content of a file of an earlier run is invalid.
    #[error("{path}: {reason}")]
    Invalid {
        /// The file.
        path: PathBuf,
        /// The error.
        reason: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::File(e) => e.exit_code(),
            Error::Log { .. } => exit::IO,
            Error::LogTruncated { .. } | Error::Row { .. } | Error::Invalid { .. } => exit::DATA,
            Error::Missing { .. } => exit::NO_INPUT,
        }
    }
}

/// Writes a value as indented JSON, atomically. A number that is not finite becomes null.
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
    let bytes = input::read(path).map_err(|source| Error::Missing { path: path.to_owned(), source })?;
    let text = input::without_mark(&bytes);
    serde_json::from_slice(text)
        .map_err(|e| Error::Invalid { path: path.to_owned(), reason: input::not_written(text, &e) })
}
