//! The operations of a model, each backward pass beside its forward pass.
//!
//! The model (`crate::model`) is written once, over the trait [`Backend`]. [`cpu::Cpu`] is the reference
//! implementation, [`cuda`] the one for NVIDIA GPUs. Conventions of all operations:
//!
//! - A `Tensor` is a dense row-major matrix `[rows, cols]` of activations. Shape letters: T tokens, D model width, F
//!   expert width, E experts, K experts per token, R = T·K routed rows sorted by expert, V vocabulary, n any number of
//!   rows.
//! - A `Weight` is a parameter in its stored dtype: `[out, in]` as in Hugging Face checkpoints, or a vector `[n]`,
//!   treated as `[1, n]`.
//! - Gradients of parameters **accumulate** (`+=`, in f32) into a flat [`Backend::Buffer`] at an element offset. An
//!   `Option<(&mut Buffer, usize)>` is such a buffer and offset, or `None` if the parameter is frozen. Gradients of
//!   activations **overwrite**: they are returned as new tensors, except for `&mut` arguments.
//! - Arguments of a backward operation, in this order: gradient of the output, saved forward values, parameters,
//!   gradient buffers.
//! - Every result is deterministic: the order of each sum is fixed and does not depend on the number of threads.
//! - The caller guarantees matching shapes. A mismatch is a bug, and panics with both shapes.

mod arguments;
#[doc(hidden)]
pub mod cpu;
#[doc(hidden)]
pub mod cuda;
mod fault;
mod host;
mod random;

pub use arguments::{AdamwStep, ExpertGrad, GradReduction, Heads, Packing, Rope, RowLoss, Stacks};
pub use fault::DeviceFault;
pub use host::{Dtype, HostTensor, SharedBytes, decode_into, encode_into};
pub use random::random_bits;

use std::ops::Range;

