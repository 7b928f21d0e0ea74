//! Tokens that a model folder declares beside tokenizer.json, against transformers: `tests/golden/declared_tokens.json`.

use std::fs;
use std::path::Path;

use moewarden::data::{ChatTokenizer, Message, Penalties};
use moewarden::exit::{self, Coded};
use serde_json::{Value, json};

/// Any chat template.
const TEMPLATE: &str = "{{ messages[-1].content }}";

const NAMES: [&str; 9] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
    "image_token",
    "x_token",
];

/// A model folder of these files; its tokenizer.json is the golden one with other fields.
fn folder(base: &str, fields: &Value, files: &Value) -> tempfile::TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/tokenizers/{base}.json"));
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(golden).unwrap()).unwrap();
    tokenizer.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    for (name, content) in files.as_object().unwrap() {
        fs::write(dir.path().join(name), content.to_string()).unwrap();
    }
    dir
}

#[test]
fn declared_tokens_are_those_of_transformers() {
    let golden: Value = serde_json::from_str(include_str!("../golden/declared_tokens.json")).unwrap();
    let base = golden["base"].as_str().unwrap();
    let cases = golden["cases"].as_object().unwrap();
    assert!(cases.len() > 25);
    for (name, case) in cases {
        let dir = folder(base, &case["tokenizer"], &case["files"]);
        let template = dir.path().join("names.jinja");
        fs::write(&template, NAMES.map(|name| format!("{{{{ {name} }}}}")).join("|") + TEMPLATE).unwrap();
        let tokenizer = ChatTokenizer::open(dir.path(), Some(&template)).unwrap();
        let texts = golden["texts"].as_array().unwrap();
        for (text, ids) in texts.iter().zip(case["ids"].as_array().unwrap()) {
            let text = text.as_str().unwrap();
            assert_eq!(json!(tokenizer.encode(text).unwrap()), *ids, "{name}: {text:?}");
            assert_eq!(json!(tokenizer.encode_with_offsets(text).unwrap().ids), *ids, "{name}: {text:?}");
        }
        let named = NAMES.map(|name| case["named"][name].as_str().unwrap_or_default()).join("|") + "q";
        assert_eq!(tokenizer.render(&[Message::new("user", "q")], false).unwrap(), named, "{name}");
    }
}

#[test]
fn an_entry_that_is_no_token_is_named() {
    let entry = |key: &str, value: Value| json!({"chat_template": TEMPLATE, key: value});
    for (file, content, says) in [
        (
            "tokenizer_config.json",
            entry("added_tokens_decoder", json!({"5": "<x>"})),
            "added_tokens_decoder: `5: \"<x>\"`",
        ),
        ("tokenizer_config.json", entry("added_tokens_decoder", json!({"x": {"content": "<x>"}})), "`?: {"),
        ("tokenizer_config.json", entry("added_tokens_decoder", json!([1])), "added_tokens_decoder: `[1]`"),
        ("tokenizer_config.json", entry("eos_token", json!(7)), "eos_token holds `7`"),
        (
            "tokenizer_config.json",
            entry("extra_special_tokens", json!([["<x>"]])),
            "extra_special_tokens holds `[\"<x>\"]`",
        ),
        ("special_tokens_map.json", json!({"additional_special_tokens": "<x>"}), "additional_special_tokens holds"),
        ("special_tokens_map.json", json!({"eos_token": {"text": "\u{1b}[2J"}}), "which is no token"),
        ("added_tokens.json", json!({"<x>": "5"}), "the id of `<x>` is `\"5\"`"),
    ] {
        let mut files = json!({"tokenizer_config.json": {"chat_template": TEMPLATE}});
        files[file] = content;
        let dir = folder("marks-304", &json!({}), &files);
        let error = ChatTokenizer::open(dir.path(), None).err().unwrap();
        let message = error.to_string();
        assert_eq!(error.exit_code(), exit::DATA, "{message}");
        assert!(message.contains(file) && message.contains(says), "{message}");
        assert!(!message.contains('\u{1b}'), "{message:?}");
    }
}

