//! Paired differences between evaluations of the same rows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::eval_rows::{PromptSide, REPLY_LOSSES, ReplyLossRow};
use super::questions::{QuestionResult, QuestionRow, QuestionsReport};
use super::verdicts::JudgeModel;
use super::{Error, EvalReport, Rows, Table, read_rows};
use crate::judge::{Assessment, PairedDifference, Safety};

/// Measures by name.
pub type Outcomes = BTreeMap<String, Measured>;

/// Yes or no for each item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Measured {
    /// How it was measured. Two evaluations are compared only if this is equal.
    basis: String,
    items: BTreeMap<String, bool>,
}

impl Measured {
    /// Yes or no by item.
    pub fn new(basis: String, items: BTreeMap<String, bool>) -> Self {
        Self { basis, items }
    }

    /// Yes or no of each item.
    pub fn answers(&self) -> impl Iterator<Item = bool> {
        self.items.values().copied()
    }

    /// Whether both were measured in the same way.
    pub fn is_comparable_with(&self, other: &Self) -> bool {
        self.basis == other.basis
    }

    /// Both answers to each item that both have; `None` if they were measured in different ways.
    pub fn pairs(&self, other: &Self) -> Option<Vec<(bool, bool)>> {
        let pair = |(item, yes): (&String, &bool)| Some((*self.items.get(item)?, *yes));
        self.is_comparable_with(other).then(|| other.items.iter().filter_map(pair).collect())
    }
}

/// What is read of a row of `generations.jsonl`.
#[derive(Deserialize)]
struct Generated {
    id: String,
    category: PromptSide,
    messages: Value,
    #[serde(default)]
    prompt_text: String,
    proxy: BTreeMap<String, bool>,
    #[serde(default)]
    judge: Option<Judged>,
}

#[derive(Deserialize)]
struct Judged {
    verdict: Option<Assessment>,
}

/// The outcomes of an evaluation, from the rows in its folder: refusals by phrase list, verdicts of the judge, exact replies, and right
/// answers to questions; `warn` hears of a torn last line, and of rows that are missing. Items of two evaluations are the same if they
/// have the same messages, or the same tokens of reply or question: rows that repeat others are one item, as they are not independent
/// of each other. Of answers that are drawn at random each row is an item, with its id.
///
/// # Errors
/// [`Error::Missing`]; [`Error::Row`].
pub fn outcomes(dir: &Path, eval: &EvalReport, warn: &mut dyn FnMut(String)) -> Result<Outcomes, Error> {
    let sampling = format!("{:?}", eval.sampling);
    // Neither the folder nor rounding makes it another judge.
    let judge = eval.judge.as_ref().map(|judge| JudgeModel {
        path: PathBuf::new(),
        precision: String::new(),
        ..judge.model.clone()
    });
    let judge = format!("{judge:?} {sampling}");
    let names = file_names(&eval.questions);
    let mut prompts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let drawn = eval.sampling.temperature > 0.0;
    let distinct = |id: &str, text: String| if drawn { format!("{id} {text}") } else { text };
    let mut out = Outcomes::new();
    let mut add = |what: String, basis: &str, item: &str, yes: bool| {
        let new = || Measured { basis: basis.to_owned(), items: BTreeMap::new() };
        out.entry(what).or_insert_with(new).items.insert(item.to_owned(), yes);
    };
    for row in rows::<Generated>(&dir.join("generations.jsonl"), answers_of(eval), warn)? {
        let messages = row.messages.to_string();
        // The same turns may come with other tools or variables, which only the rendered prompt shows.
        let texts = prompts.entry(messages.clone()).or_default();
        let number = texts.iter().position(|text| *text == row.prompt_text).unwrap_or_else(|| {
            texts.push(row.prompt_text);
            texts.len() - 1
        });
        let (item, side) = (distinct(&row.id, format!("{number} {messages}")), row.category.name());
        for (list, refuses) in row.proxy {
            add(format!("{side} prompts: refused, {list}"), &sampling, &item, refuses);
        }
        if let Some(verdict) = row.judge.and_then(|judged| judged.verdict) {
            add(format!("{side} prompts: judged unsafe"), &judge, &item, verdict.safety == Safety::Unsafe);
            if let Some(refusal) = verdict.refusal {
                add(format!("{side} prompts: judged a refusal"), &judge, &item, refusal);
            }
        }
    }
    let replies = eval.exact.iter().map(|side| side.exact.of).sum();
    for row in rows::<ReplyLossRow>(&dir.join(REPLY_LOSSES), replies, warn)?.into_iter().filter(|row| row.tokens > 0) {
        let what = format!("{} prompts: exact replies", row.side.name());
        add(what, "", &row.digest, row.exact);
    }
    let questions = eval.questions.iter().map(|file| file.choices.of + file.answers.of).sum();
    for row in rows::<QuestionRow>(&dir.join("questions.jsonl"), questions, warn)? {
        let place = row.file.wrapping_sub(1);
        let name = names.get(place).map_or("", String::as_str);
        let pattern = eval.questions.get(place).and_then(|file| file.answer_pattern.as_ref());
        let (kind, basis) = match row.result {
            QuestionResult::Choice { .. } => ("choices", String::new()),
            QuestionResult::Answer { .. } => {
                ("answers", format!("{} tokens, {pattern:?}", eval.sampling.max_new_tokens))
            }
        };
        let digest = if kind == "choices" { row.digest } else { distinct(&row.id, row.digest) };
        add(format!("{name}: right, {kind}"), &basis, &digest, row.correct);
    }
    Ok(out)
}

