//! Operations of the GPU backend that do in one pass what others do in several: the same bits, with emulated kernels. With
//! `MOEWARDEN_TEST_GPU=0` they run on that GPU, where a compiler may contract products and sums of two kernels differently; what
//! holds there in any case is compared.

use std::ops::Range;
use std::sync::Arc;

use crate::emulator::device;
use crate::values::Rng;
use moewarden::backend::cpu::Cpu;
use moewarden::backend::cuda::Cuda;
use moewarden::backend::cuda::pool::Reuse;
use moewarden::backend::cuda::profile::{Profiled, Times};
use moewarden::backend::{AdamwStep, Backend, Dtype, HostTensor};

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
