//! Reading and writing models: the golden checkpoints, every family × layout × dtype × sharding, exports and deltas.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use moewarden::backend::{Dtype, HostTensor};
use moewarden::checkpoint::{export, export_replacing, save_delta};
use moewarden::exit::{self, Coded};
use moewarden::model::tiny::{Layout, TinySpec, write_random_checkpoint};
use moewarden::model::{
    Checkpoint, FAMILIES, HubCache, ModelConfig, ParamId, ParamKind, ParamTable, Proj, write_header,
};
use proptest::prelude::*;

use crate::model_folder::{Model, families, files, make, open, out, some_changes};

/// The folder of shared test data, if it exists.
fn shared() -> Option<PathBuf> {
    let dir = crate::shared::shared();
    if dir.is_dir() {
        return Some(dir);
    }
    println!("skipped: {} is not there", dir.display());
    None
}

#[test]
fn goldens_open_and_export_unchanged() {
    let Some(shared) = shared() else { return };
    let temp = tempfile::tempdir().unwrap();
    let names = ["olmoe", "mixtral", "qwen3_moe", "qwen3_moe_dense", "qwen2_moe"];
    for name in names {
        let model = open(&shared.join("goldens").join(name).join("model"));
        let stored: usize = model.checkpoint.tensors().map(|(_, tensor)| tensor.file_range.len()).sum();
        assert_eq!(model.table.total().bytes, stored, "{name}");
        assert_eq!(model.table.find_non_finite(), None, "{name}");

        let out = temp.path().join(name);
        export(&model.dir, &model.checkpoint, &model.table, &BTreeMap::new(), &out).unwrap();
        assert_eq!(files(&out), files(&model.dir), "{name}");
    }
}

#[test]
fn every_family_layout_dtype_and_sharding_round_trips() {
    for family in families() {
        let mut values: Option<Vec<Vec<f32>>> = None;
        for layout in [Layout::PerExpert, Layout::Fused] {
            for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
                for (shards, tie) in [(1, false), (3, true)] {
                    let temp = tempfile::tempdir().unwrap();
                    let spec = TinySpec { layout, dtype, shards, tie, ..family.clone() };
                    let model = make(&temp.path().join("in"), &spec);
                    let what = format!("{} {layout:?} {dtype:?} {shards}", family.model_type);
                    assert_eq!(model.checkpoint.shards().len(), shards, "{what}");
                    assert!(model.table.params.iter().all(|spec| spec.dtype() == dtype), "{what}");
                    assert_eq!(model.table.id(ParamKind::LmHead).is_none(), tie, "{what}");

                    // Layout and sharding change the position of a value in the files, not the value.
                    if dtype == Dtype::F32 && !tie {
                        let here = model.table.params.iter().map(|spec| spec.base.to_f32()).collect();
                        assert!(*values.get_or_insert_with(|| Vec::clone(&here)) == here, "{what}");
                    }

                    let unchanged = temp.path().join("unchanged");
                    export(&model.dir, &model.checkpoint, &model.table, &BTreeMap::new(), &unchanged).unwrap();
                    assert!(files(&unchanged) == files(&model.dir), "{what}");

                    let changed = some_changes(&model.table);
                    export(&model.dir, &model.checkpoint, &model.table, &changed, &out(&temp)).unwrap();
                    let written = open(&out(&temp));
                    assert_eq!(written.config, model.config, "{what}");
                    for (id, spec) in written.table.iter() {
                        let expected = changed.get(&id).unwrap_or(&model.table.params[id].base);
                        assert!(*spec.base.bytes == *expected.bytes, "{what}: {}", spec.name());
                    }
                }
            }
        }
    }
}

#[test]
fn a_fused_expert_consists_of_its_rows() {
    let temp = tempfile::tempdir().unwrap();
    let spec = TinySpec { layout: Layout::Fused, ..TinySpec::new("qwen3_moe") };
    let model = make(temp.path(), &spec);
    let (shard, info) = model.checkpoint.get("model.layers.1.mlp.experts.gate_up_proj").unwrap();
    let (e, f, d) = (5, spec.expert_width, spec.hidden_size);
    assert_eq!(info.shape, [spec.num_experts, 2 * f, d]);
    let whole = shard.value(info).unwrap().to_f32();
    let up = &model.table.params[model.table.id(ParamKind::Expert(1, e, Proj::Up)).unwrap()];
    assert_eq!(up.base.to_f32(), whole[(e * 2 * f + f) * d..(e + 1) * 2 * f * d]);
    assert_eq!(up.name(), "model.layers.1.mlp.experts.5.up_proj.weight");
}

