//! What a scan adds up and gives: sums of one rank, scores of all ranks.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::backend::Backend;
use crate::exit::{self, Coded, Failure, Result};
use crate::experts::{Bootstrap, ExpertScores, UsageAccumulator};
use crate::input;
use crate::train::expert_load::ExpertLoads;
use crate::train::replica::Replica;

/// A number of the computation that is not finite, the same on all ranks.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "{what} is {value} ({rows}); nothing was updated with it. Lower the learning rate, set --max-grad-norm, or look at these \
     rows with `moewarden check`"
)]
pub struct NonFinite {
    /// `the loss of round 1, expert step 3`.
    pub what: String,
    /// NaN or an infinity.
    pub value: f64,
    /// `rows at lines 3, 7 of rows.jsonl`.
    pub rows: String,
}

impl Coded for NonFinite {
    fn exit_code(&self) -> u8 {
        exit::NOT_FINITE
    }
}

/// One micro-batch, scored.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScoredBatch {
    /// Tokens of its forward passes.
    pub tokens: usize,
    /// Its mean loss, where the method computes one.
    pub loss: Option<f64>,
}

/// The scores of all ranks.
#[derive(Debug, Clone)]
pub struct Scores {
    /// One score an expert; zeros where nothing was scored.
    pub scores: ExpertScores,
    /// Micro-batches (or pairs of a safe and an unsafe batch) that counted.
    pub micro_batches: u64,
    /// Mean loss of each micro-batch in global order, where the method computes one; without those that have no tokens with
    /// loss.
    pub losses: Vec<f64>,
    /// Tokens of the same micro-batches.
    pub tokens: Vec<usize>,
    /// Tokens of each expert in these micro-batches.
    pub loads: ExpertLoads,
    /// Scores of resampled micro-batches.
    pub bootstrap: Option<Bootstrap>,
    /// What published rules select from.
    pub usage: Option<UsageAccumulator>,
    /// A remark for the user.
    pub warning: Option<String>,
}

impl Scores {
    pub(super) fn of(scores: ExpertScores, micro_batches: u64) -> Self {
        Self {
            scores,
            micro_batches,
            losses: Vec::new(),
            tokens: Vec::new(),
            loads: ExpertLoads::default(),
            bootstrap: None,
            usage: None,
            warning: None,
        }
    }

    pub(super) fn zeros<B: Backend>(replica: &Replica<B>) -> Self {
        let (layers, num_experts) = (replica.moe_layers().layers.clone(), replica.model().config.num_experts);
        Self::of(ExpertScores::zeros(layers, num_experts), 0)
    }
}

/// What one rank has added up; a checkpoint holds it as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct PartialSums<A> {
    #[serde(rename = "sums")]
    pub(super) accumulator: A,
    /// (index in the global order, mean loss)
    pub(super) losses: Vec<(usize, f64)>,
    /// (index in the global order, tokens)
    pub(super) tokens: Vec<(usize, f64)>,
    /// Tokens of each expert; empty in checkpoints of earlier versions, and for methods without losses.
    #[serde(default)]
    pub(super) loads: ExpertLoads,
    /// The same sums of resampled micro-batches, if the run wants them.
    #[serde(default)]
    pub(super) bootstrap: Option<Bootstrap>,
}

impl<A: Serialize + DeserializeOwned> PartialSums<A> {
    pub(super) fn new(accumulator: A, bootstrap: Option<Bootstrap>) -> Self {
        Self { accumulator, losses: Vec::new(), tokens: Vec::new(), loads: ExpertLoads::default(), bootstrap }
    }

    /// Adds the scores of a micro-batch to the resampled sums.
    pub(super) fn resample(&mut self, index: usize, scores: Option<&[f64]>) {
        if let (Some(bootstrap), Some(scores)) = (&mut self.bootstrap, scores) {
            bootstrap.add(index, scores);
        }
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("sums are numbers")
    }

    pub(super) fn restore(&mut self, parts: &[Vec<u8>], absorb: impl Fn(&mut A, &A)) -> Result<()> {
        for (i, bytes) in parts.iter().enumerate() {
            let other: Self = serde_json::from_slice(bytes).map_err(|e| {
                Failure::new(
                    exit::DATA,
                    format!("the scores so far in the checkpoint cannot be read: {}", input::json_problem(&e)),
                )
            })?;
            if self.bootstrap.is_some() != other.bootstrap.is_some() {
                let message = "the scores so far in the checkpoint are of a version without --bootstrap: resume with that version";
                return Err(Failure::new(exit::DATA, message));
            }
            let loads_fit = other.loads.is_empty() || fits(&self.loads, &other.loads);
            if !fits(&self.accumulator, &other.accumulator) || !fits(&self.bootstrap, &other.bootstrap) || !loads_fit {
                let message = "the scores so far in the checkpoint are not of this model's layers and experts: the checkpoint is \
                               damaged; start again with --overwrite";
                return Err(Failure::new(exit::DATA, message));
            }
            if i == 0 {
                let loads = std::mem::take(&mut self.loads);
                *self = other; // not added to zeros: -0.0 must stay -0.0
                if self.loads.is_empty() {
                    self.loads = loads;
                }
                continue;
            }
            absorb(&mut self.accumulator, &other.accumulator);
            if let (Some(own), Some(others)) = (&mut self.bootstrap, &other.bootstrap) {
                own.absorb(others);
            }
            self.losses.extend(other.losses);
            self.tokens.extend(other.tokens);
            self.loads.add(&other.loads);
        }
        Ok(())
    }
}

/// Whether sums from a file have the layers, experts and lengths of `own`, which is new.
fn fits<A: Serialize>(own: &A, read: &A) -> bool {
    let value = |sums: &A| serde_json::to_value(sums).expect("sums are numbers");
    same_form(&value(own), &value(read), "")
}

fn same_form(own: &Value, read: &Value, key: &str) -> bool {
    match (own, read) {
        (Value::Object(own), Value::Object(read)) => {
            own.len() == read.len()
                && own.iter().all(|(key, value)| read.get(key).is_some_and(|read| same_form(value, read, key)))
        }
        (Value::Array(own), Value::Array(read)) => {
            own.len() == read.len() && own.iter().zip(read).all(|(own, read)| same_form(own, read, key))
        }
        // These say what the sums are of; all other numbers are sums and counts.
        (own, read) if ["layers", "num_experts", "params_per_expert", "score", "per"].contains(&key) => own == read,
        (own, read) => own.is_number() == read.is_number(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::{Score, ScoreAccumulator, ScorePer};

    #[test]
    fn sums_of_another_shape_do_not_fit() {
        let sums = |layers: &[usize], experts| {
            ScoreAccumulator::new(Score::default(), ScorePer::default(), layers.to_vec(), experts, 6)
        };
        let own = sums(&[0, 2], 3);
        assert!(fits(&own, &own));
        for other in [sums(&[0, 2], 4), sums(&[0, 1], 3), sums(&[0], 6), sums(&[0, 1, 2], 2)] {
            assert!(!fits(&own, &other));
        }
    }
}
