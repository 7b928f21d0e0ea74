//! Resuming after inputs were moved, and after outputs were lost: contents count, not paths.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use crate::program::{Outputs, Ran, model, moewarden, pipe, start, write_rows};
use moewarden::exit;

/// A folder with the copy `old` of a model and the rows `old.json`.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let old = folder.path().join("old");
    fs::create_dir(&old).unwrap();
    for entry in fs::read_dir(model("olmoe")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, old.join(path.file_name().unwrap())).unwrap();
    }
    write_rows(&folder.path().join("old.json"), 6);
    folder
}

/// Two short rounds on the model `name` with the rows `name.json`.
fn train(folder: &Path, name: &str, more: &str) -> Ran {
    let text = format!(
        "train --model-name {name} --dataset-path {name}.json --retain-dataset-path {name}.json --output-dir run --num-rounds 2 \
         --batch-size 2 --top-k-experts 4 --threads 1 --save-rounds delta {more}"
    );
    let mut command = moewarden(0, text.split_whitespace());
    command.current_dir(folder);
    start(command).end()
}

#[test]
fn check_finds_what_a_resumed_run_would_end_with() {
    let folder = folder();
    train(folder.path(), "old", "").ok();
    fs::remove_dir_all(folder.path().join("run/final_model")).unwrap();
    let check = |options: &str| {
        let text = format!(
            "check --model-name old --dataset-path old.json --retain-dataset-path old.json --output-dir run --num-rounds 2 \
             --batch-size 2 --threads 1 --save-rounds delta --resume {options}"
        );
        let mut command = moewarden(0, text.split_whitespace());
        command.current_dir(folder.path());
        start(command).end()
    };
    let ready = check("--top-k-experts 4").ok();
    assert!(ready.out.contains("the run resumes from run/checkpoints/"), "{}", ready.out);
    let other = check("--top-k-experts 3").ended(exit::CONFIG);
    assert!(
        other.err.contains("the checkpoint was made with `top-k-experts: 4`, not `top-k-experts: 3`"),
        "{}",
        other.err
    );
}

#[test]
fn a_link_as_the_output_folder_is_followed_or_refused() {
    let folder = folder();
    let link = |name: &str, target: &str| std::os::unix::fs::symlink(target, folder.path().join(name)).unwrap();
    link("run", "elsewhere");
    for (command, output) in [("train", "run"), ("check", "run"), ("train", "run/"), ("check", "run/sub")] {
        let text = format!(
            "{command} --model-name old --dataset-path old.json --output-dir {output} --top-k-experts 4 --threads 1"
        );
        let mut command = moewarden(0, text.split_whitespace());
        command.current_dir(folder.path());
        let refused = start(command).end().ended(exit::CANNOT_CREATE);
        assert!(refused.err.contains("is a link to `elsewhere`, which does not exist"), "{}", refused.err);
    }
    fs::create_dir(folder.path().join("elsewhere")).unwrap();
    train(folder.path(), "old", "").ok();
    fs::create_dir(folder.path().join("empty")).unwrap();
    link("exported", "empty");
    let text = "export --base old --delta elsewhere/round_1 --output-dir exported/";
    let mut command = moewarden(0, text.split_whitespace());
    command.current_dir(folder.path());
    start(command).end().ok();
    assert!(folder.path().join("empty/model.safetensors").is_file() && folder.path().join("exported").is_symlink());
}

#[test]
fn a_pipe_in_the_place_of_an_output_does_not_stop_a_run_without_end() {
    let folder = folder();
    let run = folder.path().join("run");
    for name in ["metrics.jsonl", "manifest.json", "state.json"] {
        _ = fs::remove_dir_all(&run);
        train(folder.path(), "old", "").ok();
        let checkpoints = fs::read_dir(run.join("checkpoints")).unwrap();
        let newest = checkpoints.map(|entry| entry.unwrap().path()).max().unwrap();
        let path = if name == "metrics.jsonl" { run.join(name) } else { newest.join(name) };
        fs::remove_file(&path).unwrap();
        pipe(&path);
        let ran = train(folder.path(), "old", "--resume");
        assert!(ran.err.contains("pipe (FIFO)") || ran.err.contains("is missing"), "{}: {}", path.display(), ran.err);
    }
    let eval = || {
        let text =
            "eval --model-name old --dataset-path old.json --output-dir eval --max-new-tokens 1 --threads 1 --resume";
        let mut command = moewarden(0, text.split_whitespace());
        command.current_dir(folder.path());
        start(command).end()
    };
    eval().ok();
    for name in ["generations.jsonl", "eval_options.json"] {
        let path = folder.path().join("eval").join(name);
        let kept = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        pipe(&path);
        let ran = eval();
        assert!(ran.code != Some(0) && ran.err.contains("it is a pipe (FIFO), not a file"), "{name}: {}", ran.err);
        fs::remove_file(&path).unwrap();
        fs::write(&path, kept).unwrap();
    }
}

#[test]
fn a_warm_up_without_an_end_is_told() {
    let folder = folder();
    let ran = train(folder.path(), "old", "--warmup-steps 10000000").ok();
    assert!(ran.err.contains("the warm-up of 10000000 steps does not end within its"), "{}", ran.err);
    let ran = train(folder.path(), "old", "--overwrite --expert-lr 1e-30 --router-lr 1e-30").ok();
    assert!(ran.err.contains("training changed no parameter"), "{}", ran.err);
    train(folder.path(), "old", "--overwrite --warmup-steps 10000001").failed(exit::CONFIG, &["at most 10000000"]);
}

