//! A file of JSON lines that grows while a command works, and from which the next run of the command continues.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Error;

/// The file, open for appending.
pub struct RowLog {
    path: PathBuf,
    file: File,
}

impl RowLog {
    /// Opens the file, or creates it, and returns its lines. A last line without a line feed, which a killed process has left,
    /// is removed from it.
    ///
    /// # Errors
    /// [`Error::Log`]; [`Error::Invalid`] for a line that is not UTF-8.
    pub fn open(path: impl Into<PathBuf>) -> Result<(Self, Vec<String>), Error> {
        let path = path.into();
        let failed = |action| {
            let path = path.clone();
            move |source: io::Error| Error::Log { path, action, source }
        };
        let mut bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(e) => return Err(failed("opening")(e)),
        };
        let file = OpenOptions::new().append(true).create(true).open(&path).map_err(failed("opening"))?;
        let whole = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64).map_err(failed("truncating"))?;
            bytes.truncate(whole);
        }
        let text = String::from_utf8(bytes)
            .map_err(|e| Error::Invalid { path: path.clone(), reason: format!("is not UTF-8 ({e})") })?;
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
        std::fs::write(&path, b"\xff\n").unwrap();
        assert!(matches!(RowLog::open(&path), Err(Error::Invalid { .. })));
    }
}
