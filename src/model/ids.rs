//! The parameters of a model: kinds, order, shapes.

use std::fmt;
use std::ops::Range;

use super::config::{LayerKind, ModelConfig, QkNorm};
use crate::backend::{Dtype, HostTensor};

/// Index of a parameter in [`ParamTable::params`](super::ParamTable::params).
pub type ParamId = usize;

/// A matrix of a SwiGLU block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proj {
    /// `[F, D]`; its output goes through silu.
    Gate,
    /// `[F, D]`
    Up,
    /// `[D, F]`
    Down,
}

/// The role of a parameter. Layer numbers count all decoder layers, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ParamKind {
    /// `[V, D]`
    Embedding,
    /// `[D]`, before attention.
    InputNorm(usize),
    /// `[H·dim, D]`
    Q(usize),
    /// `[H·dim]`
    QBias(usize),
    /// `[Hkv·dim, D]`
    K(usize),
    /// `[Hkv·dim]`
    KBias(usize),
    /// `[Hkv·dim, D]`
    V(usize),
    /// `[Hkv·dim]`
    VBias(usize),
    /// `[D, H·dim]`
    O(usize),
    /// `[D]`
    OBias(usize),
    /// `[dim]` or `[H·dim]`
    QNorm(usize),
    /// `[dim]` or `[Hkv·dim]`
    KNorm(usize),
    /// `[D]`, before the feed-forward part.
    PostNorm(usize),
    /// A matrix of a dense layer's SwiGLU.
    Dense(usize, Proj),
    /// `[E, D]`
    Router(usize),
    /// A matrix of a routed expert: (layer, expert, matrix).
    Expert(usize, usize, Proj),
    /// A matrix of the shared expert's SwiGLU.
    Shared(usize, Proj),
    /// `[1, D]`, the gate of the shared expert.
    SharedGate(usize),
    /// `[D]`
    FinalNorm,
    /// `[V, D]`; absent in models with a tied embedding.
    LmHead,
}

/// Groups of parameters for reports and counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// The input embedding.
    Embedding,
    /// Projections of attention and their biases.
    Attention,
    /// All norms.
    Norm,
    /// Routers.
    Router,
    /// Routed experts.
    Expert,
    /// Shared experts and their gates.
    Shared,
    /// Feed-forward parts of dense layers.
    Dense,
    /// The output head.
    Head,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.pad(match self {
            Group::Embedding => "embedding",
            Group::Attention => "attention",
            Group::Norm => "norms",
            Group::Router => "routers",
            Group::Expert => "experts",
            Group::Shared => "shared experts",
            Group::Dense => "dense layers",
            Group::Head => "output head",
        })
    }
}

/// One parameter: its kind, place, format and shape, which stay as they are, and the value that a run starts from. An
/// expert's matrix is one parameter even where the checkpoint fuses all experts of a layer into one tensor.
#[derive(Clone)]
pub struct ParamSpec {
    /// What it is.
    pub kind: ParamKind,
    /// Name of the checkpoint tensor that holds it; without a checkpoint, the name that this tensor would have.
    pub tensor: String,
    /// Byte range of the parameter in that tensor.
    pub byte_range: Range<usize>,
    dtype: Dtype,
    shape: Vec<usize>,
    /// The base value: memory-mapped from the checkpoint and never updated by training, or absent where it is random.
    pub base: HostTensor,
}

impl ParamKind {
    /// The group it is counted in.
    pub fn group(self) -> Group {
        use ParamKind as P;
        match self {
            P::Embedding => Group::Embedding,
            P::InputNorm(_) | P::PostNorm(_) | P::QNorm(_) | P::KNorm(_) | P::FinalNorm => Group::Norm,
            P::Q(_) | P::QBias(_) | P::K(_) | P::KBias(_) | P::V(_) | P::VBias(_) | P::O(_) | P::OBias(_) => {
                Group::Attention
            }
            P::Dense(..) => Group::Dense,
            P::Router(_) => Group::Router,
            P::Expert(..) => Group::Expert,
            P::Shared(..) | P::SharedGate(_) => Group::Shared,
            P::LmHead => Group::Head,
        }
    }

