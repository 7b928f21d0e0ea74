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

/// Value of [`ReplyLossRow::schema`].
pub const REPLY_LOSS_SCHEMA: &str = "moewarden.reply_loss/1";
/// The file in the output folder.
pub const REPLY_LOSSES: &str = "reply_losses.jsonl";

/// One line of `reply_losses.jsonl`: how probable the model finds a reply of the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ReplyLossRow {
    /// [`REPLY_LOSS_SCHEMA`].
    pub schema: String,
    /// Row and side, as in `generations.jsonl`.
    pub id: String,
    /// The side of the row.
    pub side: PromptSide,
    /// blake3 hash of the tokens of prompt and reply, and of which of them carry loss.
    pub digest: String,
    /// Number of tokens that carry loss.
    pub tokens: usize,
    /// Their summed cross-entropy, in nats.
    pub loss: f64,
    /// Whether each of them is the most probable one, given those before: greedy decoding gives the reply.
    pub exact: bool,
    /// Mean over these tokens of KL(p_original ‖ p) of the next-token distributions, in nats; absent without `--drift-from`, of
    /// unsafe prompts, and without tokens that carry loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<f64>,
}

/// How many answers to the prompts of one side were cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutOff {
    /// The side of the prompts.
    pub side: PromptSide,
    /// Number of answers.
    pub answers: usize,
    /// Those that reached the largest number of tokens before they ended.
    pub cut_off: usize,
}

/// A rate with its interval, in text.
pub(super) fn percent(rate: f64, interval: [f64; 2]) -> String {
    let [low, high] = interval.map(|x| 100.0 * x);
    format!("{:.1} % [{low:.1}, {high:.1}]", 100.0 * rate)
}
