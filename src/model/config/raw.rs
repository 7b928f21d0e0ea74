//! Typed access to the keys of a config.json; errors name the file and the key.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::error::Error;
use crate::input;
use crate::model::json::Members;
use crate::quote::cut;

/// The object of a config.json, or an object nested in it.
pub(crate) struct RawConfig {
    path: PathBuf,
    /// Prefix of keys in messages: empty, or for example `rope_scaling.`.
    prefix: String,
    members: serde_json::Map<String, Value>,
}

/// Far above any real size; the product of two such sizes cannot overflow.
const MAX_SIZE: u64 = 1 << 28;

impl RawConfig {
    pub(crate) fn read(path: &Path) -> Result<Self, Error> {
        Self::of_text(path, &input::read(path).map_err(|source| Error::read(path, source))?)
    }

    /// The object in `bytes`, which come from the file `path`.
    pub(crate) fn of_text(path: &Path, bytes: &[u8]) -> Result<Self, Error> {
        let text = input::without_mark(bytes);
        let members: Members<Value> = serde_json::from_slice(text)
            .map_err(|e| Error::NotJson { path: path.into(), message: input::not_json(text, &e) })?;
        Ok(Self { path: path.into(), prefix: String::new(), members: members.0.into_iter().collect() })
    }

    /// An error: the key's value is invalid.
    pub(crate) fn invalid(&self, key: &str, message: impl Into<String>) -> Error {
        Error::Invalid { path: self.path.clone(), key: self.full(key), message: message.into() }
    }

    /// An error: the key's value is valid, but moewarden does not implement it.
    pub(crate) fn unsupported(&self, key: &str, message: impl Into<String>) -> Error {
        Error::Unsupported { path: self.path.clone(), key: self.full(key), message: message.into() }
    }

    fn full(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// The key's value; `None` if it is null or absent.
    pub(crate) fn get(&self, key: &str) -> Option<&Value> {
        self.members.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key is present and null.
    pub(crate) fn is_null(&self, key: &str) -> bool {
        self.members.get(key).is_some_and(Value::is_null)
    }

    pub(crate) fn string(&self, key: &str) -> Result<Option<&str>, Error> {
        self.typed(key, "a string", Value::as_str)
    }

    pub(crate) fn flag(&self, key: &str, default: bool) -> Result<bool, Error> {
        Ok(self.typed(key, "true or false", Value::as_bool)?.unwrap_or(default))
    }

    /// A finite number.
    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>, Error> {
        self.typed(key, "a finite number", |value| value.as_f64().filter(|x| x.is_finite()))
    }

    /// A number above `above`.
    pub(crate) fn number_above(&self, key: &str, above: f64) -> Result<Option<f64>, Error> {
        match self.number(key)? {
            Some(x) if x <= above => Err(self.invalid(key, format!("{x} must be above {above}"))),
            other => Ok(other),
        }
    }

    /// A size from 1 to [`MAX_SIZE`].
    pub(crate) fn size(&self, key: &str) -> Result<Option<usize>, Error> {
        let read = |value: &Value| value.as_u64().filter(|n| (1..=MAX_SIZE).contains(n)).map(|n| n as usize);
        self.typed(key, "a whole number from 1 to 268435456", read)
    }

    /// A size that may be absent, but not null: transformers refuses that.
    pub(crate) fn size_or(&self, key: &str, default: usize) -> Result<usize, Error> {
        if self.is_null(key) {
            return Err(
                self.invalid(key, "null is no number: write one, or leave the key out for the family's default")
            );
        }
        Ok(self.size(key)?.unwrap_or(default))
    }

    pub(crate) fn list(&self, key: &str) -> Result<Option<&Vec<Value>>, Error> {
        self.typed(key, "a list", Value::as_array)
    }

    /// The object under this key.
    pub(crate) fn object(&self, key: &str) -> Result<Option<Self>, Error> {
        let members = self.typed(key, "an object", Value::as_object)?;
        Ok(members.map(|m| Self {
            path: self.path.clone(),
            prefix: format!("{}.", self.full(key)),
            members: m.clone(),
        }))
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        kind: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, Error> {
        let Some(value) = self.get(key) else { return Ok(None) };
        read(value).map(Some).ok_or_else(|| self.invalid(key, format!("{} is not {kind}", cut(&value.to_string(), 80))))
    }
}
