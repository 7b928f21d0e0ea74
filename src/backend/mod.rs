//! The operations a model is made of, each `*_backward` beside its forward.
//!
//! The model (`crate::model`) is written once over [`Backend`]; [`cpu::Cpu`] is the reference and the
//! fallback. Conventions, the same for every operation:
//!
//! - A `Tensor` is a dense row-major matrix `[rows, cols]` of activations. Shape suffixes: T tokens, D model
//!   width, F expert width, E experts, K experts a token, R = T·K routed rows sorted by expert, V vocabulary.
//! - A `Weight` is a parameter in its stored dtype, `[out, in]` as Hugging Face keeps it (or `[n]`, seen as `[1, n]`).
//! - Gradients of parameters **accumulate** (`+=`, f32) into a flat [`Backend::Buffer`] at an element offset;
//!   gradients of activations **overwrite** (they are returned), except where a `&mut` says otherwise.
//! - Argument order of a backward: gradient of the output, saved forward values, parameters, sinks.
//! - Every result is deterministic: fixed order of sums, whatever the number of threads.
//! - Shapes are the caller's contract: a mismatch is a bug and panics with both shapes.

pub mod cpu;
pub mod cuda;
mod fault;
mod host;
mod random;

pub use fault::DeviceFault;
pub use host::{Dtype, HostTensor, SharedBytes, decode_into, encode_into};
pub use random::random_bits;

use std::ops::Range;

/// Sequences packed one after another, without padding.
///
/// Sequence `s` owns query rows `queries[s]..queries[s + 1]` and key rows `keys[s]..keys[s + 1]`. It never has fewer keys
/// than queries; its queries are the last positions of its keys. In training both lists are the same; when decoding with
/// a key/value cache the keys reach further back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Packing {
    /// Row offsets of the queries, `[sequences + 1]`, starting at 0.
    pub queries: Vec<usize>,
    /// Row offsets of the keys, `[sequences + 1]`, starting at 0.
    pub keys: Vec<usize>,
}

impl Packing {
    /// Sequences of these lengths, each attending to itself alone.
    pub fn of_lengths(lengths: impl IntoIterator<Item = usize>) -> Self {
        let mut queries = vec![0];
        for n in lengths {
            queries.push(queries[queries.len() - 1] + n);
        }
        Self { keys: queries.clone(), queries }
    }

    /// One sequence of which only the last `new` of `total` positions are queried.
    pub fn continuing(new: usize, total: usize) -> Self {
        Self { queries: vec![0, new], keys: vec![0, total] }
    }

    /// Number of sequences.
    pub fn len(&self) -> usize {
        self.queries.len() - 1
    }

    /// Whether there is no sequence at all.
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

/// The geometry of one attention layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Heads {
    /// Query heads, H.
    pub queries: usize,
    /// Key and value heads; divides `queries`.
    pub keys: usize,
    /// Width of one head.
    pub dim: usize,
    /// A query sees this many positions, itself included; `None`: all before it.
    pub window: Option<usize>,
}

/// Rotary embedding: angle of pair `i` at position `p` is `p · inv_freq[i]`; cos and sin are multiplied by `scale`.
/// Pairs are (i, i + dim/2), as in the Hugging Face implementations.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// One inverse frequency a pair, `[head_dim / 2]`, radians a position.
    pub inv_freq: Vec<f32>,
    /// Attention scaling of the longer-context types (1.0 for the plain one).
    pub scale: f32,
}

/// What a score sums over the entries of a weight's gradient.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Σ |g|
    Abs,
    /// Σ g²
    Square,
    /// Σ |g · w|
    AbsTimesWeight,
}

/// What the backward pass does with the weight gradient of one expert.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExpertGrad {
    /// Frozen: no weight gradient is computed.
    Skip,
    /// Reduce the gradient to one number, added to the score at this index; never store it.
    Score(Moment, usize),
    /// Add the gradient of each stacked matrix to the gradient buffer at these element offsets.
    Accumulate(Vec<usize>),
}

