//! Peak memory of processes that shard the optimizer state.

use std::fs;

use moewarden::launch::memory::human;
use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use moewarden::model::{Checkpoint, ModelConfig, ParamTable};
use moewarden::train::memory::TrainedState;

use crate::program::{self, moewarden, start, write_rows};

/// Bytes of `12.3 MB`.
fn bytes(text: &str) -> f64 {
    let (number, unit) = text.trim().split_once(' ').unwrap();
    let power = ["B", "kB", "MB", "GB", "TB"].iter().position(|u| *u == unit).unwrap();
    number.parse::<f64>().unwrap() * 1000f64.powi(power as i32)
}

/// Measured peak memory of processes. On one rank, master weights and moments take 12 bytes per parameter. Each of four
/// ranks has a quarter of that, and a quarter of the gradient sum, for which a single rank needs no memory.
#[test]
fn sharding_the_optimizer_reduces_peak_memory() {
    let dir = tempfile::tempdir().unwrap();
    let [model, data] = ["model", "rows.json"].map(|name| dir.path().join(name));
    // Few short rows, and many small experts, so that buckets are close to their minimum size.
    let spec = TinySpec {
        vocab_size: 320,
        hidden_size: 256,
        num_layers: 4,
        head_dim: 64,
        num_experts: 64,
        expert_width: 192,
        ..TinySpec::new("olmoe")
    };
    write_random_checkpoint(&model, &spec).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        let source = program::model("olmoe").join(file);
        if source.exists() {
            fs::copy(source, model.join(file)).unwrap();
        }
    }
    write_rows(&data, 4);
    let run = |ranks: usize| {
        let output = dir.path().join(format!("on-{ranks}"));
        let text = format!(
            "train --model-name {} --dataset-path {} --output-dir {} --batch-size 1 --grad-accum {} --num-rounds 1 \
             --mode baseline --skip-router-training --method random --threads 1 --save-rounds none --save-steps 0",
            model.display(),
            data.display(),
            output.display(),
            4 / ranks,
        );
        let ran = start(moewarden(ranks, text.split_whitespace())).end().ok();
        fs::remove_dir_all(&output).unwrap();
        let line = ran.out.lines().find(|line| line.starts_with("peak memory")).unwrap();
        let peaks: Vec<f64> = line.split_once(": ").unwrap().1.split(", ").map(bytes).collect();
        assert_eq!(peaks.len(), ranks, "{line}");
        (peaks, ran.out)
    };
    let (single, _) = run(1);
    let (four, out) = run(4);
    let elements = ParamTable::build(&ModelConfig::from_dir(&model).unwrap(), &Checkpoint::open(&model).unwrap())
        .unwrap()
        .total()
        .elements;
    let predicted = TrainedState::predict(elements as u64, 4, 4).sharded;
    assert!(out.contains(&format!("1/4 of masters and moments {}", human(predicted))), "{out}");
    // 12 bytes per parameter become 16/4. Up to four buckets of 32 MiB are in flight and take some of that back: two queued,
    // one being filled and one being sent.
    let (less, buckets) = (8.0 * elements as f64, 4.0 * f64::from(32 << 20));
    for peak in four {
        let saved = single[0] - peak;
        assert!(saved > less - buckets && saved < 1.1 * less, "{saved} bytes less, not {less}");
    }
}
