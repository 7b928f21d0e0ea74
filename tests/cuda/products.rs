//! Grouped products, gradient magnitudes and attention of the GPU backend with emulated kernels, against the CPU
//! backend: every form, odd sizes, F32 and BF16, blocks in any order. With `MOEWARDEN_TEST_GPU=0` the same comparisons
//! run on that GPU.

use std::sync::Arc;

use crate::emulator::device;
use crate::values::{Rng, assert_close, wide};
use moewarden::backend::cpu::Cpu;
use moewarden::backend::cuda::Cuda;
use moewarden::backend::cuda::gpu::Gpu;
use moewarden::backend::cuda::plan::{AttentionForm, Form};
use moewarden::backend::cuda::pool::Reuse;
use moewarden::backend::{Backend, Dtype, ExpertGrad, GradReduction, Heads, HostTensor, Packing, Rope};

/// F32 sums of at most a few hundred products of numbers below 1, in another order.
const F32: (f64, f64, &str) = (3e-5, 3e-5, "f32 sums in another order");
/// The same, rounded to bf16: half a unit in the last of 8 bits.
const BF16: (f64, f64, &str) = (1e-4, 1.0 / 256.0, "f32 sums rounded to bf16");

/// Real tensor cores truncate sums towards zero where f32 arithmetic would round: an error of up to 2^-22 per 16
/// products.
const CUT: (f64, f64, &str) = (1e-4, 1e-4, "f32 sums on tensor cores");
const CUT_SCORES: f64 = 1e-5;

fn close(got: &[f32], want: &[f32], dtype: Dtype, what: &str) {
    near(got, want, if dtype == Dtype::F32 { F32 } else { BF16 }, what);
}

fn near(got: &[f32], want: &[f32], (abs, rel, why): (f64, f64, &str), what: &str) {
    assert_close(got, &wide(want), abs, rel, &format!("{what}: {why}"));
}

fn cuda(gpu: Arc<dyn Gpu>, dtype: Dtype, form: Form) -> Cuda {
    // Allocations of the exact size, so that accesses beyond them are detected.
    let cuda = Cuda::new(gpu, dtype, Reuse::Never);
    match form {
        Form::EachGroup => cuda.with_forms(|_, _| Form::EachGroup),
        Form::TensorCores => cuda.with_forms(|_, _| Form::TensorCores),
        Form::Warpgroups => cuda.with_forms(|_, _| Form::Warpgroups),
        Form::WideWarpgroups => cuda.with_forms(|_, _| Form::WideWarpgroups),
        Form::Arithmetic => cuda.with_forms(|_, _| Form::Arithmetic),
    }
}

/// Whether the device supports this form.
fn runs(form: &Form) -> bool {
    let wgmma = matches!(form, Form::Warpgroups | Form::WideWarpgroups);
    !device::is_real() || !wgmma || device::gpu().architecture().sm == 90
}

fn attending(gpu: Arc<dyn Gpu>, dtype: Dtype, form: AttentionForm) -> Cuda {
    let cuda = Cuda::new(gpu, dtype, Reuse::Never);
    match form {
        AttentionForm::TensorCores(64) => cuda.with_attention_forms(|_, _, _| AttentionForm::TensorCores(64)),
        AttentionForm::TensorCores(_) => cuda.with_attention_forms(|_, _, _| AttentionForm::TensorCores(128)),
        AttentionForm::Arithmetic => cuda.with_attention_forms(|_, _, _| AttentionForm::Arithmetic),
    }
}

/// Values rounded to `dtype`.
fn rounded(dtype: Dtype, values: Vec<f32>) -> Vec<f32> {
    HostTensor::encode(dtype, vec![values.len()], &values).to_f32()
}

/// One call of each grouped product.
struct Case {
    dtype: Dtype,
    counts: Vec<usize>,
    stack: usize,
    inputs: usize,
    outputs: usize,
    x: Vec<f32>,
    dy: Vec<f32>,
    weights: Vec<HostTensor>,
    plan: Vec<ExpertGrad>,
    start: Vec<f32>,
}

#[derive(Debug, PartialEq)]
struct Results {
    y: Vec<f32>,
    dx: Vec<f32>,
    dw: Vec<f32>,
    /// The gradients of one pass in a buffer that was cleared, and in one of zeros.
    stored: [Vec<f32>; 2],
    scores: Vec<f64>,
}

