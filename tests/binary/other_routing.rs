//! `eval --routers` and `--route-as`: the routing of another model.

use std::fs;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use moewarden::exit;
use serde_json::Value;

use crate::golden_copy::golden_copy as case;

/// Evaluates; the exit code, stdout and stderr.
fn eval(model: &Path, case_name: &str, output: &Path, more: &[&str]) -> (u8, String, String) {
    let mut command = Command::cargo_bin("moewarden").unwrap();
    command.args(["eval", "--threads", "1", "--batch-size", "3", "--max-new-tokens", "3", "--model-name"]).arg(model);
    command.arg("--dataset-path").arg(case(case_name).join("data.json")).arg("--output-dir").arg(output).args(more);
    let ran = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (ran.status.code().unwrap() as u8, text(ran.stdout), text(ran.stderr))
}

/// What was measured, and the answers; without the model's identity.
fn measured(output: &Path) -> (Value, Vec<Value>) {
    let mut report: Value = serde_json::from_slice(&fs::read(output.join("eval.json")).unwrap()).unwrap();
    report.as_object_mut().unwrap().remove("model");
    let lines = fs::read_to_string(output.join("generations.jsonl")).unwrap();
    (report, lines.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["response"].clone()).collect())
}

fn model_of(output: &Path) -> Value {
    let report: Value = serde_json::from_slice(&fs::read(output.join("eval.json")).unwrap()).unwrap();
    report["model"].clone()
}

/// A copy of a model whose routers have the opposite signs.
fn with_negated_routers(model: &Path, to: PathBuf) -> PathBuf {
    fs::create_dir_all(&to).unwrap();
    let mut changed = 0;
    for entry in fs::read_dir(model).unwrap() {
        let path = entry.unwrap().path();
        let mut bytes = fs::read(&path).unwrap();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let header: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..start]).unwrap();
            for (name, tensor) in header {
                if !name.ends_with(".gate.weight") || name.contains("experts") {
                    continue;
                }
                let size = if tensor["dtype"] == "F32" { 4 } else { 2 };
                let [from, end] = [0, 1].map(|i| start + tensor["data_offsets"][i].as_u64().unwrap() as usize);
                bytes[from..end].chunks_mut(size).for_each(|value| value[size - 1] ^= 0x80);
                changed += 1;
            }
        }
        fs::write(to.join(path.file_name().unwrap()), bytes).unwrap();
    }
    assert!(changed > 0, "no router in {}", model.display());
    to
}

#[test]
fn another_models_routing_and_routers_in_every_family() {
    for name in ["olmoe", "mixtral", "mixtral_fused", "qwen2_moe", "qwen3_dense"] {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let base = case(name).join("model");
        let base_text = base.display().to_string();
        let bad = with_negated_routers(&base, path("bad"));
        let run = |model: &Path, output: &str, more: &[&str]| {
            let (code, out, err) = eval(model, name, &path(output), more);
            assert_eq!(code, exit::OK, "{name}: {out}\n{err}");
            out
        };
        run(&base, "plain", &[]);
        run(&bad, "destroyed", &[]);
        run(&base, "itself", &["--route-as", &base_text]);
        let out = run(&bad, "locked", &["--route-as", &base_text]);
        assert!(out.contains("locked routing"), "{out}");
        run(&bad, "restored", &["--routers", &base_text]);
        let plain = measured(&path("plain"));
        assert_ne!(measured(&path("destroyed")), plain, "{name}");
        assert_eq!(measured(&path("itself")), plain, "{name}");
        assert_eq!(measured(&path("restored")), plain, "{name}");
        // With locked routing, the divergence is that of the model's own router logits.
        let (mut locked, answers) = measured(&path("locked"));
        locked["routing"]["divergence_by_layer"] = plain.0["routing"]["divergence_by_layer"].clone();
        assert_eq!((locked, answers), plain, "{name}");

        let model = model_of(&path("locked"));
        assert_eq!(model["sha"], model_of(&path("destroyed"))["sha"], "the model's own hash");
        assert_eq!(model["other_routing"]["sha"], model_of(&path("plain"))["sha"]);
        assert_eq!(model["other_routing"]["from"], "locked_routing");
        assert_eq!(model_of(&path("restored"))["other_routing"]["from"], "routers");
        assert!(model_of(&path("plain")).get("other_routing").is_none());
    }
}

#[test]
fn models_that_do_not_fit_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let (olmoe, mixtral) = (case("olmoe").join("model"), case("mixtral").join("model").display().to_string());
    for option in ["--routers", "--route-as"] {
        let (code, _, err) = eval(&olmoe, "olmoe", &output, &[option, &mixtral]);
        assert_eq!(code, exit::CONFIG, "{err}");
        assert!(err.contains(option) && err.contains("the family (model_type) is \"mixtral\", not \"olmoe\""), "{err}");
    }
    let (code, ..) = eval(&olmoe, "olmoe", &output, &["--routers", &mixtral, "--route-as", &mixtral]);
    assert_eq!(code, exit::USAGE);
    assert!(!output.exists());
}

#[test]
fn a_report_says_which_share_of_the_gain_is_rerouting() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let base = case("olmoe").join("model");
    let tuned = with_negated_routers(&base, path("model"));
    eval(&base, "olmoe", &path("base"), &[]);
    eval(&tuned, "olmoe", &path("tuned"), &[]);
    eval(&tuned, "olmoe", &path("restored"), &["--routers", &base.display().to_string()]);
    let report = |runs: &[&str]| {
        let mut command = Command::cargo_bin("moewarden").unwrap();
        command.args(["report", "--overwrite", "--output-dir"]).arg(path("report"));
        let ran = command.args(runs.iter().map(|run| path(run))).output().unwrap();
        String::from_utf8(ran.stdout).unwrap()
    };
    let out = report(&["base", "tuned", "restored"]);
    assert!(
        out.contains("share of the gain lost") && out.contains("restored, restored routers, exact replies"),
        "{out}"
    );
    assert!(!report(&["tuned", "restored"]).contains("share of the gain lost"), "without the base there is no gain");
}
