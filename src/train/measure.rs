//! Losses of a model over a whole data set, without gradient.

use serde::{Deserialize, Serialize};

use super::recipe::Divergence;
use super::replica::{Replica, share};
use super::router::alignment_by_layer;
use crate::backend::Backend;
use crate::data::{Dataset, Example, MicroBatch, Sampler};
use crate::exit::{self, Failure, Result};
use crate::meter::{Meter, Unit};
use crate::model::PassEnd;
use crate::optim::LossMeter;

/// What is measured before the first round and after the last one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Mean cross-entropy of the refusals, given the unsafe prompts, in nats a token.
    pub ce_loss: Option<f64>,
    /// Mean cross-entropy of the replies to the safe prompts, in nats a token: training should not raise it.
    #[serde(default)]
    pub safe_loss: Option<f64>,
    /// Mean divergence of the routers between safe and unsafe prompts, in nats.
    pub router_loss: Option<f64>,
    /// Mean cross-entropy of the held-out refusals, in nats a token.
    pub held_out_loss: Option<f64>,
}

impl Measured {
    /// Measures a model over the training rows in file order, and over the held-out rows.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn of<B: Backend>(
        replica: &Replica<B>,
        sampler: Sampler<'_>,
        held_out: Option<&Dataset>,
        divergence: Divergence,
    ) -> Result<Self> {
        let ce_loss = mean_loss(replica, &unsafe_batches(sampler.data, sampler.batch_size))?;
        let safe: Vec<_> = sampler.data.records.iter().filter_map(|r| r.safe_reply.as_ref()).collect();
        let safe_loss = mean_loss(replica, &pack_in_order(&safe, sampler.batch_size))?;
        let routes = !replica.moe_layers().layers.is_empty();
        let router_loss = if routes && sampler.data.has_both_prompts() {
            let by_layer = alignment_by_layer(replica, sampler, divergence)?;
            Some(by_layer.iter().sum::<f64>() / by_layer.len() as f64)
        } else {
            None
        };
        let held_out_loss = match held_out {
            Some(data) => mean_loss(replica, &unsafe_batches(data, sampler.batch_size))?,
            None => None,
        };
        Ok(Self { ce_loss, safe_loss, router_loss, held_out_loss })
    }

    /// The mean loss of the replies to safe prompts before and after, if training has raised it by more than a tenth and by
    /// more than 0.05 nats a token: the model answers them less as the data say.
    pub fn harm_to_safe_side(&self, after: &Self) -> Option<[f64; 2]> {
        let both = [self.safe_loss?, after.safe_loss?];
        (both[1] > 1.1 * both[0] && both[1] > both[0] + 0.05).then_some(both)
    }

    /// Refuses losses that are not finite.
    ///
    /// # Errors
    /// The first such loss.
    pub fn check_finite(&self) -> Result<()> {
        let losses = [
            ("refusals", self.ce_loss),
            ("replies to safe prompts", self.safe_loss),
            ("routers", self.router_loss),
            ("held-out rows", self.held_out_loss),
        ];
        match losses.iter().find_map(|(what, loss)| loss.filter(|l| !l.is_finite()).map(|l| (what, l))) {
            None => Ok(()),
            Some((what, loss)) => Err(Failure::new(
                exit::NOT_FINITE,
                format!("the loss of the {what} is {loss}: the weights have diverged; lower the learning rates"),
            )),
        }
    }
}

