//! TensorBoard event files (`--log tensorboard`): the numbers of `metrics.jsonl` as scalars, and the loads of the experts as
//! histograms.
//!
//! An event file is a sequence of records: the length (u64), its checksum, the bytes, their checksum (both masked CRC-32C), in
//! little-endian order. The bytes are the protocol buffer `Event` of tensorflow/core/util/event.proto; only the fields that are
//! written here have names below.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use super::Error;
use super::metrics::MetricsRow;
use crate::input;

/// The event file of a process, below the folder `tensorboard`. A run that is resumed begins another one.
pub struct EventLog {
    path: PathBuf,
    /// Created with the first event: a run that has nothing left to do leaves no file.
    file: Option<File>,
    /// Steps of which earlier files have the events; `None`: there are no such files.
    earlier: Option<u64>,
}

/// Fields of `Event`, of `Summary`, of `Summary.Value`, of `HistogramProto` and of `SessionLog`.
mod field {
    pub const WALL_TIME: u32 = 1;
    pub const STEP: u32 = 2;
    pub const FILE_VERSION: u32 = 3;
    pub const SUMMARY: u32 = 5;
    pub const SESSION_LOG: u32 = 7;
    pub const VALUE: u32 = 1;
    pub const TAG: u32 = 1;
    pub const SIMPLE_VALUE: u32 = 2;
    pub const HISTOGRAM: u32 = 5;
    /// `min`, `max`, `num`, `sum` and `sum_squares`.
    pub const MOMENTS: [u32; 5] = [1, 2, 3, 4, 5];
    pub const BUCKET_LIMIT: u32 = 6;
    pub const BUCKET: u32 = 7;
    pub const STATUS: u32 = 1;
}

/// `SessionLog.SessionStatus.START`: TensorBoard drops events of this step and later ones from earlier files.
const START: u64 = 1;

const START_OF_NAME: &str = "events.out.tfevents.";
const END_OF_NAME: &str = ".moewarden";

/// Buckets of a histogram, but for one more at most.
const BUCKETS: u64 = 30;

impl EventLog {
    /// A new event file in `folder`, for the steps after the first `done` ones.
    fn new(folder: &Path, done: u64) -> Self {
        let now = since_epoch();
        let continues = done > 0 || fs::read_dir(folder).is_ok_and(|mut files| files.next().is_some());
        // TensorBoard reads the files in the order of their names.
        let path = folder.join(format!("{START_OF_NAME}{}.{:09}{END_OF_NAME}", now.as_secs(), now.subsec_nanos()));
        Self { path, file: None, earlier: continues.then_some(done) }
    }

    /// A new event file for the steps after the first `done` ones, of which earlier files in `folder` hold the events. Where they do
    /// not, as some were damaged or deleted or the log begins only now, they are written again from `rows`, in place of what is left.
    /// Returns whether something was left.
    ///
    /// # Errors
    /// [`Error::Log`]; those of `rows`.
    pub fn resume(
        folder: &Path,
        done: u64,
        rows: impl FnOnce() -> Result<Vec<MetricsRow>, Error>,
    ) -> Result<(Self, bool), Error> {
        let earlier = own_files(folder);
        let recorded: HashSet<u64> = earlier.iter().flat_map(|path| steps_of(path)).collect();
        if (1..=done).all(|step| recorded.contains(&step)) {
            return Ok((Self::new(folder, done), false));
        }
        let rows = rows()?;
        for path in &earlier {
            fs::remove_file(path).map_err(|source| Error::Log { path: path.clone(), action: "removing", source })?;
        }
        let mut log = Self::new(folder, 0);
        rows.iter().try_for_each(|row| log.write(row))?;
        Ok((log, !earlier.is_empty()))
    }

    /// Whether event files of moewarden have names like this one.
    pub fn is_name(name: &str) -> bool {
        name.starts_with(START_OF_NAME) && name.ends_with(END_OF_NAME)
    }

    /// Appends the numbers of a row, by phase.
    ///
    /// # Errors
    /// [`Error::Log`].
    pub fn write(&mut self, row: &MetricsRow) -> Result<(), Error> {
        let speed = (row.seconds > 0.0).then(|| row.tokens as f64 / row.seconds);
        // As in metrics.jsonl.
        let phase = serde_json::to_value(row.phase).expect("a phase is a string");
        let phase = phase.as_str().unwrap_or_default();
        let mut summary = Vec::new();
        for (name, number) in [
            ("ce_loss", row.ce_loss),
            ("router_loss", row.router_loss),
            ("retain_loss", row.retain_loss),
            ("retain_routing_loss", row.retain_routing_loss),
            ("total_loss", row.total_loss),
            ("lr", row.lr),
            ("grad_norm", row.grad_norm),
            ("tokens_per_second", speed),
            ("round", Some(row.round as f64)),
        ] {
            let Some(number) = number else { continue };
            summary.extend(scalar(&format!("{phase}/{name}"), number));
        }
        if let Some(load) = &row.expert_load {
            for (i, layer) in load.layers.iter().enumerate() {
                for (name, number) in [("busiest", load.busiest[i]), ("idle", load.idle[i] as f64), ("cv", load.cv[i])]
                {
                    summary.extend(scalar(&format!("{phase}_experts/layer_{layer:02}_{name}"), number));
                }
            }
        }
        if let Some(load) = &row.phase_load {
            for (layer, counts) in load.layers.iter().zip(&load.counts) {
                summary.extend(histogram(&format!("{phase}_experts/layer_{layer:02}_tokens"), counts));
            }
        }
        self.append(row.step, bytes(field::SUMMARY, &summary))
    }

