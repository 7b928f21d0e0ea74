//! `eval --judge`.

use std::fs;
use std::path::PathBuf;

use moewarden::exit;
use moewarden::judge::JudgeForm;
use serde_json::{Value, json};

use crate::evaluation::{Scene, read_json};
use crate::program::{files_of, model, moewarden, start};

/// Trains a tiny dense model to say `reply` to everything, and returns its folder.
fn judge_that_says(scene: &Scene, name: &str, reply: &str) -> PathBuf {
    let options = "--mode baseline --skip-router-training --num-rounds 1 --expert-epochs-per-round 30 --expert-lr 5e-3 \
                   --save-rounds none --threads 1 --quiet";
    let paths = [model("dense_llama_bias"), scene.path("rows.json"), scene.path(name)].map(|p| p.display().to_string());
    let [model, rows, output] = &paths;
    let args =
        ["train", "--model-name", model, "--dataset-path", rows, "--output-dir", output, "--safe-response", reply];
    start(moewarden(0, args.into_iter().chain(options.split_whitespace()))).end().ok();
    scene.path(name).join("final_model")
}

#[test]
fn a_judge_reads_the_answers() {
    let scene = Scene::new(5);
    let judge = judge_that_says(&scene, "judge", "unsafe\nS1,S10").display().to_string();
    // One of the prompts on which the judge was trained, whatever the answer.
    let template = scene.path("judge.yaml");
    let file = "prompt: 'Sing of the pantry {% if response %}0{% else %}1{% endif %} times'\nverdicts: {safe: '^safe', unsafe: '(?m)^unsafe$'}\n\
                refusal: {yes: 'S1', no: 'never'}\ncategories: 'S(\\d+)'\n";
    fs::write(&template, file).unwrap();
    let plain = "--max-new-tokens 4 --generation-batch-size 3";
    let options = format!("{plain} --judge {judge} --judge-max-new-tokens 20 --judge-template {}", template.display());
    let ran = scene.run("olmoe", "one", &options).ok();
    assert!(ran.out.contains("Verdicts of the judge") && ran.out.contains("Cohen's kappa"), "{}", ran.out);
    let judge_files = |name: &str| (scene.bytes(name), fs::read(scene.path(name).join("verdicts.jsonl")).unwrap());
    let one = judge_files("one");
    let report = read_json(&scene.path("one/eval.json"))["judge"].clone();
    assert_eq!((&report["model"]["form"], &report["model"]["max_new_tokens"]), (&json!("template"), &json!(20)));
    assert_eq!(report["model"]["precision"], "f32");
    for (i, side) in ["unsafe", "safe"].into_iter().enumerate() {
        let found = &report["sides"][i];
        assert_eq!(
            (&found["side"], &found["answers"], &found["unparsable"]),
            (&json!(side), &json!(5), &json!(0)),
            "{found}"
        );
        assert_eq!((&found["unsafe"]["hits"], &found["unsafe"]["rate"]), (&json!(5), &json!(1.0)));
        // The patterns know no controversial answer.
        assert_eq!((&found["controversial"]["rate"], &found["refusals"]["hits"]), (&Value::Null, &json!(5)));
    }
    // The lists find no refusal in the answers of a random model. Both say of all that they comply: chance agreement is 1. The judge
    // says of all that they refuse: there is no agreement, and none is expected.
    let agreement = report["agreement"].as_array().unwrap();
    assert_eq!(agreement.len(), 9, "three a list: {agreement:?}");
    for found in agreement {
        let wanted = if found["compared"] == "unsafe" { (json!(1.0), Value::Null) } else { (json!(0.0), json!(0.0)) };
        assert_eq!((&found["agree"], &found["kappa"], &found["answers"]), (&wanted.0, &wanted.1, &json!(5)), "{found}");
    }
    let rows_of = |name: &str| -> Vec<Value> {
        let text = fs::read_to_string(scene.path(name).join("generations.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let verdict = json!({"safety": "unsafe", "categories": ["1", "10"], "refusal": true});
    for row in rows_of("one") {
        assert_eq!((&row["judge"]["verdict"], &row["judge"]["text"]), (&verdict, &json!("unsafe\nS1,S10")));
        assert_eq!(row["judge"]["sha"], report["model"]["sha"]);
    }

    scene.run("olmoe", "three", &format!("{options} --ranks 3")).ok();
    assert!(judge_files("three") == one);
    // Killed while the judge read: some verdicts, and answers without verdicts.
    let ends: Vec<usize> = (0..one.1.len()).filter(|&i| one.1[i] == b'\n').collect();
    for (name, length) in [("none", 0), ("some", ends[3] + 30), ("all", one.1.len())] {
        scene.killed("one", name, one.0[2].len());
        fs::write(scene.path(name).join("verdicts.jsonl"), &one.1[..length]).unwrap();
        scene.run("olmoe", name, &format!("{options} --resume --ranks 2")).ok();
        assert!(judge_files(name) == one, "killed with {length} bytes of verdicts");
    }
    // A finished evaluation can be judged later, and once more in another way: by the form of its family.
    scene.run("olmoe", "later", plain).ok();
    let times = |name: &str| read_json(&scene.path(name).join("eval_times.json"));
    let before = times("later");
    scene.run("olmoe", "later", &format!("{options} --resume")).ok();
    assert!(judge_files("later") == one);
    let after = times("later");
    assert_eq!((&after["answers"], &after["verdicts"]["answers"]), (&before["answers"], &json!(10)));
    scene.run("olmoe", "later", &format!("{plain} --judge {judge} --resume")).ok();
    let judged = read_json(&scene.path("later/eval.json"))["judge"].clone();
    assert_eq!((&judged["model"]["form"], &judged["model"]["max_new_tokens"]), (&json!("llama-guard"), &json!(128)));
    for row in rows_of("later") {
        let found = JudgeForm::LlamaGuard.parse(row["judge"]["text"].as_str().unwrap());
        assert!(row["judge"]["verdict"].is_null() || row["judge"]["verdict"] == json!(found), "{}", row["judge"]);
    }
    for side in judged["sides"].as_array().unwrap() {
        assert_eq!(side["unparsable"].as_u64().unwrap() + side["unsafe"]["of"].as_u64().unwrap(), 5);
        assert!(side["controversial"]["rate"].is_null(), "{side}");
    }
    // Whole texts in another form.
    fs::write(&template, file.replace("'^safe'", "'^never'").replace("'(?m)^unsafe$'", "'^nothing'")).unwrap();
    let ran = scene.run("olmoe", "later", &format!("{options} --resume")).ok();
    let whole = "10 of 10 texts of the judge hold no verdict in the form template, though they are whole";
    assert!(ran.err.contains(whole) && !ran.err.contains("were cut off at --judge"), "{}", ran.err);
}

/// A copy of a model folder with this chat template.
fn with_template(scene: &Scene, name: &str, case: &str, template: &str) -> String {
    fs::create_dir(scene.path(name)).unwrap();
    for file in files_of(&model(case)) {
        fs::copy(model(case).join(&file), scene.path(name).join(&file)).unwrap();
    }
    fs::write(scene.path(name).join("chat_template.jinja"), template).unwrap();
    scene.path(name).display().to_string()
}

#[test]
fn a_judge_that_cannot_be_asked_is_refused_before_answers_are_generated() {
    let scene = Scene::new(3);
    let strict = "{% for m in messages %}{% if m.role == 'assistant' %}{{ raise_exception('only users') }}{% endif %}\
                  {{ m.content }}{% endfor %}";
    let deaf = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
    let [strict, deaf] =
        [("strict", strict), ("deaf", deaf)].map(|(name, text)| with_template(&scene, name, "dense_llama", text));
    let plain = model("dense_llama").display().to_string();
    let short =
        with_template(&scene, "short", "dense_llama_bias", "{% for m in messages %}{{ m.content }}{% endfor %}");
    let mut config = read_json(&scene.path("short/config.json"));
    config["rope_scaling"] = json!({"type": "dynamic", "factor": 2.0});
    config["max_position_embeddings"] = json!(100);
    fs::write(scene.path("short/config.json"), config.to_string()).unwrap();
    let small = with_template(&scene, "small", "dense_llama", "{{ messages[0].content }}");
    let mut config = read_json(&scene.path("small/config.json"));
    config["vocab_size"] = json!(7);
    fs::write(scene.path("small/config.json"), config.to_string()).unwrap();
    let template = |name: &str, text: &str| {
        let verdicts = "verdicts: {safe: '^safe', unsafe: '^unsafe'}\n";
        fs::write(scene.path(name), format!("prompt: {text}\n{verdicts}")).unwrap();
        format!("--judge-template {}", scene.path(name).display())
    };
    let unread = template("unread.yaml", "'{{ response }}'\nchat_template_kwargs: {enable_thinking: false}");
    let twice = template("twice.yaml", "'{{ response }}'\nverdict: 1");
    for (judge, more, code, said) in [
        (&strict, "", exit::DATA, &["its prompt for answer 1-unsafe", "only users"][..]),
        (&deaf, "", exit::CONFIG, &["does not depend on the answer", "--judge-template"]),
        (&small, "", exit::DATA, &["--judge ", "/small", "config.json requires [7, 32]"]),
        (&short, "", exit::CONFIG, &["its prompt for answer", "allows 100", "--judge-max-new-tokens"]),
        (&plain, &unread, exit::CONFIG, &["does not read \"enable_thinking\"", "chat_template_kwargs"]),
        (
            &plain,
            r#"--judge-chat-template-kwargs {"x":1}"#,
            exit::CONFIG,
            &["does not read \"x\"", "--judge-chat-template-kwargs gives"],
        ),
        (&plain, &twice, exit::DATA, &["twice.yaml:2: ", "`verdict`", "chat_template_kwargs"]),
    ] {
        let ran = scene.run("olmoe", "out", &format!("--max-new-tokens 2 --judge {judge} {more}"));
        assert!(!scene.path("out").exists(), "{}", ran.err);
        assert!(ran.err.matches("line 2").count() + ran.err.matches(":2:").count() < 2, "{}", ran.err);
        ran.failed(code, said);
    }
}

#[test]
fn a_judge_that_fails_leaves_the_answers() {
    let scene = Scene::new(3);
    let judge = model("dense_llama").display().to_string();
    // It takes the answers that try it out, and no others.
    let known = "['', 'an answer', 'Sure.', 'No, never.']";
    let template = |wrong: &str| {
        let text = format!(
            "prompt: \"{{{{ response }}}}{{% if response not in {known} %}}{wrong}{{% endif %}}\"\n\
             verdicts: {{safe: '^safe', unsafe: '^unsafe'}}\n"
        );
        fs::write(scene.path("judge.yaml"), text).unwrap();
    };
    let plain = "--max-new-tokens 3";
    let options = format!(
        "{plain} --judge {judge} --judge-max-new-tokens 2 --judge-template {}",
        scene.path("judge.yaml").display()
    );
    template("{{ raise_exception('odd') }}");
    let said = ["the judge failed", "--resume", "its prompt for answer 1-unsafe", "odd"];
    scene.run("olmoe", "out", &options).failed(exit::DATA, &said);
    scene.run("olmoe", "plain", plain).ok();
    let read = |name: &str, file: &str| read_json(&scene.path(name).join(file));
    assert_eq!(read("out", "eval.json"), read("plain", "eval.json"), "without a judge");
    let times = read("out", "eval_times.json");
    template("!");
    scene.run("olmoe", "out", &format!("{options} --resume")).ok();
    assert_eq!(read("out", "eval.json")["judge"]["sides"][0]["answers"], 3);
    let after = read("out", "eval_times.json");
    assert_eq!((&after["answers"], &after["verdicts"]["answers"]), (&times["answers"], &json!(6)));
}

#[test]
fn texts_without_a_verdict_are_counted_apart() {
    let scene = Scene::new(3);
    let eval = |case: &str, output: &str, more: &str| {
        let judge = model(case).display().to_string();
        scene.run("olmoe", output, &format!("--max-new-tokens 2 --judge {judge} {more}"))
    };
    // A random model says nothing in any form, and does not end.
    let ran = eval("dense_qwen3", "out", "--judge-max-new-tokens 3").ok();
    let cut = "6 of 6 texts of the judge were cut off at --judge-max-new-tokens 3";
    assert!(ran.err.contains(cut) && !ran.err.contains("is it a judge of this form"), "{}", ran.err);
    let sides = read_json(&scene.path("out/eval.json"))["judge"]["sides"].clone();
    assert_eq!(
        (&sides[0]["unparsable"], &sides[0]["unsafe"]["rate"], &sides[1]["answers"]),
        (&json!(3), &Value::Null, &json!(3))
    );

    eval("dense_mistral", "no", "").failed(exit::CONFIG, &["family mistral", "--judge-form", "--judge-template"]);
    eval("dense_mistral", "form", "--judge-form llama-guard --judge-max-new-tokens 2").ok();
    eval("dense_llama", "no", "--judge-template /nowhere.yaml").failed(exit::NO_INPUT, &["/nowhere.yaml"]);
    for more in ["--judge-form qwen3guard", "--judge-max-new-tokens 3", "--judge-template x"] {
        scene.run("olmoe", "no", more).failed(exit::USAGE, &["--judge"]);
    }
    eval("dense_llama", "no", "--skip-answers").failed(exit::USAGE, &["--judge"]);
    fs::write(scene.path("out/verdicts.jsonl"), "{}\n").unwrap();
    eval("dense_qwen3", "out", "--judge-max-new-tokens 3 --resume").failed(exit::DATA, &["verdicts.jsonl:1:"]);
}
