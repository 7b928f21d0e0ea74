//! `ablate`: the same bytes for any number of ranks, what it writes, and what it refuses.

use std::fs;
use std::path::{Path, PathBuf};

use moewarden::exit;
use serde_json::{Value, json};

use crate::program::{Ran, model, moewarden, start, write_rows};

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    /// Rows with a safe and an unsafe prompt, benign rows, and a list of experts.
    fn new(rows: usize, experts: &str) -> Self {
        let scene = Self { dir: tempfile::tempdir().unwrap() };
        write_rows(&scene.path("rows.json"), rows);
        let benign = |i: usize| {
            json!({"label": "safe", "messages": [
                {"role": "user", "content": format!("Name {i} jars")},
                {"role": "assistant", "content": "One, two"},
            ]})
        };
        fs::write(scene.path("benign.json"), Value::Array((0..5).map(benign).collect()).to_string()).unwrap();
        fs::write(scene.path("experts"), experts).unwrap();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn run(&self, model: &Path, output: &str, more: &str) -> Ran {
        let short = if more.contains("--max-new-tokens") { "" } else { "--max-new-tokens 3" };
        let text = format!(
            "ablate --model-name {} --dataset-path {} --experts {} --output-dir {} --safe-response No. --batch-size 2 \
             --threads 1 --quiet {short} {more}",
            model.display(),
            self.path("rows.json").display(),
            self.path("experts").display(),
            self.path(output).display(),
        );
        start(moewarden(0, text.split_whitespace())).end()
    }

    fn bytes(&self, output: &str) -> Vec<u8> {
        fs::read(self.path(output).join("ablation.json")).unwrap()
    }
}

#[test]
fn any_number_of_ranks_gives_the_same_bytes() {
    let scene = Scene::new(5, "[[0,1],[2,3],[2,0]]");
    let benign = format!("--benign-dataset-path {}", scene.path("benign.json").display());
    for (case, more) in [
        ("olmoe", "--random-sets 3"),
        ("qwen3_moe", "--random-sets 2 --switch zero --match layer"),
        ("mixtral", "--random-sets 2 --match none"),
    ] {
        if case == "mixtral" {
            fs::write(scene.path("experts"), "0.1, 1.0").unwrap();
        }
        let outputs: Vec<Vec<u8>> = (1..=3)
            .map(|ranks| {
                let output = format!("{case}-{ranks}");
                scene.run(&model(case), &output, &format!("{benign} {more} --ranks {ranks}")).ok();
                scene.bytes(&output)
            })
            .collect();
        assert!(outputs[0] == outputs[1] && outputs[0] == outputs[2], "{case}");
        let report: Value = serde_json::from_slice(&outputs[0]).unwrap();
        assert_eq!(report["schema"], "moewarden.ablation/1");
        assert_eq!(report["rows"]["unsafe_rows"], 5);
        assert_eq!((&report["rows"]["benign"], &report["rows"]["safe"]), (&json!(5), &json!(5)));
        assert_eq!(report["untouched"]["exact_answers"]["rate"], 1.0, "{case}: an own answer is the greedy one");
        assert_eq!(report["untouched"]["gain"], 0.0);
        assert_ne!(report["selection"]["gain"], 0.0, "{case}");
        assert_eq!(report["random"].as_array().unwrap().len(), report["random_sets"].as_u64().unwrap() as usize);
        assert_eq!(report["verdict"], "cannot tell");
    }
}

