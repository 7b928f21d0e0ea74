//! The models of rounds that a resumed run finds.

use std::path::Path;

use super::session::Session;
use crate::checkpoint::{is_export, load_delta};
use crate::config::{RunConfig, SaveRounds};
use crate::ui::Ui;

/// Whether the model of a finished round, which belongs into `dir`, is missing or damaged.
pub(super) fn lacks(session: &Session, config: &RunConfig, dir: &Path) -> bool {
    match (&session.checkpoint, config.save_rounds) {
        (None, _) | (_, SaveRounds::None) => false,
        (Some(base), SaveRounds::Full) => !is_export(&session.dir, base, dir),
        (Some(base), SaveRounds::Delta) => load_delta(base, &session.table, &dir.join("delta.safetensors")).is_err(),
    }
}

/// Says that the model of a round is lost.
pub(super) fn warn_of_lost(dir: &Path, ui: &Ui) {
    ui.warn(format_args!(
        "{} is missing or damaged, and no checkpoint holds the weights of that round: it stays so. Only a new run in another folder \
         writes it again",
        dir.display()
    ));
}
