//! Arguments of the commands without run options, and additional arguments of the commands with run options.

use std::path::{Path, PathBuf};

use clap::Args;

use super::raw::heading::{INPUT, MACHINE, OUTPUT};
use super::{ConfigError, Device, Offload, Precision, RunConfig, TemplateKwargs, validate};
use crate::data::LongRows;
use crate::experts::RoutingTokens;
use crate::judge::{JudgeForm, Matching};
use crate::train::Switch;

/// Generates responses to the unsafe and the safe prompts of a data set, and measures refusals, loss and routing.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct EvalArgs {
    /// Model folder in Hugging Face format, or a hub id: ORG/NAME or ORG/NAME@REVISION
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT, visible_alias = "model")]
    pub model_name: String,
    /// Download models given as hub ids that are not in the local hub cache
    #[arg(long, help_heading = INPUT)]
    pub download: bool,
    /// Data to evaluate on: a JSON array or JSONL. Can be left out where --questions are given
    #[arg(long, value_name = "FILE", help_heading = INPUT, visible_alias = "dataset", required_unless_present = "questions")]
    pub dataset_path: Option<PathBuf>,
    /// Restored routers: evaluate with the router weights of this model, such as the one before training
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT, conflicts_with = "route_as")]
    pub routers: Option<String>,
    /// Locked routing: every token takes the experts and routing weights that this model computes for it
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT)]
    pub route_as: Option<String>,
    /// Original model: measure how far the evaluated one has moved from it on the replies to safe prompts (KL divergence of the
    /// next-token distributions)
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT, requires = "dataset_path")]
    pub drift_from: Option<String>,
    /// Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub chat_template: Option<PathBuf>,
    /// Variables of the chat template for all rows, as a JSON object such as {"enable_thinking": false}; a row's own
    /// chat_template_kwargs take precedence
    #[arg(long, value_name = "JSON", help_heading = INPUT)]
    pub chat_template_kwargs: Option<TemplateKwargs>,
    /// Questions with choices or with one right answer, to see what the model still can do: a JSON array or JSONL. Can be given several
    /// times
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub questions: Vec<PathBuf>,
    /// Regular expression of which the last match in a response (its first group, if it has one) is compared with the right answer, in
    /// place of the whole response
    #[arg(long, value_name = "REGEX", help_heading = INPUT, requires = "questions")]
    pub answer_pattern: Option<String>,
    /// Maximum number of rows of each file
    #[arg(long, value_name = "ROWS", help_heading = INPUT, default_value_t = 128, value_parser = at_least_one)]
    pub max_samples: usize,
    /// Maximum length of an example in tokens, chat template and response included
    #[arg(long, value_name = "TOKENS", help_heading = INPUT, default_value_t = 512, value_parser = at_least_one)]
    pub max_length: usize,
    /// What to do with rows longer than --max-length
    #[arg(long, help_heading = INPUT, value_enum, default_value_t)]
    pub long_rows: LongRows,
    /// Keep attack rows whose judge verdict says that the attack failed
    #[arg(long, help_heading = INPUT)]
    pub keep_failed: bool,
    /// Reply that is measured where an attack, pair or unsafe row has none (default: that of `train`)
    #[arg(long, value_name = "TEXT", help_heading = INPUT, requires = "dataset_path")]
    pub safe_response: Option<String>,
    /// Examples in a micro-batch
    #[arg(long, value_name = "EXAMPLES", help_heading = INPUT, default_value_t = 8, value_parser = at_least_one)]
    pub batch_size: usize,

    /// Generate no responses: only losses, exact replies and routing
    #[arg(long, help_heading = GENERATION, conflicts_with_all = ["max_new_tokens", "generation_batch_size", "temperature", "top_p", "seed"])]
    pub skip_answers: bool,
    /// Maximum length of a generated response in tokens
    #[arg(long, value_name = "TOKENS", help_heading = GENERATION, default_value_t = NEW_TOKENS, value_parser = at_most_many)]
    pub max_new_tokens: usize,
    /// Responses that are generated together on each rank, with one pass over the weights a token
    #[arg(long, value_name = "RESPONSES", help_heading = GENERATION, default_value_t = 16, value_parser = at_least_one)]
    pub generation_batch_size: usize,
    /// Sampling temperature; 0: greedy decoding
    #[arg(long, value_name = "T", help_heading = GENERATION, default_value_t = 0.0, value_parser = temperature)]
    pub temperature: f64,
    /// Nucleus sampling: sample from the most probable tokens with this total probability (above 0, at most 1)
    #[arg(long, value_name = "P", help_heading = GENERATION, default_value_t = 1.0, value_parser = probability)]
    pub top_p: f64,
    /// Random seed of sampling
    #[arg(long, value_name = "N", help_heading = GENERATION, default_value_t = 42, visible_alias = "random-seed")]
    pub seed: u64,

    /// Safety judge that reads the responses: a model folder, or a hub id
    #[arg(long, value_name = "FOLDER|ID", help_heading = JUDGE, conflicts_with = "skip_answers", requires = "dataset_path")]
    pub judge: Option<String>,
    /// How the judge is asked and how it answers (by default as its family does: qwen3 as qwen3guard, llama as llama-guard)
    #[arg(long, help_heading = JUDGE, value_enum, requires = "judge", conflicts_with = "judge_template")]
    pub judge_form: Option<JudgeForm>,
    /// YAML file with another prompt for the judge and the patterns of its verdicts
    #[arg(long, value_name = "FILE", help_heading = JUDGE, requires = "judge")]
    pub judge_template: Option<PathBuf>,
    /// Variables of the judge's own chat template, as a JSON object such as {"excluded_category_keys": ["S14"]}
    #[arg(long, value_name = "JSON", help_heading = JUDGE, requires = "judge", conflicts_with = "judge_template")]
    pub judge_chat_template_kwargs: Option<TemplateKwargs>,
    /// Maximum length of a text of the judge in tokens
    #[arg(long, value_name = "TOKENS", help_heading = JUDGE, default_value_t = 128, value_parser = at_most_many, requires = "judge")]
    pub judge_max_new_tokens: usize,

    /// Output folder
    #[arg(long, value_name = "FOLDER", help_heading = OUTPUT, default_value = "moewarden-eval")]
    pub output_dir: PathBuf,
    /// First delete an earlier run's outputs from the output folder; refused if the folder holds any other file
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,
    /// Continue an evaluation that was interrupted: answers in its generations.jsonl are not generated again. Without one in the
    /// output folder, start
    #[arg(long, help_heading = OUTPUT, conflicts_with = "overwrite")]
    pub resume: bool,

    /// Device to compute on
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub device: Device,
    /// Number format of matrix products, with sums in f32, and of activations: all on a GPU, the rows of experts on the CPU
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub precision: Precision,
    /// GPU: where the weights of routed experts lie. Those in host memory are copied to the GPU layer by layer, with the same
    /// results
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub offload: Offload,
    /// GPUs: divide the routed experts among the ranks of each machine, so that N GPUs hold what one cannot. Each rank keeps 1/N of
    /// them, and copies the others from the other GPUs layer by layer, with the same results
    #[arg(long, help_heading = MACHINE)]
    pub shard_frozen: bool,
    /// Data-parallel ranks, as threads of this process (1 by default; on GPUs one for each visible GPU)
    #[arg(long, value_name = "RANKS", help_heading = MACHINE)]
    pub ranks: Option<usize>,
    /// CPU threads of each rank; 0: the machine's cores divided by the ranks on the machine
    #[arg(long, value_name = "THREADS", help_heading = MACHINE, default_value_t = 0)]
    pub threads: usize,
    /// Seconds that a rank waits for the others in a collective operation before the run ends with an error
    #[arg(long, value_name = "SECONDS", help_heading = MACHINE, default_value_t = 600)]
    pub timeout: u64,
}

