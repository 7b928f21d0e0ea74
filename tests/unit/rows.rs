//! Rows in the spellings that people use: token ids and loss masks against transformers, and what is refused.

use std::fs;
use std::path::{Path, PathBuf};

use moewarden::data::{ChatTokenizer, DataOptions, Dataset, LongRows, LossOn, Question, read_questions};
use serde_json::{Map, Value, json};

const REFUSAL: &str = "I cannot assist with that request as it may be harmful or unsafe.";

/// What `tests/golden/rows.py` computed.
fn golden() -> Value {
    serde_json::from_str(include_str!("../golden/rows.json")).unwrap()
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/olmoe/model")
}

fn read_options(row: &Value, template: &str, options: &DataOptions) -> Result<Dataset, String> {
    let folder = tempfile::tempdir().unwrap();
    let [rows, jinja] = ["rows.jsonl", "template.jinja"].map(|name| folder.path().join(name));
    fs::write(&rows, format!("{row}\n")).unwrap();
    fs::write(&jinja, template).unwrap();
    let tokenizer = ChatTokenizer::open(&model(), Some(&jinja)).unwrap();
    Dataset::read(&rows, &tokenizer, options).map_err(|e| e.to_string())
}

fn read_with(row: &Value, template: &str, kwargs: Map<String, Value>) -> Result<Dataset, String> {
    let safe_response = REFUSAL.into();
    let options =
        DataOptions { max_length: 512, safe_response, chat_template_kwargs: kwargs, ..DataOptions::default() };
    read_options(row, template, &options)
}

fn read(row: &Value, template: &str) -> Result<Dataset, String> {
    read_with(row, template, Map::new())
}

fn ids_and_loss(dataset: &Dataset) -> (Value, Value) {
    let record = &dataset.records[0];
    let reply = record.unsafe_reply.as_ref().or(record.safe_reply.as_ref()).unwrap();
    (json!(reply.ids), reply.loss.iter().map(|loss| u8::from(*loss)).collect())
}

