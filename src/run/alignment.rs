//! Router alignment on one rank: statistics of forward passes, agreed over all ranks, and their gradient brought back to each
//! layer's logits.

use std::iter;
use std::ops::Range;

use super::engine::Engine;
use crate::backend::{Backend, Packing};
use crate::collective::Collective;
use crate::exit::Result;
use crate::model::{Routed, RouterGrad};
use crate::routers::{self, Alignment, KlType, LayerStatistic, SampleSoftmax, Statistic};

/// One side (safe or unsafe) of one packed batch of this rank.
pub struct Side {
    kind: Statistic,
    /// Its rows; for `sample-logits` one range a sample.
    segments: Vec<Range<usize>>,
    /// By place among the layers that route.
    statistics: Vec<LayerStatistic>,
    /// What the backward of `sample-logits` reads, by place among the layers.
    samples: Vec<Option<SampleSoftmax>>,
}

impl Side {
    /// Nothing seen yet. `sequences`: the packed sequences of this side.
    pub fn new(
        kind: Statistic,
        num_layers: usize,
        num_experts: usize,
        packing: &Packing,
        sequences: Range<usize>,
    ) -> Self {
        let segments = match kind {
            Statistic::TokenProbs => {
                iter::once(packing.queries[sequences.start]..packing.queries[sequences.end]).collect()
            }
            Statistic::SampleLogits => sequences.map(|s| packing.queries[s]..packing.queries[s + 1]).collect(),
        };
        let statistics = vec![LayerStatistic::zero(num_experts); num_layers];
        Self { kind, segments, statistics, samples: vec![None; num_layers] }
    }

    /// Takes in the logits of the layer at `place` among those that route.
    pub fn observe<B: Backend>(&mut self, b: &B, place: usize, logits: &B::Tensor) {
        let statistic = &mut self.statistics[place];
        match self.kind {
            Statistic::TokenProbs => {
                let rows = self.segments[0].clone();
                statistic.add(&b.softmax_sum(logits, rows.clone()), rows.len() as f64);
            }
            Statistic::SampleLogits => {
                let lengths: Vec<_> = self.segments.iter().map(Range::len).collect();
                let samples = SampleSoftmax::forward(&b.segment_sum(logits, &self.segments), &lengths);
                samples.add_to(statistic);
                self.samples[place] = Some(samples);
            }
        }
    }

    /// The gradient of a layer's logits from that of the statistic's global sum.
    fn gradient(&self, place: usize, d_sum: &[f64], factor: f64) -> RouterGrad {
        let to_f32 = |values: &[f64]| values.iter().map(|d| (d * factor) as f32).collect();
        match &self.samples[place] {
            None => RouterGrad::SoftmaxSums(vec![(self.segments[0].clone(), to_f32(d_sum))]),
            Some(samples) => RouterGrad::SegmentSums(self.segments.clone(), to_f32(&samples.backward(d_sum))),
        }
    }
}

/// The alignment loss of a global batch over some of the layers.
pub struct GlobalAlignment {
    loss: Alignment,
    /// Places (among the layers that route) of the layers in the loss.
    places: Vec<usize>,
}

/// Agrees on both statistics over all ranks and compares them. The sides hold one entry for each of this rank's packed
/// batches in the step; ranks may hold different numbers of them. `None` where some side has no token on any rank.
pub fn align(
    world: &dyn Collective,
    kl: KlType,
    safe: &[&Side],
    unsafe_: &[&Side],
    places: &[usize],
    num_experts: usize,
) -> Result<Option<GlobalAlignment>> {
    let total = |sides: &[&Side]| -> Result<Vec<LayerStatistic>> {
        let mut statistics = vec![LayerStatistic::zero(num_experts); places.len()];
        for side in sides {
            for (statistic, &place) in statistics.iter_mut().zip(places) {
                let part = &side.statistics[place];
                statistic.add(&part.sum, part.weight);
            }
        }
        routers::all_reduce(&mut statistics, world)?;
        Ok(statistics)
    };
    let loss = routers::alignment(kl, &total(safe)?, &total(unsafe_)?);
    Ok(loss.map(|loss| GlobalAlignment { loss, places: places.to_vec() }))
}

impl GlobalAlignment {
    /// Mean over the layers of the divergence.
    pub fn loss(&self) -> f64 {
        self.loss.loss
    }

    /// The divergence of each layer in the loss.
    pub fn by_layer(&self) -> &[f64] {
        &self.loss.per_layer
    }

    /// The gradient of `factor` times the loss through the unsafe side, for each decoder layer.
    pub fn through_unsafe(&self, side: &Side, layers: &MoeLayers, factor: f64) -> Vec<Option<RouterGrad>> {
        self.spread(layers, |i, place| side.gradient(place, &self.loss.d_unsafe[i], factor))
    }

    /// The same through both sides of one packed batch.
    pub fn through_both(
        &self,
        safe: &Side,
        unsafe_: &Side,
        layers: &MoeLayers,
        factor: f64,
    ) -> Vec<Option<RouterGrad>> {
        self.spread(layers, |i, place| {
            let safe = safe.gradient(place, &self.loss.d_safe[i], factor);
            let unsafe_ = unsafe_.gradient(place, &self.loss.d_unsafe[i], factor);
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
        for (i, &place) in self.places.iter().enumerate() {
            out[layers.layers[place]] = Some(gradient(i, place));
        }
        out
    }
}

/// Each side by reference, as [`align`] takes them.
pub fn refs(sides: &[Side]) -> Vec<&Side> {
    sides.iter().collect()
}

/// The decoder layers that route, and how many decoder layers there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MoeLayers {
    /// Decoder-layer numbers, ascending.
    pub layers: Vec<usize>,
    /// All decoder layers.
    pub depth: usize,
}

impl MoeLayers {
    /// All places among the layers that route.
    pub fn places(&self) -> Vec<usize> {
        (0..self.layers.len()).collect()
    }

    /// The place of a decoder layer among those that route.
    pub fn place(&self, layer: usize) -> usize {
        self.layers.binary_search(&layer).expect("a layer that routes")
    }
}

/// An observer that shows the logits of every layer that routes to the sides of one packed batch.
pub fn watch<'s, B: Backend>(
    engine: &'s Engine<'_, B>,
    layers: &'s MoeLayers,
    sides: Vec<&'s mut Side>,
) -> impl FnMut(Routed<'_, B>) + 's {
    let mut sides = sides;
    move |routed| {
        for side in sides.iter_mut() {
            side.observe(&*engine.model.backend, layers.place(routed.layer), routed.logits);
        }
    }
}
