//! A data file as tokenised records.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::kinds::{self, Parsed, Row, Side};
use super::mask;
use super::report::{DataReport, DropReason};
use super::rows::{self, Rows};
use super::tokenizer::Encoded;
use super::{ChatTokenizer, Error, Example, LongRows, LossOn, Record};

/// How a file is read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DataOptions {
    /// Records taken in file order, counted after the verdicts were asked; 0: all.
    pub max_samples: usize,
    /// Tokens that each of a record's token lists may have.
    pub max_length: usize,
    /// What happens to longer ones.
    pub long_rows: LongRows,
    /// The tokens that carry loss.
    pub loss_on: LossOn,
    /// Whether attacks are kept that failed by their own verdict.
    pub keep_failed: bool,
    /// The reply to unsafe prompts of rows that bring none.
    pub safe_response: String,
    /// A template to use instead of the model's; it is for [`ChatTokenizer::open`], and rides along with the rest.
    pub chat_template: Option<PathBuf>,
}

/// The records of a file, in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// At least one.
    pub records: Vec<Record>,
    /// What was read, kept and left out.
    pub report: DataReport,
}

/// What became of one row.
enum Outcome {
    Kept { record: Box<Record>, truncated: bool },
    Dropped(DropReason),
}

impl Dataset {
    /// Records made elsewhere (benchmarks, tests), with an empty report.
    pub fn of_records(records: Vec<Record>) -> Self {
        Self { records, report: DataReport::default() }
    }

    /// Whether some record has a safe prompt and some record an unsafe one: what aligning routers compares.
    pub fn has_both_prompts(&self) -> bool {
        let any = |side: fn(&Record) -> bool| self.records.iter().any(side);
        any(|r| r.safe_prompt.is_some()) && any(|r| r.unsafe_prompt.is_some())
    }

    /// The same of prompts with their replies: what routing frequencies and the joint schedule compare.
    pub fn has_both_replies(&self) -> bool {
        let any = |side: fn(&Record) -> bool| self.records.iter().any(side);
        any(|r| r.safe_reply.is_some()) && any(|r| r.unsafe_reply.is_some())
    }

    /// Reads, filters, renders and tokenises a file: a JSON array, or one row a line.
    ///
    /// Attacks without a verdict are kept and counted; those whose verdict is null are left out. A row is kept whole or
    /// left out whole, so an unsafe prompt never loses its safe twin.
    ///
    /// # Errors
    /// A file that cannot be read or is empty; the first row that is not what it should be, or that the template cannot
    /// render, or renders as an empty prompt; a row that is too long, under [`LongRows::Error`]; nothing left to train on.
    pub fn read(path: &Path, tokenizer: &ChatTokenizer, options: &DataOptions) -> Result<Self, Error> {
        let text = rows::read_text(path)?;
        let mut report = DataReport { path: path.to_owned(), ..DataReport::default() };
        let mut parsed = Vec::new();
        for row in Rows::new(path, &text) {
            if options.max_samples > 0 && parsed.len() == options.max_samples {
                report.stopped_early = true;
                break;
            }
            let (line, row) = row?;
            report.rows_read += 1;
            match kinds::parse(line, &row, &options.safe_response, options.keep_failed) {
                Ok(Parsed::Row(row)) => parsed.push(row),
                Ok(Parsed::Dropped(reason)) => *report.dropped.entry(reason).or_default() += 1,
                Err(what) => return Err(Error::row(path, line, what)),
            }
        }
        let build = Build { path, tokenizer, options };
        let outcomes: Vec<_> = parsed.par_iter().map(|row| build.record(row)).collect();
        let mut records = Vec::new();
        // In file order, so that the error given is the first row's, whatever thread met one.
        for (row, outcome) in parsed.iter().zip(outcomes) {
            match outcome? {
                Outcome::Kept { record, truncated } => {
                    report.count(row, &record, truncated);
                    report.note_special_tokens(row, tokenizer);
                    records.push(*record);
                }
                Outcome::Dropped(reason) => *report.dropped.entry(reason).or_default() += 1,
            }
        }
        if records.is_empty() {
            return Err(Error::file(path, format!("no row is left to train on\n{report}")));
        }
        if report.loss_tokens == 0 {
            return Err(Error::file(path, format!("no row has a token that carries loss\n{report}")));
        }
        Ok(Self { records, report })
    }

