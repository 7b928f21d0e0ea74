//! Output folders that cannot be written, or run out of space.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process;

use assert_cmd::Command;

use super::{Outcome, Scene, files, row};

#[test]
fn a_folder_that_is_not_empty() {
    let scene = Scene::new();
    fs::create_dir(scene.out()).unwrap();
    fs::write(scene.out().join("thesis.txt"), "mine").unwrap();
    scene.train(&[]).is(73, &["out", "not empty", "--overwrite", "--resume"]);
    scene.train(&["--overwrite"]).is(73, &["thesis.txt", "nothing was removed"]);
    assert_eq!(files(&scene.out()), ["thesis.txt"]);

    fs::remove_file(scene.out().join("thesis.txt")).unwrap();
    scene.train(&[]).is(0, &[]);
    let before = files(&scene.out());
    scene.train(&[]).is(73, &["not empty"]);
    assert_eq!(files(&scene.out()), before);
    scene.train(&["--overwrite"]).is(0, &[]);
    assert_eq!(files(&scene.out()), before);
}

#[test]
fn a_path_where_no_folder_can_be_created() {
    let scene = Scene::new();
    scene.refuses(&["--output-dir", "rows.jsonl"], 73, &["rows.jsonl", "is a file"]);
    scene.refuses(&["--output-dir", "rows.jsonl/out"], 73, &["rows.jsonl/out"]);
    // Permissions do not stop root, but nobody can create a folder here.
    scene.refuses(&["--output-dir", "/proc/moewarden"], 73, &["/proc/moewarden"]);
}

/// The same command with a file size limit of `bytes`, which looks like a full disk to the process.
fn limited(command: Command, bytes: u64) -> Outcome {
    let mut run = process::Command::new(command.get_program());
    run.args(command.get_args()).current_dir(command.get_current_dir().unwrap());
    // SAFETY: between fork and exec only these two async-signal-safe calls are made.
    unsafe {
        run.pre_exec(move || {
            // With SIGXFSZ ignored, the write fails instead of killing the process.
            libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
            let limit = libc::rlimit { rlim_cur: bytes, rlim_max: bytes };
            if libc::setrlimit(libc::RLIMIT_FSIZE, &limit) == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
        });
    }
    Outcome::of(Command::from_std(run))
}

/// Asserts that no file of a folder is truncated: JSON parses, every row of the log is complete, no temporary file is left.
fn no_file_is_partial(out: &Path) {
    for name in files(out) {
        assert!(!name.contains(".part"), "{name} was left");
        let text = || fs::read_to_string(out.join(&name)).unwrap();
        if name.ends_with(".json") {
            serde_json::from_str::<serde_json::Value>(&text()).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
        if name.ends_with(".jsonl") {
            for line in text().lines() {
                serde_json::from_str::<serde_json::Value>(line).unwrap_or_else(|e| panic!("{name}: {e}: {line}"));
            }
            assert!(text().is_empty() || text().ends_with('\n'), "{name} ends within a row");
        }
    }
}

#[test]
fn a_model_that_does_not_fit_on_the_disk() {
    let scene = Scene::new();
    let weights = fs::metadata(scene.model().join("model.safetensors")).unwrap().len();
    let outcome = limited(scene.run("train", &["--save-rounds", "none"]), weights - 1);
    outcome.is(74, &["final_model", "model.safetensors"]);
    no_file_is_partial(&scene.out());
    assert!(!files(&scene.out()).iter().any(|name| name.contains("final_model")), "{:?}", files(&scene.out()));

    let scene = Scene::new();
    limited(scene.run("train", &["--save-rounds", "full"]), weights - 1).is(74, &["round_1", "model.safetensors"]);
    no_file_is_partial(&scene.out());
}

#[test]
fn a_log_that_does_not_fit_on_the_disk() {
    let scene = Scene::new();
    let rows: Vec<_> = (0..40).map(|i| row(&format!("borrow {i} ladders"))).collect();
    scene.write_rows(&rows);
    let outcome = limited(scene.run("identify", &["--batch-size", "1"]), 4096);
    outcome.is(74, &["metrics.jsonl"]);
    no_file_is_partial(&scene.out());
    assert!(fs::metadata(scene.out().join("metrics.jsonl")).unwrap().len() > 0);
}

/// A small tmpfs, if this process may mount one.
struct Disk<'a>(&'a Path);

impl<'a> Disk<'a> {
    fn mount(at: &'a Path, bytes: u64) -> Option<Self> {
        fs::create_dir(at).unwrap();
        let size = format!("size={bytes}");
        let mount = process::Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(at).output();
        mount.is_ok_and(|output| output.status.success()).then_some(Self(at))
    }
}

impl Drop for Disk<'_> {
    fn drop(&mut self) {
        _ = process::Command::new("umount").arg(self.0).status();
    }
}

#[test]
fn a_disk_that_is_full() {
    let scene = Scene::new();
    let out = scene.out();
    let Some(_disk) = Disk::mount(&out, 256 << 10) else {
        println!("skipped: this process may not mount a file system");
        return;
    };
    scene.train(&["--save-rounds", "none"]).is(74, &["final_model"]);
    no_file_is_partial(&out);
    assert!(files(&out).contains(&"metrics.jsonl".into()));

    // Now there is not even space for the lock file.
    fs::write(out.join("thesis.txt"), vec![b' '; 256 << 10]).unwrap_err();
    scene.train(&["--output-dir", "out/sub"]).is(74, &["out/sub", "No space left"]);
    assert_eq!(files(&out.join("sub")), Vec::<String>::new());
}
