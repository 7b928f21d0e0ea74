//! [`Backend`] for [`Cuda`]: each operation calls its launcher in `ops/`.

use std::ops::Range;

use super::ops::{
    attention, cross_entropy, dispatch, elements, grouped, kl, linear, norm, norm_rope, offload, rope, route, rows,
    statistics, swiglu, transfer, update,
};
use super::{Buffer, Cuda, Dispatch, Indices, Normaliser, Routing, Scores, Sequences, Tensor, Weight, must};
use crate::backend::{AdamwStep, Backend, Dtype, ExpertGrad, Heads, HostTensor, Packing, Rope, RowLoss, Stacks};

impl Backend for Cuda {
    type Tensor = Tensor;
    type Weight = Weight;
    type Buffer = Buffer;
    type Indices = Indices;
    type Normaliser = Normaliser;
    type Sequences = Sequences;
    type Routing = Routing;
    type Dispatch = Dispatch;
    type Scores = Scores;

    // --- memory --------------------------------------------------------------------------------------------------

    fn activation_size(&self) -> usize {
        self.compute.size()
    }
    fn precision(&self) -> Dtype {
        self.compute
    }
    fn free_memory(&self) -> Option<u64> {
        Some(self.room.saturating_sub(self.pool.usage().used) as u64)
    }
    fn peak_memory(&self) -> Option<u64> {
        Some(self.pool.usage().peak as u64) // including gaps between tensors
    }
    fn profile(&self) -> Option<String> {
        self.times.as_ref().map(ToString::to_string)
    }
    fn logit_chunk_rows(&self, classes: usize) -> usize {
        cross_entropy::chunk_rows(classes, self.compute)
    }

    // --- transfers ----------------------------------------------------------------------------------------------

