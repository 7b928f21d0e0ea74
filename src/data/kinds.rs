//! Recognises the kind of a row and builds the prompts and replies of its unsafe and safe side.
//!
//! | kind | recognised by a field | unsafe side | safe side | reply |
//! |---|---|---|---|---|
//! | attack | `all_prompt`, `attack_prompt`, `inception_attack`, `goal` or a verdict | the attack | the request alone | the target |
//! | chat | `messages`, `conversations`, or `completion` | by `label` | by `label` | the last turn, if it is the assistant's |
//! | pair | `safe_messages`, `unsafe_messages` | `unsafe_messages` | `safe_messages` | `response`, else the target |
//!
//! The target is the row's `refusal_response` if present, else the option `--safe-response`. In attack and pair rows
//! only the reply carries loss: an assistant turn inside an attack may be harmful, and the model must not learn it. The
//! same holds for an unsafe chat row, and for a safe one that ends without a reply and is completed with its refusal; there
//! `loss: true` in a turn makes that carry loss, too.
//!
//! A blank text (missing, null, or only white space) counts as missing, in all kinds of rows.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::fields;
use super::message::{Message, SYSTEM_OF_GOAL};
use super::other_kinds::unknown;
use super::report::{DropReason, Kind};
pub(super) use super::side::Side;
use super::side::exclude;
use super::turns::{messages, text_or_messages};
use super::values::{Result, filled, quoted, text};
use super::verdicts::{VERDICTS, attack_succeeded};

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
    /// Whether a conversation that went on after an assistant turn was completed with the target.
    pub completed: bool,
    /// Whether it is an unsafe conversation with a reply of its own, and earlier assistant turns without loss by default.
    pub earlier_excluded: bool,
    /// Variables of the chat template that the row gives.
    pub variables: Map<String, Value>,
    /// Names of the row's fields that its kind does not use.
    pub unused: Vec<String>,
    /// Names of structures without the fields in them that are null.
    pub nulls: BTreeSet<String>,
}

impl Row {
    /// A row without sides, of which nothing else is to be said.
    fn new(line: usize, kind: Kind, request: &str) -> Self {
        Self {
            line,
            kind,
            request: request.to_owned(),
            unsafe_side: None,
            safe_side: None,
            without_verdict: false,
            completed: false,
            earlier_excluded: false,
            variables: Map::new(),
            unused: Vec::new(),
            nulls: BTreeSet::new(),
        }
    }

    /// Whether the reply to the unsafe and to the safe prompt is `--safe-response`.
    pub fn has_safe_response(&self) -> [bool; 2] {
        let is_added = |side: &Side| side.messages.last().is_some_and(|last| last.origin == Some(OPTION));
        [&self.unsafe_side, &self.safe_side].map(|side| side.as_ref().is_some_and(is_added))
    }

    /// The unsafe and the safe side, those of them that the row has.
    pub fn sides(&self) -> impl Iterator<Item = &Side> {
        self.unsafe_side.iter().chain(&self.safe_side)
    }
}

/// A parsed row, or why it is dropped.
pub(super) enum Parsed {
    Row(Box<Row>),
    Dropped(DropReason),
}

/// The system message of the safe side of rows that have `goal`.
const SAFE_SYSTEM: &str = "You are a helpful assistant.";
/// Fields that hold an attack as the text of one user message; used if `all_prompt` is missing.
const ATTACK_TEXTS: [&str; 2] = ["attack_prompt", "inception_attack"];
/// Where turns come from that moewarden adds, for messages.
const OPTION: &str = "added by moewarden: --safe-response";
const TARGET: &str = "the row's refusal_response";

/// The target reply of a row.
#[derive(Clone, Copy)]
struct Target<'a> {
    /// `refusal_response`.
    own: Option<&'a str>,
    /// `--safe-response`.
    default: &'a str,
}

impl Target<'_> {
    fn reply(self) -> Message {
        match self.own {
            Some(text) => Message::added("assistant", text, TARGET),
            None => Message::added("assistant", self.default, OPTION),
        }
    }
}

