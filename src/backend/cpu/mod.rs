//! The CPU backend: the reference implementation, and the fallback for machines without a GPU, so it is optimised too.
//!
//! Each file has one family of operations, with each backward pass beside its forward pass. `tensor` explains why the
//! backend has its own tensor type, `gemm` how matrix products are tiled for several threads, `dot` how forward products read the
//! weights, `simd` how plain loops are vectorised. Sums are always split by shape, never by the number of threads, so results do not depend on that number.

mod attention;
mod attention_bf16;
mod attention_blocks;
mod bf16;
mod cross_entropy;
mod dispatch;
mod dot;
mod element;
mod embedding;
mod gemm;
mod grouped;
mod groups;
mod kl;
mod linear;
mod norm;
mod parallel;
mod prefetch;
mod product;
mod rope;
mod route;
mod simd;
mod statistics;
mod swiglu;
mod tensor;
mod update;
mod weight;

#[cfg(target_endian = "big")]
compile_error!("weights are multiplied as checkpoints store them, in little-endian order");

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

pub use self::dispatch::Dispatch;
use self::groups::RowGroup;
use self::prefetch::Prefetch;
pub use self::product::{Caches, Instructions, Processor, Products};
pub use self::rope::Sequences;
pub use self::route::Routing;
pub use self::tensor::Tensor;
use self::tensor::TensorPool;
pub use self::weight::Weight;
use super::{AdamwStep, Backend, Dtype, ExpertGrad, Heads, HostTensor, Packing, Rope, RowLoss, Stacks};

/// The CPU backend: a thread pool, and a pool of recycled tensor storage. Products are computed in f32,
/// or of values rounded to bf16 with sums in f32. Activations are stored in f32; with products of bf16 values, the rows of experts in
/// bf16.
pub struct Cpu {
    threads: rayon::ThreadPool,
    pool: Arc<TensorPool>,
    products: Option<Products>,
    prefetch: Prefetch,
}

impl Cpu {
    /// A backend with a thread pool of `threads` threads; 0: one per core available to the process.
    ///
    /// # Panics
    /// If the operating system cannot start the threads.
    pub fn new(threads: usize) -> Self {
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .thread_name(|i| format!("cpu-{i}"))
            .build()
            .unwrap_or_else(|e| panic!("cannot start {threads} threads: {e}"));
        Self { threads, pool: Arc::new(TensorPool::default()), products: None, prefetch: Prefetch::default() }
    }

    /// The same backend with products of bf16 values, or, with `None`, of f32. Router logits are always products of f32.
    pub fn with_products(self, products: impl Into<Option<Products>>) -> Self {
        Self { products: products.into(), ..self }
    }

    /// How products of bf16 values are computed; `None` if they are products of f32.
    pub fn products(&self) -> Option<&Products> {
        self.products.as_ref()
    }

    /// Number of threads in the pool.
    pub fn threads(&self) -> usize {
        self.threads.current_num_threads()
    }

    /// Runs an operation inside the thread pool.
    fn run<R: Send>(&self, operation: impl FnOnce() -> R + Send) -> R {
        self.threads.install(operation)
    }
}

/// A flat f32 array.
pub struct Buffer(Vec<f32>);

/// Row indices, token ids or class ids.
pub struct Indices(Vec<u32>);

/// Running f64 sums.
pub struct Scores(Vec<f64>);

/// The row range and weights of each expert that has rows.
fn groups<'a>(w: &'a Stacks<'a, Weight>, dispatch: &Dispatch) -> Vec<RowGroup<'a>> {
    let experts = dispatch.offsets.len() - 1;
    assert!(w.len() == experts, "weights of {} experts, a dispatch to {experts}", w.len());
    w.iter()
        .zip(dispatch.offsets.windows(2))
        .map(|(stack, ends)| RowGroup { rows: ends[0]..ends[1], stack })
        .filter(|group| !group.rows.is_empty())
        .collect()
}

