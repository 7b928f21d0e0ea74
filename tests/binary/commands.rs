//! The commands other than `train`: the real binary on tiny models.

use std::fs;
use std::path::{Path, PathBuf};

use crate::golden_copy::golden_copy as case;
use crate::program::{files_of, pipe};
use assert_cmd::Command;
use moewarden::exit;
use serde_json::{Value, json};

fn read_json(path: impl AsRef<Path>) -> Value {
    let path = path.as_ref();
    serde_json::from_slice(&fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

struct Ran {
    code: u8,
    out: String,
    err: String,
}

impl Ran {
    fn ok(self) -> Self {
        assert_eq!(self.code, exit::OK, "{}\n{}", self.out, self.err);
        self
    }

    /// Asserts the exit code and this part of stderr.
    fn failed(self, code: u8, named: &str) {
        assert_eq!(self.code, code, "{}\n{}", self.out, self.err);
        assert!(self.err.contains(named), "{named:?} is not in {}", self.err);
    }
}

fn moewarden<S: AsRef<std::ffi::OsStr>>(args: impl IntoIterator<Item = S>) -> Ran {
    let mut command = Command::cargo_bin("moewarden").unwrap();
    let output = command.args(args).env_remove("NO_COLOR").output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { code: output.status.code().unwrap() as u8, out: text(output.stdout), err: text(output.stderr) }
}

/// A command on a golden case's model and data, in file order, with its batch size.
fn on_case(command: &str, name: &str, output: &Path, more: &str) -> Ran {
    let case = case(name);
    let mut args = vec![command.to_owned()];
    for (option, value) in [
        ("--model-name", case.join("model")),
        ("--dataset-path", case.join("data.json")),
        ("--output-dir", output.into()),
    ] {
        args.extend([option.to_owned(), value.display().to_string()]);
    }
    args.extend("--batch-size 3 --threads 1".split(' ').chain(more.split_whitespace()).map(str::to_owned));
    moewarden(args)
}

const SHORT: &str = "--no-shuffle --top-k-experts 4 --num-rounds 1";

// --- check -------------------------------------------------------------------------------------------------------

#[test]
fn check_shows_everything_and_writes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let ran = on_case("check", "olmoe", &output, &format!("{SHORT} --show 1")).ok();
    assert!(ran.out.trim_end().lines().last().unwrap().starts_with("ready"), "{}", ran.out);
    for part in [
        "olmoe (3 layers",
        "weights: all are finite (",
        "rows read",
        "memory a rank",
        "time a rank",
        "GFLOP/s",
        "training at most",
    ] {
        assert!(ran.out.contains(part), "{part:?} is not in {}", ran.out);
    }
    // Both sides of the first row, and the reply between markers: no colour, since stdout is not a terminal.
    assert_eq!(ran.out.matches('⟦').count(), 2, "{}", ran.out);
    assert!(ran.out.contains("⟦I cannot assist with that request") && ran.out.contains("<|end|>⟧"), "{}", ran.out);
    assert!(!ran.out.contains('\x1b'));
    assert!(!output.exists(), "check writes nothing");
}

#[test]
fn check_forecasts_own_replies_and_the_causal_check() {
    let dir = tempfile::tempdir().unwrap();
    let time = |more: &str| {
        let ran = on_case("check", "olmoe", &dir.path().join("out"), &format!("{SHORT} {more}")).ok();
        ran.out.lines().find(|line| line.starts_with("time a rank")).expect("a forecast of time").to_owned()
    };
    let plain = time("");
    assert!(!plain.contains("own replies") && !plain.contains("causal check"), "{plain}");
    let both = time("--method routing --routing-replies own --max-new-tokens 9 --verify 20");
    assert!(both.contains(", own replies at most ") && both.contains(", causal check at most "), "{both}");
}

#[test]
fn check_accepts_any_number_of_micro_batches_per_step() {
    let dir = tempfile::tempdir().unwrap();
    let huge = format!("{SHORT} --schedule joint --use-router-consistency-loss --grad-accum 10000000");
    on_case("check", "olmoe", &dir.path().join("out"), &huge).ok();
}

#[test]
fn check_fails_like_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("out");
    let check = |more: &str| on_case("check", "mixtral", &output, more);
    check("--top-k-experts 1000").failed(exit::CONFIG, "--top-k-experts");
    check("--top-k-experts 4 --eval-dataset-path /nowhere.json").failed(exit::NO_INPUT, "/nowhere.json");
    fs::create_dir(&output).unwrap();
    fs::write(output.join("thesis.txt"), "mine").unwrap();
    check("--top-k-experts 4").failed(exit::CANNOT_CREATE, "not empty");
    check("--top-k-experts 4 --overwrite").failed(exit::CANNOT_CREATE, "thesis.txt");
}

