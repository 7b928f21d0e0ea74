//! The library against every case of `tests/golden`, which Hugging Face transformers and plain autograd computed from the
//! same checkpoint and rows. `tests/golden/README.md` describes the files.

use std::collections::{BTreeMap, BTreeSet};

use crate::case::{
    self, Case, CaseRun, Tolerance, assert_near, ce_gradients, example, experts, fixture_name, ids, numbers,
};
use clap::ValueEnum;
use moewarden::backend::{Backend, Dtype, cpu::Cpu};
use moewarden::config::RunConfig;
use moewarden::data::{LossOn, MicroBatch};
use moewarden::experts::{Method, Ranking, RoutingTokens, Score, ScorePer, Select, select, token_mask};
use moewarden::launch;
use moewarden::model::{FAMILIES, Model, ParamId, PassEnd, Routed};
use moewarden::report::{GenerationSpeed, Sampling};
use moewarden::routers::{KlType, Statistic};
use moewarden::run::generate::{Prompt, answers};
use moewarden::run::session::Session;
use moewarden::train::{Recompute, alignment_by_layer, mean_loss};
use moewarden::ui::Ui;
use safetensors::SafeTensors;
use serde_json::{Value, json};

// The fixtures use f64 products, the program f32 ones over rows of 16 to 48 numbers (2⁻²⁴ = 6e-8 each). The README lists
// the errors of an f32 computation in another order; the tolerances are a few times as large.

const LOSS: Tolerance = Tolerance { relative: 1e-7, absolute: 0.0, why: "f32 against f64, measured 2e-8" };
const LOGITS: Tolerance =
    Tolerance { relative: 2e-6, absolute: 0.0, why: "f32 through all layers, no mean, measured 8e-7" };
const SCORES: Tolerance = Tolerance { relative: 1.5e-6, absolute: 0.0, why: "f32 against f64, measured 5e-7" };
const COUNTS: Tolerance = Tolerance { relative: 0.0, absolute: 1e-9, why: "ratios of counts with 9 digits" };
const KL: Tolerance = Tolerance { relative: 2e-6, absolute: 0.0, why: "f32 against f64, measured 7e-7" };
const GRADIENTS: Tolerance = Tolerance {
    relative: 2e-6,
    absolute: 5e-7,
    why: "f32 against f64, measured 7e-7; gradients that are zero except for rounding have digests of 1e-7",
};
const CHANGE: Tolerance = Tolerance {
    relative: 1e-3,
    absolute: 1e-9,
    why: "AdamW follows the sign of gradients: entries near zero depend on rounding, measured 2e-4",
};
const CHANGE_16: Tolerance = Tolerance {
    relative: 4e-3,
    absolute: 1e-9,
    why: "16-bit weights: an update is a few units, and a master near a tie rounds to the other neighbour",
};

/// Whether the weights are stored in 16 bits.
fn is_16_bit(case: &Case) -> bool {
    case.session.table.params[0].dtype() != Dtype::F32
}

/// `[Σ|x|, sqrt(Σ x²), Σ_i x_i · cos(i)]`
fn digest(values: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut out = [0.0; 3];
    for (i, x) in values.into_iter().enumerate() {
        out[0] += x.abs();
        out[1] += x * x;
        out[2] += x * (i as f64).cos();
    }
    vec![out[0], out[1].sqrt(), out[2]]
}

/// The tolerance of step `i`. In later steps the weights differ because AdamW amplifies rounding: by a few 1e-4 of an
/// update, which is a few per cent of the weights. In 16 bits, masters near a tie also round to different neighbours.
fn at_step(case: &Case, i: usize, tolerance: Tolerance) -> Tolerance {
    match (i, is_16_bit(case)) {
        (0, _) => tolerance,
        (_, false) => Tolerance {
            relative: 20.0 * tolerance.relative,
            why: "weights after AdamW differ by 2e-4 of their update",
            ..tolerance
        },
        (_, true) => Tolerance { relative: 2e-4, why: "16-bit weights differ by whole units", ..tolerance },
    }
}

