//! Which experts: their identity, scores, routing frequencies, and the selection.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

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
