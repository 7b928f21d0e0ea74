//! What Python says of a run's outputs, where Python is there.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tempfile::TempDir;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/olmoe");

/// The interpreter: `MOEWARDEN_PYTHON`, or `python3`.
fn python(args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Option<Output> {
    let python = std::env::var_os("MOEWARDEN_PYTHON").unwrap_or("python3".into());
    Command::new(python).args(args).output().ok()
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/python").join(name)
}

/// A run on the golden model; its folder is `out` in this one.
fn run() -> TempDir {
    let temp = tempfile::tempdir().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_moewarden"))
        .current_dir(temp.path())
        .args(["train", "--model-name", &format!("{GOLDEN}/model"), "--dataset-path", &format!("{GOLDEN}/data.json")])
        .args(["--output-dir", "out", "--num-rounds", "2", "--top-k-experts", "4", "--batch-size", "2"])
        .args(["--expert-lr", "1e-2", "--router-lr", "1e-3", "--save-rounds", "none"])
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    temp
}

#[track_caller]
fn passes(output: Output) {
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    assert!(output.status.success(), "{}\n{}", said[0], said[1]);
}

#[test]
fn python_reads_the_pickle() {
    if python(["--version"]).is_none_or(|output| !output.status.success()) {
        println!("skipped: there is no python3");
        return;
    }
    let run = run();
    let [pickle, scores] = ["expert_gradients.pkl", "expert_scores.json"].map(|name| run.path().join("out").join(name));
    let check = |pickle: &Path| python([script("check_pickle.py").as_path(), pickle, &scores]).unwrap();
    passes(check(&pickle));

    // The check can fail: another float, the last byte before the closing opcodes that is one.
    let mut bytes = fs::read(&pickle).unwrap();
    let float = bytes.windows(1).rposition(|b| b == b"G").unwrap();
    bytes[float + 4] ^= 1;
    let spoiled = run.path().join("spoiled.pkl");
    fs::write(&spoiled, bytes).unwrap();
    assert!(!check(&spoiled).status.success(), "a spoiled pickle passed");
}
