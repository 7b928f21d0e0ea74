//! The families' forward pass over candle tensors in f64, as a reference for gradients. Only sums, products and powers are
//! used: candle's fused softmax, norm and rope detach the graph, and its scatter has a wrong gradient.

use std::collections::HashMap;

use candle_core::{D, DType, Device, Result, Tensor, Var, backprop::GradStore};
use moewarden::backend::cpu::Cpu;
use moewarden::model::{LayerKind, Model, ModelConfig, ParamKind, Proj, QkNorm};

use crate::tiny_model::Tiny;

/// A model as candle variables.
pub struct Autograd<'a> {
    config: &'a ModelConfig,
    vars: HashMap<ParamKind, Var>,
}

impl<'a> Autograd<'a> {
    pub fn new(model: &'a Model<Cpu>) -> Result<Self> {
        let variable = |(id, spec): (usize, &moewarden::model::ParamSpec)| {
            let value = model.weight_host(id);
            let tensor = Tensor::from_vec(value.to_f32(), value.shape.clone(), &Device::Cpu)?.to_dtype(DType::F64)?;
            Ok((spec.kind, Var::from_tensor(&tensor)?))
        };
        Ok(Self { config: &model.config, vars: model.table.iter().map(variable).collect::<Result<_>>()? })
    }

    /// The gradient of a loss with respect to one parameter; zeros if the loss does not depend on it.
    pub fn gradient(&self, grads: &GradStore, kind: ParamKind) -> Result<Vec<f64>> {
        let var = &self.vars[&kind];
        match grads.get(var.as_tensor()) {
            Some(gradient) => gradient.flatten_all()?.to_vec1(),
            None => Ok(vec![0.0; var.elem_count()]),
        }
    }

    /// Mean cross-entropy of the tiny model's sequences.
    pub fn loss(&self, tiny: &Tiny) -> Result<Tensor> {
        let mut losses = Vec::new();
        for s in 0..tiny.packing.len() {
            let rows = tiny.packing.queries[s]..tiny.packing.queries[s + 1];
            let log_probs = self.log_probs(&tiny.ids[rows.clone()])?;
            let at = tiny.loss_rows.iter().zip(&tiny.targets).filter(|(r, _)| rows.contains(&(**r as usize)));
            for (row, target) in at {
                losses.push(log_probs.get(*row as usize - rows.start)?.get(*target as usize)?);
            }
        }
        Tensor::stack(&losses, 0)?.mean_all()?.neg()
    }

    fn log_probs(&self, ids: &[u32]) -> Result<Tensor> {
        let ids = Tensor::new(ids, &Device::Cpu)?;
        let mut x = self.w(ParamKind::Embedding).index_select(&ids, 0)?;
        for layer in 0..self.config.layers.len() {
            let normed = self.norm(&x, ParamKind::InputNorm(layer))?;
            x = (&x + self.attention(&normed, layer)?)?;
            let normed = self.norm(&x, ParamKind::PostNorm(layer))?;
            let y = match self.config.layers[layer] {
                LayerKind::Dense(_) => self.swiglu(&normed, |proj| ParamKind::Dense(layer, proj))?,
                LayerKind::Moe => self.moe(&normed, layer)?,
            };
            x = (x + y)?;
        }
        let x = self.norm(&x, ParamKind::FinalNorm)?;
        let head = if self.config.tie_word_embeddings { ParamKind::Embedding } else { ParamKind::LmHead };
        softmax(&self.linear(&x, head)?)?.log()
    }

    fn w(&self, kind: ParamKind) -> &Tensor {
        self.vars[&kind].as_tensor()
    }

    fn linear(&self, x: &Tensor, kind: ParamKind) -> Result<Tensor> {
        x.matmul(&self.w(kind).t()?)
    }

    fn norm(&self, x: &Tensor, kind: ParamKind) -> Result<Tensor> {
        let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
        let root = (mean + f64::from(self.config.rms_norm_eps))?.sqrt()?;
        x.broadcast_div(&root)?.broadcast_mul(self.w(kind))
    }

    fn swiglu(&self, x: &Tensor, kind: impl Fn(Proj) -> ParamKind) -> Result<Tensor> {
        let (gate, up) = (self.linear(x, kind(Proj::Gate))?, self.linear(x, kind(Proj::Up))?);
        self.linear(&((&gate * sigmoid(&gate)?)? * up)?, kind(Proj::Down))
    }

    /// q, k or v of one layer, `[T, heads, dim]`.
    fn project(
        &self,
        x: &Tensor,
        heads: usize,
        [weight, bias]: [ParamKind; 2],
        norm: Option<ParamKind>,
        dim: usize,
    ) -> Result<Tensor> {
        let mut y = self.linear(x, weight)?;
        if self.vars.contains_key(&bias) {
            y = y.broadcast_add(self.w(bias))?;
        }
        if let (Some(norm), QkNorm::WholeWidth) = (norm, self.config.qk_norm) {
            y = self.norm(&y, norm)?;
        }
        if let Some(limit) = self.config.clip_qkv {
            y = y.clamp(-f64::from(limit), f64::from(limit))?;
        }
        let y = y.reshape((x.dim(0)?, heads, dim))?;
        match (norm, self.config.qk_norm) {
            (Some(norm), QkNorm::PerHead) => self.norm(&y, norm),
            _ => Ok(y),
        }
    }

