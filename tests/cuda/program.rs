//! The real binary with `--device cuda`, on stand-ins for NVIDIA's libraries (`tests/stand_in/cuda.c`) that run
//! emulated kernels: only the hardware and its libraries are replaced.

use crate::golden_copy::golden_copy as golden;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::{Mutex, PoisonError};

use crate::emulator;
use moewarden::backend::cuda::kernels::MODULES;
use moewarden::exit;
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// A machine with one GPU.
pub struct Machine {
    dir: TempDir,
}

impl Machine {
    pub fn new() -> Self {
        let machine = Self { dir: tempfile::tempdir().unwrap() };
        let libraries = machine.path("libraries");
        fs::create_dir(&libraries).unwrap();
        fs::create_dir(machine.path("modules")).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/stand_in/cuda.c");
        let driver = libraries.join("libcuda.so.1");
        let mut cc = Command::new("cc");
        cc.args(["-shared", "-fPIC", "-O1", "-w", "-o"]).arg(&driver).arg(source).args(["-ldl", "-lpthread"]);
        assert!(cc.status().expect("tests need a C compiler").success());
        for name in ["libcuda.so", "libnvrtc.so.13", "libcublas.so.13", "libnccl.so.2"] {
            symlink(&driver, libraries.join(name)).unwrap();
        }
        static ONE_BUILDS: Mutex<()> = Mutex::new(());
        let _builds = ONE_BUILDS.lock().unwrap_or_else(PoisonError::into_inner);
        for module in MODULES {
            let emulated = emulator::build(module);
            symlink(emulated, machine.path("modules").join(format!("{}.so", module.stem))).unwrap();
        }
        machine
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs a command on a golden case's model and its rows.
    fn run(&self, command: &str, case: &str, output: &str, options: &str, variables: &[(&str, &str)]) -> Output {
        self.run_in(command, &golden(case), output, options, variables)
    }

    /// Runs a command on the model and the rows in a folder.
    fn run_in(&self, command: &str, case: &Path, output: &str, options: &str, variables: &[(&str, &str)]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_moewarden"))
            .arg(command)
            .arg("--model-name")
            .arg(case.join("model"))
            .arg("--dataset-path")
            .arg(case.join("data.json"))
            .arg("--output-dir")
            .arg(self.path(output))
            .args(options.split_whitespace())
            .env("LD_LIBRARY_PATH", self.path("libraries"))
            .env("STAND_IN_MODULES", self.path("modules"))
            .env("XDG_CACHE_HOME", self.path("cache"))
            .envs(variables.iter().copied())
            .output()
            .unwrap()
    }

    #[track_caller]
    fn ok(&self, command: &str, case: &str, output: &str, options: &str) -> String {
        self.ok_with(command, case, output, options, &[])
    }

    #[track_caller]
    fn ok_with(&self, command: &str, case: &str, output: &str, options: &str, variables: &[(&str, &str)]) -> String {
        let ran = self.run(command, case, output, options, variables);
        let said = String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned();
        assert_eq!(ran.status.code(), Some(0), "{said}");
        said
    }

    #[track_caller]
    fn failed(&self, code: u8, options: &str, variables: &[(&str, &str)], parts: &[&str]) {
        let ran = self.run("identify", "olmoe", "failed", &format!("{options} --overwrite"), variables);
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert_eq!(ran.status.code(), Some(code.into()), "{said}");
        parts.iter().for_each(|part| assert!(said.contains(part), "{part:?} is not in {said}"));
        assert!(!said.contains("itself is at fault"), "{said}");
    }

    /// (scores, selection) of a run.
    fn scores(&self, output: &str) -> (Vec<f64>, Value) {
        let text = fs::read_to_string(self.path(output).join("expert_scores.json")).unwrap();
        let json: Value = serde_json::from_str(&text).unwrap();
        let round = &json["rounds"]["1"];
        let mut scores = Vec::new();
        numbers(&round["scores"], &mut scores);
        assert!(scores.iter().any(|x| *x > 0.0), "{text}");
        (scores, round["selected"].clone())
    }

    /// All weights of a run's final model, by name.
    fn weights(&self, output: &str) -> Vec<(String, Vec<f32>)> {
        Self::weights_of(&self.path(output).join("final_model"))
    }

    fn weights_of(model: &Path) -> Vec<(String, Vec<f32>)> {
        let bytes = fs::read(model.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let value = |bytes: &[u8]| bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x)).collect();
        let mut all: Vec<_> = file.tensors().into_iter().map(|(name, x)| (name, value(x.data()))).collect();
        all.sort_by(|a, b| a.0.cmp(&b.0));
        all
    }
}

