//! The loss mask: which bytes of a rendered conversation, and from them which tokens, carry loss.
//!
//! If the template marks assistant text with `{% generation %}`, the marks in the turns that carry loss decide. Where some turns
//! carry none, the marks are told apart by what they hold, not by their number alone: a turn may have several marks, or none.
//! Without marks in the template, the span
//! of an assistant turn begins after the generation prompt and ends where the next turn would begin, so it includes the
//! end-of-turn token and what the template writes after that token. The span is found by rendering prefixes of the
//! conversation:
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
//! is trained on the text that it continues later.

use std::ops::Range;

use serde_json::{Map, Value};

use super::Message;
use super::message::Form;
use super::template::{Access, ChatTemplate, Rendered, TemplateError};

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
        "message {turn}: the chat template renders it differently when {PROMPTED}, so the tokens of the reply cannot be found; \
         the likely cause are thoughts or calls in the reply that the template writes otherwise than after its generation \
         prompt, such as reasoning_content with enable_thinking false: remove the thoughts, change chat_template_kwargs, or \
         give --chat-template FILE with a template that marks the reply with {{% generation %}}"
    )]
    Reply { turn: usize },
    #[error(
        "the chat template marks {marks} generations in a conversation with {turns} assistant turns, and which of them are in \
         turns that carry loss cannot be seen; give --chat-template FILE with a template that has one {{% generation %}} block \
         for each assistant turn"
    )]
    Marks { marks: usize, turns: usize },
}

/// A rendered conversation and the byte ranges of its text that carry loss, ascending.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct MaskedText {
    pub text: String,
    pub spans: Vec<Range<usize>>,
    /// What the template read.
    pub access: Access,
}

/// Renders a conversation with these variables, and finds the spans of its assistant turns, except those with `loss: false`.
pub(super) fn render_with_mask(
    template: &ChatTemplate,
    messages: &[Message],
    variables: &Map<String, Value>,
) -> Result<MaskedText, MaskError> {
    let Rendered { text, generated, access } = template.render_with(messages, variables, false)?;
    let assistant = || messages.iter().enumerate().filter(|(_, m)| m.is_assistant());
    let carries_loss = |m: &Message| m.loss != Some(false);
    let conversation = Conversation { template, messages, variables, text: &text };
    let turns = || -> Result<Vec<Range<usize>>, MaskError> {
        let mut spans: Vec<Range<usize>> = Vec::new();
        for (i, _) in assistant().filter(|(_, m)| carries_loss(m)) {
            let span = conversation.span(i)?;
            if spans.last().is_some_and(|before| before.end > span.start) {
                return Err(MaskError::Prefix { turn: i + 1, when: FOLLOWED });
            }
            spans.push(span);
        }
        Ok(spans)
    };
    if !template.marks_generation() {
        let spans = turns()?;
        return Ok(MaskedText { text, spans, access });
    }
    let (marks, count) = (generated.len(), assistant().count());
    let uncertain = MaskError::Marks { marks, turns: count };
    let spans: Vec<_> = if assistant().all(|(_, m)| carries_loss(m)) {
        generated
    } else if !assistant().any(|(_, m)| carries_loss(m)) {
        Vec::new()
    } else if conversation.one_generation_each(&generated) {
        generated.into_iter().zip(assistant()).filter(|(_, (_, m))| carries_loss(m)).map(|(span, _)| span).collect()
    } else {
        // Several marks in one turn, or none: those in the turns that carry loss.
        let turns = match turns() {
            Ok(turns) => turns,
            Err(MaskError::Prefix { .. } | MaskError::Reply { .. }) => return Err(uncertain),
            Err(e) => return Err(e),
        };
        let within = |mark: &Range<usize>| turns.iter().any(|turn| turn.start <= mark.start && mark.end <= turn.end);
        let touches = |mark: &Range<usize>| turns.iter().any(|turn| turn.start < mark.end && mark.start < turn.end);
        if generated.iter().any(|mark| touches(mark) && !within(mark)) {
            return Err(uncertain);
        }
        generated.into_iter().filter(within).collect()
    };
    if spans.is_empty() && assistant().any(|(_, m)| carries_loss(m)) {
        return Err(uncertain);
    }
    Ok(MaskedText { text, spans, access })
}

