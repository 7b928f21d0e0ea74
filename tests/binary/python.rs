//! Python reads the outputs of runs. These tests are ignored by default, so that they do not count as passed where Python is
//! missing; `tests/all.sh` includes them where it is installed.

use crate::golden_copy::golden_copy as golden;
use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use moewarden::backend::Dtype;
use moewarden::config::RunConfig;
use moewarden::data::{ChatTokenizer, DataOptions, Dataset};
use moewarden::model::tiny::{Layout, TinySpec, write_random_checkpoint};
use moewarden::model::{Checkpoint, ModelConfig, ParamKind, ParamTable};
use serde_json::{Value, json};

/// The interpreter `MOEWARDEN_PYTHON`, or `python3`, with these arguments.
fn python(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Output {
    let python = std::env::var_os("MOEWARDEN_PYTHON").unwrap_or("python3".into());
    Command::new(&python).args(args).output().unwrap_or_else(|e| panic!("{}: {e}", python.display()))
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(name)
}

/// A short `train` on a model, with the output folder `out` below `folder`.
fn train(folder: &Path, model: &Path, data: &Path) {
    let options = "--num-rounds 2 --top-k-experts 4 --expert-lr 1e-2 --router-lr 1e-3 --save-rounds none";
    moewarden(folder, "train", "out", model, data, options);
}

fn moewarden(folder: &Path, command: &str, out: &str, model: &Path, data: &Path, options: &str) {
    let [model, data] = [model, data].map(|path| path.to_str().unwrap());
    let output = Command::new(env!("CARGO_BIN_EXE_moewarden"))
        .current_dir(folder)
        .args([command, "--model-name", model, "--dataset-path", data, "--output-dir", out])
        .args(options.split(' '))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[track_caller]
fn passes(output: &Output) {
    let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned());
    assert!(output.status.success(), "{}\n{}", said[0], said[1]);
}

#[test]
#[ignore = "skipped: needs python3"]
fn python_reads_the_pickle() {
    let temp = tempfile::tempdir().unwrap();
    train(temp.path(), &golden("olmoe").join("model"), &golden("olmoe").join("data.json"));
    let [pickle, scores] =
        ["expert_gradients.pkl", "expert_scores.json"].map(|name| temp.path().join("out").join(name));
    let check = |pickle: &Path| python([script("check_pickle.py").as_path(), pickle, &scores]);
    passes(&check(&pickle));

    // The check can fail: flip the last bit of the last gradient, which is followed by SETITEMS three times and STOP.
    let mut bytes = fs::read(&pickle).unwrap();
    let last = bytes.len() - 5;
    bytes[last] ^= 1;
    let spoiled = temp.path().join("spoiled.pkl");
    fs::write(&spoiled, bytes).unwrap();
    let said = check(&spoiled);
    assert!(!said.status.success() && String::from_utf8_lossy(&said.stderr).contains("is not its score"), "{said:?}");
}

/// Models of each family as written by transformers in both layouts, and random ones in the other layout and in bf16. In CI,
/// to save time, only one fused and one in bf16.
fn models(folder: &Path) -> Vec<(PathBuf, PathBuf)> {
    let mut models: Vec<_> = ["olmoe", "mixtral", "qwen3_moe", "qwen2_moe", "olmoe_fused", "qwen2_fused"]
        .map(|case| (golden(case).join("model"), golden(case).join("data.json")))
        .into();
    let mut own = vec![
        ("qwen3_moe", Layout::Fused),
        ("qwen2_moe", Layout::Fused),
        ("olmoe", Layout::PerExpert),
        ("mixtral", Layout::PerExpert),
    ];
    if std::env::var_os("CI").is_some() {
        models.truncate(5);
        own.truncate(1);
    }
    for (family, layout) in own {
        let dir = folder.join(format!("{family}_bf16"));
        let spec = TinySpec { dtype: Dtype::Bf16, layout, ..TinySpec::new(family) };
        write_random_checkpoint(&dir, &spec).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            // Some families have the template in tokenizer_config.json.
            _ = fs::copy(golden(family).join("model").join(name), dir.join(name));
        }
        models.push((dir, golden(family).join("data.json")));
    }
    models
}

