//! Products of groups of rows with their own weights, and what becomes of the weights' gradients.
//!
//! Each has three forms, see [`Form`]. The kernels for all groups read the groups' offsets on the GPU, so nothing waits;
//! products for each group need them on the host, where a dispatch keeps them once they were read.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::cuda::gpu::{Address, Gemm, Grid, Kernel, Operand};
use crate::backend::cuda::kernels::{Typed, kernel, typed};
use crate::backend::cuda::ops::dispatch::group_rows;
use crate::backend::cuda::ops::elements::{InDtype, weight_in};
use crate::backend::cuda::plan::{Form, Grouped};
use crate::backend::cuda::pool::Memory;
use crate::backend::cuda::{Buffer, Cuda, Dispatch, Scores, Tensor, Weight};
use crate::backend::{Dtype, ExpertGrad, Moment, Stacks};

/// A kernel over all groups, as ordinary arithmetic and, for BF16, on tensor cores.
struct Kernels {
    arithmetic: Typed,
    tensor_cores: Kernel,
}

const LINEAR: Kernels = Kernels {
    arithmetic: typed!(GROUPED, "grouped_linear"),
    tensor_cores: kernel!(GROUPED_MMA, "grouped_linear_bf16"),
};
const BACKWARD_INPUT: Kernels = Kernels {
    arithmetic: typed!(GROUPED, "grouped_backward_input"),
    tensor_cores: kernel!(GROUPED_MMA, "grouped_backward_input_bf16"),
};
const BACKWARD_WEIGHT: Kernels = Kernels {
    arithmetic: typed!(GROUPED, "grouped_backward_weight"),
    tensor_cores: kernel!(GROUPED_MMA, "grouped_backward_weight_bf16"),
};
const MAGNITUDE: Kernels = Kernels {
    arithmetic: typed!(GRADIENT_MAGNITUDE, "gradient_magnitude"),
    tensor_cores: kernel!(GRADIENT_MAGNITUDE_MMA, "gradient_magnitude_bf16"),
};
const MAGNITUDE_OF: Typed = typed!(GRADIENT_MAGNITUDE, "magnitude_of");
const ADD_MAGNITUDES: Kernel = kernel!(GRADIENT_MAGNITUDE, "add_magnitudes");
/// Elements of a gradient that a block of `magnitude_of` reduces.
const MAGNITUDE_SPAN: usize = 4096;
/// Bytes of a gradient that is made in scratch: it stays in the L2 cache beside its operands.
const SCRATCH: usize = 16 << 20;

/// The shapes of one call, and the weights where kernels find them.
struct Call<'a> {
    cuda: &'a Cuda,
    dispatch: &'a Dispatch,
    form: Form,
    /// Weights a group.
    stack: usize,
    /// Columns and rows of each weight.
    inputs: usize,
    outputs: usize,
    dtype: Dtype,
    /// The weights in the compute type, `stack` a group.
    weights: Vec<InDtype>,
}

impl<'a> Call<'a> {
    fn new(cuda: &'a Cuda, w: &Stacks<'_, Weight>, dispatch: &'a Dispatch) -> Self {
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
        let shape = Grouped { rows: dispatch.rows, groups: w.len(), inputs, outputs, dtype };
        let weights = w.iter().flatten().map(|w| weight_in(cuda, w, dtype)).collect();
        Self { form: cuda.form(&shape), cuda, dispatch, stack, inputs, outputs, dtype, weights }
    }

    fn expect(&self, what: &str, x: &Tensor, cols: usize) {
        x.expect_shape(what, self.dispatch.rows, cols);
        assert!(x.dtype() == self.dtype, "{what} in {:?}, the weights in {:?}", x.dtype(), self.dtype);
    }

    /// Whether there is nothing to sum up.
    fn is_empty(&self) -> bool {
        self.dispatch.rows == 0 || self.weights.is_empty() || self.inputs * self.outputs == 0
    }

