//! Operations that a GPU does in one pass are, on the CPU, the operations of which they consist: the same bits.

use crate::values::Rng;
use moewarden::backend::cpu::Cpu;
use moewarden::backend::{AdamwStep, Backend, Dtype, HostTensor, Packing, Rope};

type Tensor = <Cpu as Backend>::Tensor;
type Weight = <Cpu as Backend>::Weight;

struct Random {
    cpu: Cpu,
    rng: Rng,
}

impl Random {
    fn new() -> Self {
        Self { cpu: Cpu::new(2), rng: Rng::new(21) }
    }

    fn tensor(&mut self, rows: usize, cols: usize) -> Tensor {
        let values = self.rng.values(rows * cols, 1.0);
        self.cpu.upload(rows, cols, &values)
    }

    fn weight(&mut self, dtype: Dtype, n: usize) -> Weight {
        self.cpu.weight(HostTensor::encode(dtype, vec![n], &self.rng.values(n, 1.0)))
    }

    fn copy(&self, x: &Tensor) -> Tensor {
        let (rows, cols) = self.cpu.shape(x);
        self.cpu.upload(rows, cols, &self.cpu.download(x))
    }

    fn bits(&self, x: &Tensor) -> Vec<u32> {
        self.cpu.download(x).into_iter().map(f32::to_bits).collect()
    }
}

#[test]
fn experts_are_combined_onto_the_residual() {
    let mut r = Random::new();
    let (tokens, experts, top_k, d) = (13, 5, 2, 24);
    let logits = r.rng.values(tokens * experts, 2.0);
    let (x, residual) = (r.tensor(tokens * top_k, d), r.tensor(tokens, d));
    let (shared, gate) = (r.tensor(tokens, d), r.tensor(tokens, 1));
    let b = &r.cpu;
    let dispatch = b.dispatch(&b.route(&b.upload(tokens, experts, &logits), top_k, true), experts);
    for shared in [None, Some((&shared, &gate))] {
        let mut want = b.combine_rows(&x, &dispatch);
        if let Some((shared, gate)) = shared {
            b.add_assign(&mut want, &b.sigmoid_gate(shared, gate));
        }
        b.add_assign(&mut want, &residual);
        assert_eq!(r.bits(&b.combine_rows_onto(&x, &dispatch, shared, &residual)), r.bits(&want));
    }
}

#[test]
fn norms_with_residuals_and_rotations() {
    let mut r = Random::new();
    let packing = Packing::of_lengths([5, 1, 4]);
    let (rows, heads, dim, eps) = (packing.rows(), 3, 8, 1e-5);
    let (x, y, dy) = (r.tensor(rows, heads * dim), r.tensor(rows, heads * dim), r.tensor(rows, heads * dim));
    for width in [dim, heads * dim] {
        let w = r.weight(Dtype::Bf16, width);
        let b = &r.cpu;
        let seqs = b.sequences(&packing, &Rope { inv_freq: vec![1.0, 0.3, 0.1, 0.03], scale: 1.0 });
        let (mut sum, mut want) = (r.copy(&x), r.copy(&x));
        let normed = b.add_rms_norm(&mut sum, &y, &w, eps);
        b.add_assign(&mut want, &y);
        assert_eq!(r.bits(&sum), r.bits(&want));
        assert_eq!(r.bits(&normed), r.bits(&b.rms_norm(&want, &w, eps)));

        let [mut one, mut other] = [b.buffer(width), b.buffer(width)];
        let (mut got, mut want) = (r.copy(&y), r.copy(&y));
        b.add_rms_norm_backward(&dy, &x, &w, eps, Some((&mut one, 0)), &mut got);
        b.add_assign(&mut want, &b.rms_norm_backward(&dy, &x, &w, eps, Some((&mut other, 0))));
        assert_eq!(r.bits(&got), r.bits(&want));
        assert_eq!(b.buffer_read(&one, 0..width), b.buffer_read(&other, 0..width));

        let mut want = b.rms_norm(&x, &w, eps);
        b.rope(&mut want, dim, &seqs);
        assert_eq!(r.bits(&b.rms_norm_rope(&x, &w, eps, dim, &seqs)), r.bits(&want));
        let mut back = r.copy(&dy);
        b.rope_backward(&mut back, dim, &seqs);
        let want = b.rms_norm_backward(&back, &x, &w, eps, Some((&mut other, 0)));
        let got = b.rms_norm_rope_backward(r.copy(&dy), &x, &w, eps, dim, &seqs, Some((&mut one, 0)));
        assert_eq!(r.bits(&got), r.bits(&want));
        assert_eq!(b.buffer_read(&one, 0..width), b.buffer_read(&other, 0..width));
    }
}

#[test]
fn adamw_writes_the_parameters_of_its_range() {
    let mut r = Random::new();
    let lens = [(Dtype::Bf16, 5), (Dtype::F32, 9), (Dtype::F16, 3)];
    let n = 17;
    let (start, grad) = (r.rng.values(n, 1.0), r.rng.values(n, 1.0));
    let run = |together: bool| {
        let b = Cpu::new(1);
        let filled = |values: &[f32]| {
            let mut buffer = b.buffer(n);
            b.buffer_write(&mut buffer, 0, values);
            buffer
        };
        let (mut master, mut m, mut v, grad) = (filled(&start), b.buffer(n), b.buffer(n), filled(&grad));
        let hosts = lens.map(|(dtype, n)| HostTensor::encode(dtype, vec![n], &vec![0.0; n]));
        let mut weights = hosts.map(|host| b.weight(host));
        let at = [0..5, 5..14, 14..17];
        let step =
            AdamwStep { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.1, step: 1, grad_scale: 0.5 };
        if together {
            let written = at.into_iter().zip(&mut weights).collect();
            b.adamw_weights(&mut master, &mut m, &mut v, 0..n, &grad, 0, &step, written);
        } else {
            b.adamw(&mut master, &mut m, &mut v, 0..n, &grad, 0, &step);
            at.into_iter().zip(&mut weights).for_each(|(at, w)| b.set_weight(w, &master, at));
        }
        let bytes = weights.each_ref().map(|w| b.weight_host(w).bytes.to_vec());
        (bytes, [&master, &m, &v].map(|x| b.buffer_read(x, 0..n)))
    };
    assert_eq!(run(true), run(false));
    assert_ne!(run(true).1[0], start);
}
