//! Resumed runs: bit-identical from every checkpoint; with another number of ranks the same steps; damaged checkpoints are
//! skipped; and signals save a checkpoint.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::comparison::{TRAINED_WEIGHTS, check_close};
use crate::program::{self, Outputs, Ran, Running, moewarden, start, write_rows};
use moewarden::exit;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

/// A run, without its output folder.
#[derive(Clone, Copy)]
struct Job {
    model: &'static str,
    rows: usize,
    options: &'static str,
}

/// Two rounds of five steps per phase: on one rank with `--batch-size 2`, on two ranks with 1. Identification pauses once.
const ALTERNATE: Job =
    Job { model: "olmoe", rows: 9, options: "--num-rounds 2 --expert-lr 1e-3 --router-lr 1e-3 --safe-response No." };

/// The ranks of a run.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Team {
    Threads(usize),
    #[cfg_attr(not(feature = "mpi"), allow(dead_code))]
    Processes(usize),
}

#[cfg(feature = "mpi")]
use Team::Processes;
use Team::Threads;

impl Job {
    fn start(&self, output: &Path, team: Team, more: &str) -> Running {
        start(self.command(output, team, more))
    }

    fn command(&self, output: &Path, team: Team, more: &str) -> Command {
        let data = output.with_file_name("rows.json");
        if !data.exists() {
            write_rows(&data, self.rows);
        }
        let (processes, ranks) = match team {
            Threads(n) => (0, format!("--ranks {n}")),
            Team::Processes(n) => (n, String::new()),
        };
        let rounds = if more.contains("--save-rounds") { "" } else { "--save-rounds none" };
        let text = format!(
            "train --model-name {} --dataset-path {} --output-dir {} {ranks} {} {more} --top-k-experts 4 {rounds} \
             --threads 1",
            program::model(self.model).display(),
            data.display(),
            output.display(),
            self.options.replace("{DATA}", &data.display().to_string()),
        );
        moewarden(processes, text.split_whitespace())
    }

    fn run(&self, output: &Path, team: Team, more: &str) -> Ran {
        self.start(output, team, more).end()
    }

    /// A run that saves at every step and keeps everything.
    fn run_saving(&self, output: &Path, team: Team, more: &str) -> Outputs {
        self.run(output, team, &format!("{more} --save-steps 1 --keep-checkpoints 1000")).ok();
        Outputs::read(output)
    }
}

/// The names of a run's checkpoints, oldest first.
fn checkpoints(run: &Path) -> Vec<String> {
    let names = fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let place = |name: &str| {
        let [round, phase, step] = name.split('-').collect::<Vec<_>>().try_into().ok()?;
        let phase = ["identify", "expert", "router", "joint"].iter().position(|p| *p == phase)?;
        let number = |text: &str| text.split_once('_')?.1.parse::<usize>().ok();
        Some((number(round)?, phase, number(step)?))
    };
    let mut names: Vec<String> = names.collect();
    names.sort_by_key(|name| place(name).unwrap_or_else(|| panic!("{name} in checkpoints")));
    names
}

/// Copies the output folder of a finished run as it was after this checkpoint, except that the logs are longer.
fn cut_at(run: &Path, checkpoint: &str, copy: &Path) {
    let folder = Path::new("checkpoints").join(checkpoint);
    fs::create_dir_all(copy.join(&folder)).unwrap();
    let files = fs::read_dir(run.join(&folder)).unwrap().map(|file| folder.join(file.unwrap().file_name()));
    let logs =
        ["metrics.jsonl", "expert_scores.json", "rankings.json", "training_metadata.json", "expert_gradients.pkl"];
    for file in files.chain(logs.map(PathBuf::from)) {
        fs::copy(run.join(&file), copy.join(&file)).unwrap();
    }
}

/// Resumes from every `stride`th checkpoint of a run; returns the outputs with the names of the checkpoints.
fn resumed(job: &Job, run: &Path, stride: usize, team: Team, more: &str) -> Vec<(String, Outputs)> {
    let all = checkpoints(run);
    let chosen = all.into_iter().step_by(stride);
    let resume = |checkpoint: String| {
        let copy = run.with_extension(format!("from-{checkpoint}"));
        cut_at(run, &checkpoint, &copy);
        let ran = job.run(&copy, team, &format!("{more} --resume")).ok();
        assert!(ran.out.contains(&format!("checkpoints/{checkpoint}")), "{}", ran.out);
        let outputs = Outputs::read(&copy);
        fs::remove_dir_all(&copy).unwrap();
        (checkpoint, outputs)
    };
    chosen.map(resume).collect()
}

