//! Errors of JSON and YAML in the user's words. The libraries name the types of Rust, the states of their parsers and their own
//! options; here a type becomes the kind of value that it is in the file.

use serde::de::IgnoredAny;
use serde_saphyr::Error as YamlError;

use crate::quote::{cut, quote};

/// Characters of a message.
const MOST: usize = 300;

/// What is wrong with a JSON text or a value of it, without the place.
pub fn json_words(error: &serde_json::Error) -> String {
    words(&error.to_string())
}

/// What is wrong with a JSON text, with line and column.
pub fn json_problem(error: &serde_json::Error) -> String {
    let words = json_words(error);
    match (error.line(), error.column()) {
        (0, _) => words,
        // At its start the text itself is meant.
        (1, 0) => words.replacen("a value should", "it should", 1),
        (line, column) => format!("{words} (line {line}, column {column})"),
    }
}

/// Where `text` ends, if it is the beginning of a JSON text that was cut off: "it ends inside a list".
pub fn cut_off(text: &[u8], error: &serde_json::Error) -> Option<String> {
    if error.is_eof() {
        return Some(json_words(error));
    }
    if !error.is_syntax() {
        return None;
    }
    // The parser reports what is missing of a number or a character as a mistake.
    let inside = match without_place(&error.to_string()) {
        "invalid number"
            if matches!(
                text,
                [b'-']
                    | [.., b'[' | b':' | b',' | b' ' | b'\n', b'-']
                    | [.., b'0'..=b'9', b'.' | b'e' | b'E']
                    | [.., b'e' | b'E', b'+' | b'-']
            ) =>
        {
            "number"
        }
        "invalid unicode code point" if std::str::from_utf8(text).is_err_and(|e| e.error_len().is_none()) => {
            "character"
        }
        _ => return None,
    };
    Some(format!("it ends inside a {inside}"))
}

/// [`json_problem`] of an error in reading a value of `text`.
pub fn problem_in(text: &[u8], error: &serde_json::Error) -> String {
    let problem = json_problem(error);
    if let Some(end) = cut_off(text, error) {
        return problem.replacen(&json_words(error), &end, 1);
    }
    if !error.is_syntax() || serde_json::from_slice::<IgnoredAny>(text).is_err() {
        return problem;
    }
    // Of valid JSON the parser says this of a list that is longer than it should be, and of what is no name.
    problem.replacen("something follows the value", "a list has more values than it should", 1).replacen(
        "no JSON value begins here",
        "a value should be a name",
        1,
    )
}

/// What is wrong with a line of JSON lines, with its column.
pub fn line_problem(line: &[u8], error: &serde_json::Error) -> String {
    if line.is_empty() {
        return "the line is empty".into();
    }
    // JSON writes the character of the number 0 as an escape.
    if line.contains(&0) {
        return "the line holds zero bytes, as after a crash or a full disk".into();
    }
    if let Some(end) = cut_off(line, error) {
        return format!("the line is cut off: {end}");
    }
    problem_in(line, error).replacen("(line 1, column ", "(column ", 1)
}

/// What is wrong with a YAML text, without the line.
pub fn yaml_words(error: &YamlError) -> String {
    const TOO_MUCH: &str = "it is nested too deep, too long or refers to itself too often for a file of options";
    match error.without_snippet() {
        YamlError::AliasError { error, .. } => yaml_words(error),
        YamlError::DuplicateMappingKey { key, .. } => {
            let key = key.as_ref().map_or_else(|| "a key".into(), |key| quote(key));
            format!("{key} is there twice: leave one out")
        }
        YamlError::Budget { .. }
        | YamlError::AliasReplayCounterOverflow { .. }
        | YamlError::AliasReplayLimitExceeded { .. }
        | YamlError::AliasExpansionLimitExceeded { .. }
        | YamlError::AliasReplayStackDepthExceeded { .. }
        | YamlError::RecursiveReferencesRequireWeakTypes { .. } => TOO_MUCH.into(),
        YamlError::Eof { .. } => "it ends where a value should be".into(),
        YamlError::MultipleDocuments { .. } => "it holds several documents, separated by `---`: keep one".into(),
        YamlError::Unexpected { expected, .. } => {
            let what = match expected {
                start if start.contains("mapping") => "a map, one `name: value` a line,",
                start if start.contains("sequence") => "a list",
                _ => "one value",
            };
            format!("{what} should stand here")
        }
        YamlError::ExternalMessage { msg, .. } => of_parser(msg),
        YamlError::UnknownAnchor { .. } => of_parser("unknown anchor"),
        YamlError::InvalidScalar { .. } => "a value is not of the kind that its mark (`!!`) or its option needs".into(),
        other => {
            let message = other.to_string();
            // The parser quotes the number, and speaks of its own policy.
            if let Some((number, _)) = message.split_once("` rejected by ").filter(|_| message.contains("non-finite")) {
                return format!("`{}` is not a finite number", number.rsplit('`').next().unwrap_or_default());
            }
            words(message.split(" (defined at line ").next().unwrap_or_default())
        }
    }
}

