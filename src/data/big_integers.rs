//! Integers of more than 64 bits in rows. The JSON parser would make floats of them, which a template prints otherwise than
//! Python does, so they are marked before: as an object with one field.

use serde_json::{Map, Value as Json};

const MARK: &str = "$big_integer";

/// The text of a row with its big integers marked; `None` if it has none.
///
/// # Errors
/// An integer of more than 128 bits.
pub(super) fn mark(text: &str) -> Result<Option<String>, String> {
    let (mut out, mut done) = (String::new(), 0);
    let (mut in_string, mut escaped, mut at) = (false, false, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        match bytes[at] {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'-' | b'0'..=b'9' if !in_string => {
                let number = |b: &u8| b.is_ascii_alphanumeric() || b"+-.".contains(b);
                let end = at + bytes[at..].iter().take_while(|b| number(b)).count();
                if let Some(value) = value(&text[at..end])? {
                    out.push_str(&text[done..at]);
                    out.push_str(&value.to_string());
                    done = end;
                }
                at = end;
                continue;
            }
            _ => {}
        }
        at += 1;
    }
    out.push_str(&text[done..]);
    Ok((done > 0).then_some(out))
}

/// The marked value of an integer with more than 64 bits; `None` for other texts.
///
/// # Errors
/// More than 128 bits.
pub(super) fn value(number: &str) -> Result<Option<Json>, String> {
    let digits = number.strip_prefix('-').unwrap_or(number);
    let is_integer = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !is_integer || number.parse::<i64>().is_ok() || number.parse::<u64>().is_ok() {
        return Ok(None);
    }
    match number.parse::<i128>() {
        Ok(_) => Ok(Some(Json::Object([(MARK.to_owned(), number.into())].into_iter().collect()))),
        Err(_) => Err(format!("an integer of {} digits is too long: write it as a string", digits.len())),
    }
}

/// The integer that an object marks.
pub(super) fn read(map: &Map<String, Json>) -> Option<i128> {
    map.get(MARK).filter(|_| map.len() == 1)?.as_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_beyond_64_bits_are_marked() {
        for same in [
            r#"{"a": 18446744073709551615, "b": [-9223372036854775808, 1e30, 1.5]}"#,
            r#"{"99999999999999999999": "\"99999999999999999999"}"#,
        ] {
            assert_eq!(mark(same), Ok(None));
        }
        let marked = mark(r#"{"a": [18446744073709551616,-9223372036854775809], "é": 1}"#).unwrap().unwrap();
        let row: Json = serde_json::from_str(&marked).unwrap();
        let read = |n: usize| read(row["a"][n].as_object().unwrap());
        assert_eq!((read(0), read(1)), (Some(1 << 64), Some(-(1 << 63) - 1)));
        assert!(mark(&format!("[{}]", "9".repeat(40))).unwrap_err().contains("40 digits"));
    }
}
