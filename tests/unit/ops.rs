//! Every operation of the CPU backend: forward passes against plain f64 definitions, backward passes against central
//! differences of those, bit-identical results for 1, 2 and 3 threads, and no use of recycled memory's old values.

use crate::reference as r;
use crate::values::{Rng, assert_close, wide};
use moewarden::backend::cpu::{Buffer, Cpu, Tensor, Weight};
use moewarden::backend::{
    AdamwStep, Backend, Dtype, ExpertGrad, GradReduction, Heads, HostTensor, Packing, Rope, encode_into,
};

/// Sums of some hundred products of numbers below 1 in f32 have errors of 100 · 2^-24 = 6e-6; the rest is a margin for
/// the blocked summation order.
const ABS: f64 = 2e-5;
const REL: f64 = 2e-5;
const WHY: &str = "f32 sums of up to a few hundred terms of size 1";

/// A backend whose memory pool has only NaN in the sizes that small tests use.
fn poisoned(threads: usize) -> Cpu {
    let cpu = Cpu::new(threads);
    let held: Vec<Tensor> = (0..200).map(|i| cpu.upload(1, 64 * (i + 1), &vec![f32::NAN; 64 * (i + 1)])).collect();
    let more: Vec<Tensor> = (0..12).map(|_| cpu.upload(1, 512, &[f32::NAN; 512])).collect();
    drop((held, more));
    cpu
}

fn tensor(cpu: &Cpu, cols: usize, values: &[f32]) -> Tensor {
    cpu.upload(values.len() / cols, cols, values)
}

/// A weight in `dtype` and its rounded values.
fn weight(cpu: &Cpu, dtype: Dtype, shape: &[usize], values: &[f32]) -> (Weight, Vec<f32>) {
    let host = HostTensor::encode(dtype, shape.to_vec(), values);
    let rounded = host.to_f32();
    (cpu.weight(host), rounded)
}

fn read(cpu: &Cpu, b: &Buffer, len: usize) -> Vec<f32> {
    cpu.buffer_read(b, 0..len)
}

const DTYPES: [Dtype; 3] = [Dtype::F32, Dtype::F16, Dtype::Bf16];

#[test]
fn linear_and_its_backwards() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(1);
    for (case, (m, n, k)) in
        [(1, 1, 1), (3, 5, 7), (0, 4, 3), (65, 19, 33), (530, 3, 9), (2, 300, 17)].into_iter().enumerate()
    {
        for dtype in DTYPES {
            let x = rng.values(m * k, 1.0);
            let (w, w32) = weight(&cpu, dtype, &[n, k], &rng.values(n * k, 1.0));
            let (b, b32) = weight(&cpu, dtype, &[n], &rng.values(n, 1.0));
            let c = rng.values(m * n, 1.0);
            let (tx, tc) = (cpu.upload(m, k, &x), cpu.upload(m, n, &c));

            let y = cpu.linear(&tx, &w, Some(&b));
            let mut want = r::matmul_nt(&wide(&x), &wide(&w32), m, n, k);
            want.iter_mut().enumerate().for_each(|(i, y)| *y += f64::from(b32[i % n]));
            assert_eq!(cpu.shape(&y), (m, n));
            assert_close(&cpu.download(&y), &want, ABS, REL, WHY);

            // The product is linear in both arguments, so finite differences are exact; small cases suffice.
            let dx = cpu.download(&cpu.linear_backward_input(&tc, &w));
            let start = rng.values(n * k + 2, 1.0);
            let mut dw = cpu.buffer(n * k + 2);
            cpu.buffer_write(&mut dw, 0, &start);
            cpu.linear_backward_weight(&tc, &tx, &mut dw, 1);
            let mut db = cpu.buffer(n + 1);
            cpu.bias_backward(&tc, &mut db, 1);
            let mut got_dw = read(&cpu, &dw, n * k + 2);
            assert_eq!((got_dw[0], got_dw[n * k + 1]), (start[0], start[n * k + 1]), "written outside the range");
            got_dw.iter_mut().zip(&start).for_each(|(g, s)| *g -= s);
            if case < 3 {
                let loss = |x: &[f64], w: &[f64]| r::dot(&r::matmul_nt(x, w, m, n, k), &wide(&c));
                assert_close(&dx, &r::gradient(&wide(&x), |x| loss(x, &wide(&w32))), ABS, REL, WHY);
                let want = r::gradient(&wide(&w32), |w| loss(&wide(&x), w));
                assert_close(&got_dw[1..=n * k], &want, ABS, REL, WHY);
            } else {
                let (cw, xw, ww) = (wide(&c), wide(&x), wide(&w32));
                let want: Vec<f64> =
                    (0..m * k).map(|i| (0..n).map(|o| cw[i / k * n + o] * ww[o * k + i % k]).sum()).collect();
                assert_close(&dx, &want, ABS, REL, WHY);
                let want: Vec<f64> =
                    (0..n * k).map(|i| (0..m).map(|t| cw[t * n + i / k] * xw[t * k + i % k]).sum()).collect();
                assert_close(&got_dw[1..=n * k], &want, 3.0 * ABS, REL, WHY);
            }
            let want: Vec<f64> = (0..n).map(|o| (0..m).map(|t| f64::from(c[t * n + o])).sum()).collect();
            assert_close(&read(&cpu, &db, n + 1)[1..], &want, ABS, REL, WHY);
        }
    }
}

#[test]
fn a_16_bit_weight_may_exceed_a_slab() {
    // 600 · 1200 elements exceed one tile of converted weights, forward and backward.
    let cpu = poisoned(2);
    let mut rng = Rng::new(2);
    let (m, n, k) = (5, 600, 1200);
    let (x, c) = (rng.values(m * k, 1.0), rng.values(m * n, 1.0));
    let (w, w32) = weight(&cpu, Dtype::Bf16, &[n, k], &rng.values(n * k, 1.0));
    let y = cpu.linear(&cpu.upload(m, k, &x), &w, None);
    assert_close(&cpu.download(&y), &r::matmul_nt(&wide(&x), &wide(&w32), m, n, k), 1e-4, REL, "1200 terms");
    let (cw, ww) = (wide(&c), wide(&w32));
    let want: Vec<f64> = (0..m * k).map(|i| (0..n).map(|o| cw[i / k * n + o] * ww[o * k + i % k]).sum()).collect();
    let dx = cpu.linear_backward_input(&cpu.upload(m, n, &c), &w);
    let mut sum = cpu.linear_backward_input(&cpu.upload(m, n, &c), &w);
    cpu.add_linear_backward_input(&cpu.upload(m, n, &c), &w, &mut sum);
    let twice: Vec<f32> = cpu.download(&dx).iter().map(|x| x + x).collect();
    assert_eq!(cpu.download(&sum), twice);
    assert_close(&cpu.download(&dx), &want, 1e-4, REL, "600 terms");
}

