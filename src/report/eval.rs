//! The outputs of an evaluation: `eval.json` and the rows of `generations.jsonl`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::eval_rows::{CutOff, FinishReason, PromptSide, percent};
use super::onset::{RefusalOnset, onset_table};
use super::questions::{QuestionsReport, questions_table};
use super::verdicts::{JudgeReport, JudgedAnswer, verdict_tables};
use super::{Error, OtherRouting, Table, read_json};
use crate::data::{Message, Penalties};
use crate::experts::ExpertId;
use crate::judge::Rate;

/// Value of [`EvalReport::schema`].
pub const EVAL_SCHEMA: &str = "moewarden.eval/1";
/// Value of [`GenerationRow::schema`].
pub const GENERATION_SCHEMA: &str = "moewarden.generation/1";

/// Options of text generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Softmax temperature; 0: greedy decoding.
    pub temperature: f64,
    /// Nucleus sampling: cumulative probability of the tokens to sample from.
    pub top_p: f64,
    /// Maximum number of tokens of an answer.
    pub max_new_tokens: usize,
    /// Seed of the random number generator.
    pub seed: u64,
    /// Of `generation_config.json`.
    #[serde(flatten)]
    pub penalties: Penalties,
}

impl Sampling {
    /// Greedy decoding: the most probable token each time.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { temperature: 0.0, top_p: 1.0, max_new_tokens, seed: 0, penalties: Penalties::default() }
    }

    /// The same with these penalties.
    #[must_use]
    pub fn with(self, penalties: Penalties) -> Self {
        Self { penalties, ..self }
    }
}

/// The evaluated model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvaluatedModel {
    /// Its folder.
    pub path: PathBuf,
    /// blake3 hash over its parameters, in their stored dtypes and in moewarden's order: independent of how the weights
    /// are sharded into files.
    pub sha: String,
    /// `tuned` if the model is in the output folder of a moewarden run, else `base`.
    pub variant: String,
    /// Whose routing it was evaluated with; absent: its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_routing: Option<OtherRouting>,
}

/// One line of `generations.jsonl`: an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GenerationRow<'a> {
    /// [`GENERATION_SCHEMA`].
    pub schema: &'static str,
    /// Line and side (`12-unsafe`; of the second row that begins in a line `12.2-unsafe`): unique in the file, and the same in every
    /// evaluation of the same data file.
    pub id: String,
    /// Line of the row: the same for its unsafe and its safe prompt.
    pub behavior_id: String,
    /// The side of the row.
    pub category: PromptSide,
    /// Messages of the prompt.
    pub messages: &'a [Message],
    /// The rendered prompt, special tokens included.
    pub prompt_text: String,
    /// The answer, without special tokens.
    pub response: &'a str,
    /// Its tokens, without the end-of-sequence token.
    pub ids: &'a [u32],
    /// Why the answer ended.
    pub finish_reason: FinishReason,
    /// Number of tokens of the answer, without the end-of-sequence token.
    pub n_tokens: usize,
    /// Options of text generation.
    pub sampling: &'a Sampling,
    /// The evaluated model.
    pub model: &'a EvaluatedModel,
    /// blake3 hash of the chat template's source.
    pub template_sha: String,
    /// For each phrase list: the number of the token (from 1) with which the refusal is complete; null without one.
    pub refused_at: BTreeMap<String, Option<usize>>,
    /// The verdict of `--judge`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub judge: Option<JudgedAnswer<'a>>,
    /// For each phrase list (`name/version`): whether it classifies the answer as a refusal. A proxy for human
    /// judgement.
    pub proxy: BTreeMap<String, bool>,
}

/// A mean cross-entropy over tokens.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct MeanLoss {
    /// In nats per token; null if there are no loss tokens.
    pub mean: Option<f64>,
    /// Number of tokens that carry loss.
    pub tokens: usize,
}

/// How many replies on one side the model gives by itself.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ExactRate {
    /// The side of the prompts. On the unsafe side the replies are refusals.
    pub side: PromptSide,
    /// Replies of which every token is the most probable one, given those before: greedy decoding gives the reply.
    #[serde(flatten)]
    pub exact: Rate,
    /// How many of the replies are `--safe-response`, as the row has none.
    #[serde(default)]
    pub safe_responses: usize,
}

/// Refusals among the answers to the prompts of one side, by one phrase list.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RefusalRate {
    /// `name/version` of the list.
    pub list: String,
    /// The side of the prompts.
    pub side: PromptSide,
    /// Number of answers that the list classifies as refusals.
    pub refused: usize,
    /// Number of all answers.
    pub answers: usize,
    /// `refused` / `answers`.
    pub rate: f64,
    /// Wilson's 95 % confidence interval of the rate.
    pub interval: [f64; 2],
}

