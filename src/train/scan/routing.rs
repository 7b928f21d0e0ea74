//! Scores from routing frequencies, of the model's forward passes or of traces.

use super::sums::{PartialSums, ScoredBatch, Scores};
use crate::backend::Backend;
use crate::data::{MicroBatch, RoutingTraces, Sampler, Trace};
use crate::exit::Result;
use crate::experts::{Bootstrap, ExpertScores, FrequencyAccumulator, RoutingCounts, RoutingTokens, token_mask};
use crate::model::{PassEnd, Routed};
use crate::train::replica::{Replica, share};

/// The risk differences over all tokens of these micro-batches together, by forward passes: frequencies of sums, so that they do not
/// depend on the batch size. (A score of the routing method is the mean of the differences of micro-batches.) Counts are whole
/// numbers: the same bits on any number of ranks. `after` is called with the tokens of each micro-batch of this rank.
///
/// # Errors
/// Rows without a safe reply; no tokens to count on one of the sides; those of the collective.
pub fn risk_differences<B: Backend>(
    replica: &Replica<B>,
    sampler: Sampler<'_>,
    tokens: RoutingTokens,
    micro_batches: &[Vec<usize>],
    mut after: impl FnMut(usize),
) -> Result<ExpertScores> {
    let scorer = RoutingScorer::new(replica, sampler, tokens, None)?;
    let layers = replica.moe_layers().layers.clone();
    let num_experts = replica.model().config.num_experts;
    // Of each side the counts, then the counted tokens.
    let width = layers.len() * num_experts + 1;
    let mut sums = vec![0.0; 2 * width];
    for (_, records) in share(micro_batches, &*replica.world) {
        let (sides, _) = scorer.sides(sampler, records);
        for (side, sums) in sides.iter().zip(sums.chunks_exact_mut(width)) {
            let counts = scorer.count(replica, side);
            let counted = counts.counts().iter().copied().chain([counts.tokens()]);
            sums.iter_mut().zip(counted).for_each(|(sum, n)| *sum += n as f64);
        }
        after(sides.iter().map(|side| side.ids.len()).sum());
    }
    replica.world.all_reduce_f64(&mut sums)?;
    let [(safe, safe_tokens), (unsafe_, unsafe_tokens)] =
        [&sums[..width], &sums[width..]].map(|side| (&side[..width - 1], side[width - 1]));
    let difference = |(safe, unsafe_): (&f64, &f64)| unsafe_ / unsafe_tokens - safe / safe_tokens;
    let differences: Vec<f64> = safe.iter().zip(unsafe_).map(difference).collect();
    let mut total = FrequencyAccumulator::new(layers, num_experts);
    total.add_differences((safe_tokens > 0.0 && unsafe_tokens > 0.0).then_some(&differences[..]));
    Ok(total.finish()?)
}

/// A remark on micro-batches that do not count.
fn skipped_warning(total: &FrequencyAccumulator) -> Option<String> {
    let (batches, skipped) = (total.batches(), total.skipped());
    (skipped > 0).then(|| {
        format!(
            "{skipped} of {} batches have no token of --routing-tokens on one side and do not count",
            batches + skipped,
        )
    })
}

/// Counts how often each expert is among the top K, by forward passes only, or in routing traces.
pub(super) struct RoutingScorer<'d> {
    tokens: RoutingTokens,
    /// For each record the one with its safe reply.
    partners: Vec<usize>,
    /// The traces of the sampler's records, in place of forward passes.
    pub(super) traces: Option<&'d RoutingTraces>,
    pub(super) sums: PartialSums<FrequencyAccumulator>,
}

impl<'d> RoutingScorer<'d> {
    pub(super) fn new<B: Backend>(
        replica: &Replica<B>,
        sampler: Sampler<'d>,
        tokens: RoutingTokens,
        bootstrap: Option<Bootstrap>,
    ) -> Result<Self> {
        let layers = replica.moe_layers().layers.clone();
        let accumulator = FrequencyAccumulator::new(layers, replica.model().config.num_experts);
        let sums = PartialSums::new(accumulator, bootstrap);
        Ok(Self { tokens, partners: sampler.reply_partners()?, traces: None, sums })
    }

    /// The safe and the unsafe side of a micro-batch, and the records of the safe side.
    fn sides(&self, sampler: Sampler<'_>, records: &[usize]) -> ([MicroBatch; 2], Vec<usize>) {
        let partners: Vec<_> = records.iter().map(|&r| self.partners[r]).collect();
        ([sampler.pack_safe(&partners), sampler.pack_unsafe(records)], partners)
    }

    /// The unsafe replies of a micro-batch against the safe replies of their partners.
    pub(super) fn add<B: Backend>(
        &mut self,
        replica: &Replica<B>,
        sampler: Sampler<'_>,
        index: usize,
        records: &[usize],
    ) -> ScoredBatch {
        let ([safe, unsafe_], partners) = self.sides(sampler, records);
        let [safe_counts, unsafe_counts] = match self.traces {
            None => [self.count(replica, &safe), self.count(replica, &unsafe_)],
            Some(traces) => [
                self.count_traces(replica, &safe, &traces.safe_side(&partners)),
                self.count_traces(replica, &unsafe_, &traces.unsafe_side(records)),
            ],
        };
        let differences = self.sums.accumulator.add(&safe_counts, &unsafe_counts);
        self.sums.resample(index, differences.as_deref());
        ScoredBatch { tokens: safe.ids.len() + unsafe_.ids.len(), loss: None }
    }

    fn count_traces<B: Backend>(&self, replica: &Replica<B>, batch: &MicroBatch, traces: &[&Trace]) -> RoutingCounts {
        let layers = replica.moe_layers().layers.len();
        let mask = token_mask(self.tokens, &batch.is_response);
        let mut counts = RoutingCounts::new(mask, layers, replica.model().config.num_experts);
        for layer in 0..layers {
            let experts: Vec<u32> = traces.iter().flat_map(|trace| trace.layer(layer)).collect();
            counts.add_layer(layer, &experts);
        }
        counts
    }

    fn count<B: Backend>(&self, replica: &Replica<B>, batch: &MicroBatch) -> RoutingCounts {
        let (b, layers) = (&*replica.model().backend, replica.moe_layers());
        let mask = token_mask(self.tokens, &batch.is_response);
        let mut counts = RoutingCounts::new(mask, layers.layers.len(), replica.model().config.num_experts);
        let mut observe = |routed: Routed<'_, B>| {
            counts.add_layer(layers.index_of(routed.layer), &b.expert_ids(routed.routing));
        };
        replica.forward(&replica.inputs(batch), None, PassEnd::Routers, Some(&mut observe));
        counts
    }

    pub(super) fn finish<B: Backend>(self, replica: &Replica<B>) -> Result<Scores> {
        let PartialSums { accumulator: mut total, mut bootstrap, .. } = self.sums;
        total.merge(&*replica.world)?;
        bootstrap.as_mut().map_or(Ok(()), |bootstrap| bootstrap.merge(&*replica.world))?;
        let (batches, warning) = (total.batches(), skipped_warning(&total));
        Ok(Scores { warning, bootstrap, ..Scores::of(total.finish()?, batches) })
    }
}
