//! The operations of one layer, in the order of a pass, each with its minimum of bytes or FLOP.

use std::sync::Arc;

use moewarden::backend::cuda::gpu::Gpu;
use moewarden::backend::cuda::plan::{self, Form, Grouped, Operation};
use moewarden::backend::cuda::pool::Reuse;
use moewarden::backend::cuda::{Buffer, Cuda, Dispatch, Tensor, Weight};
use moewarden::backend::{AdamwStep, Backend, Dtype, ExpertGrad, GradReduction, Heads, HostTensor, Packing, Rope};

use crate::report::{Report, Work, bytes, product};

/// Sizes of a model: width, attention, width and number of experts, experts per token, vocabulary.
pub struct Shape {
    pub model: &'static str,
    pub d: usize,
    pub heads: usize,
    pub kv: usize,
    pub dim: usize,
    pub f: usize,
    pub experts: usize,
    pub top_k: usize,
    pub v: usize,
}

/// Bytes of an element of an activation or a weight.
const A: usize = 2;
/// One in this many experts is trained.
const TRAINED: usize = 16;

/// The same pseudo-random numbers in [-scale, scale) every time.
fn noise(n: usize, scale: f32) -> Vec<f32> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
    };
    (0..n).map(|_| next()).collect()
}

/// A random weight, made on the GPU.
fn weight(b: &Cuda, rows: usize, cols: usize) -> Weight {
    b.random_weight(Dtype::Bf16, vec![rows, cols], 1, 0.02)
}

/// Random rows, made on the GPU.
pub fn noise_rows(b: &Cuda, rows: usize, cols: usize, scale: f32) -> Tensor {
    let w = b.random_weight(Dtype::Bf16, vec![rows, cols], 3, scale);
    b.embedding(&b.indices(&(0..rows as u32).collect::<Vec<_>>()), &w)
}

/// Times every operation for these sequences.
pub fn run(report: &mut Report, gpu: &Arc<dyn Gpu>, shape: &Shape, lengths: &[usize]) {
    let cuda = Cuda::new(gpu.clone(), Dtype::Bf16, Reuse::Segments);
    let packing = Packing::of_lengths(lengths.iter().copied());
    let t = packing.rows();
    let x = noise_rows(&cuda, t, shape.d, 1.0);
    rows(report, &cuda, shape, &x);
    attention(report, &cuda, shape, &packing, &x);
    head(report, &cuda, shape, &x);
    experts(report, gpu, &cuda, shape, &x);
    updates(report, &cuda, shape);
}

