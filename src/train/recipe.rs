//! The recipe of a run: what each of its rounds does. It is decided once, from the options; everything below asks the
//! recipe, never an option.

use std::num::NonZeroUsize;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::memory::Recompute;
use crate::experts::{
    ExpertId, RandomMatch, RoutingTokens, Rule, Score, ScoreNorm, ScorePer, Select, Selection, SelectionLimits,
};
use crate::model::{ModelConfig, ParamId, ParamKind, ParamTable, expert_params};
use crate::optim::{LearningRates, LrSchedule};
use crate::routers::{ConsistencyLayers, KlType, RouterTarget, Statistic};

/// A part of a round, in the order in which the parts run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Scores and selects experts; trains nothing.
    Identify,
    /// Trains experts by cross-entropy.
    Expert,
    /// Aligns routers.
    Router,
    /// Trains experts and routers in one step.
    Joint,
}

impl Phase {
    /// The name of the phase in messages: `expert` in "round 1, expert step 7".
    pub fn name(self) -> &'static str {
        match self {
            Phase::Identify => "identification",
            Phase::Expert => "expert",
            Phase::Router => "router",
            Phase::Joint => "joint",
        }
    }

    /// The label of the phase in the progress bar.
    pub fn label(self) -> &'static str {
        match self {
            Phase::Identify => "identify",
            Phase::Expert => "experts",
            Phase::Router => "routers",
            Phase::Joint => "joint",
        }
    }
}

/// A phase of a round, with its options.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PhasePlan<'r> {
    /// Scores and selects experts; its options are those of the run ([`Recipe::identify`]).
    Identify,
    /// Trains experts by cross-entropy.
    Expert(&'r ExpertPhase),
    /// Aligns routers.
    Router(&'r RouterPhase),
    /// Trains experts and routers in one step.
    Joint(&'r JointPhase),
}

impl PhasePlan<'_> {
    /// Which phase it is.
    pub fn phase(self) -> Phase {
        match self {
            PhasePlan::Identify => Phase::Identify,
            PhasePlan::Expert(_) => Phase::Expert,
            PhasePlan::Router(_) => Phase::Router,
            PhasePlan::Joint(_) => Phase::Joint,
        }
    }
}

/// What a run does.
#[derive(Debug, Clone, PartialEq)]
pub struct Recipe {
    /// Rounds of identification and training.
    pub rounds: usize,
    /// Examples of a rank's micro-batch.
    pub batch_size: usize,
    /// Whether the rows come in a seeded order.
    pub shuffle: bool,
    /// The seed of the order and of random selections.
    pub seed: u64,
    /// How experts are scored and selected.
    pub identify: Identify,
    /// What is trained, and by which phases.
    pub training: Training,
    /// How the routing of safe and unsafe prompts is compared, in the router phase and in measurements.
    pub divergence: Divergence,
    /// How the model is kept near the base model; `None` without retain rows.
    pub retain: Option<Retain>,
    /// How a gradient becomes an update.
    pub updates: Updates,
    /// When the forward pass of a layer is recomputed in the backward.
    pub recompute: Recompute,
}

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

/// The loss that keeps the model near the base model on the retain rows. With both weights 0 the distance is only measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Retain {
    /// The loss of the next-token distributions.
    pub loss: RetainLoss,
    /// Its factor.
    pub weight: f64,
    /// Factor of the divergence of the routing.
    pub routing_weight: f64,
}

/// The loss of the next-token distributions on retain rows (`--retain-loss`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum RetainLoss {
    /// Cross-entropy of the rows' replies.
    Ce,
    /// Divergence from the base model's distributions over the whole vocabulary, at the tokens of the replies.
    #[default]
    Kl,
}

/// How a gradient becomes an update.
#[derive(Debug, Clone, PartialEq)]
pub struct Updates {
    /// How the learning rate changes over the steps of a phase.
    pub lr_schedule: LrSchedule,
    /// Steps of linear warm-up.
    pub warmup_steps: usize,
    /// Decoupled weight decay of AdamW.
    pub weight_decay: f64,
    /// Upper bound on the global gradient norm; `None`: no clipping.
    pub max_grad_norm: Option<f64>,
    /// Consecutive steps that may be skipped because a number is not finite.
    pub max_skipped_steps: usize,
    /// Steps between two comparisons of the weights of all ranks; 0: only at checkpoints.
    pub check_replicas: usize,
}

/// The safe side of the data that a run compares unsafe rows with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeededSides {
    /// The router phase compares prompts.
    pub safe_prompts: bool,
    /// The joint phase trains on safe examples.
    pub safe_examples: bool,
    /// The routing method counts on safe replies.
    pub safe_replies: bool,
    /// The routing method counts on the model's own replies to safe prompts.
    pub answered_prompts: bool,
}

