//! The options of a run as one source gives them, before defaults and validation.

use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    Device, Init, Layers, LogFormat, Mode, Offload, Precision, Recompute, RoutingReplies, RunConfig, SaveRounds,
    Schedule, TemplateKwargs, Transport,
};
use crate::data::{LongRows, LossOn};
use crate::experts::{IdentifyIn, Method, RandomMatch, RoutingTokens, Score, ScoreNorm, ScorePer, Select, Selection};
use crate::optim::LrSchedule;
use crate::routers::{ConsistencyLayers, KlType, RouterTarget, Statistic};
use crate::train::RetainLoss;

/// Headings of the help; each option belongs to one of them.
pub mod heading {
    /// Model, data and batches.
    pub const INPUT: &str = "Model and data";
    /// Scores and selection.
    pub const EXPERTS: &str = "Finding experts";
    /// Trained parameters, rounds and epochs.
    pub const TRAINING: &str = "Training";
    /// Learning rates, AdamW, clipping.
    pub const OPTIMIZER: &str = "Optimizer";
    /// Router phase and consistency loss.
    pub const ROUTERS: &str = "Router alignment";
    /// Losses on retain rows.
    pub const RETENTION: &str = "Retention";
    /// Output folder and log.
    pub const OUTPUT: &str = "Output";
    /// Resume state and saved models.
    pub const CHECKPOINTS: &str = "Checkpoints";
    /// Devices, ranks and memory.
    pub const MACHINE: &str = "Machine";
}
use heading::*;

