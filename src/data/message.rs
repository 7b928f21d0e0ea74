//! One turn of a conversation.

use serde::Serialize;
use serde_json::{Map, Value};

use super::values::is_blank;

/// Fields of a turn that name something; the model sees them only through templates that ask for them.
pub(super) const NAMES: [&str; 2] = ["name", "tool_call_id"];

/// The origin of the system turn that the safe side of an attack row gets.
pub(super) const SYSTEM_OF_GOAL: &str = "added by moewarden: the request in goal gets it";

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Message {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    /// Text of the turn; of a list of parts, their texts one after another.
    pub content: String,
    /// Further fields that a chat template may read, such as `reasoning_content` and `tool_calls`. None is empty.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
    /// `Some(false)` excludes an assistant turn from the loss. Not passed to chat templates.
    #[serde(skip)]
    pub loss: Option<bool>,
    /// Whether it is an assistant turn that the row itself excludes from the loss.
    #[serde(skip)]
    pub(super) excluded: bool,
    /// Whether it is an assistant turn with `weight` 1, and no other field decides its loss.
    #[serde(skip)]
    pub(super) weighted: bool,
    /// How the row gives the content.
    #[serde(skip)]
    pub(super) form: Form,
    /// Names of `fields` without what was null in them.
    #[serde(skip)]
    pub(super) nulls: Vec<&'static str>,
    /// Names of fields that moewarden does not know. Not passed to chat templates.
    #[serde(skip)]
    pub(super) unknown: Vec<String>,
    /// Where the turn comes from, if it is not one of the row's own; for messages.
    #[serde(skip)]
    pub(super) origin: Option<&'static str>,
}

/// How a row gives the content of a turn. A chat template can tell these apart.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) enum Form {
    /// A string.
    #[default]
    Text,
    /// `null`, beside other fields.
    Null,
    /// No content, but other fields.
    Missing,
    /// A list of `{"type": "text", "text": ...}`: the texts.
    Parts(Vec<String>),
}

impl Message {
    /// A turn with the default loss of its role: an assistant turn carries loss, any other does not.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
            fields: Map::new(),
            loss: None,
            excluded: false,
            weighted: false,
            form: Form::Text,
            nulls: Vec::new(),
            unknown: Vec::new(),
            origin: None,
        }
    }

    /// A turn that the row does not hold as one of its turns.
    pub(super) fn added(role: &str, content: impl Into<String>, origin: &'static str) -> Self {
        Self { origin: Some(origin), ..Self::new(role, content) }
    }

    /// Whether the role is `assistant`.
    pub fn is_assistant(&self) -> bool {
        self.role == "assistant"
    }

    /// Whether the turn says nothing: a blank text, and no further fields, but for names.
    pub(super) fn is_blank(&self) -> bool {
        is_blank(&self.content) && self.fields.keys().all(|name| NAMES.contains(&name.as_str()))
    }

    /// Bytes of role, content and further fields.
    pub(super) fn bytes(&self) -> usize {
        self.role.len() + self.content.len() + map_bytes(&self.fields)
    }
}

/// Bytes of the texts in a value, with some for the structure around them.
fn value_bytes(value: &Value) -> usize {
    match value {
        Value::String(text) => text.len() + 2,
        Value::Array(items) => items.iter().map(|item| value_bytes(item) + 2).sum(),
        Value::Object(map) => map_bytes(map),
        _ => 8,
    }
}

/// [`value_bytes`] of all fields of an object.
pub(super) fn map_bytes(map: &Map<String, Value>) -> usize {
    map.iter().map(|(name, value)| name.len() + value_bytes(value) + 4).sum()
}
