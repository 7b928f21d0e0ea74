//! Products of bf16 values on the CPU, by every kind of instructions that this processor has: each operation against the
//! same operation in f32, and the golden cases against the reference.

use crate::case::{self, Case, numbers};
use crate::values::{Rng, assert_close, wide};
use moewarden::backend::cpu::{Buffer, Caches, Cpu, Instructions, Processor, Products, Tensor, Weight};
use moewarden::backend::{Backend, Dtype, ExpertGrad, GradReduction, Heads, HostTensor, Packing, Rope};
use std::sync::Arc;

/// The backends to test. Says which instructions this processor lacks.
pub fn backends(threads: usize) -> Vec<(Instructions, Cpu)> {
    let processor = Processor::detect();
    let (here, missing): (Vec<_>, Vec<_>) = Instructions::ALL.into_iter().partition(|&i| processor.has(i));
    println!("bf16 products by {here:?}; skipped, because this processor lacks them: {missing:?}");
    here.into_iter().map(|i| (i, Cpu::new(threads).with_products(Products::new(i, Caches::detect())))).collect()
}

/// Values that bf16 represents exactly.
fn values(rng: &mut Rng, n: usize) -> Vec<f32> {
    rng.values(n, 1.0).iter().map(|x| half::bf16::from_f32(*x).to_f32()).collect()
}

fn weight(cpu: &Cpu, rng: &mut Rng, rows: usize, cols: usize) -> Weight {
    cpu.weight(HostTensor::encode(Dtype::Bf16, vec![rows, cols], &values(rng, rows * cols)))
}

