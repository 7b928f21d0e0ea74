//! Comparison of runs that add up the same numbers in different orders.

use std::collections::BTreeMap;

use moewarden::backend::{Dtype, HostTensor};
use serde_json::Value;

use crate::program::Outputs;

/// Scores: f64 sums of the same f32 micro-batches in different orders.
pub const SAME_WEIGHTS: f64 = 1e-12;
/// Scores of weights that have been trained in different orders.
pub const TRAINED_WEIGHTS: f64 = 1e-5;
/// f32 sums of up to 500 terms in different orders.
const LOSSES: f64 = 1e-6;
/// Nats of a divergence near 0.
const DIVERGENCE: f64 = 1e-8;
/// Relative to a tensor's norm. 16-bit weights may also differ by one step where a master rounds to the other neighbour.
const WEIGHTS: f64 = 1e-5;

/// Asserts that two runs took the same steps with the same selection, losses and weights, within tolerances; `scores` is
/// the relative tolerance of scores.
pub fn check_close(expected: &Outputs, found: &Outputs, scores: f64, what: &str) {
    check_scores(&expected.scores(), &found.scores(), scores, what);
    check_metrics(&expected.metrics, &found.metrics, what);
    let [a, b] = [expected, found].map(Outputs::metadata);
    for loss in ["ce_loss", "held_out_loss"] {
        let [a, b] = [&a[loss], &b[loss]].map(numbers);
        let same = a.len() == b.len() && a.iter().zip(&b).all(|(a, b)| close(*a, *b, LOSSES));
        assert!(same, "{what}: {loss} before and after is {b:?}, not {a:?}");
    }
    check_weights(&expected.weights, &found.weights, what);
}

fn close(a: f64, b: f64, relative: f64) -> bool {
    (a - b).abs() <= relative * b.abs()
}

fn check_scores(expected: &Value, found: &Value, tolerance: f64, what: &str) {
    for (round, a) in expected["rounds"].as_object().unwrap() {
        let b = &found["rounds"][round];
        assert!(!a["selected"].as_array().unwrap().is_empty());
        assert_eq!(a["selected"], b["selected"], "{what}: selection");
        assert_eq!(a["micro_batches"], b["micro_batches"], "{what}");
        for (name, tolerance) in [("scores", tolerance), ("losses", LOSSES)] {
            let [a, b] = [&a[name], &b[name]].map(numbers);
            assert_eq!(a.len(), b.len(), "{what}: {name}");
            for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                assert!(close(*a, *b, tolerance), "{what}: {name}[{i}] is {b:e}, not {a:e}");
            }
        }
    }
}

fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(items) => items.iter().flat_map(numbers).collect(),
        other => other.as_f64().into_iter().collect(),
    }
}

fn check_metrics(expected: &[Value], found: &[Value], what: &str) {
    assert_eq!(expected.len(), found.len(), "{what}: steps");
    for (a, b) in expected.iter().zip(found) {
        // Loads count tokens: the last bits of weights change no choice of experts in these rows.
        for same in ["phase", "round", "step", "lr", "tokens", "expert_load", "phase_load"] {
            assert_eq!(a[same], b[same], "{what}: {same} of {a}");
        }
        for loss in ["ce_loss", "router_loss", "retain_loss", "retain_routing_loss", "total_loss", "grad_norm"] {
            // A divergence from the base model starts at 0: its last digits are those of the weights' differences.
            let absolute = if loss.starts_with("retain") { DIVERGENCE } else { 0.0 };
            match (a[loss].as_f64(), b[loss].as_f64()) {
                (Some(a), Some(b)) if close(a, b, LOSSES) || (a - b).abs() <= absolute => {}
                (None, None) => {}
                (a_loss, b_loss) => panic!("{what}: {loss} is {b_loss:?}, not {a_loss:?}, in {a}"),
            }
        }
    }
}

fn check_weights(expected: &BTreeMap<String, HostTensor>, found: &BTreeMap<String, HostTensor>, what: &str) {
    assert_eq!(expected.len(), found.len());
    for (name, a) in expected {
        let b = &found[name];
        // A step of bf16 is at most 2⁻⁷ of the value.
        let step = |x: f32| if a.dtype == Dtype::F32 { 0.0 } else { f64::from(x).abs() / 128.0 };
        let (a, b) = (a.to_f32(), b.to_f32());
        let size = a.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt();
        let apart = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).abs();
        let beyond = |pair: (&f32, &f32)| f64::max(apart(pair) - step(*pair.0), 0.0).powi(2);
        let error = a.iter().zip(&b).map(beyond).sum::<f64>().sqrt();
        if std::env::var_os("MOEWARDEN_SHOW_ERRORS").is_some() {
            let other = a.iter().zip(&b).filter(|(a, b)| a != b).count();
            eprintln!(
                "{:.1e} {:.1e} {other} of {}: {name}, {what}",
                error / size,
                a.iter().zip(&b).map(apart).fold(0.0, f64::max),
                a.len()
            );
        }
        assert!(error <= WEIGHTS * size, "{what}: {name} is off by {:.1e} of its norm", error / size);
        let flipped = a.iter().zip(&b).filter(|(a, b)| a != b && step(**a) > 0.0).count();
        assert!(flipped <= a.len() / 100, "{what}: {flipped} of {} values of {name} were rounded differently", a.len());
    }
}
