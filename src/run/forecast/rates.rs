//! The rates of a backend, measured by short runs of the operations of a layer at the sizes of a run.

use std::time::{Duration, Instant};

use super::work::{Kind, Work};
use crate::backend::{AdamwStep, Backend, Dtype, ExpertGrad, GradReduction, HostTensor, Packing, Stacks};
use crate::model::ModelConfig;

/// Amounts of work a second, of each kind.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates(Work);

/// The sizes that decide rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sizes {
    /// Tokens of the largest micro-batch.
    pub rows: usize,
    /// Mean length of a sequence.
    pub length: usize,
    /// Tokens with loss of a micro-batch.
    pub loss_rows: usize,
    /// Sequences of a batch of generation.
    pub generated: usize,
    /// The number format of the weights.
    pub dtype: Dtype,
}

/// Floating-point operations of one run of a measurement, at most; small shapes take fewer.
const FLOPS: usize = 3 << 30;
/// Rows of a product, at most: a product of more runs no faster.
const ROWS: usize = 512;
/// Elements of the measurements of updates and random weights.
const ELEMENTS: usize = 1 << 22;
/// Each measurement is repeated for a time in this range, in seconds, and at least once.
const SPEND: [f64; 2] = [0.004, 0.08];
/// Floating-point operations a second that no CPU reaches in all operations of a run.
const FAST: f64 = 1e11;

impl Rates {
    /// Seconds of this work.
    pub fn seconds(&self, work: &Work) -> f64 {
        Kind::ALL.iter().map(|&kind| work[kind] / self.0[kind]).sum()
    }

    /// The rate at which this work runs as a whole, in floating-point operations a second.
    pub fn average(&self, work: &Work) -> f64 {
        work.flops() / self.seconds(work).max(f64::MIN_POSITIVE)
    }

    /// Measures all rates on a backend for a forecast of `work`, in about two seconds, and in less for what takes less itself.
    pub fn measure<B: Backend>(backend: &B, model: &ModelConfig, sizes: Sizes, work: &Work) -> Self {
        let [least, most] = SPEND;
        let spend = Duration::from_secs_f64((work.flops() / FAST).clamp(least, most));
        let probe = Probe { backend, model, sizes, spend };
        let mut rates = Work::default();
        probe.dense(&mut rates);
        probe.attention(&mut rates);
        probe.experts(&mut rates);
        probe.head(&mut rates);
        probe.few_rows(&mut rates);
        probe.update(&mut rates);
        Self(rates)
    }
}

struct Probe<'a, B: Backend> {
    backend: &'a B,
    model: &'a ModelConfig,
    sizes: Sizes,
    /// How long a measurement is repeated.
    spend: Duration,
}