    /// Records whose bare request is also one of `other`, up to case and white space. Of a held-out file and a training
    /// file there should be none.
    pub fn shared_requests(&self, other: &Self) -> usize {
        let plain = |r: &Record| r.request.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        let others: HashSet<_> = other.records.iter().map(plain).collect();
        self.records.iter().map(plain).filter(|request| !request.is_empty() && others.contains(request)).count()
    }
}

impl DataReport {
    fn count(&mut self, row: &Row, record: &Record, truncated: bool) {
        self.kept += 1;
        *self.by_kind.entry(row.kind).or_default() += 1;
        self.truncated += usize::from(truncated);
        self.without_verdict += usize::from(row.without_verdict);
        let replies = || record.unsafe_reply.iter().chain(&record.safe_reply);
        self.without_reply += usize::from(replies().next().is_none());
        self.tokens += replies().map(|e| e.ids.len()).sum::<usize>();
        self.loss_tokens += replies().map(|e| e.loss.iter().filter(|l| **l).count()).sum::<usize>();
        self.lengths.extend(replies().next().map(|e| e.ids.len()));
    }

    fn note_special_tokens(&mut self, row: &Row, tokenizer: &ChatTokenizer) {
        let mut contents = row.sides().flat_map(|side| &side.messages).map(|m| m.content.as_str());
        if let Some(token) = contents.find_map(|text| tokenizer.special_token_in(text)) {
            self.special_tokens_in_content += 1;
            self.first_special_token.get_or_insert_with(|| (row.line, token.to_owned()));
        }
    }
}

/// Makes a record of a row.
struct Build<'a> {
    path: &'a Path,
    tokenizer: &'a ChatTokenizer,
    options: &'a DataOptions,
}

/// A list of tokens that fits, or why there is none.
enum Fit<T> {
    Whole(T),
    Cut(T),
    TooLong,
    NoLoss,
}

