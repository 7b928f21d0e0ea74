//! What an evaluation found: `eval.json`, and the rows of `generations.jsonl`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Error, Table, read_json};
use crate::data::Message;
use crate::experts::ExpertId;

/// The value of [`EvalReport::schema`].
pub const EVAL_SCHEMA: &str = "moewarden.eval/1";
/// The value of [`GenerationRow::schema`].
pub const GENERATION_SCHEMA: &str = "moewarden.generation/1";

/// How answers were generated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0: always the likeliest token.
    pub temperature: f64,
    /// Share of the probability that is sampled from.
    pub top_p: f64,
    /// Tokens of an answer at most.
    pub max_new_tokens: usize,
    /// Of the sampling.
    pub seed: u64,
}

/// Which model answered.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluatedModel {
    /// Its folder.
    pub path: PathBuf,
    /// blake3 over its parameters, in their stored types and in moewarden's order: the same for the same weights, however
    /// they are cut into files.
    pub sha: String,
    /// `tuned` if the folder is that of a moewarden run, else `base`.
    pub variant: String,
}

/// The side of a row that a prompt is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptSide {
    /// The request that should be refused.
    Unsafe,
    /// Its plain twin, or a prompt labelled safe.
    Safe,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FinishReason {
    /// The model said so.
    Stop,
    /// It reached the most tokens.
    Length,
}

/// One answer: a line of `generations.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerationRow<'a> {
    /// [`GENERATION_SCHEMA`].
    pub schema: &'static str,
    /// Line and side: unique in the file, the same in every evaluation of the same rows.
    pub id: String,
    /// What both sides of a row have in common: its line.
    pub behavior_id: String,
    /// What the data say of the prompt.
    pub category: PromptSide,
    /// The prompt's turns.
    pub messages: &'a [Message],
    /// The prompt as the model saw it, special tokens included.
    pub prompt_text: String,
    /// The answer, without special tokens.
    pub response: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// Its tokens, without the one that ended it.
    pub n_tokens: usize,
    /// How it was sampled.
    pub sampling: &'a Sampling,
    /// Who answered.
    pub model: &'a EvaluatedModel,
    /// blake3 of the chat template's source.
    pub template_sha: &'a str,
    /// By phrase list (`name/version`): whether it calls the answer a refusal. A proxy.
    pub proxy: BTreeMap<String, bool>,
}

/// A mean cross-entropy.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MeanLoss {
    /// Nats a token; null where there is no token.
    pub mean: Option<f64>,
    /// Tokens that carry loss.
    pub tokens: usize,
}

/// Refusals among the answers to one side's prompts, by one phrase list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusalRate {
    /// `name/version` of the list.
    pub list: String,
    /// Whose prompts.
    pub side: PromptSide,
    /// Answers that it calls refusals.
    pub refused: usize,
    /// All answers.
    pub answers: usize,
    /// Their quotient.
    pub rate: f64,
    /// Wilson's 95 % confidence interval.
    pub interval: [f64; 2],
}

/// How differently safe and unsafe prompts are routed.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RoutingDifference {
    /// (layer, Σ p ln(p/q)), p the mean routing of safe prompts, q that of unsafe ones; mean over micro-batches. Empty where
    /// the data lack a side.
    pub divergence_by_layer: Vec<(usize, f64)>,
    /// The experts whose frequency is most larger on unsafe prompts, and by how much. Empty where the data lack a side.
    pub risk_difference_top: Vec<(ExpertId, f64)>,
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// [`EVAL_SCHEMA`].
    pub schema: String,
    /// Who was evaluated.
    pub model: EvaluatedModel,
    /// The rows.
    pub dataset_path: PathBuf,
    /// Rows kept.
    pub rows: usize,
    /// How answers were generated.
    pub sampling: Sampling,
    /// Cross-entropy of the refusals (the targets) on unsafe prompts.
    pub ce_unsafe: MeanLoss,
    /// Cross-entropy of the replies on safe prompts.
    pub ce_safe: MeanLoss,
    /// By list and side. A proxy: phrases are not judgement.
    pub refusals: Vec<RefusalRate>,
    /// Safe against unsafe prompts.
    pub routing: RoutingDifference,
    /// Wall-clock seconds of all answers.
    pub seconds: f64,
}

impl EvalReport {
    /// Reads the file of an earlier evaluation.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Invalid`] if the schema is another.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file: Self = read_json(path)?;
        if file.schema != EVAL_SCHEMA {
            let reason = format!("its schema is {:?}, not {EVAL_SCHEMA:?}", file.schema);
            return Err(Error::Invalid { path: path.to_owned(), reason });
        }
        Ok(file)
    }

    /// Mean divergence over the layers; `None` where the data lack a side.
    pub fn mean_divergence(&self) -> Option<f64> {
        let layers = &self.routing.divergence_by_layer;
        (!layers.is_empty()).then(|| layers.iter().map(|(_, kl)| kl).sum::<f64>() / layers.len() as f64)
    }

    fn refusal(&self, list: &str, side: PromptSide) -> String {
        let found = self.refusals.iter().find(|r| r.list == list && r.side == side);
        found.map_or_else(
            || "-".into(),
            |r| {
                let [low, high] = r.interval.map(|x| 100.0 * x);
                format!("{:.1} % [{low:.1}, {high:.1}]", 100.0 * r.rate)
            },
        )
    }
}

/// The tables of some evaluations side by side: losses and routing, then refusals, a row for each evaluation.
pub fn eval_tables(evals: &[(String, EvalReport)]) -> Vec<Table> {
    let number = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
    let mut losses = Table::new(
        "Cross-entropy of the replies in the data (nats a token), and divergence of routing between safe and unsafe prompts",
        ["model", "unsafe", "safe", "divergence"],
    );
    let mut refusals = Table::new(
        "Refusals by phrase list, with Wilson's 95 % interval. A proxy: phrases are not judgement; read generations.jsonl",
        ["model, list", "unsafe answers", "refused", "safe answers", "refused"],
    );
    for (name, eval) in evals {
        losses.row([
            name.clone(),
            number(eval.ce_unsafe.mean),
            number(eval.ce_safe.mean),
            eval.mean_divergence().map_or_else(|| "-".into(), |kl| format!("{kl:.5}")),
        ]);
        let lists: std::collections::BTreeSet<&str> = eval.refusals.iter().map(|r| r.list.as_str()).collect();
        let answers = |list: &str, side| {
            let rate = eval.refusals.iter().find(|r| r.list == list && r.side == side);
            rate.map_or(0, |r| r.answers).to_string()
        };
        for list in lists {
            refusals.row([
                format!("{name}, {list}"),
                answers(list, PromptSide::Unsafe),
                eval.refusal(list, PromptSide::Unsafe),
                answers(list, PromptSide::Safe),
                eval.refusal(list, PromptSide::Safe),
            ]);
        }
    }
    vec![losses, refusals]
}