#[test]
fn a_run_resumes_where_its_inputs_lie_now() {
    let folder = folder();
    let path = |name: &str| folder.path().join(name);
    train(folder.path(), "old", "").ok();
    let whole = Outputs::read(&path("run"));
    fs::rename(path("old"), path("new")).unwrap();
    fs::rename(path("old.json"), path("new.json")).unwrap();
    let ran = train(folder.path(), "new", "--resume").ok();
    assert!(ran.out.contains("resuming from"), "{}", ran.out);
    let mut resumed = Outputs::read(&path("run"));
    // The metadata quote the paths.
    let metadata = String::from_utf8(resumed.files["training_metadata.json"].clone()).unwrap();
    let metadata = metadata.replace("\"new", "\"old");
    resumed.files.insert("training_metadata.json", metadata.into_bytes());
    resumed.assert_same(&whole, "resumed at another place");
    let resolved = fs::read_to_string(path("run/config.resolved.yaml")).unwrap();
    assert!(resolved.contains("model-name: new"), "{resolved}");

    // Packed, the rows are the same.
    let rows = fs::read(path("new.json")).unwrap();
    let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packed.write_all(&rows).unwrap();
    fs::write(path("new.json"), packed.finish().unwrap()).unwrap();
    train(folder.path(), "new", "--resume").ok();

    // So are they one a line, with the line ends of Windows, and with fields in another order and nulls.
    let mut table: Vec<serde_json::Value> = serde_json::from_slice(&rows).unwrap();
    for row in &mut table {
        let row = row.as_object_mut().unwrap();
        row.insert("documents".into(), serde_json::Value::Null);
        row.sort_keys();
    }
    let lines: String = table.iter().map(|row| format!("{row}\r\n")).collect();
    assert_ne!(lines.as_bytes(), rows);
    fs::write(path("new.json"), lines).unwrap();
    train(folder.path(), "new", "--resume").ok();

    // Another content at the same place is another run, and so is a file more or less.
    write_rows(&path("new.json"), 7);
    train(folder.path(), "new", "--resume")
        .failed(exit::CONFIG, &["checkpoint was made: the tokens of the rows of --dataset-path,"]);
    write_rows(&path("new.json"), 6);
    train(folder.path(), "new", "--resume --eval-dataset-path new.json").failed(exit::CONFIG, &["eval-dataset-path"]);
    let config = fs::read_to_string(path("new/config.json")).unwrap();
    fs::write(path("new/config.json"), config + "\n").unwrap();
    train(folder.path(), "new", "--resume")
        .failed(exit::CONFIG, &["checkpoint was made: config.json of the model (the model is new)"]);
}

#[test]
fn resuming_writes_again_what_is_missing_or_torn() {
    let folder = folder();
    let path = |name: &str| folder.path().join("run").join(name);
    train(folder.path(), "old", "").ok();
    let names = [
        "expert_scores.json",
        "rankings.json",
        "expert_gradients.pkl",
        "training_metadata.json",
        "config.resolved.yaml",
        "round_2/delta.safetensors",
        "final_model/model.safetensors",
        "final_model/config.json",
    ];
    let read = |name: &str| fs::read(path(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
    let whole: Vec<_> = names.map(&read).into();
    let check = |damage: &dyn Fn(&PathBuf)| {
        names.iter().for_each(|name| damage(&path(name)));
        let ran = train(folder.path(), "old", "--resume").ok();
        for (name, bytes) in names.iter().zip(&whole) {
            // The options that were given last.
            let resumed = String::from_utf8_lossy(&read(name)).replace("resume: true", "resume: false");
            let same = read(name) == *bytes || resumed.as_bytes() == bytes;
            assert!(same, "{name} is not what it was\n{}", ran.err);
        }
        ran
    };
    check(&|path| fs::remove_file(path).unwrap());
    let ran = check(&|path| fs::write(path, &fs::read(path).unwrap()[..9]).unwrap());
    assert!(!ran.err.contains("round_1"), "{}", ran.err);
    // Damage that leaves the header and the length.
    for round in ["round_1/delta.safetensors", "round_2/delta.safetensors"] {
        let mut bytes = read(round);
        *bytes.last_mut().unwrap() ^= 1;
        fs::write(path(round), bytes).unwrap();
    }
    let ran = train(folder.path(), "old", "--resume").ended(65);
    assert!(read("round_2/delta.safetensors") == whole[5]);
    assert!(ran.err.contains("round_1 is damaged"), "{}", ran.err);
    // Logs, of which the checkpoint has the rows.
    let log = read("metrics.jsonl");
    let line = log.iter().position(|byte| *byte == b'\n').unwrap();
    let zeroed = [vec![0; line], log[line..].to_vec()].concat();
    for damaged in [None, Some(&[][..]), Some(&log[..line / 2]), Some(&zeroed)] {
        match damaged {
            None => fs::remove_file(path("metrics.jsonl")).unwrap(),
            Some(bytes) => fs::write(path("metrics.jsonl"), bytes).unwrap(),
        }
        let ran = train(folder.path(), "old", "--resume").ended(65);
        assert!(ran.err.contains("metrics.jsonl was changed since the checkpoint"), "{}", ran.err);
        assert!(read("metrics.jsonl") == log);
    }
    // The first round is in no checkpoint: that is said.
    fs::remove_dir_all(path("round_1")).unwrap();
    let ran = train(folder.path(), "old", "--resume").ok();
    assert!(ran.err.contains("round_1 is missing"), "{}", ran.err);
}
