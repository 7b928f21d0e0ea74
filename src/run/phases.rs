//! The phases of a round: expert training, router alignment, and both jointly. Each walks the same number of steps on every
//! rank, whatever data the rank has, and every rank acts on sums that all agreed on.

use super::alignment::{GlobalAlignment, Side, align, watch};
use super::engine::{Engine, share};
use super::identify::{Choices, Identification};
use super::progress::Progress;
use super::trainer::Trainer;
use crate::backend::{Backend, Packing};
use crate::config::{Mode, Schedule};
use crate::data::{self, MicroBatch};
use crate::exit::{self, Failure, Result};
use crate::experts::{ExpertId, Selection};
use crate::model::{Forward, Inputs, LossGrads, ParamId, ParamKind, PassEnd, expert_params};
use crate::optim::LearningRates;
use crate::routers::{ConsistencyLayers, KlType, Statistic};

/// What one optimizer step did. The losses are those before the update.
#[derive(Debug, Clone, Copy, Default)]
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
}

/// Receives each step of a phase: its number from 1, and what it did.
pub type OnStep<'a> = &'a mut dyn FnMut(usize, StepResult) -> Result<()>;

/// A joint micro-batch: safe examples first, then unsafe ones.
struct JointBatch {
    batch: MicroBatch,
    safe: usize,
    records: Vec<usize>,
}

/// A joint micro-batch whose forward pass waits for the other micro-batches of its step.
struct JointPass<B: Backend> {
    inputs: Inputs<B>,
    forward: Forward<B>,
    safe: Side,
    unsafe_: Side,
}

