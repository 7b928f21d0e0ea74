//! Every operation of the GPU backend with emulated kernels, against the CPU backend: odd sizes, F32 and BF16, memory
//! that contained NaN, blocks and threads in any order, reused memory. (All forms of grouped products and attention:
//! `products.rs`.) With `MOEWARDEN_TEST_GPU=0` the same comparisons run on that GPU.

use std::fmt::Debug;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use crate::emulator::device::Guarded;
use crate::emulator::{Emulated, device};
use crate::values::{Rng, assert_close};
use moewarden::backend::cpu::Cpu;
use moewarden::backend::cuda::Cuda;
use moewarden::backend::cuda::gpu::{Address, Arg, Gpu, Grid, Kernel, Module, SourceFile};
use moewarden::backend::cuda::kernels::{self, MODULES};
use moewarden::backend::cuda::pool::{Pool, Reuse};
use moewarden::backend::cuda::profile::{Profiled, Times};
use moewarden::backend::{AdamwStep, Backend, DeviceFault, Dtype, HostTensor, Packing, Rope};
use moewarden::exit::{self, Coded};

/// Results by the name of the operation.
type Results = Vec<(String, Vec<f64>)>;

/// Runs operations on a backend and records their results.
struct Probe<'a, B: Backend> {
    b: &'a B,
    /// Inputs are rounded to this number format, on every backend.
    dtype: Dtype,
    /// Number format of parameters.
    stored: Dtype,
    rng: Rng,
    found: Results,
}

