//! Chat templates: rendered as by transformers, chosen as by transformers, and held against the rows that they drop fields of.

use std::fs;
use std::path::Path;

use moewarden::data::{ChatTemplate, ChatTokenizer, DataOptions, Dataset, LossOn, Message};
use serde_json::{Value, json};

#[test]
fn templates_render_as_in_transformers() {
    let golden: Value = serde_json::from_str(include_str!("../golden/templates.json")).unwrap();
    let tokens = || golden["tokens"].as_object().unwrap().iter().map(|(k, v)| (k.clone(), v.as_str().unwrap().into()));
    let cases = golden["cases"].as_array().unwrap();
    let mut wrong = vec![];
    for case in cases {
        let template =
            ChatTemplate::new(golden["templates"][case["template"].as_str().unwrap()].as_str().unwrap(), tokens());
        let chat = golden["chats"][case["chat"].as_str().unwrap()].as_array().unwrap();
        let text = |m: &Value, field| m[field].as_str().unwrap().to_owned();
        let messages: Vec<_> = chat.iter().map(|m| Message::new(text(m, "role"), text(m, "content"))).collect();
        let rendered = template.unwrap().render(&messages, case["prompt"].as_bool().unwrap());
        let same = match (&rendered, case["text"].as_str()) {
            (Err(_), None) => true,
            (Ok(r), Some(text)) => {
                let spans: Vec<_> = r.generated.iter().map(|s| json!([s.start, s.end])).collect();
                r.text == text && json!(spans) == case["spans"]
            }
            _ => false,
        };
        if !same {
            wrong.push(format!(
                "{} on {}:\n  got  {rendered:?}\n  want {:?} {}",
                case["template"],
                case["chat"],
                case["text"].as_str(),
                case["spans"]
            ));
        }
    }
    assert!(cases.len() > 150 && wrong.is_empty(), "{} of {} differ\n{}", wrong.len(), cases.len(), wrong.join("\n"));
}

#[test]
fn expressions_render_as_in_transformers() {
    let golden: Value = serde_json::from_str(include_str!("../golden/jinja.json")).unwrap();
    let context = golden["context"].as_object().unwrap();
    let cases = golden["cases"].as_array().unwrap();
    let render = |source: &str| {
        let template = ChatTemplate::new(source, []).map_err(|e| e.to_string())?;
        template.render_with(&[], context, false).map(|rendered| rendered.text).map_err(|e| e.to_string())
    };
    let mut wrong = vec![];
    for case in cases {
        let (source, text) = (case[0].as_str().unwrap(), case[1].as_str());
        let rendered = render(source);
        if rendered.as_deref().ok() != text {
            wrong.push(format!("{source}\n  got  {rendered:?}\n  want {text:?}"));
        }
    }
    assert!(cases.len() > 500 && wrong.is_empty(), "{} of {} differ\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    for (source, named) in [
        ("{{ t | wordwrap(5) }}", "wordwrap"),
        ("{{ t.encode() }}", "encode"),
        ("{{ d | pprint }}", "pprint"),
        ("{{ '½'.isdigit() }}", "isdigit of digits"),
        ("{{ '%r' % t }}", "conversion type 'r'"),
        ("{{ 2 ** 200 }}", "2 ** 200"),
        ("{% macro f(a, b=a) %}{% endmacro %}", "macro f reads the argument a"),
        (
            "{% macro f(a) %}\n{{ varargs }}{% endmacro %}",
            "the macro f reads varargs, which is not supported: give its arguments names (line 2",
        ),
        ("{% macro f(a) %}{% if kwargs %}{% endif %}{% endmacro %}", "the macro f reads kwargs"),
        ("{{ strftime_now('%G') }}", "unsupported directive"),
        ("{{ 's=' ~ s }}", "writes the number 1e-07 as 0.0000001"),
        ("{{ 's={}'.format([h]) }}", "writes the number 1e+16 as 1e16"),
    ] {
        let error = render(source).unwrap_err();
        assert!(error.contains(named), "{source}: {error}");
    }
    for source in [
        "{% macro f(kwargs) %}{{ kwargs }}{% endmacro %}{{ f(1) }}",
        "{% macro f(a) %}{{ a.kwargs }}{{ 'varargs' }}{% endmacro %}{% set kwargs = 1 %}{{ kwargs }}",
    ] {
        assert_eq!(render(source).as_deref(), Ok("1"), "{source}");
    }
}

