//! The method on one rank of many: scoring and selecting experts, and training them and the routers. No options, no files,
//! no user interface: those are above.
//!
//! | file | content |
//! |---|---|
//! | `recipe` | what each round does, decided once from the options |
//! | `replica` | this rank's weights, who may write them, forward passes, agreement between ranks |
//! | `scan`, `usage`, `identification` | the scoring pass, and the selection from its scores |
//! | `phase` | one training step: select, backward, norm, update or skip (the loop over steps is `run/train.rs`) |
//! | `objective` | what a phase minimises; `expert`, `router` and `joint` implement it |
//! | `alignment` | routing statistics of a step's global batch, their divergence and its gradient |
//! | `divergence` | the difference of the routing of all safe and all unsafe prompts |
//! | `retention` | the loss that keeps the model near the base on retain rows; how far it has drifted |
//! | `expert_load` | the tokens of each expert, and how even they are |
//! | `trainer`, `step_backward`, `exchange`, `device_transport` | gradient buffers, the sharded optimizer, what ranks exchange |
//! | `check_replicas` | the check that all ranks hold the same weights |
//! | `measure` | losses over a whole data set, and of single examples |
//! | `ablation` | the measurements of the causal check: rows with sets of experts switched off |
//! | `memory` | memory of a rank from shapes; how many layers keep their activations |
//! | `stop`, `fault` | the stop flag; fault injection for tests |

mod ablation;
pub mod alignment;
mod check_replicas;
mod device_transport;
mod divergence;
mod exchange;
mod expert;
mod expert_load;
pub mod fault;
mod identification;
mod joint;
mod measure;
pub mod memory;
mod objective;
mod phase;
mod recipe;
mod replica;
mod retention;
mod router;
mod router_target;
mod scan;
mod step_backward;
mod stop;
mod trainer;
mod usage;

pub use ablation::{CausalRows, Outcome, RowLosses, Switch, can_switch_off, loads, with_experts_off};
pub use check_replicas::check_replicas;
pub use device_transport::{DeviceTransport, GpuTransport};
pub use divergence::divergence_of_prompts;
pub use expert::ExpertCrossEntropy;
pub use expert_load::{ExpertLoads, LoadBalance};
pub use identification::{Identification, StepSelections, find, select};
pub use joint::JointConsistency;
pub use measure::{ExampleLoss, Measured, example_losses, mean_loss, mean_of, pack_in_order};
pub use memory::Recompute;
pub use objective::{Losses, Objective};
pub use phase::{PhaseProgress, StepResult, TrainingPhase};
pub use recipe::{
    CountedReplies, Divergence, ExpertPhase, GradientScore, Identify, JointPhase, NeededSides, Phase, PhasePlan,
    Recipe, Retain, RetainLoss, RouterPhase, ScoreBy, Trained, TrainedElements, Training, Updates, router_params,
};
pub use replica::{Replica, share};
pub use retention::{
    BaseOutputs, BaseRow, Drift, LayerDrift, RetainRows, Retention, RowDrift, compute_base, drift_by_row, hidden_states,
};
pub use router::{RouterAlignment, alignment_by_layer};
pub use scan::{Decision, NonFinite, Scan, ScoredBatch, Scores, risk_differences};
pub use step_backward::StepBackward;
pub use stop::StopFlag;
pub use trainer::{Norm, Trainer};
