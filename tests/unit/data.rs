//! From data files to token ids and loss masks: compared with the goldens and attack rows of the optional shared
//! folder, and with model folders made here with a byte-level tokenizer.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use moewarden::data::{
    ChatTokenizer, DataOptions, Dataset, DropReason, Error, Kind, LongRows, LossOn, Message, MicroBatch,
    loss_mask_samples, micro_batches, order,
};
use moewarden::exit::{self, Coded};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

const REFUSAL: &str = "I cannot assist with that request as it may be harmful or unsafe.";
const CHATML: &str = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}\
                      {% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

fn options() -> DataOptions {
    DataOptions { max_length: 256, safe_response: REFUSAL.into(), ..DataOptions::default() }
}

/// The shared folder of goldens and attack rows, if it exists.
fn shared() -> Option<PathBuf> {
    let path = crate::shared::shared();
    if !path.join("goldens").is_dir() {
        eprintln!("skipped: {} does not exist (set MOEWARDEN_SHARED to the folder)", path.display());
        return None;
    }
    Some(path)
}

/// A model folder with a byte-level tokenizer: one token a byte, one for two line feeds, and two special tokens.
fn model_folder(chat_template: &Value) -> TempDir {
    // Byte-level tokenizers represent bytes that are not visible Latin-1 characters by characters from U+0100 on.
    let visible = |b: u32| matches!(b, 33..=126 | 161..=172 | 174..=255);
    let mut moved = 256;
    let mut vocab = serde_json::Map::new();
    for byte in 0..256 {
        let c = if visible(byte) {
            byte
        } else {
            moved += 1;
            moved - 1
        };
        vocab.insert(char::from_u32(c).unwrap().to_string(), json!(byte));
    }
    vocab.insert("ĊĊ".into(), json!(256));
    let special = |id: u32, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        // Settings of an earlier use, which must not truncate or pad anything here.
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9000}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "!"},
        "added_tokens": [special(257, "<|im_start|>"), special(258, "<|im_end|>")],
        "normalizer": null, "pre_tokenizer": byte_level, "post_processor": null, "decoder": byte_level,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [["Ċ", "Ċ"]]},
    });
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let config = json!({"eos_token": {"content": "<|im_end|>"}, "bos_token": null, "chat_template": chat_template});
    fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::open(model_folder(&json!(CHATML)).path(), None).unwrap()
}

fn read_bytes(bytes: &[u8], options: &DataOptions) -> Result<Dataset, Error> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rows.json");
    fs::write(&path, bytes).unwrap();
    Dataset::read(&path, &tokenizer(), options)
}

fn read(rows: &Value, options: &DataOptions) -> Result<Dataset, Error> {
    read_bytes(rows.to_string().as_bytes(), options)
}

fn attack(goal: &str, text: &str) -> Value {
    json!({"goal": goal, "all_prompt": [{"role": "user", "content": text}], "judge_success_gpt4": 1})
}

fn chat(label: &str, contents: &[&str]) -> Value {
    let turns = contents.iter().enumerate();
    let turns: Vec<_> = turns.map(|(i, c)| json!({"role": (["user", "assistant"][i % 2]), "content": c})).collect();
    json!({"label": label, "messages": turns})
}

/// The text of the tokens that carry loss.
fn loss_text(tokenizer: &ChatTokenizer, ids: &[u32], loss: &[bool]) -> String {
    let texts = tokenizer.token_texts(ids);
    texts.into_iter().zip(loss).filter(|(_, loss)| **loss).map(|(text, _)| text).collect()
}

// --- comparison with transformers ----------------------------------------------------------------------------------

