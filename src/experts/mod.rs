//! Which experts: their identity, scores, routing frequencies, and the selection.
//!
//! The method: experts of a Mixture-of-Experts model that answer unsafe prompts are found by the size of their gradients
//! under a refusal (arXiv 2602.04448), or, for comparison, by how much more often unsafe prompts are routed to them.

mod frequency;
mod score;
mod select;

pub use frequency::{FrequencyAccumulator, RoutingCounts, token_mask};
pub use score::{ExpertScores, ScoreAccumulator};
pub use select::{Pool, Rank, Selected, random, select, selection_hash};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::exit::{self, Coded};

/// Why no scores or no selection can be made.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// There was nothing to score.
    #[error(
        "no micro-batch on any rank holds {what}: there is nothing to score experts by (see the report on the data)"
    )]
    NothingToScore {
        /// What was looked for.
        what: &'static str,
    },
    /// More experts were asked for than may be chosen.
    #[error(
        "{asked} experts are asked for, and {available} can be chosen: the model has {layers} layers that route, each \
         with {num_experts} experts{limit}. Ask for fewer (--top-k-experts), or widen what may be chosen"
    )]
    TooMany {
        /// Experts asked for.
        asked: usize,
        /// Experts that the options leave.
        available: usize,
        /// L
        layers: usize,
        /// E
        num_experts: usize,
        /// The options that limit the choice, or nothing.
        limit: String,
    },
    /// A score is NaN or infinite.
    #[error("the score of expert {} of layer {} is {value}: the loss or a gradient is not finite", id.expert, id.layer)]
    NotFinite {
        /// Whose score.
        id: ExpertId,
        /// The score.
        value: f64,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::NothingToScore { .. } => exit::DATA,
            Error::TooMany { .. } => exit::CONFIG,
            Error::NotFinite { .. } => exit::NOT_FINITE,
        }
    }
}

/// One routed expert. `layer` counts all decoder layers, dense ones included, as in the checkpoint's tensor names.
/// Ordered by (layer, expert). Serialises as `[layer, expert]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "(usize, usize)", from = "(usize, usize)")]
pub struct ExpertId {
    /// Decoder layer, from 0.
    pub layer: usize,
    /// Expert within the layer, from 0.
    pub expert: usize,
}

impl From<(usize, usize)> for ExpertId {
    fn from((layer, expert): (usize, usize)) -> Self {
        Self { layer, expert }
    }
}

impl From<ExpertId> for (usize, usize) {
    fn from(id: ExpertId) -> Self {
        (id.layer, id.expert)
    }
}

/// How experts are ranked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// By the size of their weights' gradients.
    #[default]
    Gradient,
    /// By the routing risk difference: frequency on unsafe minus frequency on safe prompts.
    Routing,
    /// At random: the control.
    Random,
}

/// What the gradient method measures, over the P = 3·D·F parameters of an expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Score {
    /// (1/P) Σ |g|
    #[default]
    L1Mean,
    /// sqrt((1/P) Σ g²)
    L2,
    /// (1/P) Σ g²
    Fisher,
    /// (1/P) Σ |g·w|
    Taylor,
}

/// What a score is divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ScorePer {
    /// The expert's parameters alone.
    #[default]
    Param,
    /// Also the tokens routed to the expert in the micro-batch.
    Token,
}

/// The tokens over which routing frequencies are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RoutingTokens {
    /// Tokens that carry loss.
    #[default]
    Response,
    /// All others.
    Prompt,
    /// Both.
    All,
}

/// What the random control has in common with the gradient method.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RandomMatch {
    /// The number of experts.
    #[default]
    Total,
    /// The number of experts in each layer.
    Layer,
}

/// Which end of the ranking is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Select {
    /// The highest scores.
    #[default]
    Highest,
    /// The lowest: a control.
    Lowest,
}

/// From what a selection is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Selection {
    /// Score the whole set once a round, then train.
    #[default]
    Global,
    /// Choose anew at every step from that step's own global batch.
    PerBatch,
}
