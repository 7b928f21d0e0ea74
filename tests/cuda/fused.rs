//! Operations of the GPU backend that do in one pass what others do in several: the same bits, with emulated kernels. With
//! `MOEWARDEN_TEST_GPU=0` they run on that GPU, where a compiler may contract products and sums of two kernels differently; what
//! holds there in any case is compared.

use std::ops::Range;
use std::sync::Arc;

use crate::emulator::device;
use crate::values::Rng;
use moewarden::backend::cpu::Cpu;
use moewarden::backend::cuda::pool::Reuse;
use moewarden::backend::cuda::profile::{Profiled, Times};
use moewarden::backend::cuda::{Cuda, Tensor, Weight};
use moewarden::backend::{AdamwStep, Backend, Dtype, HostTensor, Packing, Rope};

fn profiled(dtype: Dtype) -> Cuda {
    let times = Arc::new(Times::default());
    Cuda::new(Arc::new(Profiled::new(device::gpu(), times.clone())), dtype, Reuse::Never).with_times(times)
}

/// How often the GPU did this.
fn times(b: &Cuda, what: &str) -> usize {
    let profile = b.profile().unwrap();
    let row = profile.lines().find(|row| row.ends_with(&format!(" x {what}")));
    row.map_or(0, |row| row.split_whitespace().rev().skip_while(|word| *word != "x").nth(1).unwrap().parse().unwrap())
}

fn filled<B: Backend>(b: &B, values: &[f32]) -> B::Buffer {
    let mut buffer = b.buffer(values.len());
    b.buffer_write(&mut buffer, 0, values);
    buffer
}

/// A buffer starts at an odd element in the second case, so that nothing is aligned.
const STARTS: [usize; 2] = [0, 3];

/// Two steps of AdamW; returns the state and the parameters.
fn adamw<B: Backend>(b: &B, start: usize, offloaded: bool, together: bool) -> (Vec<u32>, Vec<Vec<u8>>) {
    use Dtype::{Bf16, F16, F32};
    let parameters = [(Bf16, 1), (F32, 2048), (Bf16, 2049), (Bf16, 4096), (F16, 70), (F32, 8), (Bf16, 7000), (F32, 5)];
    let n: usize = parameters.iter().map(|(_, n)| n).sum();
    let mut rng = Rng::new(3);
    let mut buffer = |scale| filled(b, &rng.values(start + n, scale));
    let (mut master, mut m, grad) = (buffer(1.0), buffer(0.1), buffer(1.0));
    let mut v = b.buffer(start + n);
    let hosts = parameters.iter().map(|&(dtype, n)| HostTensor::encode(dtype, vec![1, n], &vec![9.0; n]));
    let mut weights: Vec<B::Weight> = match offloaded {
        true => b.offloaded_weights(hosts.collect()),
        false => hosts.map(|w| b.weight(w)).collect(),
    };
    let mut end = start;
    let mut range = |n| {
        end += n;
        end - n..end
    };
    let at: Vec<Range<usize>> = parameters.iter().map(|&(_, n)| range(n)).collect();
    for step in 1..3 {
        let step = AdamwStep { lr: 0.01, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.3 };
        if together {
            let written = at.iter().cloned().zip(&mut weights).collect();
            b.adamw_weights(&mut master, &mut m, &mut v, start..start + n, &grad, start, &step, written);
        } else {
            b.adamw(&mut master, &mut m, &mut v, start..start + n, &grad, start, &step);
            at.iter().zip(&mut weights).for_each(|(at, w)| b.set_weight(w, &master, at.clone()));
        }
    }
    let state = [&master, &m, &v].map(|x| b.buffer_read(x, 0..start + n)).concat();
    let written = weights.iter().map(|w| b.weight_host(w).bytes.to_vec());
    (state.iter().map(|x| x.to_bits()).collect(), written.collect())
}

#[test]
fn adamw_writes_the_weights_in_the_same_pass() {
    let (gpu, cpu) = (Cuda::new(device::gpu(), Dtype::Bf16, Reuse::Never), Cpu::new(1));
    for start in STARTS {
        let want = adamw(&cpu, start, false, false);
        assert!(adamw(&cpu, start, false, true) == want, "the CPU's operation is the two others");
        for offloaded in [false, true] {
            assert!(adamw(&gpu, start, offloaded, true) == want, "from {start}, offloaded: {offloaded}");
            assert!(adamw(&gpu, start, offloaded, false) == want, "from {start}, offloaded: {offloaded}, one by one");
        }
    }
    let b = profiled(Dtype::Bf16);
    adamw(&b, 0, false, true);
    // Of each step: one launch for each format, and two for the only parameter in F16.
    for kernel in ["adamw_weights_bf16", "adamw_weights_f32", "adamw", "cast_f32_f16"] {
        assert_eq!(times(&b, &format!("{kernel} (update.cu)")) + times(&b, &format!("{kernel} (elements.cu)")), 2);
    }
    assert_eq!(times(&b, "cast_f32_bf16 (elements.cu)"), 0);
}