impl<B: Backend> Probe<'_, B> {
    fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        let values = self.rng.values(n, scale);
        HostTensor::encode(self.dtype, vec![n], &values).to_f32()
    }

    fn tensor(&mut self, rows: usize, cols: usize, scale: f32) -> B::Tensor {
        let values = self.values(rows * cols, scale);
        self.b.upload(rows, cols, &values)
    }

    fn weight(&mut self, shape: &[usize]) -> B::Weight {
        let values = self.values(shape.iter().product(), 1.0);
        self.b.weight(HostTensor::encode(self.stored, shape.to_vec(), &values))
    }

    /// A buffer of random values.
    fn buffer(&mut self, len: usize) -> B::Buffer {
        let values = self.rng.values(len, 1.0);
        let mut buffer = self.b.buffer(len);
        self.b.buffer_write(&mut buffer, 0, &values);
        buffer
    }

    fn note(&mut self, what: impl Debug, values: Vec<f64>) {
        self.found.push((format!("{what:?}"), values));
    }

    fn note_tensor(&mut self, what: impl Debug, x: &B::Tensor) {
        let values = self.b.download(x).into_iter().map(f64::from).collect();
        self.note(what, values);
    }

    fn note_buffer(&mut self, what: impl Debug, x: &B::Buffer, len: usize) {
        let values = self.b.buffer_read(x, 0..len).into_iter().map(f64::from).collect();
        self.note(what, values);
    }

    // --- families of operations ----------------------------------------------------------------------------------

    fn elements_and_rows(&mut self, n: usize, cols: usize) {
        let b = self.b;
        let at = ("elements", n, cols);
        let (mut x, y) = (self.tensor(n, cols, 2.0), self.tensor(n, cols, 2.0));
        b.add_assign(&mut x, &y);
        self.note_tensor((at, "add"), &x);
        // With new values: a rounded sum may be on the other side of the limit.
        let mut x = self.tensor(n, cols, 2.0);
        b.clamp(&mut x, 1.25);
        self.note_tensor((at, "clamp"), &x);
        let mut dy = self.tensor(n, cols, 1.0);
        b.clamp_backward(&mut dy, &x, 1.25);
        self.note_tensor((at, "clamp backward"), &dy);
        let mut filled = self.tensor(n, cols, 2.0);
        b.fill_columns(&mut filled, &b.indices(&[0, cols as u32 - 1, cols as u32 / 2]), 0.75);
        b.fill_columns(&mut filled, &b.indices(&[]), 1.0);
        self.note_tensor((at, "filled columns"), &filled);
        let mut x = b.zeros(3 * n, cols);
        // Every third row, in descending order.
        b.write_rows(&mut x, &b.indices(&(0..n as u32).rev().map(|i| 3 * i + 2).collect::<Vec<_>>()), &y);
        b.write_rows(&mut x, &b.indices(&(0..n as u32).map(|i| 3 * i).collect::<Vec<_>>()), &dy);
        b.write_rows(&mut x, &b.indices(&[]), &b.zeros(0, cols));
        self.note_tensor((at, "written rows"), &x);
        // Distinct rows, not sorted.
        let rows = b.indices(&(0..3 * n as u32).rev().step_by(2).collect::<Vec<_>>());
        let picked = b.gather_rows(&x, &rows);
        self.note_tensor((at, "gather"), &picked);
        b.gather_rows_backward(&picked, &rows, &mut x);
        self.note_tensor((at, "gather backward"), &x);
        self.note_tensor((at, "zeros"), &b.zeros_like(&y));

        let ids: Vec<u32> = (0..n).map(|_| self.rng.below(7) as u32).collect();
        let (w, index) = (self.weight(&[7, cols]), b.indices(&ids));
        self.note_tensor((at, "embedding"), &b.embedding(&index, &w));
        let mut dw = self.buffer(7 * cols + 3);
        b.embedding_backward(&y, &index, &mut dw, 3);
        self.note_buffer((at, "embedding backward"), &dw, 7 * cols + 3);
    }

    fn norms(&mut self, rows: usize, groups: usize, n: usize) {
        let b = self.b;
        let at = ("norm", rows, groups, n);
        let (x, dy, w) = (self.tensor(rows, groups * n, 1.0), self.tensor(rows, groups * n, 1.0), self.weight(&[n]));
        self.note_tensor((at, "y"), &b.rms_norm(&x, &w, 1e-3));
        let mut dw = self.buffer(n + 1);
        let dx = b.rms_norm_backward(&dy, &x, &w, 1e-3, Some((&mut dw, 1)));
        self.note_tensor((at, "dx"), &dx);
        self.note_buffer((at, "dw"), &dw, n + 1);
        let frozen = b.rms_norm_backward(&dy, &x, &w, 1e-3, None);
        assert_eq!(b.download(&frozen), b.download(&dx));
    }

    fn dense(&mut self, rows: usize, inputs: usize, outputs: usize) {
        let b = self.b;
        let at = ("linear", rows, inputs, outputs);
        let (x, dy) = (self.tensor(rows, inputs, 1.0), self.tensor(rows, outputs, 1.0));
        let (w, bias) = (self.weight(&[outputs, inputs]), self.weight(&[outputs]));
        self.note_tensor((at, "y"), &b.linear(&x, &w, None));
        self.note_tensor((at, "y with bias"), &b.linear(&x, &w, Some(&bias)));
        let mut dx = b.linear_backward_input(&dy, &w);
        self.note_tensor((at, "dx"), &dx);
        b.add_linear_backward_input(&dy, &w, &mut dx);
        self.note_tensor((at, "dx twice"), &dx);
        let mut dw = self.buffer(outputs * inputs + 5);
        b.linear_backward_weight(&dy, &x, &mut dw, 5);
        self.note_buffer((at, "dw"), &dw, outputs * inputs + 5);
        let mut db = self.buffer(outputs + 3);
        b.bias_backward(&dy, &mut db, 3);
        self.note_buffer((at, "db"), &db, outputs + 3);
    }

    fn rope(&mut self, packing: &Packing, heads: usize, half: usize) {
        let b = self.b;
        let at = ("rope", packing.rows(), heads, half);
        let rope = Rope { inv_freq: (0..half).map(|i| 0.5f32.powi(i as i32)).collect(), scale: 1.25 };
        let seqs = b.sequences(packing, &rope);
        let mut x = self.tensor(packing.rows(), heads * 2 * half, 1.0);
        b.rope(&mut x, 2 * half, &seqs);
        self.note_tensor((at, "y"), &x);
        let mut dy = self.tensor(packing.rows(), heads * 2 * half, 1.0);
        b.rope_backward(&mut dy, 2 * half, &seqs);
        self.note_tensor((at, "dx"), &dy);
    }

    fn gated(&mut self, rows: usize, f: usize) {
        let b = self.b;
        let at = ("gated", rows, f);
        let (x, dy) = (self.tensor(rows, 2 * f, 4.0), self.tensor(rows, f, 1.0));
        self.note_tensor((at, "swiglu"), &b.swiglu(&x));
        self.note_tensor((at, "swiglu backward"), &b.swiglu_backward(&dy, &x));
        let (x, gate) = (self.tensor(rows, f, 1.0), self.tensor(rows, 1, 3.0));
        self.note_tensor((at, "sigmoid gate"), &b.sigmoid_gate(&x, &gate));
        let (dx, dgate) = b.sigmoid_gate_backward(&dy, &x, &gate);
        self.note_tensor((at, "sigmoid gate dx"), &dx);
        self.note_tensor((at, "sigmoid gate dgate"), &dgate);
    }

    fn routed(&mut self, tokens: usize, experts: usize, top_k: usize, renormalize: bool) {
        let (b, d) = (self.b, 24 + experts % 2);
        let at = ("routed", tokens, experts, top_k, renormalize);
        let (x, w) = (self.tensor(tokens, d, 1.0), self.weight(&[experts, d]));
        let logits = b.router_logits(&x, &w);
        self.note_tensor((at, "logits"), &logits);
        let routing = b.route(&logits, top_k, renormalize);
        let dispatch = b.dispatch(&routing, experts);
        self.note((at, "ids"), b.expert_ids(&routing).into_iter().map(f64::from).collect());
        let counts = b.tokens_per_expert(&dispatch);
        assert_eq!(counts.iter().sum::<usize>(), tokens * top_k);
        self.note((at, "counts"), counts.into_iter().map(|n| n as f64).collect());

        let rows = b.dispatch_rows(&x, &dispatch);
        self.note_tensor((at, "dispatched"), &rows);
        self.note_tensor((at, "combined"), &b.combine_rows(&rows, &dispatch));
        let gate_up = self.tensor(tokens * top_k, 2 * d, 3.0);
        self.note_tensor((at, "weighted"), &b.weighted_swiglu(&gate_up, &routing, &dispatch));
        let dy = self.tensor(tokens * top_k, d, 1.0);
        let (dx, dweights) = b.weighted_swiglu_backward(dy, &gate_up, &routing, &dispatch);
        self.note_tensor((at, "weighted dx"), &dx);
        self.note_tensor((at, "dweights"), &dweights);
        let dlogits = b.route_backward(&dweights, &routing);
        self.note_tensor((at, "dlogits"), &dlogits);
        self.note_tensor((at, "router dx"), &b.linear_backward_input(&dlogits, &w));
        let mut sum = self.tensor(tokens, d, 1.0);
        b.add_linear_backward_input(&dlogits, &w, &mut sum);
        self.note_tensor((at, "router dx added"), &sum);
        let mut dw = self.buffer(experts * d);
        b.linear_backward_weight(&dlogits, &x, &mut dw, 0);
        self.note_buffer((at, "router dw"), &dw, experts * d);

        if top_k < experts {
            let mut off = b.router_logits(&x, &w);
            b.fill_columns(&mut off, &b.indices(&[experts as u32 / 2]), f32::NEG_INFINITY);
            let off = b.route(&off, top_k, renormalize);
            self.note((at, "ids with one off"), b.expert_ids(&off).into_iter().map(f64::from).collect());
        }
        let mut silenced = b.route(&logits, top_k, renormalize);
        b.zero_routing_weights(&mut silenced, &b.indices(&[experts as u32 / 2, 0]));
        self.note_tensor((at, "silenced"), &b.weighted_swiglu(&gate_up, &silenced, &dispatch));

        // The statistics of the router's logits.
        let mut dlogits = b.zeros_like(&logits);
        let dy = self.rng.values(experts, 1.0);
        for rows in [0..tokens, tokens / 3..tokens / 2, tokens..tokens] {
            self.note((at, "softmax sum", rows.clone()), b.softmax_sum(&logits, rows.clone()));
            b.softmax_sum_backward(&dy, &logits, rows, &mut dlogits);
        }
        let segments: Vec<Range<usize>> = [0..tokens, tokens / 2..tokens, 0..0].into();
        self.note((at, "segment sum"), b.segment_sum(&logits, &segments));
        let dy = self.rng.values(3 * experts, 1.0);
        b.segment_sum_backward(&dy, &segments, &mut dlogits);
        self.note_tensor((at, "dlogits of the statistics"), &dlogits);
    }

    fn cross_entropy(&mut self, n: usize, classes: usize, d: usize) {
        let b = self.b;
        let at = ("cross-entropy", n, classes, d);
        let (x, w) = (self.tensor(n, d, 1.0), self.weight(&[classes, d]));
        let targets: Vec<u32> = (0..n).map(|_| self.rng.below(classes) as u32).collect();
        let targets = b.indices(&targets);
        let loss = b.linear_cross_entropy(&x, &w, &targets);
        let rows = b.linear_cross_entropy_rows(&x, &w, &targets);
        self.note((at, "losses of rows"), rows.iter().map(|row| row.loss).collect());
        self.note((at, "greedy rows"), rows.iter().map(|row| f64::from(u8::from(row.greedy))).collect());
        self.note((at, "loss"), vec![loss]);
        let mut dw = self.buffer(classes * d + 1);
        let (same, dx) = b.linear_cross_entropy_backward(&x, &w, &targets, 0.25, Some((&mut dw, 1)));
        assert_eq!(same, loss);
        self.note_tensor((at, "dx"), &dx);
        self.note_buffer((at, "dw"), &dw, classes * d + 1);
        let (_, frozen) = b.linear_cross_entropy_backward(&x, &w, &targets, 0.25, None);
        assert_eq!(b.download(&frozen), b.download(&dx));
    }

    fn linear_kl(&mut self, n: usize, classes: usize, d: usize) {
        let b = self.b;
        let at = ("KL", n, classes, d);
        let (x, w) = (self.tensor(n, d, 1.0), self.weight(&[classes, d]));
        let (base_x, base_w) = (self.tensor(n, d, 1.0), self.weight(&[classes, d]));
        let (kl, same) = b.linear_kl(&x, &w, &base_x, &base_w);
        self.note((at, "sum and agreement"), vec![kl, same as f64]);
        assert_eq!(b.linear_kl(&x, &w, &x, &w), (0.0, n));
        let mut dw = self.buffer(classes * d + 1);
        let (again, dx) = b.linear_kl_backward(&x, &w, &base_x, &base_w, 0.25, Some((&mut dw, 1)));
        assert_eq!(again, kl);
        self.note_tensor((at, "dx"), &dx);
        self.note_buffer((at, "dw"), &dw, classes * d + 1);
        let (_, frozen) = b.linear_kl_backward(&x, &w, &base_x, &base_w, 0.25, None);
        assert_eq!(b.download(&frozen), b.download(&dx));
    }

    fn softmax_kl(&mut self, tokens: usize, experts: usize) {
        let b = self.b;
        let at = ("KL of routers", tokens, experts);
        // Router logits are F32 tensors.
        let (x, router) = (self.tensor(tokens, 5, 1.0), self.weight(&[experts, 5]));
        let logits = b.router_logits(&x, &router);
        let base = self.rng.values(tokens * experts, 2.0);
        self.note((at, "sum"), vec![b.softmax_kl(&logits, &base)]);
        assert_eq!(b.softmax_kl(&logits, &b.download(&logits)), 0.0);
        let mut dlogits = b.zeros_like(&logits);
        b.softmax_kl_backward(&base, &logits, 0.25, &mut dlogits);
        b.softmax_kl_backward(&base, &logits, 0.5, &mut dlogits);
        self.note_tensor((at, "dlogits"), &dlogits);
    }

    /// Updates round as on the CPU: compared bit for bit.
    fn updates(&mut self, n: usize, offset: usize) -> Vec<u32> {
        let b = self.b;
        let len = n + offset;
        let (mut w, mut m, mut v, grad) = (self.buffer(len), b.buffer(len), b.buffer(len), self.buffer(len + 1));
        for step in 1..4 {
            let numbers =
                AdamwStep { lr: 0.01, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.3 };
            b.adamw(&mut w, &mut m, &mut v, offset..len, &grad, offset + 1, &numbers);
        }
        let mut bits: Vec<u32> = Vec::new();
        for stored in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
            let start = HostTensor::encode(stored, vec![n], &self.rng.values(n, 1e-4));
            let mut weight = b.weight(start.clone());
            let mut read = b.buffer(len);
            b.read_weight(&weight, n / 3..n, &mut read, offset);
            bits.extend(b.buffer_read(&read, 0..len).iter().map(|x| x.to_bits()));
            b.set_weight(&mut weight, &w, offset..len);
            let host = b.weight_host(&weight);
            assert_eq!((host.dtype, &host.shape), (stored, &start.shape));
            bits.extend(host.bytes.iter().map(|&byte| u32::from(byte)));
        }
        for buffer in [&w, &m, &v] {
            bits.extend(b.buffer_read(buffer, 0..len).iter().map(|x| x.to_bits()));
        }
        let sum = b.sum_squares(&grad, 1..len + 1);
        self.note(("sum of squares", n), vec![sum]);
        b.buffer_clear(&mut w);
        assert_eq!(b.sum_squares(&w, 0..len), 0.0);
        for bad in [f32::NAN, f32::INFINITY] {
            b.buffer_write(&mut w, n / 2 + offset, &[bad]);
            assert!(!b.sum_squares(&w, 0..len).is_finite());
        }
        bits
    }
}

