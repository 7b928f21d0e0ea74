//! `train` and `identify`: rounds of finding experts, training them, and aligning the routers.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use super::device::Opened;
use super::direct::Direct;
use super::engine::Engine;
use super::identify::{Identification, ScanState};
use super::memory::{Place, human, peak_resident};
use super::outputs::Outputs;
use super::phase::PhaseRun;
use super::progress::Progress;
use super::ranks::{Rank, Ranks};
use super::resume::{Checkpoints, Found, Measured, Position, Within};
use super::session::Session;
use super::verify::verify_frozen;
use crate::backend::Backend;
use crate::checkpoint::{export_over, save_delta};
use crate::collective::{all_ok, meanwhile};
use crate::config::{Init, Mode, RunConfig, SaveRounds, Schedule};
use crate::data::{self, MicroBatch};
use crate::exit::{self, Failure, Result};
use crate::experts::{ExpertId, Selection};
use crate::launch::{LOCK_FILE, OutputLock, check_output_dir, prepare_output_dir};
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
pub fn identify(config: &RunConfig, ranks: &Ranks, ui: &Ui) -> Result<()> {
    // Nothing is trained: only the method itself may want safe rows.
    let untrained = RunConfig { skip_router_training: true, schedule: Schedule::Alternate, ..config.clone() };
    let session = open(config, &untrained, ranks, ui)?;
    let _lock = take_output_dir(config, ranks)?;
    describe(&session, config, ranks, ui)?;
    let config = config.clone();
    ranks.run(ui, move |rank| match rank.device.open(&config, &session, rank)? {
        Opened::Cpu(cpu) => identify_rank(&session, &config, rank, cpu, None),
        Opened::Cuda(cuda, direct) => identify_rank(&session, &config, rank, cuda, direct),
    })
}

