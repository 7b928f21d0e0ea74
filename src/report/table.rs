//! Tables for terminal and HTML.

use std::fmt::Write;

use super::markup::escape;
use crate::quote::cut;

/// Characters of a cell on the terminal.
const CELL: usize = 100;
/// Longer values of options are broken over lines on a page.
const WHOLE: usize = 16;
/// Longer texts are broken over lines on a page.
const SHORT: usize = 24;

/// A table of strings. The first column holds names, the others values.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Table {
    /// Heading of the table.
    pub caption: String,
    /// Names of the columns.
    pub header: Vec<String>,
    /// Rows of cells, each as long as the header.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// An empty table.
    pub fn new<S: Into<String>>(caption: impl Into<String>, header: impl IntoIterator<Item = S>) -> Self {
        Self { caption: caption.into(), header: header.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Appends a row.
    ///
    /// # Panics
    /// If the number of cells differs from the header's.
    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        let cells: Vec<String> = cells.into_iter().map(Into::into).collect();
        assert_eq!(cells.len(), self.header.len(), "cells of a row of {:?}", self.caption);
        self.rows.push(cells);
    }

    /// The table as text: columns padded to their widest cell, the first left-aligned, the others right-aligned. Cells are cut, and
    /// without characters that a terminal obeys: names of folders and files are among them.
    pub fn to_text(&self) -> String {
        let shown = |line: &Vec<String>| -> Vec<String> { line.iter().map(|cell| cut(cell, CELL)).collect() };
        let lines: Vec<Vec<String>> = [&self.header].into_iter().chain(&self.rows).map(shown).collect();
        let width = |column: usize| lines.iter().map(|l| l[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let mut out = format!("{}\n", self.caption);
        for line in &lines {
            let mut text = String::new();
            for (column, (cell, width)) in line.iter().zip(&widths).enumerate() {
                if column == 0 {
                    let _ = write!(text, "  {cell:<width$}");
                } else {
                    let _ = write!(text, "  {cell:>width$}");
                }
            }
            out += text.trim_end();
            out.push('\n');
        }
        out
    }

    /// The table as HTML, with all text escaped; `label` is the id of the element that holds the caption. Cells of columns of
    /// numbers carry the number that they are sorted by.
    pub(super) fn to_html(&self, label: &str) -> String {
        let mut out = format!("<table aria-labelledby=\"{label}\">\n<thead><tr>");
        for cell in &self.header {
            let _ = write!(out, "<th scope=\"col\">{}</th>", escape(cell));
        }
        out += "</tr></thead>\n<tbody>\n";
        let numeric: Vec<bool> = (0..self.header.len()).map(|column| column > 0 && self.is_numeric(column)).collect();
        let long = |column: usize| self.rows.iter().any(|row| row[column].chars().count() > SHORT);
        let words: Vec<bool> = (0..self.header.len()).map(|column| !numeric[column] && long(column)).collect();
        for row in &self.rows {
            out += "<tr>";
            for (column, cell) in row.iter().enumerate() {
                let text = escape(cell);
                let _ = match number(cell).filter(|_| numeric[column]) {
                    _ if column == 0 => write!(out, "<th scope=\"row\">{}</th>", with_whole_values(cell)),
                    Some(number) => write!(out, "<td data-number=\"{number}\">{text}</td>"),
                    None if words[column] => write!(out, "<td class=\"words\">{text}</td>"),
                    None => write!(out, "<td>{text}</td>"),
                };
            }
            out += "</tr>\n";
        }
        out + "</tbody>\n</table>\n"
    }

    /// Whether at least half of the cells that have a value are numbers.
    fn is_numeric(&self, column: usize) -> bool {
        let cells = || self.rows.iter().map(|row| row[column].trim()).filter(|cell| !["", "-", "–"].contains(cell));
        let numbers = cells().filter(|cell| number(cell).is_some()).count();
        numbers > 0 && 2 * numbers >= cells().count()
    }
}

/// A name as HTML, in which no line ends within the value of an option: `expert-lr=3e-4`.
fn with_whole_values(name: &str) -> String {
    let (mut out, mut rest) = (String::new(), name);
    while let Some(at) = rest.find('=') {
        let end = rest[at..].find([',', ' ']).map_or(rest.len(), |length| at + length);
        out += &escape(&rest[..at]);
        let value = escape(&rest[at..end]);
        out += &if end - at > WHOLE { value } else { format!("<span class=\"whole\">{value}</span>") };
        rest = &rest[end..];
    }
    out + &escape(rest)
}

/// The number that a cell is sorted by: of `before → after` the last one, without the interval behind it; a share as `3 of 4` or in
/// percent, a time in seconds. `None` if the cell is something else.
fn number(cell: &str) -> Option<f64> {
    let last = cell.rsplit('→').next().unwrap_or_default();
    let value = last.split(['[', '(']).next().unwrap_or_default().replace('−', "-");
    let words: Vec<&str> = value.split_whitespace().collect();
    let finite = |word: &str| word.parse::<f64>().ok().filter(|x| x.is_finite());
    match words[..] {
        [number] => match number.strip_suffix('%') {
            Some(percent) => finite(percent).map(|x| x / 100.0),
            None => finite(number),
        },
        [number, "%"] => finite(number).map(|x| x / 100.0),
        [part, "of", whole] => Some(finite(part)? / finite(whole)?).filter(|share| share.is_finite()),
        [] => None,
        _ => {
            let seconds = words.chunks(2).map(|pair| match *pair {
                [number, unit] => Some(finite(number)? * seconds_of(unit)?),
                _ => None,
            });
            seconds.sum()
        }
    }
}

fn seconds_of(unit: &str) -> Option<f64> {
    Some(match unit {
        "s" => 1.0,
        "min" => 60.0,
        "h" => 3600.0,
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new("Losses", ["run", "before", "after"]);
        table.row(["base", "6.25", "6.25"]);
        table.row(["selective", "6.25", "10.5"]);
        let expected = "Losses\n  run        before  after\n  base         6.25   6.25\n  selective    6.25   10.5\n";
        assert_eq!(table.to_text(), expected);
    }

    #[test]
    fn names_from_the_disk_are_only_shown() {
        let mut table = Table::new("Runs", ["run", "steps"]);
        table.row(["a\x1b[31m\nb", "1"]);
        table.row(["long".repeat(100).as_str(), "2"]);
        let text = table.to_text();
        assert!(text.lines().count() == 4 && !text.contains('\x1b'), "{text}");
        assert!(text.lines().all(|line| line.chars().count() < 150), "{text}");
    }

    #[test]
    fn cells_sort_by_their_numbers() {
        for (cell, expected) in [
            ("12", Some(12.0)),
            ("-0.5", Some(-0.5)),
            ("1.25e-3", Some(0.00125)),
            ("50 %", Some(0.5)),
            ("25.0 % [10.0, 40.5]", Some(0.25)),
            ("0.3 [0.1, 0.9]", Some(0.3)),
            ("6.25 → 0.125", Some(0.125)),
            ("- → 2", Some(2.0)),
            ("3 of 4", Some(0.75)),
            ("0 of 0", None),
            ("9.40 s", Some(9.4)),
            ("3 min 20 s", Some(200.0)),
            ("2 h 30 min", Some(9000.0)),
            ("-", None),
            ("–", None),
            ("", None),
            ("inf", None),
            ("failed (70)", None),
            ("no gain", None),
            ("5 apples", None),
            ("1 2 3", None),
        ] {
            assert_eq!(number(cell), expected, "{cell:?}");
        }
    }

    #[test]
    fn names_and_words_are_broken_where_they_can_be() {
        let mut table = Table::new("c", ["a", "words", "x"]);
        let path = format!("dataset-path={}", "p".repeat(40));
        table.row(["baseline,expert-lr=3e-5 → b,x=<1>", "benign, safe prompts: refused", "-"]);
        table.row([&*path, "exact", "-"]);
        let html = table.to_html("id");
        let whole = |value: &str| format!("<span class=\"whole\">={value}</span>");
        for part in [
            format!("baseline,expert-lr{} → b,x{}<", whole("3e-5"), whole("&lt;1&gt;")),
            format!(">{path}<"),
            "<td class=\"words\">exact<".to_owned(),
            "<td>-<".to_owned(),
        ] {
            assert!(html.contains(&part), "{part}: {html}");
        }
    }

    #[test]
    fn columns_of_numbers_carry_them() {
        let mut table = Table::new("c", ["run", "loss", "method", "few", "none"]);
        table.row(["7", "1.5", "gradient", "3", "-"]);
        table.row(["8", "failed (70)", "2", "-", "-"]);
        table.row(["9", "-", "random", "x", "-"]);
        let html = table.to_html("id");
        let numbers: Vec<&str> =
            html.split("data-number=").skip(1).map(|rest| rest.split('<').next().unwrap()).collect();
        // `loss`: one number of two values; `method`: one of three; `few`: one of two; `run`: the first column is a name.
        assert_eq!(numbers, ["\"1.5\">1.5", "\"3\">3"]);
    }
}
