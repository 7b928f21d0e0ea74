//! Models that are missing, damaged, inconsistent or hostile.

use std::fs;

use moewarden::model::tiny::TinySpec;
use serde_json::{Value, json};

use super::{Scene, spec};

#[test]
fn a_missing_model() {
    let scene = Scene::new();
    scene.refuses(&["--model-name", "/nowhere/model"], 66, &["/nowhere/model", "neither a folder nor a hub id"]);
    scene.refuses(&["--model-name", "nobody/nothing"], 66, &["nobody/nothing", "hf download"]);
    scene.refuses(&["--model-name", "rows.jsonl"], 66, &["rows.jsonl", "is a file", "folder"]);
}

#[test]
fn a_missing_or_empty_file_of_the_model() {
    for (name, missing, empty) in [("config.json", 66, 65), ("model.safetensors", 66, 65), ("tokenizer.json", 66, 65)] {
        let scene = Scene::new();
        fs::write(scene.model().join(name), "").unwrap();
        scene.refuses(&[], empty, &[name]);
        fs::remove_file(scene.model().join(name)).unwrap();
        scene.refuses(&[], missing, &[if name == "model.safetensors" { "safetensors" } else { name }]);
    }
}

#[test]
fn an_impossible_configuration() {
    let cases = [
        (json!({"num_experts": 0}), 65, "num_experts"),
        (json!({"num_experts_per_tok": 9}), 65, "num_experts_per_tok: 9 of only 8 experts"),
        (json!({"hidden_size": 1u64 << 60}), 65, "hidden_size: 1152921504606846976 is not a whole number"),
        (json!({"num_experts": 1 << 28, "intermediate_size": 1 << 28}), 65, "too large for this machine"),
        (json!({"model_type": "gemma"}), 78, "olmoe, mixtral, qwen3_moe, qwen2_moe, qwen3, llama, mistral"),
        (json!({"vocab_size": 100}), 65, "model.embed_tokens.weight"),
        (json!({"num_experts": 9}), 65, "model.layers.0.mlp.gate.weight"),
        (
            json!({"num_experts": 1 << 20}),
            65,
            "num_experts: 1048576 experts in 3 layers are more than the supported 1048576",
        ),
        (json!({"num_hidden_layers": 99_999}), 65, "tensor `model.layers.3."),
        (json!({"model_type": "x\u{1b}[2J"}), 78, "the model_type `x\\u{1b}[2J`"),
    ];
    for (change, code, says) in cases {
        let scene = Scene::new();
        scene.configure(change);
        scene.refuses(&[], code, &[says]);
    }
    let scene = Scene::new();
    scene.refuses(&["--top-k-experts", "25"], 78, &["25", "24"]);
    fs::write(scene.model().join("config.json"), "{\"model_type\": \"olmoe\",").unwrap();
    scene.refuses(&[], 65, &["config.json"]);
}

/// Header and data of a safetensors file.
pub struct Weights {
    pub header: String,
    pub data: Vec<u8>,
}

impl Weights {
    pub fn read(scene: &Scene) -> Self {
        let bytes = fs::read(scene.model().join("model.safetensors")).unwrap();
        let len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header = String::from_utf8(bytes[8..8 + len].to_vec()).unwrap();
        Self { header, data: bytes[8 + len..].to_vec() }
    }

