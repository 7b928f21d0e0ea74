//! Retain rows in the program: outputs, the cache of the base model's outputs, refused options, the report.

use std::fs;
use std::path::{Path, PathBuf};

use crate::golden_copy::golden_copy;
use crate::program::{Outputs, Ran, moewarden, start};
use moewarden::exit;
use serde_json::{Value, json};

/// Benign questions with answers, and an unsafe row, which is not used.
fn write_retain_rows(path: &Path) {
    let row = |i: usize| {
        let messages = json!([
            {"role": "user", "content": format!("How do I paint a gate {i} times?")},
            {"role": "assistant", "content": format!("Take a brush and {i} pots of paint.")},
        ]);
        json!({"messages": messages, "label": if i == 3 { "unsafe" } else { "safe" }})
    };
    fs::write(path, Value::Array((0..6).map(row).collect()).to_string()).unwrap();
}

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        write_retain_rows(&dir.path().join("retain.json"));
        Self { dir }
    }

    fn output(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, command: &str, output: &str, more: &str) -> Ran {
        let case = golden_copy("olmoe");
        let text = format!(
            "{command} --model-name {} --dataset-path {} --output-dir {} --batch-size 3 --threads 1 --no-shuffle \
             --top-k-experts 4 --num-rounds 2 --expert-lr 1e-3 {}",
            case.join("model").display(),
            case.join("data.json").display(),
            self.output(output).display(),
            more.replace("{RETAIN}", &self.output("retain.json").display().to_string()),
        );
        start(moewarden(0, text.split_whitespace())).end()
    }
}

fn metadata(run: &Outputs) -> Value {
    serde_json::from_slice(&run.files["training_metadata.json"]).unwrap()
}

/// The one folder of the cache of a run.
fn cache(run: &Path) -> PathBuf {
    let mut folders = fs::read_dir(run.join("retain_cache")).unwrap().map(|entry| entry.unwrap().path());
    let folder = folders.next().unwrap();
    assert!(folders.next().is_none());
    folder
}

#[test]
fn drift_is_measured_before_and_after_each_round() {
    let scene = Scene::new();
    let ran = scene.run("train", "out", "--skip-router-training --retain-dataset-path {RETAIN} --logging-steps 1").ok();
    for said in ["before, on 5 retain rows: KL from the original model 0.000000", "after round 2, on 5", "Retain Loss:"]
    {
        assert!(ran.out.contains(said), "{said:?} is not in {}", ran.out);
    }
    assert!(ran.err.contains("1 rows of") || ran.out.contains("1 rows of"), "{}\n{}", ran.out, ran.err);
    let run = Outputs::read(&scene.output("out"));
    let all = metadata(&run);
    assert_eq!(
        (&all["retain_weight"], &all["retain_loss"], &all["retention"]["rows"]),
        (&json!(1.0), &json!("kl"), &json!(5))
    );
    let drift = all["retention"]["drift"].as_array().unwrap();
    assert_eq!(drift.len(), 3);
    assert_eq!([&drift[0]["kl"], &drift[0]["top1_agreement"]], [&json!(0.0), &json!(1.0)]);
    assert!(drift[1]["kl"].as_f64().unwrap() > 0.0 && drift[2]["kl"].as_f64() > drift[0]["kl"].as_f64());
    assert_eq!(drift[2]["layers"].as_array().unwrap().len(), 3);
    let steps = run.metrics.iter().filter(|row| row["phase"] == "expert");
    for row in steps {
        let sum = row["ce_loss"].as_f64().unwrap() + row["retain_loss"].as_f64().unwrap();
        assert!((row["total_loss"].as_f64().unwrap() - sum).abs() < 1e-12, "{row}");
        assert!(row.get("retain_routing_loss").is_none(), "{row}");
    }

    let text = format!("report {} --output-dir {}", scene.output("out").display(), scene.output("report").display());
    let ran = start(moewarden(0, text.split_whitespace())).end().ok();
    assert!(ran.out.contains("Distance from the original model"), "{}", ran.out);
    let page = fs::read_to_string(scene.output("report").join("report.html")).unwrap();
    assert!(page.contains("Drift") && page.contains("routing of the retain rows after the last round"));
}

#[test]
fn without_weights_drift_is_only_measured() {
    let scene = Scene::new();
    let more = "--skip-router-training";
    scene.run("train", "plain", more).ok();
    let only = "--retain-dataset-path {RETAIN} --retain-weight 0";
    scene.run("train", "measured", &format!("{more} {only}")).ok();
    let [plain, measured] = ["plain", "measured"].map(|name| Outputs::read(&scene.output(name)));
    assert_eq!(plain.metrics, measured.metrics);
    let same = plain.weights.iter().all(|(name, value)| value.bytes[..] == measured.weights[name].bytes[..]);
    assert!(same, "measuring changes no weight");
    assert!(metadata(&plain).get("retention").is_none());
    assert_eq!(metadata(&measured)["retention"]["drift"].as_array().unwrap().len(), 3);
}