#[test]
fn every_spelling_gives_the_tokens_of_transformers() {
    let golden = golden();
    let cases = golden["cases"].as_array().unwrap();
    for case in cases {
        let template = golden["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let dataset = read(&case["row"], template).unwrap_or_else(|e| panic!("{}: {e}", case["name"]));
        let (ids, loss) = ids_and_loss(&dataset);
        assert_eq!(ids, case["ids"], "{}", case["name"]);
        assert_eq!(loss, case["loss"], "{}", case["name"]);
        let unread: Vec<_> = dataset.report.unread.keys().filter(|name| *name != "tool_call_id of a turn").collect();
        assert!(unread.is_empty(), "{}: {unread:?}", case["name"]);
        let left_out: Vec<_> = dataset.report.left_out.keys().collect();
        let expected: &[&str] = match case["name"].as_str().unwrap() {
            "last thoughts: thoughts of an earlier turn"
            | "last thoughts: thoughts before a call, and a further request"
            | "last thoughts: thoughts before several calls, without thinking" => &["reasoning_content"],
            _ => &[],
        };
        assert_eq!(left_out, expected, "{}", case["name"]);
    }
    assert!(cases.len() >= 50);
}

#[test]
fn loss_on_all_tokens_needs_no_turns() {
    let golden = golden();
    let template = golden["templates"]["last_thoughts"].as_str().unwrap();
    let of_last = golden["cases"].as_array().unwrap().iter().filter(|case| case["template"] == "last_thoughts");
    // This template writes nothing by which a turn could be found: of a reply it writes one character once others follow.
    let lost = "{% for m in messages %}{{ m.content if loop.last else m.content[0] }}\n{% endfor %}";
    let plain = json!({"label": "safe", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "r"}, {"role": "assistant", "content": "c"}]});
    let error = read(&plain, lost).unwrap_err();
    assert!(error.contains("rows.jsonl:1: message 2: the chat template renders it differently"), "{error}");
    let all = DataOptions { loss_on: LossOn::All, max_length: 512, ..DataOptions::default() };
    let rows = of_last.map(|case| (&case["row"], template)).chain([(&plain, lost)]);
    for (row, template) in rows {
        let dataset = read_options(row, template, &all).unwrap_or_else(|e| panic!("{row}: {e}"));
        let loss = dataset.records[0].safe_reply.clone().unwrap().loss;
        assert!(!loss[0] && loss[1..].iter().all(|loss| *loss), "{row}");
    }
    // The prompt is truncated up to the first reply that carries loss, as with loss on replies.
    let row = &golden["cases"]
        .as_array()
        .unwrap()
        .iter()
        .find(|case| case["name"] == "last thoughts: a call and a reply")
        .unwrap()["row"];
    let whole = read_options(row, template, &all).unwrap().records[0].safe_reply.clone().unwrap().ids;
    let short = |loss_on, max_length| {
        let options =
            DataOptions { loss_on, max_length, long_rows: LongRows::TruncatePrompt, ..DataOptions::default() };
        read_options(row, template, &options).map(|dataset| dataset.records[0].safe_reply.clone().unwrap())
    };
    for loss_on in [LossOn::All, LossOn::Response] {
        let cut = short(loss_on, whole.len() - 9).unwrap();
        assert_eq!(cut.ids, whole[9..]);
        assert!(!cut.loss[0] && cut.loss[1] == (loss_on == LossOn::All) && cut.loss[cut.loss.len() - 1]);
        assert!(short(loss_on, 20).unwrap_err().contains("no row is left"));
    }
    let unmarked = json!({"label": "safe", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": false}]});
    assert!(read_options(&unmarked, template, &all).unwrap_err().contains("no token of the reply carries loss"));
}

#[test]
fn null_in_a_table_is_absent_in_a_row() {
    let golden = golden();
    let folder = tempfile::tempdir().unwrap();
    let jinja = folder.path().join("template.jinja");
    for template in ["tools", "last_thoughts"] {
        fs::write(&jinja, golden["templates"][template].as_str().unwrap()).unwrap();
        let tokenizer = ChatTokenizer::open(&model(), Some(&jinja)).unwrap();
        let read = |name: &str| {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/parquet").join(name);
            let options = DataOptions { max_length: 1024, ..DataOptions::default() };
            let records = Dataset::read(&path, &tokenizer, &options).unwrap().records;
            records.into_iter().map(|record| record.safe_reply.unwrap()).collect::<Vec<_>>()
        };
        let rows = read("padded.json");
        assert_eq!(read("padded.parquet"), rows);
        let text = tokenizer.decode(&rows[0].ids);
        assert!(text.contains("Köln") && !text.contains("null") && !text.contains("day"), "{text}");
    }
}

#[test]
fn bpe_dropout_is_switched_off_with_a_note() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |name: &str| fs::copy(model().join(name), folder.path().join(name)).unwrap();
    ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"].iter().for_each(|name| _ = copy(name));
    let file = folder.path().join("tokenizer.json");
    let set = |value: Value| {
        let mut tokenizer: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        tokenizer["model"]["dropout"] = value;
        fs::write(&file, tokenizer.to_string()).unwrap();
        ChatTokenizer::open(folder.path(), None).unwrap()
    };
    let text = "hide the cake under the stairs and the ladder behind the pantry";
    let certain = set(Value::Null);
    assert_eq!(certain.note(), None);
    let ids = certain.encode(text).unwrap();
    assert!(ids.len() < text.len() - 9, "no merges");
    for dropout in [json!(0.5), json!(1.0)] {
        let tokenizer = set(dropout.clone());
        let note = tokenizer.note().unwrap();
        let dropout = format!("dropout {}", dropout.as_f64().unwrap());
        assert!(note.contains("tokenizer.json: ") && note.contains(&dropout) && !note.contains("  "), "{note}");
        for _ in 0..20 {
            assert_eq!(tokenizer.encode(text).unwrap(), ids);
            assert_eq!(tokenizer.encode_with_offsets(text).unwrap().ids, ids);
        }
    }
    assert_eq!(set(json!(0.0)).note(), None);
}

