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

/// Continues `prompt` until one of the tokens `eos`, or `max_new_tokens`. The random seed is `sampling.seed + index`, so that an
/// answer does not depend on the other answers.
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
    let seed = sampling.seed.wrapping_add(index);
    let mut sampler = LogitsProcessor::new(seed, Some(sampling.temperature), Some(sampling.top_p));
    let mut cache = model.kv_cache();
    let mut logits = model.decode(prompt, &mut cache);
    let mut ids = Vec::new();
    loop {
        let next = sample(&mut sampler, logits)?;
        if eos.contains(&next) {
            return Ok(Answer { ids, finish: FinishReason::Stop });
        }
        ids.push(next);
        if ids.len() == sampling.max_new_tokens {
            return Ok(Answer { ids, finish: FinishReason::Length });
        }
        logits = model.decode(&[next], &mut cache);
    }
}

fn sample(sampler: &mut LogitsProcessor, logits: Vec<f32>) -> Result<u32> {
    if let Some(bad) = logits.iter().position(|x| !x.is_finite()) {
        return Err(Failure::new(
            exit::NOT_FINITE,
            format!("the logit of token {bad} is {}: the model's weights are damaged or overflow", logits[bad]),
        ));
    }
    let n = logits.len();
    let drawn = Tensor::from_vec(logits, n, &Device::Cpu).and_then(|logits| sampler.sample(&logits));
    drawn.map_err(|e| Failure::new(exit::INTERNAL, format!("sampling failed: {e}; please report this")))
}
