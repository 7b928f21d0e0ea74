//! Reads the YAML file of options: a flat map whose keys are the names of the flags.

use std::fmt;
use std::path::Path;

use clap::{Arg, ArgAction, Args, Command};
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use serde_saphyr::Spanned;

use super::one_option::one;
use super::{CompareArgs, ConfigError, Meaning, RawOptions, nearest, spelled};
use crate::data::Unique;
use crate::input;

/// The options that a YAML file gives: those of runs, and those of `compare`.
#[derive(Debug, Clone, PartialEq, Default)]
pub(super) struct FileOptions {
    pub run: RawOptions,
    pub compare: CompareArgs,
    /// Names of the options of `compare` that are given.
    pub of_compare: Vec<String>,
}

/// Reads the options that a YAML file gives.
///
/// # Errors
/// [`ConfigError::NotRead`], or [`ConfigError::File`] for the first wrong line.
pub(super) fn read(path: &Path) -> Result<FileOptions, ConfigError> {
    let text = input::read_text(path).map_err(|source| ConfigError::NotRead { path: path.to_owned(), source })?;
    parse(&text).map_err(|(line, message)| ConfigError::File { path: path.to_owned(), line, message })
}

/// [`read`] on the text; errors are (line, message).
pub(super) fn parse(text: &str) -> Result<FileOptions, (u64, String)> {
    let of_compare = CompareArgs::augment_args(Command::new("options"));
    let command = RawOptions::augment_args(of_compare.clone());
    let Entries(entries) = serde_saphyr::from_str::<Option<Entries>>(text)
        .map_err(|e| (e.location().map_or(0, |l| l.line()), input::yaml_words(&e)))?
        .unwrap_or_default();

    let mut options = FileOptions::default();
    let mut seen: Vec<Entry> = Vec::new();
    for (key, Spanned { value: Unique(value), .. }) in entries {
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
        let wrong = |e| (line, format!("`{key}`: {e}"));
        check_form(&name, &value).map_err(wrong)?;
        match spelled(&of_compare, &name) {
            Some(option) => {
                let given: CompareArgs = one(&name, listed(option.arg, value.clone())).map_err(wrong)?;
                options.compare = given.or(options.compare);
                options.of_compare.push(name.clone());
            }
            None if value.is_array() => return Err(wrong("expected one value, not a list".into())),
            None => options.run = one::<RawOptions>(&name, value.clone()).map_err(wrong)?.or(options.run),
        }
        if let Some(earlier) = seen.iter().find(|earlier| earlier.name == name && earlier.value != value) {
            let message =
                format!("`{key}` and `{}` (line {}) give the same option two values", earlier.key, earlier.line);
            return Err((line, message));
        }
        seen.push(Entry { name, value, key, line });
    }
    Ok(options)
}

