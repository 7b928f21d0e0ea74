//! `--routing-replies`: the model's own replies, kept in the output folder, and routing traces.

use std::fs;
use std::path::Path;

use moewarden::exit;
use serde_json::{Value, json};

use crate::program::{self, Ran, moewarden, start, write_rows};

/// Unsafe and safe chat rows in turn; the safe ones have no reply, so that any own reply to them counts.
fn write_chats(path: &Path, rows: usize) {
    let row = |i: usize| {
        let label = if i.is_multiple_of(2) { "unsafe" } else { "safe" };
        json!({"label": label, "messages": [{"role": "user", "content": format!("Sing of the jar{} {i}", "s".repeat(i % 4))}]})
    };
    fs::write(path, Value::Array((0..rows).map(row).collect()).to_string()).unwrap();
}

fn run(command: &str, dir: &Path, folder: &str, more: &str) -> Ran {
    let data = dir.join("rows.json");
    if !data.exists() {
        write_chats(&data, 9);
    }
    let text = format!(
        "{command} --model-name {} --dataset-path {} --output-dir {} --batch-size 2 --top-k-experts 3 --method routing \
         --risk-threshold -1 --threads 1 {}",
        program::model("olmoe").display(),
        data.display(),
        dir.join(folder).display(),
        more.replace("{DIR}", &dir.display().to_string()),
    );
    start(moewarden(0, text.split_whitespace())).end()
}

fn scores(dir: &Path, folder: &str) -> Value {
    serde_json::from_slice(&fs::read(dir.join(folder).join("expert_scores.json")).unwrap()).unwrap()
}

const OWN: &str = "--routing-replies own --max-new-tokens 6";

#[test]
fn own_replies_are_kept_and_counted() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let ran = run("identify", dir, "one", OWN).ok();
    assert!(ran.out.contains("own replies: 5 of 5 to unsafe prompts comply"), "{}", ran.out);
    let one = scores(dir, "one");
    assert_eq!(one["rounds"]["1"]["own_replies"]["unsafe_complied"], 5);
    let file = |folder: &str| fs::read_to_string(dir.join(folder).join("own_replies.jsonl")).unwrap();
    assert_eq!(file("one").lines().count(), 9);
    let memory = ran.out.lines().find(|line| line.contains("memory a rank")).expect("a forecast");
    assert!(memory.contains("for own replies, of which"), "{memory}");
    assert!(ran.out.contains("own replies: 1 batch of up to 9, key/value cache"), "{}", ran.out);
    assert!(ran.out.contains("own replies of rank 0: prompts ") && ran.out.contains("tokens/s"), "{}", ran.out);

    run("identify", dir, "small", &format!("{OWN} --generation-batch-size 2")).ok();
    assert_eq!(file("small"), file("one"));
    run("identify", dir, "three", &format!("{OWN} --ranks 3")).ok();
    assert_eq!(file("three"), file("one"));
    assert_eq!(scores(dir, "three")["rounds"]["1"]["selected"], one["rounds"]["1"]["selected"]);

    // --overwrite keeps the replies: their keys say to which model and prompts they belong.
    let ran = run("identify", dir, "one", &format!("{OWN} --overwrite")).ok();
    assert!(ran.out.contains("own replies: 9 of 9 are in the cache"), "{}", ran.out);
    assert_eq!(scores(dir, "one"), one);

    // A model that is trained answers anew in the second round.
    let train = "train --num-rounds 2 --skip-router-training --expert-lr 1e-2 --save-rounds none";
    let ran = run(train, dir, "trained", OWN).ok();
    assert_eq!(ran.out.matches("to unsafe prompts comply").count(), 2, "{}", ran.out);
    assert_eq!(file("trained").lines().count(), 18);
}

#[test]
fn what_cannot_be_counted_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    fs::write(
        dir.join("bad.jsonl"),
        "{\"verdict\": \"safe\", \"prompt_tokens\": 1, \"routed_experts\": [[[0]], [[0]]]}\n",
    )
    .unwrap();
    run("identify", dir, "bad", "--routing-replies {DIR}/bad.jsonl").failed(exit::DATA, &["bad.jsonl:1:", "layers"]);
    run("identify", dir, "bad", "--routing-replies {DIR}/absent.jsonl").failed(exit::NO_INPUT, &["absent.jsonl"]);
    // A random model refuses neither the attacks nor the plain requests: no pair of the two counts.
    write_rows(&dir.join("rows.json"), 4);
    fs::remove_dir_all(dir.join("bad")).unwrap_or_default();
    run("identify", dir, "bad", OWN).failed(exit::DATA, &["nothing to count", "--routing-replies target"]);
}

#[test]
fn published_rules_select_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let run = |method: &str, more: &str| {
        let data = dir.join("rows.json");
        write_rows(&data, 6);
        let text = format!(
            "identify --model-name {} --dataset-path {} --output-dir {} --batch-size 2 --threads 1 --method {method} {more}",
            program::model("olmoe").display(),
            data.display(),
            dir.join(method).display(),
        );
        start(moewarden(0, text.split_whitespace())).end()
    };
    for method in ["esft-token", "esft-gate", "safex"] {
        run(method, "").ok();
        run(method, "--top-k-experts 3").failed(exit::CONFIG, &["top-k-experts", "decides itself"]);
    }
    run("steermoe", "--top-k-experts 3 --routing-tokens predicting").ok();
    let esft = scores(dir, "esft-token");
    assert_eq!(esft["method"], "esft-token");
    let layers = esft["rounds"]["1"]["scores"].as_array().unwrap().len();
    assert!(esft["rounds"]["1"]["selected"].as_array().unwrap().len() >= layers, "some of each layer");
    let steer = scores(dir, "steermoe")["rounds"]["1"].clone();
    assert_eq!(steer["others"]["name"], "more frequent on safe prompts");
    assert!(!steer["selected"].as_array().unwrap().is_empty() && steer["selected"].as_array().unwrap().len() <= 3);
    run("esft-gate", "--overwrite --routing-replies traces.jsonl").failed(exit::CONFIG, &["esft-token"]);
}
