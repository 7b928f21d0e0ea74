//! Scores from routing frequencies, of the model's forward passes or of traces.

use super::sums::{PartialSums, ScoredBatch, Scores};
use crate::backend::Backend;
use crate::data::{MicroBatch, RoutingTraces, Sampler, Trace};
use crate::exit::Result;
use crate::experts::{Bootstrap, FrequencyAccumulator, RoutingCounts, RoutingTokens, token_mask};
use crate::model::{PassEnd, Routed};
use crate::train::replica::Replica;

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

    /// The unsafe replies of a micro-batch against the safe replies of their partners.
    pub(super) fn add<B: Backend>(
        &mut self,
        replica: &Replica<B>,
        sampler: Sampler<'_>,
        index: usize,
        records: &[usize],
    ) -> ScoredBatch {
        let partners: Vec<_> = records.iter().map(|&r| self.partners[r]).collect();
        let (safe, unsafe_) = (sampler.pack_safe(&partners), sampler.pack_unsafe(records));
        let (safe_counts, unsafe_counts) = match self.traces {
            None => (self.count(replica, &safe), self.count(replica, &unsafe_)),
            Some(traces) => (
                self.count_traces(replica, &safe, &traces.safe_side(&partners)),
                self.count_traces(replica, &unsafe_, &traces.unsafe_side(records)),
            ),
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
        let (batches, skipped) = (total.batches(), total.skipped());
        let warning = (skipped > 0).then(|| {
            format!(
                "{skipped} of {} batches have no token of --routing-tokens on one side and do not count",
                batches + skipped,
            )
        });
        Ok(Scores { warning, bootstrap, ..Scores::of(total.finish()?, batches) })
    }
}