#[test]
fn embedding_and_gathered_rows() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(3);
    let (v, d) = (11, 7);
    let ids = [3u32, 10, 3, 0, 3, 9];
    for dtype in DTYPES {
        let (w, w32) = weight(&cpu, dtype, &[v, d], &rng.values(v * d, 1.0));
        let index = cpu.indices(&ids);
        let y = cpu.download(&cpu.embedding(&index, &w));
        let want: Vec<f32> = ids.iter().flat_map(|&i| w32[i as usize * d..(i as usize + 1) * d].to_vec()).collect();
        assert_eq!(y, want);
    }
    let dy = rng.values(ids.len() * d, 1.0);
    let mut dw = cpu.buffer(v * d + 5);
    cpu.embedding_backward(&tensor(&cpu, d, &dy), &cpu.indices(&ids), &mut dw, 5);
    let mut want = vec![0f32; v * d + 5];
    for (t, &id) in ids.iter().enumerate() {
        (0..d).for_each(|c| want[5 + id as usize * d + c] += dy[t * d + c]);
    }
    assert_eq!(read(&cpu, &dw, v * d + 5), want, "gradients are added in token order");

    let x = rng.values(v * d, 1.0);
    let rows = [4u32, 0, 10];
    let picked = cpu.gather_rows(&tensor(&cpu, d, &x), &cpu.indices(&rows));
    let want: Vec<f32> = rows.iter().flat_map(|&i| x[i as usize * d..(i as usize + 1) * d].to_vec()).collect();
    assert_eq!(cpu.download(&picked), want);
    let mut dx = tensor(&cpu, d, &x);
    cpu.gather_rows_backward(&picked, &cpu.indices(&rows), &mut dx);
    let mut want = x.clone();
    rows.iter().for_each(|&i| (0..d).for_each(|c| want[i as usize * d + c] *= 2.0));
    assert_eq!(cpu.download(&dx), want);
    assert_eq!(cpu.shape(&cpu.gather_rows(&dx, &cpu.indices(&[]))), (0, d));
}

#[test]
fn rows_are_written_clamped_and_added() {
    let cpu = poisoned(2);
    let mut x = cpu.upload(3, 3, &[7.0, 7.0, 7.0, 1.0, -5.0, 2.0, 7.0, 7.0, 7.0]);
    let written = cpu.upload(2, 3, &[0.0, -0.5, 9.0, 3.0, 4.0, -2.0]);
    cpu.write_rows(&mut x, &cpu.indices(&[2, 0]), &written);
    assert_eq!(cpu.download(&x), [3.0, 4.0, -2.0, 1.0, -5.0, 2.0, 0.0, -0.5, 9.0]);
    cpu.write_rows(&mut x, &cpu.indices(&[]), &cpu.zeros(0, 3));
    let mut x = cpu.gather_rows(&x, &cpu.indices(&[1, 0, 2]));
    let y = cpu.upload(3, 3, &[1.0; 9]);
    cpu.add_assign(&mut x, &y);
    assert_eq!(cpu.download(&x), [2.0, -4.0, 3.0, 4.0, 5.0, -1.0, 1.0, 0.5, 10.0]);
    cpu.clamp(&mut x, 4.0);
    assert_eq!(cpu.download(&x), [2.0, -4.0, 3.0, 4.0, 4.0, -1.0, 1.0, 0.5, 4.0]);
    let mut dy = cpu.upload(3, 3, &[7.0; 9]);
    cpu.clamp_backward(&mut dy, &x, 4.0);
    assert_eq!(cpu.download(&dy), [7.0, 0.0, 7.0, 0.0, 0.0, 7.0, 7.0, 7.0, 0.0]);
    assert_eq!(cpu.download(&cpu.zeros(2, 3)), [0.0; 6]);
}

#[test]
fn rms_norm_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(4);
    for (rows, groups, n, dtype) in
        [(1, 1, 1, Dtype::F32), (5, 3, 7, Dtype::Bf16), (130, 1, 5, Dtype::F16), (0, 2, 4, Dtype::F32)]
    {
        let cols = groups * n;
        let (x, c) = (rng.values(rows * cols, 1.0), rng.values(rows * cols, 1.0));
        let (w, w32) = weight(&cpu, dtype, &[n], &rng.values(n, 1.5));
        let eps = 1e-3f32;
        let (tx, tc) = (cpu.upload(rows, cols, &x), cpu.upload(rows, cols, &c));
        let y = cpu.download(&cpu.rms_norm(&tx, &w, eps));
        assert_close(&y, &r::rms_norm(&wide(&x), &wide(&w32), eps.into()), 1e-6, 1e-6, "a few roundings");
        let loss = |x: &[f64], w: &[f64]| r::dot(&r::rms_norm(x, w, eps.into()), &wide(&c));
        let mut dw = cpu.buffer(n + 3);
        let dx = cpu.rms_norm_backward(&tc, &tx, &w, eps, Some((&mut dw, 3)));
        // The second derivative by x is of the order 1/|x|², which is large for groups of one small entry.
        let want = r::gradient(&wide(&x), |x| loss(x, &wide(&w32)));
        assert_close(&cpu.download(&dx), &want, 5e-5, 1e-4, "differences of terms that cancel, for tiny |x|");
        assert_close(&read(&cpu, &dw, n + 3)[3..], &r::gradient(&wide(&w32), |w| loss(&wide(&x), w)), ABS, REL, WHY);
        let frozen = cpu.rms_norm_backward(&tc, &tx, &w, eps, None);
        assert_eq!(cpu.download(&frozen), cpu.download(&dx));
    }
}

#[test]
fn rope_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(5);
    let rope = Rope { inv_freq: vec![1.0, 0.1, 0.003], scale: 1.25 };
    for (packing, heads) in [(Packing::of_lengths([4, 1, 7]), 3), (Packing::continuing(2, 1000), 1)] {
        let (rows, dim) = (packing.rows(), 6);
        let seqs = cpu.sequences(&packing, &rope);
        let (x, c) = (rng.values(rows * heads * dim, 1.0), rng.values(rows * heads * dim, 1.0));
        let mut y = tensor(&cpu, heads * dim, &x);
        cpu.rope(&mut y, dim, &seqs);
        let forward = |x: &[f64]| r::rope(x, heads * dim, &packing.positions(), &rope.inv_freq, 1.25);
        assert_close(&cpu.download(&y), &forward(&wide(&x)), 1e-6, 1e-6, "cos, sin and two products rounded");
        let mut dx = tensor(&cpu, heads * dim, &c);
        cpu.rope_backward(&mut dx, dim, &seqs);
        let want = r::gradient(&wide(&x), |x| r::dot(&forward(x), &wide(&c)));
        assert_close(&cpu.download(&dx), &want, 1e-6, 1e-6, "as forward");
    }
}

#[test]
fn attention_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(6);
    let cases = [
        (Packing::of_lengths([1]), 1, 1, 2, None),
        (Packing::of_lengths([5, 1, 3]), 4, 2, 3, None),
        (Packing::of_lengths([7, 2]), 3, 1, 2, Some(3)),
        (Packing::of_lengths([6, 4]), 2, 2, 5, Some(1)),
        (Packing::continuing(1, 9), 2, 1, 4, None),
        (Packing::continuing(3, 8), 2, 1, 4, Some(4)),
        (Packing::of_lengths([0, 3, 0]), 2, 2, 2, None),
        // A cache of three sequences: room for later tokens behind each, and one that takes no part.
        (Packing { queries: vec![0, 0, 2, 2, 3, 3], keys: vec![0, 2, 7, 9, 12, 14] }, 2, 1, 4, None),
    ];
    for (packing, heads, key_heads, dim, window) in cases {
        check_attention(&cpu, &mut rng, &packing, Heads { queries: heads, keys: key_heads, dim, window }, true);
    }
    // Longer than a block of queries. Differences along every axis would take minutes.
    for (packing, window) in [(Packing::of_lengths([150, 65]), None), (Packing::of_lengths([200]), Some(70))] {
        check_attention(&cpu, &mut rng, &packing, Heads { queries: 4, keys: 2, dim: 6, window }, false);
    }
}

