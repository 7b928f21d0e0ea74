//! Counts from reading a data file: rows, tokens, and dropped rows with reasons.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// The kind of a row; `kinds.rs` says which fields identify it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An attack and the request inside it.
    Attack,
    /// A conversation labelled safe.
    ChatSafe,
    /// A conversation labelled unsafe.
    ChatUnsafe,
    /// A safe and an unsafe prompt with one response.
    Pair,
}

/// Why a row was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DropReason {
    /// The row's verdict says that the attack failed.
    FailedAttack,
    /// The row's verdict is null: unknown whether the attack succeeded.
    NullVerdict,
    /// A prompt or conversation is longer than the maximum length.
    TooLong,
    /// No token of the reply carries loss.
    NoLossToken,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Attack => "attack",
            Self::ChatSafe => "chat (safe)",
            Self::ChatUnsafe => "chat (unsafe)",
            Self::Pair => "pair",
        })
    }
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::FailedAttack => "failed attack (--keep-failed keeps them)",
            Self::NullVerdict => "attack with a null verdict (--keep-failed keeps them)",
            Self::TooLong => "longer than --max-length (see --long-rows)",
            Self::NoLossToken => "no token of the reply carries loss",
        })
    }
}

/// Counts from reading a data file. `Display` writes a summary of a few lines.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DataReport {
    /// The file.
    pub path: PathBuf,
    /// Rows parsed; parsing stops after `--max-samples` rows that pass their verdict.
    pub rows_read: usize,
    /// Records kept.
    pub kept: usize,
    /// Records kept, by kind.
    pub by_kind: BTreeMap<Kind, usize>,
    /// Rows dropped, by reason.
    pub dropped: BTreeMap<DropReason, usize>,
    /// Whether reading stopped at `--max-samples`.
    pub stopped_early: bool,
    /// Set if the first rows lack a side that the caller needs, and rows further on have it.
    pub both_sides: Option<BothSides>,
    /// Conversations that went on after an assistant turn, completed with the safe response.
    pub completed: usize,
    /// Unsafe conversations with a reply of their own, whose earlier assistant turns carry no loss.
    pub earlier_excluded: usize,
    /// Fields that neither moewarden nor the chat template reads: records that have them, and the line of the first.
    pub unread: BTreeMap<String, (usize, usize)>,
    /// Fields of earlier turns that the chat template reads and leaves out of the text: as `unread`.
    pub left_out: BTreeMap<String, (usize, usize)>,
    /// Structures without the fields in them that are null: as `unread`.
    pub nulls: BTreeMap<String, (usize, usize)>,
    /// Records with a prompt truncated from the front.
    pub truncated: usize,
    /// Attack rows without a verdict (kept).
    pub without_verdict: usize,
    /// Replies to unsafe and to safe prompts that are `--safe-response`, as the row has none.
    pub safe_responses: [usize; 2],
    /// Records with a prompt but no reply.
    pub without_reply: usize,
    /// Records with the text of a special token in a message; the tokenizer turns that text into the special token.
    pub special_tokens_in_content: usize,
    /// Line of the first such record, and the token.
    pub first_special_token: Option<(usize, String)>,
    /// Tokens of all conversations with a reply, prompts included.
    pub tokens: usize,
    /// The part of `tokens` that carries loss.
    pub loss_tokens: usize,
    /// Tokens of each record's conversation with a reply (of the unsafe side if it has one), in file order.
    #[serde(skip)]
    pub lengths: Vec<usize>,
}

/// Rows that are read of a file whose first rows lack a side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct BothSides {
    /// What the first rows lack.
    pub missing: &'static str,
    /// Rows taken from the start of the file.
    pub head: usize,
    /// Rows of the missing kind, taken from further on.
    pub found: usize,
}

/// Token counts of padded batches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Padding {
    /// Real tokens.
    pub tokens: usize,
    /// Padding tokens that would fill every sequence to the longest of its batch. Packed batches have none.
    pub avoided: usize,
}

impl Padding {
    /// Padding as a share of all tokens of the padded batches, 0 to 1.
    pub fn share(&self) -> f64 {
        let padded = self.tokens + self.avoided;
        if padded == 0 { 0.0 } else { self.avoided as f64 / padded as f64 }
    }
}

impl DataReport {
    /// For a message on a side that no kept row has: among which rows there is none, and what else may help. The rows beyond
    /// `--max-samples` were searched for it, unless rows with it were taken, and dropped.
    pub fn searched(&self) -> (&'static str, &'static str) {
        match (self.dropped.is_empty(), self.stopped_early) {
            (true, _) => ("", ""),
            (false, false) => (" among those that are kept", ""),
            (false, true) => (" among those that are kept", ", or raise --max-samples"),
        }
    }