/// Operations on rows and elements.
fn rows(report: &Report, b: &Cuda, shape: &Shape, x: &Tensor) {
    let (t, d) = b.shape(x);
    let one = t * d * A;
    let mut y = b.zeros_like(x);
    report.time("add_assign", bytes(3 * one), || b.add_assign(&mut y, x));
    report.time("clamp", bytes(2 * one), || b.clamp(&mut y, 8.0));
    report.time("clamp_backward", bytes(3 * one), || b.clamp_backward(&mut y, x, 8.0));
    let columns = b.indices(&[0, 1, 2, 3]);
    report.time("fill_columns, 4", bytes(16 * t), || b.fill_columns(&mut y, &columns, 0.0));
    let half = b.indices(&(0..t as u32).step_by(2).collect::<Vec<_>>());
    let picked = b.gather_rows(x, &half);
    report.time("gather_rows, every second", bytes(one), || b.gather_rows(x, &half));
    report.time("gather_rows_backward", bytes(3 * one / 2), || b.gather_rows_backward(&picked, &half, &mut y));
    report.time("write_rows, every second", bytes(one), || b.write_rows(&mut y, &half, &picked));
    let norm = b.weight(HostTensor::encode(Dtype::Bf16, vec![d], &vec![1.0; d]));
    report.time("rms_norm", bytes(2 * one), || b.rms_norm(x, &norm, 1e-5));
    report.time("rms_norm_backward, frozen", bytes(3 * one), || b.rms_norm_backward(&y, x, &norm, 1e-5, None));
    let mut dw = b.buffer(d);
    report.time("rms_norm_backward", bytes(3 * one), || b.rms_norm_backward(&y, x, &norm, 1e-5, Some((&mut dw, 0))));
    let gate = b.upload(t, 1, &noise(t, 1.0));
    report.time("sigmoid_gate", bytes(2 * one), || b.sigmoid_gate(x, &gate));
    report.time("sigmoid_gate_backward", bytes(3 * one), || b.sigmoid_gate_backward(&y, x, &gate));

    let q = shape.heads * shape.dim;
    let (w, dy) = (weight(b, q, d), b.zeros(t, q));
    let (flops, operands) = (2 * t * d * q, (t * d + t * q) * A);
    report.time("linear (queries)", product(flops, operands + d * q * A), || b.linear(x, &w, None));
    let bias = b.weight(HostTensor::encode(Dtype::Bf16, vec![q], &noise(q, 0.05)));
    report.time("linear, with a bias", product(flops, operands + d * q * A), || b.linear(x, &w, Some(&bias)));
    let stored = b.random_weight(Dtype::F16, vec![q, d], 1, 0.02);
    report.time("linear of a weight in F16", product(flops, operands + 3 * d * q * A), || b.linear(x, &stored, None));
    report.time("linear_backward_input", product(flops, operands + d * q * A), || b.linear_backward_input(&dy, &w));
    let mut dw = b.buffer(d * q);
    report.time("linear_backward_weight", product(flops, operands + 8 * d * q), || {
        b.linear_backward_weight(&dy, x, &mut dw, 0)
    });
    report.time("bias_backward", bytes(t * q * A), || b.bias_backward(&dy, &mut dw, 0));
}

/// Rotary embedding and attention, in the chosen form.
fn attention(report: &Report, b: &Cuda, shape: &Shape, packing: &Packing, x: &Tensor) {
    let (t, dim) = (b.shape(x).0, shape.dim);
    let inv_freq = (0..dim / 2).map(|i| 10_000f32.powf(-2.0 * i as f32 / dim as f32)).collect();
    let seqs = b.sequences(packing, &Rope { inv_freq, scale: 1.0 });
    let heads = Heads { queries: shape.heads, keys: shape.kv, dim, window: None };
    let (q_size, kv_size) = (t * heads.queries * dim, t * heads.keys * dim);
    let mut q = noise_rows(b, t, heads.queries * dim, 1.0);
    let [k, v] = [0; 2].map(|_| noise_rows(b, t, heads.keys * dim, 1.0));
    report.time("rope (queries)", bytes(2 * q_size * A), || b.rope(&mut q, dim, &seqs));
    report.time("rope_backward", bytes(2 * q_size * A), || b.rope_backward(&mut q, dim, &seqs));

    let pairs: usize = packing.queries.windows(2).map(|w| (w[1] - w[0]) * (w[1] - w[0] + 1) / 2).sum();
    let flops = 4 * pairs * heads.queries * dim;
    let form = plan::attention(dim, Dtype::Bf16, b.gpu().architecture());
    let (y, normaliser) = b.attention(&q, &k, &v, &seqs, &heads);
    let forward = product(flops, 2 * (q_size + kv_size) * A);
    report.time(&format!("attention: {form}"), forward, || b.attention(&q, &k, &v, &seqs, &heads));
    // The backward has five products, the forward two.
    let backward = product(flops * 5 / 2, (4 * q_size + 4 * kv_size) * A);
    report.time(&format!("attention_backward: {form}"), backward, || {
        b.attention_backward(&y, &q, &k, &v, (&y, &normaliser), &seqs, &heads)
    });
}