/// The results of all operations with products, by name.
fn results(cpu: &Cpu) -> Vec<(&'static str, Vec<f32>)> {
    let mut rng = Rng::new(7);
    let mut out = Vec::new();
    let read = |b: &Buffer, len| cpu.buffer_read(b, 0..len);
    let tensor = |rng: &mut Rng, rows: usize, cols: usize| cpu.upload(rows, cols, &values(rng, rows * cols));

    let (t, d, f, e, k, v) = (75, 40, 24, 5, 2, 333);
    let (x, dy): (Tensor, Tensor) = (tensor(&mut rng, t, d), tensor(&mut rng, t, f));
    let w = weight(cpu, &mut rng, f, d);
    let bias = cpu.weight(HostTensor::encode(Dtype::Bf16, vec![f], &values(&mut rng, f)));
    out.push(("linear", cpu.download(&cpu.linear(&x, &w, Some(&bias)))));
    out.push(("router_logits", cpu.download(&cpu.router_logits(&x, &w))));
    out.push(("linear_backward_input", cpu.download(&cpu.linear_backward_input(&dy, &w))));
    let mut dw = cpu.buffer(7 + f * d);
    cpu.linear_backward_weight(&dy, &x, &mut dw, 7);
    cpu.linear_backward_weight(&dy, &x, &mut dw, 7);
    out.push(("linear_backward_weight", read(&dw, 7 + f * d)));

    let routing = cpu.route(&tensor(&mut rng, t, e), k, false);
    let dispatch = cpu.dispatch(&routing, e);
    let rows = cpu.dispatch_rows(&x, &dispatch);
    let experts: Vec<[Weight; 2]> = (0..e).map(|_| [(); 2].map(|()| weight(cpu, &mut rng, f, d))).collect();
    let stacks: Vec<Vec<&Weight>> = experts.iter().map(|pair| pair.iter().collect()).collect();
    let dy = tensor(&mut rng, t * k, 2 * f);
    let gate_up = cpu.grouped_linear(&rows, &stacks, &dispatch);
    let single = cpu.single_expert_dispatch(t * k);
    let weighted = cpu.weighted_swiglu(&gate_up, &routing, &dispatch);
    let (d_gate_up, d_weights) =
        cpu.weighted_swiglu_backward(tensor(&mut rng, t * k, f), &gate_up, &routing, &dispatch);
    let d_dense = cpu.swiglu_backward(&tensor(&mut rng, t * k, f), &gate_up);
    out.extend(
        [
            ("dispatched", &rows),
            ("dispatched, combined", &cpu.combine_rows(&rows, &dispatch)),
            ("experts, combined", &cpu.combine_rows(&gate_up, &dispatch)),
            ("experts, swiglu", &cpu.swiglu(&gate_up)),
            ("experts, swiglu backward", &d_dense),
            ("experts, one group", &cpu.grouped_linear_backward_input(&d_dense, &stacks[..1], &single)),
            ("experts, weighted", &weighted),
            ("experts, weighted backward", &d_gate_up),
            ("experts, dweights", &d_weights),
        ]
        .map(|(name, x)| (name, cpu.download(x))),
    );
    out.push(("grouped_linear", cpu.download(&gate_up)));
    out.push((
        "grouped_linear_backward_input",
        cpu.download(&cpu.grouped_linear_backward_input(&dy, &stacks, &dispatch)),
    ));
    let reductions = [GradReduction::Abs, GradReduction::Square, GradReduction::AbsTimesWeight];
    let mut plan: Vec<_> = reductions.iter().enumerate().map(|(i, r)| ExpertGrad::Score(*r, i)).collect();
    plan.extend([ExpertGrad::Skip, ExpertGrad::Accumulate(vec![3, 3 + f * d])]);
    let (mut dw, mut scores) = (cpu.buffer(3 + 2 * f * d), cpu.scores(3));
    cpu.grouped_linear_backward_weight(&dy, &rows, &stacks, &dispatch, &plan, &mut dw, &mut scores);
    out.push(("grouped_linear_backward_weight", read(&dw, 3 + 2 * f * d)));
    out.push(("scores", cpu.scores_take(&mut scores).iter().map(|s| *s as f32).collect()));

    let lengths = [170, 1, 29];
    let n = lengths.iter().sum();
    for (dim, window) in [(64, None), (128, Some(9)), (16, Some(70))] {
        let heads = Heads { queries: 4, keys: 2, dim, window };
        let rope = Rope { inv_freq: vec![1.0; dim / 2], scale: 1.0 };
        let seqs = cpu.sequences(&Packing::of_lengths(lengths), &rope);
        let [q, dy] = [(); 2].map(|()| tensor(&mut rng, n, 4 * dim));
        let [key, val] = [(); 2].map(|()| tensor(&mut rng, n, 2 * dim));
        let (y, ()) = cpu.attention(&q, &key, &val, &seqs, &heads);
        out.push(("attention", cpu.download(&y)));
        let (dq, dk, dv) = cpu.attention_backward(&dy, &q, &key, &val, (&y, &()), &seqs, &heads);
        out.extend(
            [("attention dq", dq), ("attention dk", dk), ("attention dv", dv)]
                .map(|(name, x)| (name, cpu.download(&x))),
        );
    }

    let (head, base) = (weight(cpu, &mut rng, v, d), weight(cpu, &mut rng, v, d));
    let targets = cpu.indices(&(0..t).map(|_| rng.below(v) as u32).collect::<Vec<_>>());
    let mut dw = cpu.buffer(v * d);
    let (loss, dx) = cpu.linear_cross_entropy_backward(&x, &head, &targets, 0.25, Some((&mut dw, 0)));
    let rows = cpu.linear_cross_entropy_rows(&x, &head, &targets);
    assert!((rows.iter().map(|row| row.loss).sum::<f64>() - loss).abs() < 1e-6 * loss);
    assert!((cpu.linear_cross_entropy(&x, &head, &targets) - loss).abs() < 1e-6 * loss);
    out.extend([
        ("loss", vec![loss as f32]),
        ("cross-entropy dx", cpu.download(&dx)),
        ("cross-entropy dw", read(&dw, v * d)),
    ]);
    let (kl, dx) = cpu.linear_kl_backward(&x, &head, &x, &base, 0.25, None);
    assert!((cpu.linear_kl(&x, &head, &x, &base).0 - kl).abs() < 1e-6 * kl);
    out.extend([("KL", vec![kl as f32]), ("KL dx", cpu.download(&dx))]);
    out
}

#[test]
fn every_operation_agrees_with_f32() {
    let f32 = Cpu::new(2);
    assert_eq!(f32.precision(), Dtype::F32);
    let exact = results(&f32);
    for (instructions, cpu) in backends(2) {
        assert_eq!(cpu.precision(), Dtype::Bf16);
        for ((name, got), (_, want)) in results(&cpu).iter().zip(&exact) {
            let largest = want.iter().fold(0f32, |m, x| m.max(x.abs()));
            // Operands are exact in bf16, so results differ by the order of sums, except where an operand is a result
            // itself: probabilities and their gradients, with a relative error of 2^-9 each.
            let intermediate = ["attention", "cross-entropy", "KL dx", "experts"].iter().any(|op| name.starts_with(op));
            // Rows of experts are rounded to bf16.
            let rounded = ["grouped_linear", "grouped_linear_backward_input"].contains(name);
            let tolerance = if intermediate {
                1e-2
            } else if rounded {
                4e-3
            } else {
                1e-5
            };
            let why = format!("{name} by {instructions}");
            assert_close(got, &wide(want), tolerance * f64::from(largest), 0.0, &why);
            assert!(name != &"router_logits" || got == want, "router logits are products of f32");
        }
    }
}

#[test]
fn the_number_of_threads_changes_no_bit() {
    for ((instructions, one), (_, three)) in backends(1).iter().zip(&backends(3)) {
        let bits = |cpu: &Cpu| -> Vec<Vec<u32>> {
            results(cpu).iter().map(|(_, values)| values.iter().map(|x| x.to_bits()).collect()).collect()
        };
        assert_eq!(bits(one), bits(three), "{instructions}");
    }
}

