//! Merges the options: flags win over the YAML file, the file over the defaults.

use std::path::Path;

use super::{ConfigError, RawOptions, RunConfig, Schedule, file, validate};

/// Resolved options, with warnings.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolved {
    /// The options of the run.
    pub config: RunConfig,
    /// One sentence for each option of the YAML file that has no effect in this run. (A flag without effect is an error:
    /// a file may serve several kinds of run, a command line serves one.)
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
    if !config.has_router_phase() && flags.router_epochs_per_round.or(file.router_epochs_per_round).is_none() {
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
    let mut inert = validate::inert(&config);
    for run in runs(&config) {
        let in_run = validate::inert(&run);
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
    // The joint schedule and the consistency loss are two names of one thing: if a source gives one, the other follows.
    match (given.schedule, given.use_router_consistency_loss) {
        (None, Some(used)) => implied.schedule = Some(if used { Schedule::Joint } else { Schedule::Alternate }),
        (Some(schedule), None) => implied.use_router_consistency_loss = Some(schedule == Schedule::Joint),
        _ => {}
    }
    if wrong.is_empty() { Ok(implied) } else { Err(ConfigError::Invalid(wrong)) }
}
