//! Arguments of the commands without run options, and additional arguments of the commands with run options.

use std::path::{Path, PathBuf};

use clap::Args;

use super::raw::heading::{INPUT, MACHINE, OUTPUT};
use super::{ConfigError, Device, Precision, RunConfig, validate};
use crate::data::LongRows;
use crate::experts::RoutingTokens;

/// Generates responses to the unsafe and the safe prompts of a data set, and measures refusals, loss and routing.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct EvalArgs {
    /// Model folder in Hugging Face format, or a hub id that is in the local hub cache
    #[arg(long, value_name = "FOLDER|ID", help_heading = INPUT, visible_alias = "model")]
    pub model_name: String,
    /// Data to evaluate on: a JSON array or JSONL
    #[arg(long, value_name = "FILE", help_heading = INPUT, visible_alias = "dataset")]
    pub dataset_path: PathBuf,
    /// Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", help_heading = INPUT)]
    pub chat_template: Option<PathBuf>,
    /// Maximum number of rows
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
    /// Examples in a micro-batch
    #[arg(long, value_name = "EXAMPLES", help_heading = INPUT, default_value_t = 8, value_parser = at_least_one)]
    pub batch_size: usize,

    /// Generate no responses: only losses, exact replies and routing
    #[arg(long, help_heading = GENERATION, conflicts_with_all = ["max_new_tokens", "temperature", "top_p", "seed"])]
    pub skip_answers: bool,
    /// Maximum length of a generated response in tokens
    #[arg(long, value_name = "TOKENS", help_heading = GENERATION, default_value_t = 128, value_parser = at_least_one)]
    pub max_new_tokens: usize,
    /// Sampling temperature; 0: greedy decoding
    #[arg(long, value_name = "T", help_heading = GENERATION, default_value_t = 0.0, value_parser = temperature)]
    pub temperature: f64,
    /// Nucleus sampling: sample from the most probable tokens with this total probability (above 0, at most 1)
    #[arg(long, value_name = "P", help_heading = GENERATION, default_value_t = 1.0, value_parser = probability)]
    pub top_p: f64,
    /// Random seed of sampling
    #[arg(long, value_name = "N", help_heading = GENERATION, default_value_t = 42, visible_alias = "random-seed")]
    pub seed: u64,

    /// Output folder
    #[arg(long, value_name = "FOLDER", help_heading = OUTPUT, default_value = "moewarden-eval")]
    pub output_dir: PathBuf,
    /// First delete an earlier run's outputs from the output folder; refused if the folder holds any other file
    #[arg(long, help_heading = OUTPUT)]
    pub overwrite: bool,

    /// Device to compute on
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub device: Device,
    /// GPU: number format of activations
    #[arg(long, help_heading = MACHINE, value_enum, default_value_t)]
    pub precision: Precision,
    /// CPU threads; 0: one for each core
    #[arg(long, value_name = "THREADS", help_heading = MACHINE, default_value_t = 0)]
    pub threads: usize,
}

const GENERATION: &str = "Generation";

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

    /// The options of a run that reads the same model and data in the order of the file. Routing frequencies are
    /// counted over prompt tokens: the prompts of the two sides differ, their responses are often equal.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`], with every value out of range.
    pub fn run_config(&self) -> Result<RunConfig, ConfigError> {
        let config = RunConfig {
            model_name: self.model_name.clone(),
            dataset_path: self.dataset_path.clone(),
            chat_template: self.chat_template.clone(),
            max_samples: self.max_samples,
            max_length: self.max_length,
            long_rows: self.long_rows,
            keep_failed: self.keep_failed,
            shuffle: false,
            seed: self.seed,
            routing_tokens: RoutingTokens::Prompt,
            top_k_experts: 1, // `eval` selects no experts
            batch_size: self.batch_size,
            output_dir: self.output_dir.clone(),
            overwrite: self.overwrite,
            device: self.device,
            precision: self.precision,
            threads: self.threads,
            ..RunConfig::default()
        };
        let wrong = validate::problems(&config);
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
    /// Model that the delta was trained from: a folder, or a hub id that is in the local hub cache
    #[arg(long, value_name = "FOLDER|ID")]
    pub base: String,
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

fn number(text: &str, allowed: impl Fn(f64) -> bool, what: &str) -> Result<f64, String> {
    text.parse().ok().filter(|x| allowed(*x)).ok_or_else(|| format!("must be {what}"))
}

fn temperature(text: &str) -> Result<f64, String> {
    number(text, |t| t.is_finite() && t >= 0.0, "a finite number, 0 or above")
}

fn probability(text: &str) -> Result<f64, String> {
    number(text, |p| p > 0.0 && p <= 1.0, "a number above 0, at most 1")
}
