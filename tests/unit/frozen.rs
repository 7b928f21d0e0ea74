//! Each mode changes all of the parameters that it trains; every other parameter stays bit-identical.

use std::collections::BTreeSet;

use crate::case::{Case, CaseRun};
use crate::golden_copy::golden_copy;
use moewarden::backend::{Backend, cpu::Cpu};
use moewarden::config::{Mode, RunConfig, SaveRounds};
use moewarden::exit::Ended;
use moewarden::experts::{ExpertId, Selection};
use moewarden::launch::Started;
use moewarden::model::{
    Checkpoint, Model, ModelConfig, ParamId, ParamKind, ParamTable, PassEnd, Routed, expert_params,
};
use moewarden::ui::Ui;
use serde_json::json;

/// Every family, a dense layer, tied embeddings, alternating dense and MoE layers, fused experts. (No 16-bit weights: an
/// update may round to zero. The golden tests cover those.)
const CASES: [&str; 7] = ["olmoe", "mixtral", "qwen3_moe", "qwen2_moe", "qwen3_dense", "qwen3_sparse", "mixtral_fused"];

/// Without weight decay AdamW changes a parameter if and only if its gradient is not zero, so that one comparison shows
/// both: trained parameters have gradients, and no other parameter is written. One step, so that the first forward pass
/// gives the experts that tokens were routed to.
fn config(case: &Case) -> RunConfig {
    RunConfig { weight_decay: 0.0, grad_accum: usize::from(u8::MAX), ..case.config.clone() }
}

/// The bytes of all parameters, by parameter id.
fn bits(model: &Model<Cpu>) -> Vec<Vec<u8>> {
    (0..model.table.params.len()).map(|id| model.weight_host(id).bytes.to_vec()).collect()
}

fn moved(before: &[Vec<u8>], after: &[Vec<u8>]) -> BTreeSet<ParamId> {
    (0..before.len()).filter(|&id| before[id] != after[id]).collect()
}

/// Names, for messages.
fn names(model: &Model<Cpu>, ids: &BTreeSet<ParamId>) -> Vec<String> {
    ids.iter().map(|&id| model.table.params[id].name()).collect()
}

fn of_kind(model: &Model<Cpu>, wanted: impl Fn(ParamKind) -> bool) -> BTreeSet<ParamId> {
    model.table.iter().filter(|(_, spec)| wanted(spec.kind)).map(|(id, _)| id).collect()
}

fn matrices(model: &Model<Cpu>, experts: &[ExpertId]) -> BTreeSet<ParamId> {
    experts.iter().flat_map(|id| expert_params(&model.table, id.layer, id.expert)).collect()
}

fn routers(model: &Model<Cpu>) -> BTreeSet<ParamId> {
    of_kind(model, |kind| matches!(kind, ParamKind::Router(_)))
}

/// Experts that received a token which influences the loss: any token, but in the last layer only tokens with a target.
fn visited(run: &CaseRun<'_, Cpu>, safe_too: bool) -> BTreeSet<(usize, usize)> {
    let b = &*run.model().backend;
    let mut out = BTreeSet::new();
    let mut observe = |routed: Routed<'_, Cpu>| {
        let tokens = b.tokens_per_expert(routed.dispatch);
        out.extend(tokens.iter().enumerate().filter(|(_, n)| **n > 0).map(|(e, _)| (routed.layer, e)));
    };
    let records: Vec<usize> = (0..run.sampler().data.records.len()).collect();
    let mut batches = vec![run.sampler().pack_unsafe(&records)];
    if safe_too {
        batches.push(run.sampler().pack_safe(&records));
    }
    for batch in batches {
        run.replica.forward(&run.replica.inputs(&batch), None, PassEnd::Loss { all_rows: false }, Some(&mut observe));
    }
    out
}

/// Runs a phase: only `trained` may change, and every matrix in it that has a gradient must.
fn check(what: &str, run: &mut CaseRun<'_, Cpu>, phase: &str, selected: &[ExpertId], trained: &BTreeSet<ParamId>) {
    let visited = visited(run, phase == "joint");
    let (before, written_before) = (bits(run.model()), run.replica.written().clone());
    run.run_phase(phase, selected);
    let model = run.model();
    let moved = moved(&before, &bits(model));
    assert_eq!(
        names(model, &(run.replica.written() - &written_before)),
        names(model, trained),
        "{what}: written by an optimizer"
    );
    let expected: BTreeSet<ParamId> = trained
        .iter()
        .copied()
        .filter(|&id| match model.table.params[id].kind {
            ParamKind::Expert(layer, expert, _) => visited.contains(&(layer, expert)),
            _ => true,
        })
        .collect();
    let missing = &expected - &moved;
    assert!(missing.is_empty(), "{what}: no gradient for {:?}", names(model, &missing));
    let astray = &moved - trained;
    assert!(astray.is_empty(), "{what}: frozen and moved: {:?}", names(model, &astray));
}

#[test]
fn selective_trains_the_selected_experts() {
    for name in CASES {
        let case = Case::open(name);
        let config = config(&case);
        let mut run = case.run(&config, 1);
        let selected = case.selected();
        let trained = matrices(run.model(), &selected);
        assert_eq!(trained.len(), 3 * selected.len(), "{name}: gate, up and down of each");
        check(name, &mut run, "expert", &selected, &trained);
    }
}