/// All operations in odd sizes: one row, widths that are not multiples of a load or a warp, experts without rows.
fn everything<B: Backend>(b: &B, dtype: Dtype, stored: Dtype) -> Results {
    let mut p = Probe { b, dtype, stored, rng: Rng::new(1), found: Vec::new() };
    for (n, cols) in [(1, 1), (5, 7), (3, 40), (17, 264), (2, 4099)] {
        p.elements_and_rows(n, cols);
    }
    for (rows, groups, n) in [(1, 1, 1), (5, 3, 7), (9, 1, 64), (3, 2, 1032), (2, 1, 2500), (300, 4, 16), (70, 2, 33)] {
        p.norms(rows, groups, n);
    }
    for (rows, inputs, outputs) in [(1, 1, 1), (5, 7, 3), (33, 40, 65), (140, 8, 24), (0, 4, 3)] {
        p.dense(rows, inputs, outputs);
    }
    for (packing, heads, half) in [
        (Packing::of_lengths([4, 1, 7]), 3, 3),
        (Packing::continuing(2, 100), 1, 8),
        (Packing::of_lengths([70]), 5, 16),
    ] {
        p.rope(&packing, heads, half);
    }
    for (rows, f) in [(1, 1), (5, 33), (40, 24), (3, 2056)] {
        p.gated(rows, f);
    }
    for (tokens, experts, top_k) in
        [(1, 1, 1), (6, 5, 2), (3, 64, 3), (4, 3, 3), (70, 128, 8), (300, 40, 4), (2, 700, 40)]
    {
        p.routed(tokens, experts, top_k, tokens % 2 == 0);
    }
    for (n, classes, d) in [(1, 2, 1), (5, 13, 4), (3, 5003, 8), (70, 264, 16), (0, 5, 2)] {
        p.cross_entropy(n, classes, d);
        p.linear_kl(n, classes, d);
    }
    for (tokens, experts) in [(1, 2), (9, 5), (70, 130), (0, 4)] {
        p.softmax_kl(tokens, experts);
    }
    p.updates(5000, 0);
    p.found
}

