//! The model's own replies: greedy, the same at any number of ranks, and kept by the content that decides them.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use moewarden::backend::cpu::Cpu;
use moewarden::collective::conformance::on_threads;
use moewarden::data::Dataset;
use moewarden::exit::{self, Result};
use moewarden::launch::Rank;
use moewarden::report::{FinishReason, GenerationSpeed, OWN_REPLIES, OwnReply, PromptSide, Sampling};
use moewarden::run::generate::{Prompt, answers};
use moewarden::run::replies::{AskOptions, own_replies};
use moewarden::train::StopFlag;
use moewarden::ui::Ui;

use crate::case::Case;

const SIDES: [PromptSide; 2] = [PromptSide::Unsafe, PromptSide::Safe];

fn ask(
    case: &Case,
    data: &Dataset,
    rank: &Rank,
    max_new_tokens: usize,
    cache: Option<&Path>,
) -> Result<Option<Vec<OwnReply>>> {
    ask_in_batches(case, data, rank, (max_new_tokens, 3), cache)
}

fn ask_in_batches(
    case: &Case,
    data: &Dataset,
    rank: &Rank,
    (max_new_tokens, batch_size): (usize, usize),
    cache: Option<&Path>,
) -> Result<Option<Vec<OwnReply>>> {
    let replica = case.run_as(&case.config, Arc::new(Cpu::new(1)), rank).replica;
    let options = AskOptions { data, sides: &SIDES, max_new_tokens, batch_size, intervention: None, cache };
    own_replies(&case.session, &replica, options, &Ui::silent())
}

fn ask_alone(case: &Case, max_new_tokens: usize, cache: Option<&Path>) -> Vec<OwnReply> {
    ask(case, &case.session.data, &Rank::single(Ui::silent()), max_new_tokens, cache).unwrap().expect("nobody stops it")
}

#[test]
fn replies_are_greedy_and_the_same_at_any_number_of_ranks() {
    let case = Case::open_as_read("olmoe");
    let (model, eos) = (case.run(&case.config, 1).replica.into_model(), case.session.tokenizer.eos_ids());
    let one = ask_alone(&case, 5, None);
    let prompts = case.session.data.records.iter().flat_map(|r| [&r.unsafe_prompt, &r.safe_prompt]).flatten();
    assert_eq!(one.len(), prompts.count());
    for reply in &one {
        let record = &case.session.data.records[reply.record];
        let prompt = if reply.side == PromptSide::Unsafe { &record.unsafe_prompt } else { &record.safe_prompt };
        let prompt = [Prompt { ids: prompt.as_ref().unwrap(), index: 0 }];
        let alone = answers(&model, &prompt, eos, &Sampling::greedy(5), &mut GenerationSpeed::default(), |_, _| {});
        let alone = alone.unwrap().remove(0);
        assert_eq!((&reply.ids, reply.finish_reason), (&alone.ids, alone.finish), "line {}", reply.line);
        assert_eq!((reply.line, reply.prompt_tokens), (record.line, prompt[0].ids.len()));
        assert_eq!(reply.response, case.session.tokenizer.decode(&reply.ids));
    }
    for ranks in 2..=3 {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(OWN_REPLIES);
        let cache = file.clone();
        let several = on_threads(ranks, move |world| {
            let case = Case::open_as_read("olmoe");
            let rank = Rank::new(Arc::new(world), Ui::silent());
            ask(&case, &case.session.data, &rank, 5, Some(&cache)).unwrap().unwrap()
        });
        assert!(several.iter().all(|replies| *replies == one), "{ranks} ranks");
        assert_eq!(fs::read_to_string(file).unwrap().lines().count(), one.len());
    }
}

#[test]
fn replies_do_not_depend_on_the_batch_size() {
    let case = Case::open_as_read("olmoe");
    let rank = Rank::single(Ui::silent());
    let one = ask_in_batches(&case, &case.session.data, &rank, (6, 1), None).unwrap();
    assert!(one.as_ref().is_some_and(|replies| replies.len() > 3));
    for size in [2, 100] {
        assert_eq!(ask_in_batches(&case, &case.session.data, &rank, (6, size), None).unwrap(), one, "{size}");
    }
}

