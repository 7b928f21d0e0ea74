//! The files of a model, opened: what the sessions of one model have in common.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::config::{Init, RunConfig};
use crate::exit::Result;
use crate::launch::hub_cache;
use crate::model::{Checkpoint, ModelConfig, ParamTable, RandomInit, left_over_quantization};
use crate::quote::quote;
use crate::ui::Ui;

/// An opened model. Clones share its memory-mapped weights, and what was found by reading all of them.
#[derive(Clone)]
pub struct Base {
    /// Its folder.
    pub dir: PathBuf,
    /// Its shape and family.
    pub model: ModelConfig,
    /// Its weights; `None`: they are random.
    pub checkpoint: Option<Arc<Checkpoint>>,
    /// Its parameters.
    pub table: ParamTable,
}

impl Base {
    /// Opens the model of a run, and says what lies in its folder besides.
    ///
    /// # Errors
    /// A model that cannot be found, or whose files violate a format or contradict each other.
    pub fn open(config: &RunConfig, ui: &Ui) -> Result<Self> {
        let dir = hub_cache().resolve(&config.model_name)?;
        let model = ModelConfig::from_dir(&dir)?;
        model.check_length(config.max_length)?;
        let (checkpoint, table) = match config.init {
            Init::Checkpoint => {
                let checkpoint = Checkpoint::open(&dir)?;
                let table = ParamTable::build(&model, &checkpoint)?;
                warn_of_leftovers(&dir, &checkpoint, ui);
                (Some(Arc::new(checkpoint)), table)
            }
            Init::Random => (None, ParamTable::random(&model, RandomInit::from_dir(&dir, config.seed)?)),
        };
        Ok(Self { dir, model, checkpoint, table })
    }

    /// Whether it is the model that [`Self::open`] would open for this run.
    pub fn is_of(&self, config: &RunConfig) -> bool {
        let same_weights = match (config.init, &self.table.random) {
            (Init::Checkpoint, None) => true,
            (Init::Random, Some(random)) => random.seed == config.seed,
            _ => false,
        };
        same_weights && hub_cache().resolve(&config.model_name).is_ok_and(|dir| dir == self.dir)
    }
}

/// Says what lies in the model's folder besides the model.
fn warn_of_leftovers(dir: &Path, checkpoint: &Checkpoint, ui: &Ui) {
    if let Some(message) = left_over_quantization(dir) {
        ui.warn(message);
    }
    let unread = checkpoint.unread_files();
    if let Some(first) = unread.first() {
        let more = if unread.len() > 1 { format!(" and {} more", unread.len() - 1) } else { String::new() };
        ui.line(format_args!(
            "{}{more}: in the model's folder, but not part of the model; neither read nor exported",
            quote(first)
        ));
    }
}
