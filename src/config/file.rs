//! Reads the YAML file of options: a flat map whose keys are the names of the flags.

use std::fmt;
use std::path::Path;

use clap::{Args, Command};
use serde::de::{self, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use serde_saphyr::Spanned;

use super::{ConfigError, Meaning, RawOptions, nearest, spelled};
use crate::input;
use crate::quote::{cut, quote};

/// Reads the options that a YAML file gives.
///
/// # Errors
/// [`ConfigError::NotRead`], or [`ConfigError::File`] for the first wrong line.
pub(super) fn read(path: &Path) -> Result<RawOptions, ConfigError> {
    let text = input::read_text(path).map_err(|source| ConfigError::NotRead { path: path.to_owned(), source })?;
    parse(&text).map_err(|(line, message)| ConfigError::File { path: path.to_owned(), line, message })
}

/// [`read`] on the text; errors are (line, message).
pub(super) fn parse(text: &str) -> Result<RawOptions, (u64, String)> {
    let command = RawOptions::augment_args(Command::new("options"));
    let Entries(entries) = serde_saphyr::from_str::<Option<Entries>>(text)
        .map_err(|e| (e.location().map_or(0, |l| l.line()), plain_yaml(&e.without_snippet().to_string())))?
        .unwrap_or_default();

    let mut options = RawOptions::default();
    let mut seen: Vec<Entry> = Vec::new();
    for (key, Spanned { value: Scalar(value), .. }) in entries {
        let (line, key) = (key.referenced.line(), key.value);
        let Some(option) = spelled(&command, &key) else {
            let hint = nearest(&command, &key).map_or_else(String::new, |known| format!("; did you mean `{known}`?"));
            return Err((line, format!("unknown option `{key}`{hint}")));
        };
        let name = option.name().to_owned();
        let value = match (option.meaning, value) {
            (_, Value::Null) => continue, // `option:` without a value sets nothing
            (Meaning::Itself, value) => value,
            (Meaning::Negated, Value::Bool(value)) => Value::Bool(!value),
            (Meaning::Fixed("false"), Value::Bool(true)) => Value::Bool(false),
            (Meaning::Fixed(text), Value::Bool(true)) => Value::String(text.to_owned()),
            (Meaning::Fixed(_), Value::Bool(false)) => continue,
            (_, value) => return Err((line, format!("`{key}` is {value}, expected true or false"))),
        };
        // One option at a time, so that the error belongs to this line.
        let given = RawOptions::deserialize(Value::Object(Map::from_iter([(name.clone(), value.clone())])))
            .map_err(|e| (line, format!("`{key}`: {}", plain(&e))))?;
        if let Some(earlier) = seen.iter().find(|earlier| earlier.name == name && earlier.value != value) {
            let message =
                format!("`{key}` and `{}` (line {}) give the same option two values", earlier.key, earlier.line);
            return Err((line, message));
        }
        options = given.or(options);
        seen.push(Entry { name, value, key, line });
    }
    Ok(options)
}

/// An option of the file, kept to compare it with another spelling of the same option.
struct Entry {
    /// The option's kebab-case name.
    name: String,
    value: Value,
    /// The name as the file spells it.
    key: String,
    line: u64,
}

/// An error of the YAML library in the user's words: without the library's own options, and without the line, which the caller
/// names.
pub fn plain_yaml(message: &str) -> String {
    let message = message.split(" at line ").next().unwrap_or_default();
    let message = message.split(", set ").next().unwrap_or_default();
    match message.strip_prefix("duplicate mapping key") {
        Some(key) => {
            let key = key.trim_start_matches(": ");
            format!("{} is there twice: leave one out", if key.is_empty() { "a key".into() } else { quote(key) })
        }
        None => cut(message, 300),
    }
}

/// A type error without Rust's type names.
fn plain(error: &serde_json::Error) -> String {
    let whole = "expected a whole number, not negative";
    error
        .to_string()
        .replace("expected usize", whole)
        .replace("expected u64", whole)
        .replace("expected f64", "expected a number")
}

/// Keys and values in the order of the file. (A map type would merge repeated keys before they can be compared.)
#[derive(Default)]
struct Entries(Vec<(Spanned<String>, Spanned<Scalar>)>);

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Flat;
        impl<'de> Visitor<'de> for Flat {
            type Value = Entries;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a map of options, one `name: value` a line")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Vec::new();
                while let Some(entry) = map.next_entry()? {
                    entries.push(entry);
                }
                Ok(Entries(entries))
            }
        }
        from.deserialize_map(Flat)
    }
}

