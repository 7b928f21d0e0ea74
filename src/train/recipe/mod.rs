//! The recipe of a run: what each of its rounds does. It is decided once, from the options; everything below asks the
//! recipe, never an option.

mod identify;
mod phase;
mod training;

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

pub use identify::{CountedReplies, GradientScore, Identify, ScoreBy};
pub use phase::{Phase, PhasePlan};
pub use training::{Divergence, ExpertPhase, JointPhase, RouterPhase, Trained, Training, router_params};

use super::memory::Recompute;
use crate::experts::Selection;
use crate::model::{ModelConfig, ParamKind, ParamTable};
use crate::optim::LrSchedule;

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

impl Updates {
    /// What is to be said of the warm-up in a phase of this many steps.
    pub fn warm_up_problem(&self, steps: usize) -> Option<String> {
        (self.warmup_steps > 0 && self.warmup_steps >= steps).then(|| {
            format!(
                "the warm-up of {} steps does not end within its {steps} steps, so that the learning rate stays below the one that is \
                 given: lower --warmup-steps",
                self.warmup_steps
            )
        })
    }
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
    /// micro-batches, of which data with this many unsafe examples have no more than an epoch has.
    pub fn forwards_at_once(&self, unsafe_examples: usize) -> usize {
        match &self.training {
            Training::Joint(phase) => {
                let examples = phase.examples(unsafe_examples as f64);
                phase.grad_accum.min((examples / self.batch_size as f64).ceil().max(1.0) as usize)
            }
            _ => 1,
        }
    }

    /// The most elements of experts that so many steps select, where each step selects its own.
    pub fn selected_elements(&self, table: &ParamTable, model: &ModelConfig, steps: usize) -> usize {
        let all = table.count(|spec| matches!(spec.kind, ParamKind::Expert(..))).elements;
        all.min(self.trained_elements(table, model).experts.saturating_mul(steps))
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
