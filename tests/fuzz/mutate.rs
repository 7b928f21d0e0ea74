//! Mutations of bytes, of text by lines and words, and of JSON by its structure.

use serde_json::{Map, Number, Value, json};

use super::dice::Dice;

/// Number of mutations: mostly one, since the first may hide the others.
fn times(dice: &mut Dice) -> usize {
    if dice.one_in(3) { 2 + dice.below(4) } else { 1 }
}

/// Flips, overwrites, deletes, repeats, inserts and cuts.
pub fn bytes(dice: &mut Dice, input: &mut Vec<u8>) {
    for _ in 0..times(dice) {
        let range = dice.range(input.len());
        match dice.below(7) {
            0 | 1 if !input.is_empty() => input[range.start] ^= 1 << dice.below(8),
            2 if !input.is_empty() => input[range.start] = *dice.pick(&[0, 0xff, 0x80, b'"', b'{', b'[', 0x1b, b'\n']),
            3 => drop(input.drain(range)),
            4 => {
                let part = input[range.clone()].to_vec();
                let times = 1 + dice.below(8);
                input.splice(range.start..range.start, part.repeat(times));
            }
            5 => {
                let new: Vec<u8> = (0..=dice.below(16)).map(|_| dice.byte()).collect();
                input.splice(range.start..range.start, new);
            }
            _ => input.truncate(range.end),
        }
    }
}

/// Words that mean something in the language of a text.
pub type Words = &'static [&'static str];

pub const JINJA: Words = &[
    "{{",
    "}}",
    "{%",
    "%}",
    "{#",
    "#}",
    "{%- for m in messages %}",
    "{% endfor %}",
    "{% if true %}",
    "{% endif %}",
    "{{ messages }}",
    "{{ messages[0]['content'][::0] }}",
    "{{ messages[99] }}",
    "{{ raise_exception('no\u{1b}[2Jno') }}",
    "{{ 1 // 0 }}",
    "{{ 'x' * 999999999 }}",
    "{{ range(999999999) | list }}",
    "{{ messages | tojson(indent=999999999) }}",
    "{{ ('x' * 9999) | replace('x', 'y' * 9999) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% set ns = namespace(x='y') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% set x = [x] %}",
    "{{ bos_token }}",
    "{{ eos_token }}",
    "{% generation %}",
    "{% endgeneration %}",
    "{{ loop.index }}",
    "{{ tools }}",
    "{{ strftime_now('%Y%') }}",
    "{{ messages | map(attribute='role') | join('\u{1b}') }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{% break %}",
    "{{ -9223372036854775808 // -1 }}",
    "{{ 9223372036854775807 + 1 }}",
    "{{ 2 ** 999999 }}",
    "{{ 'a'.split('') }}",
    "{{ messages[-9223372036854775808] }}",
    "{{ ''.join(messages) }}",
    "{{ 'x'.center(999999999) }}",
    "{{ dict(a=1).items() | list }}",
    "{{ '%s' | format(1) }}",
    "{{ 1.0e308 * 10 | int }}",
    "{% filter upper %}",
    "{{ '\\u0000' }}",
];

pub const YAML: Words = &[
    "&a [*a, *a]",
    "*a",
    "<<: *a",
    "? ",
    ": [",
    "- - - -",
    "!!python/object:os.system x",
    "\t",
    ">-",
    "|",
    "%YAML 9.9",
    "---",
    "...",
    "{a: {b: [",
    "]}",
    "num-rounds: 1e99",
    "top-k-experts: -1",
    "expert-lr: .nan",
    "seed: 18446744073709551616",
    "ranks: 999999999",
    "threads: 999999999",
    "layers: 9-1",
    "batch-size: 99999999999999999999",
    "model-name: [a]",
    "dataset-path: /dev/zero",
    "max-length: 0x7fffffffffffffff",
    "output-dir: ..",
    "~",
    "null",
    "''",
    "\"\\x1b[2J\"",
    "max-samples: 18446744073709551615",
    "warmup-ratio: -.inf",
    "chat-template-kwargs: {a: {b: c}}",
    "safe-response: \"\"",
    "experts: /dev/null",
    "config: x",
];

