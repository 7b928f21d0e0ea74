//! Rows of `own_replies.jsonl`: what the model itself answers, greedily.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{FinishReason, PromptSide};

/// Value of [`OwnReply::schema`].
pub const REPLY_SCHEMA: &str = "moewarden.reply/1";
/// The file in the output folder.
pub const OWN_REPLIES: &str = "own_replies.jsonl";

/// A reply of the model by greedy decoding, with its verdict.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OwnReply {
    /// [`REPLY_SCHEMA`].
    pub schema: String,
    /// blake3 hash of what decides the tokens: weights, intervention, prompt, end-of-sequence tokens, largest number of tokens.
    pub key: String,
    /// Line of the row in its file.
    pub line: usize,
    /// The side of the row that was answered.
    pub side: PromptSide,
    /// Number of tokens of the rendered prompt.
    pub prompt_tokens: usize,
    /// The reply, without the end-of-sequence token.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The reply as text, without special tokens.
    pub response: String,
    /// For each phrase list (`name/version`): whether it classifies the reply as a refusal.
    pub proxy: BTreeMap<String, bool>,
    /// Whether the reply equals the row's target reply, token by token; null if the row has none. A reply of the largest
    /// number of tokens need only be the beginning of the target.
    pub equals_target: Option<bool>,
    /// Whether the row's target reply is a refusal: on the unsafe side always; on the safe side by some phrase list, or where it
    /// equals the target of the unsafe side; null without a target.
    pub target_refuses: Option<bool>,
    /// The verdict: a refusal by some phrase list, or by equality with a target that is a refusal.
    pub refuses: bool,
    /// Index of the record among those that were answered.
    #[serde(skip)]
    pub record: usize,
}
