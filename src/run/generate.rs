//! Generation: answers of a model to prompts, in static batches with a key/value cache.
//!
//! All answers of a batch grow by one token in each forward pass, which reads the weights once; an answer that ends leaves the
//! passes. A batch ends with its longest answer; then the next one begins. Which prompts are in a batch depends on their lengths
//! and on the batch size only.

use std::cmp::Reverse;
use std::collections::VecDeque;
use std::time::Instant;

use candle_core::{Device, Tensor};
use candle_transformers::generation::LogitsProcessor;
use candle_transformers::utils::apply_repeat_penalty;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::config::RunConfig;
use crate::data::Penalties;
use crate::exit::{self, Failure, Result};
use crate::launch::memory::{free_memory, human};
use crate::meter::{Meter, Unit};
use crate::model::{KvCache, Model};
use crate::report::{FinishReason, GenerationSpeed, Sampling};

/// Tokens of prompts in one forward pass, unless a single prompt is longer.
pub(super) const PROMPT_TOKENS: usize = 1024;

/// Maximum length of an own answer in `--verify`: `--max-new-tokens`, or the default of `ablate`.
pub(super) fn verify_new_tokens(config: &RunConfig) -> usize {
    config.max_new_tokens.unwrap_or(32)
}

/// A generated answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Tokens of the answer, without the end-of-sequence token.
    pub ids: Vec<u32>,
    /// Why generation stopped.
    pub finish: FinishReason,
}

/// A prompt to answer.
#[derive(Debug, Clone, Copy)]
pub struct Prompt<'a> {
    /// Its tokens, at least one.
    pub ids: &'a [u32],
    /// Added to the seed of sampling, so that an answer does not depend on those before it.
    pub index: u64,
}

/// Batches of at most `size` prompts, given by their lengths: the longest prompts first, of equal ones the first. Similar lengths
/// are in one batch, and the first batch needs the most memory.
pub fn batches(lengths: &[usize], size: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| Reverse(lengths[i]));
    order.chunks(size).map(<[usize]>::to_vec).collect()
}

/// Tokens for which the cache of a batch of prompts of these lengths has room. The last token of an answer is not fed back.
pub(super) fn cache_tokens(lengths: impl IntoIterator<Item = usize>, max_new_tokens: usize) -> usize {
    lengths.into_iter().map(|length| length + max_new_tokens - 1).sum()
}

/// Refuses batches whose key/value cache is larger than the free memory; says how large it is at most.
///
/// # Errors
/// Bytes that are needed and free.
pub fn check_cache<B: Backend>(
    model: &Model<B>,
    lengths: &[usize],
    batches: &[Vec<usize>],
    max_new_tokens: usize,
    limit: &str,
) -> Result<String> {
    let largest = batches.first().map_or(&[][..], Vec::as_slice);
    let needed = model.kv_cache_bytes(cache_tokens(largest.iter().map(|&i| lengths[i]), max_new_tokens));
    let free = model.backend.free_memory().unwrap_or_else(free_memory);
    if needed > free {
        let message = format!(
            "the key/value cache of {} answers needs {}, but {} are free: lower --generation-batch-size or {limit}",
            largest.len(),
            human(needed),
            human(free)
        );
        return Err(Failure::new(exit::CONFIG, message));
    }
    let plural = if batches.len() == 1 { "batch" } else { "batches" };
    Ok(format!("{} {plural} of up to {}, key/value cache {}", batches.len(), largest.len(), human(needed)))
}

