//! Values of fields, and how messages show them.

use serde_json::{Map, Value};

use crate::quote;

pub(super) type Result<T, E = String> = std::result::Result<T, E>;

/// The kind of a JSON value, for error messages.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

/// The value of a field; `None` if it is missing or empty.
pub(super) fn present<'a>(row: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    row.get(name).filter(|value| !is_empty(value))
}

/// The value of a field; `None` if it is missing, empty or a blank text.
pub(super) fn filled<'a>(row: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    present(row, name).filter(|value| !value.as_str().is_some_and(is_blank))
}

/// Whether a value is null, `""`, `[]` or `{}`.
pub(super) fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::Bool(_) | Value::Number(_) => false,
    }
}

/// A structure without the fields of objects that are null. A table has one schema for all rows, and null where a row lacks a
/// field; so null and absent are the same, as they are for the row's own fields. A null in a list stays.
pub(super) fn without_nulls(value: Value) -> Value {
    match value {
        Value::Array(items) => items.into_iter().map(without_nulls).collect(),
        Value::Object(map) => {
            let fields = map.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(fields.map(|(name, value)| (name, without_nulls(value))).collect())
        }
        other => other,
    }
}

/// Whether a text shows nothing: white space, control characters, and characters without a width, such as U+200B, that Unicode
/// lists as `Default_Ignorable_Code_Point`.
pub fn is_blank(text: &str) -> bool {
    let ignorable = |c: char| {
        matches!(c, '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}' | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fff8}' | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}')
    };
    text.chars().all(|c| c.is_whitespace() || c.is_control() || ignorable(c))
}

/// The text of a field; `None` if it is missing or blank.
pub(super) fn text<'a>(row: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>> {
    filled(row, name).map(|value| string(value, name)).transpose()
}

/// Checks that a list holds objects, none of them empty; `item` is what one of them is called.
pub(super) fn check_objects(list: &[Value], name: &str, item: &str) -> Result<()> {
    match list.iter().position(|value| !value.is_object() || is_empty(value)) {
        Some(i) => {
            let kind = if list[i].is_object() { "an empty one" } else { kind_of(&list[i]) };
            Err(format!("{name}, {item} {}: should be an object, not {kind}; write it as one, or remove it", i + 1))
        }
        None => Ok(()),
    }
}

pub(super) fn string<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value.as_str().ok_or_else(|| format!("{name} should be a string, not {}", kind_of(value)))
}

/// Characters of a value that a message shows.
const SHOWN: usize = 60;

/// The name of a field in the form that moewarden knows: `systemPrompt`, `System-Prompt` and ` SYSTEM_PROMPT` are `system_prompt`.
pub(super) fn plain_spelling(name: &str) -> String {
    let mut plain = String::with_capacity(name.len());
    let mut in_word = false;
    for c in name.trim().chars() {
        if c.is_uppercase() && in_word {
            plain.push('_');
        }
        in_word = c.is_lowercase() || c.is_numeric();
        match c {
            '-' | ' ' | '.' => plain.push('_'),
            c => plain.extend(c.to_lowercase()),
        }
    }
    plain
}

/// A field that holds something and is not of the names that are `known`, but for its spelling: it would be dropped. With that
/// name.
pub(super) fn misspelled(map: &Map<String, Value>, known: impl Fn(&str) -> bool) -> Option<(&str, String)> {
    let fields = map.keys().filter(|name| !known(name) && filled(map, name).is_some());
    fields
        .map(|name| (name.as_str(), plain_spelling(name)))
        .find(|(name, plain)| known(plain) && map.get(plain) != map.get(*name))
}

/// Text of a file for a message, in quotation marks.
pub(super) fn quoted(text: &str) -> String {
    format!("\"{}\"", quote::cut(text, SHOWN))
}

/// The name of a field for a message.
pub(super) fn name_of(text: &str) -> String {
    quote::cut(text, SHOWN)
}