impl Case {
    fn new(seed: u64, dtype: Dtype, counts: &[usize], [stack, inputs, outputs]: [usize; 3]) -> Self {
        let mut rng = Rng::new(seed);
        let (rows, size) = (counts.iter().sum::<usize>(), inputs * outputs);
        let mut values = |n: usize| rounded(dtype, rng.values(n, 0.5));
        let (x, dy) = (values(rows * inputs), values(rows * stack * outputs));
        let weights = (0..counts.len() * stack)
            .map(|_| HostTensor::encode(dtype, vec![outputs, inputs], &values(size)))
            .collect();
        // Skipped, accumulated with gaps and in descending order, and every moment.
        let place = |group: usize, index: usize| ((counts.len() - group) * stack - index) * (size + 1);
        let plan = (0..counts.len())
            .map(|g| match (g + seed as usize) % 5 {
                0 => ExpertGrad::Skip,
                1 => ExpertGrad::Accumulate((0..stack).map(|i| place(g, i)).collect()),
                2 => ExpertGrad::Score(GradReduction::Abs, counts.len() - g),
                3 => ExpertGrad::Score(GradReduction::Square, counts.len() - g),
                _ => ExpertGrad::Score(GradReduction::AbsTimesWeight, counts.len() - g),
            })
            .collect();
        let start = Rng::new(seed + 1).values((counts.len() * stack + 1) * (size + 1), 1.0);
        Self { dtype, counts: counts.to_vec(), stack, inputs, outputs, x, dy, weights, plan, start }
    }

    fn run<B: Backend>(&self, b: &B) -> Results {
        let groups = self.counts.len();
        // The tokens of all groups are shuffled; x and dy are given in sorted order.
        let mut ids: Vec<usize> = self.counts.iter().enumerate().flat_map(|(g, &n)| vec![g; n]).collect();
        let mut rng = Rng::new(9);
        (1..ids.len()).for_each(|i| ids.swap(i, rng.below(i + 1)));
        let logits: Vec<f32> =
            ids.iter().flat_map(|&id| (0..groups).map(move |g| if g == id { 9.0 } else { 0.0 })).collect();
        let routing = b.route(&b.upload(ids.len(), groups, &logits), 1, false);
        let dispatch = b.dispatch(&routing, groups);
        let weights: Vec<B::Weight> = self.weights.iter().map(|w| b.weight(w.clone())).collect();
        let stacks: Vec<Vec<&B::Weight>> = weights.chunks(self.stack).map(|c| c.iter().collect()).collect();
        let x = b.upload(ids.len(), self.inputs, &self.x);
        let dy = b.upload(ids.len(), self.stack * self.outputs, &self.dy);
        let y = b.download(&b.grouped_linear(&x, &stacks, &dispatch));
        let dx = b.download(&b.grouped_linear_backward_input(&dy, &stacks, &dispatch));
        let (mut dw, mut scores) = (b.buffer(self.start.len()), b.scores(groups + 1));
        b.buffer_write(&mut dw, 0, &self.start);
        // Twice: sums accumulate.
        for _ in 0..2 {
            b.grouped_linear_backward_weight(&dy, &x, &stacks, &dispatch, &self.plan, &mut dw, &mut scores);
        }
        let sums = b.scores_take(&mut scores);
        let stored = [true, false].map(|cleared| {
            let mut dw = b.buffer(self.start.len());
            match cleared {
                true => {
                    b.buffer_write(&mut dw, 0, &self.start);
                    b.buffer_clear(&mut dw);
                }
                false => b.buffer_write(&mut dw, 0, &vec![0.0; self.start.len()]),
            }
            b.grouped_linear_backward_weight(&dy, &x, &stacks, &dispatch, &self.plan, &mut dw, &mut scores);
            b.buffer_read(&dw, 0..self.start.len())
        });
        let dw = b.buffer_read(&dw, 0..self.start.len());
        Results { y, dx, dw, stored, scores: sums }
    }

    fn check(&self, form: Form) {
        let what = format!(
            "{:?} x {}, [{}, {}], {:?}, {form}",
            self.counts, self.stack, self.outputs, self.inputs, self.dtype
        );
        let want = self.run(&Cpu::new(1));
        let got = self.run(&cuda(device::gpu(), self.dtype, form));
        close(&got.y, &want.y, self.dtype, &format!("y, {what}"));
        close(&got.dx, &want.dx, self.dtype, &format!("dx, {what}"));
        let cut = device::is_real() && self.dtype == Dtype::Bf16 && form != Form::Arithmetic;
        near(&got.dw, &want.dw, if cut { CUT } else { F32 }, &format!("dw, {what}"));
        assert!(got.stored[0] == got.stored[1], "a gradient is stored as it is added to zeros, {what}");
        near(&got.stored[0], &want.stored[0], if cut { CUT } else { F32 }, &format!("stored dw, {what}"));
        let off = if cut { CUT_SCORES } else { 2e-6 };
        for (i, (got, want)) in got.scores.iter().zip(&want.scores).enumerate() {
            assert!((got - want).abs() <= off * want + 1e-6, "score {i}: {got} instead of {want}, {what}");
        }
        let again = self.run(&cuda(device::shuffled(5), self.dtype, form));
        assert!(got == again, "the order of blocks and threads changes bits, {what}");
    }
}