#[test]
fn ids_and_labels_equal_the_goldens() {
    let Some(shared) = shared() else { return };
    let mut compared = 0;
    for entry in fs::read_dir(shared.join("goldens")).unwrap() {
        let folder = entry.unwrap().path();
        let tokenizer = ChatTokenizer::open(&folder.join("model"), None).unwrap();
        let expect: Value = serde_json::from_slice(&fs::read(folder.join("expect.json")).unwrap()).unwrap();
        let dataset = Dataset::read(&folder.join("data.json"), &tokenizer, &options()).unwrap();
        let replies: Vec<_> = dataset.records.iter().map(|r| r.unsafe_reply.as_ref().unwrap()).collect();
        let first = replies[0];
        let labels: Vec<_> =
            first.ids.iter().zip(&first.loss).map(|(id, l)| if *l { i64::from(*id) } else { -100 }).collect();
        assert_eq!(json!(first.ids), expect["first_ids"], "{}", folder.display());
        assert_eq!(json!(labels), expect["first_labels"], "{}", folder.display());
        assert_eq!(
            json!(replies.iter().map(|e| e.ids.len()).collect::<Vec<_>>()),
            expect["tokens"],
            "{}",
            folder.display()
        );
        let targets = |e: &&moewarden::data::Example| MicroBatch::of_examples([*e]).targets.len();
        assert_eq!(
            json!(replies.iter().map(targets).collect::<Vec<_>>()),
            expect["valid_tokens"],
            "{}",
            folder.display()
        );
        compared += 1;
    }
    assert_eq!(compared, 5);
}

#[test]
fn real_attack_rows_are_all_read() {
    let Some(shared) = shared() else { return };
    let all = DataOptions { max_length: 1 << 20, ..options() };
    for (file, rows) in [("flipattack", 64), ("deepinception", 64), ("johnny", 80)] {
        for golden in ["olmoe", "mixtral", "qwen3_moe"] {
            let tokenizer = ChatTokenizer::open(&shared.join("goldens").join(golden).join("model"), None).unwrap();
            let path = shared.join("data").join(file).with_extension("json");
            let dataset = Dataset::read(&path, &tokenizer, &all).unwrap();
            let report = &dataset.report;
            assert_eq!((report.rows_read, report.kept, report.without_verdict), (rows, rows, 0), "{report}");
            assert_eq!(report.by_kind[&Kind::Attack], rows);
            for record in &dataset.records {
                let (reply, prompt) = (record.unsafe_reply.as_ref().unwrap(), record.unsafe_prompt.as_ref().unwrap());
                assert!(reply.ids.starts_with(prompt) && !record.request.is_empty());
                assert!(loss_text(&tokenizer, &reply.ids, &reply.loss).trim_start().starts_with(REFUSAL));
                assert_ne!(record.unsafe_prompt, record.safe_prompt);
            }
            let few = Dataset::read(&path, &tokenizer, &DataOptions { max_samples: 10, ..all.clone() }).unwrap();
            assert_eq!(few.records[..], dataset.records[..10]);
        }
    }
}

// --- rows to records -----------------------------------------------------------------------------------------------

#[test]
fn a_record_has_both_sides_and_their_loss_masks() {
    let tokenizer = tokenizer();
    let dataset = read(&json!([attack("bare", "attacked")]), &options()).unwrap();
    let record = &dataset.records[0];
    let text = |ids: &[u32]| tokenizer.token_texts(ids).concat();
    let prompt = "<|im_start|>user\nattacked<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text(record.unsafe_prompt.as_ref().unwrap()), prompt);
    let safe = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nbare<|im_end|>\n<|im_start|>assistant\n";
    assert_eq!(text(record.safe_prompt.as_ref().unwrap()), safe);
    for (reply, prompt) in [(&record.unsafe_reply, prompt), (&record.safe_reply, safe)] {
        let reply = reply.as_ref().unwrap();
        assert_eq!(text(&reply.ids), format!("{prompt}{REFUSAL}<|im_end|>\n"));
        assert_eq!(loss_text(&tokenizer, &reply.ids, &reply.loss), format!("{REFUSAL}<|im_end|>\n"));
    }
    assert_eq!((record.request.as_str(), record.line), ("bare", 1));
    let all = read(&json!([attack("bare", "attacked")]), &DataOptions { loss_on: LossOn::All, ..options() }).unwrap();
    let loss = &all.records[0].unsafe_reply.as_ref().unwrap().loss;
    assert!(!loss[0] && loss[1..].iter().all(|l| *l));
}

