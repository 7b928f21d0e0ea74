//! AdamW on the CPU backend: against its formula in f64, resumed, and sharded.

use moewarden::backend::cpu::Cpu;
use moewarden::backend::{Backend, Dtype, HostTensor};
use moewarden::optim::{AdamW, GradientPiece, LearningRates, LrGroup, ParamState, Trainable, piece};

const LRS: LearningRates = LearningRates { expert: 1e-2, router: 3e-3, other: 1e-3 };
const DECAY: f64 = 0.01;

fn initial(param: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((param * 13 + i * 7) % 19) as f32 / 8.0 - 1.0).collect()
}

fn gradient(step: usize, param: usize, len: usize) -> Vec<f32> {
    (0..len).map(|i| ((step * 5 + param * 11 + i * 3) % 17) as f32 / 4.0 - 2.0).collect()
}

/// Three parameters of one dtype.
fn weights(cpu: &Cpu, dtype: Dtype) -> (Vec<Trainable>, Vec<<Cpu as Backend>::Weight>) {
    let params: Vec<_> = [(6, LrGroup::Expert), (4, LrGroup::Expert), (5, LrGroup::Router)]
        .into_iter()
        .enumerate()
        .map(|(param, (len, group))| Trainable { param, len, group })
        .collect();
    let weight = |p: &Trainable| cpu.weight(HostTensor::encode(dtype, vec![p.len], &initial(p.param, p.len)));
    let weights = params.iter().map(weight).collect();
    (params, weights)
}

/// One step of these parameters; the gradients are concatenated.
fn step(
    cpu: &Cpu,
    optimizer: &mut AdamW<Cpu>,
    weights: &mut [<Cpu as Backend>::Weight],
    number: usize,
    params: &[Trainable],
) {
    let mut grads = cpu.buffer(params.iter().map(|p| p.len).sum());
    let mut gradients = Vec::new();
    let mut offset = 0;
    for p in params {
        cpu.buffer_write(&mut grads, offset, &gradient(number, p.param, p.len));
        gradients.push(GradientPiece { param: p.param, offset });
        offset += p.len;
    }
    optimizer.step(cpu, weights, &grads, &gradients, &LRS, DECAY, 0.5);
}

fn bytes(cpu: &Cpu, weights: &[<Cpu as Backend>::Weight]) -> Vec<Vec<u8>> {
    weights.iter().map(|w| cpu.weight_host(w).bytes.to_vec()).collect()
}

#[test]
fn each_parameter_follows_the_formula_with_its_own_step_count() {
    let cpu = Cpu::new(1);
    let (params, mut weights) = weights(&cpu, Dtype::F32);
    let mut optimizer = AdamW::new(0, 1);
    optimizer.add(&cpu, &weights, &params);
    // The second parameter has a gradient only at every other step.
    let takes_part = |number: usize, p: &Trainable| p.param != 1 || number.is_multiple_of(2);
    for number in 0..7 {
        let before = bytes(&cpu, &weights);
        let active: Vec<_> = params.iter().copied().filter(|p| takes_part(number, p)).collect();
        step(&cpu, &mut optimizer, &mut weights, number, &active);
        for (p, (before, after)) in params.iter().zip(before.iter().zip(bytes(&cpu, &weights))) {
            assert_eq!(*before != after, takes_part(number, p), "step {number}, parameter {}", p.param);
        }
    }
    for p in &params {
        let lr = if p.group == LrGroup::Router { LRS.router } else { LRS.expert };
        let mut w: Vec<f64> = initial(p.param, p.len).into_iter().map(f64::from).collect();
        let (mut m, mut v, mut t) = (vec![0.0; p.len], vec![0.0; p.len], 0);
        for number in (0..7).filter(|n| takes_part(*n, p)) {
            t += 1;
            for (i, g) in gradient(number, p.param, p.len).into_iter().enumerate() {
                let g = 0.5 * f64::from(g);
                m[i] = 0.9 * m[i] + 0.1 * g;
                v[i] = 0.999 * v[i] + 0.001 * g * g;
                let (m, v) = (m[i] / (1.0 - 0.9f64.powi(t)), v[i] / (1.0 - 0.999f64.powi(t)));
                w[i] -= lr * DECAY * w[i] + lr * m / (v.sqrt() + 1e-8);
            }
        }
        for (i, (x, y)) in cpu.weight_host(&weights[p.param]).to_f32().iter().zip(&w).enumerate() {
            // Seven f32 updates of weights up to 1.25: fourteen roundings of at most 6e-8 each, which partly cancel.
            assert!((f64::from(*x) - y).abs() < 3e-7, "parameter {}[{i}]: {x}, not {y}", p.param);
        }
    }
}

#[test]
fn master_weights_accumulate_updates_below_bf16_precision() {
    let cpu = Cpu::new(1);
    let one = Trainable { param: 0, len: 1, group: LrGroup::Expert };
    let mut weights = vec![cpu.weight(HostTensor::encode(Dtype::Bf16, vec![1], &[1.0]))];
    let mut optimizer = AdamW::new(0, 1);
    optimizer.add(&cpu, &weights, &[one]);
    // bf16 below 1 has a spacing of 2⁻⁸ = 4e-3: a single update is lost to rounding.
    let lrs = LearningRates { expert: 1e-4, ..LRS };
    let mut grads = cpu.buffer(1);
    cpu.buffer_write(&mut grads, 0, &[1.0]);
    let mut value = |steps: usize| {
        for _ in 0..steps {
            optimizer.step(&cpu, &mut weights, &grads, &[GradientPiece { param: 0, offset: 0 }], &lrs, 0.0, 1.0);
        }
        cpu.weight_host(&weights[0]).to_f32()[0]
    };
    assert_eq!(value(1), 1.0);
    assert_eq!(value(99), 0.98828125, "100 updates of 1e-4 make 0.99, rounded to bf16");
}

