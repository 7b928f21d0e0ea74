//! Options: parsed from flags and a YAML file, merged with the defaults, validated.
//!
//! [`RawOptions`] are the options of one source. [`resolve()`] merges them (flags win over the YAML file, the file over
//! [`RunConfig::default`]) and returns a valid [`RunConfig`]. The YAML file is the only file that this module reads.

mod commands;
mod compare;
mod decisive;
mod file;
mod layers;
mod one_option;
mod raw;
mod recipe;
mod replies;
mod resolve;
mod spelling;
mod template_kwargs;
mod validate;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::{LongRows, LossOn};
use crate::exit::{self, Coded};
use crate::experts::{IdentifyIn, Method, RandomMatch, RoutingTokens, Score, ScoreNorm, ScorePer, Select, Selection};
use crate::optim::LrSchedule;
use crate::routers::{ConsistencyLayers, KlType, RouterTarget, Statistic};
use crate::train::Recompute;
use crate::train::RetainLoss;

pub use commands::{AblateArgs, CheckArgs, EvalArgs, ExportArgs, QuickstartArgs, ReportArgs};
pub use compare::{Ablation, CompareArgs, Sweep, SweepMode, Variant};
pub use layers::Layers;
pub use raw::{RawOptions, heading};
pub use replies::RoutingReplies;
pub use resolve::{Resolved, resolve, resolve_compare};
pub use spelling::{Meaning, ORIGINAL_SPELLINGS, Spelled, is_bool, nearest, spelled};
pub use template_kwargs::TemplateKwargs;
pub use validate::options_without_effect;

/// Initial weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// Weights of the model's safetensors files.
    #[default]
    Checkpoint,
    /// Random weights, drawn by the seed. The model folder needs no weights, and no model is saved.
    Random,
}

/// Parameters that the expert phase trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// The selected experts.
    #[default]
    Selective,
    /// All parameters.
    Baseline,
    /// All experts.
    Experts,
}

/// Order in which experts and routers are trained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// An expert phase (cross-entropy), then a router phase (divergence between two forward passes).
    #[default]
    Alternate,
    /// Experts and routers in one step: cross-entropy plus the weighted router consistency loss.
    Joint,
}

/// A format in which steps are logged beside metrics.jsonl.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// Event files of TensorBoard.
    Tensorboard,
}

/// What is saved of the model after each round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SaveRounds {
    /// A complete model folder in Hugging Face format.
    #[default]
    Full,
    /// Only the changed tensors, in one safetensors file.
    Delta,
    /// Nothing.
    None,
}

/// Device to compute on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// All visible NVIDIA GPUs, or the CPU without one.
    #[default]
    Auto,
    /// CPU.
    Cpu,
    /// NVIDIA GPUs; an error without one.
    Cuda,
}

/// Number format of matrix products, and of activations: all of them on a GPU, the rows of experts on the CPU. Sums are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// bf16 for 16-bit weights, f32 for 32-bit weights. On a CPU that does not gain from bf16, f32.
    #[default]
    Auto,
    /// f32, on GPUs never rounded to TF32.
    F32,
    /// bf16, with sums in f32.
    Bf16,
}

/// Transport of gradients and updated weights between GPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// NCCL if each rank has its own GPU, else host memory.
    #[default]
    Auto,
    /// NCCL, directly between GPUs.
    Nccl,
    /// Through host memory, by the collective operations of the CPU.
    Host,
}

/// Where the frozen and trained routed experts of a model lie on a GPU machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Offload {
    /// Keeps those of as many layers on the GPU as fit, the top layers first; the others lie in pinned host memory.
    #[default]
    Auto,
    /// Keeps all of them on the GPU.
    None,
    /// All of them lie in pinned host memory, and are copied to the GPU layer by layer: the least GPU memory.
    Host,
}