/// Continues each prompt until one of the tokens `eos`, or `sampling.max_new_tokens`. At temperature 0 by the token of the highest
/// logit, of equal ones that of the lowest id. Adds tokens and times to `speed`, and calls `done` with the place of each prompt
/// whose answer is complete, and its tokens.
///
/// # Errors
/// Logits that are not finite.
pub fn answers<B: Backend>(
    model: &Model<B>,
    prompts: &[Prompt<'_>],
    eos: &[u32],
    sampling: &Sampling,
    speed: &mut GenerationSpeed,
    mut done: impl FnMut(usize, &[u32]),
) -> Result<Vec<Answer>> {
    let mut generation = Generation::new(model, prompts, eos, sampling);
    while generation.advance(speed, &mut done)? {}
    Ok(generation.into_answers().into_iter().flatten().collect())
}

/// A batch of answers that is being generated, pass by pass. See [`answers`].
pub(super) struct Generation<'a, B: Backend> {
    model: &'a Model<B>,
    eos: &'a [u32],
    max_new_tokens: usize,
    cache: KvCache<B>,
    /// Tokens of prompts and answers; the answers may end earlier.
    meter: Meter,
    /// The passes over prompts that are still to come.
    prompts: VecDeque<Vec<(usize, &'a [u32])>>,
    growing: Vec<Growing<'a>>,
}

impl<'a, B: Backend> Generation<'a, B> {
    pub(super) fn new(model: &'a Model<B>, prompts: &[Prompt<'a>], eos: &'a [u32], sampling: &Sampling) -> Self {
        let max_new_tokens = sampling.max_new_tokens;
        let room: Vec<usize> = prompts.iter().map(|p| cache_tokens([p.ids.len()], max_new_tokens)).collect();
        Self {
            model,
            eos,
            max_new_tokens,
            meter: Meter::start(format!("{} answers", prompts.len()), Unit::Tokens, room.iter().sum::<usize>() as u64),
            cache: model.kv_cache(&room),
            prompts: prompt_passes(prompts),
            growing: prompts.iter().map(|prompt| Growing::new(sampling, prompt)).collect(),
        }
    }

    /// Runs one forward pass: over prompts, until there are none left; then over the last token of each answer that goes on.
    /// Returns whether there is more to do.
    pub(super) fn advance(&mut self, speed: &mut GenerationSpeed, mut done: impl FnMut(usize, &[u32])) -> Result<bool> {
        let clock = Instant::now();
        let prompts = self.prompts.pop_front();
        let last = self.last_tokens();
        let new = prompts.clone().unwrap_or_else(|| last.iter().map(|(i, id)| (*i, &id[..])).collect());
        if new.is_empty() {
            return Ok(false);
        }
        let logits = self.model.decode(&new, &mut self.cache);
        for ((i, _), logits) in new.iter().zip(logits.chunks_exact(self.model.config.vocab_size)) {
            let answer = &mut self.growing[*i];
            answer.add(logits, self.eos, self.max_new_tokens)?;
            if answer.finish.is_some() {
                done(*i, &answer.ids);
            }
        }
        let tokens = new.iter().map(|(_, ids)| ids.len()).sum();
        self.meter.add(tokens);
        let passes = if prompts.is_some() { &mut speed.prompts } else { &mut speed.decoding };
        passes.add(tokens, clock.elapsed().as_secs_f64());
        Ok(!self.prompts.is_empty() || self.growing.iter().any(|answer| answer.finish.is_none()))
    }

    /// The last token of each answer that has begun and goes on.
    fn last_tokens(&self) -> Vec<(usize, [u32; 1])> {
        let running = self.growing.iter().enumerate().filter(|(_, answer)| answer.finish.is_none());
        running.filter_map(|(i, answer)| Some((i, [*answer.ids.last()?]))).collect()
    }

    /// The answers; `None`: not complete yet.
    pub(super) fn into_answers(self) -> Vec<Option<Answer>> {
        let answer = |answer: Growing<'_>| Some(Answer { ids: answer.ids, finish: answer.finish? });
        self.growing.into_iter().map(answer).collect()
    }
}

/// The prompts of each forward pass, with their places: as many as there are [`PROMPT_TOKENS`] for, at least one.
fn prompt_passes<'a>(prompts: &[Prompt<'a>]) -> VecDeque<Vec<(usize, &'a [u32])>> {
    let mut passes: VecDeque<Vec<(usize, &[u32])>> = VecDeque::new();
    let mut tokens = 0;
    for (i, prompt) in prompts.iter().enumerate() {
        tokens += prompt.ids.len();
        match passes.back_mut() {
            Some(pass) if tokens <= PROMPT_TOKENS => pass.push((i, prompt.ids)),
            _ => {
                tokens = prompt.ids.len();
                passes.push_back(vec![(i, prompt.ids)]);
            }
        }
    }
    passes
}

/// An answer that is being generated.
struct Growing<'a> {
    prompt: &'a [u32],
    ids: Vec<u32>,
    finish: Option<FinishReason>,
    penalties: Penalties,
    /// Draws tokens; `None`: greedy decoding.
    sampler: Option<LogitsProcessor>,
}

impl<'a> Growing<'a> {
    fn new(sampling: &Sampling, prompt: &Prompt<'a>) -> Self {
        let seed = sampling.seed.wrapping_add(prompt.index);
        let sampler = (sampling.temperature > 0.0)
            .then(|| LogitsProcessor::new(seed, Some(sampling.temperature), Some(sampling.top_p)));
        Self { prompt: prompt.ids, ids: Vec::new(), finish: None, penalties: sampling.penalties, sampler }
    }

