//! Losses of a model over a whole data set, without gradient.

use serde::{Deserialize, Serialize};

use super::recipe::Divergence;
use super::replica::{Replica, share};
use super::router::alignment_by_layer;
use crate::backend::Backend;
use crate::data::{Dataset, Example, MicroBatch, Sampler};
use crate::exit::{self, Failure, Result};
use crate::model::PassEnd;
use crate::optim::LossMeter;

/// What is measured before the first round and after the last one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Mean cross-entropy of the refusals, given the unsafe prompts, in nats a token.
    pub ce_loss: Option<f64>,
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
        let router_loss = if sampler.data.has_both_prompts() {
            let by_layer = alignment_by_layer(replica, sampler, divergence)?;
            Some(by_layer.iter().sum::<f64>() / by_layer.len() as f64)
        } else {
            None
        };
        let held_out_loss = match held_out {
            Some(data) => mean_loss(replica, &unsafe_batches(data, sampler.batch_size))?,
            None => None,
        };
        Ok(Self { ce_loss, router_loss, held_out_loss })
    }

    /// Refuses losses that are not finite.
    ///
    /// # Errors
    /// The first such loss.
    pub fn check_finite(&self) -> Result<()> {
        let losses = [("refusals", self.ce_loss), ("routers", self.router_loss), ("held-out rows", self.held_out_loss)];
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
    for (_, batch) in share(batches, &*replica.world) {
        if batch.targets.is_empty() {
            continue;
        }
        let inputs = replica.inputs(batch);
        let forward = replica.forward(&inputs, None, PassEnd::Loss { all_rows: false }, None);
        losses.add(replica.model().loss(&inputs, &forward), batch.targets.len());
    }
    losses.merge(&*replica.world)?;
    Ok(losses.mean())
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
