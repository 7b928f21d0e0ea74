//! The `quickstart` command of the real binary.

use std::fs;

use assert_cmd::Command;
use serde_json::Value;

#[test]
fn quickstart_makes_a_model_trains_it_and_explains_the_outputs() {
    let temp = tempfile::tempdir().unwrap();
    let run = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_moewarden"));
        command.current_dir(temp.path()).arg("quickstart").args(more).output().unwrap()
    };
    let output = run(&[]);
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    for words in [
        "203 have the same bits as before. Changed: 24 of the chosen experts, 4 of the routers, 0 others",
        "its weights are random",
        "hf download",
    ] {
        assert!(said.contains(words), "{words:?} is missing in:\n{said}");
    }

    // Each phase improves its own loss.
    let dir = temp.path().join("moewarden-quickstart");
    let log = fs::read_to_string(dir.join("run/metrics.jsonl")).unwrap();
    let steps: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for (phase, loss) in [("expert", "ce_loss"), ("router", "router_loss")] {
        let losses: Vec<_> =
            steps.iter().filter(|step| step["phase"] == phase).map(|step| step[loss].as_f64().unwrap()).collect();
        assert!(losses.len() == 12 && losses[11] < 0.7 * losses[0], "{phase}: {losses:?}");
    }
    for name in
        ["model/tokenizer.json", "rows.json", "run/final_model/tokenizer_config.json", "run/round_1/delta.safetensors"]
    {
        assert!(dir.join(name).is_file(), "{name} is missing");
    }

    // An existing folder is kept unless --overwrite is given.
    let model = || fs::read(dir.join("run/final_model/model.safetensors")).unwrap();
    let first = model();
    let again = run(&[]);
    assert_eq!(again.status.code(), Some(73), "{}", String::from_utf8_lossy(&again.stderr));
    assert!(run(&["--overwrite", "--quiet"]).status.success());
    assert!(model() == first, "the same command gave another model");
}
