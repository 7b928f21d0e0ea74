//! Decoding with a key/value cache gives the logits of the training pass, for all families, windows and rope types of the
//! golden models, for one sequence and for several; and generation ends, samples and fails as specified, whatever the batch size.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::bf16::backends;
use moewarden::backend::Packing;
use moewarden::backend::cpu::Cpu;
use moewarden::data::Penalties;
use moewarden::exit::{self, Result};
use moewarden::model::{Checkpoint, ForwardOptions, Inputs, Model, ModelConfig, ParamTable, PassEnd};
use moewarden::report::{FinishReason, GenerationSpeed, Sampling};
use moewarden::run::generate::{Answer, Prompt, answers, batches};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn open(case: &Path) -> Model<Cpu> {
    open_on(case, Cpu::new(1))
}

fn open_on(case: &Path, cpu: Cpu) -> Model<Cpu> {
    let dir = case.join("model");
    let config = ModelConfig::from_dir(&dir).unwrap();
    let table = ParamTable::build(&config, &Checkpoint::open(&dir).unwrap()).unwrap();
    Model::new(Arc::new(cpu), config, table)
}

/// The first unsafe reply.
fn some_ids(case: &Path) -> Vec<u32> {
    let expect: serde_json::Value = serde_json::from_slice(&std::fs::read(case.join("expect.json")).unwrap()).unwrap();
    let mut replies = expect["records"].as_array().unwrap().iter().map(|r| &r["unsafe_reply"]["ids"]);
    serde_json::from_value(replies.find(|ids| ids.is_array()).unwrap().clone()).unwrap()
}

fn answer(model: &Model<Cpu>, prompt: &[u32], eos: &[u32], sampling: &Sampling, index: u64) -> Result<Answer> {
    let prompts = [Prompt { ids: prompt, index }];
    Ok(answers(model, &prompts, eos, sampling, &mut GenerationSpeed::default(), |_, _| {})?.remove(0))
}

/// The logits after one sequence.
fn logits_of(model: &Model<Cpu>, ids: &[u32]) -> Vec<f32> {
    model.decode(&[(0, ids)], &mut model.kv_cache(&[ids.len()]))
}

/// The golden models.
fn all_cases() -> Vec<PathBuf> {
    let mut cases: Vec<PathBuf> = std::fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()).collect();
    cases.retain(|case| case.join("model").is_dir());
    cases.sort();
    assert!(cases.len() >= 20, "the golden models are missing");
    cases
}

fn assert_same_logits(got: &[f32], want: &[f32], what: &str) {
    let largest = want.iter().fold(0.0f32, |m, x| m.max(x.abs()));
    assert_eq!(got.len(), want.len());
    for (i, (a, b)) in got.iter().zip(want).enumerate() {
        // f32 sums of some dozen terms in another order, through a few layers: 2e-5 of the largest logit.
        assert!((a - b).abs() <= 2e-5 * largest, "{what}, logit {i}: {a} and {b}");
    }
}

/// −log p of `target` after `ids`, by the training pass.
fn training_loss(model: &Model<Cpu>, ids: &[u32], target: u32) -> f64 {
    let last = ids.len() as u32 - 1;
    let inputs = Inputs::new(model, ids, &Packing::of_lengths([ids.len()]), &[last], &[target]);
    let layers = model.config.layers.len();
    let options = ForwardOptions { lowest: layers, keep_from: layers, end: PassEnd::Loss { all_rows: true } };
    model.loss(&inputs, &model.forward(&inputs, options, None))
}

fn loss_of(logits: &[f32], target: u32) -> f64 {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|x| (f64::from(*x) - largest).exp()).sum();
    largest + sum.ln() - f64::from(logits[target as usize])
}

#[test]
fn decoding_with_a_cache_equals_the_training_pass() {
    let mut windows = 0;
    for case in &all_cases() {
        let model = open(case);
        let ids = some_ids(case);
        let name = case.file_name().unwrap().to_string_lossy();
        // The first half at once, then one by one, and once three at a time: the cache grows by prefill, one token and several.
        let prompt = ids.len() / 2;
        let mut cache = model.kv_cache(&[prompt + 6]);
        let mut logits = model.decode(&[(0, &ids[..prompt])], &mut cache);
        let steps = [prompt..prompt + 1, prompt + 1..prompt + 2, prompt + 2..prompt + 5, prompt + 5..prompt + 6];
        for step in steps {
            let end = step.end;
            logits = model.decode(&[(0, &ids[step])], &mut cache);
            assert_same_logits(&logits, &logits_of(&model, &ids[..end]), &format!("{name}, {end} tokens"));
            for target in [0, 7, ids[0]] {
                let (cached, trained) = (loss_of(&logits, target), training_loss(&model, &ids[..end], target));
                // As above, and the training pass sums the cross-entropy in f32 chunks.
                assert!((cached - trained).abs() <= 5e-5 * trained.max(1.0), "{name}: {cached} and {trained}");
            }
            let window = model.config.heads.iter().filter_map(|h| h.window).min();
            windows += usize::from(window.is_some_and(|w| w < end));
        }
        assert!(logits.len() == model.config.vocab_size);
    }
    assert!(windows > 0, "no sequence was longer than its model's window");
}

