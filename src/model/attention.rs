//! One attention block: norm, projections, norms of queries and keys, rotary embedding, attention, output.

use super::ids::{ParamId, ParamKind};
use super::table::ParamTable;
use super::transformer::{Model, Sinks};
use crate::backend::{Backend, Heads};

/// Parameters of one attention block.
#[derive(Debug, Clone)]
pub(super) struct AttentionParams {
    norm: ParamId,
    q: Projection,
    k: Projection,
    v: Projection,
    o: Projection,
    norms: Option<(ParamId, ParamId)>,
    heads: Heads,
}

#[derive(Debug, Clone, Copy)]
struct Projection {
    weight: ParamId,
    bias: Option<ParamId>,
}

/// What the backward of one attention block reads. `raw` holds queries and keys before their norms, where there are any.
pub(super) struct AttentionSaved<B: Backend> {
    raw: Option<(B::Tensor, B::Tensor)>,
    q: B::Tensor,
    k: B::Tensor,
    v: B::Tensor,
    o: B::Tensor,
}

/// Keys and values of the positions seen so far, one pair a layer.
pub struct KvCache<B: Backend> {
    pub(super) layers: Vec<(B::Tensor, B::Tensor)>,
}

impl AttentionParams {
    pub(super) fn find(table: &ParamTable, layer: usize, heads: Heads) -> Self {
        use ParamKind::*;
        let must = |kind| table.id(kind).expect("the table was checked against the family");
        let projection = |weight, bias| Projection { weight: must(weight), bias: table.id(bias) };
        Self {
            norm: must(InputNorm(layer)),
            q: projection(Q(layer), QBias(layer)),
            k: projection(K(layer), KBias(layer)),
            v: projection(V(layer), VBias(layer)),
            o: projection(O(layer), OBias(layer)),
            norms: table.id(QNorm(layer)).zip(table.id(KNorm(layer))),
            heads,
        }
    }
}

impl<B: Backend> Model<B> {
    /// x + attention(norm(x)). With `rows`, only those rows of the result are computed (`[n, D]`).
    pub(super) fn attention_forward(
        &self,
        p: &AttentionParams,
        x: &B::Tensor,
        seqs: &B::Sequences,
        rows: Option<&B::Indices>,
        cache: Option<&mut (B::Tensor, B::Tensor)>,
    ) -> (B::Tensor, AttentionSaved<B>) {
        let b = &*self.backend;
        let normed = b.rms_norm(x, self.weight(p.norm), self.config.rms_norm_eps);
        let mut q = self.project(&normed, p.q);
        let mut k = self.project(&normed, p.k);
        let mut v = self.project(&normed, p.v);
        let raw = p.norms.map(|(q_norm, k_norm)| {
            let normed_q = self.head_norm(&q, q_norm);
            let normed_k = self.head_norm(&k, k_norm);
            (std::mem::replace(&mut q, normed_q), std::mem::replace(&mut k, normed_k))
        });
        if let Some(limit) = self.config.clip_qkv {
            b.clamp(&mut v, limit);
        }
        b.rope(&mut q, p.heads.dim, seqs);
        b.rope(&mut k, p.heads.dim, seqs);
        let o = match cache {
            Some((cached_k, cached_v)) => {
                b.append_rows(cached_k, &k);
                b.append_rows(cached_v, &v);
                b.attention(&q, cached_k, cached_v, seqs, &p.heads)
            }
            None => b.attention(&q, &k, &v, seqs, &p.heads),
        };
        let h = match rows {
            Some(rows) => {
                let mut h = self.project(&b.gather_rows(&o, rows), p.o);
                b.add_assign(&mut h, &b.gather_rows(x, rows));
                h
            }
            None => {
                let mut h = self.project(&o, p.o);
                b.add_assign(&mut h, x);
                h
            }
        };
        (h, AttentionSaved { raw, q, k, v, o })
    }

