//! Decoding with a key/value cache gives the logits of the training pass, for all families, windows and rope types of the
//! golden models; and generation ends, samples and fails as specified.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use moewarden::backend::{Packing, cpu::Cpu};
use moewarden::exit;
use moewarden::model::{Checkpoint, ForwardOptions, Inputs, Model, ModelConfig, ParamTable, PassEnd};
use moewarden::report::{FinishReason, Sampling};
use moewarden::run::generate::answer;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

fn open(case: &Path) -> Model<Cpu> {
    let dir = case.join("model");
    let config = ModelConfig::from_dir(&dir).unwrap();
    let table = ParamTable::build(&config, &Checkpoint::open(&dir).unwrap()).unwrap();
    Model::new(Arc::new(Cpu::new(1)), config, table)
}

/// The first unsafe reply.
fn some_ids(case: &Path) -> Vec<u32> {
    let expect: serde_json::Value = serde_json::from_slice(&std::fs::read(case.join("expect.json")).unwrap()).unwrap();
    let mut replies = expect["records"].as_array().unwrap().iter().map(|r| &r["unsafe_reply"]["ids"]);
    serde_json::from_value(replies.find(|ids| ids.is_array()).unwrap().clone()).unwrap()
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
    let mut cases: Vec<PathBuf> = std::fs::read_dir(golden()).unwrap().map(|e| e.unwrap().path()).collect();
    cases.retain(|case| case.join("model").is_dir());
    cases.sort();
    assert!(cases.len() >= 20, "the golden models are missing");
    for case in &cases {
        let model = open(case);
        let ids = some_ids(case);
        let name = case.file_name().unwrap().to_string_lossy();
        // The first half at once, then one by one, and once three at a time: the cache grows by prefill, one token and several.
        let prompt = ids.len() / 2;
        let mut cache = model.kv_cache();
        let mut logits = model.decode(&ids[..prompt], &mut cache);
        let steps = [prompt..prompt + 1, prompt + 1..prompt + 2, prompt + 2..prompt + 5, prompt + 5..prompt + 6];
        for step in steps {
            let end = step.end;
            logits = model.decode(&ids[step], &mut cache);
            let whole = model.decode(&ids[..end], &mut model.kv_cache());
            let largest = whole.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            for (i, (a, b)) in logits.iter().zip(&whole).enumerate() {
                // f32 sums of some dozen terms in another order, through a few layers: 2e-5 of the largest logit.
                assert!((a - b).abs() <= 2e-5 * largest, "{name}, {end} tokens, logit {i}: {a} and {b}");
            }
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
fn answers_end_at_an_end_token_or_the_length_limit() {
    let case = golden().join("olmoe");
    let model = open(&case);
    let prompt = &some_ids(&case)[..20];
    let greedy = Sampling { temperature: 0.0, top_p: 1.0, max_new_tokens: 6, seed: 1 };
    let long = answer(&model, prompt, &[], &greedy, 0).unwrap();
    assert_eq!((long.ids.len(), long.finish), (6, FinishReason::Length));
    // Greedy decoding without a cache.
    let mut text = prompt.to_vec();
    for id in &long.ids {
        let logits = model.decode(&text, &mut model.kv_cache());
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
        let sampling = Sampling { temperature, top_p, max_new_tokens: 12, seed };
        answer(&model, prompt, &[], &sampling, index).unwrap().ids
    };
    assert_eq!(with(1, 1.0, 0.95, 3), with(1, 1.0, 0.95, 3));
    assert_ne!(with(1, 1.0, 0.95, 3), with(1, 1.0, 0.95, 4), "each answer has its own numbers");
    assert_ne!(with(1, 1.0, 0.95, 3), with(2, 1.0, 0.95, 3));
    assert_eq!(with(1, 1.0, 1e-6, 3), with(9, 0.0, 1.0, 0), "almost no probability leaves the likeliest token");
}

#[test]
fn logits_that_are_not_finite_are_an_error() {
    let mut model = open(&golden().join("mixtral"));
    let norm = model.table.id(moewarden::model::ParamKind::FinalNorm).unwrap();
    let mut value = model.weight_host(norm);
    value.bytes = f32::NAN.to_le_bytes().repeat(value.len()).into();
    model.set_weight_host(norm, value);
    let sampling = Sampling { temperature: 0.0, top_p: 1.0, max_new_tokens: 2, seed: 1 };
    assert_eq!(answer(&model, &[1, 5], &[], &sampling, 0).unwrap_err().code(), exit::NOT_FINITE);
}
