//! Recognises the kind of a row and builds the prompts and replies of its unsafe and safe side.
//!
//! | kind | recognised by a field | unsafe side | safe side | reply |
//! |---|---|---|---|---|
//! | attack | `all_prompt`, `attack_prompt`, `inception_attack`, `goal` or a verdict | the attack | the request alone | the target |
//! | chat | `messages`, `conversations`, or `completion` | by `label` | by `label` | the last assistant turn |
//! | pair | `safe_messages`, `unsafe_messages` | `unsafe_messages` | `safe_messages` | `response`, else the target |
//!
//! The target is the row's `refusal_response` if present, else the option `--safe-response`. In attack and pair rows
//! only the reply carries loss: an assistant turn inside an attack may be harmful, and the model must not learn it.

use serde::Serialize;
use serde_json::{Map, Value};

use super::python_literal;
use super::report::{DropReason, Kind};
use super::rows::kind_of;

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text of the turn.
    pub content: String,
    /// `Some(false)` excludes an assistant turn from the loss. Not passed to chat templates.
    #[serde(skip)]
    pub loss: Option<bool>,
}

impl Message {
    /// A turn with the default loss of its role: an assistant turn carries loss, any other does not.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into(), loss: None }
    }

    /// Whether the role is `assistant`.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }
}

/// One side of a row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Side {
    /// All turns, the reply included.
    pub messages: Vec<Message>,
    /// Number of turns before the reply, which is the last assistant turn. Without a reply: the number of all turns.
    pub prompt: usize,
}

impl Side {
    /// A prompt, excluded from the loss, and its reply.
    fn with_reply(mut messages: Vec<Message>, reply: &str) -> Self {
        for message in &mut messages {
            message.loss = Some(false);
        }
        let prompt = messages.len();
        messages.push(Message::new("assistant", reply));
        Self { messages, prompt }
    }

    /// The turns before the reply.
    pub fn prompt_messages(&self) -> Vec<Message> {
        self.messages[..self.prompt].to_vec()
    }

    /// Whether there is a reply.
    pub fn has_reply(&self) -> bool {
        self.prompt < self.messages.len()
    }
}

/// A parsed row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Row {
    pub line: usize,
    pub kind: Kind,
    /// See [`super::Record::request`].
    pub request: String,
    pub unsafe_side: Option<Side>,
    pub safe_side: Option<Side>,
    /// Whether it is an attack row without any verdict.
    pub without_verdict: bool,
}

impl Row {
    /// The unsafe and the safe side, those of them that the row has.
    pub fn sides(&self) -> impl Iterator<Item = &Side> {
        self.unsafe_side.iter().chain(&self.safe_side)
    }
}

/// A parsed row, or why it is dropped.
pub(super) enum Parsed {
    Row(Row),
    Dropped(DropReason),
}

/// The system message of the safe side of rows that have `goal`.
const SAFE_SYSTEM: &str = "You are a helpful assistant.";
/// Fields that hold an attack as the text of one user message; used if `all_prompt` is missing.
const ATTACK_TEXTS: [&str; 2] = ["attack_prompt", "inception_attack"];
/// Fields in which a judge recorded whether the attack succeeded.
const VERDICTS: [&str; 3] = ["judge_success_gpt4", "inception_attack_score", "judge_result"];

type Result<T, E = String> = std::result::Result<T, E>;

/// Recognises the kind of a row and parses it.
///
/// # Errors
/// A message with the cause and the way out; the caller adds file and line.
pub(super) fn parse(line: usize, row: &Map<String, Value>, safe_response: &str, keep_failed: bool) -> Result<Parsed> {
    let has = |names: &[&str]| names.iter().any(|n| present(row, n).is_some());
    let is_pair = has(&["safe_messages", "unsafe_messages"]);
    let is_chat = has(&["messages", "conversations", "completion"]);
    let is_attack = has(&["all_prompt", "goal"]) || has(&ATTACK_TEXTS) || VERDICTS.iter().any(|v| row.contains_key(*v));
    let target = match present(row, "refusal_response") {
        Some(text) => Some(string(text, "refusal_response")?.to_owned()).filter(|t| !t.trim().is_empty()),
        None => None,
    };
    let parsed = match (is_attack, is_chat, is_pair) {
        (true, false, false) => return attack(line, row, target.as_deref().unwrap_or(safe_response), keep_failed),
        (false, true, false) => chat(line, row, target.as_deref(), safe_response)?,
        (false, false, true) => pair(line, row, target.as_deref().unwrap_or(safe_response))?,
        (false, false, false) => {
            let names = row.keys().take(12).map(String::as_str).collect::<Vec<_>>().join(", ");
            return Err(format!(
                "unknown kind of row (its fields: {names}); an attack row has all_prompt and goal or prompt, a chat row \
                 messages and label, a pair row safe_messages, unsafe_messages and response"
            ));
        }
        _ => return Err("fields of more than one kind of row (attack, chat, pair); keep those of one kind".into()),
    };
    Ok(Parsed::Row(parsed))
}

