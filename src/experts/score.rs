//! Gradient scores of experts: per micro-batch, and their means over micro-batches.

use serde::{Deserialize, Serialize};

use super::{Error, ExpertId, Score, ScoreNorm, ScorePer};
use crate::backend::GradReduction;
use crate::collective::{self, Collective};

impl Score {
    /// The reduction of an expert's gradient that the backward pass computes for this score.
    pub fn reduction(self) -> GradReduction {
        match self {
            Score::L1Mean => GradReduction::Abs,
            Score::L2 | Score::Fisher => GradReduction::Square,
            Score::Taylor => GradReduction::AbsTimesWeight,
        }
    }

    /// The score in one micro-batch, from the sum over the expert's `params` gradient entries.
    fn of_sum(self, sum: f64, params: f64) -> f64 {
        match self {
            Score::L1Mean | Score::Fisher | Score::Taylor => sum / params,
            Score::L2 => (sum / params).sqrt(),
        }
    }
}

impl ScoreNorm {
    /// The scores, divided.
    pub fn apply(self, scores: ExpertScores) -> ExpertScores {
        match self {
            ScoreNorm::None => scores,
            ScoreNorm::Layer => scores.divided_by_layer_sum(),
        }
    }
}

/// The scores of all experts of all MoE layers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ExpertScores {
    /// Decoder-layer indices of the MoE layers, ascending.
    pub layers: Vec<usize>,
    /// Experts per layer, E.
    pub num_experts: usize,
    /// `[L · E]`, layer by layer.
    pub values: Vec<f64>,
}

impl ExpertScores {
    /// Zero for every expert of these MoE layers (decoder-layer indices, ascending).
    pub fn zeros(layers: Vec<usize>, num_experts: usize) -> Self {
        let values = vec![0.0; layers.len() * num_experts];
        Self { layers, num_experts, values }
    }

    /// The score of an expert; `None` if the model has no such expert.
    pub fn get(&self, id: ExpertId) -> Option<f64> {
        let row = self.layers.binary_search(&id.layer).ok()?;
        (id.expert < self.num_experts).then(|| self.values[row * self.num_experts + id.expert])
    }

    /// All experts with their scores, ordered by (layer, expert).
    pub fn iter(&self) -> impl Iterator<Item = (ExpertId, f64)> + '_ {
        experts_of(&self.layers, self.num_experts).zip(self.values.iter().copied())
    }

    /// All experts with their scores, highest first; ties by (layer, expert).
    pub fn ranked(&self) -> Vec<(ExpertId, f64)> {
        let mut all: Vec<_> = self.iter().collect();
        all.sort_by(|(_, a), (_, b)| b.total_cmp(a)); // stable, so ties keep the order of `iter`
        all
    }

    /// The scores divided by the sum of their layer: s(l,e) / Σ_e' s(l,e'). All 0 in a layer whose sum is 0.
    fn divided_by_layer_sum(mut self) -> Self {
        for row in self.values.chunks_exact_mut(self.num_experts) {
            let sum: f64 = row.iter().sum();
            row.iter_mut().for_each(|value| *value = if sum == 0.0 { 0.0 } else { *value / sum });
        }
        self
    }

    /// The scores of each layer, `[E]`, in the order of `layers`.
    pub fn rows(&self) -> impl ExactSizeIterator<Item = &[f64]> {
        self.values.chunks_exact(self.num_experts)
    }
}

/// All experts of `layers`, ordered by (layer, expert).
pub(super) fn experts_of(layers: &[usize], num_experts: usize) -> impl Iterator<Item = ExpertId> {
    layers.iter().flat_map(move |layer| (0..num_experts).map(move |expert| ExpertId { layer: *layer, expert }))
}

/// Accumulates the mean score over micro-batches b:
///
/// ```text
/// s(l,e) = (1/B) Σ_b score_b(l,e),    score_b = (1/P) Σ_i |∂L_b/∂θ_i|    (or another `Score`), P = 3·D·F
/// ```
///
/// where L_b is the *mean* loss of micro-batch b (the method of arXiv 2602.04448). |·| is not linear, so every
/// micro-batch is scored by itself, and ranks add up scores, not gradients.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ScoreAccumulator {
    score: Score,
    per: ScorePer,
    params_per_expert: usize,
    layers: Vec<usize>,
    num_experts: usize,
    sums: Vec<f64>,
    micro_batches: u64,
}

