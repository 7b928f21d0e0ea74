//! The router phase: the routing of the safe prompts is the target of the routing of the unsafe ones, by two forward passes a
//! step.

use super::alignment::{RoutingSide, align, refs, watch};
use super::objective::{Losses, Objective};
use super::recipe::{Divergence, Phase, RouterPhase, router_params};
use super::replica::{Replica, share};
use super::router_target::PromptRouting;
use super::trainer::Trainer;
use crate::backend::Backend;
use crate::data::{MicroBatch, MissingSide, Sampler, micro_batches};
use crate::exit::Result;
use crate::meter::{Meter, Unit};
use crate::model::{LossGrads, ParamId, ParamTable, PassEnd};
use crate::optim::LearningRates;
use crate::routers::{self, RouterTarget};

/// Trains routers by the divergence between the routing of safe and of unsafe prompts.
pub struct RouterAlignment<'a> {
    phase: &'a RouterPhase,
    sampler: Sampler<'a>,
    /// For each record the one with its safe prompt.
    partners: Vec<usize>,
    /// The routing of the safe prompts at the start of the phase, if that is the target.
    target: Option<PromptRouting>,
}

impl<'a> RouterAlignment<'a> {
    /// The objective over these rows.
    ///
    /// # Errors
    /// Rows without a safe prompt.
    pub fn new(phase: &'a RouterPhase, sampler: Sampler<'a>) -> Result<Self, MissingSide> {
        Ok(Self { phase, sampler, partners: sampler.prompt_partners()?, target: None })
    }
}

impl<B: Backend> Objective<B> for RouterAlignment<'_> {
    type Batch = Vec<usize>;

    fn phase(&self) -> Phase {
        Phase::Router
    }

    fn epochs(&self) -> usize {
        self.phase.epochs
    }

    /// The loss compares whole global batches, which are not sums over micro-batches.
    fn grad_accum(&self) -> usize {
        1
    }

    fn rates(&self) -> LearningRates {
        let lr = self.phase.lr;
        LearningRates { expert: lr, router: lr, other: lr }
    }

    fn logged_rate(&self, rates: &LearningRates) -> f64 {
        rates.router
    }

    /// All prompts of a rank are packed into one pass a side.
    fn forwards(&self, per_rank: usize) -> (usize, usize) {
        (per_rank, 1)
    }

    fn params(&self, table: &ParamTable) -> Vec<ParamId> {
        router_params(table)
    }

    fn epoch(&self, epoch: usize) -> Vec<Vec<usize>> {
        self.sampler.prompt_order(epoch)
    }

    fn examples(&self, batch: &Vec<usize>) -> usize {
        batch.len()
    }

    fn describe_rows(&self, step: &[Vec<usize>]) -> String {
        self.sampler.describe_rows(&step.concat())
    }

    /// The target of `--router-target round-start`, by a forward pass over the safe prompts.
    fn prepare(&mut self, replica: &Replica<B>) -> Result<()> {
        if self.phase.target == RouterTarget::RoundStart {
            self.target = Some(PromptRouting::compute(replica, self.sampler, &self.partners, self.phase.divergence)?);
        }
        Ok(())
    }

    fn prepared(&self) -> Option<Vec<u8>> {
        self.target.as_ref().map(PromptRouting::to_bytes)
    }

    fn restore_prepared(&mut self, replica: &Replica<B>, bytes: Option<&[u8]>) -> Result<()> {
        if self.phase.target == RouterTarget::RoundStart {
            let (layers, experts) = (replica.moe_layers().layers.len(), replica.model().config.num_experts);
            let bytes = bytes.unwrap_or_default();
            self.target = Some(PromptRouting::from_bytes(bytes, &self.partners, layers, experts)?);
        }
        Ok(())
    }

    fn backward(&self, replica: &Replica<B>, own: &[&Vec<usize>], trainer: &mut Trainer<B>) -> Result<Losses> {
        let divergence = self.phase.divergence;
        let (layers, experts) = (replica.moe_layers(), replica.model().config.num_experts);
        let records: Vec<usize> = own.iter().copied().flatten().copied().collect();
        let (safe, unsafe_) = self.sampler.pack_prompts(&self.partners, &records);
        assert!(self.phase.target == RouterTarget::Current || self.target.is_some(), "prepared before the first step");
        let (totals, safe) = match &self.target {
            None => {
                (replica.sum_step_totals([&safe, &unsafe_])?, observe(replica, divergence, &safe).into_iter().collect())
            }
            Some(target) => {
                let partners: Vec<usize> = records.iter().map(|&i| self.partners[i]).collect();
                let side = target.side(divergence, layers.layers.len(), experts, &partners);
                (replica.sum_step_totals([&unsafe_])?, vec![side])
            }
        };

        let mut sides = Vec::new();
        let mut pass = None;
        if !unsafe_.ids.is_empty() {
            let inputs = replica.inputs(&unsafe_);
            let mut side = empty_side(replica, divergence, &unsafe_);
            let mut observer = watch(replica, vec![&mut side]);
            let forward = trainer.forward(replica, &inputs, PassEnd::Routers, Some(&mut observer));
            drop(observer);
            sides.push(side);
            pass = Some((inputs, forward));
        }
        let alignment = align(&*replica.world, divergence.kl, &refs(&safe), &refs(&sides), &layers.indices(), experts)?
            .expect("a router step has safe and unsafe prompts on some rank");

        trainer.accumulate(replica, |step| {
            if let Some((inputs, forward)) = pass {
                let routers = alignment.through_unsafe(&sides[0], layers, 1.0);
                step.backward(&inputs, forward, LossGrads { ce_scale: 0.0, routers: &routers }, true);
            }
        })?;
        let loss = alignment.loss();
        Ok(Losses { ce: None, router: Some(loss), total: loss, tokens: totals.tokens, stop: totals.stop })
    }
}