fn numbers(value: &Value, into: &mut Vec<f64>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| numbers(item, into)),
        other => into.extend(other.as_f64()),
    }
}

#[track_caller]
fn assert_near(ours: &[f64], theirs: &[f64], relative: f64) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (x, y)) in ours.iter().zip(theirs).enumerate() {
        assert!((x - y).abs() <= relative * y.abs(), "number {i}: {x}, not {y}");
    }
}

/// One row for each of two ranks: emulation is slow.
const FEW: &str = "--max-samples 2 --batch-size 1 --top-k-experts 3 --threads 1";

#[test]
fn an_identification_finds_what_the_cpu_finds() {
    let machine = Machine::new();
    machine.ok("identify", "olmoe", "cpu", &format!("{FEW} --device cpu"));
    let said = machine.ok("identify", "olmoe", "gpu", FEW);
    for part in [
        "device: cuda, stand-in (compute capability 9.0",
        "weights [16, 32] in F32, 0.00 GFLOP a group: one kernel for all groups by ordinary arithmetic",
        "activations F32",
        "peak memory on the GPU, for tensors: ",
    ] {
        assert!(said.contains(part), "{part:?} is not in {said}");
    }
    let (cpu, gpu) = (machine.scores("cpu"), machine.scores("gpu"));
    assert_near(&gpu.0, &cpu.0, 1e-5);
    assert_eq!(gpu.1, cpu.1, "selection");

    // Two ranks on the one GPU, with the cached kernels of the first run.
    let kernels = machine.path("cache/moewarden/kernels");
    let compiled = fs::read_dir(&kernels).unwrap().count();
    assert!(compiled >= MODULES.len(), "{compiled} files in {}", kernels.display());
    let said = machine.ok("identify", "olmoe", "ranks", &format!("{FEW} --device cuda --ranks 2"));
    assert!(said.contains("shared by 2 ranks") && said.contains("through the host: ranks share a GPU"), "{said}");
    assert_near(&machine.scores("ranks").0, &gpu.0, 1e-12);
    assert_eq!(machine.scores("ranks").1, gpu.1);
    assert_eq!(fs::read_dir(&kernels).unwrap().count(), compiled);
}

#[test]
fn a_training_moves_the_weights_as_on_the_cpu() {
    let machine = Machine::new();
    let options = format!("{FEW} --num-rounds 1 --save-rounds none --expert-lr 1e-3 --router-lr 1e-3");
    for ranks in [1, 3] {
        let [cpu, gpu] = ["cpu", "gpu"].map(|device| format!("{device}-{ranks}"));
        machine.ok("train", "olmoe", &cpu, &format!("{options} --ranks {ranks} --device cpu"));
        machine.ok("train", "olmoe", &gpu, &format!("{options} --ranks {ranks}"));
        let source = Machine::weights_of(&golden("olmoe").join("model"));
        let mut moved = 0;
        for (((name, theirs), (_, ours)), (_, before)) in
            machine.weights(&cpu).iter().zip(machine.weights(&gpu)).zip(source)
        {
            let worst = theirs.iter().zip(&ours).map(|(x, y)| (x - y).abs()).fold(0.0, f32::max);
            // A few steps of 1e-3: AdamW divides by gradients that may be tiny.
            assert!(worst < 1e-4, "{ranks} ranks: {name} is {worst} off");
            assert_eq!(*theirs == before, ours == before, "{ranks} ranks: {name} moved");
            moved += usize::from(ours != before);
        }
        assert!(moved > 3, "{moved} tensors moved");
    }
    // A single rank through NCCL.
    let said = machine.ok("train", "olmoe", "nccl", &format!("{options} --ranks 1 --transport nccl"));
    assert!(said.contains("from GPU to GPU by NCCL 2.32.3"), "{said}");
    assert!(machine.weights("nccl") == machine.weights("gpu-1"));
    // Three GPUs, one rank each by default, with shards of different lengths: the same sums as through the host.
    let said = machine.ok_with("train", "olmoe", "between", &options, &[("STAND_IN_DEVICES", "3")]);
    assert!(said.contains("from GPU to GPU by NCCL 2.32.3") && said.contains("ranks: 3"), "{said}");
    assert!(machine.weights("between") == machine.weights("gpu-3"));
}