/// The drift of each reply to a safe prompt from the model of `--drift-from`, in nats a token, from the rows in the folder of an
/// evaluation.
///
/// # Errors
/// As [`outcomes`].
pub fn drift_by_reply(dir: &Path) -> Result<BTreeMap<String, f64>, Error> {
    let rows = rows::<ReplyLossRow>(&dir.join(REPLY_LOSSES), 0, &mut |_| ())?; // what is missing was told by `outcomes`
    let drift = |row: ReplyLossRow| Some((row.digest, row.drift?));
    Ok(rows.into_iter().filter_map(drift).collect())
}

/// How many answers eval.json counts.
fn answers_of(eval: &EvalReport) -> usize {
    let of_side = |side| eval.refusals.iter().filter(|rate| rate.side == side).map(|rate| rate.answers).max();
    [PromptSide::Unsafe, PromptSide::Safe].into_iter().filter_map(of_side).sum()
}

/// The rows of a file; none if it does not exist. `counted`: how many eval.json counts.
fn rows<T: DeserializeOwned>(path: &Path, counted: usize, warn: &mut dyn FnMut(String)) -> Result<Vec<T>, Error> {
    let Rows { rows, torn } = if path.exists() { read_rows(path)? } else { Rows { rows: Vec::new(), torn: None } };
    torn.into_iter().for_each(&mut *warn);
    if rows.len() < counted {
        let (found, path) = (rows.len(), path.display());
        warn(format!("{path} holds {found} of the {counted} rows that eval.json counts: the others are not compared"));
    }
    Ok(rows)
}

/// The names of the files; those that repeat an earlier one with their number among these.
fn file_names(files: &[QuestionsReport]) -> Vec<String> {
    let name = |file: &QuestionsReport| {
        file.path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    };
    let names: Vec<String> = files.iter().map(name).collect();
    let numbered = |i: usize| match names[..i].iter().filter(|earlier| **earlier == names[i]).count() {
        0 => names[i].clone(),
        n => format!("{} ({})", names[i], n + 1),
    };
    (0..names.len()).map(numbered).collect()
}

/// The differences of each evaluation from the first, on the items that both have.
pub fn paired_table(evals: &[(String, Outcomes)]) -> Table {
    let mut table = Table::new(
        "Paired differences from the first evaluation, in points, with 95 % intervals by bootstrap over the items that both have",
        ["evaluation, measure", "items", "first", "this", "difference"],
    );
    let Some(((_, first), others)) = evals.split_first() else { return table };
    for (name, outcomes) in others {
        for (what, ours) in outcomes {
            let Some(theirs) = first.get(what) else { continue };
            let label = format!("{name}, {what}");
            let Some(pairs) = theirs.pairs(ours) else {
                table.row([&label, "-", "-", "-", "not compared: another judge, or other options of generation"]);
                continue;
            };
            let Some(found) = PairedDifference::of(&pairs) else { continue };
            let count = |yes: fn(&(bool, bool)) -> bool| pairs.iter().filter(|pair| yes(pair)).count().to_string();
            let interval = found.interval.map_or_else(
                || "no interval".into(),
                |ends| format!("[{:+.1}, {:+.1}]", 100.0 * ends[0], 100.0 * ends[1]),
            );
            let difference = format!("{:+.1} {interval}", 100.0 * found.difference);
            table.row([label, found.of.to_string(), count(|pair| pair.0), count(|pair| pair.1), difference]);
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::Rate;

    fn measured(basis: &str, items: &[(&str, bool)]) -> Outcomes {
        let items = items.iter().map(|(item, yes)| ((*item).to_owned(), *yes)).collect();
        [("right".to_owned(), Measured { basis: basis.into(), items })].into()
    }

    #[test]
    fn only_equal_items_that_were_measured_alike_are_compared() {
        let first = measured("greedy", &[("1", true), ("2", true), ("3", false)]);
        let row = |second: Outcomes| {
            let evals = [("base".to_owned(), first.clone()), ("tuned".to_owned(), second)];
            paired_table(&evals).rows.first().cloned().unwrap_or_default()
        };
        let [two, alike] = [
            row(measured("greedy", &[("2", false), ("3", false), ("4", true)])),
            row(measured("greedy", &[("1", true), ("3", false)])),
        ];
        assert_eq!(two[..4], ["tuned, right", "2", "1", "0"]);
        assert!(two[4].starts_with("-50.0 [-100.0, "), "{}", two[4]);
        assert_eq!(alike[1..], ["2", "1", "1", "+0.0 no interval"]);
        let other = row(measured("sampled", &[("1", true)]));
        assert!(other[1] == "-" && other[4].starts_with("not compared"), "{other:?}");
        assert_eq!(row(measured("greedy", &[("5", true)])), Vec::<String>::new());
    }

    #[test]
    fn files_of_one_name_are_told_apart() {
        let none = || Rate::of(std::iter::empty());
        let report = |path: &str| QuestionsReport {
            path: path.into(),
            answer_pattern: None,
            choices: none(),
            choices_by_byte: none(),
            answers: none(),
        };
        assert_eq!(file_names(&["a/q", "b/q", "a/r", "c/q"].map(report)), ["q", "q (2)", "r", "q (3)"]);
    }
}
