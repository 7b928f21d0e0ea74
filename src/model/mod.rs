//! Models: family tables, weights in and out, and the hand-written forward and backward.

mod attention;
mod claim;
mod config;
mod families;
mod feed_forward;
mod finite;
mod hub;
mod json;
mod params;
mod plan;
mod random;
mod raw_config;
mod rope;
mod safetensors;
pub mod tiny;
mod transformer;
mod weights;

pub use attention::KvCache;
pub use claim::Error as ClaimError;
pub use config::{Error as ConfigError, LayerKind, ModelConfig, QkNorm};
pub use families::{FAMILIES, Family};
pub use feed_forward::{Observer, Routed};
pub use finite::{NotFinite, find_non_finite};
pub use hub::{Error as HubError, HubCache};
pub use params::{Count, Group, ParamId, ParamKind, ParamSpec, ParamTable, Proj};
pub use plan::{GradPlan, expert_params};
pub use random::RandomInit;
pub use safetensors::{Header, HeaderError, StoredDtype, TensorInfo, write_header};
pub use transformer::{Forward, ForwardOptions, Inputs, LossGrads, Model, OnLayer, PassEnd, RouterGrad, Sinks};
pub use weights::{Checkpoint, Error as WeightsError, Shard, safe_file};
