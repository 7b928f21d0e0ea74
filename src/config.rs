//! The resolved, validated configuration of a run. Nothing below this module reads flags, files of options or the
//! environment.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::data::{LongRows, LossOn};
use crate::experts::{Method, RandomMatch, RoutingTokens, Score, ScorePer, Select, Selection};
use crate::optim::LrSchedule;
use crate::routers::{ConsistencyLayers, KlType, Statistic};

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

/// Everything that decides a run. The YAML file, the flags and `config.resolved.yaml` use these names.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunConfig {
    // the model and the data
    /// As given: a folder or a hub id.
    pub model_name: String,
    pub dataset_path: PathBuf,
    /// A held-out file, measured before and after, never trained on.
    pub eval_dataset_path: Option<PathBuf>,
    pub chat_template: Option<PathBuf>,
    pub max_samples: usize,
    pub max_length: usize,
    pub long_rows: LongRows,
    pub loss_on: LossOn,
    pub keep_failed: bool,
    pub safe_response: String,
    pub shuffle: bool,
    pub seed: u64,

    // finding experts
    pub method: Method,
    pub score: Score,
    pub score_per: ScorePer,
    pub routing_tokens: RoutingTokens,
    pub risk_threshold: f64,
    pub random_match: RandomMatch,
    pub top_k_experts: usize,
    pub experts_per_layer: Option<usize>,
    /// Inclusive range of decoder layers.
    pub layers: Option<RangeInclusive<usize>>,
    pub select: Select,
    pub selection: Selection,

    // training
    pub mode: Mode,
    pub schedule: Schedule,
    pub num_rounds: usize,
    pub expert_epochs_per_round: usize,
    pub router_epochs_per_round: usize,
    pub batch_size: usize,
    pub grad_accum: usize,
    pub finetune_unsafe_experts: bool,
    pub skip_router_training: bool,
    pub expert_lr: f64,
    pub router_lr: f64,
    pub lr_schedule: LrSchedule,
    pub warmup_steps: usize,
    pub weight_decay: f64,
    pub max_grad_norm: Option<f64>,
    pub router_statistic: Statistic,
    pub kl_type: KlType,
    pub use_router_consistency_loss: bool,
    pub router_consistency_weight: f64,
    pub router_consistency_type: KlType,
    pub router_consistency_layers: ConsistencyLayers,
    pub safe_ratio: f64,

    // outputs
    pub output_dir: PathBuf,
    pub overwrite: bool,
    pub resume: bool,
    pub save_rounds: SaveRounds,
    pub logging_steps: usize,

    // the machine
    pub device: Device,
    pub ranks: usize,
    /// Threads of a rank; 0: as many as there are cores.
    pub threads: usize,
    pub recompute: Recompute,
}