/// Deletes, repeats and swaps lines, inserts words, repeats a word very often; then, rarely, changes bytes.
pub fn text(dice: &mut Dice, input: &mut Vec<u8>, words: Words) {
    let mut text = String::from_utf8_lossy(input).into_owned();
    for _ in 0..times(dice) {
        let mut lines: Vec<String> = text.split_inclusive('\n').map(str::to_owned).collect();
        let (a, b) = (dice.below(lines.len()), dice.below(lines.len()));
        let at = (0..=dice.below(text.len() + 1)).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
        match dice.below(6) {
            0 if !lines.is_empty() => drop(lines.remove(a)),
            1 if !lines.is_empty() => lines.insert(b, lines[a].repeat(1 + dice.below(3))),
            2 if !lines.is_empty() => lines.swap(a, b),
            3 => {
                let times = *dice.pick(&[50, 1000, 20_000]);
                let nested = *dice.pick(&[
                    "(",
                    "[",
                    "{",
                    "{% if x %}",
                    "- ",
                    "~ x ",
                    "not ",
                    "x.",
                    "{{",
                    "{% for x in y %}",
                    "| upper",
                    "[",
                ]);
                text.insert_str(at, &nested.repeat(times));
                continue;
            }
            _ => {
                text.insert_str(at, words[dice.below(words.len())]);
                continue;
            }
        }
        text = lines.concat();
    }
    *input = text.into_bytes();
    if dice.one_in(6) {
        bytes(dice, input);
    }
}

/// Replaces, removes, renames, moves and wraps values of a JSON document, one or some times. Rarely the text is then changed, too.
pub fn json(dice: &mut Dice, input: &mut Vec<u8>) {
    let Ok(mut document) = serde_json::from_slice::<Value>(input) else { return bytes(dice, input) };
    for _ in 0..times(dice) {
        let donor = node(dice, &mut document).clone();
        let changed = node(dice, &mut document);
        change(dice, changed, donor);
    }
    *input = document.to_string().into_bytes();
    if dice.one_in(5) {
        by_text(dice, input);
    }
}

/// What only text can hold: a key twice, numbers beyond every type, deep nesting, comments, marks.
fn by_text(dice: &mut Dice, input: &mut Vec<u8>) {
    let text = String::from_utf8_lossy(input).into_owned();
    let key = text.split('"').nth(1).unwrap_or("x").to_owned();
    *input = match dice.below(7) {
        0 => text.replacen('{', &format!("{{\"{key}\": 1, "), 1 + dice.below(3)),
        1 => text.replacen(": 1", ": 1e999", 1),
        2 => text.replacen(": ", &format!(": {}1{}, \"x\": ", "[".repeat(100_000), "]".repeat(100_000)), 1),
        3 => format!("\u{feff}{text}"),
        4 => text.replacen(':', ": NaN, \"y\":", 1),
        5 => format!("{text}{text}"),
        _ => return bytes(dice, input),
    }
    .into_bytes();
}

/// A random node: at each container it stops in one of eight cases.
fn node<'a>(dice: &mut Dice, value: &'a mut Value) -> &'a mut Value {
    let children = match value {
        Value::Array(items) => items.len(),
        Value::Object(members) => members.len(),
        _ => 0,
    };
    if children == 0 || dice.one_in(8) {
        return value;
    }
    let child = dice.below(children);
    match value {
        Value::Array(items) => node(dice, &mut items[child]),
        Value::Object(members) => node(dice, members.values_mut().nth(child).expect("counted")),
        _ => unreachable!("only containers have children"),
    }
}

