//! The memory of the model's own replies, predicted from shapes.

use crate::config::RunConfig;
use crate::data::Record;
use crate::model::kv_cache_bytes;
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

impl GenerationMemory {
    /// Of the replies on which routing is counted, or of the causal check.
    pub fn new(session: &Session, config: &RunConfig, recipe: &Recipe, budget: &MemoryBudget) -> Self {
        let prompts = |of: fn(&Record) -> Option<&Vec<u32>>| session.data.records.iter().filter_map(of).map(Vec::len);
        let on_unsafe: Vec<usize> = prompts(|r| r.unsafe_prompt.as_ref()).collect();
        let mut largest = Self::default();
        let mut add = |lengths: &[usize], max_new_tokens: usize| {
            let Some(batch) = batches(lengths, config.generation_batch_size).into_iter().next() else { return };
            let lengths: Vec<usize> = batch.into_iter().map(|i| lengths[i]).collect();
            let rows = lengths[0].max(PROMPT_TOKENS.min(lengths.iter().sum()));
            let tokens = cache_tokens(lengths, max_new_tokens);
            let cache = kv_cache_bytes(&session.model, tokens, budget.activation_size);
            let working = Activations::predict(&session.model, rows, budget).working;
            largest = Self { cache: largest.cache.max(cache), working: largest.working.max(working) };
        };
        if let CountedReplies::Own { max_new_tokens } = recipe.identify.counted_replies() {
            let both: Vec<usize> = on_unsafe.iter().copied().chain(prompts(|r| r.safe_prompt.as_ref())).collect();
            add(&both, max_new_tokens);
        }
        if config.verify > 0 {
            add(&on_unsafe, verify_new_tokens(config));
        }
        largest
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.cache + self.working
    }
}