fn cuda(gpu: Arc<dyn Gpu>, dtype: Dtype, reuse: Reuse) -> Cuda {
    Cuda::new(gpu, dtype, reuse)
}

#[track_caller]
fn compare(got: &Results, want: &Results, abs: f64, rel: f64, why: &str) {
    assert_eq!(got.len(), want.len());
    for ((what, got), (same, want)) in got.iter().zip(want) {
        assert_eq!(what, same);
        // The error of a long sum scales with its largest terms.
        let size = want.iter().fold(1.0f64, |m, x| m.max(x.abs()));
        let got: Vec<f32> = got.iter().map(|&x| x as f32).collect();
        assert_close(&got, want, abs * size, rel, &format!("{what}: {why}"));
    }
}

#[test]
fn f32_agrees_with_the_cpu() {
    let gpu = cuda(device::gpu(), Dtype::F32, Reuse::Never);
    assert_eq!(gpu.precision(), Dtype::F32);
    // Parameters stored in 16 bits are used at their exact values.
    // On a GPU expf and divisions have errors of up to 2 more units, and there are fused multiply-adds.
    let abs = if device::is_real() { 4e-6 } else { 2e-6 };
    for stored in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let (got, want) = (everything(&gpu, Dtype::F32, stored), everything(&Cpu::new(1), Dtype::F32, stored));
        compare(&got, &want, abs, 1e-5, "f32 sums of up to 5,000 terms in another order; exp within 2 units");
    }
}

#[test]
fn bf16_agrees_with_the_cpu_on_rounded_inputs() {
    let gpu = cuda(device::gpu(), Dtype::Bf16, Reuse::Never);
    assert_eq!(gpu.precision(), Dtype::Bf16);
    let (got, want) = (everything(&gpu, Dtype::Bf16, Dtype::Bf16), everything(&Cpu::new(1), Dtype::Bf16, Dtype::Bf16));
    // The last bit of bf16 is 2^-8. Results are rounded once; if a gradient of logits or an intermediate row was
    // rounded, too, each of its terms has an error of half a unit.
    compare(&got, &want, 1.0 / 256.0, 1.0 / 128.0, "rounded to bf16 once or twice");
}

/// The bits of all results.
fn bits(results: &Results) -> Vec<(String, Vec<u64>)> {
    results.iter().map(|(what, x)| (what.clone(), x.iter().map(|x| x.to_bits()).collect())).collect()
}

#[test]
fn no_order_of_blocks_or_threads_changes_a_bit() {
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let first = bits(&everything(&cuda(device::gpu(), dtype, Reuse::Never), dtype, dtype));
        for seed in [0, 3] {
            // With reuse: the previous content of memory must not matter, either.
            let again = everything(&cuda(device::shuffled(seed), dtype, Reuse::Segments), dtype, dtype);
            for (one, other) in first.iter().zip(&bits(&again)) {
                assert_eq!(one, other, "seed {seed}");
            }
        }
    }
}