    fn append(&mut self, step: u64, what: Vec<u8>) -> Result<(), Error> {
        let failed = |action| move |source| (action, source);
        let written = match &mut self.file {
            Some(file) => file.write_all(&event(step, what)).map_err(failed("appending")),
            None => self.open(&event(step, what)).map(|file| self.file = Some(file)).map_err(failed("opening")),
        };
        written.map_err(|(action, source)| Error::Log { path: self.path.clone(), action, source })
    }

    /// Creates the file, with the marks of its beginning and the `first` event.
    fn open(&self, first: &[u8]) -> io::Result<File> {
        fs::create_dir_all(self.path.parent().unwrap_or(Path::new("")))?;
        let mut start = event(0, bytes(field::FILE_VERSION, b"brain.Event:2"));
        if let Some(done) = self.earlier {
            start.extend(event(done + 1, bytes(field::SESSION_LOG, &varint(field::STATUS, START))));
        }
        start.extend(first);
        let mut file = OpenOptions::new().append(true).create_new(true).open(&self.path)?;
        file.write_all(&start)?;
        Ok(file)
    }
}

/// The record of an event.
fn event(step: u64, what: Vec<u8>) -> Vec<u8> {
    record(&[double(field::WALL_TIME, since_epoch().as_secs_f64()), varint(field::STEP, step), what].concat())
}

/// A `Summary.Value` with a number.
fn scalar(tag: &str, number: f64) -> Vec<u8> {
    let value = [bytes(field::TAG, tag.as_bytes()), float(field::SIMPLE_VALUE, number as f32)].concat();
    bytes(field::VALUE, &value)
}

/// A `Summary.Value` with the distribution of these numbers. A bucket reaches from the limit of the one before it to its own.
fn histogram(tag: &str, counts: &[u64]) -> Vec<u8> {
    let (least, most) = (counts.iter().copied().min().unwrap_or(0), counts.iter().copied().max().unwrap_or(0));
    let width = (most - least).div_ceil(BUCKETS).max(1);
    let mut buckets = vec![0.0; ((most - least) / width + 1) as usize];
    counts.iter().for_each(|count| buckets[((count - least) / width) as usize] += 1.0);
    let limits: Vec<f64> = (1..=buckets.len() as u64).map(|i| (least + i * width) as f64).collect();
    let values = || counts.iter().map(|count| *count as f64);
    let moments =
        [least as f64, most as f64, counts.len() as f64, values().sum(), values().map(|count| count * count).sum()];
    let mut histogram: Vec<u8> =
        field::MOMENTS.iter().zip(moments).flat_map(|(field, moment)| double(*field, moment)).collect();
    for (field, list) in [(field::BUCKET_LIMIT, limits), (field::BUCKET, buckets)] {
        let packed: Vec<u8> = list.into_iter().flat_map(f64::to_le_bytes).collect();
        histogram.extend(bytes(field, &packed));
    }
    bytes(field::VALUE, &[bytes(field::TAG, tag.as_bytes()), bytes(field::HISTOGRAM, &histogram)].concat())
}

/// The event files of moewarden in a folder, if it exists.
fn own_files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(EventLog::is_name))
        .map(|entry| entry.path())
        .collect()
}

/// The steps with numbers in an event file of moewarden, up to its first damaged record: a reader stops there.
fn steps_of(path: &Path) -> Vec<u64> {
    let Ok(bytes) = input::read(path) else { return Vec::new() };
    let mut rest = &bytes[..];
    let mut steps = Vec::new();
    while let Some((event, after)) = first_record(rest) {
        steps.extend(step_with_numbers(event));
        rest = after;
    }
    steps
}

/// The bytes of the first record, and what follows it; `None` at the end and at a damaged record.
fn first_record(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let size = usize::try_from(u64::from_le_bytes(*length)).ok()?;
    let (event, after) = rest.get(4..)?.split_at_checked(size)?;
    let after = after.get(4..)?;
    (record(event) == bytes[..bytes.len() - after.len()]).then_some((event, after))
}