    pub fn write(&self, scene: &Scene, header: &str) {
        let bytes = [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat();
        fs::write(scene.model().join("model.safetensors"), bytes).unwrap();
    }

    /// The header with one tensor's entry changed.
    pub fn with(&self, tensor: &str, change: impl FnOnce(&mut Value)) -> String {
        let mut header: Value = serde_json::from_str(&self.header).unwrap();
        change(&mut header[tensor]);
        header.to_string()
    }
}

const EMBEDDING: &str = "model.embed_tokens.weight";

#[test]
fn truncated_or_inconsistent_weights() {
    let scene = Scene::new();
    let weights = Weights::read(&scene);
    let entry: Value = serde_json::from_str::<Value>(&weights.header).unwrap()[EMBEDDING].clone();
    let offsets: Vec<u64> = serde_json::from_value(entry["data_offsets"].clone()).unwrap();
    let over = json!({"dtype": "F32", "shape": [321, 48], "data_offsets": [offsets[0], offsets[1] + 192]});
    let longer = weights.with(EMBEDDING, |e| e["data_offsets"] = json!([offsets[0], offsets[1] + 4]));
    let twice = weights.header.replacen('{', &format!("{{\"{EMBEDDING}\":{entry},"), 1);
    let cases = [
        ("overlap", weights.with(EMBEDDING, |e| *e = over)),
        ("needs", longer),
        ("occurs twice", twice),
        ("needs", weights.with(EMBEDDING, |e| e["shape"] = json!([320, 47]))),
        ("requires [320, 48]", weights.with(EMBEDDING, |e| e["shape"] = json!([48, 320]))),
        ("I32", weights.with(EMBEDDING, |e| e["dtype"] = json!("I32"))),
        ("too large", weights.with(EMBEDDING, |e| e["shape"] = json!([1u64 << 62, 1u64 << 62]))),
    ];
    for (says, header) in cases {
        weights.write(&scene, &header);
        scene.refuses(&[], 65, &[EMBEDDING, says, "model.safetensors"]);
    }

    let mut without: Value = serde_json::from_str(&weights.header).unwrap();
    without.as_object_mut().unwrap().remove(EMBEDDING);
    weights.write(&scene, &without.to_string());
    scene.refuses(&[], 65, &["belong to no tensor", "model.safetensors"]);

    let path = scene.model().join("model.safetensors");
    weights.write(&scene, &weights.header);
    let good = fs::read(&path).unwrap();
    fs::write(&path, &good[..good.len() - 1]).unwrap();
    scene.refuses(&[], 65, &["model.safetensors", "complete?"]);
    fs::write(&path, &good[..100]).unwrap();
    scene.refuses(&[], 65, &["model.safetensors", "claims"]);
    let mut beyond = good.clone();
    beyond[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    fs::write(&path, &beyond).unwrap();
    scene.refuses(&[], 65, &["model.safetensors"]);
}

#[test]
fn an_index_with_paths_outside_of_the_folder() {
    let scene = Scene::with(&TinySpec { shards: 2, ..spec() });
    let path = scene.model().join("model.safetensors.index.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for (file, says) in [
        ("../model.safetensors", "plain file name"),
        ("/etc/passwd", "plain file name"),
        ("model-00007-of-00007.safetensors", "does not exist"),
    ] {
        let mut index = good.clone();
        index["weight_map"][EMBEDDING] = file.into();
        fs::write(&path, index.to_string()).unwrap();
        scene.refuses(&[], 65, &["model.safetensors.index.json", says]);
    }
    fs::write(&path, good.to_string()).unwrap();
    fs::remove_file(scene.model().join("model-00002-of-00002.safetensors")).unwrap();
    scene.refuses(&[], 65, &["model-00002-of-00002.safetensors"]);
}

#[test]
fn a_checkpoint_of_pickles() {
    let scene = Scene::new();
    fs::rename(scene.model().join("model.safetensors"), scene.model().join("pytorch_model.bin")).unwrap();
    scene.refuses(&[], 65, &["pytorch_model.bin", "save_pretrained"]);
}

#[test]
fn a_weight_that_is_not_a_number() {
    for (tensor, value) in
        [("model.layers.1.mlp.experts.3.up_proj.weight", f32::NAN), ("lm_head.weight", f32::INFINITY)]
    {
        let scene = Scene::new();
        let mut weights = Weights::read(&scene);
        let header: Value = serde_json::from_str(&weights.header).unwrap();
        let start = header[tensor]["data_offsets"][0].as_u64().unwrap() as usize + 4 * 5;
        weights.data[start..start + 4].copy_from_slice(&value.to_le_bytes());
        weights.write(&scene, &weights.header);
        scene.train(&[]).is(80, &["element 5", "fetch it again"]);
        let check = |more: &[&str]| super::Outcome::of(scene.run("check", more));
        check(&[]).is(80, &[tensor, "element 5", "fetch it again"]);
        check(&["--skip-weights"]).is(0, &[]);
        assert_eq!(super::files(&scene.out()), Vec::<String>::new());
    }
}

#[test]
fn a_tokenizer_without_a_template_or_of_another_model() {
    let scene = Scene::new();
    fs::remove_file(scene.model().join("chat_template.jinja")).unwrap();
    scene.refuses(&[], 78, &["no chat template", "--chat-template"]);
    scene.refuses(&["--chat-template", "absent.jinja"], 66, &["absent.jinja"]);
    fs::write(scene.path("broken.jinja"), "{% for message in %}").unwrap();
    scene.refuses(&["--chat-template", "broken.jinja"], 65, &["broken.jinja", "does not compile", "line 1"]);

    let scene = Scene::with(&TinySpec { vocab_size: 300, ..spec() });
    scene.refuses(&[], 65, &["tokenizer.json", "319", "300"]);
}

#[test]
fn a_template_that_loops_or_grows_without_limit() {
    let scene = Scene::new();
    for source in [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
        "{{ 'a' * 900000000000 }}",
        "{% set ns = namespace(x='a') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x[:1] }}",
        "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    ] {
        fs::write(scene.model().join("chat_template.jinja"), source).unwrap();
        scene.refuses(&[], 65, &["the chat template"]);
    }
}

#[test]
fn a_template_that_panics_the_engine() {
    let scene = Scene::new();
    fs::write(scene.model().join("chat_template.jinja"), "{{ '%(é)s' | format(1) }}").unwrap();
    let outcome = scene.train(&[]);
    outcome.is(
        65,
        &["chat_template.jinja: the chat template failed on the turns of rows.jsonl:1: it crashed the template engine"],
    );
    for word in ["at fault", "panicked"] {
        assert!(!outcome.stderr.contains(word), "{}", outcome.stderr);
    }
}
