//! Training does not depend on the number of ranks: with the same micro-batches the selection, losses and weights agree;
//! and ranks as processes are bit-identical to ranks as threads.
//!
//! A step of the expert and joint phases has grad-accum · ranks micro-batches, one of the router phase has ranks
//! micro-batches. So the runs here divide a step of 12 examples among 1, 2, 3 or 4 ranks by one or the other option. There are
//! 13 rows: in the second step of each phase all ranks but one are idle.

use std::collections::BTreeMap;
use std::path::Path;

use crate::comparison::{SAME_WEIGHTS, TRAINED_WEIGHTS, check_close};
use crate::program::{self, Outputs, moewarden, read_weights, start, write_rows};

const ROWS: usize = 13;
const STEP: usize = 12;

/// The option that divides the examples of a step among the ranks.
#[derive(Clone, Copy)]
enum Shared {
    /// For cross-entropy, a mean over tokens: micro-batches of one size, several per rank.
    ByAccumulation(usize),
    /// For the router phase, which compares whole batches: smaller ones. (Gradient scores would be means over different
    /// micro-batches.)
    ByBatchSize,
}

use Shared::{ByAccumulation, ByBatchSize};

impl Shared {
    fn options(self, ranks: usize) -> String {
        match self {
            ByAccumulation(batch) => format!("--batch-size {batch} --grad-accum {}", STEP / ranks),
            ByBatchSize => format!("--batch-size {}", STEP / ranks),
        }
    }
}

/// A training run, whatever the number of ranks.
struct Job {
    model: &'static str,
    shared: Shared,
    options: &'static str,
    /// The expected number of steps by phase.
    steps: &'static [(&'static str, usize)],
    /// The relative tolerance of scores.
    scores: f64,
}

const EXPERTS: &str = "--num-rounds 1 --skip-router-training --expert-lr 1e-3";