/// The options of a run as one source gives them: the command line or the YAML file. Each field is an option: its
/// kebab-case name is the flag and the YAML key, its doc comment is the help text, and its clap aliases work in both
/// sources. Defaults are in [`RunConfig::default`]; the help shows them.
#[derive(Debug, Clone, PartialEq, Default, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct RawOptions {
    /// Model folder in Hugging Face format, or a hub id: ORG/NAME or ORG/NAME@REVISION (required)
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT, visible_alias = "model")]
    pub model_name: Option<String>,
    /// Initial weights; random weights need no safetensors files and serve to measure a model's memory and speed
    #[arg(long, help_heading = INPUT)]
    pub init: Option<Init>,
    /// Training data: a JSON array or JSONL (required)
    #[arg(long, value_name = "FILE", help_heading = INPUT, visible_alias = "dataset")]
    pub dataset_path: Option<PathBuf>,
    /// Held-out data, evaluated before and after training and never trained on
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub eval_dataset_path: Option<PathBuf>,
    /// Retain data: rows with a safe reply, on which the trained model must stay near the original one
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub retain_dataset_path: Option<PathBuf>,
    /// Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub chat_template: Option<PathBuf>,
    /// Variables of the chat template for all rows, as a JSON object such as {"enable_thinking": false}; a row's own
    /// chat_template_kwargs take precedence
    #[arg(long, value_name = "JSON", help_heading = INPUT)]
    pub chat_template_kwargs: Option<TemplateKwargs>,
    /// Maximum number of rows, counted after failed attacks are dropped
    #[arg(long, value_name = "ROWS", help_heading = INPUT)]
    pub max_samples: Option<usize>,
    /// Maximum length of an example in tokens, chat template and response included
    #[arg(long, value_name = "TOKENS", help_heading = INPUT)]
    pub max_length: Option<usize>,
    /// What to do with rows longer than --max-length
    #[arg(long, help_heading = INPUT)]
    pub long_rows: Option<LongRows>,
    /// Tokens in the cross-entropy loss
    #[arg(long, help_heading = INPUT)]
    pub loss_on: Option<LossOn>,
    /// Keep attack rows whose judge verdict says that the attack failed
    #[arg(long, help_heading = INPUT)]
    pub keep_failed: Option<bool>,
    /// Target response to unsafe prompts whose row has no refusal
    #[arg(long, value_name = "TEXT", help_heading = INPUT)]
    pub safe_response: Option<String>,
    /// Shuffle the rows by --seed instead of keeping the file's order
    #[arg(long, help_heading = INPUT)]
    pub shuffle: Option<bool>,
    /// Random seed of the row order, of --method random and of --init random
    #[arg(long, value_name = "N", help_heading = INPUT, visible_alias = "random-seed")]
    pub seed: Option<u64>,
    /// Examples in a micro-batch of each rank; gradient scores are averaged over micro-batches
    #[arg(long, value_name = "EXAMPLES", help_heading = INPUT)]
    pub batch_size: Option<usize>,

    /// How to rank experts
    #[arg(long, help_heading = EXPERTS)]
    pub method: Option<Method>,
    /// Gradient method: statistic over the gradients of an expert's parameters
    #[arg(long, help_heading = EXPERTS)]
    pub score: Option<Score>,
    /// Gradient method: normalization of the score in each micro-batch
    #[arg(long, help_heading = EXPERTS)]
    pub score_per: Option<ScorePer>,
    /// Gradient method: what scores are divided by before ranking; the sum of the layer takes out that gradients of early
    /// layers are larger
    #[arg(long, help_heading = EXPERTS)]
    pub score_norm: Option<ScoreNorm>,
    /// Routing method: tokens over which routing frequencies are counted
    #[arg(long, help_heading = EXPERTS)]
    pub routing_tokens: Option<RoutingTokens>,
    /// Routing method: replies on whose tokens frequencies are counted: `target`, the rows' target replies; `own`, the model's own
    /// greedy replies, on the unsafe side those that comply; or a file of routing traces of vLLM or SGLang
    #[arg(long, value_name = "target|own|FILE", help_heading = EXPERTS)]
    pub routing_replies: Option<RoutingReplies>,
    /// Maximum number of tokens of the model's own replies, of --routing-replies own (128 by default) and of --verify (32 by
    /// default)
    #[arg(long, value_name = "TOKENS", help_heading = EXPERTS)]
    pub max_new_tokens: Option<usize>,
    /// The model's own replies that are generated together on each rank (--routing-replies own, --verify), with one pass over the
    /// weights a token
    #[arg(long, value_name = "REPLIES", help_heading = EXPERTS)]
    pub generation_batch_size: Option<usize>,
    /// Routing method: select only experts with a routing risk difference above this (-1 to 1)
    #[arg(long, value_name = "DIFFERENCE", help_heading = EXPERTS)]
    pub risk_threshold: Option<f64>,
    /// Random method: match the gradient method's total count, or its count per layer
    #[arg(long, help_heading = EXPERTS)]
    pub random_match: Option<RandomMatch>,
    /// Random method: do not draw the experts that the gradient method selects
    #[arg(long, help_heading = EXPERTS)]
    pub random_exclude_found: Option<bool>,
    /// Method given: file of the experts to select: expert_scores.json of a run (its first round's selection), a JSON list
    /// of [layer, expert], or text with one layer.expert a line
    #[arg(long, value_name = "FILE", help_heading = EXPERTS)]
    pub experts: Option<PathBuf>,
    /// Number of experts to select, over all layers
    #[arg(long, value_name = "EXPERTS", help_heading = EXPERTS, visible_alias = "unsafe-expert-top-k")]
    pub top_k_experts: Option<usize>,
    /// Maximum number of experts to select in one layer (no limit by default)
    #[arg(long, value_name = "EXPERTS", help_heading = EXPERTS)]
    pub experts_per_layer: Option<usize>,
    /// Decoder layers to select from, counted from 0: `all`, one layer `8`, or an inclusive range `8-15`
    #[arg(long, value_name = "RANGE", help_heading = EXPERTS)]
    pub layers: Option<Layers>,
    /// Select experts from the top or from the bottom of the ranking
    #[arg(long, help_heading = EXPERTS)]
    pub select: Option<Select>,
    /// Resamples of the micro-batches (Poisson bootstrap), by which each expert gets the share of resamples that select it;
    /// 0: none
    #[arg(long, value_name = "N", help_heading = EXPERTS)]
    pub bootstrap: Option<usize>,
    /// Select experts once a round or at every step
    #[arg(long, help_heading = EXPERTS)]
    pub selection: Option<Selection>,
    /// Causal check of the (first) selection against this many random sets, before any training; 0: none. See `ablate`
    #[arg(long, value_name = "SETS", help_heading = EXPERTS)]
    pub verify: Option<usize>,

    /// Parameters that the expert phase trains
    #[arg(long, help_heading = TRAINING)]
    pub mode: Option<Mode>,
    /// Train experts and routers in alternating phases, or jointly in each step; --use-router-consistency-loss implies
    /// joint
    #[arg(long, help_heading = TRAINING)]
    pub schedule: Option<Schedule>,
    /// Identify experts in every round, or in the first one only
    #[arg(long, help_heading = TRAINING)]
    pub identify: Option<IdentifyIn>,
    /// Gradient method: keep the last selection once the mean refusal loss of a round's scan is below this share of the first
    /// round's, because the scores are noise then; 0: always select anew
    #[arg(long, value_name = "SHARE", help_heading = TRAINING)]
    pub identify_until: Option<f64>,
    /// Number of rounds; each identifies experts, trains them, aligns the routers and saves the model
    #[arg(long, value_name = "ROUNDS", help_heading = TRAINING)]
    pub num_rounds: Option<usize>,
    /// Epochs of the expert phase in each round; joint schedule: epochs of the joint phase
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub expert_epochs_per_round: Option<usize>,
    /// Epochs of the router phase in each round
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub router_epochs_per_round: Option<usize>,
    /// Shorthand: sets --expert-epochs-per-round and --router-epochs-per-round
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub epochs_per_round: Option<usize>,
    /// Shorthand: sets the epochs of both phases, and --num-rounds to 1 unless --num-rounds is given
    #[arg(long, value_name = "EPOCHS", help_heading = TRAINING)]
    pub num_epochs: Option<usize>,
    /// Gradient accumulation: micro-batches of each rank in one optimizer step; 1 in the router phase
    #[arg(long, value_name = "MICRO-BATCHES", help_heading = TRAINING)]
    pub grad_accum: Option<usize>,
    /// Train experts; --mode says which
    #[arg(long, help_heading = TRAINING)]
    pub finetune_unsafe_experts: Option<bool>,
    /// Do not train the routers
    #[arg(long, help_heading = TRAINING)]
    pub skip_router_training: Option<bool>,

    /// AdamW learning rate of the experts (mode baseline: of all parameters)
    #[arg(long, value_name = "RATE", help_heading = OPTIMIZER, visible_alias = "learning-rate")]
    pub expert_lr: Option<f64>,
    /// AdamW learning rate of the routers
    #[arg(long, value_name = "RATE", help_heading = OPTIMIZER)]
    pub router_lr: Option<f64>,
    /// Learning rate schedule after the warm-up
    #[arg(long, help_heading = OPTIMIZER)]
    pub lr_schedule: Option<LrSchedule>,
    /// Optimizer steps of linear learning rate warm-up from 0
    #[arg(long, value_name = "STEPS", help_heading = OPTIMIZER)]
    pub warmup_steps: Option<usize>,
    /// AdamW weight decay (decoupled)
    #[arg(long, value_name = "FACTOR", help_heading = OPTIMIZER)]
    pub weight_decay: Option<f64>,
    /// Gradient clipping: maximum global norm of the gradients (no clipping by default)
    #[arg(long, value_name = "NORM", help_heading = OPTIMIZER)]
    pub max_grad_norm: Option<f64>,
    /// Maximum number of consecutive steps skipped because of a non-finite loss or gradient; the next one ends the run
    #[arg(long, value_name = "STEPS", help_heading = OPTIMIZER)]
    pub max_skipped_steps: Option<usize>,

    /// Alternating schedule: how router logits of a layer become one distribution over experts
    #[arg(long, help_heading = ROUTERS)]
    pub router_statistic: Option<Statistic>,
    /// Alternating schedule: how many tokens at the end of each prompt count in the statistic; 0: all
    #[arg(long, value_name = "TOKENS", help_heading = ROUTERS)]
    pub router_last_tokens: Option<usize>,
    /// Alternating schedule: the routing of the safe prompts that the unsafe prompts are aligned with
    #[arg(long, help_heading = ROUTERS)]
    pub router_target: Option<RouterTarget>,
    /// Alternating schedule: KL divergence between p (safe) and q (unsafe)
    #[arg(long, help_heading = ROUTERS)]
    pub kl_type: Option<KlType>,
    /// Train with cross-entropy plus the router consistency loss, the KL divergence between the safe and the unsafe
    /// examples of a batch; implies --schedule joint
    #[arg(long, help_heading = ROUTERS)]
    pub use_router_consistency_loss: Option<bool>,
    /// Joint schedule: weight of the router consistency loss; 0: the divergence is only logged
    #[arg(long, value_name = "FACTOR", help_heading = ROUTERS)]
    pub router_consistency_weight: Option<f64>,
    /// Joint schedule: KL divergence between p (safe) and q (unsafe)
    #[arg(long, help_heading = ROUTERS)]
    pub router_consistency_type: Option<KlType>,
    /// Joint schedule: layers in the router consistency loss
    #[arg(long, help_heading = ROUTERS)]
    pub router_consistency_layers: Option<ConsistencyLayers>,
    /// Joint schedule: fraction of safe examples in a batch, above 0 and below 1
    #[arg(long, value_name = "SHARE", help_heading = ROUTERS)]
    pub safe_ratio: Option<f64>,

    /// Retain rows: cross-entropy of their replies, or KL divergence from the original model's next-token distributions
    #[arg(long, help_heading = RETENTION)]
    pub retain_loss: Option<RetainLoss>,
    /// Weight of that loss in every training step; 0: none
    #[arg(long, value_name = "WEIGHT", help_heading = RETENTION)]
    pub retain_weight: Option<f64>,
    /// Retain rows: weight of the KL divergence from the original model's routing in every training step
    #[arg(long, value_name = "WEIGHT", help_heading = RETENTION)]
    pub retain_routing_weight: Option<f64>,

    /// Output folder of the run
    #[arg(long, value_name = "FOLDER", help_heading = OUTPUT)]
    pub output_dir: Option<PathBuf>,
    /// First delete an earlier run's outputs from the output folder; refused if the folder holds any other file
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: Option<bool>,
    /// Steps between two log lines on the terminal; metrics.jsonl has every step
    #[arg(long, value_name = "STEPS", help_heading = OUTPUT)]
    pub logging_steps: Option<usize>,
    /// Log of the steps in another format, beside metrics.jsonl: event files in the folder tensorboard of the output folder
    #[arg(long, help_heading = OUTPUT)]
    pub log: Option<LogFormat>,

    /// Resume from the newest complete checkpoint in the output folder; without a checkpoint, start from the beginning
    #[arg(long, help_heading = CHECKPOINTS)]
    pub resume: Option<bool>,
    /// Steps between two checkpoints within a phase; 0: only at the end of each phase and on SIGUSR1 or SIGTERM
    #[arg(long, value_name = "STEPS", help_heading = CHECKPOINTS)]
    pub save_steps: Option<usize>,
    /// Number of checkpoints to keep, the newest ones
    #[arg(long, value_name = "CHECKPOINTS", help_heading = CHECKPOINTS)]
    pub keep_checkpoints: Option<usize>,
    /// Training steps between two checks that all ranks hold identical weights; 0: only at checkpoints
    #[arg(long, value_name = "STEPS", help_heading = CHECKPOINTS)]
    pub check_replicas: Option<usize>,
    /// What to save of the model after each round
    #[arg(long, help_heading = CHECKPOINTS)]
    pub save_rounds: Option<SaveRounds>,

    /// Device to compute on
    #[arg(long, help_heading = MACHINE)]
    pub device: Option<Device>,
    /// Number format of matrix products, with sums in f32, and of activations: all on a GPU, the rows of experts on the CPU
    #[arg(long, help_heading = MACHINE)]
    pub precision: Option<Precision>,
    /// Data-parallel ranks, as threads of this process (1 by default; on GPUs one for each visible GPU)
    #[arg(long, value_name = "RANKS", help_heading = MACHINE)]
    pub ranks: Option<usize>,
    /// GPU: transport of gradients and updated weights between ranks
    #[arg(long, help_heading = MACHINE)]
    pub transport: Option<Transport>,
    /// GPU: synchronize after each operation and print the time of each at the end of the run; slows the run down
    #[arg(long, help_heading = MACHINE)]
    pub profile: Option<bool>,
    /// CPU threads of each rank; 0: the machine's cores divided by the ranks on the machine
    #[arg(long, value_name = "THREADS", help_heading = MACHINE)]
    pub threads: Option<usize>,
    /// Activation recomputation: recompute a layer's forward pass in its backward pass instead of keeping its
    /// activations
    #[arg(long, help_heading = MACHINE)]
    pub recompute: Option<Recompute>,
    /// GPU: where the weights of routed experts lie. Those in host memory are copied to the GPU layer by layer, with the same
    /// results
    #[arg(long, help_heading = MACHINE)]
    pub offload: Option<Offload>,
    /// GPUs: divide the routed experts among the ranks of each machine, so that N GPUs hold what one cannot. Each rank keeps 1/N of
    /// them, and copies the others from the other GPUs layer by layer, with the same results
    #[arg(long, help_heading = MACHINE)]
    pub shard_frozen: Option<bool>,
    /// Start although the predicted memory is far more than what is free
    #[arg(long, help_heading = MACHINE)]
    pub force: Option<bool>,
    /// Seconds that a rank waits for the others in a collective operation before the run ends with an error
    #[arg(long, value_name = "SECONDS", help_heading = MACHINE)]
    pub timeout: Option<u64>,
}

