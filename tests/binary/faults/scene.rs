//! A tiny training run: its folder, its processes, and the results of an undisturbed run.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{self, Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use moewarden::checkpoint::Manifest;
use moewarden::exit;
use serde_json::Value;
use tempfile::TempDir;

use super::campaign::repeats;
use crate::golden_copy::golden_copy;
use crate::processes::{MARK, Marked, marked, mpirun};

/// Longer than any run, even if other programs share the cores.
const PATIENCE: Duration = Duration::from_secs(120);

/// All ranks end within this time after a fault is detected; checked in campaigns.
pub const SOON: Duration = Duration::from_secs(10);

/// The same outside of campaigns, where other programs may share the cores; still far below `--timeout`.
const LATE: Duration = Duration::from_secs(60);

/// `--timeout` of the runs in which a rank hangs, in seconds.
pub const TIMEOUT: u64 = 5;

/// How the ranks of a run are started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum By {
    /// As threads of one process.
    Threads,
    /// As processes.
    Mpirun,
}

impl By {
    /// The variants available in this build.
    pub const ALL: &[By] = if cfg!(feature = "mpi") { &[By::Threads, By::Mpirun] } else { &[By::Threads] };

    /// The name in the table.
    pub fn name(self) -> &'static str {
        match self {
            By::Threads => "2 threads",
            By::Mpirun => "2 processes",
        }
    }
}

/// Two ranks train on twelve rows and save at every step: 1 identification with a pause, 6 expert steps, 6 router steps.
const OPTIONS: &str = "--batch-size 1 --threads 1 --top-k-experts 4 --num-rounds 1 --save-rounds none --save-steps 1 \
                       --expert-lr 1e-3 --router-lr 1e-3";

/// Training steps of the run.
pub const STEPS: u64 = 12;

/// Checkpoints of the run: during identification, before each phase, between steps, at the end.
pub const SAVES: u64 = 14;

/// Files without times: they are the same in every run.
const SAME: [&str; 4] =
    ["final_model/model.safetensors", "expert_scores.json", "expert_gradients.pkl", "training_metadata.json"];

/// A folder for one run and its resumed runs.
pub struct Scene {
    temp: TempDir,
}

impl Scene {
    pub fn new() -> Self {
        let scene = Self { temp: tempfile::tempdir().unwrap() };
        let rows: Vec<Value> = serde_json::from_slice(&fs::read(golden().join("data.json")).unwrap()).unwrap();
        let kept = rows.iter().filter(|row| row["judge_success_gpt4"] == 1);
        let rows: Vec<_> = kept.flat_map(|row| [row, row]).collect();
        assert_eq!(rows.len() as u64, STEPS);
        fs::write(scene.path("data.json"), serde_json::to_vec(&rows).unwrap()).unwrap();
        scene
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.temp.path().join(name)
    }

    pub fn out(&self) -> PathBuf {
        self.path("out")
    }

    pub fn checkpoints(&self) -> PathBuf {
        self.out().join("checkpoints")
    }

    /// The arguments of the run; options in `more` replace the run's own.
    pub fn args(&self, more: &str) -> Vec<String> {
        let more: Vec<_> = more.split_whitespace().collect();
        let model = golden().join("model");
        let own = format!("--model-name {} --dataset-path data.json --output-dir out {OPTIONS}", model.display());
        let own: Vec<_> = own.split_whitespace().map(str::to_owned).collect();
        let own = own.chunks(2).filter(|pair| !more.contains(&&*pair[0])).flatten().cloned();
        std::iter::once("train".to_owned()).chain(own).chain(more.iter().map(|&arg| arg.to_owned())).collect()
    }

    /// Starts the run; `fault` is a value of `MOEWARDEN_FAULT`.
    pub fn start(&self, by: By, more: &str, fault: Option<&str>) -> Run {
        let args = self.args(more);
        let mut command = match by {
            By::Threads => Command::new(env!("CARGO_BIN_EXE_moewarden")),
            By::Mpirun => mpirun(),
        };
        match by {
            By::Threads => command.args(args).args(["--ranks", "2"]),
            By::Mpirun => command.args(["-n", "2", env!("CARGO_BIN_EXE_moewarden")]).args(args),
        };
        if let Some(fault) = fault {
            command.env("MOEWARDEN_FAULT", fault);
        }
        self.spawn(command)
    }

