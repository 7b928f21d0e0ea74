//! The inputs of a run: model, tokenizer, data. Everything is checked here, before anything is written.

mod base;
mod identity;

pub use base::Base;
pub(in crate::run) use identity::tokens_hash;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use crate::backend::{Backend, Dtype};
use crate::checkpoint::check_copied;
use crate::config::RunConfig;
use crate::data::{ChatTokenizer, DataOptions, Dataset, Record, RoutingTraces, Sampler, Sides, TraceShape, TraceUse};
use crate::exit::{self, Context, Failure, Result};
use crate::experts::{self, RoutingTokens, SelectionLimits, selection_hash};
use crate::launch::memory::{human, human_count};
use crate::launch::{Rank, Workload};
use crate::model::{Checkpoint, LayerKind, Model, ModelConfig, OffloadedBelow, ParamTable, RandomInit};
use crate::report::ExpertsFile;
use crate::train::{CountedReplies, DeviceTransport, Recipe, Replica, RetainRows, ScoreBy, Training};
use crate::ui::Ui;

/// The inputs of a run.
pub struct Session {
    /// The model's folder.
    pub dir: PathBuf,
    /// The model's shape and family.
    pub model: ModelConfig,
    /// Its weights, memory-mapped; `None`: they are random, and no model or checkpoint is written.
    pub checkpoint: Option<Arc<Checkpoint>>,
    /// Its parameters.
    pub table: ParamTable,
    /// Its tokenizer and chat template.
    pub tokenizer: ChatTokenizer,
    /// The rows for scoring and training.
    pub data: Dataset,
    /// Rows that are only measured.
    pub held_out: Option<Dataset>,
    /// Rows on which the trained model must stay near the base model.
    retain: Option<(PathBuf, Dataset)>,
    /// The parameters of a model of the same configuration that decides the routing in place of [`Self::table`]'s routers.
    pub route_as: Option<ParamTable>,
    /// The file of [`Self::data`].
    data_path: PathBuf,
    /// The hash of the experts of `--method given`, which decide results as the other inputs do.
    given: Option<[u8; 32]>,
    fingerprint: OnceLock<blake3::Hash>,
    earlier_fingerprint: OnceLock<blake3::Hash>,
    named_inputs: OnceLock<BTreeMap<String, String>>,
    weights_hash: OnceLock<blake3::Hash>,
    /// The routing traces on which routing is counted, and their file.
    traces: Option<(PathBuf, RoutingTraces)>,
}

impl Session {
    /// Opens and checks the inputs of `train` and `identify`, and reports what the data hold.
    ///
    /// # Errors
    /// Those of [`Self::open_any`]; data without an unsafe row; a selection that the model does not allow.
    pub fn open(config: &RunConfig, recipe: &Recipe, ui: &Ui) -> Result<Self> {
        Self::open_on(Base::open(config, ui)?, config, recipe, ui)
    }

    /// [`Self::open`] on the model of the run, which is open already.
    ///
    /// # Errors
    /// Those of [`Self::open`].
    pub fn open_on(base: Base, config: &RunConfig, recipe: &Recipe, ui: &Ui) -> Result<Self> {
        let needed = recipe.needed_sides();
        let rows = Sides {
            unsafe_: true,
            safe: needed.safe_prompts || needed.answered_prompts,
            safe_replies: needed.safe_examples || needed.safe_replies,
        };
        // Where nothing is trained, held-out rows are benign ones.
        let trains = recipe.training != Training::Nothing;
        let held_out = Sides { unsafe_: trains, safe_replies: !trains, ..Sides::default() };
        let mut session = Self::open_any(base, config, [rows, held_out], false, ui)?;
        session.check_selection(config, recipe, ui)?;
        session.given = (recipe.identify.by == ScoreBy::Given).then(|| selection_hash(&recipe.identify.given));
        if let (CountedReplies::Traces, Some(path)) = (recipe.identify.counted_replies(), config.routing_replies.path())
        {
            let (layers, num_experts) = (session.model.moe_layers().layers.len(), session.model.num_experts);
            let shape = TraceShape { layers, num_experts, top_k: session.model.num_experts_per_tok };
            let prompt_tokens = match config.routing_tokens {
                RoutingTokens::Response => 0,
                RoutingTokens::Predicting => 1,
                RoutingTokens::Prompt | RoutingTokens::All => usize::MAX,
            };
            let usage = TraceUse { prompt_tokens, both_verdicts: recipe.identify.compares_sides() };
            session.traces = Some((path.to_owned(), RoutingTraces::read(path, shape, usage)?));
        }
        if session.data.records.iter().all(|r| r.unsafe_reply.is_none()) {
            let (path, report) = (config.dataset_path.display(), &session.data.report);
            let (kept, raise) = report.searched();
            return Err(Failure::new(
                exit::DATA,
                format!(
                    "{path} holds no unsafe row{kept}: experts are found on unsafe prompts; label some rows unsafe{raise}\n{report}"
                ),
            ));
        }
        Ok(session)
    }

