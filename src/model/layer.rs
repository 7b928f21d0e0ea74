//! Types that the parts of a decoder layer share: context, extent of a forward, observers of routing, gradients and their
//! sinks.
//!
//! Shape suffixes in `attention`, `swiglu`, `moe`, `feed_forward` and `transformer` (`x_TD` is `[T, D]`):
//!
//! | letter | size |
//! |---|---|
//! | T | tokens of the micro-batch |
//! | N | rows of a layer's output: T, or in a pruned last layer only the rows that carry loss |
//! | D | model width |
//! | Q, C | width of all query heads, of all key/value heads |
//! | S | positions whose keys a sequence attends to: T, or with a key/value cache also earlier ones |
//! | F | width of a SwiGLU: an expert, a shared expert or a dense layer |
//! | E, K | experts, experts per token |
//! | R | routed rows sorted by expert: K for each row |
//! | V | vocabulary |

use std::ops::Range;
use std::sync::Arc;

use super::config::ModelConfig;
use super::ids::ParamId;
use super::intervention::LayerIntervention;
use super::plan::GradPlan;
use crate::backend::Backend;

/// The experts and routing weights of one layer, shared between two models; `None` in a layer that does not route.
pub(super) type LayerRouting<B> = Option<Arc<<B as Backend>::Routing>>;

/// The context of one layer in one pass: backend, parameters, configuration, sequences.
pub(super) struct LayerCtx<'a, B: Backend> {
    pub(super) b: &'a B,
    /// All parameters of the model, by [`ParamId`].
    pub(super) weights: &'a [B::Weight],
    pub(super) config: &'a ModelConfig,
    /// Number of the decoder layer.
    pub(super) layer: usize,
    pub(super) seqs: &'a B::Sequences,
    /// The rows that the layer computes behind attention, `[N]`; `None`: all.
    pub(super) rows: Option<&'a B::Indices>,
    /// A change of this layer's routing.
    pub(super) intervention: Option<&'a LayerIntervention<B>>,
    /// The routing of the layer's rows, where it is not the layer's router that decides it.
    pub(super) given: LayerRouting<B>,
}

impl<'a, B: Backend> LayerCtx<'a, B> {
    pub(super) fn weight(&self, id: ParamId) -> &'a B::Weight {
        &self.weights[id]
    }

    pub(super) fn rms_norm(&self, x: &B::Tensor, norm: ParamId) -> B::Tensor {
        self.b.rms_norm(x, self.weight(norm), self.config.rms_norm_eps)
    }

    /// x += y; returns the norm of the sum.
    pub(super) fn add_rms_norm(&self, x: &mut B::Tensor, y: &B::Tensor, norm: ParamId) -> B::Tensor {
        self.b.add_rms_norm(x, y, self.weight(norm), self.config.rms_norm_eps)
    }

    /// Returns dx, and adds dw to the sinks if the plan trains the norm.
    pub(super) fn rms_norm_backward(
        &self,
        dy: &B::Tensor,
        x: &B::Tensor,
        norm: ParamId,
        sinks: &mut Sinks<'_, B>,
    ) -> B::Tensor {
        self.b.rms_norm_backward(dy, x, self.weight(norm), self.config.rms_norm_eps, sinks.slot(norm))
    }

    /// dx += [`Self::rms_norm_backward`].
    pub(super) fn add_rms_norm_backward(
        &self,
        dy: &B::Tensor,
        x: &B::Tensor,
        norm: ParamId,
        sinks: &mut Sinks<'_, B>,
        dx: &mut B::Tensor,
    ) {
        self.b.add_rms_norm_backward(dy, x, self.weight(norm), self.config.rms_norm_eps, sinks.slot(norm), dx);
    }

    /// Adds the gradient of w in y = x · wᵀ to the sinks, if the plan trains w.
    pub(super) fn weight_grad(&self, w: ParamId, dy: &B::Tensor, x: &B::Tensor, sinks: &mut Sinks<'_, B>) {
        if let Some((dw, offset)) = sinks.slot(w) {
            self.b.linear_backward_weight(dy, x, dw, offset);
        }
    }
}

