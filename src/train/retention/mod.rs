//! Retention: keeps the model near the base model on rows that it answers well (benign requests with their replies).
//!
//! Each step of a training phase adds to the phase's loss, over a global batch of retain rows:
//!
//! ```text
//! W   · mean over the tokens with loss of −ln p[token] (ce) or KL(p_base ‖ p) over the vocabulary (kl)
//! W_r · mean over tokens and MoE layers of KL(softmax(z_base) ‖ softmax(z)) of the router logits z
//! ```
//!
//! For each micro-batch of the step there is one of as many retain rows as it has examples; they come in a seeded order that
//! starts again at its end. Which rows a step takes follows from its number alone, so it is the same after a resume and on any
//! number of ranks.

mod base;
mod drift;
mod rows;

pub use base::{BaseOutputs, BaseRow, compute_base};
pub use drift::{Drift, LayerDrift};
pub use rows::{RowDrift, drift_by_row, hidden_states};

use std::sync::Arc;

use super::recipe::{Retain, RetainLoss};
use super::replica::{Replica, share};
use super::step_backward::StepBackward;
use crate::backend::Backend;
use crate::data::{MicroBatch, Sampler, micro_batches, order};
use crate::exit::Result;
use crate::model::{BaseHead, LossGrads, PassEnd, Routed, RouterGrad};

/// Set in the epoch of the order of retain rows, so that it is independent of the order of the training rows.
const ORDER: u64 = 1 << 63;

/// The rows that retention uses: those of a data set that have a safe reply.
#[derive(Debug, Clone)]
pub struct RetainRows<'d> {
    sampler: Sampler<'d>,
    records: Vec<usize>,
}

impl<'d> RetainRows<'d> {
    /// The rows of `sampler.data` that have a safe reply, in file order.
    pub fn new(sampler: Sampler<'d>) -> Self {
        let records = (0..sampler.data.records.len()).filter(|&i| sampler.data.records[i].safe_reply.is_some());
        Self { sampler, records: records.collect() }
    }

    /// Number of rows.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.records.is_empty()
    }

    /// Packs these rows, which are counted from 0 in file order.
    pub fn pack(&self, rows: &[usize]) -> MicroBatch {
        self.sampler.pack_safe(&rows.iter().map(|&row| self.records[row]).collect::<Vec<_>>())
    }

    /// Tokens with loss, and all tokens.
    pub fn tokens(&self) -> [usize; 2] {
        let batches = self.in_order().into_iter().map(|rows| self.pack(&rows));
        batches.fold([0, 0], |[loss, all], batch| [loss + batch.targets.len(), all + batch.ids.len()])
    }

    /// A hash of the token ids and of the loss mask of every row.
    pub fn hash(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for row in 0..self.len() {
            let batch = self.pack(&[row]);
            for values in [&batch.ids, &batch.loss_rows] {
                hasher.update(&(values.len() as u64).to_le_bytes());
                values.iter().for_each(|value| _ = hasher.update(&value.to_le_bytes()));
            }
        }
        hasher.finalize()
    }

    /// The micro-batches of all rows in file order.
    fn in_order(&self) -> Vec<Vec<usize>> {
        micro_batches(&(0..self.len()).collect::<Vec<_>>(), self.sampler.batch_size)
    }

    /// Micro-batches of these sizes from row `first` of the endless seeded order on: one pass over the rows after another.
    fn batches(&self, first: usize, sizes: &[usize]) -> Vec<Vec<usize>> {
        let n = self.len();
        let mut pass: Option<(usize, Vec<usize>)> = None;
        let mut row = |at: usize| {
            let number = at / n;
            if pass.as_ref().is_none_or(|(present, _)| *present != number) {
                let seeded = order(n, self.sampler.shuffle, self.sampler.seed, ORDER | number as u64);
                pass = Some((number, seeded));
            }
            pass.as_ref().expect("made above").1[at % n]
        };
        let mut at = first;
        let mut batch = |size: &usize| {
            at += size;
            (at - size..at).map(&mut row).collect()
        };
        sizes.iter().map(&mut batch).collect()
    }
}