    /// The decoder layer it belongs to.
    pub fn layer(self) -> Option<usize> {
        let (section, layer, ..) = self.sort_key();
        (section == 1).then_some(layer)
    }

    /// Sort key of the parameter order: (section, layer, part of the layer, expert, matrix).
    pub(super) fn sort_key(self) -> (u8, usize, u8, usize, u8) {
        use ParamKind as P;
        let (layer, part, expert, proj) = match self {
            P::Embedding => return (0, 0, 0, 0, 0),
            P::FinalNorm => return (2, 0, 0, 0, 0),
            P::LmHead => return (3, 0, 0, 0, 0),
            P::InputNorm(l) => (l, 0, 0, None),
            P::Q(l) => (l, 1, 0, None),
            P::QBias(l) => (l, 2, 0, None),
            P::K(l) => (l, 3, 0, None),
            P::KBias(l) => (l, 4, 0, None),
            P::V(l) => (l, 5, 0, None),
            P::VBias(l) => (l, 6, 0, None),
            P::O(l) => (l, 7, 0, None),
            P::OBias(l) => (l, 8, 0, None),
            P::QNorm(l) => (l, 9, 0, None),
            P::KNorm(l) => (l, 10, 0, None),
            P::PostNorm(l) => (l, 11, 0, None),
            P::Dense(l, proj) => (l, 12, 0, Some(proj)),
            P::Router(l) => (l, 13, 0, None),
            P::Expert(l, e, proj) => (l, 14, e, Some(proj)),
            P::Shared(l, proj) => (l, 15, 0, Some(proj)),
            P::SharedGate(l) => (l, 16, 0, None),
        };
        (1, layer, part, expert, proj.map_or(0, |proj| proj as u8))
    }

    /// All parameters of a model, in order.
    pub fn all(config: &ModelConfig) -> Vec<Self> {
        use ParamKind as P;
        let mut kinds = vec![P::Embedding];
        for (l, layer) in config.layers.iter().enumerate() {
            kinds.extend([P::InputNorm(l), P::Q(l), P::K(l), P::V(l), P::O(l), P::PostNorm(l)]);
            if config.qkv_bias {
                kinds.extend([P::QBias(l), P::KBias(l), P::VBias(l)]);
            }
            if config.o_bias {
                kinds.push(P::OBias(l));
            }
            if config.qk_norm != QkNorm::None {
                kinds.extend([P::QNorm(l), P::KNorm(l)]);
            }
            match layer {
                LayerKind::Dense(_) => kinds.extend(Proj::ALL.map(|proj| P::Dense(l, proj))),
                LayerKind::Moe => {
                    kinds.push(P::Router(l));
                    kinds.extend((0..config.num_experts).flat_map(|e| Proj::ALL.map(|proj| P::Expert(l, e, proj))));
                    if config.shared_expert_width.is_some() {
                        kinds.extend(Proj::ALL.map(|proj| P::Shared(l, proj)));
                        kinds.push(P::SharedGate(l));
                    }
                }
            }
        }
        kinds.push(P::FinalNorm);
        if !config.tie_word_embeddings {
            kinds.push(P::LmHead);
        }
        kinds.sort_by_key(|kind| kind.sort_key());
        kinds
    }

    /// `[out, in]` or `[n]`, by the configuration. Panics for a kind that the model does not have.
    pub fn shape(self, config: &ModelConfig) -> Vec<usize> {
        use ParamKind as P;
        let d = config.hidden_size;
        let queries = |l: usize| config.heads[l].queries * config.heads[l].dim;
        let keys = |l: usize| config.heads[l].keys * config.heads[l].dim;
        let swiglu = |proj, width| if proj == Proj::Down { vec![d, width] } else { vec![width, d] };
        let per_head = config.qk_norm == QkNorm::PerHead;
        match self {
            P::Embedding | P::LmHead => vec![config.vocab_size, d],
            P::InputNorm(_) | P::PostNorm(_) | P::FinalNorm | P::OBias(_) => vec![d],
            P::Q(l) => vec![queries(l), d],
            P::K(l) | P::V(l) => vec![keys(l), d],
            P::O(l) => vec![d, queries(l)],
            P::QNorm(l) | P::KNorm(l) if per_head => vec![config.heads[l].dim],
            P::QBias(l) | P::QNorm(l) => vec![queries(l)],
            P::KBias(l) | P::VBias(l) | P::KNorm(l) => vec![keys(l)],
            P::Dense(l, proj) => match config.layers[l] {
                LayerKind::Dense(width) => swiglu(proj, width),
                LayerKind::Moe => panic!("layer {l} is not dense"),
            },
            P::Router(_) => vec![config.num_experts, d],
            P::Expert(_, _, proj) => swiglu(proj, config.expert_width),
            P::Shared(_, proj) => swiglu(proj, config.shared_expert_width.expect("a shared expert")),
            P::SharedGate(_) => vec![1, d],
        }
    }
}

