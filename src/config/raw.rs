//! What was asked for, before defaults and checks.

use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{Device, Init, Layers, Mode, Precision, Recompute, SaveRounds, Schedule, Transport};
use crate::data::{LongRows, LossOn};
use crate::experts::{Method, RandomMatch, RoutingTokens, Score, ScorePer, Select, Selection};
use crate::optim::LrSchedule;
use crate::routers::{ConsistencyLayers, KlType, Statistic};

/// The topics of the options, as headings of the help.
pub mod heading {
    /// What is read.
    pub const INPUT: &str = "Model and data";
    /// What is scored and selected.
    pub const EXPERTS: &str = "Finding experts";
    /// What is trained, and how long.
    pub const TRAINING: &str = "Training";
    /// Rates and AdamW.
    pub const OPTIMIZER: &str = "Optimizer";
    /// The two ways to align routers.
    pub const ROUTERS: &str = "Router alignment";
    /// What is written.
    pub const OUTPUT: &str = "Output";
    /// What an interrupted run goes on from.
    pub const CHECKPOINTS: &str = "Checkpoints";
    /// Where it runs.
    pub const MACHINE: &str = "Machine";
}
use heading::*;

/// The options of a run as one source gives them: the command line, or the YAML file. A field is an option: its
/// kebab-case name is the flag and the YAML key, its comment the help, and clap's aliases hold for both. Defaults are
/// not written here: the help shows those of [`super::RunConfig::default`].
#[derive(Debug, Clone, PartialEq, Default, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RawOptions {
    /// Model: a Hugging Face folder, or a hub id found in the local hub cache (required)
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT, visible_alias = "model")]
    pub model_name: Option<String>,
    /// Where the weights come from; random ones show a model's size and speed without its safetensors files
    #[arg(long, help_heading = INPUT)]
    pub init: Option<Init>,
    /// Training rows: a JSON array or JSONL (required)
    #[arg(long, value_name = "FILE", help_heading = INPUT, visible_alias = "dataset")]
    pub dataset_path: Option<PathBuf>,
    /// Held-out rows, measured before and after training, never trained on
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub eval_dataset_path: Option<PathBuf>,
    /// Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub chat_template: Option<PathBuf>,
    /// Rows to use at most, counted after failed attacks are dropped
    #[arg(long, value_name = "ROWS", help_heading = INPUT)]
    pub max_samples: Option<usize>,
    /// Length of an example in tokens, template and response included
    #[arg(long, value_name = "TOKENS", help_heading = INPUT)]
    pub max_length: Option<usize>,
    /// What happens to longer rows
    #[arg(long, help_heading = INPUT)]
    pub long_rows: Option<LongRows>,
    /// The tokens that carry loss
    #[arg(long, help_heading = INPUT)]
    pub loss_on: Option<LossOn>,
    /// Keep attack rows whose own verdict says that the attack failed
    #[arg(long, help_heading = INPUT)]
    pub keep_failed: Option<bool>,
    /// The target of unsafe prompts whose row has no refusal
    #[arg(long, value_name = "TEXT", help_heading = INPUT)]
    pub safe_response: Option<String>,
    /// Order the rows by the seed instead of keeping the file's order
    #[arg(long, help_heading = INPUT)]
    pub shuffle: Option<bool>,
    /// Seed of the order of rows, of random experts and of random weights
    #[arg(long, value_name = "N", help_heading = INPUT, visible_alias = "random-seed")]
    pub seed: Option<u64>,
    /// Examples in a micro-batch of one rank; gradient scores are means over micro-batches
    #[arg(long, value_name = "EXAMPLES", help_heading = INPUT)]
    pub batch_size: Option<usize>,

    /// How experts are ranked
    #[arg(long, help_heading = EXPERTS)]
    pub method: Option<Method>,
    /// Gradient method: what is measured over an expert's parameters
    #[arg(long, help_heading = EXPERTS)]
    pub score: Option<Score>,
    /// Gradient method: what the score is divided by
    #[arg(long, help_heading = EXPERTS)]
    pub score_per: Option<ScorePer>,
    /// Routing method: the tokens that are counted
    #[arg(long, help_heading = EXPERTS)]
    pub routing_tokens: Option<RoutingTokens>,
    /// Routing method: only experts with a risk difference above this qualify (-1 to 1)
    #[arg(long, value_name = "DIFFERENCE", help_heading = EXPERTS)]
    pub risk_threshold: Option<f64>,
    /// Random method: what it has in common with the gradient method
    #[arg(long, help_heading = EXPERTS)]
    pub random_match: Option<RandomMatch>,
    /// Experts to select, over all layers together
    #[arg(long, value_name = "EXPERTS", help_heading = EXPERTS, visible_alias = "unsafe-expert-top-k")]
    pub top_k_experts: Option<usize>,
    /// Experts to select from one layer at most (no limit by default)
    #[arg(long, value_name = "EXPERTS", help_heading = EXPERTS)]
    pub experts_per_layer: Option<usize>,
    /// Decoder layers to select from, counted from 0: `all`, `8` or `8-15`
    #[arg(long, value_name = "RANGE", help_heading = EXPERTS)]
    pub layers: Option<Layers>,
    /// Which end of the ranking is selected
    #[arg(long, help_heading = EXPERTS)]
    pub select: Option<Select>,
    /// When experts are selected
    #[arg(long, help_heading = EXPERTS)]
    pub selection: Option<Selection>,

    /// What the expert phase trains
    #[arg(long, help_heading = TRAINING)]
    pub mode: Option<Mode>,
    /// Experts and routers in turns or in one step; joint if --use-router-consistency-loss is given
    #[arg(long, help_heading = TRAINING)]
    pub schedule: Option<Schedule>,
    /// Rounds; each identifies, trains experts, aligns routers and saves
    #[arg(long, value_name = "ROUNDS", help_heading = TRAINING)]
    pub num_rounds: Option<usize>,
    /// Passes over the data in the expert phase of a round
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub expert_epochs_per_round: Option<usize>,
    /// Passes over the data in the router phase of a round
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub router_epochs_per_round: Option<usize>,
    /// Sets the epochs of both phases
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub epochs_per_round: Option<usize>,
    /// Sets the epochs of both phases of a single round; the number of rounds becomes 1 where it is not given
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub num_epochs: Option<usize>,
    /// Micro-batches of a rank in one optimizer step
    #[arg(long, value_name = "MICRO-BATCHES", help_heading = TRAINING)]
    pub grad_accum: Option<usize>,
    /// Train experts
    #[arg(long, help_heading = TRAINING)]
    pub finetune_unsafe_experts: Option<bool>,
    /// Leave the routers as they are
    #[arg(long, help_heading = TRAINING)]
    pub skip_router_training: Option<bool>,

    /// AdamW's learning rate for experts (in mode baseline: for all parameters)
    #[arg(long, value_name = "RATE", help_heading = OPTIMIZER, visible_alias = "learning-rate")]
    pub expert_lr: Option<f64>,
    /// AdamW's learning rate for routers
    #[arg(long, value_name = "RATE", help_heading = OPTIMIZER)]
    pub router_lr: Option<f64>,
    /// How the rate moves after the warm-up
    #[arg(long, help_heading = OPTIMIZER)]
    pub lr_schedule: Option<LrSchedule>,
    /// Optimizer steps in which the rate rises on a line from 0
    #[arg(long, value_name = "STEPS", help_heading = OPTIMIZER)]
    pub warmup_steps: Option<usize>,
    /// AdamW's decoupled weight decay
    #[arg(long, value_name = "FACTOR", help_heading = OPTIMIZER)]
    pub weight_decay: Option<f64>,
    /// Scale gradients down to this global norm (off by default)
    #[arg(long, value_name = "NORM", help_heading = OPTIMIZER)]
    pub max_grad_norm: Option<f64>,

    /// Steps in a row that are skipped because a loss or gradient is not finite, before the run ends; 0: it ends at once
    #[arg(long, value_name = "STEPS", help_heading = OPTIMIZER)]
    pub max_skipped_steps: Option<usize>,

    /// Alternating schedule: how a layer's logits become one distribution
    #[arg(long, help_heading = ROUTERS)]
    pub router_statistic: Option<Statistic>,
    /// Alternating schedule: divergence between p (safe) and q (unsafe)
    #[arg(long, help_heading = ROUTERS)]
    pub kl_type: Option<KlType>,
    /// Train by cross-entropy plus the divergence within a batch of safe and unsafe examples
    #[arg(long, help_heading = ROUTERS)]
    pub use_router_consistency_loss: Option<bool>,
    /// Joint schedule: factor of the consistency loss
    #[arg(long, value_name = "FACTOR", help_heading = ROUTERS)]
    pub router_consistency_weight: Option<f64>,
    /// Joint schedule: divergence between p (safe) and q (unsafe)
    #[arg(long, help_heading = ROUTERS)]
    pub router_consistency_type: Option<KlType>,
    /// Joint schedule: layers that the consistency loss covers
    #[arg(long, help_heading = ROUTERS)]
    pub router_consistency_layers: Option<ConsistencyLayers>,
    /// Joint schedule: share of safe examples in a batch, between 0 and 1
    #[arg(long, value_name = "SHARE", help_heading = ROUTERS)]
    pub safe_ratio: Option<f64>,

    /// Folder for everything that is written
    #[arg(long, value_name = "FOLDER", help_heading = OUTPUT)]
    pub output_dir: Option<PathBuf>,
    /// Remove an earlier run's outputs from the output folder first; refused if it holds anything else
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: Option<bool>,
    /// Optimizer steps between two lines of the log
    #[arg(long, value_name = "STEPS", help_heading = OUTPUT)]
    pub logging_steps: Option<usize>,

    /// Continue the newest whole checkpoint of the output folder, or start if there is none
    #[arg(long, help_heading = CHECKPOINTS)]
    pub resume: Option<bool>,
    /// Steps between two checkpoints within a phase; 0: none but at the ends of phases and on SIGUSR1 or SIGTERM
    #[arg(long, value_name = "STEPS", help_heading = CHECKPOINTS)]
    pub save_steps: Option<usize>,
    /// Newest checkpoints that are kept
    #[arg(long, value_name = "CHECKPOINTS", help_heading = CHECKPOINTS)]
    pub keep_checkpoints: Option<usize>,
    /// Training steps between two proofs that all ranks hold the same weights; 0: at every checkpoint
    #[arg(long, value_name = "STEPS", help_heading = CHECKPOINTS)]
    pub check_replicas: Option<usize>,
    /// What is kept of each round's model
    #[arg(long, help_heading = CHECKPOINTS)]
    pub save_rounds: Option<SaveRounds>,

    /// Where the computation runs
    #[arg(long, help_heading = MACHINE)]
    pub device: Option<Device>,
    /// GPU: number format of activations
    #[arg(long, help_heading = MACHINE)]
    pub precision: Option<Precision>,
    /// Data-parallel ranks, as threads of this process (one; on GPUs one for each that is visible)
    #[arg(long, value_name = "RANKS", help_heading = MACHINE)]
    pub ranks: Option<usize>,
    /// GPU: how gradients and new weights get from rank to rank
    #[arg(long, help_heading = MACHINE)]
    pub transport: Option<Transport>,
    /// GPU: wait for each operation and show at the end where the time went; slows the run down
    #[arg(long, help_heading = MACHINE)]
    pub profile: Option<bool>,
    /// CPU threads of a rank; 0: its part of the machine's cores
    #[arg(long, value_name = "THREADS", help_heading = MACHINE)]
    pub threads: Option<usize>,
    /// When a layer's forward is computed again in its backward instead of being kept
    #[arg(long, help_heading = MACHINE)]
    pub recompute: Option<Recompute>,
    /// Seconds that a rank waits for the others before it takes them for hung
    #[arg(long, value_name = "SECONDS", help_heading = MACHINE)]
    pub timeout: Option<u64>,
}

impl RawOptions {
    /// Complains of numbers that are not finite. (JSON, in which sources are laid over each other, would lose them.)
    pub(super) fn not_finite(&self) -> Vec<String> {
        let numbers = [
            ("risk-threshold", self.risk_threshold),
            ("expert-lr", self.expert_lr),
            ("router-lr", self.router_lr),
            ("weight-decay", self.weight_decay),
            ("max-grad-norm", self.max_grad_norm),
            ("router-consistency-weight", self.router_consistency_weight),
            ("safe-ratio", self.safe_ratio),
        ];
        let wrong = numbers.iter().filter_map(|(name, x)| x.filter(|x| !x.is_finite()).map(|x| (name, x)));
        wrong.map(|(name, x)| format!("--{name} is {x}, but must be a finite number")).collect()
    }
}
