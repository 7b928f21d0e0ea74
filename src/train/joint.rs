//! The joint phase: experts and routers in one step, by cross-entropy plus the weighted divergence between the safe and the
//! unsafe examples of the batch.

use super::alignment::{RoutingSide, align, watch};
use super::identification::{Identification, find};
use super::objective::{Losses, Objective};
use super::recipe::{Identify, JointPhase, Phase};
use super::replica::Replica;
use super::trainer::Trainer;
use crate::backend::Backend;
use crate::data::{JointBatch, MissingSide, Sampler};
use crate::exit::Result;
use crate::experts::{ExpertId, Selection};
use crate::model::{Forward, Inputs, LossGrads, ParamId, ParamTable, PassEnd};
use crate::optim::LearningRates;
use crate::routers::{ConsistencyLayers, Statistic};

/// Trains experts and routers by cross-entropy plus the in-batch consistency loss.
pub struct JointConsistency<'a> {
    phase: &'a JointPhase,
    identify: &'a Identify,
    sampler: Sampler<'a>,
    selected: Vec<ExpertId>,
}

/// A micro-batch whose forward pass waits for those of the step's other micro-batches.
struct Pass<B: Backend> {
    inputs: Inputs<B>,
    forward: Forward<B>,
    safe: RoutingSide,
    unsafe_: RoutingSide,
}

impl<'a> JointConsistency<'a> {
    /// The objective over these rows.
    ///
    /// # Errors
    /// Rows without a safe example.
    pub fn new(
        phase: &'a JointPhase,
        identify: &'a Identify,
        sampler: Sampler<'a>,
        selected: Vec<ExpertId>,
    ) -> Result<Self, MissingSide> {
        if !sampler.data.records.iter().any(|record| record.safe_reply.is_some()) {
            return Err(MissingSide::SafeExamples);
        }
        Ok(Self { phase, identify, sampler, selected })
    }

    /// Indices (among the MoE layers) of the layers in the consistency loss.
    fn layers<B: Backend>(&self, replica: &Replica<B>) -> Vec<usize> {
        let layers = replica.moe_layers();
        match self.phase.layers {
            ConsistencyLayers::All => layers.indices(),
            ConsistencyLayers::UnsafeOnly => {
                let holds_selected = |i: &usize| self.selected.iter().any(|id| id.layer == layers.layers[*i]);
                layers.indices().into_iter().filter(holds_selected).collect()
            }
        }
    }
}

impl<B: Backend> Objective<B> for JointConsistency<'_> {
    type Batch = JointBatch;

    fn phase(&self) -> Phase {
        Phase::Joint
    }

    fn epochs(&self) -> usize {
        self.phase.epochs
    }

    fn grad_accum(&self) -> usize {
        self.phase.grad_accum
    }

    fn rates(&self) -> LearningRates {
        self.phase.rates()
    }

    /// The divergence needs the forward passes of all micro-batches of a step before the first backward.
    fn forwards(&self, per_rank: usize) -> (usize, usize) {
        (1, self.phase.grad_accum * per_rank)
    }

    fn params(&self, table: &ParamTable) -> Vec<ParamId> {
        self.phase.params(table, &self.selected)
    }

    fn epoch(&self, epoch: usize) -> Vec<JointBatch> {
        self.sampler.joint_order(epoch, self.phase.safe_ratio).expect("checked when the objective was made")
    }

    fn examples(&self, batch: &JointBatch) -> usize {
        batch.safe.len() + batch.unsafe_.len()
    }

    fn describe_rows(&self, step: &[JointBatch]) -> String {
        let records: Vec<usize> = step.iter().flat_map(|b| b.safe.iter().chain(&b.unsafe_)).copied().collect();
        self.sampler.describe_rows(&records)
    }

    fn select(&mut self, replica: &Replica<B>, step: &[JointBatch]) -> Result<Option<Identification>> {
        if self.phase.selection == Selection::Global {
            return Ok(None);
        }
        let unsafe_ = step.iter().map(|batch| batch.unsafe_.clone()).collect();
        let found = find(replica, self.identify, self.sampler, unsafe_)?;
        self.selected.clone_from(&found.selected.experts);
        Ok(Some(found))
    }

    fn backward(&self, replica: &Replica<B>, own: &[&JointBatch], trainer: &mut Trainer<B>) -> Result<Losses> {
        let batches: Vec<_> = own.iter().map(|batch| self.sampler.pack_joint(batch)).collect();
        let totals = replica.sum_step_totals(&batches)?;
        let (layers, experts) = (replica.moe_layers(), replica.model().config.num_experts);

        // The divergence is that of the step's whole global batch: all forward passes come before the first backward.
        let passes: Vec<Pass<B>> = own
            .iter()
            .zip(&batches)
            .map(|(records, batch)| {
                let inputs = replica.inputs(batch);
                let (packing, first_unsafe) = (&batch.packing, records.safe.len());
                let side = |sequences| {
                    RoutingSide::new(Statistic::TokenProbs, None, layers.layers.len(), experts, packing, sequences)
                };
                let mut unsafe_ = side(first_unsafe..packing.len());
                let mut safe = side(0..first_unsafe);
                let mut observer = watch(replica, vec![&mut safe, &mut unsafe_]);
                let end = PassEnd::Loss { all_rows: true };
                let forward = trainer.forward(replica, &inputs, end, Some(&mut observer));
                drop(observer);
                Pass { inputs, forward, safe, unsafe_ }
            })
            .collect();

        let safe: Vec<&RoutingSide> = passes.iter().map(|pass| &pass.safe).collect();
        let unsafe_: Vec<&RoutingSide> = passes.iter().map(|pass| &pass.unsafe_).collect();
        let alignment = align(&*replica.world, self.phase.kl, &safe, &unsafe_, &self.layers(replica), experts)?;
        let routers: Vec<_> = match &alignment {
            None => vec![Vec::new(); passes.len()],
            // Without weight there is no gradient; the divergence is logged all the same.
            Some(_) if self.phase.weight == 0.0 => vec![Vec::new(); passes.len()],
            Some(alignment) => passes
                .iter()
                .map(|pass| alignment.through_both(&pass.safe, &pass.unsafe_, layers, self.phase.weight))
                .collect(),
        };

        let ce_scale = (1.0 / totals.divisor()) as f32;
        let last = passes.len();
        let sum: f64 = trainer.accumulate(replica, |step| {
            let mut sum = 0.0;
            for (i, (pass, routers)) in passes.into_iter().zip(&routers).enumerate() {
                let loss = LossGrads { ce_scale, routers };
                sum += step.backward(&pass.inputs, pass.forward, loss, i + 1 == last).expect("a pass to the loss");
            }
            sum
        })?;

        let mut sum = [sum];
        replica.world.all_reduce_f64(&mut sum)?;
        let ce = sum[0] / totals.divisor();
        let router = alignment.map(|a| a.loss());
        let total = ce + self.phase.weight * router.unwrap_or(0.0);
        Ok(Losses { ce: Some(ce), router, total, tokens: totals.tokens, stop: totals.stop })
    }
}