/// Refuses to place experts where all weights are in the host's memory.
fn placed_without_gpu(config: &RunConfig) -> impl Iterator<Item = String> {
    let inert = validate::options_without_effect(config).into_iter();
    let inert = inert.filter(|(option, _)| ["offload", "shard-frozen"].contains(option));
    inert.map(|(option, why)| validate::would_do_nothing(option, why))
}

/// The most tokens of a response of `eval` and `compare` by default.
pub(super) const NEW_TOKENS: usize = 128;
const GENERATION: &str = "Generation";
const JUDGE: &str = "Judge";

impl EvalArgs {
    /// The arguments of an evaluation of `model` on `rows`, with the defaults of the command line.
    ///
    /// # Panics
    /// Never: the required arguments are there.
    pub fn of(model: String, rows: &Path) -> Self {
        #[derive(clap::Parser)]
        struct Line {
            #[command(flatten)]
            args: EvalArgs,
        }
        let rows = rows.as_os_str();
        let words = ["eval".as_ref(), "--model-name".as_ref(), model.as_ref(), "--dataset-path".as_ref(), rows];
        <Line as clap::Parser>::parse_from(words).args
    }

    /// The reply that is measured where a row has none.
    pub fn safe_response(&self) -> String {
        self.safe_response.clone().unwrap_or_else(|| RunConfig::default().safe_response)
    }

