//! `quickstart`: shows on a small model with known unsafe experts that the method finds them, that retraining them helps, and
//! that retraining as many random experts does not.

mod outcome;
mod planted;

use std::path::Path;

use outcome::Outcome;
use planted::Planted;

use super::report::{Run, loss_curves};
use super::train::{TrainSummary, train};
use crate::config::{Device, Precision, QuickstartArgs, RunConfig, SaveRounds};
use crate::exit::{self, Context, Ended, Failure, Result, Stopped};
use crate::experts::{ExpertId, Method};
use crate::files;
use crate::launch::{Existing, Started, prepare_dir};
use crate::model::{Checkpoint, WeightsError};
use crate::report::{Cells, Page, Table, heatmap_svg};
use crate::ui::Ui;

/// Writes the planted model and its rows to the output folder, trains the found experts and as many random ones, evaluates all
/// three models on requests that no training has seen, and prints and draws the results.
///
/// # Errors
/// An output folder that is not empty or not writable; the errors of [`train`] and of `eval`.
pub fn quickstart(args: &QuickstartArgs, ui: &Ui) -> Result<()> {
    let dir = &args.output_dir;
    // Other files there are kept; `train` and `eval` check their own folders.
    prepare_dir(dir, if args.overwrite { Existing::Keep } else { Existing::Refuse })?;
    let planted = Planted::unpack(dir)?;
    ui.line("a small OLMoE model with known unsafe experts, and its rows, are unpacked; training the experts that are found");
    let found = Trained::new(Method::Gradient, &dir.join("found"), &planted, args.overwrite, ui)?;
    ui.line("the control: training as many random experts");
    let random = Trained::new(Method::Random, &dir.join("random"), &planted, args.overwrite, &Ui::silent())?;

    ui.line("evaluating the three models on requests that none of them has seen");
    let evaluated = |name, part: &str, model: &Path, trained: Option<&[ExpertId]>| {
        Outcome::of(name, model, trained, &planted, &dir.join("evaluations").join(part), args.overwrite)
    };
    let outcomes = [
        evaluated("before", "before", &planted.model, None)?,
        evaluated("found experts retrained", "found", &found.model(), Some(&found.summary.selected))?,
        evaluated("random experts retrained", "random", &random.model(), Some(&random.summary.selected))?,
    ];
    let diff = Diff::of(&planted.model, &found.model()).context("comparing the two models")?;
    let table = outcome::table(&outcomes);
    let page = dir.join("quickstart.html");
    write_page(&page, [&found, &random], &outcomes, &table, &planted)?;
    ui.result(describe(dir, &found, &planted, &diff, &table));
    Ok(())
}

/// A finished training run.
struct Trained {
    config: RunConfig,
    summary: TrainSummary,
}

impl Trained {
    /// Trains the experts that `method` selects.
    fn new(method: Method, dir: &Path, planted: &Planted, overwrite: bool, ui: &Ui) -> Result<Self> {
        let model = planted.model.to_str().ok_or_else(|| {
            Failure::new(exit::CONFIG, format!("{}: the path is not UTF-8; give another --output-dir", dir.display()))
        })?;
        let config = RunConfig {
            model_name: model.into(),
            dataset_path: planted.train.clone(),
            output_dir: dir.to_owned(),
            overwrite,
            save_rounds: SaveRounds::Delta,
            device: Device::Cpu,
            // The same numbers on every processor, those of the README.
            precision: Precision::F32,
            method,
            top_k_experts: planted.experts.len(),
            num_rounds: 1,
            expert_epochs_per_round: 3,
            skip_router_training: true,
            expert_lr: 1e-4,
            logging_steps: 16,
            ..RunConfig::default()
        };
        match train(&config, &Started::single(), ui)? {
            Ended::Done(summary) => Ok(Self { config, summary }),
            // Nothing sets its stop flag.
            Ended::Stopped(Stopped::Saved(message) | Stopped::Lost(message)) => {
                Err(Failure::new(exit::INTERNAL, message))
            }
        }
    }