fn check_attention(cpu: &Cpu, rng: &mut Rng, packing: &Packing, heads: Heads, differences: bool) {
    let rope = Rope { inv_freq: vec![], scale: 1.0 };
    let seqs = cpu.sequences(packing, &rope);
    let keys = packing.keys[packing.len()];
    let (width, key_width) = (heads.queries * heads.dim, heads.keys * heads.dim);
    let q = rng.values(packing.rows() * width, 2.0);
    let (k, v) = (rng.values(keys * key_width, 2.0), rng.values(keys * key_width, 1.0));
    let c = rng.values(q.len(), 1.0);
    let (tq, tk, tv) = (tensor(cpu, width, &q), tensor(cpu, key_width, &k), tensor(cpu, key_width, &v));
    let (y, ()) = cpu.attention(&tq, &tk, &tv, &seqs, &heads);
    let geometry = r::Attention {
        queries: &packing.queries,
        keys: &packing.keys,
        heads: heads.queries,
        key_heads: heads.keys,
        dim: heads.dim,
        window: heads.window,
    };
    let (qw, kw, vw) = (wide(&q), wide(&k), wide(&v));
    assert_close(&cpu.download(&y), &geometry.forward(&qw, &kw, &vw), 1e-5, 1e-5, "scores near 10 in f32");
    let (dq, dk, dv) = cpu.attention_backward(&tensor(cpu, width, &c), &tq, &tk, &tv, (&y, &()), &seqs, &heads);
    if differences {
        let loss = |q: &[f64], k: &[f64], v: &[f64]| r::dot(&geometry.forward(q, k, v), &wide(&c));
        assert_close(&cpu.download(&dq), &r::gradient(&qw, |q| loss(q, &kw, &vw)), ABS, REL, WHY);
        assert_close(&cpu.download(&dk), &r::gradient(&kw, |k| loss(&qw, k, &vw)), ABS, REL, WHY);
        assert_close(&cpu.download(&dv), &r::gradient(&vw, |v| loss(&qw, &kw, v)), ABS, REL, WHY);
    } else {
        // Directional derivatives along three random directions instead of every axis.
        let loss = |q: &[f64], k: &[f64], v: &[f64]| r::dot(&geometry.forward(q, k, v), &wide(&c));
        for _ in 0..3 {
            let (eq, ek, ev) =
                (wide(&rng.values(q.len(), 1.0)), wide(&rng.values(k.len(), 1.0)), wide(&rng.values(v.len(), 1.0)));
            let move_by =
                |x: &[f64], e: &[f64], h: f64| -> Vec<f64> { x.iter().zip(e).map(|(x, e)| x + h * e).collect() };
            let at = |h: f64| loss(&move_by(&qw, &eq, h), &move_by(&kw, &ek, h), &move_by(&vw, &ev, h));
            let want = (at(1e-5) - at(-1e-5)) / 2e-5;
            let got = r::dot(&wide(&cpu.download(&dq)), &eq)
                + r::dot(&wide(&cpu.download(&dk)), &ek)
                + r::dot(&wide(&cpu.download(&dv)), &ev);
            assert_close(&[got as f32], &[want], 1e-3, 1e-4, "a sum of 10,000 gradients with errors of 1e-6");
        }
    }
}

#[test]
fn gated_activations_and_their_backwards() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(7);
    for (rows, f) in [(1, 1), (5, 33), (0, 4), (40, 17)] {
        let (x, c) = (rng.values(rows * 2 * f, 4.0), rng.values(rows * f, 1.0));
        let (tx, tc) = (cpu.upload(rows, 2 * f, &x), cpu.upload(rows, f, &c));
        let y = cpu.swiglu(&tx);
        assert_close(&cpu.download(&y), &r::swiglu(&wide(&x), f), 1e-6, 2e-6, "exp within 2 ulp, five roundings");
        let want = r::gradient(&wide(&x), |x| r::dot(&r::swiglu(x, f), &wide(&c)));
        assert_close(&cpu.download(&cpu.swiglu_backward(&tc, &tx)), &want, 2e-6, 2e-6, "as forward");

        let (x, gate) = (rng.values(rows * f, 1.0), rng.values(rows, 3.0));
        let (tx, tg) = (cpu.upload(rows, f, &x), cpu.upload(rows, 1, &gate));
        let forward = |x: &[f64], g: &[f64]| r::sigmoid_gate(x, g, f);
        assert_close(&cpu.download(&cpu.sigmoid_gate(&tx, &tg)), &forward(&wide(&x), &wide(&gate)), 1e-6, 1e-6, "exp");
        let (dx, dgate) = cpu.sigmoid_gate_backward(&tc, &tx, &tg);
        let want = r::gradient(&wide(&x), |x| r::dot(&forward(x, &wide(&gate)), &wide(&c)));
        assert_close(&cpu.download(&dx), &want, 1e-6, 1e-6, "exp");
        let want = r::gradient(&wide(&gate), |g| r::dot(&forward(&wide(&x), g), &wide(&c)));
        assert_close(&cpu.download(&dgate), &want, 1e-5, 1e-5, "a dot product of 33 terms");
    }
}

#[test]
fn routing_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(8);
    for (t, e, k) in [(1, 1, 1), (6, 5, 2), (4, 3, 3), (0, 4, 2), (70, 64, 8)] {
        for renormalize in [false, true] {
            let (logits, c) = (rng.values(t * e, 3.0), rng.values(t * k, 1.0));
            let routing = cpu.route(&cpu.upload(t, e, &logits), k, renormalize);
            let ids = r::top_k(&wide(&logits), e, k);
            assert_eq!(cpu.expert_ids(&routing), ids.iter().map(|&i| i as u32).collect::<Vec<_>>());
            let forward = |l: &[f64]| r::routing_weights(l, e, &ids, k, renormalize);
            // The routing weights are visible as the combination of weighted rows of ones.
            let dispatch = cpu.dispatch(&routing, e);
            let sums: Vec<f64> = forward(&wide(&logits)).chunks(k).map(|w| w.iter().sum()).collect();
            let ones = cpu.upload(t * k, 2, &ONE.repeat(t * k));
            assert_close(
                &cpu.download(&cpu.combine_rows(&cpu.weighted_swiglu(&ones, &routing, &dispatch), &dispatch)),
                &sums,
                1e-6,
                1e-6,
                "exp, 8 terms",
            );
            let dlogits = cpu.route_backward(&cpu.upload(t, k, &c), &routing);
            if t < 10 {
                let want = r::gradient(&wide(&logits), |l| r::dot(&forward(l), &wide(&c)));
                assert_close(&cpu.download(&dlogits), &want, 2e-6, 1e-5, "differences of probabilities");
            }
        }
    }
}

/// Gate and up whose SwiGLU is 1: 2 · σ(2) · 0.56766764.
const ONE: [f32; 2] = [2.0, 0.567_667_64];

