//! AdamW with f32 master weights, learning-rate schedules, the optimizer's shard plan, loss means and gradient
//! clipping.

mod adamw;
mod meter;
mod schedule;
mod shard;

pub use adamw::{AdamW, GradientPiece, LearningRates, LrGroup, ParamState, Trainable};
pub use meter::{LossMeter, clip_factor};
pub use schedule::LrPlan;
pub use shard::{ShardPlan, piece};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::exit::{self, Coded};
use crate::model::ParamId;

/// Why an optimizer state cannot be restored.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A saved state does not match the trained parameters.
    #[error("the saved optimizer state of parameter {param} does not match this run: {reason}")]
    State {
        /// The parameter.
        param: ParamId,
        /// What does not match.
        reason: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::State { .. } => exit::DATA,
        }
    }
}

/// The learning-rate schedule after the linear warm-up (`--lr-schedule`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedule {
    /// Constant.
    #[default]
    Constant,
    /// Linear decay, to 0 after the last step.
    Linear,
    /// Cosine decay, to 0 after the last step.
    Cosine,
}
