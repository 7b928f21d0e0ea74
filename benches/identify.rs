//! Benchmark of a whole identification pass, or of training steps, for comparison with `benches/peer/identify.py` and
//! `benches/peer/train.py` on the same checkpoint and rows.
//!
//!     cargo bench --bench identify -- MODEL ROWS [--micro-batch 8] [--threads 2] [--repeat 3] [--recompute auto] [--scores FILE]
//!         [--precision f32|bf16] [--train N]
//!
//! ROWS is the output file of `benches/peer/make_rows.py`. Prints the seconds of each pass over all rows (without
//! loading, as the peer does), tokens/s without padding, and the peak resident memory of the process. With `--train N` a pass
//! is a step of AdamW on every Nth expert of each layer, by the gradient of all rows.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use moewarden::backend::cpu::{Caches, Cpu, Processor, Products};
use moewarden::collective::threads;
use moewarden::config::RunConfig;
use moewarden::data::{Dataset, Example, Record, Sampler};
use moewarden::experts::ExpertId;
use moewarden::launch::memory;
use moewarden::model::{Checkpoint, Model, ModelConfig, ParamTable};
use moewarden::train::memory::Activations;
use moewarden::train::{ExpertCrossEntropy, PhasePlan, Recompute, Replica, TrainingPhase, find};

#[derive(serde::Deserialize)]
struct Row {
    ids: Vec<u32>,
    /// Number of loss tokens, at the end.
    loss: usize,
}

fn main() {
    // `cargo bench` adds --bench.
    let args: Vec<String> = std::env::args().skip(1).filter(|a| a != "--bench").collect();
    let option = |name: &str| args.iter().position(|a| a == name).and_then(|i| args.get(i + 1)).cloned();
    let number = |name: &str, default: usize| option(name).map_or(default, |v| v.parse().expect(name));
    let (Some(model), Some(rows)) = (args.first(), args.get(1)) else {
        println!("identify: give MODEL and ROWS (see benches/peer/README.md); skipped");
        return;
    };
    let recompute = match option("--recompute").as_deref() {
        None | Some("auto") => Recompute::Auto,
        Some("always") => Recompute::Always,
        Some("never") => Recompute::Never,
        Some(other) => panic!("--recompute {other}"),
    };
    let dir = PathBuf::from(model);
    let rows: Vec<Row> = serde_json::from_slice(&std::fs::read(rows).expect("rows")).expect("rows");
    let records = rows.into_iter().enumerate().map(|(i, row)| record(i + 1, row)).collect();
    let data = Dataset::of_records(records);
    let tokens: usize = data.records.iter().filter_map(|r| r.unsafe_reply.as_ref()).map(|e| e.ids.len()).sum();

    let config = RunConfig {
        shuffle: false,
        top_k_experts: 1,
        batch_size: number("--micro-batch", 8),
        recompute,
        ..RunConfig::default()
    };
    let shape = ModelConfig::from_dir(&dir).expect("config.json");
    let table = ParamTable::build(&shape, &Checkpoint::open(&dir).expect("weights")).expect("parameters");
    let cpu = Cpu::new(number("--threads", 2));
    let cpu = match option("--precision").as_deref() {
        None | Some("f32") => cpu,
        Some("bf16") => {
            let forced = option("--instructions").map(|name| name.parse().expect("--instructions"));
            let instructions = Processor::detect().choose(forced).expect("--instructions");
            println!("products in bf16 by {instructions}");
            cpu.with_products(Products::new(instructions, Caches::detect()))
        }
        Some(other) => panic!("--precision {other}"),
    };
    println!(
        "{tokens} tokens in {} rows, {} a micro-batch, {} threads",
        data.records.len(),
        config.batch_size,
        cpu.threads()
    );
    let model = Model::new(Arc::new(cpu), shape, table);
    let recipe = config.recipe_of_identification().expect("options without contradictions");
    let mut replica = Replica::new(model, Arc::new(threads::single()));
    let (batch_size, shuffle, seed) = (recipe.batch_size, recipe.shuffle, recipe.seed);
    let sampler = Sampler { data: &data, path: args[1].as_ref(), batch_size, shuffle, seed };
    let micro_batches = sampler.unsafe_order(0);
    let longest = micro_batches.iter().map(|records| sampler.pack_unsafe(records).ids.len()).max().unwrap_or(0);
    let budget = memory::budget(&*replica.model().backend, 1, replica.model().config.vocab_size);
    let layers = replica.model().config.layers.len();
    replica.kept =
        Activations::predict(&replica.model().config, longest, &budget).kept_layers(recompute, layers, 0, &budget, 1);
    let report = |pass: usize, clock: Instant, loss: f64, of: &str| {
        let seconds = clock.elapsed().as_secs_f64();
        println!(
            "pass {pass}: {seconds:.3} s, {:.0} tokens/s, peak RSS {:.2} GiB, loss of the {of} {loss:.6}",
            tokens as f64 / seconds,
            memory::peak_resident() as f64 / (1u64 << 30) as f64,
        );
    };
    let repeat = number("--repeat", 3);
    if let Some(every) = option("--train") {
        let every: usize = every.parse().expect("--train");
        let steps = RunConfig { grad_accum: micro_batches.len(), expert_epochs_per_round: repeat, ..config };
        return train(&mut replica, &steps, sampler, every, report);
    }
    for pass in 1..=repeat {
        let clock = Instant::now();
        let found = find(&replica, &recipe.identify, sampler, micro_batches.clone()).expect("a finite loss");
        report(pass, clock, found.losses[0], "first micro-batch");
        if let Some(path) = option("--scores") {
            let rows: Vec<&[f64]> = found.scores.rows().collect();
            let scores = serde_json::json!({"layers": found.scores.layers, "losses": found.losses, "scores": rows});
            std::fs::write(path, scores.to_string()).expect("scores");
        }
    }
}

/// Steps of the expert phase on every `every`th expert of each layer.
fn train(
    replica: &mut Replica<Cpu>,
    config: &RunConfig,
    sampler: Sampler<'_>,
    every: usize,
    report: impl Fn(usize, Instant, f64, &str),
) {
    let recipe = config.recipe().expect("options without contradictions");
    let (layers, experts) = (replica.model().config.layers.len(), replica.model().config.num_experts);
    let selected: Vec<ExpertId> = (0..layers)
        .flat_map(|layer| (0..experts).step_by(every).map(move |expert| ExpertId { layer, expert }))
        .collect();
    println!("{} of {} experts are trained", selected.len(), layers * experts);
    let phases = recipe.phases();
    let expert = phases.iter().find_map(|phase| if let PhasePlan::Expert(phase) = phase { Some(phase) } else { None });
    let phase = expert.expect("a recipe with an expert phase");
    let objective = ExpertCrossEntropy { phase, identify: &recipe.identify, sampler, selected };
    let mut phase = TrainingPhase::new(objective, &recipe.updates, 0, replica);
    phase.prepare(replica).expect("a phase");
    let mut pass = 0;
    while !phase.is_done() {
        pass += 1;
        let clock = Instant::now();
        let step = phase.step(replica).expect("a step");
        report(pass, clock, step.total_loss, "step");
    }
}

fn record(line: usize, row: Row) -> Record {
    let loss = (0..row.ids.len()).map(|t| t + row.loss >= row.ids.len()).collect();
    let unsafe_reply = Some(Example { ids: row.ids, loss });
    Record {
        line,
        request: String::new(),
        unsafe_reply,
        safe_reply: None,
        unsafe_prompt: None,
        safe_prompt: None,
        safe_messages: Default::default(),
        unsafe_messages: Default::default(),
    }
}