#[test]
fn a_token_that_straddles_the_start_of_the_reply_carries_loss() {
    // The generation prompt ends with a line feed and the reply begins with one; one token covers both.
    let tokenizer = tokenizer();
    let dataset = read(&json!([chat("safe", &["q", "\n", "r", "a"])]), &options()).unwrap();
    let reply = dataset.records[0].safe_reply.as_ref().unwrap();
    assert_eq!(loss_text(&tokenizer, &reply.ids, &reply.loss), "\n\n<|im_end|>\na<|im_end|>\n");
    assert!(reply.ids.contains(&256));
}

#[test]
fn max_samples_counts_rows_that_pass_their_verdict() {
    let mut failed = attack("g0", "a0");
    failed["judge_success_gpt4"] = json!(0);
    let mut unknown = attack("g1", "a1");
    unknown["judge_success_gpt4"] = json!(null);
    let mut bare = attack("g4", "a4");
    bare.as_object_mut().unwrap().remove("judge_success_gpt4");
    let rows = json!([failed, unknown, attack("g2", "a2"), attack("g3", "a3"), bare, attack("g5", "a5")]);
    let requests = |d: &Dataset| d.records.iter().map(|r| r.request.clone()).collect::<Vec<_>>();
    let two = read(&rows, &DataOptions { max_samples: 2, ..options() }).unwrap();
    assert_eq!(requests(&two), ["g2", "g3"]);
    assert!(two.report.stopped_early && two.report.rows_read == 4);
    let all = read(&rows, &options()).unwrap();
    assert_eq!(requests(&all), ["g2", "g3", "g4", "g5"]);
    assert_eq!((all.report.rows_read, all.report.without_verdict, all.report.stopped_early), (6, 1, false));
    assert_eq!(all.report.dropped, [(DropReason::FailedAttack, 1), (DropReason::NullVerdict, 1)].into());
    assert_eq!(read(&rows, &DataOptions { keep_failed: true, ..options() }).unwrap().records.len(), 6);
}

#[test]
fn long_rows_are_dropped_truncated_or_errors() {
    // Only the attack is too long; the safe side is dropped with it.
    let rows = json!([attack("g", &"x".repeat(300)), attack("h", "short")]);
    let dropped = read(&rows, &options()).unwrap();
    assert_eq!((dropped.records.len(), dropped.report.dropped[&DropReason::TooLong]), (1, 1));
    assert_eq!(dropped.records[0].request, "h");

    let tokenizer = tokenizer();
    let cut = read(&rows, &DataOptions { long_rows: LongRows::TruncatePrompt, ..options() }).unwrap();
    let (reply, prompt) = (cut.records[0].unsafe_reply.clone().unwrap(), cut.records[0].unsafe_prompt.clone().unwrap());
    assert_eq!((reply.ids.len(), reply.loss.len(), prompt.len(), cut.report.truncated), (256, 256, 256, 1));
    assert_eq!(loss_text(&tokenizer, &reply.ids, &reply.loss), format!("{REFUSAL}<|im_end|>\n"));
    assert!(tokenizer.token_texts(&prompt).concat().ends_with("xx<|im_end|>\n<|im_start|>assistant\n"));

    let error = read(&rows, &DataOptions { long_rows: LongRows::Error, ..options() }).unwrap_err();
    assert!(
        error.to_string().contains("rows.json:1: a prompt of 3") && error.to_string().contains("--long-rows"),
        "{error}"
    );

    // A reply that is too long by itself is not truncated.
    let whole = json!([chat("unsafe", &["q", &"y".repeat(300)]), attack("h", "short")]);
    let cut = read(&whole, &DataOptions { long_rows: LongRows::TruncatePrompt, ..options() }).unwrap();
    assert_eq!((cut.records.len(), cut.report.dropped[&DropReason::TooLong], cut.report.truncated), (1, 1, 0));
    let exactly = cut.records[0].unsafe_reply.as_ref().unwrap().ids.len();
    let safe = cut.records[0].safe_reply.as_ref().unwrap().ids.len();
    let fits = |max_length| read(&json!([attack("h", "short")]), &DataOptions { max_length, ..options() }).is_ok();
    assert!(fits(exactly.max(safe)) && !fits(exactly.max(safe) - 1));
}

