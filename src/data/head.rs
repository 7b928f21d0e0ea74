//! Which rows of a file are read: the first ones up to a limit, with both sides where the caller needs them.

use std::path::Path;

use super::Error;
use super::kinds::{self, Parsed, Row};
use super::options::{DataOptions, Sides};
use super::report::{BothSides, DataReport};
use super::rows::{self, Rows};
use crate::meter::{Meter, Unit};

impl Sides {
    /// The side that is needed and that no row has.
    fn missing(self, rows: &[Row]) -> Option<Side> {
        let lacks = |side: Side| !rows.iter().any(|row| side.is_of(row));
        let needed = [(self.unsafe_, Side::Unsafe), (self.safe, Side::Safe), (self.safe_replies, Side::SafeReply)];
        needed.into_iter().find(|(needed, side)| *needed && lacks(*side)).map(|(_, side)| side)
    }
}

#[derive(Clone, Copy)]
enum Side {
    Unsafe,
    Safe,
    SafeReply,
}

impl Side {
    fn is_of(self, row: &Row) -> bool {
        match self {
            Self::Unsafe => row.unsafe_side.is_some(),
            Self::Safe => row.safe_side.is_some(),
            Self::SafeReply => row.safe_side.as_ref().is_some_and(kinds::Side::has_reply),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Unsafe => "unsafe rows",
            Self::Safe => "safe rows",
            Self::SafeReply => "safe rows with a reply",
        }
    }
}

/// Parses the rows of a file: those that pass their verdict, up to `max_samples`. If a needed side is missing among these, as
/// in a file sorted by label, the last half of them gives way to the first rows after them that have it.
///
/// # Errors
/// A file that cannot be read or is empty; the first row that is invalid.
pub(super) fn read(path: &Path, options: &DataOptions, report: &mut DataReport) -> Result<Vec<Row>, Error> {
    let text = rows::read_text(path)?;
    let mut rows = Rows::new(path, &text);
    let max = options.max_samples;
    let lines = text.bytes().filter(|byte| *byte == b'\n').count();
    let expected = if max > 0 { lines.min(max) } else { lines };
    let meter = Meter::start(format!("reading the rows of {}", path.display()), Unit::Rows, expected as u64);
    let mut parsed = Vec::new();
    let parse = |line, row: &_| {
        kinds::parse(line, row, &options.safe_response, options.keep_failed).map_err(|e| Error::row(path, line, e))
    };
    let mut next = None;
    for row in rows.by_ref() {
        if max > 0 && parsed.len() == max {
            report.stopped_early = true;
            next = Some(row);
            break;
        }
        let (line, row) = row?;
        report.rows_read += 1;
        meter.add(1);
        match parse(line, &row)? {
            Parsed::Row(row) => parsed.push(*row),
            Parsed::Dropped(reason) => *report.dropped.entry(reason).or_default() += 1,
        }
    }
    if let Some(side) = options.needs.missing(&parsed).filter(|_| report.stopped_early) {
        // A row that cannot be read is no error here, as it would be none without the search.
        let rest =
            next.into_iter().chain(rows).map_while(Result::ok).filter_map(|(line, row)| match parse(line, &row) {
                Ok(Parsed::Row(row)) if side.is_of(&row) => Some(*row),
                _ => None,
            });
        let found: Vec<_> = rest.take((max / 2).max(1)).collect();
        if !found.is_empty() {
            parsed.truncate(max - found.len());
            report.both_sides = Some(BothSides { missing: side.name(), head: parsed.len(), found: found.len() });
            parsed.extend(found);
        }
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(text: &str, max_samples: usize, needs: Sides) -> (Vec<usize>, DataReport) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.jsonl");
        std::fs::write(&path, text).unwrap();
        let options = DataOptions { max_samples, needs, ..DataOptions::default() };
        let mut report = DataReport::default();
        let rows = read(&path, &options, &mut report).unwrap();
        (rows.iter().map(|row| row.line).collect(), report)
    }

    #[test]
    fn a_file_sorted_by_label_gives_both_sides_where_they_are_needed() {
        let chat = |label: &str| {
            format!(
                r#"{{"label": "{label}", "messages": [{{"role": "user", "content": "q"}}, {{"role": "assistant", "content": "a"}}]}}"#
            ) + "\n"
        };
        let both = Sides { unsafe_: true, safe: true, safe_replies: false };
        let sorted = chat("safe").repeat(10) + &chat("unsafe").repeat(10);
        let (rows, report) = lines(&sorted, 4, both);
        assert_eq!(rows, [1, 2, 11, 12]);
        assert_eq!(report.both_sides, Some(BothSides { missing: "unsafe rows", head: 2, found: 2 }));
        let said = report.to_string();
        assert!(
            said.contains(": 4 rows read up to --max-samples, ") && !said.contains("only the first ones"),
            "{said}"
        );
        assert!(said.contains("2 of these are taken, and 2 unsafe rows from further on"), "{said}");
        // Nothing changes where the side is not needed, is there, or is nowhere; a broken line ends the search.
        let (rows, report) = lines(&sorted, 4, Sides { unsafe_: false, ..both });
        assert_eq!(rows, [1, 2, 3, 4]);
        assert!(report.to_string().contains("(only the first ones: --max-samples)"), "{report}");
        assert_eq!(lines(&(chat("unsafe") + &sorted), 4, both).0, [1, 2, 3, 4]);
        assert_eq!(lines(&chat("safe").repeat(10), 4, both).0, [1, 2, 3, 4]);
        assert_eq!(lines(&(chat("safe").repeat(10) + "broken\n" + &sorted), 4, both).0, [1, 2, 3, 4]);
        // Few rows of the missing side, and a limit of one row.
        assert_eq!(lines(&(chat("safe").repeat(10) + &chat("unsafe")), 4, both).0, [1, 2, 3, 11]);
        assert_eq!(lines(&sorted, 1, both).0, [11]);
        assert_eq!(lines(&(chat("unsafe").repeat(9) + &chat("safe")), 4, both).0, [1, 2, 3, 10]);
        // A prompt alone is no reply.
        let prompts = r#"{"label": "safe", "messages": [{"role": "user", "content": "q"}]}"#.to_owned() + "\n";
        let replies = Sides { unsafe_: false, safe: true, safe_replies: true };
        assert_eq!(lines(&(prompts.repeat(9) + &chat("safe")), 4, replies).0, [1, 2, 3, 10]);
    }
}