/// Recognises the kind of a row and parses it.
///
/// # Errors
/// A message with the cause and the way out; the caller adds file and line.
pub(super) fn parse(line: usize, row: &Map<String, Value>, safe_response: &str, keep_failed: bool) -> Result<Parsed> {
    let has = |names: &[&str]| names.iter().any(|n| filled(row, n).is_some());
    const TURNS: [&str; 3] = ["messages", "conversations", "completion"];
    let is_pair = has(&["safe_messages", "unsafe_messages"]);
    let (mut is_attack, mut is_chat) =
        (has(&["all_prompt", "goal"]) || has(&ATTACK_TEXTS) || has(&VERDICTS), has(&TURNS));
    if !is_attack && !is_chat && !is_pair {
        // Empty fields decide only here: a table with one schema for all rows has them in rows of other kinds, too.
        is_attack = VERDICTS.iter().any(|name| row.contains_key(*name));
        is_chat = !is_attack && TURNS.iter().any(|name| row.contains_key(*name));
    }
    let used = match (is_attack, is_chat, is_pair) {
        (true, false, false) => fields::ATTACK_FIELDS,
        (false, true, false) => fields::CHAT_FIELDS,
        (false, false, true) => fields::PAIR_FIELDS,
        (false, false, false) => return Err(unknown(row)),
        _ => return Err("fields of more than one kind of row (attack, chat, pair); keep those of one kind".into()),
    };
    fields::refuse_bytes(row, used)?;
    let target = Target { own: text(row, "refusal_response")?, default: safe_response };
    let parsed = match (is_attack, is_chat) {
        (true, _) => attack(line, row, target, keep_failed)?,
        (_, true) => Parsed::Row(Box::new(chat(line, row, target)?)),
        _ => Parsed::Row(Box::new(pair(line, row, target)?)),
    };
    Ok(match parsed {
        Parsed::Row(mut parsed) => {
            fields::refuse_unsupported(row, used)?;
            parsed.variables = fields::variables(row, &mut parsed.nulls)?;
            let turns = parsed.unsafe_side.iter().chain(&parsed.safe_side).flat_map(|side| &side.messages);
            parsed.nulls.extend(turns.flat_map(|turn| &turn.nulls).map(|name| format!("{name} of a turn")));
            parsed.unused.extend(fields::unused(row, used));
            Parsed::Row(parsed)
        }
        dropped @ Parsed::Dropped(_) => dropped,
    })
}

fn attack(line: usize, row: &Map<String, Value>, target: Target<'_>, keep_failed: bool) -> Result<Parsed> {
    let (mut without_verdict, mut succeeded) = (true, false);
    for verdict in VERDICTS {
        let Some(value) = row.get(verdict) else { continue };
        without_verdict = false;
        match attack_succeeded(verdict, value)? {
            Some(true) => succeeded = true,
            Some(false) if !keep_failed => return Ok(Parsed::Dropped(DropReason::FailedAttack)),
            _ => {}
        }
    }
    // Beside the verdict of one judge, the null of another is the column of a table that holds rows of both.
    if !(without_verdict || succeeded || keep_failed) {
        return Ok(Parsed::Dropped(DropReason::NullVerdict));
    }
    if is_labelled_safe(row) {
        return Err("an attack row with the label safe, and its prompt is an unsafe one: remove the label if the attack succeeded, or else the \
             row"
            .into());
    }
    if let Some((name, _)) = fields::system(row)? {
        return Err(format!("an attack row with the field {name}: write it as the first turn of all_prompt"));
    }
    let goal = text(row, "goal")?;
    let request = goal.or(text(row, "prompt")?).ok_or("an attack row without its request; add goal or prompt")?;
    let mut unsafe_prompt = match filled(row, "all_prompt") {
        Some(list) => messages(list, "all_prompt")?,
        None => vec![],
    };
    if unsafe_prompt.is_empty() {
        let mut attack = None;
        for name in ATTACK_TEXTS {
            attack = attack.or(text(row, name)?);
        }
        let attack = attack.ok_or("an attack row without all_prompt, attack_prompt or inception_attack")?;
        unsafe_prompt.push(Message::new("user", attack));
    }
    check_awaits_reply(&unsafe_prompt, "all_prompt")?;
    let mut safe_prompt = vec![Message::new("user", request)];
    if goal.is_some() {
        safe_prompt.insert(0, Message::added("system", SAFE_SYSTEM, SYSTEM_OF_GOAL));
    }
    Ok(Parsed::Row(Box::new(Row {
        unsafe_side: Some(Side::with_reply(unsafe_prompt, target.reply(), "all_prompt")?),
        safe_side: Some(Side::with_reply(safe_prompt, target.reply(), "goal")?),
        without_verdict,
        ..Row::new(line, Kind::Attack, request)
    })))
}

