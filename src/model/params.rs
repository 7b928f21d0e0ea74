//! Every parameter of a model, in one stable order.

use crate::backend::HostTensor;

/// Place in the [`ParamTable`].
pub type ParamId = usize;

/// A matrix of a SwiGLU block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Proj {
    /// `[F, D]`, goes through silu.
    Gate,
    /// `[F, D]`
    Up,
    /// `[D, F]`
    Down,
}

/// What a parameter is. Layers count all decoder layers.
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
    /// A dense layer's SwiGLU.
    Dense(usize, Proj),
    /// `[E, D]`
    Router(usize),
    /// (layer, expert, matrix)
    Expert(usize, usize, Proj),
    /// The shared expert's SwiGLU.
    Shared(usize, Proj),
    /// `[1, D]`
    SharedGate(usize),
    /// `[D]`
    FinalNorm,
    /// `[V, D]`; absent where the embedding is tied.
    LmHead,
}

/// One parameter: an expert's matrix is one parameter even where the checkpoint fuses all experts into one tensor.
#[derive(Clone)]
pub struct ParamSpec {
    /// What it is.
    pub kind: ParamKind,
    /// The checkpoint tensor that holds it.
    pub tensor: String,
    /// Where in that tensor's bytes it lies.
    pub byte_range: std::ops::Range<usize>,
    /// Its value, memory-mapped; shape `[out, in]` or `[n]`.
    pub value: HostTensor,
}

/// All parameters, in the order of [`ParamKind`] by layer: embedding, each layer from the first, final norm, head.
#[derive(Clone)]
pub struct ParamTable {
    /// In order; a [`ParamId`] is a place in this list.
    pub params: Vec<ParamSpec>,
}

impl ParamTable {
    /// The place of a parameter, if the model has it.
    pub fn id(&self, kind: ParamKind) -> Option<ParamId> {
        self.params.iter().position(|p| p.kind == kind)
    }
}