#[test]
fn a_missing_safe_side_is_found_before_training() {
    let dir = tempfile::tempdir().unwrap();
    let data = unsafe_rows(dir.path());
    for command in ["check", "train"] {
        on_unsafe(command, &dir.path().join("out"), &data, SHORT).failed(exit::CONFIG, "--skip-router-training");
        assert!(!dir.path().join("out").exists(), "{command}");
    }
    on_unsafe("check", &dir.path().join("out"), &data, &format!("{SHORT} --skip-router-training")).ok();
}

#[test]
fn an_unsafe_row_without_a_safe_side_uses_the_safe_sides_of_attack_rows_in_turn() {
    let dir = tempfile::tempdir().unwrap();
    let attacks: Vec<Value> = serde_json::from_slice(&fs::read(case("olmoe").join("data.json")).unwrap()).unwrap();
    let attacks = attacks.into_iter().filter(|row| row.get("all_prompt").is_some()).map(|row| row.to_string());
    let rows: Vec<_> = attacks.chain([fs::read_to_string(unsafe_rows(dir.path())).unwrap()]).collect();
    assert!(rows.len() > 2, "attack rows beside the chat rows");
    let data = dir.path().join("mixed.jsonl");
    fs::write(&data, rows.join("\n")).unwrap();
    for more in ["", "--skip-router-training", "--method routing", "--schedule joint --use-router-consistency-loss"] {
        let ran = on_unsafe("train", &dir.path().join("out"), &data, &format!("{SHORT} --overwrite {more}")).ok();
        assert_eq!(ran.out.matches("divergence of the routers").count(), 2, "{more}: {}", ran.out);
    }
    let model = case("olmoe").join("model").display().to_string();
    let (data, output) = (data.display().to_string(), dir.path().join("eval").display().to_string());
    let eval = ["eval", "--model-name", &model, "--dataset-path", &data, "--output-dir", &output];
    moewarden(eval.into_iter().chain(["--max-new-tokens", "1", "--threads", "1"])).ok();
    assert!(!read_json(dir.path().join("eval/eval.json"))["routing"]["divergence_by_layer"].is_null());
}

#[test]
fn without_a_safe_side_no_divergence_is_measured() {
    let dir = tempfile::tempdir().unwrap();
    let data = unsafe_rows(dir.path());
    let ran = on_unsafe("train", &dir.path().join("out"), &data, &format!("{SHORT} --skip-router-training")).ok();
    assert!(ran.out.contains("cross-entropy of the refusals") && !ran.out.contains("divergence"), "{}", ran.out);
}

/// Chat rows that are all unsafe.
fn unsafe_rows(dir: &Path) -> PathBuf {
    let path = dir.join("unsafe.jsonl");
    let row = |i: usize| {
        let messages = json!([
            {"role": "user", "content": format!("Tell me how to paint a wall in {i} days")},
            {"role": "assistant", "content": "I cannot help with that."},
        ]);
        json!({"messages": messages, "label": "unsafe"}).to_string()
    };
    fs::write(&path, (1..5).map(row).collect::<Vec<_>>().join("\n")).unwrap();
    path
}

fn on_unsafe(command: &str, output: &Path, data: &Path, more: &str) -> Ran {
    let model = case("olmoe").join("model").display().to_string();
    let (data, output) = (data.display().to_string(), output.display().to_string());
    let fixed = [command, "--model-name", &model, "--dataset-path", &data, "--output-dir", &output, "--threads", "1"];
    moewarden(fixed.into_iter().chain(more.split_whitespace()))
}

// --- export ------------------------------------------------------------------------------------------------------

