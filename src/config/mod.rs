//! The resolved, validated configuration of a run. Nothing below this module reads flags, files of options or the
//! environment.
//!
//! [`RawOptions`] holds what was asked for; [`resolve()`] lays flags over the YAML file over the defaults
//! ([`RunConfig::default`]) and returns a [`RunConfig`] that contradicts neither itself nor this build.

mod commands;
mod compare;
mod file;
mod layers;
mod raw;
mod resolve;
mod spelling;
mod validate;

use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::{LongRows, LossOn};
use crate::exit::{self, Coded};
use crate::experts::{Method, RandomMatch, RoutingTokens, Score, ScorePer, Select, Selection};
use crate::optim::LrSchedule;
use crate::routers::{ConsistencyLayers, KlType, Statistic};

pub use commands::{CheckArgs, EvalArgs, ExportArgs, QuickstartArgs, ReportArgs};
pub use compare::{Ablation, CompareArgs, Variant};
pub use layers::Layers;
pub use raw::{RawOptions, heading};
pub use resolve::{Resolved, resolve, resolve_matrix};
pub use spelling::{Meaning, ORIGINAL_SPELLINGS, Spelled, is_bool, nearest, spelled};

/// Where the weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Init {
    /// The model's safetensors files.
    #[default]
    Checkpoint,
    /// The seed: the model folder needs no weights, and no model is written.
    Random,
}

/// What the expert phase trains.
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

/// Whether experts and routers are trained in turns or together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// First the experts, then the routers, by two forward passes.
    #[default]
    Alternate,
    /// Both in one step: cross-entropy plus the weighted consistency loss.
    Joint,
}

/// What is kept of each round's model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SaveRounds {
    /// A complete Hugging Face folder.
    #[default]
    Full,
    /// One safetensors file of the changed tensors.
    Delta,
    /// Nothing.
    None,
}

/// Where the computation runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// The best there is.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
}

/// Number format of activations on a GPU. (The CPU computes in f32.)
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Precision {
    /// bf16 for weights of 16 bits, f32 for weights of 32.
    #[default]
    Auto,
    /// 32 bits, never rounded to TF32: slow, to compare with the CPU.
    F32,
    /// 16 bits, with sums in f32.
    Bf16,
}

/// How gradients and new weights get from GPU to GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// NCCL where each rank has a GPU of its own, else the host.
    #[default]
    Auto,
    /// NCCL, from memory to memory.
    Nccl,
    /// By way of the host, as on the CPU.
    Host,
}

/// When a layer's forward is computed again for its backward instead of being kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// When keeping it would take more than a quarter of the memory that is free.
    #[default]
    Auto,
    /// Always: the least memory.
    Always,
    /// Never: the least time.
    Never,
}