#[test]
fn gradients_after_a_clearing_are_stored_and_the_rest_reads_as_zeros() {
    let mut rng = Rng::new(4);
    let (rows, inputs, outputs) = (9, 5, 7);
    let (n, x, dy) = (inputs * outputs, rng.values(rows * inputs, 1.0), rng.values(rows * outputs, 1.0));
    let garbage = rng.values(3 * n, 1.0);
    fn step<B: Backend>(b: &B, shape: [usize; 3], x: &[f32], dy: &[f32], garbage: &[f32], twice: bool) -> Vec<f32> {
        let [rows, inputs, outputs] = shape;
        let (x, dy, n) = (b.upload(rows, inputs, x), b.upload(rows, outputs, dy), inputs * outputs);
        let mut dw = filled(b, garbage);
        b.buffer_clear(&mut dw);
        for _ in 0..if twice { 2 } else { 1 } {
            b.linear_backward_weight(&dy, &x, &mut dw, n);
        }
        b.buffer_read(&dw, 0..3 * n)
    }
    let b = profiled(Dtype::F32);
    let shape = [rows, inputs, outputs];
    let [once, twice] = [false, true].map(|twice| step(&b, shape, &x, &dy, &garbage, twice));
    assert!(once[..n].iter().chain(&once[2 * n..]).all(|x| x.to_bits() == 0), "what was not written is zero");
    for (one, two) in once.iter().zip(&twice) {
        assert_eq!(one + one, *two, "the second gradient is added");
    }
    let want = step(&Cpu::new(1), shape, &x, &dy, &garbage, true);
    assert!(twice.iter().zip(&want).all(|(got, want)| (got - want).abs() < 1e-5), "{twice:?}, not {want:?}");
    assert_eq!(times(&b, "zero"), 4, "two runs, each of which reads the two ranges that were never written");
}

#[test]
fn part_of_a_cleared_buffer_is_read_or_written_as_if_it_had_been_cleared_at_once() {
    let b = profiled(Dtype::F32);
    let mut buffer = filled(&b, &[7.0; 100]);
    b.buffer_clear(&mut buffer);
    assert_eq!(times(&b, "zero"), 0, "nothing was read");
    b.buffer_write(&mut buffer, 10, &[1.0; 20]);
    assert_eq!(times(&b, "zero"), 0, "a copy overwrites");
    let all: Vec<f32> = (0..100).map(|i| if (10..30).contains(&i) { 1.0 } else { 0.0 }).collect();
    assert_eq!(b.buffer_read(&buffer, 5..15), all[5..15]);
    assert_eq!(b.buffer_read(&buffer, 0..100), all);
    assert_eq!(times(&b, "zero"), 3, "5..10, 0..5 and 30..100");
    assert_eq!(b.sum_squares(&buffer, 0..100), 20.0);
    b.buffer_clear(&mut buffer);
    assert_eq!(b.sum_squares(&buffer, 0..100), 0.0);
}

// --- passes over activations ------------------------------------------------------------------------------------------------

/// Tensors of random values in the format of a backend.
struct Random<'a> {
    b: &'a Cuda,
    rng: Rng,
}

impl Random<'_> {
    fn tensor(&mut self, rows: usize, cols: usize, scale: f32) -> Tensor {
        self.b.upload(rows, cols, &self.rng.values(rows * cols, scale))
    }

    fn weight(&mut self, n: usize) -> Weight {
        self.b.weight(HostTensor::encode(self.b.compute(), vec![n], &self.rng.values(n, 1.0)))
    }
}

/// Runs `check` with F32 and BF16, if the device has the bits of the emulator.
fn with_both_formats(check: impl Fn(&Cuda, Random<'_>)) {
    if !device::emulator_only("bits of two kernels, in which a compiler may contract differently") {
        return;
    }
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let b = Cuda::new(device::shuffled(2), dtype, Reuse::Never);
        check(&b, Random { b: &b, rng: Rng::new(6) });
    }
}

#[track_caller]
fn same(b: &Cuda, got: &Tensor, want: &Tensor, what: &str) {
    let bits = |x: &Tensor| b.download(x).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert_eq!((got.rows(), got.cols()), (want.rows(), want.cols()), "{what}");
    assert!(bits(got) == bits(want), "{what}, {:?}", b.compute());
}