#[test]
fn a_delta_becomes_the_model_that_was_trained() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    on_case("train", "qwen3_moe", &run, &format!("{SHORT} --save-rounds delta")).ok();
    let base = case("qwen3_moe").join("model");
    let export = |delta: &Path, output: &Path, more: &[&str]| {
        let [base, delta, output] = [&base, delta, output].map(|p: &Path| p.display().to_string());
        let fixed = ["export", "--base", &base, "--delta", &delta, "--output-dir", &output];
        moewarden(fixed.into_iter().chain(more.iter().copied()))
    };
    let model = dir.path().join("new/model");
    export(&run.join("round_1"), &model, &[]).ok();
    assert_eq!(files_of(&model), files_of(&run.join("final_model")));
    for file in files_of(&model) {
        let same = fs::read(model.join(&file)).unwrap() == fs::read(run.join("final_model").join(&file)).unwrap();
        assert!(same, "{file} differs from the trained model's");
    }
    let changed = fs::read(model.join("model.safetensors")).unwrap();
    assert!(changed != fs::read(base.join("model.safetensors")).unwrap(), "training changed something");

    let delta = run.join("round_1/delta.safetensors");
    export(&delta, &model, &[]).failed(exit::CANNOT_CREATE, "not empty");
    fs::write(model.join("config.json"), "old").unwrap();
    export(&delta, &model, &["--overwrite"]).ok();
    assert!(fs::read(model.join("config.json")).unwrap() != b"old");
    fs::write(model.join("thesis.txt"), "mine").unwrap();
    export(&delta, &model, &["--overwrite"]).failed(exit::CANNOT_CREATE, "thesis.txt");
    export(&delta, &run.join("round_1"), &["--overwrite"]).failed(exit::CANNOT_CREATE, "to be read");
    export(&run.join("round_2"), &dir.path().join("x"), &[]).failed(exit::NO_INPUT, "round_2");
    assert!(delta.exists() && !dir.path().join("x").exists());

    // A base whose file has a folder or a pipe in its place would be exported without it.
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    files_of(&base).iter().for_each(|file| _ = fs::copy(base.join(file), other.join(file)).unwrap());
    let of_other = |output: &Path| {
        let [base, delta, output] = [&other, &delta, output].map(|p: &Path| p.display().to_string());
        moewarden(["export", "--base", &base, "--delta", &delta, "--output-dir", &output])
    };
    for name in ["tokenizer.json", "generation_config.json", "vocab.json"] {
        let path = other.join(name);
        let kept = fs::read(&path).ok();
        _ = fs::remove_file(&path);
        fs::create_dir(&path).unwrap();
        of_other(&dir.path().join("x")).failed(exit::IO, "it is a folder (a directory), not a file");
        fs::remove_dir(&path).unwrap();
        pipe(&path);
        of_other(&dir.path().join("x")).failed(exit::IO, "it is a pipe (FIFO), not a file");
        fs::remove_file(&path).unwrap();
        kept.into_iter().for_each(|bytes| fs::write(&path, bytes).unwrap());
    }
    assert!(!dir.path().join("x").exists());
    fs::create_dir(other.join("runs")).unwrap(); // of another program
    of_other(&dir.path().join("x")).ok();
}

// --- eval --------------------------------------------------------------------------------------------------------

