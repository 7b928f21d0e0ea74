//! The batch scripts of `launch/` with the real binary and real MPI, on a private SLURM of two nodes: see
//! `tests/mpi/cluster.sh`. Where that cannot run, a line says so.

use crate::golden_copy::golden_copy;
use std::fs;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{OnceLock, PoisonError, RwLockReadGuard};
use std::thread;
use std::time::{Duration, Instant};

use moewarden::exit;
use tempfile::TempDir;

use crate::CORES;

const BINARY: &str = env!("CARGO_BIN_EXE_moewarden");

const MINUTE: Duration = Duration::from_secs(60);

/// For a whole training: the ranks of two jobs may share two cores, and poll.
const WHOLE: Duration = Duration::from_secs(300);

/// Two ranks, one a node.
const TWO_NODES: &str = "slurm-multi.sbatch --ntasks-per-node=1 --gpus-per-task=1 --cpus-per-task=1";

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The options of a training on the tiny model.
fn training(output: &Path, more: &str) -> Vec<String> {
    let case = golden_copy("olmoe_bf16");
    let (model, rows, output) = (case.join("model"), case.join("data.json"), output);
    let paths =
        format!("--model-name {} --dataset-path {} --output-dir {}", model.display(), rows.display(), output.display());
    let options = "--device cpu --threads 1 --batch-size 1 --top-k-experts 4 --num-rounds 1 --save-rounds none";
    format!("{paths} {options} {more}").split_whitespace().map(str::to_owned).collect()
}

/// Some seconds of training, which only the signals of these tests cut short.
const LONG: &str = if cfg!(debug_assertions) {
    "--expert-epochs-per-round 60 --skip-router-training"
} else {
    "--expert-epochs-per-round 2000 --skip-router-training"
};

/// All weights of a finished training.
fn weights(output: &Path) -> blake3::Hash {
    let dir = output.join("final_model");
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "safetensors"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} holds no weights", dir.display());
    let mut hasher = blake3::Hasher::new();
    for file in files {
        hasher.update(&fs::read(file).unwrap());
    }
    hasher.finalize()
}

/// The weights after [`LONG`] by two ranks in one process, without SLURM, MPI or interruption.
fn expected_weights() -> blake3::Hash {
    static WEIGHTS: OnceLock<blake3::Hash> = OnceLock::new();
    *WEIGHTS.get_or_init(|| {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("out");
        let ran =
            Command::new(BINARY).arg("train").args(training(&output, LONG)).args(["--ranks", "2"]).output().unwrap();
        assert!(ran.status.success(), "{}{}", text(&ran.stdout), text(&ran.stderr));
        weights(&output)
    })
}

/// A running SLURM and the folder for all that a test writes.
struct Cluster {
    dir: TempDir,
    /// No launch of `collective` runs meanwhile.
    _cores: RwLockReadGuard<'static, ()>,
}

impl Cluster {
    /// None, and why on stderr, where SLURM or the right to start it is missing.
    fn start() -> Option<Self> {
        let cores = CORES.read().unwrap_or_else(PoisonError::into_inner);
        let cluster = Self { dir: tempfile::tempdir().unwrap(), _cores: cores };
        let Output { status, stderr, .. } = cluster.script("up");
        match status.code() {
            Some(0) => Some(cluster),
            // Not by `eprintln`, which is shown for failed tests only.
            Some(code) if code == i32::from(exit::LAUNCHER) => {
                let reason = text(&stderr);
                let line = format!("skipped: tests/mpi/slurm.rs: {}\n", reason.trim_end());
                io::stderr().write_all(line.as_bytes()).unwrap();
                None
            }
            _ => panic!("{}", text(&stderr)),
        }
    }

    fn script(&self, word: &str) -> Output {
        let script = repository().join("tests/mpi/cluster.sh");
        Command::new(script).arg(word).arg(self.dir.path().join("slurm")).output().unwrap()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// A command of SLURM that must work; its output.
    fn slurm(&self, line: &str) -> String {
        self.slurm_with(line, &[], &[])
    }

    fn slurm_with(&self, line: &str, args: &[String], variables: &[(&str, &str)]) -> String {
        let mut words = line.split_whitespace();
        let output = Command::new(words.next().unwrap())
            .args(words)
            .args(args)
            .current_dir(self.dir.path())
            .env("SLURM_CONF", self.path("slurm/slurm.conf"))
            .env("MOEWARDEN", BINARY)
            .env("MOEWARDEN_LAUNCH", repository().join("launch"))
            // Open MPI: both nodes are one host, but no shared memory joins them.
            .envs([("OMPI_MCA_btl", "self,tcp"), ("OMPI_MCA_btl_tcp_if_include", "lo")])
            .env("TMPDIR", self.dir.path())
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        text(&output.stdout).trim().to_owned()
    }

    /// Submits a script of `launch/`, whose name leads `line`; options of sbatch follow it.
    fn submit(&self, line: &str, training: &[String], variables: &[(&str, &str)]) -> Job<'_> {
        let (script, options) = line.split_once(' ').unwrap();
        let mut args = vec![repository().join("launch").join(script).display().to_string()];
        args.extend_from_slice(training);
        let id = self.slurm_with(&format!("sbatch --parsable --output=%j.log {options}"), &args, variables);
        Job { cluster: self, id }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        let down = self.script("down");
        if !down.status.success() && !thread::panicking() {
            panic!("{}", text(&down.stderr));
        }
    }
}

