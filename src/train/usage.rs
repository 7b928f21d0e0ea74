//! Which experts the tokens of a micro-batch are routed to, and with which weights: by a forward pass, or from routing traces.

use super::replica::Replica;
use crate::backend::Backend;
use crate::data::{MicroBatch, Trace};
use crate::experts::{RoutingTokens, Usage, token_mask};
use crate::model::{PassEnd, Routed};

/// Counts the usage of experts.
#[derive(Debug, Clone, Copy)]
pub(super) struct UsageCounter {
    /// The tokens that are counted.
    pub tokens: RoutingTokens,
    /// Whether routing weights are summed. Traces have none.
    pub weights: bool,
}

impl UsageCounter {
    /// Counts one side of a micro-batch.
    pub fn count<B: Backend>(&self, replica: &Replica<B>, batch: &MicroBatch, traces: Option<Vec<&Trace>>) -> Usage {
        let (b, layers, config) = (&*replica.model().backend, replica.moe_layers(), &replica.model().config);
        let (num_experts, k) = (config.num_experts, config.num_experts_per_tok);
        let mask = token_mask(self.tokens, &batch.is_response);
        let mut usage = Usage::new(layers.layers.len() * num_experts);
        usage.tokens = mask.iter().filter(|counted| **counted).count() as f64;
        let mut add = |layer: usize, experts: &[u32], logits: Option<&[f32]>| {
            let first = layer * num_experts;
            for (t, chosen) in experts.chunks_exact(k).enumerate().filter(|(t, _)| mask[*t]) {
                chosen.iter().for_each(|expert| usage.counts[first + *expert as usize] += 1.0);
                let Some(logits) = logits else { continue };
                let weights = weights(&logits[t * num_experts..(t + 1) * num_experts], chosen, config.renormalize);
                for (expert, weight) in chosen.iter().zip(weights) {
                    usage.weights[first + *expert as usize] += weight;
                }
            }
        };
        if let Some(traces) = traces {
            for layer in 0..layers.layers.len() {
                add(layer, &traces.iter().flat_map(|trace| trace.layer(layer)).collect::<Vec<u32>>(), None);
            }
            return usage;
        }
        let mut observe = |routed: Routed<'_, B>| {
            let logits = self.weights.then(|| b.download(routed.logits));
            add(layers.index_of(routed.layer), &b.expert_ids(routed.routing), logits.as_deref());
        };
        replica.forward(&replica.inputs(batch), None, PassEnd::Routers, Some(&mut observe));
        usage
    }
}

/// The routing weights of the chosen experts of one token: the softmax over all experts, divided by the sum over the chosen ones if
/// `renormalize`.
fn weights(logits: &[f32], chosen: &[u32], renormalize: bool) -> Vec<f64> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exp = |logit: f32| (f64::from(logit) - f64::from(largest)).exp();
    let chosen: Vec<f64> = chosen.iter().map(|expert| exp(logits[*expert as usize])).collect();
    let sum: f64 = if renormalize { chosen.iter().sum() } else { logits.iter().map(|logit| exp(*logit)).sum() };
    chosen.iter().map(|weight| weight / sum).collect()
}

#[cfg(test)]
mod tests {
    use super::weights;

    #[test]
    fn weights_are_a_softmax_over_all_or_over_the_chosen_experts() {
        let logits = [0.0, 2f32.ln(), 3f32.ln(), 4f32.ln()];
        let near = |found: Vec<f64>, wanted: [f64; 2]| found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-6);
        assert!(near(weights(&logits, &[3, 1], false), [0.4, 0.2]));
        assert!(near(weights(&logits, &[3, 1], true), [2.0 / 3.0, 1.0 / 3.0]));
    }
}
