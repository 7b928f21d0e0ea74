//! The source of a chat template: limits on its depth, and what differs between Jinja2 and minijinja.

use std::ops::Range;

use super::tokens::{Placed, Token, is_variable, tokens};

/// Methods into which the rewritten source turns slices, because those of minijinja differ for steps below 0, and `%` of a text.
pub(super) const SLICE: &str = "__slice";
pub(super) const MODULO: &str = "__mod";

/// Maximum number of tokens of a tag, and of `elif`s of a template: they bound how deep the compiler recurses.
const MAX_TOKENS: usize = 3000;
const MAX_ELIFS: usize = 1000;

/// Refuses a template, rewritten or not, that would be compiled to something else, or without a bound.
pub(in crate::data) fn check(source: &str) -> Result<(), String> {
    check_depth(source)?;
    check_macros(source)?;
    check_variadic(source)
}

/// Refuses `varargs` and `kwargs` in a macro: minijinja takes them for undefined.
fn check_variadic(source: &str) -> Result<(), String> {
    let mut open: Vec<(&str, Vec<&str>)> = Vec::new();
    for tag in tags(source) {
        let tokens: Vec<Token<'_>> = tokens(tag).into_iter().map(|placed| placed.token).collect();
        match &tokens[..] {
            [Token::Name("macro"), Token::Name(name), arguments @ ..] => {
                let names = arguments.iter().filter_map(|token| match token {
                    Token::Name(name) => Some(*name),
                    _ => None,
                });
                open.push((name, names.collect()));
            }
            [Token::Name("endmacro"), ..] => drop(open.pop()),
            _ => {}
        }
        let Some((name, arguments)) = open.last() else { continue };
        let reads = |variable: &&&str| {
            !arguments.contains(*variable) && (0..tokens.len()).any(|i| is_variable(&tokens, i, variable))
        };
        if let Some(variable) = ["varargs", "kwargs"].iter().find(reads) {
            let line = 1 + source[..tag.as_ptr() as usize - source.as_ptr() as usize].matches('\n').count();
            return Err(format!(
                "the macro {name} reads {variable}, which is not supported: give its arguments names (line {line} of the template)"
            ));
        }
    }
    Ok(())
}

/// Refuses the default of a macro's argument that reads another argument: minijinja takes it for undefined.
fn check_macros(source: &str) -> Result<(), String> {
    for tag in tags(source) {
        let tokens: Vec<Token<'_>> = tokens(tag).into_iter().map(|placed| placed.token).collect();
        let [Token::Name("macro"), Token::Name(name), Token::Sign('('), rest @ ..] = &tokens[..] else { continue };
        let (mut depth, mut arguments, mut default) = (0_usize, Vec::new(), None);
        for (i, token) in rest.iter().enumerate() {
            match token {
                Token::Sign('(' | '[' | '{') => depth += 1,
                Token::Sign(')' | ']' | '}') => depth = depth.saturating_sub(1),
                Token::Sign(',') if depth == 0 => default = None,
                Token::Sign('=') if depth == 0 && default.is_none() => default = Some(i + 1),
                Token::Name(argument) if depth == 0 && default.is_none() => arguments.push(*argument),
                Token::Name(other) if arguments.contains(other) && is_variable(rest, i, other) => {
                    return Err(format!(
                        "the default of an argument of the macro {name} reads the argument {other}, which is not supported: set it in \
                         the macro (`{{% set x = {other} if x is undefined else x %}}`)"
                    ));
                }
                _ => {}
            }
        }
    }
    Ok(())
}

/// Refuses a template whose compilation could recurse without a bound: minijinja bounds brackets and blocks itself, but not
/// chains of operators, attributes, calls and filters, nor those of `elif`.
fn check_depth(source: &str) -> Result<(), String> {
    let (mut rest, mut elifs) = (source, 0);
    while let Some(start) = rest.find('{') {
        let tag = &rest[start..];
        let end = end_of_tag(tag, false);
        let line = || 1 + source[..source.len() - rest.len() + start].matches('\n').count();
        let tag = &tag[..end];
        if !tag.starts_with("{#") {
            let tokens = count_tokens(tag);
            if tokens > MAX_TOKENS {
                return Err(format!(
                    "a tag has {tokens} tokens, more than {MAX_TOKENS} (line {} of the template)",
                    line()
                ));
            }
            elifs += usize::from(tag.trim_start_matches(['{', '%', '-', '+', ' ', '\n', '\t']).starts_with("elif"));
            if elifs > MAX_ELIFS {
                return Err(format!("it has more than {MAX_ELIFS} elif (line {} of the template)", line()));
            }
        }
        rest = &rest[start + end..];
    }
    Ok(())
}

