//! Models: configurations and families, checkpoints, parameters, and the hand-written forward and backward.
//!
//! Each file imports only from files to its left: `json`, `folder`, `config`, `safetensors`, `hub`, `weights`, `ids`, `origin`, `claim`,
//! `random`, `finite`, `table`, `plan`, `guide`, `intervention`, `layer`, `attention`, `swiglu`, `moe`, `feed_forward`, `transformer`, `decode`.

#[allow(non_snake_case)] // shape suffixes: see layer.rs
mod attention;
mod claim;
mod config;
#[allow(non_snake_case)] // shape suffixes: see layer.rs
mod decode;
#[allow(non_snake_case)] // shape suffixes: see layer.rs
mod feed_forward;
mod finite;
mod folder;
mod guide;
mod hub;
mod ids;
mod intervention;
mod json;
mod layer;
#[allow(non_snake_case)] // shape suffixes: see layer.rs
mod moe;
mod origin;
mod plan;
mod random;
mod safetensors;
#[allow(non_snake_case)] // shape suffixes: see layer.rs
mod swiglu;
mod table;
#[doc(hidden)]
pub mod tiny;
#[allow(non_snake_case)] // shape suffixes: see layer.rs
mod transformer;
mod weights;

pub use claim::Error as ClaimError;
pub use config::{Error as ConfigError, ExpertLayers, FAMILIES, Family, LayerKind, ModelConfig, MoeLayers, QkNorm};
pub use decode::{KvCache, kv_cache_bytes};
pub use finite::{NotFinite, find_non_finite};
pub use folder::left_over_quantization;
pub use guide::{RoutingMismatch, check_same_routing};
pub use hub::{Error as HubError, HubCache, HubId, is_hash};
pub use ids::{Group, ParamId, ParamKind, ParamSpec, Proj};
pub use intervention::{Intervention, InterventionError};
pub use layer::{Observer, OnLayer, Routed, RouterGrad, Sinks};
pub use plan::{GradPlan, expert_params};
pub use random::RandomInit;
pub use safetensors::{Header, HeaderError, StoredDtype, TensorInfo, write_header};
pub use table::{Count, ParamTable, hash_values};
pub use transformer::{BaseHead, Forward, ForwardOptions, Inputs, LossGrads, Model, OffloadedBelow, PassEnd};
pub use weights::{Checkpoint, Error as WeightsError, INDEX, SINGLE, Shard, files_of_index, safe_file};