/// How much the routing of safe and unsafe prompts differs.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct RoutingDifference {
    /// (layer, Σ p ln(p/q)), the KL divergence between the mean routing probabilities p of all tokens of safe prompts and q of all
    /// tokens of unsafe prompts. Empty if the data have prompts of one side only.
    pub divergence_by_layer: Vec<(usize, f64)>,
    /// The experts with the largest risk difference (routing frequency on unsafe minus on safe prompts), and that
    /// difference, descending. Empty if the data have prompts of one side only.
    pub risk_difference_top: Vec<(ExpertId, f64)>,
}

/// How far the evaluated model is from another one, on the replies to safe prompts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DriftReport {
    /// The folder of the other model.
    pub from: PathBuf,
    /// blake3 hash over its parameters.
    pub sha: String,
    /// Rows with tokens that carry loss.
    pub rows: usize,
    /// These tokens.
    pub tokens: usize,
    /// Mean over the tokens of KL(p_other ‖ p) of the next-token distributions, in nats.
    pub kl: f64,
    /// Share of the tokens at which both models have the same most probable token.
    pub same_top_token: f64,
}

/// The content of `eval.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalReport {
    /// [`EVAL_SCHEMA`].
    pub schema: String,
    /// The evaluated model.
    pub model: EvaluatedModel,
    /// The data file; absent where only questions were asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset_path: Option<PathBuf>,
    /// Number of rows kept.
    pub rows: usize,
    /// Options of text generation.
    pub sampling: Sampling,
    /// Cross-entropy of the refusals (the targets) on unsafe prompts.
    pub ce_unsafe: MeanLoss,
    /// Cross-entropy of the replies on safe prompts.
    pub ce_safe: MeanLoss,
    /// Exact replies by side; empty in files of earlier versions.
    #[serde(default)]
    pub exact: Vec<ExactRate>,
    /// Refusal rates by phrase list and side; empty with `--skip-answers`. A proxy for human judgement.
    pub refusals: Vec<RefusalRate>,
    /// Answers that were cut off, by side; empty with `--skip-answers`, and in files of earlier versions.
    #[serde(default)]
    pub cut_off: Vec<CutOff>,
    /// When answers refuse, by phrase list and side; empty with `--skip-answers`, and in files of earlier versions.
    #[serde(default)]
    pub refusal_onset: Vec<RefusalOnset>,
    /// Difference of the routing of safe and unsafe prompts.
    pub routing: RoutingDifference,
    /// The distance from the model of `--drift-from`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drift: Option<DriftReport>,
    /// Right answers to the questions of each file; empty without questions, and in files of earlier versions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub questions: Vec<QuestionsReport>,
    /// Verdicts of `--judge`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judge: Option<JudgeReport>,
}

impl EvalReport {
    /// Reads `eval.json` of an earlier evaluation.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Invalid`] if the schema is not [`EVAL_SCHEMA`].
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file: Self = read_json(path)?;
        if file.schema != EVAL_SCHEMA {
            let reason = format!("its schema is {:?}, not {EVAL_SCHEMA:?}", file.schema);
            return Err(Error::Invalid { path: path.to_owned(), reason });
        }
        Ok(file)
    }

    /// Mean of `divergence_by_layer` over the layers; `None` if it is empty.
    pub fn mean_divergence(&self) -> Option<f64> {
        let layers = &self.routing.divergence_by_layer;
        (!layers.is_empty()).then(|| layers.iter().map(|(_, kl)| kl).sum::<f64>() / layers.len() as f64)
    }

    fn refusal(&self, list: &str, side: PromptSide) -> String {
        let found = self.refusals.iter().find(|r| r.list == list && r.side == side);
        found.map_or_else(|| "-".into(), |r| percent(r.rate, r.interval))
    }

    fn exact(&self, side: PromptSide) -> String {
        let found = self.exact.iter().find(|exact| exact.side == side);
        let rate = found.and_then(|exact| Some((exact.exact.rate?, exact.exact.interval)));
        rate.map_or_else(|| "-".into(), |(rate, interval)| percent(rate, interval))
    }

    /// How many of the replies are `--safe-response`: `unsafe 3 of 3, safe 3 of 3`; `None` if the data have all of them.
    fn safe_responses(&self) -> Option<String> {
        let of_side = |e: &ExactRate| format!("{} {} of {}", e.side.name(), e.safe_responses, e.exact.of);
        let any = self.exact.iter().any(|exact| exact.safe_responses > 0);
        any.then(|| self.exact.iter().map(of_side).collect::<Vec<_>>().join(", "))
    }
}

