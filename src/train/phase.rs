//! A training phase: the steps of one objective, in their order. Every rank takes the same number of steps, whatever its
//! share of the data.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::check_replicas::check_replicas;
use super::expert_load::ExpertLoads;
use super::fault::Point;
use super::identification::StepSelections;
use super::objective::{Losses, Objective};
use super::recipe::{Phase, Updates};
use super::replica::{Replica, share};
use super::retention::{Retained, Retention};
use super::scan::NonFinite;
use super::trainer::Trainer;
use crate::backend::Backend;
use crate::exit::{self, Failure, Result};
use crate::experts;
use crate::optim::{LearningRates, LrPlan, ParamState};

/// A phase under way on one rank.
pub struct TrainingPhase<'a, B: Backend, O: Objective<B>> {
    objective: O,
    updates: &'a Updates,
    /// From 0.
    round: usize,
    trainer: Trainer<B>,
    progress: PhaseProgress,
    steps_per_epoch: usize,
    /// Examples of each micro-batch of an epoch; the same in every epoch.
    sizes: Vec<usize>,
    retention: Option<Arc<Retention<'a, B>>>,
    /// The number of the present epoch, and its micro-batches that are left.
    epoch: Option<(usize, std::vec::IntoIter<O::Batch>)>,
}

/// What a phase carries from step to step besides weights and optimizer; the same on all ranks.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct PhaseProgress {
    /// Steps that are done.
    pub steps: usize,
    /// Total losses of the steps that updated.
    pub losses: Vec<f64>,
    /// Steps that were skipped since the last update.
    pub skipped_in_a_row: usize,
    /// Tokens of each expert in these steps. Checkpoints of earlier versions have none: those before a resume are then missing.
    #[serde(default)]
    pub loads: ExpertLoads,
    /// The selections, where each step makes one.
    #[serde(rename = "choices")]
    pub selections: StepSelections,
}

/// What one optimizer step did. The losses are those before the update.
#[derive(Debug, Clone, Default)]
pub struct StepResult {
    /// Mean cross-entropy over the step's tokens with loss, in nats.
    pub ce_loss: Option<f64>,
    /// The alignment or consistency loss, in nats.
    pub router_loss: Option<f64>,
    /// Mean cross-entropy or divergence of the retain rows, in nats.
    pub retain_loss: Option<f64>,
    /// Mean divergence of the routing of the retain rows, in nats.
    pub retain_routing_loss: Option<f64>,
    /// What is minimised.
    pub total_loss: f64,
    /// The learning rate of this step: of the routers in the router phase, of the experts in others. 0 if the selection of the
    /// step failed.
    pub lr: f64,
    /// Global L2 norm of the gradient before clipping. 0 if the selection of the step failed.
    pub grad_norm: f64,
    /// Tokens of the forward passes of all ranks.
    pub tokens: usize,
    /// How these tokens were spread over the experts; empty if the selection of the step failed.
    pub loads: ExpertLoads,
    /// Why nothing was updated: which number was not finite.
    pub skipped: Option<String>,
    /// Whether the stop flag of some rank was set.
    pub stop: bool,
}

/// Whether a selection failed because a loss or a score is not finite. All ranks see the same losses and scores.
fn is_non_finite(failure: &Failure) -> bool {
    let score = failure.find::<experts::Error>();
    failure.is::<NonFinite>() || score.is_some_and(|error| matches!(error, experts::Error::NotFinite { .. }))
}

impl<'a, B: Backend, O: Objective<B>> TrainingPhase<'a, B, O> {
    /// A phase of `round` (from 0) before its first step, with zero moments.
    pub fn new(objective: O, updates: &'a Updates, round: usize, replica: &Replica<B>) -> Self {
        let micro_batches = objective.epoch(round * objective.epochs());
        let sizes: Vec<usize> = micro_batches.iter().map(|batch| objective.examples(batch)).collect();
        let per_step = objective.grad_accum() * replica.step_world_size;
        Self {
            trainer: Trainer::new(replica, &objective.params(&replica.model().table)),
            objective,
            updates,
            round,
            progress: PhaseProgress::default(),
            steps_per_epoch: sizes.len().div_ceil(per_step),
            sizes,
            retention: None,
            epoch: None,
        }
    }

    /// The phase with the retention loss added to each step.
    pub fn with_retention(self, retention: Option<Arc<Retention<'a, B>>>) -> Self {
        Self { retention, ..self }
    }

