//! Text in HTML and SVG.

use crate::quote;

/// Escapes text for HTML, SVG and their attributes, as one line: line feeds and other characters that a browser obeys, or that XML
/// forbids, are shown as on the terminal (`\n`, `\u{1b}`).
pub fn escape(text: &str) -> String {
    escape_markup(&quote::line(text))
}

/// As [`escape`], but line feeds and tabs stay.
pub fn escape_lines(text: &str) -> String {
    escape_markup(&quote::lines(text))
}

fn escape_markup(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            _ => out.push(c),
        }
    }
    out
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    #[test]
    fn a_browser_only_shows_text() {
        let hostile = "a<b>\n\tc\u{9b}1m\u{202e}'d'\0&";
        assert_eq!(escape(hostile), "a&lt;b&gt;\\n\\tc\\u{9b}1m\\u{202e}&#39;d&#39;\\u{0}&amp;");
        assert_eq!(escape_lines(hostile), "a&lt;b&gt;\n\tc\\u{9b}1m\\u{202e}&#39;d&#39;\\u{0}&amp;");
    }

    /// Panics unless `text` is well-formed: tags are nested and closed, attributes are quoted and unique, `<` and `&`
    /// are escaped. Scripts and styles have neither, because HTML and XML would read them in two ways.
    pub fn assert_well_formed(text: &str) {
        let mut open: Vec<&str> = Vec::new();
        let mut rest = text.strip_prefix("<!DOCTYPE html>").unwrap_or(text);
        while let Some(start) = rest.find('<') {
            let before = &rest[..start];
            match open.last() {
                Some(&"script" | &"style") => assert!(!before.contains('&'), "an & in {:?}", open.last()),
                _ => assert_text(before),
            }
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
        assert_well_formed("<!DOCTYPE html>\n<a b=\"c &amp; d\"><e/>f</a><script>x => 1</script>");
        let scripts = ["<script>x &amp; 1</script>", "<style>a < b</style>"];
        let others = ["<a>", "<a></b>", "<a b=c/>", "<a b=\"\" b=\"\"/>", "a & b", "<a b=\"<\"/>", "<a/>>", "</a>"];
        for bad in others.into_iter().chain(scripts) {
            assert!(std::panic::catch_unwind(|| assert_well_formed(bad)).is_err(), "{bad} passed");
        }
    }
}