/// Embedding and loss.
fn head(report: &Report, b: &Cuda, shape: &Shape, x: &Tensor) {
    let ((t, d), v) = (b.shape(x), shape.v);
    let w = weight(b, v, d);
    let ids: Vec<u32> = (0..t).map(|i| (i * 7919 % v) as u32).collect();
    let ids = b.indices(&ids);
    report.time("embedding", bytes(2 * t * d * A), || b.embedding(&ids, &w));
    let mut dw = b.buffer(v * d);
    report.time("embedding_backward", bytes(t * d * (A + 8)), || b.embedding_backward(x, &ids, &mut dw, 0));
    let (flops, operands) = (2 * t * d * v, (t * d + v * d) * A);
    report.time("linear_cross_entropy", product(flops, operands), || b.linear_cross_entropy(x, &w, &ids));
    report.time("linear_cross_entropy_rows", product(flops, operands), || b.linear_cross_entropy_rows(x, &w, &ids));
    report.time("linear_cross_entropy_backward, frozen head", product(2 * flops, operands + t * d * A), || {
        b.linear_cross_entropy_backward(x, &w, &ids, 1.0, None)
    });
    report.time("linear_cross_entropy_backward", product(3 * flops, operands + t * d * A + 8 * v * d), || {
        b.linear_cross_entropy_backward(x, &w, &ids, 1.0, Some((&mut dw, 0)))
    });
    report.time("linear_kl", product(2 * flops, 2 * operands), || b.linear_kl(x, &w, x, &w));
    report.time("linear_kl_backward, frozen head", product(3 * flops, 2 * operands + t * d * A), || {
        b.linear_kl_backward(x, &w, x, &w, 1.0, None)
    });
}

/// Router, sort, and the experts in all forms.
fn experts(report: &mut Report, gpu: &Arc<dyn Gpu>, b: &Cuda, shape: &Shape, x: &Tensor) {
    let Shape { d, f, experts, top_k, .. } = *shape;
    let t = b.shape(x).0;
    let rows = t * top_k;
    let router = weight(b, experts, d);
    let logits = b.router_logits(x, &router);
    let routing = b.route(&logits, top_k, true);
    let dispatch = b.dispatch(&routing, experts);
    let work = product(2 * t * d * experts, (t + experts) * d * A + 4 * t * experts);
    report.time("router_logits", work, || b.router_logits(x, &router));
    report.time("route", bytes(8 * t * experts + 8 * rows), || b.route(&logits, top_k, true));
    let (mut silenced, few) = (b.route(&logits, top_k, true), b.indices(&[0, 1, 2, 3]));
    report.time("zero_routing_weights, 4", bytes(8 * rows), || b.zero_routing_weights(&mut silenced, &few));
    report.time("dispatch", bytes(16 * rows), || b.dispatch(&routing, experts));
    report.time("dispatch, and waiting for its counts", bytes(16 * rows), || {
        b.tokens_per_expert(&b.dispatch(&routing, experts))
    });
    let mut dlogits = b.zeros_like(&logits);
    let dy = noise(experts, 1.0);
    let base = b.download(&logits);
    report.time("softmax_kl", bytes(8 * t * experts), || b.softmax_kl(&logits, &base));
    report.time("softmax_kl_backward", bytes(16 * t * experts), || {
        b.softmax_kl_backward(&base, &logits, 1.0, &mut dlogits)
    });
    report.time("softmax_sum", bytes(4 * t * experts), || b.softmax_sum(&logits, 0..t));
    report.time("softmax_sum_backward", bytes(12 * t * experts), || {
        b.softmax_sum_backward(&dy, &logits, 0..t, &mut dlogits)
    });
    let (halves, both) = ([0..t / 2, t / 2..t], noise(2 * experts, 1.0));
    report.time("segment_sum", bytes(4 * t * experts), || b.segment_sum(&logits, &halves));
    report
        .time("segment_sum_backward", bytes(8 * t * experts), || b.segment_sum_backward(&both, &halves, &mut dlogits));
    report.time("dispatch_rows", bytes((t + rows) * d * A), || b.dispatch_rows(x, &dispatch));

    let sorted = b.dispatch_rows(x, &dispatch);
    report.time("combine_rows", bytes((t + rows) * d * A), || b.combine_rows(&sorted, &dispatch));
    let [gate_up, down] = [(f, d, 2), (d, f, 1)].map(|(outputs, inputs, stack)| {
        let weights = (0..experts * stack).map(|_| weight(b, outputs, inputs)).collect();
        Products { name: if stack == 2 { "gate+up" } else { "down" }, weights, stack, inputs, outputs }
    });
    let forms = Forms::new(gpu, b);
    let both = b.grouped_linear(&sorted, &gate_up.stacks(), &dispatch);
    gate_up.run(report, &forms, &dispatch, &sorted, &both);
    report.time("swiglu", bytes(3 * rows * f * A), || b.swiglu(&both));
    let a = b.swiglu(&both);
    report.time("swiglu_backward", bytes(5 * rows * f * A), || b.swiglu_backward(&a, &both));
    report.time("weighted_swiglu", bytes(3 * rows * f * A), || b.weighted_swiglu(&both, &routing, &dispatch));
    report.time("swiglu and weighted_swiglu_backward", bytes(8 * rows * f * A), || {
        b.weighted_swiglu_backward(b.swiglu(&both), &both, &routing, &dispatch)
    });
    let (_, dweights) = b.weighted_swiglu_backward(b.swiglu(&both), &both, &routing, &dispatch);
    drop(both);
    report.time("route_backward", bytes(8 * t * experts), || b.route_backward(&dweights, &routing));
    down.run(report, &forms, &dispatch, &a, &sorted);
}

