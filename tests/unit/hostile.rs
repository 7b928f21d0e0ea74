//! Malformed checkpoints: each is refused with the file, the tensor and the right exit code.

use std::fs;
use std::path::Path;

use moewarden::exit::{self, Coded};
use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use moewarden::model::{Checkpoint, ClaimError, ModelConfig, ParamTable, WeightsError};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::{TempDir, tempdir};

/// A safetensors file with this header and `data` zero bytes.
fn file(header: &str, data: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.resize(bytes.len() + data, 0);
    bytes
}

fn open_single(bytes: &[u8]) -> Result<Checkpoint, WeightsError> {
    let dir = tempdir().unwrap();
    fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path())
}

#[test]
fn a_valid_file_opens() {
    let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]},
        "empty":{"dtype":"I64","shape":[0,3],"data_offsets":[8,8]},"b":{"dtype":"BF16","shape":[],"data_offsets":[16,18]},
        "c":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}"#;
    let checkpoint = open_single(&file(header, 18)).unwrap();
    let names: Vec<_> = checkpoint.tensors().map(|(_, tensor)| tensor.name.as_str()).collect();
    assert_eq!(names, ["a", "empty", "b", "c"], "the order of the header is kept");
}

#[test]
fn every_defect_of_a_file_is_named() {
    let one = |entry: &str| format!(r#"{{"x":{entry}}}"#);
    let two = |a: &str, b: &str| {
        format!(
            r#"{{"x":{{"dtype":"F32","shape":[2],"data_offsets":{a}}},"y":{{"dtype":"F32","shape":[2],"data_offsets":{b}}}}}"#
        )
    };
    let good = r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    let huge = (u64::MAX).to_le_bytes().to_vec();
    let beyond = [1000u64.to_le_bytes().as_slice(), b"{}"].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("too few", vec![]),
        ("too few", vec![1; 7]),
        ("more than the", huge),
        ("a header of 1000 bytes", beyond),
        ("does not begin with `{`", file(" {}", 0)),
        ("only zero bytes, as after a crash or a full disk", file("", 0)),
        ("only zero bytes, as after a crash or a full disk", vec![0; 10_000]),
        ("not JSON", file("{\"x\":", 0)),
        ("not JSON", file("{} x", 0)),
        ("not JSON", file("{\"\u{0}\":1}", 0)),
        ("not JSON", [2u64.to_le_bytes().as_slice(), &[b'{', 0xff]].concat()),
        ("`x` occurs twice", file(&format!(r#"{{"x":{good},"x":{good}}}"#), 8)),
        ("`__metadata__` occurs twice", file(r#"{"__metadata__":{},"__metadata__":{}}"#, 0)),
        ("`x`: the field data_offsets is missing", file(&one(r#"{"dtype":"F32","shape":[2]}"#), 8)),
        (
            "`x`: the field `offset` is unknown",
            file(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,8],"offset":1}"#), 8),
        ),
        (
            "`x`: the field dtype is there twice",
            file(&one(r#"{"dtype":"F32","dtype":"F16","shape":[2],"data_offsets":[0,8]}"#), 8),
        ),
        ("`__metadata__`", file(r#"{"__metadata__":{"n":1}}"#, 0)),
        ("`x`: the number format `F31`", file(&one(r#"{"dtype":"F31","shape":[2],"data_offsets":[0,8]}"#), 8)),
        ("`x`", file(&one(r#"{"dtype":"F32","shape":[-2],"data_offsets":[0,8]}"#), 8)),
        ("needs 12", file(&one(r#"{"dtype":"F32","shape":[3],"data_offsets":[0,8]}"#), 8)),
        ("needs 8", file(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[0,4]}"#), 4)),
        ("run backwards", file(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,0]}"#), 8)),
        ("too large", file(&one(r#"{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,8]}"#), 8)),
        ("too large", file(&one(r#"{"dtype":"F32","shape":[0,4294967296,4294967296],"data_offsets":[0,0]}"#), 0)),
        ("whole bytes", file(&one(r#"{"dtype":"F4","shape":[3],"data_offsets":[0,1]}"#), 1)),
        ("complete?", file(&one(good), 7)),
        ("bytes 8..9", file(&one(good), 9)),
        (
            "bytes 0..8 of the data belong to no tensor",
            file(&one(r#"{"dtype":"F32","shape":[2],"data_offsets":[8,16]}"#), 16),
        ),
        ("`x` and `y` overlap", file(&two("[0,8]", "[4,12]"), 12)),
        ("`x` and `y` overlap", file(&two("[0,8]", "[0,8]"), 8)),
        ("bytes 8..16", file(&two("[0,8]", "[16,24]"), 24)),
    ];
    for (expected, bytes) in cases {
        let error = open_single(&bytes).err().unwrap_or_else(|| panic!("opened: {expected}"));
        assert_eq!(error.exit_code(), exit::DATA, "{error}");
        let message = error.to_string();
        assert!(message.contains(expected), "{message:?} lacks {expected:?}");
        assert!(message.contains("model.safetensors"), "{message:?} does not name the file");
    }
}

/// A model in two shards, and its index.
fn sharded() -> (TempDir, Value) {
    let dir = tempdir().unwrap();
    write_random_checkpoint(dir.path(), &TinySpec { shards: 2, ..TinySpec::new("olmoe") }).unwrap();
    let index = fs::read(dir.path().join("model.safetensors.index.json")).unwrap();
    (dir, serde_json::from_slice(&index).unwrap())
}

fn open_with_index(dir: &Path, index: &str) -> WeightsError {
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
    Checkpoint::open(dir).err().expect("refused")
}

const EMBEDDING: &str = "model.embed_tokens.weight";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

#[test]
fn every_defect_of_an_index_is_named() {
    let (dir, good) = sharded();
    let with = |name: &str, file: Value| {
        let mut index = good.clone();
        index["weight_map"][name] = file;
        index.to_string()
    };
    let mut twice = good.to_string();
    twice.insert_str(twice.find(&format!("\"{EMBEDDING}\"")).unwrap(), &format!("\"{EMBEDDING}\":\"{SECOND}\","));
    let cases = [
        ("plain file name", with(EMBEDDING, json!("../model.safetensors"))),
        ("plain file name", with(EMBEDDING, json!("/etc/passwd.safetensors"))),
        ("a/b.safetensors does not exist", with(EMBEDDING, json!("./a/./b.safetensors"))),
        ("plain file name", with(EMBEDDING, json!("a/../b.safetensors"))),
        ("plain file name", with(EMBEDDING, json!("a//b.safetensors"))),
        ("plain file name", with(EMBEDDING, json!("a/.b/c.safetensors"))),
        ("plain file name", with(EMBEDDING, json!("a\\b.safetensors"))),
        ("plain file name", with(EMBEDDING, json!("a\u{0}.safetensors"))),
        ("plain file name", with(EMBEDDING, json!(".hidden.safetensors"))),
        ("plain file name", with(EMBEDDING, json!("pytorch_model.bin"))),
        ("plain file name", with(EMBEDDING, json!(""))),
        ("not an index", with(EMBEDDING, json!(3))),
        ("not an index", "{}".into()),
        ("not an index", "[".into()),
        ("is empty", json!({"weight_map": {}}).to_string()),
        ("model-00003-of-00003.safetensors does not exist", with(EMBEDDING, json!("model-00003-of-00003.safetensors"))),
        ("occurs twice", twice),
    ];
    for (expected, index) in cases {
        let error = open_with_index(dir.path(), &index);
        assert_eq!(error.exit_code(), exit::DATA, "{error}");
        assert!(error.to_string().contains(expected), "{error} lacks {expected:?}");
    }
}

#[test]
fn a_tensor_in_two_shards_is_refused() {
    let (dir, mut index) = sharded();
    let entry = r#"{"model.embed_tokens.weight":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"z":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}"#;
    fs::write(dir.path().join("extra.safetensors"), file(entry, 8)).unwrap();
    index["weight_map"]["z"] = json!("extra.safetensors");
    let error = open_with_index(dir.path(), &index.to_string());
    assert!(matches!(error, WeightsError::InTwoShards { .. }), "{error}");
    assert!(error.to_string().contains("extra.safetensors") && error.to_string().contains(FIRST), "{error}");
}

#[test]
fn links_may_only_lead_into_the_cache() {
    let link = |to: &Path, from: &Path| std::os::unix::fs::symlink(to, from).unwrap();
    let temp = tempdir().unwrap();
    let blobs = temp.path().join("models--a--b/blobs");
    let snapshot = temp.path().join("models--a--b/snapshots/abc");
    fs::create_dir_all(&blobs).unwrap();
    fs::create_dir_all(&snapshot).unwrap();
    write_random_checkpoint(&blobs, &TinySpec::new("olmoe")).unwrap();
    link(Path::new("../../blobs/model.safetensors"), &snapshot.join("model.safetensors"));
    let checkpoint = Checkpoint::open(&snapshot).unwrap();
    assert_eq!(checkpoint.shards()[0].file, "model.safetensors");

    let elsewhere = temp.path().join("elsewhere");
    fs::create_dir(&elsewhere).unwrap();
    link(&blobs.join("model.safetensors"), &elsewhere.join("model.safetensors"));
    let error = Checkpoint::open(&elsewhere).err().unwrap();
    assert!(matches!(error, WeightsError::LinkOutside { .. }), "{error}");
}

#[test]
fn the_error_for_a_folder_without_safetensors_names_the_remedy() {
    let dir = tempdir().unwrap();
    let open = || Checkpoint::open(dir.path()).err().unwrap();
    assert_eq!(open().exit_code(), exit::NO_INPUT);
    fs::write(dir.path().join("pytorch_model.bin"), "not opened").unwrap();
    assert_eq!(open().exit_code(), exit::DATA);
    assert!(open().to_string().contains("save_pretrained"), "{}", open());
    let error = Checkpoint::open(&dir.path().join("nowhere")).err().unwrap();
    assert_eq!(error.exit_code(), exit::NO_INPUT);
}

/// The error for a model with one key of config.json changed so that it contradicts the weights.
fn contradiction(spec: &TinySpec, key: &str, value: Value) -> ClaimError {
    let dir = tempdir().unwrap();
    write_random_checkpoint(dir.path(), spec).unwrap();
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config[key] = value;
    fs::write(&path, config.to_string()).unwrap();
    let config = ModelConfig::from_dir(dir.path()).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    ParamTable::build(&config, &checkpoint).err().unwrap_or_else(|| panic!("{key} went unnoticed"))
}

#[test]
fn config_and_weights_that_disagree_name_the_tensor() {
    let olmoe = TinySpec::new("olmoe");
    let qwen = TinySpec::new("qwen2_moe");
    let cases = [
        (&olmoe, "num_experts", json!(9), "model.layers.0.mlp.gate.weight"),
        (&olmoe, "num_hidden_layers", json!(2), "model.layers.2."),
        (&olmoe, "num_hidden_layers", json!(4), "model.layers.3."),
        (&olmoe, "vocab_size", json!(401), EMBEDDING),
        (&olmoe, "intermediate_size", json!(25), "model.layers.0.mlp.experts.0.gate_proj.weight"),
        (&olmoe, "num_key_value_heads", json!(4), "k_proj.weight"),
        (&olmoe, "attention_bias", json!(true), "model.layers.0.self_attn.q_proj.bias"),
        (&qwen, "qkv_bias", json!(false), "self_attn.q_proj.bias"),
        (&qwen, "mlp_only_layers", json!([0]), "model.layers.0.mlp.gate_proj.weight"),
        (&qwen, "shared_expert_intermediate_size", json!(7), "shared_expert.gate_proj.weight"),
    ];
    for (spec, key, value, tensor) in cases {
        let error = contradiction(spec, key, value);
        assert_eq!(error.exit_code(), exit::DATA, "{error}");
        // Several tensors are wrong: the first found may belong to another expert or layer.
        assert!(error.to_string().contains(tensor), "{key}: {error} lacks {tensor}");
    }
}

#[test]
fn quantised_weights_are_refused_and_known_extra_tensors_are_not() {
    let dir = tempdir().unwrap();
    write_random_checkpoint(dir.path(), &TinySpec::new("mixtral")).unwrap();
    let path = dir.path().join("model.safetensors");
    let good = fs::read(&path).unwrap();
    let len = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&good[8..8 + len]).unwrap().trim_end();
    let build = |header: &str| {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(&good[8 + len..]);
        fs::write(dir.path().join("new"), bytes).unwrap();
        fs::rename(dir.path().join("new"), &path).unwrap();
        ParamTable::build(&ModelConfig::from_dir(dir.path()).unwrap(), &Checkpoint::open(dir.path()).unwrap())
    };
    let end = good.len() - 8 - len;
    let extra = |name: &str| {
        let entry = format!(r#","{name}":{{"dtype":"I64","shape":[0],"data_offsets":[{end},{end}]}}}}"#);
        format!("{}{entry}", header.strip_suffix('}').unwrap())
    };
    assert!(build(&extra("model.layers.0.self_attn.rotary_emb.inv_freq")).is_ok());
    let error = build(&extra("model.layers.0.self_attn.lora_A.weight")).err().unwrap();
    assert!(matches!(error, ClaimError::NotPlain { .. }), "{error}");
    assert!(error.to_string().contains("lora_A"), "{error}");
    let error = build(&extra("model.layers.0.self_attn.q_proj.bias")).err().unwrap();
    assert!(matches!(error, ClaimError::Unclaimed { .. }), "{error}");

    let error = build(&header.replacen("F32", "I32", 1)).err().unwrap();
    assert!(error.to_string().contains("I32") && error.to_string().contains(EMBEDDING), "{error}");
    assert_eq!(error.exit_code(), exit::DATA);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Opening an arbitrarily damaged file returns, and accepted tensors lie inside the file.
    #[test]
    fn the_reader_survives_any_damage_to_a_file(edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6), cut in any::<prop::sample::Index>(), do_cut: bool) {
        let header = r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]},"c":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}}"#;
        let mut bytes = file(header, 16);
        for (at, value) in edits {
            let at = at.index(bytes.len().min(8 + header.len()));
            bytes[at] = value;
        }
        if do_cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        if let Ok(checkpoint) = open_single(&bytes) {
            for (shard, tensor) in checkpoint.tensors() {
                prop_assert!(tensor.file_range.end <= shard.bytes().len());
                if tensor.dtype.float().is_some() {
                    shard.value(tensor).unwrap();
                }
            }
        }
    }
}
