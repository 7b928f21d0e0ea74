//! A rehearsal of `benches/gpu/prove.py` on the stand-ins of `program.rs`: what it says and leaves if a test fails or hangs,
//! the memory is full, a library is missing, the time is over, or it is stopped.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::golden_copy::golden_copy;
use crate::program::Machine;

/// Three tests, of which the first alone launches the kernel `greedy`.
const THREE: &str = "tests:ops::of_equal,ops::random_weights,ops::ties_go";
/// A short one.
const ONE: &str = "tests:ops::ties_go";

/// A machine with the programs of `pack.sh`.
fn machine() -> Machine {
    let machine = Machine::new();
    let (bin, case) = (machine.path("bin"), golden_copy("olmoe"));
    fs::create_dir(&bin).unwrap();
    symlink(env!("CARGO_BIN_EXE_moewarden"), bin.join("moewarden")).unwrap();
    symlink(std::env::current_exe().unwrap(), bin.join("cuda")).unwrap();
    // cargo builds no benchmark for a test: `--open` opens the GPU by another program, and the rates are made up.
    let stub = format!(
        "#!/bin/sh\n\
         [ \"$1\" = --ceilings ] && exec echo '{{\"gpu\": \"stand-in\", \"memory\": 8e10, \"flops\": 6e14, \"bytes\": 3e12, \
         \"to_gpu\": 5e9, \"from_gpu\": 4e9}}' >\"$2\"\n\
         exec {} check --model-name {} --dataset-path {} \
         --output-dir {} --device cuda --skip-weights --top-k-experts 3\n",
        bin.join("moewarden").display(),
        case.join("model").display(),
        case.join("data.json").display(),
        machine.path("unused").display(),
    );
    fs::write(bin.join("cuda_ops"), stub).unwrap();
    fs::set_permissions(bin.join("cuda_ops"), fs::Permissions::from_mode(0o755)).unwrap();
    machine
}

fn command(machine: &Machine, options: &str, variables: &[(&str, &str)]) -> Command {
    let python = std::env::var_os("MOEWARDEN_PYTHON").unwrap_or_else(|| "python3".into());
    let mut command = Command::new(python);
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/gpu/prove.py"))
        .arg(machine.path("out"))
        .arg("--work")
        .arg(machine.path("work"))
        .arg("--bin")
        .arg(machine.path("bin"))
        .args(["--python", "/nowhere/python"]) // so that no wheel of NVIDIA's is found
        .args(options.split('|'))
        .env("LD_LIBRARY_PATH", machine.path("libraries"))
        .env("STAND_IN_MODULES", machine.path("modules"))
        .envs(variables.iter().copied());
    command
}

/// The exit code and the summary of a call.
#[track_caller]
fn prove(machine: &Machine, options: &str, variables: &[(&str, &str)]) -> (Option<i32>, String) {
    let Output { status, stdout, stderr } = command(machine, options, variables).output().unwrap();
    let summary = fs::read_to_string(machine.path("out/summary.md"));
    let said = String::from_utf8_lossy(&[stdout, stderr].concat()).into_owned();
    (status.code(), summary.unwrap_or_else(|_| panic!("no summary: {said}")))
}

#[track_caller]
fn shows(summary: &str, parts: &[&str]) {
    parts.iter().for_each(|part| assert!(summary.contains(part), "{part:?} is not in {summary}"));
}

