//! Files of JSON lines that grow while a command works, and from which the next run of the command continues.
//!
//! A killed process leaves a part of a line at the end of such a file: a last line without a line feed is torn, whatever it holds. It
//! is removed where a command goes on writing, and left out where one only reads.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Error;
use crate::input;

/// The file, open for appending.
pub struct RowLog {
    path: PathBuf,
    file: File,
}

impl RowLog {
    /// Opens the file, or creates it, and returns its lines. A torn last line is removed from it.
    ///
    /// # Errors
    /// [`Error::Log`]; [`Error::Row`] for a line that is not UTF-8.
    pub fn open(path: impl Into<PathBuf>) -> Result<(Self, Vec<String>), Error> {
        let path = path.into();
        let failed = |action| {
            let path = path.clone();
            move |source: io::Error| Error::Log { path, action, source }
        };
        let mut bytes = match input::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(failed("opening")(e)),
        };
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(failed("opening"))?;
        let whole = whole_lines(&bytes);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(failed("truncating"))?;
            bytes.truncate(whole);
        }
        let text = String::from_utf8(bytes).map_err(|e| {
            let valid = &e.as_bytes()[..e.utf8_error().valid_up_to()];
            let line = 1 + valid.iter().filter(|byte| **byte == b'\n').count();
            Error::Row { path: path.clone(), line, reason: "a text is not UTF-8".into() }
        })?;
        let lines = text.lines().map(str::to_owned).collect();
        Ok((Self { path, file }, lines))
    }

    /// Appends rows, and syncs them to the disk.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn append(&mut self, rows: impl IntoIterator<Item = impl Serialize>) -> Result<(), Error> {
        let lines = json_lines(rows);
        let written = self.file.write_all(&lines).map_err(|e| ("appending", e));
        let written = written.and_then(|()| self.file.sync_data().map_err(|e| ("syncing", e)));
        written.map_err(|(action, source)| Error::Log { path: self.path.clone(), action, source })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The length of the lines that end with a line feed.
fn whole_lines(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1)
}

/// The rows of a file of JSON lines.
#[derive(Debug)]
pub struct Rows<T> {
    /// Those of its whole lines.
    pub rows: Vec<T>,
    /// Names the torn last line, if there is one.
    pub torn: Option<String>,
}

/// Reads a file of JSON lines that a command has written.
///
/// # Errors
/// [`Error::Missing`]; [`Error::Row`] for a whole line that is no such row.
pub fn read_rows<T: DeserializeOwned>(path: &Path) -> Result<Rows<T>, Error> {
    let bytes = input::read(path).map_err(|source| Error::Missing { path: path.to_owned(), source })?;
    let (whole, torn) = bytes.split_at(whole_lines(&bytes));
    let lines = input::without_mark(whole).split_inclusive(|byte| *byte == b'\n');
    let row = |(i, line): (usize, &[u8])| {
        let line = line.trim_ascii_end(); // or an error at the end would be in the next line
        serde_json::from_slice(line).map_err(|e| {
            let reason = input::line_problem(line, &e);
            Error::Row { path: path.to_owned(), line: i + 1, reason }
        })
    };
    let rows = lines.enumerate().map(row).collect::<Result<Vec<T>, _>>()?;
    let torn = (!torn.is_empty()).then(|| {
        format!(
            "{}:{}: the last line has no line feed, as after a process that was killed while it wrote: it is left out",
            path.display(),
            rows.len() + 1
        )
    });
    Ok(Rows { rows, torn })
}

/// Rows as JSON lines.
pub fn json_lines(rows: impl IntoIterator<Item = impl Serialize>) -> Vec<u8> {
    let mut lines = Vec::new();
    for row in rows {
        serde_json::to_writer(&mut lines, &row).expect("a row has string keys");
        lines.push(b'\n');
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_last_line_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        let (mut log, lines) = RowLog::open(&path).unwrap();
        assert!(lines.is_empty());
        log.append([[1, 2], [3, 4]]).unwrap();
        let whole = std::fs::read(&path).unwrap();
        assert_eq!(whole, b"[1,2]\n[3,4]\n");
        for torn in [&b"[5"[..], "[\"\u{e4}".as_bytes().split_last().unwrap().1] {
            std::fs::write(&path, [&whole[..], torn].concat()).unwrap();
            let (mut log, lines) = RowLog::open(&path).unwrap();
            assert_eq!(lines, ["[1,2]", "[3,4]"]);
            log.append([[5, 6]]).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), b"[1,2]\n[3,4]\n[5,6]\n");
        }
        std::fs::write(&path, b"[1,2]\n\xff\n").unwrap();
        assert!(matches!(RowLog::open(&path), Err(Error::Row { line: 2, .. })));
    }

    #[test]
    fn readers_leave_a_torn_last_line_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        for torn in [&b"[5"[..], b"[5,6]", b"\xc3", b"\0\0"] {
            std::fs::write(&path, [&b"\xef\xbb\xbf[1,2]\r\n[3,4]\n"[..], torn].concat()).unwrap();
            let found = read_rows::<[u8; 2]>(&path).unwrap();
            assert_eq!(found.rows, [[1, 2], [3, 4]], "{torn:?}");
            let said = found.torn.expect("the torn line is named");
            assert!(said.starts_with(&format!("{}:3: the last line has no line feed", path.display())), "{said}");
        }
        for whole in ["", "[1,2]\n"] {
            std::fs::write(&path, whole).unwrap();
            let found = read_rows::<[u8; 2]>(&path).unwrap();
            assert_eq!((found.rows.len(), found.torn), (whole.len() / 6, None));
        }
    }

    #[test]
    fn a_whole_line_that_is_no_row_is_named_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rows.jsonl");
        for (second, reason) in [
            (&b"[3,"[..], "the line is cut off: it ends where a value should be"),
            (b"", "the line is empty"),
            (b"\0\0", "the line holds zero bytes"),
            (b"[3,\"\xff\"]", "a text is not UTF-8"),
            (b"[3]", "a value should be a list of 2, not a list of 1"),
            (b"[3,4,5]", "a list has more values than it should (column"),
        ] {
            std::fs::write(&path, [&b"[1,2]\n"[..], second, b"\n[5,6]\n"].concat()).unwrap();
            let said = read_rows::<[u8; 2]>(&path).unwrap_err().to_string();
            assert!(said.contains("rows.jsonl:2: ") && said.contains(reason), "{said}");
            assert!(!said.contains("at line"), "{said}");
        }
    }
}
