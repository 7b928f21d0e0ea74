//! AdamW with f32 masters, learning-rate schedules, and what is measured on the way.

mod adamw;
mod meter;
mod schedule;
mod shard;

pub use adamw::{AdamW, Gradient, Group, LearningRates, ParamState, Trainable};
pub use meter::{LossMeter, clip_factor};
pub use schedule::LrPlan;
pub use shard::{ShardPlan, piece};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::exit::{self, Coded};
use crate::model::ParamId;

/// Why an optimizer cannot go on from a saved state.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// A saved optimizer state does not fit the parameters that are trained.
    #[error("the saved optimizer state of parameter {param} does not fit this run: {reason}")]
    State {
        /// The parameter.
        param: ParamId,
        /// What is wrong.
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

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedule {
    /// Stays.
    #[default]
    Constant,
    /// Falls on a line, to 0 after the last step.
    Linear,
    /// Falls on half a cosine, to 0 after the last step.
    Cosine,
}
