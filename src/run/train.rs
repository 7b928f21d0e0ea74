//! `train` and `identify`: rounds of finding experts, training them, and aligning the routers.

use std::sync::Arc;

use super::engine::Engine;
use super::identify::Identification;
use super::memory::{human, peak_resident};
use super::outputs::Outputs;
use super::phases::StepResult;
use super::progress::Progress;
use super::resume::{self, Measured};
use super::session::Session;
use super::verify::verify_frozen;
use crate::backend::{Backend, cpu::Cpu};
use crate::checkpoint::{export_over, save_delta};
use crate::config::{Mode, RunConfig, SaveRounds, Schedule, check_output_dir, prepare_output_dir};
use crate::data::{self, MicroBatch};
use crate::exit::Result;
use crate::experts::{ExpertId, Selection};
use crate::model::ParamKind;
use crate::report::{Phase, TrainingStep};
use crate::ui::Ui;

/// What a training run came to, for those who run several.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSummary {
    /// What was measured before the first round.
    pub before: Measured,
    /// And after the last.
    pub after: Measured,
    /// The last round's selection.
    pub selected: Vec<ExpertId>,
    /// Elements that an optimizer wrote, and all elements.
    pub trained: [usize; 2],
    /// Wall-clock seconds of the rounds.
    pub seconds: f64,
}

/// Scores and selects; changes no weight.
///
/// # Errors
/// Anything that keeps the run from its end.
pub fn identify(config: &RunConfig, ui: &Ui) -> Result<()> {
    check_output_dir(config)?;
    let session = Session::open(config, ui)?;
    // Nothing is trained: only the method itself may want safe rows.
    let untrained = RunConfig { skip_router_training: true, schedule: Schedule::Alternate, ..config.clone() };
    session.check_sides(&untrained)?;
    ui.line(format_args!("options:\n{}", config.to_yaml()?.trim_end()));
    ui.line(session.describe());
    ui.line(session.describe_memory(config, 0));
    let engine = session.engine(config, backend(config, ui))?;
    prepare_output_dir(config)?;
    let mut outputs = outputs(config, ui, &engine)?;
    let found = identify_round(&engine, 0, ui, &mut outputs)?;
    outputs.write_metadata()?;
    describe_selection(&found, &engine, ui);
    ui.result(format_args!("scores and selection: {}", outputs.path("expert_scores.json").display()));
    ui.line(format_args!("peak memory: {}", human(peak_resident())));
    Ok(())
}

/// Runs all rounds and writes the final model.
///
/// # Errors
/// Anything that keeps the run from its end.
pub fn train(config: &RunConfig, ui: &Ui) -> Result<TrainSummary> {
    check_output_dir(config)?;
    let session = Session::open(config, ui)?;
    session.check_sides(config)?;
    let mut engine = session.engine(config, backend(config, ui))?;
    prepare_output_dir(config)?;
    ui.line(format_args!("options:\n{}", config.to_yaml()?.trim_end()));
    ui.line(session.describe());
    let trained = trained_elements(&session, config);
    ui.line(session.describe_memory(config, trained));
    let total = session.table.total().elements;
    describe_trained(&session, config, ui);
    let clock = std::time::Instant::now();

    let resumed = if config.resume { resume::load(&session, &mut engine, ui)? } else { None };
    let (before, mut outputs, first) = match resumed {
        Some(state) => (state.before, Outputs::resume(config, ui, state.outputs)?, state.rounds_done),
        None => {
            let outputs = outputs(config, ui, &engine)?;
            (measure(&engine, &session)?, outputs, 0)
        }
    };
    ui.line(losses_line("before", &before));

    let mut selected = outputs.last_selection();
    for round in first..config.num_rounds {
        selected = train_round(&mut engine, round, ui, &mut outputs)?;
        engine.check_weights(&format!("round {}", round + 1))?;
        save_round(&session, &engine, round, &outputs, ui)?;
        outputs.write_metadata()?;
        resume::save(&session, &engine, round + 1, outputs.progressed(), before)?;
    }

    let after = measure(&engine, &session)?;
    after.check_finite()?;
    ui.line(losses_line("after", &after));
    outputs.measured(&before, &after);
    outputs.write_metadata()?;

    let final_model = outputs.path("final_model");
    export_over(&session.dir, &session.checkpoint, &session.table, &engine.changed(), &final_model)?;
    let frozen = verify_frozen(&session, &final_model, &engine.touched)?;
    ui.result(format_args!(
        "frozen: {} parameters ({:.2} % of the elements) have the source's bits, blake3 {}",
        frozen.frozen,
        100.0 * frozen.frozen_elements as f64 / total as f64,
        &frozen.hash.to_hex()[..16]
    ));
    ui.result(format_args!("trained: {} parameters, {} of them changed", frozen.trained, frozen.changed));
    ui.result(format_args!("final model: {}", final_model.display()));
    ui.line(format_args!("peak memory: {}", human(peak_resident())));
    Ok(TrainSummary {
        before,
        after,
        selected,
        trained: [total - frozen.frozen_elements, total],
        seconds: clock.elapsed().as_secs_f64(),
    })
}

