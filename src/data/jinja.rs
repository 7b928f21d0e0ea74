//! minijinja configured as Hugging Face transformers configures Jinja2 for chat templates, with limits on the resources
//! that a template can use.
//!
//! The differences from plain minijinja: the filter `tojson`; line endings; some methods of Python's `str`; slices
//! `[::-1]`; and the tag `{% generation %}`, which transformers adds to mark assistant text.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, Value, filters};
use minijinja_contrib::pycompat;

/// Marks before and after the output of a `{% generation %}` block: Unicode noncharacters, which ordinary text does not
/// hold.
pub(super) const GENERATION: [char; 2] = ['\u{10fffe}', '\u{10ffff}'];
/// Maximum number of instructions of one rendering; real templates take some hundreds per turn. It also bounds how deep
/// values can be nested: a level takes some eight instructions.
const FUEL: u64 = 2_000_000;
/// Maximum length in bytes of the result of one filter or method.
const MAX_TEXT: usize = 8 << 20;
/// Maximum width of a field in a format string, and of an indent.
const MAX_WIDTH: i64 = 10_000;
const MAX_JSON_DEPTH: usize = 64;

/// The minijinja environment for chat templates.
pub(super) fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
    env.set_syntax(syntax.expect("the delimiters are the usual ones"));
    env.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    env.set_fuel(Some(FUEL));
    env.set_debug(false); // or errors hold all values of the template
    env.set_unknown_method_callback(python_method);
    env.add_filter("tojson", tojson);
    env.add_filter("replace", with_check(check_replace, Value::from_function(filters::replace)));
    env.add_filter(
        "join",
        with_check(|args| check_join(args.get(1), args.first()), Value::from_function(filters::join)),
    );
    env.add_filter("format", with_check(check_format, Value::from_function(filters::format)));
    env.add_filter("indent", with_check(check_indent, Value::from_function(filters::indent)));
    env.add_filter("__generation", |text: String| format!("{}{text}{}", GENERATION[0], GENERATION[1]));
    env.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    // The clock is read once, in UTC, so that all renderings of this process see the same date.
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    env.add_function("strftime_now", move |format: String| strftime(now, &format));
    env
}

fn refuse<T>(message: impl Into<std::borrow::Cow<'static, str>>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

fn check_size(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_TEXT {
        refuse(format!("the template builds a string of more than {MAX_TEXT} bytes"))
    } else {
        Ok(())
    }
}

/// `filter`, preceded by a check of its arguments.
fn with_check(
    check: fn(&[Value]) -> Result<(), Error>,
    filter: Value,
) -> impl Fn(&mut State, Rest<Value>) -> Result<Value, Error> + Send + Sync + 'static {
    move |state: &mut State, args: Rest<Value>| {
        check(&args)?;
        filter.call(state, &args)
    }
}

/// Methods of Python's `str`, `dict` and `list`, with limits on the size of their result.
fn python_method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let all: Vec<Value> = std::iter::once(value).chain(args).cloned().collect();
    match name {
        "replace" => check_replace(&all)?,
        "format" => check_format(&all)?,
        "join" => check_join(Some(value), args.first())?,
        _ => {}
    }
    match (value.as_str(), name, args) {
        (Some(text), "title", []) => return Ok(title(text).into()),
        (Some(text), "splitlines", []) => return Ok(split_lines(text).into_iter().map(Value::from).collect()),
        _ => {}
    }
    pycompat::unknown_method_callback(state, value, name, args)
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

/// Python's `str.splitlines`. (The method of pycompat splits only at `\n`.)
fn split_lines(text: &str) -> Vec<&str> {
    let ends = ['\n', '\r', '\u{b}', '\u{c}', '\u{1c}', '\u{1d}', '\u{1e}', '\u{85}', '\u{2028}', '\u{2029}'];
    let (mut lines, mut rest) = (Vec::new(), text);
    while let Some(end) = rest.find(ends) {
        lines.push(&rest[..end]);
        let width =
            if rest[end..].starts_with("\r\n") { 2 } else { rest[end..].chars().next().map_or(1, char::len_utf8) };
        rest = &rest[end + width..];
    }
    if !rest.is_empty() {
        lines.push(rest);
    }
    lines
}