/// Words and signs of a tag outside of strings.
fn count_tokens(tag: &str) -> usize {
    let (mut tokens, mut end_of_word) = (0, 0);
    for (i, c) in unquoted(tag) {
        let word = c.is_alphanumeric() || c == '_';
        // A word goes on where the last one ended.
        tokens += usize::from(if word { i != end_of_word || i == 0 } else { !c.is_whitespace() });
        if word {
            end_of_word = i + c.len_utf8();
        }
    }
    tokens
}

/// Rewrites a template for minijinja, outside of comments and raw blocks: `{% generation %}` becomes a filter block, slices and `%`
/// of a text become methods, and escapes those that minijinja knows. Line endings become `\n`, as in Jinja2. Also returns whether
/// there is a generation block.
pub(in crate::data) fn to_minijinja(source: &str) -> (String, bool) {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let (mut out, mut marks) = (String::with_capacity(source.len()), false);
    for Piece { before, tag, raw } in pieces(&source) {
        out.push_str(before);
        match word_of(tag) {
            "generation" if !raw => {
                marks = true;
                out.push_str(&tag.replace("generation", "filter __generation"));
            }
            "endgeneration" if !raw => out.push_str(&tag.replace("endgeneration", "endfilter")),
            _ if raw || tag.starts_with("{#") => out.push_str(tag),
            _ => push_rewritten(tag, &mut out),
        }
    }
    (out, marks)
}

/// The tags `{{ }}` and `{% %}` of a template: without comments and what raw blocks hold.
pub(super) fn tags(source: &str) -> impl Iterator<Item = &str> {
    let is_tag = |tag: &str| tag.len() > 1 && !tag.starts_with("{#") && !["raw", "endraw"].contains(&word_of(tag));
    pieces(source).filter(move |piece| !piece.raw && is_tag(piece.tag)).map(|piece| piece.tag)
}

/// A part of a template: text, and the tag, comment or single brace that follows it (nothing at the end).
struct Piece<'a> {
    before: &'a str,
    tag: &'a str,
    /// Whether the tag is in a raw block, where it is text.
    raw: bool,
}

/// The whole template, in pieces.
fn pieces(source: &str) -> impl Iterator<Item = Piece<'_>> {
    let (mut rest, mut in_raw) = (source, false);
    std::iter::from_fn(move || {
        let (before, tag) = rest.split_at(rest.find('{').unwrap_or(rest.len()));
        let length = if tag.is_empty() { 0 } else { end_of_tag(tag, in_raw) };
        let (tag, after) = tag.split_at(length);
        let done = rest.is_empty();
        rest = after;
        match word_of(tag) {
            "raw" => in_raw = true,
            "endraw" => in_raw = false,
            _ => {}
        }
        (!done).then_some(Piece { before, tag, raw: in_raw })
    })
}

/// What a `{% %}` holds; empty for other tags.
fn word_of(tag: &str) -> &str {
    let inner = tag.strip_prefix("{%").and_then(|t| t.strip_suffix("%}")).unwrap_or_default();
    inner.trim_matches(['-', '+']).trim()
}

/// Appends a tag to `out`, rewritten.
fn push_rewritten(tag: &str, out: &mut String) {
    let tokens = tokens(tag);
    let mut edits: Vec<(Range<usize>, String)> = Vec::new();
    edit_slices(&tokens, &mut edits);
    for (i, placed) in tokens.iter().enumerate() {
        match placed.token {
            Token::Text(text) if text.contains('\\') => {
                edits.push((placed.start + 1..placed.start + 1 + text.len(), escapes(text)));
            }
            Token::Sign('%') if i > 0 && matches!(tokens[i - 1].token, Token::Text(_)) => {
                if let Some(end) = end_of_operand(&tokens, i + 1) {
                    edits.push((placed.start..placed.end, format!(".{MODULO}(")));
                    edits.push((end..end, ")".into()));
                }
            }
            _ => {}
        }
    }
    edits.sort_by_key(|(range, _)| (range.start, range.end));
    let mut done = 0;
    for (range, new) in edits {
        out.push_str(&tag[done..range.start]);
        out.push_str(&new);
        done = range.end;
    }
    out.push_str(&tag[done..]);
}

