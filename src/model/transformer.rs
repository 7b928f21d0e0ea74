//! The whole model: parameters on a backend, forward, backward by plan, decoding.
//!
//! One backward serves every purpose. Walking the layers from the top it asks the [`GradPlan`] what each parameter
//! wants and stops below the lowest layer that wants anything. A layer's forward is kept or computed again from its saved
//! input; either way its backward reads the same values.

use std::ops::Range;
use std::sync::Arc;

use super::attention::{AttentionParams, AttentionSaved, KvCache};
use super::config::{LayerKind, ModelConfig};
use super::feed_forward::{Extent, FeedForwardParams, FeedForwardSaved, Observer};
use super::ids::{ParamId, ParamKind};
use super::plan::GradPlan;
use super::table::ParamTable;
use crate::backend::{Backend, HostTensor, Packing};

/// A model on a backend.
pub struct Model<B: Backend> {
    /// Where its operations run.
    pub backend: Arc<B>,
    /// Its shape and family.
    pub config: ModelConfig,
    /// Its parameters' names and sources.
    pub table: ParamTable,
    weights: Vec<B::Weight>,
    embedding: ParamId,
    layers: Vec<Layer>,
    final_norm: ParamId,
    /// The embedding itself where the model ties them.
    head: ParamId,
}

#[derive(Debug, Clone)]
struct Layer {
    attention: AttentionParams,
    feed_forward: FeedForwardParams,
}

/// One micro-batch on the backend.
pub struct Inputs<B: Backend> {
    ids: B::Indices,
    seqs: B::Sequences,
    loss_rows: B::Indices,
    targets: B::Indices,
    rows: usize,
}

/// How a forward pass is to run.
#[derive(Debug, Clone, Copy)]
pub struct ForwardOptions {
    /// Layers below this one are not kept at all: no backward visits them.
    pub lowest: usize,
    /// Layers from this one up keep what their backward reads; those between keep their input and compute again.
    pub keep_from: usize,
    /// Where the pass ends.
    pub end: PassEnd,
}

/// Where a pass ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassEnd {
    /// At the cross-entropy. The feed-forward part of the last layer is computed for rows that carry loss alone, which is
    /// exact, since nothing above mixes rows; not so if `all_rows`, for those who observe that layer's router.
    Loss {
        /// Compute the last layer for every row.
        all_rows: bool,
    },
    /// At the router logits of the last layer that routes.
    Routers,
}

/// What a forward pass leaves for its backward.
pub struct Forward<B: Backend> {
    layers: Vec<Option<LayerSaved<B>>>,
    /// The hidden states of the rows that carry loss, `[n, D]`.
    last: Option<B::Tensor>,
    options: ForwardOptions,
}

struct LayerSaved<B: Backend> {
    x: B::Tensor,
    kept: Option<LayerKept<B>>,
}

struct LayerKept<B: Backend> {
    attention: AttentionSaved<B>,
    h: B::Tensor,
    feed_forward: FeedForwardSaved<B>,
}

/// Told of each decoder layer whose gradients are complete, and shown the gradients.
pub type OnLayer<'a, B> = &'a mut dyn FnMut(usize, &<B as Backend>::Buffer);

/// Where a backward pass puts gradients and scores.
pub struct Sinks<'a, B: Backend> {
    /// What to do with each parameter.
    pub plan: &'a GradPlan,
    /// `plan.len()` elements; accumulates.
    pub grads: &'a mut B::Buffer,
    /// `layers · experts` sums; accumulates.
    pub scores: &'a mut B::Scores,
    /// Told of each layer as it is done: its gradients can leave while the layers below still compute. The head's are
    /// complete before the first layer's.
    pub done: Option<OnLayer<'a, B>>,
}

impl<B: Backend> Sinks<'_, B> {
    /// The buffer and the offset for a parameter's gradient, if it is to accumulate.
    pub(super) fn slot(&mut self, id: ParamId) -> Option<(&mut B::Buffer, usize)> {
        self.plan.slot(id).map(|offset| (&mut *self.grads, offset))
    }
}