impl<B: Backend> Probe<'_, B> {
    /// The seconds of the fastest of some runs. The first one also warms up; where it takes long, it is the measurement.
    fn fastest(&self, mut run: impl FnMut()) -> f64 {
        let begin = Instant::now();
        let mut best = f64::INFINITY;
        while best.is_infinite() || begin.elapsed() < self.spend {
            let start = Instant::now();
            run();
            best = best.min(start.elapsed().as_secs_f64());
        }
        best.max(1e-9)
    }

    fn weight(&self, rows: usize, cols: usize) -> B::Weight {
        let dtype = self.sizes.dtype;
        let bytes = vec![0; rows * cols * dtype.size()];
        self.backend.weight(HostTensor { dtype, shape: vec![rows, cols], bytes: bytes.into() })
    }

    fn tensor(&self, rows: usize, cols: usize) -> B::Tensor {
        let values: Vec<f32> = (0..rows * cols).map(|i| (i % 61) as f32 / 61.0 - 0.5).collect();
        self.backend.upload(rows, cols, &values)
    }

    /// Waits for everything that a device has been given to do.
    fn finish(&self, x: &B::Tensor) {
        drop(self.backend.download(&self.backend.gather_rows(x, &self.backend.indices(&[0]))));
    }

    /// Rows of a product that takes `per_row` operations a row.
    fn rows(&self, wanted: usize, per_row: usize) -> usize {
        wanted.clamp(1, ROWS).min((FLOPS / per_row.max(1)).max(32))
    }

    /// The four projections of attention with the norm before them and the rotation.
    fn dense(&self, rates: &mut Work) {
        let (b, d) = (self.backend, self.model.hidden_size);
        let heads = &self.model.heads[0];
        let (q, kv) = (heads.queries * heads.dim, heads.keys * heads.dim);
        let per_row = 2 * d * (2 * q + 2 * kv);
        let rows = self.rows(self.sizes.rows, per_row);
        let seqs = b.sequences(&Packing::of_lengths([rows]), &self.model.rope);
        let norm = b.weight(HostTensor::from_f32(vec![d], &vec![1.0; d]));
        let [wq, wk, wv] = [self.weight(q, d), self.weight(kv, d), self.weight(kv, d)];
        let (wo, router) = (self.weight(d, q), self.weight(self.model.num_experts.max(1), d));
        let (x, dq, dkv) = (self.tensor(rows, d), self.tensor(rows, q), self.tensor(rows, kv));
        let work = (rows * per_row) as f64;
        rates[Kind::Dense] = work
            / self.fastest(|| {
                let normed = b.rms_norm(&x, &norm, 1e-5);
                let (mut queries, mut keys) = (b.linear(&normed, &wq, None), b.linear(&normed, &wk, None));
                drop(b.linear(&normed, &wv, None));
                b.rope(&mut queries, heads.dim, &seqs);
                b.rope(&mut keys, heads.dim, &seqs);
                let mut y = b.linear(&queries, &wo, None);
                b.add_assign(&mut y, &x);
                let logits = b.router_logits(&b.rms_norm(&y, &norm, 1e-5), &router);
                self.finish(&logits);
            });
        rates[Kind::DenseInput] = work
            / self.fastest(|| {
                drop(b.linear_backward_input(&x, &wo));
                let mut dx = b.linear_backward_input(&dq, &wq);
                b.add_linear_backward_input(&dkv, &wk, &mut dx);
                b.add_linear_backward_input(&dkv, &wv, &mut dx);
                let mut dx = b.rms_norm_backward(&dx, &x, &norm, 1e-5, None);
                b.add_assign(&mut dx, &x);
                self.finish(&b.rms_norm_backward(&dx, &x, &norm, 1e-5, None));
            });
    }

    fn attention(&self, rates: &mut Work) {
        let (b, heads) = (self.backend, &self.model.heads[0]);
        let (q, kv) = (heads.queries * heads.dim, heads.keys * heads.dim);
        let length = self.sizes.length.clamp(16, 1024);
        let sequences = (ROWS / length).max(1);
        let rows = length * sequences;
        let seqs = b.sequences(&Packing::of_lengths(vec![length; sequences]), &self.model.rope);
        let (query, key, value) = (self.tensor(rows, q), self.tensor(rows, kv), self.tensor(rows, kv));
        let seen = (length as f64 / 2.0).min(heads.window.unwrap_or(usize::MAX) as f64);
        let work = 4.0 * seen * (rows * q) as f64;
        let (y, normaliser) = b.attention(&query, &key, &value, &seqs, heads);
        rates[Kind::Attention] =
            work / self.fastest(|| self.finish(&b.attention(&query, &key, &value, &seqs, heads).0));
        rates[Kind::AttentionBackward] = 2.5 * work
            / self.fastest(|| {
                let (dq, ..) = b.attention_backward(&query, &query, &key, &value, (&y, &normaliser), &seqs, heads);
                self.finish(&dq);
            });
    }

    /// A few experts, each with as many rows as in a micro-batch of the run.
    fn experts(&self, rates: &mut Work) {
        let (b, d, f) = (self.backend, self.model.hidden_size, self.model.expert_width);
        let (num_experts, top_k) = (self.model.num_experts.max(1), self.model.num_experts_per_tok.max(1));
        let per_row = 6 * d * f;
        let each = self.rows((self.sizes.rows * top_k).div_ceil(num_experts), 2 * per_row);
        let experts = (FLOPS / (per_row * each)).clamp(2, 16).min(num_experts);
        let top_k = top_k.min(experts);
        let tokens = (experts * each).div_ceil(top_k);
        // Token t takes the experts t, t + 1, ...: all have equally many rows, but for a rest.
        let mut logits = vec![0.0; tokens * experts];
        for (token, logits) in logits.chunks_exact_mut(experts).enumerate() {
            (0..top_k).for_each(|k| logits[(token * top_k + k) % experts] = 1.0);
        }
        let routing = b.route(&b.upload(tokens, experts, &logits), top_k, false);
        let dispatch = b.dispatch(&routing, experts);
        let weights = |rows, cols| -> Vec<B::Weight> { (0..experts).map(|_| self.weight(rows, cols)).collect() };
        let (gate, up, down) = (weights(f, d), weights(f, d), weights(d, f));
        let stacks: Vec<Vec<&B::Weight>> = gate.iter().zip(&up).map(|(g, u)| vec![g, u]).collect();
        let down: Vec<Vec<&B::Weight>> = down.iter().map(|w| vec![w]).collect();
        let (stacks, down): (&Stacks<'_, B::Weight>, &Stacks<'_, B::Weight>) = (&stacks, &down);
        let x = self.tensor(tokens, d);
        let work = (tokens * top_k * per_row) as f64;

        let gate_up = b.grouped_linear(&b.dispatch_rows(&x, &dispatch), stacks, &dispatch);
        rates[Kind::Experts] = work
            / self.fastest(|| {
                let gate_up = b.grouped_linear(&b.dispatch_rows(&x, &dispatch), stacks, &dispatch);
                let weighted = b.weighted_swiglu(&gate_up, &routing, &dispatch);
                self.finish(&b.combine_rows(&b.grouped_linear(&weighted, down, &dispatch), &dispatch));
            });
        rates[Kind::ExpertsInput] = work
            / self.fastest(|| {
                let dy = b.dispatch_rows(&x, &dispatch);
                let d_weighted = b.grouped_linear_backward_input(&dy, down, &dispatch);
                let (d_gate_up, d_weights) = b.weighted_swiglu_backward(d_weighted, &gate_up, &routing, &dispatch);
                drop(b.route_backward(&d_weights, &routing));
                let dx = b.grouped_linear_backward_input(&d_gate_up, stacks, &dispatch);
                self.finish(&b.combine_rows(&dx, &dispatch));
            });
        let dy = b.dispatch_rows(&x, &dispatch);
        let mut scores = b.scores(experts);
        let mut gradients = |plans: [Vec<ExpertGrad>; 2], len: usize| {
            let mut buffer = b.buffer(len);
            work / self.fastest(|| {
                let rows = b.dispatch_rows(&x, &dispatch);
                let weighted = b.weighted_swiglu(&gate_up, &routing, &dispatch);
                let (sink, sums) = (&mut buffer, &mut scores);
                b.grouped_linear_backward_weight(&dy, &weighted, down, &dispatch, &plans[0], sink, sums);
                b.grouped_linear_backward_weight(&gate_up, &rows, stacks, &dispatch, &plans[1], sink, sums);
                self.finish(&x);
            })
        };
        let plan = |of: &dyn Fn(usize) -> ExpertGrad| -> Vec<ExpertGrad> { (0..experts).map(of).collect() };
        let score = || plan(&|e| ExpertGrad::Score(GradReduction::Abs, e));
        rates[Kind::ExpertScores] = gradients([score(), score()], 0);
        let sums = [
            plan(&|e| ExpertGrad::Accumulate(vec![3 * e * d * f])),
            plan(&|e| ExpertGrad::Accumulate(vec![(3 * e + 1) * d * f, (3 * e + 2) * d * f])),
        ];
        rates[Kind::Gradients] = gradients(sums, 3 * experts * d * f);
    }

    fn head(&self, rates: &mut Work) {
        let (b, d) = (self.backend, self.model.hidden_size);
        let rows = self.sizes.loss_rows.clamp(1, ROWS);
        let classes = self.model.vocab_size.min((FLOPS / (2 * d * rows)).max(1024));
        let (x, head) = (self.tensor(rows, d), self.weight(classes, d));
        let targets = b.indices(&(0..rows as u32).map(|row| row % classes as u32).collect::<Vec<_>>());
        let work = (2 * rows * d * classes) as f64;
        rates[Kind::Head] = work
            / self.fastest(|| {
                b.linear_cross_entropy(&x, &head, &targets);
            });
        rates[Kind::HeadBackward] = 2.0 * work
            / self.fastest(|| self.finish(&b.linear_cross_entropy_backward(&x, &head, &targets, 1.0, None).1));
    }

    /// A product with as many rows as a batch of generation has sequences. Its weights are those of a layer, if these are not many:
    /// whether they stay in a cache decides the rate.
    fn few_rows(&self, rates: &mut Work) {
        let (b, d) = (self.backend, self.model.hidden_size);
        let active = 4 * d + 3 * self.model.expert_width * self.model.num_experts_per_tok;
        let outputs = active.min((FLOPS / (2 * d * self.sizes.generated.max(1))).max(d));
        let (x, weight) = (self.tensor(self.sizes.generated.clamp(1, ROWS), d), self.weight(outputs, d));
        rates[Kind::FewRows] = (outputs * d) as f64 / self.fastest(|| self.finish(&b.linear(&x, &weight, None)));
    }

    /// The norm of a gradient, AdamW, and the new weights.
    fn update(&self, rates: &mut Work) {
        let (b, n, dtype) = (self.backend, ELEMENTS, self.sizes.dtype);
        let [mut master, mut m, mut v, mut gradient] = std::array::from_fn(|_| b.buffer(n));
        let mut weight = b.random_weight(dtype, vec![1, n], 0, 0.02);
        let step =
            AdamwStep { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
        rates[Kind::Update] = n as f64
            / self.fastest(|| {
                b.sum_squares(&gradient, 0..n);
                let written = vec![(0..n, &mut weight)];
                b.adamw_weights(&mut master, &mut m, &mut v, 0..n, &gradient, 0, &step, written);
                b.buffer_clear(&mut gradient);
                drop(b.buffer_read(&gradient, 0..1));
            });
        rates[Kind::Random] = n as f64 / self.fastest(|| drop(b.random_weight(dtype, vec![1, n], 0, 0.02)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::{Caches, Cpu, Instructions, Products};
    use crate::backend::{Heads, Rope};
    use crate::run::forecast::work::tests::olmoe;

    #[test]
    fn every_kind_of_work_has_a_rate_at_any_size() {
        let heads = Heads { queries: 4, keys: 2, dim: 4, window: None };
        let rope = Rope { inv_freq: vec![1.0; 2], scale: 1.0 };
        let mut model = ModelConfig { hidden_size: 8, vocab_size: 20, expert_width: 4, rope, ..olmoe() };
        model.heads.fill(heads);
        for (num_experts, num_experts_per_tok, rows, loss_rows) in [(1, 1, 0, 0), (3, 2, 5, 1), (64, 8, 700, 600)] {
            model = ModelConfig { num_experts, num_experts_per_tok, ..model };
            let sizes = Sizes { rows, length: rows, loss_rows, generated: rows, dtype: Dtype::Bf16 };
            let bf16 = Products::new(Instructions::Portable, Caches::detect());
            for products in [None, Some(bf16)] {
                let rates = Rates::measure(&Cpu::new(1).with_products(products), &model, sizes, &Work::default());
                for kind in Kind::ALL {
                    let seconds = rates.seconds(&Work::of(kind, 1e6));
                    assert!(seconds > 0.0 && seconds.is_finite(), "{kind:?}: {seconds}");
                }
            }
        }
    }
}
