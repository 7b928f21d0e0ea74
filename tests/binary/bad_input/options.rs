//! Options that do not exist, are invalid or contradict each other.

use std::fs;

use super::Scene;

#[test]
fn a_misspelled_option() {
    let scene = Scene::new();
    scene.refuses(&["--top-k-expert", "3"], 2, &["--top-k-expert", "--top-k-experts"]);
    scene.refuses(&["--frobnicate"], 2, &["--frobnicate"]);
    fs::write(scene.path("run.yaml"), "seed: 1\n# a comment\ntop_k_expert: 3\n").unwrap();
    scene.refuses(&["--config", "run.yaml"], 78, &["run.yaml:3", "top_k_expert", "did you mean `top-k-experts`?"]);
    fs::write(scene.path("run.yaml"), "seed: [1\n").unwrap();
    scene.refuses(&["--config", "run.yaml"], 78, &["run.yaml:"]);
    scene.refuses(&["--config", "absent.yaml"], 66, &["absent.yaml"]);
}

#[test]
fn a_key_that_a_file_gives_twice() {
    let scene = Scene::new();
    fs::write(scene.path("run.yaml"), "batch-size: 2\nseed: 1\nbatch-size: 3\n").unwrap();
    let refused = scene.train(&["--config", "run.yaml"]);
    refused.is(78, &["run.yaml:3: `batch-size` is there twice"]);
    assert!(!refused.stderr.contains("Policy"), "{}", refused.stderr);
}

#[test]
fn numbers_beyond_the_machine() {
    for (option, count) in
        [("--ranks", "18446744073709551615"), ("--ranks", "5000000"), ("--threads", "18446744073709551615")]
    {
        let scene = Scene::new();
        for command in ["check", "train", "identify"] {
            let ended = super::Outcome::of(scene.run(command, &[option, count]));
            ended.is(78, &[&format!("{option} {count} is too many")]);
        }
        assert!(!scene.out().exists());
    }
}

#[test]
fn numbers_that_cannot_be_counted_in_eval_and_ablate() {
    let scene = Scene::new();
    for (command, option) in [("eval", "--max-new-tokens"), ("ablate", "--max-new-tokens"), ("ablate", "--random-sets")]
    {
        let mut run = assert_cmd::Command::new(env!("CARGO_BIN_EXE_moewarden"));
        run.arg(command).args([
            "--model-name",
            "model",
            "--dataset-path",
            "rows.jsonl",
            option,
            "18446744073709551615",
        ]);
        if command == "ablate" {
            run.args(["--experts", "rows.jsonl"]);
        }
        super::Outcome::of(run).is(2, &[option, "at most"]);
    }
    let mut run = assert_cmd::Command::new(env!("CARGO_BIN_EXE_moewarden"));
    run.current_dir(scene.temp.path()).args([
        "eval",
        "--model-name",
        "model",
        "--dataset-path",
        "rows.jsonl",
        "--skip-answers",
    ]);
    run.args(["--output-dir", "out", "--max-length", "18446744073709551615", "--threads", "1"]);
    super::Outcome::of(run).is(0, &[]);
}

#[test]
fn a_bomb_of_yaml_aliases() {
    let scene = Scene::new();
    let mut bomb = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x]\n");
    for i in 1..12 {
        let before = vec![format!("*a{}", i - 1); 9].join(", ");
        bomb += &format!("a{i}: &a{i} [{before}]\n");
    }
    fs::write(scene.path("run.yaml"), bomb).unwrap();
    scene.refuses(&["--config", "run.yaml"], 78, &["run.yaml:", "refers to itself too often"]);
}

#[test]
fn invalid_values() {
    let scene = Scene::new();
    scene.refuses(&["--batch-size", "0"], 78, &["--batch-size"]);
    for option in ["--expert-epochs-per-round", "--num-rounds", "--verify", "--max-new-tokens", "--grad-accum"] {
        scene.refuses(&[option, "18446744073709551615"], 78, &[option, "at most"]);
    }
    scene.refuses(&["--expert-lr", "nan"], 78, &["finite"]);
    scene.refuses(&["--batch-size", "many"], 2, &["--batch-size", "many"]);
    scene.refuses(&["--layers", "2-7"], 78, &["--layers 2-7", "layers 0-2"]);
    scene.refuses(&["--layers", "7-2"], 78, &["7-2", "2-7"]);
    scene.refuses(&["--kl-type", "backward"], 2, &["forward", "reverse", "symmetric"]);
}
