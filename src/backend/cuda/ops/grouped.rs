//! Products of groups of rows with their own weights: the experts.
//!
//! [`Form`] lists the implementations. Kernels over all groups read the groups' offsets on the GPU, so the host does
//! not wait. cuBLAS products per group need the offsets on the host, where the dispatch keeps them once they have been
//! read.

mod gradient;

use std::ops::Range;
use std::sync::Arc;

pub use self::gradient::backward_weight;
use crate::backend::cuda::gpu::{Address, Gemm, Grid, Operand};
use crate::backend::cuda::ops::dispatch::group_rows;
use crate::backend::cuda::ops::elements::{InDtype, weight_in};
use crate::backend::cuda::plan::{Form, Grouped, Operation};
use crate::backend::cuda::tensor::Array;
use crate::backend::cuda::{Cuda, Dispatch, Tensor, Weight, kernels};
use crate::backend::{Dtype, Stacks};

/// The shapes, the form and the weights of one call.
struct Call<'a> {
    cuda: &'a Cuda,
    dispatch: &'a Dispatch,
    form: Form,
    /// Weights per group.
    stack: usize,
    /// Columns and rows of each weight.
    inputs: usize,
    outputs: usize,
    dtype: Dtype,
    /// The weights in the compute format, `stack` per group.
    weights: Vec<InDtype<'a>>,
}

impl<'a> Call<'a> {
    fn new(cuda: &'a Cuda, operation: Operation, w: &Stacks<'a, Weight>, dispatch: &'a Dispatch) -> Self {
        assert!(w.len() == dispatch.num_experts, "weights of {} groups, rows of {}", w.len(), dispatch.num_experts);
        let stack = w.first().map_or(0, Vec::len);
        let (outputs, inputs) = w.first().and_then(|w| w.first()).map_or((0, 0), |w| (w.rows(), w.cols()));
        for group in w {
            assert!(group.len() == stack, "a stack of {} weights beside one of {stack}", group.len());
            for w in group {
                assert!(
                    (w.rows(), w.cols()) == (outputs, inputs),
                    "a weight [{}, {}] beside one [{outputs}, {inputs}]",
                    w.rows(),
                    w.cols()
                );
            }
        }
        let dtype = cuda.compute();
        let shape = Grouped { operation, rows: dispatch.rows, groups: w.len(), inputs, outputs, dtype };
        let weights = w.iter().flatten().map(|w| weight_in(cuda, w, dtype)).collect();
        Self { form: cuda.form(&shape), cuda, dispatch, stack, inputs, outputs, dtype, weights }
    }

    fn expect(&self, what: &str, x: &Tensor, cols: usize) {
        x.expect_shape(what, self.dispatch.rows, cols);
        assert!(x.dtype() == self.dtype, "{what} in {:?}, the weights in {:?}", x.dtype(), self.dtype);
    }

    /// Whether all sums are empty.
    fn is_empty(&self) -> bool {
        self.dispatch.rows == 0 || self.weights.is_empty() || self.inputs * self.outputs == 0
    }

    /// The array of the weights' addresses, on the GPU.
    fn pointers(&self) -> Arc<Array<u64>> {
        let addresses: Vec<u64> = self.weights.iter().map(|w| w.address().0).collect();
        if self.weights.iter().all(|w| matches!(w, InDtype::Original(_))) {
            self.cuda.table(addresses)
        } else {
            Arc::new(self.cuda.uploaded(&addresses)) // addresses of converted copies do not recur
        }
    }

    /// The tiles of a kernel over all groups in this call's form.
    fn tiling(&self) -> Tiling {
        match self.form {
            Form::TensorCores => Tiling { rows: 128, cols: 128, shared: 48 << 10 },
            Form::Warpgroups => Tiling { rows: 128, cols: 128, shared: 97 << 10 },
            Form::WideWarpgroups => Tiling { rows: 128, cols: 256, shared: 193 << 10 },
            Form::Arithmetic | Form::EachGroup => Tiling { rows: 64, cols: 64, shared: 0 },
        }
    }

    /// The groups that have rows: index and rows, on the host.
    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        group_rows(self.cuda, self.dispatch).into_iter().enumerate().filter(|(_, rows)| !rows.is_empty())
    }

    fn weight(&self, group: usize, index: usize) -> Address {
        self.weights[group * self.stack + index].address()
    }

    /// A product in the compute format, with a result in `c_dtype`.
    fn gemm(
        &self,
        [m, n, k]: [usize; 3],
        [a, b]: [Operand; 2],
        (c, c_stride, c_dtype): (Address, usize, Dtype),
        beta: f32,
    ) {
        let dtype = self.dtype;
        self.cuda.gemm(&Gemm { m, n, k, a, b, dtype, c, c_stride, c_dtype, alpha: 1.0, beta });
    }
}

