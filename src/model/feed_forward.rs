//! The feed-forward part of a layer: a dense SwiGLU, or routed experts with an optional shared one.

use super::config::{LayerKind, ModelConfig};
use super::ids::{ParamId, ParamKind, Proj};
use super::table::ParamTable;
use super::transformer::{Model, RouterGrad, Sinks};
use crate::backend::{Backend, ExpertGrad};

/// Gate, up and down of one SwiGLU.
#[derive(Debug, Clone, Copy)]
struct Swiglu {
    gate: ParamId,
    up: ParamId,
    down: ParamId,
}

/// Parameters of the feed-forward part.
#[derive(Debug, Clone)]
pub(super) struct FeedForwardParams {
    norm: ParamId,
    block: Block,
}

#[derive(Debug, Clone)]
enum Block {
    Dense(Swiglu),
    Moe(MoeParams),
}

#[derive(Debug, Clone)]
struct MoeParams {
    layer: usize,
    router: ParamId,
    experts: Vec<Swiglu>,
    shared: Option<(Swiglu, ParamId)>,
}

/// What the backward reads, beside the layer's hidden state.
pub(super) enum FeedForwardSaved<B: Backend> {
    Dense(B::Tensor),
    Moe(MoeSaved<B>),
}

pub(super) struct MoeSaved<B: Backend> {
    logits: B::Tensor,
    /// Absent where the pass ended at this layer's router.
    experts: Option<ExpertsSaved<B>>,
}

struct ExpertsSaved<B: Backend> {
    routing: B::Routing,
    dispatch: B::Dispatch,
    gate_up: B::Tensor,
    shared: Option<SharedSaved<B>>,
}

struct SharedSaved<B: Backend> {
    gate_up: B::Tensor,
    gate: B::Tensor,
    out: B::Tensor,
}

/// How much of the block a forward computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extent {
    /// Everything.
    Whole,
    /// What a backward reads: not the outputs of the down projections.
    Recompute,
    /// The router's logits alone.
    Router,
}

/// What an observer sees of one routing layer.
pub struct Routed<'a, B: Backend> {
    /// Decoder layer.
    pub layer: usize,
    /// The router's logits, `[rows, E]`.
    pub logits: &'a B::Tensor,
    /// Chosen experts and weights.
    pub routing: &'a B::Routing,
    /// Rows sorted by expert.
    pub dispatch: &'a B::Dispatch,
}

