//! What the published rules select from: how often, and with which weights, tokens are routed to each expert.

use super::sums::{PartialSums, ScoredBatch, Scores};
use crate::backend::Backend;
use crate::data::{RoutingTraces, Sampler};
use crate::exit::Result;
use crate::experts::{BatchUsage, Usage, UsageAccumulator};
use crate::train::replica::Replica;
use crate::train::usage::UsageCounter;

/// Counts the experts that tokens are routed to, for a published rule.
pub(super) struct UsageScorer<'d> {
    pub(super) counter: UsageCounter,
    /// For each record the one with its safe reply; `None`: the rule needs no safe side.
    pub(super) partners: Option<Vec<usize>>,
    pub(super) traces: Option<&'d RoutingTraces>,
    pub(super) sums: PartialSums<UsageAccumulator>,
}

impl<'d> UsageScorer<'d> {
    /// The unsafe replies of a micro-batch, and the safe replies of their partners where the rule needs them.
    pub(super) fn add<B: Backend>(
        &mut self,
        replica: &Replica<B>,
        sampler: Sampler<'d>,
        index: usize,
        records: &[usize],
    ) -> ScoredBatch {
        let partners = self.partners.as_ref().map_or_else(Vec::new, |of| records.iter().map(|&r| of[r]).collect());
        let (safe, unsafe_) = (sampler.pack_safe(&partners), sampler.pack_unsafe(records));
        let mut usage = BatchUsage {
            safe: Usage::new(replica.moe_layers().layers.len() * replica.model().config.num_experts),
            unsafe_: self.counter.count(replica, &unsafe_, self.traces.map(|traces| traces.unsafe_side(records))),
        };
        if !partners.is_empty() {
            usage.safe = self.counter.count(replica, &safe, self.traces.map(|traces| traces.safe_side(&partners)));
        }
        self.sums.accumulator.add(index, usage);
        ScoredBatch { tokens: safe.ids.len() + unsafe_.ids.len(), loss: None }
    }

    pub(super) fn finish<B: Backend>(self, replica: &Replica<B>, micro_batches: usize) -> Result<Scores> {
        let mut total = self.sums.accumulator;
        let experts = replica.moe_layers().layers.len() * replica.model().config.num_experts;
        total.merge(&*replica.world, micro_batches, experts)?;
        let zeros = Scores::zeros(replica);
        Ok(Scores { micro_batches: total.micro_batches(), usage: Some(total), ..zeros })
    }
}
