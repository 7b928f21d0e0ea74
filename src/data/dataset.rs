//! Reads a data file into tokenised records.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use rayon::prelude::*;

use super::deep;
use super::head;
use super::kinds::{Row, Side};
use super::mask::{self, MaskError};
use super::message::Message;
use super::report::{DataReport, DropReason, Kind};
use super::template::Reads;
use super::tokenizer::Encoded;
use super::{ChatTokenizer, DataOptions, Error, Example, LongRows, LossOn, Record, TemplateError, fields, values};
use crate::meter::{Meter, Unit};

/// The records of a file, in file order.
#[derive(Debug, Clone, PartialEq)]
pub struct Dataset {
    /// Never empty after [`Dataset::read`].
    pub records: Vec<Record>,
    /// Counts of rows read, kept and dropped.
    pub report: DataReport,
}

/// The result of tokenising one row.
enum RowOutcome {
    Kept { record: Box<Record>, truncated: bool, unread: Vec<String> },
    Dropped(DropReason),
}

impl Dataset {
    /// A data set of given records with an empty report, for benchmarks and tests.
    pub fn of_records(records: Vec<Record>) -> Self {
        Self { records, report: DataReport::default() }
    }

    /// Whether a safe and an unsafe prompt exist (not necessarily in one record). Router alignment needs both.
    pub fn has_both_prompts(&self) -> bool {
        let any = |side: fn(&Record) -> bool| self.records.iter().any(side);
        any(|r| r.safe_prompt.is_some()) && any(|r| r.unsafe_prompt.is_some())
    }

    /// Whether a reply on the safe and one on the unsafe side exist (not necessarily in one record). Routing
    /// frequencies and the joint schedule need both.
    pub fn has_both_replies(&self) -> bool {
        let any = |side: fn(&Record) -> bool| self.records.iter().any(side);
        any(|r| r.safe_reply.is_some()) && any(|r| r.unsafe_reply.is_some())
    }

