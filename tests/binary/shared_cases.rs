//! Situations from public bug reports, rebuilt in the folder `cases` of the optional shared folder: `NN-NAME/run.sh BINARY OUT` ends
//! with 0 where the program is right, and `fuzz-NN/run.sh` prints the exit codes of runs on inputs that once made it fail.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Codes that no input may cause: a panic, a time limit, and signals.
const NEVER: [&str; 5] = ["70", "124", "134", "137", "139"];

/// The exit code of a situation that did not come about.
const NOT_SHOWN: i32 = 2;

/// The folders of cases whose names begin like this; prints where it looked if there are none.
fn cases(begins: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let folder = crate::shared::shared().join("cases");
    let entries = fs::read_dir(&folder).into_iter().flatten().flatten();
    let mut cases: Vec<_> = entries
        .filter(|entry| entry.file_name().to_str().is_some_and(&begins) && entry.path().join("run.sh").is_file())
        .map(|entry| entry.path().canonicalize().unwrap())
        .collect();
    cases.sort();
    if cases.is_empty() {
        println!("skipped: no case in {}", folder.display());
    }
    cases
}

#[test]
fn situations_from_bug_reports_are_right() {
    let out = tempfile::tempdir().unwrap();
    for case in cases(|name| name.starts_with(|c: char| c.is_ascii_digit())) {
        let out = out.path().join(case.file_name().unwrap());
        let ran = Command::new("bash")
            .arg(case.join("run.sh"))
            .args([Path::new(env!("CARGO_BIN_EXE_moewarden")), &out])
            .output()
            .expect("bash runs");
        let said = String::from_utf8_lossy(&ran.stdout);
        match ran.status.code() {
            Some(0) => {}
            // It stops a run after a fixed time, in which a busy machine may have done nothing.
            Some(NOT_SHOWN) => println!("skipped: {}: {said}", case.display()),
            _ => panic!("{}: {said}", case.display()),
        }
    }
}

#[test]
fn inputs_that_once_made_it_fail_are_refused() {
    for case in cases(|name| name.starts_with("fuzz-")) {
        let ran = Command::new("bash")
            .arg(case.join("run.sh"))
            .env("MW", env!("CARGO_BIN_EXE_moewarden"))
            .output()
            .expect("bash runs");
        let said = String::from_utf8_lossy(&ran.stdout);
        let codes: Vec<_> =
            said.lines().filter_map(|line| line.strip_prefix("exit code ")?.split(':').next()).collect();
        assert!(!codes.is_empty(), "{}: {said}", case.display());
        assert!(!codes.iter().any(|code| NEVER.contains(code)), "{}: {said}", case.display());
    }
}