#[test]
fn a_weight_that_is_not_finite_is_reported_by_name() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("in");
    let spec = TinySpec { layout: Layout::Fused, dtype: Dtype::F16, ..TinySpec::new("mixtral") };
    let model = make(&dir, &spec);
    model.table.check_finite().unwrap();
    let id = model.table.id(ParamKind::Expert(2, 3, Proj::Down)).unwrap();
    let old = &model.table.params[id].base;
    let mut values = old.to_f32();
    values[17] = f32::NEG_INFINITY;
    let bad = BTreeMap::from([(id, HostTensor::encode(old.dtype, old.shape.clone(), &values))]);
    export(&dir, &model.checkpoint, &model.table, &bad, &out(&temp)).unwrap();
    let error = open(&out(&temp)).table.check_finite().unwrap_err();
    assert_eq!((error.exit_code(), error.index), (exit::NOT_FINITE, 17));
    assert_eq!(error.tensor, "model.layers.2.block_sparse_moe.experts.3.down_proj.weight");
}

#[test]
fn export_refuses_a_folder_with_files_and_export_over_replaces_it() {
    let temp = tempfile::tempdir().unwrap();
    let model = make(&temp.path().join("in"), &TinySpec::new("olmoe"));
    let write = |over: bool, changed: &BTreeMap<ParamId, HostTensor>| {
        let export = if over { export_replacing } else { export };
        export(&model.dir, &model.checkpoint, &model.table, changed, &out(&temp))
    };
    fs::create_dir(out(&temp)).unwrap(); // an empty folder is accepted
    write(false, &BTreeMap::new()).unwrap();
    let first = files(&out(&temp));

    let error = write(false, &some_changes(&model.table)).unwrap_err();
    assert_eq!(error.exit_code(), exit::CANNOT_CREATE, "{error}");
    assert!(files(&out(&temp)) == first);

    write(true, &some_changes(&model.table)).unwrap();
    assert!(files(&out(&temp)) != first);
    let names: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "leftovers: {names:?}");
}

#[test]
fn leftovers_of_a_killed_export_are_removed() {
    let temp = tempfile::tempdir().unwrap();
    let model = make(&temp.path().join("in"), &TinySpec::new("olmoe"));
    let partial = temp.path().join(".out.partial");
    fs::create_dir(&partial).unwrap();
    fs::write(partial.join("stale.json"), "{}").unwrap();
    export(&model.dir, &model.checkpoint, &model.table, &BTreeMap::new(), &out(&temp)).unwrap();
    assert!(!partial.exists());
    assert!(files(&out(&temp)) == files(&model.dir));
}

#[test]
fn export_copies_templates_but_no_other_weights_or_hidden_files() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("in");
    make(&dir, &TinySpec::new("qwen2_moe"));
    let kept = ["chat_template.jinja", "merges.txt", "README.md", "additional_chat_templates/tools.jinja"];
    let left = ["pytorch_model.bin", "consolidated.safetensors", ".gitattributes", "pytorch_model.bin.index.json"];
    fs::create_dir(dir.join("additional_chat_templates")).unwrap();
    fs::create_dir(dir.join("original")).unwrap();
    for name in kept.iter().chain(&left).chain(&["original/params.json"]) {
        fs::write(dir.join(name), *name).unwrap();
    }
    let model = open(&dir);
    export(&dir, &model.checkpoint, &model.table, &BTreeMap::new(), &out(&temp)).unwrap();
    let names: Vec<_> = files(&out(&temp)).into_keys().map(|path| path.to_str().unwrap().to_owned()).collect();
    let mut expected = vec!["config.json", "model.safetensors", "tokenizer.json"];
    expected.extend(kept);
    expected.sort();
    assert_eq!(names, expected);
}

