//! Values of JSON and YAML in which no object has a key twice: of two values under one key the first would be dropped.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::values::name_of;
use crate::input::json_problem;

/// A value that was read; reading fails where a key occurs twice.
pub struct Unique(
    /// The value.
    pub Value,
);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyValue).map(Self)
    }
}

/// A JSON object in which no object has a key twice.
///
/// # Errors
/// The parser's message, or that it is no object.
pub fn object(text: &str) -> Result<Map<String, Value>, String> {
    match serde_json::from_str(text) {
        Ok(Unique(Value::Object(map))) => Ok(map),
        Ok(_) => Err("it is no object".into()),
        Err(e) => Err(json_problem(&e)),
    }
}

struct AnyValue;

impl<'de> Visitor<'de> for AnyValue {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_none<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        // YAML has numbers that are not finite; `Value` has none of them.
        if value.is_finite() { Ok(value.into()) } else { Err(E::custom("the number must be finite")) }
    }

    fn visit_str<E>(self, text: &str) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_string<E>(self, text: String) -> Result<Value, E> {
        Ok(text.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(Unique(item)) = items.next_element()? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            if map.contains_key(&key) {
                return Err(A::Error::custom(format_args!(
                    "the field {} occurs twice in one object: keep one of them",
                    name_of(&key)
                )));
            }
            let Unique(value) = entries.next_value()?;
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_key_that_occurs_twice_is_an_error() {
        for (text, key) in [
            (r#"{"a": 1, "a": 1}"#, "a"),
            (r#"{"a": [{"b": {}, "c": 1, "b": 2}]}"#, "b"),
            (r#"{"a":1,"\u0061":2}"#, "a"),
        ] {
            let error = serde_json::from_str::<Unique>(text).err().unwrap().to_string();
            assert!(error.contains(&format!("the field {key} occurs twice")), "{error}");
        }
        assert!(serde_json::from_str::<Unique>(r#"{"a": {"b": 1}, "b": {"a": 1}, "c": [{"a": 1}, {"a": 1}]}"#).is_ok());
    }

    proptest! {
        #[test]
        fn other_values_are_read_as_by_serde_json(texts in prop::collection::vec(r#"[0-9]{1,22}|-[0-9]{1,20}|[0-9]\.[0-9]{1,4}e-?[0-9]{1,3}|null|true|"[a\\n]{0,3}"|\[\]|\{\}"#, 0..6)) {
            let fields: Vec<_> = texts.iter().enumerate().map(|(i, text)| format!("\"k{}\":[{text}]", (i * 5) % 6)).collect();
            let text = format!("{{{}}}", fields.join(","));
            let (ours, theirs) = (serde_json::from_str::<Unique>(&text), serde_json::from_str::<Value>(&text));
            match (ours, theirs) {
                (Ok(Unique(ours)), Ok(theirs)) => prop_assert_eq!(ours.to_string(), theirs.to_string()),
                (ours, theirs) => prop_assert_eq!(ours.err().map(|e| e.to_string()), theirs.err().map(|e| e.to_string())),
            }
        }
    }
}
