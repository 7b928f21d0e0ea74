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
mod tests;
