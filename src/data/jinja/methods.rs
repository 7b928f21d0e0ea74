//! Methods of Python's `str`, `dict` and `list`, slices, and `%` of a string.

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Tuple, ValueKind};
use minijinja::{Error, ErrorKind, State, Value};
use minijinja_contrib::pycompat;

use super::arguments::{arguments, integer, text};
use super::limits::{check_format, check_replace, check_size, check_width, refuse};
use super::source::{MODULO, SLICE};

/// Calls a method of a value.
pub(super) fn python_method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if name == SLICE {
        return slice(value, args);
    }
    if let Some(own) = value.as_str().and_then(|own| string_method(own, name, args).transpose()) {
        return own;
    }
    match (value.kind(), name) {
        (ValueKind::Seq, "index") => return index_in_list(value, args),
        (ValueKind::Seq | ValueKind::Map, "copy") if args.is_empty() => return Ok(value.clone()),
        _ => {}
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// A method of `str` that differs from that of pycompat, or that it lacks; `None` for others.
fn string_method(own: &str, name: &str, args: &[Value]) -> Result<Option<Value>, Error> {
    let value = match name {
        "replace" => {
            let [old, new, count] = arguments(args, ["old", "new", "count"])?;
            replace(own, text(old.as_ref(), "old")?, text(new.as_ref(), "new")?, integer(count.as_ref(), "count")?)?
                .into()
        }
        "format" => {
            check_format(own, args)?;
            return Ok(None);
        }
        MODULO => modulo(own, args)?.into(),
        "join" => {
            let [items] = arguments(args, ["items"])?;
            check_join(own, items.as_ref())?;
            return Ok(None);
        }
        "title" if args.is_empty() => title(own).into(),
        "capitalize" if args.is_empty() => capitalize(own).into(),
        "swapcase" if args.is_empty() => swapcase(own).into(),
        "splitlines" => {
            let [keep] = arguments(args, ["keepends"])?;
            split_lines(own, keep.is_some_and(|keep| keep.is_true())).into_iter().map(Value::from).collect()
        }
        "split" | "rsplit" => {
            let [separator, most] = arguments(args, ["sep", "maxsplit"])?;
            split(
                own,
                separator.as_ref().filter(|s| !s.is_none()),
                integer(most.as_ref(), "maxsplit")?,
                name == "rsplit",
            )?
        }
        "partition" | "rpartition" => {
            let [separator] = arguments(args, ["sep"])?;
            partition(own, text(separator.as_ref(), "sep")?, name == "rpartition")?
        }
        "strip" | "lstrip" | "rstrip" => {
            let [chars] = arguments(args, ["chars"])?;
            let chars = chars.filter(|chars| !chars.is_none());
            let chars = chars.as_ref().map(|chars| text(Some(chars), "chars")).transpose()?;
            strip(own, chars, name != "rstrip", name != "lstrip").into()
        }
        "removeprefix" | "removesuffix" => {
            let [part] = arguments(args, ["part"])?;
            let part = text(part.as_ref(), "part")?;
            let rest = if name == "removeprefix" { own.strip_prefix(part) } else { own.strip_suffix(part) };
            rest.unwrap_or(own).into()
        }
        "find" | "rfind" | "index" | "rindex" | "count" | "startswith" | "endswith" => search(own, name, args)?,
        "ljust" | "rjust" | "center" | "zfill" => pad(own, name, args)?.into(),
        "expandtabs" => {
            let [size] = arguments(args, ["tabsize"])?;
            expand_tabs(own, integer(size.as_ref(), "tabsize")?.unwrap_or(8))?.into()
        }
        "isdigit" | "isdecimal" if own.chars().any(|c| c.is_numeric() && !c.is_ascii()) => {
            return refuse(format!("{name} of digits other than 0 to 9 is not supported"));
        }
        "isdigit" | "isdecimal" => (!own.is_empty() && own.chars().all(|c| c.is_ascii_digit())).into(),
        "istitle" => is_title(own).into(),
        "isspace" => (!own.is_empty() && own.chars().all(is_space)).into(),
        "isprintable" => own.chars().all(super::printing::is_printable).into(),
        _ => return Ok(None),
    };
    Ok(Some(value))
}

/// White space of Python's `str`.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// `str.strip` on the given sides.
pub(super) fn strip<'a>(own: &'a str, chars: Option<&str>, start: bool, end: bool) -> &'a str {
    let strips = |c: char| chars.map_or_else(|| is_space(c), |chars| chars.contains(c));
    let rest = if start { own.trim_start_matches(strips) } else { own };
    if end { rest.trim_end_matches(strips) } else { rest }
}

