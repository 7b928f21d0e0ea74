//! A phase of training: its steps in their order, each the same number on every rank whatever data the rank has. The kinds
//! of steps are in `expert_step`, `router_step` and `joint_step`; what they have in common is here.

use std::ops::ControlFlow;

use serde::{Deserialize, Serialize};

use super::engine::{Engine, share};
use super::fault::Point;
use super::identify::Choices;
use super::progress::Progress;
use super::replicas;
use super::trainer::Trainer;
use crate::backend::Backend;
use crate::config::{Mode, RunConfig, Schedule};
use crate::data::{self, MicroBatch};
use crate::exit::{self, Failure, Result};
use crate::experts::{ExpertId, Selection};
use crate::model::{ParamId, ParamKind, expert_params};
use crate::optim::{LearningRates, LrPlan};
use crate::report::Phase;

/// What one optimizer step did. The losses are those before the update.
#[derive(Debug, Clone, Default)]
pub struct StepResult {
    /// Mean cross-entropy over the step's loss tokens.
    pub ce_loss: Option<f64>,
    /// The alignment loss.
    pub router_loss: Option<f64>,
    /// What was minimised.
    pub total_loss: f64,
    /// The rate of this step (of the experts, in the joint schedule).
    pub lr: f64,
    /// Global L2 norm of the gradient before clipping.
    pub grad_norm: f64,
    /// Tokens that went through the model on all ranks.
    pub tokens: usize,
    /// Why nothing was updated: what was not finite.
    pub skipped: Option<String>,
    /// Whether some rank was asked to save and leave.
    pub stop: bool,
}

/// A phase under way on one rank.
pub struct PhaseRun<B: Backend> {
    /// Which: not identification, which trains nothing.
    pub phase: Phase,
    /// From 0.
    pub round: usize,
    /// Steps of the whole phase.
    pub total: usize,
    /// The parameters on their way.
    pub trainer: Trainer<B>,
    /// What is known after the steps that are done.
    pub so_far: SoFar,
    /// The experts that are trained.
    pub selected: Vec<ExpertId>,
    /// Router phase: for each record the one with its safe prompt.
    pub(super) partners: Vec<usize>,
}

/// What a phase carries from step to step beside weights and optimizer; the same on all ranks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct SoFar {
    /// Steps that are done.
    pub steps: usize,
    /// Total losses of the steps that updated.
    pub losses: Vec<f64>,
    /// Steps that were skipped since the last that updated.
    pub skipped_in_a_row: usize,
    /// The choices of experts, where each step makes one.
    pub choices: Choices,
}

/// The records of one micro-batch. In the joint phase, `safe` of them, in front, stand for their safe examples; all others
/// stand for their unsafe ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    /// Indices of records.
    pub records: Vec<usize>,
    /// How many in front are safe examples.
    pub safe: usize,
}

/// Receives each step of a phase as it is done. What it answers, the same on all ranks, decides whether the phase goes on.
pub type OnStep<'a, B> = &'a mut dyn FnMut(&mut Engine<'_, B>, &PhaseRun<B>, &StepResult) -> Result<ControlFlow<()>>;

/// What all ranks have to know of a step before they begin.
pub(super) struct Agreed {
    /// Tokens that carry loss.
    pub targets: f64,
    /// All tokens.
    pub tokens: usize,
    /// Whether some rank was asked to save and leave.
    pub stop: bool,
}

/// A phase's kind of step, in words.
fn name(phase: Phase) -> &'static str {
    match phase {
        Phase::Identify => "identification",
        Phase::Expert => "expert",
        Phase::Router => "router",
        Phase::Joint => "joint",
    }
}

impl RunConfig {
    /// Micro-batches of a rank in one step of a phase. The router phase compares whole batches and accumulates nothing.
    fn accum(&self, phase: Phase) -> usize {
        if phase == Phase::Router { 1 } else { self.grad_accum }
    }

    /// Passes over the data in a phase.
    fn epochs(&self, phase: Phase) -> usize {
        if phase == Phase::Router { self.router_epochs_per_round } else { self.expert_epochs_per_round }
    }
}

