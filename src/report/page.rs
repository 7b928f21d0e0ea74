//! Tables for terminal and HTML, and a self-contained HTML page: no script, no web font, no external link.

use std::fmt::Write;

/// Escapes text for HTML, SVG and their attributes. Control characters, which XML forbids, become U+FFFD.
pub fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            '\t' | '\n' => out.push(c),
            '\0'..='\x1f' | '\u{fffe}' | '\u{ffff}' => out.push('\u{fffd}'),
            _ => out.push(c),
        }
    }
    out
}

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

    /// The table as text: columns padded to their widest cell, the first left-aligned, the others right-aligned.
    pub fn to_text(&self) -> String {
        let lines = || [&self.header].into_iter().chain(&self.rows);
        let width = |column: usize| lines().map(|l| l[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.header.len()).map(width).collect();
        let mut out = format!("{}\n", self.caption);
        for line in lines() {
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

    /// The table as HTML, with all text escaped.
    pub fn to_html(&self) -> String {
        let mut out = format!("<table>\n<caption>{}</caption>\n<thead><tr>", escape(&self.caption));
        for cell in &self.header {
            let _ = write!(out, "<th scope=\"col\">{}</th>", escape(cell));
        }
        out += "</tr></thead>\n<tbody>\n";
        for row in &self.rows {
            out += "<tr>";
            for (column, cell) in row.iter().enumerate() {
                let cell = escape(cell);
                let _ = match column {
                    0 => write!(out, "<th scope=\"row\">{cell}</th>"),
                    _ => write!(out, "<td>{cell}</td>"),
                };
            }
            out += "</tr>\n";
        }
        out + "</tbody>\n</table>\n"
    }
}

const STYLE: &str = "\
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #8886; text-align: right; }
th:first-child { text-align: left; }
.wide { overflow-x: auto; }
svg { background: #fff; max-width: none; }
";

/// An HTML page of sections, also well-formed XML.
#[derive(Debug, Clone)]
pub struct Page {
    title: String,
    body: String,
}

impl Page {
    /// An empty page.
    pub fn new(title: &str) -> Self {
        Self { title: escape(title), body: String::new() }
    }

    /// Appends a section heading.
    pub fn section(&mut self, heading: &str) {
        let _ = writeln!(self.body, "<h2>{}</h2>", escape(heading));
    }

    /// Appends a paragraph of plain text.
    pub fn text(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escape(text));
    }

    /// Appends a table.
    pub fn table(&mut self, table: &Table) {
        let _ = writeln!(self.body, "<div class=\"wide\">{}</div>", table.to_html());
    }

    /// Appends a drawing of [`super::heatmap_svg`] or [`super::curve_svg`]. The markup is not escaped.
    pub fn svg(&mut self, svg: &str) {
        let _ = writeln!(self.body, "<div class=\"wide\">{svg}</div>");
    }

    /// The complete HTML file.
    pub fn finish(&self) -> String {
        let Self { title, body } = self;
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{body}</main>\n\
             </body>\n</html>\n"
        )
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Panics unless `text` is well-formed: tags are nested and closed, attributes are quoted and unique, `<` and `&`
    /// are escaped.
    pub fn assert_well_formed(text: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = text.strip_prefix("<!DOCTYPE html>").unwrap_or(text);
        while let Some(start) = rest.find('<') {
            assert_text(&rest[..start]);
            let end = start + rest[start..].find('>').expect("a tag ends");
            let tag = &rest[start + 1..end];
            rest = &rest[end + 1..];
            if let Some(name) = tag.strip_prefix('/') {
                assert_eq!(open.pop(), Some(name), "the tag that closes");
                continue;
            }
            let (tag, empty) = tag.strip_suffix('/').map_or((tag, false), |t| (t, true));
            let name = tag.split_whitespace().next().expect("a tag has a name");
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric()), "{name:?} is not a name");
            assert_attributes(&tag[name.len()..]);
            if !empty {
                open.push(name);
            }
        }
        assert_text(rest);
        assert!(open.is_empty(), "{open:?} are not closed");
    }

    fn assert_attributes(mut text: &str) {
        let mut seen = std::collections::HashSet::new();
        while !text.trim().is_empty() {
            assert!(text.starts_with(char::is_whitespace), "space before {text:?}");
            let (name, after) = text.trim_start().split_once("=\"").expect("name=\"value\"");
            let (value, after) = after.split_once('"').expect("a value ends");
            assert!(name.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "{name:?} is not a name");
            assert!(seen.insert(name), "attribute {name} is repeated");
            assert_text(value);
            text = after;
        }
    }

    fn assert_text(text: &str) {
        assert!(!text.contains(['<', '>']), "{text:?} is not escaped");
        for after in text.split('&').skip(1) {
            let (name, _) = after.split_once(';').expect("an & begins an entity");
            assert!(["amp", "lt", "gt", "quot", "#39"].contains(&name), "&{name}; is not an entity");
        }
    }

    #[test]
    fn assert_well_formed_finds_errors() {
        assert_well_formed("<!DOCTYPE html>\n<a b=\"c &amp; d\"><e/>f</a>");
        for bad in ["<a>", "<a></b>", "<a b=c/>", "<a b=\"\" b=\"\"/>", "a & b", "<a b=\"<\"/>", "<a/>>", "</a>"] {
            assert!(std::panic::catch_unwind(|| assert_well_formed(bad)).is_err(), "{bad} passed");
        }
    }

    const HOSTILE: &str = "</title><script>alert('x' & \"y\")</script>\u{0}";

    #[test]
    fn hostile_text_is_escaped() {
        let mut table = Table::new(HOSTILE, ["a", HOSTILE]);
        table.row([HOSTILE, "1"]);
        let mut page = Page::new(HOSTILE);
        page.section(HOSTILE);
        page.text(HOSTILE);
        page.table(&table);
        let html = page.finish();
        assert_well_formed(&html);
        assert!(!html.contains("<script") && !html.contains('\0'));
        assert!(!html.contains("http"), "no external link");
    }

    #[test]
    fn columns_are_aligned() {
        let mut table = Table::new("Losses", ["run", "before", "after"]);
        table.row(["base", "6.25", "6.25"]);
        table.row(["selective", "6.25", "10.5"]);
        let expected = "Losses\n  run        before  after\n  base         6.25   6.25\n  selective    6.25   10.5\n";
        assert_eq!(table.to_text(), expected);
    }
}