/// `str.replace`; without a count, or with a negative one, all occurrences.
pub(super) fn replace(own: &str, old: &str, new: &str, count: Option<i64>) -> Result<String, Error> {
    check_replace(own, old, new)?;
    Ok(match count.and_then(|count| usize::try_from(count).ok()) {
        Some(count) => own.replacen(old, new, count),
        None => own.replace(old, new),
    })
}

/// Python's `str.title`: upper case for letters that follow a non-letter, lower case for others. (The method of
/// pycompat treats only white space as a word boundary.)
fn title(text: &str) -> String {
    let (mut out, mut in_word) = (String::with_capacity(text.len()), false);
    for c in text.chars() {
        if in_word {
            out.extend(c.to_lowercase());
        } else {
            let mut upper = c.to_uppercase();
            out.extend(upper.next());
            out.extend(upper.flat_map(char::to_lowercase));
        }
        in_word = c.is_lowercase() || c.is_uppercase();
    }
    out
}

/// Python's `str.capitalize`: of a first letter that becomes several, such as ß, only the first is upper case.
pub(super) fn capitalize(text: &str) -> String {
    let mut chars = text.chars();
    let mut first = chars.next().into_iter().flat_map(char::to_uppercase);
    let upper = first.next();
    upper.into_iter().chain(first.flat_map(char::to_lowercase)).collect::<String>() + &chars.as_str().to_lowercase()
}

fn swapcase(text: &str) -> String {
    let swapped = |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
    text.chars().map(swapped).collect()
}

fn is_title(text: &str) -> bool {
    let (mut in_word, mut any) = (false, false);
    for c in text.chars() {
        let (upper, lower) = (c.is_uppercase(), c.is_lowercase());
        if upper && in_word || lower && !in_word {
            return false;
        }
        in_word = upper || lower;
        any |= in_word;
    }
    any
}

