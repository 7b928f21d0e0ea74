//! Questions with choices and with one right answer: what a model still can do.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Table;
use super::eval_rows::{FinishReason, percent};
use crate::judge::Rate;

/// Value of [`QuestionRow::schema`].
pub const QUESTION_SCHEMA: &str = "moewarden.question/1";

/// One line of `questions.jsonl`: a question and what the model makes of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuestionRow {
    /// [`QUESTION_SCHEMA`].
    pub schema: String,
    /// Number of the file, in the order of the options, from 1.
    pub file: usize,
    /// The row's id.
    pub id: String,
    /// Line of the row.
    pub line: usize,
    /// blake3 hash of the tokens of the question, its choices and the right answer.
    #[serde(default)]
    pub digest: String,
    /// Whether the model is right: by the sum of the log-likelihoods, or by its answer.
    pub correct: bool,
    /// A question with choices.
    #[serde(flatten)]
    pub result: QuestionResult,
}

/// What a model makes of a question.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum QuestionResult {
    /// Of a question with choices.
    Choice {
        /// The right choice, from 0.
        answer: usize,
        /// The choice with the highest log-likelihood; of equal ones the first.
        chosen: usize,
        /// The same of log-likelihoods divided by the bytes of the choice.
        chosen_by_byte: usize,
        /// By choice: the sum over its tokens of log p of the token after those before it, in nats.
        log_likelihoods: Vec<f64>,
        /// By choice: number of its tokens.
        tokens: Vec<usize>,
        /// By choice: bytes of its text.
        bytes: Vec<usize>,
    },
    /// Of a question with one right answer.
    Answer {
        /// The right answer.
        answer: String,
        /// What is compared with it; null if `--answer-pattern` does not match. With the pattern, both without commas, dollar signs and
        /// a full stop at the end.
        given: Option<String>,
        /// The whole answer of the model.
        response: String,
        /// Its tokens, without the end-of-sequence token.
        ids: Vec<u32>,
        /// Why it ended.
        finish_reason: FinishReason,
    },
}

/// The results of a file of questions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuestionsReport {
    /// The file.
    pub path: PathBuf,
    /// `--answer-pattern`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer_pattern: Option<String>,
    /// Questions with choices that are answered rightly, by log-likelihood.
    pub choices: Rate,
    /// The same, by log-likelihood divided by the bytes of the choice.
    pub choices_by_byte: Rate,
    /// Questions with one right answer that are answered rightly.
    pub answers: Rate,
}

impl QuestionsReport {
    /// Counts the rows of a file.
    pub fn of<'a>(
        path: PathBuf,
        answer_pattern: Option<String>,
        rows: impl Iterator<Item = &'a QuestionRow> + Clone,
    ) -> Self {
        let choices = rows.clone().filter_map(|row| match &row.result {
            QuestionResult::Choice { answer, chosen_by_byte, .. } => Some((row.correct, chosen_by_byte == answer)),
            QuestionResult::Answer { .. } => None,
        });
        let answers = rows.filter(|row| matches!(row.result, QuestionResult::Answer { .. }));
        Self {
            path,
            answer_pattern,
            choices: Rate::of(choices.clone().map(|(sum, _)| sum)),
            choices_by_byte: Rate::of(choices.map(|(_, by_byte)| by_byte)),
            answers: Rate::of(answers.map(|row| row.correct)),
        }
    }
}

/// The rates of right answers, one row for each evaluation and file.
pub fn questions_table<'a>(evals: impl Iterator<Item = (&'a str, &'a [QuestionsReport])>) -> Table {
    let mut table = Table::new(
        "Questions answered rightly, with Wilson's 95 % interval: choices by log-likelihood, by log-likelihood a byte; one right answer",
        ["model, file", "with choices", "by sum", "by byte", "with one answer", "right"],
    );
    let share = |rate: &Rate| rate.rate.map_or_else(|| "-".into(), |value| percent(value, rate.interval));
    for (name, files) in evals {
        for file in files {
            let stem = file.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
            table.row([
                format!("{name}, {stem}"),
                file.choices.of.to_string(),
                share(&file.choices),
                share(&file.choices_by_byte),
                file.answers.of.to_string(),
                share(&file.answers),
            ]);
        }
    }
    table
}
