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

    /// The norm of the hidden state h.
    pub(super) fn norm(&self) -> ParamId {
        self.norm
    }
}

/// y = h + block(x), `[N, D]`, where x = norm(h); `None` for an extent that does not reach it.
pub(super) fn forward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &FeedForwardParams,
    h_ND: &B::Tensor,
    x_ND: &B::Tensor,
    extent: Extent,
    observer: Option<Observer<'_, B>>,
) -> (Option<B::Tensor>, FeedForwardSaved<B>) {
    match &p.block {
        Block::Dense(dense) => {
            let gate_up_N2F = swiglu::gate_up(ctx, dense, x_ND);
            let y_ND = (extent == Extent::Whole).then(|| {
                let mut y_ND = swiglu::down(ctx, dense, &gate_up_N2F);
                ctx.b.add_assign(&mut y_ND, h_ND);
                y_ND
            });
            (y_ND, FeedForwardSaved::Dense(gate_up_N2F))
        }
        Block::Moe(moe) => {
            let (y_ND, saved) = moe::forward(ctx, moe, x_ND, h_ND, extent, observer);
            (y_ND, FeedForwardSaved::Moe(saved))
        }
    }
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
    match grads.dy {
        // The gradient of the residual is dy itself.
        Some(mut dy_ND) if want_dh => {
            ctx.add_rms_norm_backward(&dx_ND, h_ND, p.norm, sinks, &mut dy_ND);
            Some(dy_ND)
        }
        _ => {
            let dh_ND = ctx.rms_norm_backward(&dx_ND, h_ND, p.norm, sinks);
            want_dh.then_some(dh_ND)
        }
    }
}