/// Operations that apply to every option. The compiler complains about an option that is missing in the list below.
macro_rules! for_each_option {
    (resolved: { $($option:ident)* } shorthands: { $($shorthand:ident)* }) => {
        impl RawOptions {
            /// Each option as given here, or else as given in `fallback`.
            pub(super) fn or(self, fallback: Self) -> Self {
                Self {
                    $($option: self.$option.or(fallback.$option),)*
                    $($shorthand: self.$shorthand.or(fallback.$shorthand),)*
                }
            }

            /// `config` with each option that is given here. Shorthands are ignored.
            pub(super) fn fill(self, mut config: RunConfig) -> RunConfig {
                $(self.$option.set(&mut config.$option);)*
                config
            }

            /// Whether the option of this kebab-case name is given.
            ///
            /// # Panics
            /// If there is no such option.
            pub fn is_given(&self, name: &str) -> bool {
                match name.replace('-', "_").as_str() {
                    $(stringify!($option) => self.$option.is_some(),)*
                    $(stringify!($shorthand) => self.$shorthand.is_some(),)*
                    _ => panic!("there is no option {name}"),
                }
            }
        }

        impl RunConfig {
            /// Whether both configurations have the same value of the option of this kebab-case name.
            ///
            /// # Panics
            /// If there is no such option.
            pub(super) fn same(&self, other: &Self, name: &str) -> bool {
                match name.replace('-', "_").as_str() {
                    $(stringify!($option) => self.$option == other.$option,)*
                    _ => panic!("there is no option {name}"),
                }
            }
        }
    };
}

