//! Progress bars, on a terminal that the test holds.

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use serde_json::json;

use crate::download::Scene;
use crate::golden_copy::golden_copy;
use crate::program::{moewarden, start, write_rows};

/// Runs a command on a terminal of 160 columns; returns what it drew, and how long it ran.
fn on_a_terminal(mut command: Command) -> (String, Duration) {
    let mut size = libc::winsize { ws_row: 40, ws_col: 160, ws_xpixel: 0, ws_ypixel: 0 };
    let (mut ours, mut theirs) = (0, 0);
    let (no_name, no_modes) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the pointers are to live values or null.
    let opened = unsafe { libc::openpty(&raw mut ours, &raw mut theirs, no_name, no_modes, &raw mut size) };
    assert_eq!(opened, 0, "{}", std::io::Error::last_os_error());
    // SAFETY: both were just opened and have no other owner.
    let [mut ours, theirs] = unsafe { [File::from_raw_fd(ours), File::from_raw_fd(theirs)] };
    let end = || Stdio::from(OwnedFd::from(theirs.try_clone().unwrap()));
    let clock = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(end()).stderr(end()).env("TERM", "xterm").spawn().unwrap();
    drop((theirs, command)); // so that reading ends with the process
    let mut drawn = Vec::new();
    _ = ours.read_to_end(&mut drawn); // Linux ends it by an error
    assert!(child.wait().unwrap().success(), "{}", String::from_utf8_lossy(&drawn));
    (String::from_utf8_lossy(&drawn).into_owned(), clock.elapsed())
}

/// Asserts that some drawing of a bar has all these parts on one line.
#[track_caller]
fn shows(drawn: &str, parts: &[&str]) {
    let mut lines = drawn.split(['\r', '\n']);
    assert!(lines.any(|line| parts.iter().all(|part| line.contains(part))), "no line has {parts:?}:\n{drawn}");
}

fn on_rows(command: &str, options: &str, more: &[&str]) -> (tempfile::TempDir, Command) {
    let temp = tempfile::tempdir().unwrap();
    write_rows(&temp.path().join("rows.json"), 12);
    std::fs::write(temp.path().join("experts"), "0.1 1.2").unwrap();
    let model = golden_copy("olmoe").join("model");
    let words =
        [command, "--model-name", model.to_str().unwrap(), "--dataset-path", "rows.json", "--output-dir", "out"];
    let options: Vec<&str> = options.split(' ').collect();
    let mut command = moewarden(0, [&words[..], &options, more].concat());
    command.current_dir(temp.path());
    (temp, command)
}

fn train(more: &[&str]) -> (tempfile::TempDir, Command) {
    on_rows("train", "--top-k-experts 2 --batch-size 2 --num-rounds 1 --save-rounds none", more)
}

#[test]
fn a_terminal_shows_bars_with_the_rate_and_the_time_left() {
    let (_temp, command) = train(&[]);
    let (drawn, _) = on_a_terminal(command);
    shows(&drawn, &["round 1 identify", "tokens/s", " left]"]);
    shows(&drawn, &["round 1 expert", "tokens/s", " left]"]);
    let (_temp, command) = train(&["--quiet"]);
    let (drawn, _) = on_a_terminal(command);
    assert!(!drawn.contains("left]") && !drawn.contains("tokens/s"), "{drawn}");
}

#[test]
fn without_a_terminal_nothing_is_drawn() {
    let (_temp, command) = train(&[]);
    let ran = start(command).end().ok();
    for text in [&ran.out, &ran.err] {
        assert!(!text.contains(['\r', '\u{1b}']), "{text:?}");
    }
    assert!(ran.out.contains("round 1 identify 6/6"), "{}", ran.out);
}

#[test]
fn lines_lead_through_the_phases_of_every_long_command() {
    let compare = "--eval-dataset-path rows.json --methods gradient --top-k-experts 2 --batch-size 2 --num-rounds 1 \
                   --eval-max-new-tokens 2";
    let training = ["round 1 identify ", "round 1 experts ", "round 1 routers "];
    for (command, options, phases) in [
        ("identify", "--top-k-experts 2 --batch-size 2", &["round 1 identify "][..]),
        ("eval", "--max-new-tokens 2", &["routing ", "answers "]),
        (
            "ablate",
            "--experts experts --random-sets 2 --max-new-tokens 2 --batch-size 4",
            &["own replies 12/12 ", "untouched model ", "sets switched off "],
        ),
        ("compare", compare, &[&["routing ", "answers "], &training[..]].concat()),
    ] {
        let (_temp, command_line) = on_rows(command, options, &[]);
        let ran = start(command_line).end().ok();
        for phase in phases {
            // The last line of a phase has all of its work.
            let last = ran.out.lines().rfind(|line| line.starts_with(phase) && line.ends_with("tokens/s"));
            let last = last.unwrap_or_else(|| panic!("{command} has no line of {phase:?}:\n{}", ran.out));
            let counts = last.split(' ').find_map(|word| word.split_once('/')).expect(last);
            assert_eq!(counts.0, counts.1, "{command}: {last}");
        }
    }
}

#[test]
fn a_download_shows_bytes() {
    let (drawn, _) = on_a_terminal(Scene::new().check(&["--download"]));
    shows(&drawn, &["downloading org/tiny", "B/", "left]"]);
}

/// Work that a bar of the command does not count step by step: it is shown where it takes more than a second, which a longer
/// answer always does.
#[test]
fn long_work_shows_its_own_bar() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model");
    let extra = json!({"max_position_embeddings": 1 << 20, "eos_token_id": 319}).as_object().unwrap().clone();
    write_random_checkpoint(&model, &TinySpec { vocab_size: 320, extra, ..TinySpec::new("olmoe") }).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(golden_copy("olmoe").join("model").join(name), model.join(name)).unwrap();
    }
    write_rows(&temp.path().join("rows.json"), 4);
    let mut tokens = 64;
    let drawn = loop {
        let longest = tokens.to_string();
        let words =
            ["eval", "--model-name", "model", "--dataset-path", "rows.json", "--output-dir", "out", "--overwrite"];
        let mut command = moewarden(0, [&words[..], &["--max-new-tokens", &longest]].concat());
        command.current_dir(temp.path());
        let (drawn, took) = on_a_terminal(command);
        if took > Duration::from_secs(6) {
            break drawn;
        }
        tokens *= 2;
    };
    shows(&drawn, &["8 answers", "tokens/s", " left]"]);
}