impl<B: Backend> Engine<'_, B> {
    /// Begins a phase of `round` (from 0) at its first step.
    ///
    /// # Errors
    /// Data that the phase cannot work with.
    pub fn begin(&self, phase: Phase, round: usize, selected: &[ExpertId]) -> Result<PhaseRun<B>> {
        let ids = match phase {
            Phase::Router => self.routers(),
            Phase::Joint => self.trainable_jointly(selected),
            _ if self.selects_per_batch() => Vec::new(),
            _ => self.trainable_experts(selected),
        };
        Ok(PhaseRun {
            phase,
            round,
            total: self.steps(phase),
            trainer: Trainer::new(self, &ids),
            so_far: SoFar::default(),
            selected: selected.to_vec(),
            partners: if phase == Phase::Router { self.prompt_pairs()?.0 } else { Vec::new() },
        })
    }

    /// Takes the steps that are left of a phase.
    ///
    /// # Errors
    /// A failure of this rank or another; too many steps in a row with numbers that are not finite.
    pub fn train(
        &mut self,
        run: &mut PhaseRun<B>,
        bar: &Progress<'_>,
        on_step: OnStep<'_, B>,
    ) -> Result<ControlFlow<()>> {
        let per_step = self.config.accum(run.phase) * self.step_ranks;
        let epochs = self.config.epochs(run.phase);
        let mut order = (usize::MAX, Vec::new());
        while run.so_far.steps < run.total {
            let steps_an_epoch = run.total / epochs;
            let (epoch, step) = (run.so_far.steps / steps_an_epoch, run.so_far.steps % steps_an_epoch);
            if order.0 != epoch {
                order = (epoch, self.order(run.phase, run.round * epochs + epoch)?);
            }
            let group = order.1.chunks(per_step).nth(step).expect("an order has micro-batches for its steps");
            let what = format!("round {}, {} step {}", run.round + 1, name(run.phase), run.so_far.steps + 1);
            self.world.doing(&what);
            let result = self.step(run, group, &what)?;
            self.count(run, &result)?;
            bar.step(result.tokens, format!("loss {:.4}", result.total_loss));
            if on_step(self, run, &result)?.is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }

    fn step(&mut self, run: &mut PhaseRun<B>, group: &[Batch], what: &str) -> Result<StepResult> {
        self.poisoned = false;
        self.pass(Point::Step)?;
        if self.selects_per_batch() && run.phase != Phase::Router {
            let unsafe_: Vec<_> = group.iter().map(|batch| batch.records[batch.safe..].to_vec()).collect();
            let found = match self.find(&unsafe_, run.round, &Progress::hidden()) {
                // All ranks have seen all losses, and skip the step together.
                Err(failure) if failure.code() == exit::NOT_FINITE => {
                    let skipped = Some(failure.to_string());
                    return Ok(StepResult { total_loss: f64::NAN, skipped, ..StepResult::default() });
                }
                found => found?,
            };
            run.selected.clone_from(&found.selected.experts);
            let ids = match run.phase {
                Phase::Joint => self.trainable_jointly(&run.selected),
                _ => self.trainable_experts(&run.selected),
            };
            run.trainer.choose(self, &ids);
            run.so_far.choices.add(found);
        }
        match run.phase {
            Phase::Router => self.router_step(run, group, what),
            Phase::Joint => self.joint_step(run, group, what),
            _ => self.expert_step(run, group, what),
        }
    }

    /// Takes a step into the account of its phase.
    fn count(&self, run: &mut PhaseRun<B>, result: &StepResult) -> Result<()> {
        run.so_far.steps += 1;
        let Some(reason) = &result.skipped else {
            run.so_far.losses.push(result.total_loss);
            run.so_far.skipped_in_a_row = 0;
            return Ok(());
        };
        run.so_far.skipped_in_a_row += 1;
        if run.so_far.skipped_in_a_row > self.config.max_skipped_steps {
            let skipped = run.so_far.skipped_in_a_row - 1;
            let before = if skipped == 0 { String::new() } else { format!(" (as in the {skipped} steps before)") };
            return Err(Failure::new(exit::NOT_FINITE, format!("{reason}{before}")));
        }
        Ok(())
    }

    /// The end of every step: agrees on the gradient's size, and updates, or (on all ranks alike) skips an update that
    /// would not be finite. `result` holds the losses, which are those of the global batch.
    pub(super) fn finish(
        &mut self,
        run: &mut PhaseRun<B>,
        rates: LearningRates,
        group: &[Batch],
        what: &str,
        mut result: StepResult,
    ) -> Result<StepResult> {
        let config = self.config;
        let total_steps = run.total;
        let plan = LrPlan { schedule: config.lr_schedule, warmup_steps: config.warmup_steps, total_steps };
        let factor = plan.factor(run.so_far.steps);
        let rates = rates.scaled(factor);
        result.lr = if run.phase == Phase::Router { rates.router } else { rates.expert };
        let norm = run.trainer.norm(self)?;
        result.grad_norm = norm.value;
        let blame = match norm.blame {
            _ if !result.total_loss.is_finite() => Some((result.total_loss, format!("the loss of {what}"))),
            Some(id) => Some((norm.value, format!("the gradient of {} in {what}", self.model.table.params[id].name()))),
            None => None,
        };
        match blame {
            None => {
                if self.config.check_replicas > 0 && (run.so_far.steps + 1).is_multiple_of(self.config.check_replicas) {
                    // Before the update, which replaces the weights of this step on all ranks.
                    replicas::check(self)?;
                }
                run.trainer.update(self, &rates, norm.value)?;
            }
            Some((value, blame)) => {
                let records: Vec<usize> = group.iter().flat_map(|batch| batch.records.iter().copied()).collect();
                result.skipped = Some(self.not_finite(value, &blame, &records).to_string());
            }
        }
        Ok(result)
    }

    /// Loss targets and tokens of a step's batches over all ranks, and whether any rank was asked to stop.
    pub(super) fn agree<'m>(&self, own: impl IntoIterator<Item = &'m MicroBatch>) -> Result<Agreed> {
        let mut sums = [0.0, 0.0, f64::from(u8::from(self.stop.is_asked()))];
        for batch in own {
            sums[0] += batch.targets.len() as f64;
            sums[1] += batch.ids.len() as f64;
        }
        self.world.all_reduce_f64(&mut sums)?;
        Ok(Agreed { targets: sums[0], tokens: sums[1] as usize, stop: sums[2] > 0.0 })
    }

    /// This rank's micro-batches of a step.
    pub(super) fn own<'g>(&self, group: &'g [Batch]) -> impl Iterator<Item = &'g Batch> + use<'g, B> {
        share(group, &*self.world).map(|(_, batch)| batch)
    }

    /// The rates of experts and routers, each its own.
    pub(super) fn rates(&self) -> LearningRates {
        let (expert, router) = (self.config.expert_lr, self.config.router_lr);
        LearningRates { expert, router, other: expert }
    }

    // --- what is trained, and in which order ---------------------------------------------------------------------

    /// The parameters that the expert phase trains, in the table's order.
    pub fn trainable_experts(&self, selected: &[ExpertId]) -> Vec<ParamId> {
        let table = &self.model.table;
        let all = 0..table.params.len();
        let mut ids: Vec<ParamId> = match self.config.mode {
            Mode::Baseline => all.collect(),
            Mode::Experts => all.filter(|&id| matches!(table.params[id].kind, ParamKind::Expert(..))).collect(),
            Mode::Selective => selected.iter().flat_map(|id| expert_params(table, id.layer, id.expert)).collect(),
        };
        ids.sort_unstable();
        ids
    }

    /// Whether the experts are chosen anew at every step.
    pub fn selects_per_batch(&self) -> bool {
        self.config.selection == Selection::PerBatch && self.config.mode == Mode::Selective
    }

    /// All routers, in the table's order.
    pub fn routers(&self) -> Vec<ParamId> {
        let id = |&l: &usize| self.model.table.id(ParamKind::Router(l)).expect("a layer that routes has a router");
        self.moe_layers().layers.iter().map(id).collect()
    }

    /// Steps of a phase in a round; the same on every rank.
    pub fn steps(&self, phase: Phase) -> usize {
        let micro_batches = match phase {
            Phase::Router => {
                let prompts = self.data.records.iter().filter(|r| r.unsafe_prompt.is_some()).count();
                prompts.div_ceil(self.config.batch_size)
            }
            Phase::Joint => self.unsafe_replies().len().div_ceil(self.config.batch_size - self.safe_a_batch()),
            _ => self.unsafe_replies().len().div_ceil(self.config.batch_size),
        };
        let per_step = self.config.accum(phase) * self.step_ranks;
        self.config.epochs(phase) * micro_batches.div_ceil(per_step)
    }

    /// The micro-batches of one pass over the data, on all ranks together.
    fn order(&self, phase: Phase, epoch: usize) -> Result<Vec<Batch>> {
        let plain = |batches: Vec<Vec<usize>>| batches.into_iter().map(|records| Batch { records, safe: 0 }).collect();
        Ok(match phase {
            Phase::Router => {
                let (_, with_unsafe) = self.prompt_pairs()?;
                let order = data::order(with_unsafe.len(), self.config.shuffle, self.config.seed, epoch as u64);
                let order: Vec<_> = order.into_iter().map(|i| with_unsafe[i]).collect();
                plain(data::micro_batches(&order, self.config.batch_size))
            }
            Phase::Joint => self.joint_order(epoch)?,
            _ => plain(self.identify_order(epoch)),
        })
    }

    /// The phase that trains experts in this run, if one does.
    pub fn expert_phase(&self) -> Option<Phase> {
        match self.config.schedule {
            Schedule::Joint => Some(Phase::Joint),
            Schedule::Alternate => self.config.finetune_unsafe_experts.then_some(Phase::Expert),
        }
    }
}
