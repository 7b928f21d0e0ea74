//! Opening what a run reads: model, tokenizer, data. Everything is checked here, before anything is written.

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::direct::Direct;
use super::engine::Engine;
use super::memory::{Activations, Place, TrainedState, human, human_count};
use super::ranks::{Rank, Ranks};
use crate::backend::{Backend, Dtype};
use crate::collective::{self, Collective, all_agree};
use crate::config::{Init, RunConfig, Schedule, hub_cache};
use crate::data::{ChatTokenizer, DataOptions, Dataset};
use crate::exit::{self, Context, Failure, Result};
use crate::experts::Method;
use crate::model::{Checkpoint, Model, ModelConfig, ParamTable, RandomInit};
use crate::ui::Ui;

/// What a run reads.
pub struct Session {
    /// The model's folder.
    pub dir: PathBuf,
    /// Its shape and family.
    pub model: ModelConfig,
    /// Its weights, memory-mapped; `None`: they are random, and nothing is worth saving of them.
    pub checkpoint: Option<Checkpoint>,
    /// Its parameters.
    pub table: ParamTable,
    /// Its tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// The rows to find and train with.
    pub data: Dataset,
    /// Rows that are only measured.
    pub held_out: Option<Dataset>,
    fingerprint: OnceLock<blake3::Hash>,
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
        let (checkpoint, table) = match config.init {
            Init::Checkpoint => {
                let checkpoint = Checkpoint::open(&dir)?;
                let table = ParamTable::build(&model, &checkpoint)?;
                (Some(checkpoint), table)
            }
            Init::Random => (None, ParamTable::random(&model, RandomInit::from_dir(&dir, config.seed)?)),
        };
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
        Ok(Self { dir, model, checkpoint, table, tokenizer, data, held_out, fingerprint: OnceLock::new() })
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

    /// The number format of all weights; F32 only if none is narrower.
    pub fn stored_dtype(&self) -> Dtype {
        let mut dtypes = self.table.params.iter().map(|spec| spec.value.dtype);
        dtypes.find(|dtype| *dtype != Dtype::F32).unwrap_or(Dtype::F32)
    }

    /// Refuses weights that are NaN or infinite.
    ///
    /// # Errors
    /// The first such weight.
    pub fn check_weights(&self) -> Result<()> {
        let damaged = format!("the checkpoint {} is damaged: fetch it again", self.dir.display());
        self.table.check_finite().context(damaged)
    }

