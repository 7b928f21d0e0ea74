//! The memory and the time of the model's own replies and of the causal check on them, predicted from shapes.

use super::time::{Forecast, of_replies};
use super::work::{TokenWork, Tokens, Work, generation_step};
use crate::config::RunConfig;
use crate::data::Record;
use crate::model::{ModelConfig, kv_cache_bytes};
use crate::run::generate::{PROMPT_TOKENS, batches, cache_tokens, verify_new_tokens};
use crate::run::session::Session;
use crate::train::memory::{Activations, MemoryBudget};
use crate::train::{CountedReplies, Recipe};

/// The predicted memory of the largest batch of own replies on a rank, in bytes; zero without own replies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GenerationMemory {
    /// Keys and values of all layers.
    pub cache: u64,
    /// Temporaries of a forward pass over prompts.
    pub working: u64,
}

/// The prompts that a run asks the model: their lengths, and the maximum length of a reply.
struct Asked {
    /// For the replies on which routing is counted.
    counted: Option<(Vec<usize>, usize)>,
    /// For the causal check.
    verified: Option<(Vec<usize>, usize)>,
}

impl Asked {
    fn of(session: &Session, config: &RunConfig, recipe: &Recipe) -> Self {
        let prompts = |of: fn(&Record) -> Option<&Vec<u32>>| session.data.records.iter().filter_map(of).map(Vec::len);
        let on_unsafe: Vec<usize> = prompts(|r| r.unsafe_prompt.as_ref()).collect();
        let counted = match recipe.identify.counted_replies() {
            CountedReplies::Own { max_new_tokens } => {
                let on_safe = prompts(|r| r.safe_prompt.as_ref());
                Some((on_unsafe.iter().copied().chain(on_safe).collect(), max_new_tokens))
            }
            _ => None,
        };
        Self { counted, verified: (config.verify > 0).then(|| (on_unsafe, verify_new_tokens(config))) }
    }
}

impl GenerationMemory {
    /// Of the replies on which routing is counted, or of the causal check.
    pub fn new(session: &Session, config: &RunConfig, recipe: &Recipe, budget: &MemoryBudget) -> Self {
        let Asked { counted, verified } = Asked::of(session, config, recipe);
        let each = counted.iter().chain(&verified).map(|(lengths, max_new_tokens)| {
            Self::of_prompts(lengths, *max_new_tokens, config.generation_batch_size, &session.model, budget)
        });
        each.fold(Self::default(), |a, b| Self { cache: a.cache.max(b.cache), working: a.working.max(b.working) })
    }

    /// Of replies of at most `max_new_tokens` tokens to prompts of these lengths, in batches of `batch_size`.
    pub fn of_prompts(
        lengths: &[usize],
        max_new_tokens: usize,
        batch_size: usize,
        model: &ModelConfig,
        budget: &MemoryBudget,
    ) -> Self {
        let Some(batch) = batches(lengths, batch_size).into_iter().next() else { return Self::default() };
        let lengths: Vec<usize> = batch.into_iter().map(|i| lengths[i]).collect();
        let rows = lengths[0].max(PROMPT_TOKENS.min(lengths.iter().sum()));
        let tokens = cache_tokens(lengths, max_new_tokens);
        let cache = kv_cache_bytes(model, tokens, budget.activation_size);
        Self { cache, working: Activations::predict(model, rows, budget).working }
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.cache + self.working
    }
}

impl Forecast {
    /// With the model's own replies on which routing is counted, and with the causal check of `--verify`: as if every reply had
    /// `--max-new-tokens` tokens, and every unsafe row complied.
    #[must_use]
    pub fn with_own_replies(self, session: &Session, config: &RunConfig, recipe: &Recipe) -> Self {
        let (model, records) = (&session.model, &session.data.records);
        let Asked { counted, verified } = Asked::of(session, config, recipe);
        let mut forecast = self;
        if let Some((both, max_new_tokens)) = counted {
            forecast.replies = generation(session, &both, config.generation_batch_size, max_new_tokens);
        }
        if let Some((on_unsafe, max_new_tokens)) = verified {
            let answers = Tokens::of(on_unsafe.iter().map(|prompt| (prompt + max_new_tokens, max_new_tokens)));
            let refusals = of_replies(records.iter().filter_map(|r| r.unsafe_reply.as_ref()));
            let safe = session.retain_records().unwrap_or_default().iter().chain(records);
            let safe = of_replies(safe.filter_map(|r| r.safe_reply.as_ref()));
            let a_set = [answers, refusals, safe]
                .iter()
                .map(|t| TokenWork::new(model, t.mean_length()).forward(t))
                .fold(Work::default(), |sum, work| sum + work);
            forecast.verify = generation(session, &on_unsafe, config.generation_batch_size, max_new_tokens)
                + a_set * (config.verify + 2) as f64;
        }
        forecast
    }
}

/// The work of greedy answers of `max_new_tokens` tokens to prompts of these lengths.
fn generation(session: &Session, prompts: &[usize], batch_size: usize, max_new_tokens: usize) -> Work {
    let tokens = Tokens::of(prompts.iter().map(|&length| (length, 1)));
    let first = TokenWork::new(&session.model, tokens.mean_length()).forward(&tokens);
    batches(prompts, batch_size).iter().fold(first, |sum, batch| {
        sum + generation_step(&session.model, batch.len()) * max_new_tokens.saturating_sub(1) as f64
    })
}