    /// Chooses the next token by its logits.
    fn add(&mut self, logits: &[f32], eos: &[u32], max_new_tokens: usize) -> Result<()> {
        check_finite(logits)?;
        let penalised = match self.penalties.is_none() {
            true => None,
            false => Some(penalise(logits, &[self.prompt, &self.ids].concat(), self.penalties)?),
        };
        let logits = penalised.as_deref().unwrap_or(logits);
        let next = match &mut self.sampler {
            Some(sampler) => sample(sampler, logits)?,
            None => highest(logits) as u32,
        };
        if eos.contains(&next) {
            self.finish = Some(FinishReason::Stop);
            return Ok(());
        }
        self.ids.push(next);
        if self.ids.len() == max_new_tokens {
            self.finish = Some(FinishReason::Length);
        }
        Ok(())
    }
}

/// The lowest index of the highest value.
pub(super) fn highest<T: PartialOrd>(values: &[T]) -> usize {
    (0..values.len()).reduce(|best, i| if values[i] > values[best] { i } else { best }).unwrap_or(0)
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

/// The logits after `context` with these penalties.
fn penalise(logits: &[f32], context: &[u32], penalties: Penalties) -> Result<Vec<f32>> {
    let Penalties { repetition_penalty, no_repeat_ngram_size } = penalties;
    let mut logits =
        with_candle(logits, |logits| apply_repeat_penalty(&logits, repetition_penalty as f32, context)?.to_vec1())?;
    for id in repeating(context, no_repeat_ngram_size) {
        if let Some(logit) = logits.get_mut(id as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    Ok(logits)
}

/// The tokens that would complete a sequence of `size` tokens which is in the context already.
fn repeating(context: &[u32], size: usize) -> impl Iterator<Item = u32> {
    let last = size.checked_sub(1).and_then(|n| context.len().checked_sub(n)).map(|at| &context[at..]);
    let earlier =
        last.into_iter().flat_map(move |last| context.windows(size).filter(move |sequence| sequence.starts_with(last)));
    earlier.filter_map(|sequence| sequence.last().copied())
}

fn sample(sampler: &mut LogitsProcessor, logits: &[f32]) -> Result<u32> {
    with_candle(logits, |logits| sampler.sample(&logits))
}

fn with_candle<T>(logits: &[f32], f: impl FnOnce(Tensor) -> candle_core::Result<T>) -> Result<T> {
    let result = Tensor::from_slice(logits, logits.len(), &Device::Cpu).and_then(f);
    result.map_err(|e| Failure::new(exit::INTERNAL, format!("sampling failed: {e}; please report this")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equal_logits_the_lowest_id_is_chosen() {
        assert_eq!(highest(&[0.5, 2.0, -1.0, 2.0]), 1);
        assert_eq!(highest(&[-3.0, -3.0]), 0);
    }

    #[test]
    fn penalties_are_those_of_transformers() {
        // RepetitionPenaltyLogitsProcessor and NoRepeatNGramLogitsProcessor of transformers 5.17.
        let penalised = |repetition_penalty, no_repeat_ngram_size, context: &[u32]| {
            let penalties = Penalties { repetition_penalty, no_repeat_ngram_size };
            penalise(&[1.0, -2.0, 3.0, 0.5], context, penalties).unwrap()
        };
        assert_eq!(penalised(1.0, 0, &[1, 2]), [1.0, -2.0, 3.0, 0.5]);
        assert_eq!(penalised(2.0, 0, &[1, 2, 1]), [1.0, -4.0, 1.5, 0.5]);
        let never = f32::NEG_INFINITY;
        assert_eq!(penalised(1.0, 1, &[0, 3]), [never, -2.0, 3.0, never]);
        assert_eq!(penalised(1.0, 2, &[1, 2, 1, 3, 1]), [1.0, -2.0, never, never]);
        assert_eq!(penalised(2.0, 3, &[1, 2, 0, 3, 1, 2]), [never, -4.0, 1.5, 0.25]);
        for short in [&[][..], &[1], &[1, 2]] {
            assert_eq!(penalised(1.0, 3, short), [1.0, -2.0, 3.0, 0.5]);
        }
    }

    #[test]
    fn batches_hold_prompts_of_similar_length() {
        assert_eq!(batches(&[3, 9, 3, 5, 9], 2), [vec![1, 4], vec![3, 0], vec![2]]);
        assert_eq!(batches(&[], 2), Vec::<Vec<usize>>::new());
    }

    #[test]
    fn passes_over_prompts_are_bounded_by_tokens() {
        let ids = [0; 2 * PROMPT_TOKENS];
        let lengths = [PROMPT_TOKENS + 1, PROMPT_TOKENS - 1, 1, 1, 5];
        let prompts = lengths.map(|n| Prompt { ids: &ids[..n], index: 0 });
        let places = |pass: &Vec<(usize, &[u32])>| pass.iter().map(|(i, _)| *i).collect::<Vec<_>>();
        let passes: Vec<_> = prompt_passes(&prompts).iter().map(places).collect();
        assert_eq!(passes, [vec![0], vec![1, 2], vec![3, 4]]);
    }
}
