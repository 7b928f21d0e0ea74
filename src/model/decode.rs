//! Decoding with a key/value cache. Shape suffixes: see [`super::layer`].

use super::layer::{Extent, LayerCtx, LayerRouting};
use super::transformer::Model;
use super::{attention, feed_forward};
use crate::backend::{Backend, Heads, Packing};

/// Keys and values of all previous positions, `[S, C]` each: one pair per layer.
pub struct KvCache<B: Backend> {
    layers: Vec<(B::Tensor, B::Tensor)>,
    /// The cache of the model that decides the routing, if another one does.
    guide: Option<Box<Self>>,
}

impl<B: Backend> Model<B> {
    /// An empty key/value cache.
    pub fn kv_cache(&self) -> KvCache<B> {
        let empty = |h: &Heads| self.backend.zeros(0, h.keys * h.dim);
        let guide = self.guide.as_ref().map(|guide| Box::new(guide.kv_cache()));
        KvCache { layers: self.config.heads.iter().map(|h| (empty(h), empty(h))).collect(), guide }
    }

    /// Appends `ids` to the sequence of the cache and returns the logits of the next token, `[V]`.
    pub fn decode(&self, ids: &[u32], cache: &mut KvCache<B>) -> Vec<f32> {
        let b = &*self.backend;
        let given = match (&self.guide, &mut cache.guide) {
            (Some(guide), Some(cache)) => guide.decode_layers(ids, cache, &[]).1,
            _ => Vec::new(),
        };
        let (x_TD, _) = self.decode_layers(ids, cache, &given);
        let normed_1D = b.rms_norm(&x_TD, self.weight(self.final_norm), self.config.rms_norm_eps);
        b.download(&b.linear(&normed_1D, self.weight(self.head), None))
    }

    /// Hidden state of the last token, `[1, D]`, and the routing of each layer. `given`: the routing of each layer, or empty.
    fn decode_layers(
        &self,
        ids: &[u32],
        cache: &mut KvCache<B>,
        given: &[LayerRouting<B>],
    ) -> (B::Tensor, Vec<LayerRouting<B>>) {
        let b = &*self.backend;
        let seen = b.shape(&cache.layers[0].0).0;
        let seqs = b.sequences(&Packing::continuing(ids.len(), seen + ids.len()), &self.config.rope);
        let last_row = b.indices(&[ids.len() as u32 - 1]);
        let mut x_TD = b.embedding(&b.indices(ids), self.weight(self.embedding));
        let mut routings = Vec::with_capacity(self.layers.len());
        let top = self.layers.len() - 1;
        for (l, layer) in self.layers.iter().enumerate() {
            let ctx = LayerCtx {
                b,
                weights: &self.weights,
                config: &self.config,
                layer: l,
                seqs: &seqs,
                rows: (l == top).then_some(&last_row),
                intervention: self.intervention(l),
                given: given.get(l).cloned().flatten(),
            };
            let (h_ND, _) = attention::forward(&ctx, &layer.attention, &x_TD, Some(&mut cache.layers[l]));
            let (y_ND, saved) = feed_forward::forward(&ctx, &layer.feed_forward, &h_ND, Extent::Whole, None);
            x_TD = y_ND.expect("the whole extent");
            routings.push(saved.routing());
        }
        (x_TD, routings)
    }
}