    fn attention(&self, x: &Tensor, l: usize) -> Result<Tensor> {
        let heads = self.config.heads[l];
        let (t, dim) = (x.dim(0)?, heads.dim);
        let q = [ParamKind::Q(l), ParamKind::QBias(l)];
        let k = [ParamKind::K(l), ParamKind::KBias(l)];
        let v = [ParamKind::V(l), ParamKind::VBias(l)];
        let q = self.rope(&self.project(x, heads.queries, q, Some(ParamKind::QNorm(l)), dim)?)?;
        let k = self.rope(&self.project(x, heads.keys, k, Some(ParamKind::KNorm(l)), dim)?)?;
        let v = self.project(x, heads.keys, v, None, dim)?;
        let window = heads.window.unwrap_or(t);
        let seen = |i: usize, j: usize| j <= i && j + window > i;
        let mask: Vec<f64> = (0..t * t).map(|at| if seen(at / t, at % t) { 0.0 } else { -1e30 }).collect();
        let mask = Tensor::from_vec(mask, (t, t), &Device::Cpu)?;
        let mut out = Vec::new();
        for head in 0..heads.queries {
            let shared = head * heads.keys / heads.queries;
            let of = |x: &Tensor, head: usize| x.narrow(1, head, 1)?.squeeze(1)?.contiguous();
            let scores = (of(&q, head)?.matmul(&of(&k, shared)?.t()?)? / (dim as f64).sqrt())?;
            out.push(softmax(&(scores + &mask)?)?.matmul(&of(&v, shared)?)?);
        }
        let y = self.linear(&Tensor::cat(&out, 1)?, ParamKind::O(l))?;
        if self.vars.contains_key(&ParamKind::OBias(l)) { y.broadcast_add(self.w(ParamKind::OBias(l))) } else { Ok(y) }
    }

    fn rope(&self, x: &Tensor) -> Result<Tensor> {
        let (t, _, dim) = x.dims3()?;
        let rope = &self.config.rope;
        let angle = |at: usize| (at / (dim / 2)) as f64 * f64::from(rope.inv_freq[at % (dim / 2)]);
        let table = |f: fn(f64) -> f64| {
            let values: Vec<f64> = (0..t * dim / 2).map(|at| f(angle(at)) * f64::from(rope.scale)).collect();
            Tensor::from_vec(values, (t, 1, dim / 2), &Device::Cpu)
        };
        let (cos, sin) = (table(f64::cos)?, table(f64::sin)?);
        let (a, b) = (x.narrow(2, 0, dim / 2)?, x.narrow(2, dim / 2, dim / 2)?);
        let left = (a.broadcast_mul(&cos)? - b.broadcast_mul(&sin)?)?;
        let right = (b.broadcast_mul(&cos)? + a.broadcast_mul(&sin)?)?;
        Tensor::cat(&[left, right], 2)
    }

    /// Every expert computes every token; experts that are not chosen have the constant weight 0.
    fn moe(&self, x: &Tensor, l: usize) -> Result<Tensor> {
        let probs = softmax(&self.linear(x, ParamKind::Router(l))?)?;
        let mask: Vec<f64> = probs.to_vec2::<f64>()?.iter().flat_map(|row| self.chosen(row)).collect();
        let mut weights = (&probs * Tensor::from_vec(mask, probs.shape(), &Device::Cpu)?)?;
        if self.config.renormalize {
            weights = weights.broadcast_div(&weights.sum_keepdim(1)?)?;
        }
        let mut y = x.zeros_like()?;
        for e in 0..self.config.num_experts {
            let out = self.swiglu(x, |proj| ParamKind::Expert(l, e, proj))?;
            y = (y + out.broadcast_mul(&weights.narrow(1, e, 1)?)?)?;
        }
        if self.config.shared_expert_width.is_some() {
            let gate = sigmoid(&self.linear(x, ParamKind::SharedGate(l))?)?;
            y = (y + self.swiglu(x, |proj| ParamKind::Shared(l, proj))?.broadcast_mul(&gate)?)?;
        }
        Ok(y)
    }

    /// 1 for the K largest, else 0.
    fn chosen(&self, probs: &[f64]) -> Vec<f64> {
        let rank = |e: usize| probs.iter().filter(|p| **p > probs[e]).count();
        (0..probs.len()).map(|e| f64::from(u8::from(rank(e) < self.config.num_experts_per_tok))).collect()
    }
}

fn softmax(x: &Tensor) -> Result<Tensor> {
    let e = x.broadcast_sub(&x.max_keepdim(D::Minus1)?.detach())?.exp()?;
    e.broadcast_div(&e.sum_keepdim(D::Minus1)?)
}

fn sigmoid(x: &Tensor) -> Result<Tensor> {
    (x.neg()?.exp()? + 1.0)?.recip()
}
