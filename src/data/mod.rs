//! From rows on disk to packed micro-batches: rows → records → rendered text → token ids and loss mask → micro-batches.
//!
//! | file | step |
//! |---|---|
//! | `rows` | a JSON array or JSONL, cut into rows with line numbers |
//! | `kinds` | attack, chat and pair rows → prompts and replies; `python_literal` reads lists held as a string |
//! | `template`, `jinja` | messages → text, by the model's chat template, as Hugging Face renders it |
//! | `tokenizer` | text → ids; special tokens, end of sequence |
//! | `mask` | which bytes of the text, and so which tokens, carry loss |
//! | `dataset`, `report` | all of it for a file: records, and what was kept, dropped and why |
//! | `batches` | the seeded order and its micro-batches |
//! | `sampling` | which records a micro-batch of each phase holds, and how they are packed |

mod batches;
mod dataset;
mod error;
mod jinja;
mod kinds;
mod mask;
mod python_literal;
mod report;
mod rows;
mod sampling;
mod template;
mod tokenizer;

pub use batches::{micro_batches, order};
pub use dataset::{DataOptions, Dataset, Sample, samples_for_people};
pub use error::Error;
pub use kinds::Message;
pub use report::{DataReport, DropReason, Kind, Padding};
pub use sampling::{JointBatch, MissingSide, Sampler};
pub use template::{ChatTemplate, Rendered, TemplateError};
pub use tokenizer::{ChatTokenizer, Encoded};

use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::backend::Packing;

/// The tokens that carry loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// Assistant tokens, the end-of-turn token included.
    #[default]
    Response,
    /// Every token.
    All,
}

/// What happens to a row longer than the maximum length.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LongRows {
    /// It is left out, and counted.
    #[default]
    Drop,
    /// Tokens are taken from the front of the prompt; the response stays whole.
    TruncatePrompt,
    /// It is an error.
    Error,
}

/// One tokenised conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Whether the token at this place is predicted under the loss (as a target), as long as `ids`. Never true for the
    /// first token, which nothing precedes.
    pub loss: Vec<bool>,
}

/// One row of the data, tokenised. Attack and pair rows have all four; a labelled chat row has those of its label, and a
/// safe one without an assistant turn has its prompt alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// 1-based line of the row in its file (of its first character, in a JSON array).
    pub line: usize,
    /// The bare request, for comparing data sets: the text of the last user turn on the safe side, or else the unsafe one.
    pub request: String,
    /// The unsafe prompt answered by its target.
    pub unsafe_reply: Option<Example>,
    /// The safe prompt answered by its target.
    pub safe_reply: Option<Example>,
    /// The unsafe prompt alone, ending with the generation prompt.
    pub unsafe_prompt: Option<Vec<u32>>,
    /// The safe prompt alone, ending with the generation prompt.
    pub safe_prompt: Option<Vec<u32>>,
    /// The turns of the unsafe prompt as the row has them; none where it has no such side.
    pub unsafe_messages: Vec<Message>,
    /// The turns of the safe prompt as the row has them; none where it has no such side.
    pub safe_messages: Vec<Message>,
}

/// What one rank puts through one forward and backward: examples one after another, without padding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids of all sequences, `[T]`.
    pub ids: Vec<u32>,
    /// Where each sequence begins.
    pub packing: Packing,
    /// Rows whose next token is a target, ascending.
    pub loss_rows: Vec<u32>,
    /// Those next tokens, as long as `loss_rows`.
    pub targets: Vec<u32>,
    /// For each row whether its own token is a target (for routing frequencies), `[T]`.
    pub is_response: Vec<bool>,
}

impl MicroBatch {
    /// Packs examples in the order given.
    pub fn of_examples<'a>(examples: impl IntoIterator<Item = &'a Example>) -> Self {
        let mut out = Self {
            ids: Vec::new(),
            packing: Packing::of_lengths([]),
            loss_rows: Vec::new(),
            targets: Vec::new(),
            is_response: Vec::new(),
        };
        let mut lengths = Vec::new();
        for example in examples {
            let start = out.ids.len();
            out.ids.extend(&example.ids);
            out.is_response.extend(&example.loss);
            lengths.push(example.ids.len());
            for (t, _) in example.loss.iter().enumerate().skip(1).filter(|(_, loss)| **loss) {
                out.loss_rows.push((start + t - 1) as u32);
                out.targets.push(example.ids[t]);
            }
        }
        out.packing = Packing::of_lengths(lengths);
        out
    }

    /// Packs prompts, which carry no loss.
    pub fn of_prompts<'a>(prompts: impl IntoIterator<Item = &'a [u32]>) -> Self {
        let mut ids = Vec::new();
        let lengths: Vec<_> = prompts
            .into_iter()
            .map(|p| {
                ids.extend_from_slice(p);
                p.len()
            })
            .collect();
        let is_response = vec![false; ids.len()];
        Self { ids, packing: Packing::of_lengths(lengths), loss_rows: Vec::new(), targets: Vec::new(), is_response }
    }

    /// Rows of the sequences `sequences`, which are contiguous.
    pub fn rows_of(&self, sequences: Range<usize>) -> Range<usize> {
        self.packing.queries[sequences.start]..self.packing.queries[sequences.end]
    }
}