/// Limits the result of replacing; arguments: text, old, new.
fn check_replace(args: &[Value]) -> Result<(), Error> {
    let [Some(text), Some(old), Some(new)] = [0, 1, 2].map(|i| args.get(i).and_then(Value::as_str)) else {
        return Ok(());
    };
    if new.len() <= old.len() {
        return Ok(());
    }
    check_size(text.len().saturating_add(text.matches(old).count().saturating_mul(new.len())))
}

/// Limits the result of joining `items` with `separator`.
fn check_join(separator: Option<&Value>, items: Option<&Value>) -> Result<(), Error> {
    let separator = separator.and_then(Value::as_str).map_or(0, str::len);
    let mut bytes = 0_usize;
    for item in items.and_then(|items| items.try_iter().ok()).into_iter().flatten() {
        bytes = bytes.saturating_add(separator + item.as_str().map_or(0, str::len));
        check_size(bytes)?;
    }
    Ok(())
}

/// Limits the result of indenting; arguments: text, width (positional or named).
fn check_indent(args: &[Value]) -> Result<(), Error> {
    let lines = args.first().and_then(Value::as_str).map_or(0, |t| t.split('\n').count());
    let width = |arg: &Value| arg.as_usize().or_else(|| arg.get_attr("width").ok()?.as_usize());
    check_size(args.iter().skip(1).filter_map(width).max().unwrap_or(4).saturating_mul(lines))
}

/// Refuses field widths beyond [`MAX_WIDTH`], whether written in the format string (the first argument) or passed as a
/// later argument.
fn check_format(args: &[Value]) -> Result<(), Error> {
    let Some((text, args)) = args.split_first().and_then(|(text, args)| Some((text.as_str()?, args))) else {
        return Ok(());
    };
    let in_format =
        text.split(|c: char| !c.is_ascii_digit()).any(|n| n.len() > 9 || n.parse().is_ok_and(|n: i64| n > MAX_WIDTH));
    // A width can also be an argument: `{:{}}` for `str.format`, `*` for `%`.
    let by_argument = text.replace("{{", "").split('}').any(|part| part.matches('{').count() > 1) || text.contains('*');
    let too_wide = |n: &Value| n.as_i64().is_some_and(|n| n.abs() > MAX_WIDTH);
    let named =
        |map: &Value| map.try_iter().is_ok_and(|mut keys| keys.any(|k| map.get_item(&k).is_ok_and(|n| too_wide(&n))));
    let in_arguments = by_argument && args.iter().any(|a| too_wide(a) || (a.kind() == ValueKind::Map && named(a)));
    if in_format || in_arguments { refuse(format!("a format string has a width beyond {MAX_WIDTH}")) } else { Ok(()) }
}

/// The filter `tojson` of transformers: `json.dumps` with `ensure_ascii=False` by default.
fn tojson(value: &Value, args: Kwargs) -> Result<String, Error> {
    let ensure_ascii = args.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false);
    let sort_keys = args.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent = args.get::<Option<usize>>("indent")?;
    let separators = match args.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return refuse("tojson: separators should be a pair"),
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    args.assert_all_used()?;
    if indent.is_some_and(|n| n as i64 > MAX_WIDTH) {
        return refuse(format!("tojson: an indent beyond {MAX_WIDTH}"));
    }
    let mut json = Json { out: String::new(), ensure_ascii, sort_keys, indent, separators };
    json.value(value, 0)?;
    Ok(json.out)
}

/// A JSON writer with the options of `json.dumps`.
struct Json {
    out: String,
    ensure_ascii: bool,
    sort_keys: bool,
    indent: Option<usize>,
    /// Between items; between key and value.
    separators: (String, String),
}