/// The operations of a model on one device. Conventions of all operations: see the module's documentation.
///
/// # Panics
/// A mismatch of shapes is a bug of the caller and panics with a message. A device that fails (memory full, a kernel's
/// fault, a lost device) makes an operation unwind with a [`DeviceFault`] as the payload. Operations may be queued, so a
/// fault can surface in a later one, at the latest in one that returns host values. Afterwards the contents of tensors
/// are undefined. The code that runs a rank catches the unwinding, turns it into an error, and tells the other ranks.
///
/// A backend may store activations in 16 bits. Router logits, routing weights and their gradients, losses, parameter
/// gradients and statistics are always f32 or wider.
pub trait Backend: Send + Sync + 'static {
    /// Activations, `[rows, cols]`.
    type Tensor: Send + Sync;
    /// A parameter in its stored dtype.
    type Weight: Send + Sync;
    /// A flat f32 array for gradients, master weights or optimizer moments.
    type Buffer: Send + Sync;
    /// Row indices, token ids or class ids, `[n]`.
    type Indices: Send + Sync;
    /// What normalises the rows of probabilities of [`Self::attention`], for its backward; nothing where that computes it again.
    type Normaliser: Send + Sync;
    /// A [`Packing`] on the device, with cos and sin of the rotary angles of its positions.
    type Sequences: Send + Sync;
    /// The K experts and routing weights of each token, with the values saved for the backward pass.
    type Routing: Send + Sync;
    /// A stable counting sort of the routed rows (token, k) by expert: where each row goes.
    type Dispatch: Send + Sync;
    /// Running f64 sums, one per index.
    type Scores: Send + Sync;

    /// Runs `work`, which calls operations of this backend one after another. A backend whose operations run on threads of its own
    /// runs all of `work` there, so that the caller does not wait for a thread to wake up at every operation.
    fn together<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        work()
    }

    // --- memory --------------------------------------------------------------------------------------------------

    /// Bytes of one element of a [`Self::Tensor`], but for those of [`Self::routed_size`].
    fn activation_size(&self) -> usize;
    /// Bytes of one element of the results of grouped products and of SwiGLU.
    fn routed_size(&self) -> usize {
        self.activation_size()
    }
    /// The number format of the operands of matrix products, F32 or BF16; sums are f32. [`Self::router_logits`] is an
    /// exception.
    fn precision(&self) -> Dtype;
    /// Free bytes of device memory; `None` if the backend uses host memory.
    fn free_memory(&self) -> Option<u64>;
    /// Peak allocation of device memory in bytes; `None` if the backend uses host memory.
    fn peak_memory(&self) -> Option<u64>;
    /// A human-readable table of time per kernel; `None` if the backend does not profile.
    fn profile(&self) -> Option<String>;
    /// Rows of a chunk in [`Self::linear_cross_entropy`] over `classes` classes, for memory estimates: it holds the
    /// logits of that many rows in f32, and their gradient as activations. 0 if it never holds a full row of logits.
    fn logit_chunk_rows(&self, classes: usize) -> usize;

    // --- allocation and copies -----------------------------------------------------------------------------------

    /// Copies row-major host values into a new tensor `[rows, cols]`.
    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Self::Tensor;
    /// Copies a tensor to the host, row-major.
    fn download(&self, x: &Self::Tensor) -> Vec<f32>;
    /// A tensor `[rows, cols]` of zeros.
    fn zeros(&self, rows: usize, cols: usize) -> Self::Tensor;
    /// Zeros with the shape of x, a tensor of tokens' rows, and its dtype.
    fn zeros_like(&self, x: &Self::Tensor) -> Self::Tensor;
    /// `(rows, cols)`.
    fn shape(&self, x: &Self::Tensor) -> (usize, usize);
    /// Copies indices from the host.
    fn indices(&self, values: &[u32]) -> Self::Indices;
    /// Copies the row offsets of packed sequences from the host and computes their rotary angles.
    fn sequences(&self, packing: &Packing, rope: &Rope) -> Self::Sequences;
    /// A parameter with the values of `host`. The CPU backend uses the (memory-mapped) bytes in place, without a copy.
    fn weight(&self, host: HostTensor) -> Self::Weight;
    /// Announces the parameters that are read next. The CPU backend reads the memory-mapped ones from the disk meanwhile.
    fn prefetch<'w>(&self, _weights: impl Iterator<Item = &'w Self::Weight>)
    where
        Self: 'w,
    {
    }
    /// Parameters that are used together, the routed experts of a layer, with these values in the host's memory, or divided among the
    /// devices of several ranks. A backend with memory of its own copies all of them to it for each use, with the same results; the
    /// others have them there anyway.
    fn offloaded_weights(&self, values: Vec<HostTensor>) -> Vec<Self::Weight> {
        values.into_iter().map(|value| self.weight(value)).collect()
    }
    /// The same for parameters that were made on the device: moves them.
    fn offload(&self, weights: Vec<Self::Weight>) -> Vec<Self::Weight> {
        weights
    }
    /// Begins to copy back those among the parameters that are read now which are offloaded, and then those among the ones that are
    /// read next.
    fn load_offloaded<'w>(
        &self,
        _now: impl Iterator<Item = &'w Self::Weight>,
        _next: impl Iterator<Item = &'w Self::Weight>,
    ) where
        Self: 'w,
    {
    }
    /// The number of ranks of this machine among whose devices offloaded parameters are divided; `None`: they are in the host's memory.
    fn offload_ranks(&self) -> Option<usize> {
        None
    }
    /// Where offloaded parameters are divided among the devices of several ranks: waits until all ranks have read and written what they
    /// queued. All ranks call it together: after parameters were loaded or dropped, and before and after they are written.
    fn fence_weights(&self) {}
    /// Overwrites a parameter with a host value of the same shape and dtype.
    fn write_weight(&self, w: &mut Self::Weight, value: HostTensor) {
        *w = self.weight(value);
    }
    /// A parameter of independent uniform random values with mean 0 and standard deviation `std`, rounded to `dtype`
    /// and generated on the device. The same seed gives the same bits on every backend.
    fn random_weight(&self, dtype: Dtype, shape: Vec<usize>, seed: u64, std: f32) -> Self::Weight;
    /// Copies the parameter's current value to the host, in its stored dtype.
    fn weight_host(&self, w: &Self::Weight) -> HostTensor;
    /// A buffer of `len` zeros.
    fn buffer(&self, len: usize) -> Self::Buffer;
    /// Copies part of a buffer to the host.
    fn buffer_read(&self, b: &Self::Buffer, range: Range<usize>) -> Vec<f32>;
    /// Overwrites part of a buffer with host values.
    fn buffer_write(&self, b: &mut Self::Buffer, offset: usize, values: &[f32]);
    /// Zeroes a whole buffer.
    fn buffer_clear(&self, b: &mut Self::Buffer);
    /// `n` scores, all zero.
    fn scores(&self, n: usize) -> Self::Scores;
    /// Returns the scores and resets them to zero.
    fn scores_take(&self, s: &mut Self::Scores) -> Vec<f64>;

    // --- row and elementwise operations --------------------------------------------------------------------------

    /// x += y, same shapes.
    fn add_assign(&self, x: &mut Self::Tensor, y: &Self::Tensor);
    /// The rows of x at indices `rows`: `[n, cols]`.
    fn gather_rows(&self, x: &Self::Tensor, rows: &Self::Indices) -> Self::Tensor;
    /// The backward operation of [`Self::gather_rows`] for distinct indices: `dx[rows[i]] += dy[i]`.
    fn gather_rows_backward(&self, dy: &Self::Tensor, rows: &Self::Indices, dx: &mut Self::Tensor);
    /// `x[rows[i]] = y[i]` for distinct indices (new keys and values in a key/value cache).
    fn write_rows(&self, x: &mut Self::Tensor, rows: &Self::Indices, y: &Self::Tensor);
    /// Clamps x to [-limit, limit], in place.
    fn clamp(&self, x: &mut Self::Tensor, limit: f32);
    /// Sets dy to 0 where the clamped output `y` is not strictly inside (-limit, limit), in place.
    fn clamp_backward(&self, dy: &mut Self::Tensor, y: &Self::Tensor, limit: f32);
    /// Sets these columns of x to `value` in every row, in place.
    fn fill_columns(&self, x: &mut Self::Tensor, columns: &Self::Indices, value: f32);

    // --- dense layers --------------------------------------------------------------------------------------------

    /// The rows of w `[V, D]` at the token ids: `[T, D]`.
    fn embedding(&self, ids: &Self::Indices, w: &Self::Weight) -> Self::Tensor;
    /// dw `[V, D]` at `offset`: row `ids[t]` += `dy[t]`, in token order.
    fn embedding_backward(&self, dy: &Self::Tensor, ids: &Self::Indices, dw: &mut Self::Buffer, offset: usize);

    /// y = w · x / sqrt(mean(x²) + eps) over groups of `w.len()` columns (Zhang & Sennrich, arXiv 1910.07467). A row of
    /// x may consist of several groups (heads). Same shape as x.
    fn rms_norm(&self, x: &Self::Tensor, w: &Self::Weight, eps: f32) -> Self::Tensor;
    /// Returns dx; accumulates dw if a buffer is given.
    fn rms_norm_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Weight,
        eps: f32,
        dw: Option<(&mut Self::Buffer, usize)>,
    ) -> Self::Tensor;

    /// x += y, then [`Self::rms_norm`] of the sum: a residual and the norm behind it. A GPU does both in one pass.
    fn add_rms_norm(&self, x: &mut Self::Tensor, y: &Self::Tensor, w: &Self::Weight, eps: f32) -> Self::Tensor {
        self.add_assign(x, y);
        self.rms_norm(x, w, eps)
    }
    /// dx += [`Self::rms_norm_backward`], the gradient through the norm beside that of the residual; accumulates dw if a buffer
    /// is given.
    fn add_rms_norm_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Weight,
        eps: f32,
        dw: Option<(&mut Self::Buffer, usize)>,
        dx: &mut Self::Tensor,
    ) {
        self.add_assign(dx, &self.rms_norm_backward(dy, x, w, eps, dw));
    }

    /// y = x · wᵀ (+ bias): `[n, in]` → `[n, out]`.
    fn linear(&self, x: &Self::Tensor, w: &Self::Weight, bias: Option<&Self::Weight>) -> Self::Tensor;
    /// y = x · wᵀ for a router, in f32 whatever the dtype of the activations, because the logits select the experts.
    fn router_logits(&self, x: &Self::Tensor, w: &Self::Weight) -> Self::Tensor;
    /// dx = dy · w.
    fn linear_backward_input(&self, dy: &Self::Tensor, w: &Self::Weight) -> Self::Tensor;
    /// dx += dy · w, where several layers read the same rows.
    fn add_linear_backward_input(&self, dy: &Self::Tensor, w: &Self::Weight, dx: &mut Self::Tensor) {
        self.add_assign(dx, &self.linear_backward_input(dy, w));
    }
    /// dw `[out, in]` at `offset` += dyᵀ · x.
    fn linear_backward_weight(&self, dy: &Self::Tensor, x: &Self::Tensor, dw: &mut Self::Buffer, offset: usize);
    /// db `[out]` at `offset` += column sums of dy.
    fn bias_backward(&self, dy: &Self::Tensor, db: &mut Self::Buffer, offset: usize);

    /// Rotates every head of x `[T, heads · head_dim]` by the angles of its position, in place. See [`Rope`].
    fn rope(&self, x: &mut Self::Tensor, head_dim: usize, seqs: &Self::Sequences);
    /// Applies the transposed rotation to the gradient, in place.
    fn rope_backward(&self, dy: &mut Self::Tensor, head_dim: usize, seqs: &Self::Sequences);

    /// [`Self::rms_norm`] of queries or keys, over groups of one head or several, then [`Self::rope`]. A GPU does both in one pass
    /// where a group is a head.
    fn rms_norm_rope(
        &self,
        x: &Self::Tensor,
        w: &Self::Weight,
        eps: f32,
        head_dim: usize,
        seqs: &Self::Sequences,
    ) -> Self::Tensor {
        let mut y = self.rms_norm(x, w, eps);
        self.rope(&mut y, head_dim, seqs);
        y
    }
    /// dx of [`Self::rms_norm_rope`]: [`Self::rope_backward`], then [`Self::rms_norm_backward`].
    #[allow(clippy::too_many_arguments)]
    fn rms_norm_rope_backward(
        &self,
        mut dy: Self::Tensor,
        x: &Self::Tensor,
        w: &Self::Weight,
        eps: f32,
        head_dim: usize,
        seqs: &Self::Sequences,
        dw: Option<(&mut Self::Buffer, usize)>,
    ) -> Self::Tensor {
        self.rope_backward(&mut dy, head_dim, seqs);
        self.rms_norm_backward(&dy, x, w, eps, dw)
    }

    /// Causal attention within each sequence: scores scaled by 1/sqrt(dim), softmax in f32.
    /// q `[T, heads.queries · dim]`; k and v `[key rows, heads.keys · dim]` → `[T, heads.queries · dim]`, and what the backward needs.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        seqs: &Self::Sequences,
        heads: &Heads,
    ) -> (Self::Tensor, Self::Normaliser);
    /// Returns (dq, dk, dv), from y and the normaliser of [`Self::attention`]. Recomputes the probabilities from q and k (Dao, arXiv 2205.14135).
    #[allow(clippy::too_many_arguments)]
    fn attention_backward(
        &self,
        dy: &Self::Tensor,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        y: (&Self::Tensor, &Self::Normaliser),
        seqs: &Self::Sequences,
        heads: &Heads,
    ) -> (Self::Tensor, Self::Tensor, Self::Tensor);

    /// SwiGLU (Shazeer, arXiv 2002.05202): silu(gate) · up, where a row of the input is gate followed by up.
    /// `[n, 2F]` → `[n, F]`.
    fn swiglu(&self, gate_up: &Self::Tensor) -> Self::Tensor;
    /// The gradient of `gate_up`, `[n, 2F]`.
    fn swiglu_backward(&self, dy: &Self::Tensor, gate_up: &Self::Tensor) -> Self::Tensor;

    /// `y[t] = sigmoid(gate[t]) · x[t]`, with gate `[T, 1]` (the shared expert of Qwen2-MoE).
    fn sigmoid_gate(&self, x: &Self::Tensor, gate: &Self::Tensor) -> Self::Tensor;
    /// Returns (dx, dgate).
    fn sigmoid_gate_backward(
        &self,
        dy: &Self::Tensor,
        x: &Self::Tensor,
        gate: &Self::Tensor,
    ) -> (Self::Tensor, Self::Tensor);

    // --- routed experts ------------------------------------------------------------------------------------------

    /// Softmax over the E logits in f32, then the K largest probabilities (of equal ones the lower expert first) as
    /// routing weights, divided by their sum if `renormalize`.
    fn route(&self, logits: &Self::Tensor, top_k: usize, renormalize: bool) -> Self::Routing;
    /// The gradient of the logits `[T, E]`, from that of the routing weights `[T, K]`.
    fn route_backward(&self, dweights: &Self::Tensor, routing: &Self::Routing) -> Self::Tensor;
    /// Sets the routing weights of these experts to 0 wherever they were chosen. The other weights stay as they are, also where
    /// they were divided by a sum that included the former ones. For forward passes only.
    fn zero_routing_weights(&self, routing: &mut Self::Routing, experts: &Self::Indices);
    /// Copies the chosen experts to the host: `[T·K]`, K consecutive per token.
    fn expert_ids(&self, routing: &Self::Routing) -> Vec<u32>;
    /// Sorts the routed rows by expert with a stable counting sort.
    fn dispatch(&self, routing: &Self::Routing, num_experts: usize) -> Self::Dispatch;
    /// A dispatch of `rows` rows to a single expert, in their order. A grouped product with it is a dense product with
    /// stacked weights. Not for [`Self::dispatch_rows`] or [`Self::combine_rows`].
    fn single_expert_dispatch(&self, rows: usize) -> Self::Dispatch;
    /// Number of routed rows of each expert, `[E]`.
    fn tokens_per_expert(&self, dispatch: &Self::Dispatch) -> Vec<usize>;
    /// Each token's row of x `[T, D]` in its K sorted rows: `[R, D]`. The backward operation of
    /// [`Self::combine_rows`].
    fn dispatch_rows(&self, x: &Self::Tensor, dispatch: &Self::Dispatch) -> Self::Tensor;
    /// `y[t] = Σ_k x[row of (t, k)]`, k ascending: `[R, D]` → `[T, D]`. The backward operation of
    /// [`Self::dispatch_rows`].
    fn combine_rows(&self, x: &Self::Tensor, dispatch: &Self::Dispatch) -> Self::Tensor;
    /// The output of an MoE block with its residual `[T, D]`: [`Self::combine_rows`], plus [`Self::sigmoid_gate`] of the shared
    /// expert's output and gate if they are given, plus the residual. A GPU does all in one pass.
    fn combine_rows_onto(
        &self,
        x: &Self::Tensor,
        dispatch: &Self::Dispatch,
        shared: Option<(&Self::Tensor, &Self::Tensor)>,
        residual: &Self::Tensor,
    ) -> Self::Tensor {
        let mut y = self.combine_rows(x, dispatch);
        if let Some((shared, gate)) = shared {
            self.add_assign(&mut y, &self.sigmoid_gate(shared, gate));
        }
        self.add_assign(&mut y, residual);
        y
    }
    /// Multiplies each expert's rows by its own stacked weights, y = x · wᵀ: `[R, in]` → `[R, Σ out]`.
    fn grouped_linear(&self, x: &Self::Tensor, w: &Stacks<'_, Self::Weight>, dispatch: &Self::Dispatch)
    -> Self::Tensor;
    /// dx = dy · w for each expert, summed over its stacked weights: `[R, in]`.
    fn grouped_linear_backward_input(
        &self,
        dy: &Self::Tensor,
        w: &Stacks<'_, Self::Weight>,
        dispatch: &Self::Dispatch,
    ) -> Self::Tensor;
    /// dw = dyᵀ · x for each expert, skipped, scored or accumulated in `dw` as `plan[expert]` says. A scored gradient
    /// is reduced tile by tile and never stored as a matrix.
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
    /// [`Self::swiglu`] with every routed row multiplied by its routing weight: `[R, 2F]` → `[R, F]`. The weight is applied before
    /// the down projection, which is linear, so that the projection's output need not be saved for the gradient of the routing
    /// weights.
    fn weighted_swiglu(
        &self,
        gate_up: &Self::Tensor,
        routing: &Self::Routing,
        dispatch: &Self::Dispatch,
    ) -> Self::Tensor;
    /// Returns the gradients of `gate_up` `[R, 2F]` and of the routing weights `[T, K]`.
    fn weighted_swiglu_backward(
        &self,
        dy: Self::Tensor,
        gate_up: &Self::Tensor,
        routing: &Self::Routing,
        dispatch: &Self::Dispatch,
    ) -> (Self::Tensor, Self::Tensor);

    // --- losses and statistics -----------------------------------------------------------------------------------

    /// Cross-entropy of a linear head: Σ over rows of `−log softmax(x · wᵀ)[target]`, for x `[n, D]` and w `[V, D]`. A
    /// fused operation in chunks, without a logit matrix `[n, V]`.
    fn linear_cross_entropy(&self, x: &Self::Tensor, w: &Self::Weight, targets: &Self::Indices) -> f64;
    /// The terms of [`Self::linear_cross_entropy`] row by row, and whether each target has the highest logit. The same pass in
    /// chunks.
    fn linear_cross_entropy_rows(&self, x: &Self::Tensor, w: &Self::Weight, targets: &Self::Indices) -> Vec<RowLoss>;
    /// Returns the sum of [`Self::linear_cross_entropy`] and dx, the gradient of `scale` times that sum; accumulates dw
    /// if a buffer is given.
    fn linear_cross_entropy_backward(
        &self,
        x: &Self::Tensor,
        w: &Self::Weight,
        targets: &Self::Indices,
        scale: f32,
        dw: Option<(&mut Self::Buffer, usize)>,
    ) -> (f64, Self::Tensor);

    /// Divergence of a linear head's distributions from those of another head: with p = softmax(x · wᵀ) and p₀ =
    /// softmax(x₀ · w₀ᵀ) of each row, returns Σ over rows of KL(p₀ ‖ p) = Σ_v p₀ ln(p₀/p) in nats, over all V classes, and the
    /// number of rows whose most probable class is the same (of equal ones the first). x and `base_x` `[n, D]`, w and
    /// `base_w` `[V, D]`. In chunks of rows, without a logit matrix `[n, V]`.
    fn linear_kl(
        &self,
        x: &Self::Tensor,
        w: &Self::Weight,
        base_x: &Self::Tensor,
        base_w: &Self::Weight,
    ) -> (f64, usize);
    /// Returns the sum of [`Self::linear_kl`] and dx, the gradient of `scale` times that sum; accumulates dw if a buffer is
    /// given. The base's distributions are constants.
    fn linear_kl_backward(
        &self,
        x: &Self::Tensor,
        w: &Self::Weight,
        base_x: &Self::Tensor,
        base_w: &Self::Weight,
        scale: f32,
        dw: Option<(&mut Self::Buffer, usize)>,
    ) -> (f64, Self::Tensor);

    /// Σ over rows of KL(softmax(base) ‖ softmax(logits)) in nats; logits `[n, E]`, `base` `[n · E]` on the host.
    fn softmax_kl(&self, logits: &Self::Tensor, base: &[f32]) -> f64;
    /// dlogits `[n, E]` += the gradient of `scale` times [`Self::softmax_kl`].
    fn softmax_kl_backward(&self, base: &[f32], logits: &Self::Tensor, scale: f32, dlogits: &mut Self::Tensor);

    /// Σ of softmax(logits) over the rows in the range `rows`: `[E]`.
    fn softmax_sum(&self, logits: &Self::Tensor, rows: Range<usize>) -> Vec<f64>;
    /// `dlogits[rows]` += the gradient through the softmax of each row, where `dy` `[E]` is the gradient of the sum.
    fn softmax_sum_backward(&self, dy: &[f32], logits: &Self::Tensor, rows: Range<usize>, dlogits: &mut Self::Tensor);
    /// Σ of the rows of x in each range: `[segments · cols]`.
    fn segment_sum(&self, x: &Self::Tensor, segments: &[Range<usize>]) -> Vec<f64>;
    /// `dx[row] += dy[segment of row]`, with `dy` `[segments · cols]`.
    fn segment_sum_backward(&self, dy: &[f32], segments: &[Range<usize>], dx: &mut Self::Tensor);

    // --- updates -------------------------------------------------------------------------------------------------

    /// Σ x² over part of a buffer, in f64. Finite exactly if all entries are.
    fn sum_squares(&self, b: &Self::Buffer, range: Range<usize>) -> f64;
    /// [`Self::sum_squares`] of several ranges. A GPU is waited for once.
    fn sums_of_squares(&self, b: &Self::Buffer, ranges: &[Range<usize>]) -> Vec<f64> {
        ranges.iter().map(|range| self.sum_squares(b, range.clone())).collect()
    }
    /// One AdamW step on elements `at` of `master`, `m` and `v`, with as many gradient elements from `grad_at`.
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
    /// [`Self::adamw`], then [`Self::set_weight`] of the parameters whose master weights these are: each with its elements
    /// of `master`, which together are `at`, one after another. A GPU writes them in the same pass.
    #[allow(clippy::too_many_arguments)]
    fn adamw_weights(
        &self,
        master: &mut Self::Buffer,
        m: &mut Self::Buffer,
        v: &mut Self::Buffer,
        at: Range<usize>,
        grad: &Self::Buffer,
        grad_at: usize,
        step: &AdamwStep,
        weights: Vec<(Range<usize>, &mut Self::Weight)>,
    ) {
        self.adamw(master, m, v, at, grad, grad_at, step);
        for (at, w) in weights {
            self.set_weight(w, master, at);
        }
    }
    /// Overwrites a parameter with elements `at` of `values`, rounded to nearest even in its stored dtype.
    fn set_weight(&self, w: &mut Self::Weight, values: &Self::Buffer, at: Range<usize>);
    /// Converts elements of a parameter to f32 and writes them into a buffer at `offset`.
    fn read_weight(&self, w: &Self::Weight, elements: Range<usize>, into: &mut Self::Buffer, offset: usize);
}