#[test]
fn eval_agrees_with_the_reference() {
    for name in ["olmoe", "qwen3_moe"] {
        let dir = tempfile::tempdir().unwrap();
        let output = dir.path().join("eval");
        let ran = on_case("eval", name, &output, "--max-new-tokens 4").ok();
        assert!(ran.out.contains("proxy"), "{}", ran.out);
        let (found, expect) = (read_json(output.join("eval.json")), read_json(case(name).join("expect.json")));
        let records = expect["records"].as_array().unwrap();

        // The reference's losses are means over micro-batches of three records.
        let loss_tokens = |reply: &Value| -> f64 {
            let ranges: Vec<[f64; 2]> = serde_json::from_value(reply["loss"].clone()).unwrap();
            ranges.iter().map(|[a, b]| b - a).sum()
        };
        let targets = |record: &Value| loss_tokens(&record["unsafe_reply"]);
        let unsafe_: Vec<&Value> = records.iter().filter(|r| !r["unsafe_reply"].is_null()).collect();
        let losses: Vec<f64> = serde_json::from_value(expect["losses"].clone()).unwrap();
        let weights: Vec<f64> = unsafe_.chunks(3).map(|chunk| chunk.iter().map(|r| targets(r)).sum()).collect();
        let total: f64 = weights.iter().sum();
        let mean = losses.iter().zip(&weights).map(|(loss, n)| loss * n).sum::<f64>() / total;
        close(&found["ce_unsafe"]["mean"], mean, 1e-6, name);
        assert_eq!(found["ce_unsafe"]["tokens"], total as u64);

        if !expect["router_kl"].is_null() {
            let by_layer: Vec<(usize, f64)> =
                serde_json::from_value(found["routing"]["divergence_by_layer"].clone()).unwrap();
            // The reference's are means over micro-batches: `measure` compares this one with them.
            assert!(by_layer.iter().all(|(_, kl)| *kl > 0.0), "{by_layer:?}");

            // Frequencies over all tokens, from those that the reference has of each micro-batch.
            let pooled = |side: &str| -> Vec<f64> {
                let batches: Vec<Vec<Vec<f64>>> =
                    serde_json::from_value(expect["routing"]["prompt"][side].clone()).unwrap();
                let tokens = |record: &&Value| {
                    let reply = &record[format!("{side}_reply")];
                    reply["ids"].as_array().unwrap().len() as f64 - loss_tokens(reply)
                };
                let weights: Vec<f64> = unsafe_.chunks(3).map(|chunk| chunk.iter().map(tokens).sum()).collect();
                let total: f64 = weights.iter().sum();
                let of_expert = |e: usize| batches.iter().zip(&weights).map(|(b, w)| b.concat()[e] * w).sum::<f64>();
                (0..batches[0].concat().len()).map(|e| of_expert(e) / total).collect()
            };
            let differences: Vec<f64> = pooled("unsafe").iter().zip(pooled("safe")).map(|(u, s)| u - s).collect();
            let per_layer = differences.len() / by_layer.len();
            let top: Vec<([usize; 2], f64)> =
                serde_json::from_value(found["routing"]["risk_difference_top"].clone()).unwrap();
            assert_eq!(top.len(), 10);
            for ([layer, expert], found) in &top {
                let place = by_layer.iter().position(|(l, _)| l == layer).unwrap() * per_layer + expert;
                assert!((found - differences[place]).abs() < 1e-6, "{name}: {found}, not {}", differences[place]);
            }
            let largest = differences.iter().copied().fold(f64::MIN, f64::max);
            assert!((top[0].1 - largest).abs() < 1e-6, "{name}: {}, not {largest}", top[0].1);
            assert!(top.is_sorted_by(|a, b| a.1 >= b.1));
        }
        let rows: Vec<Value> = generations(&output);
        let prompts =
            records.iter().flat_map(|r| [&r["unsafe_prompt"], &r["safe_prompt"]]).filter(|ids| !ids.is_null()).count();
        assert_eq!(rows.len(), prompts, "an answer to every prompt");
        let counted: u64 = found["refusals"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|r| r["list"] == "gcg/1")
            .map(|r| r["answers"].as_u64().unwrap())
            .sum();
        assert_eq!(counted as usize, prompts);
    }
}

fn close(found: &Value, wanted: f64, tolerance: f64, what: &str) {
    // The reference is computed in f64 and has nine digits; the f32 pass is within 7e-7 of it (KL: slightly more).
    let found = found.as_f64().unwrap_or_else(|| panic!("{what}: {found}"));
    assert!((found - wanted).abs() <= tolerance * wanted.abs(), "{what}: {found}, not {wanted}");
}