#[test]
fn filled_columns_and_zeroed_routing_weights() {
    let cpu = poisoned(2);
    let mut x = cpu.upload(2, 3, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    cpu.fill_columns(&mut x, &cpu.indices(&[2, 0]), f32::NEG_INFINITY);
    assert_eq!(
        cpu.download(&x),
        [f32::NEG_INFINITY, 2.0, f32::NEG_INFINITY, f32::NEG_INFINITY, 5.0, f32::NEG_INFINITY]
    );
    cpu.fill_columns(&mut cpu.zeros(0, 3), &cpu.indices(&[1]), 1.0);

    // An expert of probability 0 is not chosen while K others are left.
    let mut logits = cpu.upload(1, 4, &[3.0, 1.0, 2.0, 0.0]);
    cpu.fill_columns(&mut logits, &cpu.indices(&[0]), f32::NEG_INFINITY);
    let mut routing = cpu.route(&logits, 2, true);
    assert_eq!(cpu.expert_ids(&routing), [2, 1]);
    cpu.zero_routing_weights(&mut routing, &cpu.indices(&[3, 2]));
    let dispatch = cpu.dispatch(&routing, 4);
    let weights = cpu.weighted_swiglu(&cpu.upload(2, 2, &ONE.repeat(2)), &routing, &dispatch);
    let kept = 1.0 / (1.0 + f64::exp(1.0));
    assert_close(&cpu.download(&weights), &[kept, 0.0], 1e-6, 1e-6, "exp"); // sorted by expert: 1, 2
}

/// One layer of experts in f64: gate and up stacked, swiglu, down, combine.
struct Experts {
    d: usize,
    f: usize,
    e: usize,
    k: usize,
}

impl Experts {
    fn forward(&self, x: &[f64], weights: &[f64], ids: &[usize], gate_up: &[Vec<f64>], down: &[Vec<f64>]) -> Vec<f64> {
        let &Self { d, f, k, .. } = self;
        let mut y = vec![0.0; x.len()];
        for (slot, &expert) in ids.iter().enumerate() {
            let t = slot / k;
            let h = r::matmul_nt(&x[t * d..(t + 1) * d], &gate_up[expert], 1, 2 * f, d);
            let out = r::matmul_nt(&r::swiglu(&h, f), &down[expert], 1, d, f);
            (0..d).for_each(|c| y[t * d + c] += weights[slot] * out[c]);
        }
        y
    }
}

#[test]
fn a_layer_of_experts_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(9);
    // (tokens, experts, K, dtype); with so few tokens, some experts have no rows.
    for (t, e, k, dtype) in
        [(5, 6, 2, Dtype::F32), (1, 3, 3, Dtype::Bf16), (4, 7, 1, Dtype::F16), (0, 2, 1, Dtype::F32)]
    {
        let shape = Experts { d: 5, f: 3, e, k };
        let (d, f) = (shape.d, shape.f);
        let x = rng.values(t * d, 1.0);
        let logits = rng.values(t * e, 2.0);
        let c = rng.values(t * d, 1.0);
        let make = |rng: &mut Rng, rows: usize, cols: usize| -> Vec<(Weight, Vec<f32>)> {
            (0..shape.e).map(|_| weight(&cpu, dtype, &[rows, cols], &rng.values(rows * cols, 1.0))).collect()
        };
        let (gate, up, down) = (make(&mut rng, f, d), make(&mut rng, f, d), make(&mut rng, d, f));
        let stacks: Vec<Vec<&Weight>> = (0..e).map(|i| vec![&gate[i].0, &up[i].0]).collect();
        let downs: Vec<Vec<&Weight>> = (0..e).map(|i| vec![&down[i].0]).collect();
        let gate_up64: Vec<Vec<f64>> = (0..e).map(|i| [wide(&gate[i].1), wide(&up[i].1)].concat()).collect();
        let down64: Vec<Vec<f64>> = down.iter().map(|w| wide(&w.1)).collect();

        // Forward.
        let tx = cpu.upload(t, d, &x);
        let routing = cpu.route(&cpu.upload(t, e, &logits), k, true);
        let dispatch = cpu.dispatch(&routing, e);
        let rows = cpu.dispatch_rows(&tx, &dispatch);
        let h = cpu.grouped_linear(&rows, &stacks, &dispatch);
        let weighted = cpu.weighted_swiglu(&h, &routing, &dispatch);
        let out = cpu.grouped_linear(&weighted, &downs, &dispatch);
        let y = cpu.combine_rows(&out, &dispatch);
        let ids = r::top_k(&wide(&logits), e, k);
        let counts = cpu.tokens_per_expert(&dispatch);
        assert_eq!(counts, (0..e).map(|x| ids.iter().filter(|&&i| i == x).count()).collect::<Vec<_>>());
        let forward = |x: &[f64], l: &[f64], g: &[Vec<f64>], dn: &[Vec<f64>]| {
            shape.forward(x, &r::routing_weights(l, e, &ids, k, true), &ids, g, dn)
        };
        let (xw, lw) = (wide(&x), wide(&logits));
        assert_close(&cpu.download(&y), &forward(&xw, &lw, &gate_up64, &down64), 1e-5, 1e-5, "two products of depth 5");

        // Backward: expert 0 frozen, the others alternately accumulated and scored by each moment.
        let loss = |x: &[f64], l: &[f64], g: &[Vec<f64>], dn: &[Vec<f64>]| r::dot(&forward(x, l, g, dn), &wide(&c));
        let moments = [GradReduction::Abs, GradReduction::Square, GradReduction::AbsTimesWeight];
        let plan = |sizes: &[usize]| -> Vec<ExpertGrad> {
            let stride: usize = sizes.iter().sum();
            (0..e)
                .map(|i| match i {
                    0 => ExpertGrad::Skip,
                    _ if i % 2 == 1 => ExpertGrad::Accumulate(
                        (0..sizes.len()).map(|j| i * stride + sizes[..j].iter().sum::<usize>()).collect(),
                    ),
                    _ => ExpertGrad::Score(moments[i / 2 % 3], i),
                })
                .collect()
        };
        let (mut dw_in, mut dw_out) = (cpu.buffer(e * 2 * f * d), cpu.buffer(e * d * f));
        let mut scores = cpu.scores(e);
        let dy = cpu.upload(t, d, &c);
        let dout = cpu.dispatch_rows(&dy, &dispatch);
        cpu.grouped_linear_backward_weight(
            &dout,
            &weighted,
            &downs,
            &dispatch,
            &plan(&[d * f]),
            &mut dw_out,
            &mut scores,
        );
        let score_out = cpu.scores_take(&mut scores);
        let d_weighted = cpu.grouped_linear_backward_input(&dout, &downs, &dispatch);
        let (dh, dweights) = cpu.weighted_swiglu_backward(d_weighted, &h, &routing, &dispatch);
        cpu.grouped_linear_backward_weight(
            &dh,
            &rows,
            &stacks,
            &dispatch,
            &plan(&[f * d, f * d]),
            &mut dw_in,
            &mut scores,
        );
        let score_in = cpu.scores_take(&mut scores);
        let drows = cpu.grouped_linear_backward_input(&dh, &stacks, &dispatch);
        let dx = cpu.combine_rows(&drows, &dispatch);
        let dlogits = cpu.route_backward(&dweights, &routing);

        assert_close(&cpu.download(&dx), &r::gradient(&xw, |x| loss(x, &lw, &gate_up64, &down64)), ABS, REL, WHY);
        assert_close(&cpu.download(&dlogits), &r::gradient(&lw, |l| loss(&xw, l, &gate_up64, &down64)), ABS, REL, WHY);
        let (got_in, got_out) = (read(&cpu, &dw_in, e * 2 * f * d), read(&cpu, &dw_out, e * d * f));
        let (plan_in, plan_out) = (plan(&[f * d, f * d]), plan(&[d * f]));
        for i in 0..e {
            let with = |all: &[Vec<f64>], one: &[f64]| -> Vec<Vec<f64>> {
                let mut all = all.to_vec();
                all[i] = one.to_vec();
                all
            };
            let want_in = r::gradient(&gate_up64[i], |w| loss(&xw, &lw, &with(&gate_up64, w), &down64));
            let want_out = r::gradient(&down64[i], |w| loss(&xw, &lw, &gate_up64, &with(&down64, w)));
            for (plan, got, want, w, score) in [
                (&plan_in[i], &got_in[i * 2 * f * d..(i + 1) * 2 * f * d], &want_in, &gate_up64[i], score_in[i]),
                (&plan_out[i], &got_out[i * d * f..(i + 1) * d * f], &want_out, &down64[i], score_out[i]),
            ] {
                match plan {
                    ExpertGrad::Accumulate(_) => assert_close(got, want, ABS, REL, WHY),
                    _ => assert!(got.iter().all(|&g| g == 0.0), "expert {i} must not write to the gradient buffer"),
                }
                let expected = match plan {
                    ExpertGrad::Score(GradReduction::Abs, _) => want.iter().map(|g| g.abs()).sum(),
                    ExpertGrad::Score(GradReduction::Square, _) => want.iter().map(|g| g * g).sum(),
                    ExpertGrad::Score(GradReduction::AbsTimesWeight, _) => {
                        want.iter().zip(w).map(|(g, w)| (g * w).abs()).sum()
                    }
                    _ => 0.0,
                };
                assert_close(&[score as f32], &[expected], 1e-4, REL, "a sum of up to 30 gradients");
            }
        }
        assert_eq!(cpu.scores_take(&mut scores), vec![0.0; e], "taking the scores clears them");
    }
}

