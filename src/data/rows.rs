//! Splits a data file, a JSON array or JSONL, into rows with their line numbers, in one pass.

use std::path::Path;

use serde::de::IgnoredAny;
use serde_json::{Map, Value};

use super::unique_keys::Unique;
use super::values::kind_of;
use super::{Error, big_integers};
use crate::input::{self, RowsError};
use crate::quote;

/// The 1-based line of a row's first character, and the row; or the error in it.
type RawRow = Result<(usize, Map<String, Value>), Error>;

/// A byte order mark: at the start of a file, and where files were joined.
const MARK: char = '\u{feff}';
/// How to get a damaged file again.
const AGAIN: &str = "fetch or write the file again, or remove the row";
/// What begins each text of a JSON text sequence (RFC 7464).
const RECORD_SEPARATOR: char = '\x1e';

/// Reads a data file as UTF-8, and removes a byte order mark.
///
/// # Errors
/// A file that is missing, empty or not UTF-8; the message names the line of the first invalid byte.
pub(super) fn read_text(path: &Path) -> Result<String, Error> {
    let bytes = input::read_rows(path).map_err(|e| match e {
        RowsError::Io(e) => Error::read(path, e),
        RowsError::Format(message) => Error::file(path, message),
    })?;
    if input::recognise(&bytes) == Some(input::Format::UTF_16) {
        return Err(Error::row(path, 1, "the file is UTF-16; save it as UTF-8"));
    }
    let mut text = String::from_utf8(bytes).map_err(|e| {
        let valid = e.utf8_error().valid_up_to();
        let line = 1 + newlines(&e.as_bytes()[..valid]);
        Error::row(path, line, format!("byte {:#04x} is not UTF-8; save the file as UTF-8", e.as_bytes()[valid]))
    })?;
    if text.starts_with(MARK) {
        text.drain(..MARK.len_utf8());
    }
    // Lines that end as on old Macs: in JSON, a carriage return is only white space.
    if text.contains('\r') && !text.contains('\n') {
        text = text.replace('\r', "\n");
    }
    if text.trim().is_empty() {
        return Err(Error::file(path, "the file is empty; it should hold a JSON array of rows, or one row a line"));
    }
    Ok(text)
}

fn newlines(bytes: &[u8]) -> usize {
    bytes.iter().filter(|b| **b == b'\n').count()
}

/// Iterator over the rows of a file. It ends after the first error.
pub(super) struct Rows<'a> {
    path: &'a Path,
    text: &'a str,
    /// Byte offset of the next row, or of the white space before it.
    offset: usize,
    /// 1-based line of `offset`.
    line: usize,
    format: Format,
}

#[derive(Clone, Copy, PartialEq)]
enum Format {
    /// JSONL: one row a line.
    Lines,
    /// A JSON text sequence: each row begins with a record separator.
    Sequence,
    /// Inside a JSON array; `first`: no row has been read yet.
    Array { first: bool },
    /// The file has ended, or had an error.
    Done,
}