#[test]
fn updates_round_as_on_the_cpu() {
    let run = |b: &dyn Fn(usize, usize) -> Vec<u32>| -> Vec<Vec<u32>> {
        [(1, 0), (7, 1), (1000, 0), (4099, 2), (9000, 4)].map(|(n, offset)| b(n, offset)).into()
    };
    fn on<B: Backend>(b: &B, n: usize, offset: usize) -> Vec<u32> {
        let mut p = Probe { b, dtype: Dtype::F32, stored: Dtype::F32, rng: Rng::new(2), found: Vec::new() };
        p.updates(n, offset)
    }
    let (gpu, cpu) = (cuda(device::gpu(), Dtype::F32, Reuse::Never), Cpu::new(1));
    assert_eq!(run(&|n, offset| on(&gpu, n, offset)), run(&|n, offset| on(&cpu, n, offset)));
}

#[test]
fn random_weights_have_the_bits_of_the_cpu() {
    let (gpu, cpu) = (cuda(device::gpu(), Dtype::Bf16, Reuse::Never), Cpu::new(2));
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        for (shape, seed) in
            [(vec![1], 0), (vec![7], u64::MAX), (vec![33, 65], 42), (vec![2, 8191], 1 << 40), (vec![3, 0], 5)]
        {
            let made = |w: HostTensor| (w.dtype, w.shape.clone(), w.bytes.to_vec());
            let on_gpu = gpu.weight_host(&gpu.random_weight(dtype, shape.clone(), seed, 0.02));
            let on_cpu = cpu.weight_host(&cpu.random_weight(dtype, shape.clone(), seed, 0.02));
            assert!(made(on_gpu) == made(on_cpu), "{dtype:?} {shape:?}");
        }
    }
}

#[test]
fn every_f32_rounds_to_16_bits_as_the_half_crate_says() {
    let gpu = cuda(device::gpu(), Dtype::F32, Reuse::Never);
    // Every pattern of the upper 16 bits, with lower halves around the ties of both formats.
    let lower = [0u32, 1, 0x0fff, 0x1000, 0x1001, 0x7fff, 0x8000, 0x8001, 0xffff];
    let values: Vec<f32> =
        (0..1u32 << 16).step_by(3).flat_map(|high| lower.map(|low| f32::from_bits(high << 16 | low))).collect();
    let mut b = gpu.buffer(values.len());
    gpu.buffer_write(&mut b, 0, &values);
    for dtype in [Dtype::F16, Dtype::Bf16] {
        let mut w = gpu.weight(HostTensor::encode(dtype, vec![values.len()], &vec![0.0; values.len()]));
        gpu.set_weight(&mut w, &b, 0..values.len());
        let (got, want) = (gpu.weight_host(&w), HostTensor::encode(dtype, vec![values.len()], &values));
        for (i, (g, w)) in got.to_f32().iter().zip(want.to_f32()).enumerate() {
            assert!(g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan(), "{dtype:?} {}: {g} {w}", values[i]);
        }
        let mut back = gpu.buffer(values.len());
        gpu.read_weight(&w, 0..values.len(), &mut back, 0);
        for (g, w) in gpu.buffer_read(&back, 0..values.len()).iter().zip(want.to_f32()) {
            assert!(g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan(), "{dtype:?}: {g} {w}");
        }
    }
}

#[test]
fn ties_go_to_the_lower_expert_and_nan_still_gives_distinct_ones() {
    let gpu = cuda(device::gpu(), Dtype::F32, Reuse::Never);
    let chosen = |logits: &[f32], k| gpu.expert_ids(&gpu.route(&gpu.upload(1, logits.len(), logits), k, true));
    assert_eq!(chosen(&[0.1, 0.3, 0.3, 0.1, 0.3, 0.3], 3), [1, 2, 4]);
    assert_eq!(chosen(&[0.5; 70], 3), [0, 1, 2]);
    let mut late = [0.0; 70];
    (late[69], late[33]) = (2.0, 2.0);
    assert_eq!(chosen(&late, 4), [33, 69, 0, 1]);
    assert_eq!(chosen(&[f32::NAN; 40], 3), [0, 1, 2]);
    assert_eq!(chosen(&[1.0, f32::NAN, 3.0], 3), [0, 1, 2], "one NaN makes all probabilities NaN");
}

#[test]
fn a_profile_counts_what_the_gpu_does() {
    let times = Arc::<Times>::default();
    let gpu = Arc::new(Profiled::new(device::gpu(), times.clone()));
    let b = Cuda::new(gpu, Dtype::F32, Reuse::Segments).with_times(times);
    let (x, w) = (b.upload(3, 4, &[1.0; 12]), b.weight(HostTensor::from_f32(vec![4], &[1.0; 4])));
    (0..3).for_each(|_| drop(b.rms_norm(&x, &w, 1e-5)));
    b.download(&x);
    let text = b.profile().unwrap();
    let rows: Vec<&str> = text.lines().skip(1).collect();
    for (count, name) in [(3, "rms_norm_f32 (norm.cu)"), (2, "copy from the host"), (1, "copy to the host")] {
        let row = rows.iter().find(|row| row.ends_with(name)).unwrap_or_else(|| panic!("{name} is not in {text}"));
        assert!(row.contains(&format!(" {count} x ")), "{text}");
    }
    let shares: Vec<f64> = rows.iter().map(|row| row.split_whitespace().next().unwrap().parse().unwrap()).collect();
    assert!((shares.iter().sum::<f64>() - 100.0).abs() < 0.6 && shares.is_sorted_by(|a, b| a >= b), "{text}");
}

