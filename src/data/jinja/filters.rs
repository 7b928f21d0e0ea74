//! Filters of Jinja2 where those of minijinja differ.

use std::sync::LazyLock;

use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, Value, filters};
use regex::Regex;

use super::arguments::{all, arguments, integer, text};
use super::limits::{MAX_TEXT, check_format, check_size, check_width, refuse};
use super::methods::{self, split_lines};
use super::printing::python_str;

/// Names of minijinja that Jinja2 does not have: transformers refuses a template that uses them. (`pprint` differs.)
const FILTERS_OF_MINIJINJA: [&str; 6] = ["bool", "chain", "lines", "pprint", "split", "zip"];
const TESTS_OF_MINIJINJA: [&str; 3] = ["endingwith", "safe", "startingwith"];

/// Replaces the filters that differ, and removes names that Jinja2 does not have.
pub(super) fn add(env: &mut Environment<'static>) {
    for name in FILTERS_OF_MINIJINJA {
        env.remove_filter(name);
    }
    for name in TESTS_OF_MINIJINJA {
        env.remove_test(name);
    }
    // minijinja takes None for an empty list.
    env.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    env.add_test("sequence", is_sequence);
    // Functions and macros; the data of a chat template are none.
    env.add_test("callable", |value: &Value| matches!(value.kind(), ValueKind::Plain | ValueKind::Undefined));
    env.remove_global("debug");
    env.add_filter("attr", attr);
    for name in ["e", "escape", "forceescape"] {
        env.add_filter(name, |value: &Value| python_str(value).map(|text| Value::from_safe_string(escape(&text))));
    }
    env.add_filter("capitalize", |value: &Value| python_str(value).map(|text| methods::capitalize(&text)));
    env.add_filter("filesizeformat", filesizeformat);
    env.add_filter("float", |value: &Value, default: Option<f64>| float(value).unwrap_or(default.unwrap_or(0.0)));
    // An undefined value is empty; minijinja refuses it.
    for name in ["length", "count"] {
        env.add_filter(name, |value: &Value| if value.is_undefined() { Ok(0) } else { filters::length(value) });
    }
    env.add_filter("first", |value: &Value| of_defined(value, filters::first));
    env.add_filter("last", |value: &Value| of_defined(value, |value| filters::last(value.clone())));
    env.add_filter("items", |value: &Value| of_defined(value, filters::items));
    env.add_filter("format", format_filter);
    env.add_filter("indent", indent);
    env.add_filter("int", int);
    env.add_filter("join", join);
    env.add_filter("replace", replace);
    env.add_filter("string", python_str);
    env.add_filter("truncate", truncate);
    env.add_filter("urlencode", urlencode);
    env.add_filter("wordcount", wordcount);
    env.add_filter("trim", |value: &Value, chars: Option<String>| {
        python_str(value).map(|own| methods::strip(&own, chars.as_deref(), true, true).to_owned())
    });
}

/// `wordcount`: runs of letters, digits and underscores.
fn wordcount(value: &Value) -> Result<usize, Error> {
    static WORD: LazyLock<Regex> = LazyLock::new(|| Regex::new(r"[\p{L}\p{N}_]+").expect("a valid pattern"));
    Ok(WORD.find_iter(&python_str(value)?).count())
}

/// `filesizeformat`; single bytes are whole.
fn filesizeformat(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [binary] = arguments(&all(args, named), ["binary"])?;
    let binary = binary.is_some_and(|binary| binary.is_true());
    let Some(bytes) = float(value) else { return refuse("filesizeformat: the value should be a number") };
    let is_below_prefixes = bytes.abs() < if binary { 1024.0 } else { 1000.0 };
    let bytes = if is_below_prefixes { bytes.trunc() } else { bytes };
    Ok(minijinja_contrib::filters::filesizeformat(bytes, Some(binary)))
}

