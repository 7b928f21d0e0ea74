//! `--init random`: random weights for a model folder that has only config.json and a tokenizer.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use crate::program::{self, Ran, moewarden, start, write_rows};
use moewarden::backend::cpu::Cpu;
use moewarden::backend::{Backend, Dtype};
use moewarden::exit::{self, Coded};
use moewarden::model::{Checkpoint, FAMILIES, Group, Model, ModelConfig, ParamTable, RandomInit};
use serde_json::{Value, json};

/// f64 sums in different orders.
const SAME_SCORES: f64 = 1e-12;

/// A copy of a case's model without its weights, with these members of config.json changed (null: removed).
fn shape_of(case: &str, to: &Path, changes: &Value) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(program::model(case)).unwrap().map(Result::unwrap) {
        if !entry.file_name().to_string_lossy().contains("safetensors") {
            fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
    let mut config: Value = serde_json::from_slice(&fs::read(to.join("config.json")).unwrap()).unwrap();
    for (key, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(config.as_object_mut().unwrap().remove(key)),
            value => config[key] = value.clone(),
        }
    }
    fs::write(to.join("config.json"), config.to_string()).unwrap();
}

// --- tables ------------------------------------------------------------------------------------------------------

#[test]
fn config_json_alone_gives_the_names_shapes_and_dtypes_of_the_checkpoint() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut named = BTreeSet::new();
    let mut fused = 0;
    for case in fs::read_dir(cases).unwrap().map(|entry| entry.unwrap().path()) {
        let dir = case.join("model");
        if !dir.is_dir() {
            continue;
        }
        let config = ModelConfig::from_dir(&dir).unwrap();
        let stored = ParamTable::build(&config, &Checkpoint::open(&dir).unwrap()).unwrap();
        let random = ParamTable::random(&config, RandomInit::from_dir(&dir, 1).unwrap());
        let what = case.display();
        assert_eq!(stored.params.len(), random.params.len(), "{what}");
        let is_fused = stored.params.iter().any(|spec| spec.tensor.ends_with("experts.gate_up_proj"));
        for (theirs, ours) in stored.params.iter().zip(&random.params) {
            assert_eq!(ours.kind, theirs.kind, "{what}");
            assert_eq!(ours.shape(), theirs.shape(), "{what}: {:?}", ours.kind);
            assert_eq!(ours.dtype(), theirs.dtype(), "{what}: {:?}", ours.kind);
            assert_eq!(ours.byte_range.len(), theirs.byte_range.len(), "{what}: {:?}", ours.kind);
            // Random weights have the tensor names of the published, unfused checkpoints.
            if !is_fused {
                assert_eq!((ours.name(), &ours.tensor), (theirs.name(), &theirs.tensor), "{what}");
            }
        }
        match is_fused {
            true => fused += 1,
            false => _ = named.insert(config.model_type),
        }
    }
    assert!(FAMILIES.iter().all(|family| named.contains(family.model_type)), "names of {named:?} alone were compared");
    assert!(fused > 0, "no case has the fused layout");
}

#[test]
fn the_dtype_and_the_size_of_weights_come_from_config_json() {
    let temp = tempfile::tempdir().unwrap();
    let init = |changes: Value| {
        shape_of("olmoe", temp.path(), &changes);
        RandomInit::from_dir(temp.path(), 7)
    };
    let of = |changes| init(changes).unwrap();
    assert_eq!(of(json!({})), RandomInit { seed: 7, std: 0.15, dtype: Dtype::F32 });
    assert_eq!(
        of(json!({"dtype": null, "initializer_range": null})),
        RandomInit { seed: 7, std: 0.02, dtype: Dtype::Bf16 }
    );
    assert_eq!(of(json!({"dtype": null, "torch_dtype": "float16"})).dtype, Dtype::F16);
    assert_eq!(of(json!({"dtype": "torch.bfloat16", "torch_dtype": "float16"})).dtype, Dtype::Bf16);
    for (changes, code, key) in [
        (json!({"dtype": "float8_e4m3fn"}), exit::CONFIG, "dtype: `float8_e4m3fn`"),
        (json!({"dtype": null, "torch_dtype": 16}), exit::DATA, "torch_dtype"),
        (json!({"initializer_range": 0}), exit::DATA, "initializer_range"),
        (json!({"initializer_range": 1e5}), exit::DATA, "initializer_range"),
    ] {
        let error = init(changes).unwrap_err();
        assert_eq!(error.exit_code(), code, "{error}");
        assert!(error.to_string().contains(key), "{error} does not name {key}");
    }
}