/// The norm of a gradient of hundreds of parameters must not wait for the GPU hundreds of times.
#[test]
fn sums_of_squares_of_all_parts_wait_for_the_gpu_once() {
    let times = Arc::new(Times::default());
    let gpu = Arc::new(Profiled::new(device::gpu(), times.clone()));
    let b = Cuda::new(gpu, Dtype::F32, Reuse::Never).with_times(times);
    let values = Rng::new(7).values(30_000, 1.0);
    let mut buffer = b.buffer(values.len());
    b.buffer_write(&mut buffer, 0, &values);
    // Parts of no, one and several blocks; they may overlap.
    let parts = [0..0, 0..1, 1..9000, 5..5, 5..4101, 29_999..30_000, 30_000..30_000];
    let sums = b.sums_of_squares(&buffer, &parts);
    let text = b.profile().unwrap();
    assert!(text.contains(" 1 x copy to the host"), "{text}");
    for (part, sum) in parts.iter().zip(&sums) {
        let want: f64 = values[part.clone()].iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        assert!((sum - want).abs() <= 1e-12 * want, "{part:?}: {sum}, not {want}");
        assert_eq!(*sum, b.sum_squares(&buffer, part.clone()), "{part:?} with others and alone");
    }
    assert_eq!(b.sums_of_squares(&buffer, &[]), [0.0; 0]);
    b.buffer_write(&mut buffer, 4500, &[f32::INFINITY]);
    let finite: Vec<bool> = b.sums_of_squares(&buffer, &parts).iter().map(|sum| sum.is_finite()).collect();
    assert_eq!(finite, [true, true, false, true, true, true, true], "5..4101 ends before it");
}

#[test]
fn in_steady_state_nothing_is_allocated() {
    let gpu = cuda(device::gpu(), Dtype::Bf16, Reuse::Segments);
    // The first pass stores the rotary angles, the second one finds them.
    everything(&gpu, Dtype::Bf16, Dtype::Bf16);
    everything(&gpu, Dtype::Bf16, Dtype::Bf16);
    let before = gpu.pool().usage();
    everything(&gpu, Dtype::Bf16, Dtype::Bf16);
    let after = gpu.pool().usage();
    assert_eq!(after.allocations, before.allocations);
    assert_eq!(after.peak, before.peak);
    assert!(after.used < after.held && after.held <= after.peak, "{after:?}");
}

#[test]
fn ragged_shapes_hold_little_more_than_they_use() {
    let pool = Pool::new(device::gpu(), Reuse::Segments);
    let mut random = Rng::new(3);
    let (mut most, mut seen) = (0, 0);
    for step in 0..200 {
        // As in a layer: a few blocks that live longer, several short-lived ones, lengths that differ from step to
        // step.
        let rows = 2000 + random.below(2000);
        let take = |width: usize| pool.take(rows * width).unwrap();
        let kept: Vec<_> = [4 << 10, 12 << 10, 1 << 10].into_iter().map(take).collect();
        for width in [44 << 10, 22 << 10, 44 << 10, 6 << 10] {
            let both = (take(width), take(width / 2));
            most = most.max(pool.usage().used);
            drop(both);
        }
        drop(kept);
        if step == 100 {
            seen = pool.usage().allocations;
        }
    }
    let usage = pool.usage();
    assert!(usage.peak as f64 <= 1.3 * most as f64, "{most} bytes at most in use, {usage:?}");
    assert!(usage.allocations <= seen + 1, "{seen} allocations in the first half, {usage:?}");
    pool.release().unwrap();
    assert_eq!((pool.usage().held, pool.usage().used), (0, 0));
}

#[test]
fn many_equal_requests_hold_little_more_than_their_sum() {
    for bytes in [3 << 20, 12 << 20, 35 << 19, (16 << 20) + 512, 31 << 20, 33 << 20] {
        let pool = Pool::new(device::gpu(), Reuse::Segments);
        let number = 3 * (32usize << 20).div_ceil(bytes);
        let all: Vec<_> = (0..number).map(|_| pool.take(bytes).unwrap()).collect();
        let usage = pool.usage();
        assert!(usage.held as f64 <= 1.07 * usage.used as f64, "{bytes} bytes each: {usage:?}");
        // Any other request below the least shared segment finds room in one that is free.
        drop(all);
        let allocations = pool.usage().allocations;
        let others: Vec<_> = [31 << 20, 17 << 20, 5 << 20].into_iter().map(|bytes| pool.take(bytes).unwrap()).collect();
        assert_eq!(pool.usage().allocations, allocations, "{bytes} bytes each");
        drop(others);
    }
}

/// The device fault that `f` unwinds with.
fn fault(f: impl FnOnce()) -> DeviceFault {
    let payload = catch_unwind(AssertUnwindSafe(f)).expect_err("it fails");
    *payload.downcast::<DeviceFault>().expect("a device fault")
}

#[test]
fn full_memory_is_reported_after_what_lies_idle_was_released() {
    if !device::emulator_only("full memory") {
        return;
    }
    let gpu = cuda(Arc::new(Emulated::with_room(1 << 20)), Dtype::F32, Reuse::Segments);
    // Fills most of the memory, then frees it to the pool.
    drop(gpu.zeros(200, 1000));
    let held = gpu.zeros(100, 1000);
    assert_eq!(
        gpu.pool().usage().allocations,
        1 + 2,
        "shared, shared after a release, of its own; then a part of that"
    );
    drop(held);
    // There is room only after the free segments are released.
    let held = gpu.zeros(100, 2500);
    assert_eq!(gpu.pool().usage().held, 1_000_448);
    let error = fault(|| drop(gpu.zeros(1000, 1000)));
    assert_eq!(error.exit_code(), exit::LAUNCHER);
    let text = error.to_string();
    for part in
        ["requested", "in use", "free", "--batch-size", "--max-length", "--recompute", "--top-k-experts", "ranks"]
    {
        assert!(text.contains(part), "{part} is not in: {text}");
    }
    assert_eq!(gpu.download(&held), vec![0.0; 250_000], "what is held stays as it was");
}

// --- launches and sources agree -------------------------------------------------------------------------------------------

/// A kernel's name, and the name and type of each of its parameters.
type Signature = (String, Vec<(String, String)>);