/// A message of the YAML parser.
fn of_parser(message: &str) -> String {
    let has = |part: &str| message.contains(part);
    let plain = if has("recursion limit") {
        "it is nested too deep"
    } else if has("unknown anchor") {
        "`*NAME` refers to a value that no `&NAME` marks: text that begins with * needs quotation marks"
    } else if has("tab") && (has("disallowed") || has("indentation") || has("found a tab")) {
        "a tab stands where YAML needs spaces"
    } else if has("mapping values are not allowed") || has("illegal placement of ':'") {
        "a colon stands where YAML has none: text with a colon needs quotation marks"
    } else if has("expected key") || has("simple key") {
        "this is no line of the form `name: value` with the indentation of the lines before"
    } else if has("multiple documents") {
        "it holds several documents, separated by `---`: keep one"
    } else {
        let message =
            if message.starts_with("while ") { message.split_once(", ").map_or(message, |m| m.1) } else { message };
        let message = message.replace("scalar", "text").replace("mapping", "map").replace("sequence", "list");
        return format!("not YAML: {}", cut(&message, MOST));
    };
    plain.into()
}

/// A message of serde or of a parser.
pub fn words(message: &str) -> String {
    let message = without_place(message);
    let (keys, message) = after_keys(message);
    let plain = syntax(message).map(str::to_owned).or_else(|| content(message));
    cut(&format!("{keys}{}", plain.as_deref().unwrap_or(message)), MOST)
}

fn without_place(message: &str) -> &str {
    message.rsplit_once(" at line ").map_or(message, |(message, _)| message)
}

/// The keys, as in "`a`: `b`: ", that an error inside a member begins with, and the rest.
fn after_keys(message: &str) -> (&str, &str) {
    let mut rest = message;
    while let Some((_, inner)) = rest.strip_prefix('`').and_then(|rest| rest.split_once("`: ")) {
        rest = inner;
    }
    message.split_at(message.len() - rest.len())
}

/// The errors of serde_json's parser.
fn syntax(message: &str) -> Option<&'static str> {
    Some(match message {
        "EOF while parsing a list" => "it ends inside a list",
        "EOF while parsing an object" => "it ends inside an object",
        "EOF while parsing a string" => "it ends inside a text",
        "EOF while parsing a value" => "it ends where a value should be",
        "expected `:`" => "a colon is missing after a name",
        "expected `,` or `]`" => "a comma or ] is missing",
        "expected `,` or `}`" => "a comma or } is missing",
        "expected value" | "expected ident" => "no JSON value begins here",
        "key must be a string" | "expected `\"`" => "a name is not in double quotation marks",
        "trailing comma" => "a comma stands before a closing bracket",
        "trailing characters" => "something follows the value",
        "invalid escape" => "a backslash begins no escape of JSON",
        "invalid number" => "a number is not written as in JSON",
        "number out of range" => "a number is too large",
        "invalid unicode code point" => "a text is not UTF-8",
        "lone leading surrogate in hex escape" | "unexpected end of hex escape" => {
            "an escape is half of a surrogate pair, which is not a character"
        }
        "recursion limit exceeded" => "lists and objects are nested more than 127 deep",
        other if other.starts_with("control character") => {
            "a text holds a control character, such as a line end or a tab, that is no escape"
        }
        _ => return None,
    })
}

/// The errors of serde: a value is not of the type that is read.
fn content(message: &str) -> Option<String> {
    let name = |start: &str| message.strip_prefix(start).and_then(|rest| rest.split('`').next());
    if let Some(name) = name("missing field `") {
        return Some(format!("the field {name} is missing"));
    }
    if let Some(name) = name("duplicate field `") {
        return Some(format!("the field {name} is there twice"));
    }
    if message.starts_with("data did not match any variant") {
        return Some("a value has none of the forms that are known".into());
    }
    let of = |start: &str| message.strip_prefix(start)?.rsplit_once(", expected ");
    if let Some((name, known)) = of("unknown field ") {
        return Some(format!("the field {name} is unknown: {known} are known"));
    }
    if let Some((name, known)) = of("unknown variant ") {
        return Some(format!("{name} is unknown: expected {known}"));
    }
    if let Some((found, expected)) = of("invalid type: ").or_else(|| of("invalid value: ")) {
        return Some(format!("a value should be {}, not {}", kind(expected), found_kind(found)));
    }
    let (length, expected) = of("invalid length ")?;
    Some(format!("a value should be {}, not a list of {length}", kind(expected)))
}