/// A model folder of the golden tokenizer with these files, and an option file of rows beside it.
fn folder(base: &Value, files: &Value) -> tempfile::TempDir {
    let golden =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/golden/tokenizers/{}.json", base.as_str().unwrap()));
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("additional_chat_templates")).unwrap();
    fs::copy(golden, dir.path().join("tokenizer.json")).unwrap();
    for (name, content) in files.as_object().unwrap() {
        let content = content.as_str().map_or_else(|| content.to_string(), str::to_owned);
        fs::write(dir.path().join(name), content).unwrap();
    }
    dir
}

fn read(tokenizer: &ChatTokenizer, folder: &Path, row: &Value, loss_on: LossOn) -> Result<Dataset, String> {
    let rows = folder.join("rows.jsonl");
    fs::write(&rows, row.to_string()).unwrap();
    Dataset::read(&rows, tokenizer, &DataOptions { max_length: 512, loss_on, ..DataOptions::default() })
        .map_err(|e| e.to_string())
}

#[test]
fn a_row_takes_the_template_that_transformers_takes() {
    let golden: Value = serde_json::from_str(include_str!("../golden/named_templates.json")).unwrap();
    let cases = golden["cases"].as_object().unwrap();
    assert!(cases.len() > 12);
    for (name, case) in cases {
        let dir = folder(&golden["base"], &case["files"]);
        let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
        let mut row = json!({"label": "unsafe", "messages": golden["messages"]});
        let check = |row: &Value, text: &Value| {
            let reply = read(&tokenizer, dir.path(), row, LossOn::Response)
                .map(|dataset| dataset.records[0].unsafe_reply.clone().unwrap().ids);
            match text.as_str() {
                Some(text) => assert_eq!(reply.unwrap(), tokenizer.encode(text).unwrap(), "{name}"),
                None => assert!(reply.unwrap_err().contains("rows.jsonl:1: a row with"), "{name}"),
            }
        };
        check(&row, &case["plain"]);
        row["tools"] = golden["tools"].clone();
        check(&row, &case["with_tools"]);
    }
}

/// A template of turns, with `more` in each assistant turn.
fn with_turns(before: &str, more: &str) -> String {
    format!(
        "{before}{{% for m in messages %}}<{{{{ m.role }}}}>{{% if m.role == 'assistant' %}}{more}{{% endif %}}{{{{ m.content }}}}\n{{% \
         endfor %}}{{% if add_generation_prompt %}}<assistant>{{% endif %}}"
    )
}

fn read_row(template: &str, row: &Value) -> Result<Dataset, String> {
    read_row_with(template, row, LossOn::Response)
}

fn read_row_with(template: &str, row: &Value, loss_on: LossOn) -> Result<Dataset, String> {
    let dir = folder(&json!("marks-304"), &json!({"tokenizer_config.json": {"chat_template": template}}));
    read(&ChatTokenizer::open(dir.path(), None).unwrap(), dir.path(), row, loss_on)
}