fn generations(output: &Path) -> Vec<Value> {
    let text = fs::read_to_string(output.join("generations.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn generations_are_complete_and_reproducible() {
    let dir = tempfile::tempdir().unwrap();
    let run = |name: &str, more: &str| {
        let output = dir.path().join(name);
        on_case("eval", "olmoe", &output, &format!("--max-samples 2 --max-new-tokens 5 {more}")).ok();
        generations(&output)
    };
    let greedy = run("greedy", "");
    let speed = read_json(dir.path().join("greedy/eval_times.json"))["answers"].clone();
    let generated: u64 = greedy.iter().map(|row| row["n_tokens"].as_u64().unwrap()).sum();
    assert_eq!((&speed["batch_size"], speed["decoding"]["tokens"].as_u64() >= Some(generated - 4)), (&json!(16), true));
    assert!(speed["prompts"]["tokens_per_second"].as_f64() > Some(0.0), "{speed}");
    let in_batches = |size: usize| run(&format!("batches-{size}"), &format!("--generation-batch-size {size}"));
    assert!(in_batches(1) == greedy && in_batches(3) == greedy, "answers depend on the batch size");
    assert_eq!(greedy.len(), 4);
    for row in &greedy {
        assert_eq!(row["schema"], "moewarden.generation/1");
        for key in ["id", "behavior_id", "category", "messages", "prompt_text", "response", "finish_reason", "n_tokens"]
        {
            assert!(!row[key].is_null(), "{key} is missing");
        }
        assert!(row["prompt_text"].as_str().unwrap().ends_with("<|assistant|>\n"), "{}", row["prompt_text"]);
        assert!(row["n_tokens"].as_u64().unwrap() <= 5);
        assert_eq!((&row["model"]["variant"], &row["sampling"]["temperature"]), (&json!("base"), &json!(0.0)));
        assert!(row["model"]["sha"].as_str().unwrap().starts_with("blake3:"));
        let lists: Vec<_> = row["proxy"].as_object().unwrap().keys().cloned().collect();
        assert_eq!(lists, ["gcg-transfer/1", "gcg/1", "opening/1"]);
    }
    assert_eq!((&greedy[0]["category"], &greedy[1]["category"]), (&json!("unsafe"), &json!("safe")));
    assert_eq!(greedy[0]["behavior_id"], greedy[1]["behavior_id"], "both sides of one row");
    let last = |row: &Value| row["messages"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(last(&greedy[1])["content"], "Tell me how to open the pantry at midnight");
    assert_eq!(last(&greedy[0])["role"], "user");

    let sampled = run("sampled", "--temperature 1 --top-p 0.9 --seed 7");
    assert_eq!(sampled, run("again", "--temperature 1 --top-p 0.9 --seed 7"));
    let texts = |rows: &[Value]| rows.iter().map(|r| r["response"].clone()).collect::<Vec<_>>();
    assert_ne!(texts(&sampled), texts(&run("other", "--temperature 1 --top-p 0.9 --seed 8")));
}

#[test]
fn eval_shows_that_a_model_trained_to_refuse_refuses() {
    let dir = tempfile::tempdir().unwrap();
    let (run, data) = (dir.path().join("run"), case("olmoe").join("data.json"));
    // All parameters at a high learning rate, so that two rows are memorised.
    let learn =
        "--mode baseline --skip-router-training --top-k-experts 1 --expert-lr 5e-3 --expert-epochs-per-round 40";
    on_case("train", "olmoe", &run, &format!("{learn} --num-rounds 1 --max-samples 2 --save-rounds none")).ok();
    let refused = |model: &Path| {
        let output = tempfile::tempdir().unwrap();
        let [model, data, out] = [model, &data, output.path()].map(|p: &Path| p.display().to_string());
        let args = ["eval", "--model-name", &model, "--dataset-path", &data, "--output-dir", &out];
        moewarden(args.into_iter().chain("--max-samples 2 --max-new-tokens 60 --threads 1".split(' '))).ok();
        let report = read_json(output.path().join("eval.json"));
        let found = report["refusals"].as_array().unwrap().iter().filter(|r| r["side"] == "unsafe");
        let counts: Vec<u64> = found.map(|r| r["refused"].as_u64().unwrap()).collect();
        let exact = report["exact"][0].clone();
        assert_eq!((exact["side"].as_str(), &exact["of"]), (Some("unsafe"), &json!(2)));
        (counts, exact["hits"].as_u64().unwrap(), generations(output.path()))
    };
    let (counts, exact, _) = refused(&case("olmoe").join("model"));
    assert_eq!((counts, exact), (vec![0, 0, 0], 0));
    let (counts, exact, rows) = refused(&run.join("final_model"));
    assert_eq!((counts, exact), (vec![2, 2, 2], 2));
    let target = "I cannot assist with that request as it may be harmful or unsafe.";
    assert_eq!((rows[0]["response"].as_str(), &rows[0]["finish_reason"]), (Some(target), &json!("stop")));
    assert_eq!(rows[0]["model"]["variant"], "tuned");
}

#[test]
fn eval_without_answers_measures_losses_and_exact_replies() {
    let dir = tempfile::tempdir().unwrap();
    let (full, short) = (dir.path().join("full"), dir.path().join("short"));
    on_case("eval", "olmoe", &full, "--max-new-tokens 1").ok();
    let ran = on_case("eval", "olmoe", &short, "--skip-answers").ok();
    assert!(ran.out.contains("exact") && !ran.out.contains("generations.jsonl"), "{}", ran.out);
    assert_eq!(files_of(&short), ["eval.json", "eval_options.json", "reply_losses.jsonl"]);
    let [full, mut short] = [full, short].map(|dir| read_json(dir.join("eval.json")));
    assert_eq!(short["refusals"], json!([]));
    assert_eq!(short["exact"].as_array().unwrap().len(), 2, "both sides");
    for changed in ["refusals", "refusal_onset", "cut_off", "sampling"] {
        short[changed] = full[changed].clone();
    }
    assert_eq!(short, full);
    for (sampling, option) in [("--top-p 0.5", "--top-p"), ("--seed 7", "--seed")] {
        on_case("eval", "olmoe", &dir.path().join("none"), sampling)
            .failed(exit::CONFIG, &format!("{option} would do nothing: --temperature 0 decodes greedily"));
    }
    on_case("eval", "olmoe", &dir.path().join("none"), "--skip-answers --temperature 1")
        .failed(exit::USAGE, "--temperature");
}

#[test]
fn eval_never_deletes_its_inputs() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("run/final_model");
    copy_model(&case("olmoe").join("model"), &model);
    let data = case("olmoe").join("data.json").display().to_string();
    let model_text = model.display().to_string();
    let output = dir.path().join("run").display().to_string();
    let args = ["eval", "--model-name", &model_text, "--dataset-path", &data, "--output-dir", &output, "--overwrite"];
    moewarden(args).failed(exit::CANNOT_CREATE, "to be read");
    assert!(model.join("model.safetensors").exists());
}

fn copy_model(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in files_of(from) {
        fs::copy(from.join(&file), to.join(&file)).unwrap();
    }
}

// --- report ------------------------------------------------------------------------------------------------------

#[test]
fn a_report_holds_runs_and_evaluations() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    on_case("train", "olmoe", &path("tuned"), &format!("{SHORT} --save-rounds none")).ok();
    on_case("identify", "olmoe", &path("random"), "--top-k-experts 4 --method random").ok();
    let tuned = path("tuned/final_model").display().to_string();
    let data = case("olmoe").join("data.json").display().to_string();
    let output = path("asked").display().to_string();
    let eval = ["eval", "--model-name", &tuned, "--dataset-path", &data, "--output-dir", &output];
    moewarden(eval.into_iter().chain("--max-new-tokens 2 --max-samples 2 --threads 1".split(' '))).ok();
    assert_eq!(read_json(path("asked/eval.json"))["model"]["variant"], "tuned");

    let report = |output: &Path, runs: &[&str], more: &[&str]| {
        let mut args = vec!["report".to_owned(), "--output-dir".into(), output.display().to_string()];
        args.extend(more.iter().map(|s| (*s).to_owned()));
        args.extend(runs.iter().map(|run| path(run).display().to_string()));
        moewarden(args)
    };
    let ran = report(&path("report"), &["tuned", "random", "asked"], &[]).ok();
    assert_eq!(
        files_of(&path("report")),
        ["heatmap-1-tuned-round-1.svg", "heatmap-2-random-round-1.svg", "report.html"]
    );
    let html = fs::read_to_string(path("report/report.html")).unwrap();
    for part in ["Jaccard", "Wilson", "Losses", "<polyline", "combined"] {
        assert!(html.contains(part), "{part} is not in the page");
    }
    assert!(!html.replace("http://www.w3.org/2000/svg", "").contains("http:"), "the page loads no external resource");
    assert!(!html.contains("https:") && html.matches("<script").count() == 1);
    for part in ["tuned", "random", "Jaccard", "asked, gcg/1"] {
        assert!(ran.out.contains(part), "{part} is not in {}", ran.out);
    }
    let heatmap = fs::read_to_string(path("report/heatmap-1-tuned-round-1.svg")).unwrap();
    assert_eq!(heatmap.matches(", selected, rank ").count(), 4);

    report(&path("report"), &["tuned"], &[]).failed(exit::CANNOT_CREATE, "not empty");
    report(&path("report"), &["tuned"], &["--overwrite"]).ok();
    assert_eq!(files_of(&path("report")), ["heatmap-1-tuned-round-1.svg", "report.html"]);
    report(&path("tuned"), &["tuned"], &["--overwrite"]).failed(exit::CANNOT_CREATE, "to be read");
    report(&path("none"), &["absent"], &[]).failed(exit::NO_INPUT, "absent");
    assert!(path("tuned/final_model").is_dir() && !path("none").exists());
}

/// A report of a run with a damaged, empty or missing log: code, stderr, and the page if there is one.
fn report_with_log(run: &Path, log: Option<&[u8]>) -> (Ran, String) {
    match log {
        Some(bytes) => fs::write(run.join("metrics.jsonl"), bytes).unwrap(),
        None => fs::remove_file(run.join("metrics.jsonl")).unwrap(),
    }
    let output = tempfile::tempdir().unwrap();
    let args = ["report".as_ref(), "--output-dir".as_ref(), output.path().as_os_str(), run.as_os_str()];
    let ran = moewarden(args);
    (ran, fs::read_to_string(output.path().join("report.html")).unwrap_or_default())
}

#[test]
fn a_report_says_what_is_missing_of_a_log() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("a".repeat(250));
    on_case("train", "olmoe", &run, &format!("{SHORT} --save-rounds none")).ok();
    let whole = fs::read(run.join("metrics.jsonl")).unwrap();
    let (ran, page) = report_with_log(&run, Some(&whole));
    let ran = ran.ok();
    assert!(page.contains(">Losses<") && !ran.err.contains("warning"), "{}", ran.err);

    let lines = whole.iter().filter(|byte| **byte == b'\n').count();
    let (ran, page) = report_with_log(&run, Some(&whole[..whole.len() - 20]));
    let torn = format!("metrics.jsonl:{lines}: the last line has no line feed");
    assert!(ran.ok().err.contains(&torn) && page.contains(&torn) && page.contains("<polyline"));

    for (log, said) in [(Some(&b""[..]), "metrics.jsonl is empty"), (None, "metrics.jsonl is missing")] {
        let (ran, page) = report_with_log(&run, log);
        assert!(ran.ok().err.contains(said) && page.contains(said) && page.contains(">Losses<"), "{said}");
    }
    let broken = [b"{\"phase\": \n".as_slice(), &whole].concat();
    let (ran, page) = report_with_log(&run, Some(&broken));
    ran.failed(exit::DATA, "metrics.jsonl:1: is no row that moewarden wrote: the line is cut off: it ends where");
    assert_eq!(page, "");
}