/// The value of a field; `None` if it is missing or null.
fn present<'a>(row: &'a Map<String, Value>, name: &str) -> Option<&'a Value> {
    row.get(name).filter(|v| !v.is_null())
}

fn string<'a>(value: &'a Value, name: &str) -> Result<&'a str> {
    value.as_str().ok_or_else(|| format!("{name} should be a string, not {}", kind_of(value)))
}

fn attack(line: usize, row: &Map<String, Value>, target: &str, keep_failed: bool) -> Result<Parsed> {
    let mut without_verdict = true;
    for verdict in VERDICTS {
        let Some(value) = row.get(verdict) else { continue };
        without_verdict = false;
        match attack_succeeded(verdict, value)? {
            Some(true) => {}
            _ if keep_failed => {}
            Some(false) => return Ok(Parsed::Dropped(DropReason::FailedAttack)),
            None => return Ok(Parsed::Dropped(DropReason::NullVerdict)),
        }
    }
    let goal = present(row, "goal");
    let request = match (goal, present(row, "prompt")) {
        (Some(goal), _) => string(goal, "goal")?,
        (None, Some(prompt)) => string(prompt, "prompt")?,
        (None, None) => return Err("an attack row without its request; add goal or prompt".into()),
    };
    let mut unsafe_prompt = match present(row, "all_prompt") {
        Some(list) => messages(list, "all_prompt")?,
        None => vec![],
    };
    if unsafe_prompt.is_empty() {
        let text = ATTACK_TEXTS.iter().find_map(|n| present(row, n).map(|v| string(v, n)));
        let text = text.ok_or("an attack row without all_prompt, attack_prompt or inception_attack")??;
        unsafe_prompt.push(Message::new("user", text));
    }
    check_awaits_reply(&unsafe_prompt, "all_prompt")?;
    let mut safe_prompt = vec![Message::new("user", request)];
    if goal.is_some() {
        safe_prompt.insert(0, Message::new("system", SAFE_SYSTEM));
    }
    Ok(Parsed::Row(Row {
        line,
        kind: Kind::Attack,
        request: request.to_owned(),
        unsafe_side: Some(Side::with_reply(unsafe_prompt, target)),
        safe_side: Some(Side::with_reply(safe_prompt, target)),
        without_verdict,
    }))
}

/// Whether a verdict says that the attack succeeded; `None` for a null verdict.
fn attack_succeeded(name: &str, value: &Value) -> Result<Option<bool>> {
    if name != "judge_result" {
        return Ok(score(name, value)?.map(|n| if name == "judge_success_gpt4" { n == 1.0 } else { n != 0.0 }));
    }
    let parsed;
    let value = match value {
        Value::String(text) => {
            parsed = python_literal::parse(text).map_err(|e| {
                format!("judge_result is a string that is not an object in JSON or Python notation: {e}")
            })?;
            &parsed
        }
        value => value,
    };
    match value {
        Value::Null => Ok(None),
        Value::Object(map) => match map.get("score") {
            Some(n) => Ok(score("judge_result.score", n)?.map(|n| n != 0.0)),
            None => Err("judge_result has no score".into()),
        },
        other => Err(format!("judge_result should be an object with a score, not {}", kind_of(other))),
    }
}

/// The number of a verdict, which may also be a boolean or a string; `None` for null.
fn score(name: &str, value: &Value) -> Result<Option<f64>> {
    let number = match value {
        Value::Null => return Ok(None),
        Value::Bool(b) => Some(f64::from(u8::from(*b))),
        Value::Number(n) => n.as_f64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    };
    number
        .filter(|n: &f64| !n.is_nan())
        .map(Some)
        .ok_or_else(|| format!("{name} should be a number, not {}", kind_of(value)))
}

