//! Turns and variables as a chat template sees them: objects that record what the template reads.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use minijinja::Value;
use minijinja::value::{Enumerator, Object};
use serde_json::Value as Json;

use super::big_integers;
use super::message::{Form, Message};

/// A JSON value for a template, with the keys of objects in their order.
pub(super) fn template_value(value: &Json) -> Value {
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(n) => match (n.as_i64(), n.as_u64()) {
            (Some(n), _) => Value::from(n),
            (_, Some(n)) => Value::from(n),
            _ => Value::from(n.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text),
        Json::Array(items) => items.iter().map(template_value).collect(),
        Json::Object(map) => big_integers::read(map).map_or_else(
            || Value::from_pairs(map.iter().map(|(name, value)| (name, template_value(value)))),
            Value::from,
        ),
    }
}

/// What a rendering read of a turn.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Reads {
    /// Whether it listed all fields.
    all: bool,
    names: BTreeSet<String>,
}

impl Reads {
    /// Whether the field of this name was read, or asked for in vain.
    pub fn has(&self, name: &str) -> bool {
        self.all || self.names.contains(name)
    }
}

/// What a rendering read.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Access {
    /// Of each turn.
    pub turns: Vec<Reads>,
    /// Variables, those without a value included.
    pub variables: BTreeSet<String>,
}

/// The variables of one rendering.
#[derive(Debug)]
pub(super) struct Variables {
    values: HashMap<String, Value>,
    read: Mutex<BTreeSet<String>>,
}

impl Variables {
    /// Of two values with one name the later counts.
    pub fn new(values: impl IntoIterator<Item = (String, Value)>) -> Arc<Self> {
        Arc::new(Self { values: values.into_iter().collect(), read: Mutex::default() })
    }

    /// What was read so far.
    pub fn read(&self) -> BTreeSet<String> {
        self.read.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Object for Variables {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if !read.contains(key) {
            read.insert(key.to_owned());
        }
        self.values.get(key).cloned()
    }
}

/// A turn of one rendering.
#[derive(Debug)]
pub(super) struct Turn {
    /// In the order in which a template lists them.
    fields: Vec<(&'static str, Value)>,
    more: Vec<(String, Value)>,
    reads: Mutex<Reads>,
}

impl Turn {
    /// `as_parts`: a content that is a list of parts is given as such, not as text.
    pub fn new(message: &Message, as_parts: bool) -> Arc<Self> {
        let content = match &message.form {
            Form::Missing => None,
            Form::Null => Some(Value::from(())),
            Form::Parts(texts) if as_parts => {
                let part = |text: &String| Value::from_pairs([("type", "text"), ("text", text)]);
                Some(texts.iter().map(part).collect())
            }
            Form::Text | Form::Parts(_) => Some(Value::from(&message.content)),
        };
        let mut fields = vec![("role", Value::from(&message.role))];
        fields.extend(content.map(|content| ("content", content)));
        let more = message.fields.iter().map(|(name, value)| (name.clone(), template_value(value))).collect();
        Arc::new(Self { fields, more, reads: Mutex::default() })
    }

    /// What was read so far.
    pub fn reads(&self) -> Reads {
        self.record(|reads| reads.clone())
    }

    fn record<T>(&self, change: impl FnOnce(&mut Reads) -> T) -> T {
        change(&mut self.reads.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Object for Turn {
    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        let key = key.as_str()?;
        if !["role", "content"].contains(&key) {
            self.record(|reads| reads.names.insert(key.to_owned()));
        }
        let own = self.fields.iter().find(|(name, _)| *name == key).map(|(_, value)| value.clone());
        own.or_else(|| self.more.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone()))
    }

    fn enumerate(self: &Arc<Self>) -> Enumerator {
        self.record(|reads| reads.all = true);
        let own = self.fields.iter().map(|(name, _)| Value::from(*name));
        Enumerator::Values(own.chain(self.more.iter().map(|(name, _)| Value::from(name))).collect())
    }

    fn enumerator_len(self: &Arc<Self>) -> Option<usize> {
        Some(self.fields.len() + self.more.len())
    }
}