/// Mean cross-entropy over the tokens with loss of these micro-batches, without gradient; the same on all ranks. `None`
/// without such tokens.
///
/// # Errors
/// Those of the collective.
pub fn mean_loss<B: Backend>(replica: &Replica<B>, batches: &[MicroBatch]) -> Result<Option<f64>> {
    let mut losses = LossMeter::default();
    let own = || share(batches, &*replica.world).map(|(_, batch)| batch).filter(|batch| !batch.targets.is_empty());
    let tokens = own().map(|batch| batch.ids.len() as u64).sum();
    let meter = Meter::start("measuring losses", Unit::Tokens, tokens);
    for batch in own() {
        meter.add(batch.ids.len());
        let inputs = replica.inputs(batch);
        let forward = replica.forward(&inputs, None, PassEnd::Loss { all_rows: false }, None);
        losses.add(replica.model().loss(&inputs, &forward), batch.targets.len());
    }
    losses.merge(&*replica.world)?;
    Ok(losses.mean())
}

/// The loss of one example, teacher-forced.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct ExampleLoss {
    /// Summed cross-entropy of its targets, in nats.
    pub sum: f64,
    /// Number of its targets.
    pub tokens: usize,
    /// Whether every target is the most probable token (of equal logits the lowest id): greedy decoding gives the reply to
    /// its last token. False without targets.
    pub exact: bool,
}

impl ExampleLoss {
    /// In nats a token; 0 without targets.
    pub fn mean(&self) -> f64 {
        if self.tokens == 0 { 0.0 } else { self.sum / self.tokens as f64 }
    }
}

/// Mean cross-entropy a token over examples; `None` without targets.
pub fn mean_of(losses: &[ExampleLoss]) -> Option<f64> {
    let tokens: usize = losses.iter().map(|loss| loss.tokens).sum();
    (tokens > 0).then(|| losses.iter().map(|loss| loss.sum).sum::<f64>() / tokens as f64)
}

/// The loss of each example, packed `batch_size` a micro-batch in their order; the same bits on all ranks and for any world
/// size. `after` is called with each micro-batch of this rank.
///
/// # Errors
/// Those of the collective.
pub fn example_losses<B: Backend>(
    replica: &Replica<B>,
    examples: &[&Example],
    batch_size: usize,
    mut after: impl FnMut(&MicroBatch),
) -> Result<Vec<ExampleLoss>> {
    let batches = pack_in_order(examples, batch_size);
    let (mut sums, mut exact) = (Vec::new(), Vec::new());
    for (i, batch) in share(&batches, &*replica.world) {
        if batch.targets.is_empty() {
            continue;
        }
        let inputs = replica.inputs(batch);
        let forward = replica.forward(&inputs, None, PassEnd::Loss { all_rows: false }, None);
        let mut rows = replica.model().row_losses(&inputs, &forward).into_iter();
        let first = i * batch_size;
        for (index, example) in (first..).zip(&examples[first..examples.len().min(first + batch_size)]) {
            let own: Vec<_> = rows.by_ref().take(targets(example)).collect();
            sums.push((index, own.iter().map(|row| row.loss).sum()));
            exact.push((index, f64::from(u8::from(!own.is_empty() && own.iter().all(|row| row.greedy)))));
        }
        after(batch);
    }
    let sums = replica.gather_by_index(examples.len(), &sums)?;
    let exact = replica.gather_by_index(examples.len(), &exact)?;
    let results = examples.iter().zip(sums).zip(exact);
    Ok(results.map(|((e, sum), exact)| ExampleLoss { sum, tokens: targets(e), exact: exact > 0.0 }).collect())
}

/// Number of targets of an example.
fn targets(example: &Example) -> usize {
    example.loss.iter().skip(1).filter(|loss| **loss).count()
}

/// Micro-batches of all unsafe replies, in file order.
fn unsafe_batches(data: &Dataset, batch_size: usize) -> Vec<MicroBatch> {
    let examples: Vec<_> = data.records.iter().filter_map(|r| r.unsafe_reply.as_ref()).collect();
    pack_in_order(&examples, batch_size)
}

/// Packs examples in their order, `batch_size` a micro-batch.
pub fn pack_in_order(examples: &[&Example], batch_size: usize) -> Vec<MicroBatch> {
    examples.chunks(batch_size).map(|chunk| MicroBatch::of_examples(chunk.iter().copied())).collect()
}
