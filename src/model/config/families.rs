//! The differences between model families, as one table.
//!
//! Behaviour and defaults are those of transformers 5.17, `models/{olmoe,mixtral,qwen3_moe,qwen2_moe,qwen3,llama,mistral}`. A new
//! family that differs in these points only is a new row.

/// RMS norm of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QkNorm {
    /// No norm.
    None,
    /// One norm over each head; the weight is `[dim]`.
    PerHead,
    /// One norm over all heads together; the weight is `[heads · dim]`.
    WholeWidth,
}

/// A boolean that the family fixes, or that a key of config.json sets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rule {
    /// The same for every model of the family.
    Fixed(bool),
    /// The value of this key, or the default.
    Key(&'static str, bool),
}

/// Which layers have an attention window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WindowRule {
    /// No layer.
    Never,
    /// All layers, if `sliding_window` is set; where the key is absent, this window.
    IfSet(Option<usize>),
    /// All layers, if `use_sliding_window` is true.
    IfUsed,
    /// The layers whose entry in `layer_types` is `sliding_attention`. Without `layer_types`, if `use_sliding_window` is
    /// true: layers 0, 2, 4, ... below `max_window_layers`.
    ByLayer,
    /// The same, but without `layer_types` the layers from `max_window_layers` up.
    FromLayer,
}

/// Which layers have routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExpertLayers {
    /// All.
    All,
    /// Those that `mlp_only_layers` and `decoder_sparse_step` do not make dense, at least one.
    ByKeys,
    /// None: the family is dense.
    None,
}

/// Defaults of keys that config.json may leave out.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// `vocab_size`
    pub vocab_size: usize,
    /// `hidden_size`
    pub hidden_size: usize,
    /// `num_hidden_layers`
    pub layers: usize,
    /// `num_attention_heads`
    pub heads: usize,
    /// `num_key_value_heads`; `None`: the number of query heads.
    pub kv_heads: Option<usize>,
    /// `max_position_embeddings`
    pub positions: usize,
    /// `head_dim`; `None`: `hidden_size` / heads.
    pub head_dim: Option<usize>,
    /// `num_experts` or `num_local_experts`
    pub experts: usize,
    /// `num_experts_per_tok`
    pub top_k: usize,
    /// The key in [`Family::expert_width_key`]
    pub expert_width: usize,
    /// `intermediate_size`, in families where it is the width of dense layers
    pub dense_width: usize,
    /// `rms_norm_eps`
    pub eps: f64,
    /// `rope_theta`
    pub theta: f64,
}

/// One model family.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Family {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// The first entry of `architectures` in config.json.
    pub architecture: &'static str,
    /// Defaults of keys that config.json may leave out.
    pub defaults: Defaults,
    /// The key of the expert width F.
    pub expert_width_key: &'static str,
    /// The key and default of the shared expert's width.
    pub shared_expert: Option<(&'static str, usize)>,
    /// Which layers have routed experts.
    pub expert_layers: ExpertLayers,
    /// Whether routing weights are divided by their sum.
    pub renormalize: Rule,
    /// Norms of queries and keys.
    pub qk_norm: QkNorm,
    /// Whether `clip_qkv` is read.
    pub clip_qkv: bool,
    /// Biases of the q, k and v projections.
    pub qkv_bias: Rule,
    /// Bias of the output projection.
    pub o_bias: Rule,
    /// Attention windows.
    pub window: WindowRule,
    /// Names of the MoE block within a layer, one of which a checkpoint uses; the first is the name in the published
    /// checkpoints.
    pub blocks: &'static [&'static str],
    /// Names of an expert's gate, up and down matrices in checkpoints with one tensor per expert and matrix.
    pub expert_matrices: [&'static str; 3],
}