impl Proj {
    /// All three, in the order of parameters.
    pub const ALL: [Self; 3] = [Self::Gate, Self::Up, Self::Down];
}

impl ParamSpec {
    /// A parameter with this base value.
    pub(super) fn new(kind: ParamKind, tensor: String, byte_range: Range<usize>, value: HostTensor) -> Self {
        Self { kind, tensor, byte_range, dtype: value.dtype, shape: value.shape.clone(), base: value }
    }

    /// The number format in which the checkpoint stores it and training keeps it.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// `[out, in]` or `[n]`.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    #[allow(clippy::len_without_is_empty)] // no parameter is empty
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// A unique name: that of the tensor, or for an expert in a fused tensor the name that a tensor of this expert alone would
    /// have, `….experts.7.gate_proj.weight`.
    pub fn name(&self) -> String {
        match (self.kind, self.tensor.rsplit_once(".experts.")) {
            (ParamKind::Expert(_, e, proj), Some((block, "gate_up_proj" | "down_proj"))) => {
                let matrix = ["gate_proj", "up_proj", "down_proj"][proj as usize];
                format!("{block}.experts.{e}.{matrix}.weight")
            }
            _ => self.tensor.clone(),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::backend::{Heads, Rope};
    use crate::model::config::MoeLayers;

    /// A model with every kind of parameter, one dense and one MoE layer.
    pub(crate) fn config() -> ModelConfig {
        let heads = Heads { queries: 4, keys: 2, dim: 4, window: None };
        let layers = vec![LayerKind::Dense(6), LayerKind::Moe];
        ModelConfig {
            model_type: "qwen2_moe".into(),
            vocab_size: 10,
            hidden_size: 16,
            moe_layers: MoeLayers::of(&layers),
            layers,
            heads: vec![heads; 2],
            num_experts: 3,
            num_experts_per_tok: 2,
            expert_width: 5,
            renormalize: false,
            shared_expert_width: Some(7),
            qk_norm: QkNorm::PerHead,
            clip_qkv: None,
            qkv_bias: true,
            o_bias: true,
            tie_word_embeddings: false,
            rms_norm_eps: 1e-6,
            rope: Rope { inv_freq: vec![1.0, 0.1], scale: 1.0 },
            rope_limit: None,
        }
    }

    #[test]
    fn the_order_is_embedding_layers_norm_head() {
        let kinds = ParamKind::all(&config());
        assert_eq!(kinds[0], ParamKind::Embedding);
        assert_eq!(&kinds[kinds.len() - 2..], [ParamKind::FinalNorm, ParamKind::LmHead]);
        assert!(kinds[1..kinds.len() - 2].is_sorted_by_key(|kind| kind.layer().unwrap()));
    }

    #[test]
    fn shapes_are_out_by_in() {
        let config = config();
        let shape = |kind: ParamKind| kind.shape(&config);
        assert_eq!(shape(ParamKind::K(0)), [8, 16]);
        assert_eq!(shape(ParamKind::O(0)), [16, 16]);
        assert_eq!(shape(ParamKind::Dense(0, Proj::Up)), [6, 16]);
        assert_eq!(shape(ParamKind::Expert(1, 0, Proj::Down)), [16, 5]);
        assert_eq!(shape(ParamKind::Shared(1, Proj::Gate)), [7, 16]);
        assert_eq!(shape(ParamKind::QNorm(1)), [4]);
    }
}