#[test]
fn the_base_models_outputs_are_made_once_and_again_if_damaged() {
    let scene = Scene::new();
    let more = "--skip-router-training --retain-dataset-path {RETAIN} --retain-routing-weight 1 --save-steps 1";
    scene.run("train", "out", more).ok();
    let whole = Outputs::read(&scene.output("out"));
    let file = cache(&scene.output("out")).join("base.safetensors");
    let written = || fs::metadata(&file).unwrap().modified().unwrap();
    let first = written();
    scene.run("train", "out", &format!("{more} --resume")).ok();
    assert_eq!(written(), first, "a resumed run reads them");

    let mut bytes = fs::read(&file).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&file, bytes).unwrap();
    let ran = scene.run("train", "out", &format!("{more} --resume")).ok();
    let said = format!("{}{}", ran.out, ran.err);
    assert!(said.contains("are made again") && said.contains("base.safetensors"), "{said}");
    Outputs::read(&scene.output("out")).assert_same(&whole, "after the cache was damaged");

    scene.run("train", "out", &format!("{more} --overwrite")).ok();
    assert!(file.is_file(), "--overwrite knows the folder of the cache");
}

#[test]
fn options_without_effect_and_rows_without_replies_are_refused() {
    let scene = Scene::new();
    for (more, said) in [
        ("--retain-weight 2", "--retain-weight would do nothing: only --retain-dataset-path uses it"),
        ("--retain-loss ce", "only --retain-dataset-path uses it"),
        ("--retain-routing-weight 1", "only --retain-dataset-path uses it"),
        ("--retain-dataset-path {RETAIN} --retain-weight 0 --retain-loss ce", "--retain-weight is 0"),
        ("--retain-dataset-path {RETAIN} --retain-weight -1", "must be finite and not negative"),
        (
            "--retain-dataset-path {RETAIN} --no-finetune-unsafe-experts --skip-router-training",
            "nothing is trained, so nothing drifts",
        ),
    ] {
        scene.run("check", "out", more).failed(exit::CONFIG, &[said]);
    }
    let only_unsafe = scene.output("unsafe.json");
    let row = json!([{"messages": [{"role": "user", "content": "Sing"}, {"role": "assistant", "content": "No."}], "label": "unsafe"}]);
    fs::write(&only_unsafe, row.to_string()).unwrap();
    let more = format!("--retain-dataset-path {}", only_unsafe.display());
    scene.run("check", "out", &more).failed(exit::DATA, &["unsafe.json", "no row with a safe reply"]);
    scene
        .run("train", "out", "--retain-dataset-path absent.json")
        .failed(exit::NO_INPUT, &["absent.json", "retain rows"]);
    let ran = scene.run("check", "out", "--retain-dataset-path {RETAIN}").ok();
    assert!(ran.out.contains("retain rows "), "the forecast of the time: {}", ran.out);
}

/// What `eval` measures of the final model is what the run measured after its last round.
#[test]
fn drift_in_an_evaluation_is_that_of_the_run() {
    let scene = Scene::new();
    let base = golden_copy("olmoe").join("model");
    let json_of = |name: &str| -> Value { serde_json::from_slice(&fs::read(scene.output(name)).unwrap()).unwrap() };
    scene.run("train", "out", "--skip-router-training --retain-dataset-path {RETAIN}").ok();
    let metadata = json_of("out/training_metadata.json");
    let wanted = metadata["retention"]["drift"].as_array().unwrap().last().unwrap().clone();
    let eval = |model: &Path, ranks: usize, output: &str, more: &str| {
        let [model, base] = [model, &base].map(|path| path.display().to_string());
        let text = format!(
            "eval --model-name {model} --drift-from {base} --dataset-path {} --output-dir {} --ranks {ranks} --threads 1 --precision f32 \
             --skip-answers --batch-size 2 {more}",
            scene.output("retain.json").display(),
            scene.output(output).display(),
        );
        start(moewarden(0, text.split_whitespace())).end()
    };
    let trained = scene.output("out/final_model");
    let ran = eval(&trained, 1, "drift", "").ok();
    let found = json_of("drift/eval.json")["drift"].clone();
    let [kl, same] = ["kl", "same_top_token"].map(|name| found[name].as_f64().unwrap());
    let [kl_of_run, same_of_run] = ["kl", "top1_agreement"].map(|name| wanted[name].as_f64().unwrap());
    assert!((kl / kl_of_run - 1.0).abs() < 1e-4 && same == same_of_run, "{found} {wanted}");
    assert!(ran.out.contains("Drift on the replies to safe prompts"), "{}", ran.out);
    eval(&trained, 2, "drift-2", "").ok();
    assert_eq!(json_of("drift-2/eval.json")["drift"], found, "the same on two ranks");
    let rows = fs::read_to_string(scene.output("drift/reply_losses.jsonl")).unwrap();
    let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let sum: f64 = rows.iter().filter_map(|row| Some(row["drift"].as_f64()? * row["tokens"].as_f64()?)).sum();
    assert!((sum / found["tokens"].as_f64().unwrap() - kl).abs() < 1e-12);
    // From itself it is nothing.
    eval(&base, 1, "itself", "").ok();
    let found = json_of("itself/eval.json")["drift"].clone();
    assert!(found["kl"].as_f64().unwrap().abs() < 1e-9 && found["same_top_token"] == 1.0, "{found}");
}