/// The backend once for each form of grouped products.
struct Forms<'a> {
    chosen: &'a Cuda,
    /// The forms that this GPU supports.
    all: Vec<(Form, Cuda)>,
}

impl<'a> Forms<'a> {
    fn new(gpu: &Arc<dyn Gpu>, chosen: &'a Cuda) -> Self {
        let cuda = || Cuda::new(gpu.clone(), Dtype::Bf16, Reuse::Segments);
        let mut all = vec![(Form::EachGroup, cuda().with_forms(|_, _| Form::EachGroup))];
        match gpu.architecture().sm {
            ..80 => all.push((Form::Arithmetic, cuda().with_forms(|_, _| Form::Arithmetic))),
            sm => {
                all.push((Form::TensorCores, cuda().with_forms(|_, _| Form::TensorCores)));
                if sm == 90 {
                    all.push((Form::Warpgroups, cuda().with_forms(|_, _| Form::Warpgroups)));
                    all.push((Form::WideWarpgroups, cuda().with_forms(|_, _| Form::WideWarpgroups)));
                }
            }
        }
        Self { chosen, all }
    }

    fn of(&self, form: Form) -> &Cuda {
        let found = self.all.iter().find(|(this, _)| *this == form);
        &found.expect("one of those that this GPU can run").1
    }

    /// The form chosen for a shape, then the others.
    fn order(&self, shape: &Grouped) -> Vec<Form> {
        let chosen = shape.form(self.chosen.gpu().architecture());
        let others = self.all.iter().map(|(form, _)| *form).filter(|&form| form != chosen);
        std::iter::once(chosen).chain(others).collect()
    }
}

/// One of the experts' products.
struct Products {
    name: &'static str,
    weights: Vec<Weight>,
    /// Weights per expert.
    stack: usize,
    inputs: usize,
    outputs: usize,
}

impl Products {
    fn stacks(&self) -> Vec<Vec<&Weight>> {
        self.weights.chunks(self.stack).map(|weights| weights.iter().collect()).collect()
    }