const ODD: [(&[usize], [usize; 3]); 6] = [
    (&[0, 1, 5, 0, 70], [2, 9, 13]),
    (&[3], [1, 1, 1]),
    (&[0, 0, 2], [1, 130, 3]),
    (&[17, 64, 65, 1, 0], [1, 67, 65]),
    // More row tiles than a band, and several column tiles.
    (&[5, 530, 2], [1, 8, 70]),
    (&[0, 0], [2, 4, 5]),
];

#[test]
fn grouped_products_by_arithmetic() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for (seed, (counts, sizes)) in ODD.into_iter().enumerate() {
            Case::new(seed as u64, dtype, counts, sizes).check(Form::Arithmetic);
        }
    }
    // More groups than a warp has lanes.
    let counts: Vec<usize> = (0..75).map(|g| g * 7 % 4).collect();
    Case::new(7, Dtype::F32, &counts, [2, 6, 5]).check(Form::Arithmetic);
}

#[test]
fn grouped_products_of_each_group() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        for (seed, (counts, sizes)) in ODD.into_iter().enumerate() {
            Case::new(seed as u64 + 10, dtype, counts, sizes).check(Form::EachGroup);
        }
    }
}

#[test]
fn a_gradient_beyond_the_scratch_is_made_in_slabs() {
    // 17.6 MB of F32, in slabs of 16 MiB.
    let case = Case::new(2, Dtype::F32, &[2], [1, 2100, 2100]);
    assert!(matches!(case.plan[0], ExpertGrad::Score(GradReduction::Abs, _)));
    case.check(Form::EachGroup);
}

#[test]
fn grouped_products_on_tensor_cores() {
    let cases: [(&[usize], [usize; 3]); 5] = [
        (&[0, 1, 5, 0, 70], [2, 8, 16]),
        (&[17, 33, 0, 1], [1, 200, 136]),
        (&[131, 2], [2, 40, 24]),
        (&[3, 100], [1, 136, 8]),
        (&[0, 0], [1, 8, 8]),
    ];
    for (seed, (counts, sizes)) in cases.into_iter().enumerate() {
        Case::new(seed as u64, Dtype::Bf16, counts, sizes).check(Form::TensorCores);
    }
}

#[test]
fn grouped_products_of_warpgroups() {
    if !runs(&Form::Warpgroups) {
        return eprintln!("skipped: {}", Form::Warpgroups);
    }
    let cases: [(&[usize], [usize; 3]); 6] = [
        (&[0, 1, 5, 0, 70], [2, 8, 16]),
        // More steps than stages along every depth; the last steps are partial.
        (&[17, 33, 0, 1], [1, 456, 136]),
        (&[203, 2], [2, 40, 264]),
        (&[3, 100], [1, 136, 8]),
        (&[0, 0], [1, 8, 8]),
        (&[300], [1, 264, 392]),
    ];
    for (seed, (counts, sizes)) in cases.into_iter().enumerate() {
        for form in [Form::Warpgroups, Form::WideWarpgroups] {
            Case::new(seed as u64, Dtype::Bf16, counts, sizes).check(form);
        }
    }
}

#[test]
fn weights_stored_in_another_format_are_converted() {
    for form in [Form::Arithmetic, Form::TensorCores, Form::Warpgroups, Form::WideWarpgroups].into_iter().filter(runs) {
        let mut case = Case::new(3, Dtype::Bf16, &[2, 0, 9, 4, 1], [2, 16, 24]);
        for stored in [Dtype::F32, Dtype::F16] {
            let encode = |w: &HostTensor, dtype| HostTensor::encode(dtype, w.shape.clone(), &w.to_f32());
            let there: Vec<_> = case.weights.iter().map(|w| encode(w, stored)).collect();
            case.weights = there.iter().map(|w| encode(w, Dtype::Bf16)).collect();
            let want = case.run(&cuda(device::gpu(), Dtype::Bf16, form));
            case.weights = there;
            assert_eq!(case.run(&cuda(device::gpu(), Dtype::Bf16, form)), want, "{stored:?}, {form}");
        }
    }
}