/// The gradient of a loss on one layer's routing statistic, brought to that layer's logits.
#[derive(Debug, Clone, PartialEq)]
pub enum RouterGrad {
    /// For row ranges, the gradient of Σ over their rows of softmax(logits), `[E]` each.
    SoftmaxSums(Vec<(Range<usize>, Vec<f32>)>),
    /// For row ranges, the gradient of Σ over their rows of the logits, `[ranges · E]`.
    SegmentSums(Vec<Range<usize>>, Vec<f32>),
}

impl RouterGrad {
    pub(super) fn add_to<B: Backend>(&self, b: &B, logits: &B::Tensor, dlogits: &mut B::Tensor) {
        match self {
            RouterGrad::SoftmaxSums(parts) => {
                for (rows, dy) in parts {
                    b.softmax_sum_backward(dy, logits, rows.clone(), dlogits);
                }
            }
            RouterGrad::SegmentSums(segments, dy) => b.segment_sum_backward(dy, segments, dlogits),
        }
    }
}

/// What a backward pass starts from.
#[derive(Debug, Clone, Copy)]
pub struct LossGrads<'a> {
    /// The gradient is that of this factor times the summed cross-entropy.
    pub ce_scale: f32,
    /// One entry a decoder layer, or none at all.
    pub routers: &'a [Option<RouterGrad>],
}

impl<B: Backend> Inputs<B> {
    /// Puts a micro-batch on the backend: `ids` `[T]`, rows that carry loss and their targets.
    pub fn new(model: &Model<B>, ids: &[u32], packing: &Packing, loss_rows: &[u32], targets: &[u32]) -> Self {
        let b = &*model.backend;
        Self {
            ids: b.indices(ids),
            seqs: b.sequences(packing, &model.config.rope),
            loss_rows: b.indices(loss_rows),
            targets: b.indices(targets),
            rows: ids.len(),
        }
    }

    /// T
    pub fn rows(&self) -> usize {
        self.rows
    }
}

impl<B: Backend> Model<B> {
    /// Puts the parameters on the backend. The CPU leaves a checkpoint's memory-mapped.
    pub fn new(backend: Arc<B>, config: ModelConfig, table: ParamTable) -> Self {
        let weights = table.weights(&*backend);
        let must = |kind| table.id(kind).expect("the table was checked against the family");
        let embedding = must(ParamKind::Embedding);
        let layers = (0..config.layers.len())
            .map(|l| Layer {
                attention: AttentionParams::find(&table, l, config.heads[l]),
                feed_forward: FeedForwardParams::find(&table, l, &config),
            })
            .collect();
        let final_norm = must(ParamKind::FinalNorm);
        let head = table.id(ParamKind::LmHead).unwrap_or(embedding);
        Self { backend, config, table, weights, embedding, layers, final_norm, head }
    }

    /// A parameter's present value on the backend.
    pub fn weight(&self, id: ParamId) -> &B::Weight {
        &self.weights[id]
    }

    /// All parameters, by [`ParamId`].
    pub fn weights(&self) -> &[B::Weight] {
        &self.weights
    }

    /// All parameters, for the optimizer.
    pub fn weights_mut(&mut self) -> &mut [B::Weight] {
        &mut self.weights
    }

    /// A parameter's present value in its stored dtype.
    pub fn weight_host(&self, id: ParamId) -> HostTensor {
        self.backend.weight_host(&self.weights[id])
    }

    /// Overwrites a parameter.
    pub fn set_weight_host(&mut self, id: ParamId, value: HostTensor) {
        self.weights[id] = self.backend.weight(value);
    }

    /// The last decoder layer that routes.
    pub fn last_moe_layer(&self) -> usize {
        self.config.layers.iter().rposition(|k| *k == LayerKind::Moe).expect("a model with experts")
    }

