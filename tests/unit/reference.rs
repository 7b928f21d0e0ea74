//! The forward operations in f64 by their definitions, and central differences; independent of the crate.

/// y = x · wᵀ; x `[m, k]`, w `[n, k]`.
pub fn matmul_nt(x: &[f64], w: &[f64], m: usize, n: usize, k: usize) -> Vec<f64> {
    let mut y = vec![0.0; m * n];
    for i in 0..m {
        for j in 0..n {
            y[i * n + j] = (0..k).map(|c| x[i * k + c] * w[j * k + c]).sum();
        }
    }
    y
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn softmax(x: &[f64]) -> Vec<f64> {
    let highest = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - highest).exp()).collect();
    let total: f64 = e.iter().sum();
    e.iter().map(|e| e / total).collect()
}

pub fn rms_norm(x: &[f64], w: &[f64], eps: f64) -> Vec<f64> {
    let n = w.len();
    x.chunks(n)
        .flat_map(|x| {
            let rms = (dot(x, x) / n as f64 + eps).sqrt();
            x.iter().zip(w).map(move |(x, w)| w * x / rms).collect::<Vec<_>>()
        })
        .collect()
}

fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

pub fn swiglu(gate_up: &[f64], f: usize) -> Vec<f64> {
    gate_up.chunks(2 * f).flat_map(|row| (0..f).map(|i| silu(row[i]) * row[f + i]).collect::<Vec<_>>()).collect()
}

pub fn sigmoid_gate(x: &[f64], gate: &[f64], d: usize) -> Vec<f64> {
    x.iter().enumerate().map(|(i, x)| x / (1.0 + (-gate[i / d]).exp())).collect()
}

/// Half-split rotation of heads of `2 · inv_freq.len()`.
pub fn rope(x: &[f64], cols: usize, positions: &[u32], inv_freq: &[f32], scale: f64) -> Vec<f64> {
    let half = inv_freq.len();
    let mut y = x.to_vec();
    for (row, &p) in y.chunks_mut(cols).zip(positions) {
        for head in row.chunks_mut(2 * half) {
            for i in 0..half {
                let angle = f64::from(p as f32 * inv_freq[i]);
                let (a, b) = (head[i], head[half + i]);
                head[i] = scale * (a * angle.cos() - b * angle.sin());
                head[half + i] = scale * (b * angle.cos() + a * angle.sin());
            }
        }
    }
    y
}

/// The geometry of attention in a test: row offsets of queries and keys by sequence, heads, head width, window.
pub struct Attention<'a> {
    pub queries: &'a [usize],
    pub keys: &'a [usize],
    pub heads: usize,
    pub key_heads: usize,
    pub dim: usize,
    pub window: Option<usize>,
}

impl Attention<'_> {
    pub fn forward(&self, q: &[f64], k: &[f64], v: &[f64]) -> Vec<f64> {
        let (h, g, d) = (self.heads, self.key_heads, self.dim);
        let mut y = vec![0.0; q.len()];
        for s in 0..self.queries.len() - 1 {
            let (q0, k0) = (self.queries[s], self.keys[s]);
            let new = self.queries[s + 1] - q0;
            let total = self.keys[s + 1] - k0;
            for i in 0..new {
                let position = total - new + i;
                let first = self.window.map_or(0, |w| (position + 1).saturating_sub(w));
                for head in 0..h {
                    let at = ((q0 + i) * h + head) * d;
                    let key_at = |j: usize| ((k0 + j) * g + head / (h / g)) * d;
                    let scores: Vec<f64> = (first..=position)
                        .map(|j| dot(&q[at..at + d], &k[key_at(j)..key_at(j) + d]) / (d as f64).sqrt())
                        .collect();
                    for (p, j) in softmax(&scores).into_iter().zip(first..) {
                        (0..d).for_each(|c| y[at + c] += p * v[key_at(j) + c]);
                    }
                }
            }
        }
        y
    }
}

/// The K largest of each row of `[T, E]` logits (ties: lower first).
pub fn top_k(logits: &[f64], e: usize, k: usize) -> Vec<usize> {
    logits
        .chunks(e)
        .flat_map(|row| {
            let mut order: Vec<usize> = (0..e).collect();
            order.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
            order.truncate(k);
            order
        })
        .collect()
}

/// Routing weights of the given experts, `[T, K]`.
pub fn routing_weights(logits: &[f64], e: usize, ids: &[usize], k: usize, renormalize: bool) -> Vec<f64> {
    logits
        .chunks(e)
        .zip(ids.chunks(k))
        .flat_map(|(row, ids)| {
            let p = softmax(row);
            let total: f64 = if renormalize { ids.iter().map(|&i| p[i]).sum() } else { 1.0 };
            ids.iter().map(move |&i| p[i] / total).collect::<Vec<_>>()
        })
        .collect()
}

/// Σ over rows of −log softmax(x · wᵀ)[target].
/// Σ p ln(p/q).
pub fn kl(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| if *p == 0.0 { 0.0 } else { p * (p / q).ln() }).sum()
}

pub fn cross_entropy(x: &[f64], w: &[f64], targets: &[u32], d: usize) -> f64 {
    let v = w.len() / d;
    let logits = matmul_nt(x, w, targets.len(), v, d);
    logits.chunks(v).zip(targets).map(|(row, &t)| -softmax(row)[t as usize].ln()).sum()
}

/// Gradient of a scalar function by central differences. In f64 with h = 1e-5 both the truncation error h²/6·f‴ and the
/// rounding error 1e-16/h stay near 1e-10.
pub fn gradient(at: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    const H: f64 = 1e-5;
    let mut x = at.to_vec();
    (0..x.len())
        .map(|i| {
            x[i] = at[i] + H;
            let up = f(&x);
            x[i] = at[i] - H;
            let down = f(&x);
            x[i] = at[i];
            (up - down) / (2.0 * H)
        })
        .collect()
}