#[test]
fn a_score_over_several_tiles_is_the_sum_over_the_matrix() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(10);
    // 3 experts, one without rows; 700 output rows make several tiles of 256.
    let (t, d, n) = (30, 40, 700);
    let ids: Vec<usize> = (0..t).map(|_| 2 * rng.below(2)).collect();
    let logits: Vec<f32> = ids.iter().flat_map(|&i| (0..3).map(move |e| if e == i { 5.0 } else { 0.0 })).collect();
    let routing = cpu.route(&cpu.upload(t, 3, &logits), 1, false);
    let dispatch = cpu.dispatch(&routing, 3);
    let (x, dy) = (rng.values(t * d, 1.0), rng.values(t * n, 1.0));
    let w: Vec<(Weight, Vec<f32>)> =
        (0..3).map(|_| weight(&cpu, Dtype::Bf16, &[n, d], &rng.values(n * d, 1.0))).collect();
    let stacks: Vec<Vec<&Weight>> = w.iter().map(|w| vec![&w.0]).collect();
    let (rows, drows) =
        (cpu.dispatch_rows(&cpu.upload(t, d, &x), &dispatch), cpu.dispatch_rows(&cpu.upload(t, n, &dy), &dispatch));
    for moment in [GradReduction::Abs, GradReduction::Square, GradReduction::AbsTimesWeight] {
        let plan: Vec<ExpertGrad> = (0..3).map(|e| ExpertGrad::Score(moment, 2 - e)).collect();
        let (mut dw, mut scores) = (cpu.buffer(0), cpu.scores(3));
        cpu.grouped_linear_backward_weight(&drows, &rows, &stacks, &dispatch, &plan, &mut dw, &mut scores);
        let scores = cpu.scores_take(&mut scores);
        for e in 0..3 {
            let mut want = 0.0;
            for i in 0..n * d {
                let g: f64 = (0..t)
                    .filter(|&t| ids[t] == e)
                    .map(|t| f64::from(dy[t * n + i / d]) * f64::from(x[t * d + i % d]))
                    .sum();
                want += match moment {
                    GradReduction::Abs => g.abs(),
                    GradReduction::Square => g * g,
                    GradReduction::AbsTimesWeight => (g * f64::from(w[e].1[i])).abs(),
                };
            }
            assert_close(&[scores[2 - e] as f32], &[want], 0.0, 1e-6, "f32 errors of 28,000 entries average out");
        }
        assert_eq!(scores[1], 0.0);
    }
}

#[test]
fn cross_entropy_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(11);
    for (n, v, d, dtype) in
        [(1, 2, 1, Dtype::F32), (5, 13, 4, Dtype::Bf16), (3, 70, 3, Dtype::F16), (0, 5, 2, Dtype::F32)]
    {
        let x = rng.values(n * d, 2.0);
        let (w, w32) = weight(&cpu, dtype, &[v, d], &rng.values(v * d, 2.0));
        let targets: Vec<u32> = (0..n).map(|_| rng.below(v) as u32).collect();
        let (tx, index) = (cpu.upload(n, d, &x), cpu.indices(&targets));
        let loss = |x: &[f64], w: &[f64]| r::cross_entropy(x, w, &targets, d);
        let want = loss(&wide(&x), &wide(&w32));
        assert_close(&[cpu.linear_cross_entropy(&tx, &w, &index) as f32], &[want], 1e-6, 1e-6, "exp");
        let scale = 0.37f32;
        let mut dw = cpu.buffer(v * d + 2);
        let (value, dx) = cpu.linear_cross_entropy_backward(&tx, &w, &index, scale, Some((&mut dw, 2)));
        assert_close(&[value as f32], &[want], 1e-6, 1e-6, "exp");
        let scaled = |x: &[f64], w: &[f64]| f64::from(scale) * loss(x, w);
        assert_close(&cpu.download(&dx), &r::gradient(&wide(&x), |x| scaled(x, &wide(&w32))), 5e-6, REL, "exp");
        assert_close(
            &read(&cpu, &dw, v * d + 2)[2..],
            &r::gradient(&wide(&w32), |w| scaled(&wide(&x), w)),
            5e-6,
            REL,
            "exp",
        );
    }
}

