//! Inputs that are well formed and of no use: templates that are too deep, and models that say nothing.

use std::fs;

use serde_json::json;

use super::{Outcome, Scene, row};

#[test]
fn a_chat_template_that_is_too_deep_is_refused() {
    for deep in [
        format!("{{{{ {}1 }}}}", "-".repeat(20_000)),
        format!("{{% if a %}}{}{{% endif %}}", "{%elif a%}".repeat(6000)),
    ] {
        let scene = Scene::new();
        fs::write(scene.model().join("chat_template.jinja"), deep).unwrap();
        scene.refuses(&[], 65, &["chat_template.jinja: the chat template does not compile: ", "more than"]);
    }
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(99999) %}{% for j in range(9) %}{% set ns.x = [ns.x] %}{% endfor %}\
                  {% endfor %}{{ ns.x }}";
    let cyclic = "{% set ns = namespace(x=1) %}{% set ns.x = [ns] %}{{ ns.x | string | length }}";
    for source in [nested, cyclic] {
        let scene = Scene::new();
        fs::write(scene.model().join("chat_template.jinja"), source).unwrap();
        scene.refuses(&[], 65, &["chat_template.jinja: the chat template was stopped: "]);
    }
}

#[test]
fn scores_that_are_all_equal_are_said_loudly() {
    let scene = Scene::new();
    let path = scene.model().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[header..].fill(0);
    fs::write(path, bytes).unwrap();
    let found = Outcome::of(scene.run("identify", &["-q"]));
    found.is(0, &["warning: all ", "scores are 0", "the selection of 2 experts is arbitrary"]);
}

#[test]
fn what_changes_answers_unsupported_is_refused_before_there_is_a_folder() {
    let scene = Scene::new();
    Outcome::of(scene.run("identify", &[])).is(0, &[]);
    fs::write(scene.model().join("generation_config.json"), r#"{"num_beams": 2}"#).unwrap();
    let run = |args: &[&str]| {
        let mut run = assert_cmd::Command::new(env!("CARGO_BIN_EXE_moewarden"));
        run.args(args).args(["--model-name", "model", "--dataset-path", "rows.jsonl", "--threads", "1"]);
        run.current_dir(scene.path("."));
        Outcome::of(run)
    };
    let says = ["model/generation_config.json: num_beams is `2`"];
    run(&["eval", "--output-dir", "answers"]).is(65, &says);
    run(&["ablate", "--output-dir", "answers", "--experts", "out/expert_scores.json"]).is(65, &says);
    assert!(!scene.path("answers").exists());
    // Nothing is generated.
    run(&["eval", "--output-dir", "losses", "--skip-answers"]).is(0, &[]);
    run(&["eval", "--output-dir", "losses", "--skip-answers", "--resume"]).is(0, &[]);
}

#[test]
fn a_selection_without_experts_is_said() {
    let scene = Scene::new();
    let safe = |request: &str| json!({"label": "safe", "prompt": request, "completion": "Mix flour and water."});
    scene.write_rows(&[row("hide a cake"), safe("bake a cake"), row("open the pantry"), safe("open a jar")]);
    let found = Outcome::of(scene.run("identify", &["--method", "routing", "--risk-threshold", "0.9999"]));
    found.is(0, &["only 0 of 2 experts qualify (--risk-threshold 0.9999)"]);
}

#[test]
fn an_evaluation_that_fails_leaves_no_empty_folder() {
    let scene = Scene::new();
    let path = scene.model().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(path, bytes).unwrap();
    let eval = || {
        let mut run = assert_cmd::Command::new(env!("CARGO_BIN_EXE_moewarden"));
        run.args(["eval", "--model-name", "model", "--dataset-path", "rows.jsonl", "--output-dir", "out"]);
        run.current_dir(scene.path("."));
        Outcome::of(run)
    };
    eval().is(80, &["the checkpoint model is damaged", "NaN"]);
    assert!(!scene.out().exists());
    fs::create_dir(scene.out()).unwrap();
    eval().is(80, &["NaN"]);
    assert!(scene.out().is_dir(), "a folder that was there stays");
}