    /// Computes what the objective needs once, before the first step.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn prepare(&mut self, replica: &Replica<B>) -> Result<()> {
        replica.world.set_activity(&format!("preparing the {} phase", self.phase().name()));
        self.objective.prepare(replica)
    }

    /// Resumes after the steps of a checkpoint, with this rank's shard of its optimizer state, and with what was prepared
    /// before the first step.
    ///
    /// # Errors
    /// A state that does not fit this model.
    pub fn restore(
        &mut self,
        replica: &Replica<B>,
        progress: PhaseProgress,
        optimizer: impl IntoIterator<Item = ParamState>,
        prepared: Option<&[u8]>,
    ) -> Result<()> {
        if progress.steps > self.total_steps() {
            let (done, total) = (progress.steps, self.total_steps());
            let message = format!("the checkpoint has {done} steps of this phase done, but it has {total}");
            return Err(Failure::new(exit::DATA, message));
        }
        if !progress.loads.fits(&replica.moe_layers().layers, replica.model().config.num_experts) {
            let message = "the loads of the checkpoint are not those of this model's layers and experts: the checkpoint is damaged; \
                           start again with --overwrite";
            return Err(Failure::new(exit::DATA, message));
        }
        self.progress = progress;
        self.objective.restore_prepared(replica, prepared)?;
        for state in optimizer {
            self.trainer.import(replica, &state)?;
        }
        Ok(())
    }

    /// Which phase this is.
    pub fn phase(&self) -> Phase {
        self.objective.phase()
    }

    /// Steps of the whole phase.
    pub fn total_steps(&self) -> usize {
        self.steps_per_epoch * self.objective.epochs()
    }

    /// What the phase carries from step to step.
    pub fn progress(&self) -> &PhaseProgress {
        &self.progress
    }

    /// Whether all steps are done.
    pub fn is_done(&self) -> bool {
        self.progress.steps == self.total_steps()
    }

    /// What the phase minimises.
    pub fn objective(&self) -> &O {
        &self.objective
    }

    /// The optimizer state of the phase.
    pub fn trainer(&self) -> &Trainer<B> {
        &self.trainer
    }

    /// Takes the next step.
    ///
    /// # Errors
    /// Too many consecutive steps with a number that is not finite; ranks whose weights differ; those of the collective.
    pub fn step(&mut self, replica: &mut Replica<B>) -> Result<StepResult> {
        let step_name = self.enter_step(replica)?;
        let batches = self.take_batches(replica);

        if let Err(not_finite) = self.select(replica, &batches)? {
            let skipped = Some(not_finite.to_string());
            return self.count(StepResult { total_loss: f64::NAN, skipped, ..StepResult::default() });
        }
        replica.world.set_activity(&step_name);
        let own: Vec<&O::Batch> = share(&batches, &*replica.world).map(|(_, batch)| batch).collect();
        self.prepare_retain_rows(replica, batches.len())?;
        replica.count_loads();
        let losses = self.objective.backward(replica, &own, &mut self.trainer)?;
        let retained = self.retained(replica)?;
        let losses = Losses { total: losses.total + retained.total, tokens: losses.tokens + retained.tokens, ..losses };
        let loads = replica.take_loads()?;
        let norm = self.trainer.norm(replica)?;

        // All ranks hold the same losses and norm: they update or skip together.
        let not_finite = match norm.not_finite {
            _ if !losses.total.is_finite() => Some((losses.total, format!("the loss of {step_name}"))),
            Some(id) => {
                let tensor = replica.model().table.params[id].name();
                Some((norm.value, format!("the gradient of {tensor} in {step_name}")))
            }
            None => None,
        };
        let rates = self.rates();
        let skipped = match not_finite {
            Some((value, what)) => {
                Some(NonFinite { what, value, rows: self.objective.describe_rows(&batches) }.to_string())
            }
            None => {
                self.check_replicas_if_due(replica)?;
                self.trainer.update(replica, &rates, norm.value, self.updates)?;
                None
            }
        };
        let Losses { ce, router, total, tokens, stop } = losses;
        let lr = self.objective.logged_rate(&rates);
        self.count(StepResult {
            ce_loss: ce,
            router_loss: router,
            retain_loss: retained.loss,
            retain_routing_loss: retained.routing,
            total_loss: total,
            lr,
            grad_norm: norm.value,
            tokens,
            loads,
            skipped,
            stop,
        })
    }

    /// Announces the next step: its name is in the errors of all ranks.
    fn enter_step(&self, replica: &mut Replica<B>) -> Result<String> {
        let (round, step) = (self.round + 1, self.progress.steps + 1);
        let step_name = format!("round {round}, {} step {step}", self.objective.phase().name());
        replica.world.set_activity(&step_name);
        replica.inject_nan = false;
        replica.visit(Point::Step)?;
        Ok(step_name)
    }

    /// The micro-batches of the next step, of all ranks.
    fn take_batches(&mut self, replica: &Replica<B>) -> Vec<O::Batch> {
        let (epoch, step) = (self.progress.steps / self.steps_per_epoch, self.progress.steps % self.steps_per_epoch);
        let per_step = self.objective.grad_accum() * replica.step_world_size;
        if self.epoch.as_ref().is_none_or(|(at, _)| *at != epoch) {
            let mut batches = self.objective.epoch(self.round * self.objective.epochs() + epoch);
            batches.drain(..step * per_step); // done before the checkpoint that was resumed
            self.epoch = Some((epoch, batches.into_iter()));
        }
        let (_, left) = self.epoch.as_mut().expect("made above");
        left.take(per_step).collect()
    }

    /// Selects the experts of this step, in runs that select at each step. The inner error: a loss or a score is not finite.
    fn select(&mut self, replica: &Replica<B>, batches: &[O::Batch]) -> Result<Result<(), Failure>> {
        match self.objective.select(replica, batches) {
            Err(failure) if is_non_finite(&failure) => return Ok(Err(failure)),
            Err(failure) => return Err(failure),
            Ok(None) => {}
            Ok(Some(found)) => {
                self.trainer.set_trainable(replica, &self.objective.params(&replica.model().table));
                self.progress.selections.add(found);
            }
        }
        Ok(Ok(()))
    }

    /// Gives the trainer the retain rows of the next step, which has `count` micro-batches: for each of them as many rows as it
    /// has examples. The first is the number of examples that all earlier steps of this phase took, in earlier rounds too.
    fn prepare_retain_rows(&mut self, replica: &Replica<B>, count: usize) -> Result<()> {
        let Some(retention) = &self.retention else { return Ok(()) };
        let (epoch, step) = (self.progress.steps / self.steps_per_epoch, self.progress.steps % self.steps_per_epoch);
        let epochs_before = self.round * self.objective.epochs() + epoch;
        let (before, rest) = self.sizes.split_at(step * self.objective.grad_accum() * replica.step_world_size);
        let first = epochs_before * self.sizes.iter().sum::<usize>() + before.iter().sum::<usize>();
        self.trainer.set_retain(retention.step(replica, first, &rest[..count])?);
        Ok(())
    }

    /// The retention losses of the step's global batch.
    fn retained(&mut self, replica: &Replica<B>) -> Result<Retained> {
        match (&self.retention, self.trainer.take_retained()) {
            (Some(retention), Some((step, sums))) => retention.reduce(replica, &step, sums),
            _ => Ok(Retained::default()),
        }
    }

    /// The learning rates of the next step.
    fn rates(&self) -> LearningRates {
        let Updates { lr_schedule: schedule, warmup_steps, .. } = *self.updates;
        let plan = LrPlan { schedule, warmup_steps, total_steps: self.total_steps() };
        self.objective.rates().scaled(plan.factor(self.progress.steps))
    }

    /// Compares the weights of all ranks every `check_replicas` steps: before the update, which overwrites the evidence.
    fn check_replicas_if_due(&self, replica: &Replica<B>) -> Result<()> {
        let every = self.updates.check_replicas;
        if every > 0 && (self.progress.steps + 1).is_multiple_of(every) { check_replicas(replica) } else { Ok(()) }
    }

    /// Counts a step.
    fn count(&mut self, result: StepResult) -> Result<StepResult> {
        let progress = &mut self.progress;
        progress.steps += 1;
        progress.loads.add(&result.loads);
        let Some(reason) = &result.skipped else {
            progress.losses.push(result.total_loss);
            progress.skipped_in_a_row = 0;
            return Ok(result);
        };
        progress.skipped_in_a_row += 1;
        if progress.skipped_in_a_row > self.updates.max_skipped_steps {
            let skipped = progress.skipped_in_a_row - 1;
            let before = if skipped == 0 { String::new() } else { format!(" (as in the {skipped} steps before)") };
            return Err(Failure::new(exit::NOT_FINITE, format!("{reason}{before}")));
        }
        Ok(result)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_numbers_that_are_not_finite_skip_a_selection() {
        let (id, value) = ((0, 1).into(), f64::INFINITY);
        let score = Failure::from(experts::Error::NotFinite { id, value });
        let loss =
            Failure::from(NonFinite { what: "the loss".into(), value: f64::NAN, rows: "rows at lines 1".into() });
        let others = [
            Failure::from(experts::Error::NothingToScore { what: "a token" }),
            Failure::new(exit::NOT_FINITE, "the same exit code, another error"),
        ];
        assert!(is_non_finite(&score) && is_non_finite(&loss.context("in step 3")));
        assert!(!others.iter().any(is_non_finite));
    }
}
