//! Router: softmax over the experts, and selection of the top K.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::chunk_rows;
use super::simd::{dot, simd, softmax};
use super::tensor::Tensor;

/// The top-K experts of each token and their routing weights, with the probabilities saved for the backward pass.
pub struct Routing {
    /// Expert indices of each token by decreasing probability, `[T·K]`.
    pub(super) ids: Vec<u32>,
    /// Routing weights, `[T, K]`.
    pub(super) weights: Tensor,
    /// Softmax over all experts, `[T, E]`.
    probabilities: Tensor,
    renormalize: bool,
}

impl Routing {
    /// Number of tokens, T.
    pub fn tokens(&self) -> usize {
        self.weights.rows()
    }

    /// Experts per token, K.
    pub fn top_k(&self) -> usize {
        self.weights.cols()
    }
}

pub(super) fn route(cpu: &Cpu, logits: &Tensor, top_k: usize, renormalize: bool) -> Routing {
    let (t, e) = (logits.rows(), logits.cols());
    assert!((1..=e).contains(&top_k), "{top_k} of {e} experts");
    let mut probabilities = cpu.pool.take(t, e);
    let mut weights = cpu.pool.take(t, top_k);
    let mut ids = vec![0; t * top_k];
    let rows = probabilities.values_mut().par_chunks_mut(e).zip(logits.values().par_chunks(e));
    let chosen = weights.values_mut().par_chunks_mut(top_k).zip(ids.par_chunks_mut(top_k));
    rows.zip(chosen).with_min_len(chunk_rows(e)).for_each(|((p, logits), (weights, ids))| {
        simd!(softmax(logits, p));
        top_k_of(p, weights, ids);
        if renormalize {
            let total: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= total);
        }
    });
    Routing { ids, weights, probabilities, renormalize }
}

/// The `ids.len()` largest entries of `p`, by decreasing value and, if equal, increasing index. The indices are
/// distinct even if entries are NaN.
fn top_k_of(p: &[f32], values: &mut [f32], ids: &mut [u32]) {
    // Insertion into a sorted list: most entries fail the first comparison.
    let k = ids.len();
    let mut len = 0;
    for (i, &x) in p.iter().enumerate() {
        let mut at = if len < k {
            len
        } else if x > values[k - 1] {
            k - 1
        } else {
            continue;
        };
        while at > 0 && x > values[at - 1] {
            (values[at], ids[at]) = (values[at - 1], ids[at - 1]);
            at -= 1;
        }
        (values[at], ids[at]) = (x, i as u32);
        len = k.min(len + 1);
    }
}

pub(super) fn zero_weights(routing: &mut Routing, experts: &[u32]) {
    for (weight, id) in routing.weights.values_mut().iter_mut().zip(&routing.ids) {
        if experts.contains(id) {
            *weight = 0.0;
        }
    }
}

/// With renormalisation w = p/s by the sum s of the top K: dp_k = (dw_k − Σ_j dw_j·w_j) / s. Through the softmax:
/// dlogit = p · (dp − Σ p·dp), where dp = 0 for experts outside the top K.
pub(super) fn backward(cpu: &Cpu, dweights: &Tensor, routing: &Routing) -> Tensor {
    let (t, e, k) = (routing.tokens(), routing.probabilities.cols(), routing.top_k());
    dweights.expect_shape("gradient of the routing weights", t, k);
    let mut dlogits = cpu.pool.take(t, e);
    let chosen = routing.ids.par_chunks(k).zip(routing.weights.values().par_chunks(k));
    let rows = dweights.values().par_chunks(k).zip(routing.probabilities.values().par_chunks(e)).zip(chosen);
    dlogits.values_mut().par_chunks_mut(e).zip(rows).with_min_len(chunk_rows(e)).for_each(
        |(dlogits, ((dw, p), (ids, w)))| {
            dlogits.fill(0.0);
            let (mean, scale) = if routing.renormalize {
                let total: f32 = ids.iter().map(|&i| p[i as usize]).sum();
                (dw.iter().zip(w).map(|(dw, w)| dw * w).sum::<f32>(), 1.0 / total)
            } else {
                (0.0, 1.0)
            };
            for (&id, dw) in ids.iter().zip(dw) {
                dlogits[id as usize] = (dw - mean) * scale;
            }
            simd!(softmax_backward(p, dlogits));
        },
    );
    dlogits
}

/// Softmax backward, in place: overwrites dp with dlogits = p · (dp − Σ p·dp).
#[inline(always)]
pub(super) fn softmax_backward(p: &[f32], dp: &mut [f32]) {
    let mean = dot(p, dp) as f32;
    for (dp, p) in dp.iter_mut().zip(p) {
        *dp = p * (*dp - mean);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_the_lower_expert() {
        let mut values = [0.0; 3];
        let mut ids = [9; 3];
        top_k_of(&[0.1, 0.3, 0.3, 0.1, 0.3, 0.3], &mut values, &mut ids);
        assert_eq!((ids, values), ([1, 2, 4], [0.3; 3]));
        top_k_of(&[0.2, 0.2, 0.2], &mut values, &mut ids);
        assert_eq!(ids, [0, 1, 2]);
        top_k_of(&[0.1, 0.2, 0.7], &mut values, &mut ids);
        assert_eq!(ids, [2, 1, 0]);
    }

    #[test]
    fn nan_gives_distinct_experts() {
        let mut values = [0.0; 2];
        let mut ids = [9; 2];
        top_k_of(&[f32::NAN; 4], &mut values, &mut ids);
        assert_eq!(ids, [0, 1]);
    }
}