#[test]
fn a_cached_snapshot_is_found_and_exported_as_real_files() {
    let temp = tempfile::tempdir().unwrap();
    let (blobs, snapshot) =
        (temp.path().join("models--org--name/blobs"), temp.path().join("models--org--name/snapshots/0a"));
    fs::create_dir_all(&snapshot).unwrap();
    fs::create_dir(snapshot.join("../../refs")).unwrap();
    fs::write(snapshot.join("../../refs/main"), "0a").unwrap();
    make(&blobs, &TinySpec { shards: 2, ..TinySpec::new("qwen3_moe") });
    for name in files(&blobs).keys() {
        std::os::unix::fs::symlink(Path::new("../../blobs").join(name), snapshot.join(name)).unwrap();
    }
    let found = HubCache { root: temp.path().into() }.resolve("org/name").unwrap();
    let model = open(&found);
    export(&found, &model.checkpoint, &model.table, &BTreeMap::new(), &out(&temp)).unwrap();
    assert!(files(&out(&temp)) == files(&blobs));
    for name in files(&blobs).keys() {
        assert!(!out(&temp).join(name).is_symlink(), "{name:?}");
    }

    // A link to a file outside of the cache is not followed: the exported folder may be published.
    fs::write(temp.path().join("secret"), "s").unwrap();
    std::os::unix::fs::symlink(temp.path().join("secret"), snapshot.join("notes.txt")).unwrap();
    let error = export_replacing(&found, &model.checkpoint, &model.table, &BTreeMap::new(), &out(&temp)).unwrap_err();
    assert_eq!(error.exit_code(), exit::DATA, "{error}");
    assert!(files(&out(&temp)) == files(&blobs), "the folder before is untouched");
}

#[test]
fn a_second_copy_of_a_tied_embedding_is_updated_with_it() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("in");
    write_random_checkpoint(&dir, &TinySpec::new("olmoe")).unwrap();
    let tie = |dir: &Path| {
        let config = fs::read_to_string(dir.join("config.json")).unwrap();
        let tied = config.replace("\"tie_word_embeddings\": false", "\"tie_word_embeddings\": true");
        fs::write(dir.join("config.json"), tied).unwrap();
    };
    // A different head although the configuration says tied: transformers would not tie it.
    tie(&dir);
    let config = ModelConfig::from_dir(&dir).unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let error = ParamTable::build(&config, &checkpoint).err().unwrap();
    assert_eq!(error.exit_code(), exit::DATA, "{error}");
    assert!(error.to_string().contains("lm_head.weight"), "{error}");

    // The same values twice.
    let place = |name: &str| checkpoint.get(name).unwrap().1.file_range.clone();
    let mut bytes = fs::read(dir.join("model.safetensors")).unwrap();
    bytes.copy_within(place("model.embed_tokens.weight"), place("lm_head.weight").start);
    fs::write(dir.join("new"), bytes).unwrap();
    fs::rename(dir.join("new"), dir.join("model.safetensors")).unwrap();
    let model = open(&dir);
    let embedding = model.table.id(ParamKind::Embedding).unwrap();
    let shape = model.table.params[embedding].shape().to_vec();
    let value = HostTensor::from_f32(shape.clone(), &vec![0.5; shape.iter().product()]);
    export(&dir, &model.checkpoint, &model.table, &BTreeMap::from([(embedding, value)]), &out(&temp)).unwrap();
    let written = open(&out(&temp)); // refused if the copies differed
    assert_eq!(written.table.params[embedding].base.to_f32()[0], 0.5);
}

#[test]
fn all_families_are_covered_here() {
    let here: Vec<_> = families().into_iter().map(|spec| spec.model_type).collect();
    assert_eq!(here, FAMILIES.map(|family| family.model_type));
}

#[test]
fn an_index_names_files_by_paths_below_the_folder() {
    let temp = tempfile::tempdir().unwrap();
    let model = make(&temp.path().join("in"), &TinySpec { shards: 2, ..TinySpec::new("olmoe") });
    let names: Vec<String> = model.checkpoint.shards().iter().map(|shard| shard.file.clone()).collect();
    let index = model.dir.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).unwrap();
    let text = text.replace(&names[0], &format!("./{}", names[0])).replace(&names[1], &format!("sub/./{}", names[1]));
    fs::write(&index, text).unwrap();
    fs::create_dir(model.dir.join("sub")).unwrap();
    fs::rename(model.dir.join(&names[1]), model.dir.join("sub").join(&names[1])).unwrap();
    let moved = open(&model.dir);
    for (ours, theirs) in model.table.params.iter().zip(&moved.table.params) {
        assert!(ours.base.bytes[..] == theirs.base.bytes[..], "{}", ours.name());
    }
    export(&moved.dir, &moved.checkpoint, &moved.table, &some_changes(&moved.table), &out(&temp)).unwrap();
    open(&out(&temp));
}

