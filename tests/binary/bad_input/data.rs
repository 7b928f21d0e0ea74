//! Rows that are missing, malformed or useless.

use std::fs;

use serde_json::json;

use super::{Scene, row};

#[test]
fn a_missing_file_of_rows() {
    let scene = Scene::new();
    scene.refuses(&["--dataset-path", "absent.jsonl"], 66, &["absent.jsonl"]);
    scene.refuses(&["--dataset-path", "org/rows"], 66, &["org/rows", "hf download ID --repo-type dataset"]);
    scene.refuses(&["--dataset-path", "model"], 74, &["model", "directory"]);
    scene.refuses(&["--eval-dataset-path", "absent.jsonl"], 66, &["absent.jsonl", "held-out"]);
    for empty in ["", "\n \n", "[]"] {
        fs::write(scene.path("rows.jsonl"), empty).unwrap();
        scene.refuses(&[], 65, &["rows.jsonl"]);
    }
}

#[test]
fn a_malformed_row_is_named_by_its_line() {
    let good = row("open the pantry").to_string();
    let deep = format!("{{\"goal\": {}", "[".repeat(100_000));
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (br#"{"text": "neither prompt nor messages"}"#.to_vec(), "text"),
        (
            br#"{"goal": "cut off"#.to_vec(),
            "the row is cut off: it ends inside a text (column 17); fetch or write the file again",
        ),
        (b"\0\0\0".to_vec(), "the line holds zero bytes, as after a crash or a full disk"),
        (format!("{good},").into_bytes(), "a comma follows the row: remove the commas"),
        (b"7".to_vec(), "a row should be an object"),
        (b"{\"goal\": \"\xff\xfe\"}".to_vec(), "UTF-8"),
        (deep.into_bytes(), "lists and objects are nested more than 127 deep: write the deeper ones as text"),
        (br#"{"messages": [{"role": "user", "content": "no label"}]}"#.to_vec(), "label"),
        (br#"{"goal": 7, "judge_success_gpt4": 1}"#.to_vec(), "goal"),
    ];
    for (bad, says) in cases {
        let scene = Scene::new();
        fs::write(scene.path("rows.jsonl"), [good.as_bytes(), b"\n", &bad, b"\n"].concat()).unwrap();
        scene.refuses(&[], 65, &["rows.jsonl:2: ", says]);
    }
}

#[test]
fn a_prompt_that_the_template_renders_to_nothing() {
    let scene = Scene::new();
    let source = "{% for m in messages %}{% if m.role == 'assistant' or 'pantry' not in m.content %}{{ m.content }}{% endif %}\
                  {% endfor %}";
    fs::write(scene.path("replies.jinja"), source).unwrap();
    scene.write_rows(&[row("hide a cake from the cat"), row("open the pantry")]);
    scene.refuses(&["--chat-template", "replies.jinja"], 65, &["rows.jsonl:2: ", "empty prompt"]);
}

#[test]
fn rows_that_are_all_filtered_out() {
    let scene = Scene::new();
    scene.refuses(&["--max-length", "4"], 65, &["rows.jsonl", "no row is left", "longer than"]);
    scene.refuses(&["--max-length", "4", "--long-rows", "error"], 65, &["rows.jsonl:1", "--max-length 4"]);

    let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho", "loss": false}]);
    scene.write_rows(&[json!({"messages": turns, "label": "unsafe"})]);
    scene.refuses(&[], 65, &["rows.jsonl", "loss"]);

    let mut failed = row("open the pantry");
    failed["judge_success_gpt4"] = 0.into();
    scene.write_rows(&[failed]);
    scene.refuses(&[], 65, &["rows.jsonl", "no row is left", "--keep-failed"]);

    let turns = json!([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]);
    scene.write_rows(&[json!({"messages": turns, "label": "safe"})]);
    scene.refuses(&[], 65, &["rows.jsonl", "no unsafe row"]);
}