impl<B: Backend> Engine<'_, B> {
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

    /// Steps over `micro_batches` micro-batches, `accum` a rank and step; the same on every rank.
    fn steps(&self, micro_batches: usize, accum: usize) -> usize {
        micro_batches.div_ceil(accum * self.world.world_size())
    }

    /// Steps of the expert phase in a round (of the only phase, in the joint schedule).
    pub fn expert_steps(&self) -> usize {
        let examples_a_batch = match self.config.schedule {
            Schedule::Alternate => self.config.batch_size,
            Schedule::Joint => self.config.batch_size - self.safe_a_batch(),
        };
        let micro_batches = self.unsafe_replies().len().div_ceil(examples_a_batch);
        self.config.expert_epochs_per_round * self.steps(micro_batches, self.config.grad_accum)
    }

    /// Steps of the router phase in a round.
    pub fn router_steps(&self) -> usize {
        let prompts = self.data.records.iter().filter(|r| r.unsafe_prompt.is_some()).count();
        self.config.router_epochs_per_round * self.steps(prompts.div_ceil(self.config.batch_size), 1)
    }

    // --- experts -------------------------------------------------------------------------------------------------

    /// Cross-entropy of the unsafe prompts with their refusals. `round` counts from 0. With `--selection per-batch` the
    /// experts are chosen here, and what was found is returned.
    pub fn train_experts(
        &mut self,
        round: usize,
        selected: &[ExpertId],
        bar: &Progress<'_>,
        on_step: OnStep<'_>,
    ) -> Result<Option<Identification>> {
        let total = self.expert_steps();
        let per_batch = self.selects_per_batch();
        let first = if per_batch { Vec::new() } else { self.trainable_experts(selected) };
        let mut trainer = Trainer::new(self, &first);
        let mut choices = Choices::default();
        let mut step = 0;
        for epoch in 0..self.config.expert_epochs_per_round {
            let order = self.identify_order(round * self.config.expert_epochs_per_round + epoch);
            for group in order.chunks(self.config.grad_accum * self.world.world_size()) {
                if per_batch {
                    let found = self.find(group, round, &Progress::hidden())?;
                    trainer.choose(self, &self.trainable_experts(&found.selected.experts));
                    choices.add(found);
                }
                let result = self.expert_step(&mut trainer, group, step, total)?;
                step += 1;
                bar.step(result.tokens, format!("loss {:.4}", result.total_loss));
                on_step(step, result)?;
            }
        }
        Ok(choices.finish())
    }

    fn expert_step(
        &mut self,
        trainer: &mut Trainer<B>,
        group: &[Vec<usize>],
        step: usize,
        total: usize,
    ) -> Result<StepResult> {
        let what = format!("expert step {}", step + 1);
        let batches: Vec<_> = share(group, &*self.world).map(|s| self.pack_unsafe(s.records)).collect();
        let [targets, tokens] = self.agree_counts(&batches)?;
        let ce_scale = (1.0 / targets.max(1.0)) as f32;
        let mut sum = [0.0];
        trainer.clear(self);
        for batch in batches.iter().filter(|b| !b.targets.is_empty()) {
            let inputs = self.inputs(batch);
            let forward = self.forward(&inputs, Some(&trainer.plan), PassEnd::Loss { all_rows: false }, None);
            let grads = LossGrads { ce_scale, routers: &[] };
            sum[0] += self.model.backward(&inputs, forward, grads, &mut trainer.sinks()).expect("a pass to the loss");
        }
        self.world.all_reduce_f64(&mut sum)?;
        let loss = sum[0] / targets.max(1.0);
        let records = group.concat();
        self.check_finite(loss, &format!("the loss of {what}"), &records)?;
        let grad_norm = trainer.reduce(self, &what, &records)?;
        // Mode `baseline` trains all parameters at this rate, the routers too.
        let lr = self.config.expert_lr;
        let rates = LearningRates { expert: lr, router: lr, other: lr };
        let factor = trainer.update(self, rates, step, total, grad_norm);
        let lr = self.config.expert_lr * factor;
        Ok(StepResult {
            ce_loss: Some(loss),
            router_loss: None,
            total_loss: loss,
            lr,
            grad_norm,
            tokens: tokens as usize,
        })
    }

    /// Loss targets and tokens of these batches over all ranks.
    fn agree_counts<'m>(&self, batches: impl IntoIterator<Item = &'m MicroBatch>) -> Result<[f64; 2]> {
        let mut counts = [0.0; 2];
        for batch in batches {
            counts[0] += batch.targets.len() as f64;
            counts[1] += batch.ids.len() as f64;
        }
        self.world.all_reduce_f64(&mut counts)?;
        Ok(counts)
    }

    // --- routers -------------------------------------------------------------------------------------------------

    /// Two forward passes a step: the safe prompts give the target, the unsafe ones follow it.
    pub fn train_routers(&mut self, round: usize, bar: &Progress<'_>, on_step: OnStep<'_>) -> Result<()> {
        let total = self.router_steps();
        let (partners, with_unsafe) = self.prompt_pairs()?;
        let mut trainer = Trainer::new(self, &self.routers());
        let mut step = 0;
        for epoch in 0..self.config.router_epochs_per_round {
            let epoch = (round * self.config.router_epochs_per_round + epoch) as u64;
            let order = data::order(with_unsafe.len(), self.config.shuffle, self.config.seed, epoch);
            let order: Vec<_> = order.into_iter().map(|i| with_unsafe[i]).collect();
            for group in data::micro_batches(&order, self.config.batch_size).chunks(self.world.world_size()) {
                let result = self.router_step(&mut trainer, &partners, group, step, total)?;
                step += 1;
                bar.step(result.tokens, format!("KL {:.5}", result.total_loss));
                on_step(step, result)?;
            }
        }
        Ok(())
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
        for group in data::micro_batches(&with_unsafe, self.config.batch_size).chunks(self.world.world_size()) {
            let (safe, unsafe_) = self.pack_pairs(&partners, group);
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
    fn prompt_pairs(&self) -> Result<(Vec<usize>, Vec<usize>)> {
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

    /// This rank's safe and unsafe prompts of a step; both are empty where it has none.
    fn pack_pairs(&self, partners: &[usize], group: &[Vec<usize>]) -> (MicroBatch, MicroBatch) {
        let own: Vec<usize> = share(group, &*self.world).flat_map(|s| s.records.iter().copied()).collect();
        let records = &self.data.records;
        let safe = MicroBatch::of_prompts(own.iter().filter_map(|&i| records[partners[i]].safe_prompt.as_deref()));
        let unsafe_ = MicroBatch::of_prompts(own.iter().filter_map(|&i| records[i].unsafe_prompt.as_deref()));
        (safe, unsafe_)
    }

    fn side(&self, kind: Statistic, packing: &Packing, sequences: std::ops::Range<usize>) -> Side {
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

    fn router_step(
        &mut self,
        trainer: &mut Trainer<B>,
        partners: &[usize],
        group: &[Vec<usize>],
        step: usize,
        total: usize,
    ) -> Result<StepResult> {
        let what = format!("router step {}", step + 1);
        let layers = self.moe_layers();
        let (safe, unsafe_) = self.pack_pairs(partners, group);
        let [_, tokens] = self.agree_counts([&safe, &unsafe_])?;
        let safe = self.observe_side(&safe);

        let mut sides = Vec::new();
        let mut passed = None;
        if !unsafe_.ids.is_empty() {
            let inputs = self.inputs(&unsafe_);
            let mut side = self.side(self.config.router_statistic, &unsafe_.packing, 0..unsafe_.packing.len());
            let mut observer = watch(self, &layers, vec![&mut side]);
            let forward = self.forward(&inputs, Some(&trainer.plan), PassEnd::Routers, Some(&mut observer));
            drop(observer);
            sides.push(side);
            passed = Some((inputs, forward));
        }
        let experts = self.model.config.num_experts;
        let alignment =
            align(&*self.world, self.config.kl_type, &refs(&safe), &refs(&sides), &layers.places(), experts)?
                .expect("a router step has safe and unsafe prompts on some rank");
        let records = group.concat();
        self.check_finite(alignment.loss(), &format!("the alignment loss of {what}"), &records)?;

        trainer.clear(self);
        if let Some((inputs, forward)) = passed {
            let routers = alignment.through_unsafe(&sides[0], &layers, 1.0);
            let grads = LossGrads { ce_scale: 0.0, routers: &routers };
            self.model.backward(&inputs, forward, grads, &mut trainer.sinks());
        }
        let grad_norm = trainer.reduce(self, &what, &records)?;
        let factor = trainer.update(self, self.rates(), step, total, grad_norm);
        Ok(StepResult {
            ce_loss: None,
            router_loss: Some(alignment.loss()),
            total_loss: alignment.loss(),
            lr: self.config.router_lr * factor,
            grad_norm,
            tokens: tokens as usize,
        })
    }

    // --- both ----------------------------------------------------------------------------------------------------

    /// Experts and routers in one step: cross-entropy, plus the weighted divergence between the batch's own safe and unsafe
    /// examples where the consistency loss is on. With `--selection per-batch` the experts are chosen here, as in
    /// [`Self::train_experts`].
    pub fn train_jointly(
        &mut self,
        round: usize,
        selected: &[ExpertId],
        bar: &Progress<'_>,
        on_step: OnStep<'_>,
    ) -> Result<Option<Identification>> {
        let total = self.expert_steps();
        let per_batch = self.selects_per_batch();
        let mut trainer = Trainer::new(self, &self.trainable_jointly(selected));
        let mut choices = Choices::default();
        let mut selected = selected.to_vec();
        let mut step = 0;
        for epoch in 0..self.config.expert_epochs_per_round {
            let order = self.joint_order(round * self.config.expert_epochs_per_round + epoch)?;
            for group in order.chunks(self.config.grad_accum * self.world.world_size()) {
                if per_batch {
                    let unsafe_: Vec<_> = group.iter().map(|j| j.records[j.safe..].to_vec()).collect();
                    let found = self.find(&unsafe_, round, &Progress::hidden())?;
                    selected.clone_from(&found.selected.experts);
                    trainer.choose(self, &self.trainable_jointly(&selected));
                    choices.add(found);
                }
                let result = self.joint_step(&mut trainer, group, &selected, step, total)?;
                step += 1;
                bar.step(result.tokens, format!("loss {:.4}", result.total_loss));
                on_step(step, result)?;
            }
        }
        Ok(choices.finish())
    }

    /// The parameters that a joint step trains, in the table's order.
    fn trainable_jointly(&self, selected: &[ExpertId]) -> Vec<ParamId> {
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

    /// The rates of experts and routers, each its own.
    fn rates(&self) -> LearningRates {
        let (expert, router) = (self.config.expert_lr, self.config.router_lr);
        LearningRates { expert, router, other: expert }
    }

    /// Safe examples in a joint micro-batch: `batch_size · safe_ratio`, rounded, at least one of each kind.
    fn safe_a_batch(&self) -> usize {
        let batch = self.config.batch_size;
        ((batch as f64 * self.config.safe_ratio).round() as usize).clamp(1, batch.max(2) - 1)
    }

    /// Joint micro-batches of one pass over the unsafe examples; safe ones are taken in turn, from the front again where
    /// they run out. A last micro-batch with fewer unsafe examples has as many fewer safe ones.
    fn joint_order(&self, epoch: usize) -> Result<Vec<JointBatch>> {
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
            let examples = safe.iter().filter_map(|&i| records[i].safe_reply.as_ref());
            let examples = examples.chain(unsafe_.iter().filter_map(|&i| records[i].unsafe_reply.as_ref()));
            let batch = MicroBatch::of_examples(examples);
            JointBatch { batch, safe: safe.len(), records: [&safe, unsafe_].concat() }
        });
        Ok(batches.collect())
    }

    fn joint_step(
        &mut self,
        trainer: &mut Trainer<B>,
        group: &[JointBatch],
        selected: &[ExpertId],
        step: usize,
        total: usize,
    ) -> Result<StepResult> {
        let what = format!("joint step {}", step + 1);
        let layers = self.moe_layers();
        let own: Vec<_> = group.iter().skip(self.world.rank()).step_by(self.world.world_size()).collect();
        let [targets, tokens] = self.agree_counts(own.iter().map(|j| &j.batch))?;
        let end = PassEnd::Loss { all_rows: true };

        // The divergence is that of the step's whole batch, so every forward comes before the first backward.
        let passes: Vec<JointPass<B>> = own
            .iter()
            .map(|joint| {
                let inputs = self.inputs(&joint.batch);
                let packing = &joint.batch.packing;
                let mut safe = self.side(Statistic::TokenProbs, packing, 0..joint.safe);
                let mut unsafe_ = self.side(Statistic::TokenProbs, packing, joint.safe..packing.len());
                let mut observer = watch(self, &layers, vec![&mut safe, &mut unsafe_]);
                let forward = self.forward(&inputs, Some(&trainer.plan), end, Some(&mut observer));
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
                    let holds = |p: &usize| selected.iter().any(|id| id.layer == layers.layers[*p]);
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

        trainer.clear(self);
        let ce_scale = (1.0 / targets.max(1.0)) as f32;
        let mut sum = [0.0];
        for (pass, routers) in passes.into_iter().zip(&routers) {
            let grads = LossGrads { ce_scale, routers };
            let loss = self.model.backward(&pass.inputs, pass.forward, grads, &mut trainer.sinks());
            sum[0] += loss.expect("a pass to the loss");
        }
        self.world.all_reduce_f64(&mut sum)?;
        let ce_loss = sum[0] / targets.max(1.0);
        let total_loss = ce_loss + weight * router_loss.unwrap_or(0.0);
        let records: Vec<usize> = group.iter().flat_map(|j| j.records.iter().copied()).collect();
        self.check_finite(total_loss, &format!("the loss of {what}"), &records)?;
        let grad_norm = trainer.reduce(self, &what, &records)?;
        let factor = trainer.update(self, self.rates(), step, total, grad_norm);
        let lr = self.config.expert_lr * factor;
        Ok(StepResult { ce_loss: Some(ce_loss), router_loss, total_loss, lr, grad_norm, tokens: tokens as usize })
    }
}

fn refs(sides: &[Side]) -> Vec<&Side> {
    sides.iter().collect()
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