    /// The options of a run that reads the same model and data in the order of the file. Routing frequencies are
    /// counted over prompt tokens: the prompts of the two sides differ, their responses are often equal.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], with every value out of range.
    pub fn run_config(&self) -> Result<RunConfig, ConfigError> {
        let config = RunConfig {
            model_name: self.model_name.clone(),
            dataset_path: self.dataset_path.clone().unwrap_or_default(),
            chat_template: self.chat_template.clone(),
            chat_template_kwargs: self.chat_template_kwargs.clone().unwrap_or_default(),
            max_samples: self.max_samples,
            max_length: self.max_length,
            long_rows: self.long_rows,
            keep_failed: self.keep_failed,
            safe_response: self.safe_response(),
            shuffle: false,
            seed: self.seed,
            routing_tokens: RoutingTokens::Prompt,
            top_k_experts: 1, // `eval` selects no experts
            batch_size: self.batch_size,
            output_dir: self.output_dir.clone(),
            overwrite: self.overwrite,
            resume: self.resume,
            device: self.device,
            precision: self.precision,
            offload: self.offload,
            shard_frozen: self.shard_frozen,
            ranks: self.ranks,
            threads: self.threads,
            timeout: self.timeout,
            ..RunConfig::default()
        };
        let mut wrong = validate::problems(&config);
        wrong.extend(placed_without_gpu(&config));
        if self.temperature == 0.0 {
            let given = [("--top-p", self.top_p != 1.0), ("--seed", self.seed != RunConfig::default().seed)];
            wrong.extend(given.into_iter().filter(|(_, given)| *given).map(|(option, _)| {
                format!("{option} would do nothing: --temperature 0 decodes greedily; leave it out")
            }));
        }
        if !wrong.is_empty() {
            return Err(ConfigError::Invalid(wrong));
        }
        Ok(config)
    }
}