#[test]
fn tokens_that_end_a_generation_are_those_of_transformers() {
    // generation_config.json decides alone where it exists; else config.json, or the default of its family.
    for (files, ids) in [
        (json!({"config.json": {"eos_token_id": [2, 209]}}), vec![2, 209]),
        (json!({"config.json": {"eos_token_id": 7}}), vec![7]),
        (json!({"config.json": {"eos_token_id": 7}, "generation_config.json": {}}), vec![]),
        (json!({"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [8]}}), vec![8]),
        (json!({"config.json": {"model_type": "mixtral"}}), vec![2]),
        (json!({"config.json": {"model_type": "olmoe"}}), vec![50279]),
        (json!({"config.json": {"model_type": "mixtral", "eos_token_id": null}}), vec![]),
        (json!({"config.json": {"model_type": "qwen3_moe"}}), vec![]),
        (json!({}), vec![]),
    ] {
        let mut all =
            json!({"tokenizer_config.json": {"chat_template": TEMPLATE, "tokenizer_class": "TokenizersBackend"}});
        all.as_object_mut().unwrap().extend(files.as_object().unwrap().clone());
        let dir = folder("marks-304", &json!({}), &all);
        assert_eq!(ChatTokenizer::open(dir.path(), None).unwrap().eos_ids(), ids, "{files}");
    }
}

/// Fields of `generation_config.json` by which transformers changes even greedy answers.
#[test]
fn what_changes_answers_is_applied_or_refused() {
    let opened = |generation: &Value| {
        let files = json!({"tokenizer_config.json": {"chat_template": TEMPLATE}, "generation_config.json": generation});
        ChatTokenizer::open(folder("marks-304", &json!({}), &files).path(), None)
    };
    let penalties = |generation: Value| opened(&generation).unwrap().penalties();
    for (generation, penalty, size) in [
        (json!({}), 1.0, 0),
        (json!({"repetition_penalty": 1, "no_repeat_ngram_size": null, "num_beams": 1, "suppress_tokens": []}), 1.0, 0),
        (json!({"repetition_penalty": 1.05, "do_sample": true, "temperature": 0.6, "top_k": 20}), 1.05, 0),
        (json!({"no_repeat_ngram_size": 3, "bad_words_ids": null}), 1.0, 3),
    ] {
        let wanted = Penalties { repetition_penalty: penalty, no_repeat_ngram_size: size };
        assert_eq!(penalties(generation).unwrap(), wanted);
    }
    for (generation, message) in [
        (json!({"num_beams": 4}), "num_beams is `4`, by which transformers changes the answers"),
        (json!({"sequence_bias": [[[5], -1.0]]}), "remove the field"),
        (json!({"min_new_tokens": 3}), "min_new_tokens is `3`"),
        (json!({"encoder_repetition_penalty": 1.2}), "encoder_repetition_penalty"),
        (json!({"repetition_penalty": 0}), "repetition_penalty is `0`, but should be a number above 0"),
        (json!({"repetition_penalty": "1.1"}), "should be a number above 0"),
        (json!({"repetition_penalty": 1e-50}), "should be a number above 0"),
        (json!({"penalty_alpha": 0.6, "top_k": 4}), "penalty_alpha is `0.6`"),
        (json!({"no_repeat_ngram_size": -1}), "should be a whole number"),
    ] {
        let error = penalties(generation).unwrap_err();
        assert_eq!(error.exit_code(), exit::DATA);
        let text = error.to_string();
        assert!(text.contains("generation_config.json: ") && text.contains(message), "{text}");
    }
    // Without the file the fields of config.json count.
    let of_config = |config: &Value| {
        let files = json!({"tokenizer_config.json": {"chat_template": TEMPLATE}, "config.json": config});
        ChatTokenizer::open(folder("marks-304", &json!({}), &files).path(), None).unwrap().penalties()
    };
    assert_eq!(of_config(&json!({"repetition_penalty": 1.7})).unwrap().repetition_penalty, 1.7);
    let error = of_config(&json!({"num_beams": 2})).unwrap_err().to_string();
    assert!(error.contains("config.json: num_beams is `2`") && !error.contains("generation_config"), "{error}");
    for eos in [json!("1"), json!([]), json!([2, "3"]), json!(-1)] {
        let error = opened(&json!({"eos_token_id": eos})).err().unwrap().to_string();
        assert!(error.contains("eos_token_id is ") && error.contains("a token id or a list of ids"), "{error}");
    }
}

#[test]
fn a_byte_order_mark_before_the_json_of_a_tokenizer_is_skipped() {
    let dir = folder(
        "marks-304",
        &json!({}),
        &json!({"tokenizer_config.json": {"chat_template": TEMPLATE, "eos_token": "<x>"}}),
    );
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        let path = dir.path().join(name);
        fs::write(&path, [b"\xef\xbb\xbf".as_slice(), &fs::read(&path).unwrap()].concat()).unwrap();
    }
    let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
    assert_eq!(tokenizer.encode("<x>").unwrap(), tokenizer.eos_ids());
}

#[test]
fn a_tokenizer_is_of_the_class_that_transformers_makes() {
    let golden: Value = serde_json::from_str(include_str!("../golden/tokenizer_classes.json")).unwrap();
    let cases = golden["cases"].as_object().unwrap();
    assert!(cases.len() > 100);
    for (name, case) in cases {
        let mut tokenizer = golden["bases"][case["base"].as_str().unwrap()].clone();
        for (field, value) in case["fields"].as_object().unwrap() {
            match tokenizer[field].as_object_mut().filter(|_| field == "model") {
                Some(model) => model.extend(value.as_object().unwrap().clone()),
                None => tokenizer[field] = value.clone(),
            }
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        for (file, content) in case["files"].as_object().unwrap() {
            fs::write(dir.path().join(file), content.to_string()).unwrap();
        }
        let template = dir.path().join("names.jinja");
        fs::write(&template, NAMES.map(|name| format!("{{{{ {name} }}}}")).join("|") + TEMPLATE).unwrap();
        let opened = ChatTokenizer::open(dir.path(), Some(&template));
        let Some(ids) = case["ids"].as_array() else {
            assert!(opened.is_err(), "{name}: transformers cannot load it");
            continue;
        };
        let tokenizer = opened.unwrap_or_else(|e| panic!("{name}: {e}"));
        for (text, ids) in golden["texts"].as_array().unwrap().iter().zip(ids) {
            assert_eq!(json!(tokenizer.encode(text.as_str().unwrap()).unwrap()), *ids, "{name}: {text}");
        }
        let named = NAMES.map(|name| case["named"][name].as_str().unwrap_or_default()).join("|") + "q";
        assert_eq!(tokenizer.render(&[Message::new("user", "q")], false).unwrap(), named, "{name}");
    }
}

#[test]
fn a_class_that_is_not_known_is_named_with_the_way_out() {
    let config = json!({"tokenizer_config.json": {"chat_template": TEMPLATE, "tokenizer_class": "GPT2TokenizerFast"}});
    let error = ChatTokenizer::open(folder("marks-304", &json!({}), &config).path(), None).err().unwrap();
    let message = error.to_string();
    assert!(
        message.contains("tokenizer_class is GPT2TokenizerFast") && message.contains("PreTrainedTokenizerFast"),
        "{message}"
    );
    assert_eq!(error.exit_code(), exit::DATA);
    let words = json!({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}});
    let config = json!({"tokenizer_config.json": {"chat_template": TEMPLATE, "tokenizer_class": "LlamaTokenizer"}});
    let error = ChatTokenizer::open(folder("marks-304", &words, &config).path(), None).err().unwrap();
    assert!(error.to_string().contains("not of type BPE, as the tokenizer class Llama needs"), "{error}");
}