/// One test per case and part. Dense models have no part that concerns experts.
macro_rules! cases {
    ($($case:ident)*; dense $($dense:ident)*) => {
        $(mod $dense {
            const NAME: &str = stringify!($dense);
            #[test]
            fn rows() { super::rows(NAME) }
            #[test]
            fn forward() { super::forward(NAME) }
            #[test]
            fn losses() { super::losses(NAME) }
            #[test]
            fn greedy_answers() { super::greedy_answers(NAME) }
            #[test]
            fn gradients() { super::gradients(NAME) }
            #[test]
            fn training() { super::training(NAME) }
        })*

        $(mod $case {
            const NAME: &str = stringify!($case);
            #[test]
            fn rows() { super::rows(NAME) }
            #[test]
            fn forward() { super::forward(NAME) }
            #[test]
            fn identification() { super::identification(NAME) }
            #[test]
            fn routing() { super::routing(NAME) }
            #[test]
            fn gradients() { super::gradients(NAME) }
            #[test]
            fn training() { super::training(NAME) }
            #[test]
            fn recomputing_changes_no_bit() { super::recomputing(NAME) }
        })*

        #[test]
        fn every_case_is_tested() {
            let tested: BTreeSet<String> =
                [$(stringify!($case).to_string(),)* $(stringify!($dense).to_string()),*].into();
            let there = std::fs::read_dir(case::golden_dir()).unwrap().map(|entry| entry.unwrap());
            let there = there.filter(|entry| entry.path().is_dir() && entry.path().join("expect.json").exists());
            let there: BTreeSet<_> = there.map(|entry| entry.file_name().into_string().unwrap()).collect();
            assert_eq!(tested, there);
        }
    };
}

cases! {
    olmoe mixtral qwen3_moe qwen2_moe
    olmoe_k1 mixtral_k1 mixtral_kall qwen3_raw
    olmoe_clip mixtral_window qwen3_window qwen2_window qwen2_plain
    olmoe_linear qwen3_yarn mixtral_yarn mixtral_llama3
    qwen3_dense qwen3_sparse
    olmoe_fused olmoe_bf16 mixtral_fused qwen2_fused;
    dense dense_qwen3 dense_llama dense_llama_bias dense_mistral
}

