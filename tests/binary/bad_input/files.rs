//! What lies in the place of a file, and files that are damaged.

use std::fs;

use serde_json::Value;

use super::Scene;
use crate::program::pipe;

/// Every JSON file of a model that is read.
const JSON: [&str; 6] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
];

#[test]
fn a_folder_a_pipe_or_a_link_to_nothing_in_the_place_of_a_file_is_named() {
    let more = ["model.safetensors", "chat_template.jinja"];
    for name in JSON.into_iter().chain(more) {
        let scene = Scene::new();
        let path = scene.model().join(name);
        let _ = fs::remove_file(&path);
        fs::create_dir(&path).unwrap();
        scene.refuses(&[], 74, &[name, "it is a folder (a directory), not a file"]);
        fs::remove_dir(&path).unwrap();
        pipe(&path);
        scene.refuses(&[], 74, &[name, "it is a pipe (FIFO), not a file"]);
        fs::remove_file(&path).unwrap();
        std::os::unix::fs::symlink("../../blobs/1a", &path).unwrap();
        scene.refuses(&[], 74, &[name, "it is a link to `../../blobs/1a`, which does not exist", "cp -rL"]);
    }
    let scene = Scene::new();
    pipe(&scene.path("pipe"));
    std::os::unix::fs::symlink("nothing", scene.path("link")).unwrap();
    for option in ["--dataset-path", "--eval-dataset-path", "--retain-dataset-path", "--chat-template", "--config"] {
        scene.refuses(&[option, "pipe"], 74, &["pipe (FIFO)"]);
        scene.refuses(&[option, "link"], 74, &["it is a link to `nothing`"]);
        scene.refuses(&[option, "model"], 74, &["it is a folder"]);
    }
}

#[test]
fn a_byte_order_mark_before_json_is_skipped() {
    let plain = Scene::new();
    let marked = Scene::new();
    for name in ["generation_config.json", "special_tokens_map.json", "added_tokens.json"] {
        fs::write(marked.model().join(name), "{}").unwrap();
        fs::write(plain.model().join(name), "{}").unwrap();
    }
    for name in JSON {
        let path = marked.model().join(name);
        fs::write(&path, [b"\xef\xbb\xbf".as_slice(), &fs::read(&path).unwrap()].concat()).unwrap();
    }
    let scores = |scene: &Scene| {
        super::Outcome::of(scene.run("identify", &[])).is(0, &[]);
        let scores: Value = serde_json::from_slice(&fs::read(scene.out().join("expert_scores.json")).unwrap()).unwrap();
        scores
    };
    let expected = scores(&plain);
    assert_eq!(scores(&marked), expected);
    // Files of a run, as an editor may have saved them: a list of experts, and the scores of another run.
    let experts = expected["rounds"]["1"]["selected"].to_string();
    for text in [experts, expected.to_string()] {
        fs::write(plain.path("experts.json"), format!("\u{feff}{text}")).unwrap();
        fs::remove_dir_all(plain.out()).unwrap();
        let mut given = assert_cmd::Command::new(env!("CARGO_BIN_EXE_moewarden"));
        given.current_dir(plain.temp.path()).args(["train", "--model-name", "model", "--dataset-path", "rows.jsonl"]);
        given.args(["--output-dir", "out", "--threads", "1", "--num-rounds", "1", "--method", "given"]);
        given.args(["--experts", "experts.json"]);
        super::Outcome::of(given).is(0, &[]);
    }
}

#[test]
fn a_damaged_json_file_says_how_to_get_it_again() {
    for name in JSON {
        for (text, says) in [
            ("{\"a\": [1, 2", "cut off"),
            ("{\"a\": }", "fetch it again"),
            ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
            ("<!doctype html><html></html>", "a web page"),
            ("\0\0\0\0\0\0\0\0", "zero bytes"),
            ("", "empty"),
            ("[]", "should be an object, not a list"),
        ] {
            let scene = Scene::new();
            fs::write(scene.model().join(name), text).unwrap();
            scene.refuses(&[], 65, &[name, says]);
        }
    }
    let scene = Scene::new();
    fs::write(scene.model().join("model.safetensors"), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        .unwrap();
    scene.refuses(&[], 65, &["model.safetensors", "a pointer of Git LFS"]);
    for name in ["model.safetensors", "chat_template.jinja"] {
        let scene = Scene::new();
        fs::write(scene.model().join(name), [0; 5000]).unwrap();
        scene.refuses(&[], 65, &[name, "the file holds only zero bytes, as after a crash or a full disk"]);
    }
}

#[test]
fn a_tokenizer_that_the_library_panics_on_is_at_fault() {
    let scene = Scene::new();
    let path = scene.model().join("tokenizer.json");
    let good: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let refuses = |change: &dyn Fn(&mut Value)| {
        let mut bad = good.clone();
        change(&mut bad);
        fs::write(&path, bad.to_string()).unwrap();
        let refused = scene.train(&[]);
        refused.is(65, &["tokenizer.json: not a valid tokenizer"]);
        refused
    };
    // A merge whose parts are longer than the prefix that is cut off: a slice out of range.
    let merges = |bad: &mut Value| {
        bad["model"]["continuing_subword_prefix"] = "a long prefix".into();
    };
    assert!(!refuses(&merges).stderr.contains("report"));
    // Parts that are none, by name.
    for part in ["decoder", "model", "normalizer", "pre_tokenizer", "post_processor"] {
        let refused = refuses(&|bad: &mut Value| bad[part] = serde_json::json!({"type": "ByteLeve"}));
        refused.is(65, &[&format!("its {part} has a type or fields that the tokenizers library does not know")]);
        assert!(!refused.stderr.contains("untagged") && !refused.stderr.contains("report"), "{}", refused.stderr);
    }
    for (change, says) in [
        ("[]", "not a valid tokenizer: a value should be an object, not a list"),
        (r#"{"vocab": {}}"#, "not a valid tokenizer: it has a field that the tokenizers library does not know"),
        (r#"{"version": "1.0"}"#, "not a valid tokenizer: Model missing"),
        (r#"{"version": 1}"#, "not a valid tokenizer: a value should be a text, not the number 1"),
    ] {
        fs::write(&path, change).unwrap();
        scene.train(&[]).is(65, &["tokenizer.json: ", says]);
    }
    // Cut off anywhere.
    let text = good.to_string();
    for part in 1..8 {
        fs::write(&path, &text[..text.len() * part / 8]).unwrap();
        scene.train(&[]).is(65, &["tokenizer.json", "cut off"]);
    }
    // Text that the tokenizer fails on only when it encodes.
    let encoding = |bad: &mut Value| {
        bad["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": "(a*)*$\\1(x+x+)+y"}, "behavior": "Isolated", "invert": false});
    };
    let mut bad = good.clone();
    encoding(&mut bad);
    fs::write(&path, bad.to_string()).unwrap();
    scene.write_rows(&[super::row(&"x".repeat(3000))]);
    let ended = scene.train(&["--long-rows", "drop"]);
    assert!(!ended.stderr.contains("report"), "{}", ended.stderr);
}

#[test]
fn a_text_in_another_encoding_is_the_files_fault() {
    let scene = Scene::new();
    fs::write(scene.model().join("chat_template.jinja"), b"{{ messages }}\xff").unwrap();
    scene.refuses(&[], 65, &["chat_template.jinja", "UTF-8", "is the file damaged?"]);
    fs::write(scene.path("options.yaml"), b"model-name: \xff\n").unwrap();
    scene.refuses(&["--config", "options.yaml"], 78, &["options.yaml", "UTF-8"]);
}
