//! Models: family tables, weights in and out, and the hand-written forward and backward.

mod config;
mod params;

pub use config::{LayerKind, ModelConfig, QkNorm};
pub use params::{ParamId, ParamKind, ParamSpec, ParamTable, Proj};