#[test]
fn every_family_has_a_case() {
    let cases = std::fs::read_dir(case::golden_dir()).unwrap().map(|entry| entry.unwrap().path());
    let configs = cases.filter_map(|case| std::fs::read_to_string(case.join("model/config.json")).ok());
    let types: BTreeSet<String> = configs
        .map(|text| serde_json::from_str::<Value>(&text).unwrap()["model_type"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(types, FAMILIES.iter().map(|family| family.model_type.to_owned()).collect());
}

/// Token ids and targets of every record.
fn rows(name: &str) {
    let case = Case::open_as_read(name);
    let records = case.expect["records"].as_array().unwrap();
    // The fixture's targets are all assistant turns. The program leaves out those in the prompt of a pair or an attack:
    // the model must not learn the replies that an attack puts into its mouth.
    let chat = name == "olmoe_fused";
    assert_eq!(case.session.data.records.len(), records.len(), "records kept");
    for (i, (ours, theirs)) in case.session.data.records.iter().zip(records).enumerate() {
        for (side, ours) in [("unsafe_reply", &ours.unsafe_reply), ("safe_reply", &ours.safe_reply)] {
            assert_eq!(*ours, example(&theirs[side], !chat), "record {i}, {side}");
        }
        for (side, ours) in [("unsafe_prompt", &ours.unsafe_prompt), ("safe_prompt", &ours.safe_prompt)] {
            assert_eq!(*ours, ids(&theirs[side]), "record {i}, {side}");
        }
    }
}

/// Logits (by the decoder with its cache, token by token), losses and routing of the first row.
fn forward(name: &str) {
    let case = Case::open(name);
    let run = case.run(&case.config, 1);
    let expect = &case.expect["forward"];
    let record = case.session.data.records.iter().find_map(|r| r.unsafe_reply.as_ref()).unwrap();
    let batch = MicroBatch::of_examples([record]);

    let logits = decode_all(run.model(), &record.ids);
    let theirs = numbers(&expect["logits"]);
    assert_near("digest of the logits", &digest(wide(&logits.concat())), &theirs, LOGITS);
    let last = &logits[logits.len() - 1][..8];
    assert_near("last logits", &wide(last).collect::<Vec<_>>(), &numbers(&expect["last_logits"]), LOGITS);
    let rows = batch.loss_rows.iter().zip(&batch.targets);
    let losses: Vec<f64> = rows.map(|(row, target)| -log_prob(&logits[*row as usize], *target)).collect();
    let theirs = numbers(&expect["token_losses"]);
    assert_near("token losses", &losses, &theirs, LOGITS);

    let b = &*run.model().backend;
    let (mut routers, mut chosen) = (Vec::new(), Vec::new());
    let mut observe = |routed: Routed<'_, Cpu>| {
        routers.push(digest(wide(&b.download(routed.logits))));
        let mut last: Vec<u32> = b.expert_ids(routed.routing).split_off((record.ids.len() - 1) * top_k(&run));
        last.sort_unstable();
        chosen.push(last);
    };
    let inputs = run.replica.inputs(&batch);
    let forward = run.replica.forward(&inputs, None, PassEnd::Loss { all_rows: true }, Some(&mut observe));
    assert_near("summed loss", &[run.model().loss(&inputs, &forward)], &[theirs.iter().sum()], LOSS);
    assert_eq!(json!(chosen), expect["experts_of_last_token"], "experts of the last token");
    for (layer, (ours, theirs)) in routers.iter().zip(expect["router_logits"].as_array().unwrap()).enumerate() {
        assert_near(&format!("router logits {layer}"), ours, &numbers(theirs), LOGITS);
    }
    assert_eq!(routers.len(), expect["router_logits"].as_array().unwrap().len());
}

fn decode_all(model: &Model<Cpu>, ids: &[u32]) -> Vec<Vec<f32>> {
    let mut cache = model.kv_cache(&[ids.len()]);
    ids.iter().map(|&id| model.decode(&[(0, &[id])], &mut cache)).collect()
}

fn top_k(run: &CaseRun<'_, Cpu>) -> usize {
    run.model().config.num_experts_per_tok
}

fn wide(values: &[f32]) -> impl Iterator<Item = f64> + '_ {
    values.iter().map(|&x| f64::from(x))
}

fn log_prob(logits: &[f32], target: u32) -> f64 {
    let max = wide(logits).fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = wide(logits).map(|x| (x - max).exp()).sum();
    f64::from(logits[target as usize]) - max - total.ln()
}

