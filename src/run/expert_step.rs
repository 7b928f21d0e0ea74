//! The expert phase: cross-entropy of the unsafe prompts with their refusals.

use super::engine::Engine;
use super::phase::{Batch, PhaseRun, StepResult};
use crate::backend::Backend;
use crate::exit::Result;
use crate::model::{LossGrads, PassEnd};
use crate::optim::LearningRates;

impl<B: Backend> Engine<'_, B> {
    pub(super) fn expert_step(&mut self, run: &mut PhaseRun<B>, group: &[Batch], what: &str) -> Result<StepResult> {
        let batches: Vec<_> = self.own(group).map(|batch| self.pack_unsafe(&batch.records)).collect();
        let agreed = self.agree(&batches)?;
        let ce_scale = (1.0 / agreed.targets.max(1.0)) as f32;
        let with_loss: Vec<_> = batches.iter().filter(|b| !b.targets.is_empty()).collect();
        let plan = run.trainer.plan.clone();
        let sum: f64 = run.trainer.accumulate(self, |passes| {
            let pass = |(i, batch)| {
                let inputs = self.inputs(batch);
                let forward = self.forward(&inputs, Some(&plan), PassEnd::Loss { all_rows: false }, None);
                let loss = LossGrads { ce_scale, routers: &[] };
                passes.backward(&self.model, &inputs, forward, loss, i + 1 == with_loss.len()).expect("a pass to the loss")
            };
            with_loss.iter().copied().enumerate().map(pass).sum()
        })?;
        let mut sum = [sum];
        self.world.all_reduce_f64(&mut sum)?;
        let loss = sum[0] / agreed.targets.max(1.0);
        // Mode `baseline` trains all parameters at this rate, the routers too.
        let lr = self.config.expert_lr;
        let rates = LearningRates { expert: lr, router: lr, other: lr };
        let (tokens, stop) = (agreed.tokens, agreed.stop);
        let result = StepResult { ce_loss: Some(loss), total_loss: loss, tokens, stop, ..StepResult::default() };
        self.finish(run, rates, group, what, result)
    }
}
