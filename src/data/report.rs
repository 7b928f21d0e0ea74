//! What reading a file came to: rows, tokens, and what was left out and why.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

/// What a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// An attack with its bare request.
    Attack,
    /// A conversation labelled safe.
    ChatSafe,
    /// A conversation labelled unsafe.
    ChatUnsafe,
    /// A safe and an unsafe prompt with one response.
    Pair,
}

/// Why a row was left out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum DropReason {
    /// Its own verdict says that the attack failed.
    FailedAttack,
    /// Its verdict is null: nobody knows whether the attack worked.
    NullVerdict,
    /// One of its token lists is longer than the maximum.
    TooLong,
    /// No token of its reply carries loss.
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
            Self::NullVerdict => "attack whose verdict is null (--keep-failed keeps them)",
            Self::TooLong => "longer than --max-length (see --long-rows)",
            Self::NoLossToken => "no token of the reply carries loss",
        })
    }
}

/// What reading a file came to. `Display` gives a few plain lines.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct DataReport {
    /// The file.
    pub path: PathBuf,
    /// Rows that were looked at; reading stops when `--max-samples` are found.
    pub rows_read: usize,
    /// Records kept.
    pub kept: usize,
    /// Records kept, by kind.
    pub by_kind: BTreeMap<Kind, usize>,
    /// Rows left out, by reason.
    pub dropped: BTreeMap<DropReason, usize>,
    /// Whether reading stopped at `--max-samples`.
    pub stopped_early: bool,
    /// Records of which the front of a prompt was cut.
    pub truncated: usize,
    /// Attack rows kept although they carry no verdict.
    pub without_verdict: usize,
    /// Labelled prompts without a reply.
    pub without_reply: usize,
    /// Records with a special token's text in a message, which became a control token.
    pub special_tokens_in_content: usize,
    /// Line of the first of them, and the token.
    pub first_special_token: Option<(usize, String)>,
    /// Tokens of all replies, their prompts included.
    pub tokens: usize,
    /// Tokens among them that carry loss.
    pub loss_tokens: usize,
    /// Lengths of the replies of the unsafe side, in file order; of the safe side where a record has no other.
    #[serde(skip)]
    pub lengths: Vec<usize>,
}

/// Tokens of batches with and without padding.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Padding {
    /// Real tokens.
    pub tokens: usize,
    /// Padding that batches padded to their longest sequence would need, and packed ones do not.
    pub avoided: usize,
}

impl Padding {
    /// The share of a padded batch that would be padding.
    pub fn share(&self) -> f64 {
        let padded = self.tokens + self.avoided;
        if padded == 0 { 0.0 } else { self.avoided as f64 / padded as f64 }
    }
}

impl DataReport {
    /// What batches of `batch_size` records in file order would hold if each were padded to its longest sequence.
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

fn listed<K: fmt::Display>(counts: &BTreeMap<K, usize>) -> String {
    counts.iter().map(|(what, n)| format!("{n} {what}")).collect::<Vec<_>>().join(", ")
}

impl fmt::Display for DataReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stopped = if self.stopped_early { " (stopped at --max-samples)" } else { "" };
        write!(f, "{}: {} rows read{stopped}, {} kept", self.path.display(), self.rows_read, self.kept)?;
        if !self.by_kind.is_empty() {
            write!(f, ": {}", listed(&self.by_kind))?;
        }
        if !self.dropped.is_empty() {
            write!(f, "\n  left out: {}", listed(&self.dropped))?;
        }
        if self.truncated > 0 {
            write!(f, "\n  cut at the front of the prompt: {}", self.truncated)?;
        }
        if self.without_verdict > 0 {
            write!(f, "\n  attacks without a verdict, taken as successful: {}", self.without_verdict)?;
        }
        if self.without_reply > 0 {
            write!(f, "\n  safe prompts without a reply, used for router alignment alone: {}", self.without_reply)?;
        }
        if let Some((line, token)) = &self.first_special_token {
            let n = self.special_tokens_in_content;
            write!(
                f,
                "\n  warning: {n} rows hold a special token's text, which became a control token (first: line {line}, {token})"
            )?;
        }
        write!(f, "\n  {} tokens, {} of them with loss", self.tokens, self.loss_tokens)
    }
}
