//! What operations take besides tensors: sizes, packings, and the treatment of gradients.

/// Row offsets of packed sequences: sequences stored one after another, without padding.
///
/// Sequence `s` has query rows `queries[s]..queries[s + 1]` and key rows `keys[s]..keys[s + 1]`. Its queries are the
/// last positions among its keys, so it never has more queries than keys. In training both lists are equal; when
/// decoding with a key/value cache there are more keys than queries. A sequence without queries stands for key rows that
/// nothing attends to, such as the room for later tokens in a cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packing {
    /// Row offsets of the queries, `[sequences + 1]`, starting at 0.
    pub queries: Vec<usize>,
    /// Row offsets of the keys, `[sequences + 1]`, starting at 0.
    pub keys: Vec<usize>,
}

impl Packing {
    /// Sequences of these lengths, with equal queries and keys.
    pub fn of_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut queries = vec![0];
        for n in lengths {
            queries.push(queries[queries.len() - 1] + n);
        }
        Self { keys: queries.clone(), queries }
    }

    /// One sequence of `total` positions, of which only the last `new` are queries (decoding).
    pub fn continuing(new: usize, total: usize) -> Self {
        Self { queries: vec![0, new], keys: vec![0, total] }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.queries.len() - 1
    }

    /// Whether there is no sequence.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of query rows, T.
    pub fn rows(&self) -> usize {
        self.queries[self.len()]
    }

    /// Position of each query row within its sequence, `[T]`.
    pub fn positions(&self) -> Vec<u32> {
        let mut out = Vec::with_capacity(self.rows());
        for s in 0..self.len() {
            let new = self.queries[s + 1] - self.queries[s];
            let total = self.keys[s + 1] - self.keys[s];
            out.extend((total - new..total).map(|p| p as u32));
        }
        out
    }
}

/// Head counts and window of an attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads, H.
    pub queries: usize,
    /// Key and value heads (grouped-query attention); divides `queries`.
    pub keys: usize,
    /// Width of one head.
    pub dim: usize,
    /// Sliding window: a query attends to the last `window` positions, its own included; `None`: to all earlier ones.
    pub window: Option<usize>,
}

/// Rotary position embedding (Su et al., arXiv 2104.09864). The angle of pair `i` at position `p` is `p · inv_freq[i]`;
/// cos and sin are multiplied by `scale`. A pair is the columns (i, i + dim/2) of a head, as in the Hugging Face
/// implementations.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Inverse frequency of each pair, in radians per position: `[head_dim / 2]`.
    pub inv_freq: Vec<f32>,
    /// Attention scaling factor of the long-context variants such as YaRN; 1 for plain RoPE.
    pub scale: f32,
}

/// The reduction of a weight's gradient g to one number, from which expert scores are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GradReduction {
    /// Σ |g|
    Abs,
    /// Σ g²
    Square,
    /// Σ |g · w|
    AbsTimesWeight,
}

/// The backward pass's treatment of one expert's weight gradient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpertGrad {
    /// Frozen: no weight gradient is computed.
    Skip,
    /// Reduce the gradient to one number and add it to the score at this index. The gradient is never stored.
    Score(GradReduction, usize),
    /// Accumulate the gradients of the expert's stacked matrices in the gradient buffer, each at its element offset.
    Accumulate(Vec<usize>),
}

/// The weights of a grouped product: for each expert the matrices whose outputs are concatenated, `[gate, up]` (each
/// `[F, D]`) or `[down]` (`[D, F]`). All experts have the same shapes.
pub type Stacks<'a, W> = [Vec<&'a W>];

/// Hyperparameters of one AdamW step (Loshchilov & Hutter, arXiv 1711.05101, as in PyTorch). They are f64 so that 1 −
/// β₂ is rounded only once: computed from 0.999 as f32 it would have a relative error of 1.3e-5.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// β₁, decay rate of the first moment.
    pub beta1: f64,
    /// β₂, decay rate of the second moment.
    pub beta2: f64,
    /// ε, added to the square root of the second moment.
    pub eps: f64,
    /// λ, decoupled weight decay: weights are multiplied by 1 − lr·λ.
    pub weight_decay: f64,
    /// Step number t, from 1, for the bias corrections 1 − βᵗ.
    pub step: u64,
    /// Factor applied to the gradient first (averaging, clipping).
    pub grad_scale: f32,
}

/// The loss of one row of a linear head.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowLoss {
    /// −log softmax(logits)\[target\], in nats.
    pub loss: f64,
    /// Whether the target has the highest logit; of equal ones the lowest class counts as the highest.
    pub greedy: bool,
}
