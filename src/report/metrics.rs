//! `metrics.jsonl`: one JSON object per step.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::Error;
use crate::input;
use crate::train::{ExpertLoads, LoadBalance, Phase};

/// One line of `metrics.jsonl`: a training step, or a micro-batch of an identification. A loss that the phase does not
/// compute is null, and so is a number that is not finite.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MetricsRow {
    /// Phase of the round.
    pub phase: Phase,
    /// Round, from 1.
    pub round: usize,
    /// Number of the line, counted over the whole run from 1.
    pub step: u64,
    /// Mean cross-entropy of the global batch, in nats per token.
    pub ce_loss: Option<f64>,
    /// Mean divergence over the layers, in nats.
    pub router_loss: Option<f64>,
    /// Mean cross-entropy of the replies of the step's retain rows, or divergence of their next-token distributions from the
    /// base model's, in nats; absent where it is no part of the loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain_loss: Option<f64>,
    /// Mean divergence of the routing of the step's retain rows from the base model's, in nats; absent where it is no part of
    /// the loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retain_routing_loss: Option<f64>,
    /// The minimised loss.
    pub total_loss: Option<f64>,
    /// Learning rate.
    pub lr: Option<f64>,
    /// L2 norm of the gradient before clipping.
    pub grad_norm: Option<f64>,
    /// Tokens of the global batch (all ranks) that went through the model.
    pub tokens: u64,
    /// Wall-clock seconds since the end of the previous step of the phase, so a checkpoint saved in between is
    /// included. Lines with `timed_together` have an equal share of a longer time.
    pub seconds: f64,
    /// Set for the micro-batches of an identification, which are timed as a whole (ranks process them in parallel): the
    /// number of its lines. `seconds` of each line is the time of the whole identification divided by this number.
    /// After a resume during the identification, only the time since the resume counts. With `--selection per-batch`,
    /// scoring is part of the expert steps' `seconds`, and these lines have about 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timed_together: Option<usize>,
    /// How evenly the tokens of the step are spread over the experts, by MoE layer; absent in an identification.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expert_load: Option<LoadBalance>,
    /// In the last line of a phase: the tokens of each expert in the whole phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase_load: Option<ExpertLoads>,
    /// True if a number was not finite, so the update was skipped.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub skipped: bool,
}

/// The log file, opened for appending. Each row is one write, so a killed run leaves complete rows.
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    length: u64,
}

impl MetricsLog {
    /// Creates an empty log, replacing an existing one.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self, Error> {
        Self::resume(path, &[]).map(|(log, _)| log)
    }

    /// Continues a log after the rows that a checkpoint holds ([`Self::so_far`]): truncates the rows of the steps that will be
    /// repeated. Where the log does not begin with the rows of the checkpoint, it was damaged since, and is written again. Returns
    /// whether it was.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn resume(path: impl Into<PathBuf>, so_far: &[u8]) -> Result<(Self, bool), Error> {
        let (path, length) = (path.into(), so_far.len() as u64);
        let open = || -> io::Result<(File, bool)> {
            if input::is_there(&path) {
                input::open(&path)?; // refuses a pipe, on which reading would wait without end
            }
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path)?;
            let mut found = Vec::new();
            (&file).take(length).read_to_end(&mut found)?;
            Ok((file, found != so_far))
        };
        let failed = |action, source| Error::Log { path: path.clone(), action, source };
        let (mut file, damaged) = open().map_err(|e| failed("opening", e))?;
        if damaged {
            file.rewind().and_then(|()| file.write_all(so_far)).map_err(|e| failed("writing again", e))?;
        }
        file.set_len(length).and_then(|()| file.seek(SeekFrom::Start(length))).map_err(|e| failed("truncating", e))?;
        Ok((Self { path, file, length }, damaged))
    }

    /// The first `length` bytes of a log, for a checkpoint of an earlier version, which holds no more of it than this length.
    ///
    /// # Errors
    /// [`Error::Log`]; [`Error::LogTruncated`] if the log is shorter.
    pub fn head(path: &Path, length: u64) -> Result<Vec<u8>, Error> {
        let mut head = Vec::new();
        match input::open(path).and_then(|file| file.take(length).read_to_end(&mut head)) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(Error::Log { path: path.into(), action: "opening", source })
            }
            _ if (head.len() as u64) < length => {
                Err(Error::LogTruncated { path: path.into(), found: head.len() as u64, expected: length })
            }
            _ => Ok(head),
        }
    }

    /// Syncs the rows so far to the disk, and returns them, for a checkpoint.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn so_far(&self) -> Result<Vec<u8>, Error> {
        self.sync()?;
        let mut rows = vec![0; self.length as usize];
        self.file.read_exact_at(&mut rows, 0).map_err(|e| self.failed("reading", e))?;
        Ok(rows)
    }

    /// Appends a row.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn write(&mut self, row: &MetricsRow) -> Result<(), Error> {
        let mut line = serde_json::to_vec(row).expect("a row has string keys");
        line.push(b'\n');
        if let Err(source) = self.file.write_all(&line) {
            // A full disk can leave part of the row: truncate it, so that the rows before it stay readable.
            _ = self.file.set_len(self.length);
            return Err(self.failed("appending", source));
        }
        self.length += line.len() as u64;
        Ok(())
    }

    /// Syncs the rows to the disk (fdatasync).
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn sync(&self) -> Result<(), Error> {
        self.file.sync_data().map_err(|e| self.failed("syncing", e))
    }

    fn failed(&self, action: &'static str, source: io::Error) -> Error {
        Error::Log { path: self.path.clone(), action, source }
    }
}

