//! `quickstart`: generates a tiny model, a tokenizer and rows, and runs a complete training on them.

mod sample;

use std::path::{Path, PathBuf};

use super::train::{TrainSummary, train};
use crate::config::{Device, QuickstartArgs, RunConfig, SaveRounds};
use crate::exit::{self, Context, Ended, Failure, Result, Stopped};
use crate::launch::{Existing, Started, prepare_dir};
use crate::model::tiny::{TinySpec, write_random_checkpoint};
use crate::model::{Checkpoint, WeightsError};
use crate::ui::Ui;

/// Rows of the embedding, and the maximum vocabulary of the tokenizer.
const VOCAB_SIZE: usize = 512;

/// Writes a tiny model, a tokenizer and rows to the output folder, trains on them, and prints a summary.
///
/// # Errors
/// An output folder that is not empty or not writable; the errors of [`train`].
pub fn quickstart(args: &QuickstartArgs, ui: &Ui) -> Result<()> {
    // Other files there are kept; `train` checks the folder of the run.
    prepare_dir(&args.output_dir, if args.overwrite { Existing::Keep } else { Existing::Refuse })?;
    let (model, rows) = (args.output_dir.join("model"), args.output_dir.join("rows.json"));
    ui.line("making a tiny model with random weights, a tokenizer and 24 harmless rows");
    sample::write_rows(&rows)?;
    let spec = TinySpec {
        vocab_size: VOCAB_SIZE,
        hidden_size: 64,
        num_layers: 4,
        num_kv_heads: 4,
        head_dim: 16,
        num_experts: 16,
        expert_width: 32,
        ..TinySpec::new("olmoe")
    };
    write_random_checkpoint(&model, &spec)?;
    sample::write_tokenizer(&model, VOCAB_SIZE)?;

    let config = config(&args.output_dir, &model, rows, args.overwrite)?;
    let summary = match train(&config, &Started::single(), ui)? {
        Ended::Done(summary) => summary,
        // Nothing sets its stop flag.
        Ended::Stopped(Stopped::Saved(message) | Stopped::Lost(message)) => {
            return Err(Failure::new(exit::INTERNAL, message));
        }
    };
    let diff = Diff::of(&model, &config.output_dir.join("final_model")).context("comparing the two models")?;
    ui.result(describe(&config, &summary, &diff));
    Ok(())
}

/// One round, at learning rates far above those for real models: the weights are random, and there are few steps.
fn config(dir: &Path, model: &Path, rows: PathBuf, overwrite: bool) -> Result<RunConfig> {
    let model = model.to_str().ok_or_else(|| {
        Failure::new(exit::CONFIG, format!("{}: the path is not UTF-8; give another --output-dir", dir.display()))
    })?;
    Ok(RunConfig {
        model_name: model.into(),
        dataset_path: rows,
        output_dir: dir.join("run"),
        overwrite,
        save_rounds: SaveRounds::Delta,
        device: Device::Cpu,
        top_k_experts: 8,
        num_rounds: 1,
        expert_epochs_per_round: 4,
        router_epochs_per_round: 4,
        expert_lr: 1e-2,
        router_lr: 2e-3,
        logging_steps: 4,
        ..RunConfig::default()
    })
}

/// A bitwise comparison of the tensors of two model folders.
#[derive(Debug, PartialEq, Eq)]
struct Diff {
    tensors: usize,
    /// Names of the tensors whose bits differ.
    changed: Vec<String>,
}

impl Diff {
    fn of(source: &Path, trained: &Path) -> Result<Self, WeightsError> {
        let (source, trained) = (Checkpoint::open(source)?, Checkpoint::open(trained)?);
        let mut diff = Diff { tensors: 0, changed: Vec::new() };
        for (shard, tensor) in source.tensors() {
            diff.tensors += 1;
            let same = trained.shard_of(&tensor.name).zip(trained.get(&tensor.name)).is_some_and(|(n, (_, other))| {
                shard.bytes()[tensor.file_range.clone()] == trained.shards()[n].bytes()[other.file_range.clone()]
            });
            if !same {
                diff.changed.push(tensor.name.clone());
            }
        }
        Ok(diff)
    }
}

/// The summary in text.
fn describe(config: &RunConfig, summary: &TrainSummary, diff: &Diff) -> String {
    let experts: Vec<_> = summary.selected.iter().map(|id| format!("{}.{}", id.layer, id.expert)).collect();
    let of_experts = diff.changed.iter().filter(|name| name.contains(".experts.")).count();
    let of_routers = diff.changed.iter().filter(|name| name.ends_with("mlp.gate.weight")).count();
    let others = diff.changed.len() - of_experts - of_routers;
    let fall = |before: Option<f64>, after: Option<f64>, digits: usize| match before.zip(after) {
        Some((before, after)) => format!("{before:.digits$} before, {after:.digits$} after"),
        None => "not measured".into(),
    };
    let (before, after) = (summary.before, summary.after);
    let [model, rows, run] =
        [Path::new(&config.model_name), &config.dataset_path, &config.output_dir].map(Path::display);
    let real = "allenai/OLMoE-1B-7B-0125-Instruct";
    format!(
        "
What happened, in {seconds:.1} s
  1. Identify: gradients of the refusals scored all 64 experts; the 8 highest (layer.expert): {experts}
  2. Train: only these experts learnt to refuse. Loss of the refusals: {ce}
  3. Align: only the routers learnt to route disguised prompts like bare ones. Divergence: {kl}
  4. Export: of {tensors} tensors {kept} have the same bits as before. Changed: {of_experts} of the chosen experts, \
         {of_routers} of the routers, {others} others

The model is tiny and its weights are random: these numbers show that the machinery works, and nothing about safety.

Where things lie
  {model}  the model that went in
  {rows}  the rows: 12 requests in two disguises each
  {run}/final_model  the trained model, a complete Hugging Face folder
  {run}/round_1/delta.safetensors  the changed tensors alone
  {run}/expert_scores.json  scores of all experts, and the selection
  {run}/metrics.jsonl  every step
  {run}/config.resolved.yaml  every option of this run; `--config` takes it

Next, on a real model (rows.jsonl holds your attack rows, see README.md; `cargo install --path .` installs moewarden)
  hf download {real}
  moewarden check --model-name {real} --dataset-path rows.jsonl
  moewarden train --model-name {real} --dataset-path rows.jsonl --output-dir olmoe-run",
        seconds = summary.seconds,
        experts = experts.join(", "),
        ce = fall(before.ce_loss, after.ce_loss, 3),
        kl = fall(before.router_loss, after.router_loss, 5),
        tensors = diff.tensors,
        kept = diff.tensors - diff.changed.len(),
    )
}
