//! How experts are selected: given, random and normalised selections over the rounds of a run.

use std::fs;
use std::path::Path;

use moewarden::exit;
use serde_json::{Value, json};

use crate::program::{self, Ran, moewarden, start, write_rows};

/// Two rounds that train experts in `folder`; `more` may contain `{DIR}`, the folder of all runs of the test.
fn train(dir: &Path, folder: &str, more: &str) -> Ran {
    run("train --num-rounds 2 --skip-router-training --expert-lr 1e-3 --save-rounds none", dir, folder, more)
}

fn run(command: &str, dir: &Path, folder: &str, more: &str) -> Ran {
    let data = dir.join("rows.json");
    if !data.exists() {
        write_rows(&data, 9);
    }
    let text = format!(
        "{command} --model-name {} --dataset-path {} --output-dir {} --batch-size 2 --safe-response No. --threads 1 {}",
        program::model("olmoe").display(),
        data.display(),
        dir.join(folder).display(),
        more.replace("{DIR}", &dir.display().to_string()),
    );
    start(moewarden(0, text.split_whitespace())).end()
}

fn json_of(dir: &Path, file: &str) -> Value {
    let path = dir.join(file);
    serde_json::from_slice(&fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))).unwrap()
}

/// A round of `expert_scores.json`.
fn round(dir: &Path, folder: &str, round: usize) -> Value {
    json_of(dir, &format!("{folder}/expert_scores.json"))["rounds"][round.to_string()].clone()
}

#[test]
fn given_experts_are_trained_in_all_rounds() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run("identify", dir, "found", "--top-k-experts 3").ok();
    let found = round(dir, "found", 1)["selected"].clone();
    let ran = train(dir, "given", "--method given --experts {DIR}/found/expert_scores.json").ok();
    assert!(ran.out.contains("selected 3 of 24 experts"), "{}", ran.out);
    let first = round(dir, "given", 1);
    assert_eq!((&first["selected"], &first["scores"], &first["micro_batches"]), (&found, &json!([]), &json!(0)));
    let second = round(dir, "given", 2);
    assert_eq!((&second["selected"], &second["kept_from"]), (&found, &json!(1)));
    let log = fs::read_to_string(dir.join("given/metrics.jsonl")).unwrap();
    assert!(!log.contains("identify"), "nothing is scored");

    // The same experts in another format give the same weights; a resumed run may take them from another file.
    let text: String = found.as_array().unwrap().iter().map(|id| format!("{}.{}\n", id[0], id[1])).collect();
    fs::write(dir.join("list.txt"), text).unwrap();
    train(dir, "listed", "--method given --experts {DIR}/list.txt").ok();
    let weights = |folder: &str| fs::read(dir.join(folder).join("final_model/model.safetensors")).unwrap();
    assert!(weights("given") == weights("listed"));
    train(dir, "listed", "--method given --experts {DIR}/found/expert_scores.json --resume").ok();
    fs::write(dir.join("other.json"), "[[0, 1]]").unwrap();
    let other = train(dir, "listed", "--method given --experts {DIR}/other.json --resume");
    assert_ne!(other.code, Some(0), "other experts are another run: {}", other.out);

    for (text, code, named) in [
        (
            "[[0, 1], [9, 0]]",
            exit::DATA,
            "entry 2, expert 0 of layer 9, does not exist: the model's layers with experts are",
        ),
        ("0.99", exit::DATA, "expert 99 of layer 0, does not exist"),
        ("0.1\n0.1", exit::DATA, "comes twice"),
        ("", exit::DATA, "lists no expert"),
    ] {
        fs::write(dir.join("bad"), text).unwrap();
        train(dir, "refused", "--method given --experts {DIR}/bad").failed(code, &["bad: ", named]);
    }
    train(dir, "refused", "--method given --experts {DIR}/absent").failed(exit::NO_INPUT, &["absent"]);
    assert!(!dir.join("refused").exists());
}

#[test]
fn random_experts_are_drawn_once_a_run() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run("identify", dir, "found", "--top-k-experts 4").ok();
    let found = round(dir, "found", 1)["selected"].clone();
    let of_layer =
        |selected: &Value, layer: usize| selected.as_array().unwrap().iter().filter(|id| id[0] == json!(layer)).count();
    for (folder, more) in [
        ("total", ""),
        ("layer", "--random-match layer"),
        ("exclude", "--random-exclude-found"),
        ("both", "--random-match layer --random-exclude-found"),
    ] {
        train(dir, folder, &format!("--method random --top-k-experts 4 {more}")).ok();
        let (first, second) = (round(dir, folder, 1), round(dir, folder, 2));
        assert_eq!(first["selected"].as_array().unwrap().len(), 4);
        assert_eq!((&first["selected"], &json!(1)), (&second["selected"], &second["kept_from"]), "{folder}");
        if more.contains("layer") {
            for layer in 0..3 {
                assert_eq!(of_layer(&first["selected"], layer), of_layer(&found, layer), "{folder}");
            }
        }
        if more.contains("exclude") {
            let drawn = first["selected"].as_array().unwrap();
            assert!(drawn.iter().all(|id| !found.as_array().unwrap().contains(id)), "{drawn:?}, without {found}");
        }
    }
    // Refused before anything is computed, and by `check` too.
    for command in ["identify", "check"] {
        run(command, dir, "refused", "--method random --random-exclude-found --top-k-experts 13")
            .failed(exit::CONFIG, &["--random-exclude-found leaves only 11 experts"]);
    }
}