/// All supported families.
pub const FAMILIES: [Family; 7] = [
    Family {
        model_type: "olmoe",
        architecture: "OlmoeForCausalLM",
        defaults: Defaults {
            vocab_size: 50304,
            hidden_size: 2048,
            layers: 16,
            heads: 16,
            kv_heads: None,
            positions: 4096,
            head_dim: None,
            experts: 64,
            top_k: 8,
            expert_width: 2048,
            dense_width: 2048,
            eps: 1e-5,
            theta: 1e4,
        },
        expert_width_key: "intermediate_size",
        shared_expert: None,
        expert_layers: ExpertLayers::All,
        renormalize: Rule::Key("norm_topk_prob", false),
        qk_norm: QkNorm::WholeWidth,
        clip_qkv: true,
        qkv_bias: Rule::Key("attention_bias", false),
        o_bias: Rule::Key("attention_bias", false),
        window: WindowRule::Never,
        blocks: &["mlp"],
        expert_matrices: ["gate_proj", "up_proj", "down_proj"],
    },
    Family {
        model_type: "mixtral",
        architecture: "MixtralForCausalLM",
        defaults: Defaults {
            vocab_size: 32000,
            hidden_size: 4096,
            layers: 32,
            heads: 32,
            kv_heads: Some(8),
            positions: 131072,
            head_dim: None,
            experts: 8,
            top_k: 2,
            expert_width: 14336,
            dense_width: 14336,
            eps: 1e-5,
            theta: 1e6,
        },
        expert_width_key: "intermediate_size",
        shared_expert: None,
        expert_layers: ExpertLayers::All,
        renormalize: Rule::Fixed(true),
        qk_norm: QkNorm::None,
        clip_qkv: false,
        qkv_bias: Rule::Fixed(false),
        o_bias: Rule::Fixed(false),
        window: WindowRule::IfSet(None),
        blocks: &["block_sparse_moe", "mlp"],
        expert_matrices: ["w1", "w3", "w2"],
    },
    Family {
        model_type: "qwen3_moe",
        architecture: "Qwen3MoeForCausalLM",
        defaults: Defaults {
            vocab_size: 151936,
            hidden_size: 2048,
            layers: 24,
            heads: 32,
            kv_heads: Some(4),
            positions: 32768,
            head_dim: None,
            experts: 128,
            top_k: 8,
            expert_width: 768,
            dense_width: 6144,
            eps: 1e-6,
            theta: 1e4,
        },
        expert_width_key: "moe_intermediate_size",
        shared_expert: None,
        expert_layers: ExpertLayers::ByKeys,
        renormalize: Rule::Key("norm_topk_prob", false),
        qk_norm: QkNorm::PerHead,
        clip_qkv: false,
        qkv_bias: Rule::Key("attention_bias", false),
        o_bias: Rule::Key("attention_bias", false),
        window: WindowRule::IfUsed,
        blocks: &["mlp"],
        expert_matrices: ["gate_proj", "up_proj", "down_proj"],
    },
    Family {
        model_type: "qwen2_moe",
        architecture: "Qwen2MoeForCausalLM",
        defaults: Defaults {
            vocab_size: 151936,
            hidden_size: 2048,
            layers: 24,
            heads: 16,
            kv_heads: Some(16),
            positions: 32768,
            head_dim: None,
            experts: 60,
            top_k: 4,
            expert_width: 1408,
            dense_width: 5632,
            eps: 1e-6,
            theta: 1e4,
        },
        expert_width_key: "moe_intermediate_size",
        shared_expert: Some(("shared_expert_intermediate_size", 5632)),
        expert_layers: ExpertLayers::ByKeys,
        renormalize: Rule::Key("norm_topk_prob", false),
        qk_norm: QkNorm::None,
        clip_qkv: false,
        qkv_bias: Rule::Key("qkv_bias", true),
        o_bias: Rule::Fixed(false),
        window: WindowRule::ByLayer,
        blocks: &["mlp"],
        expert_matrices: ["gate_proj", "up_proj", "down_proj"],
    },
    Family {
        model_type: "qwen3",
        architecture: "Qwen3ForCausalLM",
        defaults: Defaults {
            vocab_size: 151936,
            hidden_size: 4096,
            layers: 32,
            heads: 32,
            kv_heads: Some(32),
            positions: 32768,
            head_dim: Some(128),
            dense_width: 22016,
            eps: 1e-6,
            theta: 1e4,
            ..NO_EXPERTS
        },
        qk_norm: QkNorm::PerHead,
        qkv_bias: Rule::Key("attention_bias", false),
        o_bias: Rule::Key("attention_bias", false),
        window: WindowRule::FromLayer,
        ..DENSE
    },
    Family {
        model_type: "llama",
        architecture: "LlamaForCausalLM",
        defaults: Defaults {
            vocab_size: 32000,
            hidden_size: 4096,
            layers: 32,
            heads: 32,
            kv_heads: None,
            positions: 2048,
            head_dim: None,
            dense_width: 11008,
            eps: 1e-6,
            theta: 1e4,
            ..NO_EXPERTS
        },
        qk_norm: QkNorm::None,
        qkv_bias: Rule::Key("attention_bias", false),
        o_bias: Rule::Key("attention_bias", false),
        window: WindowRule::Never,
        ..DENSE
    },
    Family {
        model_type: "mistral",
        architecture: "MistralForCausalLM",
        defaults: Defaults {
            vocab_size: 32000,
            hidden_size: 4096,
            layers: 32,
            heads: 32,
            kv_heads: Some(8),
            positions: 131072,
            head_dim: None,
            dense_width: 14336,
            eps: 1e-6,
            theta: 1e4,
            ..NO_EXPERTS
        },
        qk_norm: QkNorm::None,
        qkv_bias: Rule::Fixed(false),
        o_bias: Rule::Fixed(false),
        window: WindowRule::IfSet(Some(4096)),
        ..DENSE
    },
];

/// The defaults of a dense family that are not used: it has no experts.
const NO_EXPERTS: Defaults = Defaults {
    vocab_size: 0,
    hidden_size: 0,
    layers: 0,
    heads: 0,
    kv_heads: None,
    positions: 0,
    head_dim: None,
    experts: 1,
    top_k: 1,
    expert_width: 1,
    dense_width: 0,
    eps: 0.0,
    theta: 0.0,
};

/// What dense families have in common.
const DENSE: Family = Family {
    model_type: "",
    architecture: "",
    defaults: NO_EXPERTS,
    expert_width_key: "intermediate_size",
    shared_expert: None,
    expert_layers: ExpertLayers::None,
    renormalize: Rule::Fixed(false),
    qk_norm: QkNorm::None,
    clip_qkv: false,
    qkv_bias: Rule::Fixed(false),
    o_bias: Rule::Fixed(false),
    window: WindowRule::Never,
    blocks: &["mlp"],
    expert_matrices: ["gate_proj", "up_proj", "down_proj"],
};

impl Family {
    /// Whether no layer has experts.
    pub fn is_dense(&self) -> bool {
        self.expert_layers == ExpertLayers::None
    }

    /// The family of this `model_type`.
    pub fn find(model_type: &str) -> Option<&'static Family> {
        FAMILIES.iter().find(|family| family.model_type == model_type)
    }
}
