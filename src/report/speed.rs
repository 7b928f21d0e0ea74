//! How fast answers are generated.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Tokens that went through forward passes of a kind, and the time that these took.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct TokenSpeed {
    /// Tokens.
    pub tokens: usize,
    /// Wall-clock time of the passes, the choice of tokens included.
    pub seconds: f64,
    /// `tokens` / `seconds`; 0 without a pass.
    pub tokens_per_second: f64,
}

impl TokenSpeed {
    /// Adds a pass.
    pub fn add(&mut self, tokens: usize, seconds: f64) {
        self.tokens += tokens;
        self.seconds += seconds;
        self.tokens_per_second = self.tokens as f64 / self.seconds.max(1e-9);
    }
}

/// How fast answers were generated, on one rank. Times differ from run to run.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct GenerationSpeed {
    /// Largest number of answers in a batch.
    pub batch_size: usize,
    /// The passes over prompts, each of which also gives the first token of its answers.
    pub prompts: TokenSpeed,
    /// The passes over one new token of each answer, and the tokens that they gave: all but the first of each answer,
    /// end-of-sequence tokens included.
    pub decoding: TokenSpeed,
}

impl fmt::Display for GenerationSpeed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { batch_size, prompts, decoding } = self;
        write!(
            f,
            "prompts {:.1} tokens/s ({} tokens), generation {:.1} tokens/s ({} tokens) in batches of up to {batch_size}",
            prompts.tokens_per_second, prompts.tokens, decoding.tokens_per_second, decoding.tokens,
        )
    }
}