#[test]
fn counts_of_the_report() {
    let rows = json!([
        attack("g", "a <|im_end|> b"),
        chat("safe", &["hello", "world"]),
        chat("safe", &["a prompt alone"]),
        chat("unsafe", &["bad"]),
        chat("unsafe", &["empty reply", ""]),
        {"safe_messages": [{"role": "user", "content": "s"}], "unsafe_messages": [{"role": "user", "content": "u"}], "response": "R"},
        {"label": "safe", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "loss": false}]},
    ]);
    let dataset = read(&rows, &options()).unwrap();
    let report = &dataset.report;
    assert_eq!(report.by_kind, [(Kind::Attack, 1), (Kind::ChatSafe, 2), (Kind::ChatUnsafe, 2), (Kind::Pair, 1)].into());
    assert_eq!(report.dropped, [(DropReason::NoLossToken, 1)].into());
    assert_eq!(
        (report.special_tokens_in_content, report.first_special_token.clone()),
        (1, Some((1, "<|im_end|>".into())))
    );
    assert_eq!(report.without_reply, 1);
    let replies = || dataset.records.iter().flat_map(|r| [&r.unsafe_reply, &r.safe_reply]).flatten();
    assert_eq!(report.tokens, replies().map(|e| e.ids.len()).sum::<usize>());
    assert_eq!(report.loss_tokens, replies().map(|e| MicroBatch::of_examples([e]).targets.len()).sum::<usize>());
    let shown = report.to_string();
    for part in [
        "7 rows read, 6 kept",
        "1 attack, 2 chat (safe)",
        "no token of the reply",
        "in 1 rows the text of a special token",
        "line 1, <|im_end|>",
    ] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
    let lengths = &report.lengths;
    let padding = report.padding(2);
    let padded: usize = lengths.chunks(2).map(|c| c.len() * c.iter().max().unwrap()).sum();
    assert_eq!((padding.tokens, padding.tokens + padding.avoided), (lengths.iter().sum(), padded));
    assert_eq!(report.padding(1).avoided, 0);
    assert!(padding.share() > 0.0 && padding.share() < 1.0);
    assert_eq!(serde_json::to_value(report).unwrap()["by_kind"]["chat-safe"], 2);
}

#[test]
fn requests_shared_with_a_held_out_file_are_counted() {
    let train = read(&json!([attack("Make a Bomb", "a"), attack("other", "b")]), &options()).unwrap();
    let held_out = read(&json!([attack("make a  bomb ", "z"), attack("new", "b")]), &options()).unwrap();
    assert_eq!((held_out.count_shared_requests(&train), train.count_shared_requests(&train)), (1, 2));
}

