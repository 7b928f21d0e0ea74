//! The fields of rows and turns: which ones moewarden knows, which ones it gives to the chat template, and what becomes of
//! the others. A field that changes what the model sees or learns is used or refused; one that nothing reads is counted.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::message::{Form, Message, SYSTEM_OF_GOAL};
use super::python_literal;
use super::template::{ChatTemplate, Reads, TemplateError};
use super::turns::{OF_THE_LOSS, WRITTEN, has_word, is_known};
use super::values::kind_of;
use super::values::{Result, check_objects, filled, is_blank, is_empty, misspelled, name_of, text, without_nulls};
use crate::input::no_text_in;

/// Fields of a row that hold a system turn for its turns.
const SYSTEM: [&str; 3] = ["system", "system_prompt", "system_message"];
/// Fields of a row that chat templates read as variables of the same name.
const VARIABLES: [&str; 2] = ["tools", "documents"];
const KWARGS: &str = "chat_template_kwargs";
/// Variables that moewarden itself gives to chat templates.
pub const OWN_VARIABLES: [&str; 2] = ["messages", "add_generation_prompt"];
const ONLY_TEXT: &str = "only text is supported; remove the row";
const IN_ITS_TURN: &str = "write it as a field of the turn that it belongs to";
const MARK_TURNS: &str = "write loss: true or false in its turns";
const ONE_REPLY: &str = "a row has one reply: write that as its last turn";
const AS_SYSTEM: &str = "write it as system";
/// Fields of a row that change what the model sees or learns, and that no kind of row can use.
const REFUSED: [(&str, &str); 43] = [
    ("images", ONLY_TEXT),
    ("image", ONLY_TEXT),
    ("audios", ONLY_TEXT),
    ("audio", ONLY_TEXT),
    ("videos", ONLY_TEXT),
    ("video", ONLY_TEXT),
    ("functions", "write them as tools: [{\"type\": \"function\", \"function\": ...}]"),
    ("function_call", "write it as tool_calls of a turn"),
    ("tool_calls", IN_ITS_TURN),
    ("reasoning_content", IN_ITS_TURN),
    ("reasoning", IN_ITS_TURN),
    ("thinking", IN_ITS_TURN),
    ("history", "write its turns as the first ones of the conversation"),
    ("context", "write it into the turn that it belongs to"),
    ("developer", "write it as a turn with the role developer"),
    ("instructions", AS_SYSTEM),
    ("system_instruction", AS_SYSTEM),
    ("system_instructions", AS_SYSTEM),
    ("chat_template", "all rows have one template: give it with --chat-template"),
    ("continue_final_message", "a reply is learnt whole, with what ends it; remove the field"),
    ("add_generation_prompt", "moewarden renders a row with and without it; remove the field"),
    ("prefix", "write it as the beginning of the turn that it belongs to"),
    ("prefill", "write it as the beginning of the turn that it belongs to"),
    ("chosen", ONE_REPLY),
    ("rejected", ONE_REPLY),
    ("train_on_turn", MARK_TURNS),
    ("train_on_inputs", "give --loss-on all, or mark turns with loss: true or false"),
    ("loss", MARK_TURNS),
    ("train", MARK_TURNS),
    ("training", MARK_TURNS),
    ("loss_mask", MARK_TURNS),
    ("mask", MARK_TURNS),
    ("loss_scale", MARK_TURNS),
    ("loss_weights", MARK_TURNS),
    ("train_on_prompt", "give --loss-on all, or mark turns with loss: true or false"),
    ("train_on_input", "give --loss-on all, or mark turns with loss: true or false"),
    ("reasoning_details", IN_ITS_TURN),
    ("thinking_blocks", IN_ITS_TURN),
    ("thoughts", IN_ITS_TURN),
    ("thought", IN_ITS_TURN),
    ("loss_weight", "all rows have the same weight; remove the field, or repeat the row"),
    ("sample_weight", "all rows have the same weight; remove the field, or repeat the row"),
    ("weight", "all rows have the same weight; remove the field, or repeat the row"),
];
/// Of these, the ones that say nothing with the value 1 or true, or with false.
const SAY_NOTHING_WITH_ONE: [&str; 6] = ["weight", "sample_weight", "loss_weight", "loss", "train", "training"];
const SAY_NOTHING_WITH_FALSE: [&str; 5] =
    ["continue_final_message", "add_generation_prompt", "train_on_inputs", "train_on_input", "train_on_prompt"];

