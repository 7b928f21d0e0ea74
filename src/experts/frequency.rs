//! Scores of the routing method: each expert's routing frequency on unsafe prompts minus that on safe prompts.

use serde::{Deserialize, Serialize};

use super::score::{add_sums, merge_sums};
use super::{Error, ExpertScores, RoutingTokens};
use crate::collective::{self, Collective};

/// Whether each token is counted, `[T]`. `is_response`: whether each token is a loss token, `[T]`; never true for the first token of
/// a sequence.
pub fn token_mask(tokens: RoutingTokens, is_response: &[bool]) -> Vec<bool> {
    match tokens {
        RoutingTokens::Response => is_response.to_vec(),
        // The next token of a sequence's last one begins another sequence, and carries no loss.
        RoutingTokens::Predicting => {
            is_response.iter().skip(1).copied().chain([false]).take(is_response.len()).collect()
        }
        RoutingTokens::Prompt => is_response.iter().map(|r| !r).collect(),
        RoutingTokens::All => vec![true; is_response.len()],
    }
}

/// How often each expert of each MoE layer is among the top K, over the counted tokens of one side (safe or unsafe) of
/// one batch.
#[derive(Debug, Clone)]
pub struct RoutingCounts {
    mask: Vec<bool>,
    /// Number of counted tokens.
    tokens: u64,
    num_experts: usize,
    /// `[L · E]`.
    counts: Vec<u64>,
}

impl RoutingCounts {
    /// All counts zero. `mask`: whether each token is counted, `[T]` (see [`token_mask`]).
    pub fn new(mask: Vec<bool>, num_layers: usize, num_experts: usize) -> Self {
        let tokens = mask.iter().filter(|m| **m).count() as u64;
        Self { mask, tokens, num_experts, counts: vec![0; num_layers * num_experts] }
    }

    /// Counts a layer. `index`: its index among the MoE layers; `expert_ids`: the selected experts, `[T · K]`, K
    /// consecutive per token.
    pub fn add_layer(&mut self, index: usize, expert_ids: &[u32]) {
        if self.mask.is_empty() {
            return;
        }
        let counts = &mut self.counts[index * self.num_experts..(index + 1) * self.num_experts];
        let top_k = expert_ids.len() / self.mask.len();
        assert_eq!(expert_ids.len(), top_k * self.mask.len(), "K experts for each of {} tokens", self.mask.len());
        for (experts, _) in expert_ids.chunks_exact(top_k).zip(&self.mask).filter(|(_, counted)| **counted) {
            for expert in experts {
                counts[*expert as usize] += 1;
            }
        }
    }

    /// How often each expert is among the top K of the counted tokens, `[L · E]`.
    pub fn counts(&self) -> &[u64] {
        &self.counts
    }

    /// Number of counted tokens.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// f(l,e) = count / tokens, `[L · E]`. NaN if [`Self::tokens`] is 0.
    fn frequencies(&self) -> impl Iterator<Item = f64> + '_ {
        self.counts.iter().map(|count| *count as f64 / self.tokens as f64)
    }
}

/// Accumulates the mean risk difference over batches b:
///
/// ```text
/// r(l,e) = (1/B) Σ_b ( f_unsafe,b(l,e) − f_safe,b(l,e) )
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct FrequencyAccumulator {
    layers: Vec<usize>,
    num_experts: usize,
    sums: Vec<f64>,
    batches: u64,
    skipped: u64,
}

impl FrequencyAccumulator {
    /// Without batches. `layers`: decoder-layer indices of the MoE layers, ascending.
    pub fn new(layers: Vec<usize>, num_experts: usize) -> Self {
        assert!(layers.is_sorted(), "layers must ascend: {layers:?}");
        let sums = vec![0.0; layers.len() * num_experts];
        Self { layers, num_experts, sums, batches: 0, skipped: 0 }
    }

    /// Adds a batch, and returns its risk differences. A batch without counted tokens on one of its sides has no frequencies
    /// there: it is skipped, and counted in [`Self::skipped`].
    pub fn add(&mut self, safe: &RoutingCounts, unsafe_: &RoutingCounts) -> Option<Vec<f64>> {
        assert_eq!((safe.counts.len(), unsafe_.counts.len()), (self.sums.len(), self.sums.len()), "counts per expert");
        let counts = safe.tokens > 0 && unsafe_.tokens > 0;
        let differences: Option<Vec<f64>> =
            counts.then(|| safe.frequencies().zip(unsafe_.frequencies()).map(|(s, u)| u - s).collect());
        self.add_differences(differences.as_deref());
        differences
    }