    /// Opens the inputs of `eval`: the rows may all be prompts without a reply, and without a data file there are none.
    ///
    /// # Errors
    /// Those of the model's files, of the tokenizer and of the data; options that contradict the model.
    pub fn open_to_evaluate(base: Base, config: &RunConfig, ui: &Ui) -> Result<Self> {
        let both = Sides { unsafe_: true, safe: true, ..Sides::default() };
        Self::open_any(base, config, [both, Sides::default()], true, ui)
    }

    /// Opens the inputs of any command; the data may hold safe rows only. `needs`: the sides of rows, and
    /// of held-out rows, that are looked for beyond `--max-samples`. `prompts_suffice`: as for [`Self::open_to_evaluate`].
    fn open_any(
        base: Base,
        config: &RunConfig,
        [needs, held_out_needs]: [Sides; 2],
        prompts_suffice: bool,
        ui: &Ui,
    ) -> Result<Self> {
        let Base { dir, model, checkpoint, table } = base;
        model.check_length(config.max_length)?;
        let mut tokenizer = ChatTokenizer::open(&dir, config.chat_template.as_deref())?;
        tokenizer.check_vocab(model.vocab_size)?;
        if let Some(note) = tokenizer.note() {
            ui.warn(note);
        }
        let options = data_options(config);
        let data = match config.dataset_path.as_os_str().is_empty() {
            true => Dataset::of_records(Vec::new()), // only for an evaluation by questions
            false => {
                let options = DataOptions { needs, prompts_suffice, ..options.clone() };
                let data = Dataset::read(&config.dataset_path, &tokenizer, &options)?;
                ui.line(&data.report);
                let padding = data.report.padding(config.batch_size);
                let share = 100.0 * padding.share();
                ui.line(format_args!("  padding avoided: {} tokens ({share:.0} %)", padding.avoided));
                data
            }
        };
        let held_out = match &config.eval_dataset_path {
            None => None,
            Some(path) => {
                let options = DataOptions { needs: held_out_needs, ..options.clone() };
                let held_out = Dataset::read(path, &tokenizer, &options).context("reading the held-out data")?;
                if held_out.report.has_notes() {
                    ui.line(&held_out.report);
                }
                let shared = held_out.count_shared_requests(&data);
                if shared > 0 {
                    ui.warn(format_args!(
                        "{shared} of {} held-out rows of {} have the same request as rows of {}: losses on them say \
                         nothing about unseen requests",
                        held_out.records.len(),
                        path.display(),
                        config.dataset_path.display()
                    ));
                }
                Some(held_out)
            }
        };
        let retain = match &config.retain_dataset_path {
            None => None,
            Some(path) => Some((path.clone(), read_retain_rows(path, &tokenizer, &options, held_out.as_ref(), ui)?)),
        };
        let data_path = config.dataset_path.clone();
        Ok(Self {
            dir,
            model,
            checkpoint,
            table,
            tokenizer,
            data,
            held_out,
            retain,
            route_as: None,
            data_path,
            given: None,
            fingerprint: OnceLock::new(),
            earlier_fingerprint: OnceLock::new(),
            named_inputs: OnceLock::new(),
            weights_hash: OnceLock::new(),
            traces: None,
        })
    }

