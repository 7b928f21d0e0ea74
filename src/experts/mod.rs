//! Expert scores and selection.
//!
//! The method identifies the experts of a Mixture-of-Experts model that answer unsafe prompts. It scores an expert by
//! the magnitude of its gradients for a loss on refusals (arXiv 2602.04448) or, for comparison, by how much more often
//! unsafe prompts are routed to it than safe ones.

mod bootstrap;
mod frequency;
mod how_many;
mod published;
mod replies;
mod score;
mod select;

pub use bootstrap::Bootstrap;
pub use frequency::{FrequencyAccumulator, RoutingCounts, token_mask};
pub use how_many::{Drop, HowMany, STABLE};
pub use published::{
    BatchUsage, ESFT_GATE_P, ESFT_TOKEN_P, OtherExperts, Rule, RuleResult, SAFEX_BOOTSTRAPS, SAFEX_SHARE, Usage,
    UsageAccumulator, top_p,
};
pub use replies::ReplyCounts;
pub use score::{ExpertScores, ScoreAccumulator};
pub use select::{RandomDraw, Ranking, Selected, SelectionLimits, select, select_random, selection_hash};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::exit::{self, Coded};

/// Why experts cannot be scored or selected.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Error {
    /// No micro-batch has data from which to compute scores.
    #[error("no micro-batch on any rank has {what}: experts cannot be scored (see the data report)")]
    NothingToScore {
        /// What every micro-batch lacks.
        what: &'static str,
    },
    /// `--top-k-experts` exceeds the number of experts that can be selected.
    #[error(
        "--top-k-experts is {requested}, but only {available} experts can be selected: the model has {layers} MoE layers \
         with {num_experts} experts each{limit}. Lower --top-k-experts, or relax the options that limit the selection"
    )]
    TooMany {
        /// Requested number of experts.
        requested: usize,
        /// Number of experts that can be selected.
        available: usize,
        /// Number of MoE layers, L.
        layers: usize,
        /// Experts per layer, E.
        num_experts: usize,
        /// The options that limit the selection, as text; may be empty.
        limit: String,
    },
    /// `--random-exclude-found` leaves too few experts.
    #[error(
        "--random-exclude-found leaves only {available} experts{}, but the random control draws {requested}{}: lower \
         --top-k-experts, or leave --random-exclude-found out",
        layer.map_or_else(String::new, |layer| format!(" in layer {layer}")),
        layer.map_or("", |_| " there (--random-match layer)")
    )]
    TooFewLeft {
        /// Experts that are drawn.
        requested: usize,
        /// Experts that the gradient method did not select, within the limits of the selection.
        available: usize,
        /// The layer, if the draw matches the counts per layer.
        layer: Option<usize>,
    },
    /// A score is NaN or infinite.
    #[error("the score of expert {} of layer {} is {value}: the loss or a gradient is not finite", id.expert, id.layer)]
    NotFinite {
        /// The expert.
        id: ExpertId,
        /// Its score.
        value: f64,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::NothingToScore { .. } => exit::DATA,
            Error::TooMany { .. } | Error::TooFewLeft { .. } => exit::CONFIG,
            Error::NotFinite { .. } => exit::NOT_FINITE,
        }
    }
}

/// A routed expert. Ordered by (layer, expert). Serialised as `[layer, expert]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "(usize, usize)", from = "(usize, usize)")]
pub struct ExpertId {
    /// Index of the decoder layer, from 0. Counts dense layers too, as in the checkpoint's tensor names.
    pub layer: usize,
    /// Index of the expert in its layer, from 0.
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

/// The score by which experts are ranked (`--method`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Magnitude of the gradients of the expert's weights.
    #[default]
    Gradient,
    /// Routing risk difference: routing frequency on unsafe prompts minus that on safe prompts.
    Routing,
    /// Random selection, as a control.
    Random,
    /// The experts of a file (--experts).
    Given,
    /// ESFT by tokens: in each layer the experts with the largest token shares on unsafe prompts, 0.2 together.
    EsftToken,
    /// ESFT by gate: in each layer the experts with the largest routing weights on unsafe prompts, 0.1 together.
    EsftGate,
    /// SteerMoE: the largest positive differences of routing frequencies between unsafe and safe prompts.
    Steermoe,
    /// SAFEx: experts that are stably frequent on safe, but not on unsafe prompts.
    Safex,
}

impl Method {
    /// The value of `--method`.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no method is hidden").get_name().to_owned()
    }
}

/// The gradient method's score of an expert with P = 3·D·F parameters w and gradients g (`--score`).
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

/// The normalisation of a score (`--score-per`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ScorePer {
    /// By the number of the expert's parameters, see [`Score`].
    #[default]
    Param,
    /// Also by the number of tokens routed to the expert in the micro-batch.
    Token,
}

/// What a gradient score is divided by before ranking (`--score-norm`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ScoreNorm {
    /// Nothing.
    #[default]
    None,
    /// The sum of the scores of its layer; 0 where that sum is 0.
    Layer,
}

/// The tokens over which routing frequencies are counted (`--routing-tokens`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RoutingTokens {
    /// Loss tokens: the tokens of the response.
    #[default]
    Response,
    /// Tokens whose next token is a loss token: from the last token of the prompt, which decides how the reply begins, to the last but
    /// one of the reply.
    Predicting,
    /// Tokens without loss.
    Prompt,
    /// All tokens.
    All,
}

/// The counts in which the random control matches the gradient method (`--random-match`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RandomMatch {
    /// The total number of experts.
    #[default]
    Total,
    /// The number of experts in each layer.
    Layer,
}

/// The end of the ranking that is selected (`--select`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Select {
    /// The highest scores.
    #[default]
    Highest,
    /// The lowest scores, as a control.
    Lowest,
}

/// In which rounds experts are identified (`--identify`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum IdentifyIn {
    /// In every round, from the model that the earlier rounds trained.
    #[default]
    EveryRound,
    /// In the first round; later rounds keep its selection.
    Once,
}

/// When and from which data experts are selected (`--selection`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Selection {
    /// Once per round: score the whole dataset, then train.
    #[default]
    Global,
    /// At every step, from that step's own global batch.
    PerBatch,
}