/// The resolved options of a run. The YAML file, the flags and `config.resolved.yaml` use these names in kebab-case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RunConfig {
    // the model and the data
    /// Model folder or hub id, as given.
    pub model_name: String,
    /// Initial weights.
    pub init: Init,
    /// Training data: JSON or JSONL.
    pub dataset_path: PathBuf,
    /// Held-out data, evaluated before and after training and never trained on.
    pub eval_dataset_path: Option<PathBuf>,
    /// Rows on which the trained model must stay near the original one.
    pub retain_dataset_path: Option<PathBuf>,
    /// Jinja file that replaces the model's chat template.
    pub chat_template: Option<PathBuf>,
    /// Variables of the chat template, for all rows.
    pub chat_template_kwargs: TemplateKwargs,
    /// Maximum number of rows, counted after failed attacks are dropped.
    pub max_samples: usize,
    /// Maximum length of an example in tokens.
    pub max_length: usize,
    /// Rows longer than `max_length`.
    pub long_rows: LongRows,
    /// Tokens in the cross-entropy loss.
    pub loss_on: LossOn,
    /// Keep attack rows whose judge verdict says that the attack failed.
    pub keep_failed: bool,
    /// Target response to unsafe prompts whose row has no refusal.
    pub safe_response: String,
    /// Shuffle the rows by `seed` instead of keeping the file's order.
    pub shuffle: bool,
    /// Seed of the row order, of the random method and of random weights.
    pub seed: u64,

    // finding experts
    /// Ranking of experts.
    pub method: Method,
    /// Gradient method: statistic over the gradients of an expert's parameters.
    pub score: Score,
    /// Gradient method: normalization of the score in each micro-batch.
    pub score_per: ScorePer,
    /// Gradient method: what scores are divided by before ranking.
    pub score_norm: ScoreNorm,
    /// Routing method: tokens over which routing frequencies are counted.
    pub routing_tokens: RoutingTokens,
    /// Routing method: replies on whose tokens frequencies are counted.
    pub routing_replies: RoutingReplies,
    /// Largest number of tokens of the model's own replies; `None`: 128 for the routing method, 32 for the causal check.
    pub max_new_tokens: Option<usize>,
    /// Own replies, of the routing method and of the causal check, that are generated together on each rank.
    pub generation_batch_size: usize,
    /// Routing method: minimum routing risk difference, in -1..=1.
    pub risk_threshold: f64,
    /// Random method: how the counts match those of the gradient method.
    pub random_match: RandomMatch,
    /// Random method: the gradient method's selection is not drawn.
    pub random_exclude_found: bool,
    /// Method given: file of the experts to select.
    pub experts: Option<PathBuf>,
    /// Number of experts to select, over all layers.
    pub top_k_experts: usize,
    /// Maximum number of experts to select in one layer; `None`: no limit.
    pub experts_per_layer: Option<usize>,
    /// Inclusive range of decoder layers to select from, from 0; `None`: all.
    #[serde(with = "layers")]
    pub layers: Option<RangeInclusive<usize>>,
    /// End of the ranking to select from.
    pub select: Select,
    /// Resamples of the micro-batches for inclusion probabilities; 0: none.
    pub bootstrap: usize,
    /// Select once a round, or at every step.
    pub selection: Selection,
    /// Random sets of the causal check of the first selection; 0: no check.
    pub verify: usize,

    // training
    /// Parameters that the expert phase trains.
    pub mode: Mode,
    /// Alternating phases, or one joint phase.
    pub schedule: Schedule,
    /// Rounds in which experts are identified.
    pub identify: IdentifyIn,
    /// Share of the first round's refusal loss below which the last selection is kept, in 0..=1; 0: never.
    pub identify_until: f64,
    /// Rounds of: identify, train experts, align routers, save.
    pub num_rounds: usize,
    /// Epochs of the expert phase (of the joint phase, in the joint schedule) in each round.
    pub expert_epochs_per_round: usize,
    /// Epochs of the router phase in each round.
    pub router_epochs_per_round: usize,
    /// Examples in a micro-batch of each rank.
    pub batch_size: usize,
    /// Micro-batches of each rank in one optimizer step (in the router phase: 1).
    pub grad_accum: usize,
    /// Train experts.
    pub finetune_unsafe_experts: bool,
    /// Do not train the routers.
    pub skip_router_training: bool,
    /// AdamW learning rate of the experts (mode `baseline`: of all parameters).
    pub expert_lr: f64,
    /// AdamW learning rate of the routers.
    pub router_lr: f64,
    /// Learning rate schedule after the warm-up.
    pub lr_schedule: LrSchedule,
    /// Steps of linear warm-up from 0.
    pub warmup_steps: usize,
    /// AdamW weight decay (decoupled).
    pub weight_decay: f64,
    /// Gradient clipping: maximum global norm; `None`: no clipping.
    pub max_grad_norm: Option<f64>,
    /// Maximum number of consecutive steps skipped because of a non-finite value.
    pub max_skipped_steps: usize,
    /// Router phase: how a layer's router logits become one distribution.
    pub router_statistic: Statistic,
    /// Tokens at the end of each prompt that count; 0: all.
    pub router_last_tokens: usize,
    /// The routing that the unsafe prompts are aligned with.
    pub router_target: RouterTarget,
    /// Router phase: divergence.
    pub kl_type: KlType,
    /// Add the router consistency loss. True if and only if the schedule is joint.
    pub use_router_consistency_loss: bool,
    /// Joint schedule: weight of the router consistency loss.
    pub router_consistency_weight: f64,
    /// Joint schedule: divergence of the router consistency loss.
    pub router_consistency_type: KlType,
    /// Joint schedule: layers in the router consistency loss.
    pub router_consistency_layers: ConsistencyLayers,
    /// Joint schedule: fraction of safe examples in a batch, in 0..1 without the ends.
    pub safe_ratio: f64,
    // retention
    /// The loss of the next-token distributions on the retain rows.
    pub retain_loss: RetainLoss,
    /// Its factor.
    pub retain_weight: f64,
    /// Factor of the divergence of the routing of the retain rows.
    pub retain_routing_weight: f64,

    // outputs
    /// Output folder of the run.
    pub output_dir: PathBuf,
    /// Delete an earlier run's outputs first.
    pub overwrite: bool,
    /// Resume from the newest complete checkpoint.
    pub resume: bool,
    /// What is saved of the model after each round.
    pub save_rounds: SaveRounds,
    /// Steps between two log lines on the terminal.
    pub logging_steps: usize,
    /// Another format in which steps are logged.
    pub log: Option<LogFormat>,
    /// Steps between two checkpoints within a phase; 0: only at the ends of phases and on signals.
    pub save_steps: usize,
    /// Number of newest checkpoints to keep.
    pub keep_checkpoints: usize,

    // the machine
    /// Device to compute on.
    pub device: Device,
    /// Number format of matrix products.
    pub precision: Precision,
    /// Data-parallel ranks, as threads of this process; `None`: 1, or one for each visible GPU.
    pub ranks: Option<usize>,
    /// Transport between the ranks' GPUs.
    pub transport: Transport,
    /// Synchronize after each operation of a GPU and time it.
    pub profile: bool,
    /// CPU threads of each rank; 0: the machine's cores divided by its ranks.
    pub threads: usize,
    /// Activation recomputation.
    pub recompute: Recompute,
    /// Where routed experts lie.
    pub offload: Offload,
    /// Divide them among the GPUs of this machine's ranks.
    pub shard_frozen: bool,
    /// Start although the predicted memory is far more than what is free.
    pub force: bool,
    /// Training steps between two comparisons of the ranks' weights; 0: only at checkpoints.
    pub check_replicas: usize,
    /// Seconds that a rank waits for the others in a collective operation.
    pub timeout: u64,
}

