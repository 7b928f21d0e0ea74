//! What a training phase minimises: one trait, and an implementation for each kind of phase.

use super::identification::Identification;
use super::recipe::Phase;
use super::replica::Replica;
use super::trainer::Trainer;
use crate::backend::Backend;
use crate::exit::Result;
use crate::model::{ParamId, ParamTable};
use crate::optim::LearningRates;

/// What a training phase minimises, and the order of its data. A training step ([`super::TrainingPhase::step`]) knows nothing
/// else of a phase: a new kind of training is a new implementation.
pub trait Objective<B: Backend> {
    /// The records of one micro-batch of one rank.
    type Batch;

    /// The phase, as logs and checkpoints name it.
    fn phase(&self) -> Phase;

    /// Passes over the data.
    fn epochs(&self) -> usize;

    /// Micro-batches of a rank in one step.
    fn grad_accum(&self) -> usize;

    /// Learning rates before the schedule.
    fn rates(&self) -> LearningRates;

    /// The learning rate in the log, of a step with these rates.
    fn logged_rate(&self, rates: &LearningRates) -> f64 {
        rates.expert
    }

    /// The forward passes of one step on a rank that runs `per_rank` micro-batches where others run one (after a resume on fewer
    /// ranks): (micro-batches packed into one pass, passes that wait for their backward at the same time).
    fn forwards(&self, per_rank: usize) -> (usize, usize) {
        let _ = per_rank;
        (1, 1)
    }

    /// The parameters that the next step trains, in the table's order.
    fn params(&self, table: &ParamTable) -> Vec<ParamId>;

    /// The micro-batches of one pass over the data, on all ranks together. `epoch` counts from 0 over all rounds.
    fn epoch(&self, epoch: usize) -> Vec<Self::Batch>;

    /// Examples that a micro-batch trains on.
    fn examples(&self, batch: &Self::Batch) -> usize;

    /// `rows at lines 3, 7 of rows.jsonl`, for errors.
    fn describe_rows(&self, step: &[Self::Batch]) -> String;

    /// Computes what the phase needs once, before its first step. Nothing by default.
    ///
    /// # Errors
    /// Those of the collective.
    fn prepare(&mut self, _: &Replica<B>) -> Result<()> {
        Ok(())
    }

    /// What [`Self::prepare`] computed, for a checkpoint within the phase; the same on all ranks.
    fn prepared(&self) -> Option<Vec<u8>> {
        None
    }

    /// Restores [`Self::prepared`] of a checkpoint.
    ///
    /// # Errors
    /// Content that is missing or does not fit.
    fn restore_prepared(&mut self, _: &Replica<B>, _bytes: Option<&[u8]>) -> Result<()> {
        Ok(())
    }

    /// Selects experts from the micro-batches of the coming step (of all ranks), in runs that select at each step; then
    /// [`Self::params`] answers for that selection.
    ///
    /// # Errors
    /// A loss or a score that is not finite (on all ranks); those of the selection and of the collective.
    fn select(&mut self, _: &Replica<B>, _step: &[Self::Batch]) -> Result<Option<Identification>> {
        Ok(None)
    }

    /// The forward and backward passes of this rank's micro-batches of a step. Leaves the summed gradient in `trainer`, and
    /// returns the losses of the global batch, the same on all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    fn backward(&self, replica: &Replica<B>, own: &[&Self::Batch], trainer: &mut Trainer<B>) -> Result<Losses>;
}

/// The losses of one step's global batch, before the update.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Losses {
    /// Mean cross-entropy over the tokens with loss, in nats.
    pub ce: Option<f64>,
    /// The alignment or consistency loss, in nats.
    pub router: Option<f64>,
    /// What is minimised.
    pub total: f64,
    /// Tokens of the forward passes of all ranks.
    pub tokens: usize,
    /// Whether the stop flag of some rank was set at the start of the step.
    pub stop: bool,
}
