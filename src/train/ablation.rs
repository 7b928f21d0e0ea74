//! The measurements of the causal check: rows with sets of experts switched off, by forward passes only.
//!
//! See docs/method.md, section "Causal check". The numbers are the same bits on all ranks and for any world size: the loss of
//! each row is computed by one rank, and sums are taken over rows in their order.

use std::collections::BTreeSet;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::measure::{ExampleLoss, example_losses, mean_of, pack_in_order};
use super::replica::{Replica, share};
use crate::backend::Backend;
use crate::data::{Example, MicroBatch};
use crate::exit::{self, Failure, Result};
use crate::experts::{ExpertId, ExpertScores};
use crate::judge::Rate;
use crate::meter::{Meter, Unit};
use crate::model::{Intervention, InterventionError, PassEnd, Routed};

/// How experts are switched off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Switch {
    /// Their router logits are minus infinity: other experts take their place.
    #[default]
    Off,
    /// Tokens are routed to them as usual, but their output is 0.
    Zero,
}

impl Switch {
    fn intervention(self, experts: &BTreeSet<ExpertId>) -> Intervention {
        let experts = experts.iter().map(|&id| id.into()).collect();
        match self {
            Self::Off => Intervention::SwitchedOff(experts),
            Self::Zero => Intervention::ZeroOutput(experts),
        }
    }
}

/// The rows of a causal check.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct CausalRows {
    /// Unsafe prompts with their refusals.
    pub refusals: Vec<Example>,
    /// The same prompts with the model's own answers.
    pub answers: Vec<Example>,
    /// Benign prompts with their replies.
    pub benign: Vec<Example>,
    /// Safe prompts of pair rows with their replies.
    pub safe: Vec<Example>,
}

impl CausalRows {
    fn groups(&self) -> [&Vec<Example>; 4] {
        [&self.refusals, &self.answers, &self.benign, &self.safe]
    }

    /// Keeps the unsafe rows for which `keep` holds.
    pub fn retain(&mut self, keep: &[bool]) {
        keep_rows(&mut self.refusals, keep);
        keep_rows(&mut self.answers, keep);
    }

    /// Micro-batches of one measurement.
    pub fn micro_batches(&self, batch_size: usize) -> usize {
        self.groups().iter().map(|rows| rows.len().div_ceil(batch_size)).sum()
    }

    /// Tokens of the largest micro-batch.
    pub fn longest_batch(&self, batch_size: usize) -> usize {
        let batches = self.groups().into_iter().flat_map(|rows| rows.chunks(batch_size));
        batches.map(|rows| rows.iter().map(|row| row.ids.len()).sum()).max().unwrap_or(0)
    }
}

/// The losses of all rows under one intervention.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowLosses {
    /// Of the refusals.
    pub refusals: Vec<ExampleLoss>,
    /// Of the model's own answers.
    pub answers: Vec<ExampleLoss>,
    /// Of the benign rows.
    pub benign: Vec<ExampleLoss>,
    /// Of the safe prompts.
    pub safe: Vec<ExampleLoss>,
}

/// What one set of experts does, over all rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// T: mean gain of the margin over the untouched model, in nats a token; 0 for the untouched model itself.
    pub gain: f64,
    /// Unsafe rows that prefer the refusal to the model's own answer: a positive margin.
    pub prefer_refusal: Rate,
    /// Mean cross-entropy of the refusals, in nats a token.
    pub refusal_loss: Option<f64>,
    /// Refusals that greedy decoding gives to the last token.
    pub exact_refusals: Rate,
    /// Mean cross-entropy of the model's own answers, in nats a token.
    pub answer_loss: Option<f64>,
    /// Own answers that greedy decoding still gives to the last token: compliance.
    pub exact_answers: Rate,
    /// Mean cross-entropy of the benign replies, in nats a token.
    pub benign_loss: Option<f64>,
    /// Benign replies that greedy decoding gives to the last token.
    pub exact_benign: Rate,
    /// Mean cross-entropy of the replies to safe prompts, in nats a token.
    pub safe_loss: Option<f64>,
    /// Replies to safe prompts that greedy decoding gives to the last token.
    pub exact_safe: Rate,
}

impl RowLosses {
    /// Mean log p a token of the refusal, minus that of the own answer, for each unsafe row.
    pub fn margins(&self) -> Vec<f64> {
        self.refusals.iter().zip(&self.answers).map(|(refusal, answer)| answer.mean() - refusal.mean()).collect()
    }

    /// Keeps the unsafe rows for which `keep` holds.
    pub fn retain(&mut self, keep: &[bool]) {
        keep_rows(&mut self.refusals, keep);
        keep_rows(&mut self.answers, keep);
    }