/// Resumes a run of two rounds from each of its checkpoints with the same number of ranks.
fn check_every_step(team: Team, more: &str) {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let whole = ALTERNATE.run_saving(&run, team, more);
    assert_eq!(whole.metrics.iter().filter(|row| row["phase"] != "identify").count(), 20);
    // In each round one during identification, five per phase, and one at the end.
    assert_eq!(checkpoints(&run).len(), 2 * 12, "{:?}", checkpoints(&run));
    for (from, outputs) in resumed(&ALTERNATE, &run, 1, team, more) {
        outputs.assert_same(&whole, &format!("{team:?}, {from}"));
    }
}

#[test]
fn one_rank_resumes_from_every_step() {
    check_every_step(Threads(1), "--batch-size 2");
}

#[test]
fn two_ranks_resume_from_every_step() {
    check_every_step(Threads(2), "--batch-size 1");
}

#[test]
fn other_modes_and_schedules_resume() {
    let kinds = [
        ("olmoe", "--num-rounds 1 --use-router-consistency-loss --router-lr 1e-3 --batch-size 2"),
        ("olmoe_bf16", "--num-rounds 1 --mode baseline --router-lr 1e-3 --batch-size 1"),
        ("olmoe_fused", "--num-rounds 2 --selection per-batch --skip-router-training --batch-size 1"),
        ("olmoe", "--num-rounds 3 --skip-router-training --batch-size 1 --identify-until 1 --score-norm layer"),
        ("olmoe", "--num-rounds 2 --skip-router-training --batch-size 1 --method random --random-match layer"),
        (
            "olmoe_bf16",
            "--num-rounds 2 --method random --router-lr 1e-3 --batch-size 1 --retain-dataset-path {DATA} \
             --retain-routing-weight 0.5",
        ),
        ("olmoe", "--num-rounds 1 --mode baseline --router-lr 1e-3 --batch-size 2 --retain-dataset-path {DATA}"),
        (
            "olmoe",
            "--num-rounds 1 --method random --router-lr 1e-3 --batch-size 1 --router-epochs-per-round 2 \
             --router-target round-start --router-last-tokens 1",
        ),
        (
            "olmoe",
            "--num-rounds 1 --method routing --risk-threshold -1 --batch-size 1 --lr-schedule cosine --warmup-steps 2 \
             --expert-epochs-per-round 2",
        ),
    ];
    let more = "--expert-lr 1e-3 --safe-response No.";
    for (model, options) in kinds {
        let job = Job { model, rows: 9, options };
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let whole = job.run_saving(&run, Threads(2), more);
        for (from, outputs) in resumed(&job, &run, 3, Threads(2), more) {
            outputs.assert_same(&whole, &format!("{options}, {from}"));
        }
    }
}

#[test]
fn another_number_of_ranks_takes_the_same_steps() {
    let alternate = "--num-rounds 1 --safe-response No. --batch-size 1 --expert-lr 1e-3 --router-lr 1e-3";
    let choosing = "--num-rounds 1 --safe-response No. --batch-size 2 --expert-lr 1e-3 --selection per-batch \
                    --use-router-consistency-loss";
    // Enough rows that identification on four ranks pauses.
    for (rows, writers, readers, options, more) in [
        (18, 4, &[1, 2][..], alternate, ""),
        (18, 1, &[3], alternate, "--grad-accum 4"),
        (9, 3, &[2], choosing, "--grad-accum 1"),
    ] {
        let job = Job { rows, options, ..ALTERNATE };
        let dir = tempfile::tempdir().unwrap();
        let run = dir.path().join("run");
        let whole = job.run_saving(&run, Threads(writers), more);
        for readers in readers {
            for (from, outputs) in resumed(&job, &run, 4, Threads(*readers), more) {
                // Partial scores are added up in a different order.
                let what = format!("{options}: {writers} → {readers} ranks, {from}");
                check_close(&whole, &outputs, TRAINED_WEIGHTS, &what);
            }
        }
    }
}

#[cfg(feature = "mpi")]
#[test]
fn threads_resume_a_run_of_processes() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let whole = ALTERNATE.run_saving(&run, Processes(2), "--batch-size 1");
    for (from, outputs) in resumed(&ALTERNATE, &run, 9, Threads(2), "--batch-size 1") {
        outputs.assert_same(&whole, &format!("processes → threads, {from}"));
    }
}