    /// The folder of the trained model.
    fn model(&self) -> std::path::PathBuf {
        self.config.output_dir.join("final_model")
    }
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

/// A page with the outcomes, the scores of all experts, and the losses during training.
fn write_page(
    path: &Path,
    [found, random]: [&Trained; 2],
    outcomes: &[Outcome],
    table: &Table,
    planted: &Planted,
) -> Result<()> {
    let mut page = Page::new("moewarden quickstart");
    page.text(
        "A small OLMoE model in which six experts were trained to answer disguised requests for things that the model refuses \
         when it is asked plainly. moewarden finds these experts by their gradients and retrains them alone. The control \
         retrains as many random experts in the same way.",
    );
    page.section("Outcomes");
    page.svg(&outcome::chart(outcomes));
    page.table(table);
    page.section("Scores of all experts");
    page.text(&format!("Planted experts (layer.expert): {}.", names(&planted.experts)));
    let read = |trained: &Trained, name: &str| Run::read(&trained.config.output_dir, name.into());
    let runs = [read(found, "found experts")?, read(random, "random experts")?];
    if let Some(file) = &runs[0].scores
        && let (Some(scores), Some(round)) = (file.scores(1), file.rounds.get(&1))
    {
        let title = "Mean absolute gradient of each expert, the selected ones framed";
        page.svg(&heatmap_svg("scores", title, Cells::Scores, &scores, &round.selected, &round.inclusion));
    }
    page.section("Losses during training");
    loss_curves(&runs).for_each(|svg| page.svg(&svg));
    Ok(files::write(path, page.finish())?)
}

/// `0.10, 2.7`: layer and expert.
fn names(experts: &[ExpertId]) -> String {
    experts.iter().map(|id| format!("{}.{}", id.layer, id.expert)).collect::<Vec<_>>().join(", ")
}

/// The summary in text.
fn describe(dir: &Path, found: &Trained, planted: &Planted, diff: &Diff, table: &Table) -> String {
    let of_experts = diff.changed.iter().filter(|name| name.contains(".experts.")).count();
    let others = diff.changed.len() - of_experts;
    let real = "allenai/OLMoE-1B-7B-0125-Instruct";
    let dir = dir.display();
    format!(
        "
What happened
  1. Identify: gradients of the refusals scored all experts. {right} of the {of} with the highest scores (layer.expert: \
         {experts}) are among the {of} that were planted
  2. Train: only these {of} learnt to refuse, in {seconds:.1} s. Of {tensors} tensors {kept} have the same bits as before. \
         Changed: {of_experts} of the selected experts, {others} others
  3. Control: the same training of {of} random experts

{table}
The model is small and its unsafe experts were put there: this shows that the method works where compliance sits in a few
experts. Whether it does in your model is for `moewarden ablate` to say.

Files
  {dir}/quickstart.html  these results with pictures, for a browser
  {dir}/model  the model before training, a complete Hugging Face folder
  {dir}/rows  rows to train on, and held-out ones
  {dir}/found/final_model  the trained model
  {dir}/found/expert_scores.json  scores of all experts, and the selection
  {dir}/found/config.resolved.yaml  every option of this run; `--config` takes it

Do these experts cause the compliance? Switch them off in the model before training, beside 100 random sets
  moewarden ablate --model-name {dir}/model --dataset-path {dir}/rows/train.jsonl --benign-dataset-path {dir}/rows/benign.jsonl \
    --experts {dir}/found/expert_scores.json --output-dir {dir}/ablation

Next, on a real model (rows.jsonl holds your attack rows, see README.md; `cargo install --path .` installs moewarden)
  moewarden check --model-name {real} --dataset-path rows.jsonl --download
  moewarden train --model-name {real} --dataset-path rows.jsonl --output-dir olmoe-run",
        right = planted.found(&found.summary.selected),
        of = planted.experts.len(),
        experts = names(&found.summary.selected),
        seconds = found.summary.seconds,
        tensors = diff.tensors,
        kept = diff.tensors - diff.changed.len(),
        table = table.to_text(),
    )
}