#[test]
fn a_field_of_the_reply_is_read_where_it_changes_the_text() {
    let reply = |more: Value| {
        let mut reply = json!({"role": "assistant", "content": "No."});
        reply.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({"label": "unsafe", "messages": [{"role": "user", "content": "q"}, reply]})
    };
    let thought = reply(json!({"thinking": "Hm"}));
    let two_names = reply(json!({"thinking": "Hm", "reasoning_content": "Hm"}));
    for (before, more) in [
        ("", "{{ m.thinking }}"),
        ("", "{{ m['thinking'] }}"),
        ("", "{{ m.get('thinking', '') }}"),
        ("", "{% if 'thinking' in m %}T{% endif %}"),
        ("{% set key = 'thinking' %}", "{{ m[key] }}"),
        ("{% macro t(m) %}{{ m.thinking }}{% endmacro %}", "{{ t(m) }}"),
        ("", "{% for k, v in m.items() %}{{ k }}{{ v }}{% endfor %}"),
        ("", "{{ m | tojson }}"),
    ] {
        read_row(&with_turns(before, more), &thought).unwrap_or_else(|e| panic!("{before}{more}: {e}"));
    }
    read_row(&with_turns("", "{{ m.reasoning_content or m.thinking }}"), &two_names).unwrap();
    for (before, more) in [
        ("", "{# m.thinking #}"),
        ("", "{{ 'thinking' }}"),
        ("", "{{ '<thinking>' }}{% raw %}{{ m.thinking }}{% endraw %}"),
        ("{% set ns = namespace(thinking=1) %}", "{{ ns.thinking }}"),
        ("{% set thinking = 1 %}", "{{ thinking }}"),
        ("", "{% if m.thinking is defined and false %}{{ m.thinking }}{% endif %}"),
        ("", "{% set t = m.thinking %}"),
        ("{% if false %}{{ messages[0].thinking }}{% endif %}", ""),
    ] {
        let error = read_row(&with_turns(before, more), &thought).expect_err(&format!("{before}{more}"));
        assert!(error.contains("rows.jsonl:1: message 2: the chat template does not write thinking"), "{error}");
    }
    let error =
        read_row(&with_turns("", "{% if m.reasoning_content == m.thinking %}{% endif %}"), &two_names).unwrap_err();
    assert!(error.contains("does not write"), "{error}");
}

/// Writes only turns of these roles.
fn only(roles: &str) -> String {
    format!(
        "{{% for m in messages %}}{{% if m.role in {roles} %}}<{{{{ m.role }}}}>{{{{ m.content }}}}\n{{% endif %}}{{% endfor %}}{{% if \
         add_generation_prompt %}}<assistant>{{% endif %}}"
    )
}

#[test]
fn a_turn_that_the_template_does_not_write_is_refused() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let row = |more: Value| {
        let messages = [more, turn("user", "q"), turn("assistant", "A.")];
        json!({"label": "unsafe", "messages": messages})
    };
    for role in ["system", "developer", "tool"] {
        let error = read_row(&only("['user', 'assistant']"), &row(turn(role, "Speak."))).unwrap_err();
        let says =
            format!("rows.jsonl:1: message 1: the chat template writes nothing of a turn with the role {role} here");
        assert!(error.contains(&says), "{error}");
        read_row(&only(&format!("['user', 'assistant', '{role}']")), &row(turn(role, "Speak."))).unwrap();
    }
    let system =
        json!({"label": "unsafe", "system": "Speak.", "messages": [turn("user", "q"), turn("assistant", "A.")]});
    assert!(read_row(&only("['user', 'assistant']"), &system).unwrap_err().contains("role system"));
    // A greeting that the template skips, and a reply further up that it leaves out.
    let greets = [turn("assistant", "Hi."), turn("user", "q"), turn("assistant", "A.")];
    let chat = [turn("user", "q"), turn("assistant", "Yes."), turn("user", "r"), turn("assistant", "A.")];
    let last = "{% for m in messages %}{% if m.role == 'user' or loop.last %}<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}\
                {% if add_generation_prompt %}<assistant>{% endif %}";
    for (messages, number) in [(&greets[..], 1), (&chat[..], 2)] {
        let mut messages = messages.to_vec();
        messages[number - 1]["loss"] = json!(false);
        let error = read_row(last, &json!({"label": "unsafe", "messages": messages})).unwrap_err();
        let says = format!("message {number}: the chat template writes nothing of a turn with the role assistant here");
        assert!(error.contains(&says), "{error}");
    }
    // moewarden adds the system turn to the request of an attack itself.
    let attack = json!({"all_prompt": [turn("user", "a play")], "goal": "q"});
    read_row(&only("['user', 'assistant']"), &attack).unwrap();
}

