//! How far a model has moved from the base model on the retain rows, without gradient.

use std::sync::Arc;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::Retention;
use crate::backend::Backend;
use crate::exit::Result;
use crate::meter::{Meter, Unit};
use crate::model::{BaseHead, PassEnd, Routed};
use crate::train::replica::{Replica, share};

/// The distance of a model from the base model on the retain rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Drift {
    /// Mean over the tokens with loss of KL(p_base ‖ p) of the next-token distributions, in nats.
    pub kl: f64,
    /// Share of the tokens with loss at which both models have the same most probable token.
    pub top1_agreement: f64,
    /// Mean cross-entropy of the rows' replies, in nats a token.
    pub ce_loss: f64,
    /// Mean over tokens and MoE layers of KL(softmax(z_base) ‖ softmax(z)) of the router logits, in nats; 0 in a dense model.
    pub routing_kl: f64,
    /// Share of the K experts of a token that both models choose, mean over tokens and MoE layers; 1 in a dense model.
    pub expert_overlap: f64,
    /// The last two by MoE layer.
    pub layers: Vec<LayerDrift>,
}

/// The distance of the routing of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerDrift {
    /// Number of the decoder layer.
    pub layer: usize,
    /// Mean divergence over the tokens, in nats.
    pub routing_kl: f64,
    /// Mean share of equal experts over the tokens.
    pub expert_overlap: f64,
}

impl Drift {
    /// Whether all numbers are finite.
    pub fn is_finite(&self) -> bool {
        [self.kl, self.ce_loss, self.routing_kl].iter().all(|x| x.is_finite())
    }
}

impl<B: Backend> Retention<'_, B> {
    /// Measures the present model against the base model, over all rows; the same on all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn drift(&self, replica: &Replica<B>) -> Result<Drift> {
        let layers = replica.moe_layers();
        let num_layers = layers.layers.len();
        let width = 3 + 2 * num_layers;
        let batches = self.rows.in_order();
        let mut own = Vec::new();
        let rows = share(&batches, &*replica.world).map(|(_, rows)| rows.len() as u64).sum();
        let meter = Meter::start("measuring the drift on retain rows", Unit::Rows, rows);
        for (i, rows) in share(&batches, &*replica.world) {
            meter.add(rows.len());
            own.extend(self.sums(replica, rows).into_iter().enumerate().map(|(j, sum)| (i * width + j, sum)));
        }
        // One sum after another in the order of the micro-batches: the same bits on any number of ranks.
        let all = replica.gather_by_index(batches.len() * width, &own)?;
        let sum = |j: usize| all.iter().skip(j).step_by(width).sum::<f64>();
        let [loss_tokens, tokens] = self.rows.tokens().map(|n| n.max(1) as f64);
        let per_token = replica.model().config.num_experts_per_tok as f64;
        let of_layer = |(i, &layer): (usize, &usize)| LayerDrift {
            layer,
            routing_kl: sum(3 + i) / tokens,
            expert_overlap: sum(3 + num_layers + i) / (tokens * per_token),
        };
        let by_layer: Vec<_> = layers.layers.iter().enumerate().map(of_layer).collect();
        let mean = |value: fn(&LayerDrift) -> f64| by_layer.iter().map(value).sum::<f64>() / num_layers.max(1) as f64;
        Ok(Drift {
            kl: sum(1) / loss_tokens,
            top1_agreement: sum(2) / loss_tokens,
            ce_loss: sum(0) / loss_tokens,
            routing_kl: mean(|layer| layer.routing_kl),
            expert_overlap: if num_layers > 0 { mean(|layer| layer.expert_overlap) } else { 1.0 },
            layers: by_layer,
        })
    }

    /// Sums over one micro-batch: cross-entropy, divergence, equal most probable tokens; by MoE layer the divergence of the
    /// routers, and the number of equal experts.
    fn sums(&self, replica: &Replica<B>, rows: &[usize]) -> Vec<f64> {
        let (b, model, layers) = (&*replica.model().backend, replica.model(), replica.moe_layers());
        let batch = self.rows.pack(rows);
        let inputs = replica.inputs(&batch);
        let (mut kl, mut overlap) = (vec![0.0; layers.layers.len()], vec![0.0; layers.layers.len()]);
        let (experts, top_k) = (model.config.num_experts, model.config.num_experts_per_tok);
        let mut observe = |routed: Routed<'_, B>| {
            let index = layers.index_of(routed.layer);
            let base: Arc<[f32]> = self.base.router_logits(rows, index);
            kl[index] = b.softmax_kl(routed.logits, &base);
            overlap[index] = equal_experts(&b.download(routed.logits), &base, experts, top_k) as f64;
        };
        let forward = replica.forward(&inputs, None, PassEnd::Loss { all_rows: true }, Some(&mut observe));
        let normed = b.upload(batch.targets.len(), model.config.hidden_size, &self.base.hidden(rows));
        let base = BaseHead { normed: &normed, head: self.head.as_deref() };
        let (divergence, same) = model.kl(&forward, &base);
        let mut out = vec![model.loss(&inputs, &forward), divergence, same as f64];
        out.extend(kl);
        out.extend(overlap);
        out
    }
}

/// Σ over rows of the number of experts that are among the `top_k` highest logits of both; of equal logits the lower expert
/// counts as higher.
fn equal_experts(logits: &[f32], base: &[f32], experts: usize, top_k: usize) -> usize {
    let top = |row: &[f32]| {
        let mut ids: Vec<usize> = (0..experts).collect();
        if top_k < experts {
            ids.select_nth_unstable_by(top_k, |&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        }
        ids.truncate(top_k);
        ids
    };
    let rows = logits.par_chunks(experts).zip(base.par_chunks(experts)).with_min_len(64);
    rows.map(|(ours, theirs)| {
        let theirs = top(theirs);
        top(ours).iter().filter(|id| theirs.contains(id)).count()
    })
    .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_of_both_are_counted_and_ties_go_to_the_lower() {
        let base = [3.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0];
        assert_eq!(equal_experts(&base, &base, 4, 2), 4);
        let logits = [3.0, 0.0, 1.0, 2.0, 0.0, 0.0, 5.0, 4.0];
        assert_eq!(equal_experts(&logits, &base, 4, 2), 1);
        assert_eq!(equal_experts(&logits, &base, 4, 4), 8);
    }
}
