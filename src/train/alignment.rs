//! Router alignment on one rank: the routing statistics of its forward passes, their sums over all ranks, and the gradient
//! with respect to each layer's logits.

use std::iter;
use std::num::NonZeroUsize;
use std::ops::Range;

use super::replica::Replica;
use crate::backend::{Backend, Packing};
use crate::collective::Collective;
use crate::exit::Result;
use crate::model::{MoeLayers, Routed, RouterGrad};
use crate::routers::{self, Alignment, KlType, LayerStatistic, SampleSoftmax, Statistic};

/// One side (safe or unsafe) of one packed batch of this rank.
pub struct RoutingSide {
    kind: Statistic,
    /// Row ranges, each of the counted tokens of one sample; for `token-probs` over all tokens one range of all rows.
    segments: Vec<Range<usize>>,
    /// One statistic a MoE layer.
    statistics: Vec<LayerStatistic>,
    /// Saved for the backward of `sample-logits`, one a MoE layer.
    samples: Vec<Option<SampleSoftmax>>,
}

impl RoutingSide {
    /// An empty statistic of `num_layers` MoE layers. `sequences`: the packed sequences of this side; `last_tokens`: how many
    /// tokens at the end of each count, `None` for all.
    pub fn new(
        kind: Statistic,
        last_tokens: Option<NonZeroUsize>,
        num_layers: usize,
        num_experts: usize,
        packing: &Packing,
        sequences: Range<usize>,
    ) -> Self {
        let segments = match (kind, last_tokens) {
            (Statistic::TokenProbs, None) => {
                iter::once(packing.queries[sequences.start]..packing.queries[sequences.end]).collect()
            }
            _ => sequences.map(|s| counted(packing.queries[s]..packing.queries[s + 1], last_tokens)).collect(),
        };
        let statistics = vec![LayerStatistic::zero(num_experts); num_layers];
        Self { kind, segments, statistics, samples: vec![None; num_layers] }
    }

    /// The sum of known statistics, `[layers]` each, without a forward pass and without a gradient.
    pub fn of_known<'s>(
        kind: Statistic,
        num_layers: usize,
        num_experts: usize,
        parts: impl Iterator<Item = &'s [LayerStatistic]>,
    ) -> Self {
        let mut statistics = vec![LayerStatistic::zero(num_experts); num_layers];
        for part in parts {
            statistics.iter_mut().zip(part).for_each(|(sum, part)| sum.add(&part.sum, part.weight));
        }
        Self { kind, segments: Vec::new(), statistics, samples: vec![None; num_layers] }
    }

    /// The statistic of each MoE layer.
    pub fn into_statistics(self) -> Vec<LayerStatistic> {
        self.statistics
    }

    /// Adds the logits `[T, E]` of the MoE layer with this index (among the MoE layers).
    pub fn observe<B: Backend>(&mut self, b: &B, index: usize, logits: &B::Tensor) {
        let statistic = &mut self.statistics[index];
        match self.kind {
            Statistic::TokenProbs => {
                for rows in &self.segments {
                    statistic.add(&b.softmax_sum(logits, rows.clone()), rows.len() as f64);
                }
            }
            Statistic::SampleLogits => {
                let lengths: Vec<_> = self.segments.iter().map(Range::len).collect();
                let samples = SampleSoftmax::forward(&b.segment_sum(logits, &self.segments), &lengths);
                samples.add_to(statistic);
                self.samples[index] = Some(samples);
            }
        }
    }

    /// The gradient of a layer's logits from the gradient `d_sum` of the statistic's global sum.
    fn gradient(&self, index: usize, d_sum: &[f64], factor: f64) -> RouterGrad {
        let to_f32 = |values: &[f64]| values.iter().map(|d| (d * factor) as f32).collect();
        match &self.samples[index] {
            None => RouterGrad::SoftmaxSums(self.segments.iter().map(|rows| (rows.clone(), to_f32(d_sum))).collect()),
            Some(samples) => RouterGrad::SegmentSums(self.segments.clone(), to_f32(&samples.backward(d_sum))),
        }
    }
}

