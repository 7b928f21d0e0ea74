//! Which options decide the results of a run.

use std::path::PathBuf;

use super::{ConfigError, Device, RunConfig, Transport};
use crate::train::Recompute;

impl RunConfig {
    /// The options that decide results, as YAML; all others are set to fixed values. An option that is not named here counts
    /// as decisive: a run that resumes a checkpoint, and all ranks of a run, must have the same text.
    ///
    /// # Errors
    /// As [`Self::to_yaml`].
    pub fn result_options_yaml(&self) -> Result<String, ConfigError> {
        let default = RunConfig::default();
        let config = RunConfig {
            overwrite: false,
            resume: false,
            output_dir: PathBuf::new(),
            experts: None, // the experts that it lists count, with the other inputs
            threads: 0,
            ranks: None,
            device: Device::Auto,
            transport: Transport::Auto,
            profile: false,
            recompute: Recompute::Auto,
            force: false,
            logging_steps: 1,
            save_steps: default.save_steps,
            keep_checkpoints: default.keep_checkpoints,
            check_replicas: default.check_replicas,
            timeout: default.timeout,
            ..self.clone()
        };
        config.to_yaml()
    }
}
