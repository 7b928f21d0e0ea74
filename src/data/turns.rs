//! Parses the turns of a row.

use serde_json::{Map, Value};

use super::message::{Form, Message, NAMES};
use super::python_literal;
use super::values::kind_of;
use super::values::{
    Result, check_objects, filled, is_blank, is_empty, misspelled, name_of, present, quoted, string, without_nulls,
};

/// Fields of a turn that chat templates may write, so that the model sees them. A field that the template never reads is
/// an error: it would be dropped.
pub(super) const WRITTEN: [&str; 5] = ["reasoning_content", "reasoning", "thinking", "tool_calls", "function_call"];
/// Fields of a turn that decide whether it carries loss: true or false.
const LOSS: [&str; 3] = ["loss", "train", "training"];
/// Fields of a turn that hold what no text model can be given, text in a place where no template looks for it, or other
/// spellings of what decides the loss.
const REFUSED: [(&str, &str); 14] = [
    ("images", "only text is supported"),
    ("image", "only text is supported"),
    ("audios", "only text is supported"),
    ("audio", "only text is supported"),
    ("videos", "only text is supported"),
    ("video", "only text is supported"),
    ("refusal", "write the refusal as the turn's content"),
    ("loss_weight", "write weight: 0 or 1, or loss: true or false"),
    ("train_detail", "write loss: true or false; a part of a turn cannot be left out"),
    ("reasoning_details", "write the text as reasoning_content"),
    ("thinking_blocks", "write the text as reasoning_content"),
    ("thoughts", "write the text as reasoning_content"),
    ("thought", "write the text as reasoning_content"),
    ("prefix", "a reply is learnt whole, with what ends it; remove the field"),
];

/// Words in names of fields that decide which tokens carry loss, however they are spelled: `loss_mask`, `is_masked`, `sample_weights`.
pub(super) const OF_THE_LOSS: [&str; 7] = ["loss", "losses", "mask", "masks", "masked", "weight", "weights"];
/// The same in a turn, such as `train_on_turn`; the fields of a row may name the split that it belongs to.
const OF_TRAINING: [&str; 8] = ["train", "trained", "training", "trainable", "learn", "learned", "ignore", "ignored"];

/// Whether one of the words of a name is in a list.
pub(super) fn has_word(name: &str, words: &[&str]) -> bool {
    name.to_ascii_lowercase().split(|c: char| !c.is_ascii_alphanumeric()).any(|word| words.contains(&word))
}

/// One turn of `role` from a string, or a list of turns.
pub(super) fn text_or_messages(value: &Value, name: &str, role: &str) -> Result<Vec<Message>> {
    match value {
        Value::String(text) if is_blank(text) => Ok(vec![]),
        Value::String(text) => Ok(vec![Message::new(role, text)]),
        list => messages(list, name),
    }
}

/// Parses turns, given as a list or as a string that holds a list in JSON or Python notation. A blank assistant turn at the
/// end is left out: a blank text counts as missing. After another turn of the assistant it is refused: without it, that one would be
/// taken for the reply.
pub(super) fn messages(value: &Value, name: &str) -> Result<Vec<Message>> {
    let parsed;
    let list = match value {
        Value::String(text) if is_blank(text) => return Ok(vec![]),
        Value::String(text) => {
            parsed = python_literal::parse(text)
                .map_err(|e| format!("{name} is a string that is not a list in JSON or Python notation: {e}"))?;
            &parsed
        }
        value => value,
    };
    let Value::Array(list) = list else {
        let kind = kind_of(list);
        return Err(format!(
            "{name} should be a list of messages, {{\"role\": ..., \"content\": ...}} each, not {kind}"
        ));
    };
    let mut turns = Vec::with_capacity(list.len());
    for (i, value) in list.iter().enumerate() {
        let last = i + 1 == list.len();
        turns.push(message(value, last).map_err(|e| format!("{name}, message {}: {e}", i + 1))?);
    }
    while turns.last().is_some_and(|last| last.is_assistant() && last.is_blank()) {
        turns.pop();
    }
    if turns.len() < list.len() && turns.last().is_some_and(Message::is_assistant) {
        return Err(format!(
            "{name}, message {}: the reply is blank, and the turn before it is the assistant's, too, which would be taken for the reply: \
             write the reply, or remove the blank turn if the one before it is the reply",
            turns.len() + 1
        ));
    }
    Ok(turns)
}

