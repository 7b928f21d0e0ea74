//! From a data file to packed micro-batches: rows → records → rendered text → token ids and loss mask → micro-batches.
//!
//! | module | step |
//! |---|---|
//! | `head` | which rows are read: the first ones up to a limit, of both sides |
//! | `rows`, `big_integers`, `unique_keys` | splits a JSON array or JSONL file into rows with line numbers |
//! | `kinds`, `side`, `other_kinds` | attack, chat and pair rows → prompts and replies; `python_literal` parses lists stored as strings; `verdicts` of judges |
//! | `message`, `turns` | one turn of a conversation, and how rows spell it |
//! | `fields`, `values` | fields of rows and turns beyond those: given to the chat template, refused, or counted |
//! | `templates` | the model's chat templates, and which of them renders a row |
//! | `template`, `turn_object`, `jinja`, `printed_numbers`, `deep` | messages → text, by the model's chat template, as Hugging Face transformers renders it |
//! | `tokenizer`, `tokenizer_class`, `declared_tokens` | text → token ids; special tokens, end-of-sequence tokens; tokens declared beside tokenizer.json |
//! | `mask` | loss mask: the bytes of the text, and from them the tokens, that carry loss |
//! | `record` | all of these steps on one row, and the check that they drop nothing of it |
//! | `options`, `dataset`, `report` | all rows of a file; counts of kept and dropped rows with reasons |
//! | `batches` | shuffled order of an epoch and its micro-batches |
//! | `traces` | routing traces of an inference server, in place of rows |
//! | `questions` | rows that ask what a model still can do: choices, and right answers |
//! | `sampling` | which records a micro-batch of each phase holds, and how they are packed |

mod batches;
mod big_integers;
mod dataset;
mod declared_tokens;
mod deep;
mod error;
mod fields;
mod generation;
mod head;
mod jinja;
mod kinds;
mod mask;
mod message;
mod options;
mod other_kinds;
mod printed_numbers;
mod python_literal;
mod questions;
mod record;
mod report;
mod rows;
mod sampling;
mod side;
mod template;
mod templates;
mod tokenizer;
mod tokenizer_class;
mod traces;
mod turn_object;
mod turn_spans;
mod turns;
mod unique_keys;
mod values;
mod verdicts;

pub use batches::{micro_batches, order};
pub use dataset::{Dataset, Sample, loss_mask_samples, normalized};
pub use error::Error;
pub use fields::OWN_VARIABLES;
pub use generation::Penalties;
pub use message::Message;
pub use options::{DataOptions, Sides};
pub use questions::{Choice, Question, Task, read_questions};
pub use report::{DataReport, DropReason, Kind, Padding};
pub use sampling::{JointBatch, MissingSide, Sampler};
pub use template::{ChatTemplate, Rendered, TemplateError};
pub use templates::additional_templates;
pub use tokenizer::{ChatTokenizer, Encoded};
pub use traces::{RoutingTraces, Trace, TraceShape, TraceUse};
pub use unique_keys::{Unique, object as json_object};
pub use values::is_blank;

use std::ops::Range;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::backend::Packing;

/// Which tokens carry loss (option `--loss-on`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LossOn {
    /// Tokens of assistant turns, end-of-turn token included.
    #[default]
    Response,
    /// Every token except the first of a sequence.
    All,
}

/// What happens to a row longer than the maximum length (option `--long-rows`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LongRows {
    /// Drop the row and count it.
    #[default]
    Drop,
    /// Truncate the prompt from the front; never truncate the response.
    TruncatePrompt,
    /// Fail with an error that names the row.
    Error,
}

/// One tokenised conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Example {
    /// Token ids.
    pub ids: Vec<u32>,
    /// Loss mask, as long as `ids`: whether the token is a target of the cross-entropy. Always false for the first
    /// token, because no token precedes it.
    pub loss: Vec<bool>,
}

/// One row of the data, tokenised. Attack and pair rows have both sides. A chat row has the side of its label; a safe
/// chat row without an assistant turn has a prompt but no reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// 1-based line of the row's first character in the file.
    pub line: usize,
    /// The request without an attack around it, used to find duplicates between data sets: `goal` or `prompt` of an
    /// attack row; else the last user turn (of a pair row: on the safe side).
    pub request: String,
    /// The unsafe prompt followed by its target reply.
    pub unsafe_reply: Option<Example>,
    /// The safe prompt followed by its target reply.
    pub safe_reply: Option<Example>,
    /// The unsafe prompt without a reply, ending with the generation prompt.
    pub unsafe_prompt: Option<Vec<u32>>,
    /// The safe prompt without a reply, ending with the generation prompt.
    pub safe_prompt: Option<Vec<u32>>,
    /// Messages of the unsafe prompt; empty if the row has no unsafe side.
    pub unsafe_messages: Vec<Message>,
    /// Messages of the safe prompt; empty if the row has no safe side.
    pub safe_messages: Vec<Message>,
}

/// The input of one forward and backward pass on one rank: sequences packed one after another, without padding. T is
/// the number of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MicroBatch {
    /// Token ids of all sequences, `[T]`.
    pub ids: Vec<u32>,
    /// Boundaries of the sequences.
    pub packing: Packing,
    /// Token positions whose next token is a target, ascending.
    pub loss_rows: Vec<u32>,
    /// The targets: the next token of each of `loss_rows`.
    pub targets: Vec<u32>,
    /// Whether the token itself is a target (selects tokens for routing frequencies), `[T]`.
    pub is_response: Vec<bool>,
}

impl MicroBatch {
    /// Packs examples in iteration order.
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

    /// Packs prompts in iteration order, without loss.
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

    /// Token positions of a contiguous range of sequences.
    pub fn rows_of(&self, sequences: Range<usize>) -> Range<usize> {
        self.packing.queries[sequences.start]..self.packing.queries[sequences.end]
    }
}