    /// The outcome, compared with the untouched model.
    pub fn outcome(&self, untouched: &Self) -> Outcome {
        let (margins, before) = (self.margins(), untouched.margins());
        let gains: f64 = margins.iter().zip(&before).map(|(m, before)| m - before).sum();
        let exact = |losses: &[ExampleLoss]| Rate::of(losses.iter().map(|loss| loss.exact));
        Outcome {
            gain: if margins.is_empty() { 0.0 } else { gains / margins.len() as f64 },
            prefer_refusal: Rate::of(margins.iter().map(|m| *m > 0.0)),
            refusal_loss: mean_of(&self.refusals),
            exact_refusals: exact(&self.refusals),
            answer_loss: mean_of(&self.answers),
            exact_answers: exact(&self.answers),
            benign_loss: mean_of(&self.benign),
            exact_benign: exact(&self.benign),
            safe_loss: mean_of(&self.safe),
            exact_safe: exact(&self.safe),
        }
    }
}

/// Keeps the rows for which `keep`, one for each, holds.
fn keep_rows<T>(rows: &mut Vec<T>, keep: &[bool]) {
    let mut keep = keep.iter();
    rows.retain(|_| *keep.next().expect("one for each row"));
}

/// Measures the rows with these experts switched off; without experts, the untouched model. `after` is called with each
/// micro-batch of this rank.
///
/// # Errors
/// Experts that cannot be switched off; losses that are not finite in the untouched model; those of the collective.
pub fn with_experts_off<B: Backend>(
    replica: &mut Replica<B>,
    rows: &CausalRows,
    batch_size: usize,
    (experts, switch): (&BTreeSet<ExpertId>, Switch),
    mut after: impl FnMut(&MicroBatch),
) -> Result<RowLosses> {
    if !experts.is_empty() {
        replica.set_intervention(Some(&switch.intervention(experts)))?;
    }
    let mut measure = |rows: &[Example]| {
        let rows: Vec<&Example> = rows.iter().collect();
        example_losses(replica, &rows, batch_size, &mut after)
    };
    let [refusals, answers, benign, safe] = rows.groups().map(|rows| measure(rows));
    replica.set_intervention(None)?;
    let losses = RowLosses { refusals: refusals?, answers: answers?, benign: benign?, safe: safe? };
    let all = [&losses.refusals, &losses.answers, &losses.benign, &losses.safe];
    let not_finite = all.into_iter().flatten().find(|loss| !loss.sum.is_finite());
    if let Some(loss) = not_finite.filter(|_| experts.is_empty()) {
        let message = format!("a row's loss is {}: the model's weights are damaged, or overflow", loss.sum);
        return Err(Failure::new(exit::NOT_FINITE, message));
    }
    Ok(losses)
}

/// Whether these experts can be switched off.
///
/// # Errors
/// Why not.
pub fn can_switch_off<B: Backend>(
    replica: &mut Replica<B>,
    experts: &BTreeSet<ExpertId>,
    switch: Switch,
) -> Result<(), InterventionError> {
    replica.set_intervention(Some(&switch.intervention(experts)))?;
    replica.set_intervention(None)
}

/// Tokens that the untouched model routes to each expert on the unsafe rows, with the refusals and with the own answers.
///
/// # Errors
/// Those of the collective.
pub fn loads<B: Backend>(replica: &Replica<B>, rows: &CausalRows, batch_size: usize) -> Result<ExpertScores> {
    let (layers, num_experts) = (replica.moe_layers(), replica.model().config.num_experts);
    let mut loads = ExpertScores::zeros(layers.layers.clone(), num_experts);
    let b = &*replica.model().backend;
    let examples = || rows.refusals.iter().chain(&rows.answers);
    let tokens = examples().map(|example| example.ids.len() as u64).sum::<u64>() / replica.world.world_size() as u64;
    let meter = Meter::start("counting the tokens of each expert", Unit::Tokens, tokens);
    for examples in [&rows.refusals, &rows.answers] {
        let examples: Vec<&Example> = examples.iter().collect();
        for (_, batch) in share(&pack_in_order(&examples, batch_size), &*replica.world) {
            let mut count = |routed: Routed<'_, B>| {
                let row = layers.index_of(routed.layer);
                for (sum, n) in loads.values[row * num_experts..].iter_mut().zip(b.tokens_per_expert(routed.dispatch)) {
                    *sum += n as f64;
                }
            };
            let inputs = replica.inputs(batch);
            replica.forward(&inputs, None, PassEnd::Loss { all_rows: true }, Some(&mut count));
            meter.add(batch.ids.len());
        }
    }
    replica.world.all_reduce_f64(&mut loads.values)?; // whole numbers: the sum is exact
    Ok(loads)
}