    /// Starts a command.
    pub fn spawn(&self, mut command: Command) -> Run {
        static RUNS: AtomicU32 = AtomicU32::new(0);
        let number = RUNS.fetch_add(1, Ordering::Relaxed);
        let log = self.path(&format!("log-{number}.txt"));
        let file = File::create(&log).unwrap();
        let mark = format!("{}-{number}", process::id());
        command.current_dir(self.temp.path()).env(MARK, &mark).env_remove("RUST_BACKTRACE").stdin(Stdio::null());
        command.stdout(file.try_clone().unwrap()).stderr(file);
        Run { child: command.spawn().unwrap(), log, mark, start: Instant::now(), struck: None }
    }

    /// Starts the run and waits for its end.
    pub fn run(&self, by: By, more: &str, fault: Option<&str>) -> Ended {
        self.start(by, more, fault).wait()
    }

    /// Asserts that every checkpoint with a final name is complete.
    pub fn checkpoints_are_whole(&self) {
        for name in names(&self.checkpoints()).iter().filter(|name| !name.starts_with('.')) {
            Manifest::verify(&self.checkpoints().join(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        }
    }

    /// Asserts that the same command with `--resume` finds no damaged checkpoint, succeeds, and is bit-identical to an
    /// undisturbed run.
    pub fn resumes(&self, by: By) {
        self.checkpoints_are_whole();
        let ended = self.run(by, "--resume", None);
        assert!(!ended.text.contains("is skipped"), "{}", ended.text);
        self.equals_undisturbed(&ended);
    }

    /// Asserts that a run succeeded and is bit-identical to an undisturbed run.
    pub fn equals_undisturbed(&self, ended: &Ended) {
        ended.expect(exit::OK, &["have the source's bits"]);
        let (ours, undisturbed) = (self.results(), undisturbed());
        for ((name, found), (_, expected)) in ours.iter().zip(undisturbed) {
            assert!(found == expected, "{name} differs from that of an undisturbed run\n{}", ended.text);
        }
        let left: Vec<_> = names(&self.out()).into_iter().chain(names(&self.checkpoints())).collect();
        assert!(!left.iter().any(|name| name.starts_with('.')), "something is left: {left:?}");
    }

    /// All outputs that do not depend on the time.
    pub fn results(&self) -> Vec<(String, Vec<u8>)> {
        let read = |name: &&str| ((*name).to_owned(), fs::read(self.out().join(name)).unwrap());
        let mut all: Vec<_> = SAME.iter().map(read).collect();
        let rows: String = self.metrics().iter().map(|row| format!("{row}\n")).collect();
        all.push(("metrics.jsonl".into(), rows.into_bytes()));
        all
    }

    /// The rows of metrics.jsonl, without times.
    pub fn metrics(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.out().join("metrics.jsonl")).unwrap();
        let row = |line: &str| {
            let mut row: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            row.as_object_mut().unwrap().remove("seconds").expect("a time");
            row
        };
        text.lines().map(row).collect()
    }
}

/// The outputs of an undisturbed run.
fn undisturbed() -> &'static Vec<(String, Vec<u8>)> {
    static RESULTS: OnceLock<Vec<(String, Vec<u8>)>> = OnceLock::new();
    RESULTS.get_or_init(|| {
        let scene = Scene::new();
        scene.run(By::Threads, "", None).expect(exit::OK, &[]);
        assert_eq!(scene.metrics().len() as u64, 2 * STEPS);
        scene.results()
    })
}

/// The duration of an undisturbed run.
pub fn duration(by: By) -> Duration {
    static BOTH: [OnceLock<Duration>; 2] = [const { OnceLock::new() }; 2];
    *BOTH[by as usize].get_or_init(|| {
        let ended = Scene::new().run(by, "", None);
        ended.expect(exit::OK, &[]);
        ended.took
    })
}

/// The golden case with the model. (16-bit weights: the gathered weights differ from the f32 masters.)
pub fn golden() -> PathBuf {
    golden_copy("olmoe_bf16")
}

/// The names in a folder, sorted; empty if there is no such folder.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A running run.
pub struct Run {
    child: Child,
    log: PathBuf,
    mark: String,
    start: Instant,
    /// The time of the fault.
    struck: Option<Instant>,
}

