//! Decoding of several sequences with a key/value cache: one forward pass over the new tokens of all of them. Shape suffixes: see
//! [`super::layer`].

use super::attention::CachedKeys;
use super::config::ModelConfig;
use super::layer::{Extent, LayerCtx, LayerRouting};
use super::transformer::Model;
use super::{attention, feed_forward};
use crate::backend::{Backend, Heads, Packing};

/// Keys and values of the tokens so far of some sequences. Each sequence has room for a fixed number of tokens.
pub struct KvCache<B: Backend> {
    /// `[S, C]` each, where S is the room of all sequences, one after another: one pair per layer.
    layers: Vec<(B::Tensor, B::Tensor)>,
    sequences: Vec<Sequence>,
    /// The cache of the model that decides the routing, if another one does.
    guide: Option<Box<Self>>,
}

/// The rows of one sequence in a cache.
#[derive(Debug, Clone, Copy)]
struct Sequence {
    start: usize,
    len: usize,
    room: usize,
}

/// Where one pass writes and reads in a cache.
struct Pass<B: Backend> {
    ids: B::Indices,
    seqs: B::Sequences,
    /// The cache row of each new token.
    cache_rows: B::Indices,
    /// The last new token of each sequence.
    last_rows: B::Indices,
}

/// Bytes of a key/value cache with room for `tokens` tokens in all, of activations of `activation_size` bytes.
pub fn kv_cache_bytes(config: &ModelConfig, tokens: usize, activation_size: usize) -> u64 {
    let width: usize = config.heads.iter().map(|h| 2 * h.keys * h.dim).sum();
    (tokens * width * activation_size) as u64
}

impl<B: Backend> Model<B> {
    /// A key/value cache of empty sequences, each with room for so many tokens.
    pub fn kv_cache(&self, room: &[usize]) -> KvCache<B> {
        let mut start = 0;
        let sequences = room.iter().map(|&room| {
            start += room;
            Sequence { start: start - room, len: 0, room }
        });
        let sequences = sequences.collect();
        let empty = |h: &Heads| self.backend.zeros(start, h.keys * h.dim);
        let guide = self.guide.as_ref().map(|guide| Box::new(guide.kv_cache(room)));
        KvCache { layers: self.config.heads.iter().map(|h| (empty(h), empty(h))).collect(), sequences, guide }
    }

    /// Bytes of a key/value cache with room for `tokens` tokens in all, that of the model which decides the routing included.
    pub fn kv_cache_bytes(&self, tokens: usize) -> u64 {
        let models = if self.guide.is_some() { 2 } else { 1 };
        models * kv_cache_bytes(&self.config, tokens, self.backend.activation_size())
    }

    /// Appends tokens to sequences of the cache, given as (sequence, its new tokens) in ascending order of sequences and with at
    /// least one token each. Returns the logits of the next token of each, `[new.len(), V]`. All tokens go through each layer
    /// together, so that its weights are read once.
    ///
    /// # Panics
    /// If a sequence has no room for its tokens.
    pub fn decode(&self, new: &[(usize, &[u32])], cache: &mut KvCache<B>) -> Vec<f32> {
        self.backend.together(|| self.decode_together(new, cache))
    }

    fn decode_together(&self, new: &[(usize, &[u32])], cache: &mut KvCache<B>) -> Vec<f32> {
        let b = &*self.backend;
        let pass = cache.append(b, new, self);
        let given = match (&self.guide, &mut cache.guide) {
            (Some(guide), Some(cache)) => guide.decode_layers(&cache.append(b, new, guide), cache, &[]).1,
            _ => Vec::new(),
        };
        let (x_ND, _) = self.decode_layers(&pass, cache, &given);
        let normed_ND = b.rms_norm(&x_ND, self.weight(self.final_norm), self.config.rms_norm_eps);
        b.download(&b.linear(&normed_ND, self.weight(self.head), None))
    }

    /// Hidden states of the last token of each sequence, `[N, D]`, and the routing of each layer. `given`: the routing of each
    /// layer, or empty.
    fn decode_layers(
        &self,
        pass: &Pass<B>,
        cache: &mut KvCache<B>,
        given: &[LayerRouting<B>],
    ) -> (B::Tensor, Vec<LayerRouting<B>>) {
        let b = &*self.backend;
        let mut x_TD = b.embedding(&pass.ids, self.weight(self.embedding));
        let mut routings = Vec::with_capacity(self.layers.len());
        let top = self.layers.len() - 1;
        for (l, (layer, (keys, values))) in self.layers.iter().zip(&mut cache.layers).enumerate() {
            b.load_offloaded(self.layer_weights(l), self.layer_weights(l + 1));
            let ctx = LayerCtx {
                b,
                weights: &self.weights,
                config: &self.config,
                layer: l,
                seqs: &pass.seqs,
                rows: (l == top).then_some(&pass.last_rows),
                intervention: self.intervention(l),
                given: given.get(l).cloned().flatten(),
            };
            let cached = CachedKeys { keys, values, rows: &pass.cache_rows };
            let norm = layer.feed_forward.norm();
            let (h_ND, normed_ND, _) = attention::forward(&ctx, &layer.attention, &x_TD, Some(cached), norm);
            let (y_ND, saved) =
                feed_forward::forward(&ctx, &layer.feed_forward, &h_ND, &normed_ND, Extent::Whole, None);
            x_TD = y_ND.expect("the whole extent");
            routings.push(saved.routing());
        }
        (x_TD, routings)
    }
}

impl<B: Backend> KvCache<B> {
    /// Counts the new tokens as part of their sequences, and says where they are.
    fn append(&mut self, b: &B, new: &[(usize, &[u32])], model: &Model<B>) -> Pass<B> {
        assert!(new.windows(2).all(|w| w[0].0 < w[1].0), "sequences in ascending order");
        let (mut ids, mut cache_rows, mut last_rows) = (Vec::new(), Vec::new(), Vec::new());
        let mut packing = Packing { queries: vec![0], keys: vec![0] };
        // Rows between the sequences of this pass are a sequence without queries.
        let mut add = |queries: usize, keys: usize| {
            packing.queries.push(queries);
            packing.keys.push(keys);
        };
        for &(s, tokens) in new {
            let Sequence { start, len, room } = &mut self.sequences[s];
            assert!(!tokens.is_empty() && *len + tokens.len() <= *room, "{} tokens for {len} of {room}", tokens.len());
            add(ids.len(), *start);
            cache_rows.extend((*start + *len..*start + *len + tokens.len()).map(|row| row as u32));
            *len += tokens.len();
            ids.extend_from_slice(tokens);
            last_rows.push(ids.len() as u32 - 1);
            add(ids.len(), *start + *len);
        }
        add(ids.len(), b.shape(&self.layers[0].0).0);
        Pass {
            ids: b.indices(&ids),
            seqs: b.sequences(&packing, &model.config.rope),
            cache_rows: b.indices(&cache_rows),
            last_rows: b.indices(&last_rows),
        }
    }
}