    fn run(&self, report: &mut Report, forms: &Forms<'_>, dispatch: &Dispatch, x: &Tensor, dy: &Tensor) {
        let b = forms.chosen;
        let (stacks, experts) = (self.stacks(), self.weights.len() / self.stack);
        let (rows, width, size) = (b.shape(x).0, self.stack * self.outputs, self.inputs * self.outputs);
        let (inputs, outputs) = (self.inputs, self.outputs);
        let order =
            |operation| forms.order(&Grouped { operation, rows, groups: experts, inputs, outputs, dtype: Dtype::Bf16 });
        let (products, scored, added) =
            (order(Operation::Product), order(Operation::Scores), order(Operation::Gradients));
        let name = |what: &str| format!("{} {what}", self.name);
        let (flops, operands) = (2 * rows * self.inputs * width, rows * (self.inputs + width) * A);

        let all = product(flops, operands + self.weights.len() * size * A);
        report.compare(&name("forward"), all, &products, |form| forms.of(form).grouped_linear(x, &stacks, dispatch));
        report.compare(&name("backward_input"), all, &products, |form| {
            forms.of(form).grouped_linear_backward_input(dy, &stacks, dispatch)
        });

        let (mut scores, mut nothing) = (b.scores(experts), b.buffer(1));
        let plan: Vec<_> = (0..experts).map(|e| ExpertGrad::Score(GradReduction::Abs, e)).collect();
        report.compare(&name("gradient magnitude"), product(flops, operands), &scored, |form| {
            let b = forms.of(form);
            b.grouped_linear_backward_weight(dy, x, &stacks, dispatch, &plan, &mut nothing, &mut scores)
        });

        for (moment, read) in
            [(GradReduction::Square, 0), (GradReduction::AbsTimesWeight, self.weights.len() * size * A)]
        {
            let plan: Vec<_> = (0..experts).map(|e| ExpertGrad::Score(moment, e)).collect();
            let what = name(&format!("gradient magnitude, {moment:?}: {}", scored[0]));
            report.time(&what, product(flops, operands + read), || {
                b.grouped_linear_backward_weight(dy, x, &stacks, dispatch, &plan, &mut nothing, &mut scores)
            });
        }

        let trained = experts.div_ceil(TRAINED);
        let mut dw: Buffer = b.buffer(trained * self.stack * size);
        let place = |e: usize| (0..self.stack).map(|i| (e * self.stack + i) * size).collect();
        let add = |e: usize| if e < trained { ExpertGrad::Accumulate(place(e)) } else { ExpertGrad::Skip };
        let plan: Vec<_> = (0..experts).map(add).collect();
        let counts = b.tokens_per_expert(dispatch);
        let part = counts[..trained].iter().sum::<usize>() as f64 / rows as f64;
        let gradients = (8 * trained * self.stack * size) as f64;
        let work = Work { flops: flops as f64 * part, bytes: operands as f64 * part + gradients };
        report.compare(&name(&format!("gradients of {trained} of {experts}")), work, &added, |form| {
            let b = forms.of(form);
            b.grouped_linear_backward_weight(dy, x, &stacks, dispatch, &plan, &mut dw, &mut scores)
        });
    }
}

/// The update of the trained experts of a layer.
fn updates(report: &Report, b: &Cuda, shape: &Shape) {
    let (rows, cols) = (3 * shape.f * shape.experts.div_ceil(TRAINED), shape.d);
    let n = rows * cols;
    let [mut master, mut m, mut v, grad] = [0; 4].map(|_| b.buffer(n));
    let mut w = b.weight(HostTensor::encode(Dtype::Bf16, vec![rows, cols], &vec![0.5; n]));
    let step = AdamwStep { lr: 1e-4, beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, step: 1, grad_scale: 1.0 };
    report.time("random_weight", bytes(A * n), || b.random_weight(Dtype::Bf16, vec![rows, cols], 1, 0.02));
    report.time("adamw", bytes(28 * n), || b.adamw(&mut master, &mut m, &mut v, 0..n, &grad, 0, &step));
    report.time("adamw_weights", bytes((28 + A) * n), || {
        let written = vec![(0..n, &mut w)];
        b.adamw_weights(&mut master, &mut m, &mut v, 0..n, &grad, 0, &step, written)
    });
    report.time("sum_squares", bytes(4 * n), || b.sum_squares(&grad, 0..n));
    report.time("set_weight", bytes((4 + A) * n), || b.set_weight(&mut w, &master, 0..n));
    report.time("read_weight", bytes((4 + A) * n), || b.read_weight(&w, 0..n, &mut master, 0));
}