/// The expected values for check_export.py: the loss of each row alone, and the trained tensors.
fn expectation(folder: &Path, model: &Path, data: &Path) -> Value {
    let export = folder.join("out/final_model");
    moewarden(
        folder,
        "identify",
        "each",
        &export,
        data,
        "--batch-size 1 --no-shuffle --top-k-experts 1 --precision f32",
    );
    let read = |path: &str| -> Value { serde_json::from_slice(&fs::read(folder.join(path)).unwrap()).unwrap() };
    let losses = read("each/expert_scores.json")["rounds"]["1"]["losses"].clone();

    let run = RunConfig::default();
    let options = DataOptions {
        max_samples: run.max_samples,
        max_length: run.max_length,
        long_rows: run.long_rows,
        loss_on: run.loss_on,
        keep_failed: run.keep_failed,
        safe_response: run.safe_response,
        ..DataOptions::default()
    };
    let tokenizer = ChatTokenizer::open(model, None).unwrap();
    let records = Dataset::read(data, &tokenizer, &options).unwrap().records;
    let examples: Vec<_> = records.into_iter().filter_map(|record| record.unsafe_reply).collect();
    assert_eq!(losses.as_array().unwrap().len(), examples.len());
    let rows = examples.iter().zip(losses.as_array().unwrap()).filter_map(|(example, ce)| {
        let n = example.loss.iter().filter(|loss| **loss).count();
        let at_the_end = example.loss.iter().rev().take(n).all(|loss| *loss);
        at_the_end.then(|| json!({"ids": example.ids, "loss": n, "ce": ce}))
    });
    let rows: Vec<_> = rows.collect();
    assert!(rows.len() > 2, "too few rows end with their reply");

    let scores = read("out/expert_scores.json");
    let rounds = scores["rounds"].as_object().unwrap().values();
    let selected: BTreeSet<_> = rounds.flat_map(|r| r["selected"].as_array().unwrap()).map(Value::to_string).collect();
    let config = ModelConfig::from_dir(model).unwrap();
    let table = ParamTable::build(&config, &Checkpoint::open(model).unwrap()).unwrap();
    let trained = table.params.iter().filter(|spec| match spec.kind {
        ParamKind::Expert(layer, expert, _) => selected.contains(&json!([layer, expert]).to_string()),
        ParamKind::Router(_) => true,
        _ => false,
    });
    let changed: BTreeSet<_> = trained.map(|spec| spec.tensor.clone()).collect();
    json!({"rows": rows, "changed": changed})
}

#[test]
#[ignore = "skipped: needs python3 with torch, transformers and safetensors"]
fn transformers_loads_what_was_exported() {
    let temp = tempfile::tempdir().unwrap();
    for (i, (model, data)) in models(temp.path()).into_iter().enumerate() {
        let folder = temp.path().join(i.to_string());
        fs::create_dir(&folder).unwrap();
        train(&folder, &model, &data);
        let rows = folder.join("rows.json");
        fs::write(&rows, expectation(&folder, &model, &data).to_string()).unwrap();
        let check = script("check_export.py");
        let export = folder.join("out/final_model");
        println!("{}", model.display());
        passes(&python([&check, &model, &export, &rows]));
        if i == 0 {
            // The check can fail: the source in place of the trained model.
            let said = python([&check, &model, &model, &rows]);
            assert!(String::from_utf8_lossy(&said.stderr).contains("kept its bits but was trained"), "{said:?}");
        }
    }
}