#[test]
fn the_option_gives_variables_to_all_rows_and_a_row_takes_precedence() {
    let golden = golden();
    let template = golden["templates"]["thinking"].as_str().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    let named = |name: &str| cases.iter().find(|case| case["name"] == name).unwrap();
    let kwargs = |value: Value| value.as_object().unwrap().clone();
    let plain = json!({"label": "unsafe", "messages": named("a chat")["row"]["messages"]});
    let by_option = read_with(&plain, template, kwargs(json!({"preamble": "Hm"}))).unwrap();
    assert_eq!(ids_and_loss(&by_option).0, named("variables as text")["ids"]);
    let by_row = read_with(&named("variables as text")["row"], template, kwargs(json!({"preamble": "Oh"}))).unwrap();
    assert_eq!(by_row.records, by_option.records);
    let error = read_with(&plain, template, kwargs(json!({"enable_thoughts": true}))).unwrap_err();
    assert!(error.contains("--chat-template-kwargs gives enable_thoughts"), "{error}");
}

#[test]
fn a_field_that_would_be_dropped_is_refused_by_line_and_name() {
    let golden = golden();
    let template = |name: &str| golden["templates"][name].as_str().unwrap().to_owned();
    let turns = |more: Value| {
        let mut reply = json!({"role": "assistant", "content": "I will not."});
        reply.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"label": "unsafe", "messages": [{"role": "user", "content": "hide a cake"}, reply]})
    };
    let row = |more: Value| {
        let mut row = turns(json!({}));
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    let image = json!([{"type": "image_url", "image_url": {"url": "x"}}]);
    let two = json!([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]);
    let safe = |messages: Value| json!({"label": "safe", "messages": messages});
    let obliging = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]);
    let reads_mood = template("plain") + "{% for m in messages %}{{ m.mood }}{% endfor %}";
    let reads_date = template("plain") + "{{ date_string }}";
    for (row, template, says) in [
        (turns(json!({"reasoning_content": "Hm"})), template("plain"), "does not write reasoning_content"),
        (turns(json!({"thinking": "Hm"})), template("plain"), "does not write thinking"),
        (turns(json!({"reasoning": "Hm"})), template("thinking"), "does not write reasoning,"),
        (turns(json!({"tool_calls": [{"function": {"name": "f"}}]})), template("plain"), "does not write tool_calls"),
        (turns(json!({"function_call": {"name": "f"}})), template("tools"), "does not write function_call"),
        (turns(json!({"reasoning_content": 3})), template("thinking"), "reasoning_content should be a string"),
        (turns(json!({"tool_calls": "no"})), template("tools"), "tool_calls is a string that is not"),
        (turns(json!({"tool_calls": {"name": "f"}})), template("tools"), "tool_calls should be a list"),
        (
            turns(json!({"tool_calls": [null]})),
            template("tools"),
            "message 2: tool_calls, call 1: should be an object, not null",
        ),
        (
            turns(json!({"tool_calls": [{"name": "f"}, "g"]})),
            template("tools"),
            "tool_calls, call 2: should be an object, not a",
        ),
        (
            turns(json!({"tool_calls": "[{'function': None}]"})),
            template("tools"),
            "tool_calls, call 1: should be an object",
        ),
        (
            turns(json!({"content": [{"type": "text", "text": 3}]})),
            template("parts"),
            "part 1: text should be a string",
        ),
        (
            json!({"label": "unsafe", "messages": [{"role": "user", "content": [{"type": "text", "text": null}]}]}),
            template("plain"),
            "message 1 of the conversation is blank: the request is missing",
        ),
        (turns(json!({"images": ["x"]})), template("plain"), "images is not supported"),
        (turns(json!({"refusal": "No."})), template("plain"), "refusal is not supported: write"),
        (turns(json!({"mood": "sad"})), reads_mood, "reads the field mood of a turn"),
        (turns(json!({"weight": 0.5})), template("plain"), "weight 0.5"),
        (turns(json!({"weight": "1"})), template("plain"), "weight"),
        (turns(json!({"loss": true, "weight": 0})), template("plain"), "loss and weight contradict"),
        (turns(json!({"loss": true, "train": false})), template("plain"), "loss and train contradict"),
        (turns(json!({"value": "other"})), template("plain"), "content and value differ"),
        (turns(json!({"content": image})), template("parts"), "the type \"image_url\" is not supported"),
        (turns(json!({"content": two})), template("plain"), "has 2 parts, and the template takes only text"),
        (
            row(json!({"tools": [{"name": "f"}]})),
            template("plain"),
            "gives tools for the chat template, which does not read",
        ),
        (row(json!({"tools": {"name": "f"}})), template("tools"), "tools should be a list"),
        (row(json!({"tools": [null]})), template("tools"), "tools, item 1: should be an object, not null"),
        (
            row(json!({"tools": "[{'f': None}]"})),
            template("tools"),
            "tools, item 1: should be an object, not an empty one",
        ),
        (
            row(json!({"documents": ["text"]})),
            template("plain"),
            "documents, item 1: should be an object, not a string",
        ),
        (
            row(json!({"chat_template_kwargs": {"tools": ["f"]}})),
            template("tools"),
            "tools, item 1: should be an object",
        ),
        (row(json!({"tools": "{}{"})), template("tools"), "tools is a string that is not JSON"),
        (row(json!({"documents": [{"text": "f"}]})), template("plain"), "documents"),
        (row(json!({"chat_template_kwargs": {"enable_thinking": false}})), template("plain"), "enable_thinking"),
        (row(json!({"chat_template_kwargs": [1]})), template("plain"), "should be an object"),
        (row(json!({"chat_template_kwargs": {"messages": []}})), template("plain"), "which the row itself decides"),
        (row(json!({"date_string": "today"})), reads_date, "write it as chat_template_kwargs"),
        (row(json!({"images": ["x.png"]})), template("plain"), "the field images of a row"),
        (row(json!({"functions": [{"name": "f"}]})), template("plain"), "functions of a row"),
        (row(json!({"weight": 2})), template("plain"), "weight of a row"),
        (row(json!({"system": "a", "system_prompt": "b"})), template("plain"), "system and system_prompt differ"),
        (row(json!({"system": 3})), template("plain"), "system should be a string"),
        (
            row(json!({"systemPrompt": "s"})),
            template("plain"),
            "systemPrompt of a row is unknown, unlike system_prompt:",
        ),
        (row(json!({"System": "s"})), template("plain"), "the field System of a row is unknown, unlike system:"),
        (row(json!({"chat-template-kwargs": {"a": 1}})), template("plain"), "unlike chat_template_kwargs"),
        (row(json!({"TOOLS": [{"name": "f"}]})), template("tools"), "unlike tools"),
        (row(json!({"lossMask": [0]})), template("plain"), "unlike loss_mask"),
        (row(json!({"thought": "Hm"})), template("plain"), "thought of a row is not supported"),
        (
            turns(json!({"reasoningContent": "Hm"})),
            template("thinking"),
            "reasoningContent is unknown, unlike reasoning_content:",
        ),
        (turns(json!({"toolCalls": [{"name": "f"}]})), template("tools"), "unlike tool_calls"),
        (turns(json!({"Weight": 0})), template("plain"), "unlike weight"),
        (turns(json!({"thought": "Hm"})), template("plain"), "thought is not supported: write the text as"),
        (turns(json!({"prefix": true})), template("plain"), "prefix is not supported: a reply is learnt whole"),
        (turns(json!({"ignore": true})), template("plain"), "ignore is not supported: write loss"),
        (turns(json!({"learn": false})), template("plain"), "learn is not supported: write loss"),
        (
            json!({"goal": "g", "label": "safe", "all_prompt": [{"role": "user", "content": "q"}]}),
            template("plain"),
            "an attack row with the label safe",
        ),
        (
            json!({"label": "Safe", "response": "No.", "safe_messages": [{"role": "user", "content": "q"}],
                "unsafe_messages": [{"role": "user", "content": "q"}]}),
            template("plain"),
            "a pair row with the label safe",
        ),
        (
            json!({"label": "unsafe", "system": "a", "messages": [{"role": "system", "content": "b"}, {"role": "user", "content": "q"}]}),
            template("plain"),
            "the first turn, of the role system, and the field system differ",
        ),
        (
            json!({"goal": "g", "system": "s", "all_prompt": [{"role": "user", "content": "q"}]}),
            template("plain"),
            "the first turn of all_prompt",
        ),
        (
            json!({"label": "unsafe", "messages": [{"role": "user", "content": "q", "loss": true}, {"role": "assistant", "content": "a"}]}),
            template("plain"),
            "only assistant turns can carry loss",
        ),
        (
            json!({"label": "unsafe", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "response": "R"}),
            template("plain"),
            "a last assistant turn beside the field response, and they differ",
        ),
        (
            json!({"label": "unsafe", "prompt": "q", "completion": "a", "reasoning_content": "Hm"}),
            template("thinking"),
            "reasoning_content of a row is not supported: write it as a field of the turn",
        ),
        (
            row(json!({"instructions": "Be kind."})),
            template("plain"),
            "instructions of a row is not supported: write it as system",
        ),
        (row(json!({"developer": "Be kind."})), template("plain"), "developer of a row"),
        (row(json!({"context": "A cake."})), template("plain"), "context of a row"),
        (json!({"goal": "g", "attack_prompt": "a", "context": "c"}), template("plain"), "context of a row"),
        (row(json!({"prefix": "Sure"})), template("plain"), "prefix of a row"),
        (row(json!({"continue_final_message": true})), template("plain"), "continue_final_message of a row"),
        (row(json!({"chat_template": "{{ messages }}"})), template("plain"), "give it with --chat-template"),
        (row(json!({"chosen": "a", "rejected": "b"})), template("plain"), "chosen of a row"),
        (row(json!({"loss": false})), template("plain"), "loss of a row"),
        (row(json!({"loss_mask": [0, 1]})), template("plain"), "loss_mask of a row"),
        (row(json!({"sample_weights": [1]})), template("plain"), "sample_weights is not supported"),
        (
            safe(
                json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "train_on_turn": false}]),
            ),
            template("plain"),
            "message 2: train_on_turn is not supported: write loss: true or false",
        ),
        (
            safe(json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "is_masked": true}])),
            template("plain"),
            "message 2: is_masked is not supported",
        ),
        (safe(obliging.clone()), template("plain"), "goes on after the last assistant turn and ends with a user turn"),
        (
            json!({"label": "unsafe", "messages": [{"role": "user", "content": "q"}], "response": "R"}),
            template("plain"),
            "with the field response",
        ),
        (safe(json!([{"role": "user", "content": " "}])), template("plain"), "is blank"),
        (json!({"label": "unsafe", "prompt": " ", "completion": "a"}), template("plain"), "without"),
        (
            json!({"goal": "", "prompt": null, "all_prompt": [{"role": "user", "content": "q"}]}),
            template("plain"),
            "without its request",
        ),
        (json!({"goal": "g", "all_prompt": [{"role": "user", "content": ""}]}), template("plain"), "is blank"),
        // Without the blank turn the one before it would be the reply.
        (
            safe(
                json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": " "}]),
            ),
            template("plain"),
            "message 3: the reply is blank",
        ),
        (
            json!({"label": "unsafe", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "", "loss": true}]}),
            template("plain"),
            "message 3: the reply is blank",
        ),
        (
            json!({"label": "unsafe", "prompt": "q", "completion": [{"role": "assistant", "content": "Yes."}, {"role": "assistant"}]}),
            template("plain"),
            "message 2: the reply is blank",
        ),
        (json!({"goal": "g", "attack_prompt": "\n"}), template("plain"), "without all_prompt"),
    ] {
        let error = read(&row, &template).expect_err(&row.to_string());
        assert!(error.contains("rows.jsonl:1: ") && error.contains(says), "{row}\ngave {error}\nwanted {says}");
    }
}

