//! The whole model: parameters on a backend, forward, backward by plan.
//!
//! One backward serves scoring and every kind of training. From the top layer down it asks the
//! [`GradPlan`](super::GradPlan) what to do with each parameter's gradient, and it stops below the lowest layer in the plan.
//! The activations that a layer's backward reads are kept, or recomputed from the layer's saved input; both give the same
//! values. Shape suffixes: see [`super::layer`].

use std::sync::Arc;

use super::attention::{self, AttentionParams, AttentionSaved};
use super::config::ModelConfig;
use super::feed_forward::{self, FeedForwardParams, FeedForwardSaved};
use super::guide::{RoutingMismatch, check_same_routing};
use super::ids::{ParamId, ParamKind};
use super::intervention::{Intervention, InterventionError, LayerIntervention};
use super::layer::{Extent, LayerCtx, LayerGrads, Observer, RouterGrad, Sinks};
use super::table::ParamTable;
use crate::backend::{Backend, HostTensor, Packing, RowLoss};

/// A model on a backend.
pub struct Model<B: Backend> {
    /// Runs the operations.
    pub backend: Arc<B>,
    /// Sizes and family.
    pub config: ModelConfig,
    /// Kinds, names and base values of the parameters.
    pub table: ParamTable,
    pub(super) weights: Vec<B::Weight>,
    pub(super) embedding: ParamId,
    pub(super) layers: Vec<Layer>,
    pub(super) final_norm: ParamId,
    /// The embedding, if the model ties the two.
    pub(super) head: ParamId,
    /// The change of each layer's routing; empty without an intervention.
    interventions: Vec<Option<LayerIntervention<B>>>,
    /// The model whose routing this one uses.
    pub(super) guide: Option<Box<Model<B>>>,
}

#[derive(Debug, Clone)]
pub(super) struct Layer {
    pub(super) attention: AttentionParams,
    pub(super) feed_forward: FeedForwardParams,
}

/// One micro-batch on the backend.
pub struct Inputs<B: Backend> {
    ids: B::Indices,
    seqs: B::Sequences,
    loss_rows: B::Indices,
    targets: B::Indices,
    rows: usize,
}

/// The routed experts of decoder layers below this one lie in the host's memory, and a backend with memory of its own copies
/// those of a layer for each use. Results do not depend on it. By default none do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OffloadedBelow(pub usize);

/// What a forward pass keeps for its backward, and where it ends.
#[derive(Debug, Clone, Copy)]
pub struct ForwardOptions {
    /// The lowest layer that the backward visits: nothing is kept of the layers below.
    pub lowest: usize,
    /// Layers from this one up keep the activations that their backward reads; layers from `lowest` to here keep only their
    /// input, and their backward recomputes the rest.
    pub keep_from: usize,
    /// Where the pass ends.
    pub end: PassEnd,
}

/// Where a pass ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassEnd {
    /// At the cross-entropy. Behind attention, the last layer computes only the rows that carry loss, which is exact, since
    /// nothing above attention mixes rows. An observer of that layer's router needs `all_rows`.
    Loss {
        /// Compute the last layer for every row.
        all_rows: bool,
    },
    /// At the router logits of the last layer that routes.
    Routers,
}

/// The activations that a forward pass keeps for its backward.
pub struct Forward<B: Backend> {
    layers: Vec<Option<LayerSaved<B>>>,
    /// Hidden states of the rows that carry loss. Absent where the pass ended at the routers.
    last_ND: Option<B::Tensor>,
    options: ForwardOptions,
}

struct LayerSaved<B: Backend> {
    x_TD: B::Tensor,
    kept: Option<LayerKept<B>>,
}

struct LayerKept<B: Backend> {
    attention: AttentionSaved<B>,
    h_ND: B::Tensor,
    feed_forward: FeedForwardSaved<B>,
}

/// The gradients that a backward pass starts from.
#[derive(Debug, Clone, Copy)]
pub struct LossGrads<'a> {
    /// Factor of the summed cross-entropy in the loss.
    pub ce_scale: f32,
    /// The gradient of a routing loss for each decoder layer, `[layers]` or empty.
    pub routers: &'a [Option<RouterGrad>],
}