impl<'a> Rows<'a> {
    /// Splits `text`, read from `path`. It is a JSON array if its first character is `[`, else JSONL.
    pub(super) fn new(path: &'a Path, text: &'a str) -> Self {
        let mut rows = Self { path, text, offset: 0, line: 1, format: Format::Lines };
        rows.skip_space();
        if rows.byte() == Some(b'[') {
            rows.offset += 1;
            rows.format = Format::Array { first: true };
        } else if text[..rows.offset].contains(RECORD_SEPARATOR) {
            rows.format = Format::Sequence;
        }
        rows
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.offset).copied()
    }

    /// Moves to byte `end` and counts the lines passed.
    fn advance(&mut self, end: usize) {
        self.line += newlines(&self.text.as_bytes()[self.offset..end]);
        self.offset = end;
    }

    /// Skips what may stand between rows.
    fn skip_space(&mut self) {
        let rest = &self.text[self.offset..];
        let space = |c: char| c.is_ascii_whitespace() || c == MARK || c == RECORD_SEPARATOR;
        self.advance(self.offset + rest.len() - rest.trim_start_matches(space).len());
    }

    /// The error for `line`; ends the iteration.
    fn fail(&mut self, line: usize, message: impl ToString) -> Error {
        self.format = Format::Done;
        Error::row(self.path, line, message)
    }

    /// Parses the row `self.text[self.offset..end]` and moves past it.
    fn row(&mut self, end: usize) -> RawRow {
        let (line, start, text) = (self.line, self.offset, &self.text[self.offset..end]);
        self.advance(end);
        let marked = match big_integers::mark(text) {
            Ok(marked) => marked,
            Err(message) => return Err(self.fail(line, message)),
        };
        match serde_json::from_str(marked.as_deref().unwrap_or(text)) {
            Ok(Unique(Value::Object(row))) => Ok((line, row)),
            Ok(Unique(other)) => Err(self.fail(line, format!("a row should be an object, not {}", kind_of(&other)))),
            Err(e) => {
                let problem = self.problem(start, text, &e);
                Err(self.fail(line + e.line() - 1, problem))
            }
        }
    }

    /// What is wrong with the text of the row that begins at `start`.
    fn problem(&self, start: usize, text: &str, error: &serde_json::Error) -> String {
        let (message, words) = (error.to_string(), input::json_words(error));
        if error.is_data() || message.starts_with("number out of range") {
            return words;
        }
        if text.contains('\0') {
            return format!("{}: {AGAIN}", input::line_problem(text.as_bytes(), error));
        }
        if message.starts_with("recursion limit") {
            return format!("{words}: write the deeper ones as text, or remove the row");
        }
        if self.format == Format::Lines
            && let Some(key) = rows_below(self.text)
        {
            return one_level_down(&key);
        }
        let Some(end) = input::cut_off(text.as_bytes(), error) else {
            return format!("not JSON: {words} (column {}){}", error.column(), self.hint(text, &message));
        };
        match self.goes_on(start, text) {
            true => {
                "the row goes on in the next line: a file is a JSON array of rows, or JSONL with each row on one line"
                    .into()
            }
            false => format!("the row is cut off: {end} (column {}); {AGAIN}", error.column()),
        }
    }

    /// Whether a row that its line does not hold goes on in the next one.
    fn goes_on(&self, start: usize, line: &str) -> bool {
        let mut rows = serde_json::Deserializer::from_str(&self.text[start..]).into_iter::<IgnoredAny>();
        let is_last = self.text[self.offset..].trim().is_empty();
        self.format == Format::Lines
            && !is_last
            && (line.trim().len() == 1 || rows.next().is_some_and(|row| row.is_ok()))
    }

    /// The way out of an error of the syntax, where the text of the row shows one.
    fn hint(&self, text: &str, message: &str) -> &'static str {
        let lines = self.format == Format::Lines;
        if !lines && message.contains("trailing characters") {
            "; is a comma missing between rows?"
        } else if lines && message.contains("trailing characters") && text.trim_end().ends_with("},") {
            "; a comma follows the row: remove the commas at the ends of the lines, or make the file a JSON array with [ at its start and ] \
             at its end"
        } else if lines && message.contains("trailing characters") {
            "; is a line end missing between rows?"
        } else if text.contains("NaN") || text.contains("Infinity") {
            "; NaN and Infinity are not JSON: write null"
        } else if message.contains("hex escape") {
            "; half of a surrogate pair is not a character: write the character itself, or remove it"
        } else if text.starts_with("{'") {
            "; JSON has double quotation marks: write rows with json.dumps"
        } else if text.starts_with("//") || text.starts_with('#') {
            "; JSON has no comments: remove the line"
        } else if lines && looks_like_yaml(text) {
            "; this looks like YAML: write rows by json.dump(yaml.safe_load(open(FILE)), open('rows.json', 'w'))"
        } else if message.contains("trailing comma") {
            "; remove the comma before the bracket"
        } else {
            ""
        }
    }

    /// The row that ends before `end`.
    fn next_until(&mut self, end: char) -> Option<RawRow> {
        self.skip_space();
        let rest = &self.text[self.offset..];
        if rest.is_empty() {
            return None;
        }
        let end = self.offset + rest.find(end).unwrap_or(rest.len());
        Some(self.row(end))
    }

    fn next_element(&mut self, first: bool) -> Option<RawRow> {
        self.skip_space();
        match self.byte() {
            Some(b']') => {
                self.offset += 1;
                self.skip_space();
                self.format = Format::Done;
                let line = self.line;
                return self.byte().map(|_| Err(self.fail(line, "something follows the array's closing bracket")));
            }
            Some(b',') if !first => {
                let line = self.line;
                self.offset += 1;
                self.skip_space();
                if self.byte() == Some(b']') {
                    return Some(Err(self.fail(line, "a comma follows the last row of the array: remove it")));
                }
            }
            _ => {}
        }
        if self.byte().is_none() {
            let message =
                "the array has no closing bracket, as in a file that was cut off: fetch or write the file again";
            return Some(Err(self.fail(self.line, message)));
        }
        self.format = Format::Array { first: false };
        let end = self.offset + element_length(&self.text.as_bytes()[self.offset..]);
        Some(self.row(end))
    }
}

