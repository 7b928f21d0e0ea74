//! A self-contained HTML page: no external link, and no script but the one in it.

use std::fmt::Write;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use sha2::{Digest, Sha256};

use super::drawing;
use super::markup::{escape, escape_lines};
use super::table::Table;

const STYLE: &str = include_str!("../../assets/report/page.css");
/// Sorting, and values beside the pointer: the page is complete without them.
const SCRIPT: &str = include_str!("../../assets/report/page.js");
/// The most sections of a page without a table of contents.
const FEW: usize = 3;

/// An HTML page of sections, also well-formed XML.
#[derive(Debug, Clone)]
pub struct Page {
    title: String,
    body: String,
    /// Escaped.
    sections: Vec<String>,
    tables: usize,
}

impl Page {
    /// An empty page.
    pub fn new(title: &str) -> Self {
        Self { title: escape(title), body: String::new(), sections: Vec::new(), tables: 0 }
    }

    /// Appends a section heading.
    pub fn section(&mut self, heading: &str) {
        self.sections.push(escape(heading));
        let n = self.sections.len();
        let _ = writeln!(self.body, "<h2 id=\"section-{n}\">{}</h2>", self.sections[n - 1]);
    }

    /// Appends a paragraph of plain text; line breaks stay.
    pub fn text(&mut self, text: &str) {
        let _ = writeln!(self.body, "<p>{}</p>", escape_lines(text));
    }

    /// Appends a table.
    pub fn table(&mut self, table: &Table) {
        self.tables += 1;
        let label = format!("table-{}", self.tables);
        let (caption, table) = (escape(&table.caption), table.to_html(&label));
        let figcaption = format!("<figcaption id=\"{label}\">{caption}</figcaption>");
        let _ = writeln!(self.body, "<figure>{figcaption}\n<div class=\"wide\">{table}</div></figure>");
    }

    /// Appends drawings side by side, as many as the window is wide for.
    pub fn grid(&mut self, drawings: &[String]) {
        self.body += "<div class=\"side-by-side\">\n";
        drawings.iter().for_each(|svg| self.svg(svg));
        self.body += "</div>\n";
    }

    /// Appends a drawing of [`super::heatmap_svg`] or [`super::curve_svg`]. The markup is not escaped.
    pub fn svg(&mut self, svg: &str) {
        // As text of the page, because a narrow window shows only a part of the drawing.
        let title = drawing::title_of(svg);
        let _ =
            writeln!(self.body, "<figure><figcaption>{title}</figcaption>\n<div class=\"wide\">{svg}</div></figure>");
    }

    /// The complete HTML file.
    pub fn finish(&self) -> String {
        let Self { title, body, .. } = self;
        let (contents, style) = (self.contents(), format!("\n{}{STYLE}", drawing::style()));
        let script = format!("\n{SCRIPT}");
        // Nothing but this style and this script: a browser loads nothing, and runs nothing that text has brought in.
        let policy = format!("default-src 'none'; style-src {}; script-src {}", hash(&style), hash(&script));
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta http-equiv=\"Content-Security-Policy\" content=\"{policy}\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n<h1>{title}</h1>\n{contents}{body}</main>\n\
             <script>{script}</script>\n</body>\n</html>\n"
        )
    }

    fn contents(&self) -> String {
        if self.sections.len() <= FEW {
            return String::new();
        }
        let entry = |(i, heading): (usize, &String)| format!("<li><a href=\"#section-{}\">{heading}</a></li>\n", i + 1);
        let entries: String = self.sections.iter().enumerate().map(entry).collect();
        format!("<nav aria-label=\"Contents\"><ul>\n{entries}</ul></nav>\n")
    }
}

/// The source of a Content-Security-Policy that allows an element of this text.
fn hash(text: &str) -> String {
    format!("'sha256-{}'", BASE64.encode(Sha256::digest(text)))
}

#[cfg(test)]
mod tests {
    use super::super::markup::tests::assert_well_formed;
    use super::*;

    const HOSTILE: &str = "</title><script>alert('x' & \"y\")</script>\u{0}\u{9b}1m\u{202e}";

    #[test]
    fn hostile_text_is_escaped() {
        let mut table = Table::new(HOSTILE, ["a", HOSTILE]);
        table.row([HOSTILE, "1"]);
        let mut page = Page::new(HOSTILE);
        (0..5).for_each(|_| page.section(HOSTILE));
        page.text(HOSTILE);
        page.table(&table);
        let html = page.finish();
        assert_well_formed(&html);
        assert_eq!(html.matches("<script").count(), 1, "its own");
        assert!(!html.contains("alert('") && !html.contains(['\0', '\u{9b}', '\u{202e}']));
        assert!(!html.contains("http:") && !html.contains("https:"), "no external link");
    }

    /// A browser runs the script and takes the style only if their hashes are those of the policy.
    #[test]
    fn the_policy_allows_the_style_and_the_script() {
        let html = Page::new("t").finish();
        let inside = |name: &str| {
            let (_, rest) = html.split_once(&format!("<{name}>")).expect("an element");
            rest.split_once(&format!("</{name}>")).expect("its end").0
        };
        for name in ["style", "script"] {
            assert!(html.contains(&format!("{name}-src {}", hash(inside(name)))), "{name}");
        }
        // FIPS 180-2: the hash of "abc".
        assert_eq!(hash("abc"), "'sha256-ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0='");
    }

    #[test]
    fn long_pages_have_contents() {
        let page = |sections: usize| {
            let mut page = Page::new("t");
            (0..sections).for_each(|i| page.section(&format!("Part {i}")));
            page.finish()
        };
        assert!(!page(FEW).contains("<nav"));
        let html = page(FEW + 1);
        assert_well_formed(&html);
        assert!(
            html.contains("<a href=\"#section-4\">Part 3</a>") && html.contains("<h2 id=\"section-4\">Part 3</h2>")
        );
    }
}