    /// The weights' addresses on the GPU.
    fn pointers(&self) -> Arc<Memory> {
        let addresses: Vec<u64> = self.weights.iter().map(|w| w.address().0).collect();
        if self.weights.iter().all(|w| matches!(w, InDtype::There(_))) {
            self.cuda.table(addresses)
        } else {
            Arc::new(self.cuda.uploaded(&addresses)) // scratch does not recur
        }
    }

    /// A kernel over all groups in this call's form, with the sides of its tiles and its shared memory.
    fn tiled(&self, kernels: &Kernels) -> Tiled {
        match self.form {
            Form::TensorCores => Tiled { kernel: kernels.tensor_cores, side: 128, shared: 48 << 10 },
            _ => Tiled { kernel: *kernels.arithmetic.of(self.dtype), side: 64, shared: 0 },
        }
    }

    /// Rows of each group on the host, with the group's number, without the empty ones.
    fn groups(&self) -> impl Iterator<Item = (usize, Range<usize>)> {
        group_rows(self.cuda, self.dispatch).into_iter().enumerate().filter(|(_, rows)| !rows.is_empty())
    }

    fn weight(&self, group: usize, index: usize) -> Address {
        self.weights[group * self.stack + index].address()
    }

    /// A product in the compute type, result in `c_dtype`.
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

    /// The gradient of rows `out` of one weight: dyᵀ · x over a group's rows.
    fn gradient(
        &self,
        dy: &Tensor,
        x: &Tensor,
        rows: &Range<usize>,
        index: usize,
        out: Range<usize>,
        to: Address,
        beta: f32,
    ) {
        let first = (index * self.outputs + out.start) * self.dtype.size();
        let a = Operand { at: dy.row(rows.start).offset(first), stride: dy.cols(), transposed: true };
        let b = Operand { at: x.row(rows.start), stride: self.inputs, transposed: false };
        self.gemm([out.len(), self.inputs, rows.len()], [a, b], (to, self.inputs, Dtype::F32), beta);
    }
}

/// A kernel whose blocks make square tiles.
struct Tiled {
    kernel: Kernel,
    side: usize,
    shared: usize,
}

impl Tiled {
    fn grid(&self, blocks: usize) -> Grid {
        Grid::row(blocks, 256).shared(self.shared)
    }

    /// At least the row tiles that all groups can have together: each may end with a part of one.
    fn row_tiles(&self, dispatch: &Dispatch) -> usize {
        dispatch.rows / self.side + dispatch.num_experts.min(dispatch.rows)
    }

    /// Tiles of one weight.
    fn weight_tiles(&self, call: &Call<'_>) -> usize {
        call.outputs.div_ceil(self.side) * call.inputs.div_ceil(self.side)
    }
}

/// y = x · wᵀ for each group; the outputs of stacked weights lie side by side.
pub fn forward(cuda: &Cuda, x: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
    let call = Call::new(cuda, w, dispatch);
    call.expect("x of grouped products", x, call.inputs);
    let width = call.stack * call.outputs;
    let y = cuda.tensor(x.rows(), width, call.dtype);
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
    let tiled = call.tiled(&LINEAR);
    let blocks = tiled.row_tiles(dispatch) * call.stack * call.outputs.div_ceil(tiled.side);
    launch_over_rows(&call, &tiled, blocks, &y, x);
    y
}

/// dx = dy · w for each group, summed over its stacked weights.
pub fn backward_input(cuda: &Cuda, dy: &Tensor, w: &Stacks<'_, Weight>, dispatch: &Dispatch) -> Tensor {
    let call = Call::new(cuda, w, dispatch);
    let width = call.stack * call.outputs;
    call.expect("dy of grouped products", dy, width);
    let dx = cuda.tensor(dy.rows(), call.inputs, call.dtype);
    if call.is_empty() {
        cuda.zero(dx.address(), dx.len() * call.dtype.size());
        return dx;
    }
    if call.form == Form::EachGroup {
        // The sum over a stack is rounded once: in F32 first where there are several.
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
            super::elements::cast(cuda, sums.address(), Dtype::F32, dx.address(), call.dtype, dx.len());
        }
        return dx;
    }
    let tiled = call.tiled(&BACKWARD_INPUT);
    let blocks = tiled.row_tiles(dispatch) * call.inputs.div_ceil(tiled.side);
    launch_over_rows(&call, &tiled, blocks, &dx, dy);
    dx
}

