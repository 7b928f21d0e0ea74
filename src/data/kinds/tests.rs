use super::*;
use serde_json::json;

fn read(row: Value, keep_failed: bool) -> Result<Option<Row>> {
    match parse(7, row.as_object().unwrap(), "No.", keep_failed)? {
        Parsed::Row(row) => Ok(Some(*row)),
        Parsed::Dropped(_) => Ok(None),
    }
}

fn kept(row: Value) -> Row {
    read(row, false).unwrap().expect("a row that is kept")
}

fn turns(side: &Option<Side>) -> Vec<(String, String)> {
    side.as_ref().unwrap().messages.iter().map(|m| (m.role.clone(), m.content.clone())).collect()
}

fn texts<const N: usize>(turns: [(&str, &str); N]) -> Vec<(String, String)> {
    turns.map(|(r, c)| (r.to_owned(), c.to_owned())).to_vec()
}

#[test]
fn verdicts_drop_rows_unless_keep_failed() {
    let base = |extra: Value| {
        let mut row = json!({"prompt": "p", "all_prompt": [{"role": "user", "content": "a"}]});
        row.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        row
    };
    for (verdict, keep) in [
        (json!({"judge_success_gpt4": 1}), true),
        (json!({"judge_success_gpt4": true}), true),
        (json!({"judge_success_gpt4": 0}), false),
        (json!({"judge_success_gpt4": 2}), false),
        (json!({"inception_attack_score": 3}), true),
        (json!({"inception_attack_score": "0"}), false),
        (json!({"inception_attack_score": null}), false),
        (json!({"judge_result": {"reason": "", "score": 1}}), true),
        (json!({"judge_result": {"reason": "", "score": 0}}), false),
        (json!({"judge_result": "{'reason': '', 'score': 2}"}), true),
        (json!({"judge_result": null}), false),
        (json!({"judge_success_gpt4": 1, "inception_attack_score": 0}), false),
        (json!({"judge_success_gpt4": 1, "inception_attack_score": null, "judge_result": {"score": null}}), true),
        (json!({"judge_success_gpt4": null, "inception_attack_score": 0}), false),
        (json!({}), true),
    ] {
        assert_eq!(read(base(verdict.clone()), false).unwrap().is_some(), keep, "{verdict}");
        assert!(read(base(verdict.clone()), true).unwrap().is_some(), "{verdict}");
    }
    assert!(kept(base(json!({}))).without_verdict);
    assert!(read(base(json!({"judge_success_gpt4": "yes"})), false).unwrap_err().contains("a number"));
    assert!(read(base(json!({"judge_result": {}})), false).unwrap_err().contains("no score"));
}

#[test]
fn an_attack_row_has_an_unsafe_and_a_safe_side() {
    let row = kept(
        json!({"goal": "g", "prompt": "p", "all_prompt": "[{'role': 'system', 'content': 's'}, {'role': 'user', 'content': \"it's\"}]"}),
    );
    assert_eq!(turns(&row.unsafe_side), texts([("system", "s"), ("user", "it's"), ("assistant", "No.")]));
    assert_eq!(turns(&row.safe_side), texts([("system", SAFE_SYSTEM), ("user", "g"), ("assistant", "No.")]));
    assert_eq!((row.request.as_str(), row.line), ("g", 7));

    let row = kept(json!({"prompt": "p", "attack_prompt": "a", "all_prompt": null, "refusal_response": "Sorry."}));
    assert_eq!(turns(&row.unsafe_side), texts([("user", "a"), ("assistant", "Sorry.")]));
    assert_eq!(turns(&row.safe_side), texts([("user", "p"), ("assistant", "Sorry.")]));

    let row = kept(json!({"prompt": "p", "inception_attack": "a", "all_prompt": [], "refusal_response": " "}));
    assert_eq!(turns(&row.unsafe_side), texts([("user", "a"), ("assistant", "No.")]));
}

#[test]
fn an_assistant_turn_inside_an_attack_carries_no_loss() {
    let turns = |more: Value| {
        let mut reply = json!({"role": "assistant", "content": "2"});
        reply.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!([{"role": "user", "content": "1"}, reply, {"role": "user", "content": "3"}])
    };
    let rows = |attack: Value| {
        [
            json!({"goal": "g", "all_prompt": attack}),
            json!({"safe_messages": [{"role": "user", "content": "s"}], "unsafe_messages": attack, "response": "R"}),
        ]
    };
    for mark in
        [json!({"loss": true}), json!({"train": true}), json!({"loss": true, "weight": 1}), json!({"weight": 1})]
    {
        for row in rows(turns(mark)) {
            let error = read(row, false).unwrap_err();
            assert!(error.contains("message 2 of ") && error.contains("only the reply does"), "{error}");
        }
    }
    let unmarked = [json!({}), json!({"loss": false}), json!({"weight": 0})];
    for row in unmarked.into_iter().flat_map(|mark| rows(turns(mark))) {
        let side = kept(row).unsafe_side.unwrap();
        assert_eq!(
            side.messages.iter().map(|m| m.loss).collect::<Vec<_>>(),
            [Some(false), Some(false), Some(false), None]
        );
        assert_eq!(side.prompt, 3);
    }
}