impl Job {
    fn new(shared: Shared, options: &'static str, steps: &'static [(&'static str, usize)]) -> Self {
        Self { model: "olmoe", shared, options, steps, scores: SAME_WEIGHTS }
    }

    /// Runs with ranks as threads of one process, or as processes.
    fn run(&self, dir: &Path, ranks: usize, processes: bool) -> Outputs {
        let [data, output] = [dir.join("data.json"), dir.join(format!("{ranks}-{processes}"))];
        write_rows(&data, ROWS);
        let threads = if processes { String::new() } else { format!("--ranks {ranks}") };
        let text = format!(
            "train --model-name {} --dataset-path {} --output-dir {} {} {threads} {} --top-k-experts 4 \
             --safe-response No. --save-rounds none --save-steps 0 --threads 1 --quiet",
            program::model(self.model).display(),
            data.display(),
            output.display(),
            self.shared.options(ranks),
            self.options.replace("{EXPERTS}", EXPERTS).replace("{DATA}", &data.display().to_string()),
        );
        start(moewarden(if processes { ranks } else { 0 }, text.split_whitespace())).end().ok();
        Outputs::read(&output)
    }

    /// Compares runs on 2, 3 and 4 ranks with a run on one rank.
    fn check(&self) {
        let dir = tempfile::tempdir().unwrap();
        let single = self.run(dir.path(), 1, false);
        let mut steps: BTreeMap<&str, usize> = BTreeMap::new();
        for row in &single.metrics {
            *steps.entry(row["phase"].as_str().unwrap()).or_default() += 1;
        }
        assert_eq!(steps, self.steps.iter().copied().collect(), "{}", self.options);
        self.check_loads(&single);
        self.check_trained(&single);
        for ranks in 2..=4 {
            let what = format!("{ranks} ranks, {}", self.options);
            let several = self.run(dir.path(), ranks, false);
            check_close(&single, &several, self.scores, &what);
        }
    }

    /// Asserts that each token of a phase is counted for K experts of the first layer, and that steps say how even that is.
    fn check_loads(&self, run: &Outputs) {
        let config = std::fs::read(program::model(self.model).join("config.json")).unwrap();
        let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
        let top_k = config["num_experts_per_tok"].as_u64().unwrap();
        for (phase, _) in self.steps {
            let of_phase = || run.metrics.iter().filter(|row| row["phase"] == *phase);
            let round = &of_phase().next_back().unwrap()["round"];
            let rows: Vec<_> = of_phase().filter(|row| row["round"] == *round).collect();
            let tokens: u64 = rows.iter().map(|row| row["tokens"].as_u64().unwrap()).sum();
            let last = &rows.last().unwrap()["phase_load"];
            let counted =
                last["counts"][0].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum::<u64>();
            assert_eq!(counted, top_k * tokens, "{phase}, {}", self.options);
            let layers = last["layers"].as_array().unwrap().len();
            for row in rows.iter().filter(|_| *phase != "identify") {
                let of_layers = row["expert_load"]["busiest"].as_array().unwrap();
                assert!(of_layers.len() == layers && of_layers.iter().all(|share| share.as_f64() > Some(0.0)), "{row}");
            }
        }
    }

    /// Asserts that weights changed: otherwise the comparison would be vacuous.
    fn check_trained(&self, run: &Outputs) {
        let source = read_weights(&program::model(self.model));
        let moved = run.weights.iter().filter(|(name, value)| value.bytes[..] != source[*name].bytes[..]).count();
        assert!(moved > 2, "{}: {moved} tensors moved", self.options);
    }
}

const ONE_EXPERT_PHASE: &[(&str, usize)] = &[("identify", 13), ("expert", 2)];

#[test]
fn the_expert_phase() {
    Job::new(ByAccumulation(1), "{EXPERTS}", ONE_EXPERT_PHASE).check();
}

#[test]
fn scores_per_token_and_clipped_gradients() {
    let options = "{EXPERTS} --score fisher --score-per token --max-grad-norm 0.05 --weight-decay 0.1";
    Job::new(ByAccumulation(1), options, ONE_EXPERT_PHASE).check();
}

#[test]
fn frequencies_of_routing() {
    Job::new(ByAccumulation(1), "{EXPERTS} --method routing --risk-threshold -1", &[("expert", 2)]).check();
}

#[test]
fn random_experts_with_the_counts_per_layer_of_the_gradient_method() {
    Job::new(ByAccumulation(1), "{EXPERTS} --method random --random-match layer", &[("expert", 2)]).check();
}

#[test]
fn all_parameters_and_held_out_rows() {
    let options = "{EXPERTS} --mode baseline --eval-dataset-path {DATA}";
    Job::new(ByAccumulation(1), options, ONE_EXPERT_PHASE).check();
}

#[test]
fn all_experts_of_a_model_with_shared_experts() {
    let job = Job::new(ByAccumulation(1), "{EXPERTS} --mode experts", ONE_EXPERT_PHASE);
    Job { model: "qwen2_moe", ..job }.check();
}

#[test]
fn experts_chosen_at_every_step() {
    let job = Job::new(ByAccumulation(1), "{EXPERTS} --selection per-batch", ONE_EXPERT_PHASE);
    Job { scores: TRAINED_WEIGHTS, ..job }.check();
}

#[test]
fn weights_in_16_bits() {
    let job = Job::new(ByAccumulation(1), "{EXPERTS}", ONE_EXPERT_PHASE);
    Job { model: "olmoe_bf16", ..job }.check();
}

#[test]
fn fused_experts() {
    let job = Job::new(ByAccumulation(1), "{EXPERTS}", ONE_EXPERT_PHASE);
    Job { model: "olmoe_fused", ..job }.check();
}

#[test]
fn experts_and_routers_in_one_step() {
    // Micro-batches of one safe and one unsafe example.
    let options = "--num-rounds 1 --use-router-consistency-loss --expert-lr 1e-3 --router-lr 1e-3";
    Job::new(ByAccumulation(2), options, &[("identify", 7), ("joint", 2)]).check();
}

#[test]
fn the_router_phase_by_either_statistic() {
    for options in [
        "--num-rounds 1 --method random --no-finetune-unsafe-experts --router-lr 1e-3",
        "--num-rounds 1 --method random --no-finetune-unsafe-experts --router-lr 1e-3 --router-statistic sample-logits \
         --kl-type symmetric",
        "--num-rounds 1 --method random --no-finetune-unsafe-experts --router-lr 1e-3 --router-last-tokens 2 \
         --router-target round-start",
    ] {
        Job::new(ByBatchSize, options, &[("router", 2)]).check();
    }
}

#[test]
fn rounds_of_both_phases() {
    let options = "--method random --num-rounds 2 --expert-lr 1e-3 --router-lr 1e-3 --lr-schedule cosine";
    Job::new(ByBatchSize, options, &[("expert", 4), ("router", 4)]).check();
}

/// As many retain rows in a step as it has examples, also in the last step, which has one.
#[test]
fn every_phase_with_retain_rows() {
    let retain = |weights: &str| format!("--retain-dataset-path {{DATA}} {weights}");
    let experts = format!("{{EXPERTS}} {}", retain("--retain-routing-weight 0.5"));
    let everything = format!("{{EXPERTS}} --mode baseline {}", retain("--retain-weight 3"));
    let joint = "--num-rounds 1 --use-router-consistency-loss --expert-lr 1e-3 --router-lr 1e-3";
    let joint = format!("{joint} {}", retain("--retain-loss ce --retain-routing-weight 2"));
    let both = "--method random --num-rounds 2 --expert-lr 1e-3 --router-lr 1e-3";
    let both = format!("{both} {}", retain("--retain-weight 0.5 --retain-routing-weight 1"));
    let routing = "--num-rounds 1 --method random --no-finetune-unsafe-experts --router-lr 1e-3";
    let routing = format!("{routing} {}", retain("--retain-weight 0 --retain-routing-weight 1"));
    let check = |shared, options: &str, steps| {
        Job { options: options.to_owned().leak(), ..Job::new(shared, "", steps) }.check();
    };
    check(ByAccumulation(1), &experts, ONE_EXPERT_PHASE);
    check(ByAccumulation(1), &everything, ONE_EXPERT_PHASE);
    check(ByAccumulation(2), &joint, &[("identify", 7), ("joint", 2)]);
    check(ByBatchSize, &both, &[("expert", 4), ("router", 4)]);
    check(ByBatchSize, &routing, &[("router", 2)]);
}

#[cfg(feature = "mpi")]
#[test]
fn processes_are_bit_identical_to_threads() {
    let joint = "--num-rounds 1 --use-router-consistency-loss --expert-lr 1e-3 --router-lr 1e-3";
    let both = "--num-rounds 1 --method random --expert-lr 1e-3 --router-lr 1e-3";
    for (ranks, model, shared, options) in [
        (2, "olmoe", ByAccumulation(1), "{EXPERTS} --mode baseline --score-per token"),
        (3, "olmoe_bf16", ByAccumulation(1), "{EXPERTS} --selection per-batch"),
        (4, "qwen2_moe", ByBatchSize, both),
        (3, "olmoe", ByAccumulation(2), joint),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let job = Job { model, ..Job::new(shared, options, &[]) };
        let threads = job.run(dir.path(), ranks, false);
        job.check_trained(&threads);
        job.run(dir.path(), ranks, true).assert_same(&threads, &format!("{ranks} processes, {options}"));
    }
}