/// `x[a:b:c]` → `x.__slice(a, b, c)`, with `none` for what is left out.
fn edit_slices(tokens: &[Placed<'_>], edits: &mut Vec<(Range<usize>, String)>) {
    /// A bracket that is open.
    struct Open {
        start: usize,
        is_index: bool,
        colons: Vec<usize>,
    }
    let mut open: Vec<Open> = Vec::new();
    for (i, placed) in tokens.iter().enumerate() {
        match placed.token {
            Token::Sign('(' | '[' | '{') => {
                let is_index = placed.token == Token::Sign('[') && i > 0 && ends_operand(tokens[i - 1].token);
                open.push(Open { start: i, is_index, colons: Vec::new() });
            }
            Token::Sign(':') => {
                if let Some(bracket) = open.last_mut() {
                    bracket.colons.push(i);
                }
            }
            Token::Sign(')' | ']' | '}') => {
                let Some(bracket) = open.pop().filter(|bracket| bracket.is_index && !bracket.colons.is_empty()) else {
                    continue;
                };
                let bounds: Vec<usize> = [bracket.start].into_iter().chain(bracket.colons).chain([i]).collect();
                for (n, at) in bounds.iter().enumerate() {
                    let missing = bounds.get(n + 1).is_some_and(|next| at + 1 == *next);
                    let sign = if n == 0 {
                        format!(".{SLICE}(")
                    } else if n + 1 == bounds.len() {
                        ")".to_owned()
                    } else {
                        ", ".to_owned()
                    };
                    edits.push((tokens[*at].start..tokens[*at].end, sign + if missing { "none" } else { "" }));
                }
            }
            _ => {}
        }
    }
}

/// Whether a bracket after this token is an index or a slice.
fn ends_operand(token: Token<'_>) -> bool {
    match token {
        Token::Name(name) => !["in", "if", "else", "elif", "and", "or", "not", "is"].contains(&name),
        Token::Text(_) => true,
        Token::Sign(sign) => matches!(sign, ')' | ']' | '}'),
    }
}

/// The byte after the operand of `%` that begins at token `i`: a value with its indices, attributes, calls and filters.
fn end_of_operand(tokens: &[Placed<'_>], mut i: usize) -> Option<usize> {
    while matches!(tokens.get(i)?.token, Token::Sign('-' | '+')) {
        i += 1;
    }
    let group = |i: usize| match tokens.get(i)?.token {
        Token::Sign('(' | '[' | '{') => {
            let mut depth = 0_usize;
            let end = tokens[i..].iter().position(|placed| {
                match placed.token {
                    Token::Sign('(' | '[' | '{') => depth += 1,
                    Token::Sign(')' | ']' | '}') => depth -= 1,
                    _ => {}
                }
                depth == 0
            });
            end.map(|n| i + n + 1)
        }
        _ => None,
    };
    i = match tokens.get(i)?.token {
        Token::Sign(_) => group(i)?,
        _ => i + 1,
    };
    loop {
        i = match tokens.get(i).map(|placed| placed.token) {
            Some(Token::Sign('.' | '|')) => i + 2,
            Some(Token::Sign('(' | '[')) => group(i)?,
            _ => return Some(tokens.get(i - 1)?.end),
        };
    }
}

/// The content of a string literal with those escapes of Python that minijinja lacks or reads otherwise.
fn escapes(text: &str) -> String {
    let (mut out, mut chars) = (String::with_capacity(text.len()), text.chars());
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('a') => out.push_str("\\x07"),
            Some('v') => out.push_str("\\x0b"),
            Some('\n') => {}
            Some('U') => {
                let digits: String = chars.as_str().chars().take(8).collect();
                match u32::from_str_radix(&digits, 16).ok().filter(|_| digits.len() == 8).and_then(char::from_u32) {
                    Some(c) if c > '\u{7f}' => {
                        out.push(c);
                        chars = chars.as_str()[8..].chars();
                    }
                    _ => out.push_str("\\U"),
                }
            }
            // minijinja reads these as Python does.
            Some(c @ ('n' | 'r' | 't' | 'b' | 'f' | '\\' | '\'' | '"' | 'x' | 'u' | '0'..='7')) => {
                out.extend(['\\', c])
            }
            Some(c) => out.extend(['\\', '\\', c]),
            None => out.push('\\'),
        }
    }
    out
}

/// Length in bytes of the comment or tag at the start of `text`, in a `raw` block only of a `{% %}`; 1 for a brace that begins
/// neither.
fn end_of_tag(text: &str, raw: bool) -> usize {
    match text.as_bytes().get(1) {
        Some(b'#') if !raw => text.find("#}").map_or(text.len(), |i| i + 2),
        Some(b'{') if !raw => tag_length(text, "}}"),
        Some(b'%') => tag_length(text, "%}"),
        _ => 1,
    }
}