/// Whether a field of a turn is one that moewarden reads.
pub(super) fn is_known(name: &str) -> bool {
    let own = ["role", "from", "content", "value", "weight"];
    own.contains(&name) || LOSS.contains(&name) || WRITTEN.contains(&name) || NAMES.contains(&name)
}

/// Parses one turn: `role` and `content`, or `from` and `value`. Only a `last` assistant turn may have neither content nor
/// other fields.
fn message(value: &Value, last: bool) -> Result<Message> {
    let Value::Object(map) = value else {
        return Err(format!("should be an object with role and content, not {}", kind_of(value)));
    };
    let says_nothing = |name: &str, value: &Value| name == "prefix" && value.as_bool() == Some(false);
    let given = |name: &str| filled(map, name).is_some_and(|value| !says_nothing(name, value));
    if let Some((name, why)) = REFUSED.iter().find(|(name, _)| given(name)) {
        return Err(format!("{name} is not supported: {why}"));
    }
    let is_refused = |name: &str| REFUSED.iter().any(|(other, _)| *other == name);
    if let Some((name, known)) = misspelled(map, |name| is_known(name) || is_refused(name)) {
        return Err(format!("the field {} is unknown, unlike {known}: rename or remove it", name_of(name)));
    }
    let role = match string(one_of(map, ["role", "from"])?.ok_or("has no role")?, "role")? {
        role @ ("system" | "developer" | "user" | "assistant" | "tool") => role,
        "human" => "user",
        "gpt" | "bot" | "model" => "assistant",
        other => {
            let hint = match other.to_ascii_lowercase().as_str() {
                "function" | "observation" | "tool_response" | "ipython" => ": write this one as tool",
                "function_call" | "tool_call" => ": write this one as a turn of the assistant with tool_calls",
                "chatgpt" | "ai" | "bing" | "bard" | "claude" => ": write this one as assistant",
                _ => "",
            };
            let other = quoted(other);
            return Err(format!("role {other}; it should be system, developer, user, assistant or tool{hint}"));
        }
    };
    let mut turn = Message { loss: loss(map, role)?, ..Message::new(role, "") };
    turn.excluded = turn.is_assistant() && turn.loss == Some(false);
    turn.weighted = turn.is_assistant() && turn.loss.is_none() && present(map, "weight").is_some();
    for name in WRITTEN.into_iter().chain(NAMES) {
        // Blank thoughts are none, as blank texts everywhere.
        if let Some(value) = filled(map, name) {
            let given = written(name, value)?;
            let cleaned = without_nulls(given.clone());
            if cleaned != given {
                turn.nulls.push(name);
            }
            if let ("tool_calls", Value::Array(calls)) = (name, &cleaned) {
                check_objects(calls, name, "call")?;
            }
            if !is_empty(&cleaned) {
                turn.fields.insert(name.to_owned(), cleaned);
            }
        }
    }
    // In the order of the row, which a template that writes the whole turn keeps.
    turn.fields = map.keys().filter_map(|name| Some((name.clone(), turn.fields.get(name)?.clone()))).collect();
    let needs_content = turn.fields.is_empty() && !(last && turn.is_assistant());
    (turn.form, turn.content) = match content(map)? {
        Some(content) => content,
        // An empty value is an empty text.
        None if needs_content && CONTENT.iter().any(|name| map.contains_key(*name)) => (Form::Text, String::new()),
        None if needs_content => return Err("has no content".into()),
        None if map.contains_key("content") => (Form::Null, String::new()),
        None => (Form::Missing, String::new()),
    };
    turn.unknown = map
        .keys()
        .filter(|name| filled(map, name).is_some() && !is_known(name) && !is_refused(name))
        .cloned()
        .collect();
    match turn.unknown.iter().find(|name| has_word(name, &OF_THE_LOSS) || has_word(name, &OF_TRAINING)) {
        Some(name) => {
            Err(format!("{} is not supported: write loss: true or false, or remove the field", name_of(name)))
        }
        None => Ok(turn),
    }
}

/// The fields of a turn that hold its content.
const CONTENT: [&str; 2] = ["content", "value"];