/// What serde calls the value that it expected.
fn kind(expected: &str) -> String {
    let list_of = |start: &str| expected.strip_prefix(start).map(|n| format!("a list of {n}"));
    if let Some(list) = list_of("a tuple of size ").or_else(|| list_of("an array of length ")) {
        return list;
    }
    let plain = match expected {
        "usize" | "u64" | "u32" | "u16" | "u8" => "a whole number, not negative",
        "isize" | "i64" | "i32" => "a whole number",
        "f64" | "f32" => "a number",
        "a boolean" | "bool" => "true or false",
        "a string" | "string" | "a borrowed string" | "path string" => "a text",
        "a sequence" | "sequence" => "a list",
        "a map" | "map" => "an object",
        "unit" => "null",
        "string or map" => "a name, or an object with one",
        "variant identifier" | "field identifier" => "a name",
        enumeration if enumeration.starts_with("enum ") => "a name, or an object with one",
        tuple if tuple.starts_with("tuple ") => "a list",
        object
            if ["struct ", "internally tagged ", "adjacently tagged "]
                .iter()
                .any(|start| object.starts_with(start)) =>
        {
            "an object"
        }
        other => other,
    };
    plain.into()
}

/// What serde calls the value that it found.
fn found_kind(found: &str) -> String {
    let value = |start: &str| found.strip_prefix(start).map(|value| value.trim_matches('`'));
    if let Some(value) = value("boolean ") {
        return value.into();
    }
    if let Some(number) = value("integer ").or_else(|| value("floating point ")) {
        return format!("the number {number}");
    }
    if let Some(text) = value("string ") {
        return format!("the text {}", cut(text, 60));
    }
    let plain = match found {
        "sequence" => "a list",
        "map" => "an object",
        "null" | "unit value" | "Option value" => "null",
        "byte array" => "bytes",
        _ => "another value",
    };
    plain.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[expect(dead_code, reason = "only errors of reading it are looked at")]
    struct Inner {
        pair: (usize, f64),
        kind: Kind,
        choice: Option<Choice>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Kind {
        First,
        Second,
    }

    #[derive(Debug, Deserialize)]
    #[serde(untagged)]
    #[expect(dead_code, reason = "only errors of reading it are looked at")]
    enum Choice {
        One(bool),
        Two(String),
    }

    /// Words of the libraries, which no message may hold.
    const OF_LIBRARIES: [&str; 12] = [
        "EOF",
        "variant",
        "untagged",
        "invalid type",
        "expected value",
        "missing field",
        "struct",
        "usize",
        "f64",
        "sequence",
        "recursion",
        "at line",
    ];

    #[test]
    fn errors_of_json_are_in_the_words_of_the_file() {
        let deep = "[".repeat(200);
        for (text, says) in [
            ("[]", "a value should be an object, not a list of 0 (line 1, column 2)"),
            ("7", "a value should be an object, not the number 7 (line 1, column 1)"),
            ("{}", "the field pair is missing (line 1, column 2)"),
            (r#"{"pair": {}}"#, "a value should be a list of 2, not an object (line 1, column 9)"),
            (r#"{"pair": [1]}"#, "a value should be a list of 2, not a list of 1"),
            (r#"{"pair": [-1, 2]}"#, "a value should be a whole number, not negative, not the number -1"),
            (r#"{"pair": ["x", 2]}"#, r#"not the text "x""#),
            (r#"{"pair": [1, null]}"#, "a value should be a number, not null"),
            (r#"{"pair": [1, 2], "kind": "third"}"#, "`third` is unknown: expected `first` or `second`"),
            (r#"{"pair": [1, 2], "kind": "first", "choice": {}}"#, "a value has none of the forms"),
            (r#"{"pear": 1}"#, "the field `pear` is unknown: one of `pair`, `kind`, `choice` are known"),
            (r#"{"pair": [1, 2], "pair": 1}"#, "the field pair is there twice"),
            (r#"{"pair": [1"#, "it ends inside a list"),
            (r#"{"pair": [1 2"#, "a comma or ] is missing"),
            (r#"{"pair" 1"#, "a colon is missing"),
            (r#"{pair: 1}"#, "a name is not in double quotation marks"),
            (r#"{"pair": True}"#, "no JSON value begins here (line 1, column 10)"),
            (r#"{"pair": nil}"#, "no JSON value begins here"),
            (r#"{"choice": "\ud83d"}"#, "half of a surrogate pair"),
            (r#"{"choice": "\x"}"#, "a backslash begins no escape"),
            ("{\"choice\": \"\n\"}", "a control character"),
            (&format!("{{\"choice\": {deep}"), "nested more than 127 deep"),
        ] {
            let said = json_problem(&serde_json::from_str::<Inner>(text).unwrap_err());
            assert!(said.contains(says), "{text}: {said}");
            assert!(OF_LIBRARIES.iter().all(|word| !said.contains(word)), "{text}: {said}");
        }
        assert_eq!(words("`a`: `b`: missing field `c` at line 1 column 2"), "`a`: `b`: the field c is missing");
        assert!(matches!(serde_json::from_str("\"second\"").unwrap(), Kind::Second));
    }

    #[test]
    fn the_beginning_of_a_text_is_told_from_a_mistake() {
        let whole = r#"{"a": [-1.5e+10, 0.25E-3, true, null, false, "x\u00e9\ud83d\ude00\n é 😀"], "b": {"c": 1e5}}"#
            .as_bytes();
        let read = |text: &[u8]| serde_json::from_slice::<serde_json::Value>(text);
        for end in 0..whole.len() {
            let cut = &whole[..end];
            let error = read(cut).unwrap_err();
            assert!(cut_off(cut, &error).is_some(), "{:?}: {error}", String::from_utf8_lossy(cut));
            assert!(problem_in(cut, &error).starts_with("it ends "), "{}", problem_in(cut, &error));
        }
        for mistake in [r#"{"a": 1.}"#, "[1..", "[01", "[1ee", "[--", "[.", "{\"a\": 1}}", "[1,]", "[\"ÿ\"]"] {
            let text: Vec<u8> = mistake.chars().map(|c| c as u8).collect();
            let error = read(&text).unwrap_err();
            assert_eq!(cut_off(&text, &error), None, "{mistake}");
        }
    }

    #[test]
    fn a_line_that_is_cut_off_or_holds_zero_bytes_says_so() {
        for (line, says) in [
            ("", "the line is empty"),
            ("[\"first\"", "the line is cut off: it ends inside a list"),
            ("\0\0\0", "the line holds zero bytes"),
            ("[]\0\0", "the line holds zero bytes"),
            ("[x]", "no JSON value begins here (column 2)"),
            ("[7]", "a value should be a name (column 2)"),
            ("{\"a\": 1}", "it should be a list, not an object"),
        ] {
            let error = serde_json::from_str::<Vec<Kind>>(line).unwrap_err();
            let said = line_problem(line.as_bytes(), &error);
            assert!(said.starts_with(says), "{line:?}: {said}");
        }
    }

    #[test]
    fn errors_of_yaml_are_in_the_words_of_the_file() {
        let deep = format!("a: {}1{}", "[".repeat(5000), "]".repeat(5000));
        let aliases = "a: &a [1,1,1,1,1,1,1,1,1]\n".to_owned()
            + &(1..9).map(|i| {
                let (name, before) = ((b'a' + i) as char, (b'a' + i - 1) as char);
                format!("{name}: &{name} [*{before},*{before},*{before},*{before},*{before},*{before},*{before},*{before}]\n")
            }).collect::<String>();
        for (text, says) in [
            ("- 1", "a map, one `name: value` a line, should stand here"),
            ("a: 1\na: 2", "`a` is there twice: leave one out"),
            ("a: b: c", "a colon stands where YAML has none"),
            ("a:\n\t- 1", "a tab stands where YAML needs spaces"),
            ("a: 1\n b: 2", ""),
            ("a: *b", "refers to a value that no `&NAME` marks"),
            ("a: [1", "unclosed bracket"),
            ("a: |0", "not YAML: found an indentation indicator equal to 0"),
            ("a: 'b'c", "not YAML: invalid trailing content after single-quoted text"),
            ("a: 1\n---\nb: 1", "several documents"),
            (&deep, "nested too deep"),
            (&aliases, "refers to itself too often"),
        ] {
            type Map = std::collections::BTreeMap<String, serde_json::Value>;
            let said = yaml_words(&serde_saphyr::from_str::<Map>(text).unwrap_err());
            assert!(said.contains(says), "{text:.80}: {said}");
            let words = ["recursion", "mapping", "scalar", "Options", "budget", "policy", "at line", "alias"];
            assert!(words.iter().all(|word| !said.contains(word)), "{text:.80}: {said}");
        }
    }
}