/// Tokens of an answer must not depend on the other answers of a batch, nor on whether a position is computed with those before it.
#[test]
fn rows_and_positions_have_the_same_bits_in_any_batch() {
    let cpus = backends(2).into_iter().map(|(i, cpu)| (i.to_string(), cpu));
    for (name, cpu) in cpus.chain([("f32".to_owned(), Cpu::new(2))]) {
        let mut rng = Rng::new(11);
        let (n, d, e) = (70, 1024, 64);
        let (x, w) = (values(&mut rng, n * d), weight(&cpu, &mut rng, e, d));
        let all = cpu.download(&cpu.linear(&cpu.upload(n, d, &x), &w, None));
        for rows in [1, 2, 8, 33] {
            let some = cpu.download(&cpu.linear(&cpu.upload(rows, d, &x[..rows * d]), &w, None));
            assert_eq!(some, all[..rows * e], "{name}: {rows} rows of {n}");
        }
        let (dim, tokens) = (64, 150);
        for window in [None, Some(40)] {
            let heads = Heads { queries: 2, keys: 1, dim, window };
            let rope = Rope { inv_freq: vec![1.0; dim / 2], scale: 1.0 };
            let (q, k, v) =
                (values(&mut rng, tokens * 2 * dim), values(&mut rng, tokens * dim), values(&mut rng, tokens * dim));
            let attention = |first: usize, end: usize| {
                let q = cpu.upload(end - first, 2 * dim, &q[first * 2 * dim..end * 2 * dim]);
                let [k, v] = [&k, &v].map(|x| cpu.upload(end, dim, &x[..end * dim]));
                let seqs = cpu.sequences(&Packing::continuing(end - first, end), &rope);
                cpu.download(&cpu.attention(&q, &k, &v, &seqs, &heads).0)
            };
            let whole = attention(0, tokens);
            // In f32 the sums of a softmax's products depend on the number of queries in a block.
            let same = |a: &[f32], b: &[f32]| {
                if name == "f32" { a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-6) } else { a == b }
            };
            for end in [1, 31, 33, 64, 65, 100, tokens] {
                let one = attention(end - 1, end);
                assert!(same(&one, &whole[(end - 1) * 2 * dim..end * 2 * dim]), "{name}: position {end}, {window:?}");
            }
        }
    }
}

/// Relative differences of scores, sorted; of those above a thousandth of the largest score.
fn differences(got: &[f64], want: &[f64]) -> Vec<f64> {
    let largest = want.iter().fold(0.0f64, |m, x| m.max(*x));
    let mut off: Vec<f64> =
        got.iter().zip(want).filter(|(_, w)| **w > 1e-3 * largest).map(|(g, w)| (g - w).abs() / w).collect();
    off.sort_by(f64::total_cmp);
    off
}

#[test]
fn scores_and_losses_of_the_golden_cases() {
    let (mut all, mut losses_off) = (Vec::new(), 0.0f64);
    for entry in std::fs::read_dir(case::golden_dir()).unwrap() {
        let path = entry.unwrap().path();
        if !path.join("expect.json").exists() {
            continue;
        }
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let case = Case::open(&name);
        if case.session.model.is_dense() {
            continue; // nothing is identified in it
        }
        let want = numbers(&case.expect["losses"]);
        let exact = case.run(&case.config, 2).identify();
        // The emulation is slow, and tested with the operations.
        let fast = backends(2).into_iter().filter(|(i, _)| *i != Instructions::AmxEmulated);
        for (instructions, cpu) in fast {
            let found = case.run_on(&case.config, Arc::new(cpu)).identify();
            for (got, want) in found.losses.iter().zip(&want) {
                let off = (got - want).abs() / want;
                assert!(off < 1e-3, "{name} by {instructions}: loss {got} instead of {want}");
                losses_off = losses_off.max(off);
            }
            let off = differences(&found.scores.values, &exact.scores.values);
            let (median, most) = (off[off.len() / 2], off[off.len() - 1]);
            println!("{name} by {instructions}: scores differ by {median:.1e} in the median, {most:.1e} at most");
            // With widths of 16 to 48 a changed logit sends a token of some 60 to another expert, which moves two scores.
            assert!(median < 3e-2, "{name} by {instructions}: median {median}");
            all.extend(off);
        }
    }
    all.sort_by(f64::total_cmp);
    let at = |q: f64| all[(q * (all.len() - 1) as f64) as usize];
    assert!(at(0.5) < 5e-3, "median of all cases: {}", at(0.5));
    println!("all: median {:.1e}, 95 % {:.1e}, most {:.1e}; losses {losses_off:.1e}", at(0.5), at(0.95), at(1.0));
}
