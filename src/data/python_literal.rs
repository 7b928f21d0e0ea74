//! Parses lists of messages that an export stored as a string, in JSON or in Python notation (`repr`).

use std::iter::Peekable;
use std::str::CharIndices;

use serde_json::{Map, Number, Value};

use super::big_integers;
use super::unique_keys::Unique;
use crate::input::json_words;
use crate::quote::quote;

/// Maximum nesting of brackets; the same as serde_json's.
const MAX_DEPTH: usize = 128;

/// Why a text is not a Python literal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} at byte {at}")]
pub struct LiteralError {
    /// Byte offset of the error.
    pub at: usize,
    /// The error.
    pub message: String,
}

/// Parses a value in JSON notation, or else in Python notation: lists, tuples (as lists), dicts with string keys,
/// strings with any quotes and Python's escapes, numbers, `True`, `False`, `None`. No expression is evaluated.
///
/// # Errors
/// That of [`parse_python`], if the text is in neither notation.
pub fn parse(text: &str) -> Result<Value, LiteralError> {
    let json = match big_integers::mark(text) {
        Ok(marked) => match serde_json::from_str(marked.as_deref().unwrap_or(text)) {
            Ok(Unique(value)) => Some(value),
            // It is JSON, with a key twice.
            Err(e) if e.is_data() => {
                return Err(LiteralError { at: e.column().saturating_sub(1), message: json_words(&e) });
            }
            Err(_) => None,
        },
        Err(_) => None,
    };
    json.map_or_else(|| parse_python(text), Ok)
}

/// Parses a value in Python notation.
///
/// # Errors
/// The first byte at which the text is not a literal.
pub fn parse_python(text: &str) -> Result<Value, LiteralError> {
    let mut parser = Parser { text, chars: text.char_indices().peekable() };
    let value = parser.value(0)?;
    parser.skip_space();
    match parser.chars.next() {
        None => Ok(value),
        Some((at, c)) => Err(LiteralError { at, message: format!("unexpected {c:?} after the value") }),
    }
}

struct Parser<'a> {
    text: &'a str,
    chars: Peekable<CharIndices<'a>>,
}

type Result<T, E = LiteralError> = std::result::Result<T, E>;