/// Switches a selection of experts off in the model, compares it with random sets, and says whether it causes the answers to
/// unsafe prompts.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct AblateArgs {
    /// Model folder in Hugging Face format, or a hub id: ORG/NAME or ORG/NAME@REVISION
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT, visible_alias = "model")]
    pub model_name: String,
    /// Download models given as hub ids that are not in the local hub cache
    #[arg(long, help_heading = INPUT)]
    pub download: bool,
    /// Rows with unsafe prompts and refusals: a JSON array or JSONL
    #[arg(long, value_name = "FILE", help_heading = INPUT, visible_alias = "dataset")]
    pub dataset_path: PathBuf,
    /// Benign rows that must not suffer: chat rows labelled safe, with an assistant turn. By default, such rows of --dataset-path
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub benign_dataset_path: Option<PathBuf>,
    /// Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub chat_template: Option<PathBuf>,
    /// Variables of the chat template for all rows, as a JSON object such as {"enable_thinking": false}; a row's own
    /// chat_template_kwargs take precedence
    #[arg(long, value_name = "JSON", help_heading = INPUT)]
    pub chat_template_kwargs: Option<TemplateKwargs>,
    /// Maximum number of rows of each file
    #[arg(long, value_name = "ROWS", help_heading = INPUT, default_value_t = 128, value_parser = at_least_one)]
    pub max_samples: usize,
    /// Maximum length of an example in tokens, chat template and response included
    #[arg(long, value_name = "TOKENS", help_heading = INPUT, default_value_t = 512, value_parser = at_least_one)]
    pub max_length: usize,
    /// What to do with rows longer than --max-length
    #[arg(long, help_heading = INPUT, value_enum, default_value_t)]
    pub long_rows: LongRows,
    /// Keep attack rows whose judge verdict says that the attack failed
    #[arg(long, help_heading = INPUT)]
    pub keep_failed: bool,
    /// Refusal of unsafe prompts whose row has none (default: that of `train`)
    #[arg(long, value_name = "TEXT", help_heading = INPUT)]
    pub safe_response: Option<String>,
    /// Examples in a micro-batch of each rank
    #[arg(long, value_name = "EXAMPLES", help_heading = INPUT, default_value_t = 8, value_parser = at_least_one)]
    pub batch_size: usize,
    /// Maximum length of the model's own answers in tokens
    #[arg(long, value_name = "TOKENS", help_heading = INPUT, default_value_t = 32, value_parser = at_most_many)]
    pub max_new_tokens: usize,
    /// Answers of the model that are generated together on each rank, with one pass over the weights a token
    #[arg(long, value_name = "ANSWERS", help_heading = INPUT, default_value_t = 16, value_parser = at_least_one)]
    pub generation_batch_size: usize,

    /// The selection to judge: an expert_scores.json (its first round), JSON `[[layer, expert], ..]`, or `layer.expert` separated
    /// by white space or commas
    #[arg(long, value_name = "FILE", help_heading = CHECK)]
    pub experts: PathBuf,
    /// Number of random sets of the same size to compare with; a verdict of "localised" needs 99
    #[arg(long, value_name = "SETS", help_heading = CHECK, default_value_t = 100, value_parser = at_most_many)]
    pub random_sets: usize,
    /// What random sets have in common with the selection besides their size
    #[arg(long = "match", id = "match", help_heading = CHECK, value_enum, default_value_t)]
    pub matching: Matching,
    /// How experts are switched off
    #[arg(long, help_heading = CHECK, value_enum, default_value_t)]
    pub switch: Switch,
    /// Random seed of the random sets
    #[arg(long, value_name = "N", help_heading = CHECK, default_value_t = 42, visible_alias = "random-seed")]
    pub seed: u64,

    /// Output folder
    #[arg(long, value_name = "FOLDER", help_heading = OUTPUT, default_value = "moewarden-ablate")]
    pub output_dir: PathBuf,
    /// First delete an earlier run's outputs from the output folder; refused if the folder holds any other file
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,

    /// Device to compute on
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub device: Device,
    /// Number format of matrix products, with sums in f32, and of activations: all on a GPU, the rows of experts on the CPU
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub precision: Precision,
    /// GPU: where the weights of routed experts lie. Those in host memory are copied to the GPU layer by layer, with the same
    /// results
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub offload: Offload,
    /// GPUs: divide the routed experts among the ranks of each machine, so that N GPUs hold what one cannot. Each rank keeps 1/N of
    /// them, and copies the others from the other GPUs layer by layer, with the same results
    #[arg(long, help_heading = MACHINE)]
    pub shard_frozen: bool,
    /// Data-parallel ranks, as threads of this process (1 by default; on GPUs one for each visible GPU)
    #[arg(long, value_name = "RANKS", help_heading = MACHINE)]
    pub ranks: Option<usize>,
    /// CPU threads of each rank; 0: the machine's cores divided by the ranks on the machine
    #[arg(long, value_name = "THREADS", help_heading = MACHINE, default_value_t = 0)]
    pub threads: usize,
    /// Seconds that a rank waits for the others in a collective operation before the run ends with an error
    #[arg(long, value_name = "SECONDS", help_heading = MACHINE, default_value_t = 600)]
    pub timeout: u64,
}

const CHECK: &str = "Causal check";