    /// Runs the layers; `observer` sees each router.
    pub fn forward(
        &self,
        inputs: &Inputs<B>,
        options: ForwardOptions,
        mut observer: Option<Observer<'_, B>>,
    ) -> Forward<B> {
        let b = &*self.backend;
        let mut saved: Vec<Option<LayerSaved<B>>> = Vec::with_capacity(self.layers.len());
        let mut x = b.embedding(&inputs.ids, self.weight(self.embedding));
        let top = self.top_layer(options.end);
        for (l, layer) in self.layers.iter().enumerate().take(top + 1) {
            let rows = self.pruned_rows(l, inputs, options.end);
            let extent = if options.end == PassEnd::Routers && l == top { Extent::Router } else { Extent::Whole };
            let (h, attention) = self.attention_forward(&layer.attention, &x, &inputs.seqs, rows, None);
            let (y, feed_forward) =
                self.feed_forward(&layer.feed_forward, &h, extent, observer.as_mut().map(|o| &mut **o as _));
            let kept = (l >= options.keep_from).then_some(LayerKept { attention, h, feed_forward });
            let Some(y) = y else {
                saved.push((l >= options.lowest).then_some(LayerSaved { x, kept }));
                return Forward { layers: saved, last: None, options };
            };
            let input = std::mem::replace(&mut x, y);
            saved.push((l >= options.lowest).then_some(LayerSaved { x: input, kept }));
        }
        let last =
            if self.pruned_rows(top, inputs, options.end).is_some() { x } else { b.gather_rows(&x, &inputs.loss_rows) };
        Forward { layers: saved, last: Some(last), options }
    }

    /// The summed cross-entropy of a forward pass that ended at the loss.
    pub fn loss(&self, inputs: &Inputs<B>, forward: &Forward<B>) -> f64 {
        let b = &*self.backend;
        let last = forward.last.as_ref().expect("a pass that ended at the loss");
        let normed = b.rms_norm(last, self.weight(self.final_norm), self.config.rms_norm_eps);
        b.linear_cross_entropy(&normed, self.weight(self.head), &inputs.targets)
    }

    /// The summed cross-entropy (`None` where the pass ended at the routers) and every gradient that the plan wants.
    /// `forward` must have been made with `lowest <= plan.lowest_layer()`.
    pub fn backward(
        &self,
        inputs: &Inputs<B>,
        mut forward: Forward<B>,
        grads: LossGrads<'_>,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<f64> {
        let b = &*self.backend;
        let end = forward.options.end;
        let top = self.top_layer(end);
        let mut loss = None;
        let mut dx = None;
        if let Some(last) = forward.last.take() {
            let (sum, d_last) = self.head_backward(&last, inputs, grads.ce_scale, sinks);
            loss = Some(sum);
            dx = Some(if self.pruned_rows(top, inputs, end).is_some() {
                d_last
            } else {
                let mut spread = b.zeros(inputs.rows, self.config.hidden_size);
                b.gather_rows_backward(&d_last, &inputs.loss_rows, &mut spread);
                spread
            });
        }
        let Some(lowest) = sinks.plan.lowest_layer() else { return loss };
        for l in (lowest..=top).rev() {
            let LayerSaved { x, kept } = forward.layers[l].take().expect("layers from the lowest up are saved");
            dx =
                self.layer_backward(l, dx, &x, kept, inputs, end, grads.routers.get(l).and_then(Option::as_ref), sinks);
            if let Some(done) = &mut sinks.done {
                done(l, sinks.grads);
            }
        }
        if sinks.plan.wants_embedding()
            && let (Some(dx), Some((dw, offset))) = (dx, sinks.slot(self.embedding))
        {
            b.embedding_backward(&dx, &inputs.ids, dw, offset);
        }
        loss
    }