/// The value of an option that can be given several times as a list: one value is a list of one, or, where the flag takes
/// comma-separated values, of these.
fn listed(option: &Arg, value: Value) -> Value {
    match value {
        Value::String(text) if option.get_value_delimiter() == Some(',') => text.split(',').map(str::trim).collect(),
        value if value.is_array() || !matches!(option.get_action(), ArgAction::Append) => value,
        value => Value::Array(vec![value]),
    }
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

/// Keys and values in the order of the file. (A map type would merge repeated keys before they can be compared.)
#[derive(Default)]
struct Entries(Vec<(Spanned<String>, Spanned<Unique>)>);

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

/// Checks that a value has the form that the option takes: one value, a list of values, or, of variables of a template, a map.
fn check_form(option: &str, value: &Value) -> Result<(), String> {
    let form = match value {
        Value::Object(_) if option.ends_with("chat-template-kwargs") => return Ok(()),
        Value::Array(_) if option.ends_with("chat-template-kwargs") => {
            return Err("expected a map, one `variable: value` a line, or an object of JSON as text, not a list".into());
        }
        Value::Object(_) => "map",
        Value::Array(items) if items.iter().any(|item| item.is_array() || item.is_object()) => "list of lists or maps",
        _ => return Ok(()),
    };
    Err(format!("expected one value, true or false, a number or text, not a {form}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::experts::Method;

    /// The options that are given, as JSON.
    fn ok(text: &str) -> Value {
        let options = serde_json::to_value(parse(text).unwrap().run).unwrap();
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
        let kwargs =
            json!({"chat-template-kwargs": r#"{"enable_thinking":false,"levels":["a",{"b":1.5}],"none":null}"#});
        for text in [
            "chat_template_kwargs:\n  enable_thinking: false\n  levels:\n    - a\n    - b: 1.5\n  none:\n",
            "chat-template-kwargs: {enable_thinking: false, levels: [a, {b: 1.5}], none: null}\n",
            r#"chat-template-kwargs: '{"enable_thinking": false, "levels": ["a", {"b": 1.5}], "none": null}'"#,
        ] {
            assert_eq!(ok(text), kwargs, "{text}");
        }
        // Words that are true or false in YAML 1.1, unless they are quoted.
        let words = ok("chat-template-kwargs: {a: no, b: On, c: 'no', d: 7}\n");
        assert_eq!(words["chat-template-kwargs"], r#"{"a":false,"b":true,"c":"no","d":7}"#);
        let compare = parse("judge-chat-template-kwargs: {a: [S14]}").unwrap().compare;
        assert_eq!(compare.judge_chat_template_kwargs.unwrap().to_string(), r#"{"a":["S14"]}"#);
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
            ("batch-size: eight\n", 1, "a whole number, not negative, not the text \"eight\""),
            ("batch-size: -8\n", 1, "a whole number, not negative"),
            ("batch-size: 8.5\n", 1, "a whole number, not negative"),
            ("shuffle: maybe\n", 1, "true or false"),
            ("use-random-experts: 7\n", 1, "expected true or false"),
            ("layers: 8-x\n", 1, "one range of layers"),
            ("seed: 1\nseed: 2\n", 2, "seed"),
            ("random_seed: 1\nseed: 2\n", 2, "(line 1) give the same option two values"),
            ("expert-lr: .inf\n", 1, "finite"),
            ("layers: [1, 2]\n", 1, "one value"),
            ("layers: {a: 2}\n", 1, "one value"),
            ("seed: 1\nsweep: [[seed=1]]\n", 2, "one value"),
            ("chat-template-kwargs: [a]\n", 1, "expected a map, one `variable: value` a line"),
            ("seed: 1\nchat-template-kwargs: [a]\n", 2, "not a list"),
            ("chat-template-kwargs: enable_thinking\n", 1, "expected a JSON object such as"),
            ("chat-template-kwargs: 1\n", 1, "an object of variables, or its JSON text"),
            ("chat-template-kwargs: {messages: []}\n", 1, "the rows decide messages"),
            ("chat-template-kwargs: {a: 1, a: 2}\n", 1, "`a` is there twice"),
            ("chat-template-kwargs: {a: .nan}\n", 1, "finite"),
        ];
        for (text, line, message) in cases {
            let (at, why) = parse(text).expect_err(text);
            assert!(why.contains(message), "{text:?}: {why}");
            assert_eq!(at, line, "{text:?}: {why}");
        }
    }

    #[test]
    fn options_of_compare_are_lists() {
        let text = "seed: 3\nmethods: gradient, random\nablations: [frozen]\nsweep:\n  - expert-lr=1e-5,1e-4\n  - seed=1,2\nquestions: a,b.jsonl\nskip-answers: true\n";
        let found = parse(text).unwrap();
        assert_eq!(found.run.seed, Some(3));
        assert_eq!(found.compare.methods, [Method::Gradient, Method::Random]);
        let sweeps: Vec<_> = found.compare.sweep.iter().map(ToString::to_string).collect();
        assert_eq!(sweeps, ["expert-lr=1e-5,1e-4", "seed=1,2"]);
        assert_eq!(found.compare.questions, [Path::new("a,b.jsonl")]);
        assert_eq!(found.compare.skip_answers, Some(true));
        assert_eq!(found.of_compare, ["methods", "ablations", "sweep", "questions", "skip-answers"]);
        assert_eq!(parse("sweep: seed=1,2").unwrap().compare.sweep.len(), 1);
    }
}