    /// The retain rows, and their file.
    pub fn retain_data(&self) -> Option<(&Path, &Dataset)> {
        self.retain.as_ref().map(|(path, data)| (&**path, data))
    }

    /// The records of the retain rows.
    pub fn retain_records(&self) -> Option<&[Record]> {
        Some(&self.retain.as_ref()?.1.records)
    }

    /// The retain rows, with the order and the batch size of `recipe`.
    pub fn retain_rows(&self, recipe: &Recipe) -> Option<RetainRows<'_>> {
        let (path, data) = self.retain.as_ref()?;
        Some(RetainRows::new(Sampler { data, path, ..self.sampler(recipe) }))
    }

    /// A sampler of the training rows, with the order and the batch size of `recipe`.
    pub fn sampler(&self, recipe: &Recipe) -> Sampler<'_> {
        Sampler {
            data: &self.data,
            path: &self.data_path,
            batch_size: recipe.batch_size,
            shuffle: recipe.shuffle,
            seed: recipe.seed,
        }
    }

    /// A sampler of the records over which experts are scored: routing traces have their own, in place of the rows.
    pub fn scored_sampler(&self, recipe: &Recipe) -> Sampler<'_> {
        let rows = self.sampler(recipe);
        match &self.traces {
            Some((path, traces)) => Sampler { data: &traces.data, path, ..rows },
            None => rows,
        }
    }

    /// The routing traces on which routing is counted.
    pub fn traces(&self) -> Option<&RoutingTraces> {
        self.traces.as_ref().map(|(_, traces)| traces)
    }

    /// A copy of the model on the device of one rank, with routed experts of lower layers in the host's memory.
    pub fn replica<B: Backend>(
        &self,
        backend: Arc<B>,
        transport: Option<Arc<dyn DeviceTransport<B>>>,
        rank: &Rank,
        offloaded: OffloadedBelow,
    ) -> Replica<B> {
        let model =
            |table: &ParamTable| Model::offloaded(backend.clone(), self.model.clone(), table.clone(), offloaded);
        let mut replica_model = model(&self.table);
        if let Some(table) = &self.route_as {
            let guide = model(table);
            replica_model.route_as(guide).expect("the same configuration");
        }
        let mut replica = Replica::new(replica_model, rank.world.clone());
        replica.transport = transport;
        replica.stop = rank.stop.clone();
        replica.fault = rank.fault.clone();
        replica
    }

    /// The sizes by which a device chooses its kernels.
    pub fn workload(&self, batch_size: usize) -> Workload {
        workload(&self.model, &self.table, self.longest_batch(batch_size))
    }

    /// Refuses data without the safe side that a phase of the run needs, before the first phase begins, and a model whose own replies
    /// are needed and cannot be generated as transformers does it.
    ///
    /// # Errors
    /// The phase, and how to do without it; those of [`ChatTokenizer::penalties`].
    pub fn check_sides(&self, recipe: &Recipe) -> Result<()> {
        let (prompts, replies) = (self.data.has_both_prompts(), self.data.has_both_replies());
        let needed = recipe.needed_sides();
        if needed.answered_prompts {
            self.tokenizer.penalties()?; // of the model's own replies
        }
        let needs = [
            (
                needed.safe_prompts && !prompts,
                "router alignment needs safe prompts",
                "--skip-router-training (in `compare`: --ablations expert-only)",
            ),
            (needed.safe_examples && !replies, "the joint schedule needs safe examples", "--schedule alternate"),
            (
                needed.answered_prompts && !prompts,
                "--routing-replies own needs safe prompts",
                "--method gradient (in `compare`: --methods)",
            ),
            (
                needed.safe_replies && !replies,
                "--method routing needs safe examples",
                "--method gradient (in `compare`: --methods)",
            ),
        ];
        match needs.into_iter().find(|(lacks, ..)| *lacks) {
            None => Ok(()),
            Some((_, what, instead)) => {
                let (path, (kept, raise)) = (self.data_path.display(), self.data.report.searched());
                let message = format!(
                    "{what}, and {path} holds none{kept}: add rows with the label safe{raise}, or take {instead}"
                );
                Err(Failure::new(exit::CONFIG, message))
            }
        }
    }

    /// Refuses a selection that the model does not allow. If the selection trains nothing, a smaller one is made instead, with a
    /// warning.
    fn check_selection(&self, config: &RunConfig, recipe: &Recipe, ui: &Ui) -> Result<()> {
        if self.model.is_dense() {
            return Ok(());
        }
        let (identify, depth) = (&recipe.identify, self.model.layers.len());
        if let Some(range) = identify.limits.layers.as_ref().filter(|range| *range.end() >= depth) {
            let (first, last) = (range.start(), range.end());
            let message = format!("--layers {first}-{last} leaves the model, which has the layers 0-{}", depth - 1);
            return Err(Failure::new(exit::CONFIG, message));
        }
        let layers = &self.model.moe_layers().layers;
        if let Some(path) = config.experts.as_ref().filter(|_| identify.by == ScoreBy::Given) {
            return Ok(ExpertsFile::read(path)?.check(layers, self.model.num_experts)?);
        }
        if matches!(identify.by, ScoreBy::Published { rule, .. } if rule.decides_size()) {
            return Ok(());
        }
        let limits = identify.limits_for(layers, self.model.num_experts);
        if limits.top_k < identify.limits.top_k {
            ui.warn(format_args!(
                "--top-k-experts {} exceeds the {} selectable experts: all of them are selected. (With these options no selection \
                 is trained; otherwise this would be an error.)",
                identify.limits.top_k, limits.top_k
            ));
        }
        limits.check(layers, self.model.num_experts)?;
        // The control takes as many experts as the selection that it excludes: both must fit, whatever the scores are.
        let available = SelectionLimits { per_layer: None, ..limits.clone() }.available(layers, self.model.num_experts);
        if matches!(identify.by, ScoreBy::Random { exclude_found: true, .. }) && available < 2 * limits.top_k {
            let available = available - limits.top_k;
            return Err(experts::Error::TooFewLeft { requested: limits.top_k, available, layer: None }.into());
        }
        Ok(())
    }

    /// The number format of the weights: F32 only if none is narrower.
    pub fn stored_dtype(&self) -> Dtype {
        stored_dtype(&self.table)
    }

    /// Refuses weights that are NaN or infinite.
    ///
    /// # Errors
    /// The first such weight.
    pub fn check_weights(&self) -> Result<()> {
        let damaged = format!("the checkpoint {} is damaged: fetch it again", self.dir.display());
        self.table.check_finite().context(damaged)
    }

    /// Refuses a model folder from which no complete model could be written at the end.
    ///
    /// # Errors
    /// A file beside the weights that cannot be copied.
    pub fn check_copied(&self) -> Result<()> {
        Ok(self.checkpoint.as_ref().map_or(Ok(()), |checkpoint| check_copied(&self.dir, checkpoint))?)
    }

    /// The model and its parameters by kind, in text.
    pub fn describe(&self) -> String {
        let total = self.table.total();
        let experts = match self.model.is_dense() {
            true => "all of them dense".to_owned(),
            false => format!(
                "{} of them with {} experts, top-{}",
                self.model.moe_layers().count(),
                self.model.num_experts,
                self.model.num_experts_per_tok
            ),
        };
        let mut lines = format!(
            "model {}: {} ({} layers, {experts}), {} parameters, {}",
            self.dir.display(),
            self.model.model_type,
            self.model.layers.len(),
            human_count(total.elements as u64),
            human(total.bytes as u64),
        );
        if let Some(RandomInit { seed, std, dtype }) = &self.table.random {
            lines += &format!(
                "\n  weights: random {dtype:?} of seed {seed}, standard deviation {std}; no weights will be saved"
            );
        }
        for (group, count) in self.table.by_group() {
            let share = 100.0 * count.elements as f64 / total.elements as f64;
            lines += &format!("\n  {:<10} {:>14} parameters  {share:5.1} %", group.to_string(), count.elements);
        }
        lines
    }

    /// Rows with a reply to an unsafe prompt.
    pub fn unsafe_replies(&self) -> usize {
        self.data.records.iter().filter(|r| r.unsafe_reply.is_some()).count()
    }

    /// Tokens of the largest possible micro-batch.
    pub fn longest_batch(&self, batch_size: usize) -> usize {
        let largest = |data: &Dataset| -> usize {
            let replies = data.records.iter().flat_map(|r| [&r.unsafe_reply, &r.safe_reply]);
            let mut lengths: Vec<_> = replies.flatten().map(|e| e.ids.len()).collect();
            lengths.sort_unstable_by(|a, b| b.cmp(a));
            lengths.iter().take(batch_size).sum()
        };
        // The passes of the retain rows follow those of the step's own rows: the larger ones decide.
        largest(&self.data).max(self.retain.as_ref().map_or(0, |(_, data)| largest(data)))
    }
}