// --- which checkpoint --------------------------------------------------------------------------------------------------

#[test]
fn the_newest_valid_checkpoint_of_the_same_run_is_used() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let team = Threads(2);
    ALTERNATE.run(&run, team, "--batch-size 1 --save-steps 1 --keep-checkpoints 3").ok();
    let whole = Outputs::read(&run);
    let kept = checkpoints(&run);
    assert_eq!(kept, ["round_2-router-step_3", "round_2-router-step_4", "round_3-identify-step_0"], "the newest three");
    let resume = |more: &str| ALTERNATE.run(&run, team, &format!("--resume --keep-checkpoints 3 {more}"));

    // Resumed after its end: nothing is trained, nothing changes.
    resume("--batch-size 1").ok();
    Outputs::read(&run).assert_same(&whole, "resumed at the end");
    assert_eq!(checkpoints(&run), kept);

    resume("--batch-size 1 --seed 7").failed(exit::CONFIG, &["seed: 42", "seed: 7"]);
    resume("--batch-size 2").failed(exit::CONFIG, &["batch-size: 1", "batch-size: 2"]);
    let rows = run.with_file_name("rows.json");
    write_rows(&rows, ALTERNATE.rows + 1);
    resume("--batch-size 1").failed(exit::CONFIG, &["data", "--overwrite"]);
    write_rows(&rows, ALTERNATE.rows);

    // Leftovers of a killed run are ignored, and removed with the next checkpoint.
    let left = run.join("checkpoints/.round_2-router-step_2.partial");
    fs::create_dir(&left).unwrap();
    fs::write(left.join("state.json"), "{").unwrap();
    fs::remove_dir_all(run.join("checkpoints").join(&kept[2])).unwrap();
    resume("--batch-size 1").ok();
    Outputs::read(&run).assert_same(&whole, "resumed beside a partial checkpoint");
    assert!(!left.exists());
    assert_eq!(checkpoints(&run), kept);

    // A damaged checkpoint is skipped for the one before it; without a valid one the run cannot resume.
    let damage = |checkpoint: &str, file: &str| {
        let path = run.join("checkpoints").join(checkpoint).join(file);
        let mut bytes = fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    damage(&kept[2], "weights.safetensors");
    damage(&kept[1], "optimizer-1-of-2.safetensors");
    let ran = resume("--batch-size 1").ok();
    for (checkpoint, file) in [(&kept[2], "weights.safetensors"), (&kept[1], "optimizer-1-of-2.safetensors")] {
        let said = ran.err.lines().any(|line| {
            line.contains("is skipped") && [checkpoint, file, "hash"].iter().all(|part| line.contains(part))
        });
        assert!(said, "nothing of {file} in {checkpoint}: {}", ran.err);
    }
    assert!(ran.out.contains(&format!("resuming from {}", run.join("checkpoints").join(&kept[0]).display())));
    Outputs::read(&run).assert_same(&whole, "resumed from the last valid checkpoint");
    assert_eq!(checkpoints(&run), kept, "the damaged checkpoints were replaced");

    for checkpoint in checkpoints(&run) {
        fs::remove_file(run.join("checkpoints").join(checkpoint).join("manifest.json")).unwrap();
    }
    resume("--batch-size 1").failed(exit::DATA, &["is skipped", "manifest.json", "are damaged", "--overwrite"]);
}

/// Changes a JSON file of a checkpoint, and its entry in the manifest.
fn change(checkpoint: &Path, file: &str, change: &dyn Fn(&mut Value)) {
    let [path, manifest] = [file, "manifest.json"].map(|name| checkpoint.join(name));
    let read = |path: &Path| serde_json::from_slice::<Value>(&fs::read(path).unwrap()).unwrap();
    let mut content = read(&path);
    change(&mut content);
    let bytes = content.to_string().into_bytes();
    let mut entries = read(&manifest);
    entries["files"][file] = json!({"bytes": bytes.len(), "blake3": blake3::hash(&bytes).to_string()});
    fs::write(&path, bytes).unwrap();
    fs::write(manifest, serde_json::to_vec_pretty(&entries).unwrap()).unwrap();
}