#[test]
fn losses_of_rows_and_the_greedy_choice() {
    let cpu = poisoned(3);
    let mut rng = Rng::new(13);
    // Two strips, several tiles in each segment of the vocabulary.
    let (n, v, d) = (600, 5000, 4);
    let x = rng.values(n * d, 1.0);
    let (w, w32) = weight(&cpu, Dtype::F32, &[v, d], &rng.values(v * d, 2.0));
    let (tx, logits) = (cpu.upload(n, d, &x), r::matmul_nt(&wide(&x), &wide(&w32), n, v, d));
    let best = |row: &[f64]| (0..v).reduce(|a, b| if row[b] > row[a] { b } else { a }).unwrap() as u32;
    let targets: Vec<u32> =
        logits.chunks(v).map(|row| if rng.below(2) == 0 { best(row) } else { rng.below(v) as u32 }).collect();
    let rows = cpu.linear_cross_entropy_rows(&tx, &w, &cpu.indices(&targets));
    let (sum, same) =
        (rows.iter().map(|row| row.loss).sum::<f64>(), cpu.linear_cross_entropy(&tx, &w, &cpu.indices(&targets)));
    assert!((sum - same).abs() < 1e-12 * same, "{sum} {same}: f64 sums of 600 terms, there in two parts");
    for (i, (row, logits)) in rows.iter().zip(logits.chunks(v)).enumerate() {
        let want = r::cross_entropy(&wide(&x[i * d..(i + 1) * d]), &wide(&w32), &targets[i..=i], d);
        assert!((row.loss - want).abs() < 1e-5, "row {i}: {} {want}", row.loss);
        assert_eq!(row.greedy, best(logits) == targets[i], "row {i}");
    }
    assert!((250..350).contains(&rows.iter().filter(|row| row.greedy).count()));

    // Of equal logits the lowest class wins, in one tile and over several segments.
    let (w, _) = weight(&cpu, Dtype::F32, &[v, 1], &vec![1.0; v]);
    let greedy =
        |target| cpu.linear_cross_entropy_rows(&cpu.upload(1, 1, &[1.0]), &w, &cpu.indices(&[target]))[0].greedy;
    assert_eq!([0, 1, 4999].map(greedy), [true, false, false]);
    assert!(cpu.linear_cross_entropy_rows(&cpu.zeros(0, 1), &w, &cpu.indices(&[])).is_empty());
}

#[test]
fn cross_entropy_over_many_blocks_and_tiles_with_logits_far_apart() {
    let cpu = poisoned(3);
    let mut rng = Rng::new(12);
    // Two strips of rows, several tiles in each of the eight vocabulary segments, logits up to ±200 that grow along the
    // vocabulary, so that the running maximum keeps moving.
    let (n, v, d) = (600, 5000, 8);
    let x: Vec<f32> = rng.values(n * d, 1.0).iter().map(|x| x.abs()).collect();
    let w: Vec<f32> = (0..v * d).map(|i| rng.unit() * 5.0 + 40.0 * (i / d) as f32 / v as f32 - 20.0).collect();
    let (w, w32) = weight(&cpu, Dtype::F32, &[v, d], &w);
    let targets: Vec<u32> = (0..n).map(|_| rng.below(v) as u32).collect();
    let (tx, index) = (cpu.upload(n, d, &x), cpu.indices(&targets));
    let (xw, ww) = (wide(&x), wide(&w32));
    let want = r::cross_entropy(&xw, &ww, &targets, d);
    let mut dw = cpu.buffer(v * d);
    let (value, dx) = cpu.linear_cross_entropy_backward(&tx, &w, &index, 1.0, Some((&mut dw, 0)));
    assert_eq!(value, cpu.linear_cross_entropy(&tx, &w, &index));
    assert!(
        (value - want).abs() < 1e-6 * want,
        "{value} {want}: logits near 200 carry errors of 1e-5, which average out"
    );
    let p: Vec<f64> = r::matmul_nt(&xw, &ww, n, v, d).chunks(v).flat_map(r::softmax).collect();
    let grad: Vec<f64> = (0..n * v).map(|i| p[i] - if targets[i / v] as usize == i % v { 1.0 } else { 0.0 }).collect();
    let want: Vec<f64> = (0..n * d).map(|i| (0..v).map(|j| grad[i / d * v + j] * ww[j * d + i % d]).sum()).collect();
    assert_close(&cpu.download(&dx), &want, 2e-3, 1e-4, "probabilities off by 1e-5 times rows of size 25");
    let want: Vec<f64> = (0..v * d).map(|j| (0..n).map(|i| grad[i * v + j / d] * xw[i * d + j % d]).sum()).collect();
    assert_close(&read(&cpu, &dw, v * d), &want, 1e-3, 1e-4, "probabilities off by 1e-5, 600 rows");
}

#[test]
fn kl_of_a_head_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(14);
    // The last case has more rows than a chunk, several blocks, and logits up to about 30.
    for (n, v, d, base_d, dtype) in [
        (1, 2, 1, 1, Dtype::F32),
        (5, 13, 4, 3, Dtype::Bf16),
        (3, 70, 3, 3, Dtype::F16),
        (0, 5, 2, 2, Dtype::F32),
        (530, 7, 8, 8, Dtype::F32),
    ] {
        let (x, base_x) = (rng.values(n * d, 2.0), rng.values(n * base_d, 2.0));
        let (w, w32) = weight(&cpu, dtype, &[v, d], &rng.values(v * d, 2.0));
        let (base_w, base32) = weight(&cpu, dtype, &[v, base_d], &rng.values(v * base_d, 2.0));
        let (tx, tb) = (cpu.upload(n, d, &x), cpu.upload(n, base_d, &base_x));
        let base: Vec<Vec<f64>> =
            r::matmul_nt(&wide(&base_x), &wide(&base32), n, v, base_d).chunks(v).map(r::softmax).collect();
        let rows = |x: &[f64], w: &[f64]| -> Vec<Vec<f64>> {
            r::matmul_nt(x, w, x.len() / d, v, d).chunks(v).map(r::softmax).collect()
        };
        let sum = |x: &[f64], w: &[f64]| -> f64 { rows(x, w).iter().zip(&base).map(|(p, b)| r::kl(b, p)).sum() };
        let want = sum(&wide(&x), &wide(&w32));
        let top = |p: &Vec<f64>| p.iter().enumerate().fold(0, |best, (i, x)| if *x > p[best] { i } else { best });
        let same = rows(&wide(&x), &wide(&w32)).iter().zip(&base).filter(|(p, b)| top(p) == top(b)).count();
        let (value, agree) = cpu.linear_kl(&tx, &w, &tb, &base_w);
        assert_close(&[value as f32], &[want], 2e-6, 2e-6, "f32 logits");
        assert_eq!(agree, same);
        let scale = 0.37f32;
        let mut dw = cpu.buffer(v * d + 2);
        let (again, dx) = cpu.linear_kl_backward(&tx, &w, &tb, &base_w, scale, Some((&mut dw, 2)));
        assert_eq!(again, value);
        if n > 100 {
            continue; // finite differences of so many inputs take long
        }
        let scaled = |x: &[f64], w: &[f64]| f64::from(scale) * sum(x, w);
        assert_close(&cpu.download(&dx), &r::gradient(&wide(&x), |x| scaled(x, &wide(&w32))), 5e-6, REL, "exp");
        let want = r::gradient(&wide(&w32), |w| scaled(&wide(&x), w));
        assert_close(&read(&cpu, &dw, v * d + 2)[2..], &want, 5e-6, REL, "exp");
    }
}

#[test]
fn kl_from_itself_is_exactly_zero() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(15);
    let (n, v, d) = (9, 301, 16);
    let x = cpu.upload(n, d, &rng.values(n * d, 3.0));
    let (w, _) = weight(&cpu, Dtype::F32, &[v, d], &rng.values(v * d, 3.0));
    assert_eq!(cpu.linear_kl(&x, &w, &x, &w), (0.0, n));
    let (_, dx) = cpu.linear_kl_backward(&x, &w, &x, &w, 1.0, None);
    assert!(cpu.download(&dx).iter().all(|d| *d == 0.0));
    let values = cpu.download(&x);
    assert_eq!(cpu.softmax_kl(&x, &values), 0.0);
}

