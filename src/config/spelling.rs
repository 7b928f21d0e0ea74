//! Spellings of an option: its name, its clap aliases, underscores instead of dashes, the prefix `no-`, and flags of
//! the original scripts that mean an option with a value. Flags and YAML keys use the same lookup.

use clap::{Arg, Command};

/// Flags of the original scripts that mean an option with a value: (spelling, option, value).
pub const ORIGINAL_SPELLINGS: [(&str, &str, &str); 3] = [
    ("use-random-experts", "method", "random"),
    ("full-param-training", "mode", "baseline"),
    ("skip-expert-training", "finetune-unsafe-experts", "false"),
];

/// How the value given with a spelling becomes the value of the option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// Unchanged.
    Itself,
    /// `no-…`: negated; `no-…` without a value means false.
    Negated,
    /// Without a value or with `true`: this value. With `false`: the option is not given.
    Fixed(&'static str),
}

/// An option, found by one of its spellings.
#[derive(Debug, Clone, Copy)]
pub struct Spelled<'a> {
    /// The option in clap's grammar.
    pub arg: &'a Arg,
    /// How to read the value.
    pub meaning: Meaning,
}

impl Spelled<'_> {
    /// The option's kebab-case name.
    pub fn name(&self) -> &str {
        self.arg.get_long().expect("only options with a long name are looked up")
    }

    /// Whether the option is boolean.
    pub fn is_bool(&self) -> bool {
        is_bool(self.arg)
    }
}

/// Whether an argument takes `true` or `false`. (A switch takes no value and is not boolean in this sense.)
pub fn is_bool(arg: &Arg) -> bool {
    let values = arg.get_possible_values();
    arg.get_action().takes_values()
        && values.len() == 2
        && values.iter().all(|v| matches!(v.get_name(), "true" | "false"))
}

/// Looks up the option of `command` with this spelling, without leading dashes; underscores are allowed.
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

/// The known spelling most similar to `name` (normalized Damerau-Levenshtein similarity above 0.6), for "did you mean".
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