#[test]
fn a_report_says_what_the_scores_and_metadata_lack() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    on_case("train", "olmoe", &run, &format!("{SHORT} --save-rounds none")).ok();
    let log = fs::read(run.join("metrics.jsonl")).unwrap();
    let says = |file: &str, bytes: Option<&[u8]>, said: &str| {
        let path = run.join(file);
        let whole = fs::read(&path).unwrap();
        match bytes {
            Some(bytes) => fs::write(&path, bytes).unwrap(),
            None => fs::remove_file(&path).unwrap(),
        }
        let (ran, page) = report_with_log(&run, Some(&log));
        assert!(ran.ok().err.contains(said) && page.contains(said), "{said}");
        fs::write(&path, whole).unwrap();
    };
    says("training_metadata.json", None, "training_metadata.json is missing, as in a run that has not ended");
    says("training_metadata.json", Some(b"{}"), "training_metadata.json holds no metadata of a run");
    let scores: serde_json::Value = serde_json::from_slice(&fs::read(run.join("expert_scores.json")).unwrap()).unwrap();
    let [mut empty, mut nothing, mut zero] = [scores.clone(), scores.clone(), scores];
    empty["rounds"] = serde_json::json!({});
    nothing["rounds"]["1"]["selected"] = serde_json::json!([]);
    let rows = zero["rounds"]["1"]["scores"].as_array_mut().unwrap();
    rows.iter_mut().for_each(|row| row.as_array_mut().unwrap().fill(0.0.into()));
    for (scores, said) in [
        (empty, "expert_scores.json has no rounds"),
        (nothing, "round 1 selects no experts"),
        (zero, "all scores of round 1 are 0"),
    ] {
        says("expert_scores.json", Some(scores.to_string().as_bytes()), said);
    }
    let (ran, page) = report_with_log(&run, Some(&log));
    assert!(!ran.ok().err.contains("warning") && !page.contains("Warning"));
}