#[test]
fn sequences_of_a_batch_do_not_see_each_other() {
    for case in &all_cases() {
        let model = open(case);
        let ids = some_ids(case);
        let name = case.file_name().unwrap().to_string_lossy();
        let starts = [0, 3, 1];
        // Begin at different times, grow by different numbers of tokens, and stop early.
        let passes: [&[(usize, usize)]; 5] =
            [&[(0, 9), (1, 4)], &[(2, 12)], &[(0, 1), (1, 1), (2, 1)], &[(1, 3), (2, 1)], &[(0, 2)]];
        let mut cache = model.kv_cache(&[12, 8, 20]);
        let mut seen = [0; 3];
        for pass in passes {
            let new: Vec<(usize, &[u32])> = pass.iter().map(|&(s, n)| (s, &ids[starts[s] + seen[s]..][..n])).collect();
            pass.iter().for_each(|&(s, n)| seen[s] += n);
            let logits = model.decode(&new, &mut cache);
            assert_eq!(logits.len(), new.len() * model.config.vocab_size);
            for ((s, _), logits) in new.iter().zip(logits.chunks_exact(model.config.vocab_size)) {
                let alone = logits_of(&model, &ids[starts[*s]..][..seen[*s]]);
                assert_same_logits(logits, &alone, &format!("{name}, sequence {s} of {} tokens", seen[*s]));
            }
        }
    }
}

#[test]
#[should_panic(expected = "for 2 of 3")]
fn a_sequence_without_room_is_a_bug() {
    let model = open(&golden().join("mixtral"));
    let mut cache = model.kv_cache(&[3, 9]);
    model.decode(&[(0, &[1, 2])], &mut cache);
    model.decode(&[(0, &[3, 4])], &mut cache);
}

/// Prompts of lengths from 3 up.
fn prompts(ids: &[u32], count: usize) -> Vec<Prompt<'_>> {
    (0..count).map(|i| Prompt { ids: &ids[i % 4..i % 4 + 3 + 5 * i % 13], index: i as u64 }).collect()
}

#[test]
fn answers_are_the_same_whatever_the_batch_size() {
    let f32 = all_cases().into_iter().map(|case| (case, "f32".to_owned(), Cpu::new(1)));
    let bf16 = ["olmoe", "mixtral", "qwen3_moe"].into_iter().flat_map(|name| {
        backends(1).into_iter().map(move |(instructions, cpu)| (golden().join(name), instructions.to_string(), cpu))
    });
    for (case, products, cpu) in f32.chain(bf16) {
        let model = open_on(&case, cpu);
        let ids = some_ids(&case);
        let prompts = prompts(&ids, 7);
        let lengths: Vec<usize> = prompts.iter().map(|p| p.ids.len()).collect();
        let all = |eos: &[u32], sampling: &Sampling, size: usize| {
            let mut said = vec![None; prompts.len()];
            for batch in batches(&lengths, size) {
                let asked: Vec<Prompt<'_>> = batch.iter().map(|&i| prompts[i]).collect();
                let found = answers(&model, &asked, eos, sampling, &mut GenerationSpeed::default(), |_, _| {}).unwrap();
                batch.iter().zip(found).for_each(|(&i, answer)| said[i] = Some(answer));
            }
            said.into_iter().flatten().collect::<Vec<_>>()
        };
        let greedy = all(&[], &Sampling::greedy(8), 1);
        // Tokens of some of the answers as end tokens, so that answers end at different times.
        let eos = [greedy[0].ids[2], greedy[3].ids[4]];
        for sampling in [Sampling::greedy(8), Sampling { temperature: 0.9, seed: 5, ..Sampling::greedy(8) }] {
            let one = all(&eos, &sampling, 1);
            assert_eq!(one.len(), prompts.len());
            for size in [2, 3, 16] {
                assert_eq!(all(&eos, &sampling, size), one, "{} {products}, batches of {size}", case.display());
            }
        }
    }
}

