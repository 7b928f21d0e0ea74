//! One option with a value, as the YAML file and sweeps give it.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use super::RawOptions;
use crate::input::json_words;

/// The option of this name with the value that this text means in the file.
///
/// # Errors
/// What is wrong with the value.
pub(super) fn option(name: &str, text: &str) -> Result<RawOptions, String> {
    let number = || text.parse::<f64>().ok().filter(|x| x.is_finite());
    let value = match text {
        "" => return Err("the value is empty".into()),
        "true" => true.into(),
        "false" => false.into(),
        _ => text
            .parse::<u64>()
            .map(Value::from)
            .ok()
            .or_else(|| number().map(Value::from))
            .unwrap_or_else(|| text.into()),
    };
    one(name, value)
}

/// An option with a value.
pub(super) fn one<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, String> {
    T::deserialize(Value::Object(Map::from_iter([(name.to_owned(), value)]))).map_err(|e| json_words(&e))
}
