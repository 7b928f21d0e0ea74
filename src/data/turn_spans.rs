//! Where the turns of a conversation are in its one rendering.
//!
//! The span of an assistant turn begins after the generation prompt and ends where the next turn would begin, so it includes
//! the end-of-turn token and what the template writes after that token. It is found by rendering prefixes of the conversation:
//!
//! ```text
//! render(turns before the turn, with generation prompt)  is a prefix of
//! render(turns up to and including the turn)             is a prefix of
//! render(all turns)
//! ```
//!
//! Some templates render a turn differently once others follow: Qwen3's writes an empty think block only into the last
//! turn. Such a turn is found in the one rendering of all turns by a mark, a character that occurs nowhere else, at the end
//! of its content (or of the name of its last tool call). What `render(turns up to and including the turn)` writes from the
//! mark on has to follow the mark in the whole rendering, too: its end is the turn's end. The text before the mark and the
//! text after the turn have to be the same with the mark as without. The turn's header, which is the generation prompt or the
//! beginning of it, has to stand between the end of the turn before, which is found in the same way, and the content: the
//! template may have written thoughts of still earlier turns into the prefix only. Where that does not hold, the mask would be
//! a guess, so the conversation is refused. The reply, which is the last turn, has to follow its prompt in any case: the model
//! is trained on the text that it continues later. Only an assistant turn right before it may be written otherwise at the end of
//! the prompt; the whole generation prompt has to follow that.

use std::cell::OnceCell;
use std::ops::Range;

use serde_json::{Map, Value};

use super::Message;
use super::message::Form;
use super::template::{ChatTemplate, TemplateError};

const JOINED: &str = "The turn before it is the assistant's, too: write both as one turn";
const THOUGHTS: &str = "Where the prompt begins a think block, write the reply's thoughts as reasoning_content, or have \
     enable_thinking: false (--chat-template-kwargs); where it ends one, remove the thoughts, or the variable that asks for none. Without \
     thoughts, the template writes the turns before the reply differently once it follows, a system text, say";

/// Why the loss mask of a conversation cannot be determined.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum MaskError {
    #[error(transparent)]
    Template(#[from] TemplateError),
    #[error("message {turn}: {source}")]
    Turn { turn: usize, source: TemplateError },
    #[error(
        "message {turn}: the chat template renders it differently when {when}, so its tokens cannot be found; give \
         --chat-template FILE with a template that marks them with {{% generation %}}, or exclude the turn from the loss \
         with \"loss\": false"
    )]
    Prefix { turn: usize, when: &'static str },
    #[error(
        "message {turn}: the chat template renders it differently when {PROMPTED}, so the tokens of the reply cannot be found. {}; \
         or give --chat-template FILE with a template that marks the reply with {{% generation %}}",
        if *.joined { JOINED } else { THOUGHTS }
    )]
    Reply {
        turn: usize,
        /// Whether the turn before it is the assistant's, too.
        joined: bool,
    },
    #[error(
        "the chat template marks {marks} generations in a conversation with {turns} assistant turns, and which of them are in \
         turns that carry loss cannot be seen; give --chat-template FILE with a template that has one {{% generation %}} block \
         for each assistant turn"
    )]
    Marks { marks: usize, turns: usize },
}

pub(super) const PROMPTED: &str = "the conversation ends with its generation prompt";
pub(super) const FOLLOWED: &str = "further messages follow";

/// A conversation and its rendering.
pub(super) struct Conversation<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Message],
    variables: &'a Map<String, Value>,
    text: &'a str,
    /// See [`Self::unused_character`].
    unused: OnceCell<Option<char>>,
    /// See [`Self::end`].
    end: OnceCell<Option<String>>,
}

impl<'a> Conversation<'a> {
    /// `text`: the messages rendered with these variables.
    pub(super) fn new(
        template: &'a ChatTemplate,
        messages: &'a [Message],
        variables: &'a Map<String, Value>,
        text: &'a str,
    ) -> Self {
        Self { template, messages, variables, text, unused: OnceCell::new(), end: OnceCell::new() }
    }