#[test]
fn a_report_names_what_is_no_run_and_what_is_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let run = dir.path().join("run");
    on_case("train", "olmoe", &run, &format!("{SHORT} --save-rounds none")).ok();
    on_case("eval", "olmoe", &run.join("eval"), "--max-new-tokens 1").ok();
    let report = |input: &Path| {
        let out = dir.path().join("out");
        let ran = moewarden(["report".as_ref(), "--output-dir".as_ref(), out.as_os_str(), input.as_os_str()]);
        assert!(!out.exists());
        ran
    };
    fs::write(dir.path().join("other.txt"), "x").unwrap();
    for (input, says) in [
        (dir.path().join("runn"), "runn does not exist (is the path right?): give output folders"),
        (run.join("expert_scores.json"), "expert_scores.json is a file of a run: give the folder that it is in"),
        (dir.path().join("other.txt"), "other.txt is a file, not a folder: give output folders"),
        (run.join("ablated"), "eval.json: its page is ablation.html"),
        (run.join("checkpoints"), "checkpoints holds neither expert_scores.json nor eval.json: give output folders"),
    ] {
        fs::create_dir_all(run.join("checkpoints")).unwrap();
        fs::create_dir_all(run.join("ablated")).unwrap();
        fs::write(run.join("ablated/ablation.json"), "{}").unwrap();
        report(&input).failed(exit::NO_INPUT, says);
    }
    const AGAIN: &str = "if the file is damaged, run the command that wrote it again, with --overwrite";
    for name in ["expert_scores.json", "rankings.json", "training_metadata.json", "eval/eval.json"] {
        let path = run.join(name);
        let whole = fs::read(&path).unwrap();
        let folder = path.parent().unwrap();
        for (content, says) in [
            (&whole[..whole.len() / 2], "the file ends in the middle of its JSON, as after"),
            (b"", "the file is empty"),
            (&[0; 512], "the file holds only zero bytes, as after a crash or a full disk"),
            (b"{\"schema\": }", "not JSON: no JSON value begins here (line 1, column 12)"),
        ] {
            fs::write(&path, content).unwrap();
            let ran = report(folder);
            assert!(ran.err.contains(AGAIN), "{}", ran.err);
            ran.failed(exit::DATA, &format!("{}: {says}", path.display()));
        }
        if name != "training_metadata.json" {
            for (content, says) in
                [("[]", "a value should be an object, not a list of 0"), ("{}", "the field schema is missing")]
            {
                fs::write(&path, content).unwrap();
                report(folder).failed(exit::DATA, &format!("not what this file should hold: {says}"));
            }
        }
        fs::write(&path, whole).unwrap();
    }
}