/// Losses, scores of every kind, selections.
fn identification(name: &str) {
    let case = Case::open(name);
    let losses = numbers(&case.expect["losses"]);
    // The long cases test every pair of score and divisor; the others each score and each divisor once.
    let both = [ScorePer::Param, ScorePer::Token];
    let pers = |param_only| {
        if case.is_long() {
            &both[..]
        } else if param_only {
            &both[..1]
        } else {
            &both[1..]
        }
    };
    let kinds = [(Score::L1Mean, true), (Score::L2, false), (Score::Fisher, true), (Score::Taylor, false)];
    assert_eq!(kinds.len(), Score::value_variants().len(), "every score is tested");
    for (score, score_per) in kinds.into_iter().flat_map(|(s, p)| pers(p).iter().map(move |per| (s, *per))) {
        let config = RunConfig { score, score_per, ..case.config.clone() };
        let found = case.run(&config, 1).identify();
        let (score, per) = (json!(score), json!(score_per));
        let theirs = &case.expect["scores"][score.as_str().unwrap()][per.as_str().unwrap()];
        assert_near(&format!("scores {score} {per}"), &found.scores.values, &numbers(theirs), SCORES);
        assert_near("losses", &found.losses, &losses, LOSS);
        assert_eq!(json!(found.scores.layers), case.expect["layers"]);
    }

    let found = case.run(&case.config, 2).identify();
    let selection = &case.expect["selection"];
    assert_eq!(found.selected.experts, experts(&selection["highest"]), "selection");
    // Two layers with a cap of 2 yield 4 experts, although the fixture requests 5.
    let capped = experts(&selection["at_most_2_per_layer"]).len();
    let capped = RunConfig { experts_per_layer: Some(2), top_k_experts: capped, ..case.config.clone() };
    for (config, key, end) in
        [(&capped, "at_most_2_per_layer", Select::Highest), (&case.config, "lowest", Select::Lowest)]
    {
        let found = select(
            &found.scores,
            &config.recipe().unwrap().identify.limits_for(&found.scores.layers, found.scores.num_experts),
            &Ranking { select: end, threshold: None },
        )
        .unwrap();
        assert_eq!(found.experts, experts(&selection[key]), "selection {key}");
    }

    let config = RunConfig { loss_on: LossOn::All, ..case.config.clone() };
    let session = Session::open(&config, &config.recipe().unwrap(), &Ui::silent()).unwrap();
    let run = CaseRun::new(&session, &config, Cpu::new(1).into(), &launch::Rank::single(Ui::silent()));
    let found = run.identify();
    assert_near("losses on all tokens", &found.losses, &numbers(&case.expect["losses_on_all_tokens"]), LOSS);
}

/// Losses of a dense model, of the refusals and of all tokens.
fn losses(name: &str) {
    let case = Case::open(name);
    let of = |case: &Case| -> Vec<f64> {
        let run = case.run(&case.config, 1);
        let one = |batch: &MicroBatch| mean_loss(&run.replica, std::slice::from_ref(batch)).unwrap().unwrap();
        run.unsafe_batches().iter().map(one).collect()
    };
    assert_near("losses", &of(&case), &numbers(&case.expect["losses"]), LOSS);
    let config = RunConfig { loss_on: LossOn::All, ..case.config.clone() };
    let session = Session::open(&config, &config.recipe().unwrap(), &Ui::silent()).unwrap();
    let all = Case { session, config, expect: case.expect };
    assert_near("losses on all tokens", &of(&all), &numbers(&all.expect["losses_on_all_tokens"]), LOSS);
}

/// Greedy answers are those of transformers' `generate`, one by one and in batches.
fn greedy_answers(name: &str) {
    let case = Case::open(name);
    let run = case.run(&case.config, 2);
    let wanted = case.expect["greedy"].as_array().unwrap();
    assert_eq!(wanted.len(), 50);
    let ids = |value: &Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    let prompts: Vec<Vec<u32>> = wanted.iter().map(|pair| ids(&pair["prompt"])).collect();
    let wanted: Vec<Vec<u32>> = wanted.iter().map(|pair| ids(&pair["answer"])).collect();
    let longest = wanted.iter().map(Vec::len).max().unwrap();
    let prompts: Vec<_> = prompts.iter().map(|ids| Prompt { ids, index: 0 }).collect();
    for size in [1, 7, 50] {
        let mut found = Vec::new();
        for batch in prompts.chunks(size) {
            let (eos, sampling) = (case.session.tokenizer.eos_ids(), Sampling::greedy(longest));
            let said = answers(run.model(), batch, eos, &sampling, &mut GenerationSpeed::default(), |_, _| {}).unwrap();
            found.extend(said.into_iter().map(|answer| answer.ids));
        }
        assert_eq!(found, wanted, "batches of {size}");
    }
}