#[test]
fn replies_are_kept_by_the_content_that_decides_them() {
    let case = Case::open_as_read("olmoe");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(OWN_REPLIES);
    let first = ask_alone(&case, 3, Some(&file));
    let written = fs::read_to_string(&file).unwrap();
    assert_eq!(ask_alone(&case, 3, Some(&file)), first);
    assert_eq!(fs::read_to_string(&file).unwrap(), written);

    // What the file holds is not generated again: other tokens in it are believed.
    let ids = serde_json::to_string(&first[0].ids).unwrap();
    fs::write(&file, written.replacen(&format!("\"ids\":{ids}"), "\"ids\":[7,8]", 1)).unwrap();
    let read = ask_alone(&case, 3, Some(&file));
    let changed = read.iter().zip(&first).filter(|(a, b)| a.ids != b.ids).count();
    assert_eq!((changed, read.iter().any(|reply| reply.ids == [7, 8])), (1, true));

    // Another largest number of tokens is another question; the former replies stay in the file.
    let longer = ask_alone(&case, 4, Some(&file));
    assert!(longer.iter().all(|reply| reply.ids != [7, 8]));
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 2 * first.len());

    fs::write(&file, format!("{written}{{\"schema\":\n")).unwrap();
    let error = ask(&case, &case.session.data, &Rank::single(Ui::silent()), 3, Some(&file)).unwrap_err();
    assert_eq!(error.code(), exit::DATA);
    let text = error.to_string();
    assert!(text.contains(&format!("{}:{}:", file.display(), first.len() + 1)), "{text}");
}

#[test]
fn a_reply_equal_to_the_target_is_a_refusal() {
    let case = Case::open_as_read("olmoe");
    let eos = case.session.tokenizer.eos_ids();
    let said = ask_alone(&case, 4, None);
    let first = said.iter().find(|reply| reply.side == PromptSide::Unsafe).unwrap();
    assert_eq!((first.refuses, first.equals_target), (false, Some(false)), "gibberish of a random model");
    // The targets become what the model says, and its continuation on one of the sides.
    let mut data = case.session.data.clone();
    let record = &mut data.records[first.record];
    let prompt = record.unsafe_prompt.clone().unwrap();
    let target = record.unsafe_reply.as_mut().unwrap();
    let mut tail = first.ids.clone();
    tail.push(if first.finish_reason == FinishReason::Stop { eos[0] } else { 9 });
    target.loss = prompt.iter().map(|_| false).chain(tail.iter().map(|_| true)).collect();
    target.ids = [prompt, tail].concat();
    let again = ask(&case, &data, &Rank::single(Ui::silent()), 4, None).unwrap().unwrap();
    let same = again.iter().find(|reply| (reply.record, reply.side) == (first.record, first.side)).unwrap();
    assert_eq!((same.refuses, same.equals_target), (true, Some(true)));
    assert_eq!(again.iter().filter(|reply| reply.refuses).count(), 1 + said.iter().filter(|r| r.refuses).count());
}

#[test]
fn a_stop_keeps_the_replies_so_far() {
    let case = Case::open_as_read("olmoe");
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join(OWN_REPLIES);
    let rank = Rank { stop: StopFlag::default(), ..Rank::single(Ui::silent()) };
    rank.stop.set();
    assert_eq!(ask(&case, &case.session.data, &rank, 3, Some(&file)).unwrap(), None);
    assert_eq!(fs::read_to_string(&file).unwrap().lines().count(), 3, "one batch of one rank");
    assert_eq!(ask_alone(&case, 3, Some(&file)), ask_alone(&case, 3, None));
    // Within a batch, it keeps the replies that are complete.
    assert_eq!(ask(&case, &case.session.data, &rank, 40, Some(&file)).unwrap(), None);
    let text = fs::read_to_string(&file).unwrap();
    let rows: Vec<OwnReply> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(rows.iter().all(|row| row.ids.len() <= 3 || row.finish_reason == FinishReason::Stop), "{text}");
    assert_eq!(ask_alone(&case, 40, Some(&file)), ask_alone(&case, 40, None));
}