/// The rows of a sample that count.
fn counted(rows: Range<usize>, last_tokens: Option<NonZeroUsize>) -> Range<usize> {
    let first = last_tokens.map_or(rows.start, |n| rows.end.saturating_sub(n.get()).max(rows.start));
    first..rows.end
}

/// The alignment loss of a global batch over some of the layers.
pub struct GlobalAlignment {
    loss: Alignment,
    /// Indices (among the MoE layers) of the layers in the loss.
    indices: Vec<usize>,
}

/// Sums both statistics over all ranks and computes their divergence in the MoE layers `indices`. The slices hold one entry
/// for each of this rank's packed batches in the step; ranks may hold different numbers of them. `None` if one side has no
/// token on any rank.
pub fn align(
    world: &dyn Collective,
    kl: KlType,
    safe: &[&RoutingSide],
    unsafe_: &[&RoutingSide],
    indices: &[usize],
    num_experts: usize,
) -> Result<Option<GlobalAlignment>> {
    let total = |sides: &[&RoutingSide]| -> Result<Vec<LayerStatistic>> {
        let mut statistics = vec![LayerStatistic::zero(num_experts); indices.len()];
        for side in sides {
            for (statistic, &index) in statistics.iter_mut().zip(indices) {
                let part = &side.statistics[index];
                statistic.add(&part.sum, part.weight);
            }
        }
        routers::all_reduce(&mut statistics, world)?;
        Ok(statistics)
    };
    let loss = routers::alignment(kl, &total(safe)?, &total(unsafe_)?);
    Ok(loss.map(|loss| GlobalAlignment { loss, indices: indices.to_vec() }))
}

impl GlobalAlignment {
    /// Mean divergence over the layers, in nats.
    pub fn loss(&self) -> f64 {
        self.loss.loss
    }

    /// The gradient of `factor` times the loss through the unsafe side, one entry a decoder layer.
    pub fn through_unsafe(&self, side: &RoutingSide, layers: &MoeLayers, factor: f64) -> Vec<Option<RouterGrad>> {
        self.spread(layers, |i, index| side.gradient(index, &self.loss.d_unsafe[i], factor))
    }

    /// The gradient of `factor` times the loss through both sides of one packed batch, one entry a decoder layer.
    pub fn through_both(
        &self,
        safe: &RoutingSide,
        unsafe_: &RoutingSide,
        layers: &MoeLayers,
        factor: f64,
    ) -> Vec<Option<RouterGrad>> {
        self.spread(layers, |i, index| {
            let safe = safe.gradient(index, &self.loss.d_safe[i], factor);
            let unsafe_ = unsafe_.gradient(index, &self.loss.d_unsafe[i], factor);
            match (safe, unsafe_) {
                (RouterGrad::SoftmaxSums(mut parts), RouterGrad::SoftmaxSums(more)) => {
                    parts.extend(more);
                    RouterGrad::SoftmaxSums(parts)
                }
                _ => unreachable!("the consistency loss uses the token-probs statistic"),
            }
        })
    }

    fn spread(&self, layers: &MoeLayers, gradient: impl Fn(usize, usize) -> RouterGrad) -> Vec<Option<RouterGrad>> {
        let mut out = vec![None; layers.depth];
        for (i, &index) in self.indices.iter().enumerate() {
            out[layers.layers[index]] = Some(gradient(i, index));
        }
        out
    }
}

/// The sides as [`align`] takes them.
pub fn refs(sides: &[RoutingSide]) -> Vec<&RoutingSide> {
    sides.iter().collect()
}

/// An observer of a forward pass that adds the logits of every MoE layer to these sides.
pub fn watch<'s, B: Backend>(
    replica: &'s Replica<B>,
    mut sides: Vec<&'s mut RoutingSide>,
) -> impl FnMut(Routed<'_, B>) + 's {
    move |routed| {
        for side in sides.iter_mut() {
            side.observe(&*replica.model().backend, replica.moe_layers().index_of(routed.layer), routed.logits);
        }
    }
}