#[test]
fn numbers_of_one_group_never_reach_another() {
    let forms = [Form::Arithmetic, Form::EachGroup, Form::TensorCores, Form::Warpgroups, Form::WideWarpgroups];
    for form in forms.into_iter().filter(runs) {
        let counts = [3, 40, 7];
        let mut case = Case::new(1, Dtype::Bf16, &counts, [1, 16, 24]);
        let moments = |g: usize| ExpertGrad::Score(GradReduction::Abs, g);
        case.plan = (0..3).map(moments).collect();
        let want = case.run(&cuda(device::gpu(), Dtype::Bf16, form));
        // The middle group is full of NaN; tiles of its neighbours would extend into it.
        case.x[3 * 16..43 * 16].fill(f32::NAN);
        case.dy[3 * 24..43 * 24].fill(f32::NAN);
        case.weights[1] = HostTensor::encode(Dtype::Bf16, vec![24, 16], &[f32::NAN; 24 * 16]);
        let got = case.run(&cuda(device::gpu(), Dtype::Bf16, form));
        for (got, want, width) in [(&got.y, &want.y, 24), (&got.dx, &want.dx, 16)] {
            for range in [0..3 * width, 43 * width..50 * width] {
                assert_eq!(got[range.clone()], want[range], "{form}");
            }
            assert!(got[3 * width..43 * width].iter().all(|x| x.is_nan()), "{form}");
        }
        assert_eq!((got.scores[0], got.scores[2]), (want.scores[0], want.scores[2]), "{form}");
        assert!(got.scores[1].is_nan(), "{form}: a NaN must show");
    }
}

#[test]
fn one_group_is_a_plain_product_that_waits_for_nothing() {
    let (cpu, mut rng) = (Cpu::new(1), Rng::new(4));
    let gpu = cuda(device::gpu(), Dtype::F32, Form::EachGroup);
    let (rows, inputs, outputs) = (21, 10, 6);
    let x = rng.values(rows * inputs, 1.0);
    let hosts: Vec<HostTensor> =
        (0..2).map(|_| HostTensor::from_f32(vec![outputs, inputs], &rng.values(inputs * outputs, 1.0))).collect();
    let on_cpu: Vec<_> = hosts.iter().map(|w| cpu.weight(w.clone())).collect();
    let on_gpu: Vec<_> = hosts.iter().map(|w| gpu.weight(w.clone())).collect();
    let want = cpu.grouped_linear(
        &cpu.upload(rows, inputs, &x),
        &[on_cpu.iter().collect::<Vec<_>>()],
        &cpu.single_expert_dispatch(rows),
    );
    let got = gpu.grouped_linear(
        &gpu.upload(rows, inputs, &x),
        &[on_gpu.iter().collect::<Vec<_>>()],
        &gpu.single_expert_dispatch(rows),
    );
    close(&gpu.download(&got), &cpu.download(&want), Dtype::F32, "one group");
}

/// One forward and backward of attention.
struct Attention {
    dtype: Dtype,
    packing: Packing,
    heads: Heads,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    dy: Vec<f32>,
}

impl Attention {
    fn new(seed: u64, dtype: Dtype, packing: Packing, heads: Heads) -> Self {
        let mut rng = Rng::new(seed);
        let (queries, keys) = (packing.rows() * heads.queries, packing.keys[packing.len()] * heads.keys);
        let mut values = |n: usize, scale: f32| rounded(dtype, rng.values(n * heads.dim, scale));
        // Large scores, so that subtracting the maximum matters.
        let (q, k) = (values(queries, 3.0), values(keys, 3.0));
        let (v, dy) = (values(keys, 1.0), values(queries, 1.0));
        Self { dtype, packing, heads, q, k, v, dy }
    }

    /// y, then dq, dk, dv; the backward starts from `y` if it is given, else from its own.
    fn run<B: Backend>(&self, b: &B, y: Option<&[f32]>) -> [Vec<f32>; 4] {
        let (h, keys) = (&self.heads, self.packing.keys[self.packing.len()]);
        let seqs = b.sequences(&self.packing, &Rope { inv_freq: vec![1.0; h.dim.div_ceil(2)], scale: 1.0 });
        let query = |x: &[f32]| b.upload(self.packing.rows(), h.queries * h.dim, x);
        let key = |x: &[f32]| b.upload(keys, h.keys * h.dim, x);
        let (q, k, v, dy) = (query(&self.q), key(&self.k), key(&self.v), query(&self.dy));
        let (made, normaliser) = b.attention(&q, &k, &v, &seqs, h);
        let y = y.map(query);
        let y = (y.as_ref().unwrap_or(&made), &normaliser);
        let (dq, dk, dv) = b.attention_backward(&dy, &q, &k, &v, y, &seqs, h);
        [&made, &dq, &dk, &dv].map(|x| b.download(x))
    }