#[test]
fn a_checkpoint_whose_hash_fits_is_held_against_the_model_and_the_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let job = Job { rows: 3, options: "--num-rounds 1 --safe-response No.", ..ALTERNATE };
    job.run_saving(&run, Threads(1), "--batch-size 2");
    let copy = dir.path().join("copy");
    let refuses = |checkpoint: &str, file: &str, says: &str, changed: &dyn Fn(&mut Value)| {
        cut_at(&run, checkpoint, &copy);
        change(&copy.join("checkpoints").join(checkpoint), file, changed);
        job.run(&copy, Threads(1), "--batch-size 2 --resume").failed(exit::DATA, &[says]);
        fs::remove_dir_all(&copy).unwrap();
    };
    let set = |pointer: &'static str, value: Value| {
        move |state: &mut Value| *state.pointer_mut(pointer).unwrap() = value.clone()
    };
    let step = "round_1-router-step_1";
    let cases = [
        ("it is of 0 ranks", set("/world_size", json!(0))),
        ("but 1 of them have a file optimizer-*", set("/world_size", json!(2))),
        ("but 1 of them have a file optimizer-*", set("/world_size", json!(1u64 << 60))),
        ("in steps of 0", set("/step_ranks", json!(0))),
        ("in steps of", set("/step_ranks", json!(1u64 << 60))),
        ("its position is round_1-router-step_2", set("/position/step", json!(2))),
        ("its position is round_3-router-step_1", set("/position/round", json!(2))),
        ("steps of a training phase are done", set("/so_far/steps", json!(7))),
        ("the progress of its phase is missing", set("/so_far", Value::Null)),
        ("other layers or experts", set("/outputs/scores/num_experts", json!(7))),
        ("other layers or experts", set("/outputs/scores/layers", json!([0]))),
        ("selects expert 8 of layer 0", set("/outputs/scores/rounds/1/selected", json!([[0, 8]]))),
        ("selects expert 0 of layer 99", set("/outputs/scores/rounds/1/selected", json!([[99, 0]]))),
        ("scores of round 1 are not those of", set("/outputs/scores/rounds/1/scores/0", json!([1.0]))),
        ("scores of round 1 are not those of", set("/outputs/scores/rounds/1/scores", json!([[]]))),
        ("the scores of round 1 are missing", set("/outputs/scores/rounds", json!({}))),
        ("is damaged: the field scores is missing", set("/outputs/scores/rounds/1", json!({}))),
        ("the loads of the checkpoint are not those", set("/so_far/loads/counts", json!([[1]]))),
    ];
    for (says, changed) in cases {
        refuses(step, "state.json", says, &changed);
    }
    let scan = "round_1-identify-step_1";
    if checkpoints(&run).iter().any(|name| name == scan) {
        let sums = |sums: &mut Value| drop(sums["sums"]["sums"].as_array_mut().unwrap().pop());
        refuses(scan, "identify-0-of-1.json", "not of this model's layers and experts", &sums);
    }
}

/// Flips one bit of the last weight in the model of a round.
fn flip(run: &Path, round: &str) {
    let path = run.join(round).join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn flipped_weights_of_a_finished_round_are_noticed() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    let options = "--num-rounds 2 --skip-router-training --safe-response No.";
    let job = Job { model: "olmoe_fused", rows: 3, options };
    job.run(&run, Threads(1), "--save-rounds full").ok();
    let again = || job.run(&run, Threads(1), "--save-rounds full --resume");
    let resume = || again().ok();
    let ran = resume();
    assert!(!ran.err.contains("damaged") && !ran.out.contains("not verified"), "{}{}", ran.out, ran.err);
    // Another file than the weights: the message says so, and names no damage of the weights.
    let config = run.join("round_1/config.json");
    let whole = fs::read(&config).unwrap();
    fs::write(&config, [&whole, &b"\n"[..]].concat()).unwrap();
    let ran = again().ended(65);
    assert!(ran.err.contains("round_1 has the weights of its round, but not the files"), "{}", ran.err);
    fs::write(&config, whole).unwrap();
    let read = |round: &str| fs::read(run.join(round).join("model.safetensors")).unwrap();
    let last = read("round_2");
    ["round_1", "round_2"].iter().for_each(|round| flip(&run, round));
    fs::remove_dir_all(run.join("final_model")).unwrap();
    let ran = again().ended(65);
    assert!(ran.err.contains("round_1 is damaged") && !ran.err.contains("round_2"), "{}", ran.err);
    assert!(ran.err.contains("or delete these folders, and --resume ends"), "{}", ran.err);
    assert!(read("round_2") == last, "the last round is written again");
    assert!(read("final_model") == last, "so is all that can be");
    // A part of a model is damage, too.
    fs::remove_file(run.join("round_1/config.json")).unwrap();
    again().ended(65);
    let damaged = dir.path().join("damaged");
    fs::rename(run.join("round_1"), &damaged).unwrap();
    let ran = resume();
    assert!(ran.err.contains("round_1 is missing") && !ran.err.contains("error"), "{}", ran.err);
    fs::rename(&damaged, run.join("round_1")).unwrap();
    fs::copy(run.join("final_model/config.json"), run.join("round_1/config.json")).unwrap();

    // Checkpoints of earlier versions have no hashes.
    let newest = checkpoints(&run).pop().unwrap();
    let forget = |state: &mut Value| drop(state["outputs"].as_object_mut().unwrap().remove("round_weights").unwrap());
    change(&run.join("checkpoints").join(newest), "state.json", &forget);
    let ran = resume();
    assert!(ran.out.contains("round_1 is complete, but its weights are not verified"), "{}", ran.out);
    assert!(!ran.err.contains("damaged"), "{}", ran.err);
}