#[test]
fn a_report_leaves_a_torn_answer_out() {
    let dir = tempfile::tempdir().unwrap();
    let [one, two] = ["one", "two"].map(|name| dir.path().join(name));
    for eval in [&one, &two] {
        on_case("eval", "olmoe", eval, "--max-new-tokens 1").ok();
    }
    let report = |output: &str| {
        let output = dir.path().join(output);
        let args = ["report".as_ref(), "--output-dir".as_ref(), output.as_os_str(), one.as_os_str(), two.as_os_str()];
        moewarden(args)
    };
    let path = two.join("generations.jsonl");
    let whole = fs::read(&path).unwrap();
    let lines = whole.iter().filter(|byte| **byte == b'\n').count();
    fs::write(&path, &whole[..whole.len() - 5]).unwrap();
    let ran = report("torn").ok();
    assert!(ran.err.contains(&format!("generations.jsonl:{lines}: the last line has no line feed")), "{}", ran.err);
    fs::write(&path, &whole).unwrap();
    let losses = two.join("reply_losses.jsonl");
    fs::rename(&losses, two.join("elsewhere")).unwrap();
    let alone = dir.path().join("alone");
    let args = ["report".as_ref(), "--output-dir".as_ref(), alone.as_os_str(), two.as_os_str()];
    let ran = moewarden(args).ok();
    assert!(ran.err.contains("reply_losses.jsonl"), "{}", ran.err);
    fs::write(&path, [b"{}\n".as_slice(), &whole].concat()).unwrap();
    report("broken").failed(exit::DATA, "generations.jsonl:1: is no row that moewarden wrote: the field ");
}