#[test]
fn tokens_and_passes_are_counted() {
    let case = golden().join("olmoe");
    let model = open(&case);
    let ids = some_ids(&case);
    let prompts = prompts(&ids, 3);
    let (mut speed, mut complete) = (GenerationSpeed::default(), Vec::new());
    let said = answers(&model, &prompts, &[], &Sampling::greedy(5), &mut speed, |i, ids| complete.push((i, ids.len())));
    assert_eq!(complete, [(0, 5), (1, 5), (2, 5)]);
    assert!(said.unwrap().iter().all(|answer| answer.finish == FinishReason::Length));
    assert_eq!(speed.prompts.tokens, prompts.iter().map(|p| p.ids.len()).sum::<usize>());
    assert_eq!(speed.decoding.tokens, 3 * 4, "the first token of an answer comes from the pass over its prompt");
    assert!(speed.decoding.seconds > 0.0 && speed.decoding.tokens_per_second > 0.0);
}

#[test]
fn answers_end_at_an_end_token_or_the_length_limit() {
    let case = golden().join("olmoe");
    let model = open(&case);
    let prompt = &some_ids(&case)[..20];
    let greedy = Sampling::greedy(6);
    let long = answer(&model, prompt, &[], &greedy, 0).unwrap();
    assert_eq!((long.ids.len(), long.finish), (6, FinishReason::Length));
    // Greedy decoding without a cache.
    let mut text = prompt.to_vec();
    for id in &long.ids {
        let logits = logits_of(&model, &text);
        let best = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap();
        assert_eq!(*id as usize, best);
        text.push(*id);
    }
    // An end token ends the answer and is not part of it.
    let (end, before) =
        long.ids.iter().enumerate().find_map(|(i, id)| (!long.ids[..i].contains(id)).then_some((id, i))).unwrap();
    let short = answer(&model, prompt, &[*end], &greedy, 0).unwrap();
    assert_eq!((short.ids.as_slice(), short.finish), (&long.ids[..before], FinishReason::Stop));
}

#[test]
fn each_answer_is_sampled_from_its_own_seed() {
    let case = golden().join("mixtral");
    let model = open(&case);
    let prompt = &some_ids(&case)[..20];
    let with = |seed, temperature, top_p, index| {
        let sampling = Sampling { temperature, top_p, seed, ..Sampling::greedy(12) };
        answer(&model, prompt, &[], &sampling, index).unwrap().ids
    };
    assert_eq!(with(1, 1.0, 0.95, 3), with(1, 1.0, 0.95, 3));
    assert_ne!(with(1, 1.0, 0.95, 3), with(1, 1.0, 0.95, 4), "each answer has its own numbers");
    assert_ne!(with(1, 1.0, 0.95, 3), with(2, 1.0, 0.95, 3));
    assert_eq!(with(1, 1.0, 1e-6, 3), with(9, 0.0, 1.0, 0), "almost no probability leaves the likeliest token");
}

/// Answers of transformers with `repetition_penalty` and `no_repeat_ngram_size`, alone and in a batch.
#[test]
fn answers_with_penalties_are_those_of_transformers() {
    let wanted: serde_json::Value = serde_json::from_str(include_str!("../golden/penalties.json")).unwrap();
    let model = open(&golden().join(wanted["model"].as_str().unwrap()));
    for case in wanted["cases"].as_array().unwrap() {
        let penalties: Penalties = serde_json::from_value(case.clone()).unwrap();
        let ids =
            |pair: &serde_json::Value, key: &str| -> Vec<u32> { serde_json::from_value(pair[key].clone()).unwrap() };
        let pairs = case["answers"].as_array().unwrap();
        let (prompts, wanted): (Vec<_>, Vec<_>) =
            pairs.iter().map(|pair| (ids(pair, "prompt"), ids(pair, "answer"))).unzip();
        let prompts: Vec<_> = prompts.iter().map(|ids| Prompt { ids, index: 0 }).collect();
        let sampling = Sampling::greedy(wanted[0].len()).with(penalties);
        let batch = answers(&model, &prompts, &[], &sampling, &mut GenerationSpeed::default(), |_, _| {}).unwrap();
        for (i, (answered, wanted)) in batch.into_iter().zip(wanted).enumerate() {
            assert_eq!(answered.ids, wanted, "{penalties:?}");
            assert_eq!(answer(&model, prompts[i].ids, &[], &sampling, 0).unwrap().ids, wanted, "alone, {penalties:?}");
        }
    }
}

#[test]
fn logits_that_are_not_finite_are_an_error() {
    let mut model = open(&golden().join("mixtral"));
    let norm = model.table.id(moewarden::model::ParamKind::FinalNorm).unwrap();
    let mut value = model.weight_host(norm);
    value.bytes = f32::NAN.to_le_bytes().repeat(value.len()).into();
    model.set_weight_host(norm, value);
    assert_eq!(answer(&model, &[1, 5], &[], &Sampling::greedy(2), 0).unwrap_err().code(), exit::NOT_FINITE);
}