/// Elements that a run trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainedElements {
    /// Of routed experts.
    pub experts: usize,
    /// Of routers.
    pub routers: usize,
    /// Of everything else.
    pub others: usize,
    /// The most that one phase trains, so that its gradients and optimizer state exist at once.
    pub at_once: usize,
}

impl Recipe {
    /// The phases of a round, in order.
    pub fn phases(&self) -> Vec<PhasePlan<'_>> {
        let training = match &self.training {
            Training::Nothing => vec![],
            Training::Experts(phase) => vec![PhasePlan::Expert(phase)],
            Training::Routers(phase) => vec![PhasePlan::Router(phase)],
            Training::Alternate(experts, routers) => vec![PhasePlan::Expert(experts), PhasePlan::Router(routers)],
            Training::Joint(phase) => vec![PhasePlan::Joint(phase)],
        };
        // A phase that selects at each step needs no selection for the round.
        let identify = (!self.selects_each_step()).then_some(PhasePlan::Identify);
        identify.into_iter().chain(training).collect()
    }

    /// Whether experts are selected anew at each training step, from the step's own batch.
    pub fn selects_each_step(&self) -> bool {
        let selection = match &self.training {
            Training::Experts(phase) | Training::Alternate(phase, _) => phase.selection,
            Training::Joint(phase) => phase.selection,
            Training::Nothing | Training::Routers(_) => Selection::Global,
        };
        selection == Selection::PerBatch
    }

    /// The name of the recipe in `training_metadata.json`.
    pub fn strategy(&self) -> &'static str {
        match &self.training {
            Training::Nothing => "frozen",
            Training::Routers(_) => "router_only",
            Training::Joint(phase) => phase.trained.map_or("router_only", |_| "joint"),
            _ if self.trained() == Some(Trained::Everything) => "baseline",
            Training::Experts(_) => "expert_only",
            Training::Alternate(..) => "combined",
        }
    }

    /// Which weights an expert phase or a joint phase trains.
    pub fn trained(&self) -> Option<Trained> {
        match &self.training {
            Training::Experts(phase) | Training::Alternate(phase, _) => Some(phase.trained),
            Training::Joint(phase) => phase.trained,
            Training::Nothing | Training::Routers(_) => None,
        }
    }

    /// The router phase, if the run has one.
    pub fn router_phase(&self) -> Option<&RouterPhase> {
        match &self.training {
            Training::Routers(phase) | Training::Alternate(_, phase) => Some(phase),
            _ => None,
        }
    }

    /// The safe rows that the run cannot do without.
    pub fn needed_sides(&self) -> NeededSides {
        NeededSides {
            safe_prompts: self.router_phase().is_some(),
            answered_prompts: self.identify.compares_sides()
                && matches!(self.identify.counted_replies(), CountedReplies::Own { .. }),
            safe_examples: matches!(self.training, Training::Joint(_)),
            safe_replies: self.identify.compares_sides() && self.identify.counted_replies() == CountedReplies::Targets,
        }
    }

    /// Forward passes that wait for their backward at the same time: the consistency loss of a joint step is that of all its
    /// micro-batches.
    pub fn forwards_at_once(&self) -> usize {
        match &self.training {
            Training::Joint(phase) => phase.grad_accum,
            _ => 1,
        }
    }

    /// How many elements the run trains, where each round selects as many experts as the options ask for.
    pub fn trained_elements(&self, table: &ParamTable, model: &ModelConfig) -> TrainedElements {
        let count = |wanted: fn(ParamKind) -> bool| table.count(|spec| wanted(spec.kind)).elements;
        let all_routers = count(|kind| matches!(kind, ParamKind::Router(_)));
        let all_experts = count(|kind| matches!(kind, ParamKind::Expert(..)));
        let [experts, others] = match self.trained() {
            None => [0, 0],
            Some(Trained::SelectedExperts) => [
                self.identify.expected_size(model.moe_layers().count(), model.num_experts)
                    * 3
                    * model.hidden_size
                    * model.expert_width,
                0,
            ],
            Some(Trained::AllExperts) => [all_experts, 0],
            Some(Trained::Everything) => [all_experts, table.total().elements - all_experts - all_routers],
        };
        let everything = self.trained() == Some(Trained::Everything);
        let joint = matches!(self.training, Training::Joint(_));
        let routers = if self.router_phase().is_some() || joint || everything { all_routers } else { 0 };
        let at_once = if joint || everything { experts + routers + others } else { experts.max(routers) };
        TrainedElements { experts, routers, others, at_once }
    }
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