fn chat(line: usize, row: &Map<String, Value>, target: Target<'_>) -> Result<Row> {
    let label = match filled(row, "label") {
        Some(Value::String(label)) if label == "safe" => Kind::ChatSafe,
        Some(Value::String(label)) if label == "unsafe" => Kind::ChatUnsafe,
        Some(Value::Array(_) | Value::Object(_)) => {
            return Err("label holds several values, as in a table by columns: write one object a row, such as by \
                 pandas.read_json(FILE).to_json('rows.jsonl', orient='records', lines=True)"
                .into());
        }
        Some(other) => {
            let other = other.as_str().map_or_else(|| other.to_string(), quoted);
            return Err(format!("label {other}; it should be \"safe\" or \"unsafe\""));
        }
        None => return Err("a chat row without a label; add \"label\": \"safe\" or \"label\": \"unsafe\"".into()),
    };
    let mut unused = Vec::new();
    let list = ["messages", "conversations"].into_iter().find(|name| filled(row, name).is_some());
    let name = list.unwrap_or("prompt and completion");
    let turns = match (filled(row, "messages"), filled(row, "conversations"), filled(row, "completion")) {
        (Some(list), None, None) => messages(list, "messages")?,
        (None, Some(list), None) => messages(list, "conversations")?,
        (None, None, completion) if row.contains_key("completion") => {
            let prompt = filled(row, "prompt").ok_or_else(|| {
                let hint = if ["vanilla", "adversarial"].iter().all(|name| row.contains_key(*name)) {
                    ": write adversarial, or else vanilla, as prompt"
                } else {
                    ""
                };
                format!("a completion without its prompt{hint}")
            })?;
            let mut turns = text_or_messages(prompt, "prompt", "user")?;
            if turns.is_empty() {
                return Err("a completion without its prompt".into());
            }
            // Assistant turns of the prompt carry no loss unless they say so, only the completion does.
            exclude(&mut turns, "prompt", "of a prompt with its completion only the completion carries loss")?;
            turns.extend(completion.map_or(Ok(vec![]), |c| text_or_messages(c, "completion", "assistant"))?);
            turns
        }
        (None, None, _) => vec![],
        _ => return Err("more than one of messages, conversations and completion; keep one".into()),
    };
    if list.is_some() && filled(row, "prompt").is_some() {
        unused.push("prompt".to_owned());
    }
    if turns.is_empty() {
        return Err("a conversation without messages".into());
    }
    let mut turns = fields::with_system(row, turns)?;
    let mut completed = false;
    if !turns.last().is_some_and(Message::is_assistant) {
        if text(row, "response")?.is_some() {
            return Err(
                "a chat row that ends without a reply, with the field response: write it as the last turn".into()
            );
        }
        let went_on = turns.iter().any(Message::is_assistant);
        // Without a reply, that to an unsafe prompt is the target. A safe prompt stays without a reply: it must not be
        // refused.
        if target.own.is_some() || label == Kind::ChatUnsafe {
            // What the assistant said before is no reply to this prompt, and may be harmful.
            exclude(&mut turns, name, "in a row that is completed with the safe response only that carries loss")?;
            turns.push(target.reply());
            completed = went_on;
        } else if went_on {
            let role = turns.last().map_or("", |last| &last.role);
            return Err(format!(
                "the conversation goes on after the last assistant turn and ends with a {role} turn: the reply of a row is its last turn. \
                 Add the assistant's reply, or remove the turns after the last one"
            ));
        }
    } else if let Some(response) = text(row, "response")?
        && turns.last().is_some_and(|last| last.content.trim() != response.trim())
    {
        return Err("a last assistant turn beside the field response, and they differ; keep one of them".into());
    } else if let Some(own) = target.own {
        let last = turns.last().map_or("", |last| last.content.trim());
        match label {
            Kind::ChatUnsafe if last != own.trim() => {
                return Err(
                    "the last assistant turn of an unsafe row is the refusal that is learnt, and its refusal_response is another one; \
                     keep one of them"
                        .into(),
                );
            }
            Kind::ChatUnsafe => {}
            _ => unused.push("refusal_response".to_owned()),
        }
    }
    let prompt = turns.len() - usize::from(turns.last().is_some_and(Message::is_assistant));
    if prompt == 0 {
        return Err(format!("{name} has only the reply, without a turn before it: add the request, or remove the row"));
    }
    // What the assistant said before it refused may be what the prompt was after.
    let undecided = turns[..prompt].iter().any(|turn| turn.is_assistant() && turn.loss.is_none());
    let earlier_excluded = label == Kind::ChatUnsafe && undecided;
    if earlier_excluded {
        exclude(&mut turns[..prompt], name, "in an unsafe row only the last turn carries loss")?;
    }
    check_request(&turns[..prompt], "the conversation")?;
    let row = Row::new(line, label, last_user_message(&turns));
    let side = Some(Side { messages: turns, prompt });
    let (unsafe_side, safe_side) = if label == Kind::ChatUnsafe { (side, None) } else { (None, side) };
    Ok(Row { unsafe_side, safe_side, completed, earlier_excluded, unused, ..row })
}