/// The defaults. `model_name` and `dataset_path` are required: they are empty here, which [`resolve()`] refuses.
impl Default for RunConfig {
    fn default() -> Self {
        Self {
            model_name: String::new(),
            init: Init::Checkpoint,
            dataset_path: PathBuf::new(),
            eval_dataset_path: None,
            retain_dataset_path: None,
            chat_template: None,
            chat_template_kwargs: TemplateKwargs::default(),
            max_samples: 128,
            max_length: 512,
            long_rows: LongRows::Drop,
            loss_on: LossOn::Response,
            keep_failed: false,
            safe_response: "I cannot assist with that request as it may be harmful or unsafe.".into(),
            shuffle: true,
            seed: 42,
            method: Method::Gradient,
            score: Score::L1Mean,
            score_per: ScorePer::Param,
            score_norm: ScoreNorm::None,
            routing_tokens: RoutingTokens::Response,
            routing_replies: RoutingReplies::Target,
            max_new_tokens: None,
            generation_batch_size: 16,
            risk_threshold: 0.05,
            random_match: RandomMatch::Total,
            random_exclude_found: false,
            experts: None,
            top_k_experts: 100,
            experts_per_layer: None,
            layers: None,
            select: Select::Highest,
            bootstrap: 200,
            selection: Selection::Global,
            verify: 0,
            mode: Mode::Selective,
            schedule: Schedule::Alternate,
            identify: IdentifyIn::EveryRound,
            identify_until: 0.1,
            num_rounds: 3,
            expert_epochs_per_round: 1,
            router_epochs_per_round: 1,
            batch_size: 8,
            grad_accum: 1,
            finetune_unsafe_experts: true,
            skip_router_training: false,
            expert_lr: 5e-5,
            router_lr: 1e-4,
            lr_schedule: LrSchedule::Constant,
            warmup_steps: 0,
            weight_decay: 0.01,
            max_grad_norm: None,
            max_skipped_steps: 3,
            router_statistic: Statistic::TokenProbs,
            router_last_tokens: 0,
            router_target: RouterTarget::Current,
            kl_type: KlType::Forward,
            use_router_consistency_loss: false,
            router_consistency_weight: 0.1,
            router_consistency_type: KlType::Symmetric,
            router_consistency_layers: ConsistencyLayers::All,
            safe_ratio: 0.5,
            retain_loss: RetainLoss::Kl,
            retain_weight: 1.0,
            retain_routing_weight: 0.0,
            output_dir: "moewarden-output".into(),
            overwrite: false,
            resume: false,
            save_rounds: SaveRounds::Full,
            logging_steps: 100,
            log: None,
            save_steps: 500,
            keep_checkpoints: 2,
            device: Device::Auto,
            precision: Precision::Auto,
            ranks: None,
            transport: Transport::Auto,
            profile: false,
            threads: 0,
            recompute: Recompute::Auto,
            offload: Offload::Auto,
            shard_frozen: false,
            force: false,
            check_replicas: 0,
            timeout: 600,
        }
    }
}

