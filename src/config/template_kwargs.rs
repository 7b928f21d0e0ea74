//! The option `chat-template-kwargs`: variables of the chat template, as a JSON object or, in a YAML file, as a map.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use serde_json::{Map, Value};

use crate::data::{OWN_VARIABLES, Unique, json_object};

/// Variables of the chat template, by name.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TemplateKwargs(pub Map<String, Value>);

impl TemplateKwargs {
    /// These variables.
    ///
    /// # Errors
    /// The name of a variable that the program itself gives the template.
    pub fn of(map: Map<String, Value>) -> Result<Self, String> {
        match OWN_VARIABLES.iter().find(|n| map.contains_key(**n)) {
            Some(own) => Err(format!("the rows decide {own}")),
            None => Ok(Self(map)),
        }
    }
}

impl FromStr for TemplateKwargs {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let map = json_object(text)
            .map_err(|e| format!(r#"expected a JSON object such as {{"enable_thinking": false}}: {e}"#))?;
        Self::of(map)
    }
}

impl fmt::Display for TemplateKwargs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(&self.0).map_err(|_| fmt::Error)?)
    }
}

impl Serialize for TemplateKwargs {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TemplateKwargs {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let of_value = |value| match value {
            Value::String(text) => text.parse(),
            Value::Object(map) => Self::of(map),
            Value::Array(_) => Err("expected an object of variables, or its JSON text, not a list".into()),
            other => Err(format!("expected an object of variables, or its JSON text, not {other}")),
        };
        let Unique(value) = Unique::deserialize(from)?;
        of_value(value).map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_json_object_and_nothing_else() {
        let text = r#"{"enable_thinking":false,"reasoning_effort":"low"}"#;
        let kwargs: TemplateKwargs = text.parse().unwrap();
        assert_eq!(kwargs.to_string(), text);
        let json = serde_json::to_value(&kwargs).unwrap();
        assert_eq!(serde_json::from_value::<TemplateKwargs>(json).unwrap(), kwargs);
        for wrong in [
            "",
            "enable_thinking",
            "[]",
            "{",
            r#"{"messages": []}"#,
            r#"{"add_generation_prompt": true}"#,
            r#"{"a": true, "a": false}"#,
        ] {
            assert!(wrong.parse::<TemplateKwargs>().is_err(), "{wrong}");
        }
    }
}