#[test]
fn kl_of_a_router_and_its_backward() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(16);
    for (t, e) in [(1, 2), (9, 5), (70, 33), (0, 4)] {
        let (logits, base) = (rng.values(t * e, 3.0), rng.values(t * e, 3.0));
        let tl = cpu.upload(t, e, &logits);
        let kl = |l: &[f64]| -> f64 {
            l.chunks(e).zip(wide(&base).chunks(e)).map(|(l, b)| r::kl(&r::softmax(b), &r::softmax(l))).sum()
        };
        assert_close(&[cpu.softmax_kl(&tl, &base) as f32], &[kl(&wide(&logits))], 1e-6, 1e-6, "f64");
        let start = rng.values(t * e, 1.0);
        let mut dl = cpu.upload(t, e, &start);
        cpu.softmax_kl_backward(&base, &tl, 0.3, &mut dl);
        let mut want = r::gradient(&wide(&logits), |l| f64::from(0.3f32) * kl(l));
        want.iter_mut().zip(&start).for_each(|(w, s)| *w += f64::from(*s));
        assert_close(&cpu.download(&dl), &want, 1e-6, 1e-6, "one rounding to f32");
    }
}

#[test]
fn statistics_and_their_backwards() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(13);
    let (t, e) = (9, 5);
    let logits = rng.values(t * e, 2.0);
    let tl = cpu.upload(t, e, &logits);
    let c = rng.values(e, 1.0);
    for rows in [0..9, 2..7, 4..4] {
        let forward = |l: &[f64]| -> Vec<f64> {
            let mut sum = vec![0.0; e];
            for row in l.chunks(e).skip(rows.start).take(rows.len()) {
                r::softmax(row).iter().zip(&mut sum).for_each(|(p, s)| *s += p);
            }
            sum
        };
        let got: Vec<f32> = cpu.softmax_sum(&tl, rows.clone()).iter().map(|&x| x as f32).collect();
        assert_close(&got, &forward(&wide(&logits)), 1e-6, 1e-6, "exp");
        let start = rng.values(t * e, 1.0);
        let mut dl = cpu.upload(t, e, &start);
        cpu.softmax_sum_backward(&c, &tl, rows.clone(), &mut dl);
        let mut want = r::gradient(&wide(&logits), |l| r::dot(&forward(l), &wide(&c)));
        want.iter_mut().zip(&start).for_each(|(w, s)| *w += f64::from(*s));
        assert_close(&cpu.download(&dl), &want, 1e-6, 1e-6, "exp");
    }
    let segments = [0..3, 3..3, 2..9];
    let sums = cpu.segment_sum(&tl, &segments);
    let want: Vec<f64> = segments
        .iter()
        .flat_map(|s| (0..e).map(|c| s.clone().map(|i| f64::from(logits[i * e + c])).sum::<f64>()).collect::<Vec<_>>())
        .collect();
    assert_eq!(sums, want, "nine f32 numbers add exactly in f64, or nearly so in the same order");
    let dy = rng.values(3 * e, 1.0);
    let mut dx = cpu.zeros(t, e);
    cpu.segment_sum_backward(&dy, &segments, &mut dx);
    let mut want = vec![0.0; t * e];
    for (s, rows) in segments.iter().enumerate() {
        rows.clone().for_each(|i| (0..e).for_each(|c| want[i * e + c] += f64::from(dy[s * e + c])));
    }
    assert_close(&cpu.download(&dx), &want, 0.0, 1e-7, "one f32 addition");
}

#[test]
fn updates_of_buffers_and_weights() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(14);
    let n = 40_000;
    let values = rng.values(n, 1.0);
    let mut b = cpu.buffer(n + 4);
    cpu.buffer_write(&mut b, 3, &values);
    let want: f64 = wide(&values).iter().map(|x| x * x).sum();
    assert!((cpu.sum_squares(&b, 3..n + 3) - want).abs() < 1e-9 * want);
    let parts = [3..n + 3, 0..0, 5..90];
    assert_eq!(cpu.sums_of_squares(&b, &parts), parts.clone().map(|part| cpu.sum_squares(&b, part)));
    cpu.buffer_write(&mut b, 7, &[1e30]);
    assert!(cpu.sum_squares(&b, 0..n + 4).is_finite(), "a large finite entry is no overflow");
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        cpu.buffer_write(&mut b, 30_000, &[bad]);
        assert!(!cpu.sum_squares(&b, 0..n).is_finite());
        assert!(cpu.sum_squares(&b, 0..30_000).is_finite());
    }
    cpu.buffer_clear(&mut b);
    assert_eq!(cpu.sum_squares(&b, 0..n + 4), 0.0);

    for dtype in DTYPES {
        let (mut w, _) = weight(&cpu, dtype, &[5, 3], &rng.values(15, 1.0));
        let before = cpu.weight_host(&w);
        let new = rng.values(15, 3.0);
        cpu.buffer_write(&mut b, 2, &new);
        cpu.set_weight(&mut w, &b, 2..17);
        let mut bytes = vec![0; 15 * dtype.size()];
        encode_into(dtype, &new, &mut bytes);
        let after = cpu.weight_host(&w);
        assert_eq!(&*after.bytes, &bytes[..], "rounded to nearest even");
        assert_eq!((after.dtype, &after.shape), (dtype, &before.shape));
        assert_ne!(&*before.bytes, &bytes[..], "an earlier copy keeps its bits");
        cpu.read_weight(&w, 0..15, &mut b, 100);
        assert_eq!(cpu.buffer_read(&b, 100..115), after.to_f32());
        cpu.read_weight(&w, 4..11, &mut b, 200);
        assert_eq!(cpu.buffer_read(&b, 200..207), after.to_f32()[4..11]);
    }
}

#[test]
fn adamw_follows_its_formula() {
    let cpu = poisoned(2);
    let mut rng = Rng::new(15);
    let n = 300;
    let (w0, grads) = (rng.values(n, 1.0), [rng.values(n, 1.0), rng.values(n, 0.01), rng.values(n, 10.0)]);
    let (mut w, mut m, mut v, mut g) = (cpu.buffer(n + 1), cpu.buffer(n + 1), cpu.buffer(n + 1), cpu.buffer(n + 9));
    cpu.buffer_write(&mut w, 1, &w0);
    let (mut w64, mut m64, mut v64) = (wide(&w0), vec![0.0; n], vec![0.0; n]);
    for (step, grad) in (1..).zip(&grads) {
        let s = AdamwStep { lr: 0.01, beta1: 0.9, beta2: 0.98, eps: 1e-8, weight_decay: 0.1, step, grad_scale: 0.5 };
        cpu.buffer_write(&mut g, 9, grad);
        cpu.adamw(&mut w, &mut m, &mut v, 1..n + 1, &g, 9, &s);
        let (b1, b2) = (s.beta1, s.beta2);
        for i in 0..n {
            let g = f64::from(grad[i]) * 0.5;
            m64[i] = b1 * m64[i] + (1.0 - b1) * g;
            v64[i] = b2 * v64[i] + (1.0 - b2) * g * g;
            let (mh, vh) = (m64[i] / (1.0 - b1.powi(step as i32)), v64[i] / (1.0 - b2.powi(step as i32)));
            w64[i] -= s.lr * (mh / (vh.sqrt() + s.eps) + s.weight_decay * w64[i]);
        }
        assert_close(&cpu.buffer_read(&w, 1..n + 1), &w64, 1e-6, 1e-6, "a dozen f32 roundings a step");
    }
    assert_eq!(cpu.buffer_read(&w, 0..1), [0.0]);
}