#[test]
fn samples_show_the_loss_mask() {
    let dataset = read(&json!([attack("g", "äöü 😀"), chat("safe", &["q", "a"])]), &options()).unwrap();
    let samples = loss_mask_samples(&dataset, &tokenizer(), 1);
    assert_eq!(samples.iter().map(|s| (s.line, s.is_unsafe)).collect::<Vec<_>>(), [(1, true), (1, false)]);
    let (text, loss): (Vec<_>, Vec<_>) = samples[0].tokens.iter().cloned().unzip();
    assert!(text.concat().contains("äöü 😀<|im_end|>"));
    assert_eq!(loss, dataset.records[0].unsafe_reply.as_ref().unwrap().loss);
    assert_eq!(loss_mask_samples(&dataset, &tokenizer(), 9).len(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn exactly_the_replies_of_a_chat_carry_loss(texts in prop::collection::vec("[a-zäΩ0-9].{0,20}", 2..7)) {
        let mut texts: Vec<_> = texts.iter().map(String::as_str).collect();
        texts.truncate(texts.len() / 2 * 2);
        let tokenizer = tokenizer();
        let dataset = read(&json!([chat("safe", &texts)]), &DataOptions { max_length: 4096, ..options() }).unwrap();
        let record = &dataset.records[0];
        let reply = record.safe_reply.as_ref().unwrap();
        prop_assert_eq!(reply.ids.len(), reply.loss.len());
        prop_assert!(reply.ids.starts_with(record.safe_prompt.as_ref().unwrap()));
        let want: String = texts.iter().skip(1).step_by(2).map(|t| format!("{t}<|im_end|>\n")).collect();
        prop_assert_eq!(loss_text(&tokenizer, &reply.ids, &reply.loss), want);
    }
}

#[test]
fn packed_micro_batches_predict_each_target_from_the_token_before_it() {
    let dataset =
        read(&json!([attack("g", "a"), chat("unsafe", &["q", "no"]), chat("unsafe", &["r", "never"])]), &options());
    let dataset = dataset.unwrap();
    for batch in micro_batches(&order(3, true, 5, 0), 2) {
        let examples: Vec<_> = batch.iter().map(|i| dataset.records[*i].unsafe_reply.as_ref().unwrap()).collect();
        let packed = MicroBatch::of_examples(examples.iter().copied());
        assert_eq!(packed.packing.len(), examples.len());
        for (s, example) in examples.iter().enumerate() {
            let rows = packed.rows_of(s..s + 1);
            assert_eq!(packed.ids[rows.clone()], example.ids);
            assert_eq!(packed.is_response[rows.clone()], example.loss);
            let mine = packed.loss_rows.iter().zip(&packed.targets).filter(|(row, _)| rows.contains(&(**row as usize)));
            let mine: Vec<_> = mine.map(|(row, target)| (*row as usize - rows.start + 1, *target)).collect();
            let wanted: Vec<_> =
                (1..example.ids.len()).filter(|t| example.loss[*t]).map(|t| (t, example.ids[t])).collect();
            assert_eq!(mine, wanted);
        }
    }
    let prompts = dataset.records.iter().map(|r| r.unsafe_prompt.as_deref().unwrap());
    let packed = MicroBatch::of_prompts(prompts.clone());
    assert_eq!((packed.ids, packed.targets.len()), (prompts.collect::<Vec<_>>().concat(), 0));
}

// --- invalid files -------------------------------------------------------------------------------------------------

#[test]
fn bad_files_name_their_line_and_exit_with_the_right_code() {
    let good = attack("g", "a").to_string();
    let second = |bytes: &[u8]| [good.as_bytes(), b"\n", bytes, b"\n"].concat();
    let mut long = attack("g", "a");
    long["goal"] = json!("x".repeat(400));
    for (bytes, message) in [
        (vec![], "the file is empty"),
        (b"\xef\xbb\xbf \n".to_vec(), "the file is empty"),
        (b"[]".to_vec(), "the file holds no rows"),
        (second(b"{\"goal\": \"\xff\"}"), "rows.json:2: byte 0xff is not UTF-8"),
        ([b"\xff\xfe".as_slice(), b"[\0]\0"].concat(), "rows.json:1: the file is UTF-16"),
        (second(br#"{"goal": "\ud83d"}"#), "rows.json:2: not JSON: "),
        (second(b"{\"goal\": 3}"), "rows.json:2: goal should be a string"),
        (
            second(b"{\"messages\": [{\"role\": \"user\", \"content\": \"q\"}]}"),
            "rows.json:2: a chat row without a label",
        ),
        (second(b"{\"text\": 1}"), "rows.json:2: unknown kind of row"),
        (json!([long]).to_string().into_bytes(), "no row is left: dropped 1 longer than --max-length"),
        (json!([chat("safe", &["only a prompt"])]).to_string().into_bytes(), "no row has a token that carries loss"),
    ] {
        let error = read_bytes(&bytes, &options()).unwrap_err();
        assert!(error.to_string().contains(message), "{error}\nshould say {message:?}");
        assert_eq!(error.exit_code(), exit::DATA, "{error}");
    }
    let missing = Dataset::read(Path::new("no/such/file.json"), &tokenizer(), &options()).unwrap_err();
    assert_eq!(missing.exit_code(), exit::NO_INPUT);
    assert!(missing.to_string().starts_with("no/such/file.json: "), "{missing}");
}

#[test]
fn unusual_but_valid_rows_are_read() {
    let mut row = attack("g", "a\u{0}b");
    row["extra"] = json!({"deep": [[[[1]]]]});
    let bytes =
        [b"\xef\xbb\xbf".as_slice(), row.to_string().as_bytes(), b"\r\n\r\n", attack("?", "?").to_string().as_bytes()]
            .concat();
    let dataset = read_bytes(&bytes, &options()).unwrap();
    assert_eq!(dataset.records.iter().map(|r| r.line).collect::<Vec<_>>(), [1, 3]);
}

#[test]
fn one_huge_line_and_very_many_rows_take_linear_time() {
    let start = Instant::now();
    let huge = json!([attack("g", &"x".repeat(32 << 20)), attack("h", "a")]);
    assert_eq!(read(&huge, &options()).unwrap().records.len(), 1);
    let many = format!("{}\n", attack("g", "a")).repeat(300_000);
    let few = read_bytes(many.as_bytes(), &DataOptions { max_samples: 5, ..options() }).unwrap();
    assert_eq!(few.records.len(), 5);
    let failed = many.replace("\"judge_success_gpt4\":1", "\"judge_success_gpt4\":0") + &attack("g", "a").to_string();
    assert_eq!(read_bytes(failed.as_bytes(), &options()).unwrap().report.rows_read, 300_001);
    // A few seconds on a busy machine; quadratic work would take hours.
    assert!(start.elapsed() < Duration::from_secs(120), "{:?}", start.elapsed());
}

// --- tokenizer and chat template -----------------------------------------------------------------------------------

#[test]
fn precedence_of_chat_templates_and_special_tokens() {
    let user = [Message::new("user", "q")];
    let folder = model_folder(
        &json!([{"name": "tool", "template": "T"}, {"name": "default", "template": "D{{ eos_token }}{{ messages[-1].content }}"}]),
    );
    let render =
        |file: Option<&Path>| ChatTokenizer::open(folder.path(), file).map(|t| t.render(&user, false).unwrap());
    assert_eq!(render(None).unwrap(), "D<|im_end|>q");
    fs::write(folder.path().join("chat_template.jinja"), "J{{ messages[-1].content }}").unwrap();
    assert_eq!(render(None).unwrap(), "Jq");
    let own = folder.path().join("own");
    // special_tokens_map.json takes precedence, as in transformers: tokenizer_config.json says null for bos_token.
    fs::write(
        folder.path().join("special_tokens_map.json"),
        r#"{"bos_token": "<s>", "unk_token": {"content": "<u>"}}"#,
    )
    .unwrap();
    fs::write(&own, "M{{ bos_token }}{{ unk_token }}{{ eos_token }}{{ messages[-1].content }}").unwrap();
    assert_eq!(render(Some(&own)).unwrap(), "M<s><u><|im_end|>q");
    assert_eq!(render(Some(Path::new("nowhere"))).unwrap_err().exit_code(), exit::NO_INPUT);
}

#[test]
fn errors_of_tokenizer_folders() {
    let open = |template: &Value| ChatTokenizer::open(model_folder(template).path(), None).err().unwrap();
    for (template, code, message) in [
        (json!(null), exit::CONFIG, "it has no chat template; name a template with --chat-template"),
        (json!([{"name": "tool", "template": "T"}]), exit::CONFIG, "(tool) is named default"),
        (json!("{% if %}"), exit::DATA, "does not compile"),
        (
            json!("<html>Sign in</html>"),
            exit::DATA,
            "role user with the content \"It is seven in the evening, and the lamps are lit.\" as `<html>Sign in</html>`, without",
        ),
        (
            json!("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"),
            exit::DATA,
            "too many steps",
        ),
    ] {
        let error = open(&template);
        assert!(error.to_string().contains(message), "{error}");
        assert_eq!(error.exit_code(), code, "{error}");
    }
    let folder = model_folder(&json!(CHATML));
    fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    assert_eq!(ChatTokenizer::open(folder.path(), None).err().unwrap().exit_code(), exit::DATA);
    fs::remove_file(folder.path().join("tokenizer.json")).unwrap();
    let missing = ChatTokenizer::open(folder.path(), None).err().unwrap();
    assert_eq!(missing.exit_code(), exit::NO_INPUT);
    assert!(missing.to_string().contains("save_pretrained"), "{missing}");
}

#[test]
fn encoding_decoding_and_vocabulary() {
    let folder = model_folder(&json!(CHATML));
    fs::write(folder.path().join("generation_config.json"), r#"{"eos_token_id": [7, 258]}"#).unwrap();
    let mut tokenizer = ChatTokenizer::open(folder.path(), None).unwrap();
    assert_eq!(tokenizer.eos_ids(), [7, 258]);
    let ids = tokenizer.encode("Grüße 😀<|im_end|>").unwrap();
    assert_eq!(ids.last(), Some(&258));
    assert_eq!(tokenizer.decode(&ids), "Grüße 😀");
    assert!(tokenizer.check_vocab(259).is_ok());
    let error = tokenizer.check_vocab(258).unwrap_err();
    assert!(error.to_string().contains("ids up to 258") && error.exit_code() == exit::DATA, "{error}");
    // A token for padding that is declared beside the tokenizer needs no embedding, until a text has it.
    let path = folder.path().join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["pad_token"] = json!("[PAD]");
    fs::write(&path, config.to_string()).unwrap();
    let mut tokenizer = ChatTokenizer::open(folder.path(), None).unwrap();
    tokenizer.check_vocab(259).unwrap();
    assert_eq!(tokenizer.encode("Grüße 😀<|im_end|>").unwrap(), ids);
    for error in [tokenizer.encode("a[PAD]").unwrap_err(), tokenizer.encode_with_offsets("[PAD]").unwrap_err()] {
        assert!(error.to_string().contains("the token `[PAD]`, id 259, but the model's vocabulary has 259"), "{error}");
    }
}

#[test]
fn a_template_that_rewrites_earlier_turns_is_refused_by_row_and_turn() {
    let forgetful = "{% for m in messages %}<{{ m.content if m.role == 'user' or loop.last else m.content[0] | upper }}>{% endfor %}";
    let folder = model_folder(&json!(forgetful));
    let tokenizer = ChatTokenizer::open(folder.path(), None).unwrap();
    let path = folder.path().join("rows.json");
    fs::write(&path, format!("{}\n{}", chat("safe", &["q", "a"]), chat("safe", &["q", "a", "r", "b"]))).unwrap();
    let error = Dataset::read(&path, &tokenizer, &options()).unwrap_err();
    assert!(error.to_string().contains("rows.json:2: message 2: the chat template renders it differently"), "{error}");
    // Of an unsafe row only the last turn is looked for.
    fs::write(&path, chat("unsafe", &["q", "a", "r", "b"]).to_string()).unwrap();
    let dataset = Dataset::read(&path, &tokenizer, &options()).unwrap();
    assert_eq!(dataset.report.earlier_excluded, 1);
    assert!(
        dataset
            .report
            .to_string()
            .contains("earlier assistant turns carry no loss (loss: true in a turn changes that): 1")
    );
}