#[test]
fn an_empty_content_is_a_blank_text() {
    let golden = golden();
    let template = golden["templates"]["plain"].as_str().unwrap();
    let ids = |content: Value| {
        let turns = json!([{"role": "user", "content": "a"}, {"role": "assistant", "content": content}, {"role": "user", "content": "b"},
            {"role": "assistant", "content": "No."}]);
        read(&json!({"label": "unsafe", "messages": turns}), template).unwrap().records[0].unsafe_reply.clone()
    };
    let blank = ids(json!(""));
    for empty in [json!(null), json!([]), json!({}), json!([{"type": "text", "text": null}])] {
        assert_eq!(ids(empty.clone()), blank, "{empty}");
    }
}

#[test]
fn a_field_that_nothing_reads_is_counted_once() {
    let golden = golden();
    let row = json!({"label": "unsafe", "id": 7, "source": "", "tags": [], "messages": [
        {"role": "user", "content": "q", "mood": "sad", "name": "Ann"}, {"role": "assistant", "content": "a", "extra": null}]});
    let dataset = read(&row, golden["templates"]["plain"].as_str().unwrap()).unwrap();
    let unread: Vec<_> = dataset.report.unread.keys().map(String::as_str).collect();
    assert_eq!(unread, ["id", "mood of a turn", "name of a turn"]);
    let shown = dataset.report.to_string();
    assert!(
        shown.contains("note: fields that neither moewarden nor the chat template reads: id (1 rows, first line 1)"),
        "{shown}"
    );
}

