//! `train`: rounds of finding experts, training them, and aligning the routers.

mod memory_plan;
mod models;
pub mod snapshots;

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use super::ablate::{report_again, verify};
use super::counted::CountedRows;
use super::dense::fit_recipe;
use super::identify::scan_round;
use super::outputs::{OutputState, Outputs};
use super::progress::Progress;
use super::session::{Base, Session};
use super::{prepare, retention, rounds, summary};
use crate::backend::Backend;
use crate::checkpoint::{PhaseSnapshot, Position, Snapshot, SnapshotStore};
use crate::collective::all_ok;
use crate::config::{Init, RunConfig};
use crate::exit::{self, Ended, Failure, Result, Stopped};
use crate::experts::{ExpertId, Selected};
use crate::launch::{Opened, Rank, Started};
use crate::train::{
    DeviceTransport, ExpertCrossEntropy, Identification, JointConsistency, Measured, Objective, Phase, PhasePlan,
    Recipe, Replica, Retention, RouterAlignment, TrainingPhase,
};
use crate::ui::Ui;

/// The results of a training run.
#[derive(Debug, Clone, PartialEq)]
pub struct TrainSummary {
    /// Losses before the first round.
    pub before: Measured,
    /// Losses after the last round.
    pub after: Measured,
    /// The last round's selection.
    pub selected: Vec<ExpertId>,
    /// Elements that an optimizer wrote, and all elements.
    pub trained: [usize; 2],
    /// Wall-clock seconds of the rounds.
    pub seconds: f64,
}

/// Runs all rounds and writes the final model.
///
/// # Errors
/// Inputs that cannot be read or are invalid; an output folder or a device that cannot be used; too many steps with numbers that are
/// not finite; weights that diverged; a rank that fails.
pub fn train(config: &RunConfig, started: &Started, ui: &Ui) -> Result<Ended<TrainSummary>> {
    train_within(config, &Within::default(), started, ui)
}

/// What a comparison asks of a run.
#[derive(Default)]
pub(super) struct Within<'a> {
    /// The opened model, if it is that of the run.
    pub base: Option<&'a Base>,
    /// How many experts an identification has to select.
    pub exactly: Option<usize>,
}

/// [`train`], which fails after the identification of a round that selects another number of experts.
///
/// # Errors
/// Those of [`train`].
pub(super) fn train_within(
    config: &RunConfig,
    within: &Within<'_>,
    started: &Started,
    ui: &Ui,
) -> Result<Ended<TrainSummary>> {
    let ranks = &started.ranks;
    let recipe = config.recipe()?;
    let recipe = ranks.all_ok(fit_recipe(recipe, config, ui))?;
    let session = prepare::open(config, within.base, &recipe, ranks, ui)?;
    ranks.all_ok(session.check_copied())?;
    let _lock = prepare::take_output_dir(config, ranks)?;
    prepare::describe(&session, config, ranks, ui)?;
    prepare::describe_trained(&session, &recipe, ui);
    let (config, device, exactly) = (config.clone(), started.device.clone(), within.exactly);
    ranks.run(ui, move |rank| {
        let run = RankInputs { session: &session, config: &config, recipe: &recipe, exactly, rank };
        match device.open(&config, session.workload(config.batch_size), rank)? {
            Opened::Cpu(cpu) => run.all_rounds(cpu, None),
            Opened::Cuda(cuda, transport) => run.all_rounds(cuda, transport),
        }
    })
}

/// The inputs of one rank.
struct RankInputs<'a> {
    session: &'a Session,
    config: &'a RunConfig,
    recipe: &'a Recipe,
    /// How many experts an identification has to select.
    exactly: Option<usize>,
    rank: &'a Rank,
}