#[test]
fn experts_trains_every_expert() {
    for name in CASES {
        let case = Case::open(name);
        let config = RunConfig { mode: Mode::Experts, ..config(&case) };
        let mut run = case.run(&config, 1);
        let trained = of_kind(run.model(), |kind| matches!(kind, ParamKind::Expert(..)));
        let model = &run.model().config;
        assert_eq!(trained.len(), 3 * model.num_experts * model.moe_layers().count(), "{name}");
        check(name, &mut run, "expert", &case.selected(), &trained);
    }
}

#[test]
fn baseline_trains_everything() {
    for name in CASES {
        let case = Case::open(name);
        let config = RunConfig { mode: Mode::Baseline, ..config(&case) };
        let mut run = case.run(&config, 1);
        let trained = of_kind(run.model(), |_| true);
        check(name, &mut run, "expert", &[], &trained);
    }
}

#[test]
fn the_router_phase_trains_every_router_and_no_expert_of_the_phase_before() {
    for name in CASES {
        let case = Case::open(name);
        let config = config(&case);
        let mut run = case.run(&config, 1);
        run.run_phase("expert", &case.selected());
        let trained = routers(run.model());
        check(name, &mut run, "router", &[], &trained);
    }
}

#[test]
fn the_joint_schedule_trains_selected_experts_and_routers() {
    for name in CASES {
        let case = Case::open(name);
        let joint = case.config_with(&json!({ "phase": "joint" }));
        let joint = RunConfig { weight_decay: 0.0, grad_accum: usize::from(u8::MAX), ..joint };
        let selected = case.selected();
        let mut run = case.run(&joint, 1);
        let (experts, routers) = (matrices(run.model(), &selected), routers(run.model()));
        check(name, &mut run, "joint", &selected, &(&experts | &routers));

        if name != CASES[0] {
            continue;
        }
        let no_experts = RunConfig { finetune_unsafe_experts: false, ..joint.clone() };
        let mut run = case.run(&no_experts, 1);
        check(&format!("{name}, routers alone"), &mut run, "joint", &selected, &routers);
    }
}

/// With a layer range, only experts of these layers are selected and changed.
#[test]
fn layers_outside_the_range_stay_frozen() {
    let case = Case::open("olmoe");
    let config = RunConfig { layers: Some(2..=2), top_k_experts: 3, ..config(&case) };
    let mut run = case.run(&config, 1);
    let selected = run.identify().selected.experts;
    assert_eq!(selected.len(), 3);
    assert!(selected.iter().all(|id| id.layer == 2), "{selected:?}");
    let trained = matrices(run.model(), &selected);
    check("layer 2", &mut run, "expert", &selected, &trained);
}

/// With a selection per step, an expert that is no longer selected must not change by momentum or weight decay.
#[test]
fn an_expert_that_is_no_longer_selected_stays_bit_identical() {
    for name in ["olmoe", "mixtral"] {
        let mut case = Case::open(name);
        // With weight decay, which would change parameters without a gradient. One row per step.
        let config =
            RunConfig { selection: Selection::PerBatch, top_k_experts: 2, batch_size: 1, ..case.config.clone() };
        let all = case.session.data.records.clone();
        // The model after each number of steps: at a constant learning rate a shorter run is a prefix of a longer one.
        let steps = 4;
        let mut after = vec![case.run(&config, 1).replica.into_model()];
        for n in 1..=steps {
            case.session.data.records.truncate(n);
            let mut run = case.run(&config, 1);
            run.run_phase("expert", &[]);
            after.push(run.replica.into_model());
            case.session.data.records = all.clone();
        }
        let (mut dropped, mut chosen_before) = (0, BTreeSet::new());
        for (n, next) in (1..=steps).zip(after.iter().skip(1).map(bits)) {
            let previous = bits(&after[n - 1]);
            let mut run = case.run(&config, 1);
            let before = &after[n - 1];
            run.replica.restore((0..before.table.params.len()).map(|id| (id, before.weight_host(id))));
            let found = run.find(vec![vec![n - 1]]);
            let chosen = matrices(run.model(), &found.selected.experts);
            assert_eq!(chosen, moved(&previous, &next), "{name}: what step {n} moves");
            dropped += (&chosen_before - &chosen).len();
            chosen_before = chosen;
        }
        assert!(dropped > 0, "{name}: every expert is chosen again at every step, which shows nothing");
    }
}

/// Neither experts nor routers are trained: the run succeeds and changes no bit.
#[test]
fn a_run_that_trains_nothing_changes_nothing() {
    let case = Case::open("qwen3_moe");
    let out = tempfile::tempdir().unwrap();
    let config = RunConfig {
        finetune_unsafe_experts: false,
        skip_router_training: true,
        save_rounds: SaveRounds::None,
        model_name: golden_copy("qwen3_moe").join("model").to_str().unwrap().into(),
        output_dir: out.path().join("run"),
        ..case.config.clone()
    };
    let summary = moewarden::run::train(&config, &Started::single(), &Ui::silent()).unwrap();
    let Ended::Done(summary) = summary else { panic!("nothing asks it to stop") };
    assert_eq!(summary.trained[0], 0);
    assert_eq!(summary.before.ce_loss, summary.after.ce_loss);
    let dir = config.output_dir.join("final_model");
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let table = ParamTable::build(&ModelConfig::from_dir(&dir).unwrap(), &checkpoint).unwrap();
    for (ours, source) in table.params.iter().zip(&case.session.table.params) {
        assert_eq!(ours.tensor, source.tensor);
        assert!(*ours.base.bytes == *source.base.bytes, "{}", source.name());
    }
}
