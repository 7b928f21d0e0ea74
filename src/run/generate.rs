//! Generation: answers of a model to prompts, token by token with a key/value cache.

use candle_core::{Device, Tensor};
use candle_transformers::generation::LogitsProcessor;

use crate::backend::Backend;
use crate::exit::{self, Failure, Result};
use crate::model::Model;
use crate::report::{FinishReason, Sampling};

/// A generated answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Tokens of the answer, without the end-of-sequence token.
    pub ids: Vec<u32>,
    /// Why generation stopped.
    pub finish: FinishReason,
}

/// Continues `prompt` until one of the tokens `eos`, or `max_new_tokens`. At temperature 0 by [`greedy`]. The random seed is
/// `sampling.seed + index`, so that an answer does not depend on the other answers.
///
/// # Errors
/// Logits that are not finite.
pub fn answer<B: Backend>(
    model: &Model<B>,
    prompt: &[u32],
    eos: &[u32],
    sampling: &Sampling,
    index: u64,
) -> Result<Answer> {
    if sampling.temperature == 0.0 {
        return greedy(model, prompt, eos, sampling.max_new_tokens);
    }
    let seed = sampling.seed.wrapping_add(index);
    let mut sampler = LogitsProcessor::new(seed, Some(sampling.temperature), Some(sampling.top_p));
    generate(model, prompt, eos, sampling.max_new_tokens, |logits| sample(&mut sampler, logits))
}

/// Continues `prompt` by the token of the highest logit, of equal ones that of the lowest id, until one of the tokens `eos`, or
/// `max_new_tokens`.
///
/// # Errors
/// Logits that are not finite.
pub fn greedy<B: Backend>(model: &Model<B>, prompt: &[u32], eos: &[u32], max_new_tokens: usize) -> Result<Answer> {
    generate(model, prompt, eos, max_new_tokens, |logits| Ok(highest(&logits)))
}

/// The lowest index of the highest value.
fn highest(logits: &[f32]) -> u32 {
    let better = |best: usize, i: usize| if logits[i] > logits[best] { i } else { best };
    (0..logits.len()).reduce(better).map_or(0, |best| best as u32)
}

/// Continues `prompt` by the tokens that `choose` takes.
fn generate<B: Backend>(
    model: &Model<B>,
    prompt: &[u32],
    eos: &[u32],
    max_new_tokens: usize,
    mut choose: impl FnMut(Vec<f32>) -> Result<u32>,
) -> Result<Answer> {
    let mut cache = model.kv_cache();
    let mut logits = model.decode(prompt, &mut cache);
    let mut ids = Vec::new();
    loop {
        check_finite(&logits)?;
        let next = choose(logits)?;
        if eos.contains(&next) {
            return Ok(Answer { ids, finish: FinishReason::Stop });
        }
        ids.push(next);
        if ids.len() == max_new_tokens {
            return Ok(Answer { ids, finish: FinishReason::Length });
        }
        logits = model.decode(&[next], &mut cache);
    }
}

fn check_finite(logits: &[f32]) -> Result<()> {
    match logits.iter().position(|x| !x.is_finite()) {
        None => Ok(()),
        Some(bad) => Err(Failure::new(
            exit::NOT_FINITE,
            format!("the logit of token {bad} is {}: the model's weights are damaged or overflow", logits[bad]),
        )),
    }
}

fn sample(sampler: &mut LogitsProcessor, logits: Vec<f32>) -> Result<u32> {
    let n = logits.len();
    let drawn = Tensor::from_vec(logits, n, &Device::Cpu).and_then(|logits| sampler.sample(&logits));
    drawn.map_err(|e| Failure::new(exit::INTERNAL, format!("sampling failed: {e}; please report this")))
}

#[cfg(test)]
mod tests {
    use super::highest;

    #[test]
    fn of_equal_logits_the_lowest_id_is_chosen() {
        assert_eq!(highest(&[0.5, 2.0, -1.0, 2.0]), 1);
        assert_eq!(highest(&[-3.0, -3.0]), 0);
    }
}