#[test]
fn null_fields_of_structures_are_left_out_with_a_note() {
    let golden = golden();
    let call = json!({"function": {"name": "f", "arguments": {"city": "Ulm", "day": null}}});
    let row = |calls: Value, tools: Value| {
        json!({"label": "unsafe", "tools": tools, "messages": [{"role": "user", "content": "q"},
            {"role": "assistant", "content": "a", "tool_calls": calls, "name": null}]})
    };
    let noted = |row: Value| {
        let report = read(&row, golden["templates"]["tools"].as_str().unwrap()).unwrap().report;
        let names: Vec<_> = report.nulls.keys().cloned().collect();
        let said = report.to_string().contains("fields inside these are null, and left out as missing: tool");
        assert_eq!((said, report.has_notes()), (!names.is_empty(), !names.is_empty()), "{report}");
        names
    };
    let whole = json!({"function": {"name": "f", "arguments": {"city": "Ulm", "days": [null]}}});
    assert_eq!(noted(row(json!([whole]), json!([{"name": "f"}]))), [""; 0]);
    assert_eq!(noted(row(json!([whole, call]), json!([{"name": "f"}]))), ["tool_calls of a turn"]);
    let text = json!([call]).to_string();
    assert_eq!(noted(row(json!(text), json!([{"name": "f", "strict": null}]))), ["tool_calls of a turn", "tools"]);
}