/// The backend that the options ask for. (`config` has refused what this build does not have.)
pub fn backend(config: &RunConfig, ui: &Ui) -> Arc<Cpu> {
    let cpu = Cpu::new(config.threads);
    ui.line(format_args!("device: cpu, {} threads", cpu.threads()));
    Arc::new(cpu)
}

fn outputs<'a, B: Backend>(config: &'a RunConfig, ui: &'a Ui, engine: &Engine<'_, B>) -> Result<Outputs<'a>> {
    Outputs::create(config, ui, engine.moe_layers().layers, engine.model.config.num_experts)
}

fn identify_round<B: Backend>(
    engine: &Engine<'_, B>,
    round: usize,
    ui: &Ui,
    outputs: &mut Outputs<'_>,
) -> Result<Identification> {
    outputs.start_clock();
    let label = format!("round {} identify", round + 1);
    let progress = Progress::new(ui, engine.identify_order(round).len(), label);
    let found = engine.identify(round, &progress)?;
    outputs.identified(round + 1, &found)?;
    if found.selected.shortfall() > 0 {
        ui.warn(format_args!(
            "only {} of {} experts qualify (--risk-threshold {})",
            found.selected.experts.len(),
            found.selected.asked,
            engine.config.risk_threshold
        ));
    }
    Ok(found)
}

/// One round; the selection that it trained.
fn train_round<B: Backend>(
    engine: &mut Engine<'_, B>,
    round: usize,
    ui: &Ui,
    outputs: &mut Outputs<'_>,
) -> Result<Vec<ExpertId>> {
    let config = engine.config;
    let per_batch = engine.selects_per_batch();
    let mut selected = Vec::new();
    if !per_batch {
        let found = identify_round(engine, round, ui, outputs)?;
        describe_selection(&found, engine, ui);
        selected = found.selected.experts;
    }
    let joint = config.schedule == Schedule::Joint;
    if joint || config.finetune_unsafe_experts {
        let (phase, step, name) = match joint {
            true => (Phase::Joint, TrainingStep::Joint, "joint"),
            false => (Phase::Expert, TrainingStep::Expert, "experts"),
        };
        let progress = Progress::new(ui, engine.expert_steps(), format!("round {} {name}", round + 1));
        let mut found = None;
        let losses = logged(outputs, phase, round, |on_step| {
            found = match joint {
                true => engine.train_jointly(round, &selected, &progress, on_step)?,
                false => engine.train_experts(round, &selected, &progress, on_step)?,
            };
            Ok(())
        })?;
        if let Some(found) = found {
            outputs.identified(round + 1, &found)?;
            selected = found.selected.experts;
        }
        outputs.phase_done(round + 1, step, &losses, selected.len());
    }
    if config.has_router_phase() {
        let progress = Progress::new(ui, engine.router_steps(), format!("round {} routers", round + 1));
        let losses = logged(outputs, Phase::Router, round, |on_step| engine.train_routers(round, &progress, on_step))?;
        outputs.phase_done(round + 1, TrainingStep::Router, &losses, selected.len());
    }
    Ok(selected)
}

/// Runs a phase with its steps written to the log; the total losses of its steps.
fn logged(
    outputs: &mut Outputs<'_>,
    phase: Phase,
    round: usize,
    run: impl FnOnce(&mut dyn FnMut(usize, StepResult) -> Result<()>) -> Result<()>,
) -> Result<Vec<f64>> {
    let mut losses = Vec::new();
    outputs.start_clock();
    run(&mut |_, result| {
        losses.push(result.total_loss);
        outputs.step(phase, round + 1, result)
    })?;
    Ok(losses)
}

fn save_round<B: Backend>(
    session: &Session,
    engine: &Engine<'_, B>,
    round: usize,
    outputs: &Outputs<'_>,
    ui: &Ui,
) -> Result<()> {
    let dir = outputs.path(format!("round_{}", round + 1));
    match engine.config.save_rounds {
        SaveRounds::None => return Ok(()),
        SaveRounds::Full => {
            export_over(&session.dir, &session.checkpoint, &session.table, &engine.changed(), &dir)?;
        }
        SaveRounds::Delta => {
            save_delta(&session.checkpoint, &session.table, &engine.changed(), &dir.join("delta.safetensors"))?;
        }
    }
    ui.line(format_args!("round {} saved: {}", round + 1, dir.display()));
    Ok(())
}

