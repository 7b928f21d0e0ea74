//! The tokens of a tag.

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Token<'a> {
    /// A name, a keyword or digits.
    Name(&'a str),
    /// A string literal without its quotes.
    Text(&'a str),
    Sign(char),
}

/// A token and its bytes in the tag.
#[derive(Debug, Clone, Copy)]
pub(super) struct Placed<'a> {
    pub token: Token<'a>,
    pub start: usize,
    pub end: usize,
}

/// The tokens of a tag, without its braces.
pub(super) fn tokens(tag: &str) -> Vec<Placed<'_>> {
    let is_name = |c: char| c.is_alphanumeric() || c == '_';
    let close = if tag.ends_with("}}") || tag.ends_with("%}") { 2 } else { 0 };
    let (mut at, mut last) = (2.min(tag.len()), (tag.len() - close).max(2.min(tag.len())));
    if tag[at..last].starts_with(['-', '+']) {
        at += 1;
    }
    if tag[at..last].ends_with(['-', '+']) {
        last -= 1;
    }
    let mut tokens = Vec::new();
    while let Some(first) = tag[at..last].chars().next() {
        let rest = &tag[at..last];
        let (token, length) = match first {
            c if c.is_whitespace() => (None, c.len_utf8()),
            '\'' | '"' => {
                let end = end_of_text(rest, first);
                (Some(Token::Text(&rest[1..end])), (end + 1).min(rest.len()))
            }
            c if is_name(c) => {
                let end = rest.find(|c| !is_name(c)).unwrap_or(rest.len());
                (Some(Token::Name(&rest[..end])), end)
            }
            c => (Some(Token::Sign(c)), c.len_utf8()),
        };
        tokens.extend(token.map(|token| Placed { token, start: at, end: at + length }));
        at += length;
    }
    tokens
}

/// The byte of the quote that ends the literal at the start of `text`, or its length.
fn end_of_text(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (i, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return i,
            _ => {}
        }
    }
    text.len()
}

/// Whether token `i` of an expression is the variable `name`: no field, and no argument's name.
pub(super) fn is_variable(tokens: &[Token<'_>], i: usize, name: &str) -> bool {
    let assigned = tokens.get(i + 1) == Some(&Token::Sign('=')) && tokens.get(i + 2) != Some(&Token::Sign('='));
    tokens[i] == Token::Name(name)
        && !matches!(i.checked_sub(1).map(|at| tokens[at]), Some(Token::Sign('.' | '|')))
        && !assigned
}