/// Sees every routing layer that a forward pass visits.
pub type Observer<'a, B> = &'a mut dyn FnMut(Routed<'_, B>);

impl Swiglu {
    fn find(table: &ParamTable, kind: impl Fn(Proj) -> ParamKind) -> Self {
        let must = |proj| table.id(kind(proj)).expect("the table was checked against the family");
        Self { gate: must(Proj::Gate), up: must(Proj::Up), down: must(Proj::Down) }
    }
}

impl FeedForwardParams {
    pub(super) fn find(table: &ParamTable, layer: usize, config: &ModelConfig) -> Self {
        let must = |kind| table.id(kind).expect("the table was checked against the family");
        let block = match config.layers[layer] {
            LayerKind::Dense(_) => Block::Dense(Swiglu::find(table, |p| ParamKind::Dense(layer, p))),
            LayerKind::Moe => Block::Moe(MoeParams {
                layer,
                router: must(ParamKind::Router(layer)),
                experts: (0..config.num_experts)
                    .map(|e| Swiglu::find(table, |p| ParamKind::Expert(layer, e, p)))
                    .collect(),
                shared: table
                    .id(ParamKind::SharedGate(layer))
                    .map(|gate| (Swiglu::find(table, |p| ParamKind::Shared(layer, p)), gate)),
            }),
        };
        Self { norm: must(ParamKind::PostNorm(layer)), block }
    }
}

impl<B: Backend> Model<B> {
    /// h + block(norm(h)); `None` instead of the sum for an extent that does not reach it.
    pub(super) fn feed_forward(
        &self,
        p: &FeedForwardParams,
        h: &B::Tensor,
        extent: Extent,
        observer: Option<Observer<'_, B>>,
    ) -> (Option<B::Tensor>, FeedForwardSaved<B>) {
        let b = &*self.backend;
        let x = b.rms_norm(h, self.weight(p.norm), self.config.rms_norm_eps);
        match &p.block {
            Block::Dense(dense) => {
                let gate_up = self.dense_gate_up(dense, &x);
                let y = (extent == Extent::Whole).then(|| {
                    let mut y = b.linear(&b.swiglu(&gate_up), self.weight(dense.down), None);
                    b.add_assign(&mut y, h);
                    y
                });
                (y, FeedForwardSaved::Dense(gate_up))
            }
            Block::Moe(moe) => {
                let (y, saved) = self.moe_forward(moe, &x, h, extent, observer);
                (y, FeedForwardSaved::Moe(saved))
            }
        }
    }

    fn moe_forward(
        &self,
        p: &MoeParams,
        x: &B::Tensor,
        h: &B::Tensor,
        extent: Extent,
        observer: Option<Observer<'_, B>>,
    ) -> (Option<B::Tensor>, MoeSaved<B>) {
        let b = &*self.backend;
        let logits = b.router_logits(x, self.weight(p.router));
        if extent == Extent::Router && observer.is_none() {
            return (None, MoeSaved { logits, experts: None });
        }
        let routing = b.route(&logits, self.config.num_experts_per_tok, self.config.renormalize);
        let dispatch = b.dispatch(&routing, self.config.num_experts);
        if let Some(observe) = observer {
            observe(Routed { layer: p.layer, logits: &logits, routing: &routing, dispatch: &dispatch });
        }
        if extent == Extent::Router {
            return (None, MoeSaved { logits, experts: None });
        }
        let gate_up = b.grouped_linear(&b.dispatch_rows(x, &dispatch), &self.gate_up_stacks(p), &dispatch);
        let shared = p.shared.map(|(shared, gate)| {
            let gate_up = self.dense_gate_up(&shared, x);
            let out = b.linear(&b.swiglu(&gate_up), self.weight(shared.down), None);
            SharedSaved { gate_up, gate: b.linear(x, self.weight(gate), None), out }
        });
        let y = (extent == Extent::Whole).then(|| {
            let hidden = b.weight_rows(&b.swiglu(&gate_up), &routing, &dispatch);
            let mut y = b.combine_rows(&b.grouped_linear(&hidden, &self.down_stacks(p), &dispatch), &dispatch);
            if let Some(s) = &shared {
                b.add_assign(&mut y, &b.sigmoid_gate(&s.out, &s.gate));
            }
            b.add_assign(&mut y, h);
            y
        });
        (y, MoeSaved { logits, experts: Some(ExpertsSaved { routing, dispatch, gate_up, shared }) })
    }

    /// The gradient of h, from that of the sum (`None`: zero). Returns `None` where the plan needs none below, or where
    /// it is zero.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn feed_forward_backward(
        &self,
        p: &FeedForwardParams,
        dy: Option<B::Tensor>,
        h: &B::Tensor,
        saved: &FeedForwardSaved<B>,
        router_grad: Option<&RouterGrad>,
        want_dh: bool,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<B::Tensor> {
        let b = &*self.backend;
        let want_dx = want_dh || sinks.plan.slot(p.norm).is_some();
        if dy.is_none() && router_grad.is_none() {
            return None;
        }
        let x = b.rms_norm(h, self.weight(p.norm), self.config.rms_norm_eps);
        let dx = match (&p.block, saved) {
            (Block::Dense(dense), FeedForwardSaved::Dense(gate_up)) => {
                self.dense_backward(dense, dy.as_ref()?, &x, gate_up, want_dx, sinks)
            }
            (Block::Moe(moe), FeedForwardSaved::Moe(saved)) => {
                self.moe_backward(moe, dy.as_ref(), &x, saved, router_grad, want_dx, sinks)
            }
            _ => unreachable!("a block is saved as what it is"),
        }?;
        let dh = b.rms_norm_backward(&dx, h, self.weight(p.norm), self.config.rms_norm_eps, sinks.slot(p.norm));
        if !want_dh {
            return None;
        }
        Some(match dy {
            Some(mut dy) => {
                b.add_assign(&mut dy, &dh);
                dy
            }
            None => dh,
        })
    }

    #[allow(clippy::too_many_arguments)]
    fn moe_backward(
        &self,
        p: &MoeParams,
        dy: Option<&B::Tensor>,
        x: &B::Tensor,
        saved: &MoeSaved<B>,
        router_grad: Option<&RouterGrad>,
        want_dx: bool,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<B::Tensor> {
        let b = &*self.backend;
        let wants = sinks.plan.layer(p.layer);
        let mut dx = None;
        let mut dlogits = None;
        if let Some((dy, experts)) = dy.zip(saved.experts.as_ref()) {
            let want_router = want_dx || sinks.plan.slot(p.router).is_some();
            if wants.experts || want_router {
                let (d, l) = self.experts_backward(p, dy, x, experts, want_dx, want_router, sinks);
                (dx, dlogits) = (d, l);
            }
            if let Some(((shared, gate), saved)) = p.shared.zip(experts.shared.as_ref()) {
                let d = self.shared_backward(&shared, gate, dy, x, saved, want_dx, sinks);
                add_some(b, &mut dx, d);
            }
        }
        if let Some(grad) = router_grad {
            let d = dlogits.get_or_insert_with(|| b.zeros_like(&saved.logits));
            grad.add_to(b, &saved.logits, d);
        }
        if let Some(dlogits) = dlogits {
            if let Some((dw, offset)) = sinks.slot(p.router) {
                b.linear_backward_weight(&dlogits, x, dw, offset);
            }
            if want_dx {
                add_some(b, &mut dx, Some(b.linear_backward_input(&dlogits, self.weight(p.router))));
            }
        }
        dx
    }

    /// (dx, dlogits) through the routed experts, each where wanted.
    #[allow(clippy::too_many_arguments)]
    fn experts_backward(
        &self,
        p: &MoeParams,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: &ExpertsSaved<B>,
        want_dx: bool,
        want_router: bool,
        sinks: &mut Sinks<'_, B>,
    ) -> (Option<B::Tensor>, Option<B::Tensor>) {
        let b = &*self.backend;
        let ExpertsSaved { routing, dispatch, gate_up, .. } = saved;
        let scoring = sinks.plan.layer(p.layer).experts;
        let (gate_up_stacks, down_stacks) = (self.gate_up_stacks(p), self.down_stacks(p));

        let hidden = b.swiglu(gate_up);
        let dy_rows = b.dispatch_rows(dy, dispatch);
        if scoring {
            let plan: Vec<_> =
                p.experts.iter().enumerate().map(|(e, s)| sinks.plan.expert(p.layer, e, &[s.down])).collect();
            let weighted = b.weight_rows(&hidden, routing, dispatch);
            b.grouped_linear_backward_weight(
                &dy_rows,
                &weighted,
                &down_stacks,
                dispatch,
                &plan,
                sinks.grads,
                sinks.scores,
            );
        }
        let d_weighted = b.grouped_linear_backward_input(&dy_rows, &down_stacks, dispatch);
        drop(dy_rows);
        let (d_hidden, d_weights) = b.weight_rows_backward(&d_weighted, &hidden, routing, dispatch);
        drop((d_weighted, hidden));
        let dlogits = want_router.then(|| b.route_backward(&d_weights, routing));
        if !scoring && !want_dx {
            return (None, dlogits);
        }
        let d_gate_up = b.swiglu_backward(&d_hidden, gate_up);
        drop(d_hidden);
        if scoring {
            let plan: Vec<_> =
                p.experts.iter().enumerate().map(|(e, s)| sinks.plan.expert(p.layer, e, &[s.gate, s.up])).collect();
            b.grouped_linear_backward_weight(
                &d_gate_up,
                &b.dispatch_rows(x, dispatch),
                &gate_up_stacks,
                dispatch,
                &plan,
                sinks.grads,
                sinks.scores,
            );
        }
        let dx = want_dx
            .then(|| b.combine_rows(&b.grouped_linear_backward_input(&d_gate_up, &gate_up_stacks, dispatch), dispatch));
        (dx, dlogits)
    }

    #[allow(clippy::too_many_arguments)]
    fn shared_backward(
        &self,
        p: &Swiglu,
        gate: ParamId,
        dy: &B::Tensor,
        x: &B::Tensor,
        saved: &SharedSaved<B>,
        want_dx: bool,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<B::Tensor> {
        let b = &*self.backend;
        let trained = [p.gate, p.up, p.down, gate].into_iter().any(|id| sinks.plan.slot(id).is_some());
        if !want_dx && !trained {
            return None;
        }
        let (d_out, d_gate) = b.sigmoid_gate_backward(dy, &saved.out, &saved.gate);
        if let Some((dw, offset)) = sinks.slot(gate) {
            b.linear_backward_weight(&d_gate, x, dw, offset);
        }
        let mut dx = self.dense_backward(p, &d_out, x, &saved.gate_up, want_dx, sinks);
        if want_dx {
            add_some(b, &mut dx, Some(b.linear_backward_input(&d_gate, self.weight(gate))));
        }
        dx
    }

    /// `[n, 2F]`: gate and up side by side.
    fn dense_gate_up(&self, p: &Swiglu, x: &B::Tensor) -> B::Tensor {
        let b = &*self.backend;
        b.grouped_linear(x, &[vec![self.weight(p.gate), self.weight(p.up)]], &b.single_expert_dispatch(b.shape(x).0))
    }

    fn dense_backward(
        &self,
        p: &Swiglu,
        dy: &B::Tensor,
        x: &B::Tensor,
        gate_up: &B::Tensor,
        want_dx: bool,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<B::Tensor> {
        let b = &*self.backend;
        if let Some((dw, offset)) = sinks.slot(p.down) {
            b.linear_backward_weight(dy, &b.swiglu(gate_up), dw, offset);
        }
        let plan = [sinks.plan.accumulate(&[p.gate, p.up])];
        if !want_dx && plan[0] == ExpertGrad::Skip {
            return None;
        }
        let d_hidden = b.linear_backward_input(dy, self.weight(p.down));
        let d_gate_up = b.swiglu_backward(&d_hidden, gate_up);
        let stacks = [vec![self.weight(p.gate), self.weight(p.up)]];
        let group = b.single_expert_dispatch(b.shape(x).0);
        if plan[0] != ExpertGrad::Skip {
            b.grouped_linear_backward_weight(&d_gate_up, x, &stacks, &group, &plan, sinks.grads, sinks.scores);
        }
        want_dx.then(|| b.grouped_linear_backward_input(&d_gate_up, &stacks, &group))
    }

    fn gate_up_stacks(&self, p: &MoeParams) -> Vec<Vec<&B::Weight>> {
        p.experts.iter().map(|e| vec![self.weight(e.gate), self.weight(e.up)]).collect()
    }

    fn down_stacks(&self, p: &MoeParams) -> Vec<Vec<&B::Weight>> {
        p.experts.iter().map(|e| vec![self.weight(e.down)]).collect()
    }
}

fn add_some<B: Backend>(b: &B, sum: &mut Option<B::Tensor>, term: Option<B::Tensor>) {
    match (sum.as_mut(), term) {
        (Some(sum), Some(term)) => b.add_assign(sum, &term),
        (None, term) => *sum = term,
        (Some(_), None) => {}
    }
}