/// Elements that training writes, by kind: experts, routers, everything else.
fn trained_by_kind(session: &Session, config: &RunConfig) -> [(&'static str, usize); 3] {
    let elements = |chosen: fn(ParamKind) -> bool| session.table.count(|spec| chosen(spec.kind)).elements;
    let all_routers = elements(|kind| matches!(kind, ParamKind::Router(_)));
    let all_experts = elements(|kind| matches!(kind, ParamKind::Expert(..)));
    let [experts, others] = match config.mode {
        _ if !config.finetune_unsafe_experts => [0, 0],
        Mode::Selective => [config.top_k_experts * 3 * session.model.hidden_size * session.model.expert_width, 0],
        Mode::Experts => [all_experts, 0],
        Mode::Baseline => [all_experts, session.table.total().elements - all_experts - all_routers],
    };
    let in_expert_phase = config.finetune_unsafe_experts && config.mode == Mode::Baseline;
    let routers = if config.skip_router_training && !in_expert_phase { 0 } else { all_routers };
    [("experts", experts), ("routers", routers), ("others", others)]
}

/// What will be trained, for people.
fn describe_trained(session: &Session, config: &RunConfig, ui: &Ui) {
    let total = session.table.total().elements;
    let kinds = trained_by_kind(session, config)
        .map(|(kind, elements)| format!("{kind} {elements} ({:.2} %)", 100.0 * elements as f64 / total as f64));
    let at_a_time = if config.selection == Selection::PerBatch { ", chosen anew at every step" } else { "" };
    ui.line(format_args!("trained parameters, of {total}: {}{at_a_time}", kinds.join(", ")));
}

/// The most parameters that are trained at once.
pub(super) fn trained_elements(session: &Session, config: &RunConfig) -> usize {
    let [(_, experts), (_, routers), (_, others)] = trained_by_kind(session, config);
    if config.schedule == Schedule::Joint || config.mode == Mode::Baseline {
        experts + routers + others
    } else {
        experts.max(routers)
    }
}

/// Micro-batches of all unsafe replies, in file order.
fn unsafe_batches<B: Backend>(engine: &Engine<'_, B>) -> Vec<MicroBatch> {
    data::micro_batches(&engine.unsafe_replies(), engine.config.batch_size)
        .iter()
        .map(|records| engine.pack_unsafe(records))
        .collect()
}

fn measure_held_out<B: Backend>(engine: &Engine<'_, B>, session: &Session) -> Result<Option<f64>> {
    let Some(held_out) = &session.held_out else { return Ok(None) };
    let examples: Vec<_> = held_out.records.iter().filter_map(|r| r.unsafe_reply.as_ref()).collect();
    let batches: Vec<_> =
        examples.chunks(engine.config.batch_size).map(|c| MicroBatch::of_examples(c.iter().copied())).collect();
    engine.measure(&batches)
}

/// Losses of the whole data, in file order, without gradient.
fn measure<B: Backend>(engine: &Engine<'_, B>, session: &Session) -> Result<Measured> {
    Ok(Measured {
        ce_loss: engine.measure(&unsafe_batches(engine))?,
        router_loss: if session.data.has_both_prompts() { Some(engine.measure_alignment()?) } else { None },
        held_out_loss: measure_held_out(engine, session)?,
    })
}

fn losses_line(when: &str, m: &Measured) -> String {
    let parts = [
        m.ce_loss.map(|x| format!("cross-entropy of the refusals {x:.4}")),
        m.router_loss.map(|x| format!("divergence of the routers {x:.5}")),
        m.held_out_loss.map(|x| format!("cross-entropy of the held-out refusals {x:.4}")),
    ];
    format!("{when}: {}", parts.into_iter().flatten().collect::<Vec<_>>().join(", "))
}

fn describe_selection<B: Backend>(found: &Identification, engine: &Engine<'_, B>, ui: &Ui) {
    let layers = engine.moe_layers().layers;
    let experts = &found.selected.experts;
    let all = layers.len() * engine.model.config.num_experts;
    let mut lines = format!("selected {} of {all} experts; by layer:", experts.len());
    for layer in layers {
        lines += &format!(" {}", experts.iter().filter(|id| id.layer == layer).count());
    }
    for id in experts.iter().take(5) {
        if let Some(score) = found.scores.get(*id).filter(|s| *s != 0.0) {
            lines += &format!("\n  layer {:>2} expert {:>3}  {score:.4e}", id.layer, id.expert);
        }
    }
    ui.line(lines);
}
