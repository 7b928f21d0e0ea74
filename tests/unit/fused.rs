//! Operations that a GPU does in one pass are, on the CPU, the operations of which they consist: the same bits.

use crate::values::Rng;
use moewarden::backend::cpu::Cpu;
use moewarden::backend::{AdamwStep, Backend, Dtype, HostTensor};

struct Random {
    rng: Rng,
}

impl Random {
    fn new() -> Self {
        Self { rng: Rng::new(21) }
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
