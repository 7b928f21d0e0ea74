//! Sweeps: an option of the runs with the values to compare.

use std::fmt;
use std::str::FromStr;

use clap::{Args, Command, ValueEnum};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::config::raw::heading::{CHECKPOINTS, MACHINE, OUTPUT};
use crate::config::{Meaning, RawOptions, RunConfig, nearest, one_option, recipe, spelled};

/// How several sweeps combine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SweepMode {
    /// Every value of each sweep with every value of the others.
    #[default]
    Grid,
    /// The values of one sweep at a time; the options of the others keep their value of the base configuration.
    OneAtATime,
}

/// `OPTION=VALUE,VALUE`: an option of the runs, and the values that it takes in turn.
#[derive(Debug, Clone, PartialEq)]
pub struct Sweep {
    /// The option's kebab-case name.
    option: String,
    values: Vec<Setting>,
}

/// One value of a swept option.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// The option's kebab-case name.
    pub option: String,
    /// The value as it was written.
    text: String,
    /// The heading of the option in the help.
    pub heading: String,
    /// The option with this value, and what it implies.
    given: RawOptions,
}

/// Options that a sweep may not vary, and what does instead.
const FIXED: [(&str, &str); 9] = [
    ("model-name", "compare one model at a time"),
    ("init", "compare one model at a time"),
    ("eval-dataset-path", "all variants are measured on the same rows"),
    ("method", "give --methods"),
    ("mode", "give --ablations"),
    ("finetune-unsafe-experts", "give --ablations"),
    ("skip-router-training", "give --ablations"),
    ("epochs-per-round", "sweep expert-epochs-per-round or router-epochs-per-round"),
    ("num-epochs", "sweep expert-epochs-per-round or router-epochs-per-round"),
];

impl FromStr for Sweep {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (key, values) = text.split_once('=').ok_or("expected OPTION=VALUE,VALUE, such as expert-lr=1e-5,5e-5")?;
        let key = key.trim().trim_start_matches("--");
        let options = RawOptions::augment_args(Command::new("options"));
        let Some(option) = spelled(&options, key).filter(|option| option.meaning == Meaning::Itself) else {
            let hint = nearest(&options, key).map_or_else(String::new, |known| format!("; did you mean `{known}`?"));
            return Err(format!("there is no option `{key}` of runs{hint}"));
        };
        let name = option.name();
        if let Some((_, instead)) = FIXED.iter().find(|(fixed, _)| *fixed == name) {
            return Err(format!("`{name}` cannot be swept: {instead}"));
        }
        if matches!(option.arg.get_help_heading(), Some(OUTPUT | CHECKPOINTS | MACHINE)) {
            return Err(format!("`{name}` cannot be swept: it does not decide results"));
        }
        let mut found: Vec<Setting> = Vec::new();
        for text in split(values) {
            let text = text.trim();
            let given = one_option::option(name, text).map_err(|e| format!("`{name}={text}`: {e}"))?;
            let mut implied = RawOptions::default();
            recipe::imply(&given, &mut implied);
            let heading = option.arg.get_help_heading().unwrap_or_default().to_owned();
            let setting = Setting { option: name.to_owned(), text: text.to_owned(), heading, given: given.or(implied) };
            if found.iter().any(|earlier| earlier.given == setting.given) {
                return Err(format!("`{name}` has the value {text} twice: leave one out"));
            }
            found.push(setting);
        }
        Ok(Self { option: name.to_owned(), values: found })
    }
}

impl fmt::Display for Sweep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let values: Vec<String> = self.values.iter().map(|setting| setting.text.replace(',', "\\,")).collect();
        write!(f, "{}={}", self.option, values.join(","))
    }
}

impl Serialize for Sweep {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Sweep {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

impl Sweep {
    /// The option's kebab-case name.
    pub fn option(&self) -> &str {
        &self.option
    }

    /// The heading of the option in the help.
    pub fn heading(&self) -> &str {
        &self.values[0].heading
    }

    /// Number of values.
    pub fn num_values(&self) -> usize {
        self.values.len()
    }
}

/// The values of a list; a comma after a backslash is part of a value.
fn split(values: &str) -> Vec<String> {
    let mut found = vec![String::new()];
    let mut chars = values.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' if chars.peek() == Some(&',') => found.last_mut().expect("one").extend(chars.next()),
            ',' => found.push(String::new()),
            c => found.last_mut().expect("one").push(c),
        }
    }
    found
}

