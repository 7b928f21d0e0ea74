//! Merges the options (flags win over the YAML file, the file over the defaults), and makes the recipe of the run.

use std::path::Path;

use super::{ConfigError, RawOptions, RunConfig, file, recipe, validate};
use crate::experts::{ExpertId, Method};
use crate::report::ExpertsFile;
use crate::train::{CountedReplies, Identify, Recipe, ScoreBy, Training};

/// Resolved options, with warnings.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The options of the run.
    pub config: RunConfig,
    /// One sentence for each option of the YAML file that has no effect in this run. (A flag without effect is an
    /// error: a file may serve several kinds of run, a command line serves one.)
    pub warnings: Vec<String>,
}

/// Resolves the options of a run: flags win over the YAML file, the file over the defaults. Validates the result.
///
/// # Errors
/// Every variant of [`ConfigError`].
pub fn resolve(file: Option<&Path>, flags: &RawOptions) -> Result<Resolved, ConfigError> {
    resolve_matrix(file, flags, |config| vec![config.clone()])
}

/// [`resolve()`] for the base configuration of several runs: a flag is refused for having no effect only if it has none
/// in any of the runs.
///
/// # Errors
/// As [`resolve()`].
pub fn resolve_matrix(
    file: Option<&Path>,
    flags: &RawOptions,
    runs: impl FnOnce(&RunConfig) -> Vec<RunConfig>,
) -> Result<Resolved, ConfigError> {
    let file = file.map(file::read).transpose()?.unwrap_or_default();
    let mut given = flags.clone().or(implied(flags)?).or(file.clone()).or(implied(&file)?);
    if given.num_epochs.is_some() {
        given.num_rounds.get_or_insert(1);
    }
    let mut config = given.fill(RunConfig::default());
    if !recipe::asks_for_router_phase(&config)
        && flags.router_epochs_per_round.or(file.router_epochs_per_round).is_none()
    {
        // `--num-epochs` sets the epochs of the router phase only in a run that has one
        config.router_epochs_per_round = RunConfig::default().router_epochs_per_round;
    }

    for (option, empty) in
        [("--model-name", config.model_name.is_empty()), ("--dataset-path", config.dataset_path.as_os_str().is_empty())]
    {
        if empty {
            return Err(ConfigError::Missing(option));
        }
    }
    config.to_yaml()?; // fails on paths that config.resolved.yaml cannot hold
    let mut wrong = validate::problems(&config);
    let mut warnings = Vec::new();
    let mut inert = validate::options_without_effect(&config);
    for run in runs(&config) {
        let in_run = validate::options_without_effect(&run);
        inert.retain(|(option, _)| in_run.iter().any(|(other, _)| other == option));
    }
    for (option, why) in inert {
        if flags.is_given(option) {
            wrong.push(format!("--{option} would do nothing: {why}; leave it out"));
        } else if file.is_given(option) {
            warnings.push(format!("`{option}` of the options file does nothing in this run: {why}"));
        }
    }
    if !wrong.is_empty() {
        return Err(ConfigError::Invalid(wrong));
    }
    Ok(Resolved { config, warnings })
}

impl RunConfig {
    /// The experts of `--experts`, where the method selects them.
    fn given_experts(&self) -> Result<Vec<ExpertId>, ConfigError> {
        match &self.experts {
            Some(path) if self.method == Method::Given => Ok(ExpertsFile::read(path)?.experts),
            _ => Ok(Vec::new()),
        }
    }

    /// What a run with these options does.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], with every contradiction between the options; [`ConfigError::Experts`].
    pub fn recipe(&self) -> Result<Recipe, ConfigError> {
        match validate::problems(self) {
            problems if problems.is_empty() => Ok(recipe::recipe_of(self, self.given_experts()?)),
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
        let (tokens, threshold) = (self.routing_tokens, self.risk_threshold);
        let by = ScoreBy::Routing { tokens, threshold, replies: CountedReplies::Targets };
        Ok(Recipe { identify: Identify { by, bootstrap: 0, ..recipe.identify }, ..recipe })
    }
}

/// The options that those of one source imply. They win over the sources below it.
fn implied(given: &RawOptions) -> Result<RawOptions, ConfigError> {
    let mut implied = RawOptions::default();
    let mut wrong = Vec::new();
    for (shorthand, epochs) in [("epochs-per-round", given.epochs_per_round), ("num-epochs", given.num_epochs)] {
        let Some(epochs) = epochs else { continue };
        for (option, given, implied) in [
            ("expert-epochs-per-round", given.expert_epochs_per_round, &mut implied.expert_epochs_per_round),
            ("router-epochs-per-round", given.router_epochs_per_round, &mut implied.router_epochs_per_round),
        ] {
            match given.or(*implied) {
                Some(other) if other != epochs => wrong
                    .push(format!("`{shorthand}` is {epochs} and sets `{option}`, which is {other}: leave one out")),
                _ => *implied = Some(epochs),
            }
        }
    }
    recipe::imply(given, &mut implied);
    if wrong.is_empty() { Ok(implied) } else { Err(ConfigError::Invalid(wrong)) }
}