#[test]
fn published_models_have_the_known_number_of_parameters() {
    let known = [
        // allenai/OLMoE-1B-7B-0125-Instruct
        (json!({"model_type": "olmoe", "intermediate_size": 1024}), 6_919_161_856),
        // mistralai/Mixtral-8x7B-Instruct-v0.1
        (json!({"model_type": "mixtral"}), 46_702_792_704),
        // Qwen/Qwen3-30B-A3B
        (json!({"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128}), 30_532_122_624),
    ];
    let temp = tempfile::tempdir().unwrap();
    for (config, parameters) in known {
        fs::write(temp.path().join("config.json"), config.to_string()).unwrap();
        let shape = ModelConfig::from_dir(temp.path()).unwrap();
        let table = ParamTable::random(&shape, RandomInit::from_dir(temp.path(), 1).unwrap());
        let total = table.total();
        assert_eq!((total.elements, total.bytes), (parameters, 2 * parameters), "{config}");
    }
}

// --- values ------------------------------------------------------------------------------------------------------

/// A model with random weights on a CPU backend with `threads` threads.
fn model(case: &str, seed: u64, threads: usize) -> Model<Cpu> {
    let dir = program::model(case);
    let config = ModelConfig::from_dir(&dir).unwrap();
    let table = ParamTable::random(&config, RandomInit::from_dir(&dir, seed).unwrap());
    Model::new(Arc::new(Cpu::new(threads)), config, table)
}

#[test]
fn norms_are_ones_biases_zeros_and_matrices_random() {
    for case in ["qwen2_moe", "qwen3_yarn", "olmoe_bf16"] {
        let [one, again, other] = [(1, 1), (1, 3), (2, 1)].map(|(seed, threads)| model(case, seed, threads));
        let mut matrices = BTreeSet::new();
        for (id, spec) in one.table.iter() {
            let name = spec.name();
            let [value, again, other] = [&one, &again, &other].map(|model| model.weight_host(id));
            assert_eq!((value.dtype, &*value.shape), (spec.dtype(), spec.shape()), "{name}");
            assert!(value.bytes[..] == again.bytes[..], "{case} {name}: another number of threads, other bits");
            let values = value.to_f32();
            if spec.kind.group() == Group::Norm {
                assert!(values.iter().all(|x| *x == 1.0), "{case} {name}");
            } else if name.ends_with(".bias") {
                assert!(values.iter().all(|x| *x == 0.0), "{case} {name}");
            } else {
                assert!(value.bytes[..] != other.bytes[..], "{case} {name}: another seed, the same bits");
                assert!(matrices.insert(value.bytes.to_vec()), "{case} {name}: the bits of another matrix");
            }
        }
        assert!(matrices.len() > 8 * 3, "{case}");
    }
}

#[test]
fn random_values_have_the_given_mean_and_standard_deviation() {
    let b = Cpu::new(2);
    let n = 300_007; // more than one chunk
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        let values = b.weight_host(&b.random_weight(dtype, vec![n], 3, 0.02)).to_f32();
        let mean = values.iter().map(|x| f64::from(*x)).sum::<f64>() / n as f64;
        let deviation = (values.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / n as f64).sqrt();
        // Five standard errors of each: 0.02 / sqrt(n), and of a uniform's deviation 0.02 · sqrt(0.2 / n).
        assert!(mean.abs() < 2e-4, "{dtype:?}: mean {mean}");
        assert!((deviation - 0.02).abs() < 9e-5, "{dtype:?}: standard deviation {deviation}");
        let neighbours = values.windows(2).map(|w| f64::from(w[0]) * f64::from(w[1])).sum::<f64>() / n as f64;
        assert!(neighbours.abs() < 5.0 * 4e-4 / (n as f64).sqrt(), "{dtype:?}: neighbours go together: {neighbours}");
    }
}

#[test]
#[should_panic(expected = "exist only on the device")]
fn absent_values_cannot_be_taken_for_zeros() {
    model("olmoe", 1, 1).table.params[0].base.to_f32();
}

// --- commands ----------------------------------------------------------------------------------------------------

/// A folder with a config.json, a tokenizer and rows.
struct Scene(tempfile::TempDir);

impl Scene {
    fn new() -> Self {
        let scene = Self(tempfile::tempdir().unwrap());
        shape_of("olmoe", &scene.path("model"), &json!({}));
        write_rows(&scene.path("rows.json"), 9);
        scene
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn run(&self, command: &str, output: &str, more: &str) -> Ran {
        let text = format!(
            "{command} --model-name {} --dataset-path {} --output-dir {} --batch-size 2 --top-k-experts 4 --threads 1 \
             --no-shuffle {more}",
            self.path("model").display(),
            self.path("rows.json").display(),
            self.path(output).display(),
        );
        start(moewarden(0, text.split_whitespace())).end()
    }

    /// The first round of expert_scores.json.
    fn scores(&self, output: &str) -> Value {
        let text = fs::read(self.path(output).join("expert_scores.json")).unwrap();
        serde_json::from_slice::<Value>(&text).unwrap()["rounds"]["1"].clone()
    }
}

/// All numbers of a nested list.
fn numbers(value: &Value) -> Vec<f64> {
    match value {
        Value::Array(values) => values.iter().flat_map(numbers).collect(),
        value => vec![value.as_f64().unwrap()],
    }
}

#[test]
fn scores_of_identify_depend_on_the_seed_but_not_on_the_number_of_ranks() {
    let scene = Scene::new();
    let identify = |output: &str, more: &str| {
        let ran = scene.run("identify", output, &format!("--init random {more}")).ok();
        assert!(ran.out.contains("weights: random F32 of seed"), "{}", ran.out);
        scene.scores(output)
    };
    let one = identify("one", "");
    assert_eq!(one, identify("again", ""));
    let losses = numbers(&one["losses"]);
    assert_eq!(losses.len(), 5);
    // ln 320 of a uniform guess, plus a little for the random weights.
    assert!(losses.iter().all(|loss| (loss - 320f64.ln()).abs() < 1.0), "{losses:?}");

    let two = identify("two", "--ranks 2");
    assert_eq!(two["selected"], one["selected"]);
    for part in ["scores", "losses"] {
        let (one, two) = (numbers(&one[part]), numbers(&two[part]));
        assert_eq!(one.len(), two.len());
        let far = one.iter().zip(&two).find(|(a, b)| (*a - *b).abs() > SAME_SCORES * a.abs());
        assert_eq!(far, None, "{part}");
    }

    let other = identify("other", "--seed 43");
    let pairs = numbers(&one["scores"]).into_iter().zip(numbers(&other["scores"]));
    assert!(
        pairs.into_iter().filter(|(a, b)| *a > 0.0 && *b > 0.0).all(|(a, b)| a != b),
        "--no-shuffle: only the weights differ"
    );
}

#[test]
fn train_reports_metrics_and_writes_no_model() {
    let scene = Scene::new();
    let options = "--init random --num-rounds 2 --expert-lr 1e-2 --router-lr 1e-3";
    let check = scene.run("check", "out", options).ok();
    assert!(check.out.contains("random: each rank makes its own"), "{}", check.out);
    for (output, ranks) in [("one", 1), ("two", 2)] {
        let ran = scene.run("train", output, &format!("{options} --ranks {ranks}")).ok();
        assert_eq!(ran.out.matches("no model is written").count(), 1, "{}", ran.out);
        assert!(!ran.out.contains("final model:"), "{}", ran.out);
        let mut left: Vec<_> = fs::read_dir(scene.path(output)).unwrap().map(|e| e.unwrap().file_name()).collect();
        left.sort();
        let known = [
            "config.resolved.yaml",
            "expert_gradients.pkl",
            "expert_scores.json",
            "metrics.jsonl",
            "rankings.json",
            "training_metadata.json",
        ];
        assert_eq!(left, known, "{ranks} ranks");
    }
    let metadata: Value = serde_json::from_slice(&fs::read(scene.path("one/training_metadata.json")).unwrap()).unwrap();
    let losses = numbers(&metadata["ce_loss"]);
    assert!(losses[1] < losses[0], "the weights are trained: {losses:?}");
    let again = scene.run(
        "train",
        "one",
        &format!("--config {} --overwrite", scene.path("one/config.resolved.yaml").display()),
    );
    assert!(again.ok().out.contains("no model is written"), "config.resolved.yaml keeps --init");
}

#[test]
fn a_signal_ends_a_run_without_checkpoints() {
    let scene = Scene::new();
    let text = format!(
        "train --init random --model-name {} --dataset-path {} --output-dir {} --batch-size 1 --top-k-experts 4 --threads 1 \
         --epochs-per-round 2000",
        scene.path("model").display(),
        scene.path("rows.json").display(),
        scene.path("out").display(),
    );
    let mut running = start(moewarden(0, text.split_whitespace()));
    let begun = || fs::metadata(scene.path("out/metrics.jsonl")).is_ok_and(|file| file.len() > 0);
    assert!(running.wait_for(begun));
    running.signal(libc::SIGTERM);
    running.end().failed(exit::TERMINATED, &["nothing of random weights is saved"]);
    assert!(!scene.path("out/checkpoints").exists());
}

#[test]
fn options_that_need_real_weights_are_refused() {
    let scene = Scene::new();
    let random = |more: &str| scene.run("train", "out", &format!("--init random {more}"));
    random("--resume").failed(exit::CONFIG, &["--resume", "--init random"]);
    random("--save-rounds delta").failed(exit::CONFIG, &["--save-rounds would do nothing", "--init random"]);
    random("--save-steps 10").failed(exit::CONFIG, &["--save-steps would do nothing"]);
    random("--keep-checkpoints 9").failed(exit::CONFIG, &["--keep-checkpoints would do nothing"]);
    // Options that turn saving off are accepted.
    random("--num-rounds 1 --save-rounds none --save-steps 0").ok();

    // Missing weights without --init random; a missing tokenizer with it.
    scene.run("train", "other", "").failed(exit::NO_INPUT, &["model.safetensors", "--init random"]);
    fs::remove_file(scene.path("model/tokenizer.json")).unwrap();
    scene.run("identify", "other", "--init random").failed(exit::NO_INPUT, &["tokenizer.json"]);
    assert!(!scene.path("other").exists());
}

/// `check`, `identify` and `train` refuse a model far beyond the memory before anything is allocated, on all ranks.
#[test]
fn far_more_memory_than_there_is_needs_force() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("rows.json");
    write_rows(&data, 2);
    let model = dir.path().join("model");
    shape_of("olmoe", &model, &json!({"hidden_size": 1 << 14, "intermediate_size": 1 << 18, "num_experts": 64}));
    for command in ["check", "identify", "train", "identify --ranks 2"] {
        let text = format!(
            "{command} --model-name {} --dataset-path {} --output-dir {} --init random --top-k-experts 3 --threads 1",
            model.display(),
            data.display(),
            dir.path().join("out").display(),
        );
        let ran = start(moewarden(0, text.split_whitespace())).end();
        ran.failed(exit::LAUNCHER, &["a rank needs ", "TB of memory", "--force starts"]);
    }
}
