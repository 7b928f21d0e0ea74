//! What a checkpoint's `config.json` says, in one vocabulary for all families.

use crate::backend::{Heads, Rope};

/// The feed-forward part of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// Routed experts.
    Moe,
    /// One SwiGLU of this width.
    Dense(usize),
}

/// Where queries and keys are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// Not at all.
    None,
    /// Each head on its own.
    PerHead,
    /// The whole width at once.
    WholeWidth,
}

/// A model's shape and its family's differences, as data.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// `model_type` of config.json.
    pub model_type: String,
    /// V
    pub vocab_size: usize,
    /// D
    pub hidden_size: usize,
    /// One entry a decoder layer.
    pub layers: Vec<LayerKind>,
    /// One entry a decoder layer (the window may differ).
    pub heads: Vec<Heads>,
    /// E
    pub num_experts: usize,
    /// K
    pub num_experts_per_tok: usize,
    /// F
    pub expert_width: usize,
    /// Routing weights are divided by their sum.
    pub renormalize: bool,
    /// Width of the shared expert, which every token visits.
    pub shared_expert_width: Option<usize>,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Queries, keys and values are clamped to ± this.
    pub clip_qkv: Option<f32>,
    /// The q, k and v projections have biases.
    pub qkv_bias: bool,
    /// The output projection of attention has a bias.
    pub o_bias: bool,
    /// The output head is the embedding.
    pub tie_word_embeddings: bool,
    /// Added to the mean square.
    pub rms_norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
}
