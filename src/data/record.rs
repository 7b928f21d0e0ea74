//! From a row to a record: renders and tokenises its prompts and replies, and checks that nothing of it is dropped.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::{Map, Value};

use super::kinds::{Row, Side};
use super::mask::{self, MaskedText};
use super::message::Message;
use super::report::{DropReason, Kind};
use super::template::{Access, ChatTemplate};
use super::tokenizer::Encoded;
use super::turn_spans::MaskError;
use super::{ChatTokenizer, DataOptions, Error, Example, LongRows, LossOn, Record, TemplateError, fields, values};

/// The result of tokenising one row.
pub(super) enum RowOutcome {
    Kept { record: Box<Record>, truncated: bool, unread: BTreeSet<String>, left_out: BTreeSet<String> },
    Dropped(DropReason),
}

/// Renders and tokenises one row.
pub(super) struct RecordBuilder<'a> {
    path: &'a Path,
    tokenizer: &'a ChatTokenizer,
    options: &'a DataOptions,
    row: &'a Row,
    /// The one of the model's templates that renders this row.
    template: &'a ChatTemplate,
    /// Names of fields of turns that nothing read.
    unread: BTreeSet<String>,
    /// Names of fields of earlier turns that the template left out.
    left_out: BTreeSet<String>,
    /// Variables that some rendering read.
    variables: BTreeSet<String>,
}

/// Tokens that fit into the maximum length, or why the row is dropped.
enum Fit<T> {
    Whole(T),
    Truncated(T),
    TooLong,
    NoLossToken,
}

impl<'a> RecordBuilder<'a> {
    /// The record of a row of the file `path`.
    ///
    /// # Errors
    /// A row that the template cannot render, or renders as an empty prompt; a field that would be dropped; with
    /// [`LongRows::Error`], a row that is too long.
    pub(super) fn build(
        path: &'a Path,
        tokenizer: &'a ChatTokenizer,
        options: &'a DataOptions,
        row: &'a Row,
    ) -> Result<RowOutcome, Error> {
        let kind = if row.variables.contains_key("tools") { "with" } else { "without" };
        let template = tokenizer.templates().of_row(&row.variables);
        let template = template.map_err(|e| Error::row(path, row.line, format!("a row {kind} tools: {e}")))?;
        let (unread, left_out, variables) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        Self { path, tokenizer, options, row, template, unread, left_out, variables }.record()
    }

    fn record(mut self) -> Result<RowOutcome, Error> {
        let row = self.row;
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
        if let Some(side) = &row.unsafe_side {
            record.unsafe_prompt = fitting!(self.prompt(side)?);
            if side.has_reply() {
                record.unsafe_reply = fitting!(self.reply(side)?);
            }
        }
        if let Some(side) = &row.safe_side {
            record.safe_prompt = fitting!(self.prompt(side)?);
            if side.has_reply() {
                record.safe_reply = fitting!(self.reply(side)?);
            }
        }
        let given = &self.options.chat_template_kwargs;
        let own = row.variables.keys().map(String::as_str).filter(|name| !given.contains_key(*name));
        let unread = fields::check_row(own, &row.unused, &self.variables, self.template);
        let unread = unread.map_err(|e| self.row_error(e))?;
        self.unread.extend(unread);
        let Self { unread, left_out, .. } = self;
        Ok(RowOutcome::Kept { record: Box::new(record), truncated, unread, left_out })
    }

    fn row_error(&self, message: impl ToString) -> Error {
        Error::row(self.path, self.row.line, message)
    }

    /// The error of the chat template on these turns, with the turns.
    fn template_error(&self, turns: &[Message], error: MaskError) -> Error {
        let (row, file) = (self.row, self.template.file());
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
        let doubled = doubled(turns);
        self.row_error(format!(
            "{error}; the template, of {}, was given the turns {named}{doubled}{hint}",
            file.display()
        ))
    }

    /// Checks that the text of these turns, which is all that the model gets of them, drops nothing of the row.
    fn check_rendering(&mut self, turns: &[Message], prompt: bool, text: &str, access: &Access) -> Result<(), Error> {
        let unread = fields::check_turns(turns, &access.turns, self.template);
        let unread = unread.map_err(|e| self.row_error(e))?;
        self.unread.extend(unread);
        let render = |turns: &[Message], variables: &Map<String, Value>| {
            self.template.render_with(turns, variables, prompt).map(|rendered| rendered.text)
        };
        // The reply is the last turn, and prompts have none.
        let reply_is_last = !prompt && turns.last().is_some_and(Message::is_assistant);
        let written = fields::check_written(turns, reply_is_last, &self.row.variables, text, self.template, render);
        written.map_err(|e| self.row_error(e))?;
        let render = |turns: &[Message]| render(turns, &self.row.variables);
        let left_out = fields::left_out(turns, reply_is_last, &access.turns, text, render);
        self.left_out.extend(left_out);
        Ok(())
    }