    /// Adds a batch by its risk differences; `None`: it is skipped.
    pub fn add_differences(&mut self, differences: Option<&[f64]>) {
        match differences {
            None => self.skipped += 1,
            Some(differences) => {
                self.batches += 1;
                add_sums(&mut self.sums, differences);
            }
        }
    }

    /// Number of batches added, B: of this rank before [`Self::merge`], of all ranks after it.
    pub fn batches(&self) -> u64 {
        self.batches
    }

    /// Number of batches skipped: of this rank before [`Self::merge`], of all ranks after it.
    pub fn skipped(&self) -> u64 {
        self.skipped
    }

    /// Adds another rank's sums and counts of the same run.
    pub fn absorb(&mut self, other: &Self) {
        add_sums(&mut self.sums, &other.sums);
        self.batches += other.batches;
        self.skipped += other.skipped;
    }

    /// All-reduces the sums and counts over the ranks.
    ///
    /// # Errors
    /// Those of [`Collective::barrier`].
    pub fn merge(&mut self, collective: &dyn Collective) -> Result<(), collective::Error> {
        merge_sums(collective, &mut self.sums, [&mut self.batches, &mut self.skipped])
    }

    /// The mean risk differences, as scores.
    ///
    /// # Errors
    /// [`Error::NothingToScore`] without batches.
    pub fn finish(self) -> Result<ExpertScores, Error> {
        if self.batches == 0 {
            return Err(Error::NothingToScore {
                what: "tokens to count (--routing-tokens) in both its safe and its unsafe rows",
            });
        }
        let batches = self.batches as f64;
        let values = self.sums.iter().map(|sum| sum / batches).collect();
        Ok(ExpertScores { layers: self.layers, num_experts: self.num_experts, values })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::collective::conformance::on_threads;

    fn counts(mask: &[bool], ids: &[u32]) -> RoutingCounts {
        let mut out = RoutingCounts::new(mask.to_vec(), 1, 3);
        out.add_layer(0, ids);
        out
    }

    #[test]
    fn masks_split_a_conversation() {
        let is_response = [false, false, true];
        assert_eq!(token_mask(RoutingTokens::Response, &is_response), [false, false, true]);
        assert_eq!(token_mask(RoutingTokens::Predicting, &is_response), [false, true, false]);
        assert_eq!(token_mask(RoutingTokens::Prompt, &is_response), [true, true, false]);
        assert_eq!(token_mask(RoutingTokens::All, &is_response), [true, true, true]);
    }

    #[test]
    fn predicting_tokens_stay_in_their_sequence() {
        // Two sequences: prompt, reply, reply; prompt, prompt, reply.
        let is_response = [false, true, true, false, false, true];
        let mask = token_mask(RoutingTokens::Predicting, &is_response);
        assert_eq!(mask, [true, true, false, false, true, false]);
        assert!(token_mask(RoutingTokens::Predicting, &[]).is_empty());
    }

    #[test]
    fn frequencies_are_over_counted_tokens() {
        // Two experts per token; the second token is not counted.
        let side = counts(&[true, false, true], &[0, 1, 2, 2, 0, 2]);
        assert_eq!(side.tokens(), 2);
        assert_eq!(side.frequencies().collect::<Vec<_>>(), [1.0, 0.5, 0.5]);
    }

    #[test]
    fn the_mean_is_over_batches_with_both_sides() {
        let merged = on_threads(2, |c| {
            let mut acc = FrequencyAccumulator::new(vec![4], 3);
            if c.rank() == 0 {
                acc.add(&counts(&[true; 2], &[0, 0]), &counts(&[true; 4], &[0, 1, 1, 1]));
                acc.add(&counts(&[false; 2], &[0, 0]), &counts(&[true; 2], &[1, 1]));
            } else {
                acc.add(&counts(&[true], &[2]), &counts(&[true], &[1]));
                acc.add(&counts(&[], &[]), &counts(&[true], &[1]));
            }
            acc.merge(&c).unwrap();
            assert_eq!((acc.batches(), acc.skipped()), (2, 2));
            acc.finish().unwrap().values
        });
        // Batch 1: [1/4 - 1, 3/4, 0]; batch 2: [0, 1, -1].
        assert_eq!(merged, vec![vec![-0.375, 0.875, -0.5]; 2]);
        assert!(matches!(FrequencyAccumulator::new(vec![4], 3).finish(), Err(Error::NothingToScore { .. })));
    }
}