/// The human-readable form of a row: `Step 100: CE Loss: 2.3456, Router Loss: 0.0234, Total Loss: 2.3690`, with `-` for
/// a loss that the phase does not compute. Scripts may parse it, so it must not change.
pub fn log_line(row: &MetricsRow) -> String {
    let loss = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
    let (ce, router, total) = (loss(row.ce_loss), loss(row.router_loss), loss(row.total_loss));
    let mut retain = String::new();
    for (name, value) in [("Retain Loss", row.retain_loss), ("Retain Routing Loss", row.retain_routing_loss)] {
        if value.is_some() {
            retain += &format!(", {name}: {}", loss(value));
        }
    }
    format!("Step {}: CE Loss: {ce}, Router Loss: {router}{retain}, Total Loss: {total}", row.step)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::exit::{self, Coded};

    fn row(step: u64) -> MetricsRow {
        MetricsRow {
            phase: Phase::Joint,
            round: 1,
            step,
            ce_loss: Some(2.3456),
            router_loss: Some(0.0234),
            retain_loss: None,
            retain_routing_loss: None,
            total_loss: Some(2.369),
            lr: Some(5e-5),
            grad_norm: None,
            tokens: 640,
            seconds: 0.25,
            timed_together: None,
            expert_load: None,
            phase_load: None,
            skipped: false,
        }
    }

    fn rows_of(path: &Path) -> Vec<MetricsRow> {
        super::super::read_rows(path).unwrap().rows
    }

    #[test]
    fn a_row_is_one_json_line() {
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
        let rows = rows_of(&path);
        assert_eq!(
            rows,
            [row(1), MetricsRow { ce_loss: None, lr: None, ..row(2) }],
            "numbers that are not finite become null"
        );
        assert_eq!(log.so_far().unwrap(), text.as_bytes());
    }

    #[test]
    fn micro_batches_of_an_identification_share_their_time() {
        let row = MetricsRow { phase: Phase::Identify, timed_together: Some(12), ..row(1) };
        let line = serde_json::to_value(&row).unwrap();
        assert_eq!((&line["seconds"], &line["timed_together"]), (&0.25.into(), &12.into()));
        assert_eq!(serde_json::from_value::<MetricsRow>(line).unwrap(), row);
    }

    #[test]
    fn loads_of_a_step_and_of_a_phase() {
        let loads = ExpertLoads { layers: vec![1, 3], counts: vec![vec![3, 1], vec![0, 4]] };
        let row = MetricsRow { expert_load: Some(loads.balance()), phase_load: Some(loads), ..row(1) };
        let line = serde_json::to_value(&row).unwrap();
        let balance = serde_json::json!({"layers": [1, 3], "busiest": [0.75, 1.0], "idle": [0, 1], "cv": [0.5, 1.0]});
        assert_eq!(line["expert_load"], balance);
        assert_eq!(line["phase_load"], serde_json::json!({"layers": [1, 3], "counts": [[3, 1], [0, 4]]}));
        assert_eq!(serde_json::from_value::<MetricsRow>(line).unwrap(), row);
    }

    #[test]
    fn resuming_truncates_the_rows_after_the_checkpoint_and_restores_those_before() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut log = MetricsLog::create(&path).unwrap();
        log.write(&row(1)).unwrap();
        let checkpoint = log.so_far().unwrap();
        log.write(&row(2)).unwrap();
        let (mut log, damaged) = MetricsLog::resume(&path, &checkpoint).unwrap();
        assert!(!damaged);
        log.write(&row(3)).unwrap();
        assert_eq!(rows_of(&path), [row(1), row(3)]);
        let whole = log.so_far().unwrap();
        let zeroed = [vec![0; checkpoint.len()], whole[checkpoint.len()..].to_vec()].concat();
        for bytes in
            [None, Some(&[][..]), Some(&whole[..9]), Some(&zeroed), Some(&[&whole[..9], b"x", &whole[10..]].concat())]
        {
            match bytes {
                Some(bytes) => std::fs::write(&path, bytes).unwrap(),
                None => std::fs::remove_file(&path).unwrap(),
            }
            let (mut log, damaged) = MetricsLog::resume(&path, &checkpoint).unwrap();
            assert!(damaged);
            log.write(&row(3)).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), whole);
        }
        drop(MetricsLog::create(&path).unwrap());
        assert!(rows_of(&path).is_empty());
    }

    #[test]
    fn checkpoints_of_earlier_versions_hold_the_length() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        assert_eq!(MetricsLog::head(&path, 0).unwrap(), b"");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(MetricsLog::head(&path, 2).unwrap(), b"ab");
        for absent in [false, true] {
            if absent {
                std::fs::remove_file(&path).unwrap();
            }
            let error = MetricsLog::head(&path, 4).unwrap_err();
            assert_eq!(error.exit_code(), exit::DATA);
            assert!(error.to_string().contains("--overwrite"), "{error}");
        }
    }

    #[test]
    fn errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let Err(error) = MetricsLog::create(dir.path().join("absent/m.jsonl")) else {
            panic!("created a log in a missing folder")
        };
        assert_eq!(error.exit_code(), exit::IO);
        assert!(error.to_string().contains("absent/m.jsonl"), "{error}");
    }

    #[test]
    fn human_readable_line() {
        let line = log_line(&row(100));
        assert_eq!(line, "Step 100: CE Loss: 2.3456, Router Loss: 0.0234, Total Loss: 2.3690");
        let line = log_line(&MetricsRow { router_loss: None, ..row(3) });
        assert_eq!(line, "Step 3: CE Loss: 2.3456, Router Loss: -, Total Loss: 2.3690");
        let line = log_line(&MetricsRow { retain_loss: Some(0.5), ..row(3) });
        assert_eq!(line, "Step 3: CE Loss: 2.3456, Router Loss: 0.0234, Retain Loss: 0.5000, Total Loss: 2.3690");
    }
}