impl ScoreAccumulator {
    /// Without micro-batches. `layers`: decoder-layer indices of the MoE layers, ascending; `params_per_expert`: P.
    pub fn new(score: Score, per: ScorePer, layers: Vec<usize>, num_experts: usize, params_per_expert: usize) -> Self {
        assert!(layers.is_sorted(), "layers must ascend: {layers:?}");
        let sums = vec![0.0; layers.len() * num_experts];
        Self { score, per, params_per_expert, layers, num_experts, sums, micro_batches: 0 }
    }

    /// Adds a micro-batch. `reductions`: each expert's [`Score::reduction`], summed over the gradient of the mean loss;
    /// `tokens_per_expert`: the number of tokens routed to it; both `[L · E]`. A micro-batch without loss tokens is
    /// ignored; otherwise its scores are returned.
    pub fn add(&mut self, reductions: &[f64], tokens_per_expert: &[usize], loss_tokens: usize) -> Option<Vec<f64>> {
        assert_eq!(reductions.len(), self.sums.len(), "one reduction per expert");
        assert_eq!(tokens_per_expert.len(), self.sums.len(), "one token count per expert");
        if loss_tokens == 0 {
            return None;
        }
        self.micro_batches += 1;
        let of_expert = |(reduction, tokens): (&f64, &usize)| {
            let score = self.score.of_sum(*reduction, self.params_per_expert as f64);
            match (self.per, tokens) {
                (ScorePer::Param, _) => score,
                (ScorePer::Token, 0) => 0.0, // its gradient is exactly 0 too
                (ScorePer::Token, tokens) => score / *tokens as f64,
            }
        };
        let scores: Vec<f64> = reductions.iter().zip(tokens_per_expert).map(of_expert).collect();
        add_sums(&mut self.sums, &scores);
        Some(scores)
    }

    /// Number of micro-batches added, B: of this rank before [`Self::merge`], of all ranks after it.
    pub fn micro_batches(&self) -> u64 {
        self.micro_batches
    }

    /// Adds another rank's sums and counts of the same run.
    pub fn absorb(&mut self, other: &Self) {
        add_sums(&mut self.sums, &other.sums);
        self.micro_batches += other.micro_batches;
    }

    /// All-reduces the sums and counts over the ranks.
    ///
    /// # Errors
    /// Those of [`Collective::barrier`].
    pub fn merge(&mut self, collective: &dyn Collective) -> Result<(), collective::Error> {
        merge_sums(collective, &mut self.sums, [&mut self.micro_batches])
    }

    /// The mean scores over the micro-batches.
    ///
    /// # Errors
    /// [`Error::NothingToScore`] without micro-batches.
    pub fn finish(self) -> Result<ExpertScores, Error> {
        if self.micro_batches == 0 {
            return Err(Error::NothingToScore { what: "a loss token" });
        }
        let batches = self.micro_batches as f64;
        let values = self.sums.iter().map(|sum| sum / batches).collect();
        Ok(ExpertScores { layers: self.layers, num_experts: self.num_experts, values })
    }
}

/// sums += others.
pub(super) fn add_sums(sums: &mut [f64], others: &[f64]) {
    assert_eq!(sums.len(), others.len(), "both sums are over the same experts");
    sums.iter_mut().zip(others).for_each(|(sum, other)| *sum += other);
}