/// What a base model computed for the rows of a pass that carry loss: the constant side of a KL divergence.
pub struct BaseHead<'a, B: Backend> {
    /// Its final hidden states behind the norm, `[n, D]`.
    pub normed: &'a B::Tensor,
    /// Its head; `None`: the model's own, which is frozen.
    pub head: Option<&'a B::Weight>,
}

impl<B: Backend> Inputs<B> {
    /// Uploads a micro-batch: token ids `[T]`, the rows that carry loss and their target ids.
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
    /// Uploads the parameters. On the CPU, those of a checkpoint stay memory-mapped.
    pub fn new(backend: Arc<B>, config: ModelConfig, table: ParamTable) -> Self {
        Self::offloaded(backend, config, table, OffloadedBelow::default())
    }

    /// The same with routed experts offloaded. Where they are divided among ranks, all ranks load the same models together.
    pub fn offloaded(backend: Arc<B>, config: ModelConfig, table: ParamTable, below: OffloadedBelow) -> Self {
        let weights = table.weights(&*backend, below.0);
        backend.fence_weights();
        let embedding = table.expect_id(ParamKind::Embedding);
        let layers = (0..config.layers.len())
            .map(|l| Layer {
                attention: AttentionParams::find(&table, l, config.heads[l]),
                feed_forward: FeedForwardParams::find(&table, l, &config),
            })
            .collect();
        let final_norm = table.expect_id(ParamKind::FinalNorm);
        let head = table.id(ParamKind::LmHead).unwrap_or(embedding);
        Self {
            backend,
            config,
            table,
            weights,
            embedding,
            layers,
            final_norm,
            head,
            interventions: Vec::new(),
            guide: None,
        }
    }

    /// A parameter's current value on the backend.
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

    /// A parameter's current value in its stored dtype.
    pub fn weight_host(&self, id: ParamId) -> HostTensor {
        self.backend.weight_host(&self.weights[id])
    }

    /// Overwrites a parameter.
    pub fn set_weight_host(&mut self, id: ParamId, value: HostTensor) {
        self.backend.write_weight(&mut self.weights[id], value);
    }

    /// Applies an intervention to all forward passes and to decoding from now on, in place of the former one; `None` clears it.
    ///
    /// # Errors
    /// Experts that the model does not have; a layer with fewer than K experts left. The former intervention then stays.
    pub fn set_intervention(&mut self, intervention: Option<&Intervention>) -> Result<(), InterventionError> {
        self.interventions = match intervention {
            Some(intervention) => intervention.by_layer(&*self.backend, &self.config)?,
            None => Vec::new(),
        };
        Ok(())
    }

    /// Locked routing: from now on, each token takes in each layer the experts and the routing weights that `guide` computes for it
    /// from the same tokens, in all forward passes and in decoding. The own routers still compute logits, which observers see;
    /// they decide nothing. Both models run side by side, so a pass takes twice the time. For forward passes only; an
    /// intervention on the guide applies to both models, an intervention on this one is refused by a panic.
    ///
    /// # Errors
    /// A guide of another family or of other sizes.
    pub fn route_as(&mut self, guide: Self) -> Result<(), RoutingMismatch> {
        check_same_routing(&self.config, &guide.config)?;
        self.guide = Some(Box::new(guide));
        Ok(())
    }

    /// The change of a layer's routing.
    pub(super) fn intervention(&self, layer: usize) -> Option<&LayerIntervention<B>> {
        assert!(self.guide.is_none() || self.interventions.is_empty(), "the routing is the guide's: change it there");
        self.interventions.get(layer).and_then(Option::as_ref)
    }

    /// Number of the last MoE layer.
    pub fn last_moe_layer(&self) -> usize {
        *self.config.moe_layers().layers.last().expect("a model with experts")
    }