fn chat(line: usize, row: &Map<String, Value>, target: Option<&str>, safe_response: &str) -> Result<Row> {
    let label = match present(row, "label").map(|v| string(v, "label")).transpose()? {
        Some("safe") => Kind::ChatSafe,
        Some("unsafe") => Kind::ChatUnsafe,
        Some(other) => return Err(format!("label {other:?}; it should be \"safe\" or \"unsafe\"")),
        None => return Err("a chat row without a label; add \"label\": \"safe\" or \"label\": \"unsafe\"".into()),
    };
    let mut turns = match (present(row, "messages"), present(row, "conversations"), present(row, "completion")) {
        (Some(list), None, None) => messages(list, "messages")?,
        (None, Some(list), None) => messages(list, "conversations")?,
        (None, None, Some(completion)) => {
            let prompt = present(row, "prompt").ok_or("a completion without its prompt")?;
            let mut turns = text_or_messages(prompt, "prompt", "user")?;
            // Assistant turns of the prompt carry no loss, only the completion does.
            turns.iter_mut().for_each(|m| m.loss = Some(false));
            turns.extend(text_or_messages(completion, "completion", "assistant")?);
            turns
        }
        _ => return Err("more than one of messages, conversations and completion; keep one".into()),
    };
    if turns.is_empty() {
        return Err("a conversation without messages".into());
    }
    if !turns.iter().any(Message::is_assistant) {
        // Without an assistant turn, the reply to an unsafe prompt is the target. A safe prompt stays without a reply:
        // it must not be refused.
        let reply = target.or((label == Kind::ChatUnsafe).then_some(safe_response));
        turns.extend(reply.map(|text| Message::new("assistant", text)));
    }
    let prompt = turns.iter().rposition(Message::is_assistant).unwrap_or(turns.len());
    let request = last_user_message(&turns);
    let side = Some(Side { messages: turns, prompt });
    let (unsafe_side, safe_side) = if label == Kind::ChatUnsafe { (side, None) } else { (None, side) };
    Ok(Row { line, kind: label, request, unsafe_side, safe_side, without_verdict: false })
}

fn pair(line: usize, row: &Map<String, Value>, target: &str) -> Result<Row> {
    let side = |name| {
        let list = present(row, name).ok_or_else(|| format!("a pair row without {name}"))?;
        let list = messages(list, name)?;
        check_awaits_reply(&list, name)?;
        Ok::<_, String>(list)
    };
    let (safe, unsafe_) = (side("safe_messages")?, side("unsafe_messages")?);
    let response = present(row, "response").map(|v| string(v, "response")).transpose()?;
    let response = response.filter(|r| !r.trim().is_empty()).unwrap_or(target);
    Ok(Row {
        line,
        kind: Kind::Pair,
        request: last_user_message(&safe),
        unsafe_side: Some(Side::with_reply(unsafe_, response)),
        safe_side: Some(Side::with_reply(safe, response)),
        without_verdict: false,
    })
}

fn last_user_message(messages: &[Message]) -> String {
    messages.iter().rfind(|m| m.role == "user").map(|m| m.content.clone()).unwrap_or_default()
}

/// Checks that a prompt has turns and that the last one is not an assistant turn.
fn check_awaits_reply(messages: &[Message], name: &str) -> Result<()> {
    match messages.last() {
        None => Err(format!("{name} has no messages")),
        Some(last) if last.is_assistant() => {
            Err(format!("{name} ends with an assistant turn; it should end with the user's"))
        }
        Some(_) => Ok(()),
    }
}

/// One turn of `role` from a string, or a list of turns.
fn text_or_messages(value: &Value, name: &str, role: &str) -> Result<Vec<Message>> {
    match value {
        Value::String(text) => Ok(vec![Message::new(role, text)]),
        list => messages(list, name),
    }
}

/// Parses turns, given as a list or as a string that holds a list in JSON or Python notation.
fn messages(value: &Value, name: &str) -> Result<Vec<Message>> {
    let parsed;
    let list = match value {
        Value::String(text) if text.trim().is_empty() => return Ok(vec![]),
        Value::String(text) => {
            parsed = python_literal::parse(text)
                .map_err(|e| format!("{name} is a string that is not a list in JSON or Python notation: {e}"))?;
            &parsed
        }
        value => value,
    };
    let Value::Array(list) = list else {
        return Err(format!("{name} should be a list of messages, not {}", kind_of(list)));
    };
    list.iter().enumerate().map(|(i, m)| message(m).map_err(|e| format!("{name}, message {}: {e}", i + 1))).collect()
}

