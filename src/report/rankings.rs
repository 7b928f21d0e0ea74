//! `rankings.json`: every ranking of experts that a run computed, and how much they agree.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Error, RoundScores, RunSelection, ScoresFile, overlap, read_json};
use crate::experts::{ExpertId, ExpertScores, Method, Score, ScoreNorm};

/// Value of [`RankingsFile::schema`].
pub const RANKINGS_SCHEMA: &str = "moewarden.rankings/1";

/// The content of `rankings.json`. L: number of layers with experts; E: experts per layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RankingsFile {
    /// [`RANKINGS_SCHEMA`].
    pub schema: String,
    /// Decoder layers with experts (numbers from 0).
    pub layers: Vec<usize>,
    /// E
    pub num_experts: usize,
    /// In the order of their rounds. A round that scores nothing has none.
    pub rankings: Vec<NamedRanking>,
    /// Jaccard index of the selections of each two rankings, `[n][n]`; null where both are empty.
    pub jaccard: Vec<Vec<Option<f64>>>,
    /// Spearman's rank correlation of the scores of all experts, `[n][n]`; null without scores.
    pub spearman: Vec<Vec<Option<f64>>>,
}

/// One ranking.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NamedRanking {
    /// `round-1`, or `round-1-gradient` for the ranking that the random control of the round was matched to.
    pub name: String,
    /// The round, from 1.
    pub round: usize,
    /// By what the experts are ranked.
    pub method: Method,
    /// The score of the gradient method; null for other methods.
    pub score: Option<Score>,
    /// What the scores of the gradient method are divided by; null for other methods.
    pub score_norm: Option<ScoreNorm>,
    /// The selected experts, best first.
    pub selected: Vec<ExpertId>,
    /// All experts, highest score first; empty for a selection without scores.
    pub experts: Vec<ExpertId>,
    /// Their scores, in the same order.
    pub scores: Vec<f64>,
}

impl NamedRanking {
    /// The selection and scores of a round.
    fn new(name: String, round: usize, by: &ScoresFile, selected: &[ExpertId], scores: Option<ExpertScores>) -> Self {
        let (experts, scores) = scores.map_or_else(Default::default, |scores| scores.ranked().into_iter().unzip());
        let (method, score, score_norm) = (by.method, by.score, by.score_norm);
        Self { name, round, method, score, score_norm, selected: selected.to_vec(), experts, scores }
    }
}

