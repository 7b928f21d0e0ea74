//! Router alignment: routing statistics, the divergence between safe and unsafe prompts, and its gradient.
//!
//! This module computes in f64 on the host, on vectors of E numbers. The backend sums over the tokens of a rank, and an
//! all-reduce over the ranks. Then every rank computes the loss of the *global* batch and its gradient, which the
//! backend propagates to the logits of the rank's own tokens:
//!
//! ```text
//! softmax_sum / segment_sum → LayerStatistic → all_reduce → alignment → d_safe, d_unsafe → ..._sum_backward
//! ```

mod kl;
mod statistic;

pub use kl::{Alignment, alignment, kl_and_gradient};
pub use statistic::{LayerStatistic, SampleSoftmax, all_reduce};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

/// The statistic that turns a layer's router logits into one distribution over experts (`--router-statistic`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Statistic {
    /// Mean of softmax(logits) over all tokens.
    #[default]
    TokenProbs,
    /// Mean logits over each sample's tokens, then softmax, then the mean over samples.
    SampleLogits,
}

/// The routing that the unsafe prompts are aligned with in the router phase (`--router-target`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RouterTarget {
    /// The present routing of the safe prompts, which moves with the routers.
    #[default]
    Current,
    /// The routing of the safe prompts at the start of the round's router phase.
    RoundStart,
}

/// The direction of the KL divergence between p (safe) and q (unsafe) (`--kl-type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum KlType {
    /// Σ p ln(p/q)
    #[default]
    Forward,
    /// Σ q ln(q/p)
    Reverse,
    /// The mean of both directions.
    Symmetric,
}

/// The layers in the in-batch consistency loss (`--router-consistency-layers`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ConsistencyLayers {
    /// All MoE layers.
    #[default]
    All,
    /// Only layers with a selected expert.
    #[value(alias = "unsafe_only")]
    #[serde(alias = "unsafe_only")]
    UnsafeOnly,
}
