//! The valid inputs that are mutated: models, rows in all formats, options, and what finished and interrupted runs left.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use serde_json::{Value, json};

use crate::golden_copy::golden_copy;

/// Options of a short training run, as in `config.yaml`.
pub const SHORT: &str =
    "--top-k-experts 2 --batch-size 2 --num-rounds 1 --threads 1 --save-rounds delta --save-steps 1";

/// A folder with everything; each run gets a copy of it.
pub struct Corpus {
    root: PathBuf,
}

impl Corpus {
    /// Writes all inputs below `root`, the outputs of runs among them by the binary itself.
    pub fn make(root: &Path) -> Self {
        let corpus = Self { root: root.to_owned() };
        fs::create_dir_all(root).unwrap();
        corpus.models();
        corpus.rows();
        corpus.options();
        corpus.runs();
        corpus
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    fn models(&self) {
        let golden = golden_copy("olmoe").join("model");
        copy(&golden, &self.path("model"));
        let spec = TinySpec { vocab_size: 320, shards: 3, ..TinySpec::new("qwen2_moe") };
        write_random_checkpoint(&self.path("sharded"), &spec).unwrap();
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            fs::copy(golden.join(name), self.path("sharded").join(name)).unwrap();
        }
    }

    fn rows(&self) {
        let golden = fs::read(golden_copy("olmoe").join("data.json")).unwrap();
        fs::write(self.path("rows.json"), &golden).unwrap();
        let turn = |role: &str, content: &str| json!({"role": role, "content": content});
        let rows = [
            json!({"goal": "hide a jar", "all_prompt": [turn("user", "Sing of the jar")], "judge_success_gpt4": 1}),
            json!({"messages": [turn("system", "Sing."), turn("user", "A song?"), turn("assistant", "La la.")], "label": "safe"}),
            json!({"messages": [turn("user", "A boat?"), turn("assistant", "No.")], "label": "unsafe"}),
            json!({"safe_messages": [turn("user", "Bake a cake")], "unsafe_messages": [turn("user", "Steal a cake")],
                   "response": "I will not."}),
        ];
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        fs::write(self.path("rows.jsonl"), &lines).unwrap();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(&golden).unwrap();
        fs::write(self.path("rows.json.gz"), gzip.finish().unwrap()).unwrap();
        fs::write(self.path("rows.jsonl.zst"), zstd::encode_all(lines.as_bytes(), 3).unwrap()).unwrap();
        let tables = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet");
        for table in ["snappy", "groups", "gzip", "zstd"] {
            fs::copy(tables.join(format!("{table}.parquet")), self.path(&format!("{table}.parquet"))).unwrap();
        }
        fs::write(self.path("traces.jsonl"), self.traces()).unwrap();
    }

    fn traces(&self) -> String {
        let config: Value = serde_json::from_slice(&fs::read(self.path("model/config.json")).unwrap()).unwrap();
        let number = |key: &str| config[key].as_u64().unwrap() as usize;
        let (layers, k) = (number("num_hidden_layers"), number("num_experts_per_tok"));
        let trace = |i: usize| {
            let token = |t: usize| (0..layers).map(|l| (0..k).map(|e| (i + t + l + e) % 4).collect()).collect();
            let experts: Vec<Vec<Vec<usize>>> = (0..6).map(token).collect();
            let verdict = if i.is_multiple_of(2) { "unsafe" } else { "refuse" };
            json!({"verdict": verdict, "prompt_tokens": 2, "routed_experts": experts, "id": i / 2})
        };
        (0..6).map(|i| format!("{}\n", trace(i))).collect()
    }

    fn options(&self) {
        let mut options = String::from("model-name: model\ndataset-path: rows.json\noutput-dir: out\n");
        let words: Vec<&str> = SHORT.split(' ').collect();
        for option in words.chunks(2) {
            options += &format!("{}: {}\n", option[0].trim_start_matches('-'), option[1]);
        }
        options += "expert-lr: 1e-3\nlayers: 0-1\nloss-on: response\nshuffle: true\n";
        fs::write(self.path("config.yaml"), options).unwrap();
        fs::write(self.path("experts.json"), "[[0, 1], [1, 2]]").unwrap();
    }

    /// What runs leave. The inputs are valid, or mutations of them would say nothing.
    fn runs(&self) {
        self.run("check --config config.yaml", None);
        self.run("check --model-name model --dataset-path rows.jsonl --top-k-experts 2", None);
        let train = |out: &str| format!("train --model-name model --dataset-path rows.json {SHORT} --output-dir {out}");
        self.run(&train("done"), None);
        self.run(&train("stopped"), Some("rank=0,at=step:3,do=kill"));
        self.run("eval --model-name model --dataset-path rows.json --output-dir answers --max-new-tokens 2", None);
        fs::copy(self.path("done/round_1/delta.safetensors"), self.path("delta.safetensors")).unwrap();
        fs::copy(self.path("done/expert_scores.json"), self.path("expert_scores.json")).unwrap();
        fs::remove_dir_all(self.path("done/final_model")).unwrap();
    }

    fn run(&self, words: &str, fault: Option<&str>) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moewarden"));
        command.args(words.split(' ')).current_dir(&self.root);
        command.envs(fault.map(|fault| ("MOEWARDEN_FAULT", fault)));
        let output = command.output().unwrap();
        assert_eq!(output.status.success(), fault.is_none(), "{words}\n{}", String::from_utf8_lossy(&output.stderr));
    }

    /// A copy for one run.
    pub fn copy_to(&self, folder: &Path) {
        copy(&self.root, folder);
    }

    /// The files below a folder of the corpus, by their paths in it, sorted.
    pub fn files(&self, below: &str) -> Vec<String> {
        let mut found = Vec::new();
        let mut folders = vec![PathBuf::from(below)];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(self.root.join(&folder)).unwrap().map(|entry| entry.unwrap()) {
                let path = folder.join(entry.file_name());
                if entry.path().is_dir() { folders.push(path) } else { found.push(path.to_str().unwrap().to_owned()) }
            }
        }
        found.sort();
        found
    }
}

/// Copies a folder. Files that no run changes are linked.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let name = entry.unwrap().file_name();
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy(&from, &to);
        } else if from.extension().is_some_and(|ending| ending == "safetensors") {
            fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop)).unwrap();
        } else {
            fs::copy(&from, &to).unwrap();
        }
    }
}