/// The sizes by which a device chooses its kernels for this model and micro-batches of `rows` tokens.
pub fn workload(model: &ModelConfig, table: &ParamTable, rows: usize) -> Workload {
    Workload {
        rows,
        num_experts_per_tok: model.num_experts_per_tok,
        num_experts: model.num_experts,
        hidden_size: model.hidden_size,
        expert_width: widest_block(model),
        head_dim: model.heads.first().map_or(0, |heads| heads.dim),
        stored: stored_dtype(table),
    }
}

/// The expert width, or that of a dense model's widest layer.
fn widest_block(model: &ModelConfig) -> usize {
    let width = |kind: &LayerKind| if let LayerKind::Dense(width) = kind { *width } else { 0 };
    match model.is_dense() {
        true => model.layers.iter().map(width).max().unwrap_or(1),
        false => model.expert_width,
    }
}

/// The number format of weights: F32 only if none is narrower.
pub fn stored_dtype(table: &ParamTable) -> Dtype {
    let mut dtypes = table.params.iter().map(|spec| spec.dtype());
    dtypes.find(|dtype| *dtype != Dtype::F32).unwrap_or(Dtype::F32)
}

/// Reads the retain rows.
fn read_retain_rows(
    path: &Path,
    tokenizer: &ChatTokenizer,
    options: &DataOptions,
    held_out: Option<&Dataset>,
    ui: &Ui,
) -> Result<Dataset> {
    let options = DataOptions { needs: Sides { safe_replies: true, ..Sides::default() }, ..options.clone() };
    let data = Dataset::read(path, tokenizer, &options).context("reading the retain rows")?;
    if data.report.has_notes() {
        ui.line(&data.report);
    }
    let usable = data.records.iter().filter(|r| r.safe_reply.is_some()).count();
    if usable == 0 {
        let message = format!(
            "{} holds no row with a safe reply, so nothing can be retained: give chat rows with the label safe and an \
             assistant turn",
            path.display()
        );
        return Err(Failure::new(exit::DATA, message));
    }
    let without = data.records.len() - usable;
    if without > 0 {
        ui.warn(format_args!("{without} rows of {} have no safe reply and are not used", path.display()));
    }
    let shared = held_out.map_or(0, |held_out| held_out.count_shared_requests(&data));
    if shared > 0 {
        ui.warn(format_args!(
            "{shared} held-out rows have the same request as retain rows of {}, on which the model is trained: losses on them \
             say nothing about unseen requests",
            path.display()
        ));
    }
    ui.line(format_args!("retain rows: {usable} of {}", path.display()));
    Ok(data)
}

/// The options of the data pipeline.
pub fn data_options(config: &RunConfig) -> DataOptions {
    DataOptions {
        max_samples: config.max_samples,
        needs: Sides::default(),
        prompts_suffice: false,
        max_length: config.max_length,
        long_rows: config.long_rows,
        loss_on: config.loss_on,
        keep_failed: config.keep_failed,
        safe_response: config.safe_response.clone(),
        chat_template: config.chat_template.clone(),
        chat_template_kwargs: config.chat_template_kwargs.0.clone(),
    }
}
