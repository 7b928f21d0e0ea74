//! The joint phase: experts and routers in one step, by cross-entropy plus the weighted divergence between the batch's own
//! safe and unsafe examples.

use super::alignment::{GlobalAlignment, Side, align, watch};
use super::engine::Engine;
use super::phase::{Batch, PhaseRun, StepResult};
use crate::backend::Backend;
use crate::data::{self, MicroBatch};
use crate::exit::{self, Failure, Result};
use crate::experts::ExpertId;
use crate::model::{Forward, Inputs, LossGrads, ParamId, PassEnd};
use crate::routers::{ConsistencyLayers, KlType, Statistic};

/// A joint micro-batch whose forward pass waits for the other micro-batches of its step.
struct JointPass<B: Backend> {
    inputs: Inputs<B>,
    forward: Forward<B>,
    safe: Side,
    unsafe_: Side,
}

impl<B: Backend> Engine<'_, B> {
    pub(super) fn joint_step(&mut self, run: &mut PhaseRun<B>, group: &[Batch], what: &str) -> Result<StepResult> {
        let layers = self.moe_layers();
        let own: Vec<_> = self.own(group).map(|batch| (self.pack_jointly(batch), batch.safe)).collect();
        let agreed = self.agree(own.iter().map(|(batch, _)| batch))?;
        let end = PassEnd::Loss { all_rows: true };

        // The divergence is that of the step's whole batch, so every forward comes before the first backward.
        let passes: Vec<JointPass<B>> = own
            .iter()
            .map(|(batch, safe)| {
                let inputs = self.inputs(batch);
                let packing = &batch.packing;
                let mut unsafe_ = self.side(Statistic::TokenProbs, packing, *safe..packing.len());
                let mut safe = self.side(Statistic::TokenProbs, packing, 0..*safe);
                let mut observer = watch(self, &layers, vec![&mut safe, &mut unsafe_]);
                let forward = self.forward(&inputs, Some(&run.trainer.plan), end, Some(&mut observer));
                drop(observer);
                JointPass { inputs, forward, safe, unsafe_ }
            })
            .collect();

        let weight = self.config.router_consistency_weight;
        let mut router_loss = None;
        let mut routers = vec![Vec::new(); passes.len()];
        if self.config.use_router_consistency_loss {
            let places: Vec<usize> = match self.config.router_consistency_layers {
                ConsistencyLayers::All => layers.places(),
                ConsistencyLayers::UnsafeOnly => {
                    let holds = |p: &usize| run.selected.iter().any(|id| id.layer == layers.layers[*p]);
                    layers.places().into_iter().filter(holds).collect()
                }
            };
            let kl = self.config.router_consistency_type;
            let alignment = align_passes(self, kl, &passes, &places)?;
            if let Some(alignment) = &alignment {
                for (routers, pass) in routers.iter_mut().zip(&passes) {
                    *routers = alignment.through_both(&pass.safe, &pass.unsafe_, &layers, weight);
                }
            }
            router_loss = alignment.map(|a| a.loss());
        }

        let ce_scale = (1.0 / agreed.targets.max(1.0)) as f32;
        let last = passes.len();
        let sum: f64 = run.trainer.accumulate(self, |backward| {
            let pass = |(i, (pass, routers)): (usize, (JointPass<B>, &Vec<_>))| {
                let loss = LossGrads { ce_scale, routers };
                backward.backward(&self.model, &pass.inputs, pass.forward, loss, i + 1 == last).expect("a pass to the loss")
            };
            passes.into_iter().zip(&routers).enumerate().map(pass).sum()
        })?;
        let mut sum = [sum];
        self.world.all_reduce_f64(&mut sum)?;
        let ce_loss = sum[0] / agreed.targets.max(1.0);
        let result = StepResult {
            ce_loss: Some(ce_loss),
            router_loss,
            total_loss: ce_loss + weight * router_loss.unwrap_or(0.0),
            tokens: agreed.tokens,
            stop: agreed.stop,
            ..StepResult::default()
        };
        self.finish(run, self.rates(), group, what, result)
    }

    /// The parameters that a joint step trains, in the table's order.
    pub(super) fn trainable_jointly(&self, selected: &[ExpertId]) -> Vec<ParamId> {
        let mut ids = Vec::new();
        if self.config.finetune_unsafe_experts {
            ids.extend(self.trainable_experts(selected));
        }
        if !self.config.skip_router_training {
            ids.extend(self.routers());
        }
        ids.sort_unstable();
        ids.dedup(); // mode `baseline` has the routers already
        ids
    }

    /// Safe examples in a joint micro-batch: `batch_size · safe_ratio`, rounded, at least one of each kind.
    pub(super) fn safe_a_batch(&self) -> usize {
        let batch = self.config.batch_size;
        ((batch as f64 * self.config.safe_ratio).round() as usize).clamp(1, batch.max(2) - 1)
    }

    /// Joint micro-batches of one pass over the unsafe examples; safe ones are taken in turn, from the front again where
    /// they run out. A last micro-batch with fewer unsafe examples has as many fewer safe ones.
    pub(super) fn joint_order(&self, epoch: usize) -> Result<Vec<Batch>> {
        let records = &self.data.records;
        let config = self.config;
        let shuffled = |ids: Vec<usize>| -> Vec<usize> {
            let order = data::order(ids.len(), config.shuffle, config.seed, epoch as u64);
            order.into_iter().map(|i| ids[i]).collect()
        };
        let unsafe_ = shuffled(self.unsafe_replies());
        let safe = shuffled((0..records.len()).filter(|&i| records[i].safe_reply.is_some()).collect());
        if safe.is_empty() {
            return Err(Failure::new(
                exit::CONFIG,
                "the joint schedule needs safe examples beside unsafe ones, and the data hold none: add rows with the \
                 label safe, or take --schedule alternate",
            ));
        }
        let safe_a_batch = self.safe_a_batch();
        let unsafe_a_batch = config.batch_size - safe_a_batch;
        let mut safe = safe.into_iter().cycle();
        let batches = unsafe_.chunks(unsafe_a_batch).map(|unsafe_| {
            let wanted = (unsafe_.len() * safe_a_batch).div_ceil(unsafe_a_batch);
            let safe: Vec<_> = safe.by_ref().take(wanted).collect();
            Batch { safe: safe.len(), records: [&safe, unsafe_].concat() }
        });
        Ok(batches.collect())
    }

    fn pack_jointly(&self, batch: &Batch) -> MicroBatch {
        let (safe, unsafe_) = batch.records.split_at(batch.safe);
        let records = &self.data.records;
        let safe = safe.iter().filter_map(|&i| records[i].safe_reply.as_ref());
        MicroBatch::of_examples(safe.chain(unsafe_.iter().filter_map(|&i| records[i].unsafe_reply.as_ref())))
    }
}

/// [`align`] over the passes of a joint step.
fn align_passes<B: Backend>(
    engine: &Engine<'_, B>,
    kl: KlType,
    passes: &[JointPass<B>],
    places: &[usize],
) -> Result<Option<GlobalAlignment>> {
    let safe: Vec<&Side> = passes.iter().map(|p| &p.safe).collect();
    let unsafe_: Vec<&Side> = passes.iter().map(|p| &p.unsafe_).collect();
    align(&*engine.world, kl, &safe, &unsafe_, places, engine.model.config.num_experts)
}
