//! Paired differences between evaluations of the same rows.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::eval_rows::PromptSide;
use super::questions::{QuestionRow, QuestionsReport};
use super::{Error, Table};
use crate::judge::{Assessment, PairedDifference, Safety};

/// Yes or no for each item, by what is asked of it.
pub type Outcomes = BTreeMap<String, BTreeMap<String, bool>>;

/// What is read of a row of `generations.jsonl`.
#[derive(Deserialize)]
struct Generated {
    id: String,
    category: PromptSide,
    messages: Value,
    proxy: BTreeMap<String, bool>,
    #[serde(default)]
    judge: Option<Judged>,
}

#[derive(Deserialize)]
struct Judged {
    verdict: Option<Assessment>,
}

/// The outcomes of an evaluation, from the rows in its folder: refusals by phrase list, verdicts of the judge, and right answers to
/// `questions`. Items of two evaluations are the same if they have the same id and messages.
///
/// # Errors
/// [`Error::Missing`]; [`Error::Invalid`] with the number of the line.
pub fn outcomes(dir: &Path, questions: &[QuestionsReport]) -> Result<Outcomes, Error> {
    let mut out = Outcomes::new();
    let mut add = |what: String, item: &str, yes: bool| _ = out.entry(what).or_default().insert(item.to_owned(), yes);
    for row in rows::<Generated>(&dir.join("generations.jsonl"))? {
        let (item, side) = (format!("{} {}", row.id, row.messages), row.category.name());
        for (list, refuses) in row.proxy {
            add(format!("{side} prompts: refused, {list}"), &item, refuses);
        }
        if let Some(verdict) = row.judge.and_then(|judged| judged.verdict) {
            add(format!("{side} prompts: judged unsafe"), &item, verdict.safety == Safety::Unsafe);
            if let Some(refusal) = verdict.refusal {
                add(format!("{side} prompts: judged a refusal"), &item, refusal);
            }
        }
    }
    for row in rows::<QuestionRow>(&dir.join("questions.jsonl"))? {
        let name = questions.get(row.file.wrapping_sub(1)).and_then(|file| file.path.file_name());
        let name = name.map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        add(format!("{name}: right"), &row.id, row.correct);
    }
    Ok(out)
}

/// The rows of a file of JSON lines; none if it does not exist.
fn rows<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Vec<T>, Error> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let text = crate::input::read_text(path).map_err(|source| Error::Missing { path: path.to_owned(), source })?;
    let row = |(i, line): (usize, &str)| {
        let invalid = |e| Error::Invalid { path: path.to_owned(), reason: format!("line {}: {e}", i + 1) };
        serde_json::from_str(line).map_err(invalid)
    };
    text.lines().enumerate().map(row).collect()
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
            let pairs: Vec<(bool, bool)> =
                ours.iter().filter_map(|(item, yes)| Some((*theirs.get(item)?, *yes))).collect();
            let Some(found) = PairedDifference::of(&pairs) else { continue };
            let count = |yes: fn(&(bool, bool)) -> bool| pairs.iter().filter(|pair| yes(pair)).count().to_string();
            let [low, high] = found.interval.map(|x| 100.0 * x);
            table.row([
                format!("{name}, {what}"),
                found.of.to_string(),
                count(|pair| pair.0),
                count(|pair| pair.1),
                format!("{:+.1} [{low:+.1}, {high:+.1}]", 100.0 * found.difference),
            ]);
        }
    }
    table
}
