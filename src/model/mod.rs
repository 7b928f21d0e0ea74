//! Models: family tables, weights in and out, and the hand-written forward and backward.

mod attention;
mod claim;
mod config;
mod feed_forward;
mod finite;
mod hub;
mod ids;
mod json;
mod plan;
mod random;
mod safetensors;
mod table;
pub mod tiny;
mod transformer;
mod weights;

pub use attention::KvCache;
pub use claim::Error as ClaimError;
pub use config::{Error as ConfigError, FAMILIES, Family, LayerKind, ModelConfig, MoeLayers, QkNorm};
pub use feed_forward::{Observer, Routed};
pub use finite::{NotFinite, find_non_finite};
pub use hub::{Error as HubError, HubCache};
pub use ids::{Group, ParamId, ParamKind, ParamSpec, Proj};
pub use plan::{GradPlan, expert_params};
pub use random::RandomInit;
pub use safetensors::{Header, HeaderError, StoredDtype, TensorInfo, write_header};
pub use table::{Count, ParamTable};
pub use transformer::{Forward, ForwardOptions, Inputs, LossGrads, Model, OnLayer, PassEnd, RouterGrad, Sinks};
pub use weights::{Checkpoint, Error as WeightsError, Shard, safe_file};