/// The fields that each kind of row uses.
pub(super) const ATTACK_FIELDS: &[&str] = &[
    "all_prompt",
    "goal",
    "prompt",
    "attack_prompt",
    "inception_attack",
    "judge_success_gpt4",
    "inception_attack_score",
    "judge_result",
    "refusal_response",
];
pub(super) const CHAT_FIELDS: &[&str] = &[
    "label",
    "response",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "refusal_response",
    "system",
    "system_prompt",
    "system_message",
];
pub(super) const PAIR_FIELDS: &[&str] =
    &["safe_messages", "unsafe_messages", "response", "refusal_response", "system", "system_prompt", "system_message"];

pub(super) const QUESTION_FIELDS: &[&str] =
    &["id", "messages", "question", "prompt", "choices", "answer", "system", "system_prompt", "system_message"];

/// Refuses bytes that are no text in the fields that are read: those of the row's kind, and of them, in turns, the known ones.
pub(super) fn refuse_bytes(row: &Map<String, Value>, used: &[&str]) -> Result<()> {
    let read = |name: &str| used.contains(&name) || VARIABLES.contains(&name) || name == KWARGS;
    match row.iter().filter(|(name, _)| read(name)).find_map(|(_, value)| bytes_of_field(value)) {
        Some(column) => {
            Err(format!("the column {} holds bytes that are no text in UTF-8: write it as text", name_of(column)))
        }
        None => Ok(()),
    }
}

fn bytes_of_field(value: &Value) -> Option<&str> {
    match value {
        Value::Array(items) => items.iter().find_map(bytes_of_item),
        other => no_text_in(other),
    }
}

fn bytes_of_item(value: &Value) -> Option<&str> {
    match value {
        Value::Object(turn) if turn.contains_key("role") || turn.contains_key("from") => {
            turn.iter().filter(|(name, _)| is_known(name)).find_map(|(_, value)| no_text_in(value))
        }
        other => no_text_in(other),
    }
}

/// Refuses fields that would change what the model sees or learns, and the `used` ones in another spelling.
pub(super) fn refuse_unsupported(row: &Map<String, Value>, used: &[&str]) -> Result<()> {
    let is_refused = |name: &str| REFUSED.iter().any(|(other, _)| *other == name);
    let is_read =
        |name: &str| used.contains(&name) || SYSTEM.contains(&name) || VARIABLES.contains(&name) || name == KWARGS;
    if let Some((name, known)) = misspelled(row, |name| is_read(name) || is_refused(name)) {
        return Err(format!("the field {} of a row is unknown, unlike {known}: rename or remove it", name_of(name)));
    }
    let says_nothing = |name: &str, value: &Value| {
        let one = value.as_f64() == Some(1.0) || value.as_bool() == Some(true);
        let is_false = value.as_bool() == Some(false);
        one && SAY_NOTHING_WITH_ONE.contains(&name) || is_false && SAY_NOTHING_WITH_FALSE.contains(&name)
    };
    match REFUSED.iter().find(|(name, _)| filled(row, name).is_some_and(|value| !says_nothing(name, value))) {
        Some((name, why)) => Err(format!("the field {name} of a row is not supported: {why}")),
        None => Ok(()),
    }
}

/// The system text of a row, and its field.
pub(super) fn system(row: &Map<String, Value>) -> Result<Option<(&'static str, &str)>> {
    let mut found: Option<(&str, &str)> = None;
    for name in SYSTEM {
        match (text(row, name)?, found) {
            (Some(text), Some((other, before))) if text != before => {
                return Err(format!("{other} and {name} differ; keep one"));
            }
            (Some(text), None) => found = Some((name, text)),
            _ => {}
        }
    }
    Ok(found)
}

/// Puts the system text of a row in front of its turns, unless they begin with the same one. A system turn further down is
/// another one.
pub(super) fn with_system(row: &Map<String, Value>, mut turns: Vec<Message>) -> Result<Vec<Message>> {
    let Some((name, text)) = system(row)? else { return Ok(turns) };
    match turns.first().filter(|turn| ["system", "developer"].contains(&turn.role.as_str())) {
        Some(own) if own.content.trim() == text.trim() => {}
        Some(own) => {
            return Err(format!(
                "the first turn, of the role {}, and the field {name} differ; keep one of them",
                own.role
            ));
        }
        None => turns.insert(0, Message::added("system", text, "from the row's system field")),
    }
    Ok(turns)
}

