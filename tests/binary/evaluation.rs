//! `eval` over ranks, continued after an interruption, and on dense models.

use std::fs;
use std::path::{Path, PathBuf};

use moewarden::exit;
use serde_json::{Value, json};

use crate::program::{Ran, files_of, model, moewarden, start, write_rows};

/// The files that do not depend on ranks, batches and time.
const FILES: [&str; 3] = ["eval.json", "eval_options.json", "generations.jsonl"];

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new(rows: usize) -> Self {
        let scene = Self { dir: tempfile::tempdir().unwrap() };
        write_rows(&scene.path("rows.json"), rows);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn command(&self, case: &str, output: &str, more: &str) -> std::process::Command {
        let text = format!(
            "eval --model-name {} --dataset-path {} --output-dir {} --batch-size 2 --threads 1 --quiet {more}",
            model(case).display(),
            self.path("rows.json").display(),
            self.path(output).display(),
        );
        moewarden(0, text.split_whitespace())
    }

    fn run(&self, case: &str, output: &str, more: &str) -> Ran {
        start(self.command(case, output, more)).end()
    }

    fn bytes(&self, output: &str) -> [Vec<u8>; 3] {
        FILES.map(|name| fs::read(self.path(output).join(name)).unwrap_or_else(|e| panic!("{output}/{name}: {e}")))
    }

    /// A copy of an evaluation that was killed while its answers had come to `length` bytes of the file.
    fn killed(&self, from: &str, to: &str, length: usize) {
        fs::create_dir(self.path(to)).unwrap();
        let read = |name: &str| fs::read(self.path(from).join(name)).unwrap();
        fs::write(self.path(to).join("eval_options.json"), read("eval_options.json")).unwrap();
        fs::write(self.path(to).join("generations.jsonl"), &read("generations.jsonl")[..length]).unwrap();
    }
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn ranks_and_batches_change_no_byte() {
    let scene = Scene::new(5);
    scene.run("olmoe", "one", "--max-new-tokens 5").ok();
    let one = scene.bytes("one");
    assert_eq!(
        files_of(&scene.path("one")),
        ["eval.json", "eval_options.json", "eval_times.json", "generations.jsonl"]
    );
    for (ranks, size) in [(1, 1), (2, 3), (3, 2)] {
        let name = format!("{ranks}-{size}");
        let more = format!("--max-new-tokens 5 --ranks {ranks} --generation-batch-size {size}");
        scene.run("olmoe", &name, &more).ok();
        assert!(scene.bytes(&name) == one, "{ranks} ranks, batches of {size}");
        let times = read_json(&scene.path(&name).join("eval_times.json"))["answers"].clone();
        assert_eq!(
            (&times["ranks"], &times["batch_size"], &times["answers"]),
            (&json!(ranks), &json!(size), &json!(10))
        );
        let rows = String::from_utf8(one[2].clone()).unwrap();
        let rows: Vec<Value> = rows.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let tokens: u64 = rows.iter().map(|row| row["n_tokens"].as_u64().unwrap()).sum();
        assert_eq!(times["tokens"], tokens);
        // The first token of an answer comes from the pass over its prompt, the end-of-sequence token counts as a token of a pass.
        assert!(times["decoding"]["tokens"].as_u64().unwrap() + rows.len() as u64 >= tokens, "{times}");
    }
}

#[test]
fn an_interrupted_evaluation_continues_to_the_same_bytes() {
    let scene = Scene::new(4);
    let options = "--max-new-tokens 4 --generation-batch-size 3";
    scene.run("olmoe", "whole", options).ok();
    let whole = scene.bytes("whole");
    let ends: Vec<usize> = (0..whole[2].len()).filter(|&i| whole[2][i] == b'\n').collect();
    let lengths = [0, 1, ends[0], ends[0] + 1, ends[2] + 40, whole[2].len() - 1, whole[2].len()];
    for (i, length) in lengths.into_iter().enumerate() {
        let name = format!("killed-{i}");
        scene.killed("whole", &name, length);
        let ranks = 1 + i % 3;
        scene.run("olmoe", &name, &format!("{options} --ranks {ranks} --resume")).ok();
        assert!(scene.bytes(&name) == whole, "killed after {length} bytes");
    }
    // A finished one is made again from its answers: the losses are measured anew, no answer is generated.
    scene.run("olmoe", "whole", &format!("{options} --resume")).ok();
    assert!(scene.bytes("whole") == whole);
    assert_eq!(read_json(&scene.path("whole/eval_times.json"))["answers"]["answers"], 0);
    // Without an evaluation in the folder, --resume starts one.
    scene.run("olmoe", "new", &format!("{options} --resume")).ok();
    assert!(scene.bytes("new") == whole);
}

#[test]
fn signals_stop_an_evaluation_that_continues() {
    let scene = Scene::new(30);
    let options = "--max-new-tokens 40 --generation-batch-size 2 --ranks 2";
    scene.run("olmoe", "whole", options).ok();
    for (signal, code) in [(libc::SIGTERM, Some(i32::from(exit::REQUEUE))), (libc::SIGKILL, None)] {
        let name = format!("signal-{signal}");
        let mut running = start(scene.command("olmoe", &name, options));
        let log = scene.path(&name).join("generations.jsonl");
        let seen = running.wait_for(|| fs::read(&log).is_ok_and(|bytes| bytes.contains(&b'\n')));
        assert!(seen, "the evaluation ended before it was stopped");
        running.signal(signal);
        let ran = running.end();
        // A process that has just ended is past its last moment to stop.
        assert!(ran.code == code || ran.code == Some(0), "{:?}\n{}", ran.code, ran.err);
        if ran.code == Some(i32::from(exit::REQUEUE)) {
            assert!(ran.err.contains("--resume continues"), "{}", ran.err);
        }
        scene.run("olmoe", &name, &format!("{options} --resume")).ok();
        assert!(scene.bytes(&name) == scene.bytes("whole"), "after signal {signal}");
    }
}

#[test]
fn another_evaluation_is_not_continued() {
    let scene = Scene::new(3);
    let options = "--max-new-tokens 3";
    scene.run("olmoe", "out", options).ok();
    let before = scene.bytes("out");
    for (case, more, said) in [
        ("mixtral", "--max-new-tokens 3", "model weights"),
        ("olmoe", "--max-new-tokens 4", "--max-new-tokens: 3, not 4"),
        ("olmoe", "--max-new-tokens 3 --temperature 1", "--temperature: 0.0, not 1.0"),
        ("olmoe", "--max-new-tokens 3 --max-samples 2", "--max-samples: 128, not 2"),
        ("olmoe", "--skip-answers", "other inputs or options"),
    ] {
        scene.run(case, "out", &format!("{more} --resume")).failed(exit::CONFIG, &["eval_options.json", said]);
    }
    scene.run("olmoe", "out", options).failed(exit::CANNOT_CREATE, &["not empty", "--resume"]);
    scene.run("olmoe", "out", &format!("{options} --overwrite --resume")).failed(exit::USAGE, &["--resume"]);
    assert!(scene.bytes("out") == before);

    write_rows(&scene.path("rows.json"), 4);
    scene.run("olmoe", "out", &format!("{options} --resume")).failed(exit::CONFIG, &["rows and their tokens"]);
    write_rows(&scene.path("rows.json"), 3);
    let log = scene.path("out").join("generations.jsonl");
    let text = fs::read_to_string(&log).unwrap();
    for (broken, said) in [
        (text.replacen("\"1-unsafe\"", "\"9-unsafe\"", 1), ":1: has the id \"9-unsafe\""),
        (text.replace("Sing of", "Say"), "answers another prompt"),
        (text.replacen("{\"schema\"", "{\"scheme\"", 1), ":1: is no answer"),
    ] {
        fs::write(&log, broken).unwrap();
        scene.run("olmoe", "out", &format!("{options} --resume")).failed(exit::DATA, &["generations.jsonl", said]);
    }
    fs::write(&log, text).unwrap();
    fs::remove_file(scene.path("out").join("eval_options.json")).unwrap();
    scene.run("olmoe", "out", &format!("{options} --resume")).failed(exit::CONFIG, &["eval_options.json: is missing"]);
}

#[test]
fn a_dense_model_is_evaluated_and_trained_whole() {
    let scene = Scene::new(3);
    let run = |command: &str, output: &str, more: &str| {
        let text = format!(
            "{command} --model-name {} --dataset-path {} --output-dir {} --threads 1 {more}",
            model("dense_qwen3").display(),
            scene.path("rows.json").display(),
            scene.path(output).display(),
        );
        start(moewarden(0, text.split_whitespace())).end()
    };
    for (command, more, said) in [
        ("identify", "", "so there is nothing to identify"),
        ("train", "", "nothing to identify or to train"),
        ("train", "--mode experts", "nothing to identify or to train"),
        ("train", "--mode baseline --schedule joint", "nothing to identify or to train"),
        ("train", "--mode baseline --verify 20", "--verify has nothing to check"),
        ("check", "", "nothing to identify or to train"),
        ("ablate", "--experts rows.json", "so there is nothing to identify"),
    ] {
        let said = [said, "dense model (qwen3)", "train --mode baseline"];
        run(command, "never", more).failed(exit::CONFIG, &said);
        assert!(!scene.path("never").exists());
    }
    let ran = run("check", "never", "--mode baseline").ok();
    assert!(ran.out.contains("all of them dense") && ran.out.contains("ready"), "{}", ran.out);

    let ran = run("train", "run", "--mode baseline --num-rounds 2 --expert-lr 1e-3 --save-rounds none --ranks 2").ok();
    assert!(ran.err.contains("there is no router phase"), "{}", ran.err);
    let scores = read_json(&scene.path("run/expert_scores.json"));
    assert_eq!((&scores["layers"], &scores["rounds"]["1"]["selected"]), (&json!([]), &json!([])));
    let losses = read_json(&scene.path("run/training_metadata.json"))["ce_loss"].clone();
    assert!(losses[1].as_f64() < losses[0].as_f64(), "{losses}");

    for (ranks, name) in [(1, "one"), (3, "three")] {
        let ran = scene.run("dense_qwen3", name, &format!("--max-new-tokens 3 --ranks {ranks}")).ok();
        assert!(ran.out.contains("exact"), "{}", ran.out);
    }
    assert!(scene.bytes("one") == scene.bytes("three"));
    let report = read_json(&scene.path("one/eval.json"));
    assert_eq!(report["routing"], json!({"divergence_by_layer": [], "risk_difference_top": []}));
    assert!(report["ce_unsafe"]["mean"].as_f64() > Some(0.0) && report["exact"][0]["of"] == 3, "{report}");
    let runs = ["run", "one"].map(|name| scene.path(name).display().to_string());
    let args = ["report".to_owned(), "--output-dir".into(), scene.path("report").display().to_string()];
    start(moewarden(0, args.into_iter().chain(runs))).end().ok();
    assert!(fs::read_to_string(scene.path("report/report.html")).unwrap().contains("Losses"));
}
