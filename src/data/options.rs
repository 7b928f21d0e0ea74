//! Options for reading a data file.

use std::path::PathBuf;

use serde_json::{Map, Value};

use super::{LongRows, LossOn};

/// Options for reading a data file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DataOptions {
    /// Maximum number of records, taken in file order from the rows that pass their verdict; 0: all.
    pub max_samples: usize,
    /// The sides that the caller needs. If the first `max_samples` rows lack one, half of them give way to rows that have it.
    pub needs: Sides,
    /// Whether rows may all be prompts without a reply, as for a model that is to answer them. Else some token must carry loss.
    pub prompts_suffice: bool,
    /// Maximum number of tokens of a prompt and of a conversation.
    pub max_length: usize,
    /// What happens to longer rows.
    pub long_rows: LongRows,
    /// Which tokens carry loss.
    pub loss_on: LossOn,
    /// Whether attacks with a failed or null verdict are kept.
    pub keep_failed: bool,
    /// Target reply of rows without `refusal_response`.
    pub safe_response: String,
    /// File of a chat template that replaces the model's. Not used here: the caller passes it to
    /// [`super::ChatTokenizer::open`].
    pub chat_template: Option<PathBuf>,
    /// Variables of the chat template for all rows; a row's `chat_template_kwargs` take precedence.
    pub chat_template_kwargs: Map<String, Value>,
}

/// Sides of rows that a caller needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Sides {
    /// Rows with an unsafe side.
    pub unsafe_: bool,
    /// Rows with a safe side.
    pub safe: bool,
    /// Rows with a reply on the safe side.
    pub safe_replies: bool,
}
