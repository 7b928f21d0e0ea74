//! `expert_scores.json`: the scores of all experts and the selected experts of each round.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, read_json};
use crate::experts::{ExpertId, ExpertScores, HowMany, Method, OtherExperts, ReplyCounts, Score, ScoreNorm};

/// Value of [`ScoresFile::schema`].
pub const SCORES_SCHEMA: &str = "moewarden.scores/1";

/// The content of `expert_scores.json`. L: number of layers with experts; E: experts per layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoresFile {
    /// [`SCORES_SCHEMA`].
    pub schema: String,
    /// How experts were scored and selected.
    pub method: Method,
    /// The score of the gradient method; null for other methods.
    pub score: Option<Score>,
    /// What the scores of the gradient method are divided by; missing for other methods and in older files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub score_norm: Option<ScoreNorm>,
    /// Decoder layers with experts (numbers from 0): the rows of all scores.
    pub layers: Vec<usize>,
    /// E: the columns of all scores.
    pub num_experts: usize,
    /// Rounds, from 1.
    pub rounds: BTreeMap<usize, RoundScores>,
}

/// Scores and selection of one round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundScores {
    /// Scores, `[L][E]`; empty for a random selection without scores.
    pub scores: Vec<Vec<f64>>,
    /// The selected experts, best first.
    pub selected: Vec<ExpertId>,
    /// Number of micro-batches over which the scores are averaged.
    pub micro_batches: u64,
    /// Loss of each micro-batch, in global order; empty if the method computes none.
    pub losses: Vec<f64>,
    /// The earlier round whose selection was kept; missing where the round selected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kept_from: Option<usize>,
    /// The share of bootstrap resamples in which each expert is selected, `[L][E]`; missing without a bootstrap.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inclusion: Vec<Vec<f64>>,
    /// How many experts the scores single out; missing where scores do not decide the selection.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub how_many: Option<HowMany>,
    /// How many of the model's own replies comply; missing where it was not asked for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub own_replies: Option<ReplyCounts>,
    /// Experts that a published rule names besides the selection; missing for other methods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub others: Option<OtherExperts>,
}

impl ScoresFile {
    /// A file without rounds. `score` is kept only for the gradient method.
    pub fn new(method: Method, score: Score, layers: Vec<usize>, num_experts: usize) -> Self {
        let score = (method == Method::Gradient).then_some(score);
        let schema = SCORES_SCHEMA.to_owned();
        Self { schema, method, score, score_norm: None, layers, num_experts, rounds: BTreeMap::new() }
    }

    /// The scores by which the selection of a round was made: its own, or those of the round whose selection it kept.
    pub fn scores_of_selection(&self, round: usize) -> Option<ExpertScores> {
        self.scores(self.rounds.get(&round)?.kept_from.unwrap_or(round))
    }

    /// The scores of a round; `None` without such a round or without scores in it.
    pub fn scores(&self, round: usize) -> Option<ExpertScores> {
        let values = self.rounds.get(&round)?.scores.concat();
        (!values.is_empty()).then(|| ExpertScores {
            layers: self.layers.clone(),
            num_experts: self.num_experts,
            values,
        })
    }

    /// Reads and checks `expert_scores.json` of an earlier run.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Invalid`] if the schema is not [`SCORES_SCHEMA`], if scores do not have the shape
    /// `[L][E]`, or if a selected expert does not exist.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file: Self = read_json(path)?;
        let invalid = |reason: String| Error::Invalid { path: path.to_owned(), reason };
        if file.schema != SCORES_SCHEMA {
            return Err(invalid(format!("its schema is {:?}, not {SCORES_SCHEMA:?}", file.schema)));
        }
        for (round, scores) in &file.rounds {
            for (what, rows) in [("scores", &scores.scores), ("inclusion", &scores.inclusion)] {
                let shape_fits = rows.len() == file.layers.len() && rows.iter().all(|r| r.len() == file.num_experts);
                if !rows.is_empty() && !shape_fits {
                    let (l, e) = (file.layers.len(), file.num_experts);
                    return Err(invalid(format!("the {what} of round {round} are not {l} layers of {e} experts")));
                }
            }
            let unknown = |id: &&ExpertId| !file.layers.contains(&id.layer) || id.expert >= file.num_experts;
            if let Some(id) = scores.selected.iter().find(unknown) {
                return Err(invalid(format!(
                    "round {round} selects expert {} of layer {}, which does not exist",
                    id.expert, id.layer
                )));
            }
        }
        Ok(file)
    }
}

impl RoundScores {
    /// The share of bootstrap resamples that select an expert. `layers`: those of the file.
    pub fn inclusion_of(&self, layers: &[usize], id: ExpertId) -> Option<f64> {
        let row = layers.binary_search(&id.layer).ok()?;
        self.inclusion.get(row)?.get(id.expert).copied()
    }

    /// The result of a round. `scores` is `None` for a random selection without scores.
    pub fn new(scores: Option<&ExpertScores>, selected: &[ExpertId], micro_batches: u64, losses: Vec<f64>) -> Self {
        let scores = scores.map_or_else(Vec::new, |s| s.rows().map(<[f64]>::to_vec).collect());
        Self {
            scores,
            selected: selected.to_vec(),
            micro_batches,
            losses,
            kept_from: None,
            inclusion: Vec::new(),
            how_many: None,
            own_replies: None,
            others: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::write_json;

    fn example() -> ScoresFile {
        let scores = ExpertScores { layers: vec![0, 2], num_experts: 2, values: vec![0.25, 0.1, 1e-300, 0.3] };
        let mut file = ScoresFile::new(Method::Gradient, Score::L1Mean, vec![0, 2], 2);
        let selected = [(2, 1).into(), (0, 0).into()];
        file.rounds.insert(1, RoundScores::new(Some(&scores), &selected, 2, vec![6.5, 6.25]));
        file.rounds.insert(10, RoundScores::new(None, &selected, 0, vec![]));
        file
    }

    #[test]
    fn exact_json_and_round_trip() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("expert_scores.json");
        write_json(&path, &example()).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let compact: String = text.split_whitespace().collect();
        assert_eq!(
            compact,
            r#"{"schema":"moewarden.scores/1","method":"gradient","score":"l1-mean","layers":[0,2],"num_experts":2,"#
                .to_owned()
                + r#""rounds":{"1":{"scores":[[0.25,0.1],[1e-300,0.3]],"selected":[[2,1],[0,0]],"micro_batches":2,"#
                + r#""losses":[6.5,6.25]},"10":{"scores":[],"selected":[[2,1],[0,0]],"micro_batches":0,"losses":[]}}}"#
        );
        let file = ScoresFile::read(&path).unwrap();
        assert_eq!(file, example());
        assert_eq!(file.scores(1).unwrap().get((2, 1).into()), Some(0.3));
        assert_eq!((file.scores(10), file.scores(2)), (None, None));
    }

    #[test]
    fn invalid_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("expert_scores.json");
        let expect = |change: fn(&mut ScoresFile), part: &str| {
            let mut file = example();
            change(&mut file);
            write_json(&path, &file).unwrap();
            let error = ScoresFile::read(&path).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("expert_scores.json"), "{part} not in: {error}");
        };
        expect(|f| f.schema = "other/1".into(), "other/1");
        expect(|f| f.num_experts = 3, "the scores of round 1");
        expect(|f| f.rounds.get_mut(&1).unwrap().inclusion = vec![vec![1.0]], "the inclusion of round 1");
        expect(|f| f.rounds.get_mut(&10).unwrap().selected[0].layer = 1, "expert 1 of layer 1");
    }
}