    fn upload(&self, rows: usize, cols: usize, values: &[f32]) -> Tensor {
        transfer::upload(self, rows, cols, values, self.compute)
    }
    fn download(&self, x: &Tensor) -> Vec<f32> {
        transfer::download(self, x)
    }
    fn zeros(&self, rows: usize, cols: usize) -> Tensor {
        transfer::zeros(self, rows, cols, self.compute)
    }
    fn zeros_like(&self, x: &Tensor) -> Tensor {
        transfer::zeros(self, x.rows(), x.cols(), x.dtype())
    }
    fn shape(&self, x: &Tensor) -> (usize, usize) {
        (x.rows(), x.cols())
    }
    fn indices(&self, values: &[u32]) -> Indices {
        transfer::indices(self, values)
    }
    fn sequences(&self, packing: &Packing, rope: &Rope) -> Sequences {
        transfer::sequences(self, packing, rope)
    }
    fn weight(&self, host: HostTensor) -> Weight {
        transfer::weight(self, &host)
    }
    fn offloaded_weights(&self, values: Vec<HostTensor>) -> Vec<Weight> {
        offload::weights(self, &values)
    }
    fn offload(&self, weights: Vec<Weight>) -> Vec<Weight> {
        offload::offload(self, weights)
    }
    fn load_offloaded<'w>(&self, now: impl Iterator<Item = &'w Weight>, next: impl Iterator<Item = &'w Weight>) {
        offload::request(now);
        offload::request(next);
    }
    fn offload_ranks(&self) -> Option<usize> {
        self.ring.ranks()
    }
    fn fence_weights(&self) {
        must(self.ring.fence());
    }
    fn write_weight(&self, w: &mut Weight, value: HostTensor) {
        if !offload::write(w, &value) {
            *w = self.weight(value);
        }
    }
    fn random_weight(&self, dtype: Dtype, shape: Vec<usize>, seed: u64, std: f32) -> Weight {
        elements::random_weight(self, dtype, shape, seed, std)
    }
    fn weight_host(&self, w: &Weight) -> HostTensor {
        transfer::weight_host(self, w)
    }
    fn buffer(&self, len: usize) -> Buffer {
        transfer::buffer(self, len)
    }
    fn buffer_read(&self, b: &Buffer, range: Range<usize>) -> Vec<f32> {
        self.copy_out(b.at(range.start, range.len()), range.len())
    }
    fn buffer_write(&self, b: &mut Buffer, offset: usize, values: &[f32]) {
        self.copy_in(b.overwritten(offset, values.len()), values);
    }
    fn buffer_clear(&self, b: &mut Buffer) {
        b.clear();
    }
    fn scores(&self, n: usize) -> Scores {
        transfer::scores(self, n)
    }
    fn scores_take(&self, s: &mut Scores) -> Vec<f64> {
        transfer::scores_take(self, s)
    }

    // --- rows and elements ---------------------------------------------------------------------------------------

    fn add_assign(&self, x: &mut Tensor, y: &Tensor) {
        elements::add_assign(self, x, y);
    }
    fn gather_rows(&self, x: &Tensor, rows: &Indices) -> Tensor {
        rows::gather_rows(self, x, rows)
    }
    fn gather_rows_backward(&self, dy: &Tensor, rows: &Indices, dx: &mut Tensor) {
        rows::gather_rows_backward(self, dy, rows, dx);
    }
    fn write_rows(&self, x: &mut Tensor, rows: &Indices, y: &Tensor) {
        rows::write_rows(self, x, rows, y);
    }
    fn clamp(&self, x: &mut Tensor, limit: f32) {
        elements::clamp(self, x, limit);
    }
    fn clamp_backward(&self, dy: &mut Tensor, y: &Tensor, limit: f32) {
        elements::clamp_backward(self, dy, y, limit);
    }
    fn fill_columns(&self, x: &mut Tensor, columns: &Indices, value: f32) {
        rows::fill_columns(self, x, columns, value);
    }

    // --- dense layers --------------------------------------------------------------------------------------------

    fn embedding(&self, ids: &Indices, w: &Weight) -> Tensor {
        rows::embedding(self, ids, w)
    }
    fn embedding_backward(&self, dy: &Tensor, ids: &Indices, dw: &mut Buffer, offset: usize) {
        rows::embedding_backward(self, dy, ids, dw, offset);
    }
    fn rms_norm(&self, x: &Tensor, w: &Weight, eps: f32) -> Tensor {
        norm::rms_norm(self, x, w, eps)
    }
    fn rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Weight,
        eps: f32,
        dw: Option<(&mut Buffer, usize)>,
    ) -> Tensor {
        norm::backward(self, dy, x, w, eps, dw)
    }
    fn add_rms_norm(&self, x: &mut Tensor, y: &Tensor, w: &Weight, eps: f32) -> Tensor {
        norm::add_rms_norm(self, x, y, w, eps)
    }
    fn add_rms_norm_backward(
        &self,
        dy: &Tensor,
        x: &Tensor,
        w: &Weight,
        eps: f32,
        dw: Option<(&mut Buffer, usize)>,
        dx: &mut Tensor,
    ) {
        norm::add_backward(self, dy, x, w, eps, dw, dx);
    }
    fn linear(&self, x: &Tensor, w: &Weight, bias: Option<&Weight>) -> Tensor {
        linear::linear(self, x, w, bias, self.compute)
    }
    fn router_logits(&self, x: &Tensor, w: &Weight) -> Tensor {
        linear::linear(self, x, w, None, Dtype::F32)
    }
    fn linear_backward_input(&self, dy: &Tensor, w: &Weight) -> Tensor {
        linear::backward_input(self, dy, w)
    }
    fn add_linear_backward_input(&self, dy: &Tensor, w: &Weight, dx: &mut Tensor) {
        linear::add_backward_input(self, dy, w, dx);
    }
    fn linear_backward_weight(&self, dy: &Tensor, x: &Tensor, dw: &mut Buffer, offset: usize) {
        linear::backward_weight(self, dy, x, dw, offset);
    }
    fn bias_backward(&self, dy: &Tensor, db: &mut Buffer, offset: usize) {
        linear::bias_backward(self, dy, db, offset);
    }
    fn rope(&self, x: &mut Tensor, head_dim: usize, seqs: &Sequences) {
        rope::rotate(self, x, head_dim, seqs, 1.0);
    }
    /// The transpose of a rotation times the scale is the inverse rotation times the scale.
    fn rope_backward(&self, dy: &mut Tensor, head_dim: usize, seqs: &Sequences) {
        rope::rotate(self, dy, head_dim, seqs, -1.0);
    }
    fn rms_norm_rope(&self, x: &Tensor, w: &Weight, eps: f32, head_dim: usize, seqs: &Sequences) -> Tensor {
        norm_rope::forward(self, x, w, eps, head_dim, seqs)
    }
    fn rms_norm_rope_backward(
        &self,
        dy: Tensor,
        x: &Tensor,
        w: &Weight,
        eps: f32,
        head_dim: usize,
        seqs: &Sequences,
        dw: Option<(&mut Buffer, usize)>,
    ) -> Tensor {
        norm_rope::backward(self, dy, x, w, eps, head_dim, seqs, dw)
    }
    fn attention(&self, q: &Tensor, k: &Tensor, v: &Tensor, seqs: &Sequences, heads: &Heads) -> (Tensor, Normaliser) {
        attention::attention(self, q, k, v, seqs, heads)
    }
    fn attention_backward(
        &self,
        dy: &Tensor,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        y: (&Tensor, &Normaliser),
        seqs: &Sequences,
        heads: &Heads,
    ) -> (Tensor, Tensor, Tensor) {
        attention::backward(self, dy, q, k, v, y, seqs, heads)
    }
    fn swiglu(&self, gate_up: &Tensor) -> Tensor {
        swiglu::swiglu(self, gate_up)
    }
    fn swiglu_backward(&self, dy: &Tensor, gate_up: &Tensor) -> Tensor {
        swiglu::backward(self, dy, gate_up)
    }
    fn sigmoid_gate(&self, x: &Tensor, gate: &Tensor) -> Tensor {
        swiglu::sigmoid_gate(self, x, gate)
    }
    fn sigmoid_gate_backward(&self, dy: &Tensor, x: &Tensor, gate: &Tensor) -> (Tensor, Tensor) {
        swiglu::sigmoid_gate_backward(self, dy, x, gate)
    }

    // --- routed experts ------------------------------------------------------------------------------------------

    fn route(&self, logits: &Tensor, top_k: usize, renormalize: bool) -> Routing {
        route::route(self, logits, top_k, renormalize)
    }
    fn route_backward(&self, dweights: &Tensor, routing: &Routing) -> Tensor {
        route::backward(self, dweights, routing)
    }
    fn zero_routing_weights(&self, routing: &mut Routing, experts: &Indices) {
        route::zero_weights(self, routing, experts);
    }
    fn expert_ids(&self, routing: &Routing) -> Vec<u32> {
        self.copy_out(routing.ids.address(), routing.tokens() * routing.top_k())
    }
    fn dispatch(&self, routing: &Routing, num_experts: usize) -> Dispatch {
        dispatch::dispatch(self, routing, num_experts)
    }
    fn single_expert_dispatch(&self, rows: usize) -> Dispatch {
        dispatch::single_expert_dispatch(self, rows)
    }
    fn tokens_per_expert(&self, dispatch: &Dispatch) -> Vec<usize> {
        dispatch::tokens_per_expert(self, dispatch)
    }
    fn dispatch_rows(&self, x: &Tensor, dispatch: &Dispatch) -> Tensor {
        dispatch::dispatch_rows(self, x, dispatch)
    }
    fn combine_rows(&self, x: &Tensor, dispatch: &Dispatch) -> Tensor {
        dispatch::combine_rows(self, x, dispatch)
    }
    fn combine_rows_onto(
        &self,
        x: &Tensor,
        dispatch: &Dispatch,
        shared: Option<(&Tensor, &Tensor)>,
        residual: &Tensor,
    ) -> Tensor {
        dispatch::combine_rows_onto(self, x, dispatch, shared, residual)
    }
    fn grouped_linear(&self, x: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
        grouped::forward(self, x, w, dispatch)
    }
    fn grouped_linear_backward_input(&self, dy: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
        grouped::backward_input(self, dy, w, dispatch)
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
        grouped::backward_weight(self, dy, x, w, dispatch, plan, dw, scores);
    }
    fn weighted_swiglu(&self, gate_up: &Tensor, routing: &Routing, dispatch: &Dispatch) -> Tensor {
        swiglu::weighted(self, gate_up, routing, dispatch)
    }
    fn weighted_swiglu_backward(
        &self,
        dy: Tensor,
        gate_up: &Tensor,
        routing: &Routing,
        dispatch: &Dispatch,
    ) -> (Tensor, Tensor) {
        swiglu::weighted_backward(self, &dy, gate_up, routing, dispatch)
    }

    // --- losses and statistics -----------------------------------------------------------------------------------

    fn linear_cross_entropy(&self, x: &Tensor, w: &Weight, targets: &Indices) -> f64 {
        cross_entropy::forward(self, x, w, targets)
    }
    fn linear_cross_entropy_rows(&self, x: &Tensor, w: &Weight, targets: &Indices) -> Vec<RowLoss> {
        cross_entropy::rows(self, x, w, targets)
    }
    fn linear_cross_entropy_backward(
        &self,
        x: &Tensor,
        w: &Weight,
        targets: &Indices,
        scale: f32,
        dw: Option<(&mut Buffer, usize)>,
    ) -> (f64, Tensor) {
        cross_entropy::backward(self, x, w, targets, scale, dw)
    }
    fn linear_kl(&self, x: &Tensor, w: &Weight, base_x: &Tensor, base_w: &Weight) -> (f64, usize) {
        kl::forward(self, kl::Head { x, w }, kl::Head { x: base_x, w: base_w })
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
        kl::backward(self, kl::Head { x, w }, kl::Head { x: base_x, w: base_w }, scale, dw)
    }
    fn softmax_kl(&self, logits: &Tensor, base: &[f32]) -> f64 {
        kl::softmax(self, logits, base)
    }
    fn softmax_kl_backward(&self, base: &[f32], logits: &Tensor, scale: f32, dlogits: &mut Tensor) {
        kl::softmax_backward(self, base, logits, scale, dlogits);
    }
    fn softmax_sum(&self, logits: &Tensor, rows: Range<usize>) -> Vec<f64> {
        statistics::softmax_sum(self, logits, rows)
    }
    fn softmax_sum_backward(&self, dy: &[f32], logits: &Tensor, rows: Range<usize>, dlogits: &mut Tensor) {
        statistics::softmax_sum_backward(self, dy, logits, rows, dlogits);
    }
    fn segment_sum(&self, x: &Tensor, segments: &[Range<usize>]) -> Vec<f64> {
        statistics::segment_sum(self, x, segments)
    }
    fn segment_sum_backward(&self, dy: &[f32], segments: &[Range<usize>], dx: &mut Tensor) {
        statistics::segment_sum_backward(self, dy, segments, dx);
    }

    // --- updates -------------------------------------------------------------------------------------------------

    fn sum_squares(&self, b: &Buffer, range: Range<usize>) -> f64 {
        update::sums_of_squares(self, b, &[range])[0]
    }
    fn sums_of_squares(&self, b: &Buffer, ranges: &[Range<usize>]) -> Vec<f64> {
        update::sums_of_squares(self, b, ranges)
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
        update::adamw(self, master, m, v, at, grad, grad_at, step);
    }
    fn adamw_weights(
        &self,
        master: &mut Buffer,
        m: &mut Buffer,
        v: &mut Buffer,
        at: Range<usize>,
        grad: &Buffer,
        grad_at: usize,
        step: &AdamwStep,
        weights: Vec<(Range<usize>, &mut Weight)>,
    ) {
        update::adamw_weights(self, master, m, v, at, grad, grad_at, step, weights);
    }
    fn set_weight(&self, w: &mut Weight, values: &Buffer, at: Range<usize>) {
        update::set_weight(self, w, values, at);
    }
    fn read_weight(&self, w: &Weight, elements: Range<usize>, into: &mut Buffer, offset: usize) {
        update::read_weight(self, w, elements, into, offset);
    }
}