impl RankingsFile {
    /// The rankings of the rounds of `scores`. `matched`: the gradient method's selection and scores in rounds of the random control.
    pub fn new<'m>(
        scores: &ScoresFile,
        gradient: (Score, ScoreNorm),
        matched: impl IntoIterator<Item = (&'m usize, &'m RoundScores)>,
    ) -> Self {
        let by_gradient = ScoresFile {
            method: Method::Gradient,
            score: Some(gradient.0),
            score_norm: Some(gradient.1),
            rounds: matched.into_iter().map(|(round, found)| (*round, found.clone())).collect(),
            ..scores.clone()
        };
        let mut rankings = Vec::new();
        for (round, found) in &scores.rounds {
            let values = scores.scores(*round);
            if found.kept_from.is_some() && values.is_none() {
                continue;
            }
            rankings.push(NamedRanking::new(format!("round-{round}"), *round, scores, &found.selected, values));
            if let Some(found) = by_gradient.rounds.get(round) {
                let (name, values) = (format!("round-{round}-gradient"), by_gradient.scores(*round));
                rankings.push(NamedRanking::new(name, *round, &by_gradient, &found.selected, values));
            }
        }
        let mut file = Self {
            schema: RANKINGS_SCHEMA.to_owned(),
            layers: scores.layers.clone(),
            num_experts: scores.num_experts,
            rankings,
            jaccard: Vec::new(),
            spearman: Vec::new(),
        };
        let all = file.selections();
        file.jaccard = all.iter().map(|a| all.iter().map(|b| overlap(a, b).jaccard).collect()).collect();
        file.spearman = all.iter().map(|a| all.iter().map(|b| overlap(a, b).spearman).collect()).collect();
        file
    }

    /// The rankings by name, for [`super::overlap_tables`].
    pub fn selections(&self) -> Vec<RunSelection> {
        let selection = |ranking: &NamedRanking| RunSelection {
            name: ranking.name.clone(),
            selected: ranking.selected.clone(),
            scores: self.scores(ranking),
        };
        self.rankings.iter().map(selection).collect()
    }

    /// The scores of a ranking in the order of the layers.
    fn scores(&self, ranking: &NamedRanking) -> Option<ExpertScores> {
        let mut ordered: Vec<_> = ranking.experts.iter().zip(&ranking.scores).collect();
        ordered.sort_by_key(|(id, _)| **id);
        (!ordered.is_empty()).then(|| ExpertScores {
            layers: self.layers.clone(),
            num_experts: self.num_experts,
            values: ordered.into_iter().map(|(_, score)| *score).collect(),
        })
    }

    /// Reads and checks `rankings.json` of an earlier run.
    ///
    /// # Errors
    /// [`Error::Missing`]; [`Error::Invalid`] if the schema is not [`RANKINGS_SCHEMA`], or if a ranking does not hold each expert
    /// once with a score.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let file: Self = read_json(path)?;
        let invalid = |reason: String| Error::Invalid { path: path.to_owned(), reason };
        if file.schema != RANKINGS_SCHEMA {
            return Err(invalid(format!("its schema is {:?}, not {RANKINGS_SCHEMA:?}", file.schema)));
        }
        let exists = |id: &ExpertId| file.layers.contains(&id.layer) && id.expert < file.num_experts;
        for ranking in &file.rankings {
            let distinct: std::collections::BTreeSet<_> = ranking.experts.iter().filter(|id| exists(id)).collect();
            let all = file.layers.len().saturating_mul(file.num_experts);
            let complete = distinct.len() == all && ranking.experts.len() == all;
            if ranking.experts.len() != ranking.scores.len() || !(ranking.experts.is_empty() || complete) {
                let (l, e) = (file.layers.len(), file.num_experts);
                return Err(invalid(format!(
                    "the ranking {} does not hold each expert of {l} layers of {e} once with a score",
                    ranking.name
                )));
            }
            if let Some(id) = ranking.selected.iter().find(|id| !exists(id)) {
                let (name, expert, layer) = (&ranking.name, id.expert, id.layer);
                return Err(invalid(format!(
                    "the ranking {name} selects expert {expert} of layer {layer}, which does not exist"
                )));
            }
        }
        Ok(file)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::write_json;

    fn of_values(values: [f64; 4]) -> ExpertScores {
        ExpertScores { layers: vec![0, 2], num_experts: 2, values: values.to_vec() }
    }

    /// Two scored rounds, and one that kept its selection.
    fn scores() -> ScoresFile {
        let mut file = ScoresFile {
            score_norm: Some(ScoreNorm::None),
            ..ScoresFile::new(Method::Gradient, Score::L2, vec![0, 2], 2)
        };
        let first = of_values([4.0, 3.0, 2.0, 1.0]);
        let second = of_values([4.0, 1.0, 2.0, 3.0]);
        file.rounds.insert(1, RoundScores::new(Some(&first), &[(0, 0).into(), (0, 1).into()], 2, vec![]));
        file.rounds.insert(2, RoundScores::new(Some(&second), &[(0, 0).into(), (2, 1).into()], 2, vec![]));
        let kept = RoundScores::new(None, &[(0, 0).into(), (2, 1).into()], 0, vec![]);
        file.rounds.insert(3, RoundScores { kept_from: Some(2), ..kept });
        file
    }

    #[test]
    fn every_computed_ranking_is_in_the_file() {
        let file = RankingsFile::new(&scores(), (Score::L2, ScoreNorm::None), []);
        assert_eq!(file.rankings.iter().map(|r| &r.name[..]).collect::<Vec<_>>(), ["round-1", "round-2"]);
        let second = &file.rankings[1];
        assert_eq!(second.experts, [(0, 0), (2, 1), (2, 0), (0, 1)].map(Into::into));
        assert_eq!(second.scores, [4.0, 3.0, 2.0, 1.0]);
        assert_eq!((second.score, second.score_norm), (Some(Score::L2), Some(ScoreNorm::None)));
        assert_eq!(file.jaccard, [[Some(1.0), Some(1.0 / 3.0)], [Some(1.0 / 3.0), Some(1.0)]]);
        // Ranks 4 3 2 1 and 4 1 2 3: 1 − 6·(0 + 4 + 0 + 4) / (4·15).
        assert!((file.spearman[0][1].unwrap() - 0.2).abs() < 1e-12, "{:?}", file.spearman);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rankings.json");
        write_json(&path, &file).unwrap();
        assert_eq!(RankingsFile::read(&path).unwrap(), file);
    }

    #[test]
    fn a_random_control_stands_beside_the_ranking_that_it_matches() {
        let mut random = ScoresFile::new(Method::Random, Score::L1Mean, vec![0, 2], 2);
        random.rounds.insert(1, RoundScores::new(None, &[(0, 1).into()], 0, vec![]));
        let gradient = RoundScores::new(Some(&of_values([4.0, 3.0, 2.0, 1.0])), &[(0, 0).into()], 0, vec![]);
        let file = RankingsFile::new(&random, (Score::Taylor, ScoreNorm::Layer), [(&1, &gradient)]);
        let [control, matched] = &file.rankings[..] else { panic!("{file:?}") };
        assert_eq!((control.method, control.score, control.experts.len()), (Method::Random, None, 0));
        assert_eq!((matched.name.as_str(), matched.method), ("round-1-gradient", Method::Gradient));
        assert_eq!((matched.score, matched.score_norm), (Some(Score::Taylor), Some(ScoreNorm::Layer)));
        assert_eq!((file.jaccard[0][1], file.spearman[0][1]), (Some(0.0), None));
    }

    #[test]
    fn invalid_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("rankings.json");
        let expect = |change: fn(&mut RankingsFile), part: &str| {
            let mut file = RankingsFile::new(&scores(), (Score::L2, ScoreNorm::None), []);
            change(&mut file);
            write_json(&path, &file).unwrap();
            let error = RankingsFile::read(&path).unwrap_err().to_string();
            assert!(error.contains(part) && error.contains("rankings.json"), "{part} not in: {error}");
        };
        expect(|f| f.schema = "other/1".into(), "other/1");
        expect(|f| f.rankings[1].experts[0] = (0, 1).into(), "the ranking round-2 does not hold each expert");
        expect(|f| f.rankings[0].scores.clear(), "the ranking round-1 does not hold each expert");
        expect(|f| f.rankings[0].selected[0].expert = 9, "selects expert 9 of layer 0");
    }
}
