//! Benchmark of a whole identification pass, for comparison with `benches/peer/identify.py` on the same checkpoint and
//! rows.
//!
//!     cargo bench --bench identify -- MODEL ROWS [--micro-batch 8] [--threads 2] [--repeat 3] [--recompute auto] [--scores FILE]
//!         [--precision f32|bf16]
//!
//! ROWS is the output file of `benches/peer/make_rows.py`. Prints the seconds of each pass over all rows (without
//! loading, as the peer does), tokens/s without padding, and the peak resident memory of the process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use moewarden::backend::cpu::{Caches, Cpu, Processor, Products};
use moewarden::collective::threads;
use moewarden::config::RunConfig;
use moewarden::data::{Dataset, Example, Record, Sampler};
use moewarden::launch::memory;
use moewarden::model::{Checkpoint, Model, ModelConfig, ParamTable};
use moewarden::train::memory::Activations;
use moewarden::train::{Recompute, Replica, find};

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
    for pass in 1..=number("--repeat", 3) {
        let clock = Instant::now();
        let found = find(&replica, &recipe.identify, sampler, micro_batches.clone()).expect("a finite loss");
        let seconds = clock.elapsed().as_secs_f64();
        println!(
            "pass {pass}: {seconds:.3} s, {:.0} tokens/s, peak RSS {:.2} GiB, loss of the first micro-batch {:.6}",
            tokens as f64 / seconds,
            memory::peak_resident() as f64 / (1u64 << 30) as f64,
            found.losses[0]
        );
        if let Some(path) = option("--scores") {
            let rows: Vec<&[f64]> = found.scores.rows().collect();
            let scores = serde_json::json!({"layers": found.scores.layers, "losses": found.losses, "scores": rows});
            std::fs::write(path, scores.to_string()).expect("scores");
        }
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
