//! Arguments of Python functions: by position or by name.

use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, Value};

/// The arguments of a call in the order of their `names`; `None` for those that are not given.
///
/// # Errors
/// Too many arguments, or one of another name.
pub(super) fn arguments<const N: usize>(args: &[Value], names: [&str; N]) -> Result<[Option<Value>; N], Error> {
    let mut found = [const { None }; N];
    let (positional, named) = match args.split_last() {
        Some((last, others)) if last.is_kwargs() => (others, Some(Kwargs::try_from(last.clone())?)),
        _ => (args, None),
    };
    if positional.len() > N {
        return Err(Error::from(ErrorKind::TooManyArguments));
    }
    for (slot, value) in found.iter_mut().zip(positional) {
        *slot = Some(value.clone());
    }
    if let Some(named) = named {
        for (slot, name) in found.iter_mut().zip(names).filter(|(_, name)| named.has(name)) {
            *slot = Some(named.get(name)?);
        }
        named.assert_all_used()?;
    }
    Ok(found)
}

/// The arguments of a filter in one list, as methods get them.
pub(super) fn all(args: Rest<Value>, named: Kwargs) -> Vec<Value> {
    args.0.into_iter().chain([Value::from(named)]).collect()
}

/// A text.
pub(super) fn text<'a>(value: Option<&'a Value>, name: &str) -> Result<&'a str, Error> {
    let wrong = || Error::new(ErrorKind::InvalidOperation, format!("the argument {name} should be a string"));
    value.and_then(Value::as_str).ok_or_else(wrong)
}

/// An integer; `None` if it is missing or none.
pub(super) fn integer(value: Option<&Value>, name: &str) -> Result<Option<i64>, Error> {
    let wrong = || Error::new(ErrorKind::InvalidOperation, format!("the argument {name} should be an integer"));
    value.filter(|value| !value.is_none()).map(|value| i64::try_from(value.clone()).map_err(|_| wrong())).transpose()
}
