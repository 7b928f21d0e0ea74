//! Normalizes the spellings of options before clap parses them: `--learning_rate 1e-4` → `--expert-lr=1e-4`.

use std::ffi::{OsStr, OsString};

use clap::Command;
use clap::error::ErrorKind;

use crate::config::{Meaning, Spelled, spelled};

/// An option that has been normalized, to find contradictions.
struct Written {
    name: String,
    spelling: String,
    value: OsString,
}

/// Replaces each known option by its canonical name, joined with its value by `=`. Values are unchanged; unknown
/// options are left for clap to report. Two spellings of an option with the same value become one.
///
/// # Errors
/// Two spellings with different values, or a boolean option with another value: a usage error (exit 2).
pub fn canonical(args: Vec<OsString>, root: &mut Command) -> Result<Vec<OsString>, clap::Error> {
    let subcommand = args.iter().skip(1).find(|a| !a.to_string_lossy().starts_with('-'));
    let Some(command) = subcommand.and_then(|name| root.find_subcommand(name)).cloned() else { return Ok(args) };

    let mut out = Vec::with_capacity(args.len());
    let mut written: Vec<Written> = Vec::new();
    let mut rest = args.into_iter().peekable();
    while let Some(arg) = rest.next() {
        if arg == "--" {
            out.push(arg);
            out.extend(rest);
            break;
        }
        let Some((spelling, inline)) = split(&arg) else {
            out.push(arg);
            continue;
        };
        let Some(option) = spelled(&command, &spelling) else {
            out.push(join(&spelling.replace('_', "-"), inline.as_deref()));
            continue;
        };
        let name = option.name().to_owned();
        let takes_next =
            option.meaning == Meaning::Itself && !option.is_bool() && option.arg.get_action().takes_values();
        let inline = inline.or_else(|| rest.next_if(|next| takes_next && !looks_like_option(next)));
        let value = match meant(option, inline) {
            Ok(Some(value)) => value,
            Ok(None) => continue,
            Err(Unclear::NoValue) => {
                out.push(join(&name, None));
                continue;
            }
            Err(Unclear::NotBool(value)) => {
                let value = value.to_string_lossy();
                let message = format!("--{spelling} takes true or false, not '{value}'");
                return Err(root.error(ErrorKind::InvalidValue, message));
            }
        };
        match written.iter().find(|w| w.name == name && w.spelling != spelling) {
            Some(earlier) if same(&earlier.value, &value) => continue,
            Some(earlier) => {
                let message = format!(
                    "--{} and --{spelling} set the same option ({name}) to different values: '{}' and '{}'",
                    earlier.spelling,
                    earlier.value.to_string_lossy(),
                    value.to_string_lossy()
                );
                return Err(root.error(ErrorKind::ArgumentConflict, message));
            }
            None => {}
        }
        out.push(join(&name, Some(&value)));
        written.push(Written { name, spelling, value });
    }
    Ok(out)
}

/// Why [`meant`] finds no value.
enum Unclear {
    /// The option is a switch without a value, or the value is missing.
    NoValue,
    /// Not a boolean, as in `--no-x=7`.
    NotBool(OsString),
}

/// The value of an option, by its spelling and its written value. `None`: the option is not given.
fn meant(option: Spelled, inline: Option<OsString>) -> Result<Option<OsString>, Unclear> {
    if option.meaning == Meaning::Itself {
        return match inline {
            Some(value) => Ok(Some(value)),
            None if option.is_bool() => Ok(Some("true".into())),
            None => Err(Unclear::NoValue),
        };
    }
    let given = match inline.as_deref().map(OsStr::to_str) {
        None | Some(Some("true")) => true,
        Some(Some("false")) => false,
        Some(_) => return Err(Unclear::NotBool(inline.unwrap_or_default())),
    };
    Ok(match option.meaning {
        Meaning::Negated => Some((!given).to_string().into()),
        Meaning::Fixed(value) => given.then(|| value.into()),
        Meaning::Itself => unreachable!("handled above"),
    })
}

/// Splits `--name=value` into (name, value) and `--name` into (name, `None`). Returns `None` for any other argument,
/// and for one that is not UTF-8.
fn split(arg: &OsStr) -> Option<(String, Option<OsString>)> {
    let text = arg.to_str()?.strip_prefix("--")?;
    Some(match text.split_once('=') {
        Some((name, value)) => (name.to_owned(), Some(value.into())),
        None => (text.to_owned(), None),
    })
}

fn join(name: &str, value: Option<&OsStr>) -> OsString {
    let mut arg = OsString::from(format!("--{name}"));
    if let Some(value) = value {
        arg.push("=");
        arg.push(value);
    }
    arg
}

/// Whether an argument starts with a dash and is not a negative number.
fn looks_like_option(arg: &OsStr) -> bool {
    let text = arg.to_string_lossy();
    text.starts_with('-') && text.len() > 1 && text.parse::<f64>().is_err()
}

/// Equal as text or as numbers.
fn same(a: &OsStr, b: &OsStr) -> bool {
    let number = |text: &OsStr| text.to_str().and_then(|t| t.parse::<f64>().ok());
    a == b || number(a).is_some_and(|x| number(b) == Some(x))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rewritten(line: &str) -> Result<String, String> {
        let args = line.split(' ').map(OsString::from).collect();
        canonical(args, &mut crate::cli::command())
            .map(|args| args.iter().map(|a| a.to_string_lossy()).collect::<Vec<_>>().join(" "))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn spellings_become_names_and_values_stay() {
        let cases = [
            ("m train --top_k_experts 5", "m train --top-k-experts=5"),
            ("m train --top-k-experts=5", "m train --top-k-experts=5"),
            ("m -q train --learning_rate 1e-4 --resume", "m -q train --expert-lr=1e-4 --resume=true"),
            ("m train --output_dir a_b --model_name x_y", "m train --output-dir=a_b --model-name=x_y"),
            ("m train --no_shuffle --no-resume=false", "m train --shuffle=false --resume=true"),
            (
                "m train --use_random_experts --skip_expert_training",
                "m train --method=random --finetune-unsafe-experts=false",
            ),
            ("m train --full_param_training=false", "m train"),
            ("m train --random_seed 7 --seed 7", "m train --seed=7"),
            ("m train --expert-lr 5e-5 --learning_rate 0.00005", "m train --expert-lr=5e-5"),
            ("m train --risk_threshold -0.5", "m train --risk-threshold=-0.5"),
            ("m train --output-dir --overwrite", "m train --output-dir --overwrite=true"),
            ("m train --top_k_expert 5", "m train --top-k-expert 5"),
            ("m eval --max_new_tokens 9 --overwrite", "m eval --max-new-tokens=9 --overwrite"),
            ("m report a_b -- --c_d", "m report a_b -- --c_d"),
            ("m nonsense --a_b", "m nonsense --a_b"),
        ];
        for (line, expected) in cases {
            assert_eq!(rewritten(line).as_deref(), Ok(expected), "{line}");
        }
    }

    #[test]
    fn two_spellings_with_two_values_are_refused() {
        for line in [
            "m train --seed 1 --random_seed 2",
            "m train --learning-rate 1e-4 --expert_lr 1e-5",
            "m train --use-random-experts --method gradient",
            "m train --shuffle --no-shuffle",
            "m train --no-shuffle=7",
        ] {
            assert!(rewritten(line).is_err(), "{line}");
        }
    }
}
