//! The part of a recipe that says how experts are scored and selected.

use crate::experts::{ExpertId, RandomMatch, RoutingTokens, Rule, Score, ScoreNorm, ScorePer, Select, SelectionLimits};

/// How experts are scored and selected.
#[derive(Debug, Clone, PartialEq)]
pub struct Identify {
    /// What a score measures.
    pub by: ScoreBy,
    /// Which end of the ranking is selected.
    pub select: Select,
    /// How many experts are selected, and from which.
    pub limits: SelectionLimits,
    /// Whether `top_k` may exceed the number of experts. True if the selection is only reported and not trained; otherwise that is
    /// an error.
    pub as_many_as_exist: bool,
    /// The seed of random selections and of the bootstrap.
    pub seed: u64,
    /// Resamples of the micro-batches from which inclusion probabilities are computed; 0: none.
    pub bootstrap: usize,
    /// Whether only the first round scores and selects.
    pub once: bool,
    /// A later round keeps the selection before it where the mean loss of its scan is below this share of the first round's: the
    /// gradients are noise then. 0: never.
    pub until: f64,
    /// The experts of [`ScoreBy::Given`], in the order of their file; otherwise empty.
    pub given: Vec<ExpertId>,
}

/// What the score of an expert measures.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ScoreBy {
    /// The size of the gradient of the expert's weights.
    Gradient(GradientScore),
    /// How much more often unsafe than safe tokens are routed to the expert.
    Routing {
        /// The tokens that are counted.
        tokens: RoutingTokens,
        /// Only a risk difference above this qualifies.
        threshold: f64,
        /// The replies whose tokens are counted.
        replies: CountedReplies,
    },
    /// Routing, by a published rule.
    Published {
        /// The rule.
        rule: Rule,
        /// The tokens that are counted.
        tokens: RoutingTokens,
        /// The replies whose tokens are counted.
        replies: CountedReplies,
    },
    /// Nothing: experts are drawn at random, once a run.
    Random {
        /// The gradient score whose selection the draw matches or excludes; `None` if it does neither.
        gradient: Option<GradientScore>,
        /// The counts of that selection which the draw matches.
        matching: RandomMatch,
        /// Whether that selection is excluded from the draw.
        exclude_found: bool,
    },
    /// Nothing: the experts are given ([`Identify::given`]).
    Given,
}

/// The replies on whose tokens routing is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CountedReplies {
    /// The targets of the rows, in one forward pass.
    Targets,
    /// The model's own greedy replies of at most so many tokens.
    Own {
        /// Largest number of tokens of a reply.
        max_new_tokens: usize,
    },
    /// Those of routing traces: no forward pass is needed.
    Traces,
}

/// A score from gradients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradientScore {
    /// The norm that is taken.
    pub score: Score,
    /// What it is divided by in each micro-batch.
    pub per: ScorePer,
    /// What the mean over micro-batches is divided by.
    pub norm: ScoreNorm,
}

impl Identify {
    /// The smallest score that qualifies, where the method has one.
    pub fn threshold(&self) -> Option<f64> {
        match self.by {
            ScoreBy::Routing { threshold, .. } => Some(threshold),
            ScoreBy::Gradient(_) | ScoreBy::Published { .. } | ScoreBy::Random { .. } | ScoreBy::Given => None,
        }
    }

    /// Whether a later round keeps the first round's selection and scores nothing: random and given experts are the same in
    /// all rounds, so that as many experts are trained as the options ask for; routing traces are of the untrained model.
    pub fn keeps_first_selection(&self) -> bool {
        let traces = self.counted_replies() == CountedReplies::Traces;
        self.once || traces || matches!(self.by, ScoreBy::Random { .. } | ScoreBy::Given)
    }

    /// Whether the score compares routing on unsafe and on safe prompts.
    pub fn compares_sides(&self) -> bool {
        match self.by {
            ScoreBy::Routing { .. } => true,
            ScoreBy::Published { rule, .. } => rule.needs_safe_side(),
            ScoreBy::Gradient(_) | ScoreBy::Random { .. } | ScoreBy::Given => false,
        }
    }

    /// The number of experts that a round selects, of a model with so many MoE layers of `num_experts` experts each. For a published
    /// rule that decides the number itself it is an estimate.
    pub fn expected_size(&self, layers: usize, num_experts: usize) -> usize {
        match self.by {
            ScoreBy::Published { rule, .. } if rule.decides_size() => {
                layers * (rule.share().unwrap_or(1.0) * num_experts as f64).ceil() as usize
            }
            _ => self.limits.top_k,
        }
    }

    /// The replies on whose tokens routing is counted.
    pub fn counted_replies(&self) -> CountedReplies {
        match self.by {
            ScoreBy::Routing { replies, .. } | ScoreBy::Published { replies, .. } => replies,
            ScoreBy::Gradient(_) | ScoreBy::Random { .. } | ScoreBy::Given => CountedReplies::Targets,
        }
    }

    /// The limits for a model with the MoE layers `layers` of `num_experts` experts each: `top_k` is lowered to the number of
    /// experts that exist if [`Self::as_many_as_exist`].
    pub fn limits_for(&self, layers: &[usize], num_experts: usize) -> SelectionLimits {
        let mut limits = self.limits.clone();
        if self.as_many_as_exist {
            limits.top_k = limits.top_k.min(limits.available(layers, num_experts));
        }
        limits
    }
}
