//! The checkpoints that a run writes, and the one that it resumes.

use crate::checkpoint::{Identity, Snapshot, SnapshotStore, State};
use crate::config::RunConfig;
use crate::exit::Result;
use crate::launch::Rank;
use crate::run::outputs::OutputState;
use crate::run::session::Session;
use crate::train::Recipe;

/// The checkpoints in the output folder of a run.
pub(super) fn store<'a>(session: &'a Session, config: &'a RunConfig) -> Result<SnapshotStore<'a>> {
    Ok(SnapshotStore {
        folder: config.output_dir.join("checkpoints"),
        keep: config.keep_checkpoints,
        identity: Identity {
            options: config.result_options_yaml()?,
            comparable: RunConfig::comparable_options,
            inputs: Box::new(move || session.fingerprint(config)),
            named_inputs: Box::new(move || session.named_inputs(config)),
            earlier_inputs: Box::new(move || session.earlier_fingerprint(config)),
            model: &session.dir,
        },
        base: session.checkpoint.as_deref(),
        table: &session.table,
    })
}

/// The checkpoint that the run resumes; `None`: it starts from the beginning.
pub(super) fn newest(
    store: &SnapshotStore<'_>,
    session: &Session,
    config: &RunConfig,
    recipe: &Recipe,
    rank: &Rank,
) -> Result<Option<Snapshot<OutputState>>> {
    let ui = &rank.ui;
    let snapshot: Option<Snapshot<OutputState>> = match config.resume {
        true => store.agree_on_newest(
            &*rank.world,
            |state: &State<OutputState>| state.outputs.fits(session, recipe, state.position),
            |folder, failure| ui.warn(format_args!("checkpoint {} is skipped: {failure}", folder.display())),
        )?,
        false => None,
    };
    if config.resume && snapshot.is_none() {
        ui.line("no checkpoint: starting from the beginning");
    }
    Ok(snapshot)
}

/// Finds the checkpoint that a run with `--resume` would go on from, for `check`.
///
/// # Errors
/// Those of the run: checkpoints that are damaged, or of other options or inputs.
pub fn check(session: &Session, config: &RunConfig, recipe: &Recipe, rank: &Rank) -> Result<()> {
    if let Some(snapshot) = newest(&store(session, config)?, session, config, recipe, rank)? {
        rank.ui.result(format_args!("the run resumes from {}", snapshot.folder().display()));
    }
    Ok(())
}
