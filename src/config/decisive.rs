//! Which options decide the results of a run.

use std::path::PathBuf;

use super::{ConfigError, Device, Offload, RawOptions, RoutingReplies, RunConfig, Transport, file};
use crate::train::Recompute;

impl RunConfig {
    /// The options that decide results, as YAML; all others are set to fixed values. An option that is not named here counts
    /// as decisive: a run that resumes a checkpoint, and all ranks of a run, must have the same text. Of an input it says only
    /// that there is one: its content counts, wherever it lies.
    ///
    /// # Errors
    /// As [`Self::to_yaml`].
    pub fn result_options_yaml(&self) -> Result<String, ConfigError> {
        self.deciding().to_yaml()
    }

    /// The options that decide results; all others have fixed values.
    pub fn deciding(&self) -> Self {
        let default = RunConfig::default();
        let some = |path: &Option<PathBuf>| path.as_ref().map(|_| PathBuf::from("by content"));
        let traces = self.routing_replies.path().map(|_| RoutingReplies::File("by content".into()));
        RunConfig {
            model_name: String::new(),
            dataset_path: PathBuf::new(),
            eval_dataset_path: some(&self.eval_dataset_path),
            retain_dataset_path: some(&self.retain_dataset_path),
            chat_template: some(&self.chat_template),
            routing_replies: traces.unwrap_or_else(|| self.routing_replies.clone()),
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
            offload: Offload::Auto,
            shard_frozen: false,
            force: false,
            logging_steps: 1,
            log: None,
            save_steps: default.save_steps,
            keep_checkpoints: default.keep_checkpoints,
            check_replicas: default.check_replicas,
            timeout: default.timeout,
            ..self.clone()
        }
    }

    /// [`Self::result_options_yaml`] of options that another version may have written: what it did not know has its default.
    /// Text that this version does not understand is returned as it is.
    pub fn comparable_options(yaml: &str) -> String {
        let options: Option<RawOptions> = file::parse(yaml).ok().map(|options| options.run);
        let config = options.map(|given| given.fill(RunConfig::default()));
        config.and_then(|config| config.result_options_yaml().ok()).unwrap_or_else(|| yaml.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_do_not_decide_but_whether_there_is_a_file_does() {
        let run = |model: &str, retain: Option<&str>| RunConfig {
            model_name: model.into(),
            dataset_path: format!("{model}.jsonl").into(),
            retain_dataset_path: retain.map(PathBuf::from),
            ..RunConfig::default()
        };
        let text = |config: &RunConfig| config.result_options_yaml().unwrap();
        assert_eq!(text(&run("old", Some("a"))), text(&run("new", Some("b"))));
        assert_ne!(text(&run("old", None)), text(&run("old", Some("a"))));
        let seed = RunConfig { seed: 7, ..run("old", None) };
        assert_ne!(text(&seed), text(&run("old", None)));
        // An earlier version wrote paths, and did not know all options.
        let earlier = seed.to_yaml().unwrap();
        let earlier: Vec<_> = earlier.lines().filter(|line| !line.starts_with("chat-template-kwargs")).collect();
        assert_eq!(
            RunConfig::comparable_options(&earlier.join("\n")),
            text(&RunConfig { seed: 7, ..run("new", None) })
        );
        assert_eq!(RunConfig::comparable_options("unknown: 1"), "unknown: 1");
    }
}
