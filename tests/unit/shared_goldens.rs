//! The real binary against cases of an independent reference.
//!
//! A case is a folder with `model/`, `data.json`, `expect.json` (options, scores, selection, losses) and
//! `after.safetensors` (the selected experts after the expert phase, the routers after the router phase). Cases are found in
//! `goldens` of the optional shared folder and in the folder that `MOEWARDEN_CASES` names.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::case::{Tolerance, assert_near, experts, numbers};
use moewarden::backend::{Dtype, HostTensor};
use moewarden::experts::ExpertId;
use moewarden::model::{Checkpoint, ModelConfig, ParamKind, ParamTable, Proj};
use safetensors::SafeTensors;
use serde_json::Value;

// Both sides are f32 with different orders of summation; the reference pads its batches, the program packs them.
const SCORES: f64 = 1e-4;
const LOSS: Tolerance = Tolerance { relative: 0.0, absolute: 1e-5, why: "two f32 programs, measured 1e-6" };
const LATER_IN_16_BITS: Tolerance = Tolerance {
    relative: 1e-3,
    absolute: 0.0,
    why: "the reference trains f32 copies, we round to the stored 16 bits after every step",
};

/// The folders of all cases; prints the searched folders if there are none.
fn cases() -> Vec<PathBuf> {
    let named = std::env::var_os("MOEWARDEN_CASES").map(PathBuf::from);
    let folders: Vec<PathBuf> = [Some(crate::shared::shared().join("goldens")), named].into_iter().flatten().collect();
    let entries = folders.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten();
    let mut cases: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    cases.retain(|case| case.join("expect.json").is_file());
    cases.sort();
    if cases.is_empty() {
        println!("skipped: no case in {folders:?}");
    }
    cases
}

#[test]
fn the_binary_agrees_with_the_reference() {
    for dir in cases() {
        println!("case {}", dir.display());
        let text = std::fs::read_to_string(dir.join("expect.json")).unwrap();
        Reference { expect: serde_json::from_str(&text).unwrap(), dir, work: tempfile::tempdir().unwrap() }.check();
    }
}

struct Reference {
    dir: PathBuf,
    expect: Value,
    work: tempfile::TempDir,
}

/// The extent of a run; each variant also needs the options of those before it.
#[derive(Clone, Copy, PartialEq, PartialOrd)]
enum Run {
    Identify,
    Experts,
    Whole,
}

/// The parameters of a folder by kind.
type Weights = BTreeMap<ParamKind, HostTensor>;

impl Reference {
    fn check(&self) {
        let whole = self.run(Run::Whole, &self.dir.join("model"), "whole");
        let experts_only = self.run(Run::Experts, &self.dir.join("model"), "experts");
        let before = weights(&self.dir.join("model"));
        let later = if is_16_bit(&before) { LATER_IN_16_BITS } else { LOSS };

        let found = &json(&whole.join("expert_scores.json"))["rounds"]["1"];
        self.check_scores(found);
        let losses = numbers(&self.expect["micro_batch_losses"]);
        assert_near("losses of the micro-batches", &numbers(&found["losses"]), &losses, LOSS);

        // Only the first step of a phase starts from the same weights on both sides.
        for (phase, key, first) in [("expert", "expert_step_losses", LOSS), ("router", "router_step_losses", later)] {
            let (ours, theirs) = (step_losses(&whole, phase), numbers(&self.expect[key]));
            assert_near(&format!("{key}, the first"), &ours[..1], &theirs[..1], first);
            assert_near(key, &ours, &theirs, later);
        }
        for (output, key) in [(&experts_only, "loss_after_experts"), (&whole, "loss_after_routers")] {
            let again = format!("again-{key}");
            let measured = self.run(Run::Identify, &output.join("final_model"), &again);
            let ours = numbers(&json(&measured.join("expert_scores.json"))["rounds"]["1"]["losses"]);
            assert_near(key, &ours, &numbers(&self.expect[key]), later);
        }
        self.check_updates(&before, &weights(&experts_only.join("final_model")), &weights(&whole.join("final_model")));
    }