/// The variables that a row gives to the chat template: `tools`, `documents`, and those of `chat_template_kwargs`. `nulls` gets
/// the names of those without what was null in them.
pub(super) fn variables(row: &Map<String, Value>, nulls: &mut BTreeSet<String>) -> Result<Map<String, Value>> {
    let mut variables = Map::new();
    for name in VARIABLES {
        if let Some(value) = structure(row, name, nulls)? {
            check_list(name, &value)?;
            variables.insert(name.to_owned(), value);
        }
    }
    match structure(row, KWARGS, nulls)? {
        None => {}
        Some(Value::Object(given)) => {
            for (name, value) in given.into_iter().filter(|(name, value)| !is_missing(name, value)) {
                let twice = variables.get(&name).is_some_and(|other| *other != value);
                if OWN_VARIABLES.contains(&name.as_str()) || twice {
                    return Err(format!("{KWARGS} gives {}, which the row itself decides", name_of(&name)));
                }
                if VARIABLES.contains(&name.as_str()) {
                    check_list(&name, &value)?;
                }
                variables.insert(name, value);
            }
        }
        Some(other) => return Err(format!("{KWARGS} should be an object, not {}", kind_of(&other))),
    }
    Ok(variables)
}

/// Checks the value of tools or documents: a list of objects, as transformers takes it.
fn check_list(name: &str, value: &Value) -> Result<()> {
    match value {
        Value::Array(list) => check_objects(list, name, "item"),
        other => Err(format!("{name} should be a list, not {}", kind_of(other))),
    }
}

/// Whether a variable of `chat_template_kwargs` is none: null, or empty tools or documents, as the fields of these names.
pub(super) fn is_missing(name: &str, value: &Value) -> bool {
    value.is_null() || VARIABLES.contains(&name) && is_empty(value)
}

/// The value of a field, or the structure that its text holds in JSON or Python notation; `None` if it is empty.
fn structure(row: &Map<String, Value>, name: &str, nulls: &mut BTreeSet<String>) -> Result<Option<Value>> {
    let value = match text(row, name) {
        Ok(Some(text)) => python_literal::parse(text)
            .map_err(|e| format!("{name} is a string that is not JSON or Python notation: {e}"))?,
        Ok(None) => return Ok(None),
        Err(_) => row[name].clone(), // no text
    };
    let cleaned = without_nulls(value.clone());
    if cleaned != value {
        nulls.insert(name.to_owned());
    }
    Ok(Some(cleaned).filter(|value| !is_empty(value)))
}

/// Names of a row's fields that hold something and are not `used` by its kind.
pub(super) fn unused(row: &Map<String, Value>, used: &[&str]) -> Vec<String> {
    let refused = |name: &str| REFUSED.iter().any(|(other, _)| *other == name);
    let common = |name: &str| VARIABLES.contains(&name) || name == KWARGS || refused(name);
    let unused = row.keys().filter(|name| !used.contains(&name.as_str()) && !common(name));
    unused.filter(|name| filled(row, name).is_some()).cloned().collect()
}

/// Checks a row's fields against the variables that its renderings read: `own` are those of the row, `unused` fields that
/// moewarden does not use. Returns the names of those that nothing reads.
pub(super) fn check_row<'a>(
    mut own: impl Iterator<Item = &'a str>,
    unused: &[String],
    read: &BTreeSet<String>,
    template: &ChatTemplate,
) -> Result<Vec<String>> {
    // A template that names the variable decides itself in which conversations it reads it.
    if let Some(name) = own.find(|name| !read.contains(*name) && !template.reads_variable(name)) {
        return Err(format!(
            "the row gives {} for the chat template, which does not read it, so that it would be dropped: remove it, or give a \
             template that reads it with --chat-template",
            name_of(name)
        ));
    }
    if let Some(name) = unused.iter().find(|name| read.contains(*name) && !template.is_function(name)) {
        let name = name_of(name);
        return Err(format!(
            "the chat template reads the variable {name}, and the row has a field of that name: write it as {KWARGS}: {{\"{name}\": \
             ...}}, or remove it"
        ));
    }
    if let Some(name) = unused.iter().find(|name| has_word(name, &OF_THE_LOSS)) {
        return Err(format!("{} is not supported: {MARK_TURNS}; or remove the field", name_of(name)));
    }
    Ok(unused.iter().map(|name| name_of(name)).collect())
}

fn not_written(turn: usize, name: &str) -> String {
    format!(
        "message {turn}: the chat template does not write {name}, so that it would be dropped: remove it, or give a template that \
         writes it with --chat-template"
    )
}