impl Iterator for Rows<'_> {
    type Item = RawRow;

    fn next(&mut self) -> Option<Self::Item> {
        match self.format {
            Format::Lines => self.next_until('\n'),
            Format::Sequence => self.next_until(RECORD_SEPARATOR),
            Format::Array { first } => self.next_element(first),
            Format::Done => None,
        }
    }
}

/// Whether a line that is no JSON is an item, a field or a mark of YAML.
fn looks_like_yaml(line: &str) -> bool {
    let line = line.trim_end();
    let item = line.strip_prefix("- ").unwrap_or(line).trim_start();
    let is_name = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || "_-'\"".contains(c));
    let is_field =
        item.split_once(':').is_some_and(|(name, value)| is_name(name) && (value.is_empty() || value.starts_with(' ')));
    line == "---" || line == "-" || line.starts_with("- ") || is_field
}

/// The key under which a file that is one object holds rows: `{"data": [{...}, ...]}`.
fn rows_below(text: &str) -> Option<String> {
    let file: Map<String, Value> = serde_json::from_str(text.trim_start_matches(MARK)).ok()?;
    key_of_rows(&file).map(str::to_owned)
}

/// Fields by which a list of rows is told from a list of turns.
const OF_ROWS: [&str; 8] =
    ["messages", "conversations", "prompt", "goal", "all_prompt", "attack_prompt", "safe_messages", "unsafe_messages"];

/// Where the hub's dataset viewer gives rows: `{"rows": [{"row_idx": 0, "row": {...}}]}`.
const OF_VIEWER: &str = "rows[].row";

/// The first key that holds rows in a list.
pub(super) fn key_of_rows(row: &Map<String, Value>) -> Option<&str> {
    let is_row =
        |value: &Value| value.as_object().is_some_and(|row| OF_ROWS.iter().any(|name| row.contains_key(*name)));
    if row.get("rows").and_then(|list| list.get(0)?.get("row")).is_some_and(is_row) {
        return Some(OF_VIEWER);
    }
    let holds_rows = |value: &Value| value.as_array().is_some_and(|list| list.first().is_some_and(is_row));
    row.iter().find(|(_, value)| holds_rows(value)).map(|(key, _)| key.as_str())
}

/// Says that the rows are below a key, and how to get them.
pub(super) fn one_level_down(key: &str) -> String {
    let key = quote::cut(key, 60);
    if key == OF_VIEWER {
        return "the file is an answer of the hub's dataset viewer, with a row in each object of its list rows: take them out by \
                `jq -c '.rows[].row' FILE > rows.jsonl`"
            .into();
    }
    format!(
        "the file is one object with rows in the list {key}: give the list itself (`jq '.[\"{key}\"]' FILE > rows.json`, or \
         `json.dump(json.load(open(FILE))[\"{key}\"], open(\"rows.json\", \"w\"))`)"
    )
}