/// Whether a row of a kind that needs no label has one that contradicts its unsafe side.
fn is_labelled_safe(row: &Map<String, Value>) -> bool {
    filled(row, "label").and_then(Value::as_str).is_some_and(|label| label.trim().eq_ignore_ascii_case("safe"))
}

fn pair(line: usize, row: &Map<String, Value>, target: Target<'_>) -> Result<Row> {
    let side = |name| {
        let list = row.get(name).filter(|list| !list.is_null()).ok_or_else(|| format!("a pair row without {name}"))?;
        let list = fields::with_system(row, messages(list, name)?)?;
        check_awaits_reply(&list, name)?;
        Ok::<_, String>(list)
    };
    if is_labelled_safe(row) {
        return Err("a pair row with the label safe, and it has an unsafe side, too: remove the label if both sides are meant, or write the \
             safe one as a chat row"
            .into());
    }
    let (safe, unsafe_) = (side("safe_messages")?, side("unsafe_messages")?);
    let response = text(row, "response")?;
    let reply = || response.map_or_else(|| target.reply(), |text| Message::new("assistant", text));
    if let Some((response, own)) = response.zip(target.own)
        && response.trim() != own.trim()
    {
        return Err(
            "response and refusal_response of a pair row are both its reply, and they differ; keep one of them".into(),
        );
    }
    let row = Row::new(line, Kind::Pair, last_user_message(&safe));
    let unsafe_side = Some(Side::with_reply(unsafe_, reply(), "unsafe_messages")?);
    let safe_side = Some(Side::with_reply(safe, reply(), "safe_messages")?);
    Ok(Row { unsafe_side, safe_side, ..row })
}

pub(super) fn last_user_message(messages: &[Message]) -> &str {
    messages.iter().rfind(|m| m.role == "user").map_or("", |m| &m.content)
}

/// Checks that a prompt has turns, that the last one is not an assistant turn, and that it asks something.
fn check_awaits_reply(messages: &[Message], name: &str) -> Result<()> {
    match messages.last() {
        None => Err(format!("{name} has no messages")),
        Some(last) if last.is_assistant() => {
            Err(format!("{name} ends with an assistant turn; it should end with the user's"))
        }
        Some(_) => check_request(messages, name),
    }
}

