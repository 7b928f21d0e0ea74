//! From flags, YAML and defaults to one configuration, and from it to the recipe of the run.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::{ConfigError, RawOptions, RunConfig, file, recipe, validate};
use crate::train::{Identify, Recipe, ScoreBy, Training};

/// A resolved configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// What decides the run.
    pub config: RunConfig,
    /// Options of the YAML file that ask for something but cannot act under the other options, one sentence each.
    /// (As flags they are refused: a file may serve several kinds of run, a command line serves one.)
    pub warnings: Vec<String>,
}

/// Options by their kebab-case names.
type Options = Map<String, Value>;

/// One source of options, with what it implies. Both override the sources below.
struct Layer {
    given: Options,
    implied: Options,
    num_epochs: bool,
}

/// Lays `flags` over the YAML file `file` over the defaults, and validates the result.
///
/// Fails with every variant of [`ConfigError`].
pub fn resolve(file: Option<&Path>, flags: &RawOptions) -> Result<Resolved, ConfigError> {
    resolve_matrix(file, flags, |config| vec![config.clone()])
}

/// The same for the base of several runs: an option is refused as useless only where it would do nothing in any of them.
pub fn resolve_matrix(
    file: Option<&Path>,
    flags: &RawOptions,
    runs: impl FnOnce(&RunConfig) -> Vec<RunConfig>,
) -> Result<Resolved, ConfigError> {
    let wrong = flags.not_finite();
    if !wrong.is_empty() {
        return Err(ConfigError::Invalid(wrong));
    }
    let file = file.map(file::read).transpose()?.unwrap_or_default();
    let (file, flags) = (Layer::new(file)?, Layer::new(given(flags)?)?);

    let mut all = given(&RunConfig::default())?;
    if file.num_epochs || flags.num_epochs {
        all.insert("num-rounds".into(), json!(1));
    }
    for part in [&file.implied, &file.given, &flags.implied, &flags.given] {
        all.extend(part.clone());
    }
    let from_options = |all: &Options| -> RunConfig {
        serde_json::from_value(Value::Object(all.clone())).expect("options have the types of the configuration")
    };
    let mut config = from_options(&all);
    if !recipe::asks_for_router_phase(&config)
        && ![&file.given, &flags.given].iter().any(|g| g.contains_key(ROUTER_EPOCHS))
    {
        // `--num-epochs` speaks of the router phase only where there is one
        config.router_epochs_per_round = RunConfig::default().router_epochs_per_round;
    }

    for (option, empty) in
        [("--model-name", config.model_name.is_empty()), ("--dataset-path", config.dataset_path.as_os_str().is_empty())]
    {
        if empty {
            return Err(ConfigError::Missing(option));
        }
    }
    let mut wrong = validate::problems(&config);
    let mut warnings = Vec::new();
    let mut inert = validate::options_without_effect(&config);
    for run in runs(&config) {
        let here = validate::options_without_effect(&run);
        inert.retain(|(option, _)| here.iter().any(|(other, _)| other == option));
    }
    for (option, why) in inert {
        if flags.given.contains_key(option) {
            wrong.push(format!("--{option} would do nothing: {why}; leave it out"));
        } else if file.given.contains_key(option) {
            warnings.push(format!("`{option}` of the options file does nothing in this run: {why}"));
        }
    }
    if !wrong.is_empty() {
        return Err(ConfigError::Invalid(wrong));
    }
    Ok(Resolved { config, warnings })
}

impl RunConfig {
    /// What a run with these options does.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], with every contradiction between the options.
    pub fn recipe(&self) -> Result<Recipe, ConfigError> {
        match validate::problems(self) {
            problems if problems.is_empty() => Ok(recipe::recipe_of(self)),
            problems => Err(ConfigError::Invalid(problems)),
        }
    }

    /// The recipe of `identify`: scores and selects as a run with these options would, and trains nothing.
    ///
    /// # Errors
    /// As [`Self::recipe`].
    pub fn recipe_of_identification(&self) -> Result<Recipe, ConfigError> {
        Ok(Recipe { training: Training::Nothing, ..self.recipe()? })
    }

    /// The recipe of `eval`: counts routing frequencies, and trains nothing.
    ///
    /// # Errors
    /// As [`Self::recipe`].
    pub fn recipe_of_evaluation(&self) -> Result<Recipe, ConfigError> {
        let recipe = self.recipe_of_identification()?;
        let by = ScoreBy::Routing { tokens: self.routing_tokens, threshold: self.risk_threshold };
        Ok(Recipe { identify: Identify { by, ..recipe.identify }, ..recipe })
    }
}

const EXPERT_EPOCHS: &str = "expert-epochs-per-round";
const ROUTER_EPOCHS: &str = "router-epochs-per-round";

impl Layer {
    fn new(mut given: Options) -> Result<Self, ConfigError> {
        let mut implied = Options::new();
        let mut num_epochs = false;
        let mut wrong = Vec::new();
        for shorthand in ["epochs-per-round", "num-epochs"] {
            let Some(epochs) = given.remove(shorthand) else { continue };
            num_epochs |= shorthand == "num-epochs";
            for option in [EXPERT_EPOCHS, ROUTER_EPOCHS] {
                match given.get(option).or(implied.get(option)) {
                    Some(other) if *other != epochs => {
                        wrong.push(format!(
                            "`{shorthand}` is {epochs} and sets `{option}`, which is {other}: leave one out"
                        ));
                    }
                    _ => drop(implied.insert(option.into(), epochs.clone())),
                }
            }
        }
        // The joint schedule and the consistency loss are one thing with two names; where a source gives only one,
        // the other follows.
        match (given.get("schedule"), given.get("use-router-consistency-loss")) {
            (None, Some(Value::Bool(used))) => {
                implied.insert("schedule".into(), json!(if *used { "joint" } else { "alternate" }));
            }
            (Some(schedule), None) => {
                implied.insert("use-router-consistency-loss".into(), json!(schedule == "joint"));
            }
            _ => {}
        }
        if wrong.is_empty() { Ok(Self { given, implied, num_epochs }) } else { Err(ConfigError::Invalid(wrong)) }
    }
}

/// The options that have a value.
fn given(options: &impl serde::Serialize) -> Result<Options, ConfigError> {
    match serde_json::to_value(options).map_err(|e| ConfigError::NotText(e.to_string()))? {
        Value::Object(options) => Ok(options.into_iter().filter(|(_, value)| !value.is_null()).collect()),
        other => unreachable!("options serialise as a map, not as {other}"),
    }
}
