//! Models: family tables, weights in and out, and the hand-written forward and backward.

mod attention;
mod config;
mod feed_forward;
mod params;
mod plan;
mod transformer;

pub use attention::KvCache;
pub use config::{LayerKind, ModelConfig, QkNorm};
pub use feed_forward::{Observer, Routed};
pub use params::{ParamId, ParamKind, ParamSpec, ParamTable, Proj};
pub use plan::{GradPlan, expert_params};
pub use transformer::{Forward, ForwardOptions, Inputs, LossGrads, Model, PassEnd, RouterGrad, Sinks};