/// Checks that a prompt asks something: that it has a turn of the user or of a tool, and that a last one of the user is not blank.
pub(super) fn check_request(messages: &[Message], name: &str) -> Result<()> {
    if !messages.iter().any(|turn| ["user", "tool"].contains(&turn.role.as_str())) {
        return Err(format!("{name} has no turn of the user: add the request, or remove the row"));
    }
    match messages.last() {
        Some(last) if last.role == "user" && last.is_blank() => {
            let n = messages.len();
            Err(format!("message {n} of {name} is blank: the request is missing; add it, or remove the row"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(row: Value, keep_failed: bool) -> Result<Option<Row>> {
        match parse(7, row.as_object().unwrap(), "No.", keep_failed)? {
            Parsed::Row(row) => Ok(Some(*row)),
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
            (json!({"judge_success_gpt4": 1, "inception_attack_score": null, "judge_result": {"score": null}}), true),
            (json!({"judge_success_gpt4": null, "inception_attack_score": 0}), false),
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
        let turns = |more: Value| {
            let mut reply = json!({"role": "assistant", "content": "2"});
            reply.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            json!([{"role": "user", "content": "1"}, reply, {"role": "user", "content": "3"}])
        };
        let rows = |attack: Value| {
            [
                json!({"goal": "g", "all_prompt": attack}),
                json!({"safe_messages": [{"role": "user", "content": "s"}], "unsafe_messages": attack, "response": "R"}),
            ]
        };
        for mark in
            [json!({"loss": true}), json!({"train": true}), json!({"loss": true, "weight": 1}), json!({"weight": 1})]
        {
            for row in rows(turns(mark)) {
                let error = read(row, false).unwrap_err();
                assert!(error.contains("message 2 of ") && error.contains("only the reply does"), "{error}");
            }
        }
        let unmarked = [json!({}), json!({"loss": false}), json!({"weight": 0})];
        for row in unmarked.into_iter().flat_map(|mark| rows(turns(mark))) {
            let side = kept(row).unsafe_side.unwrap();
            assert_eq!(
                side.messages.iter().map(|m| m.loss).collect::<Vec<_>>(),
                [Some(false), Some(false), Some(false), None]
            );
            assert_eq!(side.prompt, 3);
        }
    }

    #[test]
    fn an_unsafe_row_carries_loss_on_its_reply_alone_unless_a_turn_says_so() {
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let marked = |mark: Value| {
            let mut earlier = turn("assistant", "Sure: ...");
            earlier.as_object_mut().unwrap().extend(mark.as_object().unwrap().clone());
            vec![turn("user", "1"), earlier, turn("user", "2")]
        };
        // With its own reply, completed with the target, and completed with its own refusal.
        let rows = |mark: Value| {
            let open = marked(mark);
            let whole = [open.clone(), vec![turn("assistant", "No.")]].concat();
            [
                json!({"label": "unsafe", "messages": whole}),
                json!({"label": "unsafe", "conversations": open}),
                json!({"label": "safe", "messages": open, "refusal_response": "No."}),
                json!({"label": "safe", "prompt": open, "completion": "No."}),
                json!({"label": "unsafe", "prompt": turn("user", "0")["content"], "completion": whole[1..]}),
            ]
        };
        let carries = |row: Row| {
            let side = row.unsafe_side.or(row.safe_side).unwrap();
            side.messages.iter().filter(|m| m.is_assistant()).map(|m| m.loss != Some(false)).collect::<Vec<_>>()
        };
        for (mark, earlier) in [
            (json!({}), false),
            (json!({"loss": false, "weight": 0}), false),
            (json!({"loss": true, "weight": 1}), true),
        ] {
            for row in rows(mark.clone()) {
                assert_eq!(carries(kept(row.clone())), [earlier, true], "{row}");
            }
        }
        assert!(
            kept(rows(json!({}))[0].clone()).earlier_excluded
                && !kept(rows(json!({"loss": true}))[0].clone()).earlier_excluded
        );
        for (row, name) in rows(json!({"weight": 1})).into_iter().zip([
            "messages",
            "conversations",
            "messages",
            "prompt",
            "prompt and completion",
        ]) {
            let error = read(row, false).unwrap_err();
            assert!(
                error.contains(&format!("of {name} has weight 1, but ")) && error.contains("write loss: true"),
                "{error}"
            );
        }
        let mut safe = [marked(json!({"weight": 1})), vec![turn("assistant", "Yes.")]].concat();
        assert_eq!(carries(kept(json!({"label": "safe", "messages": safe}))), [true, true]);
        safe[1]["loss"] = json!(false);
        assert!(read(json!({"label": "safe", "messages": safe}), false).unwrap_err().contains("contradict"));
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
    fn two_refusals_that_differ_are_refused() {
        let parsed = |row: Value| parse(1, row.as_object().unwrap(), "No.", false).map(drop);
        let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure."}]);
        let chat = |label: &str, refusal: &str| json!({"label": label, "messages": turns, "refusal_response": refusal});
        assert!(parsed(chat("unsafe", "Own.")).unwrap_err().contains("refusal_response is another one"));
        assert_eq!((parsed(chat("unsafe", " Sure. ")), parsed(chat("safe", "Own."))), (Ok(()), Ok(())));
        // The refusal of an unsafe row is compared, that of a safe row is for nothing.
        assert_eq!(kept(chat("unsafe", "Sure.")).unused, Vec::<String>::new());
        assert_eq!(kept(chat("safe", "Own.")).unused, ["refusal_response"]);
        let user = json!([{"role": "user", "content": "q"}]);
        let pair = |refusal: &str| json!({"safe_messages": user, "unsafe_messages": user, "response": "No.", "refusal_response": refusal});
        assert!(parsed(pair("Own.")).unwrap_err().contains("they differ") && parsed(pair("No.")).is_ok());
    }

    #[test]
    fn an_assistant_turn_before_a_completion_carries_loss_where_it_says_so() {
        let prompt = json!([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss": true},
            {"role": "user", "content": "3"}]);
        let side = kept(json!({"label": "safe", "prompt": prompt, "completion": "4"})).safe_side.unwrap();
        assert_eq!(
            side.messages.iter().map(|m| m.loss).collect::<Vec<_>>(),
            [Some(false), Some(true), Some(false), None]
        );
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
            (
                json!({"instruction": "i", "input": "", "output": "o"}),
                "Write instruction and input as prompt, output as completion",
            ),
            (json!({"prompt": "p", "response": "r", "label": "safe"}), "response. Write response as completion"),
            (json!({"prompt": "p", "response_0": "r", "response_1": "s"}), "Write the response to learn as completion"),
            (json!({"chosen": "Human: q", "rejected": "Human: q"}), "the reply to learn as completion"),
            (json!({"prompt": "p", "label": "unsafe"}), "write completion: null"),
            (json!({"conversation": [], "label": "safe"}), "Write conversation as messages"),
            (json!({"messages": [{"role": "system", "content": "s"}], "label": "unsafe"}), "has no turn of the user"),
            (
                json!({"goal": "g", "all_prompt": [{"role": "system", "content": "s"}]}),
                "all_prompt has no turn of the user",
            ),
            (
                json!({"vanilla": "v", "adversarial": "a", "completion": "c", "label": "unsafe"}),
                "adversarial, or else vanilla, as prompt",
            ),
            (json!({}), "unknown kind"),
            (json!({"messages": user, "all_prompt": user}), "more than one kind"),
            (json!({"messages": user, "judge_success_gpt4": 1}), "more than one kind"),
            (json!({"messages": user, "judge_success_gpt4": null, "goal": "", "all_prompt": []}), "without a label"),
            (json!({"messages": user, "conversations": user, "label": "safe"}), "keep one"),
            (json!({"messages": user}), "add \"label\": \"safe\" or"),
            (json!({"messages": user, "label": "ok"}), "label \"ok\""),
            (json!({"messages": user, "label": 1}), "label 1; it should be \"safe\" or \"unsafe\""),
            (json!({"messages": [user], "label": ["safe"]}), "label holds several values"),
            (json!({"messages": {"0": user}, "label": {"0": "safe"}}), "a table by columns"),
            (json!({"messages": [], "label": "safe"}), "without messages"),
            (
                json!({"messages": [{"role": "assistant", "content": "a"}], "label": "safe"}),
                "messages has only the reply",
            ),
            (json!({"conversations": [{"from": "gpt", "value": "a"}], "label": "unsafe"}), "add the request"),
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
            (json!({"goal": "g", "all_prompt": [{"role": "user", "content": "x", "tool_calls": 1}]}), "tool_calls"),
            (json!({"goal": "g", "all_prompt": [{"from": "observation", "value": "x"}]}), "write this one as tool"),
            (
                json!({"goal": "g", "all_prompt": [{"from": "function_call", "value": "x"}]}),
                "assistant with tool_calls",
            ),
            (json!({"goal": "g", "all_prompt": [{"from": "chatgpt", "value": "x"}]}), "write this one as assistant"),
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