    /// Runs the binary with the case's options and returns its output folder.
    fn run(&self, command: Run, model: &Path, output: &str) -> PathBuf {
        let output = self.work.path().join(output);
        let mut program = Command::new(env!("CARGO_BIN_EXE_moewarden"));
        program.arg(if command == Run::Identify { "identify" } else { "train" });
        program.arg("--model-name").arg(model).arg("--dataset-path").arg(self.dir.join("data.json"));
        program.arg("--output-dir").arg(&output).args([
            "--no-shuffle",
            "--threads",
            "2",
            "--max-samples",
            "100000",
            "--precision",
            "f32",
        ]);
        match command {
            Run::Identify => {}
            Run::Experts => _ = program.args(["--num-rounds", "1", "--save-rounds", "none", "--skip-router-training"]),
            Run::Whole => _ = program.args(["--num-rounds", "1", "--save-rounds", "none"]),
        }
        for (key, value) in self.expect["options"].as_object().unwrap() {
            let flag = match key.as_str() {
                "micro_batch" => "batch-size",
                "top_k" => "top-k-experts",
                "accum" => "grad-accum",
                "kl" => "kl-type",
                "stat" => "router-statistic",
                "refusal" => "safe-response",
                same => &same.replace('_', "-"),
            };
            // Options of a phase that does not run are refused.
            let needs = match flag {
                "router-lr" | "kl-type" | "router-statistic" => Run::Whole,
                "expert-lr" | "grad-accum" | "weight-decay" => Run::Experts,
                _ => Run::Identify,
            };
            if command >= needs {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_string);
                program.arg(format!("--{flag}={value}"));
            }
        }
        let done = program.output().unwrap();
        assert!(done.status.success(), "{program:?}: {}\n{}", done.status, String::from_utf8_lossy(&done.stderr));
        output
    }

    fn check_scores(&self, found: &Value) {
        let (ours, theirs) = (numbers(&found["scores"]), numbers(&self.expect["scores"]));
        assert_eq!(ours.len(), theirs.len(), "experts");
        let largest = theirs.iter().fold(0.0, |a: f64, b| a.max(*b));
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            // A score far below the others is a sum of f32 terms that cancel: its error depends on the size of the terms.
            let allowed = SCORES * theirs + 1e-6 * SCORES * largest;
            assert!((ours - theirs).abs() <= allowed, "score {i}: {ours} instead of {theirs}");
        }
        assert_eq!(experts(&found["selected"]), experts(&self.expect["selected"]), "selected experts");
    }

    /// Compares the trained tensors with `after.safetensors`; every other tensor must be bit-identical to the source.
    fn check_updates(&self, before: &Weights, experts_after: &Weights, after: &Weights) {
        let bytes = std::fs::read(self.dir.join("after.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let selected: BTreeSet<ExpertId> = experts(&self.expect["selected"]).into_iter().collect();
        let mut trained: BTreeSet<ParamKind> = BTreeSet::new();
        for (name, tensor) in file.tensors() {
            let values: Vec<f32> = tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            for (kind, theirs) in parts(&name, &values) {
                compare_update(&name, &before[&kind], &after[&kind], theirs);
                if !matches!(kind, ParamKind::Router(_)) {
                    assert!(*after[&kind].bytes == *experts_after[&kind].bytes, "{kind:?} moved with the routers");
                }
                trained.insert(kind);
            }
        }
        for (kind, value) in before {
            let is_selected = matches!(kind, ParamKind::Expert(l, e, _) if selected.contains(&(*l, *e).into()));
            let is_trained = is_selected || matches!(kind, ParamKind::Router(_));
            assert_eq!(is_trained, trained.contains(kind), "{kind:?} in after.safetensors");
            assert!(is_trained || *value.bytes == *after[kind].bytes, "{kind:?} is frozen and moved");
            assert!(is_selected || *value.bytes == *experts_after[kind].bytes, "{kind:?} moved with the experts");
        }
    }
}

/// `expert.L.E.gate_up_proj` (gate rows first), `expert.L.E.down_proj` or `router.L` as the parameters they correspond to.
fn parts<'a>(name: &str, values: &'a [f32]) -> Vec<(ParamKind, &'a [f32])> {
    let words: Vec<&str> = name.split('.').collect();
    let number = |i: usize| words[i].parse().unwrap_or_else(|_| panic!("after.safetensors: {name}"));
    let expert = |proj| ParamKind::Expert(number(1), number(2), proj);
    match (words[0], words.last()) {
        ("router", _) => vec![(ParamKind::Router(number(1)), values)],
        ("expert", Some(&"gate_up_proj")) => {
            let (gate, up) = values.split_at(values.len() / 2);
            vec![(expert(Proj::Gate), gate), (expert(Proj::Up), up)]
        }
        ("expert", Some(&"down_proj")) => vec![(expert(Proj::Down), values)],
        _ => panic!("after.safetensors holds {name}"),
    }
}

/// ‖ours − theirs‖ is within 1 % of ‖theirs − before‖: AdamW's update is nearly the sign of a gradient, so entries near zero
/// flip with rounding. In 16 bits, half a unit per entry is added.
fn compare_update(name: &str, before: &HostTensor, ours: &HostTensor, theirs: &[f32]) {
    assert_eq!(before.len(), theirs.len(), "{name}");
    let half_unit = match before.dtype {
        Dtype::F32 => 0.0,
        Dtype::F16 => 2f64.powi(-11),
        Dtype::Bf16 => 2f64.powi(-8),
    };
    let (mut off, mut moved, mut size) = (0.0, 0.0, 0.0);
    for ((before, ours), theirs) in before.to_f32().iter().zip(ours.to_f32()).zip(theirs) {
        off += f64::from(ours - theirs).powi(2);
        moved += f64::from(theirs - before).powi(2);
        size += f64::from(*theirs).powi(2);
    }
    let allowed = 0.01 * moved.sqrt() + half_unit * size.sqrt();
    assert!(off.sqrt() <= allowed, "{name}: off by {:e}, moved {:e}", off.sqrt(), moved.sqrt());
}

fn weights(dir: &Path) -> Weights {
    let config = ModelConfig::from_dir(dir).unwrap();
    let table = ParamTable::build(&config, &Checkpoint::open(dir).unwrap()).unwrap();
    table.params.into_iter().map(|spec| (spec.kind, spec.base)).collect()
}

fn is_16_bit(weights: &Weights) -> bool {
    weights.values().any(|w| w.dtype != Dtype::F32)
}

fn step_losses(output: &Path, phase: &str) -> Vec<f64> {
    let text = std::fs::read_to_string(output.join("metrics.jsonl")).unwrap();
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    rows.filter(|row| row["phase"] == phase).map(|row| row["total_loss"].as_f64().unwrap()).collect()
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}