    fn check(&self, form: AttentionForm) {
        let what = format!("{:?}, {:?}, {:?}, {form}", self.packing, self.heads, self.dtype);
        let got = self.run(&attending(device::gpu(), self.dtype, form), None);
        let want = self.run(&Cpu::new(1), Some(&got[0]));
        for ((name, got), want) in ["y", "dq", "dk", "dv"].into_iter().zip(&got).zip(&want) {
            let what = format!("{name} of attention, {what}");
            if form == AttentionForm::Arithmetic {
                close(got, want, self.dtype, &what);
            } else {
                // The relative error of every probability and every dS is up to 2^-9, in sums of size 1 to 10.
                let size = want.iter().fold(1.0f32, |m, x| m.max(x.abs()));
                assert_close(got, &wide(want), 4e-3 * f64::from(size), 1.0 / 128.0, &what);
            }
        }
        let again = self.run(&attending(device::shuffled(3), self.dtype, form), None);
        assert!(got == again, "the order of blocks and threads changes bits, {what}");
    }
}

fn heads(queries: usize, keys: usize, dim: usize, window: Option<usize>) -> Heads {
    Heads { queries, keys, dim, window }
}

#[test]
fn attention_over_sequences_of_all_lengths() {
    let cases = [
        (Packing::of_lengths([1]), heads(1, 1, 1, None)),
        (Packing::of_lengths([5, 1, 0, 33]), heads(4, 2, 7, None)),
        (Packing::of_lengths([70, 3]), heads(2, 1, 64, None)),
        (Packing::of_lengths([40]), heads(1, 1, 256, None)),
        (Packing::of_lengths([100, 31]), heads(3, 3, 8, Some(33))),
        (Packing::of_lengths([66]), heads(2, 2, 12, Some(1))),
        (Packing::of_lengths([66, 64]), heads(2, 1, 10, Some(1000))),
        (Packing::continuing(3, 80), heads(6, 2, 16, None)),
        (Packing::continuing(1, 40), heads(2, 1, 5, Some(9))),
        (Packing { queries: vec![0, 2, 2, 37], keys: vec![0, 70, 75, 140] }, heads(2, 1, 9, Some(40))),
        (Packing::of_lengths([]), heads(2, 1, 9, None)),
    ];
    for (seed, (packing, heads)) in cases.into_iter().enumerate() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            Attention::new(seed as u64, dtype, packing.clone(), heads).check(AttentionForm::Arithmetic);
        }
    }
}

#[test]
fn attention_on_tensor_cores() {
    let cases = [
        (64, Packing::of_lengths([1]), heads(1, 1, 8, None)),
        (64, Packing::of_lengths([5, 1, 0, 33]), heads(4, 2, 16, None)),
        (64, Packing::of_lengths([150]), heads(2, 1, 64, None)),
        (128, Packing::of_lengths([70, 3]), heads(2, 1, 128, None)),
        (128, Packing::of_lengths([100, 31]), heads(1, 1, 72, Some(33))),
        (64, Packing::of_lengths([130]), heads(1, 1, 24, Some(1))),
        (64, Packing::continuing(3, 180), heads(6, 2, 16, None)),
        (64, Packing { queries: vec![0, 2, 2, 67], keys: vec![0, 70, 75, 240] }, heads(2, 1, 40, Some(70))),
    ];
    for (seed, (width, packing, heads)) in cases.into_iter().enumerate() {
        Attention::new(seed as u64, Dtype::Bf16, packing, heads).check(AttentionForm::TensorCores(width));
    }
}

#[test]
fn attention_shows_a_nan() {
    let mut case = Attention::new(1, Dtype::F32, Packing::of_lengths([40]), heads(1, 1, 4, None));
    case.k[20 * 4] = f32::NAN;
    let [y, ..] = case.run(&attending(device::gpu(), Dtype::F32, AttentionForm::Arithmetic), None);
    assert!(y[..20 * 4].iter().all(|y| y.is_finite()), "positions before see nothing of it");
    assert!(y[20 * 4..].iter().all(|y| y.is_nan()));
}