    /// Counts the fields of a record that nothing reads, those of earlier turns that are read and left out, and those with nulls.
    pub(super) fn note_fields(&mut self, line: usize, [unread, left_out, nulls]: [BTreeSet<String>; 3]) {
        for (counts, names) in [(&mut self.unread, unread), (&mut self.left_out, left_out), (&mut self.nulls, nulls)] {
            for name in names {
                counts.entry(name).or_insert((0, line)).0 += 1;
            }
        }
    }

    /// Whether it says more than how many rows were read: rows from further on, completed rows, fields that nothing reads.
    pub fn has_notes(&self) -> bool {
        self.both_sides.is_some()
            || self.completed > 0
            || self.earlier_excluded > 0
            || !self.unread.is_empty()
            || !self.left_out.is_empty()
            || !self.nulls.is_empty()
    }

    /// Token counts of batches of `batch_size` records in file order, each padded to its longest sequence.
    ///
    /// # Panics
    /// If `batch_size` is 0.
    pub fn padding(&self, batch_size: usize) -> Padding {
        let padded: usize =
            self.lengths.chunks(batch_size).map(|batch| batch.len() * batch.iter().max().copied().unwrap_or(0)).sum();
        let tokens = self.lengths.iter().sum();
        Padding { tokens, avoided: padded - tokens }
    }
}

pub(super) fn list_counts<K: fmt::Display>(counts: &BTreeMap<K, usize>) -> String {
    counts.iter().map(|(key, n)| format!("{n} {key}")).collect::<Vec<_>>().join(", ")
}

/// The first names of fields, each with its rows.
pub(super) fn named_fields(fields: &BTreeMap<String, (usize, usize)>) -> String {
    const SHOWN: usize = 12;
    let named = |(name, (rows, line)): (&String, &(usize, usize))| format!("{name} ({rows} rows, first line {line})");
    let names: Vec<_> = fields.iter().take(SHOWN).map(named).collect();
    let more = fields.len().saturating_sub(SHOWN);
    let more = if more > 0 { format!(", and {more} more") } else { String::new() };
    names.join(", ") + &more
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stopped = match self.both_sides {
            Some(_) => " up to --max-samples",
            None if self.stopped_early => " (only the first ones: --max-samples)",
            None => "",
        };
        write!(f, "{}: {} rows read{stopped}, {} kept", self.path.display(), self.rows_read, self.kept)?;
        if !self.by_kind.is_empty() {
            write!(f, ": {}", list_counts(&self.by_kind))?;
        }
        if !self.dropped.is_empty() {
            write!(f, "\n  dropped: {}", list_counts(&self.dropped))?;
        }
        if let Some(BothSides { missing, head, found }) = self.both_sides {
            write!(
                f,
                "\n  warning: no {missing} among the first rows, up to --max-samples: {head} of these are taken, and {found} {missing} \
                 from further on"
            )?;
        }
        if self.completed > 0 {
            write!(
                f,
                "\n  conversations that went on after an assistant turn, completed with the safe response: {}",
                self.completed
            )?;
        }
        if self.earlier_excluded > 0 {
            write!(
                f,
                "\n  unsafe conversations whose earlier assistant turns carry no loss (loss: true in a turn changes that): {}",
                self.earlier_excluded
            )?;
        }
        for (what, fields) in [
            ("fields that neither moewarden nor the chat template reads", &self.unread),
            ("fields of earlier turns that the chat template leaves out of the text", &self.left_out),
            ("fields inside these are null, and left out as missing", &self.nulls),
        ] {
            if !fields.is_empty() {
                write!(f, "\n  note: {what}: {}", named_fields(fields))?;
            }
        }
        if self.truncated > 0 {
            write!(f, "\n  prompts truncated from the front: {}", self.truncated)?;
        }
        if self.without_verdict > 0 {
            write!(f, "\n  attacks without a verdict, kept as successful: {}", self.without_verdict)?;
        }
        if self.safe_responses != [0; 2] {
            let [to_unsafe, to_safe] = self.safe_responses;
            write!(
                f,
                "\n  replies that are --safe-response, as the row has none: {to_unsafe} to unsafe prompts, {to_safe} to safe ones"
            )?;
        }
        if self.without_reply > 0 {
            write!(f, "\n  safe prompts without a reply, used only for router alignment: {}", self.without_reply)?;
        }
        if let Some((line, token)) = &self.first_special_token {
            let n = self.special_tokens_in_content;
            write!(
                f,
                "\n  warning: in {n} rows the text of a special token became that token (first: line {line}, {token})"
            )?;
        }
        write!(f, "\n  {} tokens, {} of them with loss", self.tokens, self.loss_tokens)
    }
}