const PROMPTED: &str = "the conversation ends with its generation prompt";
const FOLLOWED: &str = "further messages follow";

/// A conversation and its rendering.
struct Conversation<'a> {
    template: &'a ChatTemplate,
    messages: &'a [Message],
    variables: &'a Map<String, Value>,
    text: &'a str,
}

impl Conversation<'_> {
    fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, TemplateError> {
        self.template.render_with(messages, self.variables, add_generation_prompt).map(|rendered| rendered.text)
    }

    /// The bytes of the assistant turn at index `i`, without its generation prompt.
    fn span(&self, i: usize) -> Result<Range<usize>, MaskError> {
        let turn = i + 1;
        let of_turn = |source| MaskError::Turn { turn, source };
        let last = turn == self.messages.len();
        let before = self.render(&self.messages[..i], true).map_err(of_turn)?;
        let after =
            if last { self.text.to_owned() } else { self.render(&self.messages[..turn], false).map_err(of_turn)? };
        if after.starts_with(&before) && self.text.starts_with(&after) {
            return Ok(before.len()..after.len());
        }
        if last {
            return Err(MaskError::Reply { turn });
        }
        let (mark, end) = self.marked_end(i, &after).ok_or(MaskError::Prefix { turn, when: FOLLOWED })?;
        let start = self.start(i, &before).filter(|start| *start <= mark);
        Ok(start.ok_or(MaskError::Prefix { turn, when: PROMPTED })?..end)
    }

    /// Where a turn that others follow begins. The generation prompt may go on with what the template writes only for the
    /// last turn, such as an empty think block: then the turn begins with its content.
    fn start(&self, i: usize, before: &str) -> Option<usize> {
        if self.text.starts_with(before) {
            return Some(before.len());
        }
        let base = self.render(&self.messages[..i], false).ok()?;
        let generation_prompt = before.strip_prefix(&base).filter(|prompt| !prompt.is_empty())?;
        let header_start = self.header_start(i, &base)?;
        if self.text[header_start..].starts_with(generation_prompt) {
            return Some(header_start + generation_prompt.len());
        }
        let mark = self.unused_character()?;
        let (_, content) = self.marked(i, with_content(&self.messages[i], mark.to_string()), mark)?;
        let header = self.text.get(header_start..content)?;
        (!header.is_empty() && generation_prompt.starts_with(header)).then_some(content)
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
        // Of two assistant turns in a row, the template may take the second for the continuation of the first.
        let previous = i.checked_sub(1).filter(|previous| !self.messages[*previous].is_assistant())?;
        self.marked_end(previous, base).map(|(_, end)| end)
    }

    /// Whether each assistant turn has the generation of its own number: a mark character in the turn's text is in that one and
    /// in no other, and nothing else changes.
    fn one_generation_each(&self, generated: &[Range<usize>]) -> bool {
        let turns = || self.messages.iter().enumerate().filter(|(_, m)| m.is_assistant());
        let Some(mark) = self.unused_character().filter(|_| turns().count() == generated.len()) else { return false };
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
        turns().enumerate().all(|(number, (i, turn))| {
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
        [Some(at_end), with_named_call(turn, mark)].into_iter().flatten().find_map(|marked| {
            let mut cut = self.messages[..i].to_vec();
            cut.push(marked.clone());
            let cut = self.render(&cut, false).ok()?;
            let rest = after.strip_prefix(&cut[..sole(&cut, mark)?])?;
            let (whole, at) = self.marked(i, marked, mark)?;
            let end = at + rest.len();
            let follows =
                self.text[at..].starts_with(rest) && whole[at + mark.len_utf8()..].ends_with(&self.text[end..]);
            follows.then_some((at, end))
        })
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
        ('\u{e000}'..='\u{f8ff}').rev().find(|c| !occurs(*c))
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

/// The loss mask of tokens with byte ranges `offsets`, for `spans` of bytes that carry loss; both ascending.
///
/// A token that straddles the edge of a span carries loss, so that every character of the reply is trained;
/// transformers decides the same for its generation masks. A token with an empty byte range carries loss if the byte
/// after it does. The first token of a sequence never carries loss, because no token precedes it.
pub(super) fn token_mask(offsets: &[(usize, usize)], spans: &[Range<usize>]) -> Vec<bool> {
    let mut spans = spans.iter().peekable();
    let carries = |(i, (start, end)): (usize, &(usize, usize))| {
        while spans.next_if(|s| s.end <= *start).is_some() {}
        // The next span ends after the token's first byte.
        i > 0 && spans.peek().is_some_and(|s| s.start < *end || (start == end && s.start <= *start))
    };
    offsets.iter().enumerate().map(carries).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>\n{% endif %}\
                         {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";
    const MARKED: &str = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>\
                          {% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}\
                          <assistant>{% endif %}";

    fn mask(source: &str, turns: &[(&str, &str, Option<bool>)]) -> Result<Vec<String>, MaskError> {
        let messages: Vec<_> =
            turns.iter().map(|(r, c, loss)| Message { loss: *loss, ..Message::new(*r, *c) }).collect();
        let masked = render_with_mask(&ChatTemplate::new(source, []).unwrap(), &messages, &Map::new())?;
        Ok(masked.spans.into_iter().map(|s| masked.text[s].to_owned()).collect())
    }

    #[test]
    fn replies_and_end_of_turn_tokens_carry_loss() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        assert_eq!(mask(PLAIN, &turns).unwrap(), ["a</s>\n", "b</s>\n"]);
        assert_eq!(mask(MARKED, &turns).unwrap(), ["a</s>", "b</s>"]);
        let mut without_first = turns;
        without_first[1].2 = Some(false);
        assert_eq!(mask(PLAIN, &without_first).unwrap(), ["b</s>\n"]);
        assert_eq!(mask(MARKED, &without_first).unwrap(), ["b</s>"]);
        // Two marks in a turn, and marks in the last turn only.
        let twice = MARKED.replace("{{ m.content }}</s>", "{{ m.content }}{% endgeneration %}-{% generation %}</s>");
        assert_eq!(mask(&twice, &turns).unwrap(), ["a", "</s>", "b", "</s>"]);
        assert_eq!(mask(&twice, &without_first).unwrap(), ["b", "</s>"]);
        let last = MARKED.replace("m.role == 'assistant'", "m.role == 'assistant' and loop.last");
        assert_eq!(mask(&last, &without_first).unwrap(), ["b</s>"]);
        without_first[3].2 = Some(false);
        assert_eq!(mask(&twice, &without_first).unwrap(), [""; 0]);
        without_first[1].2 = None;
        assert!(matches!(
            mask(&last, &without_first).unwrap_err(),
            MaskError::Marks { marks: 1, turns: 2 } | MaskError::Prefix { .. }
        ));
    }

    fn spans(source: &str, messages: &[Message]) -> Result<Vec<String>, MaskError> {
        let masked = render_with_mask(&ChatTemplate::new(source, []).unwrap(), messages, &Map::new())?;
        Ok(masked.spans.into_iter().map(|s| masked.text[s].to_owned()).collect())
    }

    #[test]
    fn marks_belong_to_the_turns_that_hold_them() {
        let turn = |content: &str, loss: Option<bool>, fields: serde_json::Value| Message {
            loss,
            fields: fields.as_object().cloned().unwrap(),
            ..Message::new("assistant", content)
        };
        let thoughts = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% if m.reasoning_content %}{% generation %}\
                        {{ m.reasoning_content }}{% endgeneration %}|{% endif %}{% if m.content %}{% generation %}{{ m.content }}\
                        {% endgeneration %}{% endif %}{% for c in m.tool_calls or [] %}({% generation %}{{ c.name }}{% endgeneration %})\
                        {% endfor %}</s>{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>\
                        {% endif %}";
        let user = || Message::new("user", "q");
        let call = serde_json::json!({"tool_calls": [{"name": "f"}]});
        for first in
            [turn("bad", Some(false), serde_json::json!({"reasoning_content": "why"})), turn("bad", Some(false), call)]
        {
            // As many marks as turns: two in the first turn, none in the second.
            let none = || turn("", None, serde_json::json!({}));
            let mut row = vec![user(), first, user(), none(), user(), turn("good", None, serde_json::json!({}))];
            assert_eq!(spans(thoughts, &row).unwrap(), ["good"]);
            row[1].loss = None;
            row[5].loss = Some(false);
            assert_eq!(spans(thoughts, &row).unwrap().len(), 2);
            // Where turns cannot be found either.
            let forgets = format!("{{{{ messages | length }}}}{thoughts}");
            let error = spans(&forgets, &row).unwrap_err();
            assert_eq!(error, MaskError::Marks { marks: 3, turns: 3 });
            assert!(error.to_string().contains("--chat-template"), "{error}");
        }
        // One mark in each turn, in a template that renders a prefix otherwise, or whose marks hold the header.
        let rows =
            [("user", "q", None), ("assistant", " a ", Some(false)), ("user", "r", None), ("assistant", "", None)];
        let counts = format!("{{{{ messages | length }}}}{MARKED}");
        assert_eq!(mask(&counts, &rows).unwrap(), ["</s>"]);
        let trims = counts.replace("{{ m.content }}</s>", "{{ m.content | trim }}</s>");
        assert_eq!(mask(&trims, &rows).unwrap(), ["</s>"]);
        let header = MARKED
            .replace(
                "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}",
                "\
            {% if m.role == 'assistant' %}{% generation %}<assistant>",
            )
            .replace("{% else %}", "{% else %}<{{ m.role }}>");
        assert_eq!(mask(&header, &rows).unwrap(), ["<assistant></s>"]);
        // Two marks, of which one holds the header.
        let twice = header.replace("</s>", "{% endgeneration %}{% generation %}</s>");
        let rows = [rows[0], rows[1], rows[2], ("assistant", "b", None)];
        assert_eq!(mask(&twice, &rows).unwrap_err(), MaskError::Marks { marks: 4, turns: 2 });
    }

    #[test]
    fn a_template_without_the_prefix_property_is_refused() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        let forgets =
            "{% for m in messages %}{% if loop.index0 > messages | length - 3 %}{{ m.content }}{% endif %}{% endfor %}";
        assert_eq!(mask(forgets, &turns).unwrap_err(), MaskError::Prefix { turn: 2, when: FOLLOWED });
        let differs =
            "{% for m in messages %}<{{ m.content }}>{% endfor %}{% if add_generation_prompt %}<think>{% endif %}";
        let error = mask(differs, &turns[..2]).unwrap_err();
        assert_eq!(error, MaskError::Reply { turn: 2 });
        let text = error.to_string();
        assert!(
            text.contains("--chat-template") && text.contains("remove the thoughts") && !text.contains("loss"),
            "{text}"
        );
        let marks_none = format!("{{% if false %}}{{% generation %}}{{% endgeneration %}}{{% endif %}}{PLAIN}");
        assert_eq!(mask(&marks_none, &turns).unwrap_err(), MaskError::Marks { marks: 0, turns: 2 });
        let fails =
            format!("{{{{ messages[0].content[0] ~ raise_exception('no') if messages | length == 1 }}}}{PLAIN}");
        assert_eq!(
            mask(&fails, &turns).unwrap_err().to_string(),
            "message 2: the chat template failed: no (line 1 of the template)"
        );
    }

    /// Writes an empty think block into the last turn, calls, and a trimmed content.
    const LAST: &str = "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% if loop.last %}<think></think>{% endif %}\
                        {{ m.content | trim }}{% for c in m.tool_calls or [] %}({{ c.name }} {{ c.x }}){% endfor %}</s>\n{% else %}\
                        {{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

    #[test]
    fn a_turn_is_found_where_the_template_writes_more_into_the_last_one() {
        let turns = [("user", "q", None), ("assistant", " a ", None), ("user", "r", None), ("assistant", "", None)];
        assert_eq!(mask(LAST, &turns[..2]).unwrap(), ["<think></think>a</s>\n"]);
        assert_eq!(mask(LAST, &turns).unwrap(), ["a</s>\n", "<think></think></s>\n"]);
        // Of two in a row the second has no text before it that ends with the generation prompt.
        let doubled = [&turns[..2], &turns[1..]].concat();
        assert_eq!(mask(LAST, &doubled).unwrap_err(), MaskError::Prefix { turn: 3, when: PROMPTED });
        // A template that writes no content beside calls.
        let calls = LAST.replace("{{ m.content | trim }}", "{{ m.content | trim if not m.tool_calls }}");
        let mut messages = vec![Message::new("user", "q"), Message::new("assistant", "x"), Message::new("user", "r")];
        messages[1]
            .fields
            .insert("tool_calls".into(), serde_json::json!([{"name": "f", "x": 1}, {"name": "g", "x": 2}]));
        messages.push(Message::new("assistant", "y"));
        let masked = render_with_mask(&ChatTemplate::new(&calls, []).unwrap(), &messages, &Map::new()).unwrap();
        let spans: Vec<_> = masked.spans.into_iter().map(|span| &masked.text[span]).collect();
        assert_eq!(spans, ["(f 1)(g 2)</s>\n", "<think></think>y</s>\n"]);
    }

    /// Writes thoughts, or an empty think block, only into turns after the last request.
    const LAST_THOUGHTS: &str = "{% set ns = namespace(request=0) %}{% for m in messages %}{% if m.role == 'user' %}\
                                 {% set ns.request = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}<{{ m.role }}>\
                                 {% if m.role == 'assistant' %}{% if loop.index0 > ns.request and (loop.last or m.thinking) %}\
                                 <think>{{ m.thinking }}</think>{% endif %}{{ m.content }}{% for c in m.tool_calls or [] %}({{ c.name }})\
                                 {% endfor %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}{% if add_generation_prompt %}\
                                 <assistant>{% if quick %}<think></think>{% endif %}{% endif %}";

    #[test]
    fn a_turn_is_found_after_turns_whose_thoughts_are_left_out() {
        let call = serde_json::json!([{"name": "f"}]);
        let mut step = Message::new("assistant", "");
        step.fields.insert("tool_calls".into(), call);
        step.fields.insert("thinking".into(), "why".into());
        let turn = |role: &str, content: &str| Message::new(role, content);
        let answer = || turn("tool", "42 ");
        let row = vec![
            turn("user", "q"),
            step.clone(),
            answer(),
            step.clone(),
            answer(),
            turn("assistant", "it is 42"),
            turn("user", "r"),
            step,
            answer(),
            turn("assistant", "a"),
        ];
        let want =
            ["(f)</s>\n", "(f)</s>\n", "it is 42</s>\n", "<think>why</think>(f)</s>\n", "<think></think>a</s>\n"];
        assert_eq!(spans(LAST_THOUGHTS, &row).unwrap(), want);
        // The generation prompt goes on with what is only in the last turn.
        let quick = |template: &str, row: &[Message]| -> Result<Vec<String>, MaskError> {
            let variables = serde_json::json!({"quick": true}).as_object().cloned().unwrap();
            let masked = render_with_mask(&ChatTemplate::new(template, []).unwrap(), row, &variables)?;
            Ok(masked.spans.into_iter().map(|s| masked.text[s].to_owned()).collect())
        };
        let short = [&row[..7], &row[9..]].concat();
        assert_eq!(quick(LAST_THOUGHTS, &short).unwrap(), [&want[..3], &["a</s>\n"]].concat());
        assert_eq!(quick(LAST_THOUGHTS, &row).unwrap_err(), MaskError::Prefix { turn: 8, when: PROMPTED });
        // The reply with thoughts that the generation prompt rules out.
        assert_eq!(quick(LAST_THOUGHTS, &row[..2]).unwrap_err(), MaskError::Reply { turn: 2 });
        for (from, to) in [
            // Another text before the first turn, another end of the turn before, or another header.
            ("{% for m in messages %}<{{ m.role }}>", "{{ messages | length }}{% for m in messages %}<{{ m.role }}>"),
            ("</s>\n", "{% if m.role == 'tool' and loop.last %}</t>{% else %}</s>{% endif %}\n"),
            ("<{{ m.role }}>", "<{{ m.role }}{{ '!' if loop.index0 < ns.request }}>"),
        ] {
            let source = LAST_THOUGHTS.replace(from, to);
            assert_ne!(source, LAST_THOUGHTS);
            let error = spans(&source, &row).unwrap_err();
            assert!(matches!(error, MaskError::Prefix { turn: 2 | 4, .. }), "{to}: {error}");
        }
    }

    #[test]
    fn a_turn_that_cannot_be_found_for_certain_is_refused() {
        let turns = [("user", "q", None), ("assistant", "a", None), ("user", "r", None), ("assistant", "b", None)];
        for (from, to) in [
            // Another end, another content, or another text before the turn, once others follow.
            ("</s>\n", "{% if loop.last %}</s>{% else %}</t>{% endif %}\n"),
            ("{{ m.content | trim }}", "{{ m.content | trim if loop.last else m.content | upper ~ '!' }}"),
            ("{{ m.content | trim }}", "{{ m.content ~ m.content }}"),
            ("{% for m in messages %}<", "{{ messages | length }}{% for m in messages %}<"),
            ("{% for m in messages %}<", "{{ messages[1].content if messages | length > 1 }}{% for m in messages %}<"),
            // The text after the turn depends on the turn.
            (
                "{{ m.content }}{% endif %}",
                "{{ m.content }}{{ messages[1].content | length if loop.index == 3 }}{% endif %}",
            ),
        ] {
            let source = LAST.replace(from, to);
            assert_ne!(source, LAST);
            let error = mask(&source, &turns).unwrap_err();
            assert!(matches!(error, MaskError::Prefix { turn: 2, .. }), "{to}: {error}");
        }
    }

    #[test]
    fn tokens_at_the_edges_of_spans() {
        let offsets = [(0, 2), (2, 5), (5, 5), (5, 6), (6, 8), (8, 8), (8, 9)];
        let tokens = |spans: &[(usize, usize)]| {
            let spans: Vec<_> = spans.iter().map(|(start, end)| *start..*end).collect();
            let mask = token_mask(&offsets, &spans);
            (0..offsets.len()).filter(|i| mask[*i]).collect::<Vec<_>>()
        };
        assert_eq!(tokens(&[(5, 8)]), [2, 3, 4]);
        assert_eq!(tokens(&[(4, 7)]), [1, 2, 3, 4]);
        assert_eq!(tokens(&[(6, 6)]), [0_usize; 0]);
        assert_eq!(tokens(&[(0, 9)]), [1, 2, 3, 4, 5, 6]);
        assert_eq!(tokens(&[(2, 5), (8, 9)]), [1, 5, 6]);
        assert_eq!(tokens(&[]), [0_usize; 0]);
    }

    proptest! {
        #[test]
        fn a_mask_is_as_long_as_its_tokens_and_covers_its_spans(
            lengths in prop::collection::vec(0_usize..4, 0..30),
            cuts in prop::collection::btree_set(0_usize..60, 0..8),
        ) {
            let mut offsets = vec![];
            let mut at = 0;
            for n in lengths {
                offsets.push((at, at + n));
                at += n;
            }
            let cuts: Vec<_> = cuts.into_iter().collect();
            let spans: Vec<_> = cuts.chunks_exact(2).map(|c| c[0]..c[1]).collect();
            let mask = token_mask(&offsets, &spans);
            prop_assert_eq!(mask.len(), offsets.len());
            for (i, (start, end)) in offsets.into_iter().enumerate() {
                let wanted = if start == end {
                    spans.iter().any(|s| s.contains(&start))
                } else {
                    (start..end).any(|byte| spans.iter().any(|s| s.contains(&byte)))
                };
                prop_assert_eq!(mask[i], wanted && i > 0, "token {} {}..{}", i, start, end);
            }
        }

        #[test]
        fn turns_of_any_text_are_found_where_the_last_one_has_more(texts in prop::collection::vec("[a<>/s\u{f8ff}\u{f8fe} \n]{0,9}", 1..7)) {
            let roles = ["user", "assistant"];
            let mut turns: Vec<_> = texts.iter().enumerate().map(|(i, t)| (roles[i % 2], t.as_str(), None)).collect();
            if turns.len() % 2 == 1 {
                turns.push(("assistant", "end", None));
            }
            let mut want: Vec<_> = turns.iter().skip(1).step_by(2).map(|turn| format!("{}</s>\n", turn.1.trim())).collect();
            if let Some(last) = want.last_mut() {
                last.insert_str(0, "<think></think>");
            }
            prop_assert_eq!(mask(LAST, &turns).unwrap(), want);
        }

        #[test]
        fn the_prefix_rule_holds_for_any_text(texts in prop::collection::vec(".{0,12}", 1..7)) {
            let roles = ["user", "assistant"];
            let turns: Vec<_> = texts.iter().enumerate().map(|(i, t)| (roles[i % 2], t.as_str(), None)).collect();
            let want: Vec<_> = texts.iter().skip(1).step_by(2).map(|t| format!("{t}</s>\n")).collect();
            prop_assert_eq!(mask(PLAIN, &turns).unwrap(), want);
        }
    }
}
