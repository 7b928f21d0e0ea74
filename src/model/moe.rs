//! The MoE block: router, routed experts, and an optional shared expert that processes every token.
//! Shape suffixes: see [`super::layer`]; T is the number of rows of the block (N there).

use std::sync::Arc;

use super::config::ModelConfig;
use super::ids::{ParamId, ParamKind};
use super::layer::{Extent, LayerCtx, LayerGrads, Observer, Routed, Sinks};
use super::swiglu::{self, Swiglu};
use super::table::ParamTable;
use crate::backend::Backend;

#[derive(Debug, Clone)]
pub(super) struct MoeParams {
    router: ParamId,
    experts: Vec<Swiglu>,
    shared: Option<SharedExpert>,
}

/// The shared expert and its gate `[1, D]`: sigmoid(x · gateᵀ) scales its output.
#[derive(Debug, Clone, Copy)]
struct SharedExpert {
    swiglu: Swiglu,
    gate: ParamId,
}

/// Activations for the backward, besides the input.
pub(super) struct MoeSaved<B: Backend> {
    logits_TE: B::Tensor,
    /// Absent where the pass ended at this layer's router.
    experts: Option<ExpertsSaved<B>>,
}

struct ExpertsSaved<B: Backend> {
    routing: Arc<B::Routing>,
    dispatch: B::Dispatch,
    gate_up_R2F: B::Tensor,
    shared: Option<SharedSaved<B>>,
}

struct SharedSaved<B: Backend> {
    gate_up_T2F: B::Tensor,
    gate_T1: B::Tensor,
    out_TD: B::Tensor,
}

impl<B: Backend> MoeSaved<B> {
    /// The routing by which the experts were computed, if they were.
    pub(super) fn routing(&self) -> Option<Arc<B::Routing>> {
        self.experts.as_ref().map(|experts| experts.routing.clone())
    }
}

impl MoeParams {
    pub(super) fn find(table: &ParamTable, layer: usize, config: &ModelConfig) -> Self {
        let expert = |e| Swiglu::find(table, |p| ParamKind::Expert(layer, e, p));
        let shared = |gate| SharedExpert { swiglu: Swiglu::find(table, |p| ParamKind::Shared(layer, p)), gate };
        Self {
            router: table.expect_id(ParamKind::Router(layer)),
            experts: (0..config.num_experts).map(expert).collect(),
            shared: table.id(ParamKind::SharedGate(layer)).map(shared),
        }
    }

    fn gate_up_stacks<'a, B: Backend>(&self, ctx: &LayerCtx<'a, B>) -> Vec<Vec<&'a B::Weight>> {
        self.experts.iter().map(|expert| expert.gate_up_stack(ctx)).collect()
    }

    fn down_stacks<'a, B: Backend>(&self, ctx: &LayerCtx<'a, B>) -> Vec<Vec<&'a B::Weight>> {
        self.experts.iter().map(|expert| expert.down_stack(ctx)).collect()
    }
}

/// y = h + block(x), `[T, D]`; `None` for an extent that does not reach it.
pub(super) fn forward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &MoeParams,
    x_TD: &B::Tensor,
    h_TD: &B::Tensor,
    extent: Extent,
    observer: Option<Observer<'_, B>>,
) -> (Option<B::Tensor>, MoeSaved<B>) {
    let b = ctx.b;
    let mut logits_TE = b.router_logits(x_TD, ctx.weight(p.router));
    if let Some(intervention) = ctx.intervention {
        intervention.change_logits(b, &mut logits_TE);
    }
    if extent == Extent::Router && observer.is_none() {
        return (None, MoeSaved { logits_TE, experts: None });
    }
    let routing = ctx.given.clone().unwrap_or_else(|| {
        let mut routing = b.route(&logits_TE, ctx.config.num_experts_per_tok, ctx.config.renormalize);
        if let Some(intervention) = ctx.intervention {
            intervention.change_routing(b, &mut routing);
        }
        Arc::new(routing)
    });
    let dispatch = b.dispatch(&routing, ctx.config.num_experts);
    if let Some(observe) = observer {
        observe(Routed { layer: ctx.layer, logits: &logits_TE, routing: &routing, dispatch: &dispatch });
    }
    if extent == Extent::Router {
        return (None, MoeSaved { logits_TE, experts: None });
    }
    let gate_up_R2F = b.grouped_linear(&b.dispatch_rows(x_TD, &dispatch), &p.gate_up_stacks(ctx), &dispatch);
    let shared = p.shared.map(|shared| {
        let gate_up_T2F = swiglu::gate_up(ctx, &shared.swiglu, x_TD);
        let out_TD = swiglu::down(ctx, &shared.swiglu, &gate_up_T2F);
        SharedSaved { gate_up_T2F, gate_T1: b.linear(x_TD, ctx.weight(shared.gate), None), out_TD }
    });
    let y_TD = (extent == Extent::Whole).then(|| {
        let hidden_RF = b.weighted_swiglu(&gate_up_R2F, &routing, &dispatch);
        let out_RD = b.grouped_linear(&hidden_RF, &p.down_stacks(ctx), &dispatch);
        b.combine_rows_onto(&out_RD, &dispatch, shared.as_ref().map(|s| (&s.out_TD, &s.gate_T1)), h_TD)
    });
    (y_TD, MoeSaved { logits_TE, experts: Some(ExpertsSaved { routing, dispatch, gate_up_R2F, shared }) })
}