fn change(dice: &mut Dice, value: &mut Value, donor: Value) {
    match (dice.below(8), &mut *value) {
        (0, Value::Object(members)) if !members.is_empty() => {
            let name = members.keys().nth(dice.below(members.len())).expect("counted").clone();
            let old = members.shift_remove(&name).expect("a member");
            match dice.below(3) {
                0 => {}
                1 => drop(members.insert(format!("{name}\u{1b}[31m"), old)),
                _ => drop(members.insert(name, donor)),
            }
        }
        (1, Value::Array(items)) if !items.is_empty() => match dice.below(3) {
            0 => drop(items.remove(dice.below(items.len()))),
            1 => items.push(donor),
            _ => {
                let (a, b) = (dice.below(items.len()), dice.below(items.len()));
                items.swap(a, b);
            }
        },
        (2 | 3, Value::Number(number)) => *number = nearby(dice, number),
        (2 | 3, Value::String(text)) => {
            let mut bytes = std::mem::take(text).into_bytes();
            self::bytes(dice, &mut bytes);
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        (4, _) => *value = donor,
        (5, _) => *value = Value::Array(vec![value.take()]),
        _ => *value = special(dice),
    }
}

fn nearby(dice: &mut Dice, number: &Number) -> Number {
    let (int, float) = (number.as_i64().unwrap_or(0), number.as_f64().unwrap_or(0.0));
    match dice.below(7) {
        0 => int.wrapping_add(1).into(),
        1 => int.wrapping_sub(1).into(),
        2 => int.wrapping_neg().into(),
        3 => int.wrapping_mul(1000).into(),
        4 => 0.into(),
        _ => Number::from_f64(float * 1.5 + 0.5).unwrap_or(number.clone()),
    }
}

fn special(dice: &mut Dice) -> Value {
    match dice.below(18) {
        0 => Value::Null,
        1 => true.into(),
        2 => 0.into(),
        3 => (-1).into(),
        4 => u64::MAX.into(),
        5 => i64::MIN.into(),
        6 => 1e308.into(),
        7 => 5e-324.into(),
        8 => "".into(),
        9 => "x".repeat(100_000).into(),
        10 => "\u{1b}[2J\u{1b}]0;x\u{7}\u{202e}\u{0}\r\u{9b}31m".into(),
        11 => json!([]),
        12 => json!({}),
        13 => (0..100).fold(json!(1), |inner, _| json!([inner])),
        14 => Value::Object((0..50).map(|i| (i.to_string(), json!(i))).collect::<Map<_, _>>()),
        15 => json!([null, 1, "a", {"role": "user"}, []]),
        16 => (1u64 << (20 + dice.below(40))).into(),
        _ => "../../etc/passwd".into(),
    }
}

/// Changes the JSON header of a safetensors file, and keeps or breaks its length.
pub fn safetensors(dice: &mut Dice, input: &mut Vec<u8>) {
    let length = input.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes) as usize);
    if dice.one_in(3) || input.len() < 8 + length {
        let end = input.len().min(8 + length);
        let mut head = input[..end].to_vec();
        bytes(dice, &mut head);
        input.splice(..end, head);
        return;
    }
    let mut header = input[8..8 + length].to_vec();
    json(dice, &mut header);
    let length = if dice.one_in(8) { dice.below(1 << 20) as u64 } else { header.len() as u64 };
    let head = [&length.to_le_bytes()[..], &header].concat();
    let end = 8 + input.first_chunk::<8>().map_or(0, |bytes| u64::from_le_bytes(*bytes) as usize);
    input.splice(..end, head);
}

/// [`json`] of a document, or of a line of JSONL.
pub fn json_lines(dice: &mut Dice, input: &mut Vec<u8>) {
    if serde_json::from_slice::<Value>(input).is_ok() {
        return json(dice, input);
    }
    let mut lines: Vec<Vec<u8>> = input.split_inclusive(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    if !lines.is_empty() {
        let line = dice.below(lines.len());
        json(dice, &mut lines[line]);
        lines[line].push(b'\n');
    }
    *input = lines.concat();
}

/// Values of tensors: flipped bits, and numbers that are not finite or huge.
pub fn weights(dice: &mut Dice, input: &mut [u8]) {
    let header = input.first_chunk::<8>().map_or(0, |bytes| 8 + u64::from_le_bytes(*bytes) as usize);
    for _ in 0..=dice.below(8) {
        let at = header + 4 * dice.below((input.len() - header) / 4);
        let value = *dice.pick(&[f32::NAN, f32::INFINITY, f32::MAX, f32::MIN, 0.0, 1e20, f32::MIN_POSITIVE]);
        match dice.below(3) {
            0 => input[at] ^= 1 << dice.below(8),
            1 => input[at + 3] ^= 0x40,
            _ => input[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        }
    }
}

/// By what the content is: JSON, JSONL, safetensors or other bytes.
pub fn any(dice: &mut Dice, input: &mut Vec<u8>) {
    match input.first() {
        Some(b'{' | b'[') => json_lines(dice, input),
        _ if input.get(8) == Some(&b'{') => safetensors(dice, input),
        _ => bytes(dice, input),
    }
}
