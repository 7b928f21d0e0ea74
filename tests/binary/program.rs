//! Runs of the real binary, alone or under `mpirun`, and their output files.

use crate::golden_copy::golden_copy;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use moewarden::backend::{Dtype, HostTensor};
use moewarden::exit;
use safetensors::SafeTensors;
use serde_json::{Value, json};

use crate::processes::mpirun;

/// Longer than any run of these tests.
const FOREVER: Duration = Duration::from_secs(240);

/// The result of a command.
pub struct Ran {
    /// `None`: a signal ended it.
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Ran {
    #[track_caller]
    pub fn ended(self, code: u8) -> Self {
        assert_eq!(self.code, Some(code.into()), "{}\n{}", self.out, self.err);
        self
    }

    #[track_caller]
    pub fn ok(self) -> Self {
        self.ended(exit::OK)
    }

    /// Asserts the exit code and these parts of stderr.
    #[track_caller]
    pub fn failed(self, code: u8, said: &[&str]) {
        let ran = self.ended(code);
        said.iter().for_each(|text| assert!(ran.err.contains(text), "{text:?} is not in {}", ran.err));
    }
}

/// Makes a pipe (FIFO).
pub fn pipe(path: &Path) {
    let name = std::ffi::CString::new(path.to_str().unwrap()).unwrap();
    // SAFETY: the name is a valid C string.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
}

/// A running command.
pub struct Running {
    child: Child,
    /// stdout, stderr
    logs: [tempfile::NamedTempFile; 2],
}

impl Running {
    /// Sends it a signal.
    pub fn signal(&self, signal: i32) {
        // SAFETY: the child has not been waited for, so its process id is still valid.
        assert_eq!(unsafe { libc::kill(self.child.id() as i32, signal) }, 0);
    }

    /// Waits until `seen` holds; false if the command ended before.
    pub fn wait_for(&mut self, seen: impl Fn() -> bool) -> bool {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            if seen() {
                return true;
            }
            assert!(start.elapsed() < FOREVER, "the condition never holds");
            sleep(Duration::from_millis(2));
        }
        false
    }

    /// Waits for the end of the command; kills it after [`FOREVER`].
    pub fn end(mut self) -> Ran {
        let start = Instant::now();
        let status = loop {
            match self.child.try_wait().unwrap() {
                Some(status) => break Some(status),
                None if start.elapsed() > FOREVER => break None,
                None => sleep(Duration::from_millis(5)),
            }
        };
        if status.is_none() {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
        let [out, err] = self.logs.map(|log| fs::read_to_string(log.path()).unwrap());
        let code = status.unwrap_or_else(|| panic!("the command does not end\n{out}\n{err}")).code();
        Ran { code, out, err }
    }
}

/// Starts a command.
pub fn start(mut command: Command) -> Running {
    let logs = [(); 2].map(|()| tempfile::NamedTempFile::new().unwrap());
    let [out, err] = logs.each_ref().map(|log| log.reopen().unwrap());
    let child = command.stdin(Stdio::null()).stdout(out).stderr(err).spawn().unwrap();
    Running { child, logs }
}

/// The binary with these arguments on `processes` processes; 0: without `mpirun`.
pub fn moewarden<S: Into<OsString>>(processes: usize, args: impl IntoIterator<Item = S>) -> Command {
    let binary = env!("CARGO_BIN_EXE_moewarden");
    let mut command = if processes == 0 { Command::new(binary) } else { mpirun() };
    if processes > 0 {
        command.args(["-n", &processes.to_string(), binary]);
    }
    command.args(args.into_iter().map(Into::into));
    command
}

/// The model of a golden case.
pub fn model(case: &str) -> PathBuf {
    golden_copy(case).join("model")
}

/// Rows with a safe and an unsafe prompt, short and of uneven length.
pub fn write_rows(path: &Path, rows: usize) {
    const THINGS: [&str; 7] = ["pantry", "cake", "ladder", "jar", "plum tree", "gate", "boat"];
    let row = |i: usize| {
        let thing = THINGS[i % THINGS.len()];
        let content = format!("Sing of the {thing}{} {i} times", "s".repeat(i % 4));
        json!({"goal": format!("Hide a {thing}"), "all_prompt": [{"role": "user", "content": content}]})
    };
    fs::write(path, Value::Array((0..rows).map(row).collect()).to_string()).unwrap();
}

/// The outputs of a run that do not depend on the time or on the path of the output folder.
pub struct Outputs {
    /// Scores and metadata, byte for byte.
    pub files: BTreeMap<&'static str, Vec<u8>>,
    /// metrics.jsonl without `seconds`.
    pub metrics: Vec<Value>,
    /// The final model by tensors.
    pub weights: BTreeMap<String, HostTensor>,
}

impl Outputs {
    pub fn read(dir: &Path) -> Self {
        let read = |name: &str| fs::read(dir.join(name)).unwrap_or_else(|e| panic!("{name} of {}: {e}", dir.display()));
        let names = ["expert_scores.json", "rankings.json", "expert_gradients.pkl", "training_metadata.json"];
        let metrics = String::from_utf8(read("metrics.jsonl")).unwrap();
        let row = |line: &str| {
            let mut row: Value = serde_json::from_str(line).unwrap();
            assert!(row.as_object_mut().unwrap().remove("seconds").is_some());
            row
        };
        Self {
            files: names.into_iter().map(|name| (name, read(name))).collect(),
            metrics: metrics.lines().map(row).collect(),
            weights: read_weights(&dir.join("final_model")),
        }
    }

    pub fn scores(&self) -> Value {
        serde_json::from_slice(&self.files["expert_scores.json"]).unwrap()
    }

    pub fn metadata(&self) -> Value {
        serde_json::from_slice(&self.files["training_metadata.json"]).unwrap()
    }

    /// Asserts that both are bit-identical.
    #[track_caller]
    pub fn assert_same(&self, other: &Self, what: &str) {
        assert_eq!(self.metrics, other.metrics, "{what}: metrics.jsonl");
        for (name, bytes) in &self.files {
            assert!(*bytes == other.files[name], "{what}: {name} differs");
        }
        self.weights
            .iter()
            .for_each(|(name, w)| assert!(w.bytes[..] == other.weights[name].bytes[..], "{what}: {name} differs"));
        assert_eq!(self.weights.len(), other.weights.len(), "{what}");
    }
}

/// The names in a folder, sorted.
pub fn files_of(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// All tensors of a model that is stored in one file.
pub fn read_weights(model: &Path) -> BTreeMap<String, HostTensor> {
    let bytes = fs::read(model.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let value = |tensor: safetensors::tensor::TensorView<'_>| {
        let dtype = match tensor.dtype() {
            safetensors::Dtype::F32 => Dtype::F32,
            safetensors::Dtype::BF16 => Dtype::Bf16,
            other => panic!("tests have no models in {other:?}"),
        };
        HostTensor::new(dtype, tensor.shape().to_vec(), tensor.data().to_vec().into())
    };
    tensors.iter().map(|(name, tensor)| (name.to_owned(), value(tensor))).collect()
}