    /// Puts the weights on the backend of one rank.
    pub fn engine<'a, B: Backend>(
        &'a self,
        config: &'a RunConfig,
        backend: Arc<B>,
        direct: Option<Arc<dyn Direct<B>>>,
        rank: &Rank,
    ) -> Engine<'a, B> {
        let model = Model::new(backend, self.model.clone(), self.table.clone());
        Engine { direct, ..Engine::new(model, rank, config, &self.data) }
    }

    /// blake3 over the base model's parameters, its configuration and tokenizer, and the files of rows and template.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn fingerprint(&self, config: &RunConfig) -> Result<blake3::Hash> {
        if let Some(hash) = self.fingerprint.get() {
            return Ok(*hash);
        }
        let mut hasher = blake3::Hasher::new();
        if let Some(init) = &self.table.random {
            hasher.update(&init.seed.to_le_bytes()); // with config.json, below, it decides all values
        } else {
            for spec in &self.table.params {
                hasher.update_rayon(&spec.value.bytes);
            }
        }
        hasher.update(self.fingerprint_of_files(config)?.as_bytes());
        Ok(*self.fingerprint.get_or_init(|| hasher.finalize()))
    }

    fn fingerprint_of_files(&self, config: &RunConfig) -> Result<blake3::Hash> {
        let mut hasher = blake3::Hasher::new();
        let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
        let model = names.iter().map(|name| self.dir.join(name)).filter(|path| path.is_file());
        for path in model.chain(data_files(config)) {
            hasher.update(hash_file(&path)?.as_bytes());
        }
        Ok(hasher.finalize())
    }

    /// Proves that all ranks have the same program, options, rows and model. Nothing to prove where they are threads.
    ///
    /// # Errors
    /// What differs, and on which rank.
    pub fn agree(&self, config: &RunConfig, ranks: &Ranks) -> Result<()> {
        let Some(world) = ranks.other_processes() else { return Ok(()) };
        world.doing("the check that all ranks have the same inputs");
        all_agree(world, "version of moewarden", env!("CARGO_PKG_VERSION").as_bytes())?;
        agree_on_options(world, &super::resume::decisive(config)?)?;
        let files = self.fingerprint_of_files(config)?;
        all_agree(world, "file of rows, chat template, tokenizer or config.json", files.as_bytes())?;
        Ok(all_agree(world, "set of model weights", self.fingerprint(config)?.as_bytes())?)
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
        if let Some(RandomInit { seed, std, dtype }) = &self.table.random {
            lines += &format!("\n  weights: random {dtype:?} of seed {seed}, standard deviation {std}; none is saved");
        }
        for (group, count) in self.table.by_group() {
            let share = 100.0 * count.elements as f64 / total.elements as f64;
            lines += &format!("\n  {:<10} {:>14} parameters  {share:5.1} %", group.to_string(), count.elements);
        }
        lines
    }

    /// Expected memory of a rank in bytes, and for people: weights, activations of the longest micro-batches, trained state.
    pub fn predict_memory(&self, config: &RunConfig, trained: usize, world_size: usize, place: Place) -> (u64, String) {
        let rows = self.longest_batch(config.batch_size);
        let activations = Activations::predict(&self.model, rows, &place);
        let layers = self.model.layers.len();
        let weights = self.table.total().bytes as u64;
        let loaded = self.loaded(trained, world_size, place);
        let waiting = passes_at_once(config);
        let of = if waiting == 1 { "a micro-batch".into() } else { format!("{waiting} micro-batches") };
        let keep_from = activations.keep_from(config.recompute, layers, 0, &loaded, waiting);
        let kept = activations.peak(layers, 0, keep_from) - activations.working;
        let peak = kept.saturating_mul(waiting as u64).saturating_add(activations.working);
        let state = self.trained_state(trained, world_size, place);
        let all = peak.saturating_add(weights + state.whole + state.sharded);
        let kind = match self.checkpoint {
            _ if place.device => "",
            Some(_) => " (memory-mapped: ranks on one machine share them)",
            None => " (random: each rank makes its own)",
        };
        let text = format!(
            "memory a rank: weights {}{kind}, activations {} for {of} of up to {rows} tokens ({} of {layers} layers kept, the \
             others computed again), trained state {} ({} {}, 1/{world_size} of masters and moments \
             {}): {} in all; {} free",
            human(weights),
            human(peak),
            layers - keep_from,
            human(state.whole + state.sharded),
            if place.device { "gradients" } else { "gradients and new weights" },
            human(state.whole),
            human(state.sharded),
            human(all),
            human(place.free),
        );
        (all, text)
    }

    /// What training adds.
    fn trained_state(&self, trained: usize, world_size: usize, place: Place) -> TrainedState {
        let total = self.table.total();
        // A device's weights are overwritten; memory-mapped ones are replaced.
        let new = if place.device { 0 } else { (total.bytes / total.elements.max(1)) as u64 };
        TrainedState::predict(trained as u64, new, world_size)
    }

    /// The same place once weights and trained state are there, which a device has to hold.
    pub fn loaded(&self, trained: usize, world_size: usize, place: Place) -> Place {
        if !place.device {
            return place;
        }
        let state = self.trained_state(trained, world_size, place);
        let there = self.table.total().bytes as u64 + state.whole + state.sharded;
        Place { free: place.free.saturating_sub(there), ..place }
    }

    /// Tokens of the largest micro-batch there can be.
    pub fn longest_batch(&self, batch_size: usize) -> usize {
        let replies = self.data.records.iter().flat_map(|r| [&r.unsafe_reply, &r.safe_reply]);
        let mut lengths: Vec<_> = replies.flatten().map(|e| e.ids.len()).collect();
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.iter().take(batch_size).sum()
    }
}

/// Forward passes that wait for their backward at once: a joint step's divergence is that of all its micro-batches.
pub fn passes_at_once(config: &RunConfig) -> usize {
    match config.schedule {
        Schedule::Joint => config.grad_accum,
        Schedule::Alternate => 1,
    }
}

/// Proves that all ranks have these options, a line each; the error names the first that differs.
fn agree_on_options(world: &dyn Collective, options: &str) -> Result<()> {
    let all = world.all_gather(options.as_bytes())?;
    let Some(rank) = all.iter().position(|other| *other != all[0]) else { return Ok(()) };
    let [ours, theirs] = [0, rank].map(|rank| String::from_utf8_lossy(&all[rank]));
    let mut lines = ours.lines().zip(theirs.lines()).filter(|(ours, theirs)| ours != theirs);
    let (ours, theirs) = lines.next().unwrap_or(("fewer of them", "more"));
    Err(collective::Error::Disagree { what: format!("set of options (`{theirs}`, not `{ours}`)"), rank }.into())
}

/// The files of rows and template that a run reads.
fn data_files(config: &RunConfig) -> impl Iterator<Item = PathBuf> + '_ {
    let files = [Some(&config.dataset_path), config.eval_dataset_path.as_ref(), config.chat_template.as_ref()];
    files.into_iter().flatten().cloned()
}

fn hash_file(path: &Path) -> Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_mmap_rayon(path)
        .map_err(|e| Failure::new(exit::NO_INPUT, format!("{}: cannot be read: {e}", path.display())))?;
    Ok(hasher.finalize())
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
    let layers = &model.moe_layers().layers;
    Ok(super::identify::pool(config, layers, model.num_experts).check(layers, model.num_experts)?)
}
