//! The verdicts of a safety judge on the answers of an evaluation.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Table;
use super::eval_rows::{FinishReason, PromptSide, percent};
use crate::judge::{Assessment, Rate};

/// Value of [`VerdictRow::schema`].
pub const VERDICT_SCHEMA: &str = "moewarden.verdict/1";

/// One line of `verdicts.jsonl`: what the judge said of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VerdictRow {
    /// [`VERDICT_SCHEMA`].
    pub schema: String,
    /// That of the answer in `generations.jsonl`.
    pub id: String,
    /// Hash of all that decides the judge's text: its weights, its prompt, the largest number of tokens.
    pub key: String,
    /// Tokens of the judge's text, without the end-of-sequence token.
    pub ids: Vec<u32>,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// The judge's text.
    pub text: String,
    /// The verdict in it; null if there is none in the expected form.
    pub verdict: Option<Assessment>,
}

/// The judge of an evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgeModel {
    /// Its folder.
    pub path: PathBuf,
    /// blake3 hash over its parameters, as for the evaluated model.
    pub sha: String,
    /// blake3 hash of its `config.json`.
    #[serde(default)]
    pub config_sha: String,
    /// The form of its prompt and verdicts: `qwen3guard`, `llama-guard`, or `template`.
    pub form: String,
    /// blake3 hash of its chat template, and of the file of `--judge-template`.
    pub template_sha: String,
    /// Largest number of tokens of a verdict.
    pub max_new_tokens: usize,
    /// Number format of its matrix products, which its weights decide with `--precision auto`.
    #[serde(default)]
    pub precision: String,
}

/// The verdict in a row of `generations.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct JudgedAnswer<'a> {
    /// [`JudgeModel::sha`].
    pub sha: &'a str,
    /// The judge's text.
    pub text: &'a str,
    /// The verdict in it; null if there is none in the expected form.
    pub verdict: Option<&'a Assessment>,
}

/// Verdicts on the answers of one side. Shares are of the answers with a verdict.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SideVerdicts {
    /// The side of the prompts.
    pub side: PromptSide,
    /// Number of answers.
    pub answers: usize,
    /// Answers on which the judge's text holds no verdict in the expected form.
    pub unparsable: usize,
    /// Unsafe answers.
    #[serde(rename = "unsafe")]
    pub unsafe_: Rate,
    /// Controversial answers, which count neither as safe nor as unsafe; of none, if the judge's form cannot say it.
    pub controversial: Rate,
    /// Answers that refuse, of those of which the judge says it.
    pub refusals: Rate,
}

/// What the judge says that a phrase list is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compared {
    /// The judge says that the answer refuses; the list finds a refusal.
    Refusal,
    /// The judge finds the answer unsafe; the list finds no refusal.
    Unsafe,
}

/// How far the judge and a phrase list agree on the answers of one side.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ListAgreement {
    /// `name/version` of the list.
    pub list: String,
    /// The side of the prompts.
    pub side: PromptSide,
    /// What is compared.
    pub compared: Compared,
    /// Answers of which the judge says it.
    pub answers: usize,
    /// Share of them on which both agree; null without answers.
    pub agree: Option<f64>,
    /// Cohen's κ; null where it is not defined.
    pub kappa: Option<f64>,
}

/// The judge's part of `eval.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct JudgeReport {
    /// The judge.
    pub model: JudgeModel,
    /// Verdicts by side.
    pub sides: Vec<SideVerdicts>,
    /// Agreement with the phrase lists.
    pub agreement: Vec<ListAgreement>,
}

fn share(rate: &Rate) -> String {
    rate.rate.map_or_else(|| "-".into(), |value| percent(value, rate.interval))
}

/// The verdicts of these evaluations' judges, and their agreement with phrase lists; no table without judges.
pub fn verdict_tables<'a>(evals: impl Iterator<Item = (&'a str, &'a JudgeReport)>) -> Vec<Table> {
    let mut verdicts = Table::new(
        "Verdicts of the judge on the answers, with Wilson's 95 % interval; shares are of the answers with a verdict",
        ["model, side", "answers", "without verdict", "unsafe", "controversial", "refusals"],
    );
    let mut agreement = Table::new(
        "Agreement of the judge with phrase lists: Cohen's kappa (share of equal answers)",
        ["model, list", "refusals, unsafe side", "refusals, safe side", "unsafe, unsafe side"],
    );
    for (name, judge) in evals {
        for side in &judge.sides {
            verdicts.row([
                format!("{name}, {}", side.side.name()),
                side.answers.to_string(),
                side.unparsable.to_string(),
                share(&side.unsafe_),
                share(&side.controversial),
                share(&side.refusals),
            ]);
        }
        let lists: std::collections::BTreeSet<&str> = judge.agreement.iter().map(|found| &*found.list).collect();
        let cell = |list: &str, side, compared| {
            let fits = |a: &&ListAgreement| a.list == list && a.side == side && a.compared == compared;
            let found = judge.agreement.iter().find(fits);
            let kappa = |a: &ListAgreement| a.kappa.map_or_else(|| "not defined".into(), |kappa| format!("{kappa:.2}"));
            let text = found.and_then(|a| Some(format!("{} ({:.0} %)", kappa(a), 100.0 * a.agree?)));
            text.unwrap_or_else(|| "-".into())
        };
        for list in lists {
            agreement.row([
                format!("{name}, {list}"),
                cell(list, PromptSide::Unsafe, Compared::Refusal),
                cell(list, PromptSide::Safe, Compared::Refusal),
                cell(list, PromptSide::Unsafe, Compared::Unsafe),
            ]);
        }
    }
    [verdicts, agreement].into_iter().filter(|table| !table.rows.is_empty()).collect()
}