/// Routing frequencies, their risk differences, and the KL divergence of the routers.
fn routing(name: &str) {
    let mut case = Case::open(name);
    if case.expect["routing"].is_null() {
        let sides = |r: &moewarden::data::Record| r.unsafe_reply.is_some() && r.safe_reply.is_some();
        assert!(!case.session.data.records.iter().any(sides), "null is for rows of one side");
        assert!(case.expect["router_kl"].is_null());
        return;
    }
    let run = case.run(&case.config, 1);
    let all_tokens = [RoutingTokens::Response, RoutingTokens::Prompt, RoutingTokens::All];
    for (i, records) in run.sampler().unsafe_order(0).iter().enumerate() {
        for (side, batch) in
            [("safe", run.sampler().pack_safe(records)), ("unsafe", run.sampler().pack_unsafe(records))]
        {
            let chosen = chosen_experts(&run, &batch);
            for tokens in all_tokens {
                let ours = frequencies(&run, &chosen, &token_mask(tokens, &batch.is_response));
                let theirs = numbers(&case.expect["routing"][json!(tokens).as_str().unwrap()][side][i]);
                assert_near(&format!("{side} frequencies"), &ours, &theirs, COUNTS);
            }
        }
    }
    for tokens in all_tokens {
        let config =
            RunConfig { method: Method::Routing, routing_tokens: tokens, risk_threshold: -1.0, ..case.config.clone() };
        let found = case.run(&config, 1).identify();
        let theirs = numbers(&case.expect["routing"][json!(tokens).as_str().unwrap()]["risk_difference"]);
        assert_near("risk differences", &found.scores.values, &theirs, COUNTS);
    }
    // The tokens that predict are those before the loss tokens: the same as `response` where each mask begins one token earlier.
    let predicting = RunConfig {
        method: Method::Routing,
        routing_tokens: RoutingTokens::Predicting,
        risk_threshold: -1.0,
        ..case.config.clone()
    };
    let found = case.run(&predicting, 1).identify().scores.values;
    let records = case.session.data.records.clone();
    for reply in case.session.data.records.iter_mut().flat_map(|r| [&mut r.unsafe_reply, &mut r.safe_reply]).flatten() {
        reply.loss.rotate_left(1);
    }
    let shifted = case.run(&RunConfig { routing_tokens: RoutingTokens::Response, ..predicting }, 1).identify();
    assert_eq!(found, shifted.scores.values);
    case.session.data.records = records;

    let records = case.session.data.records.clone();
    for (i, batch) in records.chunks(case.config.batch_size).enumerate() {
        case.session.data.records = batch.to_vec();
        for router_statistic in [Statistic::TokenProbs, Statistic::SampleLogits] {
            for kl_type in [KlType::Forward, KlType::Reverse, KlType::Symmetric] {
                let config = RunConfig { router_statistic, kl_type, ..case.config.clone() };
                let run = case.run(&config, 1);
                let by_layer = alignment_by_layer(&run.replica, run.sampler(), run.recipe.divergence).unwrap();
                let measured = by_layer.iter().sum::<f64>() / by_layer.len() as f64;
                let (statistic, kl) = (json!(router_statistic), json!(kl_type));
                let theirs = &case.expect["router_kl"][statistic.as_str().unwrap()][kl.as_str().unwrap()];
                assert_near(&format!("{statistic}, {kl}"), &[measured], &numbers(&theirs[i]), KL);
            }
        }
    }
}

/// The experts of each token `[T · K]`, by MoE layer.
fn chosen_experts(run: &CaseRun<'_, Cpu>, batch: &MicroBatch) -> Vec<Vec<u32>> {
    let mut out = Vec::new();
    let mut observe = |routed: Routed<'_, Cpu>| out.push(run.model().backend.expert_ids(routed.routing));
    run.replica.forward(&run.replica.inputs(batch), None, PassEnd::Routers, Some(&mut observe));
    out
}