/// The slice and offset of an optional gradient buffer.
fn grad_slice(dw: Option<(&mut Buffer, usize)>) -> Option<(&mut [f32], usize)> {
    dw.map(|(buffer, offset)| (&mut buffer.0[..], offset))
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Weight = Weight;
    type Buffer = Buffer;
    type Indices = Indices;
    type Normaliser = ();
    type Sequences = Sequences;
    type Routing = Routing;
    type Dispatch = Dispatch;
    type Scores = Scores;

    fn together<R: Send>(&self, work: impl FnOnce() -> R + Send) -> R {
        self.run(work)
    }

    // --- memory --------------------------------------------------------------------------------------------------

    fn activation_size(&self) -> usize {
        size_of::<f32>()
    }
    fn routed_size(&self) -> usize {
        self.precision().size()
    }
    fn precision(&self) -> Dtype {
        if self.products.is_some() { Dtype::Bf16 } else { Dtype::F32 }
    }
    fn free_memory(&self) -> Option<u64> {
        None
    }
    fn peak_memory(&self) -> Option<u64> {
        None
    }
    fn profile(&self) -> Option<String> {
        None
    }
    fn logit_chunk_rows(&self, _: usize) -> usize {
        0
    }

    // --- allocation and copies -----------------------------------------------------------------------------------

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Tensor {
        assert!(values.len() == rows * cols, "{} values for a [{rows}, {cols}] tensor", values.len());
        let mut x = self.pool.take(rows, cols);
        x.values_mut().copy_from_slice(values);
        x
    }
    fn download(&self, x: &Tensor) -> Vec<f32> {
        x.to_f32()
    }
    fn zeros(&self, rows: usize, cols: usize) -> Tensor {
        self.pool.zeros(rows, cols)
    }
    fn zeros_like(&self, x: &Tensor) -> Tensor {
        self.pool.zeros(x.rows(), x.cols())
    }
    fn shape(&self, x: &Tensor) -> (usize, usize) {
        (x.rows(), x.cols())
    }
    fn indices(&self, values: &[u32]) -> Indices {
        Indices(values.to_vec())
    }
    fn sequences(&self, packing: &Packing, rope: &Rope) -> Sequences {
        self.run(|| Sequences::new(packing, rope))
    }
    fn weight(&self, host: HostTensor) -> Weight {
        Weight::new(host)
    }
    fn prefetch<'w>(&self, weights: impl Iterator<Item = &'w Weight>) {
        self.prefetch.request(weights.filter_map(Weight::loaded));
    }
    fn random_weight(&self, dtype: Dtype, shape: Vec<usize>, seed: u64, std: f32) -> Weight {
        self.run(|| update::random_weight(dtype, shape, seed, std))
    }
    fn weight_host(&self, w: &Weight) -> HostTensor {
        w.host()
    }
    fn buffer(&self, len: usize) -> Buffer {
        Buffer(vec![0.0; len])
    }
    fn buffer_read(&self, b: &Buffer, range: Range<usize>) -> Vec<f32> {
        b.0[range].to_vec()
    }
    fn buffer_write(&self, b: &mut Buffer, offset: usize, values: &[f32]) {
        b.0[offset..offset + values.len()].copy_from_slice(values);
    }
    fn buffer_clear(&self, b: &mut Buffer) {
        self.run(|| b.0.par_chunks_mut(parallel::CHUNK).for_each(|chunk| chunk.fill(0.0)));
    }
    fn scores(&self, n: usize) -> Scores {
        Scores(vec![0.0; n])
    }
    fn scores_take(&self, s: &mut Scores) -> Vec<f64> {
        let zeros = vec![0.0; s.0.len()];
        std::mem::replace(&mut s.0, zeros)
    }

    // --- row and elementwise operations --------------------------------------------------------------------------

    fn add_assign(&self, x: &mut Tensor, y: &Tensor) {
        y.expect_shape("y", x.rows(), x.cols());
        self.run(|| update::zip_assign(x.values_mut(), y.values(), |x, y| x + y));
    }
    fn gather_rows(&self, x: &Tensor, rows: &Indices) -> Tensor {
        self.run(|| embedding::gather_rows(self, x, &rows.0))
    }
    fn gather_rows_backward(&self, dy: &Tensor, rows: &Indices, dx: &mut Tensor) {
        self.run(|| embedding::gather_rows_backward(dy, &rows.0, dx));
    }
    fn write_rows(&self, x: &mut Tensor, rows: &Indices, y: &Tensor) {
        embedding::write_rows(x, &rows.0, y);
    }
    fn clamp(&self, x: &mut Tensor, limit: f32) {
        self.run(|| {
            x.values_mut().par_chunks_mut(parallel::CHUNK).for_each(|chunk| {
                simd::simd!({
                    for x in chunk {
                        *x = x.clamp(-limit, limit);
                    }
                });
            });
        });
    }
    fn clamp_backward(&self, dy: &mut Tensor, y: &Tensor, limit: f32) {
        y.expect_shape("y", dy.rows(), dy.cols());
        self.run(|| update::zip_assign(dy.values_mut(), y.values(), |dy, y| if y.abs() < limit { dy } else { 0.0 }));
    }
    fn fill_columns(&self, x: &mut Tensor, columns: &Indices, value: f32) {
        self.run(|| update::fill_columns(x, &columns.0, value));
    }

    // --- dense layers --------------------------------------------------------------------------------------------

    fn embedding(&self, ids: &Indices, w: &Weight) -> Tensor {
        self.run(|| embedding::embedding(self, &ids.0, w))
    }
    fn embedding_backward(&self, dy: &Tensor, ids: &Indices, dw: &mut Buffer, offset: usize) {
        self.run(|| embedding::backward(dy, &ids.0, &mut dw.0[offset..]));
    }
    fn rms_norm(&self, x: &Tensor, w: &Weight, eps: f32) -> Tensor {
        self.run(|| norm::rms_norm(self, x, w, eps))
    }
    fn rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Weight,
        eps: f32,
        dw: Option<(&mut Buffer, usize)>,
    ) -> Tensor {
        let dw = grad_slice(dw);
        self.run(|| norm::backward(self, dy, x, w, eps, dw))
    }
    fn linear(&self, x: &Tensor, w: &Weight, bias: Option<&Weight>) -> Tensor {
        self.run(|| linear::linear(self, x, w, bias))
    }
    fn router_logits(&self, x: &Tensor, w: &Weight) -> Tensor {
        self.run(|| linear::linear_f32(self, x, w))
    }
    fn linear_backward_input(&self, dy: &Tensor, w: &Weight) -> Tensor {
        self.run(|| linear::backward_input(self, dy, w))
    }
    fn linear_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Buffer, offset: usize) {
        self.run(|| linear::backward_weight(self, dy, x, &mut dw.0, offset));
    }
    fn bias_backward(&self, dy: &Tensor, db: &mut Buffer, offset: usize) {
        self.run(|| linear::bias_backward(dy, &mut db.0, offset));
    }
    fn rope(&self, x: &mut Tensor, head_dim: usize, seqs: &Sequences) {
        self.run(|| rope::rope(x, head_dim, seqs));
    }
    fn rope_backward(&self, dy: &mut Tensor, head_dim: usize, seqs: &Sequences) {
        self.run(|| rope::backward(dy, head_dim, seqs));
    }
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, seqs: &Sequences, heads: &Heads) -> (Tensor, ()) {
        (self.run(|| attention::attention(self, q, k, v, seqs, heads)), ())
    }
    fn attention_backward(
        &self,
        dy: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        (y, ()): (&Tensor, &()),
        seqs: &Sequences,
        heads: &Heads,
    ) -> (Tensor, Tensor, Tensor) {
        self.run(|| attention::backward(self, dy, q, k, v, y, seqs, heads))
    }
    fn swiglu(&self, gate_up: &Tensor) -> Tensor {
        self.run(|| swiglu::swiglu(self, gate_up))
    }
    fn swiglu_backward(&self, dy: &Tensor, gate_up: &Tensor) -> Tensor {
        self.run(|| swiglu::backward(self, dy, gate_up))
    }
    fn sigmoid_gate(&self, x: &Tensor, gate: &Tensor) -> Tensor {
        self.run(|| swiglu::sigmoid_gate(self, x, gate))
    }
    fn sigmoid_gate_backward(&self, dy: &Tensor, x: &Tensor, gate: &Tensor) -> (Tensor, Tensor) {
        self.run(|| swiglu::sigmoid_gate_backward(self, dy, x, gate))
    }

    // --- routed experts ------------------------------------------------------------------------------------------

    fn route(&self, logits: &Tensor, top_k: usize, renormalize: bool) -> Routing {
        self.run(|| route::route(self, logits, top_k, renormalize))
    }
    fn route_backward(&self, dweights: &Tensor, routing: &Routing) -> Tensor {
        self.run(|| route::backward(self, dweights, routing))
    }
    fn zero_routing_weights(&self, routing: &mut Routing, experts: &Indices) {
        route::zero_weights(routing, &experts.0);
    }
    fn expert_ids(&self, routing: &Routing) -> Vec<u32> {
        routing.ids.clone()
    }
    fn dispatch(&self, routing: &Routing, num_experts: usize) -> Dispatch {
        Dispatch::new(&routing.ids, routing.top_k(), num_experts)
    }
    fn single_expert_dispatch(&self, rows: usize) -> Dispatch {
        Dispatch::single_expert_dispatch(rows)
    }
    fn tokens_per_expert(&self, dispatch: &Dispatch) -> Vec<usize> {
        dispatch.tokens_per_expert()
    }
    fn dispatch_rows(&self, x: &Tensor, dispatch: &Dispatch) -> Tensor {
        self.run(|| dispatch::dispatch_rows(self, x, dispatch))
    }
    fn combine_rows(&self, x: &Tensor, dispatch: &Dispatch) -> Tensor {
        self.run(|| dispatch::combine_rows(self, x, dispatch))
    }
    fn grouped_linear(&self, x: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
        let outputs = w.first().map_or(0, |stack| stack.iter().map(|w| w.rows()).sum());
        let mut y = self.pool.take_as(self.precision(), x.rows(), outputs);
        self.run(|| grouped::forward(self.products(), x, &groups(w, dispatch), &mut y));
        y
    }
    fn grouped_linear_backward_input(&self, dy: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
        let inputs = w.first().and_then(|stack| stack.first()).map_or(0, |w| w.cols());
        // Gradients of the tokens' own rows are summed in f32.
        let dtype = if dispatch.single { Dtype::F32 } else { self.precision() };
        let mut dx = self.pool.take_as(dtype, dy.rows(), inputs);
        self.run(|| grouped::backward_input(self.products(), dy, &groups(w, dispatch), &mut dx));
        dx
    }
    fn grouped_linear_backward_weight(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Stacks<'_, Weight>,
        dispatch: &Dispatch,
        plan: &[ExpertGrad],
        dw: &mut Buffer,
        scores: &mut Scores,
    ) {
        let jobs = groups::weight_grad_jobs(&dispatch.offsets, w, plan);
        self.run(|| grouped::backward_weight(self.products(), dy, x, &jobs, &mut dw.0, &mut scores.0));
    }
    fn weighted_swiglu(&self, gate_up: &Tensor, routing: &Routing, dispatch: &Dispatch) -> Tensor {
        self.run(|| swiglu::weighted(self, gate_up, routing, dispatch))
    }
    fn weighted_swiglu_backward(
        &self,
        dy: Tensor,
        gate_up: &Tensor,
        routing: &Routing,
        dispatch: &Dispatch,
    ) -> (Tensor, Tensor) {
        self.run(|| swiglu::weighted_backward(self, &dy, gate_up, routing, dispatch))
    }

    // --- losses and statistics -----------------------------------------------------------------------------------

    fn linear_cross_entropy(&self, x: &Tensor, w: &Weight, targets: &Indices) -> f64 {
        self.run(|| cross_entropy::forward(self, x, w, &targets.0))
    }
    fn linear_cross_entropy_rows(&self, x: &Tensor, w: &Weight, targets: &Indices) -> Vec<RowLoss> {
        self.run(|| cross_entropy::rows(self, x, w, &targets.0))
    }
    fn linear_cross_entropy_backward(
        &self,
        x: &Tensor,
        w: &Weight,
        targets: &Indices,
        scale: f32,
        dw: Option<(&mut Buffer, usize)>,
    ) -> (f64, Tensor) {
        let dw = grad_slice(dw);
        self.run(|| cross_entropy::backward(self, x, w, &targets.0, scale, dw))
    }
    fn linear_kl(&self, x: &Tensor, w: &Weight, base_x: &Tensor, base_w: &Weight) -> (f64, usize) {
        self.run(|| kl::forward(self, [x, base_x], [w, base_w]))
    }
    fn linear_kl_backward(
        &self,
        x: &Tensor,
        w: &Weight,
        base_x: &Tensor,
        base_w: &Weight,
        scale: f32,
        dw: Option<(&mut Buffer, usize)>,
    ) -> (f64, Tensor) {
        let dw = grad_slice(dw);
        self.run(|| kl::backward(self, [x, base_x], [w, base_w], scale, dw))
    }
    fn softmax_kl(&self, logits: &Tensor, base: &[f32]) -> f64 {
        self.run(|| kl::softmax(logits, base))
    }
    fn softmax_kl_backward(&self, base: &[f32], logits: &Tensor, scale: f32, dlogits: &mut Tensor) {
        self.run(|| kl::softmax_backward(base, logits, scale, dlogits));
    }
    fn softmax_sum(&self, logits: &Tensor, rows: Range<usize>) -> Vec<f64> {
        self.run(|| statistics::softmax_sum(logits, rows))
    }
    fn softmax_sum_backward(&self, dy: &[f32], logits: &Tensor, rows: Range<usize>, dlogits: &mut Tensor) {
        self.run(|| statistics::softmax_sum_backward(dy, logits, rows, dlogits));
    }
    fn segment_sum(&self, x: &Tensor, segments: &[Range<usize>]) -> Vec<f64> {
        self.run(|| statistics::segment_sum(x, segments))
    }
    fn segment_sum_backward(&self, dy: &[f32], segments: &[Range<usize>], dx: &mut Tensor) {
        self.run(|| statistics::segment_sum_backward(dy, segments, dx));
    }

    // --- updates -------------------------------------------------------------------------------------------------

    fn sum_squares(&self, b: &Buffer, range: Range<usize>) -> f64 {
        self.run(|| update::sum_squares(&b.0[range]))
    }
    fn adamw(
        &self,
        master: &mut Buffer,
        m: &mut Buffer,
        v: &mut Buffer,
        at: Range<usize>,
        grad: &Buffer,
        grad_at: usize,
        step: &AdamwStep,
    ) {
        let grad = &grad.0[grad_at..grad_at + at.len()];
        let (master, m, v) = (&mut master.0[at.clone()], &mut m.0[at.clone()], &mut v.0[at]);
        self.run(|| update::adamw(master, m, v, grad, step));
    }
    fn set_weight(&self, w: &mut Weight, values: &Buffer, at: Range<usize>) {
        self.run(|| update::set_weight(w, &values.0[at]));
    }
    fn read_weight(&self, w: &Weight, elements: Range<usize>, into: &mut Buffer, offset: usize) {
        let into = &mut into.0[offset..offset + elements.len()];
        self.run(|| update::read_weight(w, elements.start, into));
    }
}