/// Streams that run as late as allowed show a slot that is read too early, and eager ones a slot that is overwritten too early.
#[test]
fn experts_in_host_memory_change_no_bit() {
    let machine = Machine::new();
    let on_host = "experts: those of all 3 MoE layers, ";
    let text = |output: &str, file: &str| fs::read_to_string(machine.path(output).join(file)).unwrap();
    let kinds: [(&str, &[(&str, &str)]); 3] = [("none", &[]), ("host", &[]), ("host", &[("STAND_IN_EAGER", "1")])];
    let train = format!("{FEW} --num-rounds 1 --save-rounds none --expert-lr 1e-3 --router-lr 1e-3 --recompute always");
    let eval = "--max-samples 2 --batch-size 1 --max-new-tokens 2 --threads 1 --device cuda";
    for (i, (offload, variables)) in kinds.into_iter().enumerate() {
        let ran = |command: &str, options: &str| {
            let options = format!("{options} --offload {offload}");
            let said = machine.ok_with(command, "olmoe", &format!("{command}-{i}"), &options, variables);
            assert_eq!(said.contains(on_host), offload == "host", "{said}");
        };
        ran("train", &train);
        assert!(machine.weights(&format!("train-{i}")) == machine.weights("train-0"), "{offload}: weights");
        if !variables.is_empty() {
            continue; // a training has all kinds of copies
        }
        ran("identify", FEW);
        ran("eval", eval);
        assert!(machine.scores(&format!("identify-{i}")) == machine.scores("identify-0"), "{offload}: scores");
        for (command, file) in [("eval", "eval.json"), ("eval", "generations.jsonl"), ("eval", "reply_losses.jsonl")] {
            assert_eq!(text(&format!("{command}-{i}"), file), text(&format!("{command}-0"), file), "{offload}: {file}");
        }
    }
    let source = Machine::weights_of(&golden("olmoe").join("model"));
    assert!(machine.weights("train-0") != source, "training moves weights");

    // New weights of several ranks, through the host and by NCCL, which sum two ranks' gradients in the only order.
    let ranks = |offload: &str, transport: &str, devices| {
        let options = format!("{train} --ranks 2 --transport {transport} {offload}");
        let output = format!("train-{transport}{}", offload.replace(' ', ""));
        let said = machine.ok_with("train", "olmoe", &output, &options, &[("STAND_IN_DEVICES", devices)]);
        (machine.weights(&output), said)
    };
    let (none, _) = ranks("--offload none", "host", "1");
    assert!(none != source);
    for (transport, devices) in [("host", "1"), ("nccl", "2")] {
        assert!(ranks("--offload host", transport, devices).0 == none, "{transport}");
        let (divided, said) = ranks("--shard-frozen", transport, devices);
        assert!(said.contains("are divided among the GPUs of this machine's 2 ranks"), "{said}");
        assert!(divided == none, "{transport}, divided");
    }
}

/// A rank without rows holds its part of the experts for the others. Streams that run as early as allowed show a part that is
/// overwritten or freed too early.
#[test]
fn ranks_read_experts_from_each_other() {
    let machine = Machine::new();
    let eval = "--max-samples 2 --batch-size 1 --max-new-tokens 2 --threads 1 --device cuda";
    let eager = [("STAND_IN_EAGER", "1")];
    for (command, options) in [("identify", FEW), ("eval", eval)] {
        machine.ok(command, "olmoe", &format!("{command}-whole"), &format!("{options} --ranks 3"));
        let said = machine.ok_with(
            command,
            "olmoe",
            &format!("{command}-divided"),
            &format!("{options} --ranks 3 --shard-frozen"),
            &eager,
        );
        assert!(said.contains("this machine's 3 ranks"), "{said}");
    }
    assert!(machine.scores("identify-divided") == machine.scores("identify-whole"));
    let answers = |output| fs::read(machine.path(output).join("generations.jsonl")).unwrap();
    assert_eq!(answers("eval-divided"), answers("eval-whole"));
    let said = machine.ok("identify", "olmoe", "identify-alone", &format!("{FEW} --shard-frozen"));
    assert!(said.contains("--shard-frozen does nothing: no machine has"), "{said}");
    let checked = machine.ok("check", "olmoe", "checked", &format!("{FEW} --ranks 2 --shard-frozen"));
    assert!(checked.contains("this machine's 2 ranks") && checked.contains("ready"), "{checked}");
    machine.failed(exit::CONFIG, "--shard-frozen --offload host", &[], &["leave --offload out"]);
    machine.failed(exit::CONFIG, "--shard-frozen --device cpu", &[], &["--shard-frozen would do nothing"]);
}