#[test]
fn without_a_checkpoint_resume_starts_from_the_beginning() {
    let dir = tempfile::tempdir().unwrap();
    let job = Job { rows: 3, options: "--num-rounds 1 --skip-router-training", ..ALTERNATE };
    let [new, plain] = ["new", "plain"].map(|name| dir.path().join(name));
    job.run(&new, Threads(1), "--resume").ok();
    job.run(&plain, Threads(1), "").ok();
    Outputs::read(&new).assert_same(&Outputs::read(&plain), "resumed from nothing");

    // What is no interrupted run is not replaced: a finished model, or files of others.
    fs::remove_dir_all(new.join("checkpoints")).unwrap();
    let foreign = dir.path().join("foreign");
    fs::create_dir_all(foreign.join("round_1")).unwrap();
    fs::write(foreign.join("round_1/mine.txt"), "mine").unwrap();
    for (folder, held) in [(&new, "final_model"), (&foreign, "round_1/mine.txt")] {
        let said = format!("holds {held}, but no checkpoint");
        job.run(folder, Threads(1), "--resume").failed(exit::CANNOT_CREATE, &[&said]);
    }
    Outputs::read(&new).assert_same(&Outputs::read(&plain), "refused");
    assert_eq!(fs::read_to_string(foreign.join("round_1/mine.txt")).unwrap(), "mine");
}

// --- signals -----------------------------------------------------------------------------------------------------------

/// From a signal to the end of the process. A step of these models takes a tenth of a second on idle cores.
const SOON: Duration = Duration::from_secs(60);

/// Interrupts a run at random times and resumes it until it ends by itself.
fn check_interrupted(team: Team, signals: &[i32], seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    // Longer replies than elsewhere, so that there is time to interrupt the run.
    let job = Job { options: "--num-rounds 2 --expert-lr 1e-3 --router-lr 1e-3", ..ALTERNATE };
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let [plain, run] = ["plain", "run"].map(|name| dir.path().join(name));
    let under_way = |output: &Path, more: &str| {
        let config = output.join("config.resolved.yaml");
        fs::remove_file(&config).ok();
        let mut running = job.start(output, team, more);
        assert!(running.wait_for(|| config.exists()), "{}", running.end().err);
        running
    };
    let uninterrupted = under_way(&plain, "--batch-size 1");
    let start = Instant::now();
    uninterrupted.end().ok();
    let mut longest = start.elapsed() / 8;
    let mut times = 0;
    loop {
        let more = if times == 0 { "--batch-size 1 --overwrite" } else { "--batch-size 1 --resume" };
        let running = under_way(&run, more);
        sleep(longest.mul_f64(random.random_range(0.0..1.0)));
        running.signal(signals[times % signals.len()]);
        let signalled = Instant::now();
        let ran = running.end();
        if ran.code == Some(exit::OK.into()) {
            // It ended before the signal.
            if times > 2 {
                break;
            }
            (times, longest) = (0, longest / 2);
            continue;
        }
        assert!(signalled.elapsed() < SOON, "{:?}", signalled.elapsed());
        assert!(ran.err.contains("saved") && ran.err.contains("--resume"), "{}", ran.err);
        ran.ended(exit::REQUEUE);
        times += 1;
        // The machine may become slower, and a signal before the first step makes no progress.
        longest = longest.mul_f64(1.1);
    }
    Outputs::read(&run).assert_same(&Outputs::read(&plain), &format!("{team:?}, interrupted {times} times"));
}