/// All-reduces sums and counts in one operation. Counts are exact in f64 up to 2⁵³.
pub(super) fn merge_sums<const N: usize>(
    collective: &dyn Collective,
    sums: &mut [f64],
    counts: [&mut u64; N],
) -> Result<(), collective::Error> {
    let mut all: Vec<f64> = sums.iter().copied().chain(counts.iter().map(|c| **c as f64)).collect();
    collective.all_reduce_f64(&mut all)?;
    let (merged, merged_counts) = all.split_at(sums.len());
    sums.copy_from_slice(merged);
    for (count, merged) in counts.into_iter().zip(merged_counts) {
        *count = *merged as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::conformance::on_threads;

    fn accumulator(score: Score, per: ScorePer) -> ScoreAccumulator {
        ScoreAccumulator::new(score, per, vec![1, 3], 2, 4)
    }

    #[test]
    fn each_score_by_its_formula() {
        // Gradients of 4 entries, all of size 3: Σ|g| = 12, Σg² = 36.
        let cases = [
            (Score::L1Mean, ScorePer::Param, 12.0, 3.0),
            (Score::L2, ScorePer::Param, 36.0, 3.0),
            (Score::Fisher, ScorePer::Param, 36.0, 9.0),
            (Score::Taylor, ScorePer::Param, 12.0, 3.0),
            (Score::L1Mean, ScorePer::Token, 12.0, 0.6),
            (Score::L2, ScorePer::Token, 36.0, 0.6),
        ];
        for (score, per, reduction, expected) in cases {
            let mut acc = accumulator(score, per);
            acc.add(&[reduction, 0.0, 0.0, 0.0], &[5, 0, 1, 1], 9);
            let scores = acc.finish().unwrap();
            let value = scores.get((1, 0).into()).unwrap();
            assert!((value - expected).abs() < 1e-15, "{score:?} {per:?}: {value}, not {expected}"); // one rounding
            assert_eq!(scores.get((1, 1).into()), Some(0.0), "no token, no score");
        }
    }

    #[test]
    fn a_micro_batch_without_loss_tokens_is_ignored() {
        let mut acc = accumulator(Score::L1Mean, ScorePer::Param);
        acc.add(&[4.0, 8.0, 0.0, 12.0], &[1; 4], 3);
        acc.add(&[9e9; 4], &[1; 4], 0);
        acc.add(&[8.0, 8.0, 0.0, 0.0], &[1; 4], 1);
        assert_eq!(acc.micro_batches(), 2);
        assert_eq!(acc.finish().unwrap().values, [1.5, 2.0, 0.0, 1.5]);
        let nothing = accumulator(Score::L1Mean, ScorePer::Param).finish();
        assert!(matches!(nothing, Err(Error::NothingToScore { .. })));
    }

    #[test]
    fn merged_scores_equal_those_of_one_rank() {
        let reductions = |b: usize| -> Vec<f64> { (0..4).map(|i| ((b * 7 + i * 3) % 11) as f64 / 7.0).collect() };
        let score = |ranks: usize| {
            on_threads(ranks, move |c| {
                let mut acc = accumulator(Score::L2, ScorePer::Param);
                for b in (0..10).filter(|b| b % ranks == c.rank()) {
                    acc.add(&reductions(b), &[2; 4], if b == 4 { 0 } else { 5 });
                }
                acc.merge(&c).unwrap();
                assert_eq!(acc.micro_batches(), 9);
                acc.finish().unwrap()
            })
        };
        let one = score(1).remove(0);
        for ranks in 2..=4 {
            for scores in score(ranks) {
                for (x, y) in scores.values.iter().zip(&one.values) {
                    assert!((x - y).abs() <= 1e-12 * y, "{ranks} ranks: {x}, not {y}"); // the documented tolerance
                }
            }
        }
    }

    #[test]
    fn the_norm_is_the_sum_of_the_layer() {
        let scores =
            ExpertScores { layers: vec![2, 5, 6], num_experts: 2, values: vec![1.0, 3.0, 0.0, 0.0, 0.0, 2e-9] };
        assert_eq!(scores.divided_by_layer_sum().values, [0.25, 0.75, 0.0, 0.0, 0.0, 1.0]);
        let broken = ExpertScores { layers: vec![0], num_experts: 2, values: vec![f64::NAN, 1.0] };
        assert!(broken.divided_by_layer_sum().values.iter().all(|v| v.is_nan()), "a NaN stays visible");
    }

    #[test]
    fn ties_are_ranked_by_layer_and_expert() {
        let scores = ExpertScores { layers: vec![2, 5], num_experts: 2, values: vec![1.0, 3.0, 3.0, 2.0] };
        let ids: Vec<(usize, usize)> = scores.ranked().into_iter().map(|(id, _)| id.into()).collect();
        assert_eq!(ids, [(2, 1), (5, 0), (5, 1), (2, 0)]);
        assert_eq!(scores.get((3, 0).into()), None);
        assert_eq!(scores.get((2, 2).into()), None);
    }
}