fn launch_over_rows(call: &Call<'_>, tiled: &Tiled, blocks: usize, to: &Tensor, from: &Tensor) {
    let pointers = call.pointers();
    let args = [
        to.address().into(),
        from.address().into(),
        pointers.address().into(),
        call.dispatch.offsets.address().into(),
        call.dispatch.num_experts.into(),
        call.stack.into(),
        call.inputs.into(),
        call.outputs.into(),
    ];
    call.cuda.launch(&tiled.kernel, tiled.grid(blocks), &args);
}

/// For each group what `plan[group]` says.
#[allow(clippy::too_many_arguments)]
pub fn backward_weight(
    cuda: &Cuda,
    dy: &Tensor,
    x: &Tensor,
    w: &Stacks<'_, Weight>,
    dispatch: &Dispatch,
    plan: &[ExpertGrad],
    dw: &mut Buffer,
    scores: &mut Scores,
) {
    let call = Call::new(cuda, w, dispatch);
    call.expect("dy of grouped products", dy, call.stack * call.outputs);
    call.expect("x of grouped products", x, call.inputs);
    assert!(plan.len() == dispatch.num_experts, "a plan for {} groups, rows of {}", plan.len(), dispatch.num_experts);
    let (adds, sums) = (adds(&call, plan, dw), sums(plan, scores));
    if call.is_empty() {
        return;
    }
    if !adds.is_empty() {
        accumulate(&call, dy, x, &adds, dw);
    }
    if !sums.is_empty() {
        score(&call, dy, x, &sums, scores);
    }
}

/// A group, and where the gradients of its weights begin.
struct Add<'a> {
    group: usize,
    at: &'a [usize],
}

/// A group, its moment and the index of its score.
struct Sum {
    group: usize,
    moment: Moment,
    index: usize,
}

fn adds<'p>(call: &Call<'_>, plan: &'p [ExpertGrad], dw: &Buffer) -> Vec<Add<'p>> {
    let mut claimed = Vec::new();
    let mut adds = Vec::new();
    for (group, grad) in plan.iter().enumerate() {
        if let ExpertGrad::Accumulate(at) = grad {
            assert!(at.len() == call.stack, "{} offsets for {} stacked matrices", at.len(), call.stack);
            for &at in at {
                dw.at(at, call.outputs * call.inputs);
                claimed.push(at);
            }
            adds.push(Add { group, at });
        }
    }
    claimed.sort_unstable();
    let apart = claimed.windows(2).all(|w| w[0] + call.outputs * call.inputs <= w[1]);
    assert!(apart, "two gradients share a place in the buffer");
    adds
}

fn sums(plan: &[ExpertGrad], scores: &Scores) -> Vec<Sum> {
    let mut sums: Vec<Sum> = Vec::new();
    for (group, grad) in plan.iter().enumerate() {
        if let &ExpertGrad::Score(moment, index) = grad {
            assert!(index < scores.len, "score {index} of {}", scores.len);
            sums.push(Sum { group, moment, index });
        }
    }
    let mut indices: Vec<usize> = sums.iter().map(|s| s.index).collect();
    indices.sort_unstable();
    assert!(indices.windows(2).all(|w| w[0] < w[1]), "two groups share a score");
    sums
}

fn accumulate(call: &Call<'_>, dy: &Tensor, x: &Tensor, adds: &[Add<'_>], dw: &Buffer) {
    if call.form == Form::EachGroup {
        let rows = group_rows(call.cuda, call.dispatch);
        for add in adds.iter().filter(|add| !rows[add.group].is_empty()) {
            for (index, &at) in add.at.iter().enumerate() {
                let to = dw.at(at, call.outputs * call.inputs);
                call.gradient(dy, x, &rows[add.group], index, 0..call.outputs, to, 1.0);
            }
        }
        return;
    }
    let tiled = call.tiled(&BACKWARD_WEIGHT);
    let jobs = adds.iter().flat_map(|add| std::iter::once(add.group).chain(add.at.iter().copied()));
    let jobs = call.cuda.table(jobs.map(|n| n as u64).collect());
    let args = [
        dw.at(0, 0).into(),
        dy.address().into(),
        x.address().into(),
        call.dispatch.offsets.address().into(),
        jobs.address().into(),
        call.stack.into(),
        call.inputs.into(),
        call.outputs.into(),
    ];
    call.cuda.launch(&tiled.kernel, tiled.grid(adds.len() * call.stack * tiled.weight_tiles(call)), &args);
}