/// One value: a boolean, a finite number, a string or null.
struct Scalar(Value);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct One;
        impl Visitor<'_> for One {
            type Value = Scalar;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("one value: true or false, a number or text")
            }
            fn visit_bool<E>(self, value: bool) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_i64<E>(self, value: i64) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_u64<E>(self, value: u64) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_f64<E: de::Error>(self, value: f64) -> Result<Scalar, E> {
                // `serde_json::Value` has no infinity, and no option accepts it.
                if value.is_finite() { Ok(Scalar(value.into())) } else { Err(E::custom("the number must be finite")) }
            }
            fn visit_str<E>(self, value: &str) -> Result<Scalar, E> {
                Ok(Scalar(value.into()))
            }
            fn visit_unit<E>(self) -> Result<Scalar, E> {
                Ok(Scalar(Value::Null))
            }
            fn visit_none<E>(self) -> Result<Scalar, E> {
                Ok(Scalar(Value::Null))
            }
        }
        from.deserialize_any(One)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The options that are given, as JSON.
    fn ok(text: &str) -> Value {
        let options = serde_json::to_value(parse(text).unwrap()).unwrap();
        let Value::Object(options) = options else { panic!("{options}") };
        Value::Object(options.into_iter().filter(|(_, value)| !value.is_null()).collect())
    }

    #[test]
    fn names_and_values_are_those_of_the_flags() {
        assert_eq!(
            ok("# a comment\ntop_k_experts: 128\nexpert-lr: 5e-5\nno-shuffle: true\nlayers: 8-15\nkl-type: reverse\n"),
            json!({"top-k-experts": 128, "expert-lr": 5e-5, "shuffle": false, "layers": "8-15", "kl-type": "reverse"})
        );
        assert_eq!(ok("layers: 8\n"), json!({"layers": "8"}));
        assert_eq!(ok("use_random_experts: true\nfull_param_training: false\n"), json!({"method": "random"}));
        assert_eq!(ok("skip-expert-training: true\n"), json!({"finetune-unsafe-experts": false}));
        assert_eq!(ok("router_consistency_layers: unsafe_only\n"), json!({"router-consistency-layers": "unsafe-only"}));
        assert_eq!(ok(""), json!({}));
        assert_eq!(ok("max-grad-norm:\n"), json!({}));
        assert_eq!(ok("seed: 1\nrandom-seed: 1\n"), json!({"seed": 1}));
    }

    #[test]
    fn wrong_files_are_refused_with_their_line() {
        let cases = [
            ("seed: 1\ntop-k-expert: 3\n", 2, "did you mean `top-k-experts`"),
            ("\n\nlearning_rat: 1e-4\n", 3, "did you mean `learning-rate`"),
            ("zzz: 1\n", 1, "unknown option `zzz`"),
            ("seed: 1\nkl-type: forwards\n", 2, "expected one of `forward`, `reverse`, `symmetric`"),
            ("batch-size: eight\n", 1, "expected a whole number, not negative"),
            ("batch-size: -8\n", 1, "expected a whole number, not negative"),
            ("batch-size: 8.5\n", 1, "expected a whole number, not negative"),
            ("shuffle: maybe\n", 1, "expected a boolean"),
            ("use-random-experts: 7\n", 1, "expected true or false"),
            ("layers: 8-x\n", 1, "one range of layers"),
            ("seed: 1\nseed: 2\n", 2, "seed"),
            ("random_seed: 1\nseed: 2\n", 2, "(line 1) give the same option two values"),
            ("expert-lr: .inf\n", 1, "finite"),
            ("layers: [1, 2]\n", 1, "one value"),
            ("- seed\n", 1, "expected mapping"),
            ("seed: 1\nlayers: 8: 9\n", 2, ""),
        ];
        for (text, line, message) in cases {
            let (at, why) = parse(text).expect_err(text);
            assert!(why.contains(message), "{text:?}: {why}");
            assert_eq!(at, line, "{text:?}: {why}");
        }
    }
}
