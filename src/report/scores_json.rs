//! `expert_scores.json`: every expert's score in every round, and who was selected.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, read_json};
use crate::experts::{ExpertId, ExpertScores, Method, Score};

/// The value of [`ScoresFile::schema`].
pub const SCORES_SCHEMA: &str = "moewarden.scores/1";

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ScoresFile {
    /// [`SCORES_SCHEMA`].
    pub schema: String,
    /// How experts were ranked.
    pub method: Method,
    /// What the gradient method measured; null for the others.
    pub score: Option<Score>,
    /// Decoder-layer numbers of the layers that route: the rows of all scores.
    pub layers: Vec<usize>,
    /// E: the columns.
    pub num_experts: usize,
    /// By round, from 1.
    pub rounds: BTreeMap<usize, RoundScores>,
}

/// One round.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RoundScores {
    /// `[L][E]`; empty where nothing was scored (random selection).
    pub scores: Vec<Vec<f64>>,
    /// Best first.
    pub selected: Vec<ExpertId>,
    /// Micro-batches that the scores are means of.
    pub micro_batches: u64,
    /// Loss of each micro-batch, in global order.
    pub losses: Vec<f64>,
}

impl ScoresFile {
    /// Of no round yet. `score` is kept for the gradient method alone.
    pub fn new(method: Method, score: Score, layers: Vec<usize>, num_experts: usize) -> Self {
        let score = (method == Method::Gradient).then_some(score);
        Self { schema: SCORES_SCHEMA.to_owned(), method, score, layers, num_experts, rounds: BTreeMap::new() }
    }

    /// The scores of a round; `None` if there was no such round or nothing was scored in it.
    pub fn scores(&self, round: usize) -> Option<ExpertScores> {
        let values = self.rounds.get(&round)?.scores.concat();
        let scored = !values.is_empty();
        scored.then(|| ExpertScores { layers: self.layers.clone(), num_experts: self.num_experts, values })
    }

    /// Reads and checks the file of an earlier run.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Invalid`] if the schema is another or the numbers contradict each other.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file: Self = read_json(path)?;
        let invalid = |reason: String| Error::Invalid { path: path.to_owned(), reason };
        if file.schema != SCORES_SCHEMA {
            return Err(invalid(format!("its schema is {:?}, not {SCORES_SCHEMA:?}", file.schema)));
        }
        for (round, scores) in &file.rounds {
            let rows = &scores.scores;
            let shape_fits = rows.len() == file.layers.len() && rows.iter().all(|r| r.len() == file.num_experts);
            if !rows.is_empty() && !shape_fits {
                let (l, e) = (file.layers.len(), file.num_experts);
                return Err(invalid(format!("the scores of round {round} are not {l} layers of {e} experts")));
            }
            let unknown = |id: &&ExpertId| !file.layers.contains(&id.layer) || id.expert >= file.num_experts;
            if let Some(id) = scores.selected.iter().find(unknown) {
                return Err(invalid(format!(
                    "round {round} selects expert {} of layer {}, which is none",
                    id.expert, id.layer
                )));
            }
        }
        Ok(file)
    }
}

impl RoundScores {
    /// From what a round found. `scores` may be `None` for a random selection.
    pub fn new(scores: Option<&ExpertScores>, selected: &[ExpertId], micro_batches: u64, losses: Vec<f64>) -> Self {
        let scores = scores.map_or_else(Vec::new, |s| s.rows().map(<[f64]>::to_vec).collect());
        Self { scores, selected: selected.to_vec(), micro_batches, losses }
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
    fn the_schema_to_the_letter_and_back() {
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
    fn contradictions_are_named() {
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
        expect(|f| f.num_experts = 3, "round 1");
        expect(|f| f.rounds.get_mut(&10).unwrap().selected[0].layer = 1, "expert 1 of layer 1");
    }
}