/// Length in bytes of the tag at the start of `text`, up to and including the first `close` outside of strings.
fn tag_length(text: &str, close: &str) -> usize {
    let end = unquoted(text).skip(2).find(|(i, _)| text[*i..].starts_with(close));
    end.map_or(text.len(), |(i, _)| i + close.len())
}

/// The characters of a tag outside of string literals, with their byte offsets.
fn unquoted(tag: &str) -> impl Iterator<Item = (usize, char)> {
    let (mut quote, mut escaped) = (None, false);
    tag.char_indices().filter(move |(_, c)| {
        let outside = quote.is_none();
        match (quote, c) {
            _ if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(q), c) if q == *c => quote = None,
            (None, '\'' | '"') => quote = Some(*c),
            _ => {}
        }
        outside && quote.is_none()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_are_rewritten_only_where_they_are_tags() {
        let (text, marks) = to_minijinja("{%- generation -%}\r\nx{% endgeneration %}");
        assert_eq!((text.as_str(), marks), ("{%- filter __generation -%}\nx{% endfilter %}", true));
        for other in [
            "{# {% generation %} #}",
            "{{ '{% generation %}' }}",
            "{% raw %}{% generation %}{% endraw %}",
            "{% set generation = 1 %}{{ generation }} { {",
            "{% if x == '%} {% generation %}' %}{% endif %}",
        ] {
            assert_eq!(to_minijinja(other), (other.to_owned(), false));
        }
    }

    #[test]
    fn long_chains_are_refused_before_they_are_compiled() {
        assert_eq!(count_tokens("{{ a + bc.d['x + y'] -1 }}"), 13);
        let texts = "text { without tags \" ' ".repeat(5000);
        for fine in [texts.as_str(), "{# a + b + #}", "{% if a %}{% elif b %}{% endif %}", &"{{ a }}".repeat(5000)] {
            assert_eq!(check_depth(fine), Ok(()));
        }
        for sign in ["-", "not ", "a+", "a and ", "1**", "a~"] {
            let error = check_depth(&format!("\n{{{{ {}a }}}}", sign.repeat(4000))).unwrap_err();
            assert!(error.contains("line 2"), "{error}");
        }
        for tail in [".b", "|upper", "[0]", "()", "(1)"] {
            assert!(check_depth(&format!("{{% set x = a{} %}}", tail.repeat(4000))).is_err(), "{tail}");
        }
        assert!(check_depth(&format!("{{% if a %}}{}{{% endif %}}", "{%- elif a %}".repeat(1001))).is_err());
    }

    #[test]
    fn slices_and_remainders_of_texts_become_methods() {
        for (given, wanted) in [
            ("{{ x[::-1] }}[::-1]", "{{ x.__slice(none, none, -1) }}[::-1]"),
            ("{{ x.y[1:] ~ f(a)[:n][0] }}", "{{ x.y.__slice(1, none) ~ f(a).__slice(none, n)[0] }}"),
            ("{{ x[a[1:2]:{'k': 3}['k']] }}", "{{ x.__slice(a.__slice(1, 2), {'k': 3}['k']) }}"),
            (
                "{% if [{'a': 1}][0] in [x[:]] %}{% endif %}",
                "{% if [{'a': 1}][0] in [x.__slice(none, none)] %}{% endif %}",
            ),
            ("{{ '%s' % x.y | upper ~ 'a' }}", "{{ '%s' .__mod( x.y | upper) ~ 'a' }}"),
            ("{{ '%d%%' % (a, -1) }}{{ a % b }}", "{{ '%d%%' .__mod( (a, -1)) }}{{ a % b }}"),
            ("{{ 'it\\'s \\a \\/ \\U0001F600 [::-1]' }}", "{{ 'it\\'s \\x07 \\\\/ 😀 [::-1]' }}"),
            ("{# x[::-1] #}{% raw %}{{ x[::-1] }}{% endraw %}", "{# x[::-1] #}{% raw %}{{ x[::-1] }}{% endraw %}"),
        ] {
            assert_eq!(to_minijinja(given).0, wanted);
        }
    }

    #[test]
    fn a_default_that_reads_another_argument_is_refused() {
        let error = check("{% macro f(a, b=a | upper) %}{% endmacro %}").unwrap_err();
        assert!(error.contains("the macro f reads the argument a"), "{error}");
        for fine in ["{% macro f(a, b=x.a) %}{% endmacro %}", "{% macro f(a, b=g(a=1), c='a') %}{% endmacro %}"] {
            assert_eq!(check(fine), Ok(()));
        }
    }
}