    /// dx of [`Self::attention_forward`], from the gradient of its result; `dh` has as many rows as that had.
    #[allow(clippy::too_many_arguments)]
    pub(super) fn attention_backward(
        &self,
        p: &AttentionParams,
        dh: B::Tensor,
        x: &B::Tensor,
        saved: &AttentionSaved<B>,
        seqs: &B::Sequences,
        rows: Option<&B::Indices>,
        want_dx: bool,
        sinks: &mut Sinks<'_, B>,
    ) -> Option<B::Tensor> {
        let b = &*self.backend;
        let normed = b.rms_norm(x, self.weight(p.norm), self.config.rms_norm_eps);

        // Back through the output projection; the residual's gradient is dh itself.
        let d_o;
        let mut dx;
        match rows {
            Some(rows) => {
                self.projection_grads(p.o, &dh, &b.gather_rows(&saved.o, rows), sinks);
                let mut spread = b.zeros_like(&saved.o);
                b.gather_rows_backward(&b.linear_backward_input(&dh, self.weight(p.o.weight)), rows, &mut spread);
                d_o = spread;
                dx = b.zeros_like(x);
                b.gather_rows_backward(&dh, rows, &mut dx);
            }
            None => {
                self.projection_grads(p.o, &dh, &saved.o, sinks);
                d_o = b.linear_backward_input(&dh, self.weight(p.o.weight));
                dx = dh;
            }
        }

        let (mut dq, mut dk, mut dv) =
            b.attention_backward(&d_o, &saved.q, &saved.k, &saved.v, &saved.o, seqs, &p.heads);
        b.rope_backward(&mut dq, p.heads.dim, seqs);
        b.rope_backward(&mut dk, p.heads.dim, seqs);
        if let (Some((raw_q, raw_k)), Some((q_norm, k_norm))) = (&saved.raw, p.norms) {
            dq = self.head_norm_backward(dq, raw_q, q_norm, sinks);
            dk = self.head_norm_backward(dk, raw_k, k_norm, sinks);
        }
        if let Some(limit) = self.config.clip_qkv {
            b.clamp_backward(&mut dv, &saved.v, limit);
        }
        for (projection, dy) in [(p.q, &dq), (p.k, &dk), (p.v, &dv)] {
            self.projection_grads(projection, dy, &normed, sinks);
        }
        if !want_dx && sinks.plan.slot(p.norm).is_none() {
            return None;
        }
        let mut d_normed = b.linear_backward_input(&dq, self.weight(p.q.weight));
        b.add_assign(&mut d_normed, &b.linear_backward_input(&dk, self.weight(p.k.weight)));
        b.add_assign(&mut d_normed, &b.linear_backward_input(&dv, self.weight(p.v.weight)));
        let d_residual =
            b.rms_norm_backward(&d_normed, x, self.weight(p.norm), self.config.rms_norm_eps, sinks.slot(p.norm));
        b.add_assign(&mut dx, &d_residual);
        want_dx.then_some(dx)
    }

    /// Norm of queries or keys, then the clamp where the config asks for it (only families with these norms have one).
    fn head_norm(&self, raw: &B::Tensor, norm: ParamId) -> B::Tensor {
        let mut y = self.backend.rms_norm(raw, self.weight(norm), self.config.rms_norm_eps);
        if let Some(limit) = self.config.clip_qkv {
            self.backend.clamp(&mut y, limit);
        }
        y
    }

    fn head_norm_backward(
        &self,
        mut dy: B::Tensor,
        raw: &B::Tensor,
        norm: ParamId,
        sinks: &mut Sinks<'_, B>,
    ) -> B::Tensor {
        if let Some(limit) = self.config.clip_qkv {
            self.backend.clamp_backward(&mut dy, &self.head_norm(raw, norm), limit);
        }
        self.backend.rms_norm_backward(&dy, raw, self.weight(norm), self.config.rms_norm_eps, sinks.slot(norm))
    }

    fn project(&self, x: &B::Tensor, p: Projection) -> B::Tensor {
        self.backend.linear(x, self.weight(p.weight), p.bias.map(|id| self.weight(id)))
    }

    fn projection_grads(&self, p: Projection, dy: &B::Tensor, x: &B::Tensor, sinks: &mut Sinks<'_, B>) {
        if let Some((dw, offset)) = sinks.slot(p.weight) {
            self.backend.linear_backward_weight(dy, x, dw, offset);
        }
        if let Some((db, offset)) = p.bias.and_then(|bias| sinks.slot(bias)) {
            self.backend.bias_backward(dy, db, offset);
        }
    }
}
