//! The feed-forward part of a layer, h + block(norm(h)), where the block is a dense SwiGLU or an MoE block.
//! Shape suffixes: see [`super::layer`].

use std::sync::Arc;

use super::config::{LayerKind, ModelConfig};
use super::ids::{ParamId, ParamKind};
use super::layer::{Extent, LayerCtx, LayerGrads, Observer, Sinks};
use super::moe::{self, MoeParams, MoeSaved};
use super::swiglu::{self, Swiglu};
use super::table::ParamTable;
use crate::backend::Backend;

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

/// Activations for the backward, besides the hidden state h.
pub(super) enum FeedForwardSaved<B: Backend> {
    /// Gate and up before the activation, `[N, 2F]`.
    Dense(B::Tensor),
    Moe(MoeSaved<B>),
}

impl<B: Backend> FeedForwardSaved<B> {
    /// The routing of an MoE block whose experts were computed.
    pub(super) fn routing(&self) -> Option<Arc<B::Routing>> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(saved) => saved.routing(),
        }
    }
}

impl FeedForwardParams {
    pub(super) fn find(table: &ParamTable, layer: usize, config: &ModelConfig) -> Self {
        let block = match config.layers[layer] {
            LayerKind::Dense(_) => Block::Dense(Swiglu::find(table, |p| ParamKind::Dense(layer, p))),
            LayerKind::Moe => Block::Moe(MoeParams::find(table, layer, config)),
        };
        Self { norm: table.expect_id(ParamKind::PostNorm(layer)), block }
    }
}

/// y = h + block(norm(h)), `[N, D]`; `None` for an extent that does not reach it.
pub(super) fn forward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &FeedForwardParams,
    h_ND: &B::Tensor,
    extent: Extent,
    observer: Option<Observer<'_, B>>,
) -> (Option<B::Tensor>, FeedForwardSaved<B>) {
    let x_ND = ctx.rms_norm(h_ND, p.norm);
    let (mut y_ND, saved) = match &p.block {
        Block::Dense(dense) => {
            let gate_up_N2F = swiglu::gate_up(ctx, dense, &x_ND);
            let y_ND = (extent == Extent::Whole).then(|| swiglu::down(ctx, dense, &gate_up_N2F));
            (y_ND, FeedForwardSaved::Dense(gate_up_N2F))
        }
        Block::Moe(moe) => {
            let (y_ND, saved) = moe::forward(ctx, moe, &x_ND, extent, observer);
            (y_ND, FeedForwardSaved::Moe(saved))
        }
    };
    if let Some(y_ND) = &mut y_ND {
        ctx.b.add_assign(y_ND, h_ND);
    }
    (y_ND, saved)
}

/// dh `[N, D]` of [`forward`]; `None` if the plan needs no gradient in attention or below, or if dh is zero.
pub(super) fn backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &FeedForwardParams,
    grads: LayerGrads<'_, B::Tensor>,
    h_ND: &B::Tensor,
    saved: FeedForwardSaved<B>,
    sinks: &mut Sinks<'_, B>,
) -> Option<B::Tensor> {
    if grads.is_zero() {
        return None;
    }
    let want_dh = sinks.plan.layer(ctx.layer).hidden();
    let want_dx = want_dh || sinks.plan.slot(p.norm).is_some();
    let x_ND = ctx.rms_norm(h_ND, p.norm);
    let dx_ND = match (&p.block, saved) {
        (Block::Dense(dense), FeedForwardSaved::Dense(gate_up_N2F)) => {
            swiglu::backward(ctx, dense, grads.dy.as_ref()?, &x_ND, &gate_up_N2F, want_dx, sinks)
        }
        (Block::Moe(moe), FeedForwardSaved::Moe(saved)) => {
            moe::backward(ctx, moe, grads.borrowed(), &x_ND, saved, want_dx, sinks)
        }
        _ => unreachable!("a dense block saves Dense, an MoE block Moe"),
    }?;
    let dh_ND = ctx.rms_norm_backward(&dx_ND, h_ND, p.norm, sinks);
    if !want_dh {
        return None;
    }
    Some(match grads.dy {
        Some(mut dy_ND) => {
            // The gradient of the residual is dy itself.
            ctx.b.add_assign(&mut dy_ND, &dh_ND);
            dy_ND
        }
        None => dh_ND,
    })
}
