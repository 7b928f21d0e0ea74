//! The filter `tojson` of transformers: `json.dumps` with `ensure_ascii=False` by default.

use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Error, Value};

use super::arguments::{all, arguments, text};
use super::limits::{check_size, check_width, refuse};
use super::printing::number;

const MAX_DEPTH: usize = 64;

/// The filter; arguments: ensure_ascii, indent (a width or a text), separators, sort_keys.
pub(super) fn tojson(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] =
        arguments(&all(args, named), names)?.map(|given| given.filter(|value| !value.is_none()));
    let indent = match &indent {
        Some(indent) if indent.as_str().is_some() => Some(text(Some(indent), "indent")?.to_owned()),
        Some(width) => Some(" ".repeat(check_width(i64::try_from(width.clone())?)?)),
        None => None,
    };
    let separators = match separators {
        Some(pair) => match &pair.try_iter()?.collect::<Vec<_>>()[..] {
            [item, key] => (text(Some(item), "separators")?.to_owned(), text(Some(key), "separators")?.to_owned()),
            _ => return refuse("tojson: separators should be a pair"),
        },
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (ensure_ascii, sort_keys) = (is_true(ensure_ascii), is_true(sort_keys));
    let mut json = Json { out: String::new(), ensure_ascii, sort_keys, indent, separators };
    json.value(value, 0)?;
    Ok(json.out)
}

/// A JSON writer with the options of `json.dumps`.
struct Json {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    /// What begins a line, once for each level.
    indent: Option<String>,
    /// Between items; between key and value.
    separators: (String, String),
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_size(self.out.len())?;
        if depth > MAX_DEPTH {
            return refuse("tojson: nested too deep");
        }
        match value.kind() {
            ValueKind::None | ValueKind::Bool | ValueKind::Number => self.out.push_str(&word(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container(['[', ']'], &items, depth, |json, item| json.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.container(['{', '}'], &keys, depth, |json, key| {
                    match key.as_str() {
                        Some(text) => json.string(text),
                        None => json.string(&word(key)),
                    }
                    json.out.push_str(&json.separators.1.clone());
                    json.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            other => return refuse(format!("tojson: {other} has no JSON form")),
        }
        Ok(())
    }

    fn container(
        &mut self,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut each: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.separators.0.clone());
            }
            self.new_line(depth + 1);
            each(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(indent) = &self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(&**indent, depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// None, a boolean or a number, as a value or as the text of a key.
fn word(value: &Value) -> String {
    match value.kind() {
        ValueKind::None => "null".into(),
        ValueKind::Bool => if value.is_true() { "true" } else { "false" }.into(),
        _ => match f64::try_from(value.clone()) {
            Ok(float) if float.is_nan() => "NaN".into(),
            Ok(float) if float.is_infinite() => if float > 0.0 { "Infinity" } else { "-Infinity" }.into(),
            _ => number(value),
        },
    }
}
