//! Retention against PyTorch (`tests/golden/retention.py`): losses, gradients, changes of the weights, drift.

use std::sync::Arc;

use crate::case::{Case, CaseRun, Tolerance, assert_near, fixture_name, golden_dir, numbers};
use moewarden::backend::HostTensor;
use moewarden::backend::cpu::Cpu;
use moewarden::data::Sampler;
use moewarden::train::{BaseOutputs, BaseRow, RetainRows, Retention, Trained, compute_base};
use serde_json::Value;

const LOSS: Tolerance = Tolerance { relative: 2e-6, absolute: 0.0, why: "f32 against f64" };
/// A divergence near 0 is a small difference of logits with errors of about 1e-6.
const KL: Tolerance = Tolerance { relative: 1e-4, absolute: 1e-8, why: "f32 logits of two forward passes" };
const GRADIENTS: Tolerance = Tolerance { relative: 2e-5, absolute: 0.0, why: "f32 gradients" };
const CHANGE: Tolerance =
    Tolerance { relative: 2e-3, absolute: 1e-6, why: "AdamW divides by the root of small second moments" };

/// Attaches retention over the safe replies of the case, in file order.
fn retain<'a>(case: &'a Case, run: &mut CaseRun<'a, Cpu>) {
    let sampler = Sampler { shuffle: false, ..case.session.sampler(&run.recipe) };
    let rows = RetainRows::new(sampler);
    let shapes = BaseOutputs::shapes(&rows, &run.model().config);
    let mut base = Vec::new();
    compute_base(&run.replica, &rows, |hidden, router_logits| {
        let [of_hidden, of_logits] = shapes[base.len()].clone();
        base.push(BaseRow {
            hidden: HostTensor::from_f32(of_hidden, hidden),
            router_logits: HostTensor::from_f32(of_logits, router_logits),
        });
    })
    .unwrap();
    assert_eq!(base.len(), rows.len());
    let goal = run.recipe.retain.expect("a run with retain rows");
    let trains_head = run.recipe.trained() == Some(Trained::Everything);
    run.retention = Some(Arc::new(Retention::new(goal, rows, BaseOutputs(base), &run.replica, trains_head)));
}

fn digest(change: &[f64]) -> Vec<f64> {
    let along: f64 = change.iter().enumerate().map(|(i, x)| x * (i as f64).cos()).sum();
    vec![change.iter().map(|x| x.abs()).sum(), change.iter().map(|x| x * x).sum::<f64>().sqrt(), along]
}