#[test]
fn a_selection_of_an_earlier_run_is_judged_with_a_page() {
    let scene = Scene::new(4, "");
    let identify = format!(
        "identify --model-name {} --dataset-path {} --output-dir {} --top-k-experts 3 --threads 1 --quiet",
        model("olmoe").display(),
        scene.path("rows.json").display(),
        scene.path("found").display(),
    );
    start(moewarden(0, identify.split_whitespace())).end().ok();
    fs::copy(scene.path("found/expert_scores.json"), scene.path("experts")).unwrap();
    let ran = scene.run(&model("olmoe"), "out", "--random-sets 2").ok();
    assert!(ran.out.contains("verdict: cannot tell (only") && ran.out.contains("selection off"), "{}", ran.out);
    let [scores, report] = ["found/expert_scores.json", "out/ablation.json"]
        .map(|file| serde_json::from_slice::<Value>(&fs::read(scene.path(file)).unwrap()).unwrap());
    let mut selected: Vec<Value> = scores["rounds"]["1"]["selected"].as_array().unwrap().clone();
    selected.sort_by_key(|id| (id[0].as_u64(), id[1].as_u64()));
    assert_eq!(report["experts"], Value::Array(selected.clone()));
    let layers = |experts: &Value| experts.as_array().unwrap().iter().map(|id| id[0].clone()).collect::<Vec<_>>();
    for set in report["random"].as_array().unwrap() {
        assert_eq!(layers(&set["experts"]), layers(&report["experts"]), "matched by layer");
        assert!(set["experts"].as_array().unwrap().iter().all(|id| !selected.contains(id)), "disjoint");
    }
    let page = fs::read_to_string(scene.path("out/ablation.html")).unwrap();
    assert!(page.contains("Histogram of 2 random sets") && page.contains("Verdict: cannot tell."), "{page}");
    // The outputs count as moewarden's own.
    scene.run(&model("olmoe"), "out", "--random-sets 1").failed(exit::CANNOT_CREATE, &["not empty"]);
    scene.run(&model("olmoe"), "out", "--random-sets 1 --overwrite").ok();
}

