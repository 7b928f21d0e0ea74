//! The models of rounds that a resumed run finds.

use std::path::Path;

use super::session::Session;
use crate::checkpoint::load_delta;
use crate::config::{RunConfig, SaveRounds};
use crate::model::Checkpoint;
use crate::ui::Ui;

/// Whether the model of a finished round, which belongs into `dir`, is missing or damaged.
pub(super) fn lacks(session: &Session, config: &RunConfig, dir: &Path) -> bool {
    match (&session.checkpoint, config.save_rounds) {
        (None, _) | (_, SaveRounds::None) => false,
        (_, SaveRounds::Full) => !dir.join("config.json").is_file() || Checkpoint::open(dir).is_err(),
        (Some(base), SaveRounds::Delta) => load_delta(base, &session.table, &dir.join("delta.safetensors")).is_err(),
    }
}

/// Says that the model of a round is lost.
pub(super) fn warn_of_lost(dir: &Path, ui: &Ui) {
    ui.warn(format_args!(
        "{} is missing or damaged, and no checkpoint holds the weights of that round: it stays so",
        dir.display()
    ));
}