    /// Reads, filters, renders and tokenises a data file: a JSON array of rows, or JSONL.
    ///
    /// Attacks without a verdict are kept and counted; attacks with a null verdict are dropped. Both sides of a row are
    /// kept or both are dropped, so an unsafe prompt keeps its safe counterpart.
    ///
    /// # Errors
    /// A file that cannot be read or is empty; the first row that is invalid, or that the template cannot render or
    /// renders as an empty prompt; with [`LongRows::Error`], a row that is too long; no row or no loss token left to
    /// train on.
    pub fn read(path: &Path, tokenizer: &ChatTokenizer, options: &DataOptions) -> Result<Self, Error> {
        let template = tokenizer.template();
        if let Some(name) = options.chat_template_kwargs.keys().find(|name| !template.reads_variable(name)) {
            return Err(Error::Kwargs { name: values::name_of(name) });
        }
        let mut report = DataReport { path: path.to_owned(), ..DataReport::default() };
        let mut parsed = head::read(path, options, &mut report)?;
        for row in &mut parsed {
            for (name, value) in &options.chat_template_kwargs {
                row.variables.entry(name).or_insert_with(|| value.clone());
            }
        }
        let builder = RecordBuilder { path, tokenizer, options };
        let pool = deep::pool().map_err(|e| Error::file(path, e))?;
        let meter = Meter::start(format!("rendering the rows of {}", path.display()), Unit::Rows, parsed.len() as u64);
        let record = |row: &Row| {
            meter.add(1);
            builder.record(row)
        };
        let outcomes: Vec<_> = pool.install(|| parsed.par_iter().map(record).collect());
        drop(meter);
        let mut records = Vec::new();
        // In file order: the error returned is that of the first bad row, whichever thread finished first.
        for (row, outcome) in parsed.iter().zip(outcomes) {
            match outcome? {
                RowOutcome::Kept { record, truncated, unread } => {
                    report.count(row, &record, truncated);
                    report.note_unread(row.line, unread);
                    report.note_special_tokens(row, tokenizer);
                    records.push(*record);
                }
                RowOutcome::Dropped(reason) => *report.dropped.entry(reason).or_default() += 1,
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

    /// Number of records whose [`Record::request`] also occurs in `other`, ignoring case and white space. Should be 0
    /// for a held-out file against a training file.
    pub fn count_shared_requests(&self, other: &Self) -> usize {
        let normalized = |r: &Record| r.request.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        let others: HashSet<_> = other.records.iter().map(normalized).collect();
        self.records.iter().map(normalized).filter(|request| !request.is_empty() && others.contains(request)).count()
    }
}

impl DataReport {
    fn count(&mut self, row: &Row, record: &Record, truncated: bool) {
        self.kept += 1;
        *self.by_kind.entry(row.kind).or_default() += 1;
        self.truncated += usize::from(truncated);
        self.without_verdict += usize::from(row.without_verdict);
        self.completed += usize::from(row.completed);
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

/// Renders and tokenises rows.
struct RecordBuilder<'a> {
    path: &'a Path,
    tokenizer: &'a ChatTokenizer,
    options: &'a DataOptions,
}

/// Tokens that fit into the maximum length, or why the row is dropped.
enum Fit<T> {
    Whole(T),
    Truncated(T),
    TooLong,
    NoLossToken,
}

impl RecordBuilder<'_> {
    fn record(&self, row: &Row) -> Result<RowOutcome, Error> {
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
        /// Unwraps tokens that fit; returns from the function if the row is dropped.
        macro_rules! fitting {
            ($fit:expr) => {
                match $fit {
                    Fit::Whole(value) => Some(value),
                    Fit::Truncated(value) => {
                        truncated = true;
                        Some(value)
                    }
                    Fit::TooLong => return Ok(RowOutcome::Dropped(DropReason::TooLong)),
                    Fit::NoLossToken => return Ok(RowOutcome::Dropped(DropReason::NoLossToken)),
                }
            };
        }
        let own = fields::check_row(&row.variables, &row.unused, self.tokenizer.template())
            .map_err(|e| self.row_error(row.line, e))?;
        let mut unread: BTreeSet<String> = own.into_iter().collect();
        if let Some(side) = &row.unsafe_side {
            record.unsafe_prompt = fitting!(self.prompt(row, side, &mut unread)?);
            if side.has_reply() {
                record.unsafe_reply = fitting!(self.reply(row, side, &mut unread)?);
            }
        }
        if let Some(side) = &row.safe_side {
            record.safe_prompt = fitting!(self.prompt(row, side, &mut unread)?);
            if side.has_reply() {
                record.safe_reply = fitting!(self.reply(row, side, &mut unread)?);
            }
        }
        Ok(RowOutcome::Kept { record: Box::new(record), truncated, unread: unread.into_iter().collect() })
    }

    fn row_error(&self, line: usize, message: impl ToString) -> Error {
        Error::row(self.path, line, message)
    }

    /// The error of the chat template on these turns, with the turns.
    fn template_error(&self, row: &Row, turns: &[Message], error: MaskError) -> Error {
        let file = self.tokenizer.template().file();
        if let MaskError::Template(TemplateError::Crashed) | MaskError::Turn { source: TemplateError::Crashed, .. } =
            error
        {
            let message = format!(
                "the chat template failed on the turns of {}:{}: it crashed the template engine; give another template with \
                 --chat-template",
                self.path.display(),
                row.line
            );
            return Error::file(file, message);
        }
        let named: Vec<_> =
            turns.iter().enumerate().map(|(i, turn)| format!("{} {}", i + 1, describe_turn(turn))).collect();
        let named = if named.len() > 6 {
            format!("{}, …, {}", named[..3].join(", "), named[named.len() - 2..].join(", "))
        } else {
            named.join(", ")
        };
        let hint = match turns.first() {
            Some(first) if first.role == "system" && first.origin.is_some() && row.kind == Kind::Attack => {
                ". Does it take no system turn? Give another template with --chat-template, or name the request prompt instead of \
                 goal: then no system turn is added"
            }
            _ => ". --chat-template gives another template",
        };
        self.row_error(
            row.line,
            format!("{error}; the template, of {}, was given the turns {named}{hint}", file.display()),
        )
    }

    /// Checks the fields of turns against what a rendering read of them, and collects those that nothing read.
    fn check_turns(&self, row: &Row, side: &Side, reads: &[Reads], unread: &mut BTreeSet<String>) -> Result<(), Error> {
        let names = fields::check_turns(&side.messages, reads, self.tokenizer.template());
        unread.extend(names.map_err(|e| self.row_error(row.line, e))?);
        Ok(())
    }

    /// Token ids of the turns before the reply, ending with the generation prompt.
    fn prompt(&self, row: &Row, side: &Side, unread: &mut BTreeSet<String>) -> Result<Fit<Vec<u32>>, Error> {
        let line = row.line;
        let messages = &side.messages[..side.prompt];
        // Do not render a line of a gigabyte: treat it as too long, even where prompts are truncated.
        let bytes = messages.iter().map(Message::bytes).sum();
        if self.tokenizer.exceeds_by_far(bytes, self.options.max_length) {
            return self.too_long(line, format_args!("a prompt of {bytes} bytes"));
        }
        let rendered = self.tokenizer.template().render_with(messages, &row.variables, true);
        let rendered = rendered.map_err(|e| self.template_error(row, messages, e.into()))?;
        if !side.has_reply() {
            self.check_turns(row, side, &rendered.reads, unread)?;
        }
        let mut ids = self.tokenizer.encode(&rendered.text)?;
        if ids.is_empty() {
            return Err(self.row_error(
                line,
                "the chat template renders the turns before the reply as an empty prompt: correct the row, or give another \
                 template with --chat-template",
            ));
        }
        let Some(excess) = ids.len().checked_sub(self.options.max_length).filter(|n| *n > 0) else {
            return Ok(Fit::Whole(ids));
        };
        match self.options.long_rows {
            LongRows::TruncatePrompt => {
                ids.drain(..excess);
                Ok(Fit::Truncated(ids))
            }
            _ => self.too_long(line, format_args!("a prompt of {} tokens", ids.len())),
        }
    }

    /// Token ids and loss mask of the conversation, reply included.
    fn reply(&self, row: &Row, side: &Side, unread: &mut BTreeSet<String>) -> Result<Fit<Example>, Error> {
        let line = row.line;
        let bytes = side.messages.iter().map(Message::bytes).sum();
        if self.tokenizer.exceeds_by_far(bytes, self.options.max_length) {
            return self.too_long(line, format_args!("a conversation of {bytes} bytes"));
        }
        let masked = mask::render_with_mask(self.tokenizer.template(), &side.messages, &row.variables);
        let masked = masked.map_err(|e| match e {
            MaskError::Template(_) | MaskError::Turn { .. } => self.template_error(row, &side.messages, e),
            _ => self.row_error(line, e),
        })?;
        self.check_turns(row, side, &masked.reads, unread)?;
        let Encoded { mut ids, offsets } = self.tokenizer.encode_with_offsets(&masked.text)?;
        let mut loss = mask::token_mask(&offsets, &masked.spans);
        let Some(first) = loss.iter().position(|l| *l) else { return Ok(Fit::NoLossToken) };
        let excess = ids.len().saturating_sub(self.options.max_length);
        if excess > 0 {
            // Keep at least one token before the reply: the first token of a sequence cannot be a target.
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
        Ok(if excess > 0 { Fit::Truncated(example) } else { Fit::Whole(example) })
    }

    fn too_long<T>(&self, line: usize, what: std::fmt::Arguments<'_>) -> Result<Fit<T>, Error> {
        if self.options.long_rows != LongRows::Error {
            return Ok(Fit::TooLong);
        }
        let max = self.options.max_length;
        Err(self.row_error(
            line,
            format!("{what} does not fit into --max-length {max}; raise it, or choose another --long-rows"),
        ))
    }
}

/// A turn for a message: its role, the beginning of its text, and where it comes from.
fn describe_turn(turn: &Message) -> String {
    match turn.origin {
        Some(origin) => format!("{} ({origin})", turn.role),
        None => format!("{} {}", turn.role, values::quoted(&turn.content)),
    }
}

/// A conversation as text, token by token, for showing the loss mask to the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    /// 1-based line of the row.
    pub line: usize,
    /// Whether it is the unsafe side of the row.
    pub is_unsafe: bool,
    /// The text of each token, and whether it carries loss. If a character takes several tokens, the last of them has
    /// the text and the others are empty.
    pub tokens: Vec<(String, bool)>,
}

/// The conversations of the first `n` records, token by token with the loss mask.
pub fn loss_mask_samples(dataset: &Dataset, tokenizer: &ChatTokenizer, n: usize) -> Vec<Sample> {
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