impl Parser<'_> {
    fn peek(&mut self) -> Option<char> {
        self.chars.peek().map(|(_, c)| *c)
    }

    fn at(&mut self) -> usize {
        self.chars.peek().map_or(self.text.len(), |(at, _)| *at)
    }

    fn fail<T>(&mut self, message: impl Into<String>) -> Result<T> {
        Err(LiteralError { at: self.at(), message: message.into() })
    }

    fn skip_space(&mut self) {
        while self.chars.next_if(|(_, c)| c.is_ascii_whitespace()).is_some() {}
    }

    /// Consumes `c`, if it is the next character after white space.
    fn accept(&mut self, c: char) -> bool {
        self.skip_space();
        self.chars.next_if(|(_, next)| *next == c).is_some()
    }

    fn value(&mut self, depth: usize) -> Result<Value> {
        if depth > MAX_DEPTH {
            return self.fail("brackets nested too deep");
        }
        self.skip_space();
        match self.peek() {
            Some('[') => self.list(']', depth),
            Some('(') => self.list(')', depth),
            Some('{') => self.dict(depth),
            Some('\'' | '"') => self.strings().map(Value::String),
            Some(c) if c == '-' || c == '+' || c == '.' || c.is_ascii_digit() => self.number(),
            Some(c) if c.is_alphabetic() => self.word(),
            Some(c) => self.fail(format!("a value cannot begin with {c:?}")),
            None => self.fail("the text ends where a value should be"),
        }
    }

    fn list(&mut self, close: char, depth: usize) -> Result<Value> {
        self.chars.next();
        let mut items = Vec::new();
        while !self.accept(close) {
            items.push(self.value(depth + 1)?);
            if !self.accept(',') {
                if !self.accept(close) {
                    return self.fail(format!("a comma or {close:?} is missing"));
                }
                // Without a trailing comma, `(x)` is x, not a tuple: Python code joins strings across lines this way.
                let parenthesized = close == ')' && items.len() == 1;
                return Ok(if parenthesized { items.remove(0) } else { Value::Array(items) });
            }
        }
        Ok(Value::Array(items))
    }

    fn dict(&mut self, depth: usize) -> Result<Value> {
        self.chars.next();
        let mut map = Map::new();
        while !self.accept('}') {
            let at = self.at();
            let Value::String(key) = self.value(depth + 1)? else {
                return Err(LiteralError { at, message: "a key that is not a string".into() });
            };
            if !self.accept(':') {
                return self.fail("a colon is missing");
            }
            map.insert(key, self.value(depth + 1)?);
            if !self.accept(',') {
                if !self.accept('}') {
                    return self.fail("a comma or '}' is missing");
                }
                break;
            }
        }
        Ok(Value::Object(map))
    }

    fn number(&mut self) -> Result<Value> {
        let start = self.at();
        while self.chars.next_if(|(_, c)| c.is_ascii_alphanumeric() || "+-._".contains(*c)).is_some() {}
        let end = self.at();
        let digits = self.text[start..end].replace('_', "");
        if let Some(big) = big_integers::value(&digits).map_err(|message| LiteralError { at: start, message })? {
            return Ok(big);
        }
        let integer = digits.parse::<i64>().map(Number::from).or_else(|_| digits.parse::<u64>().map(Number::from));
        integer
            .ok()
            .or_else(|| digits.parse::<f64>().ok().and_then(Number::from_f64))
            .map(Value::Number)
            .ok_or_else(|| LiteralError { at: start, message: format!("{} is not a number", quote(&digits)) })
    }

    /// `True`, `False`, `None` (or their JSON spelling), or the prefix `u` of a string.
    fn word(&mut self) -> Result<Value> {
        let start = self.at();
        while self.chars.next_if(|(_, c)| c.is_alphanumeric() || *c == '_').is_some() {}
        let end = self.at();
        match (&self.text[start..end], self.peek()) {
            ("True" | "true", _) => Ok(Value::Bool(true)),
            ("False" | "false", _) => Ok(Value::Bool(false)),
            ("None" | "null", _) => Ok(Value::Null),
            ("u" | "U", Some('\'' | '"')) => self.strings().map(Value::String),
            (word, _) => Err(LiteralError { at: start, message: format!("{} is not a literal", quote(word)) }),
        }
    }

    /// Adjacent string literals, which Python joins.
    fn strings(&mut self) -> Result<String> {
        let mut out = String::new();
        while let Some(quote @ ('\'' | '"')) = self.peek() {
            let start = self.at();
            let quotes = if self.text[start..].starts_with(&quote.to_string().repeat(3)) { 3 } else { 1 };
            for _ in 0..quotes {
                self.chars.next();
            }
            self.string(quote, quotes, start, &mut out)?;
            self.skip_space();
        }
        Ok(out)
    }

    /// The rest of a string literal that begins at byte `start` with `quotes` (1 or 3) times `quote`; appends it to
    /// `out`.
    fn string(&mut self, quote: char, quotes: usize, start: usize, out: &mut String) -> Result<()> {
        let close = quote.to_string().repeat(quotes);
        while let Some((at, c)) = self.chars.next() {
            match c {
                '\\' => self.escape(at, out)?,
                '\n' if quotes == 1 => return Err(LiteralError { at, message: "a line ends within a string".into() }),
                _ if c == quote && self.text[at..].starts_with(&close) => {
                    for _ in 1..quotes {
                        self.chars.next();
                    }
                    return Ok(());
                }
                _ => out.push(c),
            }
        }
        Err(LiteralError { at: start, message: "a string without its closing quote".into() })
    }

    /// The escape sequence whose backslash is at byte `at`; appends its character to `out`.
    fn escape(&mut self, at: usize, out: &mut String) -> Result<()> {
        let Some((_, c)) = self.chars.next() else { return self.fail("the text ends after a backslash") };
        let code = match c {
            '\n' => return Ok(()),
            '\\' | '\'' | '"' => c as u32,
            'a' => 7,
            'b' => 8,
            't' => 9,
            'n' => 10,
            'v' => 11,
            'f' => 12,
            'r' => 13,
            'x' => self.hex(2)?,
            'u' => self.hex(4)?,
            'U' => self.hex(8)?,
            'N' => return Err(LiteralError { at, message: "characters by name (\\N) are not supported".into() }),
            '0'..='7' => {
                let mut code = c as u32 - '0' as u32;
                for _ in 0..2 {
                    let Some((_, d)) = self.chars.next_if(|(_, d)| ('0'..='7').contains(d)) else { break };
                    code = code * 8 + (d as u32 - '0' as u32);
                }
                code
            }
            // Python keeps the backslash of an unknown escape.
            other => {
                out.push('\\');
                other as u32
            }
        };
        let not_a_character =
            || LiteralError { at, message: format!("\\{c} {code:#x} is half of a surrogate pair, or not a character") };
        out.push(char::from_u32(code).ok_or_else(not_a_character)?);
        Ok(())
    }

    fn hex(&mut self, digits: usize) -> Result<u32> {
        let mut code = 0_u32;
        for _ in 0..digits {
            let Some(digit) = self.peek().and_then(|c| c.to_digit(16)) else {
                return self.fail("a hexadecimal digit is missing");
            };
            self.chars.next();
            code = code.wrapping_mul(16).wrapping_add(digit);
        }
        Ok(code)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    #[test]
    fn python_and_json_notation() {
        for (text, value) in [
            (r#"[{'role': 'user', 'content': "it's"}]"#, json!([{"role": "user", "content": "it's"}])),
            (r#"[{"role": "user", "content": "a\u00e9"}]"#, json!([{"role": "user", "content": "aé"}])),
            (r"['a\n\t\\\'\x41\u00e9\U0001F600\101\q']", json!(["a\n\t\\'Aé😀A\\q"])),
            ("('a' \"b\"\n 'c', u'd',)", json!(["abc", "d"])),
            ("('a'\n 'b')", json!("ab")),
            ("'''it's\n\"it\"'''", json!("it's\n\"it\"")),
            (
                "{'a': None, 'b': True, 'c': [-1, 2.5, 1_000, 1e3], }",
                json!({"a": null, "b": true, "c": [-1, 2.5, 1000, 1000.0]}),
            ),
            ("[]", json!([])),
            ("()", json!([])),
            (" { } ", json!({})),
        ] {
            assert_eq!(parse(text), Ok(value), "{text}");
        }
    }

    #[test]
    fn errors_name_the_byte() {
        for (text, at, message) in [
            ("", 0, "ends where a value should be"),
            ("['a'", 4, "missing"),
            ("['a' 1]", 5, "missing"),
            ("['a", 1, "closing quote"),
            ("['a\nb']", 3, "a line ends"),
            ("[__import__('os')]", 1, "cannot begin with '_'"),
            ("[open('x')]", 1, "`open` is not a literal"),
            ("{1: 2}", 1, "not a string"),
            ("['\\ud800']", 2, "surrogate"),
            ("['\\x4']", 5, "hexadecimal"),
            ("[1--2]", 1, "not a number"),
            ("[1] 2", 4, "after the value"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.at, at, "{text}: {error}");
            assert!(error.message.contains(message), "{text}: {error}");
        }
        assert!(parse(&"[".repeat(1_000_000)).unwrap_err().message.contains("too deep"));
    }

    /// As Python's `repr` writes it.
    fn repr(value: &Value) -> String {
        match value {
            Value::Null => "None".into(),
            Value::Bool(b) => if *b { "True" } else { "False" }.into(),
            Value::Number(n) => n.to_string(),
            Value::String(s) => {
                let quote = if s.contains('\'') && !s.contains('"') { '"' } else { '\'' };
                let mut out = String::from(quote);
                for c in s.chars() {
                    match c {
                        '\\' => out.push_str("\\\\"),
                        '\n' => out.push_str("\\n"),
                        '\r' => out.push_str("\\r"),
                        '\t' => out.push_str("\\t"),
                        c if c == quote => out.extend(['\\', c]),
                        c if (c as u32) < 0x20 || c as u32 == 0x7f => out.push_str(&format!("\\x{:02x}", c as u32)),
                        c => out.push(c),
                    }
                }
                out.push(quote);
                out
            }
            Value::Array(items) => format!("[{}]", items.iter().map(repr).collect::<Vec<_>>().join(", ")),
            Value::Object(map) => {
                let items: Vec<_> = map.iter().map(|(k, v)| format!("{}: {}", repr(&json!(k)), repr(v))).collect();
                format!("{{{}}}", items.join(", "))
            }
        }
    }

    fn values() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".*".prop_map(Value::from),
            "['\"\\\\\n a]*".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::hash_map(".{0,6}", inner, 0..4).prop_map(|m| Value::Object(m.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn a_python_repr_is_parsed_back(value in values()) {
            prop_assert_eq!(parse_python(&repr(&value)), Ok(value));
        }

        #[test]
        fn no_text_panics(text in "[\\[\\]{}()'\"a-z\\\\0-9:, \n]*") {
            let _ = parse(&text);
        }
    }
}