    /// The assistant turns and their indices.
    pub(super) fn assistant_turns(&self) -> impl Iterator<Item = (usize, &'a Message)> + use<'a> {
        self.messages.iter().enumerate().filter(|(_, m)| m.is_assistant())
    }

    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        self.template.render_with(messages, self.variables, add_generation_prompt).map(|rendered| rendered.text)
    }

    /// The bytes of the assistant turn at index `i`, without its generation prompt.
    pub(super) fn span(&self, i: usize) -> Result<Range<usize>, MaskError> {
        let turn = i + 1;
        let of_turn = |source| MaskError::Turn { turn, source };
        let last = turn == self.messages.len();
        let before = match self.render(&self.messages[..i], true) {
            Err(source) if i == 0 && !last => return self.greeting().ok_or(MaskError::Turn { turn, source }),
            rendered => rendered.map_err(of_turn)?,
        };
        let after =
            if last { self.text.to_owned() } else { self.render(&self.messages[..turn], false).map_err(of_turn)? };
        if after.starts_with(&before) && self.text.starts_with(&after) {
            return Ok(before.len()..if last { self.end_of_last(&before) } else { after.len() });
        }
        if i == 0
            && !last
            && let Some(span) = self.greeting()
        {
            return Ok(span);
        }
        if last {
            // The template may write the assistant turn before it otherwise at the end of a prompt.
            let follows_assistant = i > 0 && self.messages[i - 1].is_assistant();
            let start = self.after_prompt(i, &before).filter(|_| follows_assistant);
            return start
                .map(|start| start..self.text.len())
                .ok_or(MaskError::Reply { turn, joined: follows_assistant });
        }
        if after.starts_with(&before)
            && let Some(body) = self.without_end(&after).filter(|body| body.len() >= before.len())
        {
            return Ok(before.len()..body.len());
        }
        let (mark, end) = self.marked_end(i, &after).ok_or(MaskError::Prefix { turn, when: FOLLOWED })?;
        let start = self.start(i, &before).filter(|start| *start <= mark);
        Ok(start.ok_or(MaskError::Prefix { turn, when: PROMPTED })?..end)
    }

    /// What the template writes after the last turn, in place of a generation prompt, such as `eos_token` in Phi-3's: all that it
    /// writes for no turns at all, but for `bos_token`. `None`: nothing.
    fn end(&self) -> Option<&str> {
        let render = || {
            let mut variables = self.variables.clone();
            variables.insert("bos_token".into(), Value::from(""));
            let end = self.template.render_with(&[], &variables, false).ok()?.text;
            Some(end).filter(|end| !end.is_empty())
        };
        self.end.get_or_init(render).as_deref()
    }