/// One rank of an identification.
fn identify_rank<B: Backend>(
    session: &Session,
    config: &RunConfig,
    rank: &Rank,
    backend: Arc<B>,
    direct: Option<Arc<dyn Direct<B>>>,
) -> Result<()> {
    let ui = &rank.ui;
    let predicted = predict_memory(session, config, rank, 0, &*backend);
    let engine = session.engine(config, backend, direct, rank);
    let mut outputs = Outputs::create(&engine, ui)?;
    let found = identify_round(&engine, 0, ScanState::default(), &mut outputs, ui, &mut |_, _, pause| {
        if pause.stop {
            let message = "stopped by a signal: nothing was saved (only `train` makes checkpoints)";
            return Err(Failure::new(exit::TERMINATED, message));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    let found = found.expect("it is never paused for good");
    all_ok(&*rank.world, outputs.write_metadata())?;
    describe_selection(&found, &engine, ui);
    ui.result(format_args!("scores and selection: {}", outputs.path("expert_scores.json").display()));
    ui.line(resources(&engine, predicted)?);
    Ok(())
}

/// Runs all rounds and writes the final model.
///
/// # Errors
/// Anything that keeps the run from its end.
pub fn train(config: &RunConfig, ranks: &Ranks, ui: &Ui) -> Result<TrainSummary> {
    let session = open(config, config, ranks, ui)?;
    let _lock = take_output_dir(config, ranks)?;
    describe(&session, config, ranks, ui)?;
    describe_trained(&session, config, ui);
    let config = config.clone();
    ranks.run(ui, move |rank| match rank.device.open(&config, &session, rank)? {
        Opened::Cpu(cpu) => train_rank(&session, &config, rank, cpu, None),
        Opened::Cuda(cuda, direct) => train_rank(&session, &config, rank, cuda, direct),
    })
}

/// Opens and checks everything that the run reads, on all processes; `for_sides` says what its phases need.
fn open(config: &RunConfig, for_sides: &RunConfig, ranks: &Ranks, ui: &Ui) -> Result<Arc<Session>> {
    let own = || {
        check_output_dir(config)?;
        let session = Session::open(config, ui)?;
        session.check_sides(for_sides)?;
        session.check_weights()?;
        Ok(Arc::new(session))
    };
    let session = ranks.all_ok(own())?;
    session.agree(config, ranks)?;
    Ok(session)
}

/// Prepares the output folder, takes it for this run, and proves that all ranks see the same one.
fn take_output_dir(config: &RunConfig, ranks: &Ranks) -> Result<Option<OutputLock>> {
    let own = || {
        if !ranks.leads() {
            return Ok(None);
        }
        check_output_dir(config)?;
        let lock = OutputLock::take(&config.output_dir)?;
        prepare_output_dir(config)?;
        Ok(Some(lock))
    };
    let lock = ranks.all_ok(own())?;
    if let Some(world) = ranks.other_processes() {
        let holder = lock.as_ref().map_or_else(String::new, |lock| lock.holder.clone());
        let shared = world.all_gather(holder.as_bytes())?.swap_remove(0);
        ranks.all_ok(see_lock(config, &shared))?;
    }
    Ok(lock)
}

/// Waits until this rank sees the lock of rank 0: network file systems show new files with a delay.
fn see_lock(config: &RunConfig, holder: &[u8]) -> Result<()> {
    const TRIES: usize = 300;
    let path = config.output_dir.join(LOCK_FILE);
    for _ in 0..TRIES {
        if std::fs::read(&path).is_ok_and(|bytes| bytes == holder) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(Failure::new(
        exit::CANNOT_CREATE,
        format!(
            "this rank does not see the files of rank 0 in {}: give an --output-dir on a file system that all machines share",
            config.output_dir.display()
        ),
    ))
}

/// What is about to happen, for people.
fn describe(session: &Session, config: &RunConfig, ranks: &Ranks, ui: &Ui) -> Result<()> {
    ui.line(format_args!("options:\n{}", config.to_yaml()?.trim_end()));
    ui.line(session.describe());
    if ranks.world_size() > 1 {
        ui.line(format_args!("ranks: {} ({} on this machine)", ranks.world_size(), ranks.here()));
    }
    Ok(())
}

/// Says how much memory a rank is expected to take, and returns it.
fn predict_memory(session: &Session, config: &RunConfig, rank: &Rank, trained: usize, backend: &impl Backend) -> u64 {
    let place = Place::of(backend, rank.here, session.model.vocab_size);
    let (bytes, text) = session.predict_memory(config, trained, rank.world.world_size(), place);
    rank.ui.line(text);
    bytes
}

/// One rank of a training run.
fn train_rank<B: Backend>(
    session: &Session,
    config: &RunConfig,
    rank: &Rank,
    backend: Arc<B>,
    direct: Option<Arc<dyn Direct<B>>>,
) -> Result<TrainSummary> {
    let (ui, world) = (&rank.ui, &*rank.world);
    let predicted = predict_memory(session, config, rank, trained_elements(session, config), &*backend);
    let mut engine = session.engine(config, backend, direct, rank);
    let clock = std::time::Instant::now();
    let checkpoints = Checkpoints::new(session, config)?;
    let found = if config.resume { checkpoints.agree_on_newest(world, ui)? } else { None };
    let (before, outputs) = match &found {
        Some(found) => {
            all_ok(world, found.load_weights(session, &mut engine))?;
            (found.state.before, Outputs::resume(&engine, ui, found.state.outputs.clone())?)
        }
        None => {
            world.doing("measuring the losses before training");
            (measure(&engine, session)?, Outputs::create(&engine, ui)?)
        }
    };
    ui.line(losses_line("before", &before));
    let at = found.as_ref().map_or(Position::start(0, Phase::Identify), |found| found.state.position);
    let mut run = Run { session, checkpoints, outputs, before, ui };
    for round in at.round..config.num_rounds {
        let (at, found) =
            if round == at.round { (at, found.as_ref()) } else { (Position::start(round, Phase::Identify), None) };
        run.round(&mut engine, at, found)?;
    }
    run.finish(&mut engine, clock.elapsed().as_secs_f64(), predicted)
}

/// A training run as one rank walks through it.
struct Run<'a> {
    session: &'a Session,
    checkpoints: Checkpoints<'a>,
    outputs: Outputs<'a>,
    before: Measured,
    ui: &'a Ui,
}

impl Run<'_> {
    /// What is left of a round from `at` on; `found` is the checkpoint that it goes on from.
    fn round<B: Backend>(&mut self, engine: &mut Engine<'_, B>, at: Position, found: Option<&Found>) -> Result<()> {
        let (config, round) = (engine.config, at.round);
        let expert_phase = engine.expert_phase();
        if at.phase == Phase::Identify && !(engine.selects_per_batch() && expert_phase.is_some()) {
            let from = found.map_or(Ok(ScanState::default()), |found| found.scan(engine))?;
            self.identify(engine, round, from)?;
            if let Some(next) = expert_phase.or(config.has_router_phase().then_some(Phase::Router)) {
                self.save(engine, Position::start(round, next))?;
            }
        }
        if let Some(phase) = expert_phase.filter(|phase| at.phase <= *phase) {
            self.phase(engine, phase, round, found.filter(|_| at.phase == phase))?;
            if config.has_router_phase() {
                self.save(engine, Position::start(round, Phase::Router))?;
            }
        }
        if config.has_router_phase() {
            self.phase(engine, Phase::Router, round, found.filter(|_| at.phase == Phase::Router))?;
        }
        engine.world.doing(&format!("the end of round {}", round + 1));
        engine.check_weights(&format!("round {}", round + 1))?;
        engine.world.doing(&format!("saving the model of round {}", round + 1));
        all_ok(&*engine.world, meanwhile(&*engine.world, || self.save_round(engine, round))?)?;
        self.save(engine, Position::start(round + 1, Phase::Identify))
    }

    fn identify<B: Backend>(&mut self, engine: &mut Engine<'_, B>, round: usize, from: ScanState) -> Result<()> {
        let Self { checkpoints, outputs, before, ui, .. } = self;
        let every = engine.config.save_steps;
        let mut saved = from.next;
        let found = identify_round(engine, round, from, outputs, ui, &mut |engine, outputs, pause| {
            if pause.stop || (every > 0 && pause.next - saved >= every) {
                let position = Position { round, phase: Phase::Identify, step: pause.next };
                checkpoints.save(engine, position, Within::Identification((pause.sums)()), outputs, *before)?;
                saved = pause.next;
            }
            Ok(if pause.stop { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        let found = found.ok_or_else(|| requeue(engine.config))?;
        describe_selection(&found, engine, ui);
        Ok(())
    }

    fn phase<B: Backend>(
        &mut self,
        engine: &mut Engine<'_, B>,
        phase: Phase,
        round: usize,
        found: Option<&Found>,
    ) -> Result<()> {
        let Self { checkpoints, outputs, before, ui, .. } = self;
        let config = engine.config;
        let mut run: PhaseRun<B> = engine.begin(phase, round, &outputs.last_selection())?;
        if let Some(found) = found {
            all_ok(&*engine.world, found.restore(engine, &mut run))?;
        }
        let (step, name) = match phase {
            Phase::Router => (TrainingStep::Router, "routers"),
            Phase::Joint => (TrainingStep::Joint, "joint"),
            _ => (TrainingStep::Expert, "experts"),
        };
        let progress = Progress::new(ui, run.total - run.so_far.steps, format!("round {} {name}", round + 1));
        outputs.start_clock();
        let every = config.save_steps as u64;
        let end = engine.train(&mut run, &progress, &mut |engine, run, result| {
            outputs.step(phase, round + 1, result)?;
            if let Some(reason) = &result.skipped {
                ui.warn(format_args!("step {} is skipped: {reason}", outputs.steps()));
            }
            let last = run.so_far.steps == run.total; // the end of the phase is saved, too
            if !last && (result.stop || (every > 0 && outputs.steps().is_multiple_of(every))) {
                let position = Position { round, phase, step: run.so_far.steps };
                checkpoints.save(engine, position, Within::Training(run), outputs, *before)?;
            }
            Ok(if result.stop && !last { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })?;
        if end.is_break() {
            return Err(requeue(config));
        }
        if let Some(found) = run.so_far.choices.finish() {
            outputs.identified(round + 1, &found)?;
            run.selected = found.selected.experts;
        }
        outputs.phase_done(round + 1, step, &run.so_far.losses, run.selected.len());
        Ok(())
    }

    /// Saves the run between two phases; if it was asked to stop, this is the place.
    fn save<B: Backend>(&self, engine: &Engine<'_, B>, position: Position) -> Result<()> {
        self.checkpoints.save::<B>(engine, position, Within::Nothing, &self.outputs, self.before)?;
        stop_if_asked(engine)
    }

    /// What rank 0 writes after a round.
    fn save_round<B: Backend>(&self, engine: &Engine<'_, B>, round: usize) -> Result<()> {
        if engine.world.rank() != 0 {
            return Ok(());
        }
        let session = self.session;
        let dir = self.outputs.path(format!("round_{}", round + 1));
        let Some(checkpoint) = &session.checkpoint else { return self.outputs.write_metadata() };
        match engine.config.save_rounds {
            SaveRounds::None => {}
            SaveRounds::Full => {
                export_over(&session.dir, checkpoint, &session.table, &engine.changed(), &dir)?;
            }
            SaveRounds::Delta => {
                save_delta(checkpoint, &session.table, &engine.changed(), &dir.join("delta.safetensors"))?;
            }
        }
        if engine.config.save_rounds != SaveRounds::None {
            self.ui.line(format_args!("round {} saved: {}", round + 1, dir.display()));
        }
        self.outputs.write_metadata()
    }

    /// Measures the trained model, writes it, and proves that what was frozen kept its bits.
    fn finish<B: Backend>(
        mut self,
        engine: &mut Engine<'_, B>,
        seconds: f64,
        predicted_memory: u64,
    ) -> Result<TrainSummary> {
        let world = engine.world.clone();
        world.doing("measuring the losses after training");
        let after = measure(engine, self.session)?;
        after.check_finite()?;
        self.ui.line(losses_line("after", &after));
        stop_if_asked(engine)?; // the end of the last round is saved
        self.outputs.measured(&self.before, &after);
        world.doing("writing the final model");
        let write = || if world.rank() == 0 { self.write_final(engine) } else { Ok(()) };
        all_ok(&*world, meanwhile(&*world, write)?)?;
        self.ui.line(resources(engine, predicted_memory)?);
        let table = &self.session.table;
        let trained = engine.touched.iter().map(|&id| table.params[id].value.len()).sum();
        Ok(TrainSummary {
            before: self.before,
            after,
            selected: self.outputs.last_selection(),
            trained: [trained, table.total().elements],
            seconds,
        })
    }

    fn write_final<B: Backend>(&self, engine: &Engine<'_, B>) -> Result<()> {
        let Self { session, outputs, ui, .. } = self;
        outputs.write_metadata()?;
        let Some(checkpoint) = &session.checkpoint else {
            ui.result("no model is written: its weights are random (--init random)");
            return Ok(());
        };
        let final_model = outputs.path("final_model");
        export_over(&session.dir, checkpoint, &session.table, &engine.changed(), &final_model)?;
        let frozen = verify_frozen(session, &final_model, &engine.touched)?;
        ui.result(format_args!(
            "frozen: {} parameters ({:.2} % of the elements) have the source's bits, blake3 {}",
            frozen.frozen,
            100.0 * frozen.frozen_elements as f64 / session.table.total().elements as f64,
            &frozen.hash.to_hex()[..16]
        ));
        ui.result(format_args!("trained: {} parameters, {} of them changed", frozen.trained, frozen.changed));
        ui.result(format_args!("final model: {}", final_model.display()));
        Ok(())
    }
}

/// Ends the run on all ranks if one of them was asked to.
fn stop_if_asked<B: Backend>(engine: &Engine<'_, B>) -> Result<()> {
    let mut stop = [f64::from(u8::from(engine.stop.is_asked()))];
    engine.world.all_reduce_f64(&mut stop)?;
    if stop[0] > 0.0 { Err(requeue(engine.config)) } else { Ok(()) }
}

/// How a run ends that was asked to save and leave.
fn requeue(config: &RunConfig) -> Failure {
    if config.init == Init::Random {
        return Failure::new(exit::TERMINATED, "stopped by a signal: nothing of random weights is saved");
    }
    Failure::new(
        exit::REQUEUE,
        format!("stopped as asked, and saved in {}: --resume goes on from there", config.output_dir.display()),
    )
}

/// The largest resident size of each process, what each rank took most of a device's memory, and where its time went if that
/// was counted.
fn resources<B: Backend>(engine: &Engine<'_, B>, predicted: u64) -> Result<String> {
    let device = engine.model.backend.peak_memory();
    let own = [peak_resident(), device.unwrap_or(0)].map(u64::to_le_bytes).concat();
    let all = engine.world.all_gather(&own)?;
    let nth = |i: usize| {
        let bytes = all.iter().map(|both| both[8 * i..][..8].try_into().map_or(0, u64::from_le_bytes));
        bytes.map(human).collect::<Vec<_>>().join(", ")
    };
    let many = all.len() > 1;
    let mut text = format!("peak memory{}: {}", if many { " of each rank's process" } else { "" }, nth(0));
    if device.is_some() {
        let whose = if many { " of each rank" } else { "" };
        text += &format!("\npeak memory on the GPU{whose}, for tensors: {} (predicted: {})", nth(1), human(predicted));
    }
    if let Some(profile) = engine.model.backend.profile() {
        let whose = if many { format!("of rank {}, ", engine.world.rank()) } else { String::new() };
        text += &format!("\n{whose}{profile}");
    }
    Ok(text)
}

/// What is called at each pause of an identification.
type OnPause<'p, B> =
    &'p mut dyn FnMut(&Engine<'_, B>, &mut Outputs<'_>, super::identify::Pause<'_>) -> Result<ControlFlow<()>>;

/// Scores from `from` on and selects; `None` if it was paused for good.
fn identify_round<B: Backend>(
    engine: &Engine<'_, B>,
    round: usize,
    from: ScanState,
    outputs: &mut Outputs<'_>,
    ui: &Ui,
    on_pause: OnPause<'_, B>,
) -> Result<Option<Identification>> {
    outputs.start_clock();
    let left = engine.identify_order(round).len() - from.next;
    let progress = Progress::new(ui, left.div_ceil(engine.world.world_size()), format!("round {} identify", round + 1));
    let found = engine.identify_from(round, from, &progress, &mut |engine, pause| on_pause(engine, outputs, pause))?;
    let Some(found) = found else { return Ok(None) };
    outputs.identified(round + 1, &found)?;
    if found.selected.shortfall() > 0 {
        ui.warn(format_args!(
            "only {} of {} experts qualify (--risk-threshold {})",
            found.selected.experts.len(),
            found.selected.asked,
            engine.config.risk_threshold
        ));
    }
    Ok(Some(found))
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
