//! The models of rounds: written, and found again by a resumed run.

use std::path::{Path, PathBuf};

use super::session::Session;
use crate::backend::Backend;
use crate::checkpoint::{export_replacing, is_export, load_delta, save_delta};
use crate::config::{RunConfig, SaveRounds};
use crate::exit::{self, Failure, Result};
use crate::model::{Checkpoint, ParamTable, hash_values};
use crate::train::Replica;
use crate::ui::Ui;

/// Writes the model of a round to `dir`, as `--save-rounds` says. Returns the hash of the weights of a complete model; a delta holds
/// its own.
///
/// # Errors
/// A write that fails.
pub(super) fn write<B: Backend>(
    session: &Session,
    config: &RunConfig,
    replica: &Replica<B>,
    dir: &Path,
) -> Result<Option<String>> {
    let Some(checkpoint) = &session.checkpoint else { return Ok(None) };
    match config.save_rounds {
        SaveRounds::None => Ok(None),
        SaveRounds::Delta => {
            save_delta(checkpoint, &session.table, &replica.changed(), &dir.join("delta.safetensors"))?;
            Ok(None)
        }
        SaveRounds::Full => {
            let changed = replica.changed();
            export_replacing(&session.dir, checkpoint, &session.table, &changed, dir)?;
            // Of what should be in the files, not of what is: the hash shows a write that went wrong, too.
            let mut hasher = blake3::Hasher::new();
            hash_values(
                session.table.params.iter().enumerate().map(|(id, spec)| changed.get(&id).unwrap_or(&spec.base)),
                &mut hasher,
            );
            Ok(Some(hasher.finalize().to_string()))
        }
    }
}

/// What a resumed run finds in place of the model of a finished round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// The model, or nothing was to be written.
    Whole,
    /// A complete model whose weights cannot be verified: the checkpoint is of a version that did not hash them.
    Unverified,
    /// The model's weights, beside other files than the source model has: one of the two has changed.
    OtherFiles,
    /// Nothing.
    Missing,
    /// A part, or other weights.
    Damaged,
}

/// Looks at the model of a finished round, which belongs into `dir`. `weights`: the hash of its weights, if it is known.
pub(super) fn find(session: &Session, config: &RunConfig, dir: &Path, weights: Option<&str>) -> Found {
    let whole = match (&session.checkpoint, config.save_rounds) {
        (None, _) | (_, SaveRounds::None) => true,
        (Some(base), SaveRounds::Delta) => load_delta(base, &session.table, &dir.join("delta.safetensors")).is_ok(),
        (Some(base), SaveRounds::Full) => {
            let is_export = is_export(&session.dir, base, dir);
            match weights.map(|weights| hash_of(session, dir).is_some_and(|found| found == weights)) {
                None if is_export => return Found::Unverified,
                Some(true) if !is_export => return Found::OtherFiles,
                same => same == Some(true),
            }
        }
    };
    match whole {
        true => Found::Whole,
        false if dir.exists() => Found::Damaged,
        false => Found::Missing,
    }
}

fn hash_of(session: &Session, dir: &Path) -> Option<String> {
    let checkpoint = Checkpoint::open(dir).ok()?;
    let table = ParamTable::build(&session.model, &checkpoint).ok()?;
    Some(table.hashed().finalize().to_string())
}

/// Says that the weights of a round's model were not verified.
pub(super) fn note_unverified(dir: &Path, ui: &Ui) {
    ui.line(format_args!(
        "{} is complete, but its weights are not verified: the run was begun by a version that did not hash them",
        dir.display()
    ));
}

/// Says that files beside the weights differ from those of the source model.
pub(super) fn warn_of_other_files(dir: &Path, source: &Path, ui: &Ui) {
    ui.warn(format_args!(
        "{} has the weights of its round, but not the files that {} has beside its weights: one of the two was changed. Copy them again",
        dir.display(),
        source.display()
    ));
}

/// Says that the model of an earlier round is not there.
pub(super) fn warn_of_missing(dir: &Path, ui: &Ui) {
    ui.warn(format_args!("{} is missing, and {LOST}", dir.display()));
}

/// Says that the model of an earlier round is damaged.
pub(super) fn warn_of_damaged(dir: &Path, ui: &Ui) {
    ui.warn(format_args!("{} is damaged, and {LOST}. The run goes on, and ends with an error", dir.display()));
}

/// Fails if the model of an earlier round is damaged: an exit code of 0 says that all that is there is right.
///
/// # Errors
/// Names the folders of the models.
pub(super) fn check_damaged(damaged: &[PathBuf]) -> Result<()> {
    if damaged.is_empty() {
        return Ok(());
    }
    let folders: Vec<String> = damaged.iter().map(|dir| dir.display().to_string()).collect();
    let message = format!(
        "the run is complete and its final model is right, but of the models of earlier rounds {} damaged, and {LOST}: {}. Mend what the \
         warnings name, or delete these folders, and --resume ends without this error; or run again in another folder",
        if folders.len() == 1 { "one is" } else { "some are" },
        folders.join(", ")
    );
    Err(Failure::new(exit::DATA, message))
}

const LOST: &str = "no checkpoint holds the weights of that round";