/// Parses one turn: `role` and `content`, or `from` and `value`.
fn message(value: &Value) -> Result<Message> {
    let Value::Object(map) = value else {
        return Err(format!("should be an object with role and content, not {}", kind_of(value)));
    };
    let field = |names: [&'static str; 2]| {
        let found = names.into_iter().find_map(|n| present(map, n).map(|v| string(v, n)));
        found.unwrap_or_else(|| Err(format!("has no {}", names[0])))
    };
    if let Some(calls) = ["tool_calls", "function_call"].into_iter().find(|n| present(map, n).is_some()) {
        return Err(format!("{calls} is not supported; write the turn's text as content"));
    }
    let role = match field(["role", "from"])? {
        role @ ("system" | "developer" | "user" | "assistant" | "tool") => role,
        "human" => "user",
        "gpt" | "bot" | "model" => "assistant",
        other => return Err(format!("role {other:?}; it should be system, developer, user, assistant or tool")),
    };
    let loss = match present(map, "loss") {
        None => None,
        Some(Value::Bool(loss)) => Some(*loss),
        Some(other) => return Err(format!("loss should be true or false, not {}", kind_of(other))),
    };
    Ok(Message { role: role.to_owned(), content: field(["content", "value"])?.to_owned(), loss })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: Value, keep_failed: bool) -> Result<Option<Row>> {
        match parse(7, row.as_object().unwrap(), "No.", keep_failed)? {
            Parsed::Row(row) => Ok(Some(row)),
            Parsed::Dropped(_) => Ok(None),
        }
    }

    fn kept(row: Value) -> Row {
        read(row, false).unwrap().expect("a row that is kept")
    }

    fn turns(side: &Option<Side>) -> Vec<(String, String)> {
        side.as_ref().unwrap().messages.iter().map(|m| (m.role.clone(), m.content.clone())).collect()
    }

    fn texts<const N: usize>(turns: [(&str, &str); N]) -> Vec<(String, String)> {
        turns.map(|(r, c)| (r.to_owned(), c.to_owned())).to_vec()
    }

    #[test]
    fn verdicts_drop_rows_unless_keep_failed() {
        let base = |extra: Value| {
            let mut row = json!({"prompt": "p", "all_prompt": [{"role": "user", "content": "a"}]});
            row.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            row
        };
        for (verdict, keep) in [
            (json!({"judge_success_gpt4": 1}), true),
            (json!({"judge_success_gpt4": true}), true),
            (json!({"judge_success_gpt4": 0}), false),
            (json!({"judge_success_gpt4": 2}), false),
            (json!({"inception_attack_score": 3}), true),
            (json!({"inception_attack_score": "0"}), false),
            (json!({"inception_attack_score": null}), false),
            (json!({"judge_result": {"reason": "", "score": 1}}), true),
            (json!({"judge_result": {"reason": "", "score": 0}}), false),
            (json!({"judge_result": "{'reason': '', 'score': 2}"}), true),
            (json!({"judge_result": null}), false),
            (json!({"judge_success_gpt4": 1, "inception_attack_score": 0}), false),
            (json!({}), true),
        ] {
            assert_eq!(read(base(verdict.clone()), false).unwrap().is_some(), keep, "{verdict}");
            assert!(read(base(verdict.clone()), true).unwrap().is_some(), "{verdict}");
        }
        assert!(kept(base(json!({}))).without_verdict);
        assert!(read(base(json!({"judge_success_gpt4": "yes"})), false).unwrap_err().contains("a number"));
        assert!(read(base(json!({"judge_result": {}})), false).unwrap_err().contains("no score"));
    }

    #[test]
    fn an_attack_row_has_an_unsafe_and_a_safe_side() {
        let row = kept(
            json!({"goal": "g", "prompt": "p", "all_prompt": "[{'role': 'system', 'content': 's'}, {'role': 'user', 'content': \"it's\"}]"}),
        );
        assert_eq!(turns(&row.unsafe_side), texts([("system", "s"), ("user", "it's"), ("assistant", "No.")]));
        assert_eq!(turns(&row.safe_side), texts([("system", SAFE_SYSTEM), ("user", "g"), ("assistant", "No.")]));
        assert_eq!((row.request.as_str(), row.line), ("g", 7));

        let row = kept(json!({"prompt": "p", "attack_prompt": "a", "all_prompt": null, "refusal_response": "Sorry."}));
        assert_eq!(turns(&row.unsafe_side), texts([("user", "a"), ("assistant", "Sorry.")]));
        assert_eq!(turns(&row.safe_side), texts([("user", "p"), ("assistant", "Sorry.")]));

        let row = kept(json!({"prompt": "p", "inception_attack": "a", "all_prompt": [], "refusal_response": " "}));
        assert_eq!(turns(&row.unsafe_side), texts([("user", "a"), ("assistant", "No.")]));
    }

    #[test]
    fn an_assistant_turn_inside_an_attack_carries_no_loss() {
        let attack = json!([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss": true}, {"role": "user", "content": "3"}]);
        for row in [
            json!({"goal": "g", "all_prompt": attack}),
            json!({"safe_messages": [{"role": "user", "content": "s"}], "unsafe_messages": attack, "response": "R"}),
        ] {
            let side = kept(row).unsafe_side.unwrap();
            assert_eq!(
                side.messages.iter().map(|m| m.loss).collect::<Vec<_>>(),
                [Some(false), Some(false), Some(false), None]
            );
            assert_eq!(side.prompt, 3);
        }
    }

    #[test]
    fn chat_rows_in_three_formats() {
        let want = texts([("user", "q"), ("assistant", "a")]);
        for row in [
            json!({"label": "unsafe", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
            json!({"label": "unsafe", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
            json!({"label": "unsafe", "prompt": "q", "completion": "a"}),
            json!({"label": "unsafe", "prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}),
        ] {
            let row = kept(row);
            assert_eq!(turns(&row.unsafe_side), want);
            assert_eq!((row.kind, row.request.as_str()), (Kind::ChatUnsafe, "q"));
            assert_eq!((row.unsafe_side.unwrap().prompt, row.safe_side), (1, None));
        }
    }

    #[test]
    fn the_target_replaces_a_missing_reply_of_unsafe_prompts_only() {
        let row = |label: &str| json!({"label": label, "messages": [{"role": "user", "content": "q"}]});
        assert_eq!(turns(&kept(row("unsafe")).unsafe_side), texts([("user", "q"), ("assistant", "No.")]));
        let safe = kept(row("safe")).safe_side.unwrap();
        assert!(!safe.has_reply());
        let mut own = row("safe");
        own["refusal_response"] = json!("Own.");
        assert_eq!(turns(&kept(own).safe_side), texts([("user", "q"), ("assistant", "Own.")]));
    }

    #[test]
    fn a_chat_row_keeps_loss_false() {
        let row = kept(json!({"label": "safe", "messages": [
            {"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss": false},
            {"role": "user", "content": "3"}, {"role": "assistant", "content": "4", "loss": true}]}));
        let side = row.safe_side.unwrap();
        assert_eq!(side.messages.iter().map(|m| m.loss).collect::<Vec<_>>(), [None, Some(false), None, Some(true)]);
        assert_eq!(side.prompt, 3);
    }

    #[test]
    fn errors_name_cause_and_way_out() {
        let user = json!([{"role": "user", "content": "q"}]);
        for (row, message) in [
            (json!({"text": "x"}), "unknown kind of row (its fields: text)"),
            (json!({}), "unknown kind"),
            (json!({"messages": user, "all_prompt": user}), "more than one kind"),
            (json!({"messages": user, "conversations": user, "label": "safe"}), "keep one"),
            (json!({"messages": user}), "add \"label\": \"safe\" or"),
            (json!({"messages": user, "label": "ok"}), "label \"ok\""),
            (json!({"messages": [], "label": "safe"}), "without messages"),
            (json!({"completion": "c", "label": "safe"}), "without its prompt"),
            (json!({"all_prompt": user}), "add goal or prompt"),
            (json!({"goal": "g"}), "without all_prompt"),
            (json!({"goal": "g", "all_prompt": "hello"}), "JSON or Python notation"),
            (json!({"goal": "g", "all_prompt": 3}), "not a number"),
            (
                json!({"goal": "g", "all_prompt": [{"role": "assistant", "content": "x"}]}),
                "ends with an assistant turn",
            ),
            (json!({"goal": "g", "all_prompt": [{"role": "user"}]}), "message 1: has no content"),
            (json!({"goal": "g", "all_prompt": [{"role": "usr", "content": "x"}]}), "role \"usr\""),
            (json!({"goal": "g", "all_prompt": [{"role": "user", "content": "x", "tool_calls": [1]}]}), "tool_calls"),
            (json!({"goal": "g", "all_prompt": [{"role": "user", "content": "x", "loss": 1}]}), "true or false"),
            (json!({"goal": "g", "all_prompt": ["x"]}), "not a string"),
            (json!({"safe_messages": user}), "without unsafe_messages"),
            (json!({"safe_messages": user, "unsafe_messages": []}), "unsafe_messages has no messages"),
        ] {
            let error = read(row.clone(), false).unwrap_err();
            assert!(error.contains(message), "{row} gave {error:?}, expected {message:?}");
        }
    }
}
