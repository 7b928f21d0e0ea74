//! The spellings of an option: its name, clap's aliases, underscores, `no-…`, and words of the original scripts that
//! stand for an option with its value. Flags and YAML keys are looked up by the same function.

use clap::{Arg, Command};

/// Spellings of the original scripts that stand for an option and its value: (spelling, option, value).
pub const ORIGINAL_SPELLINGS: [(&str, &str, &str); 3] = [
    ("use-random-experts", "method", "random"),
    ("full-param-training", "mode", "baseline"),
    ("skip-expert-training", "finetune-unsafe-experts", "false"),
];

/// What a spelling does to the value given with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// Nothing.
    Itself,
    /// `no-…`: the opposite of the truth value given, which is true where none is.
    Negated,
    /// Given without a value, or with true, it stands for this value; with false, for nothing.
    Fixed(&'static str),
}

/// An option as found by one of its spellings.
#[derive(Debug, Clone, Copy)]
pub struct Spelled<'a> {
    /// The option.
    pub arg: &'a Arg,
    /// How its value is to be read.
    pub meaning: Meaning,
}

impl Spelled<'_> {
    /// The option's kebab-case name.
    pub fn name(&self) -> &str {
        self.arg.get_long().expect("only options with a long name are looked up")
    }

    /// Whether the option is true or false.
    pub fn is_bool(&self) -> bool {
        is_bool(self.arg)
    }
}

/// Whether an argument's values are true and false. (A plain switch has no value.)
pub fn is_bool(arg: &Arg) -> bool {
    let values = arg.get_possible_values();
    arg.get_action().takes_values()
        && values.len() == 2
        && values.iter().all(|v| matches!(v.get_name(), "true" | "false"))
}

/// The option of `command` that is spelled `name` (without dashes in front, underscores allowed).
pub fn spelled<'a>(command: &'a Command, name: &str) -> Option<Spelled<'a>> {
    let name = name.replace('_', "-");
    let find = |name: &str| {
        command
            .get_arguments()
            .find(|a| a.get_long() == Some(name) || a.get_all_aliases().unwrap_or_default().contains(&name))
    };
    if let Some(arg) = find(&name) {
        return Some(Spelled { arg, meaning: Meaning::Itself });
    }
    if let Some((_, option, value)) = ORIGINAL_SPELLINGS.iter().find(|(spelling, ..)| *spelling == name) {
        return Some(Spelled { arg: find(option)?, meaning: Meaning::Fixed(value) });
    }
    let arg = find(name.strip_prefix("no-")?).filter(|a| is_bool(a))?;
    Some(Spelled { arg, meaning: Meaning::Negated })
}

/// The spelling that `command` knows and that is nearest to `name`, if one is near.
pub fn nearest(command: &Command, name: &str) -> Option<String> {
    let name = name.replace('_', "-");
    let originals = ORIGINAL_SPELLINGS.iter().map(|(spelling, ..)| *spelling).filter(|s| spelled(command, s).is_some());
    command
        .get_arguments()
        .flat_map(|a| a.get_long().into_iter().chain(a.get_all_aliases().unwrap_or_default()))
        .chain(originals)
        .map(|known| (strsim::normalized_damerau_levenshtein(known, &name), known))
        .filter(|(similarity, _)| *similarity > 0.6)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, known)| known.to_owned())
}