/// The signatures of a module's kernels, `extern "C" __global__ void __launch_bounds__(..) name(type parameter, ..)`,
/// once the preprocessor has expanded its macros.
fn signatures(module: &Module) -> Vec<Signature> {
    let text = crate::emulator::preprocessed(&kernels::source(module));
    let mut found = Vec::new();
    for kernel in text.split("extern \"C\" __global__ void").skip(1) {
        let bounds = kernel.split_once("__launch_bounds__").expect("a launch bound").1;
        let (name, rest) = bounds.split_once(')').expect("its end").1.split_once('(').expect("parameters");
        let parameter = |text: &str| {
            let text = text.replace('*', " * ");
            let mut words: Vec<&str> = text.split_whitespace().collect();
            let name = words.pop().expect("the parameter's name");
            (name.to_owned(), words.join(" ").replace(" *", "*"))
        };
        let parameters = rest.split_once(')').expect("their end").0.split(',').map(parameter).collect();
        found.push((name.trim().to_owned(), parameters));
    }
    found
}

/// A parameter that is `const T*` in the source is an `In<T>` of the launch, any other pointer an `Out<T>` or
/// `InOut<T>`.
#[test]
fn every_launch_has_the_signature_of_its_kernel() {
    if !device::emulator_only("signatures, which need a C++ compiler but no GPU") {
        return;
    }
    let mut declared: Vec<(&str, Signature)> = Vec::new();
    for kernel in kernels::declarations() {
        let parameters = kernel.parameters.iter().map(|(name, c_type)| ((*name).to_owned(), c_type.clone())).collect();
        declared.push((kernel.kernel.module.stem, (kernel.kernel.name.to_owned(), parameters)));
    }
    let written = MODULES.iter().flat_map(|module| signatures(module).into_iter().map(|kernel| (module.stem, kernel)));
    let mut written: Vec<_> = written.collect();
    declared.sort();
    written.sort();
    assert!(written.len() > 60, "{written:?}");
    for (declared, written) in declared.iter().zip(&written) {
        assert_eq!(declared, written, "kernels.rs, and the module's source");
    }
    assert_eq!(declared.len(), written.len());
}

// --- mistakes that the emulator detects -----------------------------------------------------------------------------------

static FAULTY: Module = Module {
    only: None,
    stem: "faulty",
    files: &[SourceFile {
        name: "faulty.cu",
        text: r#"
        KERNEL(64, beyond, (float* x, u64 n)) { x[n + threadIdx.x % 2] = 1.0f; }
        KERNEL(64, dynamic_beyond, (float* x)) {
            DYNAMIC_SHARED(bytes);
            ((float*)bytes)[blockDim.x] = *x;
        }
        KERNEL(64, diverging, (float* x)) {
            if (threadIdx.x < 7) __syncthreads();
            else __syncwarp(1u << threadIdx.x % 32);
            *x = 1.0f;
        }
        // Reads another thread's value without a barrier.
        KERNEL(64, racing, (float* x)) {
            SHARED(float, all, [64]);
            all[threadIdx.x] = (float)threadIdx.x;
            x[threadIdx.x] = all[63 - threadIdx.x];
        }
        KERNEL(64, ordered, (float* x)) {
            SHARED(float, all, [64]);
            all[threadIdx.x] = (float)threadIdx.x;
            __syncthreads();
            x[threadIdx.x] = all[63 - threadIdx.x];
        }
    "#,
    }],
};

