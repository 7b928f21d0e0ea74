//! `eval --questions`.

use std::fs;
use std::path::Path;

use moewarden::exit;
use serde_json::{Value, json};

use crate::evaluation::{Scene, read_json};
use crate::program::{moewarden, start};

#[test]
fn questions_have_the_log_likelihoods_of_the_reference() {
    let golden = read_json(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/choices.json"));
    let scene = Scene::new(2);
    let mut questions = golden["questions"].as_array().unwrap().clone();
    let choices = questions.len();
    questions.push(json!({"id": "e1", "question": "Say nothing", "answer": "something"}));
    fs::write(scene.path("q.json"), Value::Array(questions.clone()).to_string()).unwrap();
    for case in ["olmoe", "dense_llama_bias"] {
        let expect = &golden[case];
        let options = format!("--max-new-tokens 3 --questions {}", scene.path("q.json").display());
        let ran = scene.run(case, case, &options).ok();
        assert!(ran.out.contains("Questions answered rightly"), "{}", ran.out);
        let text = fs::read_to_string(scene.path(case).join("questions.jsonl")).unwrap();
        let rows: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(rows.len(), questions.len());
        let floats = |value: &Value| -> Vec<f64> { serde_json::from_value(value.clone()).unwrap() };
        let mut right = [0, 0];
        for (i, row) in rows[..choices].iter().enumerate() {
            let (ours, theirs) = (floats(&row["log_likelihoods"]), floats(&expect["log_likelihoods"][i]));
            // f32 against f64: sums of a few terms of about 6 nats, each within 1e-6 of its size.
            assert!(ours.iter().zip(&theirs).all(|(a, b)| (a - b).abs() < 1e-5), "{case}: {ours:?} {theirs:?}");
            assert_eq!(row["tokens"], expect["tokens"][i], "{case}");
            let texts: Vec<&str> =
                questions[i]["choices"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
            let first_of_highest = |values: &[f64]| {
                (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best }).unwrap()
            };
            let by_byte: Vec<f64> = theirs.iter().zip(&texts).map(|(sum, text)| sum / text.len() as f64).collect();
            let chosen = [first_of_highest(&theirs), first_of_highest(&by_byte)];
            assert_eq!((&row["chosen"], &row["chosen_by_byte"]), (&json!(chosen[0]), &json!(chosen[1])), "{case}");
            let answer = row["answer"].as_u64().unwrap() as usize;
            assert_eq!(answer, [0, 1, 2, 1][i]);
            right.iter_mut().zip(chosen).for_each(|(n, chosen)| *n += usize::from(chosen == answer));
        }
        let report = read_json(&scene.path(case).join("eval.json"))["questions"][0].clone();
        assert_eq!(
            (&report["choices"]["hits"], &report["choices_by_byte"]["hits"]),
            (&json!(right[0]), &json!(right[1]))
        );
        assert_eq!((&report["choices"]["of"], &report["answers"]["of"]), (&json!(choices), &json!(1)));
        assert_eq!((&rows[choices]["correct"], &rows[choices]["answer"]), (&json!(false), &json!("something")));

        // The model's own answer is the right one; three ranks, and a kill before the second of two files.
        let said = rows[choices]["response"].as_str().unwrap().trim();
        let own = json!([{"question": "Say nothing", "answer": said}, {"question": "Say", "answer": "x"}]);
        fs::write(scene.path("own.json"), own.to_string()).unwrap();
        let options = format!("{options} --questions {}", scene.path("own.json").display());
        let [one, three] = ["one", "three"].map(|name| format!("{case}-{name}"));
        scene.run(case, &one, &options).ok();
        scene.run(case, &three, &format!("{options} --ranks 3 --generation-batch-size 1")).ok();
        let questions_of = |name: &str| fs::read(scene.path(name).join("questions.jsonl")).unwrap();
        assert!(scene.bytes(&one) == scene.bytes(&three) && questions_of(&one) == questions_of(&three), "{case}");
        let report = read_json(&scene.path(&one).join("eval.json"))["questions"][1].clone();
        assert_eq!((&report["answers"]["hits"], &report["answers"]["of"]), (&json!(1), &json!(2)));
        let (whole, generations) = (questions_of(&one), fs::read(scene.path(&one).join("generations.jsonl")).unwrap());
        scene.killed(&one, &format!("{case}-killed"), generations.len());
        fs::write(scene.path(&format!("{case}-killed")).join("questions.jsonl"), &whole[..whole.len() - 9]).unwrap();
        scene.run(case, &format!("{case}-killed"), &format!("{options} --resume")).ok();
        assert!(questions_of(&format!("{case}-killed")) == whole);
    }

    // Two evaluations of the same rows and questions are compared in pairs.
    let runs = ["olmoe-one", "olmoe-three"].map(|name| scene.path(name).display().to_string());
    let args = ["report".to_owned(), "--output-dir".into(), scene.path("report").display().to_string()];
    let ran = start(moewarden(0, args.into_iter().chain(runs))).end().ok();
    for said in [
        "Paired differences",
        "olmoe-three, own.json: right, answers",
        "olmoe-three, unsafe prompts: exact replies",
        "+0.0 no interval",
    ] {
        assert!(ran.out.contains(said), "{said}: {}", ran.out);
    }
    // Another pattern is named; and answers that were read by another one are not compared.
    let own = format!(
        "--max-new-tokens 3 --questions {} --questions {}",
        scene.path("q.json").display(),
        scene.path("own.json").display()
    );
    scene
        .run("olmoe", "olmoe-one", &format!("{own} --answer-pattern x --resume"))
        .failed(exit::CONFIG, &["--answer-pattern: null, not \"x\""]);
    scene.run("olmoe", "olmoe-pattern", &format!("{own} --answer-pattern x")).ok();
    let runs = ["olmoe-one", "olmoe-pattern"].map(|name| scene.path(name).display().to_string());
    let args = ["report".to_owned(), "--output-dir".into(), scene.path("report-2").display().to_string()];
    let ran = start(moewarden(0, args.into_iter().chain(runs))).end().ok();
    let line = ran.out.lines().find(|line| line.contains("own.json: right, answers")).unwrap_or_default();
    assert!(line.contains("not compared"), "{}", ran.out);

    let [questions, copy] = ["q.json", "copy.json"].map(|name| scene.path(name).display().to_string());
    fs::copy(&questions, &copy).unwrap();
    fs::write(scene.path("long.json"), json!([{"question": "so ".repeat(900), "answer": "x"}]).to_string()).unwrap();
    for (more, code, said) in [
        (format!("--skip-answers --questions {questions}"), exit::CONFIG, "needs an answer"),
        (format!("--questions {questions} --answer-pattern ("), exit::USAGE, "--answer-pattern"),
        ("--answer-pattern x".into(), exit::USAGE, "--questions"),
        ("--questions /nowhere.json".into(), exit::NO_INPUT, "/nowhere.json"),
        (format!("--questions {}", scene.path("long.json").display()), exit::DATA, "--max-length 512"),
        (format!("--questions {questions} --questions {copy}"), exit::CONFIG, "it holds the questions of --questions"),
    ] {
        scene.run("olmoe", "no", &more).failed(code, &[said]);
    }
}
