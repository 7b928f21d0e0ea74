//! SwiGLU, y = (silu(x · gateᵀ) ⊙ (x · upᵀ)) · downᵀ, of a dense layer or a shared expert; and the parameters of one routed
//! expert. Shape suffixes: see [`super::layer`].

use super::ids::{ParamId, ParamKind, Proj};
use super::layer::{LayerCtx, Sinks};
use super::table::ParamTable;
use crate::backend::{Backend, ExpertGrad};

/// Gate, up and down of one SwiGLU.
#[derive(Debug, Clone, Copy)]
pub(super) struct Swiglu {
    pub(super) gate: ParamId,
    pub(super) up: ParamId,
    pub(super) down: ParamId,
}

impl Swiglu {
    pub(super) fn find(table: &ParamTable, kind: impl Fn(Proj) -> ParamKind) -> Self {
        let id = |proj| table.expect_id(kind(proj));
        Self { gate: id(Proj::Gate), up: id(Proj::Up), down: id(Proj::Down) }
    }

    /// Whether the plan trains any of the three matrices.
    pub(super) fn is_trained<B: Backend>(&self, sinks: &Sinks<'_, B>) -> bool {
        [self.gate, self.up, self.down].into_iter().any(|id| sinks.plan.slot(id).is_some())
    }

    /// Gate and up stacked, `[2F, D]`.
    pub(super) fn gate_up_stack<'a, B: Backend>(&self, ctx: &LayerCtx<'a, B>) -> Vec<&'a B::Weight> {
        vec![ctx.weight(self.gate), ctx.weight(self.up)]
    }

    /// Down alone, `[D, F]`.
    pub(super) fn down_stack<'a, B: Backend>(&self, ctx: &LayerCtx<'a, B>) -> Vec<&'a B::Weight> {
        vec![ctx.weight(self.down)]
    }
}

/// Gate and up side by side, before the activation: `[T, 2F]`.
pub(super) fn gate_up<B: Backend>(ctx: &LayerCtx<'_, B>, p: &Swiglu, x_TD: &B::Tensor) -> B::Tensor {
    let b = ctx.b;
    b.grouped_linear(x_TD, &[p.gate_up_stack(ctx)], &b.single_expert_dispatch(b.shape(x_TD).0))
}

/// The output of the block from [`gate_up`]'s result: `[T, D]`.
pub(super) fn down<B: Backend>(ctx: &LayerCtx<'_, B>, p: &Swiglu, gate_up_T2F: &B::Tensor) -> B::Tensor {
    ctx.b.linear(&ctx.b.swiglu(gate_up_T2F), ctx.weight(p.down), None)
}

/// dx `[T, D]` of [`gate_up`] and [`down`] together, if `want_dx`.
pub(super) fn backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &Swiglu,
    dy_TD: &B::Tensor,
    x_TD: &B::Tensor,
    gate_up_T2F: &B::Tensor,
    want_dx: bool,
    sinks: &mut Sinks<'_, B>,
) -> Option<B::Tensor> {
    let b = ctx.b;
    if let Some((dw, offset)) = sinks.slot(p.down) {
        b.linear_backward_weight(dy_TD, &b.swiglu(gate_up_T2F), dw, offset);
    }
    let plan = [sinks.plan.accumulate(&[p.gate, p.up])];
    if !want_dx && plan[0] == ExpertGrad::Skip {
        return None;
    }
    let d_hidden_TF = b.linear_backward_input(dy_TD, ctx.weight(p.down));
    let d_gate_up_T2F = b.swiglu_backward(&d_hidden_TF, gate_up_T2F);
    let stacks = [p.gate_up_stack(ctx)];
    let group = b.single_expert_dispatch(b.shape(x_TD).0);
    if plan[0] != ExpertGrad::Skip {
        b.grouped_linear_backward_weight(&d_gate_up_T2F, x_TD, &stacks, &group, &plan, sinks.grads, sinks.scores);
    }
    want_dx.then(|| b.grouped_linear_backward_input(&d_gate_up_T2F, &stacks, &group))
}
