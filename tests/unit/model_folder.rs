//! Small model folders for tests of weights and deltas.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moewarden::backend::HostTensor;
use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use moewarden::model::{Checkpoint, Group, ModelConfig, ParamId, ParamTable};
use tempfile::TempDir;

/// An opened checkpoint.
pub struct Model {
    pub dir: PathBuf,
    pub config: ModelConfig,
    pub checkpoint: Checkpoint,
    pub table: ParamTable,
}

pub fn open(dir: &Path) -> Model {
    let config = ModelConfig::from_dir(dir).unwrap();
    let checkpoint = Checkpoint::open(dir).unwrap();
    let table = ParamTable::build(&config, &checkpoint).unwrap();
    Model { dir: dir.into(), config, checkpoint, table }
}

pub fn make(dir: &Path, spec: &TinySpec) -> Model {
    write_random_checkpoint(dir, spec).unwrap();
    fs::write(dir.join("tokenizer.json"), "{\"not\": \"read here\"}").unwrap();
    open(dir)
}

pub fn out(temp: &TempDir) -> PathBuf {
    temp.path().join("out")
}

/// Contents of every file below a folder, by relative path.
pub fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                found.insert(path.strip_prefix(dir).unwrap().to_path_buf(), fs::read(&path).unwrap());
            }
        }
    }
    found
}

/// New values for a few parameters of every group.
pub fn some_changes(table: &ParamTable) -> BTreeMap<ParamId, HostTensor> {
    let mut changed = BTreeMap::new();
    for (id, spec) in table.iter().filter(|(id, spec)| id % 5 == 0 || spec.kind.group() == Group::Router) {
        let values: Vec<f32> = (0..spec.len()).map(|i| (i % 7) as f32 - id as f32).collect();
        changed.insert(id, HostTensor::encode(spec.dtype(), spec.shape().to_vec(), &values));
    }
    changed
}

/// A spec per family with the features that only this family has.
pub fn families() -> Vec<TinySpec> {
    let with = |model_type: &str, extra: serde_json::Value| {
        let mut spec = TinySpec::new(model_type);
        spec.extra = extra.as_object().unwrap().clone();
        spec
    };
    vec![
        with("olmoe", serde_json::json!({"clip_qkv": 8.0, "attention_bias": true})),
        with("mixtral", serde_json::json!({"sliding_window": 16})),
        with("qwen3_moe", serde_json::json!({"mlp_only_layers": [1], "norm_topk_prob": true, "head_dim": 16})),
        with("qwen2_moe", serde_json::json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2})),
        with("qwen3", serde_json::json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 0})),
        with("llama", serde_json::json!({"attention_bias": true})),
        with("mistral", serde_json::json!({"sliding_window": 16})),
    ]
}