/// The code of docs/python.md, as one script, on a run and an evaluation as the page has them.
#[test]
#[ignore = "skipped: needs python3 with pandas, peft, torch, transformers and safetensors"]
fn the_snippets_of_the_documentation_run() {
    let page = include_str!("../../docs/python.md");
    let snippets: Vec<&str> = page.split("```python\n").skip(1).map(|rest| rest.split("```").next().unwrap()).collect();
    assert!(snippets.len() >= 7, "{} snippets", snippets.len());
    let temp = tempfile::tempdir().unwrap();
    let (model, data) = (golden("olmoe").join("model"), golden("olmoe").join("data.json"));
    let options = "--num-rounds 2 --top-k-experts 4 --save-rounds delta";
    moewarden(temp.path(), "train", "runs/olmoe", &model, &data, options);
    moewarden(temp.path(), "eval", "runs/base-eval", &model, &data, "--max-new-tokens 4");
    let script = temp.path().join("snippets.py");
    fs::write(&script, format!("import os\nos.chdir(os.path.dirname(__file__))\n{}", snippets.join("\n"))).unwrap();
    let ran = python([&script]);
    passes(&ran);
    let out = String::from_utf8_lossy(&ran.stdout);
    for part in ["model.layers.", "trainable params", "unsafe"] {
        assert!(out.contains(part), "{part:?} is not in {out}");
    }
}

/// The event files of a run that was stopped and resumed: TensorBoard drops the steps that were repeated.
#[test]
#[ignore = "skipped: needs python3 with tensorboard"]
fn tensorboard_reads_the_steps() {
    let temp = tempfile::tempdir().unwrap();
    let (model, data) = (golden("olmoe").join("model"), golden("olmoe").join("data.json"));
    let options = "--num-rounds 2 --top-k-experts 4 --save-rounds none --batch-size 2 --save-steps 2 --log tensorboard";
    let stopped = Command::new(env!("CARGO_BIN_EXE_moewarden"))
        .current_dir(temp.path())
        .env("MOEWARDEN_FAULT", "rank=0,at=step:5,do=kill")
        .args(["train", "--model-name", model.to_str().unwrap(), "--dataset-path", data.to_str().unwrap()])
        .args(["--output-dir", "out"])
        .args(options.split(' '))
        .output()
        .unwrap();
    assert!(!stopped.status.success(), "{stopped:?}");
    moewarden(temp.path(), "train", "out", &model, &data, &format!("{options} --resume"));
    let out = temp.path().join("out");
    assert_eq!(fs::read_dir(out.join("tensorboard")).unwrap().count(), 2);
    passes(&python([script("check_events.py"), out.join("tensorboard"), out.join("metrics.jsonl")]));
    // Damaged since, they are written again; the reader stops at a torn record.
    let files = || {
        let mut files: Vec<_> = fs::read_dir(out.join("tensorboard")).unwrap().map(|e| e.unwrap().path()).collect();
        files.sort();
        files
    };
    let whole = fs::read(&files()[1]).unwrap();
    fs::write(&files()[1], &whole[..whole.len() - 5]).unwrap();
    moewarden(temp.path(), "train", "out", &model, &data, &format!("{options} --resume"));
    assert_eq!(files().len(), 1);
    passes(&python([script("check_events.py"), out.join("tensorboard"), out.join("metrics.jsonl")]));
    moewarden(temp.path(), "train", "out", &model, &data, &format!("{options} --overwrite"));
}

/// What `--download` leaves is what `huggingface_hub` would have left.
#[test]
#[ignore = "skipped: needs python3 with huggingface_hub"]
fn huggingface_hub_reads_the_cache() {
    let scene = crate::download::Scene::new();
    scene.download();
    let cache = scene.cache();
    let read = format!(
        "from huggingface_hub import scan_cache_dir, snapshot_download\n\
         import sys\n\
         folder = snapshot_download({:?}, cache_dir=sys.argv[1], local_files_only=True)\n\
         assert open(folder + '/config.json').read()\n\
         (repo,) = scan_cache_dir(sys.argv[1]).repos\n\
         (revision,) = repo.revisions\n\
         assert revision.refs == {{'main'}} and len(revision.files) == 6, revision\n\
         assert not scan_cache_dir(sys.argv[1]).warnings\n",
        crate::download::hub::ID
    );
    passes(&python([OsStr::new("-c"), read.as_ref(), cache.as_os_str()]));
}
