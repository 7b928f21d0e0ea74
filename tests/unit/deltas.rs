//! Deltas: applied to the base model that they belong to, and to no other.

use std::fs;

use moewarden::backend::{Dtype, HostTensor};
use moewarden::checkpoint::{self, apply_delta, export, save_delta};
use moewarden::exit::{self, Coded};
use moewarden::model::tiny::{Layout, TinySpec};
use serde_json::json;

use crate::model_folder::{families, files, make, out, some_changes};

#[test]
fn a_delta_gives_the_same_folder_as_an_export() {
    for (family, layout) in families().into_iter().flat_map(|f| [(f.clone(), Layout::PerExpert), (f, Layout::Fused)]) {
        let temp = tempfile::tempdir().unwrap();
        let model = make(&temp.path().join("in"), &TinySpec { layout, shards: 2, dtype: Dtype::Bf16, ..family });
        let changed = some_changes(&model.table);
        export(&model.dir, &model.checkpoint, &model.table, &changed, &out(&temp)).unwrap();
        let delta = temp.path().join("round_1.safetensors");
        save_delta(&model.checkpoint, &model.table, &changed, &delta).unwrap();
        let applied = temp.path().join("applied");
        apply_delta(&model.dir, &delta, &applied).unwrap();
        assert!(files(&applied) == files(&out(&temp)), "{} {layout:?}", model.config.model_type);
    }
}

#[test]
fn a_delta_of_weights_that_are_not_finite_is_not_applied() {
    let temp = tempfile::tempdir().unwrap();
    let model = make(&temp.path().join("base"), &TinySpec::new("olmoe"));
    let delta = temp.path().join("delta.safetensors");
    let mut changes = some_changes(&model.table);
    for bad in [f32::NAN, f32::INFINITY] {
        let (&id, value) = changes.iter_mut().next().unwrap();
        let mut values = value.to_f32();
        values[5] = bad;
        *value = HostTensor::encode(value.dtype, value.shape.clone(), &values);
        save_delta(&model.checkpoint, &model.table, &changes, &delta).unwrap();
        let error = apply_delta(&model.dir, &delta, &out(&temp)).unwrap_err();
        assert_eq!(error.exit_code(), exit::NOT_FINITE, "{error}");
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(error.to_string().contains("delta.safetensors"), "{error}");
        assert!(cause.contains(&model.table.params[id].name()) && cause.contains("element 5"), "{cause}");
        assert!(!out(&temp).exists());
    }
}

#[test]
fn a_hostile_delta_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let model = make(&temp.path().join("in"), &TinySpec::new("mixtral"));
    let path = temp.path().join("delta");
    save_delta(&model.checkpoint, &model.table, &some_changes(&model.table), &path).unwrap();
    let good = fs::read(&path).unwrap();
    let header_len = u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let header = std::str::from_utf8(&good[8..8 + header_len]).unwrap().to_owned();
    let with_header = |from: &str, to: &str| {
        assert!(header.contains(from), "{from} is not in the header");
        let header = header.replacen(from, to, 1);
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(&good[8 + header_len..]);
        bytes
    };
    let router = "model.layers.0.block_sparse_moe.gate.weight";
    // Two routers swapped: each still has the right shape.
    let other_router = router.replace("layers.0", "layers.1");
    let swapped = header.replace(router, "?").replace(&other_router, router).replace('?', &other_router);
    let swapped =
        [(swapped.len() as u64).to_le_bytes().as_slice(), swapped.as_bytes(), &good[8 + header_len..]].concat();
    let layout = model.checkpoint.layout_hash().to_string();
    let cases = [
        ("its schema is", with_header("moewarden.delta/1", "moewarden.delta/9")),
        ("no schema", with_header("schema", "scheme")),
        ("another base", with_header(&layout, &layout.replace(|c: char| c.is_ascii_digit(), "0"))),
        ("the base model has no such parameter", with_header(router, "../../etc/passwd")),
        ("[48, 8]", with_header("[8,48]", "[48,8]")),
        ("complete?", good[..good.len() - 4].to_vec()),
        ("complete?", good[..20].to_vec()),
        ("its values are not those that were written", swapped),
    ];
    for (expected, bytes) in cases {
        fs::write(&path, bytes).unwrap();
        let error = apply_delta(&model.dir, &path, &out(&temp)).unwrap_err();
        assert_eq!(error.exit_code(), exit::DATA, "{error}");
        assert!(error.to_string().contains(expected), "{error} lacks {expected}");
        assert!(!out(&temp).exists());
    }
    fs::write(&path, good).unwrap();

    // The same structure with the weights of another seed.
    let other = temp.path().join("other");
    make(&other, &TinySpec { seed: 7, ..TinySpec::new("mixtral") });
    let error = apply_delta(&other, &path, &out(&temp)).unwrap_err();
    assert!(matches!(error, checkpoint::Error::OtherBase { .. }), "{error}");
    apply_delta(&model.dir, &path, &out(&temp)).unwrap();
}

#[test]
fn a_delta_belongs_to_one_configuration_and_all_weights_of_its_base() {
    let temp = tempfile::tempdir().unwrap();
    let model = make(&temp.path().join("base"), &TinySpec::new("olmoe"));
    let delta = temp.path().join("delta.safetensors");
    let mut changes = some_changes(&model.table);
    let (&unchanged, _) = changes.iter().next().unwrap();
    let kept = changes.remove(&unchanged).unwrap();
    save_delta(&model.checkpoint, &model.table, &changes, &delta).unwrap();

    let config = fs::read_to_string(model.dir.join("config.json")).unwrap();
    let apply_with = |key: &str, value: serde_json::Value| {
        let mut other: serde_json::Value = serde_json::from_str(&config).unwrap();
        other[key] = value;
        fs::write(model.dir.join("config.json"), other.to_string()).unwrap();
        let _ = fs::remove_dir_all(out(&temp));
        apply_delta(&model.dir, &delta, &out(&temp))
    };
    for (key, value) in
        [("rms_norm_eps", json!(0.125)), ("num_experts_per_tok", json!(1)), ("norm_topk_prob", json!(true))]
    {
        let error = apply_with(key, value).unwrap_err();
        assert!(error.to_string().contains(&format!("config.json differs in {key} (")), "{error}");
        assert_eq!(error.exit_code(), exit::DATA);
        assert!(!out(&temp).exists());
    }
    apply_with("transformers_version", json!("9")).unwrap();
    fs::write(model.dir.join("config.json"), &config).unwrap();

    // A weight that the delta does not replace.
    let other = temp.path().join("other");
    export(&model.dir, &model.checkpoint, &model.table, &[(unchanged, kept)].into(), &other).unwrap();
    let _ = fs::remove_dir_all(out(&temp));
    let error = apply_delta(&other, &delta, &out(&temp)).unwrap_err();
    assert!(error.to_string().contains("weights that the delta does not replace differ"), "{error}");

    // As older versions wrote it: without the keys that say so.
    let bytes = fs::read(&delta).unwrap();
    let header_len = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header_len]).unwrap();
    for key in ["base_weights", "base_config"] {
        assert!(header["__metadata__"].as_object_mut().unwrap().remove(key).is_some());
    }
    let header = header.to_string();
    let old = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[8 + header_len..]].concat();
    fs::write(&delta, old).unwrap();
    apply_delta(&other, &delta, &out(&temp)).unwrap();
}
