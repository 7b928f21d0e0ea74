//! The source of a chat template: limits on its depth, and what differs between Jinja2 and minijinja.

/// Maximum number of tokens of a tag, and of `elif`s of a template: they bound how deep the compiler recurses.
const MAX_TOKENS: usize = 3000;
const MAX_ELIFS: usize = 1000;

/// Refuses a template whose compilation could recurse without a bound: minijinja bounds brackets and blocks itself, but not
/// chains of operators, attributes, calls and filters, nor those of `elif`.
pub(super) fn check_depth(source: &str) -> Result<(), String> {
    let (mut rest, mut elifs) = (source, 0);
    while let Some(start) = rest.find('{') {
        let tag = &rest[start..];
        let end = end_of_tag(tag, false);
        let line = || 1 + source[..source.len() - rest.len() + start].matches('\n').count();
        let tag = &tag[..end];
        if !tag.starts_with("{#") {
            let tokens = tokens(tag);
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
fn tokens(tag: &str) -> usize {
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

/// Rewrites a template for minijinja, outside of comments, strings and raw blocks: `{% generation %}` becomes a filter
/// block and `[::-1]` the filter `reverse`. Line endings become `\n`, as in Jinja2. Also returns whether there is a
/// generation block.
pub(super) fn to_minijinja(source: &str) -> (String, bool) {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let (mut out, mut rest) = (String::with_capacity(source.len()), source.as_str());
    let (mut marks, mut raw) = (false, false);
    while let Some(start) = rest.find('{') {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let end = end_of_tag(tag, raw);
        let tag = &tag[..end];
        rest = &rest[start + end..];
        let inner = tag.strip_prefix("{%").and_then(|t| t.strip_suffix("%}")).unwrap_or_default();
        let word = inner.trim_matches(['-', '+']).trim();
        match word {
            "raw" => raw = true,
            "endraw" => raw = false,
            "generation" if !raw => marks = true,
            _ => {}
        }
        match word {
            "generation" if !raw => out.push_str(&tag.replace("generation", "filter __generation")),
            "endgeneration" if !raw => out.push_str(&tag.replace("endgeneration", "endfilter")),
            _ if raw || tag.starts_with("{#") => out.push_str(tag),
            _ => push_with_reverse(tag, &mut out),
        }
    }
    out.push_str(rest);
    (out, marks)
}

/// Appends a tag to `out` with `x[::-1]` rewritten as `x|reverse`, because minijinja 3.0.5 panics on the slice if the
/// list is empty. Not rewritten if an index, attribute or call follows the slice.
fn push_with_reverse(tag: &str, out: &mut String) {
    const SLICE: &str = "[::-1]";
    let mut done = 0;
    for (i, _) in unquoted(tag).filter(|(i, c)| *c == '[' && tag[*i..].starts_with(SLICE)) {
        let end = i + SLICE.len();
        if !tag[end..].trim_start().starts_with(['[', '.', '(']) {
            out.push_str(&tag[done..i]);
            out.push_str("|reverse");
            done = end;
        }
    }
    out.push_str(&tag[done..]);
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
        assert_eq!(tokens("{{ a + bc.d['x + y'] -1 }}"), 13);
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
    fn backward_slices_become_the_filter_reverse() {
        for (given, wanted) in [
            ("{{ x[::-1] }}[::-1]", "{{ x|reverse }}[::-1]"),
            ("{% for m in x[::-1] %}{{ '[::-1]' ~ y[::-1] }}", "{% for m in x|reverse %}{{ '[::-1]' ~ y|reverse }}"),
            ("{{ x[::-1][0] }}", "{{ x[::-1][0] }}"),
            ("{# x[::-1] #}{% raw %}{{ x[::-1] }}{% endraw %}", "{# x[::-1] #}{% raw %}{{ x[::-1] }}{% endraw %}"),
        ] {
            assert_eq!(to_minijinja(given).0, wanted);
        }
    }
}
