//! KL divergence between the routing distributions of safe and unsafe prompts, and its exact gradient.

use super::{KlType, LayerStatistic};

/// Added to every entry of a distribution before it is renormalised, so that no logarithm is of 0.
const EPS: f64 = 1e-8;

/// The KL divergence between p (safe) and q (unsafe), `[E]` each, with its gradients by p and by q.
///
/// ```text
/// u = (p + ε) / Σ(p + ε),   v = (q + ε) / Σ(q + ε)
/// forward   Σ u ln(u/v)        reverse   Σ v ln(v/u)        symmetric   mean of both
/// ```
///
/// The sums are not divided by E. The gradients are with respect to p and q themselves, through ε and the
/// normalisation; p and q need not sum to 1.
pub fn kl_and_gradient(kind: KlType, p: &[f64], q: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    assert_eq!(p.len(), q.len(), "number of experts");
    match kind {
        KlType::Forward => directed(p, q),
        KlType::Reverse => {
            let (kl, dq, dp) = directed(q, p);
            (kl, dp, dq)
        }
        KlType::Symmetric => {
            let (forward, dp, dq) = directed(p, q);
            let (reverse, dq2, dp2) = directed(q, p);
            let half = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(b).map(|(a, b)| 0.5 * (a + b)).collect();
            (0.5 * (forward + reverse), half(dp, dp2), half(dq, dq2))
        }
    }
}

/// KL(u ‖ v), and its gradients by p and by q.
fn directed(p: &[f64], q: &[f64]) -> (f64, Vec<f64>, Vec<f64>) {
    let (u, p_total) = normalise(p);
    let (v, q_total) = normalise(q);
    let ratio: Vec<f64> = u.iter().zip(&v).map(|(u, v)| u / v).collect();
    let kl: f64 = u.iter().zip(&ratio).map(|(u, r)| u * r.ln()).sum();
    // d/du_i = ln(u_i/v_i) + 1 and d/dv_i = −u_i/v_i. Through x ↦ x/Σx a gradient g becomes (g_j − Σ g_i u_i) / Σx:
    // Σ u_i (ln(u_i/v_i) + 1) = KL + 1, and Σ v_i u_i/v_i = 1.
    let dp = ratio.iter().map(|r| (r.ln() - kl) / p_total).collect();
    let dq = ratio.iter().map(|r| (1.0 - r) / q_total).collect();
    let kl = if kl < 0.0 { 0.0 } else { kl }; // rounding may make a divergence of 0 negative; NaN stays NaN
    (kl, dp, dq)
}

fn normalise(x: &[f64]) -> (Vec<f64>, f64) {
    let total: f64 = x.iter().map(|x| x + EPS).sum();
    (x.iter().map(|x| (x + EPS) / total).collect(), total)
}

/// The router loss of a batch with its gradients.
#[derive(Debug, Clone, PartialEq)]
pub struct Alignment {
    /// Mean of the divergence over the layers.
    pub loss: f64,
    /// The divergence of each layer.
    pub per_layer: Vec<f64>,
    /// Gradient of `loss` by each layer's safe [`LayerStatistic::sum`], `[layers][E]`. Includes the factors 1/layers
    /// and 1/weight.
    pub d_safe: Vec<Vec<f64>>,
    /// Gradient of `loss` by each layer's unsafe [`LayerStatistic::sum`], `[layers][E]`.
    pub d_unsafe: Vec<Vec<f64>>,
}

/// The mean divergence over layers, with gradients. `safe` and `unsafe_` are the statistics of the global batch, of the
/// same layers. `None` without layers, or if a side has no tokens.
pub fn alignment(kind: KlType, safe: &[LayerStatistic], unsafe_: &[LayerStatistic]) -> Option<Alignment> {
    assert_eq!(safe.len(), unsafe_.len(), "number of layers");
    let layers = safe.len() as f64;
    let mut out = Alignment { loss: 0.0, per_layer: Vec::new(), d_safe: Vec::new(), d_unsafe: Vec::new() };
    for (safe, unsafe_) in safe.iter().zip(unsafe_) {
        let (kl, dp, dq) = kl_and_gradient(kind, &safe.mean()?, &unsafe_.mean()?);
        let of_sum = |d: Vec<f64>, weight: f64| d.into_iter().map(|d| d / (layers * weight)).collect();
        out.per_layer.push(kl);
        out.d_safe.push(of_sum(dp, safe.weight));
        out.d_unsafe.push(of_sum(dq, unsafe_.weight));
    }
    out.loss = out.per_layer.iter().sum::<f64>() / layers;
    (!out.per_layer.is_empty()).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nan_divergence_is_not_clamped_to_zero() {
        for kind in [KlType::Forward, KlType::Reverse, KlType::Symmetric] {
            assert!(kl_and_gradient(kind, &[0.5, 0.5], &[f64::NAN, 0.5]).0.is_nan());
        }
    }
}
