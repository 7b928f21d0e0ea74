//! One attention block: norm, projections, norms of queries and keys, rotary embedding, attention, output projection,
//! residual. Shape suffixes: see [`super::layer`].

use super::ids::{ParamId, ParamKind};
use super::layer::{LayerCtx, Sinks};
use super::table::ParamTable;
use crate::backend::{Backend, Heads};

/// Parameters of one attention block.
#[derive(Debug, Clone)]
pub(super) struct AttentionParams {
    norm: ParamId,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    /// Norms of queries and keys.
    qk_norms: Option<(ParamId, ParamId)>,
    heads: Heads,
}

#[derive(Debug, Clone, Copy)]
struct Projection {
    weight: ParamId,
    bias: Option<ParamId>,
}

/// Activations for the backward of one attention block.
pub(super) struct AttentionSaved<B: Backend> {
    /// Queries and keys before their norms, in families with these norms.
    raw_qk: Option<(B::Tensor, B::Tensor)>,
    q_TQ: B::Tensor,
    k_TC: B::Tensor,
    v_TC: B::Tensor,
    o_TQ: B::Tensor,
    normaliser: B::Normaliser,
}

impl AttentionParams {
    pub(super) fn find(table: &ParamTable, layer: usize, heads: Heads) -> Self {
        use ParamKind::*;
        let projection = |weight, bias| Projection { weight: table.expect_id(weight), bias: table.id(bias) };
        Self {
            norm: table.expect_id(InputNorm(layer)),
            q: projection(Q(layer), QBias(layer)),
            k: projection(K(layer), KBias(layer)),
            v: projection(V(layer), VBias(layer)),
            o: projection(O(layer), OBias(layer)),
            qk_norms: table.id(QNorm(layer)).zip(table.id(KNorm(layer))),
            heads,
        }
    }
}

/// The keys and values of one layer in a key/value cache, `[S, C]` each, and the rows of this pass's tokens in it, `[T]`.
pub(super) struct CachedKeys<'a, B: Backend> {
    pub(super) keys: &'a mut B::Tensor,
    pub(super) values: &'a mut B::Tensor,
    pub(super) rows: &'a B::Indices,
}

/// h = x + attention(norm(x)), `[N, D]`, and norm(h) by `next`, the norm behind it. With a cache, writes this pass's keys and values
/// to it and attends to its rows.
pub(super) fn forward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &AttentionParams,
    x_TD: &B::Tensor,
    cache: Option<CachedKeys<'_, B>>,
    next: ParamId,
) -> (B::Tensor, B::Tensor, AttentionSaved<B>) {
    let b = ctx.b;
    let normed_TD = ctx.rms_norm(x_TD, p.norm);
    let mut q_TQ = project(ctx, p.q, &normed_TD);
    let mut k_TC = project(ctx, p.k, &normed_TD);
    let mut v_TC = project(ctx, p.v, &normed_TD);
    let raw_qk = match p.qk_norms {
        Some((q_norm, k_norm)) => {
            let rotated_q = head_norm_rope(ctx, p, &q_TQ, q_norm);
            let rotated_k = head_norm_rope(ctx, p, &k_TC, k_norm);
            Some((std::mem::replace(&mut q_TQ, rotated_q), std::mem::replace(&mut k_TC, rotated_k)))
        }
        None => {
            b.rope(&mut q_TQ, p.heads.dim, ctx.seqs);
            b.rope(&mut k_TC, p.heads.dim, ctx.seqs);
            None
        }
    };
    if let Some(limit) = ctx.config.clip_qkv {
        b.clamp(&mut v_TC, limit);
    }
    let (o_TQ, normaliser) = match cache {
        Some(CachedKeys { keys, values, rows }) => {
            b.write_rows(keys, rows, &k_TC);
            b.write_rows(values, rows, &v_TC);
            b.attention(&q_TQ, keys, values, ctx.seqs, &p.heads)
        }
        None => b.attention(&q_TQ, &k_TC, &v_TC, ctx.seqs, &p.heads),
    };
    let (mut h_ND, normed_ND);
    match ctx.rows {
        Some(rows) => {
            h_ND = project(ctx, p.o, &b.gather_rows(&o_TQ, rows));
            normed_ND = ctx.add_rms_norm(&mut h_ND, &b.gather_rows(x_TD, rows), next);
        }
        None => {
            h_ND = project(ctx, p.o, &o_TQ);
            normed_ND = ctx.add_rms_norm(&mut h_ND, x_TD, next);
        }
    }
    (h_ND, normed_ND, AttentionSaved { raw_qk, q_TQ, k_TC, v_TC, o_TQ, normaliser })
}

