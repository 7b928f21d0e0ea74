//! Numbers in a rendered text: `~` and format strings print some as Rust does, all else as Python does.

use serde_json::{Map, Value};

use super::jinja::python_float;
use super::message::Message;

/// A number of the inputs that stands in `text` as Python does not print it, as both print it.
pub(super) fn printed_otherwise(
    text: &str,
    messages: &[Message],
    variables: &Map<String, Value>,
) -> Option<(String, String)> {
    let mut inputs = Inputs::default();
    messages.iter().flat_map(|message| message.fields.values()).chain(variables.values()).for_each(|v| inputs.add(v));
    for number in inputs.numbers {
        let python = python_float(number);
        for rust in [format!("{number:?}"), minijinja::Value::from(number).to_string()] {
            let in_texts =
                messages.iter().map(|m| &*m.content).chain(inputs.texts.iter().copied()).any(|t| t.contains(&rust));
            if rust != python && !in_texts && holds_number(text, &rust) {
                return Some((rust, python));
            }
        }
    }
    None
}

#[derive(Default)]
struct Inputs<'a> {
    /// Those that Python writes with an exponent.
    numbers: Vec<f64>,
    texts: Vec<&'a str>,
}

impl<'a> Inputs<'a> {
    fn add(&mut self, value: &'a Value) {
        match value {
            Value::Number(n) if n.is_f64() => {
                self.numbers.extend(n.as_f64().filter(|number| python_float(*number).contains('e')));
            }
            Value::String(text) => self.texts.push(text),
            Value::Array(items) => items.iter().for_each(|item| self.add(item)),
            Value::Object(map) => map.values().for_each(|item| self.add(item)),
            _ => {}
        }
    }
}

/// Whether `text` holds a number, and not only as a part of another one.
fn holds_number(text: &str, number: &str) -> bool {
    let part = |c: char| c.is_ascii_digit() || c == '.';
    text.match_indices(number).any(|(i, _)| {
        let (before, after) = (&text[..i], &text[i + number.len()..]);
        !before.ends_with(part) && !after.starts_with(|c: char| c.is_ascii_digit())
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn only_numbers_of_the_inputs_are_looked_for() {
        let variables = json!({"tools": [{"least": 1e-7, "most": 1e16, "text": "1e300"}, 0.5, 1e300]});
        let variables = variables.as_object().unwrap();
        let found = |text: &str| printed_otherwise(text, &[Message::new("user", "2e-9")], variables);
        for fine in ["1e-07 1e+16 0.5", "11e-7 1e-70 1e300 0.5", "2e-9"] {
            assert_eq!(found(fine), None, "{fine}");
        }
        for (text, rust) in [("x1e-7,", "1e-7"), ("[0.0000001]", "0.0000001"), ("1e16", "1e16")] {
            assert_eq!(found(text).unwrap().0, rust);
        }
    }
}