    /// Runs the layers and calls `observer` at each MoE layer.
    pub fn forward(
        &self,
        inputs: &Inputs<B>,
        options: ForwardOptions,
        observer: Option<Observer<'_, B>>,
    ) -> Forward<B> {
        self.backend.together(|| self.forward_layers(inputs, options, observer))
    }

    fn forward_layers(
        &self,
        inputs: &Inputs<B>,
        options: ForwardOptions,
        mut observer: Option<Observer<'_, B>>,
    ) -> Forward<B> {
        let b = &*self.backend;
        let mut saved: Vec<Option<LayerSaved<B>>> = Vec::with_capacity(self.layers.len());
        let mut x_TD = b.embedding(&inputs.ids, self.weight(self.embedding));
        let mut guide =
            self.guide.as_deref().map(|guide| (guide, b.embedding(&inputs.ids, guide.weight(guide.embedding))));
        let top = self.top_layer(options.end);
        for (l, layer) in self.layers.iter().enumerate().take(top + 1) {
            if l < top || options.end != PassEnd::Routers {
                self.prefetch(l + 1);
            }
            match &guide {
                Some((guide, _)) => b.load_offloaded(guide.layer_weights(l), self.layer_weights(l)),
                None => self.load_offloaded(l, (l < top).then_some(l + 1), options.end),
            }
            let mut ctx = self.layer_ctx(l, inputs, options.end);
            if let Some((guide, guide_x_TD)) = &mut guide {
                let ctx_of_guide = guide.layer_ctx(l, inputs, options.end);
                let (y_ND, kept) = layer_forward(&ctx_of_guide, &guide.layers[l], guide_x_TD, Extent::Whole, None);
                *guide_x_TD = y_ND.expect("the whole extent");
                ctx.given = kept.feed_forward.routing();
            }
            let extent = if options.end == PassEnd::Routers && l == top { Extent::Router } else { Extent::Whole };
            let (y_ND, kept) = layer_forward(&ctx, layer, &x_TD, extent, observer.as_mut().map(|o| &mut **o as _));
            let kept = (l >= options.keep_from).then_some(kept);
            let Some(y_ND) = y_ND else {
                saved.push((l >= options.lowest).then_some(LayerSaved { x_TD, kept }));
                return Forward { layers: saved, last_ND: None, options };
            };
            let x_TD = std::mem::replace(&mut x_TD, y_ND);
            saved.push((l >= options.lowest).then_some(LayerSaved { x_TD, kept }));
        }
        let pruned = self.pruned_rows(top, inputs, options.end).is_some();
        let last_ND = if pruned { x_TD } else { b.gather_rows(&x_TD, &inputs.loss_rows) };
        Forward { layers: saved, last_ND: Some(last_ND), options }
    }

    /// The summed cross-entropy of a forward pass that ended at the loss.
    pub fn loss(&self, inputs: &Inputs<B>, forward: &Forward<B>) -> f64 {
        self.backend.linear_cross_entropy(&self.normed(forward), self.weight(self.head), &inputs.targets)
    }

    /// The cross-entropy of each target of a forward pass that ended at the loss, and whether it is the greedy choice.
    pub fn row_losses(&self, inputs: &Inputs<B>, forward: &Forward<B>) -> Vec<RowLoss> {
        self.backend.linear_cross_entropy_rows(&self.normed(forward), self.weight(self.head), &inputs.targets)
    }

    /// The input of the head, `[N, D]`: the final hidden states behind the norm, of the rows that carry loss.
    pub fn normed(&self, forward: &Forward<B>) -> B::Tensor {
        let last_ND = forward.last_ND.as_ref().expect("a pass that ended at the loss");
        self.backend.rms_norm(last_ND, self.weight(self.final_norm), self.config.rms_norm_eps)
    }

    /// Σ over the rows that carry loss of KL(base ‖ model) of the next-token distributions, in nats, and the number of rows
    /// whose most probable token is the same.
    pub fn kl(&self, forward: &Forward<B>, base: &BaseHead<'_, B>) -> (f64, usize) {
        self.kl_of(&self.normed(forward), base)
    }