/// The step of an event with a summary, of which the fields are in the order in which they are written here.
fn step_with_numbers(event: &[u8]) -> Option<u64> {
    let mut rest = event.get(double(field::WALL_TIME, 0.0).len()..)?.strip_prefix(&key(field::STEP, 0)[..])?.iter();
    let (mut step, mut shift) = (0, 0);
    loop {
        let byte = *rest.next()?;
        step |= u64::from(byte & 0x7f).checked_shl(shift)?;
        shift += 7;
        if byte < 0x80 {
            return rest.as_slice().starts_with(&key(field::SUMMARY, 2)).then_some(step);
        }
    }
}

fn since_epoch() -> Duration {
    UNIX_EPOCH.elapsed().unwrap_or_default()
}

fn record(event: &[u8]) -> Vec<u8> {
    let length = (event.len() as u64).to_le_bytes();
    [&length[..], &checksum(&length), event, &checksum(event)].concat()
}

/// The masked CRC-32C of the record format.
fn checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xa282_ead8).to_le_bytes()
}

// --- the wire format of protocol buffers ---------------------------------------------------------------------------

fn key(field: u32, wire_type: u32) -> Vec<u8> {
    number(u64::from(field << 3 | wire_type))
}

fn number(mut value: u64) -> Vec<u8> {
    let mut out = Vec::new();
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
    out
}

fn varint(field: u32, value: u64) -> Vec<u8> {
    [key(field, 0), number(value)].concat()
}

fn double(field: u32, value: f64) -> Vec<u8> {
    [&key(field, 1)[..], &value.to_le_bytes()].concat()
}

fn bytes(field: u32, value: &[u8]) -> Vec<u8> {
    [&key(field, 2)[..], &number(value.len() as u64), value].concat()
}

fn float(field: u32, value: f32) -> Vec<u8> {
    [&key(field, 5)[..], &value.to_le_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_have_masked_checksums() {
        // RFC 3720, B.4: the CRC-32C of 32 zero bytes is 0x8a9136aa.
        assert_eq!(crc32c::crc32c(&[0; 32]), 0x8a91_36aa);
        // That, rotated by 15 bits to the right, and 0xa282ead8 more.
        let masked = 0x0fd7_fffa_u32.to_le_bytes();
        let record = record(&[0; 32]);
        assert_eq!((record.len(), &record[44..]), (8 + 4 + 32 + 4, &masked[..]));
        assert_eq!(record[..8], 32u64.to_le_bytes());
    }

    /// The log with events of these steps.
    fn log_of(folder: &Path, steps: std::ops::RangeInclusive<u64>) -> PathBuf {
        let mut log = EventLog::new(folder, steps.start() - 1);
        steps.for_each(|step| log.write(&row(step)).unwrap());
        log.path
    }

    fn row(step: u64) -> MetricsRow {
        let row = serde_json::json!({"phase": "expert", "round": 1, "step": step, "ce_loss": 0.5, "tokens": 8, "seconds": 1.0});
        serde_json::from_value(row).unwrap()
    }

    #[test]
    fn events_that_were_damaged_or_deleted_are_written_again() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("tensorboard");
        let first = log_of(&folder, 1..=200);
        let second = log_of(&folder, 4..=6);
        assert_eq!(steps_of(&first), (1..=200).collect::<Vec<_>>());
        assert_eq!(steps_of(&second), [4, 5, 6]);
        let resume = |done: u64| EventLog::resume(&folder, done, || Ok((1..=done).map(row).collect())).unwrap();
        assert!(!resume(200).1);
        assert_eq!(own_files(&folder).len(), 2, "no file without events");
        let whole = fs::read(&first).unwrap();
        let mut flipped = whole.clone();
        flipped[300] ^= 1;
        for damaged in [&whole[..whole.len() - 1], &flipped, &whole[..100], &[]] {
            fs::write(&first, damaged).unwrap();
            assert!(steps_of(&first).len() < 200);
            assert!(resume(200).1);
            let [path] = own_files(&folder).try_into().expect("one file in place of all");
            assert_eq!(steps_of(&path), (1..=200).collect::<Vec<_>>());
            fs::remove_file(&path).unwrap();
            fs::write(&first, &whole).unwrap();
        }
        // What was written after the checkpoint may be torn. A log that begins with a resumed run has all steps.
        fs::write(&first, &whole[..whole.len() - 1]).unwrap();
        assert!(!resume(199).1);
        own_files(&folder).iter().for_each(|path| fs::remove_file(path).unwrap());
        let (log, damaged) = resume(3);
        assert!(!damaged);
        assert_eq!(steps_of(&log.path), [1, 2, 3]);
    }

    #[test]
    fn numbers_have_seven_bits_a_byte() {
        assert_eq!(varint(field::STEP, 300), [0x10, 0xac, 0x02]);
        assert_eq!(bytes(field::TAG, b"ab"), [0x0a, 2, b'a', b'b']);
        assert_eq!(float(field::SIMPLE_VALUE, 1.0), [0x15, 0, 0, 0x80, 0x3f]);
    }
}
