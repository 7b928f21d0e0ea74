//! Routing statistics: one distribution over experts per layer, from router logits.

use crate::collective::{self, Collective};

/// A distribution over experts as a running mean: micro-batches and ranks add up sums and weights; the division is
/// last.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStatistic {
    /// Σ of softmax over tokens (`Statistic::TokenProbs`) or over samples (`Statistic::SampleLogits`), `[E]`.
    pub sum: Vec<f64>,
    /// Number of these tokens or samples.
    pub weight: f64,
}

impl LayerStatistic {
    /// Sum and weight zero.
    pub fn zero(num_experts: usize) -> Self {
        Self { sum: vec![0.0; num_experts], weight: 0.0 }
    }

    /// Adds the sum and weight of another part of the batch, for the same layer.
    pub fn add(&mut self, sum: &[f64], weight: f64) {
        assert_eq!(sum.len(), self.sum.len(), "number of experts");
        for (total, x) in self.sum.iter_mut().zip(sum) {
            *total += x;
        }
        self.weight += weight;
    }

    /// The mean, `[E]`; `None` if the weight is 0.
    pub fn mean(&self) -> Option<Vec<f64>> {
        (self.weight > 0.0).then(|| self.sum.iter().map(|x| x / self.weight).collect())
    }
}

/// All-reduces the statistics of this rank's part of the batch to those of the global batch.
///
/// # Errors
/// Those of [`Collective::barrier`].
pub fn all_reduce(statistics: &mut [LayerStatistic], collective: &dyn Collective) -> Result<(), collective::Error> {
    let mut flat: Vec<f64> = statistics.iter().flat_map(|s| s.sum.iter().copied().chain([s.weight])).collect();
    collective.all_reduce_f64(&mut flat)?;
    let mut rest = flat.as_slice();
    for statistic in statistics {
        let (sum, after) = rest.split_at(statistic.sum.len());
        statistic.sum.copy_from_slice(sum);
        statistic.weight = after[0];
        rest = &after[1..];
    }
    Ok(())
}

/// [`Statistic::SampleLogits`](super::Statistic::SampleLogits): softmax of each sample's mean logits, with the values
/// saved for the backward pass.
#[derive(Debug, Clone)]
pub struct SampleSoftmax {
    /// Softmax of the mean logits, `[S, E]`.
    probs: Vec<f64>,
    /// Number of tokens of each sample, `[S]`.
    lens: Vec<usize>,
}

impl SampleSoftmax {
    /// From the sum of the logits over each sample's tokens, `[S · E]`, and the number of these tokens, `[S]`.
    ///
    /// # Panics
    /// If a sample has no tokens.
    pub fn forward(segment_sums: &[f64], lens: &[usize]) -> Self {
        assert!(lens.iter().all(|n| *n > 0), "a sample without tokens: {lens:?}");
        let mut probs = segment_sums.to_vec();
        if !lens.is_empty() {
            let num_experts = probs.len() / lens.len();
            assert_eq!(probs.len(), lens.len() * num_experts, "logit sums of {} samples", lens.len());
            for (row, len) in probs.chunks_exact_mut(num_experts).zip(lens) {
                row.iter_mut().for_each(|x| *x /= *len as f64);
                softmax(row);
            }
        }
        Self { probs, lens: lens.to_vec() }
    }

    /// Adds the samples to a layer's statistic, each with weight 1.
    pub fn add_to(&self, statistic: &mut LayerStatistic) {
        for row in self.probs.chunks_exact(statistic.sum.len()) {
            statistic.add(row, 1.0);
        }
    }

    /// The gradient of `segment_sums`, `[S · E]`, from that of [`LayerStatistic::sum`], `[E]`. The gradient of each
    /// token's logits equals that of its sample's sum.
    pub fn backward(&self, dsum: &[f64]) -> Vec<f64> {
        let mut out = Vec::with_capacity(self.probs.len());
        for (probs, len) in self.probs.chunks_exact(dsum.len()).zip(&self.lens) {
            let mean: f64 = probs.iter().zip(dsum).map(|(p, d)| p * d).sum();
            out.extend(probs.iter().zip(dsum).map(|(p, d)| p * (d - mean) / *len as f64));
        }
        out
    }
}

fn softmax(x: &mut [f64]) {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    x.iter_mut().for_each(|x| *x = (*x - max).exp());
    let total: f64 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= total);
}
