//! Whole identifications and training steps of golden cases on the GPU backend, its kernels run on the CPU.

#[path = "common/case.rs"]
mod case;
mod emulator;

use std::sync::Arc;

use case::{Case, Tolerance, assert_near, ce_gradients, experts, fixture_name, numbers, run_phase, unsafe_batches};
use emulator::Emulated;
use moewarden::backend::Dtype;
use moewarden::backend::cuda::Cuda;
use moewarden::backend::cuda::pool::Reuse;
use moewarden::config::RunConfig;
use moewarden::model::ParamId;
use moewarden::run::progress::Progress;
use serde_json::json;

const F32: Tolerance =
    Tolerance { relative: 1e-5, absolute: 1e-7, why: "f32 in another order than the CPU's, measured 1e-6" };
/// A bf16 number is within 2^-9 = 0.2 % of what it stands for, and here the f32 parameters are rounded too. Scores and losses
/// are means over many such errors, but an expert that few tokens reach has few.
const BF16: Tolerance =
    Tolerance { relative: 0.015, absolute: 0.0, why: "activations of 8 significant bits, measured 9e-3" };

fn cuda(dtype: Dtype) -> Arc<Cuda> {
    Arc::new(Cuda::new(Arc::new(Emulated::new()), dtype, Reuse::Classes))
}

/// Scores, losses and selection of the fixture.
fn identification(name: &str, dtype: Dtype, tolerance: Tolerance) {
    let case = Case::open(name);
    let backend = cuda(dtype);
    let run = || case.engine_on(&case.config, backend.clone()).identify(0, &Progress::hidden()).unwrap();
    let found = run();
    let theirs = numbers(&case.expect["scores"]["l1-mean"]["param"]);
    assert_near(&format!("{name}: scores"), &found.scores.values, &theirs, tolerance);
    assert_near(&format!("{name}: losses"), &found.losses, &numbers(&case.expect["losses"]), tolerance);
    if dtype == Dtype::F32 {
        assert_eq!(found.selected.experts, experts(&case.expect["selection"]["highest"]), "{name}: selection");
    }
    let bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&run().scores.values), bits(&found.scores.values), "{name}: two runs differ");
}

/// Every parameter's gradient against the CPU's.
fn gradients(name: &str) {
    let case = Case::open(name);
    let all: Vec<ParamId> = (0..case.session.table.params.len()).collect();
    let (gpu, cpu) = (case.engine_on(&case.config, cuda(Dtype::F32)), case.engine(&case.config, 1));
    let batch = &unsafe_batches(&cpu)[0];
    let ((loss, ours), (expected, theirs)) = (ce_gradients(&gpu, batch, &all), ce_gradients(&cpu, batch, &all));
    assert_near("loss", &[loss], &[expected], F32);
    for ((ours, theirs), spec) in ours.iter().zip(&theirs).zip(&case.session.table.params) {
        let wide = |x: &[f32]| x.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
        assert_near(&format!("{name}: gradient of {}", fixture_name(spec)), &wide(ours), &wide(theirs), F32);
    }
}

/// Steps of a phase, and every parameter afterwards, against the CPU's.
fn training(name: &str, phase: &str) {
    let case = Case::open(name);
    let config: RunConfig = case.config_with(&json!({ "phase": phase }));
    let selected = case.selected();
    let mut gpu = case.engine_on(&config, cuda(Dtype::F32));
    let mut cpu = case.engine(&config, 1);
    let (ours, theirs) = (run_phase(&mut gpu, phase, &selected), run_phase(&mut cpu, phase, &selected));
    assert_eq!(ours.len(), theirs.len());
    assert!(!ours.is_empty());
    for (ours, theirs) in ours.iter().zip(&theirs) {
        let what = format!("{name}, {phase}");
        assert_near(&what, &[ours.total_loss, ours.grad_norm], &[theirs.total_loss, theirs.grad_norm], F32);
    }
    let mut moved = 0;
    for (id, spec) in case.session.table.iter() {
        let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
        let (ours, theirs) = (gpu.model.weight_host(id), cpu.model.weight_host(id));
        if *theirs.bytes == *spec.value.bytes {
            assert!(*ours.bytes == *spec.value.bytes, "{name}, {phase}: {} moved", fixture_name(spec));
            continue;
        }
        moved += 1;
        let before = wide(spec.value.to_f32());
        let change = |after: Vec<f32>| wide(after).iter().zip(&before).map(|(a, b)| a - b).collect::<Vec<_>>();
        let (ours, theirs) = (change(ours.to_f32()), change(theirs.to_f32()));
        // AdamW follows the sign of gradients: an entry near zero may turn, the update as a whole may not.
        let size = theirs.iter().map(|x| x * x).sum::<f64>().sqrt();
        let off = ours.iter().zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
        assert!(off <= 2e-3 * size, "{name}, {phase}: change of {} off by {off} of {size}", fixture_name(spec));
    }
    assert!(moved > 0);
}

#[test]
fn identification_in_f32() {
    for name in ["olmoe", "qwen2_moe"] {
        identification(name, Dtype::F32, F32);
    }
}

#[test]
fn identification_in_bf16() {
    for name in ["olmoe_bf16", "qwen3_moe"] {
        identification(name, Dtype::Bf16, BF16);
    }
}

#[test]
fn gradients_of_all_parameters() {
    for name in ["olmoe_clip", "qwen3_sparse"] {
        gradients(name);
    }
}

#[test]
fn training_of_experts_and_routers() {
    for (name, phase) in [("olmoe", "expert"), ("mixtral", "router"), ("qwen2_moe", "joint")] {
        training(name, phase);
    }
}

#[test]
fn decoding_with_a_growing_cache() {
    let case = Case::open("qwen3_moe");
    let (gpu, cpu) = (case.engine_on(&case.config, cuda(Dtype::F32)), case.engine(&case.config, 1));
    let (mut ours, mut theirs) = (gpu.model.kv_cache(), cpu.model.kv_cache());
    for ids in [&[3u32, 9, 4][..], &[7], &[2], &[11, 5], &[1]] {
        let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<_>>();
        let (a, b) = (gpu.model.decode(ids, &mut ours), cpu.model.decode(ids, &mut theirs));
        assert_near("logits", &wide(a), &wide(b), F32);
    }
    let b = &*gpu.model.backend;
    assert!(b.pool().usage().used > 0 && b.compute() == Dtype::F32);
    b.gpu().synchronize().unwrap();
}
