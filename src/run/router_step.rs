//! The router phase: the safe prompts give the target, the unsafe ones follow it, by two forward passes a step.

use super::alignment::{Side, align, refs, watch};
use super::engine::{Engine, share};
use super::phase::{Batch, PhaseRun, StepResult};
use crate::backend::{Backend, Packing};
use crate::data::{self, MicroBatch};
use crate::exit::{self, Failure, Result};
use crate::model::{LossGrads, PassEnd};
use crate::routers::Statistic;

impl<B: Backend> Engine<'_, B> {
    pub(super) fn router_step(&mut self, run: &mut PhaseRun<B>, group: &[Batch], what: &str) -> Result<StepResult> {
        let layers = self.moe_layers();
        let own: Vec<usize> = self.own(group).flat_map(|batch| batch.records.iter().copied()).collect();
        let (safe, unsafe_) = self.pack_pairs(&run.partners, &own);
        let agreed = self.agree([&safe, &unsafe_])?;
        let safe = self.observe_side(&safe);

        let mut sides = Vec::new();
        let mut passed = None;
        if !unsafe_.ids.is_empty() {
            let inputs = self.inputs(&unsafe_);
            let mut side = self.side(self.config.router_statistic, &unsafe_.packing, 0..unsafe_.packing.len());
            let mut observer = watch(self, &layers, vec![&mut side]);
            let forward = self.forward(&inputs, Some(&run.trainer.plan), PassEnd::Routers, Some(&mut observer));
            drop(observer);
            sides.push(side);
            passed = Some((inputs, forward));
        }
        let experts = self.model.config.num_experts;
        let alignment =
            align(&*self.world, self.config.kl_type, &refs(&safe), &refs(&sides), &layers.places(), experts)?
                .expect("a router step has safe and unsafe prompts on some rank");
        run.trainer.accumulate(self, |passes| {
            if let Some((inputs, forward)) = passed {
                let routers = alignment.through_unsafe(&sides[0], &layers, 1.0);
                let loss = LossGrads { ce_scale: 0.0, routers: &routers };
                passes.backward(&self.model, &inputs, forward, loss, true);
            }
        })?;
        let result = StepResult {
            router_loss: Some(alignment.loss()),
            total_loss: alignment.loss(),
            tokens: agreed.tokens,
            stop: agreed.stop,
            ..StepResult::default()
        };
        self.finish(run, self.rates(), group, what, result)
    }

    /// The alignment loss over the whole set in file order, without gradient: mean over micro-batches.
    pub fn measure_alignment(&self) -> Result<f64> {
        let layers = self.measure_alignment_by_layer()?;
        Ok(layers.iter().sum::<f64>() / layers.len() as f64)
    }

    /// The same for each layer that routes: its mean over micro-batches. All of them count the same, the last one too.
    pub fn measure_alignment_by_layer(&self) -> Result<Vec<f64>> {
        let layers = self.moe_layers();
        let (partners, with_unsafe) = self.prompt_pairs()?;
        let mut sums = vec![0.0; layers.layers.len()];
        let mut steps = 0.0;
        for group in data::micro_batches(&with_unsafe, self.config.batch_size).chunks(self.step_ranks) {
            let own: Vec<usize> = share(group, &*self.world).flat_map(|(_, records)| records.iter().copied()).collect();
            let (safe, unsafe_) = self.pack_pairs(&partners, &own);
            let (safe, unsafe_) = (self.observe_side(&safe), self.observe_side(&unsafe_));
            let experts = self.model.config.num_experts;
            let places = layers.places();
            if let Some(a) = align(&*self.world, self.config.kl_type, &refs(&safe), &refs(&unsafe_), &places, experts)?
            {
                sums.iter_mut().zip(a.by_layer()).for_each(|(sum, kl)| *sum += kl);
                steps += 1.0;
            }
        }
        sums.iter_mut().for_each(|sum| *sum /= f64::max(steps, 1.0));
        Ok(sums)
    }

    /// (for each record the one with its safe prompt, records with an unsafe prompt).
    pub(super) fn prompt_pairs(&self) -> Result<(Vec<usize>, Vec<usize>)> {
        let partners = self.safe_partners(|r| r.safe_prompt.is_some()).ok_or_else(|| {
            Failure::new(
                exit::CONFIG,
                "router alignment compares safe with unsafe prompts, and the data hold no safe ones: add rows with the \
                 label safe, or give --skip-router-training",
            )
        })?;
        let records = &self.data.records;
        let with_unsafe = (0..records.len()).filter(|&i| records[i].unsafe_prompt.is_some()).collect();
        Ok((partners, with_unsafe))
    }

    /// The safe and the unsafe prompts of these records; both are empty where there are none.
    fn pack_pairs(&self, partners: &[usize], own: &[usize]) -> (MicroBatch, MicroBatch) {
        let records = &self.data.records;
        let safe = MicroBatch::of_prompts(own.iter().filter_map(|&i| records[partners[i]].safe_prompt.as_deref()));
        let unsafe_ = MicroBatch::of_prompts(own.iter().filter_map(|&i| records[i].unsafe_prompt.as_deref()));
        (safe, unsafe_)
    }

    pub(super) fn side(&self, kind: Statistic, packing: &Packing, sequences: std::ops::Range<usize>) -> Side {
        Side::new(kind, self.moe_layers().layers.len(), self.model.config.num_experts, packing, sequences)
    }

    /// The statistic of one side by a forward pass that keeps nothing; none for an empty batch.
    fn observe_side(&self, batch: &MicroBatch) -> Vec<Side> {
        if batch.ids.is_empty() {
            return Vec::new();
        }
        let layers = self.moe_layers();
        let mut side = self.side(self.config.router_statistic, &batch.packing, 0..batch.packing.len());
        self.forward(&self.inputs(batch), None, PassEnd::Routers, Some(&mut watch(self, &layers, vec![&mut side])));
        vec![side]
    }
}