    /// [`Self::kl`] of hidden states behind the norm, `[n, D]`.
    pub fn kl_of(&self, normed: &B::Tensor, base: &BaseHead<'_, B>) -> (f64, usize) {
        let head = self.weight(self.head);
        self.backend.linear_kl(normed, head, base.normed, base.head.unwrap_or(head))
    }

    /// The parameter that makes logits of hidden states: the embedding, if the model ties the two.
    pub fn head(&self) -> ParamId {
        self.head
    }

    /// Adds the gradients of the plan to the sinks and returns the summed cross-entropy (`None` if the pass ended at the
    /// routers). `forward` must have been run with `lowest <= plan.lowest_layer()`.
    pub fn backward(
        &self,
        inputs: &Inputs<B>,
        forward: Forward<B>,
        grads: LossGrads<'_>,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<f64> {
        let LossGrads { ce_scale, routers } = grads;
        let b = &*self.backend;
        b.together(|| {
            self.backward_from(inputs, forward, routers, sinks, |normed_ND, head, dw| {
                b.linear_cross_entropy_backward(normed_ND, head, &inputs.targets, ce_scale, dw)
            })
        })
    }

    /// As [`Self::backward`], for `scale` times the sum of [`Self::kl`] in place of the cross-entropy. Returns that sum.
    pub fn backward_kl(
        &self,
        inputs: &Inputs<B>,
        forward: Forward<B>,
        base: &BaseHead<'_, B>,
        scale: f32,
        routers: &[Option<RouterGrad>],
        sinks: &mut Sinks<'_, B>,
    ) -> f64 {
        let b = &*self.backend;
        let sum = b.together(|| {
            self.backward_from(inputs, forward, routers, sinks, |normed_ND, head, dw| {
                b.linear_kl_backward(normed_ND, head, base.normed, base.head.unwrap_or(head), scale, dw)
            })
        });
        sum.expect("a pass that ended at the loss")
    }

    /// The backward of a pass with `of_head`, the backward of the loss behind the final norm: (normed hidden states, head, sink
    /// of the head) → (sum, gradient of the normed hidden states).
    fn backward_from(
        &self,
        inputs: &Inputs<B>,
        mut forward: Forward<B>,
        routers: &[Option<RouterGrad>],
        sinks: &mut Sinks<'_, B>,
        of_head: impl FnOnce(&B::Tensor, &B::Weight, Option<(&mut B::Buffer, usize)>) -> (f64, B::Tensor),
    ) -> Option<f64> {
        assert!(self.interventions.is_empty() && self.guide.is_none(), "an intervention is for forward passes only");
        let b = &*self.backend;
        let end = forward.options.end;
        let top = self.top_layer(end);
        let mut loss = None;
        let mut dx = None;
        if let Some(last_ND) = forward.last_ND.take() {
            let (sum, d_last_ND) = self.head_backward(&last_ND, sinks, of_head);
            loss = Some(sum);
            dx = Some(if self.pruned_rows(top, inputs, end).is_some() {
                d_last_ND
            } else {
                let mut dx_TD = b.zeros(inputs.rows, self.config.hidden_size);
                b.gather_rows_backward(&d_last_ND, &inputs.loss_rows, &mut dx_TD);
                dx_TD
            });
        }
        let Some(lowest) = sinks.plan.lowest_layer() else { return loss };
        for l in (lowest..=top).rev() {
            if l > lowest {
                self.prefetch(l - 1);
                self.load_offloaded(l, Some(l - 1), end);
            }
            let saved = forward.layers[l].take().expect("layers from the lowest up are saved");
            let grads = LayerGrads { dy: dx, router: routers.get(l).and_then(Option::as_ref) };
            dx = layer_backward(&self.layer_ctx(l, inputs, end), &self.layers[l], grads, saved, sinks);
            if let Some(done) = &mut sinks.done {
                done(l, sinks.grads);
            }
        }
        if sinks.plan.wants_embedding()
            && let (Some(dx_TD), Some((dw, offset))) = (dx, sinks.slot(self.embedding))
        {
            b.embedding_backward(&dx_TD, &inputs.ids, dw, offset);
        }
        loss
    }