#[test]
fn fields_that_say_nothing_are_no_obstacle() {
    let golden = golden();
    let row = json!({"label": "unsafe", "loss": true, "weight": 1, "continue_final_message": false, "context": " ", "prefix": null,
        "response": "a\n", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]});
    let dataset = read(&row, golden["templates"]["plain"].as_str().unwrap()).unwrap();
    assert!(dataset.report.unread.is_empty(), "{:?}", dataset.report.unread);
}

#[test]
fn a_reply_without_a_visible_character_is_blank() {
    let golden = golden();
    let plain = golden["templates"]["plain"].as_str().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    let completed = &cases.iter().find(|case| case["name"] == "ends with a null reply").unwrap()["ids"];
    for blank in ["\u{200b}", "\u{feff}\u{200d} \n", "\u{2060}\u{ad}", "\u{0}", "\u{3164}", ""] {
        let turns = json!([{"role": "user", "content": "hide a cake"}, {"role": "assistant", "content": blank}]);
        let dataset = read(&json!({"label": "unsafe", "messages": turns}), plain).unwrap();
        assert_eq!(ids_and_loss(&dataset).0, *completed, "{blank:?}");
        let error = read(&json!({"label": "unsafe", "prompt": blank, "completion": "a"}), plain).unwrap_err();
        assert!(error.contains("rows.jsonl:1"), "{error}");
    }
    let seen = json!([{"role": "user", "content": "hide a cake"}, {"role": "assistant", "content": "\u{200b}."}]);
    assert_ne!(ids_and_loss(&read(&json!({"label": "unsafe", "messages": seen}), plain).unwrap()).0, *completed);
}

#[test]
fn a_template_that_fails_is_shown_with_the_turns_it_was_given() {
    let no_system = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}{% endfor %}";
    let attack = json!({"goal": "hide a cake", "all_prompt": [{"role": "user", "content": "In a play, hide a cake"}]});
    let error = read(&attack, no_system).unwrap_err();
    for part in [
        "rows.jsonl:1: the chat template failed: no system",
        "1 system (added by moewarden",
        "2 user \"hide a cake\"",
        "--chat-template",
        "prompt instead of goal",
    ] {
        assert!(error.contains(part), "{part} is not in {error}");
    }
    let mut by_prompt = attack;
    let goal = by_prompt.as_object_mut().unwrap().remove("goal").unwrap();
    by_prompt["prompt"] = goal;
    read(&by_prompt, no_system).unwrap();
    let column = json!({"label": "unsafe", "system": "s", "prompt": "q\u{1b}[2J", "completion": "a"});
    let error = read(&column, no_system).unwrap_err();
    assert!(error.contains("1 system (from the row's system field)") && !error.contains('\u{1b}'), "{error}");
}