impl RunConfig {
    /// The text of `config.resolved.yaml`. Read by `--config`, it resolves to this configuration.
    ///
    /// # Errors
    /// [`ConfigError::NotText`] if a path is not UTF-8; [`resolve()`] refuses such paths.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        serde_saphyr::to_string(self).map_err(|e| ConfigError::NotText(e.to_string()))
    }

    /// Input paths of the run. Includes `model_name` even if it is a hub id and not a path.
    pub fn inputs(&self) -> Vec<&Path> {
        let optional = [&self.eval_dataset_path, &self.retain_dataset_path, &self.chat_template, &self.experts]
            .into_iter()
            .flatten();
        let required = [Path::new(&self.model_name), &self.dataset_path];
        required
            .into_iter()
            .filter(|path| !path.as_os_str().is_empty())
            .chain(optional.map(PathBuf::as_path))
            .chain(self.routing_replies.path())
            .collect()
    }
}

/// Errors of reading and validating options.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The YAML file cannot be read.
    #[error("cannot read the options file {}", path.display())]
    NotRead {
        /// Path of the file, as given.
        path: PathBuf,
        /// The I/O error.
        source: std::io::Error,
    },
    /// A line of the YAML file is wrong.
    #[error("{}:{line}: {message}", path.display())]
    File {
        /// Path of the file, as given.
        path: PathBuf,
        /// Line number from 1; 0 if the parser does not know it.
        line: u64,
        /// The cause and the way out.
        message: String,
    },
    /// A required option is missing.
    #[error("{0} is required: give it as a flag, or in the file of --config")]
    Missing(&'static str),
    /// Values out of range and contradictions between options, one a line.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
    /// The file of `--experts` cannot be read or is invalid.
    #[error(transparent)]
    Experts(#[from] crate::report::Error),
    /// A path that is not UTF-8.
    #[error("an option is not valid UTF-8, which config.resolved.yaml requires: {0}")]
    NotText(String),
}

impl Coded for ConfigError {
    fn exit_code(&self) -> u8 {
        match self {
            ConfigError::NotRead { source, .. } if source.kind() == std::io::ErrorKind::NotFound => exit::NO_INPUT,
            // Text in another encoding.
            ConfigError::NotRead { source, .. } if source.kind() == std::io::ErrorKind::InvalidData => exit::CONFIG,
            ConfigError::NotRead { .. } => exit::IO,
            ConfigError::Experts(e) => e.exit_code(),
            ConfigError::Missing(_) => exit::USAGE,
            ConfigError::File { .. } | ConfigError::Invalid(_) | ConfigError::NotText(_) => exit::CONFIG,
        }
    }
}
