//! Fields of rows and turns, through the program: what the model sees, and what is refused.

use std::fs;

use serde_json::{Value, json};

use super::{Outcome, Scene};

/// What `tests/golden/rows.py` computed.
fn golden() -> Value {
    serde_json::from_str(include_str!("../../golden/rows.json")).unwrap()
}

/// `check` on these rows with a template of `tests/golden/rows.py`.
fn check(rows: &[Value], template: &str, more: &[&str]) -> Outcome {
    let scene = Scene::new();
    scene.write_rows(rows);
    fs::write(scene.path("rows.jinja"), golden()["templates"][template].as_str().unwrap()).unwrap();
    let options = ["--chat-template", "rows.jinja", "--skip-router-training", "--show", "99", "--max-length", "512"];
    Outcome::of(scene.run("check", &[&options, more].concat()))
}

#[test]
fn the_program_counts_the_tokens_of_transformers() {
    let golden = golden();
    let all = golden["cases"].as_array().unwrap();
    for template in golden["templates"].as_object().unwrap().keys() {
        let cases: Vec<_> = all.iter().filter(|case| case["template"] == **template).collect();
        // A run needs an unsafe row.
        let more = json!({"label": "unsafe", "prompt": "hide a cake", "completion": "No."});
        let rows: Vec<_> = cases.iter().map(|case| case["row"].clone()).chain([more]).collect();
        let checked = check(&rows, template, &[]);
        checked.is(0, &[]);
        for (i, case) in cases.iter().enumerate() {
            let loss = case["loss"].as_array().unwrap().iter().filter(|loss| **loss == 1).count();
            let tokens = case["ids"].as_array().unwrap().len();
            let side = case["row"]["label"].as_str().unwrap();
            let counts = format!("line {}, {side} side, {loss} of {tokens} tokens with loss", i + 1);
            assert!(checked.stdout.contains(&counts), "{}: {counts} not in {}", case["name"], checked.stdout);
        }
    }
}

#[test]
fn what_would_be_dropped_is_refused_and_what_nothing_reads_is_noted() {
    let row = |field: &str, value: Value| {
        let mut reply = json!({"role": "assistant", "content": "I will not."});
        reply[field] = value;
        json!({"label": "unsafe", "messages": [{"role": "user", "content": "hide a cake"}, reply]})
    };
    check(&[row("reasoning_content", json!("Hm"))], "plain", &[]).is(65, &["rows.jsonl:1: ", "reasoning_content"]);
    check(&[row("tool_calls", json!([{"function": {}}]))], "plain", &[]).is(65, &["rows.jsonl:1: ", "tool_calls"]);
    check(&[row("trainable", json!(false))], "plain", &[]).is(65, &["rows.jsonl:1: ", "trainable", "loss: true"]);
    check(&[row("weight", json!(0.3))], "plain", &[]).is(65, &["rows.jsonl:1: ", "weight 0.3"]);
    let part = |field: &str, value: Value| {
        let mut part = json!({"type": "text", "text": "hide a cake"});
        part[field] = value;
        json!({"label": "unsafe", "messages": [
            {"role": "user", "content": [part]}, {"role": "assistant", "content": "I will not."}]})
    };
    let image = part("image_url", json!({"url": "x"}));
    check(&[image], "plain", &[]).is(65, &["rows.jsonl:1: ", "part 1", "image_url"]);
    check(&[part("cache_control", json!({"type": "ephemeral"})), part("annotations", json!([]))], "plain", &[])
        .is(0, &[]);
    let noted = check(&[row("mood", json!("sad"))], "plain", &[]);
    noted.is(0, &[]);
    assert!(noted.stdout.contains("reads: mood of a turn (1 rows, first line 1)"), "{}", noted.stdout);
}