/// Share of the tokens in the mask that went to each expert, `[L · E]`.
fn frequencies(run: &CaseRun<'_, Cpu>, chosen: &[Vec<u32>], mask: &[bool]) -> Vec<f64> {
    let count = mask.iter().filter(|m| **m).count() as f64;
    let of_layer = |ids: &Vec<u32>| {
        let mut hits = vec![0.0; run.model().config.num_experts];
        for (ids, _) in ids.chunks(top_k(run)).zip(mask).filter(|(_, m)| **m) {
            ids.iter().for_each(|e| hits[*e as usize] += 1.0);
        }
        hits.into_iter().map(move |n| n / count)
    };
    chosen.iter().flat_map(of_layer).collect()
}

/// Every parameter's gradient of the first micro-batch.
fn gradients(name: &str) {
    let case = Case::open(name);
    let run = case.run(&case.config, 2);
    let all: Vec<ParamId> = (0..case.session.table.params.len()).collect();
    let (loss, gradients) = ce_gradients(&run.replica, &run.unsafe_batches()[0], &all);
    assert_near("loss", &[loss], &numbers(&case.expect["losses"])[..1], LOSS);

    let mut theirs = case.expect["gradients"].as_object().unwrap().clone();
    let file = std::fs::read(case.config.dataset_path.with_file_name("gradients.safetensors")).ok();
    let file = file.as_deref().map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    for (spec, gradient) in case.session.table.params.iter().zip(&gradients) {
        let name = fixture_name(spec);
        let expected = theirs.remove(&name).unwrap_or_else(|| panic!("{name} is not in the fixture"));
        assert_near(&format!("gradient of {name}"), &digest(wide(gradient)), &numbers(&expected), GRADIENTS);
        if let Some(file) = &file {
            let expected = floats(file.tensor(&name).unwrap().data());
            let ours: Vec<f64> = wide(gradient).collect();
            assert_near(&format!("gradient of {name}, each entry"), &ours, &expected, GRADIENTS);
        }
    }
    assert!(theirs.is_empty(), "parameters that we do not have: {:?}", theirs.keys());
}

fn floats(bytes: &[u8]) -> Vec<f64> {
    bytes.as_chunks::<4>().0.iter().map(|b| f64::from(f32::from_le_bytes(*b))).collect()
}

/// Every training run: its steps, the loss after it, the change of each trained tensor, and that no other tensor changed.
fn training(name: &str) {
    let case = Case::open(name);
    for run in case.expect["training"].as_array().unwrap() {
        train(&case, run);
    }
}

fn train(case: &Case, golden: &Value) {
    let what = |part: &str| format!("run {}, {part}", golden["name"]);
    let config = case.config_with(&golden["options"]);
    let phase = golden["options"]["phase"].as_str().unwrap();
    let mut run = case.run(&config, 2);
    let steps = run.run_phase(phase, &case.selected());

    let expected = golden["steps"].as_array().unwrap();
    assert_eq!(steps.len(), expected.len(), "{}", what("steps"));
    let rate = if phase == "router" { config.router_lr } else { config.expert_lr };
    for (i, (step, expected)) in steps.iter().zip(expected).enumerate() {
        let check = |key: &str, ours: Option<f64>, tolerance| match (ours, expected[key].as_f64()) {
            (None, None) => {}
            (Some(ours), Some(theirs)) => {
                assert_near(&what(&format!("{key} of step {i}")), &[ours], &[theirs], tolerance)
            }
            (ours, theirs) => panic!("{} of step {i}: {ours:?} and {theirs:?}", what(key)),
        };
        check("ce_loss", step.ce_loss, at_step(case, i, LOSS));
        check("router_loss", step.router_loss, at_step(case, i, KL));
        if phase == "joint" {
            check("total_loss", Some(step.total_loss), at_step(case, i, LOSS));
        }
        check("grad_norm", Some(step.grad_norm), at_step(case, i, GRADIENTS));
        let exact = Tolerance { relative: 2e-9, absolute: 0.0, why: "f64, written with 9 digits" };
        check("lr_factor", Some(step.lr / rate), exact);
    }

    let base = case.run(&case.config, 1);
    let after = mean_loss(&run.replica, &base.unsafe_batches()).unwrap().unwrap();
    assert_near(&what("loss after"), &[after], &numbers(&golden["loss_after"]), at_step(case, steps.len(), LOSS));
    compare_changes(case, golden, &run);
}

