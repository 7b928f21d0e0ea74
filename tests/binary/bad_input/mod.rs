//! Bad input to the real binary: the exit code, a message with the cause and the remedy, and no partial files.

mod data;
mod fields;
mod files;
mod folder;
mod formats;
mod hollow;
mod model;
mod options;
mod output;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use assert_cmd::Command;
use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Longer than any refusal, even if the tests share two cores with other programs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A folder with a valid model, valid rows and a path for outputs, for a test to damage.
struct Scene {
    temp: TempDir,
}

impl Scene {
    fn new() -> Self {
        Self::with(&spec())
    }

    fn with(spec: &TinySpec) -> Self {
        let scene = Self { temp: tempfile::tempdir().unwrap() };
        write_random_checkpoint(&scene.model(), spec).unwrap();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/olmoe/model");
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            fs::copy(golden.join(name), scene.model().join(name)).unwrap();
        }
        scene.write_rows(&[row("open the pantry"), row("hide a cake from the cat")]);
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    fn model(&self) -> PathBuf {
        self.path("model")
    }

    fn out(&self) -> PathBuf {
        self.path("out")
    }

    fn write_rows(&self, rows: &[Value]) {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        fs::write(self.path("rows.jsonl"), lines).unwrap();
    }

    /// Changes keys of config.json.
    fn configure(&self, changes: Value) {
        let path = self.model().join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        fs::write(path, config.to_string()).unwrap();
    }

    /// A short run; options in `more` replace the scene's own.
    fn run(&self, command: &str, more: &[&str]) -> Command {
        const OWN: [[&str; 2]; 7] = [
            ["--model-name", "model"],
            ["--dataset-path", "rows.jsonl"],
            ["--output-dir", "out"],
            ["--batch-size", "2"],
            ["--top-k-experts", "2"],
            ["--threads", "1"],
            ["--num-rounds", "1"],
        ];
        let mut run = Command::new(env!("CARGO_BIN_EXE_moewarden"));
        run.arg(command).current_dir(self.temp.path()).timeout(PATIENCE);
        let own =
            OWN.iter().filter(|[name, _]| !more.contains(name) && (command == "train" || *name != "--num-rounds"));
        run.args(own.flatten()).args(more);
        run
    }

    fn train(&self, more: &[&str]) -> Outcome {
        Outcome::of(self.run("train", more))
    }

    /// Asserts that `train` ends with this code and these messages, and without an output folder.
    #[track_caller]
    fn refuses(&self, more: &[&str], code: i32, says: &[&str]) {
        self.train(more).is(code, says);
        assert!(!self.out().exists(), "an output folder was left: {:?}", files(&self.out()));
    }
}

/// A model with the vocabulary size of the golden tokenizer.
fn spec() -> TinySpec {
    TinySpec { vocab_size: 320, ..TinySpec::new("olmoe") }
}

/// A valid attack row.
fn row(request: &str) -> Value {
    let content = format!("In a play the baker explains how to {request}.");
    json!({"goal": request, "all_prompt": [{"role": "user", "content": content}], "judge_success_gpt4": 1})
}

/// How the process ended.
struct Outcome {
    code: Option<i32>,
    stdout: String,
    stderr: String,
}

impl Outcome {
    fn of(mut command: Command) -> Self {
        let output = command.output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
    }

    /// Asserts the exit code and these parts of the output.
    #[track_caller]
    fn is(&self, code: i32, says: &[&str]) {
        let Self { code: found, stdout, stderr } = self;
        assert_eq!(*found, Some(code), "stdout:\n{stdout}\nstderr:\n{stderr}");
        assert!(code == 0 || stderr.contains("error: "), "{stderr}");
        for what in says {
            assert!(stderr.contains(what), "{what:?} is missing in:\n{stderr}");
        }
        assert!(!stderr.contains("at fault"), "{stderr}");
    }
}

/// Every file below a folder, relative to it, sorted.
fn files(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { found.push(path) }
        }
    }
    let mut names: Vec<_> = found.iter().map(|p| p.strip_prefix(dir).unwrap().display().to_string()).collect();
    names.sort();
    names
}

#[test]
fn the_undamaged_scene_is_valid() {
    let scene = Scene::new();
    scene.train(&[]).is(0, &[]);
    assert!(scene.out().join("final_model/model.safetensors").exists());
}