/// Compares named evaluations in tables: losses and routing, with one row for each evaluation; refusals, with one row for each
/// evaluation and phrase list; verdicts of judges.
pub fn eval_tables(evals: &[(String, EvalReport)]) -> Vec<Table> {
    let format_loss = |x: Option<f64>| x.map_or_else(|| "-".to_owned(), |x| format!("{x:.4}"));
    // A reply that is not the data's is said where there is one.
    let completed = evals.iter().any(|(_, eval)| eval.safe_responses().is_some());
    let header = ["model", "unsafe", "exact", "safe", "exact", "divergence"].into_iter();
    let mut losses = Table::new(
        "Cross-entropy of the replies (nats per token), exact replies (greedy decoding gives them) with Wilson's 95 % interval, and \
         divergence of routing between safe and unsafe prompts",
        header.chain(completed.then_some("replies that are --safe-response")),
    );
    let mut refusals = Table::new(
        "Refusals by phrase list, with Wilson's 95 % interval. A proxy for human judgement; read generations.jsonl",
        ["model, list", "unsafe answers", "refused", "safe answers", "refused"],
    );
    for (name, eval) in evals {
        let name = match &eval.model.other_routing {
            None => name.clone(),
            Some(other) => format!("{name}, {}", other.from.phrase()),
        };
        // Without rows, only questions were asked.
        if eval.rows > 0 {
            let cells = [
                name.clone(),
                format_loss(eval.ce_unsafe.mean),
                eval.exact(PromptSide::Unsafe),
                format_loss(eval.ce_safe.mean),
                eval.exact(PromptSide::Safe),
                eval.mean_divergence().map_or_else(|| "-".into(), |kl| format!("{kl:.5}")),
            ];
            let of_option = completed.then(|| eval.safe_responses().unwrap_or_else(|| "none".into()));
            losses.row(cells.into_iter().chain(of_option));
        }
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
    let cut_off = cut_off_table(evals);
    let onsets = onset_table(evals.iter().map(|(name, eval)| (&**name, &eval.refusal_onset[..])));
    let judged = evals.iter().filter_map(|(name, eval)| Some((&**name, eval.judge.as_ref()?)));
    let questions = questions_table(evals.iter().map(|(name, eval)| (&**name, &eval.questions[..])));
    let drift = drift_table(evals);
    let tables = [losses, drift, questions, refusals, cut_off].into_iter().filter(|table| !table.rows.is_empty());
    tables.chain(onsets).chain(verdict_tables(judged)).collect()
}

/// The distance from the models of `--drift-from`, one row for each evaluation that measured it.
fn drift_table(evals: &[(String, EvalReport)]) -> Table {
    let mut table = Table::new(
        "Drift on the replies to safe prompts: KL(original ‖ model) of the next-token distributions, in nats a token",
        ["model", "original", "rows", "KL", "same most probable token"],
    );
    for (name, drift) in evals.iter().filter_map(|(name, eval)| Some((name, eval.drift.as_ref()?))) {
        table.row([
            name.clone(),
            drift.from.display().to_string(),
            drift.rows.to_string(),
            format!("{:.6}", drift.kl),
            format!("{:.2} %", 100.0 * drift.same_top_token),
        ]);
    }
    table
}

/// How many answers the largest number of tokens cut off, one row for each evaluation with answers.
fn cut_off_table(evals: &[(String, EvalReport)]) -> Table {
    let mut table = Table::new(
        "Answers that --max-new-tokens cut off before they ended",
        ["model", "most tokens", "unsafe answers", "cut off", "safe answers", "cut off"],
    );
    for (name, eval) in evals.iter().filter(|(_, eval)| !eval.cut_off.is_empty()) {
        let found = |side| eval.cut_off.iter().find(|found| found.side == side);
        let answers = |side| found(side).map_or(0, |found| found.answers).to_string();
        let cut_off = |side| found(side).map_or_else(|| "-".into(), |found| found.cut_off.to_string());
        table.row([
            name.clone(),
            eval.sampling.max_new_tokens.to_string(),
            answers(PromptSide::Unsafe),
            cut_off(PromptSide::Unsafe),
            answers(PromptSide::Safe),
            cut_off(PromptSide::Safe),
        ]);
    }
    table
}