#[test]
fn a_resumed_optimizer_is_bit_identical() {
    let cpu = Cpu::new(1);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (params, mut weights) = weights(&cpu, dtype);
        let mut whole = AdamW::new(0, 1);
        whole.add(&cpu, &weights, &params[..2]);
        step(&cpu, &mut whole, &mut weights, 0, &params[..1]);
        whole.add(&cpu, &weights, &params); // the third is added later; the first two keep their state
        step(&cpu, &mut whole, &mut weights, 1, &params);

        let saved: Vec<_> = whole.export(&cpu).collect();
        assert_eq!(saved.iter().map(|s| (s.param, s.step)).collect::<Vec<_>>(), [(0, 2), (1, 1), (2, 1)]);
        let mut others: Vec<_> = weights.iter().map(|w| cpu.weight(cpu.weight_host(w))).collect();
        let mut resumed = AdamW::new(0, 1);
        resumed.add(&cpu, &others, &params);
        for state in &saved {
            resumed.import(&cpu, state).unwrap();
        }
        for number in 2..5 {
            step(&cpu, &mut whole, &mut weights, number, &params);
            step(&cpu, &mut resumed, &mut others, number, &params);
        }
        assert_eq!(bytes(&cpu, &weights), bytes(&cpu, &others));
        assert_eq!(whole.export(&cpu).collect::<Vec<_>>(), resumed.export(&cpu).collect::<Vec<_>>());
    }
}

#[test]
fn the_shards_of_three_ranks_are_bit_identical_to_the_whole() {
    const RANKS: usize = 3;
    let cpu = Cpu::new(1);
    for dtype in [Dtype::F32, Dtype::Bf16] {
        // 6, 4 and 5 elements: shards of unequal lengths.
        let (params, mut weights) = weights(&cpu, dtype);
        let initial: Vec<_> = weights.iter().map(|w| cpu.weight(cpu.weight_host(w))).collect();
        let mut whole = AdamW::new(0, 1);
        whole.add(&cpu, &weights, &params);
        let active = |number: usize| params.iter().copied().filter(move |p| p.param != 1 || number.is_multiple_of(2));
        for number in 0..5 {
            step(&cpu, &mut whole, &mut weights, number, &active(number).collect::<Vec<_>>());
        }

        let mut parts: Vec<AdamW<Cpu>> = (0..RANKS).map(|rank| AdamW::new(rank, RANKS)).collect();
        for (rank, part) in parts.iter_mut().enumerate() {
            part.add(&cpu, &initial, &params);
            let mut unchanged: Vec<_> = initial.iter().map(|w| cpu.weight(cpu.weight_host(w))).collect();
            for number in 0..5 {
                let mut shard = Vec::new();
                let mut gradients = Vec::new();
                for p in active(number) {
                    gradients.push(GradientPiece { param: p.param, offset: shard.len() });
                    shard.extend_from_slice(&gradient(number, p.param, p.len)[piece(p.len, rank, RANKS)]);
                }
                let mut grads = cpu.buffer(shard.len());
                cpu.buffer_write(&mut grads, 0, &shard);
                part.step(&cpu, &mut unchanged, &grads, &gradients, &LRS, DECAY, 0.5);
            }
            assert_eq!(
                bytes(&cpu, &unchanged),
                bytes(&cpu, &initial),
                "with several ranks, the all-gather writes the weights"
            );
        }

        assert_eq!(parts.iter().map(AdamW::bytes).sum::<usize>(), whole.bytes());
        let states: Vec<Vec<_>> = parts.iter().map(|part| part.export(&cpu).collect()).collect();
        for (i, expected) in whole.export(&cpu).enumerate() {
            let together = |part: fn(&ParamState) -> &[f32]| states.iter().flat_map(|s| part(&s[i])).copied().collect();
            let mut found = states[0][i].clone();
            (found.master, found.m, found.v) = (together(|s| &s.master), together(|s| &s.m), together(|s| &s.v));
            assert_eq!(found, expected);
            let masters: Vec<f32> = parts.iter().flat_map(|part| part.master(&cpu, expected.param)).collect();
            let rounded = HostTensor::encode(dtype, vec![masters.len()], &masters);
            assert_eq!(rounded.bytes[..], cpu.weight_host(&weights[expected.param]).bytes[..]);
        }
    }
}

#[test]
fn a_mismatched_state_is_refused() {
    let cpu = Cpu::new(1);
    let (params, weights) = weights(&cpu, Dtype::F32);
    let mut optimizer = AdamW::new(0, 1);
    optimizer.add(&cpu, &weights, &params[..1]);
    let good = optimizer.export(&cpu).next().unwrap();
    let mut short = good.clone();
    short.v.pop();
    let error = optimizer.import(&cpu, &short).unwrap_err().to_string();
    assert!(error.contains("parameter 0") && error.contains("v of 5 elements, not 6"), "{error}");
    let unknown = ParamState { param: 2, ..good };
    assert!(optimizer.import(&cpu, &unknown).unwrap_err().to_string().contains("not trained"));
}