#[test]
fn scores_are_divided_by_the_sum_of_their_layer() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    run("identify", dir, "plain", "--top-k-experts 4").ok();
    run("identify", dir, "norm", "--top-k-experts 4 --score-norm layer").ok();
    let scores = |folder| -> Vec<Vec<f64>> { serde_json::from_value(round(dir, folder, 1)["scores"].clone()).unwrap() };
    for (plain, norm) in scores("plain").iter().zip(scores("norm")) {
        let sum: f64 = plain.iter().sum();
        for (plain, norm) in plain.iter().zip(norm) {
            assert!((norm - plain / sum).abs() <= 1e-15, "{norm}, not {plain} / {sum}"); // one rounding
        }
    }
    let file = |folder: &str| json_of(dir, &format!("{folder}/expert_scores.json"));
    assert_eq!((&file("plain")["score_norm"], &file("norm")["score_norm"]), (&json!("none"), &json!("layer")));
}

#[test]
fn later_rounds_keep_the_selection_where_asked() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    train(dir, "every", "--top-k-experts 4").ok();
    let [first, second] = [1, 2].map(|n| round(dir, "every", n));
    assert!(second["kept_from"].is_null() && second["scores"] != first["scores"]);

    let ran = train(dir, "once", "--top-k-experts 4 --identify once").ok();
    assert!(ran.out.contains("round 2: the selection of round 1 is kept"), "{}", ran.out);
    let second = round(dir, "once", 2);
    assert_eq!((&second["selected"], &second["kept_from"]), (&first["selected"], &json!(1)));
    assert_eq!((&second["scores"], &second["micro_batches"]), (&json!([]), &json!(0)));

    // Any lower loss than in the first round counts as learned.
    let ran = train(dir, "until", "--top-k-experts 4 --identify-until 1").ok();
    assert!(ran.err.contains("below 1 times the"), "{}", ran.err);
    let second = round(dir, "until", 2);
    assert_eq!((&second["selected"], &second["kept_from"]), (&first["selected"], &json!(1)));
    assert!(second["micro_batches"] == json!(5) && second["scores"] != json!([]), "the scan is recorded: {second}");
}

#[test]
fn inclusion_is_the_same_on_any_number_of_ranks_and_says_what_is_stable() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    for method in ["gradient", "routing --risk-threshold -1"] {
        let identify = |ranks| {
            run("identify", dir, "found", &format!("--method {method} --top-k-experts 4 --ranks {ranks} --overwrite"))
                .ok();
            round(dir, "found", 1)
        };
        let one = identify(1);
        let shares: Vec<Vec<f64>> = serde_json::from_value(one["inclusion"].clone()).unwrap();
        let sum: f64 = shares.concat().iter().sum();
        assert!((sum - 4.0).abs() < 1e-9, "each of the resamples selects 4: {sum}");
        assert!(shares.concat().iter().any(|p| *p > 0.0 && *p < 1.0), "{shares:?}");
        for ranks in 2..=4 {
            assert_eq!(identify(ranks)["inclusion"], one["inclusion"], "{method}, {ranks} ranks");
        }
    }
    run("identify", dir, "off", "--top-k-experts 4 --bootstrap 0").ok();
    let ran = run("identify", dir, "on", "--top-k-experts 4").ok();
    let (off, on) = (round(dir, "off", 1), round(dir, "on", 1));
    assert_eq!((&off["scores"], &off["selected"]), (&on["scores"], &on["selected"]), "the bootstrap changes no score");
    assert!(off["inclusion"].is_null() && off["how_many"]["stable"].is_null());
    let how_many = &on["how_many"];
    assert!(how_many["share"].as_f64().unwrap() > 4.0 / 24.0 && how_many["stable"].is_u64(), "{how_many}");
    assert!(how_many["largest_drop"]["ratio"].as_f64().unwrap() >= 1.0, "{how_many}");
    for part in ["of the total score", "drop", "of the bootstrap resamples"] {
        assert!(ran.out.contains(part), "{part} not in: {}", ran.out);
    }
}

#[test]
fn all_rankings_of_a_run_are_in_one_file() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    train(dir, "found", "--top-k-experts 4").ok();
    train(dir, "random", "--top-k-experts 4 --method random --random-match layer --score-norm layer").ok();
    let names = |folder: &str| -> Vec<Value> {
        let file = json_of(dir, &format!("{folder}/rankings.json"));
        file["rankings"].as_array().unwrap().iter().map(|ranking| ranking["name"].clone()).collect()
    };
    assert_eq!(names("found"), [json!("round-1"), json!("round-2")]);
    assert_eq!(names("random"), [json!("round-1"), json!("round-1-gradient")], "the second round computes none");
    let found = json_of(dir, "found/rankings.json");
    let first = &found["rankings"][0];
    assert_eq!(first["experts"].as_array().unwrap()[..4], first["selected"].as_array().unwrap()[..]);
    assert!(found["spearman"][0][1].as_f64().unwrap() < 1.0);
    let matched = &json_of(dir, "random/rankings.json")["rankings"][1];
    assert_eq!((&matched["method"], &matched["score_norm"]), (&json!("gradient"), &json!("layer")));
    let report =
        ["report", "--output-dir", &dir.join("report").display().to_string(), &dir.join("found").display().to_string()]
            .map(str::to_owned);
    start(moewarden(0, report)).end().ok();
    let page = fs::read_to_string(dir.join("report/report.html")).unwrap();
    for part in ["the Jaccard index |A ∩ B| / |A ∪ B| of each pair", "round-2", "of resamples", "of the total score"]
    {
        assert!(page.contains(part), "{part} is not in the page");
    }
}