/// Everything that decides a run. The YAML file, the flags and `config.resolved.yaml` use these names, in kebab-case.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RunConfig {
    // the model and the data
    /// As given: a folder or a hub id.
    pub model_name: String,
    /// Where the weights come from.
    pub init: Init,
    /// JSON or JSONL.
    pub dataset_path: PathBuf,
    /// A held-out file, measured before and after, never trained on.
    pub eval_dataset_path: Option<PathBuf>,
    /// A Jinja file used instead of the checkpoint's chat template.
    pub chat_template: Option<PathBuf>,
    /// At most this many kept rows.
    pub max_samples: usize,
    /// Tokens of an example.
    pub max_length: usize,
    /// What happens to longer ones.
    pub long_rows: LongRows,
    /// The tokens that carry loss.
    pub loss_on: LossOn,
    /// Attack rows count even where their own verdict says that the attack failed.
    pub keep_failed: bool,
    /// The target of rows that bring none.
    pub safe_response: String,
    /// Seeded order, rather than the file's.
    pub shuffle: bool,
    /// Of the order of the rows, of the random method and of random weights.
    pub seed: u64,

    // finding experts
    /// How experts are ranked.
    pub method: Method,
    /// What the gradient method measures.
    pub score: Score,
    /// What that is divided by.
    pub score_per: ScorePer,
    /// Where the routing method counts.
    pub routing_tokens: RoutingTokens,
    /// The routing method's least risk difference, in -1..=1.
    pub risk_threshold: f64,
    /// What the random method has in common with the gradient method.
    pub random_match: RandomMatch,
    /// Number of experts selected, over all layers.
    pub top_k_experts: usize,
    /// At most this many of one layer.
    pub experts_per_layer: Option<usize>,
    /// Inclusive range of decoder layers; `None`: all.
    #[serde(with = "layers")]
    pub layers: Option<RangeInclusive<usize>>,
    /// Which end of the ranking.
    pub select: Select,
    /// Once a round, or at every step.
    pub selection: Selection,

    // training
    /// What the expert phase trains.
    pub mode: Mode,
    /// In turns or together.
    pub schedule: Schedule,
    /// Rounds of identify, train, align, save.
    pub num_rounds: usize,
    /// Passes over the data in a round's expert phase (in the joint schedule: its only phase).
    pub expert_epochs_per_round: usize,
    /// Passes over the data in a round's router phase.
    pub router_epochs_per_round: usize,
    /// Examples of a rank's micro-batch.
    pub batch_size: usize,
    /// Micro-batches of a rank in one step.
    pub grad_accum: usize,
    /// Whether experts are trained at all.
    pub finetune_unsafe_experts: bool,
    /// Whether routers are left alone.
    pub skip_router_training: bool,
    /// AdamW's rate for experts (and for everything else that mode `baseline` trains).
    pub expert_lr: f64,
    /// AdamW's rate for routers.
    pub router_lr: f64,
    /// After the warm-up.
    pub lr_schedule: LrSchedule,
    /// Steps in which the rate rises on a line from 0.
    pub warmup_steps: usize,
    /// AdamW's, decoupled.
    pub weight_decay: f64,
    /// Gradients are scaled down to this global norm; `None`: never.
    pub max_grad_norm: Option<f64>,
    /// Steps in a row that are skipped because a number is not finite, before the run ends.
    pub max_skipped_steps: usize,
    /// The router phase's statistic.
    pub router_statistic: Statistic,
    /// The router phase's divergence.
    pub kl_type: KlType,
    /// Adds the in-batch consistency loss; true if and only if the schedule is joint.
    pub use_router_consistency_loss: bool,
    /// Its factor.
    pub router_consistency_weight: f64,
    /// Its divergence.
    pub router_consistency_type: KlType,
    /// The layers that it covers.
    pub router_consistency_layers: ConsistencyLayers,
    /// Share of safe examples in a joint batch, between 0 and 1.
    pub safe_ratio: f64,

    // outputs
    /// Everything is written here.
    pub output_dir: PathBuf,
    /// Outputs of an earlier run are removed first.
    pub overwrite: bool,
    /// The newest whole checkpoint is continued.
    pub resume: bool,
    /// What is kept of each round.
    pub save_rounds: SaveRounds,
    /// Steps between two lines of the log.
    pub logging_steps: usize,
    /// Steps between two checkpoints within a phase; 0: none but at the ends of phases.
    pub save_steps: usize,
    /// Newest checkpoints that are kept.
    pub keep_checkpoints: usize,

    // the machine
    /// Where the computation runs.
    pub device: Device,
    /// Of activations on a GPU.
    pub precision: Precision,
    /// Data-parallel ranks, as threads of this process; `None`: one, or one a visible GPU.
    pub ranks: Option<usize>,
    /// Between the ranks' GPUs.
    pub transport: Transport,
    /// Whether each operation of a GPU is waited for and counted.
    pub profile: bool,
    /// Threads of a rank; 0: as many as there are cores.
    pub threads: usize,
    /// Time against memory.
    pub recompute: Recompute,
    /// Training steps between two comparisons of the ranks' weights; 0: at checkpoints alone.
    pub check_replicas: usize,
    /// Seconds that a rank waits for the others.
    pub timeout: u64,
}