/// Ranks in processes of their own open each other's memory.
#[cfg(feature = "mpi")]
#[test]
fn processes_read_experts_from_each_other() {
    let machine = Machine::new();
    let options =
        format!("{FEW} --num-rounds 1 --save-rounds none --expert-lr 1e-3 --skip-router-training --transport host");
    machine.ok("train", "olmoe", "whole", &format!("{options} --ranks 2"));
    let mut mpirun = crate::processes::mpirun();
    mpirun.args(["-n", "2"]).arg(env!("CARGO_BIN_EXE_moewarden")).arg("train");
    for (option, value) in [
        ("--model-name", golden("olmoe").join("model")),
        ("--dataset-path", golden("olmoe").join("data.json")),
        ("--output-dir", machine.path("divided")),
    ] {
        mpirun.arg(option).arg(value);
    }
    mpirun.args(options.split_whitespace()).args(["--device", "cuda", "--shard-frozen"]);
    mpirun.env("LD_LIBRARY_PATH", machine.path("libraries")).env("STAND_IN_MODULES", machine.path("modules"));
    mpirun.env("XDG_CACHE_HOME", machine.path("cache")).env("STAND_IN_IPC", "1");
    let ran = mpirun.output().unwrap();
    let said = String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned();
    assert!(ran.status.success() && said.contains("this machine's 2 ranks"), "{said}");
    assert!(machine.weights("divided") == machine.weights("whole"));
}