/// The alignment loss of each MoE layer over the whole data in file order, without gradient: the mean over the micro-batches,
/// all weighted the same, the last one too. The same bits on all ranks and for any world size.
///
/// # Errors
/// Rows without a safe prompt; those of the collective.
pub fn alignment_by_layer<B: Backend>(
    replica: &Replica<B>,
    sampler: Sampler<'_>,
    divergence: Divergence,
) -> Result<Vec<f64>> {
    let layers = replica.moe_layers().layers.len();
    let partners = sampler.prompt_partners()?;
    let micro_batches = micro_batches(&sampler.unsafe_prompts(), sampler.batch_size);
    let mut own = Vec::new();
    let rows = share(&micro_batches, &*replica.world).map(|(_, records)| records.len() as u64).sum();
    let meter = Meter::start("measuring the routers", Unit::Rows, rows);
    for (i, records) in share(&micro_batches, &*replica.world) {
        meter.add(records.len());
        let (safe, unsafe_) = sampler.pack_prompts(&partners, records);
        let safe = observe(replica, divergence, &safe).expect("a safe prompt of each record");
        let unsafe_ = observe(replica, divergence, &unsafe_).expect("an unsafe prompt of each record");
        let alignment = routers::alignment(divergence.kl, &safe.into_statistics(), &unsafe_.into_statistics())
            .expect("both sides have tokens");
        own.extend(alignment.per_layer.into_iter().enumerate().map(|(layer, kl)| (i * layers + layer, kl)));
    }
    let all = replica.gather_by_index(micro_batches.len() * layers, &own)?;
    let mean = |layer| all.iter().skip(layer).step_by(layers).sum::<f64>() / micro_batches.len().max(1) as f64;
    Ok((0..layers).map(mean).collect())
}

/// An empty statistic over all sequences of a packed batch.
fn empty_side<B: Backend>(replica: &Replica<B>, divergence: Divergence, batch: &MicroBatch) -> RoutingSide {
    let Divergence { statistic, last_tokens, .. } = divergence;
    let (layers, experts) = (replica.moe_layers().layers.len(), replica.model().config.num_experts);
    RoutingSide::new(statistic, last_tokens, layers, experts, &batch.packing, 0..batch.packing.len())
}

/// The statistic of a packed batch by a forward pass that keeps nothing; `None` for an empty batch.
fn observe<B: Backend>(replica: &Replica<B>, divergence: Divergence, batch: &MicroBatch) -> Option<RoutingSide> {
    if batch.ids.is_empty() {
        return None;
    }
    let mut side = empty_side(replica, divergence, batch);
    replica.forward(&replica.inputs(batch), None, PassEnd::Routers, Some(&mut watch(replica, vec![&mut side])));
    Some(side)
}
