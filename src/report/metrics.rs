//! `metrics.jsonl`: one JSON object a step.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::train::Phase;

/// What is known after a step. A loss that a phase does not have is null, and so is a number that is not finite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsRow {
    /// Part of the round.
    pub phase: Phase,
    /// From 1.
    pub round: usize,
    /// Step of the whole run, from 1.
    pub step: u64,
    /// Mean cross-entropy of the global batch, nats a token.
    pub ce_loss: Option<f64>,
    /// Mean divergence over the layers, nats.
    pub router_loss: Option<f64>,
    /// What is minimised.
    pub total_loss: Option<f64>,
    /// Learning rate of the step.
    pub lr: Option<f64>,
    /// Norm of the gradient before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens of the global batch that went through the model.
    pub tokens: u64,
    /// Wall-clock time of the step.
    pub seconds: f64,
    /// True where a number was not finite, so that nothing was updated.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// The growing log. Each row is handed to the system whole, so that a killed run leaves whole rows.
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    length: u64,
}

impl MetricsLog {
    /// Begins an empty log, replacing one that is there.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Self::open(path.into(), 0)
    }

    /// Continues a log after its first `length` bytes ([`Self::length`] at the checkpoint): the rows of steps that are
    /// about to be repeated are cut off.
    ///
    /// # Errors
    /// [`Error::Log`]; [`Error::LogCut`] if the log is shorter than that.
    pub fn resume(path: impl Into<PathBuf>, length: u64) -> Result<Self, Error> {
        Self::open(path.into(), length)
    }

    fn open(path: PathBuf, length: u64) -> Result<Self, Error> {
        let open = || -> io::Result<(File, u64)> {
            let file = OpenOptions::new().write(true).create(true).truncate(false).open(&path)?;
            let found = file.metadata()?.len();
            Ok((file, found))
        };
        let failed = |action, source| Error::Log { path: path.clone(), action, source };
        let (mut file, found) = open().map_err(|e| failed("opening", e))?;
        if found < length {
            return Err(Error::LogCut { path, found, expected: length });
        }
        file.set_len(length).and_then(|()| file.seek(SeekFrom::Start(length))).map_err(|e| failed("cutting", e))?;
        Ok(Self { path, file, length })
    }

    /// Appends a row.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn write(&mut self, row: &MetricsRow) -> Result<(), Error> {
        let mut line = serde_json::to_vec(row).expect("a row has string keys");
        line.push(b'\n');
        if let Err(source) = self.file.write_all(&line) {
            // Of a full disk's last row a part was written: cut it off, so that the rows before it can be read.
            _ = self.file.set_len(self.length);
            return Err(self.failed("appending", source));
        }
        self.length += line.len() as u64;
        Ok(())
    }

    /// Bytes so far: what a checkpoint remembers.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Makes all rows survive a crash of the machine.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_data().map_err(|e| self.failed("syncing", e))
    }

    /// Reads the rows of a log.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Invalid`] with the line.
    pub fn read(path: &Path) -> Result<Vec<MetricsRow>, Error> {
        let text = std::fs::read_to_string(path).map_err(|source| Error::Missing { path: path.to_owned(), source })?;
        let row = |(i, line): (usize, &str)| {
            let invalid = |e| Error::Invalid { path: path.to_owned(), reason: format!("line {}: {e}", i + 1) };
            serde_json::from_str(line).map_err(invalid)
        };
        text.lines().enumerate().map(row).collect()
    }

    fn failed(&self, action: &'static str, source: io::Error) -> Error {
        Error::Log { path: self.path.clone(), action, source }
    }
}

/// The line for people and their scripts: `Step 100: CE Loss: 2.3456, Router Loss: 0.0234, Total Loss: 2.3690`; `-` stands
/// for a loss that the phase does not have.
pub fn log_line(row: &MetricsRow) -> String {
    let loss = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
    let (ce, router, total) = (loss(row.ce_loss), loss(row.router_loss), loss(row.total_loss));
    format!("Step {}: CE Loss: {ce}, Router Loss: {router}, Total Loss: {total}", row.step)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::{self, Coded};

    fn row(step: u64) -> MetricsRow {
        MetricsRow {
            phase: Phase::Joint,
            round: 1,
            step,
            ce_loss: Some(2.3456),
            router_loss: Some(0.0234),
            total_loss: Some(2.369),
            lr: Some(5e-5),
            grad_norm: None,
            tokens: 640,
            seconds: 0.25,
            skipped: false,
        }
    }

    #[test]
    fn a_row_is_one_line_of_json() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        log.write(&row(1)).unwrap();
        log.write(&MetricsRow { ce_loss: Some(f64::NAN), lr: Some(f64::INFINITY), ..row(2) }).unwrap();
        log.sync().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let first = r#"{"phase":"joint","round":1,"step":1,"ce_loss":2.3456,"router_loss":0.0234,"total_loss":2.369,"lr":0.00005,"grad_norm":null,"tokens":640,"seconds":0.25}"#;
        let value: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(value, serde_json::from_str::<serde_json::Value>(first).unwrap());
        let rows = MetricsLog::read(&path).unwrap();
        assert_eq!(rows, [row(1), MetricsRow { ce_loss: None, lr: None, ..row(2) }], "not finite is null");
        assert_eq!(log.length(), text.len() as u64);
    }

    #[test]
    fn a_resumed_log_forgets_what_is_repeated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        log.write(&row(1)).unwrap();
        let checkpoint = log.length();
        log.write(&row(2)).unwrap();
        let mut log = MetricsLog::resume(&path, checkpoint).unwrap();
        log.write(&row(2)).unwrap();
        assert_eq!(MetricsLog::read(&path).unwrap(), [row(1), row(2)]);
        let Err(error) = MetricsLog::resume(&path, 1 << 20) else { panic!("a log cannot grow by resuming") };
        assert_eq!(error.exit_code(), exit::DATA);
        assert!(MetricsLog::create(&path).unwrap().length() == 0 && MetricsLog::read(&path).unwrap().is_empty());
    }

    #[test]
    fn faults_name_the_file_and_the_line() {
        let dir = tempfile::tempdir().unwrap();
        let Err(error) = MetricsLog::create(dir.path().join("absent/m.jsonl")) else { panic!("no folder") };
        assert_eq!(error.exit_code(), exit::IO);
        assert!(error.to_string().contains("absent/m.jsonl"), "{error}");
        let path = dir.path().join("bad.jsonl");
        std::fs::write(&path, "{\n").unwrap();
        let error = MetricsLog::read(&path).unwrap_err().to_string();
        assert!(error.contains("bad.jsonl: line 1"), "{error}");
    }

    #[test]
    fn the_line_for_people() {
        let line = log_line(&row(100));
        assert_eq!(line, "Step 100: CE Loss: 2.3456, Router Loss: 0.0234, Total Loss: 2.3690");
        let line = log_line(&MetricsRow { router_loss: None, ..row(3) });
        assert_eq!(line, "Step 3: CE Loss: 2.3456, Router Loss: -, Total Loss: 2.3690");
    }
}