/// A folder with a model of 8 layers, of which only some fit on the GPU.
fn eight_layers(machine: &Machine) -> PathBuf {
    let folder = machine.path("eight");
    fs::create_dir_all(folder.join("model")).unwrap();
    let from = golden("olmoe");
    fs::copy(from.join("data.json"), folder.join("data.json")).unwrap();
    for entry in fs::read_dir(from.join("model")).unwrap() {
        let entry = entry.unwrap();
        if !entry.file_name().to_string_lossy().contains("safetensors") {
            fs::copy(entry.path(), folder.join("model").join(entry.file_name())).unwrap();
        }
    }
    let path = folder.join("model/config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    (config["num_hidden_layers"], config["intermediate_size"]) = (8.into(), 512.into());
    fs::write(path, config.to_string()).unwrap();
    folder
}

#[test]
fn as_many_layers_as_fit_stay_on_the_gpu() {
    let machine = Machine::new();
    let model = eight_layers(&machine);
    let options = format!("{FEW} --max-samples 1 --init random").replacen("--max-samples 2 ", "", 1);
    let run = |command: &str, output: &str, more: &str, variables: &[(&str, &str)]| {
        let ran = machine.run_in(command, &model, output, &format!("{options} {more}"), variables);
        (ran.status.code(), String::from_utf8_lossy(&[ran.stdout, ran.stderr].concat()).into_owned())
    };
    let (code, said) = run("identify", "all", "", &[]);
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("pinned host memory"), "{said}");
    // The workspace of cuBLAS, and less than the experts.
    let little = [("STAND_IN_MEMORY", "44000000")];
    let (code, said) = run("identify", "some", "", &little);
    assert_eq!(code, Some(0), "{said}");
    let top = said.split("those of the top ").nth(1).and_then(|rest| rest.split(' ').next());
    let top: usize = top.unwrap_or_else(|| panic!("{said}")).parse().unwrap();
    assert!((1..8).contains(&top), "{said}");
    assert!(machine.scores("some") == machine.scores("all"));

    let (code, said) = run("identify", "not", "--offload none", &little);
    assert_eq!(code, Some(exit::LAUNCHER.into()), "{said}");
    assert!(said.contains("--offload auto or host"), "{said}");
    // With the state of training, fewer layers fit.
    let (code, said) = run("check", "check", "", &little);
    assert_eq!(code, Some(0), "{said}");
    for part in [" 8 MoE layers", "in pinned host memory", "bus: a forward pass copies", "/s just measured"] {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    // The host refuses to pin so much.
    let (code, said) = run("identify", "pinned", "--offload host", &[("STAND_IN_PINNED", "24000000")]);
    assert_eq!(code, Some(exit::LAUNCHER.into()), "{said}");
    assert!(said.contains("the host's memory is full") && said.contains("--offload none"), "{said}");
    assert!(!said.contains("itself is at fault"), "{said}");
}

#[test]
fn bf16_is_near_and_eval_answers() {
    let machine = Machine::new();
    machine.ok("identify", "olmoe", "cpu", &format!("{FEW} --device cpu"));
    let said = machine.ok("identify", "olmoe", "gpu", &format!("{FEW} --precision bf16 --profile"));
    assert!(said.contains("activations Bf16"), "{said}");
    for part in
        ["where the GPU's time went, of ", "gradient_magnitude_bf16 (gradient_magnitude_wgmma.cu)", "cuBLAS, Bf16"]
    {
        assert!(said.contains(part), "{part:?} is not in: {said}");
    }
    // A token near a tie may be routed to other experts, so single scores may differ a lot.
    let (gpu, cpu) = (machine.scores("gpu").0, machine.scores("cpu").0);
    let off: f64 = gpu.iter().zip(&cpu).map(|(x, y)| (x - y).abs()).sum();
    let share = off / cpu.iter().sum::<f64>();
    assert!(share > 0.0 && share < 0.05, "the scores are {share} off");
    machine.ok("eval", "olmoe", "eval", "--max-samples 1 --max-new-tokens 2 --device cuda");
    assert!(machine.path("eval/generations.jsonl").exists());
    let said = machine.ok("check", "olmoe", "unused", FEW);
    assert!(said.contains("device: cuda") && said.contains("234.9 MB free"), "{said}");
}

#[test]
fn what_is_missing_or_full_is_said() {
    let machine = Machine::new();
    let full = ["the GPU's memory is full", "GiB", "--batch-size", "--recompute always"];
    // Less than the cuBLAS workspace and the weights: far beyond the memory, or found out while it is allocated.
    let predicted = ["a rank needs", "--force"];
    machine.failed(exit::LAUNCHER, FEW, &[("STAND_IN_MEMORY", "33600000")], &predicted);
    machine.failed(exit::LAUNCHER, &format!("{FEW} --force"), &[("STAND_IN_MEMORY", "33600000")], &full);
    let both = [("STAND_IN_MEMORY", "67160000")];
    machine.failed(exit::LAUNCHER, &format!("{FEW} --ranks 2 --force"), &both, &full);
    // Less than the cuBLAS workspace.
    machine.failed(exit::LAUNCHER, FEW, &[("STAND_IN_MEMORY", "1000000")], &["cuMemAlloc", "nvidia-smi"]);
    let shared = ["ranks 0 and 1 use the same GPU"];
    machine.failed(exit::LAUNCHER, &format!("{FEW} --ranks 2 --transport nccl"), &[], &shared);
    fs::remove_file(machine.path("libraries/libnvrtc.so.13")).unwrap();
    let libraries = machine.path("libraries").display().to_string();
    let missing = ["libnvrtc.so.13", &libraries, "pip install nvidia-cuda-nvrtc"];
    machine.failed(exit::LAUNCHER, FEW, &[], &missing);
    if !Path::new("/dev/nvidia0").exists() {
        fs::remove_dir_all(machine.path("libraries")).unwrap();
        let none = ["libcuda.so.1", "LD_LIBRARY_PATH", "--device cpu"];
        machine.failed(exit::LAUNCHER, &format!("{FEW} --device cuda"), &[], &none);
        let said = machine.ok("identify", "olmoe", "auto", FEW);
        assert!(said.contains("no GPU: there is no NVIDIA driver") && said.contains("device: cpu"), "{said}");
    }
}
