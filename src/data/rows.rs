//! A JSON array of rows, or one row a line, cut into rows with their line numbers in one pass.

use std::fs;
use std::path::Path;

use serde_json::{Map, Value};

use super::Error;

/// A row and the 1-based line of its first character, or what is wrong with it.
type RawRow = Result<(usize, Map<String, Value>), Error>;

/// The text of a data file: UTF-8, without its byte order mark.
///
/// # Errors
/// A file that is missing, empty or not UTF-8; the line of the first bad byte is named.
pub(super) fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = fs::read(path).map_err(|e| Error::read(path, e))?;
    if bytes.starts_with(b"\xff\xfe") || bytes.starts_with(b"\xfe\xff") {
        return Err(Error::row(path, 1, "the file is UTF-16; save it as UTF-8"));
    }
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let good = e.utf8_error().valid_up_to();
        let line = 1 + newlines(&e.as_bytes()[..good]);
        Error::row(path, line, format!("byte {:#04x} is not UTF-8; save the file as UTF-8", e.as_bytes()[good]))
    })?;
    if text.starts_with('\u{feff}') {
        text.drain(..'\u{feff}'.len_utf8());
    }
    if text.trim().is_empty() {
        return Err(Error::file(path, "the file is empty; it should hold a JSON array of rows, or one row a line"));
    }
    Ok(text)
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|b| **b == b'\n').count()
}

/// The rows of a file, in order, each with the 1-based line of its first character.
pub(super) struct Rows<'a> {
    path: &'a Path,
    text: &'a str,
    /// Byte where the next row, or the space before it, begins.
    at: usize,
    /// Line of `at`.
    line: usize,
    form: Form,
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    Lines,
    Array { first: bool },
    Done,
}

impl<'a> Rows<'a> {
    /// Rows of `text`, which came from `path`. A file whose first character is `[` is an array.
    pub(super) fn new(path: &'a Path, text: &'a str) -> Self {
        let mut rows = Self { path, text, at: 0, line: 1, form: Form::Lines };
        rows.skip_space();
        if rows.byte() == Some(b'[') {
            rows.at += 1;
            rows.form = Form::Array { first: true };
        }
        rows
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.at).copied()
    }

    /// Moves to `end`, counting lines.
    fn advance(&mut self, end: usize) {
        self.line += newlines(&self.text.as_bytes()[self.at..end]);
        self.at = end;
    }

    fn skip_space(&mut self) {
        let rest = &self.text.as_bytes()[self.at..];
        let space = rest.iter().take_while(|b| b.is_ascii_whitespace()).count();
        self.advance(self.at + space);
    }

    fn problem(&mut self, line: usize, what: impl ToString) -> Error {
        self.form = Form::Done;
        Error::row(self.path, line, what)
    }

    /// The row of `self.text[self.at..end]`, moving past it.
    fn row(&mut self, end: usize) -> RawRow {
        let (line, text) = (self.line, &self.text[self.at..end]);
        self.advance(end);
        match serde_json::from_str(text) {
            Ok(Value::Object(row)) => Ok((line, row)),
            Ok(other) => Err(self.problem(line, format!("a row should be an object, not {}", kind_of(&other)))),
            Err(e) => {
                let what = e.to_string();
                let what = what.split(" at line ").next().unwrap_or_default();
                let hint = if self.form != Form::Lines && what.contains("trailing characters") {
                    "; is a comma missing between rows?"
                } else if self.form == Form::Lines && e.is_eof() {
                    "; a file is a JSON array of rows, or holds each row on one line"
                } else if text.contains("NaN") || text.contains("Infinity") {
                    "; NaN and Infinity are no JSON: write null"
                } else if what.contains("hex escape") {
                    "; half of a surrogate pair is no character: write the character itself, or remove it"
                } else {
                    ""
                };
                Err(self.problem(line + e.line() - 1, format!("not JSON: {what} (column {}){hint}", e.column())))
            }
        }
    }

    fn next_line(&mut self) -> Option<RawRow> {
        self.skip_space();
        let rest = &self.text[self.at..];
        if rest.is_empty() {
            return None;
        }
        let end = self.at + rest.find('\n').unwrap_or(rest.len());
        Some(self.row(end))
    }

    fn next_element(&mut self, first: bool) -> Option<RawRow> {
        self.skip_space();
        match self.byte() {
            Some(b']') => {
                self.at += 1;
                self.skip_space();
                self.form = Form::Done;
                let line = self.line;
                return self.byte().map(|_| Err(self.problem(line, "something follows the array's closing bracket")));
            }
            Some(b',') if !first => {
                self.at += 1;
                self.skip_space();
            }
            Some(_) => {}
            None => {
                return Some(Err(self.problem(self.line, "the array has no closing bracket: is the file cut off?")));
            }
        }
        self.form = Form::Array { first: false };
        let end = self.at + element_length(&self.text.as_bytes()[self.at..]);
        Some(self.row(end))
    }
}

