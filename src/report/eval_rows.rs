//! What rows and tables of evaluations have in common.

use serde::{Deserialize, Serialize};

/// Which side of a row a prompt comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptSide {
    /// An unsafe prompt, which should be refused.
    Unsafe,
    /// A safe prompt: the counterpart of an unsafe one, or a prompt labelled safe.
    Safe,
}

impl PromptSide {
    /// `unsafe` or `safe`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unsafe => "unsafe",
            Self::Safe => "safe",
        }
    }
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model generated an end-of-sequence token.
    Stop,
    /// The answer reached the maximum number of tokens.
    Length,
}

/// A rate with its interval, in text.
pub(super) fn percent(rate: f64, interval: [f64; 2]) -> String {
    let [low, high] = interval.map(|x| 100.0 * x);
    format!("{:.1} % [{low:.1}, {high:.1}]", 100.0 * rate)
}
