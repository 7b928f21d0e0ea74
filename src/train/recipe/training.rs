//! The part of a recipe that says what is trained, and the options of each phase.

use std::num::NonZeroUsize;

use crate::experts::{ExpertId, Selection};
use crate::model::{ParamId, ParamKind, ParamTable, expert_params};
use crate::optim::LearningRates;
use crate::routers::{ConsistencyLayers, KlType, RouterTarget, Statistic};

/// What the rounds train, and by which phases.
#[derive(Debug, Clone, PartialEq)]
pub enum Training {
    /// Nothing: the run scores and measures.
    Nothing,
    /// Experts only.
    Experts(ExpertPhase),
    /// Routers only.
    Routers(RouterPhase),
    /// First experts, then routers.
    Alternate(ExpertPhase, RouterPhase),
    /// Experts and routers in the same step.
    Joint(JointPhase),
}

/// Which weights the expert phase trains, or the joint phase besides all routers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trained {
    /// The selected experts.
    SelectedExperts,
    /// All experts.
    AllExperts,
    /// All parameters of the model, routers included.
    Everything,
}

/// The expert phase: cross-entropy of the refusals.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertPhase {
    /// The weights that it trains.
    pub trained: Trained,
    /// When experts are selected.
    pub selection: Selection,
    /// Passes over the data in a round.
    pub epochs: usize,
    /// Micro-batches of a rank in one step.
    pub grad_accum: usize,
    /// Learning rate of everything that it trains.
    pub lr: f64,
}

/// The router phase: alignment by two forward passes. It accumulates nothing: a step compares whole global batches.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterPhase {
    /// Passes over the data in a round.
    pub epochs: usize,
    /// What is minimised.
    pub divergence: Divergence,
    /// The routing that the unsafe prompts are aligned with.
    pub target: RouterTarget,
    /// Learning rate of the routers.
    pub lr: f64,
}

/// How the routing of safe prompts is compared with that of unsafe ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Divergence {
    /// How the logits of a layer become one distribution over its experts.
    pub statistic: Statistic,
    /// How many tokens at the end of each prompt count; `None`: all.
    pub last_tokens: Option<NonZeroUsize>,
    /// The divergence between the two distributions.
    pub kl: KlType,
}

/// The joint phase: cross-entropy plus the weighted in-batch consistency loss.
#[derive(Debug, Clone, PartialEq)]
pub struct JointPhase {
    /// The weights that it trains besides the routers.
    pub trained: Option<Trained>,
    /// When experts are selected.
    pub selection: Selection,
    /// Passes over the unsafe replies in a round.
    pub epochs: usize,
    /// Micro-batches of a rank in one step.
    pub grad_accum: usize,
    /// Share of safe examples in a micro-batch.
    pub safe_ratio: f64,
    /// Factor of the consistency loss.
    pub weight: f64,
    /// The divergence of the consistency loss.
    pub kl: KlType,
    /// The layers in the consistency loss.
    pub layers: ConsistencyLayers,
    /// Learning rate of experts (and of everything else besides routers).
    pub expert_lr: f64,
    /// Learning rate of routers.
    pub router_lr: f64,
}

impl Trained {
    /// The parameters, in the table's order.
    pub fn params(self, table: &ParamTable, selected: &[ExpertId]) -> Vec<ParamId> {
        let all = 0..table.params.len();
        let mut ids: Vec<ParamId> = match self {
            Trained::Everything => all.collect(),
            Trained::AllExperts => all.filter(|&id| matches!(table.params[id].kind, ParamKind::Expert(..))).collect(),
            Trained::SelectedExperts => {
                selected.iter().flat_map(|id| expert_params(table, id.layer, id.expert)).collect()
            }
        };
        ids.sort_unstable();
        ids
    }
}

impl JointPhase {
    /// Examples of an epoch, the safe ones included, of data with so many unsafe ones.
    pub fn examples(&self, unsafe_examples: f64) -> f64 {
        unsafe_examples / (1.0 - self.safe_ratio)
    }

    /// The parameters, in the table's order: routers and what is trained besides them.
    pub fn params(&self, table: &ParamTable, selected: &[ExpertId]) -> Vec<ParamId> {
        let mut ids = self.trained.map_or_else(Vec::new, |trained| trained.params(table, selected));
        ids.extend(router_params(table));
        ids.sort_unstable();
        ids.dedup(); // all parameters include the routers
        ids
    }

    /// The learning rates of a step before the schedule.
    pub fn rates(&self) -> LearningRates {
        LearningRates { expert: self.expert_lr, router: self.router_lr, other: self.expert_lr }
    }
}

/// All routers, in the table's order.
pub fn router_params(table: &ParamTable) -> Vec<ParamId> {
    table.iter().filter(|(_, spec)| matches!(spec.kind, ParamKind::Router(_))).map(|(id, _)| id).collect()
}