struct Job<'a> {
    cluster: &'a Cluster,
    id: String,
}

impl Job<'_> {
    /// `Key=value` of what SLURM says about the job.
    fn field(&self, key: &str) -> String {
        let shown = self.cluster.slurm(&format!("scontrol --oneliner show job {}", self.id));
        let value = shown.split_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        value.unwrap_or_else(|| panic!("no {key} in {shown}")).to_owned()
    }

    fn log(&self) -> String {
        fs::read_to_string(self.cluster.path(&format!("{}.log", self.id))).unwrap_or_default()
    }

    fn wait_until(&self, what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
        let start = Instant::now();
        while !done() {
            let state = self.field("JobState");
            assert!(start.elapsed() < limit, "job {} is {state}, and still not {what}:\n{}", self.id, self.log());
            thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits for the end and returns state and exit code, as in `COMPLETED 0:0`.
    fn end(&self, limit: Duration) -> String {
        let ended = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"];
        self.wait_until("at its end", limit, || ended.contains(&&*self.field("JobState")));
        format!("{} {}", self.field("JobState"), self.field("ExitCode"))
    }

    /// Waits until the training is some steps further than now.
    fn progress(&self, output: &Path) {
        let steps = || fs::read_to_string(output.join("metrics.jsonl")).map_or(0, |text| text.lines().count());
        let before = steps();
        self.wait_until("some steps further", MINUTE, || steps() > before + 3);
    }

    /// Waits until the job is back in the queue for the `times`-th time, and spares it most of SLURM's two minutes there:
    /// not all, since a node refuses to start a job in the second in which it ended it ("Job credential revoked").
    fn requeued(&self, times: usize) {
        let back = || self.field("JobState") == "PENDING" && self.field("Restarts") == times.to_string();
        self.wait_until("back in the queue", MINUTE, back);
        self.cluster.slurm(&format!("scontrol update JobId={} StartTime=now+2", self.id));
    }
}

#[test]
fn two_nodes_equal_two_threads() {
    let Some(cluster) = Cluster::start() else { return };
    let output = cluster.path("out");
    let job = cluster.submit(TWO_NODES, &training(&output, LONG), &[]);
    assert_eq!(job.end(WHOLE), "COMPLETED 0:0", "{}", job.log());
    assert!(weights(&output) == expected_weights(), "other weights: {}", job.log());
}

#[test]
fn a_job_that_is_interrupted_three_times_ends_with_the_same_weights() {
    let Some(cluster) = Cluster::start() else { return };
    let output = cluster.path("out");
    let job = cluster.submit(TWO_NODES, &training(&output, LONG), &[]);

    job.progress(&output);
    // The ranks stand still until SLURM, which takes its time, wakes them with the signal to leave.
    cluster.slurm(&format!("scancel --signal=STOP {}.0", job.id));
    let urgent =
        cluster.slurm("sbatch --parsable --partition=high --nodes=2 --exclusive --output=/dev/null --wrap=true");
    job.requeued(1);
    job.progress(&output);
    assert_eq!(Job { cluster: &cluster, id: urgent }.end(MINUTE), "COMPLETED 0:0");

    // As before the time limit.
    cluster.slurm(&format!("scancel --batch --signal=USR1 {}", job.id));
    job.requeued(2);
    job.progress(&output);

    // By an administrator, or at preemption without grace: TERM to everything at once.
    cluster.slurm(&format!("scontrol requeue {}", job.id));
    job.requeued(3);

    assert_eq!(job.end(WHOLE), "COMPLETED 0:0", "{}", job.log());
    assert!(weights(&output) == expected_weights(), "other weights: {}", job.log());
    let log = job.log();
    for line in ["requeues so far: 3", "launch: checkpointed; requeued", "launch: moewarden ended with exit code 0"] {
        assert!(log.contains(line), "{line:?} is not in {log}");
    }
}

#[test]
fn a_sweep_trains_each_line_in_its_folder_on_its_gpu() {
    let Some(cluster) = Cluster::start() else { return };
    let lines = ["--seed 1", "--seed 2 --expert-lr 1e-3", "--seed 3"];
    fs::write(cluster.path("sweep.txt"), lines.join("\n")).unwrap();
    let mut options = training(&cluster.path("unused"), "--expert-epochs-per-round 4 --skip-router-training");
    let at = options.iter().position(|option| option == "--output-dir").unwrap();
    options.drain(at..at + 2);

    // One node of two GPUs: two tasks at a time.
    let line = "slurm-array-sweep.sbatch --array=1-3 --cpus-per-task=1 --nodelist=n1 --output=%A_%a.log";
    let array = cluster.submit(line, &options, &[("SWEEP", "sweep.txt"), ("SWEEP_DIR", "runs")]);
    let mut gpus = Vec::new();
    for (task, line) in (1..).zip(lines) {
        let job = Job { cluster: &cluster, id: format!("{}_{task}", array.id) };
        assert_eq!(job.end(MINUTE), "COMPLETED 0:0", "{}", job.log());
        weights(&cluster.path(&format!("runs/{task}")));
        let log = job.log();
        assert!(log.contains(&format!("launch: task {task}: {line}\n")), "{log}");
        let (_, rest) = log.split_once("on n1, GPUs ").unwrap_or_else(|| panic!("no GPU in {log}"));
        gpus.push(rest.split(',').next().unwrap().to_owned());
    }
    assert_ne!(gpus[0], gpus[1], "tasks on one node at the same time");
    assert!(gpus.iter().all(|gpu| gpu == "0" || gpu == "1"), "{gpus:?}");
}

#[test]
fn ranks_that_srun_does_not_connect_say_so_and_end() {
    let Some(cluster) = Cluster::start() else { return };
    let output = cluster.path("out");
    let job = cluster.submit(TWO_NODES, &training(&output, LONG), &[("MPI_TYPE", "none")]);
    assert_eq!(job.end(MINUTE), format!("FAILED {}:0", exit::LAUNCHER), "{}", job.log());
    assert!(job.log().contains("--mpi=pmix"), "no way out in {}", job.log());
    assert!(!output.join("final_model").exists());
}

#[test]
fn a_rank_that_dies_ends_the_job() {
    let Some(cluster) = Cluster::start() else { return };
    let output = cluster.path("out");
    let fault = [("MOEWARDEN_FAULT", "rank=1,at=step:9,do=kill")];
    let job = cluster.submit(TWO_NODES, &training(&output, LONG), &fault);
    job.progress(&output);
    // The other rank notices at once; SLURM takes its time to tell.
    let end = job.end(MINUTE);
    assert!(end.starts_with("FAILED "), "{end}: {}", job.log());
    let named = "rank 1 ended while rank 0 waited for it at";
    assert!(job.log().contains(named) && !output.join("final_model").exists(), "{}", job.log());
}

#[test]
fn requeues_are_bounded_and_a_cancelled_job_stays_cancelled() {
    let Some(cluster) = Cluster::start() else { return };
    let requeue = format!("FAILED {}:0", exit::REQUEUE);

    let output = cluster.path("bounded");
    let job = cluster.submit(TWO_NODES, &training(&output, LONG), &[("MAX_REQUEUES", "1")]);
    job.progress(&output);
    cluster.slurm(&format!("scancel --batch --signal=USR1 {}", job.id));
    job.requeued(1);
    job.progress(&output);
    cluster.slurm(&format!("scancel --batch --signal=USR1 {}", job.id));
    assert_eq!(job.end(MINUTE), requeue, "{}", job.log());
    assert!(job.log().contains("MAX_REQUEUES=1 is reached: submit the job again"), "{}", job.log());

    let output = cluster.path("cancelled");
    let job = cluster.submit(TWO_NODES, &training(&output, LONG), &[]);
    job.progress(&output);
    cluster.slurm(&format!("scancel {}", job.id));
    assert_eq!(job.end(MINUTE), format!("CANCELLED {}:0", exit::REQUEUE), "{}", job.log());
    assert_eq!(job.field("Restarts"), "0");
    assert!(job.log().contains("is not requeued by this script"), "{}", job.log());
}

#[test]
fn a_failed_check_ends_the_job_before_the_ranks_start() {
    let Some(cluster) = Cluster::start() else { return };
    let mut options = training(&cluster.path("out"), LONG);
    let at = options.iter().position(|option| option == "--dataset-path").unwrap();
    options[at + 1] = "nowhere.json".to_owned();
    let job = cluster.submit(TWO_NODES, &options, &[]);
    assert_eq!(job.end(MINUTE), format!("FAILED {}:0", exit::NO_INPUT), "{}", job.log());
    assert!(job.log().contains("launch: the check before the start failed"), "{}", job.log());
    assert!(!cluster.path("out").exists());
}