impl AblateArgs {
    /// The options of a run that reads the same model and data in the order of the file. The benign rows are its held-out
    /// data.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], with every value out of range.
    pub fn run_config(&self) -> Result<RunConfig, ConfigError> {
        let default = RunConfig::default();
        let config = RunConfig {
            model_name: self.model_name.clone(),
            dataset_path: self.dataset_path.clone(),
            eval_dataset_path: self.benign_dataset_path.clone(),
            chat_template: self.chat_template.clone(),
            chat_template_kwargs: self.chat_template_kwargs.clone().unwrap_or_default(),
            max_samples: self.max_samples,
            max_length: self.max_length,
            long_rows: self.long_rows,
            keep_failed: self.keep_failed,
            safe_response: self.safe_response.clone().unwrap_or(default.safe_response.clone()),
            shuffle: false,
            seed: self.seed,
            top_k_experts: 1, // the selection is given
            batch_size: self.batch_size,
            generation_batch_size: self.generation_batch_size,
            output_dir: self.output_dir.clone(),
            overwrite: self.overwrite,
            device: self.device,
            precision: self.precision,
            offload: self.offload,
            shard_frozen: self.shard_frozen,
            ranks: self.ranks,
            threads: self.threads,
            timeout: self.timeout,
            ..default
        };
        let mut wrong = validate::problems(&config);
        wrong.extend(placed_without_gpu(&config));
        if !wrong.is_empty() {
            return Err(ConfigError::Invalid(wrong));
        }
        Ok(config)
    }
}

/// Draws heatmaps of the scores and selections of finished runs, and compares the runs.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ReportArgs {
    /// Output folders of `train`, `identify` or `eval` runs
    #[arg(required = true, value_name = "RUN")]
    pub runs: Vec<PathBuf>,
    /// Output folder
    #[arg(long, value_name = "FOLDER", default_value = "moewarden-report")]
    pub output_dir: PathBuf,
    /// First delete an earlier run's outputs from the output folder; refused if the folder holds any other file
    #[arg(long)]
    pub overwrite: bool,
}

/// Merges a base model and a delta into a complete model folder in Hugging Face format.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct ExportArgs {
    /// Model that the delta was trained from: a folder, or a hub id: ORG/NAME or ORG/NAME@REVISION
    #[arg(long, value_name = "FOLDER|ID")]
    pub base: String,
    /// Download models given as hub ids that are not in the local hub cache
    #[arg(long)]
    pub download: bool,
    /// Folder or safetensors file of a round, saved with --save-rounds delta
    #[arg(long, value_name = "PATH")]
    pub delta: PathBuf,
    /// Output folder
    #[arg(long, value_name = "FOLDER")]
    pub output_dir: PathBuf,
    /// Replace the model in the output folder once the new one is complete; refused if the folder holds any other file
    #[arg(long)]
    pub overwrite: bool,
}

/// Options of `check` in addition to those of a run.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct CheckArgs {
    /// Number of rendered examples to show, with the loss mask marked
    #[arg(long, value_name = "EXAMPLES", default_value_t = 2)]
    pub show: usize,
    /// Do not read the weights to find NaN and infinite ones, which takes as long as reading the files
    #[arg(long)]
    pub skip_weights: bool,
}

/// Generates a tiny model and data set, trains and reports: the whole pipeline in seconds.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct QuickstartArgs {
    /// Output folder
    #[arg(long, value_name = "FOLDER", default_value = "moewarden-quickstart")]
    pub output_dir: PathBuf,
    /// Write into a folder that is not empty, replacing files of the same names
    #[arg(long)]
    pub overwrite: bool,
}

fn at_least_one(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(0) => Err("must be at least 1".into()),
        Ok(n) => Ok(n),
        Err(e) => Err(format!("{e}")),
    }
}

/// From 1 to [`validate::MOST`].
fn at_most_many(text: &str) -> Result<usize, String> {
    match at_least_one(text)? {
        n if n > validate::MOST => Err(format!("must be at most {}", validate::MOST)),
        n => Ok(n),
    }
}

fn number(text: &str, allowed: impl Fn(f64) -> bool, what: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x| allowed(*x)).ok_or_else(|| format!("must be {what}"))
}

fn temperature(text: &str) -> Result<f64, String> {
    number(text, |t| t.is_finite() && t >= 0.0, "a finite number, 0 or above")
}

fn probability(text: &str) -> Result<f64, String> {
    number(text, |p| p > 0.0 && p <= 1.0, "a number above 0, at most 1")
}