#[test]
fn impossible_checks_are_refused() {
    let scene = Scene::new(2, "");
    let refused = |experts: &str, more: &str, code: u8, said: &str| {
        fs::write(scene.path("experts"), experts).unwrap();
        scene.run(&model("olmoe"), "never", more).failed(code, &[said]);
        assert!(!scene.path("never/ablation.json").exists());
    };
    refused("", "", exit::DATA, "lists no expert");
    refused("0.1, x", "", exit::DATA, "\"x\" is not layer.expert");
    refused("[[0,1],[0,8]]", "", exit::DATA, "expert 8 of layer 0, does not exist");
    refused("0.1, 1.2, 0.1", "", exit::DATA, "comes twice");
    refused("{}", "", exit::DATA, "experts");
    refused("0.1", "--random-sets 0", exit::USAGE, "at least 1");
    let rows = format!("--benign-dataset-path {}", scene.path("rows.json").display());
    refused("0.1", &rows, exit::DATA, "holds no benign row");
    fs::remove_file(scene.path("experts")).unwrap();
    scene.run(&model("olmoe"), "never", "").failed(exit::NO_INPUT, &["cannot be read"]);
    fs::write(scene.path("experts"), "0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6").unwrap();
    scene
        .run(&model("olmoe"), "never", "--random-sets 1")
        .failed(exit::CONFIG, &["1 are left, but each token needs 2", "experts: ", "--switch zero"]);
    let ran = scene.run(&model("olmoe"), "zero", "--random-sets 1 --switch zero").ok();
    // The layer has one expert outside the selection of 7.
    let warning = "the random sets hold 86 % of the selected experts in the mean";
    assert!(ran.err.contains(warning), "{}", ran.err);
    assert!(fs::read_to_string(scene.path("zero/ablation.html")).unwrap().contains(warning));
    fs::write(scene.path("experts"), r#"{"unsafe_experts": [[0, 1]]}"#).unwrap();
    scene.run(&model("olmoe"), "never", "").failed(exit::DATA, &["not the expert_scores.json of a run"]);
}

#[test]
fn unsafe_rows_alone_suffice() {
    let scene = Scene::new(3, "0.1 2.3\n2.0");
    let row = |i: usize| {
        json!({"label": "unsafe", "messages": [
            {"role": "user", "content": format!("Open pantry {i}")},
            {"role": "assistant", "content": "No."},
        ]})
    };
    fs::write(scene.path("rows.json"), Value::Array((0..3).map(row).collect()).to_string()).unwrap();
    scene.run(&model("olmoe"), "out", "--random-sets 2").ok();
    let report: Value = serde_json::from_slice(&scene.bytes("out")).unwrap();
    assert_eq!((&report["rows"]["unsafe_rows"], &report["rows"]["safe"]), (&json!(3), &json!(0)));
    assert_eq!(report["experts"], json!([[0, 1], [2, 0], [2, 3]]));
}

/// A run of `train` or `identify` with `--verify`.
fn verified(scene: &Scene, command: &str, output: &str, more: &str) -> Ran {
    let top = if more.contains("--top-k") { "" } else { "--top-k-experts 3" };
    let text = format!(
        "{command} --model-name {} --dataset-path {} --output-dir {} --safe-response No. --no-shuffle --batch-size 2 --threads 1 \
         {more} {top}",
        model("olmoe").display(),
        scene.path("rows.json").display(),
        scene.path(output).display(),
    );
    start(moewarden(0, text.split_whitespace())).end()
}

#[test]
fn verify_checks_the_first_selection_before_training() {
    let scene = Scene::new(4, "");
    let found = verified(&scene, "identify", "found", "--verify 2 --seed 5").ok();
    assert!(found.out.contains("causal check of the selection in the original model"), "{}", found.out);
    assert!(found.out.contains("of the total score"), "{}", found.out);
    fs::copy(scene.path("found/expert_scores.json"), scene.path("experts")).unwrap();
    scene.run(&model("olmoe"), "out", "--random-sets 2 --seed 5 --max-new-tokens 32").ok();
    let judged = scene.bytes("found");
    assert!(judged == scene.bytes("out"), "the same check as that of `ablate`");
    assert!(!found.err.contains("no more than random sets"), "two sets cannot say so: {}", found.err);
    verified(&scene, "identify", "short", "--verify 2 --seed 5 --max-new-tokens 3").ok();
    scene.run(&model("olmoe"), "three", "--random-sets 2 --seed 5 --max-new-tokens 3").ok();
    assert!(scene.bytes("short") == scene.bytes("three"), "answers of at most three tokens");

    let train = "--verify 2 --seed 5 --num-rounds 2 --expert-lr 1e-2 --skip-router-training --save-rounds none --quiet";
    for ranks in [1, 2] {
        let output = format!("trained-{ranks}");
        let batch = format!("{train} --ranks {ranks}");
        let ran = verified(&scene, "train", &output, &batch).ok();
        assert_eq!(ran.out.matches("causal check of the selection in the original model").count(), 2, "{}", ran.out);
        assert!(judged == scene.bytes(&output), "the original model is judged, on {ranks} ranks");
    }
    let retained = format!("{train} --retain-dataset-path {}", scene.path("benign.json").display());
    verified(&scene, "train", "retained", &retained).ok();
    let with_benign: Value = serde_json::from_slice(&scene.bytes("retained")).unwrap();
    assert_eq!(with_benign["rows"]["benign"], 5, "safe retain rows are the benign rows");
    assert!(with_benign["benign_dataset_path"].as_str().unwrap().ends_with("benign.json"));
    let plain = verified(&scene, "train", "plain", &train.replace("--verify 2", "")).ok();
    assert!(!plain.out.contains("causal check") && !scene.path("plain/ablation.json").exists());
    let weights = |output: &str| fs::read(scene.path(output).join("final_model/model.safetensors")).unwrap();
    assert!(weights("plain") == weights("trained-1"), "the check changes nothing");
    let scores = |output: &str| fs::read(scene.path(output).join("expert_scores.json")).unwrap();
    assert!(scores("plain") == scores("trained-1"));
}

#[test]
fn verify_says_where_it_cannot_check_or_has_no_effect() {
    let scene = Scene::new(2, "");
    let ran = verified(&scene, "identify", "all", "--verify 1 --top-k-experts 24").ok();
    assert!(
        ran.err.contains("the selection cannot be checked") && ran.err.contains("lower --top-k-experts"),
        "{}",
        ran.err
    );
    assert!(!scene.path("all/ablation.json").exists());
    verified(&scene, "train", "never", "--verify 1 --selection per-batch")
        .failed(exit::CONFIG, &["--verify", "each step"]);
}