/// A block computes a tile.
struct Tiling {
    /// Rows and columns of a tile.
    rows: usize,
    cols: usize,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

impl Tiling {
    fn grid(&self, blocks: usize) -> Grid {
        Grid::row(blocks, 256).shared(self.shared)
    }

    /// An upper bound on the row tiles of all groups: each group may end with a partial tile.
    fn row_tiles(&self, dispatch: &Dispatch) -> usize {
        dispatch.rows / self.rows + dispatch.num_experts.min(dispatch.rows)
    }

    /// Tiles of one weight.
    fn weight_tiles(&self, call: &Call<'_>) -> usize {
        call.outputs.div_ceil(self.rows) * call.inputs.div_ceil(self.cols)
    }
}

/// y = x · wᵀ for each group; the outputs of stacked weights are side by side.
pub fn forward(cuda: &Cuda, x: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
    let call = Call::new(cuda, Operation::Product, w, dispatch);
    call.expect("x of grouped products", x, call.inputs);
    let width = call.stack * call.outputs;
    let mut y = cuda.tensor(x.rows(), width, call.dtype);
    if call.is_empty() {
        cuda.zero(y.address(), y.len() * call.dtype.size());
        return y;
    }
    if call.form == Form::EachGroup {
        for (group, rows) in call.groups() {
            for index in 0..call.stack {
                let a = Operand { at: x.row(rows.start), stride: call.inputs, transposed: false };
                let b = Operand { at: call.weight(group, index), stride: call.inputs, transposed: true };
                let to = y.row(rows.start).offset(index * call.outputs * call.dtype.size());
                call.gemm([rows.len(), call.outputs, call.inputs], [a, b], (to, width, call.dtype), 0.0);
            }
        }
        return y;
    }
    let (tiling, pointers) = (call.tiling(), call.pointers());
    let blocks = tiling.row_tiles(dispatch) * call.stack * call.outputs.div_ceil(tiling.cols);
    kernels::grouped_linear(
        cuda,
        call.form,
        tiling.grid(blocks),
        y.output(),
        x.input(),
        pointers.input().addresses(call.dtype),
        dispatch.offsets.input(),
        dispatch.num_experts,
        call.stack,
        call.inputs,
        call.outputs,
    );
    y
}

/// dx = dy · w for each group, summed over its stacked weights.
pub fn backward_input(cuda: &Cuda, dy: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
    let call = Call::new(cuda, Operation::Product, w, dispatch);
    let width = call.stack * call.outputs;
    call.expect("dy of grouped products", dy, width);
    let mut dx = cuda.tensor(dy.rows(), call.inputs, call.dtype);
    if call.is_empty() {
        cuda.zero(dx.address(), dx.len() * call.dtype.size());
        return dx;
    }
    if call.form == Form::EachGroup {
        // The sum over a stack is accumulated in F32 and rounded once.
        let wide = call.stack > 1 && call.dtype != Dtype::F32;
        let sums = wide.then(|| cuda.tensor(dy.rows(), call.inputs, Dtype::F32));
        let to = sums.as_ref().unwrap_or(&dx);
        for (group, rows) in call.groups() {
            for index in 0..call.stack {
                let at = dy.row(rows.start).offset(index * call.outputs * call.dtype.size());
                let a = Operand { at, stride: width, transposed: false };
                let b = Operand { at: call.weight(group, index), stride: call.inputs, transposed: false };
                let beta = if index == 0 { 0.0 } else { 1.0 };
                let to = (to.row(rows.start), call.inputs, to.dtype());
                call.gemm([rows.len(), call.inputs, call.outputs], [a, b], to, beta);
            }
        }
        if let Some(sums) = sums {
            let n = dx.len();
            super::elements::cast(cuda, sums.input(), dx.output(), n);
        }
        return dx;
    }
    let (tiling, pointers) = (call.tiling(), call.pointers());
    let blocks = tiling.row_tiles(dispatch) * call.inputs.div_ceil(tiling.cols);
    kernels::grouped_backward_input(
        cuda,
        call.form,
        tiling.grid(blocks),
        dx.output(),
        dy.input(),
        pointers.input().addresses(call.dtype),
        dispatch.offsets.input(),
        dispatch.num_experts,
        call.stack,
        call.inputs,
        call.outputs,
    );
    dx
}