/// Runs many operations and returns all bits of their results.
fn everything(threads: usize) -> Vec<u64> {
    let cpu = poisoned(threads);
    let mut rng = Rng::new(16);
    let mut bits: Vec<u64> = Vec::new();
    let (t, d, e, k, f, v) = (300, 48, 6, 2, 40, 3000);
    let packing = Packing::of_lengths([170, 1, 129]);
    let heads = Heads { queries: 4, keys: 2, dim: 12, window: None };
    let seqs = cpu.sequences(&packing, &Rope { inv_freq: vec![1.0, 0.3, 0.1, 0.03, 0.01, 0.003], scale: 1.0 });
    let (x, dy) = (tensor(&cpu, d, &rng.values(t * d, 1.0)), tensor(&cpu, d, &rng.values(t * d, 1.0)));
    let make = |rng: &mut Rng, dtype, n: usize, k: usize| weight(&cpu, dtype, &[n, k], &rng.values(n * k, 0.3)).0;
    let mut dw = cpu.buffer(v * d);
    let mut scores = cpu.scores(e);
    let mut record = |x: &[f32]| bits.extend(x.iter().map(|x| u64::from(x.to_bits())));

    let norm = cpu.weight(HostTensor::from_f32(vec![d], &rng.values(d, 1.0)));
    record(&cpu.download(&cpu.rms_norm_backward(&dy, &x, &norm, 1e-5, Some((&mut dw, 0)))));
    let w = make(&mut rng, Dtype::Bf16, 200, d);
    let y = cpu.linear(&x, &w, None);
    record(&cpu.download(&y));
    record(&cpu.download(&cpu.linear_backward_input(&y, &w)));
    cpu.linear_backward_weight(&y, &x, &mut dw, 100);
    cpu.bias_backward(&y, &mut dw, 7);
    let kv = tensor(&cpu, 24, &rng.values(t * 24, 1.0));
    let mut q = cpu.gather_rows(&x, &cpu.indices(&(0..t as u32).rev().collect::<Vec<_>>()));
    cpu.rope(&mut q, 12, &seqs);
    let (a, ()) = cpu.attention(&q, &kv, &kv, &seqs, &heads);
    let (dq, dk, dv) = cpu.attention_backward(&dy, &q, &kv, &kv, (&a, &()), &seqs, &heads);
    [&a, &dq, &dk, &dv].iter().for_each(|x| record(&cpu.download(x)));

    let logits = cpu.linear(&x, &make(&mut rng, Dtype::F32, e, d), None);
    let routing = cpu.route(&logits, k, true);
    let dispatch = cpu.dispatch(&routing, e);
    let rows = cpu.dispatch_rows(&x, &dispatch);
    let (w1, w2): (Vec<_>, Vec<_>) =
        (0..e).map(|_| (make(&mut rng, Dtype::F32, 2 * f, d), make(&mut rng, Dtype::Bf16, d, f))).unzip();
    let (s1, s2): (Vec<Vec<&Weight>>, Vec<Vec<&Weight>>) =
        (w1.iter().map(|w| vec![w]).collect(), w2.iter().map(|w| vec![w]).collect());
    let h = cpu.grouped_linear(&rows, &s1, &dispatch);
    let weighted = cpu.weighted_swiglu(&h, &routing, &dispatch);
    let out = cpu.grouped_linear(&weighted, &s2, &dispatch);
    record(&cpu.download(&cpu.combine_rows(&out, &dispatch)));
    let dout = cpu.dispatch_rows(&dy, &dispatch);
    let d_weighted = cpu.grouped_linear_backward_input(&dout, &s2, &dispatch);
    let (dh, dweights) = cpu.weighted_swiglu_backward(d_weighted, &h, &routing, &dispatch);
    record(&cpu.download(&cpu.route_backward(&dweights, &routing)));
    record(&cpu.download(&dh));
    let plan: Vec<ExpertGrad> = (0..e)
        .map(|i| if i == 0 { ExpertGrad::Accumulate(vec![500]) } else { ExpertGrad::Score(GradReduction::Abs, i) })
        .collect();
    cpu.grouped_linear_backward_weight(&dout, &weighted, &s2, &dispatch, &plan, &mut dw, &mut scores);
    let drows = cpu.grouped_linear_backward_input(&dh, &s1, &dispatch);
    record(&cpu.download(&cpu.combine_rows(&drows, &dispatch)));

    let head = make(&mut rng, Dtype::F16, v, d);
    let targets: Vec<u32> = (0..t).map(|_| rng.below(v) as u32).collect();
    let (loss, dx) = cpu.linear_cross_entropy_backward(&x, &head, &cpu.indices(&targets), 0.1, Some((&mut dw, 0)));
    record(&cpu.download(&dx));
    let base = make(&mut rng, Dtype::Bf16, v, d);
    let (kl, dx) = cpu.linear_kl_backward(&x, &head, &dy, &base, 0.1, Some((&mut dw, 0)));
    record(&cpu.download(&dx));
    let kl_of_router = cpu.softmax_kl(&logits, &cpu.download(&cpu.zeros_like(&logits)));
    cpu.embedding_backward(&dy, &cpu.indices(&targets), &mut dw, 0);
    record(&cpu.buffer_read(&dw, 0..v * d));
    let mut doubles = vec![loss, kl, kl_of_router, cpu.sum_squares(&dw, 0..v * d)];
    doubles.extend(cpu.scores_take(&mut scores));
    doubles.extend(cpu.softmax_sum(&logits, 0..t));
    doubles.extend(cpu.segment_sum(&x, &[0..170, 171..300]));
    assert!(bits.iter().all(|&b| f32::from_bits(b as u32).is_finite()), "a recycled NaN is in a result");
    assert!(doubles.iter().all(|x| x.is_finite()));
    bits.extend(doubles.iter().map(|x| x.to_bits()));
    bits
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let one = everything(1);
    for threads in [2, 3] {
        let other = everything(threads);
        let first = one.iter().zip(&other).position(|(a, b)| a != b);
        assert_eq!(first, None, "first different number with {threads} threads");
    }
}

#[test]
fn operations_together_run_on_the_threads_of_the_pool() {
    let cpu = Cpu::new(1);
    let names = || std::thread::current().name().map(str::to_owned);
    let (name, sum) = cpu.together(|| {
        let x = cpu.upload(1, 3, &[1.0, 2.0, 4.0]);
        (names(), cpu.download(&x).iter().sum::<f32>())
    });
    assert_eq!((name.as_deref(), sum), (Some("cpu-0"), 7.0));
    assert_ne!(names().as_deref(), Some("cpu-0"), "outside, the caller's thread");
}
