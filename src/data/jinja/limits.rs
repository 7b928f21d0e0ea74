//! Limits on the size of what filters and methods of a template make.

use std::borrow::Cow;

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// Maximum length in bytes of the result of one filter or method.
pub(super) const MAX_TEXT: usize = 8 << 20;
/// Maximum width of a field in a format string, and of an indent.
pub(super) const MAX_WIDTH: i64 = 10_000;

pub(super) fn refuse<T>(message: impl Into<Cow<'static, str>>) -> Result<T, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Stops a template that no usable one resembles, as one that takes too many steps.
pub(super) fn stop<T>(message: &'static str) -> Result<T, Error> {
    Err(Error::new(ErrorKind::OutOfFuel, message))
}

pub(super) fn check_size(bytes: usize) -> Result<(), Error> {
    if bytes > MAX_TEXT {
        refuse(format!("the template builds a string of more than {MAX_TEXT} bytes"))
    } else {
        Ok(())
    }
}

/// A width within [`MAX_WIDTH`]; a negative one is 0.
pub(super) fn check_width(width: i64) -> Result<usize, Error> {
    if width > MAX_WIDTH {
        return refuse(format!("a width beyond {MAX_WIDTH}"));
    }
    Ok(usize::try_from(width).unwrap_or(0))
}

/// Limits the result of replacing `old` in `text`.
pub(super) fn check_replace(text: &str, old: &str, new: &str) -> Result<(), Error> {
    if new.len() <= old.len() {
        return Ok(());
    }
    check_size(text.len().saturating_add(text.matches(old).count().saturating_mul(new.len())))
}

/// Refuses field widths beyond [`MAX_WIDTH`], whether written in the format string or passed as an argument.
pub(super) fn check_format(text: &str, args: &[Value]) -> Result<(), Error> {
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