    fn head_backward(
        &self,
        last_ND: &B::Tensor,
        sinks: &mut Sinks<'_, B>,
        of_head: impl FnOnce(&B::Tensor, &B::Weight, Option<(&mut B::Buffer, usize)>) -> (f64, B::Tensor),
    ) -> (f64, B::Tensor) {
        let b = &*self.backend;
        let (norm, eps) = (self.weight(self.final_norm), self.config.rms_norm_eps);
        let normed_ND = b.rms_norm(last_ND, norm, eps);
        let (sum, d_normed_ND) = of_head(&normed_ND, self.weight(self.head), sinks.slot(self.head));
        (sum, b.rms_norm_backward(&d_normed_ND, last_ND, norm, eps, sinks.slot(self.final_norm)))
    }

    /// Announces the parameters of a layer, or, for the number of layers, those behind the last one.
    fn prefetch(&self, layer: usize) {
        self.backend.prefetch(self.layer_weights(layer));
    }

    /// Begins to copy the offloaded experts of the layer that is computed now, and of the one that follows. A pass that ends at the
    /// routers uses none of its top layer.
    fn load_offloaded(&self, now: usize, next: Option<usize>, end: PassEnd) {
        let used = |layer: Option<usize>| match layer {
            Some(layer) if end != PassEnd::Routers || layer < self.top_layer(end) => self.layer_weights(layer),
            _ => self.weights[..0].iter(),
        };
        self.backend.load_offloaded(used(Some(now)), used(next));
    }

    /// The parameters of a layer, or, for the number of layers, those behind the last one.
    pub(super) fn layer_weights(&self, layer: usize) -> std::slice::Iter<'_, B::Weight> {
        let end = if layer < self.layers.len() { self.table.start_of(layer + 1) } else { self.weights.len() };
        self.weights[self.table.start_of(layer)..end].iter()
    }

    fn layer_ctx<'a>(&'a self, layer: usize, inputs: &'a Inputs<B>, end: PassEnd) -> LayerCtx<'a, B> {
        LayerCtx {
            b: &*self.backend,
            weights: &self.weights,
            config: &self.config,
            layer,
            seqs: &inputs.seqs,
            rows: self.pruned_rows(layer, inputs, end),
            intervention: self.intervention(layer),
            given: None,
        }
    }

    /// The rows that carry loss, if this layer computes only those behind attention.
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
}

/// The layer's output `[N, D]`, if the extent reaches it, and the activations that the backward reads.
fn layer_forward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    layer: &Layer,
    x_TD: &B::Tensor,
    extent: Extent,
    observer: Option<Observer<'_, B>>,
) -> (Option<B::Tensor>, LayerKept<B>) {
    let (h_ND, normed_ND, attention) = attention::forward(ctx, &layer.attention, x_TD, None, layer.feed_forward.norm());
    let (y_ND, feed_forward) = feed_forward::forward(ctx, &layer.feed_forward, &h_ND, &normed_ND, extent, observer);
    (y_ND, LayerKept { attention, h_ND, feed_forward })
}

/// The gradient of the layer's input, `[T, D]`; `None` if no parameter below is in the plan, or if it is zero.
fn layer_backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    layer: &Layer,
    grads: LayerGrads<'_, B::Tensor>,
    saved: LayerSaved<B>,
    sinks: &mut Sinks<'_, B>,
) -> Option<B::Tensor> {
    if grads.is_zero() {
        return None;
    }
    let LayerSaved { x_TD, kept } = saved;
    let LayerKept { attention, h_ND, feed_forward } = kept.unwrap_or_else(|| {
        let extent = if grads.dy.is_none() { Extent::Router } else { Extent::Recompute };
        layer_forward(ctx, layer, &x_TD, extent, None).1
    });
    let dh_ND = feed_forward::backward(ctx, &layer.feed_forward, grads, &h_ND, feed_forward, sinks)?;
    drop(h_ND);
    attention::backward(ctx, &layer.attention, dh_ND, &x_TD, &attention, sinks)
}