/// How much of a feed-forward part a forward computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Everything.
    Whole,
    /// All activations that a backward reads, which are all but the outputs of the down projections.
    Recompute,
    /// Only the router's logits.
    Router,
}

/// The routing of one MoE layer, for an observer.
pub struct Routed<'a, B: Backend> {
    /// Number of the decoder layer.
    pub layer: usize,
    /// The router's logits, `[N, E]`.
    pub logits: &'a B::Tensor,
    /// The chosen experts of each row and their weights.
    pub routing: &'a B::Routing,
    /// The routed rows, sorted by expert.
    pub dispatch: &'a B::Dispatch,
}

/// Called at every MoE layer that a forward pass reaches.
pub type Observer<'a, B> = &'a mut (dyn FnMut(Routed<'_, B>) + Send);

/// Called with the number of each decoder layer whose gradients are complete, and the gradient buffer.
pub type OnLayer<'a, B> = &'a mut (dyn FnMut(usize, &<B as Backend>::Buffer) + Send);

/// Where a backward pass accumulates gradients and scores.
pub struct Sinks<'a, B: Backend> {
    /// What to do with each parameter.
    pub plan: &'a GradPlan,
    /// `plan.len()` elements; accumulates.
    pub grads: &'a mut B::Buffer,
    /// `layers · experts` sums; accumulates.
    pub scores: &'a mut B::Scores,
    /// Called after each layer, so that its gradients can be sent while the layers below still compute. The head's
    /// gradients are complete before the first call.
    pub done: Option<OnLayer<'a, B>>,
}

impl<B: Backend> Sinks<'_, B> {
    /// Buffer and offset of a parameter's gradient, if the plan trains it.
    pub(super) fn slot(&mut self, id: ParamId) -> Option<(&mut B::Buffer, usize)> {
        self.plan.slot(id).map(|offset| (&mut *self.grads, offset))
    }
}

/// The gradients that reach a layer from above; `None`: zero.
pub(super) struct LayerGrads<'a, T> {
    /// Of the layer's output, `[N, D]`.
    pub(super) dy: Option<T>,
    /// Of the router's logits, by a loss on the layer's routing statistic.
    pub(super) router: Option<&'a RouterGrad>,
}

impl<T> LayerGrads<'_, T> {
    pub(super) fn is_zero(&self) -> bool {
        self.dy.is_none() && self.router.is_none()
    }

    pub(super) fn borrowed(&self) -> LayerGrads<'_, &T> {
        LayerGrads { dy: self.dy.as_ref(), router: self.router }
    }
}

/// The gradient of a loss on one layer's routing statistic with respect to sums over that layer's logits.
#[derive(Debug, Clone, PartialEq)]
pub enum RouterGrad {
    /// For row ranges, the gradient of Σ over their rows of softmax(logits), `[E]` each.
    SoftmaxSums(Vec<(Range<usize>, Vec<f32>)>),
    /// For row ranges, the gradient of Σ over their rows of the logits, `[ranges · E]`.
    SegmentSums(Vec<Range<usize>>, Vec<f32>),
    /// Of `scale` times Σ over all rows of KL(softmax(base) ‖ softmax(logits)), where `base` `[N, E]` are the logits of a base
    /// model.
    SoftmaxKl {
        /// Row-major.
        base: Arc<[f32]>,
        /// Factor of the sum in the loss.
        scale: f32,
    },
}

impl RouterGrad {
    /// dlogits += the gradient through the sums; both `[N, E]`.
    pub(super) fn add_to<B: Backend>(&self, b: &B, logits: &B::Tensor, dlogits: &mut B::Tensor) {
        match self {
            RouterGrad::SoftmaxSums(parts) => {
                for (rows, dy) in parts {
                    b.softmax_sum_backward(dy, logits, rows.clone(), dlogits);
                }
            }
            RouterGrad::SoftmaxKl { base, scale } => b.softmax_kl_backward(base, logits, *scale, dlogits),
            RouterGrad::SegmentSums(segments, dy) => b.segment_sum_backward(dy, segments, dlogits),
        }
    }
}