/// `urlencode`: of a dict or a list of pairs the query that they make, of others their text with escapes.
fn urlencode(value: &Value) -> Result<String, Error> {
    let pairs: Vec<(Value, Value)> = match value.kind() {
        ValueKind::Map => {
            value.try_iter()?.map(|key| Ok((key.clone(), value.get_item(&key)?))).collect::<Result<_, Error>>()?
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let pair = |item: Value| Ok((item.get_item_by_index(0)?, item.get_item_by_index(1)?));
            value.try_iter()?.map(pair).collect::<Result<_, Error>>()?
        }
        _ => return Ok(percent_encoded(&python_str(value)?, false)),
    };
    let pair = |(key, value): &(Value, Value)| {
        Ok(format!("{}={}", percent_encoded(&python_str(key)?, true), percent_encoded(&python_str(value)?, true)))
    };
    Ok(pairs.iter().map(pair).collect::<Result<Vec<_>, Error>>()?.join("&"))
}

/// The escapes of a URL's path, or of its query.
fn percent_encoded(text: &str, query: bool) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'.' | b'-' | b'~' => out.push(byte.into()),
            b'/' if !query => out.push('/'),
            b' ' if query => out.push('+'),
            byte => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

/// The result of a filter; of an undefined value that value.
fn of_defined(value: &Value, filter: impl Fn(&Value) -> Result<Value, Error>) -> Result<Value, Error> {
    if value.is_undefined() { Ok(Value::UNDEFINED) } else { filter(value) }
}

/// Whether Python finds a length and items: texts and dicts are sequences, too.
fn is_sequence(value: &Value) -> bool {
    match value.kind() {
        ValueKind::Seq | ValueKind::String | ValueKind::Map | ValueKind::Undefined => true,
        ValueKind::Iterable => value.len().is_some(),
        _ => false,
    }
}

/// `markupsafe.escape`.
pub(super) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '\'' => out.push_str("&#39;"),
            '"' => out.push_str("&#34;"),
            c => out.push(c),
        }
    }
    out
}

/// Attributes are not items: a dict, list or text has none that a template could print.
fn attr(value: &Value, name: &str) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::Plain => value.get_attr(name),
        _ => Ok(Value::UNDEFINED),
    }
}

fn float(value: &Value) -> Option<f64> {
    match value.as_str() {
        Some(text) => text.trim().replace('_', "").parse().ok(),
        None if value.kind() == ValueKind::Bool => Some(f64::from(value.is_true())),
        None => f64::try_from(value.clone()).ok(),
    }
}

/// `int`, which gives `default` for what is no number.
fn int(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let [default, base] = arguments(&all(args, named), ["default", "base"])?;
    let default = default.unwrap_or_else(|| 0.into());
    let base = integer(base.as_ref(), "base")?.unwrap_or(10);
    if value.is_integer() {
        return Ok(value.clone());
    }
    if let Some(text) = value.as_str() {
        let text = text.trim().replace('_', "");
        let digits = match base {
            16 => text.trim_start_matches("0x").trim_start_matches("0X"),
            8 => text.trim_start_matches("0o").trim_start_matches("0O"),
            2 => text.trim_start_matches("0b").trim_start_matches("0B"),
            _ => &text,
        };
        let Some(radix) = u32::try_from(base).ok().filter(|base| (2..=36).contains(base)) else {
            return refuse(format!("int: the base {base} is not supported"));
        };
        if let Ok(number) = i128::from_str_radix(digits, radix) {
            return Ok(number.into());
        }
    }
    match float(value) {
        Some(number) if number.is_finite() && number.abs() < 1e38 => Ok((number.trunc() as i128).into()),
        Some(number) if number.is_finite() => refuse("int: a number beyond 1e38"),
        _ => Ok(default),
    }
}