/// dx `[T, D]` of [`forward`], if a parameter below this layer is in the plan.
pub(super) fn backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &AttentionParams,
    dh_ND: B::Tensor,
    x_TD: &B::Tensor,
    saved: &AttentionSaved<B>,
    sinks: &mut Sinks<'_, B>,
) -> Option<B::Tensor> {
    let b = ctx.b;
    let want_dx = sinks.plan.layer(ctx.layer).below;
    let normed_TD = ctx.rms_norm(x_TD, p.norm);

    // Output projection; the gradient of the residual is dh itself.
    let do_TQ;
    let mut dx_TD;
    match ctx.rows {
        Some(rows) => {
            projection_grads(ctx, p.o, &dh_ND, &b.gather_rows(&saved.o_TQ, rows), sinks);
            let mut spread_TQ = b.zeros_like(&saved.o_TQ);
            let do_NQ = b.linear_backward_input(&dh_ND, ctx.weight(p.o.weight));
            b.gather_rows_backward(&do_NQ, rows, &mut spread_TQ);
            do_TQ = spread_TQ;
            dx_TD = b.zeros_like(x_TD);
            b.gather_rows_backward(&dh_ND, rows, &mut dx_TD);
        }
        None => {
            projection_grads(ctx, p.o, &dh_ND, &saved.o_TQ, sinks);
            do_TQ = b.linear_backward_input(&dh_ND, ctx.weight(p.o.weight));
            dx_TD = dh_ND;
        }
    }

    let AttentionSaved { raw_qk, q_TQ, k_TC, v_TC, o_TQ, normaliser } = saved;
    let (mut dq_TQ, mut dk_TC, mut dv_TC) =
        b.attention_backward(&do_TQ, q_TQ, k_TC, v_TC, (o_TQ, normaliser), ctx.seqs, &p.heads);
    if let (Some((raw_q_TQ, raw_k_TC)), Some((q_norm, k_norm))) = (raw_qk, p.qk_norms) {
        dq_TQ = head_norm_rope_backward(ctx, p, dq_TQ, raw_q_TQ, q_norm, sinks);
        dk_TC = head_norm_rope_backward(ctx, p, dk_TC, raw_k_TC, k_norm, sinks);
    } else {
        b.rope_backward(&mut dq_TQ, p.heads.dim, ctx.seqs);
        b.rope_backward(&mut dk_TC, p.heads.dim, ctx.seqs);
    }
    if let Some(limit) = ctx.config.clip_qkv {
        b.clamp_backward(&mut dv_TC, v_TC, limit);
    }
    for (projection, dy) in [(p.q, &dq_TQ), (p.k, &dk_TC), (p.v, &dv_TC)] {
        projection_grads(ctx, projection, dy, &normed_TD, sinks);
    }
    if !want_dx && sinks.plan.slot(p.norm).is_none() {
        return None;
    }
    let mut d_normed_TD = b.linear_backward_input(&dq_TQ, ctx.weight(p.q.weight));
    b.add_linear_backward_input(&dk_TC, ctx.weight(p.k.weight), &mut d_normed_TD);
    b.add_linear_backward_input(&dv_TC, ctx.weight(p.v.weight), &mut d_normed_TD);
    ctx.add_rms_norm_backward(&d_normed_TD, x_TD, p.norm, sinks, &mut dx_TD);
    want_dx.then_some(dx_TD)
}

/// Norm of queries or keys, the clamp of `clip_qkv` (only families with these norms have it), rotary embedding.
fn head_norm_rope<B: Backend>(ctx: &LayerCtx<'_, B>, p: &AttentionParams, raw: &B::Tensor, norm: ParamId) -> B::Tensor {
    let Some(limit) = ctx.config.clip_qkv else {
        return ctx.b.rms_norm_rope(raw, ctx.weight(norm), ctx.config.rms_norm_eps, p.heads.dim, ctx.seqs);
    };
    let mut y = clamped_head_norm(ctx, raw, norm, limit);
    ctx.b.rope(&mut y, p.heads.dim, ctx.seqs);
    y
}

fn clamped_head_norm<B: Backend>(ctx: &LayerCtx<'_, B>, raw: &B::Tensor, norm: ParamId, limit: f32) -> B::Tensor {
    let mut y = ctx.rms_norm(raw, norm);
    ctx.b.clamp(&mut y, limit);
    y
}

fn head_norm_rope_backward<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: &AttentionParams,
    mut dy: B::Tensor,
    raw: &B::Tensor,
    norm: ParamId,
    sinks: &mut Sinks<'_, B>,
) -> B::Tensor {
    let (b, eps) = (ctx.b, ctx.config.rms_norm_eps);
    let Some(limit) = ctx.config.clip_qkv else {
        let w = ctx.weight(norm);
        return b.rms_norm_rope_backward(dy, raw, w, eps, p.heads.dim, ctx.seqs, sinks.slot(norm));
    };
    b.rope_backward(&mut dy, p.heads.dim, ctx.seqs);
    b.clamp_backward(&mut dy, &clamped_head_norm(ctx, raw, norm, limit), limit);
    ctx.rms_norm_backward(&dy, raw, norm, sinks)
}

fn project<B: Backend>(ctx: &LayerCtx<'_, B>, p: Projection, x: &B::Tensor) -> B::Tensor {
    ctx.b.linear(x, ctx.weight(p.weight), p.bias.map(|id| ctx.weight(id)))
}

fn projection_grads<B: Backend>(
    ctx: &LayerCtx<'_, B>,
    p: Projection,
    dy: &B::Tensor,
    x: &B::Tensor,
    sinks: &mut Sinks<'_, B>,
) {
    ctx.weight_grad(p.weight, dy, x, sinks);
    if let Some((db, offset)) = p.bias.and_then(|bias| sinks.slot(bias)) {
        ctx.b.bias_backward(dy, db, offset);
    }
}