#[test]
#[ignore = "needs Python"]
fn four_files_are_left_and_a_later_call_goes_on() {
    let machine = machine();
    let (code, summary) = prove(&machine, &format!("--steps|ceilings {ONE}"), &[]);
    shows(
        &summary,
        &["# stand-in, ", "| ceilings | passed |", "600 TFLOP/s, 3.00 TB/s", &format!("| {ONE} | passed |")],
    );
    assert_eq!(code, Some(0), "{summary}");
    let mut files: Vec<_> = fs::read_dir(machine.path("out"))
        .unwrap()
        .map(|file| file.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(files, ["logs.tgz", "summary.md"], "the other two are left by benchmarks");

    // Full memory is a result: neither a failure nor a missing GPU. Earlier results stay in the table.
    let steps = "--no-peer|--steps|identify:OLMoE-1B-7B:8x512 offload:OLMoE-1B-7B:8x512 identify:Mixtral-8x7B:8x512";
    let (code, summary) = prove(&machine, steps, &[("STAND_IN_MEMORY", "67000000")]);
    shows(
        &summary,
        &["| ceilings | passed |", "| identify:OLMoE-1B-7B:8x512 | out of memory |", "| stand-in | OLMoE-1B-7B |"],
    );
    shows(&summary, &["| offload:OLMoE-1B-7B:8x512 | out of memory |", "| 8x512 | identify --offload none |"]);
    shows(&summary, &["| identify:Mixtral-8x7B:8x512 | skipped |", "does not fit into 80 GB"]);
    assert_eq!(code, Some(3), "{summary}");
    let speed = fs::read_to_string(machine.path("out/speed.jsonl")).unwrap();
    shows(&speed, &["\"oom\": true", "\"gpu\": \"stand-in\"", "a rank needs"]);

    // A missing library: the GPU cannot be used, and the summary says why.
    fs::remove_file(machine.path("libraries/libnvrtc.so.13")).unwrap();
    let (code, summary) = prove(&machine, &format!("--fresh|--steps|{ONE} nccl"), &[]);
    shows(
        &summary,
        &["The GPU cannot be used: ", "libnvrtc.so.13", &format!("| {ONE} | not run: the GPU cannot be used |")],
    );
    assert_eq!(code, Some(69), "{summary}");
}

#[test]
#[ignore = "needs Python"]
fn after_an_illegal_address_each_test_is_run_alone() {
    let machine = machine();
    let (code, summary) = prove(&machine, &format!("--steps|{THREE} {ONE}"), &[("STAND_IN_BREAKS", "greedy")]);
    let alone = "together: exit 101; alone, 2 of 3 tests passed; failed: ops::of_equal_logits";
    shows(&summary, &[&format!("| {THREE} | failed (exit 1) |"), alone, &format!("| {ONE} | passed |")]);
    assert_eq!(code, Some(1), "{summary}");
}

#[test]
#[ignore = "needs Python"]
fn what_hangs_is_ended_and_the_deadline_holds() {
    let machine = machine();
    let hangs = [("STAND_IN_HANGS", "greedy")];
    let (code, summary) = prove(&machine, &format!("--limit|16|--steps|{THREE} {ONE}"), &hangs);
    shows(&summary, &["a test did not end; alone, 2 of 3 tests passed; failed: ops::of_equal_logits"]);
    shows(&summary, &["(did not end)", &format!("| {ONE} | passed |")]);
    assert_eq!(code, Some(1), "{summary}");

    let begin = Instant::now();
    let (code, summary) = prove(&machine, &format!("--fresh|--deadline|15|--steps|{THREE} {ONE} nccl"), &hangs);
    assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
    shows(&summary, &["not reached |"]);
    assert!(matches!(code, Some(1 | 3)), "{code:?}: {summary}");
}

/// Waits for a file with this text.
fn wait_for(path: &PathBuf, part: &str) {
    let begin = Instant::now();
    while !fs::read_to_string(path).is_ok_and(|text| text.contains(part)) {
        assert!(begin.elapsed() < Duration::from_secs(60), "{part:?} is not in {}", path.display());
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
#[ignore = "needs Python"]
fn a_stopped_call_leaves_a_summary_and_no_process() {
    let machine = machine();
    let mut called = command(&machine, &format!("--steps|{THREE}"), &[("STAND_IN_HANGS", "greedy")]);
    let mut child: Child = called.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    wait_for(&machine.path("out/summary.md"), "| running |"); // it is written before a step, too
    wait_for(
        &machine.path("work/logs").join(format!("{}.log", THREE.replace([':', ','], "-").replace("--", "-"))),
        "running 3 tests",
    );
    // SAFETY: a signal to the own child.
    unsafe { libc::kill(child.id() as i32, libc::SIGTERM) };
    assert_eq!(child.wait().unwrap().code(), Some(1));
    shows(&fs::read_to_string(machine.path("out/summary.md")).unwrap(), &["| stopped by a signal |"]);
    let bin = machine.path("bin").display().to_string();
    let left = fs::read_dir("/proc").unwrap().filter_map(|process| {
        let line = fs::read_to_string(process.ok()?.path().join("cmdline")).ok()?;
        line.starts_with(&format!("{bin}/cuda")).then_some(line)
    });
    assert_eq!(left.collect::<Vec<_>>(), Vec::<String>::new());
}