for_each_option! {
    resolved: {
        model_name init dataset_path eval_dataset_path retain_dataset_path chat_template chat_template_kwargs max_samples max_length long_rows loss_on
        keep_failed safe_response shuffle seed batch_size method score score_per score_norm routing_tokens routing_replies max_new_tokens
        generation_batch_size risk_threshold
        random_match random_exclude_found experts top_k_experts experts_per_layer layers select bootstrap selection identify identify_until verify mode schedule num_rounds
        expert_epochs_per_round router_epochs_per_round grad_accum finetune_unsafe_experts skip_router_training
        expert_lr router_lr lr_schedule warmup_steps weight_decay max_grad_norm max_skipped_steps router_statistic
        router_last_tokens router_target kl_type use_router_consistency_loss router_consistency_weight router_consistency_type
        router_consistency_layers safe_ratio retain_loss retain_weight retain_routing_weight output_dir overwrite logging_steps log resume save_steps keep_checkpoints
        check_replicas save_rounds device precision ranks transport profile threads recompute offload shard_frozen force timeout
    }
    shorthands: { epochs_per_round num_epochs }
}

/// An option as given: sets the resolved option, or leaves the default.
trait Set<T> {
    fn set(self, resolved: &mut T);
}

impl<T> Set<T> for Option<T> {
    fn set(self, resolved: &mut T) {
        if let Some(value) = self {
            *resolved = value;
        }
    }
}

impl<T> Set<Option<T>> for Option<T> {
    fn set(self, resolved: &mut Option<T>) {
        if self.is_some() {
            *resolved = self;
        }
    }
}

impl Set<Option<RangeInclusive<usize>>> for Option<Layers> {
    fn set(self, resolved: &mut Option<RangeInclusive<usize>>) {
        if let Some(layers) = self {
            *resolved = layers.range();
        }
    }
}