#[test]
fn marks_that_decide_the_loss_are_followed_or_refused() {
    let template = with_turns("", "");
    let row = |turn: usize, field: &str, value: Value| {
        let mut messages = json!([
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "A."},
            {"role": "user", "content": "r"}, {"role": "assistant", "content": "No."}
        ]);
        messages[turn][field] = value;
        json!({"label": "unsafe", "messages": messages})
    };
    let error = read_row(&template, &row(0, "weight", json!(1))).unwrap_err();
    assert!(error.contains("message 1: weight is 1, but only assistant turns"), "{error}");
    read_row(&template, &row(0, "weight", json!(0))).unwrap();

    let all = |row: &Value| read_row_with(&template, row, LossOn::All);
    for (field, value) in [("loss", json!(false)), ("weight", json!(0)), ("train", json!(false))] {
        let dataset = all(&row(1, field, value)).unwrap();
        assert_eq!(dataset.report.loss_tokens + 1, dataset.report.tokens);
        let noted: Vec<_> = dataset.report.unread.keys().collect();
        assert_eq!(noted, ["loss: false of a turn (--loss-on all takes all tokens)"]);
    }
    let dataset = all(&row(1, "loss", json!(true))).unwrap();
    assert_eq!(dataset.report.loss_tokens + 1, dataset.report.tokens);
    let dataset = all(&row(0, "name", json!(null))).unwrap();
    assert_eq!(dataset.report.earlier_excluded, 0, "all tokens carry loss");
    assert_eq!(read_row(&template, &row(0, "name", json!(null))).unwrap().report.earlier_excluded, 1);
}

#[test]
fn blank_thoughts_are_none() {
    let reply = |thoughts: &str| {
        let reply = json!({"role": "assistant", "content": "No.", "reasoning_content": thoughts});
        json!({"label": "unsafe", "messages": [{"role": "user", "content": "q"}, reply]})
    };
    let template = with_turns("", "{% if m.reasoning_content %}[{{ m.reasoning_content | trim }}]{% endif %}");
    let tokens = |thoughts: &str| read_row(&template, &reply(thoughts)).unwrap().report.tokens;
    assert_eq!([tokens("\n"), tokens(" ")], [tokens(""); 2]);
    assert!(tokens("Hm") > tokens(""));
}

#[test]
fn a_key_that_occurs_twice_in_a_structure_given_as_text_is_refused() {
    let messages = r#"[{"role": "user", "content": "q", "content": "r"}, {"role": "assistant", "content": "A."}]"#;
    let error = read_row(&with_turns("", ""), &json!({"label": "unsafe", "messages": messages})).unwrap_err();
    assert!(error.contains("rows.jsonl:1: ") && error.contains("the field content occurs twice"), "{error}");
}

#[test]
fn a_field_of_an_earlier_turn_is_the_templates_business_if_it_names_the_field() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let mut earlier = turn("assistant", "A.");
    earlier["thinking"] = json!("Hm");
    earlier["loss"] = json!(false);
    let messages = [turn("user", "q"), earlier, turn("user", "r"), turn("assistant", "No.")];
    let row = json!({"label": "unsafe", "messages": messages});
    let last_only = "{% if loop.last and m.thinking %}{{ m.thinking }}{% endif %}";
    let dataset = read_row(&with_turns("", last_only), &row).unwrap();
    assert_eq!(dataset.report.unread.keys().collect::<Vec<_>>(), ["thinking of a turn"]);
    let error = read_row(&with_turns("", "{# thinking #}{{ 'thinking' }}"), &row).unwrap_err();
    assert!(error.contains("message 2: the chat template does not write thinking"), "{error}");
}

