//! AdamW with f32 masters, and learning-rate schedules.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// How the learning rate moves after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LrSchedule {
    /// Stays.
    #[default]
    Constant,
    /// Falls on a line to 0 at the last step.
    Linear,
    /// Falls on half a cosine to 0 at the last step.
    Cosine,
}