/// A training run on one rank, between its first step and its last.
struct RankRun<'a, B: Backend> {
    session: &'a Session,
    config: &'a RunConfig,
    recipe: &'a Recipe,
    exactly: Option<usize>,
    ui: &'a Ui,
    local_world_size: usize,
    replica: Replica<B>,
    retention: Option<Arc<Retention<'a, B>>>,
    store: SnapshotStore<'a>,
    outputs: Outputs<'a>,
    before: Measured,
    /// Models of earlier rounds that a resumed run has found damaged, on the rank that writes.
    damaged: Vec<PathBuf>,
}

impl<'a> RankInputs<'a> {
    /// The whole run on this rank.
    fn all_rounds<B: Backend>(
        self,
        backend: Arc<B>,
        transport: Option<Arc<dyn DeviceTransport<B>>>,
    ) -> Result<Ended<TrainSummary>> {
        let Self { session, config, recipe, rank, .. } = self;
        let trained = recipe.trained_elements(&session.table, &session.model).at_once;
        let (predicted_memory, offloaded) = prepare::predict_memory(session, config, recipe, rank, trained, &*backend)?;
        let clock = Instant::now();

        let (mut run, snapshot) = self.begin(session.replica(backend, transport, rank, offloaded))?;
        if let Some(snapshot) = &snapshot {
            run.write_rounds_again(snapshot.state.position)?;
        }
        rank.ui.line(summary::losses("before", &run.before));
        let start = snapshot.as_ref().map_or(Position::start(0, Phase::Identify), |s| s.state.position);
        for round in start.round..recipe.rounds {
            let resumed = snapshot.as_ref().filter(|_| round == start.round);
            let first = resumed.map_or(Phase::Identify, |_| start.phase);
            if run.round(round, first, resumed)?.is_break() {
                return Ok(Ended::Stopped(stopped(config)));
            }
        }

        let seconds = clock.elapsed().as_secs_f64();
        rank.world.set_activity("measuring the losses after training");
        let after = run.measure()?;
        after.check_finite()?;
        rank.ui.line(summary::losses("after", &after));
        if let Some([before, after]) = run.before.harm_to_safe_side(&after) {
            rank.ui.warn(format_args!(
                "the loss of the replies to safe prompts rose from {before:.4} to {after:.4} nats a token: training harmed answers \
                 that were right; lower the learning rates, or leave the routers alone (--skip-router-training; in `compare`: --ablations expert-only)"
            ));
        }
        if run.stop_requested()? {
            return Ok(Ended::Stopped(stopped(config))); // the end of the last round is saved
        }
        run.write_final_model(&after)?;
        if config.verify > 0 {
            report_again(config, &rank.ui);
        }
        rank.ui.line(summary::resources(&run.replica, predicted_memory)?);
        rank.world.set_activity("");
        all_ok(&*rank.world, rounds::check_damaged(&run.damaged))?;
        let trained = run.replica.written().iter().map(|&id| session.table.params[id].len()).sum();
        run.replica.finish();
        Ok(Ended::Done(TrainSummary {
            before: run.before,
            after,
            selected: run.outputs.last_selection(),
            trained: [trained, session.table.total().elements],
            seconds,
        }))
    }

    /// Restores the newest checkpoint if the run resumes one; otherwise measures the untrained model.
    fn begin<B: Backend>(self, mut replica: Replica<B>) -> Result<(RankRun<'a, B>, Option<Snapshot<OutputState>>)> {
        let Self { session, config, recipe, exactly, rank } = self;
        let (ui, world) = (&rank.ui, &*rank.world);
        let store = snapshots::store(session, config)?;
        let snapshot = snapshots::newest(&store, session, config, recipe, rank)?;
        // With the base model's weights, before those of a checkpoint replace them.
        let retention = retention::open(session, config, recipe, &replica, ui)?;
        let (before, mut outputs) = match &snapshot {
            Some(snapshot) => {
                ui.line(format_args!("resuming from {}", snapshot.folder().display()));
                snapshot.restore_weights(&store, &mut replica)?;
                let (outputs, log) = (snapshot.state.outputs.clone(), all_ok(world, snapshot.metrics())?);
                (snapshot.state.before, Outputs::resume(config, recipe, &replica, ui, outputs, log)?)
            }
            None => {
                world.set_activity("measuring the losses before training");
                let before = measure(session, recipe, &replica)?;
                (before, Outputs::create(session, config, recipe, &replica, ui)?)
            }
        };
        if let Some(retention) = retention.as_ref().filter(|_| snapshot.is_none()) {
            world.set_activity("measuring the retain rows before training");
            let drift = retention.drift(&replica)?;
            ui.line(retention::describe("before", retention.rows().len(), &drift));
            outputs.start_retention(retention.rows());
            outputs.drifted(drift);
        }
        let local_world_size = rank.local_world_size;
        let damaged = Vec::new();
        let run = RankRun {
            session,
            config,
            recipe,
            exactly,
            ui,
            local_world_size,
            replica,
            retention,
            store,
            outputs,
            before,
            damaged,
        };
        Ok((run, snapshot))
    }
}