/// The content of a turn: the form in which it is given, and its text.
fn content(map: &Map<String, Value>) -> Result<Option<(Form, String)>> {
    match one_of(map, CONTENT)? {
        Some(Value::Array(parts)) => {
            let text = |(i, value)| part(value).map_err(|e| format!("content, part {}: {e}", i + 1)).transpose();
            let texts = parts.iter().enumerate().filter_map(text).collect::<Result<Vec<_>>>()?;
            let text = texts.concat();
            Ok((!texts.is_empty()).then_some((Form::Parts(texts), text)))
        }
        Some(Value::String(text)) => Ok(Some((Form::Text, text.clone()))),
        Some(other) => Err(format!("content should be a string, or a list of parts, not {}", kind_of(other))),
        None if CONTENT.iter().any(|name| map.get(*name).is_some_and(Value::is_string)) => {
            Ok(Some((Form::Text, String::new())))
        }
        None => Ok(None),
    }
}

/// The value of a field that has two names; an error if both are given and differ.
fn one_of<'a>(map: &'a Map<String, Value>, names: [&str; 2]) -> Result<Option<&'a Value>> {
    match names.map(|name| present(map, name)) {
        [Some(a), Some(b)] if a != b => Err(format!("{} and {} differ; keep one", names[0], names[1])),
        [a, b] => Ok(a.or(b)),
    }
}

/// The value of a field that is passed to templates, with what is null in it.
fn written(name: &str, value: &Value) -> Result<Value> {
    match (name, value) {
        // Tables with one schema for all rows store structures as text.
        ("tool_calls" | "function_call", Value::String(text)) => {
            let parsed = python_literal::parse(text)
                .map_err(|e| format!("{name} is a string that is not JSON or Python notation: {e}"))?;
            if is_empty(&parsed) { Ok(Value::Null) } else { written(name, &parsed) }
        }
        ("tool_calls", Value::Array(_)) | ("function_call", Value::Object(_)) => Ok(value.clone()),
        ("tool_calls", other) => Err(format!("tool_calls should be a list, not {}", kind_of(other))),
        ("function_call", other) => Err(format!("function_call should be an object, not {}", kind_of(other))),
        (name, value) => string(value, name).map(Value::from),
    }
}

/// The text of one part of a content; `None` if it has none.
fn part(value: &Value) -> Result<Option<String>> {
    let map = match value {
        Value::String(text) => return Ok(Some(text.clone())),
        Value::Object(map) => map,
        other => return Err(format!("should be an object with type and text, not {}", kind_of(other))),
    };
    match map.get("type").and_then(Value::as_str) {
        Some("text" | "input_text" | "output_text") | None => {
            // A mark of a service's prompt cache is no content.
            let own = |name: &&String| ["type", "text", "cache_control"].contains(&name.as_str());
            if let Some(name) = map.keys().find(|name| !own(name) && present(map, name).is_some()) {
                return Err(format!(
                    "has the field {}, which is not supported: only text is; remove it",
                    name_of(name)
                ));
            }
            let text = map.get("text").filter(|text| !text.is_null());
            text.map(|text| string(text, "text").map(str::to_owned)).transpose()
        }
        Some(other) => Err(format!("the type {} is not supported: only parts with text are", quoted(other))),
    }
}

/// Whether a turn carries loss, where the row says so. `weight` 1 is the default of fine-tuning services: it agrees with turns
/// that carry loss by the rules for the row, and does not make others carry it.
fn loss(map: &Map<String, Value>, role: &str) -> Result<Option<bool>> {
    let mut given: Vec<(&str, bool)> = Vec::new();
    for name in LOSS {
        match present(map, name) {
            None => {}
            Some(Value::Bool(value)) => given.push((name, *value)),
            Some(other) => return Err(format!("{name} should be true or false, not {}", kind_of(other))),
        }
    }
    if let Some(weight) = present(map, "weight") {
        match weight.as_f64().or_else(|| weight.as_bool().map(f64::from)) {
            Some(0.0) => given.push(("weight", false)),
            Some(1.0) if given.is_empty() && role == "assistant" => {}
            Some(1.0) => given.push(("weight", true)),
            _ => {
                let weight = name_of(&weight.to_string());
                return Err(format!("weight {weight}; the weight of a turn should be 0 (no loss) or 1"));
            }
        }
    }
    if let Some(pair) = given.windows(2).find(|pair| pair[0].1 != pair[1].1) {
        return Err(format!("{} and {} contradict each other; keep one", pair[0].0, pair[1].0));
    }
    match given.first() {
        Some((name, true)) if role != "assistant" => {
            let value = if *name == "weight" { "1" } else { "true" };
            Err(format!("{name} is {value}, but only assistant turns can carry loss (or all tokens: --loss-on all)"))
        }
        given => Ok(given.map(|(_, value)| *value)),
    }
}
