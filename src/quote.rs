//! Text from files in messages, tables and pages: cut to a length, and without the characters that a terminal or a browser obeys.

use std::fmt::Write;

/// Characters of a value that a message shows.
const VALUE: usize = 80;

/// Characters of a whole message, such as one of a library that quotes its input.
const MESSAGE: usize = 4000;

/// A value from a file, in backquotes: one line of at most 80 characters.
pub fn quote(value: &str) -> String {
    format!("`{}`", cut(value, VALUE))
}

/// One line of at most `limit` characters; what is left out is counted.
pub fn cut(text: &str, limit: usize) -> String {
    shown(text, limit, |_| false)
}

/// A message of several lines that may quote files.
pub fn message(text: &str) -> String {
    shown(text, MESSAGE, is_layout)
}

/// One line of any length.
pub fn line(text: &str) -> String {
    shown(text, usize::MAX, |_| false)
}

/// A text of any length, which keeps its lines.
pub fn lines(text: &str) -> String {
    shown(text, usize::MAX, is_layout)
}

fn is_layout(c: char) -> bool {
    matches!(c, '\n' | '\t')
}

fn shown(text: &str, limit: usize, keep: impl Fn(char) -> bool) -> String {
    let mut out = String::with_capacity(text.len().min(limit));
    for c in text.chars().take(limit) {
        match c {
            c if keep(c) || !obeyed(c) => out.push(c),
            c => out.extend(c.escape_default()),
        }
    }
    let left = text.chars().skip(limit).count();
    if left > 0 {
        let _ = write!(out, "… ({left} more characters)");
    }
    out
}

/// Whether a terminal or a browser obeys the character instead of showing it: control characters, line separators, and marks that
/// turn the direction of the text; and what XML forbids.
fn obeyed(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}')
        || matches!(c, '\u{feff}' | '\u{fffe}' | '\u{ffff}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_one_line_that_the_terminal_only_shows() {
        assert_eq!(quote("<|im_start|>"), "`<|im_start|>`");
        assert_eq!(quote("a\x1b[2J\nb\u{202e}c\u{9b}1m"), "`a\\u{1b}[2J\\nb\\u{202e}c\\u{9b}1m`");
        assert_eq!(quote(&"é".repeat(81)), format!("`{}… (1 more characters)`", "é".repeat(80)));
    }

    #[test]
    fn every_character_that_is_obeyed_is_escaped() {
        let c1 = '\u{7f}'..='\u{9f}';
        let directions =
            ('\u{202a}'..='\u{202e}').chain('\u{2066}'..='\u{2069}').chain(['\u{200e}', '\u{200f}', '\u{61c}']);
        for c in ('\0'..='\x1f').chain(c1).chain(directions).chain(['\u{fffe}', '\u{ffff}']) {
            let text = format!("a{c}b");
            assert_eq!(line(&text), format!("a{}b", c.escape_default()), "{c:?}");
            assert_eq!(lines(&text), if is_layout(c) { text } else { line(&text) }, "{c:?}");
        }
        assert_eq!(line("é → 日本 \u{a0}"), "é → 日本 \u{a0}");
    }

    #[test]
    fn a_message_keeps_its_lines() {
        assert_eq!(message("one\n\ttwo\x07 \u{1b}]0;title\x07"), "one\n\ttwo\\u{7} \\u{1b}]0;title\\u{7}");
        let long = message(&"x".repeat(1_000_000));
        assert!(long.len() < 4100 && long.ends_with("… (996000 more characters)"), "{}", long.len());
    }
}