impl<B: Backend> RankRun<'_, B> {
    /// One round from its phase `first` on; `resumed` is the checkpoint that this phase continues. Breaks if the run was asked
    /// to stop; then it is saved.
    fn round(
        &mut self,
        round: usize,
        first: Phase,
        resumed: Option<&Snapshot<OutputState>>,
    ) -> Result<ControlFlow<()>> {
        let recipe = self.recipe;
        let phases: Vec<_> = recipe.phases().into_iter().filter(|plan| plan.phase() >= first).collect();
        for (i, plan) in phases.iter().enumerate() {
            let resumed = resumed.filter(|_| plan.phase() == first);
            // A phase that selects at each step starts without a selection.
            let selected = if recipe.selects_each_step() { Vec::new() } else { self.outputs.last_selection() };
            let (identify, sampler) = (&recipe.identify, self.session.sampler(recipe));
            let flow = match *plan {
                PhasePlan::Identify => self.identify(round, resumed)?,
                PhasePlan::Expert(phase) => {
                    self.train_phase(round, ExpertCrossEntropy { phase, identify, sampler, selected }, resumed)?
                }
                PhasePlan::Router(phase) => self.train_phase(round, RouterAlignment::new(phase, sampler)?, resumed)?,
                PhasePlan::Joint(phase) => {
                    self.train_phase(round, JointConsistency::new(phase, identify, sampler, selected)?, resumed)?
                }
            };
            if flow.is_break() {
                return Ok(flow);
            }
            if let Some(next) = phases.get(i + 1)
                && self.save_between(Position::start(round, next.phase()))?.is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        self.replica.world.set_activity(&format!("the end of round {}", round + 1));
        self.replica.check_weights(&format!("round {}", round + 1))?;
        self.measure_drift(round)?;
        self.save_round(round)?;
        self.save_between(Position::start(round + 1, Phase::Identify))
    }

    /// Scores and selects experts.
    fn identify(&mut self, round: usize, resumed: Option<&Snapshot<OutputState>>) -> Result<ControlFlow<()>> {
        let Self { recipe, session, ui, .. } = *self;
        if let Some((from, experts)) =
            self.outputs.selection_to_keep().filter(|_| recipe.identify.keeps_first_selection())
        {
            let found = Identification::kept(&self.replica, experts, from);
            self.outputs.identified(round + 1, &found)?;
            ui.line(format_args!("round {}: the selection of round {from} is kept", round + 1));
            return Ok(ControlFlow::Continue(()));
        }
        let Some(rows) = CountedRows::of(session, self.config, recipe, &self.replica, ui)? else {
            // The start of a later round, or of this phase if it was resumed, is saved.
            if round == 0 && resumed.is_none() {
                self.save(Position::start(0, Phase::Identify), &PhaseSnapshot::Between)?;
            }
            return Ok(ControlFlow::Break(()));
        };
        match (rows.check(), self.outputs.selection_to_keep()) {
            (Err(nothing), Some((from, experts))) => {
                ui.warn(format_args!("round {}: the selection of round {from} is kept: {nothing}", round + 1));
                let found =
                    Identification { replies: rows.counts(), ..Identification::kept(&self.replica, experts, from) };
                self.outputs.identified(round + 1, &found)?;
                return Ok(ControlFlow::Continue(()));
            }
            (checked, _) => checked?,
        }
        let mut scan = scan_round(session, &rows, recipe, &mut self.replica, self.local_world_size, round, ui)?;
        if let Some(snapshot) = resumed {
            all_ok(&*self.replica.world, snapshot.restore_scan(&self.replica, &mut scan.pass))?;
        }
        self.outputs.start_clock();
        let progress = scan.progress(&self.replica, ui);
        let mut saved = scan.pass.done();
        while let Some(stop) = scan.interval(&self.replica, &progress)? {
            let done = scan.pass.done();
            // The end of the phase is saved by the caller.
            let due = self.config.save_steps > 0 && done - saved >= self.config.save_steps && scan.pass.left() > 0;
            if stop || due {
                let position = Position { round, phase: Phase::Identify, step: done };
                self.save(position, &PhaseSnapshot::Identification(scan.pass.state()))?;
                saved = done;
            }
            if stop {
                return Ok(ControlFlow::Break(()));
            }
        }
        let (done, state) = (scan.pass.done(), scan.pass.state());
        let mut found = scan.finish(&self.replica, &progress)?;
        if let Some((from, experts)) = self.outputs.selection_to_keep()
            && let Some([first, now]) = found.has_learned(self.outputs.first_losses(), recipe.identify.until)
        {
            progress.warn(format_args!(
                "round {}: the mean refusal loss of the scan is {now:.4e}, below {} times the {first:.4e} of round 1 \
                 (--identify-until): its scores are noise, and the selection of round {from} is kept",
                round + 1,
                recipe.identify.until
            ));
            found.selected = Selected { requested: experts.len(), experts };
            found.kept_from = Some(from);
        }
        self.check_size(&found.selected.experts)?;
        summary::selection(&found, session, ui);
        let clock = Instant::now();
        if round == 0
            && self.config.verify > 0
            && verify(session, self.config, &mut self.replica, &found, ui)?.is_some()
        {
            // The resumed run selects from these scores again, and starts the check anew.
            let position = Position { round, phase: Phase::Identify, step: done };
            self.save(position, &PhaseSnapshot::Identification(state))?;
            return Ok(ControlFlow::Break(()));
        }
        self.outputs.skip_time(clock.elapsed());
        self.outputs.identified(round + 1, &found)?;
        Ok(ControlFlow::Continue(()))
    }

    /// Refuses a selection of another size than the run needs.
    fn check_size(&self, selected: &[ExpertId]) -> Result<()> {
        let (found, method) = (selected.len(), self.config.method.name());
        match self.exactly.filter(|wanted| *wanted != found) {
            None => Ok(()),
            Some(wanted) => Err(Failure::new(
                exit::CONFIG,
                format!(
                    "--method {method} selects {found} experts, not {wanted} as the others do: methods that train different numbers of \
                     parameters are not compared; give --top-k-experts {found}, or --unequal-parameters"
                ),
            )),
        }
    }

    /// Takes the steps of a phase.
    fn train_phase<O: Objective<B>>(
        &mut self,
        round: usize,
        objective: O,
        resumed: Option<&Snapshot<OutputState>>,
    ) -> Result<ControlFlow<()>> {
        let Self { recipe, ui, .. } = *self;
        let phase = TrainingPhase::new(objective, &recipe.updates, round, &self.replica);
        let mut phase = phase.with_retention(self.retention.clone());
        let label = phase.phase().label();
        if resumed.is_none() {
            recipe.updates.warm_up_problem(phase.total_steps()).into_iter().for_each(|problem| {
                ui.warn(format_args!("round {}, {label} phase: {problem}", round + 1));
            });
        }
        self.plan_memory(&phase, round);
        let mut restore = || -> Result<bool> {
            let Some(saved) = resumed.map(|s| s.training(&self.replica)).transpose()?.flatten() else {
                return Ok(false);
            };
            phase.restore(&self.replica, saved.progress, saved.optimizer, saved.prepared.as_deref())?;
            Ok(true)
        };
        if !all_ok(&*self.replica.world, restore())? {
            phase.prepare(&self.replica)?;
        }
        let mut num_selected = self.outputs.last_selection().len();
        let progress =
            Progress::new(ui, phase.total_steps() - phase.progress().steps, format!("round {} {label}", round + 1));
        self.outputs.start_clock();

        while !phase.is_done() {
            let step = phase.step(&mut self.replica)?;
            progress.step(step.tokens, format!("loss {:.4}", step.total_loss));
            let phase_load = phase.is_done().then_some(&phase.progress().loads);
            self.outputs.step(phase.phase(), round + 1, &step, phase_load)?;
            if let Some(reason) = &step.skipped {
                ui.warn(format_args!("step {} is skipped: {reason}", self.outputs.steps()));
            }
            // The end of the phase is saved by the caller.
            let due = self.config.save_steps > 0 && self.outputs.steps().is_multiple_of(self.config.save_steps as u64);
            if !phase.is_done() && (step.stop || due) {
                let position = Position { round, phase: phase.phase(), step: phase.progress().steps };
                let (progress, optimizer) = (phase.progress(), phase.trainer().optimizer());
                let prepared = phase.objective().prepared();
                self.save(position, &PhaseSnapshot::Training { progress, optimizer, prepared })?;
                if step.stop {
                    return Ok(ControlFlow::Break(()));
                }
            }
        }

        if let Some(found) = phase.progress().selections.finish() {
            self.outputs.identified(round + 1, &found)?;
            num_selected = found.selected.experts.len();
        }
        self.outputs.phase_done(round + 1, phase.phase(), &phase.progress().losses, num_selected);
        Ok(ControlFlow::Continue(()))
    }

    /// Measures the distance from the base model after a round (from 0).
    fn measure_drift(&mut self, round: usize) -> Result<()> {
        let Some(retention) = &self.retention else { return Ok(()) };
        self.replica.world.set_activity(&format!("measuring the retain rows after round {}", round + 1));
        let drift = retention.drift(&self.replica)?;
        retention::check_finite(&drift)?;
        self.ui.line(retention::describe(&format!("after round {}", round + 1), retention.rows().len(), &drift));
        self.outputs.drifted(drift);
        Ok(())
    }

    /// Losses of the whole data, in file order, without gradient.
    fn measure(&self) -> Result<Measured> {
        measure(self.session, self.recipe, &self.replica)
    }

    /// Saves a checkpoint.
    fn save(&self, position: Position, phase: &PhaseSnapshot<'_, B>) -> Result<()> {
        self.store.save(&self.replica, position, phase, || self.outputs.synced_state(), self.before)
    }

    /// Saves a checkpoint between two phases. Breaks if the run was asked to stop.
    fn save_between(&self, position: Position) -> Result<ControlFlow<()>> {
        self.save(position, &PhaseSnapshot::Between)?;
        Ok(if self.stop_requested()? { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
    }

    /// Whether some rank was asked to stop.
    fn stop_requested(&self) -> Result<bool> {
        let [stop] = self.replica.any([self.replica.stop.is_set()])?;
        Ok(stop)
    }
}

fn measure<B: Backend>(session: &Session, recipe: &Recipe, replica: &Replica<B>) -> Result<Measured> {
    Measured::of(replica, session.sampler(recipe), session.held_out.as_ref(), recipe.divergence)
}

/// What is left of a run that was asked to stop.
fn stopped(config: &RunConfig) -> Stopped {
    match config.init {
        Init::Random => Stopped::Lost("stopped by a signal: nothing of random weights is saved".into()),
        Init::Checkpoint => Stopped::Saved(format!(
            "stopped by a signal, and saved in {}: --resume continues from there",
            config.output_dir.display()
        )),
    }
}