fn compare_changes(case: &Case, golden: &Value, run: &CaseRun<'_, Cpu>) {
    let mut expected: BTreeMap<String, Value> =
        golden["change"].as_object().unwrap().iter().map(|(k, v)| (k.clone(), v.clone())).collect();
    let file = std::fs::read(
        case.config.dataset_path.with_file_name(format!("{}.safetensors", golden["name"].as_str().unwrap())),
    )
    .ok();
    let file = file.as_deref().map(|bytes| SafeTensors::deserialize(bytes).unwrap());
    for (id, spec) in case.session.table.iter() {
        let name = fixture_name(spec);
        let (before, after) = (&spec.base, run.model().weight_host(id));
        let Some(expected) = expected.remove(&name) else {
            assert!(!run.replica.written().contains(&id), "{name} is trained and should be frozen");
            assert!(*before.bytes == *after.bytes, "run {}: {name} moved", golden["name"]);
            continue;
        };
        assert!(run.replica.written().contains(&id), "{name} is frozen and should be trained");
        let (before, after) = (before.to_f32(), after.to_f32());
        let change: Vec<f64> = wide(&after).zip(wide(&before)).map(|(a, b)| a - b).collect();
        let tolerance = if is_16_bit(case) { CHANGE_16 } else { CHANGE };
        let what = format!("run {}, change of {name}", golden["name"]);
        assert_near(&what, &digest(change.iter().copied()), &numbers(&expected), tolerance);
        if let Some(file) = &file {
            let theirs = floats(file.tensor(&name).unwrap().data());
            let off: f64 = wide(&after).zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum();
            let moved: f64 = wide(&before).zip(&theirs).map(|(a, b)| (a - b) * (a - b)).sum();
            assert!(off.sqrt() <= 2e-3 * moved.sqrt(), "{what}: off by {} of {}", off.sqrt(), moved.sqrt());
        }
    }
    assert!(expected.is_empty(), "trained there and unknown here: {:?}", expected.keys());
}

/// Recomputing every layer's forward pass leaves gradients, scores and losses (in the long cases also steps) bit-identical.
fn recomputing(name: &str) {
    let case = Case::open(name);
    let results = [Recompute::Never, Recompute::Always].map(|recompute| {
        let config = RunConfig { recompute, ..case.config.clone() };
        let run = case.run(&config, 1);
        let all: Vec<ParamId> = (0..case.session.table.params.len()).collect();
        let (loss, gradients) = ce_gradients(&run.replica, &run.unsafe_batches()[0], &all);
        let gradients: Vec<Vec<u32>> = gradients.iter().map(|g| g.iter().map(|x| x.to_bits()).collect()).collect();
        let found = run.identify();
        let scores: Vec<u64> = found.scores.values.iter().chain(&found.losses).map(|x| x.to_bits()).collect();
        let phases: &[&str] = if case.is_long() { &["router", "joint"] } else { &[] };
        let steps = phases.iter().flat_map(|phase| {
            let config = RunConfig { recompute, ..case.config_with(&json!({ "phase": phase })) };
            case.run(&config, 1).run_phase(phase, &case.selected())
        });
        let steps: Vec<u64> = steps.flat_map(|s| [s.total_loss.to_bits(), s.grad_norm.to_bits()]).collect();
        (loss.to_bits(), gradients, scores, steps)
    });
    assert!(results[0] == results[1]);
}