    /// A rendering without that end.
    fn without_end<'t>(&self, after: &'t str) -> Option<&'t str> {
        after.strip_suffix(self.end()?).filter(|body| self.text.starts_with(body))
    }

    /// Where the last turn ends: at the end of the text, but before a generation prompt that the template writes unasked, as the first
    /// one of Llama 3 did. `before`: the prompt of the turn.
    fn end_of_last(&self, before: &str) -> usize {
        let whole = self.text.len();
        let Some(end) = self.end().filter(|end| before.ends_with(end) && self.text.ends_with(end)) else {
            return whole;
        };
        Some(whole - end.len()).filter(|end| *end >= before.len()).unwrap_or(whole)
    }

    /// Where a turn that others follow begins. The generation prompt may go on with what the template writes only for the
    /// last turn, such as an empty think block: then the turn begins with its content.
    fn start(&self, i: usize, before: &str) -> Option<usize> {
        if let Some(start) = self.after_prompt(i, before) {
            return Some(start);
        }
        let (header_start, generation_prompt) = self.header(i, before)?;
        let mark = self.unused_character()?;
        let (_, content) = self.marked(i, with_content(&self.messages[i], mark.to_string()), mark)?;
        let header = self.text.get(header_start..content)?;
        (!header.is_empty() && generation_prompt.starts_with(header)).then_some(content)
    }

    /// The span of an assistant turn that begins the conversation. Of no turns at all some templates render nothing, as they read
    /// `messages[0]`, or another text than before this turn, such as no system prompt of their own. The turn begins with its
    /// content, before which the generation prompt has to stand, or its beginning with the whole first line.
    fn greeting(&self) -> Option<Range<usize>> {
        let prompted = self.render(self.messages, true).ok()?;
        let generation_prompt = prompted.strip_prefix(self.text)?;
        let first_line = generation_prompt.split_inclusive('\n').next()?;
        let mark = self.unused_character()?;
        let (_, content) = self.marked(0, with_content(&self.messages[0], mark.to_string()), mark)?;
        let mut beginnings = (first_line.len()..=generation_prompt.len()).filter_map(|n| generation_prompt.get(..n));
        let header = self.text.get(..content).filter(|header| beginnings.any(|prompt| header.ends_with(prompt)))?;
        let after = self.render(&self.messages[..1], false).ok()?;
        let end = if self.text.starts_with(&after) { after.len() } else { self.marked_end(0, &after)?.1 };
        (header.len() < end).then_some(header.len()..end)
    }

    /// Where the generation prompt of a turn ends, if it stands there whole.
    fn after_prompt(&self, i: usize, before: &str) -> Option<usize> {
        if self.text.starts_with(before) {
            return Some(before.len());
        }
        let (header_start, generation_prompt) = self.header(i, before)?;
        self.text[header_start..].starts_with(&generation_prompt).then_some(header_start + generation_prompt.len())
    }

    /// Where the header of a turn begins, and its generation prompt, which ends `before`.
    fn header(&self, i: usize, before: &str) -> Option<(usize, String)> {
        let base = self.render(&self.messages[..i], false).ok()?;
        let generation_prompt = before.strip_prefix(&base).filter(|prompt| !prompt.is_empty())?;
        Some((self.header_start(i, &base)?, generation_prompt.to_owned()))
    }

    /// Where the header of an assistant turn that others follow begins, which is the end of the turn before it. `base`: the
    /// rendering up to there.
    fn header_start(&self, i: usize, base: &str) -> Option<usize> {
        if self.text.starts_with(base) {
            return Some(base.len());
        }
        // Some templates write the thoughts of assistant turns only until the next request. Such turns may differ, but nothing
        // before the first of them.
        let first = self.messages.iter().position(Message::is_assistant)?;
        let head = if first == 0 { String::new() } else { self.render(&self.messages[..first], false).ok()? };
        if !base.starts_with(&head) || !self.text.starts_with(&head) {
            return None;
        }
        // Of two assistant turns in a row, the template may take the second for the continuation of the first: then that has no end.
        self.marked_end(i.checked_sub(1)?, base).map(|(_, end)| end)
    }

    /// Whether each assistant turn has the generation of its own number: a mark character in the turn's text is in that one and
    /// in no other, and nothing else changes.
    pub(super) fn one_generation_each(&self, generated: &[Range<usize>]) -> bool {
        if self.assistant_turns().count() != generated.len() {
            return false;
        }
        let Some(mark) = self.unused_character() else { return false };
        let is_in = |number: usize, i: usize, turn: Message| {
            let mut messages = self.messages.to_vec();
            messages[i] = turn;
            let Ok(marked) = self.template.render_with(&messages, self.variables, false) else { return false };
            let without_mark = |at: usize| at - marked.text[..at].matches(mark).count() * mark.len_utf8();
            marked.text.replace(mark, "") == self.text
                && marked
                    .generated
                    .iter()
                    .map(|g| without_mark(g.start)..without_mark(g.end))
                    .eq(generated.iter().cloned())
                && marked
                    .generated
                    .iter()
                    .enumerate()
                    .all(|(k, g)| marked.text[g.clone()].contains(mark) == (k == number))
        };
        self.assistant_turns().enumerate().all(|(number, (i, turn))| {
            // The template may trim the content.
            let (text, space) = turn.content.split_at(turn.content.trim_end().len());
            let in_content = with_content(turn, format!("{text}{mark}{space}"));
            is_in(number, i, in_content) || with_named_call(turn, mark).is_some_and(|named| is_in(number, i, named))
        })
    }

    /// Where a turn that others follow ends, if `after` is the rendering up to it; and the position of the mark before that.
    fn marked_end(&self, i: usize, after: &str) -> Option<(usize, usize)> {
        let (mark, turn) = (self.unused_character()?, &self.messages[i]);
        let at_end = with_content(turn, format!("{}{mark}", turn.content.trim_end()));
        let found = [Some(at_end), with_named_call(turn, mark)].into_iter().flatten().find_map(|marked| {
            let mut cut = self.messages[..i].to_vec();
            cut.push(marked.clone());
            let cut = self.render(&cut, false).ok()?;
            let rest = after.strip_prefix(&cut[..sole(&cut, mark)?])?;
            let (whole, at) = self.marked(i, marked, mark)?;
            let end = at + rest.len();
            let follows =
                self.text[at..].starts_with(rest) && whole[at + mark.len_utf8()..].ends_with(&self.text[end..]);
            follows.then_some((at, end))
        });
        found.or_else(|| self.blank_end(i))
    }

    /// [`Self::marked_end`] of a turn with a blank content, of which the template may write less in the last turn. With the mark in its
    /// place the turn ends alike in both.
    fn blank_end(&self, i: usize) -> Option<(usize, usize)> {
        let turn = Some(&self.messages[i]).filter(|turn| turn.content.trim().is_empty())?;
        let mark = self.unused_character()?;
        let marked = with_content(turn, mark.to_string());
        let cut = self.render(&[&self.messages[..i], std::slice::from_ref(&marked)].concat(), false).ok()?;
        let rest = &cut[sole(&cut, mark)? + mark.len_utf8()..];
        let (whole, at) = self.marked(i, marked, mark)?;
        let after = whole[at + mark.len_utf8()..].strip_prefix(rest)?;
        let own = self.text[at..].strip_suffix(after)?;
        own.strip_suffix(rest).is_some_and(|content| content.trim().is_empty()).then_some((at, at + own.len()))
    }

    /// The rendering with another turn at index `i`, and where that has the mark. Up to there nothing may differ.
    fn marked(&self, i: usize, turn: Message, mark: char) -> Option<(String, usize)> {
        let mut messages = self.messages.to_vec();
        messages[i] = turn;
        let whole = self.render(&messages, false).ok()?;
        let at = sole(&whole, mark)?;
        self.text.starts_with(&whole[..at]).then_some((whole, at))
    }

    /// A character for private use that occurs neither in the rendering nor in what is rendered.
    fn unused_character(&self) -> Option<char> {
        let occurs = |c: char| {
            let in_fields = |m: &Message| !m.fields.is_empty() && m.fields.values().any(|v| v.to_string().contains(c));
            self.text.contains(c) || self.messages.iter().any(|m| m.content.contains(c) || in_fields(m))
        };
        *self.unused.get_or_init(|| ('\u{e000}'..='\u{f8ff}').rev().find(|c| !occurs(*c)))
    }
}

/// The position of a character that occurs once.
fn sole(text: &str, c: char) -> Option<usize> {
    text.find(c).filter(|at| text.rfind(c) == Some(*at))
}

/// The turn with another content, of the same form where it has one.
fn with_content(turn: &Message, content: String) -> Message {
    let form = match &turn.form {
        Form::Parts(parts) if parts.len() <= 1 => Form::Parts(vec![content.clone()]),
        _ => Form::Text,
    };
    Message { content, form, ..turn.clone() }
}

/// The turn with a mark after the name of its last call.
fn with_named_call(turn: &Message, mark: char) -> Option<Message> {
    let mut turn = turn.clone();
    let call = match turn.fields.get_mut("tool_calls") {
        Some(calls) => calls.as_array_mut()?.last_mut()?,
        None => turn.fields.get_mut("function_call")?,
    };
    let call = if call.get("function").is_some() { call.get_mut("function")? } else { call };
    let Some(Value::String(name)) = call.get_mut("name") else { return None };
    name.push(mark);
    Some(turn)
}