fn check(case: &Case, golden: &Value) {
    let what = |part: &str| format!("{}: {part}", golden["options"]);
    let mut config = case.config_with(&golden["options"]);
    config.retain_dataset_path = Some(config.dataset_path.clone());
    let mut run = case.run(&config, 2);
    retain(case, &mut run);
    let drift = run.retention.as_ref().unwrap().drift(&run.replica).unwrap();
    let [kl, agreement] = [drift.kl, drift.top1_agreement];
    assert_eq!([kl, agreement, drift.routing_kl, drift.expert_overlap], [0.0, 1.0, 0.0, 1.0], "the base model itself");

    let phase = golden["options"]["phase"].as_str().unwrap();
    let steps = run.run_phase(phase, &case.selected());
    let expected = golden["steps"].as_array().unwrap();
    assert_eq!(steps.len(), expected.len(), "{}", what("steps"));
    let kind = if golden["options"]["retain_loss"] == "ce" { LOSS } else { KL };
    for (i, (step, expected)) in steps.iter().zip(expected).enumerate() {
        let own = step.ce_loss.or(step.router_loss);
        // The first step compares equal weights; later ones add the differences of the updates before.
        let after = |t: Tolerance| if i == 0 { t } else { Tolerance { relative: 20.0 * t.relative, ..t } };
        for (key, ours, tolerance) in [
            ("own_loss", own, LOSS),
            ("total_loss", Some(step.total_loss), LOSS),
            ("retain_loss", step.retain_loss, kind),
            ("retain_routing_loss", step.retain_routing_loss, KL),
            ("grad_norm", Some(step.grad_norm), GRADIENTS),
        ] {
            let theirs = expected[key].as_f64();
            assert_eq!(ours.is_some(), theirs.is_some(), "{} of step {i}", what(key));
            if let Some((ours, theirs)) = ours.zip(theirs) {
                let label = what(&format!("{key} of step {i}"));
                let near_zero = if key == "own_loss" && phase == "router" { KL } else { tolerance };
                assert_near(&label, &[ours], &[theirs], after(near_zero));
            }
        }
    }

    let mut trained = 0;
    for (id, spec) in case.session.table.iter() {
        let name = fixture_name(spec);
        let (before, after) = (spec.base.to_f32(), run.model().weight_host(id).to_f32());
        let change: Vec<f64> = after.iter().zip(&before).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
        match golden["change"].get(&name) {
            None => assert!(change.iter().all(|x| *x == 0.0), "{}", what(&format!("{name} moved"))),
            Some(expected) => {
                assert_near(&what(&name), &digest(&change), &numbers(expected), CHANGE);
                trained += 1;
            }
        }
    }
    assert_eq!(trained, golden["change"].as_object().unwrap().len(), "{}", what("trained parameters"));

    let drift = run.retention.as_ref().unwrap().drift(&run.replica).unwrap();
    let ours = serde_json::to_value(&drift).unwrap();
    let drifted = Tolerance { relative: 2e-3, absolute: 1e-7, why: "the changes above" };
    for key in ["kl", "routing_kl", "ce_loss"] {
        assert_near(&what(key), &numbers(&ours[key]), &numbers(&golden["drift"][key]), drifted);
    }
    // A token may be a near tie.
    let shares = Tolerance { relative: 0.0, absolute: 0.02, why: "a choice near a tie" };
    for key in ["top1_agreement", "expert_overlap"] {
        assert_near(&what(key), &numbers(&ours[key]), &numbers(&golden["drift"][key]), shares);
    }
    for (ours, theirs) in drift.layers.iter().zip(golden["drift"]["layers"].as_array().unwrap()) {
        assert_near(&what("routing of a layer"), &[ours.routing_kl], &numbers(&theirs["routing_kl"]), drifted);
    }
}

fn check_case(name: &str) {
    let text = std::fs::read_to_string(golden_dir().join(name).join("retention.json")).unwrap();
    let golden: Value = serde_json::from_str(&text).unwrap();
    let case = Case::open(name);
    golden["training"].as_array().unwrap().iter().for_each(|run| check(&case, run));
}

#[test]
fn phases_with_retain_rows_agree_with_pytorch() {
    check_case("olmoe");
}

#[test]
fn a_model_with_shared_experts_agrees_with_pytorch() {
    check_case("qwen2_moe");
}

/// Retention holds the model near the base: with a larger weight it drifts less.
#[test]
fn a_larger_weight_means_less_drift() {
    let case = Case::open("olmoe");
    let drift = |weight: f64, routing_weight: f64| {
        let mut config = case.config.clone();
        config.retain_dataset_path = Some(config.dataset_path.clone());
        (config.retain_weight, config.retain_routing_weight) = (weight, routing_weight);
        (config.expert_epochs_per_round, config.expert_lr) = (4, 5e-3);
        let mut run = case.run(&config, 2);
        retain(&case, &mut run);
        let steps = run.run_phase("expert", &case.selected());
        assert_eq!(steps[0].retain_loss.is_some(), weight > 0.0);
        run.retention.as_ref().unwrap().drift(&run.replica).unwrap()
    };
    let (free, held) = (drift(0.0, 0.0), drift(20.0, 0.0));
    assert!(held.kl < 0.5 * free.kl, "{} with retention, {} without", held.kl, free.kl);
    let routed = drift(0.0, 200.0);
    assert!(routed.routing_kl < 0.5 * free.routing_kl, "{} and {}", routed.routing_kl, free.routing_kl);
}
