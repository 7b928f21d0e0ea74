//! Merges the options (flags win over the YAML file, the file over the defaults), and makes the recipe of the run.

use std::collections::BTreeSet;
use std::path::Path;

use super::{CompareArgs, ConfigError, RawOptions, RunConfig, Variant, file, recipe, validate};
use crate::experts::{ExpertId, IdentifyIn, Method};
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
    let file = file.map(file::read).transpose()?.unwrap_or_default();
    let (config, _) = merge(&file.run, flags)?;
    let mut resolved = check(config.clone(), flags, &file.run, &[config])?;
    let only = |option| format!("`{option}` of the options file does nothing in this run: only `compare` uses it");
    resolved.warnings.extend(file.of_compare.iter().map(only));
    Ok(resolved)
}

/// [`resolve()`] for `compare`: the base configuration of its runs, and its own options. A flag is refused for having no effect
/// only if it has none in any of the runs.
///
/// # Errors
/// As [`resolve()`].
pub fn resolve_compare(
    file: Option<&Path>,
    flags: &RawOptions,
    own_flags: &CompareArgs,
) -> Result<(Resolved, CompareArgs), ConfigError> {
    let file = file.map(file::read).transpose()?.unwrap_or_default();
    let args = own_flags.clone().or(file.compare.clone()).with_defaults();
    let (mut config, given) = merge(&file.run, flags)?;
    if let Some(too_many) = args.too_many() {
        return Err(ConfigError::Invalid(vec![too_many]));
    }
    let mut variants = args.variants(&config);
    let unequal = |variants: &[Variant]| {
        let selecting = variants.iter().filter(|variant| variant.method().is_some());
        selecting.filter_map(|variant| args.why_unequal(&variant.config)).collect::<BTreeSet<&str>>()
    };
    if given.identify.is_none() && !unequal(&variants).is_empty() {
        config.identify = IdentifyIn::Once; // so that every method trains equally many parameters
        variants = args.variants(&config);
    }
    let runs: Vec<RunConfig> = variants.iter().map(|variant| variant.config.clone()).collect();
    let mut resolved = check(config, flags, &file.run, &runs)?;
    let mut wrong = args.problems(&resolved.config);
    let decided = args.decided(&resolved.config);
    resolved.warnings.extend(refuse_inert(&decided, flags, &file.run, &mut wrong));
    if !own_flags.methods.is_empty() && variants.iter().all(|variant| variant.method().is_none()) {
        wrong.push(validate::would_do_nothing("methods", "no variant trains selected experts"));
    }
    wrong.extend(unequal(&variants).into_iter().map(str::to_owned));
    wrong.extend(args.inert_sweeps(&variants));
    for variant in &variants {
        if variants.iter().filter(|other| other.name == variant.name).count() > 1 {
            wrong.push(format!(
                "two variants would have the folder {}: letters, digits and . _ + - alone tell values apart; sweep other values",
                variant.name
            ));
        }
        if variant.has_long_name() {
            wrong.push(format!(
                "{}: this name of a variant is too long for a folder: sweep fewer options at once",
                variant.name
            ));
        }
        // What is wrong in the base configuration has been said.
        wrong.extend(
            validate::problems(&variant.config).into_iter().map(|problem| format!("{}: {problem}", variant.name)),
        );
    }
    if !wrong.is_empty() {
        return Err(ConfigError::Invalid(wrong));
    }
    Ok((resolved, args))
}

/// The configuration of these options over the defaults, and the options that are given or implied.
fn merge(file: &RawOptions, flags: &RawOptions) -> Result<(RunConfig, RawOptions), ConfigError> {
    let mut given = flags.clone().or(implied(flags)?).or(file.clone()).or(implied(file)?);
    if given.num_epochs.is_some() {
        given.num_rounds.get_or_insert(1);
    }
    let mut config = given.clone().fill(RunConfig::default());
    if !recipe::asks_for_router_phase(&config)
        && flags.router_epochs_per_round.or(file.router_epochs_per_round).is_none()
    {
        // `--num-epochs` sets the epochs of the router phase only in a run that has one
        config.router_epochs_per_round = RunConfig::default().router_epochs_per_round;
    }
    Ok((config, given))
}

/// Validates a configuration, which is the base of these runs.
fn check(
    config: RunConfig,
    flags: &RawOptions,
    file: &RawOptions,
    runs: &[RunConfig],
) -> Result<Resolved, ConfigError> {
    for (option, empty) in
        [("--model-name", config.model_name.is_empty()), ("--dataset-path", config.dataset_path.as_os_str().is_empty())]
    {
        if empty {
            return Err(ConfigError::Missing(option));
        }
    }
    config.to_yaml()?; // fails on paths that config.resolved.yaml cannot hold
    let mut wrong = validate::problems(&config);
    let mut inert = validate::options_without_effect(&config);
    for run in runs {
        let in_run = validate::options_without_effect(run);
        inert.retain(|(option, _)| in_run.iter().any(|(other, _)| other == option));
    }
    let warnings = refuse_inert(&inert, flags, file, &mut wrong);
    if !wrong.is_empty() {
        return Err(ConfigError::Invalid(wrong));
    }
    Ok(Resolved { config, warnings })
}

/// Refuses those of these options without effect that are flags, and returns a warning for each that is in the file.
fn refuse_inert(
    inert: &[(&str, &'static str)],
    flags: &RawOptions,
    file: &RawOptions,
    wrong: &mut Vec<String>,
) -> Vec<String> {
    let mut warnings = Vec::new();
    for (option, why) in inert {
        if flags.is_given(option) {
            wrong.push(validate::would_do_nothing(option, why));
        } else if file.is_given(option) {
            warnings.push(format!("`{option}` of the options file does nothing in this run: {why}"));
        }
    }
    warnings
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