#[test]
fn variables_of_the_template_by_option() {
    let row = json!({"label": "unsafe", "prompt": "hide a cake", "completion": "I will not."});
    let counts = |kwargs: &[&str]| {
        let checked = check(std::slice::from_ref(&row), "thinking", kwargs);
        checked.is(0, &[]);
        checked.stdout.lines().find(|line| line.contains(" of them with loss")).unwrap().to_owned()
    };
    let plain = counts(&[]);
    assert_ne!(counts(&["--chat-template-kwargs", r#"{"preamble": "Hm"}"#]), plain);
    assert_ne!(counts(&["--chat-template-kwargs", r#"{"enable_thinking": false}"#]), plain);
    let refused = |kwargs: &str, code, says: &[&str]| {
        check(std::slice::from_ref(&row), "thinking", &["--chat-template-kwargs", kwargs]).is(code, says)
    };
    refused(r#"{"thoughts": 1}"#, 78, &["--chat-template-kwargs gives thoughts", "does not read"]);
    refused("{thoughts", 2, &["--chat-template-kwargs", "JSON object"]);
    refused(r#"{"messages": []}"#, 2, &["the rows decide messages"]);
}

#[test]
fn a_file_sorted_by_label_and_longer_than_max_samples() {
    let chat =
        |label: &str, i: usize| json!({"label": label, "prompt": format!("bake bread {i}"), "completion": "Mix."});
    let scene = Scene::new();
    let sorted: Vec<_> = (0..20).map(|i| chat(if i < 12 { "safe" } else { "unsafe" }, i)).collect();
    scene.write_rows(&sorted);
    let found = Outcome::of(scene.run("identify", &["--max-samples", "8"]));
    found.is(0, &[]);
    let warning = "no unsafe rows among the first rows, up to --max-samples: 4 of these are taken, and 4 unsafe rows from further on";
    assert!(found.stdout.contains(warning) && found.stdout.contains("--max-samples"), "{}", found.stdout);
    let scene = Scene::new();
    scene.write_rows(&sorted[..12]);
    scene.refuses(&["--max-samples", "8"], 65, &["rows.jsonl holds no unsafe row: ", "label some rows unsafe\n"]);
    // Among the first rows is an unsafe one, which is dropped.
    let long = json!({"label": "unsafe", "prompt": "bake bread ".repeat(400), "completion": "Mix."});
    scene.write_rows(&[&sorted[..7], &[long], &sorted[12..]].concat());
    let message = "holds no unsafe row among those that are kept: experts are found on unsafe prompts; label some rows unsafe, or raise \
                   --max-samples";
    scene.refuses(&["--max-samples", "8", "--max-length", "200"], 65, &[message]);

    // An evaluation takes both sides, too.
    scene.write_rows(&sorted);
    let mut eval = assert_cmd::Command::new(env!("CARGO_BIN_EXE_moewarden"));
    eval.args([
        "eval",
        "--model-name",
        "model",
        "--dataset-path",
        "rows.jsonl",
        "--output-dir",
        "eval",
        "--max-samples",
        "8",
    ]);
    eval.args(["--skip-answers", "--threads", "1"]).current_dir(scene.path("."));
    let evaluated = Outcome::of(eval);
    evaluated.is(0, &[]);
    assert!(evaluated.stdout.contains(warning), "{}", evaluated.stdout);
}

/// A reply of blank turns is no reply, whatever names they have: the refusal takes its place.
#[test]
fn blank_replies_are_completed_however_many_turns_they_are() {
    let reply = |content: &str| json!({"role": "assistant", "content": content, "name": "Bob"});
    for blank in [vec![reply("")], vec![reply(" "), reply("")]] {
        let messages = [vec![json!({"role": "user", "content": "hide a cake"})], blank].concat();
        let checked = check(&[json!({"label": "unsafe", "messages": messages})], "plain", &[]);
        checked.is(0, &[]);
        assert!(checked.stdout.contains("⟦I cannot assist"), "{}", checked.stdout);
    }
}