#[test]
fn an_unsafe_row_carries_loss_on_its_reply_alone_unless_a_turn_says_so() {
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let marked = |mark: Value| {
        let mut earlier = turn("assistant", "Sure: ...");
        earlier.as_object_mut().unwrap().extend(mark.as_object().unwrap().clone());
        vec![turn("user", "1"), earlier, turn("user", "2")]
    };
    // With its own reply, completed with the target, and completed with its own refusal.
    let rows = |mark: Value| {
        let open = marked(mark);
        let whole = [open.clone(), vec![turn("assistant", "No.")]].concat();
        [
            json!({"label": "unsafe", "messages": whole}),
            json!({"label": "unsafe", "conversations": open}),
            json!({"label": "safe", "messages": open, "refusal_response": "No."}),
            json!({"label": "safe", "prompt": open, "completion": "No."}),
            json!({"label": "unsafe", "prompt": turn("user", "0")["content"], "completion": whole[1..]}),
        ]
    };
    let carries = |row: Row| {
        let side = row.unsafe_side.or(row.safe_side).unwrap();
        side.messages.iter().filter(|m| m.is_assistant()).map(|m| m.loss != Some(false)).collect::<Vec<_>>()
    };
    for (mark, earlier) in
        [(json!({}), false), (json!({"loss": false, "weight": 0}), false), (json!({"loss": true, "weight": 1}), true)]
    {
        for row in rows(mark.clone()) {
            assert_eq!(carries(kept(row.clone())), [earlier, true], "{row}");
        }
    }
    assert!(
        kept(rows(json!({}))[0].clone()).earlier_excluded
            && !kept(rows(json!({"loss": true}))[0].clone()).earlier_excluded
    );
    for (row, name) in rows(json!({"weight": 1})).into_iter().zip([
        "messages",
        "conversations",
        "messages",
        "prompt",
        "prompt and completion",
    ]) {
        let error = read(row, false).unwrap_err();
        assert!(
            error.contains(&format!("of {name} has weight 1, but ")) && error.contains("write loss: true"),
            "{error}"
        );
    }
    let mut safe = [marked(json!({"weight": 1})), vec![turn("assistant", "Yes.")]].concat();
    assert_eq!(carries(kept(json!({"label": "safe", "messages": safe}))), [true, true]);
    safe[1]["loss"] = json!(false);
    assert!(read(json!({"label": "safe", "messages": safe}), false).unwrap_err().contains("contradict"));
}