impl Iterator for Rows<'_> {
    type Item = RawRow;

    fn next(&mut self) -> Option<Self::Item> {
        match self.form {
            Form::Lines => self.next_line(),
            Form::Array { first } => self.next_element(first),
            Form::Done => None,
        }
    }
}

/// Bytes up to the comma or bracket that ends the array's element at the start of `text`; the JSON parser judges them.
fn element_length(text: &[u8]) -> usize {
    let (mut depth, mut in_string, mut escaped) = (0_usize, false, false);
    for (i, b) in text.iter().enumerate() {
        match b {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            _ if in_string => {}
            b'{' | b'[' => depth += 1,
            b',' | b']' if depth == 0 => return i,
            b'}' | b']' => depth = depth.saturating_sub(1),
            _ => {}
        }
    }
    text.len()
}

/// A JSON value's kind, for messages.
pub(super) fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(usize, String)>, String> {
        Rows::new(Path::new("f"), text)
            .map(|r| r.map(|(line, row)| (line, Value::Object(row).to_string())).map_err(|e| e.to_string()))
            .collect()
    }

    #[test]
    fn arrays_and_lines_know_their_lines() {
        let rows =
            |lines: [usize; 2]| Ok(vec![(lines[0], r#"{"a":1}"#.to_owned()), (lines[1], r#"{"b":"]},["}"#.to_owned())]);
        assert_eq!(read("{\"a\":1}\r\n\n  {\"b\":\"]},[\"}"), rows([1, 3]));
        assert_eq!(read("\n[\n{\"a\":\n1}\n,\n {\"b\":\"]},[\"}\n]\n"), rows([3, 6]));
        assert_eq!(read("[]"), Ok(vec![]));
        assert_eq!(read(r#"[{"a":"\\\""}]"#).unwrap()[0].1, r#"{"a":"\\\""}"#);
    }

    #[test]
    fn every_way_to_be_wrong_names_its_line() {
        for (text, message) in [
            ("{\"a\":1}\n[1]", "f:2: a row should be an object, not a list"),
            ("{\"a\":1}\n{\"a\":", "f:2: not JSON: EOF while parsing a value"),
            ("{\n\"a\":1}", "holds each row on one line"),
            ("[{\"a\":1}\n{\"a\":2}]", "f:2: not JSON: trailing characters (column 1); is a comma missing"),
            ("[{\"a\":1},\n\n]", "f:3: not JSON: EOF"),
            ("[{\"a\":1},\n{\"a\":\n\n oops}]", "f:4: not JSON: expected value"),
            ("[{\"a\":1}", "f:1: the array has no closing bracket"),
            ("[{\"a\":1}]\n{}", "f:2: something follows"),
            ("[{\"a\":\"\\ud800\"}]", "half of a surrogate pair"),
            ("{\"a\":\"\0\"}", "control character"),
            ("{\"a\":NaN}", "write null"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(message), "{text:?} gave {error:?}, expected {message:?}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let deep = format!("[{{\"a\":{}{}}}]", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert!(read(&deep).unwrap_err().contains("recursion limit"));
    }
}