impl Run {
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap()).into_owned()
    }

    /// The processes that hold ranks.
    pub fn ranks(&self) -> Vec<Marked> {
        let is_ours = |process: &Marked| {
            fs::read_link(format!("/proc/{}/exe", process.pid))
                .is_ok_and(|exe| exe == Path::new(env!("CARGO_BIN_EXE_moewarden")).canonicalize().unwrap())
        };
        marked(&self.mark).into_iter().filter(is_ours).collect()
    }

    /// Waits until `done` holds; false if the run ended before.
    pub fn wait_for(&mut self, mut done: impl FnMut(&Run) -> bool) -> bool {
        while !done(self) {
            if self.child.try_wait().unwrap().is_some() {
                return false;
            }
            assert!(self.start.elapsed() < PATIENCE, "{}", self.text());
            sleep(Duration::from_micros(500));
        }
        true
    }

    /// Sends a signal to the process of a rank; if ranks are threads, to their only process.
    pub fn signal(&mut self, rank: usize, signal: i32) {
        let ranks = self.ranks();
        let number = rank.to_string();
        let of_rank = |p: &&Marked| ranks.len() == 1 || p.var("OMPI_COMM_WORLD_RANK") == Some(&number);
        if let Some(process) = ranks.iter().find(of_rank) {
            process.signal(signal);
            self.struck.get_or_insert_with(Instant::now);
        }
    }

    /// Sends a signal to the process that the test started.
    pub fn signal_launcher(&mut self, signal: i32) {
        // SAFETY: signals a child that has not been waited for.
        unsafe { libc::kill(self.child.id() as i32, signal) };
        self.struck.get_or_insert_with(Instant::now);
    }

    /// Waits for the end of all its processes.
    pub fn wait(mut self) -> Ended {
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break Some(status);
            }
            if self.struck.is_none() && self.text().contains("MOEWARDEN_FAULT: ") {
                self.struck = Some(Instant::now());
            }
            if self.start.elapsed() > PATIENCE {
                self.child.kill().unwrap();
                self.child.wait().unwrap();
                break None;
            }
            sleep(Duration::from_millis(5));
        };
        let end = Instant::now();
        // A killed process takes a moment to vanish.
        while end.elapsed() < Duration::from_secs(5) && !marked(&self.mark).is_empty() {
            sleep(Duration::from_millis(20));
        }
        let left = marked(&self.mark);
        left.iter().for_each(|process| process.signal(libc::SIGKILL));
        let text = self.text();
        let pids: Vec<_> = left.iter().map(|process| process.pid).collect();
        assert!(pids.is_empty(), "processes {pids:?} are left behind\n{text}");
        let status = status.unwrap_or_else(|| panic!("the run does not end\n{text}"));
        let after = self.struck.map_or(Duration::ZERO, |struck| end - struck);
        Ended { code: status.code(), text, took: end - self.start, after }
    }
}

/// The result of a run.
pub struct Ended {
    /// The exit code of the process that the test started; `None` if a signal ended it.
    pub code: Option<i32>,
    /// stdout and stderr of all ranks.
    pub text: String,
    pub took: Duration,
    /// The time from the fault to the end.
    pub after: Duration,
}

impl Ended {
    /// Asserts the exit code and these parts of the output.
    #[track_caller]
    pub fn expect(&self, code: u8, says: &[&str]) {
        assert_eq!(self.code, Some(code.into()), "{}", self.text);
        self.says(says);
    }

    #[track_caller]
    pub fn says(&self, says: &[&str]) {
        for what in says {
            assert!(self.text.contains(what), "{what:?} is not in\n{}", self.text);
        }
    }

    /// Asserts that all ranks ended soon after the fault: `within` if detecting it takes a while.
    #[track_caller]
    pub fn soon(&self, within: Duration) {
        let within = if repeats() > 0 { within } else { within.max(LATE) };
        assert!(self.after <= within, "{:?} passed between the fault and the end\n{}", self.after, self.text);
    }

    /// Asserts that the run neither succeeded nor asks for a requeue.
    #[track_caller]
    pub fn failed(&self) {
        let good = [exit::OK, exit::REQUEUE].map(|code| Some(i32::from(code)));
        assert!(!good.contains(&self.code), "{:?}\n{}", self.code, self.text);
    }
}