/// The retention of a run on one rank.
pub struct Retention<'a, B: Backend> {
    goal: Retain,
    rows: RetainRows<'a>,
    base: BaseOutputs,
    /// A copy of the base model's head, if the run trains the head.
    head: Option<Arc<B::Weight>>,
}

/// The retain rows of one step.
pub(super) struct RetainStep<B: Backend> {
    passes: Vec<RetainPass>,
    head: Option<Arc<B::Weight>>,
    loss: RetainLoss,
    /// Factor of the summed loss at the head; `None`: it is not computed.
    head_scale: Option<f32>,
    /// Factor of the summed divergence of the routers.
    router_scale: Option<f32>,
    loss_tokens: f64,
    /// Tokens of all ranks.
    tokens: usize,
    moe_layers: usize,
}

/// One micro-batch of this rank.
struct RetainPass {
    batch: MicroBatch,
    /// The base's hidden states, `[n, D]`; empty where the loss does not read them.
    hidden: Vec<f32>,
    /// The base's router logits, `[T, E]` for each MoE layer; empty where the loss does not read them.
    routers: Vec<Arc<[f32]>>,
}

/// The retention losses of a step's global batch.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Retained {
    /// Mean cross-entropy or divergence of the next-token distributions, in nats.
    pub loss: Option<f64>,
    /// Mean divergence of the routers, in nats.
    pub routing: Option<f64>,
    /// What is added to the phase's loss.
    pub total: f64,
    /// Tokens of the forward passes of all ranks.
    pub tokens: usize,
}

impl<'a, B: Backend> Retention<'a, B> {
    /// Retention with the outputs of the base model. `trains_head`: whether the run trains the head.
    pub fn new(goal: Retain, rows: RetainRows<'a>, base: BaseOutputs, replica: &Replica<B>, trains_head: bool) -> Self {
        let model = replica.model();
        let head = trains_head.then(|| Arc::new(model.table.weight(&*model.backend, model.head())));
        Self { goal, rows, base, head }
    }

    /// The rows.
    pub fn rows(&self) -> &RetainRows<'a> {
        &self.rows
    }

    /// The part of a step that takes micro-batches of these sizes from row `first` of the order on; `None` if both weights are 0.
    pub(super) fn step(&self, replica: &Replica<B>, first: usize, sizes: &[usize]) -> Result<Option<RetainStep<B>>> {
        let Retain { loss, weight, routing_weight } = self.goal;
        if weight == 0.0 && routing_weight == 0.0 {
            return Ok(None);
        }
        let moe_layers = replica.moe_layers().layers.len();
        let reads_hidden = weight > 0.0 && loss == RetainLoss::Kl;
        let pass = |rows: &Vec<usize>| RetainPass {
            batch: self.rows.pack(rows),
            hidden: if reads_hidden { self.base.hidden(rows) } else { Vec::new() },
            routers: match routing_weight > 0.0 {
                true => (0..moe_layers).map(|index| self.base.router_logits(rows, index)).collect(),
                false => Vec::new(),
            },
        };
        let batches = self.rows.batches(first, sizes);
        let passes: Vec<_> = share(&batches, &*replica.world).map(|(_, rows)| pass(rows)).collect();
        let totals = replica.sum_step_totals(passes.iter().map(|pass| &pass.batch))?;
        let per_router = totals.tokens as f64 * moe_layers as f64;
        Ok(Some(RetainStep {
            passes,
            head: self.head.clone(),
            loss,
            head_scale: (weight > 0.0).then_some((weight / totals.divisor()) as f32),
            router_scale: (routing_weight > 0.0).then_some((routing_weight / per_router) as f32),
            loss_tokens: totals.divisor(),
            tokens: totals.tokens,
            moe_layers,
        }))
    }

    /// The losses of a step from this rank's sums.
    pub(super) fn reduce(&self, replica: &Replica<B>, step: &RetainStep<B>, mut sums: [f64; 2]) -> Result<Retained> {
        replica.world.all_reduce_f64(&mut sums)?;
        let loss = step.head_scale.map(|_| sums[0] / step.loss_tokens);
        let routing = step.router_scale.map(|_| sums[1] / (step.tokens as f64 * step.moe_layers as f64));
        let total = self.goal.weight * loss.unwrap_or(0.0) + self.goal.routing_weight * routing.unwrap_or(0.0);
        Ok(Retained { loss, routing, total, tokens: step.tokens })
    }
}