/// `format`: `%` of a text.
fn format_filter(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let own = python_str(value)?;
    let has_named = named.args().next().is_some();
    let args = if has_named { vec![Value::from(named)] } else { args.0 };
    check_format(&own, &args)?;
    format(FormatStyle::Printf, &own, &args)
}

fn indent(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [width, first, blank] = arguments(&all(args, named), ["width", "first", "blank"])?;
    let is_true = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let (first, blank) = (is_true(first), is_true(blank));
    let indent = match &width {
        Some(width) if width.as_str().is_some() => text(Some(width), "width")?.to_owned(),
        width => " ".repeat(check_width(integer(width.as_ref(), "width")?.unwrap_or(4))?),
    };
    let own = python_str(value)? + "\n";
    let lines = split_lines(&own, false);
    check_size(own.len().saturating_add(indent.len().saturating_mul(lines.len())))?;
    let mut out = String::new();
    for (i, line) in lines.iter().enumerate() {
        out.push_str(if i > 0 { "\n" } else { "" });
        if if i == 0 { first } else { blank || !line.is_empty() } {
            out.push_str(&indent);
        }
        out.push_str(line);
    }
    Ok(out)
}

/// `join`; items are printed as Python prints them.
fn join(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [separator, attribute] = arguments(&all(args, named), ["d", "attribute"])?;
    let separator = separator.as_ref().map_or(Ok(String::new()), python_str)?;
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut out = String::new();
    for (i, item) in value.try_iter()?.enumerate() {
        let item = match attribute.as_ref().filter(|attribute| !attribute.is_none()) {
            Some(path) => attribute_of(item, text(Some(path), "attribute")?)?,
            None => item,
        };
        out.push_str(if i > 0 { &separator } else { "" });
        out.push_str(&python_str(&item)?);
        check_size(out.len())?;
    }
    Ok(out)
}

/// The item under a path such as `function.name` or `0.name`.
fn attribute_of(item: Value, path: &str) -> Result<Value, Error> {
    path.split('.').try_fold(item, |item, name| match name.parse::<usize>() {
        Ok(index) => item.get_item_by_index(index),
        Err(_) => item.get_attr(name),
    })
}

fn replace(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    let [old, new, count] = arguments(&all(args, named), ["old", "new", "count"])?;
    let (old, new) = (text(old.as_ref(), "old")?, new.as_ref().map_or(Ok(String::new()), python_str)?);
    let own = python_str(value)?;
    if own.len() > MAX_TEXT {
        return refuse("replace: the text is too long");
    }
    methods::replace(&own, old, &new, integer(count.as_ref(), "count")?)
}

/// `truncate`: lengths in characters; a text that is longer by at most the leeway stays as it is.
fn truncate(value: &Value, args: Rest<Value>, named: Kwargs) -> Result<String, Error> {
    const LEEWAY: i64 = 5;
    let [length, killwords, end, leeway] = arguments(&all(args, named), ["length", "killwords", "end", "leeway"])?;
    let Some(own) = value.as_str() else { return refuse("truncate: the value should be a string") };
    let length = integer(length.as_ref(), "length")?.unwrap_or(255);
    let end = end.as_ref().map_or(Ok("..."), |end| text(Some(end), "end"))?;
    let leeway = integer(leeway.as_ref(), "leeway")?.unwrap_or(LEEWAY);
    let kept = match usize::try_from(length).ok().and_then(|length| length.checked_sub(end.chars().count())) {
        Some(kept) if leeway >= 0 => kept,
        _ => return refuse(format!("truncate: the length {length} is below that of its end, or the leeway below 0")),
    };
    if own.chars().count() as i128 <= i128::from(length) + i128::from(leeway) {
        return Ok(own.to_owned());
    }
    let cut: String = own.chars().take(kept).collect();
    let whole_words = cut.rsplit_once(' ').map_or(&*cut, |(before, _)| before);
    Ok(if killwords.is_some_and(|kill| kill.is_true()) { cut.clone() } else { whole_words.to_owned() } + end)
}