    /// Token ids of the turns before the reply, ending with the generation prompt.
    fn prompt(&mut self, side: &Side) -> Result<Fit<Vec<u32>>, Error> {
        let messages = &side.messages[..side.prompt];
        // Do not render a line of a gigabyte: treat it as too long, even where prompts are truncated.
        let bytes = messages.iter().map(Message::bytes).sum();
        if self.tokenizer.exceeds_by_far(bytes, self.options.max_length) {
            return self.too_long(format_args!("a prompt of {bytes} bytes"));
        }
        self.check_contents(messages)?;
        let rendered = self.template.render_with(messages, &self.row.variables, true);
        let rendered = rendered.map_err(|e| self.template_error(messages, e.into()))?;
        self.variables.extend(rendered.access.variables.iter().cloned());
        if !side.has_reply() {
            self.check_rendering(messages, true, &rendered.text, &rendered.access)?;
        }
        let mut ids = self.tokenizer.encode(&rendered.text)?;
        if ids.is_empty() {
            return Err(self.row_error(
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
            _ => self.too_long(format_args!("a prompt of {} tokens", ids.len())),
        }
    }

    /// Token ids and loss mask of the conversation, reply included.
    fn reply(&mut self, side: &Side) -> Result<Fit<Example>, Error> {
        let bytes = side.messages.iter().map(Message::bytes).sum();
        if self.tokenizer.exceeds_by_far(bytes, self.options.max_length) {
            return self.too_long(format_args!("a conversation of {bytes} bytes"));
        }
        self.check_contents(&side.messages)?;
        if self.options.loss_on == LossOn::All {
            return self.all_tokens(side);
        }
        let masked = self.masked(side)?;
        self.variables.extend(masked.access.variables.iter().cloned());
        self.check_rendering(&side.messages, false, &masked.text, &masked.access)?;
        let Encoded { ids, offsets } = self.tokenizer.encode_with_offsets(&masked.text)?;
        let loss = mask::token_mask(&offsets, &masked.spans);
        let Some(first) = loss.iter().position(|l| *l) else { return Ok(Fit::NoLossToken) };
        self.fit(Example { ids, loss }, first)
    }

    fn check_contents(&self, messages: &[Message]) -> Result<(), Error> {
        let checked = self.template.check_contents(messages, &self.row.variables);
        checked.map_err(|e| self.template_error(messages, e.into()))
    }

    fn masked(&self, side: &Side) -> Result<MaskedText, Error> {
        let masked = mask::render_with_mask(self.template, &side.messages, &self.row.variables);
        masked.map_err(|e| match e {
            MaskError::Template(_) | MaskError::Turn { .. } => self.template_error(&side.messages, e),
            _ => self.row_error(format!("{e}{}", doubled(&side.messages))),
        })
    }

    /// The conversation with loss on all tokens. Where its turns begin and end matters only if its prompt has to be truncated.
    fn all_tokens(&mut self, side: &Side) -> Result<Fit<Example>, Error> {
        if side.messages.iter().any(|turn| turn.excluded) {
            self.unread.insert("loss: false of a turn (--loss-on all takes all tokens)".to_owned());
        }
        let rendered = self.template.render_with(&side.messages, &self.row.variables, false);
        let rendered = rendered.map_err(|e| self.template_error(&side.messages, e.into()))?;
        self.variables.extend(rendered.access.variables.iter().cloned());
        self.check_rendering(&side.messages, false, &rendered.text, &rendered.access)?;
        let Encoded { ids, offsets } = self.tokenizer.encode_with_offsets(&rendered.text)?;
        if ids.len() < 2 || !side.messages.iter().any(|m| m.is_assistant() && m.loss != Some(false)) {
            return Ok(Fit::NoLossToken);
        }
        let first = if ids.len() > self.options.max_length && self.options.long_rows == LongRows::TruncatePrompt {
            let spans = self.masked(side)?.spans;
            let Some(first) = mask::token_mask(&offsets, &spans).iter().position(|l| *l) else {
                return Ok(Fit::NoLossToken);
            };
            first
        } else {
            0
        };
        let mut loss = vec![true; ids.len()];
        loss[0] = false;
        self.fit(Example { ids, loss }, first)
    }

    /// The conversation, its prompt truncated if it is too long and that is asked for. `first`: the first token of the reply.
    fn fit(&self, mut example: Example, first: usize) -> Result<Fit<Example>, Error> {
        let excess = example.ids.len().saturating_sub(self.options.max_length);
        if excess == 0 {
            return Ok(Fit::Whole(example));
        }
        // Keep at least one token before the reply: the first token of a sequence cannot be a target.
        if self.options.long_rows != LongRows::TruncatePrompt {
            return self.too_long(format_args!("a conversation of {} tokens", example.ids.len()));
        }
        if excess >= first {
            return self
                .too_long(format_args!("a conversation of {} tokens, {first} before the reply", example.ids.len()));
        }
        example.ids.drain(..excess);
        example.loss.drain(..excess);
        example.loss[0] = false;
        Ok(Fit::Truncated(example))
    }

    fn too_long<T>(&self, what: std::fmt::Arguments<'_>) -> Result<Fit<T>, Error> {
        if self.options.long_rows != LongRows::Error {
            return Ok(Fit::TooLong);
        }
        let max = self.options.max_length;
        Err(self
            .row_error(format!("{what} does not fit into --max-length {max}; raise it, or choose another --long-rows")))
    }
}

/// A turn for a message: its role, the beginning of its text, and where it comes from.
fn describe_turn(turn: &Message) -> String {
    match turn.origin {
        Some(origin) => format!("{} ({origin})", turn.role),
        None => format!("{} {}", turn.role, values::quoted(&turn.content)),
    }
}

/// A hint where two turns in a row have one role, which many templates do not expect.
fn doubled(turns: &[Message]) -> String {
    let at = turns.windows(2).position(|pair| pair[0].role == pair[1].role && pair[0].role != "tool");
    at.map_or_else(String::new, |i| {
        format!(
            "; messages {} and {} are both {} turns: join them into one, if the template expects that",
            i + 1,
            i + 2,
            turns[i].role
        )
    })
}