impl<B: Backend> RetainStep<B> {
    /// Whether this rank has a pass.
    pub(super) fn has_passes(&self) -> bool {
        !self.passes.is_empty()
    }

    /// The forward and backward passes of this rank: adds their gradients to those of the step. Returns the sums of the loss at
    /// the head and of the divergence of the routers.
    pub(super) fn backward(&self, step: &mut StepBackward<'_, B>) -> [f64; 2] {
        let replica = step.replica();
        let (b, layers) = (&*replica.model().backend, replica.moe_layers());
        let mut sums = [0.0; 2];
        for (i, pass) in self.passes.iter().enumerate() {
            let last = i + 1 == self.passes.len();
            let at_head = self.head_scale.filter(|_| !pass.batch.targets.is_empty());
            let end = match (at_head, self.router_scale) {
                (None, None) => continue,
                (None, Some(_)) => PassEnd::Routers,
                (Some(_), routers) => PassEnd::Loss { all_rows: routers.is_some() },
            };
            let inputs = replica.inputs(&pass.batch);
            let mut observe = |routed: Routed<'_, B>| {
                sums[1] += b.softmax_kl(routed.logits, &pass.routers[layers.index_of(routed.layer)]);
            };
            let forward = match self.router_scale {
                Some(_) => step.forward(&inputs, end, Some(&mut observe)),
                None => step.forward(&inputs, end, None),
            };
            let mut routers = vec![None; layers.depth];
            for (base, &layer) in pass.routers.iter().zip(&layers.layers) {
                let scale = self.router_scale.unwrap_or(0.0);
                routers[layer] = Some(RouterGrad::SoftmaxKl { base: base.clone(), scale });
            }
            let ce = LossGrads { ce_scale: at_head.unwrap_or(0.0), routers: &routers };
            match at_head {
                Some(scale) if self.loss == RetainLoss::Kl => {
                    let d = replica.model().config.hidden_size;
                    let normed = b.upload(pass.batch.targets.len(), d, &pass.hidden);
                    let base = BaseHead { normed: &normed, head: self.head.as_deref() };
                    sums[0] += step.backward_kl(&inputs, forward, &base, scale, &routers, last);
                }
                _ => sums[0] += step.backward(&inputs, forward, ce, last).unwrap_or(0.0),
            }
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Dataset, Example, Record};
    use std::path::Path;

    fn record(line: usize, reply: bool) -> Record {
        Record {
            line,
            request: String::new(),
            unsafe_reply: None,
            safe_reply: reply.then(|| Example { ids: vec![1, 2, line as u32], loss: vec![false, false, true] }),
            unsafe_prompt: None,
            safe_prompt: None,
            unsafe_messages: Vec::new(),
            safe_messages: Vec::new(),
        }
    }

    #[test]
    fn the_order_visits_every_row_once_a_pass_and_never_depends_on_where_it_starts() {
        let data = Dataset::of_records((0..6).map(|line| record(line, line != 2)).collect());
        let sampler = Sampler { data: &data, path: Path::new("rows"), batch_size: 2, shuffle: true, seed: 3 };
        let rows = RetainRows::new(sampler);
        assert_eq!((rows.len(), rows.tokens()), (5, [5, 15]));
        let all = rows.batches(0, &[2; 20]);
        assert!(all.iter().all(|batch| batch.len() == 2));
        for (pass, of_pass) in all.concat().chunks(5).enumerate() {
            let mut sorted = of_pass.to_vec();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4], "pass {pass}");
        }
        assert_ne!(all.concat()[..5], all.concat()[5..10], "each pass has its own order");
        for first in 0..18 {
            assert_eq!(rows.batches(2 * first, &[2, 2]), all[first..first + 2]);
        }
        let in_order = RetainRows::new(Sampler { shuffle: false, ..sampler });
        assert_eq!(in_order.batches(2, &[2, 3, 1]), [vec![2, 3], vec![4, 0, 1], vec![2]]);
    }
}