#[test]
fn variables_are_read_where_the_template_looks_them_up() {
    let row = |more: Value| {
        let mut row = json!({"label": "unsafe", "messages": [
            {"role": "user", "content": "q"}, {"role": "assistant", "content": "No."}]});
        row.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        row
    };
    let effort = row(json!({"chat_template_kwargs": {"effort": "low"}}));
    for before in [
        "{{ effort }}",
        "{% set effort = effort if effort is defined else 'high' %}{{ effort }}",
        "{% set effort = effort | default('high') %}{{ effort }}",
        "{% macro e() %}{{ effort }}{% endmacro %}{{ e() }}",
        "{% if messages | length > 9 %}{{ effort }}{% endif %}",
    ] {
        read_row(&with_turns(before, ""), &effort).unwrap_or_else(|e| panic!("{before}: {e}"));
    }
    for before in
        ["{# effort #}", "{{ 'effort' }}", "{% set effort = 'high' %}{{ effort }}", "{{ messages[0].effort }}"]
    {
        let error = read_row(&with_turns(before, ""), &effort).expect_err(before);
        assert!(error.contains("the row gives effort for the chat template, which does not read it"), "{error}");
    }
    // A field that is not given to the template matters only where a rendering looks it up.
    let dated = row(json!({"date": "today", "range": [1, 2]}));
    for before in ["{% if false %}{{ date }}{% endif %}{{ range(2) | length }}", "{% set date = '1' %}{{ date }}"] {
        read_row(&with_turns(before, ""), &dated).unwrap_or_else(|e| panic!("{before}: {e}"));
    }
    let error = read_row(&with_turns("{% if date is defined %}{{ date }}{% endif %}", ""), &dated).unwrap_err();
    assert!(error.contains("the chat template reads the variable date"), "{error}");
    // Tools that are read, and not written.
    let tools = row(json!({"tools": [{"name": "f"}]}));
    read_row(&with_turns("{% if tools %}{{ tools | length }}{% endif %}", ""), &tools).unwrap();
    let error = read_row(&with_turns("{% if tools %}{% set x = 1 %}{% endif %}", ""), &tools).unwrap_err();
    assert!(error.contains("rows.jsonl:1: the chat template writes nothing of tools"), "{error}");
}

#[test]
fn numbers_of_rows_are_printed_as_python_prints_them() {
    // `json.dumps` and `str` of Python.
    let row = |tools: &str| {
        let messages = r#"[{"role": "user", "content": "q"}, {"role": "assistant", "content": "No."}]"#;
        format!(r#"{{"label": "unsafe", "messages": {messages}, "tools": {tools}}}"#)
    };
    let dir = folder(
        &json!("marks-304"),
        &json!({"tokenizer_config.json": {"chat_template": with_turns("{{ tools | tojson }}{{ tools[0].n }}\n", "")}}),
    );
    let tokenizer = ChatTokenizer::open(dir.path(), None).unwrap();
    let rows = dir.path().join("rows.jsonl");
    for (number, printed) in [
        ("1e-7", "1e-07"),
        ("1E16", "1e+16"),
        ("1.0", "1.0"),
        ("18446744073709551615", "18446744073709551615"),
        ("18446744073709551616", "18446744073709551616"),
        ("-123456789012345678901234567890", "-123456789012345678901234567890"),
    ] {
        for tools in [format!(r#"[{{"n": {number}}}]"#), format!(r#""[{{'n': {number}}}]""#)] {
            fs::write(&rows, row(&tools)).unwrap();
            let dataset = Dataset::read(&rows, &tokenizer, &DataOptions { max_length: 512, ..DataOptions::default() });
            let dataset = dataset.unwrap_or_else(|e| panic!("{tools}: {e}"));
            let prompt = format!("[{{\"n\": {printed}}}]{printed}\n<user>q\n<assistant>");
            assert_eq!(
                dataset.records[0].unsafe_prompt.as_deref().unwrap(),
                tokenizer.encode(&prompt).unwrap(),
                "{tools}"
            );
        }
    }
    fs::write(&rows, row(&format!(r#"[{{"n": {}}}]"#, "9".repeat(50)))).unwrap();
    let error = Dataset::read(&rows, &tokenizer, &DataOptions::default()).unwrap_err().to_string();
    assert!(error.contains("rows.jsonl:1: an integer of 50 digits is too long"), "{error}");
}