fn score(call: &Call<'_>, dy: &Tensor, x: &Tensor, sums: &[Sum], scores: &Scores) {
    let cuda = call.cuda;
    let jobs = sums.iter().flat_map(|s| [s.group as u64, moment_code(s.moment), s.index as u64]).collect();
    let jobs = cuda.table(jobs);
    let add = |partial: Address, each: usize, first: usize, jobs_of: usize| {
        let jobs = jobs.address().offset(first * 3 * 8);
        let args = [scores.address().into(), partial.into(), jobs.into(), each.into()];
        cuda.launch(&ADD_MAGNITUDES, Grid::row(jobs_of, 256), &args);
    };
    if call.form == Form::EachGroup {
        let rows = group_rows(cuda, call.dispatch);
        for (i, sum) in sums.iter().enumerate().filter(|(_, s)| !rows[s.group].is_empty()) {
            let partial = magnitudes_by_scratch(call, dy, x, sum, &rows[sum.group]);
            add(partial.0.address(), partial.1, i, 1);
        }
        return;
    }
    let tiled = call.tiled(&MAGNITUDE);
    let each = call.stack * tiled.weight_tiles(call);
    let partial = cuda.scratch(8 * sums.len() * each);
    let pointers = call.pointers();
    let args = [
        partial.address().into(),
        dy.address().into(),
        x.address().into(),
        pointers.address().into(),
        call.dispatch.offsets.address().into(),
        jobs.address().into(),
        call.stack.into(),
        call.inputs.into(),
        call.outputs.into(),
    ];
    cuda.launch(&tiled.kernel, tiled.grid(sums.len() * each), &args);
    add(partial.address(), each, 0, sums.len());
}

/// Makes a group's gradients slab by slab in scratch; the partial sums of their moment, and how many.
fn magnitudes_by_scratch(call: &Call<'_>, dy: &Tensor, x: &Tensor, sum: &Sum, rows: &Range<usize>) -> (Memory, usize) {
    let cuda = call.cuda;
    let height = (SCRATCH / (4 * call.inputs)).clamp(1, call.outputs);
    let slab = cuda.scratch(4 * height * call.inputs);
    let blocks = |height: usize| (height * call.inputs).div_ceil(MAGNITUDE_SPAN);
    let slabs: Vec<Range<usize>> =
        (0..call.outputs).step_by(height).map(|at| at..call.outputs.min(at + height)).collect();
    let count = call.stack * slabs.iter().map(|s| blocks(s.len())).sum::<usize>();
    let partial = cuda.scratch(8 * count);
    let mut done = 0;
    for index in 0..call.stack {
        for out in &slabs {
            call.gradient(dy, x, rows, index, out.clone(), slab.address(), 0.0);
            let w = call.weight(sum.group, index).offset(out.start * call.inputs * call.dtype.size());
            let args = [
                partial.address().offset(8 * done).into(),
                slab.address().into(),
                w.into(),
                (out.len() * call.inputs).into(),
                moment_code(sum.moment).into(),
            ];
            cuda.launch(MAGNITUDE_OF.of(call.dtype), Grid::row(blocks(out.len()), 256), &args);
            done += blocks(out.len());
        }
    }
    (partial, count)
}

/// As gradient_magnitude.cu numbers them.
fn moment_code(moment: Moment) -> u64 {
    match moment {
        Moment::Abs => 0,
        Moment::Square => 1,
        Moment::AbsTimesWeight => 2,
    }
}