#[test]
fn chat_rows_in_three_formats() {
    let want = texts([("user", "q"), ("assistant", "a")]);
    for row in [
        json!({"label": "unsafe", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}),
        json!({"label": "unsafe", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}),
        json!({"label": "unsafe", "prompt": "q", "completion": "a"}),
        json!({"label": "unsafe", "prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}),
    ] {
        let row = kept(row);
        assert_eq!(turns(&row.unsafe_side), want);
        assert_eq!((row.kind, row.request.as_str()), (Kind::ChatUnsafe, "q"));
        assert_eq!((row.unsafe_side.unwrap().prompt, row.safe_side), (1, None));
    }
}

#[test]
fn the_target_replaces_a_missing_reply_of_unsafe_prompts_only() {
    let row = |label: &str| json!({"label": label, "messages": [{"role": "user", "content": "q"}]});
    assert_eq!(turns(&kept(row("unsafe")).unsafe_side), texts([("user", "q"), ("assistant", "No.")]));
    let safe = kept(row("safe")).safe_side.unwrap();
    assert!(!safe.has_reply());
    let mut own = row("safe");
    own["refusal_response"] = json!("Own.");
    assert_eq!(turns(&kept(own).safe_side), texts([("user", "q"), ("assistant", "Own.")]));
}

#[test]
fn two_refusals_that_differ_are_refused() {
    let parsed = |row: Value| parse(1, row.as_object().unwrap(), "No.", false).map(drop);
    let turns = json!([{"role": "user", "content": "q"}, {"role": "assistant", "content": "Sure."}]);
    let chat = |label: &str, refusal: &str| json!({"label": label, "messages": turns, "refusal_response": refusal});
    assert!(parsed(chat("unsafe", "Own.")).unwrap_err().contains("refusal_response is another one"));
    assert_eq!((parsed(chat("unsafe", " Sure. ")), parsed(chat("safe", "Own."))), (Ok(()), Ok(())));
    // The refusal of an unsafe row is compared, that of a safe row is for nothing.
    assert_eq!(kept(chat("unsafe", "Sure.")).unused, Vec::<String>::new());
    assert_eq!(kept(chat("safe", "Own.")).unused, ["refusal_response"]);
    let user = json!([{"role": "user", "content": "q"}]);
    let pair = |refusal: &str| json!({"safe_messages": user, "unsafe_messages": user, "response": "No.", "refusal_response": refusal});
    assert!(parsed(pair("Own.")).unwrap_err().contains("they differ") && parsed(pair("No.")).is_ok());
}

#[test]
fn an_assistant_turn_before_a_completion_carries_loss_where_it_says_so() {
    let prompt = json!([{"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss": true},
        {"role": "user", "content": "3"}]);
    let side = kept(json!({"label": "safe", "prompt": prompt, "completion": "4"})).safe_side.unwrap();
    assert_eq!(side.messages.iter().map(|m| m.loss).collect::<Vec<_>>(), [Some(false), Some(true), Some(false), None]);
}

#[test]
fn a_chat_row_keeps_loss_false() {
    let row = kept(json!({"label": "safe", "messages": [
        {"role": "user", "content": "1"}, {"role": "assistant", "content": "2", "loss": false},
        {"role": "user", "content": "3"}, {"role": "assistant", "content": "4", "loss": true}]}));
    let side = row.safe_side.unwrap();
    assert_eq!(side.messages.iter().map(|m| m.loss).collect::<Vec<_>>(), [None, Some(false), None, Some(true)]);
    assert_eq!(side.prompt, 3);
}

#[test]
fn errors_name_cause_and_way_out() {
    let user = json!([{"role": "user", "content": "q"}]);
    for (row, message) in [
        (json!({"text": "x"}), "unknown kind of row (its fields: text)"),
        (
            json!({"instruction": "i", "input": "", "output": "o"}),
            "Write instruction and input as prompt, output as completion",
        ),
        (json!({"prompt": "p", "response": "r", "label": "safe"}), "response. Write response as completion"),
        (json!({"prompt": "p", "response_0": "r", "response_1": "s"}), "Write the response to learn as completion"),
        (json!({"chosen": "Human: q", "rejected": "Human: q"}), "the reply to learn as completion"),
        (json!({"prompt": "p", "label": "unsafe"}), "write completion: null"),
        (json!({"conversation": [], "label": "safe"}), "Write conversation as messages"),
        (json!({"messages": [{"role": "system", "content": "s"}], "label": "unsafe"}), "has no turn of the user"),
        (
            json!({"goal": "g", "all_prompt": [{"role": "system", "content": "s"}]}),
            "all_prompt has no turn of the user",
        ),
        (
            json!({"vanilla": "v", "adversarial": "a", "completion": "c", "label": "unsafe"}),
            "adversarial, or else vanilla, as prompt",
        ),
        (json!({}), "unknown kind"),
        (json!({"messages": user, "all_prompt": user}), "more than one kind"),
        (json!({"messages": user, "judge_success_gpt4": 1}), "more than one kind"),
        (json!({"messages": user, "judge_success_gpt4": null, "goal": "", "all_prompt": []}), "without a label"),
        (json!({"messages": user, "conversations": user, "label": "safe"}), "keep one"),
        (json!({"messages": user}), "add \"label\": \"safe\" or"),
        (json!({"messages": user, "label": "ok"}), "label \"ok\""),
        (json!({"messages": user, "label": 1}), "label 1; it should be \"safe\" or \"unsafe\""),
        (json!({"messages": [user], "label": ["safe"]}), "label holds several values"),
        (json!({"messages": {"0": user}, "label": {"0": "safe"}}), "a table by columns"),
        (json!({"messages": [], "label": "safe"}), "without messages"),
        (json!({"messages": [{"role": "assistant", "content": "a"}], "label": "safe"}), "messages has only the reply"),
        (json!({"conversations": [{"from": "gpt", "value": "a"}], "label": "unsafe"}), "add the request"),
        (json!({"completion": "c", "label": "safe"}), "without its prompt"),
        (json!({"all_prompt": user}), "add goal or prompt"),
        (json!({"goal": "g"}), "without all_prompt"),
        (json!({"goal": "g", "all_prompt": "hello"}), "JSON or Python notation"),
        (json!({"goal": "g", "all_prompt": 3}), "not a number"),
        (json!({"goal": "g", "all_prompt": [{"role": "assistant", "content": "x"}]}), "ends with an assistant turn"),
        (json!({"goal": "g", "all_prompt": [{"role": "user"}]}), "message 1: has no content"),
        (json!({"goal": "g", "all_prompt": [{"role": "usr", "content": "x"}]}), "role \"usr\""),
        (json!({"goal": "g", "all_prompt": [{"role": "user", "content": "x", "tool_calls": 1}]}), "tool_calls"),
        (json!({"goal": "g", "all_prompt": [{"from": "observation", "value": "x"}]}), "write this one as tool"),
        (json!({"goal": "g", "all_prompt": [{"from": "function_call", "value": "x"}]}), "assistant with tool_calls"),
        (json!({"goal": "g", "all_prompt": [{"from": "chatgpt", "value": "x"}]}), "write this one as assistant"),
        (json!({"goal": "g", "all_prompt": [{"role": "user", "content": "x", "loss": 1}]}), "true or false"),
        (json!({"goal": "g", "all_prompt": ["x"]}), "not a string"),
        (json!({"safe_messages": user}), "without unsafe_messages"),
        (json!({"safe_messages": user, "unsafe_messages": []}), "unsafe_messages has no messages"),
    ] {
        let error = read(row.clone(), false).unwrap_err();
        assert!(error.contains(message), "{row} gave {error:?}, expected {message:?}");
    }
}