/// The defaults. `model_name` and `dataset_path` have none: they are empty here, and [`resolve()`] asks for them.
impl Default for RunConfig {
    fn default() -> Self {
        Self {
            model_name: String::new(),
            init: Init::Checkpoint,
            dataset_path: PathBuf::new(),
            eval_dataset_path: None,
            chat_template: None,
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
            routing_tokens: RoutingTokens::Response,
            risk_threshold: 0.05,
            random_match: RandomMatch::Total,
            top_k_experts: 100,
            experts_per_layer: None,
            layers: None,
            select: Select::Highest,
            selection: Selection::Global,
            mode: Mode::Selective,
            schedule: Schedule::Alternate,
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
            kl_type: KlType::Forward,
            use_router_consistency_loss: false,
            router_consistency_weight: 0.1,
            router_consistency_type: KlType::Symmetric,
            router_consistency_layers: ConsistencyLayers::All,
            safe_ratio: 0.5,
            output_dir: "moewarden-output".into(),
            overwrite: false,
            resume: false,
            save_rounds: SaveRounds::Full,
            logging_steps: 100,
            save_steps: 500,
            keep_checkpoints: 2,
            device: Device::Auto,
            precision: Precision::Auto,
            ranks: None,
            transport: Transport::Auto,
            profile: false,
            threads: 0,
            recompute: Recompute::Auto,
            check_replicas: 0,
            timeout: 600,
        }
    }
}

impl RunConfig {
    /// The text of `config.resolved.yaml`: given back by `--config`, it resolves to this very configuration.
    ///
    /// Fails with [`ConfigError::NotText`] on a path that is not UTF-8, which [`resolve()`] never lets through.
    pub fn to_yaml(&self) -> Result<String, ConfigError> {
        serde_saphyr::to_string(self).map_err(|e| ConfigError::NotText(e.to_string()))
    }

    /// The files and folders that the run reads. A hub id is none, and is among them.
    pub fn inputs(&self) -> Vec<&Path> {
        let optional = [&self.eval_dataset_path, &self.chat_template].into_iter().flatten();
        [Path::new(&self.model_name), &self.dataset_path].into_iter().chain(optional.map(PathBuf::as_path)).collect()
    }

    /// Whether the selection decides what is trained (or, in the joint schedule, which layers are aligned).
    pub fn trains_selection(&self) -> bool {
        self.mode == Mode::Selective && (self.finetune_unsafe_experts || self.schedule == Schedule::Joint)
    }

    /// Whether the router phase runs: the two-forward alignment of the alternating schedule.
    pub fn has_router_phase(&self) -> bool {
        self.schedule == Schedule::Alternate && !self.skip_router_training
    }
}

/// What keeps options from becoming a [`RunConfig`].
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The YAML file cannot be opened.
    #[error("cannot read the options file {}", path.display())]
    NotRead {
        /// As given.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A place of the YAML file is wrong.
    #[error("{}:{line}: {message}", path.display())]
    File {
        /// As given.
        path: PathBuf,
        /// From 1; 0 where the parser knows none.
        line: u64,
        /// The cause and the way out.
        message: String,
    },
    /// A required option is absent.
    #[error("{0} is required: give it as a flag, or in the file of --config")]
    Missing(&'static str),
    /// Values that cannot be, or contradict each other, one a line.
    #[error("{}", .0.join("\n"))]
    Invalid(Vec<String>),
    /// A path that YAML cannot hold.
    #[error("an option is not text, so that config.resolved.yaml could not hold it: {0}")]
    NotText(String),
}

impl Coded for ConfigError {
    fn exit_code(&self) -> u8 {
        match self {
            ConfigError::NotRead { source, .. } if source.kind() == std::io::ErrorKind::NotFound => exit::NO_INPUT,
            ConfigError::NotRead { .. } => exit::IO,
            ConfigError::Missing(_) => exit::USAGE,
            ConfigError::File { .. } | ConfigError::Invalid(_) | ConfigError::NotText(_) => exit::CONFIG,
        }
    }
}