/// Checks the fields of turns against what a rendering read of them. Returns the names of those that nothing read.
pub(super) fn check_turns(turns: &[Message], reads: &[Reads], template: &ChatTemplate) -> Result<Vec<String>> {
    let mut unread = Vec::new();
    for (i, (turn, reads)) in turns.iter().zip(reads).enumerate() {
        for name in turn.fields.keys().filter(|name| !reads.has(name)) {
            // A template that names the field decides itself in which turns it writes it.
            if WRITTEN.contains(&name.as_str()) && !template.names_field(name) {
                return Err(not_written(i + 1, name));
            }
            unread.push(format!("{name} of a turn"));
        }
        for name in &turn.unknown {
            if reads.has(name) {
                return Err(format!(
                    "message {}: the chat template reads the field {} of a turn, which moewarden does not know: rename or remove it, \
                     or give another template with --chat-template",
                    i + 1,
                    name_of(name)
                ));
            }
            unread.push(format!("{} of a turn", name_of(name)));
        }
    }
    Ok(unread)
}

/// Names of fields of turns before the last `reply` turn that a rendering read and left out of its text, such as the thoughts of
/// earlier turns.
pub(super) fn left_out(
    turns: &[Message],
    reply: bool,
    reads: &[Reads],
    text: &str,
    render: impl Fn(&[Message]) -> std::result::Result<String, TemplateError>,
) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for (i, turn) in turns[..turns.len() - usize::from(reply)].iter().enumerate() {
        let read = |name: &&String| WRITTEN.contains(&name.as_str()) && reads[i].has(name);
        for name in turn.fields.keys().filter(read) {
            if !names.contains(name) && render(&without(turns, i, &turn.fields[name])).is_ok_and(|other| other == text)
            {
                names.insert(name.clone());
            }
        }
    }
    names
}

/// The turns without a value of the turn at index `i`, under each of its names: the template writes one of them.
fn without(turns: &[Message], i: usize, value: &Value) -> Vec<Message> {
    let mut without = turns.to_vec();
    without[i].fields.retain(|_, other| other != value);
    without
}

/// Whether a template may have left a turn out: of a role that not all templates write, or a reply further up. Of many turns of tools, or
/// of the assistant, the first stands for all.
fn may_be_dropped(turns: &[Message], i: usize, turn: &Message) -> bool {
    let is_first = || turns[..i].iter().all(|other| other.role != turn.role);
    let by_role = match turn.role.as_str() {
        "system" | "developer" => true,
        "tool" => is_first(),
        // The last one is the reply, and of one without a text a template may leave the thoughts out.
        "assistant" => is_first() && i + 1 < turns.len() && !is_blank(&turn.content),
        _ => false,
    };
    // What moewarden itself adds to the request of an attack is none of the row's.
    by_role && !turn.is_blank() && turn.origin != Some(SYSTEM_OF_GOAL)
}

/// Checks that the text of a conversation would be another one without the row's tools and documents, its turns of roles that not
/// all templates write and, with `reply`, without the fields of the last turn: a template may read a field and not write it.
pub(super) fn check_written(
    turns: &[Message],
    reply: bool,
    variables: &Map<String, Value>,
    text: &str,
    template: &ChatTemplate,
    render: impl Fn(&[Message], &Map<String, Value>) -> std::result::Result<String, TemplateError>,
) -> Result<()> {
    // Those that the template nowhere reads are the row's error.
    let read = |name: &&str| variables.contains_key(*name) && template.reads_variable(name);
    for name in VARIABLES.into_iter().filter(read) {
        let mut others = variables.clone();
        others.shift_remove(name);
        if render(turns, &others).is_ok_and(|other| other == text) {
            return Err(format!(
                "the chat template writes nothing of {name} in this conversation, so that they would be dropped: remove them, or give \
                 a template that writes them with --chat-template"
            ));
        }
    }
    for (i, turn) in turns.iter().enumerate().filter(|(i, turn)| may_be_dropped(turns, *i, turn)) {
        let mut others = turns.to_vec();
        // A reply further up may lose its thoughts, or all but a part, but not all of its text.
        let other = match turn.is_assistant() {
            true => if turn.content.starts_with('x') { "y" } else { "x" }.to_owned(),
            false => format!("{} {}", turn.content, turn.content),
        };
        others[i] = Message { content: other, form: Form::Text, ..turn.clone() };
        if render(&others, variables).is_ok_and(|other| other == text) {
            return Err(format!(
                "message {}: the chat template writes nothing of a turn with the role {} here, so that it would be dropped: remove the turn, \
                 write its text into the user's turn, or give a template that writes it with --chat-template",
                i + 1,
                turn.role
            ));
        }
    }
    let Some(last) = turns.last().filter(|_| reply) else { return Ok(()) };
    for (name, value) in last.fields.iter().filter(|(name, _)| WRITTEN.contains(&name.as_str())) {
        if render(&without(turns, turns.len() - 1, value), variables).is_ok_and(|other| other == text) {
            return Err(not_written(turns.len(), name));
        }
    }
    Ok(())
}
