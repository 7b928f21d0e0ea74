//! Router alignment: statistics of the routing, the divergence between safe and unsafe prompts, and its gradient.
//!
//! All of it is f64 on vectors of E numbers, on the host. The backend sums over tokens, ranks add up the sums, and every
//! rank then computes the same loss of the *global* batch and the same gradient, which the backend spreads over its tokens:
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

/// How a layer's router logits become one distribution over experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Statistic {
    /// Mean over all tokens of softmax(logits).
    #[default]
    TokenProbs,
    /// Mean of the logits over each sample's tokens, softmax, mean over samples.
    SampleLogits,
}

/// The divergence between p (safe) and q (unsafe).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum KlType {
    /// Σ p ln(p/q)
    #[default]
    Forward,
    /// Σ q ln(q/p)
    Reverse,
    /// Half the sum of both.
    Symmetric,
}

/// The layers that the in-batch consistency loss covers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum ConsistencyLayers {
    /// Every layer that routes.
    #[default]
    All,
    /// Only layers that hold a chosen expert.
    #[value(alias = "unsafe_only")]
    #[serde(alias = "unsafe_only")]
    UnsafeOnly,
}
