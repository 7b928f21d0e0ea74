//! Opening what a run reads: model, tokenizer, data. Everything is checked here, before anything is written.

use std::path::PathBuf;
use std::sync::Arc;

use super::engine::Engine;
use super::memory::{Activations, free_memory, human, human_count};
use crate::backend::Backend;
use crate::collective::{Collective, threads};
use crate::config::{RunConfig, Schedule, hub_cache};
use crate::data::{ChatTokenizer, DataOptions, Dataset};
use crate::exit::{self, Context, Failure, Result};
use crate::experts::Method;
use crate::model::{Checkpoint, Model, ModelConfig, ParamTable};
use crate::ui::Ui;

/// What a run reads.
pub struct Session {
    /// The model's folder.
    pub dir: PathBuf,
    /// Its shape and family.
    pub model: ModelConfig,
    /// Its weights, memory-mapped.
    pub checkpoint: Checkpoint,
    /// Its parameters.
    pub table: ParamTable,
    /// Its tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// The rows to find and train with.
    pub data: Dataset,
    /// Rows that are only measured.
    pub held_out: Option<Dataset>,
}

impl Session {
    /// Opens and checks everything that `config` names, and reports what the data hold.
    ///
    /// # Errors
    /// Those of [`Self::open_any`]; data without an unsafe row.
    pub fn open(config: &RunConfig, ui: &Ui) -> Result<Self> {
        let session = Self::open_any(config, ui)?;
        if session.data.records.iter().all(|r| r.unsafe_reply.is_none()) {
            return Err(Failure::new(
                exit::DATA,
                format!(
                    "{} holds no unsafe row: experts are found on unsafe prompts; label some rows unsafe",
                    config.dataset_path.display()
                ),
            ));
        }
        Ok(session)
    }

    /// The same for data that may hold safe rows alone.
    ///
    /// # Errors
    /// Those of the model's files, the tokenizer, and the data; options that contradict the model.
    pub fn open_any(config: &RunConfig, ui: &Ui) -> Result<Self> {
        let dir = hub_cache().resolve(&config.model_name)?;
        let model = ModelConfig::from_dir(&dir)?;
        model.check_length(config.max_length)?;
        let checkpoint = Checkpoint::open(&dir)?;
        let table = ParamTable::build(&model, &checkpoint)?;
        check_selection(config, &model)?;
        let tokenizer = ChatTokenizer::open(&dir, config.chat_template.as_deref())?;
        tokenizer.check_vocab(model.vocab_size)?;
        let options = data_options(config);
        let data = Dataset::read(&config.dataset_path, &tokenizer, &options)?;
        ui.line(&data.report);
        let padding = data.report.padding(config.batch_size);
        ui.line(format_args!("  padding left out: {} tokens ({:.0} %)", padding.avoided, 100.0 * padding.share()));
        let held_out = match &config.eval_dataset_path {
            None => None,
            Some(path) => {
                let held_out = Dataset::read(path, &tokenizer, &options).context("reading the held-out data")?;
                let shared = held_out.shared_requests(&data);
                if shared > 0 {
                    ui.warn(format_args!(
                        "{shared} of {} held-out rows of {} ask what rows of {} ask: what is measured on them is no \
                         measure of unseen requests",
                        held_out.records.len(),
                        path.display(),
                        config.dataset_path.display()
                    ));
                }
                Some(held_out)
            }
        };
        Ok(Self { dir, model, checkpoint, table, tokenizer, data, held_out })
    }

    /// Refuses data without the safe side that a phase of the run compares with, before an earlier phase has run for hours.
    ///
    /// # Errors
    /// The phase, and how to do without it.
    pub fn check_sides(&self, config: &RunConfig) -> Result<()> {
        let (prompts, replies) = (self.data.has_both_prompts(), self.data.has_both_replies());
        let needs = [
            (config.has_router_phase() && !prompts, "router alignment needs safe prompts", "--skip-router-training"),
            (
                config.schedule == Schedule::Joint && !replies,
                "the joint schedule needs safe examples",
                "--schedule alternate",
            ),
            (config.method == Method::Routing && !replies, "--method routing needs safe examples", "--method gradient"),
        ];
        match needs.into_iter().find(|(lacks, ..)| *lacks) {
            None => Ok(()),
            Some((_, what, instead)) => Err(Failure::new(
                exit::CONFIG,
                format!(
                    "{what}, and {} holds none: add rows with the label safe, or take {instead}",
                    config.dataset_path.display()
                ),
            )),
        }
    }