impl Json {
    fn value(&mut self, value: &Value, depth: usize) -> Result<(), Error> {
        check_size(self.out.len())?;
        if depth > MAX_JSON_DEPTH {
            return refuse("tojson: nested too deep");
        }
        match value.kind() {
            ValueKind::None => self.out.push_str("null"),
            ValueKind::Bool => self.out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => self.out.push_str(&value.to_string()),
            ValueKind::String => self.string(value.as_str().unwrap_or_default()),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.container(['[', ']'], &items, depth, |json, item| json.value(item, depth + 1))?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort();
                }
                self.container(['{', '}'], &keys, depth, |json, key| {
                    json.string(&key.to_string());
                    json.out.push_str(&json.separators.1.clone());
                    json.value(&value.get_item(key)?, depth + 1)
                })?;
            }
            other => return refuse(format!("tojson: {other} has no JSON form")),
        }
        Ok(())
    }

    fn container(
        &mut self,
        [open, close]: [char; 2],
        items: &[Value],
        depth: usize,
        mut each: impl FnMut(&mut Self, &Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.separators.0.clone());
            }
            self.new_line(depth + 1);
            each(self, item)?;
        }
        if !items.is_empty() {
            self.new_line(depth);
        }
        self.out.push(close);
        Ok(())
    }

    fn new_line(&mut self, depth: usize) {
        if let Some(width) = self.indent {
            self.out.push('\n');
            self.out.extend(std::iter::repeat_n(' ', width * depth));
        }
    }

    fn string(&mut self, text: &str) {
        self.out.push('"');
        for c in text.chars() {
            match c {
                '"' => self.out.push_str("\\\""),
                '\\' => self.out.push_str("\\\\"),
                '\n' => self.out.push_str("\\n"),
                '\r' => self.out.push_str("\\r"),
                '\t' => self.out.push_str("\\t"),
                '\u{8}' => self.out.push_str("\\b"),
                '\u{c}' => self.out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        self.out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => self.out.push(c),
            }
        }
        self.out.push('"');
    }
}

/// `strftime` in UTC and English, with the directives that chat templates use. `seconds`: Unix time.
fn strftime(seconds: u64, format: &str) -> Result<String, Error> {
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let (month_name, day_name) = (MONTHS[month - 1], DAYS[(days % 7) as usize]);
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        let no_padding = directive == Some('-');
        if no_padding {
            directive = chars.next();
        }
        let two = |n: u64| if no_padding { n.to_string() } else { format!("{n:02}") };
        out.push_str(&match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month as u64),
            Some('d') => two(day),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => day_name.to_owned(),
            Some('a') => day_name[..3].to_owned(),
            Some('H') => two(hour),
            Some('I') => two((hour + 11) % 12 + 1),
            Some('M') => two(minute),
            Some('S') => two(second % 60),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => "%".to_owned(),
            _ => return refuse(format!("strftime_now: unsupported directive in the format {format:?}")),
        });
    }
    Ok(out)
}

/// Year, month (from 1) and day (from 1) of the day `day` days after 1970-01-01, in the Gregorian calendar.
fn civil_date(mut day: u64) -> (u64, usize, u64) {
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    let mut year = 1970;
    while day >= 365 + u64::from(leap(year)) {
        day -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut lengths = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];
    lengths[1] += u64::from(leap(year));
    let mut month = 0;
    while day >= lengths[month] {
        day -= lengths[month];
        month += 1;
    }
    (year, month + 1, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strftime_formats() {
        // 2024-02-29 13:05:09 UTC, a Thursday.
        let now = 1_709_211_909;
        assert_eq!(strftime(now, "%A %d %B %Y %H:%M:%S %p").unwrap(), "Thursday 29 February 2024 13:05:09 PM");
        assert_eq!(strftime(now, "%a %-d %b %y %I %F %T 100%%").unwrap(), "Thu 29 Feb 24 01 2024-02-29 13:05:09 100%");
        assert_eq!(strftime(0, "%F %a").unwrap(), "1970-01-01 Thu");
        assert!(strftime(0, "%Q").is_err());
    }
}