/// Python's `str.splitlines`. (The method of pycompat splits only at `\n`.)
pub(super) fn split_lines(text: &str, keep_ends: bool) -> Vec<&str> {
    let ends = ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some(end) = rest.find(ends) {
        let width =
            if rest[end..].starts_with("\r\n") { 2 } else { rest[end..].chars().next().map_or(1, char::len_utf8) };
        lines.push(&rest[..if keep_ends { end + width } else { end }]);
        rest = &rest[end + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// `str.split` and, `from_end`, `str.rsplit`; `most`: maximum number of splits, if not negative.
fn split(own: &str, separator: Option<&Value>, most: Option<i64>, from_end: bool) -> Result<Value, Error> {
    let most = most.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    let mut parts: Vec<&str> = Vec::new();
    let mut rest = own;
    if let Some(separator) = separator {
        let separator = text(Some(separator), "sep")?;
        if separator.is_empty() {
            return refuse("split: an empty separator");
        }
        let next = |rest| if from_end { str::rsplit_once(rest, separator) } else { str::split_once(rest, separator) };
        while let Some((before, after)) = next(rest).filter(|_| parts.len() < most) {
            let (part, left) = if from_end { (after, before) } else { (before, after) };
            parts.push(part);
            rest = left;
        }
        parts.push(rest);
    } else {
        loop {
            rest = strip(rest, None, !from_end, from_end);
            if rest.is_empty() {
                break;
            }
            let end = if from_end { rest.rfind(is_space) } else { rest.find(is_space) };
            let Some(end) = end.filter(|_| parts.len() < most) else {
                parts.push(strip(rest, None, from_end, !from_end && parts.len() < most));
                break;
            };
            let (before, after) = rest.split_at(end);
            let space = after.chars().next().map_or(0, char::len_utf8);
            let (part, left) = if from_end { (&after[space..], before) } else { (before, after) };
            parts.push(part);
            rest = left;
        }
    }
    if from_end {
        parts.reverse();
    }
    Ok(parts.into_iter().map(Value::from).collect())
}

fn partition(own: &str, separator: &str, from_end: bool) -> Result<Value, Error> {
    if separator.is_empty() {
        return refuse("partition: an empty separator");
    }
    let found = if from_end { own.rsplit_once(separator) } else { own.split_once(separator) };
    let parts = match found {
        Some((before, after)) => [before, separator, after],
        None if from_end => ["", "", own],
        None => [own, "", ""],
    };
    Ok(Value::from(Tuple::from(parts.map(Value::from).to_vec())))
}

/// `find`, `rfind`, `index`, `rindex`, `count`, `startswith` and `endswith`, within the range of characters that the call gives.
fn search(own: &str, name: &str, args: &[Value]) -> Result<Value, Error> {
    let [what, start, end] = arguments(args, ["what", "start", "end"])?;
    let chars = own.chars().count();
    let range = indices(integer(start.as_ref(), "start")?, integer(end.as_ref(), "end")?, 1, chars);
    let byte = |n: usize| own.char_indices().nth(n).map_or(own.len(), |(i, _)| i);
    // A start beyond the end finds nothing, not even an empty text.
    let beyond = integer(start.as_ref(), "start")?.is_some_and(|start| start > chars as i64);
    let (first, last) = (range.start.max(0) as usize, range.stop.max(range.start).max(0) as usize);
    let within = &own[byte(first)..byte(last)];
    if let "startswith" | "endswith" = name {
        let fits = |part: &str| {
            !beyond && if name == "startswith" { within.starts_with(part) } else { within.ends_with(part) }
        };
        let what = what.unwrap_or_default();
        return match what.as_str() {
            Some(part) => Ok(fits(part).into()),
            None => {
                let parts: Vec<Value> = what.try_iter()?.collect();
                let parts = parts.iter().map(|part| text(Some(part), name)).collect::<Result<Vec<_>, _>>()?;
                Ok(parts.into_iter().any(fits).into())
            }
        };
    }
    let what = text(what.as_ref(), "sub")?;
    let found = match name {
        "count" => return Ok(if beyond { 0 } else { within.matches(what).count() }.into()),
        "find" | "index" => within.find(what),
        _ => within.rfind(what),
    };
    match found.filter(|_| !beyond) {
        Some(at) => Ok((first + within[..at].chars().count()).into()),
        None if name.ends_with("index") => refuse(format!("{name}: the text is not found")),
        None => Ok((-1).into()),
    }
}

/// `ljust`, `rjust`, `center` and `zfill`.
fn pad(own: &str, name: &str, args: &[Value]) -> Result<String, Error> {
    let [width, fill] = arguments(args, ["width", "fillchar"])?;
    let width = check_width(integer(width.as_ref(), "width")?.unwrap_or(0))?;
    let fill = match &fill {
        Some(fill) => text(Some(fill), "fillchar")?.to_owned(),
        None => if name == "zfill" { "0" } else { " " }.to_owned(),
    };
    if fill.chars().count() != 1 {
        return refuse(format!("{name}: the fill character should be one character"));
    }
    let chars = own.chars().count();
    let more = width.saturating_sub(chars);
    // As in CPython.
    let left = more / 2 + (more & width & 1);
    let sign = own.starts_with(['+', '-']);
    Ok(match name {
        "ljust" => own.to_owned() + &fill.repeat(more),
        "rjust" => fill.repeat(more) + own,
        "zfill" if sign => own[..1].to_owned() + &fill.repeat(more) + &own[1..],
        "zfill" => fill.repeat(more) + own,
        _ => fill.repeat(left) + own + &fill.repeat(more - left),
    })
}

fn expand_tabs(own: &str, size: i64) -> Result<String, Error> {
    let size = check_width(size)?;
    check_size(own.len().saturating_add(own.matches('\t').count().saturating_mul(size)))?;
    let (mut out, mut column) = (String::new(), 0);
    for c in own.chars() {
        match c {
            '\t' if size > 0 => {
                let width = size - column % size;
                out.extend(std::iter::repeat_n(' ', width));
                column += width;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    Ok(out)
}

/// Limits the result of joining `items` with `separator`.
pub(super) fn check_join(separator: &str, items: Option<&Value>) -> Result<(), Error> {
    let mut bytes = 0_usize;
    for item in items.and_then(|items| items.try_iter().ok()).into_iter().flatten() {
        bytes = bytes.saturating_add(separator.len() + item.as_str().map_or(0, str::len));
        check_size(bytes)?;
    }
    Ok(())
}

/// `own % value`: the values of a tuple, those of a dict by name, or one value.
fn modulo(own: &str, args: &[Value]) -> Result<String, Error> {
    let [value] = arguments(args, ["value"])?;
    let value = value.unwrap_or_default();
    let values: Vec<Value> = match value.downcast_object_ref::<Tuple>() {
        Some(_) => value.try_iter()?.collect(),
        None => vec![value],
    };
    check_format(own, &values)?;
    format(FormatStyle::Printf, own, &values)
}

fn index_in_list(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [what] = arguments(args, ["value"])?;
    let at = value.try_iter()?.position(|item| Some(item) == what);
    at.map(Value::from).ok_or_else(|| Error::new(ErrorKind::InvalidOperation, "index: the value is not in the list"))
}

/// First, last (exclusive) and step of a slice.
struct Indices {
    start: i64,
    stop: i64,
}

/// Python's `slice.indices` for a sequence of `length` items.
fn indices(start: Option<i64>, stop: Option<i64>, step: i64, length: usize) -> Indices {
    let length = length as i64;
    let (lowest, highest) = if step < 0 { (-1, length - 1) } else { (0, length) };
    let at = |n: i64| if n < 0 { n.saturating_add(length).max(lowest) } else { n.min(highest) };
    let (first, end) = if step < 0 { (highest, lowest) } else { (lowest, highest) };
    Indices { start: start.map_or(first, at), stop: stop.map_or(end, at) }
}

/// `value[start:stop:step]`.
fn slice(value: &Value, args: &[Value]) -> Result<Value, Error> {
    let [start, stop, step] = arguments(args, ["start", "stop", "step"])?;
    let step = integer(step.as_ref(), "step")?.unwrap_or(1);
    if step == 0 {
        return refuse("a slice with step 0");
    }
    let (start, stop) = (integer(start.as_ref(), "start")?, integer(stop.as_ref(), "stop")?);
    let taken = |length: usize| {
        let Indices { start, stop } = indices(start, stop, step, length);
        let count = if step > 0 { stop - start } else { start - stop };
        let count = (count.max(0) as u64).div_ceil(step.unsigned_abs());
        (0..count as i64).map(move |n| (start + n * step) as usize)
    };
    if let Some(text) = value.as_str() {
        let chars: Vec<char> = text.chars().collect();
        return Ok(taken(chars.len()).map(|i| chars[i]).collect::<String>().into());
    }
    if !matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable) {
        return refuse(format!("a slice of {}, which has none", value.kind()));
    }
    let items: Vec<Value> = value.try_iter()?.collect();
    let taken = taken(items.len()).map(|i| items[i].clone());
    Ok(match value.downcast_object_ref::<Tuple>() {
        Some(_) => Value::from(Tuple::from(taken.collect::<Vec<_>>())),
        None => taken.collect(),
    })
}