/// dx `[T, D]`; `None` if not `want_dx`, or if it is zero.
pub(super) fn backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &MoeParams,
    grads: LayerGrads<'_, &B::Tensor>,
    x_TD: &B::Tensor,
    saved: MoeSaved<B>,
    want_dx: bool,
    sinks: &mut Sinks<'_, B>,
) -> Option<B::Tensor> {
    let b = ctx.b;
    let mut dx_TD = None;
    let mut dlogits_TE = None;
    if let Some((dy_TD, mut experts)) = grads.dy.zip(saved.experts) {
        let shared = experts.shared.take();
        (dx_TD, dlogits_TE) = experts_backward(ctx, p, dy_TD, x_TD, experts, want_dx, sinks);
        if let Some((shared, saved)) = p.shared.zip(shared) {
            let d = shared_backward(ctx, shared, dy_TD, x_TD, &saved, want_dx, sinks);
            add_some(b, &mut dx_TD, d);
        }
    }
    if let Some(grad) = grads.router {
        let dlogits_TE = dlogits_TE.get_or_insert_with(|| b.zeros_like(&saved.logits_TE));
        grad.add_to(b, &saved.logits_TE, dlogits_TE);
    }
    if let Some(dlogits_TE) = dlogits_TE {
        ctx.weight_grad(p.router, &dlogits_TE, x_TD, sinks);
        if want_dx {
            add_input_gradient(ctx, p.router, &dlogits_TE, &mut dx_TD);
        }
    }
    dx_TD
}

/// (dx `[T, D]`, dlogits `[T, E]`) through the routed experts: dx if `want_dx`, dlogits if `want_dx` or the plan trains the
/// router.
fn experts_backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &MoeParams,
    dy_TD: &B::Tensor,
    x_TD: &B::Tensor,
    saved: ExpertsSaved<B>,
    want_dx: bool,
    sinks: &mut Sinks<'_, B>,
) -> (Option<B::Tensor>, Option<B::Tensor>) {
    let b = ctx.b;
    let want_dw = sinks.plan.layer(ctx.layer).experts;
    let want_router = want_dx || sinks.plan.slot(p.router).is_some();
    if !want_dw && !want_router {
        return (None, None);
    }
    let ExpertsSaved { routing, dispatch, gate_up_R2F, .. } = saved;
    let (gate_up_stacks, down_stacks) = (p.gate_up_stacks(ctx), p.down_stacks(ctx));

    let dy_RD = b.dispatch_rows(dy_TD, &dispatch);
    if want_dw {
        let plan: Vec<_> =
            p.experts.iter().enumerate().map(|(e, s)| sinks.plan.expert(ctx.layer, e, &[s.down])).collect();
        let hidden_RF = b.weighted_swiglu(&gate_up_R2F, &routing, &dispatch);
        b.grouped_linear_backward_weight(&dy_RD, &hidden_RF, &down_stacks, &dispatch, &plan, sinks.grads, sinks.scores);
    }
    let d_hidden_RF = b.grouped_linear_backward_input(&dy_RD, &down_stacks, &dispatch);
    drop(dy_RD);
    let (d_gate_up_R2F, d_weights_TK) = b.weighted_swiglu_backward(d_hidden_RF, &gate_up_R2F, &routing, &dispatch);
    drop(gate_up_R2F);
    let dlogits_TE = want_router.then(|| b.route_backward(&d_weights_TK, &routing));
    if !want_dw && !want_dx {
        return (None, dlogits_TE);
    }
    if want_dw {
        let plan: Vec<_> =
            p.experts.iter().enumerate().map(|(e, s)| sinks.plan.expert(ctx.layer, e, &[s.gate, s.up])).collect();
        b.grouped_linear_backward_weight(
            &d_gate_up_R2F,
            &b.dispatch_rows(x_TD, &dispatch),
            &gate_up_stacks,
            &dispatch,
            &plan,
            sinks.grads,
            sinks.scores,
        );
    }
    let dx_TD = want_dx.then(|| {
        let dx_RD = b.grouped_linear_backward_input(&d_gate_up_R2F, &gate_up_stacks, &dispatch);
        b.combine_rows(&dx_RD, &dispatch)
    });
    (dx_TD, dlogits_TE)
}

/// dx `[T, D]` through the shared expert and its gate, if `want_dx`.
fn shared_backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: SharedExpert,
    dy_TD: &B::Tensor,
    x_TD: &B::Tensor,
    saved: &SharedSaved<B>,
    want_dx: bool,
    sinks: &mut Sinks<'_, B>,
) -> Option<B::Tensor> {
    let b = ctx.b;
    if !want_dx && !p.swiglu.is_trained(sinks) && sinks.plan.slot(p.gate).is_none() {
        return None;
    }
    let (d_out_TD, d_gate_T1) = b.sigmoid_gate_backward(dy_TD, &saved.out_TD, &saved.gate_T1);
    ctx.weight_grad(p.gate, &d_gate_T1, x_TD, sinks);
    let mut dx_TD = swiglu::backward(ctx, &p.swiglu, &d_out_TD, x_TD, &saved.gate_up_T2F, want_dx, sinks);
    if want_dx {
        add_input_gradient(ctx, p.gate, &d_gate_T1, &mut dx_TD);
    }
    dx_TD
}

/// dx += dy · w, where `None` is zero.
fn add_input_gradient<B: Backend>(ctx: &LayerCtx<'_, B>, w: ParamId, dy: &B::Tensor, dx: &mut Option<B::Tensor>) {
    let (b, w) = (ctx.b, ctx.weight(w));
    match dx {
        Some(dx) => b.add_linear_backward_input(dy, w, dx),
        None => *dx = Some(b.linear_backward_input(dy, w)),
    }
}

/// sum += term, where `None` is zero.
fn add_some<B: Backend>(b: &B, sum: &mut Option<B::Tensor>, term: Option<B::Tensor>) {
    match (sum.as_mut(), term) {
        (Some(sum), Some(term)) => b.add_assign(sum, &term),
        (None, term) => *sum = term,
        (Some(_), None) => {}
    }
}