#[test]
fn experts_are_combined_onto_the_residual_with_the_bits_of_separate_passes() {
    with_both_formats(|b, mut random| {
        for (tokens, experts, top_k, d) in [(1, 1, 1, 1), (7, 5, 2, 13), (33, 16, 4, 264), (3, 9, 8, 2056)] {
            let routing = b.route(&b.upload(tokens, experts, &random.rng.values(tokens * experts, 2.0)), top_k, true);
            let dispatch = b.dispatch(&routing, experts);
            let x = random.tensor(tokens * top_k, d, 1.0);
            let (residual, shared, gate) =
                (random.tensor(tokens, d, 2.0), random.tensor(tokens, d, 1.0), random.tensor(tokens, 1, 2.0));
            for shared in [None, Some((&shared, &gate))] {
                let mut want = b.combine_rows(&x, &dispatch);
                if let Some((shared, gate)) = shared {
                    b.add_assign(&mut want, &b.sigmoid_gate(shared, gate));
                }
                b.add_assign(&mut want, &residual);
                let got = b.combine_rows_onto(&x, &dispatch, shared, &residual);
                same(b, &got, &want, &format!("{tokens} tokens of {d}, shared expert: {}", shared.is_some()));
            }
        }
    });
}

#[test]
fn a_norm_behind_a_residual_has_the_bits_of_separate_passes() {
    with_both_formats(|b, mut random| {
        for (rows, groups, n) in [(1, 1, 1), (5, 3, 7), (9, 1, 64), (3, 2, 1032), (2, 1, 2500), (30, 1, 2048)] {
            let what = format!("[{rows}, {groups} x {n}]");
            let cols = groups * n;
            let (x, y, w) = (random.tensor(rows, cols, 1.0), random.tensor(rows, cols, 1.0), random.weight(n));
            let copy = |x: &Tensor| b.upload(rows, cols, &b.download(x));
            let (mut sum, mut want) = (copy(&x), copy(&x));
            let normed = b.add_rms_norm(&mut sum, &y, &w, 1e-3);
            b.add_assign(&mut want, &y);
            same(b, &sum, &want, &format!("the sum of {what}"));
            same(b, &normed, &b.rms_norm(&want, &w, 1e-3), &format!("the norm of {what}"));

            let (dy, dx) = (random.tensor(rows, cols, 1.0), random.tensor(rows, cols, 1.0));
            for trained in [false, true] {
                let [mut one, mut other] = [b.buffer(n + 1), b.buffer(n + 1)];
                let (mut got, mut want) = (copy(&dx), copy(&dx));
                b.add_rms_norm_backward(&dy, &x, &w, 1e-3, trained.then_some((&mut one, 1)), &mut got);
                let separate = b.rms_norm_backward(&dy, &x, &w, 1e-3, trained.then_some((&mut other, 1)));
                b.add_assign(&mut want, &separate);
                same(b, &got, &want, &format!("dx of {what}"));
                assert_eq!(b.buffer_read(&one, 0..n + 1), b.buffer_read(&other, 0..n + 1), "dw of {what}");
            }
        }
    });
}

#[test]
fn a_norm_of_heads_with_their_rotation_has_the_bits_of_separate_passes() {
    with_both_formats(|b, mut random| {
        let packings = [Packing::of_lengths([4, 1, 7]), Packing::continuing(3, 90)];
        // Norms of each head, of all heads together, and of one half of them; heads whose half is not a whole load.
        for (half, heads, norms) in
            [(1, 1, 1), (3, 4, 4), (4, 3, 3), (4, 6, 1), (32, 5, 5), (64, 2, 2), (64, 16, 1), (20, 4, 2)]
        {
            for packing in &packings {
                let inv_freq = (0..half).map(|i| 0.7f32.powi(i as i32)).collect();
                let seqs = b.sequences(packing, &Rope { inv_freq, scale: 1.25 });
                let (rows, cols) = (packing.rows(), heads * 2 * half);
                let what = format!("{rows} rows, {heads} heads of 2 x {half}, {norms} norms");
                let (x, w) = (random.tensor(rows, cols, 1.0), random.weight(cols / norms));
                let mut want = b.rms_norm(&x, &w, 1e-3);
                b.rope(&mut want, 2 * half, &seqs);
                same(b, &b.rms_norm_rope(&x, &w, 1e-3, 2 * half, &seqs), &want, &format!("y of {what}"));
                let dy = random.tensor(rows, cols, 1.0);
                let copy = || b.upload(rows, cols, &b.download(&dy));
                for trained in [false, true] {
                    let [mut one, mut other] = [0; 2].map(|_| b.buffer(w.len()));
                    let mut back = copy();
                    b.rope_backward(&mut back, 2 * half, &seqs);
                    let want = b.rms_norm_backward(&back, &x, &w, 1e-3, trained.then_some((&mut one, 0)));
                    let dw = trained.then_some((&mut other, 0));
                    let got = b.rms_norm_rope_backward(copy(), &x, &w, 1e-3, 2 * half, &seqs, dw);
                    same(b, &got, &want, &format!("dx of {what}"));
                    assert_eq!(b.buffer_read(&one, 0..w.len()), b.buffer_read(&other, 0..w.len()), "dw of {what}");
                }
            }
        }
    });
}