#[test]
fn an_interrupted_rank_resumes() {
    check_interrupted(Threads(1), &[libc::SIGUSR1, libc::SIGTERM], 1);
}

#[test]
fn interrupted_ranks_resume() {
    check_interrupted(Threads(2), &[libc::SIGTERM, libc::SIGUSR1], 2);
}

/// `identify` writes no checkpoints.
#[test]
fn an_interrupted_identify_reports_that_nothing_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let [rows, output] = ["rows.json", "run"].map(|name| dir.path().join(name));
    write_rows(&rows, 100);
    let [model, data, dir] = [program::model("olmoe"), rows, output.clone()].map(|path| path.display().to_string());
    let args = ["identify", "--model-name", &model, "--dataset-path", &data, "--output-dir", &dir, "--ranks", "2"];
    let mut running = start(moewarden(0, args.into_iter().chain(["--batch-size", "1", "--top-k-experts", "4"])));
    assert!(running.wait_for(|| output.join("config.resolved.yaml").exists()));
    running.signal(libc::SIGTERM);
    running.end().failed(exit::TERMINATED, &["nothing was saved"]);
    assert!(!output.join("expert_scores.json").exists());
}

/// `mpirun` forwards SIGUSR1 to its processes. (On SIGTERM it kills them.)
#[cfg(feature = "mpi")]
#[test]
fn interrupted_processes_resume() {
    check_interrupted(Processes(2), &[libc::SIGUSR1], 3);
}

/// As when a scheduler preempts one machine.
#[cfg(feature = "mpi")]
#[test]
fn a_signal_to_one_process_stops_all() {
    let dir = tempfile::tempdir().unwrap();
    let [plain, run] = ["plain", "run"].map(|name| dir.path().join(name));
    ALTERNATE.run(&plain, Processes(2), "--batch-size 1").ok();
    let mut running = ALTERNATE.start(&run, Processes(2), "--batch-size 1");
    assert!(running.wait_for(|| run.join("config.resolved.yaml").exists()));
    let one = processes_with(&run).pop().expect("two are running");
    // SAFETY: signals a process that this test has started.
    assert_eq!(unsafe { libc::kill(one, libc::SIGTERM) }, 0);
    running.end().failed(exit::REQUEUE, &["stopped by a signal, and saved"]);
    ALTERNATE.run(&run, Processes(2), "--batch-size 1 --resume").ok();
    Outputs::read(&run).assert_same(&Outputs::read(&plain), "one of two processes was signalled");
}

/// The processes of the binary with this folder among their arguments.
#[cfg(feature = "mpi")]
fn processes_with(folder: &Path) -> Vec<i32> {
    let folder = folder.to_str().unwrap();
    let numbers = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let has_it = |pid: &i32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        let mut args = line.split('\0');
        args.next() == Some(env!("CARGO_BIN_EXE_moewarden")) && args.any(|arg| arg == folder)
    };
    numbers.filter(has_it).collect()
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let [plain, run] = ["plain", "run"].map(|name| dir.path().join(name));
    let job = Job { rows: 5, options: "--num-rounds 1 --batch-size 1 --expert-lr 1e-3 --router-lr 1e-3", ..ALTERNATE };
    job.run(&plain, Threads(1), "").ok();
    let whole = Outputs::read(&plain);
    for signal in [libc::SIGTERM, libc::SIGUSR1] {
        let more = if run.exists() { "--overwrite" } else { "" };
        // The run saves the first two steps and hangs at the third.
        let mut hanging = job.command(&run, Threads(1), &format!("{more} --save-steps 1"));
        hanging.env("MOEWARDEN_FAULT", "rank=0,at=step:3,do=hang");
        let mut running = start(hanging);
        let saved = run.join("checkpoints/round_1-expert-step_2");
        assert!(running.wait_for(|| saved.exists()), "{}", running.end().err);
        running.signal(signal);
        sleep(Duration::from_millis(300));
        let second = Instant::now();
        running.signal(signal);
        running.end().ended(128 + signal as u8);
        assert!(second.elapsed() < SOON, "{:?}", second.elapsed());
        let ran = job.run(&run, Threads(1), "--resume").ok();
        assert!(ran.out.contains("round_1-expert-step_2"), "{}", ran.out);
        Outputs::read(&run).assert_same(&whole, "after a second signal");
    }
}