/// Length in bytes of the array element at the start of `text`: up to the comma or bracket that ends it. Only brackets
/// and strings are tracked; the JSON parser finds the errors inside.
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<(usize, String)>, String> {
        Rows::new(Path::new("f"), text)
            .map(|r| r.map(|(line, row)| (line, Value::Object(row).to_string())).map_err(|e| e.to_string()))
            .collect()
    }

    #[test]
    fn rows_of_both_formats_have_line_numbers() {
        let rows =
            |lines: [usize; 2]| Ok(vec![(lines[0], r#"{"a":1}"#.to_owned()), (lines[1], r#"{"b":"]},["}"#.to_owned())]);
        assert_eq!(read("{\"a\":1}\r\n\n  {\"b\":\"]},[\"}"), rows([1, 3]));
        assert_eq!(read("\n[\n{\"a\":\n1}\n,\n {\"b\":\"]},[\"}\n]\n"), rows([3, 6]));
        assert_eq!(read("[]"), Ok(vec![]));
        // A JSON text sequence, and files that were joined with their byte order marks.
        assert_eq!(read("\x1e{\"a\":\n1}\n\x1e{\"b\":\"]},[\"}\n"), rows([1, 3]));
        assert_eq!(read("{\"a\":1}\n\u{feff}{\"b\":\"]},[\"}"), rows([1, 2]));
        assert_eq!(read(r#"[{"a":"\\\""}]"#).unwrap()[0].1, r#"{"a":"\\\""}"#);
    }

    #[test]
    fn every_error_names_its_line() {
        for (text, message) in [
            ("{\"a\":1}\n[1]", "f:2: a row should be an object, not a list"),
            (
                "{\"a\":1}\n{\"a\":",
                "f:2: the row is cut off: it ends where a value should be (column 5); fetch or write the file again",
            ),
            ("{\"a\":[1\n{\"a\":1}", "f:1: the row is cut off: it ends inside a list"),
            ("[{\"a\":1},\n{\"a\":\"b", "f:2: the row is cut off: it ends inside a text"),
            ("{\n\"a\":1}", "each row on one line"),
            ("{\n\"a\":1,}\n{\n\"a\":1}", "each row on one line"),
            ("{\"a\":[\n{\"b\":1}]}\n{\"a\":[]}", "each row on one line"),
            (
                "{\"a\":1},\n{\"a\":2},\n",
                "f:1: not JSON: something follows the value (column 8); a comma follows the row: remove the commas",
            ),
            ("{\"a\":1}\n\0\0\0", "f:2: the line holds zero bytes, as after a crash or a full disk: fetch or write"),
            ("{\"a\":1}\0", "f:1: the line holds zero bytes"),
            ("[{\"a\":1},\n\0\0", "f:2: the line holds zero bytes"),
            ("[{\"a\":1}\n{\"a\":2}]", "f:2: not JSON: something follows the value (column 1); is a comma missing"),
            ("[{\"a\":1},\n\n]", "f:1: a comma follows the last row of the array: remove it"),
            ("{\"a\":[1,]}", "remove the comma before the bracket"),
            ("{\"a\":1}{\"a\":2}", "is a line end missing between rows?"),
            ("{\n\"data\": [\n{\"goal\": 1}]}", "rows in the list data: give the list itself (`jq '.[\"data\"]'"),
            ("{\n\"rows\": [\n{\"goal\": 1}]}", "rows in the list rows: give the list itself (`jq '.[\"rows\"]'"),
            ("{\n\"rows\": [\n{\"row_idx\": 0, \"row\": {\"goal\": 1}}]}", "dataset viewer, with a row in each object"),
            ("[{\"a\":1},\n{\"a\":\n\n oops}]", "f:4: not JSON: no JSON value begins here"),
            ("[{\"a\":1}", "f:1: the array has no closing bracket, as in a file that was cut off: fetch or write"),
            ("[{\"a\":1},\n", "f:2: the array has no closing bracket"),
            ("[", "f:1: the array has no closing bracket"),
            ("{\"a\":1e999}", "f:1: a number is too large"),
            ("[{\"a\":1}]\n{}", "f:2: something follows"),
            ("[{\"a\":\"\\ud800\"}]", "half of a surrogate pair"),
            ("{\"a\":\"\0\"}", "zero bytes"),
            ("{\"a\":\"\x01\"}", "control character"),
            ("{\"a\":NaN}", "write null"),
            (
                "{'a': 1}",
                "f:1: not JSON: a name is not in double quotation marks (column 2); JSON has double quotation marks",
            ),
            ("- a: 1\n  b: 2\n", "(column 2); this looks like YAML: write rows by json.dump(yaml"),
            ("---\n- a: 1\n", "; this looks like YAML"),
            ("a: 1\n", "(column 1); this looks like YAML"),
            ("how to: write\n", "f:1: not JSON: no JSON value begins here (column 1)"),
            ("# rows\n{\"a\":1}", "f:1: not JSON: no JSON value begins here (column 1); JSON has no comments"),
            (
                "[{\"b\":1},\n{\"a\":1,\n\"a at line 7\":2, \"a\":2}]",
                "f:3: the field a occurs twice in one object: keep one",
            ),
            ("{\"a at line 7\":2, \"a at line 7\":2}", "f:1: the field a at line 7 occurs twice"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(message), "{text:?} gave {error:?}, expected {message:?}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_crash() {
        let deep = format!("[{{\"a\":{}{}}}]", "[".repeat(1_000_000), "]".repeat(1_000_000));
        assert!(read(&deep).unwrap_err().contains("nested more than 127 deep"));
    }
}