    /// Puts the weights on a backend, with this process as the only rank.
    ///
    /// # Errors
    /// A weight that is NaN or infinite.
    pub fn engine<'a, B: Backend>(&'a self, config: &'a RunConfig, backend: Arc<B>) -> Result<Engine<'a, B>> {
        let damaged = format!("the checkpoint {} is damaged: fetch it again", self.dir.display());
        self.table.check_finite().context(damaged)?;
        let world: Arc<dyn Collective> = Arc::new(threads::single());
        let model = Model::new(backend, self.model.clone(), self.table.clone());
        Ok(Engine { model, world, config, data: &self.data, touched: Default::default() })
    }

    /// Parameters by kind, for people.
    pub fn describe(&self) -> String {
        let total = self.table.total();
        let mut lines = format!(
            "model {}: {} ({} layers, {} of them with {} experts, top-{}), {} parameters, {}",
            self.dir.display(),
            self.model.model_type,
            self.model.layers.len(),
            self.model.moe_layers().count(),
            self.model.num_experts,
            self.model.num_experts_per_tok,
            human_count(total.elements as u64),
            human(total.bytes as u64),
        );
        for (group, count) in self.table.by_group() {
            let share = 100.0 * count.elements as f64 / total.elements as f64;
            lines += &format!("\n  {:<10} {:>14} parameters  {share:5.1} %", group.to_string(), count.elements);
        }
        lines
    }

    /// Expected memory of a rank, for people: weights, activations of the longest micro-batches, trained state.
    pub fn describe_memory(&self, config: &RunConfig, trained: usize) -> String {
        let rows = self.longest_batch(config.batch_size);
        let activations = Activations::predict(&self.model, rows);
        let layers = self.model.layers.len();
        let free = free_memory();
        let keep_from = activations.keep_from(config.recompute, layers, 0, free);
        // A joint step's divergence is that of all its micro-batches, so their forward passes wait for one another.
        let (waiting, of) = match config.schedule {
            Schedule::Joint => (config.grad_accum as u64, format!("{} micro-batches", config.grad_accum)),
            Schedule::Alternate => (1, "a micro-batch".into()),
        };
        let kept = activations.peak(layers, 0, keep_from) - activations.working;
        let peak = waiting.saturating_mul(kept).saturating_add(activations.working);
        let total = self.table.total();
        // Gradient, master and two moments in f32, and the weight itself out of its file.
        let state = trained as u64 * (16 + (total.bytes / total.elements.max(1)) as u64);
        let weights = total.bytes as u64;
        format!(
            "memory a rank: weights {} (memory-mapped: ranks on one machine share them), activations {} for {of} of up to \
             {rows} tokens ({} of {layers} layers kept, the others computed again), trained state {}: {} in all; {} free",
            human(weights),
            human(peak),
            layers - keep_from,
            human(state),
            human(peak.saturating_add(weights + state)),
            human(free),
        )
    }

    /// Tokens of the largest micro-batch there can be.
    pub fn longest_batch(&self, batch_size: usize) -> usize {
        let replies = self.data.records.iter().flat_map(|r| [&r.unsafe_reply, &r.safe_reply]);
        let mut lengths: Vec<_> = replies.flatten().map(|e| e.ids.len()).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(batch_size).sum()
    }
}

/// The options of reading rows.
pub fn data_options(config: &RunConfig) -> DataOptions {
    DataOptions {
        max_samples: config.max_samples,
        max_length: config.max_length,
        long_rows: config.long_rows,
        loss_on: config.loss_on,
        keep_failed: config.keep_failed,
        safe_response: config.safe_response.clone(),
        chat_template: config.chat_template.clone(),
    }
}

/// Refuses a selection that this model cannot give, before anything is computed.
fn check_selection(config: &RunConfig, model: &ModelConfig) -> Result<()> {
    let depth = model.layers.len();
    if let Some(range) = config.layers.as_ref().filter(|range| *range.end() >= depth) {
        let (first, last) = (range.start(), range.end());
        let message = format!("--layers {first}-{last} leaves the model, which has the layers 0-{}", depth - 1);
        return Err(Failure::new(exit::CONFIG, message));
    }
    let layers: Vec<_> = model.moe_layers().collect();
    Ok(super::identify::pool(config, &layers, model.num_experts).check(&layers, model.num_experts)?)
}
