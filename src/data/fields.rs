//! The fields of rows and turns: which ones moewarden knows, which ones it gives to the chat template, and what becomes of
//! the others. A field that changes what the model sees or learns is used or refused; one that nothing reads is counted.

use serde_json::{Map, Value};

use super::message::Message;
use super::python_literal;
use super::rows::kind_of;
use super::template::{ChatTemplate, Reads};
use super::turns::WRITTEN;
use super::values::{Result, is_empty, name_of, present, text};

/// Fields of a row that hold a system turn for its turns.
const SYSTEM: [&str; 3] = ["system", "system_prompt", "system_message"];
/// Fields of a row that chat templates read as variables of the same name.
const VARIABLES: [&str; 2] = ["tools", "documents"];
const KWARGS: &str = "chat_template_kwargs";
/// Variables that moewarden itself gives to chat templates.
pub const OWN_VARIABLES: [&str; 2] = ["messages", "add_generation_prompt"];
/// Fields of a row that change what the model sees or learns, and that no kind of row can use.
const REFUSED: [(&str, &str); 12] = [
    ("images", "only text is supported; remove the row"),
    ("image", "only text is supported; remove the row"),
    ("audios", "only text is supported; remove the row"),
    ("audio", "only text is supported; remove the row"),
    ("videos", "only text is supported; remove the row"),
    ("video", "only text is supported; remove the row"),
    ("functions", "write them as tools: [{\"type\": \"function\", \"function\": ...}]"),
    ("function_call", "write it as tool_calls of a turn"),
    ("history", "write its turns as the first ones of the conversation"),
    ("train_on_turn", "write loss: true or false in its turns"),
    ("system_instruction", "write it as system"),
    ("weight", "all rows have the same weight; remove the field, or repeat the row"),
];

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

/// Refuses fields that would change what the model sees or learns.
pub(super) fn refuse_unsupported(row: &Map<String, Value>) -> Result<()> {
    for (name, why) in REFUSED {
        match present(row, name) {
            None => {}
            Some(weight) if name == "weight" && (weight.as_f64() == Some(1.0) || weight.as_bool() == Some(true)) => {}
            Some(_) => return Err(format!("the field {name} of a row is not supported: {why}")),
        }
    }
    Ok(())
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

/// Puts the system text of a row in front of its turns, unless they begin with the same one.
pub(super) fn with_system(row: &Map<String, Value>, mut turns: Vec<Message>) -> Result<Vec<Message>> {
    let Some((name, text)) = system(row)? else { return Ok(turns) };
    match turns.iter().find(|turn| ["system", "developer"].contains(&turn.role.as_str())) {
        Some(own) if own.content.trim() == text.trim() => {}
        Some(_) => return Err(format!("a system turn beside the field {name}, and they differ; keep one of them")),
        None => turns.insert(0, Message::added("system", text, "from the row's system field")),
    }
    Ok(turns)
}

/// The variables that a row gives to the chat template: `tools`, `documents`, and those of `chat_template_kwargs`.
pub(super) fn variables(row: &Map<String, Value>) -> Result<Map<String, Value>> {
    let mut variables = Map::new();
    for name in VARIABLES {
        match structure(row, name)? {
            None => {}
            Some(list @ Value::Array(_)) => _ = variables.insert(name.to_owned(), list),
            Some(other) => return Err(format!("{name} should be a list, not {}", kind_of(&other))),
        }
    }
    match structure(row, KWARGS)? {
        None => {}
        Some(Value::Object(given)) => {
            for (name, value) in given {
                let twice = variables.get(&name).is_some_and(|other| *other != value);
                if OWN_VARIABLES.contains(&name.as_str()) || twice {
                    return Err(format!("{KWARGS} gives {}, which the row itself decides", name_of(&name)));
                }
                // null is a value here: it is how a table with one schema for all rows leaves a variable out.
                if !value.is_null() {
                    variables.insert(name, value);
                }
            }
        }
        Some(other) => return Err(format!("{KWARGS} should be an object, not {}", kind_of(&other))),
    }
    Ok(variables)
}

/// The value of a field, or the structure that its text holds in JSON or Python notation; `None` if it is empty.
fn structure(row: &Map<String, Value>, name: &str) -> Result<Option<Value>> {
    let value = match text(row, name) {
        Ok(Some(text)) => python_literal::parse(text)
            .map_err(|e| format!("{name} is a string that is not JSON or Python notation: {e}"))?,
        Ok(None) => return Ok(None),
        Err(_) => row[name].clone(), // no text
    };
    Ok(Some(value).filter(|value| !is_empty(value)))
}

/// Names of a row's fields that hold something and are not `used` by its kind.
pub(super) fn unused(row: &Map<String, Value>, used: &[&str]) -> Vec<String> {
    let common = |name: &str| VARIABLES.contains(&name) || name == KWARGS || name == "weight";
    let unused = row.keys().filter(|name| !used.contains(&name.as_str()) && !common(name));
    unused.filter(|name| present(row, name).is_some()).cloned().collect()
}

/// Checks the fields of a row against the variables of the template. Returns the names of those that nothing reads.
pub(super) fn check_row(
    variables: &Map<String, Value>,
    unused: &[String],
    template: &ChatTemplate,
) -> Result<Vec<String>> {
    if let Some(name) = variables.keys().find(|name| !template.reads_variable(name)) {
        return Err(format!(
            "the row gives {} for the chat template, which does not read it, so that it would be dropped: remove it, or give a \
             template that reads it with --chat-template",
            name_of(name)
        ));
    }
    if let Some(name) = unused.iter().find(|name| template.reads_variable(name)) {
        let name = name_of(name);
        return Err(format!(
            "the chat template reads the variable {name}, and the row has a field of that name: write it as {KWARGS}: {{\"{name}\": \
             ...}}, or remove it"
        ));
    }
    Ok(unused.iter().map(|name| name_of(name)).collect())
}

/// Checks the fields of turns against what a rendering read of them. Returns the names of those that nothing read.
pub(super) fn check_turns(turns: &[Message], reads: &[Reads], template: &ChatTemplate) -> Result<Vec<String>> {
    let mut unread = Vec::new();
    for (i, (turn, reads)) in turns.iter().zip(reads).enumerate() {
        for name in turn.fields.keys().filter(|name| !reads.has(name)) {
            // A template that mentions the field decides itself in which turns it writes it.
            if WRITTEN.contains(&name.as_str()) && !template.mentions(name) {
                return Err(format!(
                    "message {}: the chat template does not write {name}, so that it would be dropped: remove it, or give a template \
                     that writes it with --chat-template",
                    i + 1
                ));
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