impl Setting {
    /// `base` with this value.
    pub fn apply(&self, base: RunConfig) -> RunConfig {
        self.given.clone().fill(base)
    }

    /// `expert-lr=1e-5`, with characters that a folder name may have on every file system.
    pub fn folder_name(&self) -> String {
        let allowed = |c: char| if c.is_ascii_alphanumeric() || "._+-".contains(c) { c } else { '-' };
        format!("{}={}", self.option, self.text.chars().map(allowed).collect::<String>())
    }
}

/// All combinations of values that the sweeps ask for, the last sweep varying fastest; without sweeps a single empty one.
pub fn combinations(sweeps: &[Sweep], mode: SweepMode) -> Vec<Vec<&Setting>> {
    if mode == SweepMode::OneAtATime && !sweeps.is_empty() {
        return sweeps.iter().flat_map(|sweep| sweep.values.iter().map(|setting| vec![setting])).collect();
    }
    sweeps.iter().fold(vec![Vec::new()], |all, sweep| {
        let with = |earlier: &Vec<_>| {
            let earlier = earlier.clone();
            sweep.values.iter().map(move |setting| earlier.iter().copied().chain([setting]).collect::<Vec<_>>())
        };
        all.iter().flat_map(with).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routers::KlType;

    #[track_caller]
    fn refused(text: &str, why: &str) {
        let error = text.parse::<Sweep>().expect_err(text);
        assert!(error.contains(why), "{text}: {error}");
    }

    #[test]
    fn values_are_those_of_the_options_file() {
        let sweep: Sweep = "--router_consistency_type=forward, reverse".parse().unwrap();
        assert_eq!(sweep.to_string(), "router-consistency-type=forward,reverse");
        let found: Vec<_> =
            sweep.values.iter().map(|s| s.apply(RunConfig::default()).router_consistency_type).collect();
        assert_eq!(found, [KlType::Forward, KlType::Reverse]);
        let rates: Sweep = "learning_rate=1e-5,0.5".parse().unwrap();
        assert_eq!((rates.option(), rates.values[1].apply(RunConfig::default()).expert_lr), ("expert-lr", 0.5));
        let joint: Sweep = "schedule=joint".parse().unwrap();
        assert!(joint.values[0].apply(RunConfig::default()).use_router_consistency_loss, "as the option implies");
        let layers: Sweep = "layers=0-3".parse().unwrap();
        assert_eq!(layers.values[0].folder_name(), "layers=0-3");
        let texts: Sweep = r"safe-response=Sorry\, no,Never".parse().unwrap();
        let found: Vec<_> = texts.values.iter().map(|s| s.apply(RunConfig::default()).safe_response).collect();
        assert_eq!(
            (found, texts.to_string()),
            (vec!["Sorry, no".into(), "Never".into()], r"safe-response=Sorry\, no,Never".into())
        );
    }

    #[test]
    fn what_cannot_be_swept_is_named() {
        refused("expert-lr", "OPTION=VALUE");
        refused("expert-lrs=1", "did you mean `expert-lr`");
        refused("no-shuffle=true", "no option");
        refused("expert-lr=fast", "`expert-lr=fast`");
        refused("expert-lr=1e-5,0.00001", "twice");
        refused("expert-lr=", "`expert-lr=`");
        refused("method=random", "--methods");
        refused("mode=baseline", "--ablations");
        refused("threads=1,2", "does not decide results");
        refused("model-name=a,b", "one model");
    }

    #[test]
    fn sweeps_combine() {
        let sweeps: Vec<Sweep> = ["seed=1,2", "expert-lr=1e-5,1e-4"].iter().map(|s| s.parse().unwrap()).collect();
        let names = |mode| -> Vec<String> {
            let all = combinations(&sweeps, mode);
            all.iter().map(|of| of.iter().map(|s| s.folder_name()).collect::<Vec<_>>().join(",")).collect()
        };
        let grid = ["seed=1,expert-lr=1e-5", "seed=1,expert-lr=1e-4", "seed=2,expert-lr=1e-5", "seed=2,expert-lr=1e-4"];
        assert_eq!(names(SweepMode::Grid), grid);
        assert_eq!(names(SweepMode::OneAtATime), ["seed=1", "seed=2", "expert-lr=1e-5", "expert-lr=1e-4"]);
        assert_eq!(combinations(&[], SweepMode::OneAtATime), vec![Vec::<&Setting>::new()]);
    }
}