/// Distributes the same tensors over files with these names, in another order.
fn reshard(model: &Model, dir: &Path, names: &[String], seed: u64) {
    fs::create_dir(dir).unwrap();
    fs::copy(model.dir.join("config.json"), dir.join("config.json")).unwrap();
    let mut files: Vec<Vec<_>> = vec![Vec::new(); names.len()];
    let mut weight_map = serde_json::Map::new();
    for (n, (shard, info)) in model.checkpoint.tensors().enumerate() {
        // A hash assigns the tensors to files and orders them, so that the seed determines both.
        let hash = blake3::hash(format!("{seed} {n}").as_bytes());
        let file = if n < names.len() { n } else { hash.as_bytes()[0] as usize % names.len() };
        files[file].push((*hash.as_bytes(), info.name.clone(), shard.value(info).unwrap()));
        weight_map.insert(info.name.clone(), names[file].clone().into());
    }
    for (name, mut tensors) in names.iter().zip(files) {
        tensors.sort_by_key(|(hash, ..)| *hash);
        let entries: Vec<_> = tensors.iter().map(|(_, name, t)| (name.clone(), t.dtype, t.shape.clone())).collect();
        let mut bytes = Vec::new();
        write_header(&mut bytes, &[("made".into(), format!("by a test, {seed}"))], &entries).unwrap();
        tensors.iter().for_each(|(.., value)| bytes.extend_from_slice(&value.bytes));
        fs::write(dir.join(name), bytes).unwrap();
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": weight_map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Parameters do not depend on how the tensors are distributed over files; an export changes only the given tensors,
    /// and the files keep their names and headers.
    #[test]
    fn sharding_names_and_order_change_no_parameter(
        names in prop::collection::hash_set("[a-z0-9_-]{1,12}\\.safetensors", 1..5),
        fused: bool,
        seed: u64,
    ) {
        let temp = tempfile::tempdir().unwrap();
        let layout = if fused { Layout::Fused } else { Layout::PerExpert };
        let original = make(&temp.path().join("in"), &TinySpec { layout, ..TinySpec::new("qwen2_moe") });
        let mut names: Vec<_> = names.into_iter().filter(|name| name != "model.safetensors").collect();
        names.sort();
        prop_assume!(!names.is_empty());
        reshard(&original, &temp.path().join("sharded"), &names, seed);
        let model = open(&temp.path().join("sharded"));
        for (id, spec) in model.table.iter() {
            prop_assert!(*spec.base.bytes == *original.table.params[id].base.bytes, "{}", spec.name());
        }

        let changed = some_changes(&model.table);
        export(&model.dir, &model.checkpoint, &model.table, &changed, &out(&temp)).unwrap();
        let written = open(&out(&temp));
        prop_assert_eq!(written.checkpoint.layout_hash(), model.checkpoint.layout_hash());
        for (id, spec) in written.table.iter() {
            let expected = changed.get(&id).unwrap_or(&model.table.params[id].base);
            prop_assert!(*spec.base.bytes == *expected.bytes, "{}", spec.name());
        }
    }
}

/// Runs in a separate process that the test below starts with a limit on the file size.
#[test]
#[ignore = "started by a_full_disk_leaves_no_partial_files"]
fn export_onto_a_disk_that_fills_up() {
    let from = PathBuf::from(std::env::var_os("MOEWARDEN_TEST_DIR").unwrap());
    let model = open(&from.join("in"));
    let error = export(&model.dir, &model.checkpoint, &model.table, &BTreeMap::new(), &from.join("out")).unwrap_err();
    assert_eq!(error.exit_code(), exit::IO, "{error}");
    assert!(error.to_string().contains(from.join("out/model.safetensors").to_str().unwrap()), "{error}");
    let error =
        save_delta(&model.checkpoint, &model.table, &some_changes(&model.table), &from.join("delta")).unwrap_err();
    assert_eq!(error.exit_code(), exit::IO, "{error}");
}

#[test]
fn a_full_disk_leaves_no_partial_files() {
    use std::os::unix::process::CommandExt;
    let temp = tempfile::tempdir().unwrap();
    make(&temp.path().join("in"), &TinySpec::new("olmoe"));
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "weights::export_onto_a_disk_that_fills_up", "--ignored", "--nocapture"]);
    child.env("MOEWARDEN_TEST_DIR", temp.path());
    // SAFETY: between fork and exec the child makes only these two async-signal-safe calls.
    unsafe {
        child.pre_exec(|| {
            // With SIGXFSZ ignored, a write beyond 64 KiB fails like a write to a full disk.
            let limit = libc::rlimit { rlim_cur: 1 << 16, rlim_max: 1 << 16 };
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            if libc::setrlimit(libc::RLIMIT_FSIZE, &limit) == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
    }
    let output = child.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(String::from_utf8_lossy(&output.stdout).contains("1 passed"), "the child ran no test");
    let names: Vec<_> = fs::read_dir(temp.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names, ["in"], "leftovers");
}
