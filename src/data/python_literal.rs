//! Lists of messages that an export turned into a string: in JSON notation, or as Python prints them.

use std::iter::Peekable;
use std::str::CharIndices;

use serde_json::{Map, Number, Value};

/// Brackets that may be open at once; deeper text is refused, as serde_json does.
const MAX_DEPTH: usize = 128;

/// Where a text stops being a literal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} at byte {at}")]
pub struct LiteralError {
    /// Byte of the text.
    pub at: usize,
    /// What is wrong there.
    pub what: String,
}

/// Reads a value in JSON notation, or else in Python's: lists, tuples (as lists), dicts with string keys, strings in
/// any quotes with the escapes of Python, numbers, `True`, `False`, `None`. Nothing is evaluated.
///
/// # Errors
/// The Python reading's error, where the text is neither.
pub fn parse(text: &str) -> Result<Value, LiteralError> {
    serde_json::from_str(text).or_else(|_| parse_python(text))
}

/// Reads a value in Python's notation.
///
/// # Errors
/// Where the text stops being a literal.
pub fn parse_python(text: &str) -> Result<Value, LiteralError> {
    let mut parser = Parser { text, chars: text.char_indices().peekable() };
    let value = parser.value(0)?;
    parser.space();
    match parser.chars.next() {
        None => Ok(value),
        Some((at, c)) => Err(LiteralError { at, what: format!("{c:?} follows the value") }),
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

    fn fail<T>(&mut self, what: impl Into<String>) -> Result<T> {
        Err(LiteralError { at: self.at(), what: what.into() })
    }

    fn space(&mut self) {
        while self.chars.next_if(|(_, c)| c.is_ascii_whitespace()).is_some() {}
    }

    fn take(&mut self, c: char) -> bool {
        self.space();
        self.chars.next_if(|(_, next)| *next == c).is_some()
    }

    fn value(&mut self, depth: usize) -> Result<Value> {
        if depth > MAX_DEPTH {
            return self.fail("brackets nested too deep");
        }
        self.space();
        match self.peek() {
            Some('[') => self.list(']', depth),
            Some('(') => self.list(')', depth),
            Some('{') => self.dict(depth),
            Some('\'' | '"') => self.strings().map(Value::String),
            Some(c) if c == '-' || c == '+' || c == '.' || c.is_ascii_digit() => self.number(),
            Some(c) if c.is_alphabetic() => self.word(),
            Some(c) => self.fail(format!("{c:?} begins no value")),
            None => self.fail("the text ends where a value should be"),
        }
    }

    fn list(&mut self, close: char, depth: usize) -> Result<Value> {
        self.chars.next();
        let mut items = Vec::new();
        while !self.take(close) {
            items.push(self.value(depth + 1)?);
            if !self.take(',') {
                if !self.take(close) {
                    return self.fail(format!("a comma or {close:?} is missing"));
                }
                // A lone value in round brackets is that value: Python joins adjacent strings across lines this way.
                let lone = close == ')' && items.len() == 1;
                return Ok(if lone { items.remove(0) } else { Value::Array(items) });
            }
        }
        Ok(Value::Array(items))
    }

    fn dict(&mut self, depth: usize) -> Result<Value> {
        self.chars.next();
        let mut map = Map::new();
        while !self.take('}') {
            let at = self.at();
            let Value::String(key) = self.value(depth + 1)? else {
                return Err(LiteralError { at, what: "a key that is not a string".into() });
            };
            if !self.take(':') {
                return self.fail("a colon is missing");
            }
            map.insert(key, self.value(depth + 1)?);
            if !self.take(',') {
                if !self.take('}') {
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
        let integer = digits.parse::<i64>().ok().map(Number::from);
        integer
            .or_else(|| digits.parse::<f64>().ok().and_then(Number::from_f64))
            .map(Value::Number)
            .ok_or_else(|| LiteralError { at: start, what: format!("{digits:?} is no number") })
    }

    /// `True`, `False`, `None`, or the letters before a string.
    fn word(&mut self) -> Result<Value> {
        let start = self.at();
        while self.chars.next_if(|(_, c)| c.is_alphanumeric() || *c == '_').is_some() {}
        let end = self.at();
        match (&self.text[start..end], self.peek()) {
            ("True" | "true", _) => Ok(Value::Bool(true)),
            ("False" | "false", _) => Ok(Value::Bool(false)),
            ("None" | "null", _) => Ok(Value::Null),
            ("u" | "U", Some('\'' | '"')) => self.strings().map(Value::String),
            (word, _) => Err(LiteralError { at: start, what: format!("{word:?} is no literal") }),
        }
    }

    /// A string, and those directly after it, which Python joins.
    fn strings(&mut self) -> Result<String> {
        let mut out = String::new();
        while let Some(quote @ ('\'' | '"')) = self.peek() {
            let start = self.at();
            let fence = if self.text[start..].starts_with(&quote.to_string().repeat(3)) { 3 } else { 1 };
            for _ in 0..fence {
                self.chars.next();
            }
            self.string(quote, fence, start, &mut out)?;
            self.space();
        }
        Ok(out)
    }

    /// The rest of a string that began at `start` with `fence` times `quote`.
    fn string(&mut self, quote: char, fence: usize, start: usize, out: &mut String) -> Result<()> {
        let close = quote.to_string().repeat(fence);
        while let Some((at, c)) = self.chars.next() {
            match c {
                '\\' => self.escape(at, out)?,
                '\n' if fence == 1 => return Err(LiteralError { at, what: "a line ends within a string".into() }),
                _ if c == quote && self.text[at..].starts_with(&close) => {
                    for _ in 1..fence {
                        self.chars.next();
                    }
                    return Ok(());
                }
                _ => out.push(c),
            }
        }
        Err(LiteralError { at: start, what: "a string without its closing quote".into() })
    }

    /// What follows the backslash at byte `at`.
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
            'N' => return Err(LiteralError { at, what: "characters by name (\\N) are not supported".into() }),
            '0'..='7' => {
                let mut code = c as u32 - '0' as u32;
                for _ in 0..2 {
                    let Some((_, d)) = self.chars.next_if(|(_, d)| ('0'..='7').contains(d)) else { break };
                    code = code * 8 + (d as u32 - '0' as u32);
                }
                code
            }
            // Python keeps the backslash of an escape it does not know.
            other => {
                out.push('\\');
                other as u32
            }
        };
        let what =
            || LiteralError { at, what: format!("\\{c} {code:#x} is half of a surrogate pair, or no character") };
        out.push(char::from_u32(code).ok_or_else(what)?);
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
    fn what_is_no_literal_is_refused_with_its_place() {
        for (text, at, what) in [
            ("", 0, "ends where a value should be"),
            ("['a'", 4, "missing"),
            ("['a' 1]", 5, "missing"),
            ("['a", 1, "closing quote"),
            ("['a\nb']", 3, "a line ends"),
            ("[__import__('os')]", 1, "'_' begins no value"),
            ("[open('x')]", 1, "\"open\" is no literal"),
            ("{1: 2}", 1, "not a string"),
            ("['\\ud800']", 2, "surrogate"),
            ("['\\x4']", 5, "hexadecimal"),
            ("[1--2]", 1, "no number"),
            ("[1] 2", 4, "follows the value"),
        ] {
            let error = parse(text).unwrap_err();
            assert_eq!(error.at, at, "{text}: {error}");
            assert!(error.what.contains(what), "{text}: {error}");
        }
        assert!(parse(&"[".repeat(1_000_000)).unwrap_err().what.contains("too deep"));
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
        fn what_python_prints_is_read_back(value in values()) {
            prop_assert_eq!(parse_python(&repr(&value)), Ok(value));
        }

        #[test]
        fn no_text_is_a_crash(text in "[\\[\\]{}()'\"a-z\\\\0-9:, \n]*") {
            let _ = parse(&text);
        }
    }
}
