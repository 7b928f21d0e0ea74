//! How fast answers are generated.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::collective::{self, Collective};

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

/// How fast answers were generated: on one rank, or tokens and seconds summed over ranks, so that rates are those of a rank. Times differ from run to run.
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

/// Value of [`EvalTimes::schema`].
pub const TIMES_SCHEMA: &str = "moewarden.eval_times/1";

/// How long the generation of answers took.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct AnswerTimes {
    /// Ranks that generated answers.
    pub ranks: usize,
    /// Answers that this run of the command generated: those of an interrupted run before it are not counted.
    pub answers: usize,
    /// Tokens of these answers, end-of-sequence tokens excluded.
    pub tokens: usize,
    /// Wall-clock time of generating them, in which ranks also wait for each other.
    pub seconds: f64,
    /// `tokens` / `seconds`: the speed of all ranks together.
    pub tokens_per_second: f64,
    /// Forward passes; tokens and seconds are summed over ranks.
    #[serde(flatten)]
    pub passes: GenerationSpeed,
}

/// The content of `eval_times.json`: what differs between two runs of the same evaluation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EvalTimes {
    /// [`TIMES_SCHEMA`].
    pub schema: String,
    /// The generation of answers.
    pub answers: Option<AnswerTimes>,
    /// That of the answers to questions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub questions: Option<AnswerTimes>,
    /// That of the judge's verdicts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verdicts: Option<AnswerTimes>,
}

impl EvalTimes {
    /// These times, but where this run of the command generated nothing, those of the run before it: a judge that is added later does
    /// not say how fast the answers were generated.
    #[must_use]
    pub fn or_those_of(self, earlier: &Self) -> Self {
        let keep = |new: Option<AnswerTimes>, old: Option<AnswerTimes>| {
            let new = new?;
            Some(if new.answers == 0 { old.unwrap_or(new) } else { new })
        };
        Self {
            answers: keep(self.answers, earlier.answers),
            questions: keep(self.questions, earlier.questions),
            verdicts: keep(self.verdicts, earlier.verdicts),
            schema: self.schema,
        }
    }
}

impl AnswerTimes {
    /// Sums the passes of all ranks. `answers`, `tokens` and `seconds` are those of all ranks together.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn gather(
        world: &dyn Collective,
        own: GenerationSpeed,
        [answers, tokens]: [usize; 2],
        seconds: f64,
    ) -> Result<Self, collective::Error> {
        let own_bytes = serde_json::to_vec(&own).expect("numbers are data");
        let mut passes = GenerationSpeed { batch_size: own.batch_size, ..GenerationSpeed::default() };
        for other in world.all_gather(&own_bytes)? {
            let other: GenerationSpeed = serde_json::from_slice(&other).expect("the speed of another rank");
            passes.prompts.add(other.prompts.tokens, other.prompts.seconds);
            passes.decoding.add(other.decoding.tokens, other.decoding.seconds);
        }
        let tokens_per_second = tokens as f64 / seconds.max(1e-9);
        Ok(Self { ranks: world.world_size(), answers, tokens, seconds, tokens_per_second, passes })
    }
}

impl fmt::Display for AnswerTimes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { ranks, answers, tokens, seconds, tokens_per_second, passes } = self;
        let on = if *ranks > 1 { format!(" on {ranks} ranks") } else { String::new() };
        let of_a_rank = if *ranks > 1 { "; of a rank, in its passes: " } else { "; " };
        write!(
            f,
            "{answers} with {tokens} tokens in {seconds:.1} s{on}, {tokens_per_second:.1} tokens/s{of_a_rank}{passes}"
        )
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_an_earlier_run_are_kept_where_nothing_was_generated() {
        let took = |answers| {
            let passes = GenerationSpeed::default();
            AnswerTimes { ranks: 1, answers, tokens: 0, seconds: 1.0, tokens_per_second: 0.0, passes }
        };
        let times = |answers, questions, verdicts| EvalTimes {
            schema: TIMES_SCHEMA.into(),
            answers: Some(took(answers)),
            questions,
            verdicts,
        };
        let earlier = times(8, Some(took(3)), None);
        let now = times(0, Some(took(2)), Some(took(0)));
        assert_eq!(now.or_those_of(&earlier), times(8, Some(took(2)), Some(took(0))));
        assert_eq!(times(0, None, None).or_those_of(&earlier), times(8, None, None));
    }
}