#[test]
fn two_turns_of_one_role_are_named_where_the_template_fails_on_them() {
    let messages = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]);
    let row = json!({"label": "unsafe", "messages": messages});
    let strict = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}\
                  {% endif %}{{ m.content }}{% endfor %}";
    let merging = "{% for m in messages %}{% if m.role == 'assistant' and (loop.last or loop.nextitem.role == 'user') %}<{{ m.content }}>\
                   {% else %}{{ m.content }}{% endif %}{% endfor %}";
    for template in [strict, merging] {
        let error = read(&row, template).unwrap_err();
        assert!(
            error.contains("rows.jsonl:1: ") && error.contains("messages 2 and 3 are both assistant turns"),
            "{error}"
        );
    }
    read(&row, golden()["templates"]["plain"].as_str().unwrap()).unwrap();
}

/// The questions of one row, and the note on them.
fn ask(row: &Value, template: &str, variables: &Value) -> Result<(Vec<Question>, Option<String>), String> {
    let folder = tempfile::tempdir().unwrap();
    let [rows, jinja] = ["rows.jsonl", "template.jinja"].map(|name| folder.path().join(name));
    fs::write(&rows, row.to_string()).unwrap();
    fs::write(&jinja, template).unwrap();
    let tokenizer = ChatTokenizer::open(&model(), Some(&jinja)).unwrap();
    read_questions(&rows, &tokenizer, variables.as_object().unwrap(), 0, 512).map_err(|e| e.to_string())
}

#[test]
fn fields_of_questions_are_used_or_refused_as_in_rows() {
    let golden = golden();
    let template = |name: &str| golden["templates"][name].as_str().unwrap();
    let row = |more: Value| {
        let mut row = json!({"question": "hide a cake", "answer": "no", "messages": " ", "subject": ""});
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    // The prompts are those of chat rows with the same fields.
    for (more, name) in [
        (json!({}), "plain"),
        (json!({"system": "Answer as a pirate."}), "plain"),
        (json!({"tools": [{"name": "f", "strict": null}]}), "tools"),
        (json!({"chat_template_kwargs": {"enable_thinking": false, "preamble": "Hm"}}), "thinking"),
    ] {
        let (questions, note) = ask(&row(more.clone()), template(name), &json!({})).unwrap();
        let mut chat = json!({"label": "unsafe", "prompt": "hide a cake", "completion": "no"});
        chat.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let wanted = read(&chat, template(name)).unwrap().records[0].unsafe_prompt.clone().unwrap();
        assert_eq!((&questions[0].prompt, note), (&wanted, None), "{more}");
    }
    let own = row(json!({"chat_template_kwargs": {"preamble": "Hm"}}));
    let by_row = ask(&own, template("thinking"), &json!({"preamble": "Oh"})).unwrap().0;
    assert_eq!(
        by_row[0].prompt,
        ask(&row(json!({})), template("thinking"), &json!({"preamble": "Hm"})).unwrap().0[0].prompt
    );
    let turns = |more: Value| {
        let mut first = json!({"role": "assistant", "content": "a"});
        first.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"messages": [{"role": "user", "content": "q"}, first, {"role": "user", "content": "r"}], "answer": "no"})
    };
    for (row, says) in [
        (row(json!({"context": "A cake."})), "the field context of a row is not supported"),
        (row(json!({"systemMessage": "s"})), "systemMessage of a row is unknown, unlike system_message"),
        (row(json!({"tools": [{"name": "f"}]})), "gives tools for the chat template, which does not read it"),
        (row(json!({"chat_template_kwargs": {"mood": 1}})), "gives mood for the chat template"),
        (turns(json!({"tool_calls": [{"name": "f"}]})), "message 2: the chat template does not write tool_calls"),
        (json!({"messages": [{"role": "user", "content": " "}], "answer": "no"}), "message 1 of messages is blank"),
    ] {
        let error = ask(&row, template("plain"), &json!({})).unwrap_err();
        assert!(error.contains("rows.jsonl:1: ") && error.contains(says), "{row}: {error}");
    }
    let (_, note) = ask(&row(json!({"subject": "food"})), template("plain"), &json!({})).unwrap();
    assert!(note.unwrap().contains("neither moewarden nor the chat template reads: subject (1 rows, first line 1)"));
}
