//! The expert phase: cross-entropy of the refusals, given the unsafe prompts.

use super::identification::{Identification, find};
use super::objective::{Losses, Objective};
use super::recipe::{ExpertPhase, Identify, Phase};
use super::replica::Replica;
use super::trainer::Trainer;
use crate::backend::Backend;
use crate::data::Sampler;
use crate::exit::Result;
use crate::experts::{ExpertId, Selection};
use crate::model::{LossGrads, ParamId, ParamTable, PassEnd};
use crate::optim::LearningRates;

/// Trains experts (or all parameters) by cross-entropy.
pub struct ExpertCrossEntropy<'a> {
    /// The options of the phase.
    pub phase: &'a ExpertPhase,
    /// How experts are selected, in runs that select at each step.
    pub identify: &'a Identify,
    /// The rows.
    pub sampler: Sampler<'a>,
    /// The selected experts.
    pub selected: Vec<ExpertId>,
}

impl<B: Backend> Objective<B> for ExpertCrossEntropy<'_> {
    type Batch = Vec<usize>;

    fn phase(&self) -> Phase {
        Phase::Expert
    }

    fn epochs(&self) -> usize {
        self.phase.epochs
    }

    fn grad_accum(&self) -> usize {
        self.phase.grad_accum
    }

    /// One rate for everything: a phase that trains all parameters trains the routers at this rate too.
    fn rates(&self) -> LearningRates {
        let lr = self.phase.lr;
        LearningRates { expert: lr, router: lr, other: lr }
    }

    fn params(&self, table: &ParamTable) -> Vec<ParamId> {
        self.phase.trained.params(table, &self.selected)
    }

    fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        self.sampler.unsafe_order(epoch)
    }

    fn examples(&self, batch: &Vec<usize>) -> usize {
        batch.len()
    }

    fn describe_rows(&self, step: &[Vec<usize>]) -> String {
        self.sampler.describe_rows(&step.concat())
    }

    fn select(&mut self, replica: &Replica<B>, step: &[Vec<usize>]) -> Result<Option<Identification>> {
        if self.phase.selection == Selection::Global {
            return Ok(None);
        }
        let found = find(replica, self.identify, self.sampler, step.to_vec())?;
        self.selected.clone_from(&found.selected.experts);
        Ok(Some(found))
    }

    /// The gradient of Σ cross-entropy / n, where n counts the tokens with loss of all ranks: it does not depend on how the
    /// global batch is spread over micro-batches and ranks.
    fn backward(&self, replica: &Replica<B>, own: &[&Vec<usize>], trainer: &mut Trainer<B>) -> Result<Losses> {
        let batches: Vec<_> = own.iter().map(|records| self.sampler.pack_unsafe(records)).collect();
        let totals = replica.sum_step_totals(&batches)?;
        let ce_scale = (1.0 / totals.divisor()) as f32;
        let with_loss: Vec<_> = batches.iter().filter(|batch| !batch.targets.is_empty()).collect();

        let sum: f64 = trainer.accumulate(replica, |step| {
            let mut sum = 0.0;
            for (i, batch) in with_loss.iter().enumerate() {
                let inputs = replica.inputs(batch);
                let forward = step.forward(&inputs, PassEnd::Loss { all_rows: false }, None);
                let loss = LossGrads { ce_scale, routers: &[] };
                sum += step.backward(&inputs, forward, loss, i + 1 == with_loss.len()).expect("a pass to the loss");
            }
            sum
        })?;

        let mut sum = [sum];
        replica.world.all_reduce_f64(&mut sum)?;
        let loss = sum[0] / totals.divisor();
        Ok(Losses { ce: Some(loss), router: None, total: loss, tokens: totals.tokens, stop: totals.stop })
    }
}