fn run(
    name: &'static str,
    threads: u32,
    shared: usize,
    args: impl Fn(Address) -> Vec<Arg>,
) -> Result<Vec<f32>, String> {
    let gpu = Emulated::new();
    let x = gpu.allocate(4 * 64).unwrap().unwrap();
    gpu.zero(x, 4 * 64).unwrap();
    let kernel = Kernel { module: &FAULTY, name };
    // SAFETY: the emulator checks the arguments, and the memory is large enough for what the faulty kernels do.
    let launch = || unsafe { gpu.launch(&kernel, Grid::row(1, threads).shared(shared), &args(x)) }.unwrap();
    if let Err(payload) = catch_unwind(AssertUnwindSafe(launch)) {
        std::mem::forget(gpu); // its guards are damaged
        return Err(*payload.downcast::<String>().expect("a message"));
    }
    let mut bytes = vec![0; 4 * 64];
    gpu.copy_out(x, &mut bytes).unwrap();
    Ok(bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

#[test]
fn guarded_memory_starts_as_nan_and_shows_what_was_written_beside_it() {
    if !device::emulator_only("guards around memory") {
        return;
    }
    let gpu = Guarded::new(Box::new(Emulated::new()));
    // The last size is not a multiple of the copied chunk.
    for len in [1, 300, 1 << 16, (1 << 18) + 1] {
        let at = gpu.allocate(len).unwrap().unwrap();
        let mut bytes = vec![0; len];
        gpu.copy_out(at, &mut bytes).unwrap();
        assert!(bytes.iter().all(|&b| b == 0xff), "{len} bytes");
        gpu.zero(at, len).unwrap();
        gpu.free(at).unwrap();
        for place in [-1, len as i64] {
            let at = gpu.allocate(len).unwrap().unwrap();
            gpu.copy_in(Address(at.0.wrapping_add_signed(place)), &[0]).unwrap();
            catch_unwind(AssertUnwindSafe(|| gpu.free(at))).expect_err("a guard that was written to");
        }
    }
}

#[test]
fn mistakes_of_kernels_and_launches_are_found() {
    if !device::emulator_only("what the emulator finds") {
        return;
    }
    let refused = |name, threads, args: &dyn Fn(Address) -> Vec<Arg>, what: &str| {
        let error = run(name, threads, 128, args).expect_err(name);
        assert!(error.contains(what), "{name}: {error}");
    };
    refused("beyond", 32, &|x| vec![Arg::Pointer(x), Arg::U64(64)], "wrote behind an allocation of 256 bytes");
    refused("dynamic_beyond", 32, &|x| vec![Arg::Pointer(x)], "beyond the dynamic shared memory");
    refused("diverging", 64, &|x| vec![Arg::Pointer(x)], "never reach");
    refused("ordered", 96, &|x| vec![Arg::Pointer(x)], "blocks of 96 threads");
    refused("ordered", 32, &|x| vec![Arg::Pointer(x), Arg::U32(1)], "takes p, not pu");
    refused("beyond", 32, &|x| vec![Arg::Pointer(x), Arg::U32(64)], "takes pl, not pu");
    refused("missing", 32, &|x| vec![Arg::Pointer(x)], "no kernel missing");
    let racing = run("racing", 64, 0, |x| vec![Arg::Pointer(x)]).unwrap();
    assert!(racing.iter().any(|x| x.is_nan()), "shared memory starts as NaN");
    let ordered = run("ordered", 64, 0, |x| vec![Arg::Pointer(x)]).unwrap();
    assert_eq!(ordered, (0..64).rev().map(|i| i as f32).collect::<Vec<_>>());
}

#[test]
fn of_equal_logits_the_lowest_class_is_the_greedy_one() {
    let gpu = cuda(device::gpu(), Dtype::F32, Reuse::Never);
    for classes in [1, 7, 1500] {
        let w = gpu.weight(HostTensor::encode(Dtype::F32, vec![classes, 1], &vec![1.0; classes]));
        let targets: Vec<u32> = (0..classes.min(3) as u32).collect();
        let x = gpu.upload(targets.len(), 1, &vec![0.5; targets.len()]);
        let rows = gpu.linear_cross_entropy_rows(&x, &w, &gpu.indices(&targets));
        assert!(rows.iter().enumerate().all(|(i, row)| row.greedy == (i == 0)), "{rows:?}");
    }
}

/// One pass instead of three changes no bit: silu(gate) · up and its gradient are rounded to the format of the rows before the
/// routing weight multiplies the one, and after it has multiplied the other.
#[test]
fn swiglu_with_routing_weights_rounds_as_swiglu_and_then_the_weights() {
    if !device::emulator_only("bits of two kernels, in which a compiler may contract differently") {
        return;
    }
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let gpu = device::gpu();
        let b = cuda(gpu.clone(), dtype, Reuse::Never);
        let mut p = Probe { b: &b, dtype, stored: dtype, rng: Rng::new(5), found: Vec::new() };
        let (tokens, experts, top_k, f) = (9, 5, 3, 37);
        let rounded = |values: &[f32]| HostTensor::encode(dtype, vec![values.len()], values).to_f32();
        let logits = b.router_logits(&p.tensor(tokens, 8, 1.0), &p.weight(&[experts, 8]));
        let routing = b.route(&logits, top_k, true);
        let dispatch = b.dispatch(&routing, experts);
        let gate_up = p.tensor(tokens * top_k, 2 * f, 3.0);
        let dy = p.values(tokens * top_k * f, 1.0);

        // The weight of each sorted row, in F32, where silu(64) / 64 is 1.
        let (exact, rows) = (cuda(gpu.clone(), Dtype::F32, Reuse::Never), tokens * top_k);
        let one = exact.upload(rows, 2, &[64.0, 1.0 / 64.0].repeat(rows));
        let weights = exact.download(&exact.weighted_swiglu(&one, &routing, &dispatch));
        assert!(weights.iter().all(|w| (0.0..1.0).contains(w)), "{weights:?}");
        let scaled = |x: &[f32]| rounded(&x.iter().enumerate().map(|(i, x)| x * weights[i / f]).collect::<Vec<_>>());

        let want = scaled(&b.download(&b.swiglu(&gate_up)));
        assert_eq!(b.download(&b.weighted_swiglu(&gate_up, &routing, &dispatch)), want, "{dtype:?}");
        let want = b.download(&b.swiglu_backward(&b.upload(rows, f, &scaled(&dy)), &gate_up));
        let (dx, _) = b.weighted_swiglu_backward(b.upload(rows, f, &dy), &gate_up, &routing, &dispatch);
        assert_eq!(b.download(&dx), want, "{dtype:?}");
    }
}

#[test]
fn gradients_of_inputs_are_rounded_once() {
    let b = cuda(device::gpu(), Dtype::Bf16, Reuse::Never);
    let weight = |rows: usize, values: &[f32]| {
        b.weight(HostTensor::encode(Dtype::Bf16, vec![rows, values.len() / rows], values))
    };
    let power = |n: i32| 2f32.powi(n);
    // Gradients of logits are in F32. 2^-9 beside 1 is beyond BF16, and here it is all that is left in the sum.
    let dlogits = b.router_logits(&b.upload(1, 2, &[1.0, power(-9)]), &weight(2, &[1.0, 1.0, -1.0, 0.0]));
    assert_eq!(b.download(&dlogits), [1.0 + power(-9), -1.0]);
    let ones = weight(2, &[1.0, 1.0]);
    assert_eq!(b.download(&b.linear_backward_input(&dlogits, &ones)), [power(-9)]);
    // 1 + 2^-8 + 2^-18 is 1 + 2^-7 in BF16; if 2^-8 + 2^-18 is rounded first, the sum is 1.
    let mut dx = b.upload(1, 1, &[1.0]);
    b.add_linear_backward_input(&b.upload(1, 2, &[1.0, power(-10)]), &weight(2, &[power(-8), power(-8)]), &mut dx);
    assert_eq!(b.download(&dx), [1.0 + power(-7)]);
    // What is not finite stays so.
    let dlogits = b.router_logits(&b.upload(1, 1, &[3e38]), &weight(2, &[3e38, 1.0]));
    assert_eq!(b.download(&dlogits)[0], f32::INFINITY);
    assert_eq!(b.download(&b.linear_backward_input(&dlogits, &ones)), [f32::INFINITY]);
}
