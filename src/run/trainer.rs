//! The parameters of a phase on their way through one step: gradient buffer, agreement over ranks, update.

use super::engine::Engine;
use crate::backend::Backend;
use crate::exit::Result;
use crate::model::{GradPlan, ParamId, ParamKind, Sinks};
use crate::optim::{AdamW, Gradient, Group, LearningRates, LrPlan, Trainable, clip_factor};

/// What a phase trains. Each phase begins with fresh moments.
pub struct Trainer<B: Backend> {
    optimizer: AdamW<B>,
    /// What the present step's backward computes.
    pub plan: GradPlan,
    gradients: Vec<Gradient>,
    grads: B::Buffer,
    scores: B::Scores,
}

impl<B: Backend> Trainer<B> {
    /// Trains these parameters.
    pub fn new(engine: &Engine<'_, B>, ids: &[ParamId]) -> Self {
        let b = &*engine.model.backend;
        let plan = GradPlan::train(&engine.model.table, engine.model.config.layers.len(), &[]);
        let (grads, scores) = (b.buffer(0), b.scores(0));
        let mut trainer = Self { optimizer: AdamW::new(), plan, gradients: Vec::new(), grads, scores };
        trainer.choose(engine, ids);
        trainer
    }

    /// From the next step on trains these; others keep their value and their moments until they are chosen again.
    pub fn choose(&mut self, engine: &Engine<'_, B>, ids: &[ParamId]) {
        let (b, model) = (&*engine.model.backend, &engine.model);
        let trainables: Vec<_> = ids
            .iter()
            .map(|&param| {
                let spec = &model.table.params[param];
                let group = match spec.kind {
                    ParamKind::Expert(..) => Group::Expert,
                    ParamKind::Router(_) => Group::Router,
                    _ => Group::Other,
                };
                Trainable { param, len: spec.value.len(), group }
            })
            .collect();
        self.optimizer.add(b, model.weights(), &trainables);
        let old = self.plan.len();
        self.plan = GradPlan::train(&model.table, model.config.layers.len(), ids);
        let offset = |param| self.plan.slot(param).expect("a trained parameter has a slot");
        self.gradients = ids.iter().map(|&param| Gradient { param, offset: offset(param) }).collect();
        if self.plan.len() != old {
            self.grads = b.buffer(0); // the old one goes before the new one comes
            self.grads = b.buffer(self.plan.len());
        }
    }

    /// Zeroes the gradients for the next step.
    pub fn clear(&mut self, engine: &Engine<'_, B>) {
        engine.model.backend.buffer_clear(&mut self.grads);
    }

    /// Where a backward pass puts its gradients.
    pub fn sinks(&mut self) -> Sinks<'_, B> {
        Sinks { plan: &self.plan, grads: &mut self.grads, scores: &mut self.scores }
    }

    /// Adds up the gradients of all ranks; their global L2 norm.
    ///
    /// # Errors
    /// A norm that is not finite, with the first tensor to blame.
    pub fn reduce(&mut self, engine: &Engine<'_, B>, what: &str, records: &[usize]) -> Result<f64> {
        let b = &*engine.model.backend;
        if engine.world.world_size() > 1 {
            let mut values = b.buffer_read(&self.grads, 0..self.plan.len());
            engine.world.all_reduce_f32(&mut values)?;
            b.buffer_write(&mut self.grads, 0, &values);
        }
        // By parameter, so that the sum does not depend on how the buffer is cut.
        let mut squares = 0.0;
        for &Gradient { param, offset } in &self.gradients {
            let spec = &engine.model.table.params[param];
            let sum = b.sum_squares(&self.grads, offset..offset + spec.value.len());
            engine.check_finite(sum, &format!("the gradient of {} in {what}", spec.name()), records)?;
            squares += sum;
        }
        Ok(squares.sqrt())
    }

    /// One AdamW update in step `step` of `total` (from 0) at `rates` times the schedule's factor, clipped by the options;
    /// that factor.
    pub fn update(
        &mut self,
        engine: &mut Engine<'_, B>,
        rates: LearningRates,
        step: usize,
        total: usize,
        grad_norm: f64,
    ) -> f64 {
        let config = engine.config;
        let schedule = LrPlan { schedule: config.lr_schedule, warmup_steps: config.warmup_steps, total_steps: total };
        let factor = schedule.factor(step);
        let LearningRates { expert, router, other } = rates;
        let lrs = LearningRates { expert: expert * factor, router: router * factor, other: other * factor };
        let scale = clip_factor(grad_norm, config.max_grad_norm);
        let b = engine.model.backend.clone();
        self.optimizer.step(
            &b,
            engine.model.weights_mut(),
            &self.grads,
            &self.gradients,
            &lrs,
            config.weight_decay,
            scale,
        );
        for &Gradient { param, .. } in &self.gradients {
            engine.touched.insert(param);
        }
        factor
    }
}