impl Build<'_> {
    fn record(&self, row: &Row) -> Result<Outcome, Error> {
        let mut truncated = false;
        let mut record = Record {
            line: row.line,
            request: row.request.clone(),
            unsafe_reply: None,
            safe_reply: None,
            unsafe_prompt: None,
            safe_prompt: None,
            unsafe_messages: row.unsafe_side.as_ref().map_or_else(Vec::new, Side::prompt_messages),
            safe_messages: row.safe_side.as_ref().map_or_else(Vec::new, Side::prompt_messages),
        };
        /// The value that fits; returns the outcome where none does.
        macro_rules! fitting {
            ($fit:expr) => {
                match $fit {
                    Fit::Whole(value) => Some(value),
                    Fit::Cut(value) => {
                        truncated = true;
                        Some(value)
                    }
                    Fit::TooLong => return Ok(Outcome::Dropped(DropReason::TooLong)),
                    Fit::NoLoss => return Ok(Outcome::Dropped(DropReason::NoLossToken)),
                }
            };
        }
        if let Some(side) = &row.unsafe_side {
            record.unsafe_prompt = fitting!(self.prompt(row.line, side)?);
            if side.has_reply() {
                record.unsafe_reply = fitting!(self.reply(row.line, side)?);
            }
        }
        if let Some(side) = &row.safe_side {
            record.safe_prompt = fitting!(self.prompt(row.line, side)?);
            if side.has_reply() {
                record.safe_reply = fitting!(self.reply(row.line, side)?);
            }
        }
        Ok(Outcome::Kept { record: Box::new(record), truncated })
    }

    fn wrong(&self, line: usize, what: impl ToString) -> Error {
        Error::row(self.path, line, what)
    }

    /// The turns before the reply, ending with the generation prompt.
    fn prompt(&self, line: usize, side: &Side) -> Result<Fit<Vec<u32>>, Error> {
        let messages = &side.messages[..side.prompt];
        // A line of a gigabyte is left out, whatever the rule, without being rendered.
        let bytes = messages.iter().map(|m| m.content.len()).sum();
        if self.tokenizer.is_hopeless(bytes, self.options.max_length) {
            return self.too_long(line, format_args!("a prompt of {bytes} bytes"));
        }
        let text = self.tokenizer.render(messages, true).map_err(|e| self.wrong(line, e))?;
        let mut ids = self.tokenizer.encode(&text)?;
        if ids.is_empty() {
            return Err(self.wrong(
                line,
                "the chat template makes nothing of the turns before the reply, so the model would have nothing to \
                 answer: correct the row, or give another template with --chat-template",
            ));
        }
        let Some(excess) = ids.len().checked_sub(self.options.max_length).filter(|n| *n > 0) else {
            return Ok(Fit::Whole(ids));
        };
        match self.options.long_rows {
            LongRows::TruncatePrompt => {
                ids.drain(..excess);
                Ok(Fit::Cut(ids))
            }
            _ => self.too_long(line, format_args!("a prompt of {} tokens", ids.len())),
        }
    }

    /// The whole conversation with its mask.
    fn reply(&self, line: usize, side: &Side) -> Result<Fit<Example>, Error> {
        let bytes = side.messages.iter().map(|m| m.content.len()).sum();
        if self.tokenizer.is_hopeless(bytes, self.options.max_length) {
            return self.too_long(line, format_args!("a conversation of {bytes} bytes"));
        }
        let masked = mask::masked(self.tokenizer.template(), &side.messages).map_err(|e| self.wrong(line, e))?;
        let Encoded { mut ids, offsets } = self.tokenizer.encode_with_offsets(&masked.text)?;
        let mut loss = mask::token_mask(&offsets, &masked.spans);
        let Some(first) = loss.iter().position(|l| *l) else { return Ok(Fit::NoLoss) };
        let excess = ids.len().saturating_sub(self.options.max_length);
        if excess > 0 {
            // One token must stay before the reply: the first token of a sequence cannot be predicted.
            if self.options.long_rows != LongRows::TruncatePrompt || excess >= first {
                return self
                    .too_long(line, format_args!("a conversation of {} tokens, {first} before the reply", ids.len()));
            }
            ids.drain(..excess);
            loss.drain(..excess);
        }
        if self.options.loss_on == LossOn::All {
            loss.fill(true);
            loss[0] = false;
        }
        let example = Example { ids, loss };
        Ok(if excess > 0 { Fit::Cut(example) } else { Fit::Whole(example) })
    }

    fn too_long<T>(&self, line: usize, what: std::fmt::Arguments<'_>) -> Result<Fit<T>, Error> {
        if self.options.long_rows != LongRows::Error {
            return Ok(Fit::TooLong);
        }
        let max = self.options.max_length;
        Err(self.wrong(
            line,
            format!("{what} does not fit into --max-length {max}; raise it, or choose another --long-rows"),
        ))
    }
}

/// A record's conversation for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// Line of the row.
    pub line: usize,
    /// Whether it is the unsafe side.
    pub is_unsafe: bool,
    /// Each token's text, and whether it carries loss. Of a character that takes several tokens, the last has the text.
    pub tokens: Vec<(String, bool)>,
}

/// The conversations of the first `n` records, token by token with the loss mask.
pub fn samples_for_people(dataset: &Dataset, tokenizer: &ChatTokenizer, n: usize) -> Vec<Sample> {
    let sample = |line, is_unsafe, example: &Example| Sample {
        line,
        is_unsafe,
        tokens: tokenizer.token_texts(&example.ids).into_iter().zip(example.loss.iter().copied()).collect(),
    };
    let of_record = |r: &Record| {
        let sides = [(true, &r.unsafe_reply), (false, &r.safe_reply)];
        sides.map(|(is_unsafe, reply)| reply.as_ref().map(|example| sample(r.line, is_unsafe, example)))
    };
    dataset.records.iter().take(n).flat_map(of_record).flatten().collect()
}