    fn head_backward(
        &self,
        last: &B::Tensor,
        inputs: &Inputs<B>,
        scale: f32,
        sinks: &mut Sinks<'_, B>,
    ) -> (f64, B::Tensor) {
        let b = &*self.backend;
        let (norm, eps) = (self.weight(self.final_norm), self.config.rms_norm_eps);
        let normed = b.rms_norm(last, norm, eps);
        let head = self.weight(self.head);
        let (sum, d_normed) =
            b.linear_cross_entropy_backward(&normed, head, &inputs.targets, scale, sinks.slot(self.head));
        (sum, b.rms_norm_backward(&d_normed, last, norm, eps, sinks.slot(self.final_norm)))
    }

    /// The gradient of the layer's input, where something below wants it and it is not zero.
    #[allow(clippy::too_many_arguments)]
    fn layer_backward(
        &self,
        l: usize,
        dy: Option<B::Tensor>,
        x: &B::Tensor,
        kept: Option<LayerKept<B>>,
        inputs: &Inputs<B>,
        end: PassEnd,
        router_grad: Option<&RouterGrad>,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<B::Tensor> {
        if dy.is_none() && router_grad.is_none() {
            return None;
        }
        let layer = &self.layers[l];
        let rows = self.pruned_rows(l, inputs, end);
        let wants = sinks.plan.layer(l);
        let LayerKept { attention, h, feed_forward } = kept.unwrap_or_else(|| {
            let (h, attention) = self.attention_forward(&layer.attention, x, &inputs.seqs, rows, None);
            let extent = if dy.is_none() { Extent::Router } else { Extent::Recompute };
            let (_, feed_forward) = self.feed_forward(&layer.feed_forward, &h, extent, None);
            LayerKept { attention, h, feed_forward }
        });
        let dh =
            self.feed_forward_backward(&layer.feed_forward, dy, &h, &feed_forward, router_grad, wants.hidden(), sinks)?;
        drop((h, feed_forward));
        self.attention_backward(&layer.attention, dh, x, &attention, &inputs.seqs, rows, wants.below, sinks)
    }

    /// The rows that the last layer computes, where it need not compute all.
    fn pruned_rows<'a>(&self, layer: usize, inputs: &'a Inputs<B>, end: PassEnd) -> Option<&'a B::Indices> {
        let prunes = end == PassEnd::Loss { all_rows: false } && layer + 1 == self.layers.len();
        prunes.then_some(&inputs.loss_rows)
    }

    fn top_layer(&self, end: PassEnd) -> usize {
        match end {
            PassEnd::Loss { .. } => self.layers.len() - 1,
            PassEnd::Routers => self.last_moe_layer(),
        }
    }

    /// An empty key/value cache.
    pub fn kv_cache(&self) -> KvCache<B> {
        let b = &*self.backend;
        let empty = |h: &crate::backend::Heads| b.zeros(0, h.keys * h.dim);
        KvCache { layers: self.config.heads.iter().map(|h| (empty(h), empty(h))).collect() }
    }

    /// Continues one sequence by `ids`; the logits of the next token, `[V]`.
    pub fn decode(&self, ids: &[u32], cache: &mut KvCache<B>) -> Vec<f32> {
        let b = &*self.backend;
        let seen = b.shape(&cache.layers[0].0).0;
        let seqs = b.sequences(&Packing::continuing(ids.len(), seen + ids.len()), &self.config.rope);
        let last_row = b.indices(&[ids.len() as u32 - 1]);
        let mut x = b.embedding(&b.indices(ids), self.weight(self.embedding));
        let top = self.layers.len() - 1;
        for (l, layer) in self.layers.iter().enumerate() {
            let rows = (l == top).then_some(&last_row);
            let (h, _) = self.attention_forward(&layer.attention, &x, &seqs, rows, Some(&mut cache.layers[l]));
            x = self.feed_forward(&layer.feed_forward, &h, Extent::Whole, None).0.expect("the whole extent");
        }
        let normed = b.rms_norm(&x, self.weight(self.final_norm), self.config.rms_norm_eps);
        b.download(&b.linear(&normed, self.weight(self.head), None))
    }
}