/// The weights of one grouped product: for each expert the matrices whose rows are stacked
/// (`[gate, up]`, each `[F, D]`, or `[down]`, `[D, F]`). All experts have the same shapes.
pub type Stacks<'a, W> = [Vec<&'a W>];

/// AdamW's numbers for one step (Loshchilov & Hutter, arXiv 1711.05101, as in PyTorch). In f64, so that 1 − β₂ is rounded
/// once: from the f32 next to 0.999 it would be 1.3e-5 of itself off.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AdamwStep {
    /// Learning rate of this step.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; multiplied by `lr`.
    pub weight_decay: f64,
    /// This step's number, from 1, for the bias corrections.
    pub step: u64,
    /// The gradient is multiplied by this first (averaging, clipping).
    pub grad_scale: f32,
}

/// The operations. See the module's documentation for the conventions that hold for all of them.
///
/// # Panics
/// A mismatch of shapes is a bug of the caller and panics with a message. A device that fails (memory full, a kernel's fault, a
/// lost device) makes an operation unwind with a [`DeviceFault`] as the payload. Operations may be queued, so a fault can
/// surface in a later one, at the latest in one that returns host values. Afterwards the contents of tensors are undefined.
/// The code that runs a rank catches the unwinding, turns it into an error, and tells the other ranks.
///
/// A backend may keep activations in 16 bits; router logits and what is computed of them (routing weights, their
/// gradients), losses, gradients of parameters and statistics are f32 or wider everywhere.
pub trait Backend: Send + Sync + 'static {
    /// Activations `[rows, cols]`.
    type Tensor: Send + Sync;
    /// A parameter in its stored dtype.
    type Weight: Send + Sync;
    /// A flat row of f32: gradients, master weights, moments.
    type Buffer: Send + Sync;
    /// Row numbers, token ids or class ids, `[n]`.
    type Indices: Send + Sync;
    /// A [`Packing`] where the operations can read it, with the rotary angles of its positions.
    type Sequences: Send + Sync;
    /// For each token its K experts and their weights, with what the backward needs.
    type Routing: Send + Sync;
    /// Where each routed row goes: a stable counting sort of (token, k) by expert.
    type Dispatch: Send + Sync;
    /// Running sums, one f64 an index.
    type Scores: Send + Sync;

    // --- memory --------------------------------------------------------------------------------------------------

    /// Bytes of one element of an activation.
    fn activation_size(&self) -> usize;
    /// Bytes that this device has left for what a run makes, in a memory of its own; `None`: it takes the host's.
    fn free_memory(&self) -> Option<u64>;
    /// The most bytes that it held at once in a memory of its own.
    fn peak_memory(&self) -> Option<u64>;
    /// Where its time went, for people, if that was counted.
    fn profile(&self) -> Option<String>;
    /// Rows whose logits over so many classes a cross-entropy holds at once, in f32, and their gradient as activations; 0: it
    /// never holds a row's.
    fn rows_of_logits(&self, classes: usize) -> usize;

    // --- moving things -------------------------------------------------------------------------------------------

    /// A tensor from row-major host values, `[rows, cols]`.
    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Self::Tensor;
    /// Row-major host values of a tensor.
    fn download(&self, x: &Self::Tensor) -> Vec<f32>;
    /// A tensor of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Self::Tensor;
    /// Zeros in the shape and number format of x.
    fn zeros_like(&self, x: &Self::Tensor) -> Self::Tensor;
    /// `(rows, cols)`.
    fn shape(&self, x: &Self::Tensor) -> (usize, usize);
    /// Row numbers or ids.
    fn indices(&self, values: &[u32]) -> Self::Indices;
    /// Packed sequences and the angles of their positions.
    fn sequences(&self, packing: &Packing, rope: &Rope) -> Self::Sequences;
    /// A parameter over host bytes; the CPU keeps the (memory-mapped) bytes where they are.
    fn weight(&self, host: HostTensor) -> Self::Weight;
    /// A parameter made here, of independent uniform values with mean 0 and standard deviation `std`, rounded into
    /// `dtype`. The seed decides them; every backend makes the same bits.
    fn random_weight(&self, dtype: Dtype, shape: Vec<usize>, seed: u64, std: f32) -> Self::Weight;
    /// The parameter's present value in its stored dtype.
    fn weight_host(&self, w: &Self::Weight) -> HostTensor;
    /// A buffer of `len` zeros.
    fn buffer(&self, len: usize) -> Self::Buffer;
    /// Host values of part of a buffer.
    fn buffer_read(&self, b: &Self::Buffer, range: Range<usize>) -> Vec<f32>;
    /// Overwrites part of a buffer with host values.
    fn buffer_write(&self, b: &mut Self::Buffer, offset: usize, values: &[f32]);
    /// Zeroes a whole buffer.
    fn buffer_clear(&self, b: &mut Self::Buffer);
    /// `n` scores, all zero.
    fn scores(&self, n: usize) -> Self::Scores;
    /// Reads the scores and sets them to zero.
    fn scores_take(&self, s: &mut Self::Scores) -> Vec<f64>;

    // --- rows and elements ---------------------------------------------------------------------------------------

    /// x += y, same shapes.
    fn add_assign(&self, x: &mut Self::Tensor, y: &Self::Tensor);
    /// Rows `rows` of x: `[n, cols]`.
    fn gather_rows(&self, x: &Self::Tensor, rows: &Self::Indices) -> Self::Tensor;
    /// The backward of [`Self::gather_rows`] for distinct rows: `dx[rows[i]] += dy[i]`.
    fn gather_rows_backward(&self, dy: &Self::Tensor, rows: &Self::Indices, dx: &mut Self::Tensor);
    /// Appends the rows of y below those of x (a growing key/value cache).
    fn append_rows(&self, x: &mut Self::Tensor, y: &Self::Tensor);
    /// x clamped to [-limit, limit], in place.
    fn clamp(&self, x: &mut Self::Tensor, limit: f32);
    /// dy where the clamped `y` is strictly inside its limits, else 0; in place.
    fn clamp_backward(&self, dy: &mut Self::Tensor, y: &Self::Tensor, limit: f32);

    // --- dense layers --------------------------------------------------------------------------------------------

    /// Rows `ids` of `w_VD`: `[T, D]`.
    fn embedding(&self, ids: &Self::Indices, w: &Self::Weight) -> Self::Tensor;
    /// dw at `offset` (layout `[V, D]`) += dy at the rows `ids`, in order of the tokens.
    fn embedding_backward(&self, dy: &Self::Tensor, ids: &Self::Indices, dw: &mut Self::Buffer, offset: usize);

    /// y = w · x / sqrt(mean(x²) + eps) over groups of `w.len()` columns: a row of x may hold several groups
    /// (heads). Same shape as x.
    fn rms_norm(&self, x: &Self::Tensor, w: &Self::Weight, eps: f32) -> Self::Tensor;
    /// dx; with a sink, dw += too.
    fn rms_norm_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Weight,
        eps: f32,
        dw: Option<(&mut Self::Buffer, usize)>,
    ) -> Self::Tensor;

    /// y = x · wᵀ (+ bias): `[n, in]` → `[n, out]`.
    fn linear(&self, x: &Self::Tensor, w: &Self::Weight, bias: Option<&Self::Weight>) -> Self::Tensor;
    /// The same product of a router, in f32 whatever the activations are: its logits decide which experts run.
    fn router_logits(&self, x: &Self::Tensor, w: &Self::Weight) -> Self::Tensor;
    /// dx = dy · w.
    fn linear_backward_input(&self, dy: &Self::Tensor, w: &Self::Weight) -> Self::Tensor;
    /// dw += dyᵀ · x, layout `[out, in]`.
    fn linear_backward_weight(&self, dy: &Self::Tensor, x: &Self::Tensor, dw: &mut Self::Buffer, offset: usize);
    /// db += column sums of dy.
    fn bias_backward(&self, dy: &Self::Tensor, db: &mut Self::Buffer, offset: usize);

    /// Rotates every head of x (`[T, heads · dim]`) by its position's angles, in place.
    fn rope(&self, x: &mut Self::Tensor, head_dim: usize, seqs: &Self::Sequences);
    /// Rotates the gradient back, in place.
    fn rope_backward(&self, dy: &mut Self::Tensor, head_dim: usize, seqs: &Self::Sequences);

    /// Causal attention within each sequence, scores scaled by 1/sqrt(dim), softmax in f32.
    /// q `[T, queries·dim]`; k, v `[keys, keys·dim]` → `[T, queries·dim]`.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        seqs: &Self::Sequences,
        heads: &Heads,
    ) -> Self::Tensor;
    /// (dq, dk, dv); the probabilities are recomputed from q and k.
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        dy: &Self::Tensor,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        y: &Self::Tensor,
        seqs: &Self::Sequences,
        heads: &Heads,
    ) -> (Self::Tensor, Self::Tensor, Self::Tensor);

    /// silu(gate) · up with gate and up side by side: `[n, 2F]` → `[n, F]`.
    fn swiglu(&self, gate_up: &Self::Tensor) -> Self::Tensor;
    /// d gate_up.
    fn swiglu_backward(&self, dy: &Self::Tensor, gate_up: &Self::Tensor) -> Self::Tensor;

    /// `y[t] = sigmoid(gate[t]) · x[t]`, gate `[T, 1]` (the shared expert of Qwen2-MoE).
    fn sigmoid_gate(&self, x: &Self::Tensor, gate: &Self::Tensor) -> Self::Tensor;
    /// (dx, dgate).
    fn sigmoid_gate_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        gate: &Self::Tensor,
    ) -> (Self::Tensor, Self::Tensor);

    // --- routed experts ------------------------------------------------------------------------------------------

    /// softmax over all E in f32, then the K largest (ties: lower expert first), then, if `renormalize`, divided by
    /// their sum.
    fn route(&self, logits: &Self::Tensor, top_k: usize, renormalize: bool) -> Self::Routing;
    /// d logits `[T, E]` from the gradient of the routing weights `[T, K]`.
    fn route_backward(&self, dweights: &Self::Tensor, routing: &Self::Routing) -> Self::Tensor;
    /// Host copy of the chosen experts, `[T·K]`, k fastest.
    fn expert_ids(&self, routing: &Self::Routing) -> Vec<u32>;
    /// Sorts the routed rows by expert, stably.
    fn dispatch(&self, routing: &Self::Routing, num_experts: usize) -> Self::Dispatch;
    /// All of `rows` rows in one group, as they are: grouped products with it are plain ones over stacked weights.
    fn one_group(&self, rows: usize) -> Self::Dispatch;
    /// Routed rows of each expert, `[E]`.
    fn tokens_per_expert(&self, dispatch: &Self::Dispatch) -> Vec<usize>;
    /// x_TD copied to the sorted rows: `[R, D]`.
    fn dispatch_rows(&self, x: &Self::Tensor, dispatch: &Self::Dispatch) -> Self::Tensor;
    /// `y[t] = Σ_k x[row of (t, k)]`, k ascending: `[T, D]`. Each is the backward of the other.
    fn combine_rows(&self, x: &Self::Tensor, dispatch: &Self::Dispatch) -> Self::Tensor;
    /// Each expert's rows times its own stacked weights: `[R, in]` → `[R, Σ out]`.
    fn grouped_linear(&self, x: &Self::Tensor, w: &Stacks<'_, Self::Weight>, dispatch: &Self::Dispatch)
    -> Self::Tensor;
    /// dx `[R, in]`.
    fn grouped_linear_backward_input(
        &self,
        dy: &Self::Tensor,
        w: &Stacks<'_, Self::Weight>,
        dispatch: &Self::Dispatch,
    ) -> Self::Tensor;
    /// For each expert what `plan[expert]` says. A scored gradient never exists as a whole matrix.
    #[allow(clippy::too_many_arguments)]
    fn grouped_linear_backward_weight(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        w: &Stacks<'_, Self::Weight>,
        dispatch: &Self::Dispatch,
        plan: &[ExpertGrad],
        dw: &mut Self::Buffer,
        scores: &mut Self::Scores,
    );
    /// Every routed row times its own routing weight: `[R, F]` → `[R, F]`. Done before the down projection, which is
    /// linear, so that its outputs need not be kept for the gradient of the routing weights.
    fn weight_rows(&self, x: &Self::Tensor, routing: &Self::Routing, dispatch: &Self::Dispatch) -> Self::Tensor;
    /// (dx `[R, F]`, d routing weights `[T, K]`).
    fn weight_rows_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        routing: &Self::Routing,
        dispatch: &Self::Dispatch,
    ) -> (Self::Tensor, Self::Tensor);

    // --- losses and statistics -----------------------------------------------------------------------------------

    /// Σ over rows of `−log softmax(x · wᵀ)[target]`, in chunks, so that no `[n, V]` logits exist.
    fn linear_cross_entropy(&self, x: &Self::Tensor, w: &Self::Weight, targets: &Self::Indices) -> f64;
    /// The same sum, and the gradient of `scale` times it: dx, and with a sink dw +=.
    fn linear_cross_entropy_backward(
        &self,
        x: &Self::Tensor,
        w: &Self::Weight,
        targets: &Self::Indices,
        scale: f32,
        dw: Option<(&mut Self::Buffer, usize)>,
    ) -> (f64, Self::Tensor);

    /// Σ over the rows `rows` of softmax(logits): `[E]`.
    fn softmax_sum(&self, logits: &Self::Tensor, rows: Range<usize>) -> Vec<f64>;
    /// `dlogits[rows]` += the gradient through softmax of `dy` `[E]`, the same for every row.
    fn softmax_sum_backward(&self, dy: &[f32], logits: &Self::Tensor, rows: Range<usize>, dlogits: &mut Self::Tensor);
    /// Σ of the rows of each range: `[ranges · cols]`.
    fn segment_sum(&self, x: &Self::Tensor, segments: &[Range<usize>]) -> Vec<f64>;
    /// `dx[row] += dy[segment of row]`, `dy` `[ranges · cols]`.
    fn segment_sum_backward(&self, dy: &[f32], segments: &[Range<usize>], dx: &mut Self::Tensor);

    // --- updates -------------------------------------------------------------------------------------------------

    /// Σ x² of part of a buffer, in f64; NaN or infinite if an entry is.
    fn sum_squares(&self, b: &Self::Buffer, range: Range<usize>) -> f64;
    /// One AdamW step on parts of equal length: `master`, `m`, `v` at `at`, gradient at `grad_at`.
    #[allow(clippy::too_many_arguments)]
    fn adamw(
        &self,
        master: &mut Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
        at: Range<usize>,
        grad: &Self::Buffer,
        grad_at: usize,
        step: &AdamwStep,
    );
    /// Overwrites a parameter with f32 values, rounded to nearest even into its stored dtype.
    fn set_weight(&self, w: &mut Self::Weight, values: &Self::Buffer, at: Range<usize>);
    /// Reads elements of a parameter as f32 into a buffer at `offset`.
    fn read_weight(&self, w: &Self::Weight, elements: Range<usize>, into: &mut Self::Buffer, offset: usize);
}
