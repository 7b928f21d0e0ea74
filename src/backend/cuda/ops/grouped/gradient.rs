//! Gradients of the groups' weights: added to the gradient buffer, or reduced to one number per group.

use std::ops::Range;
use std::sync::Arc;

use super::{Call, group_rows};
use crate::backend::cuda::gpu::{Address, Grid, Operand};
use crate::backend::cuda::launch::In;
use crate::backend::cuda::plan::{Form, Operation};
use crate::backend::cuda::tensor::Array;
use crate::backend::cuda::{Buffer, Cuda, Dispatch, Scores, Tensor, Weight, kernels};
use crate::backend::{Dtype, ExpertGrad, GradReduction, Stacks};

/// Elements per block of `magnitude_of`.
const MAGNITUDE_SPAN: usize = 4096;
/// Bytes of a slab of a gradient in scratch memory: it stays in the L2 cache with its operands.
const SCRATCH: usize = 16 << 20;

/// Skips, accumulates or scores the gradient of each group's weights, as `plan[group]` says.
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
    let adds = plan.iter().any(|grad| matches!(grad, ExpertGrad::Accumulate(_)));
    let operation = if adds { Operation::Gradients } else { Operation::Scores };
    let call = Call::new(cuda, operation, w, dispatch);
    call.expect("dy of grouped products", dy, call.stack * call.outputs);
    call.expect("x of grouped products", x, call.inputs);
    assert!(plan.len() == dispatch.num_experts, "a plan for {} groups, rows of {}", plan.len(), dispatch.num_experts);
    let gradients = Gradients { call, dy, x };
    let (adds, sums) = (gradients.adds(plan, dw), sums(plan, scores));
    if gradients.call.is_empty() {
        return;
    }
    match gradients.call.form {
        Form::EachGroup => {
            let rows = group_rows(cuda, dispatch);
            gradients.add_each(&adds, &rows, dw);
            gradients.score_each(&sums, &rows, scores);
        }
        Form::TensorCores | Form::Warpgroups | Form::WideWarpgroups | Form::Arithmetic => {
            gradients.add(&adds, dw);
            gradients.score(&sums, scores);
        }
    }
}

/// A group, and the offsets of its weights' gradients in the buffer.
struct Add<'a> {
    group: usize,
    at: &'a [usize],
}

/// An expert's group, the reduction of its gradient, and the index of its score.
struct Sum {
    group: usize,
    reduction: GradReduction,
    index: usize,
}

fn sums(plan: &[ExpertGrad], scores: &Scores) -> Vec<Sum> {
    let mut sums = Vec::new();
    for (group, grad) in plan.iter().enumerate() {
        if let &ExpertGrad::Score(reduction, index) = grad {
            assert!(index < scores.0.len(), "score {index} of {}", scores.0.len());
            sums.push(Sum { group, reduction, index });
        }
    }
    let mut indices: Vec<usize> = sums.iter().map(|s| s.index).collect();
    indices.sort_unstable();
    assert!(indices.windows(2).all(|w| w[0] < w[1]), "two groups share a score");
    sums
}

/// dyᵀ · x of each group.
struct Gradients<'a> {
    call: Call<'a>,
    dy: &'a Tensor,
    x: &'a Tensor,
}

impl Gradients<'_> {
    /// Elements of the gradient of one weight.
    fn size(&self) -> usize {
        self.call.outputs * self.call.inputs
    }

    fn adds<'p>(&self, plan: &'p [ExpertGrad], dw: &Buffer) -> Vec<Add<'p>> {
        let (mut adds, mut starts) = (Vec::new(), Vec::new());
        for (group, grad) in plan.iter().enumerate() {
            if let ExpertGrad::Accumulate(at) = grad {
                assert!(at.len() == self.call.stack, "{} offsets for {} stacked matrices", at.len(), self.call.stack);
                for &at in at {
                    dw.expect(at, self.size());
                    starts.push(at);
                }
                adds.push(Add { group, at });
            }
        }
        starts.sort_unstable();
        let apart = starts.windows(2).all(|w| w[0] + self.size() <= w[1]);
        assert!(apart, "two gradients overlap in the buffer");
        adds
    }

    /// Adds the gradients, or stores those whose place in the buffer was never written.
    fn add(&self, adds: &[Add<'_>], dw: &mut Buffer) {
        let first = |add: &&Add<'_>| add.at.iter().all(|&at| dw.is_unwritten(at, self.size()));
        let (stores, adds): (Vec<_>, Vec<_>) = adds.iter().partition(first);
        for (jobs, overwrite) in [(stores, true), (adds, false)] {
            for &at in jobs.iter().flat_map(|add| add.at) {
                if overwrite {
                    dw.overwritten(at, self.size())
                } else {
                    dw.at(at, self.size())
                };
            }
            self.launch(&jobs, overwrite, dw);
        }
    }

    fn launch(&self, adds: &[&Add<'_>], overwrite: bool, dw: &mut Buffer) {
        if adds.is_empty() {
            return;
        }
        let call = &self.call;
        let tiling = call.tiling();
        let jobs = adds.iter().flat_map(|add| std::iter::once(add.group).chain(add.at.iter().copied()));
        let jobs = call.cuda.table(jobs.map(|n| n as u64).collect());
        kernels::grouped_backward_weight(
            call.cuda,
            call.form,
            tiling.grid(adds.len() * call.stack * tiling.weight_tiles(call)),
            dw.ranges(),
            self.dy.input(),
            self.x.input(),
            call.dispatch.offsets.input(),
            jobs.input(),
            call.stack,
            call.inputs,
            call.outputs,
            overwrite,
        );
    }

    fn add_each(&self, adds: &[Add<'_>], rows: &[Range<usize>], dw: &mut Buffer) {
        for add in adds.iter().filter(|add| !rows[add.group].is_empty()) {
            for (index, &at) in add.at.iter().enumerate() {
                let (to, beta) = dw.sum(at, self.size());
                self.product(&rows[add.group], index, 0..self.call.outputs, to, beta);
            }
        }
    }

    /// One kernel for all gradients: each tile stores one partial sum.
    fn score(&self, sums: &[Sum], scores: &mut Scores) {
        if sums.is_empty() {
            return;
        }
        let call = &self.call;
        let tiling = call.tiling();
        let each = call.stack * tiling.weight_tiles(call);
        let mut partial = call.cuda.array::<f64>(sums.len() * each);
        let (pointers, jobs) = (call.pointers(), self.jobs(sums));
        kernels::gradient_magnitude(
            call.cuda,
            call.form,
            tiling.grid(sums.len() * each),
            partial.output(),
            self.dy.input(),
            self.x.input(),
            pointers.input().addresses(call.dtype),
            call.dispatch.offsets.input(),
            jobs.input(),
            call.stack,
            call.inputs,
            call.outputs,
        );
        self.add_partials(scores, &partial, jobs.input(), each, sums.len());
    }

    /// One gradient after another, slab by slab in scratch memory.
    fn score_each(&self, sums: &[Sum], rows: &[Range<usize>], scores: &mut Scores) {
        if sums.is_empty() {
            return;
        }
        let call = &self.call;
        let jobs = self.jobs(sums);
        let height = slab_rows(call.inputs, call.outputs);
        let slab = call.cuda.array::<f32>(height * call.inputs);
        let slabs: Vec<Range<usize>> =
            (0..call.outputs).step_by(height).map(|at| at..call.outputs.min(at + height)).collect();
        let blocks = |slab: &Range<usize>| (slab.len() * call.inputs).div_ceil(MAGNITUDE_SPAN);
        let each = call.stack * slabs.iter().map(blocks).sum::<usize>();
        let mut partial = call.cuda.array::<f64>(each);
        for (i, sum) in sums.iter().enumerate().filter(|(_, sum)| !rows[sum.group].is_empty()) {
            let mut at = 0;
            for index in 0..call.stack {
                for out in &slabs {
                    self.product(&rows[sum.group], index, out.clone(), slab.address(), 0.0);
                    let w = call.weights[sum.group * call.stack + index].input().skip(out.start * call.inputs);
                    let (grid, sums) = (Grid::row(blocks(out), 256), partial.output().skip(at));
                    let (n, reduction) = (out.len() * call.inputs, code(sum.reduction));
                    kernels::magnitude_of(call.cuda, grid, sums, slab.input(), w, n, reduction);
                    at += blocks(out);
                }
            }
            self.add_partials(scores, &partial, jobs.input().skip(3 * i), each, 1);
        }
    }

    /// The job list in the layout of gradient_magnitude.cu.
    fn jobs(&self, sums: &[Sum]) -> Arc<Array<u64>> {
        self.call.cuda.table(sums.iter().flat_map(|s| [s.group as u64, code(s.reduction), s.index as u64]).collect())
    }

    /// Adds the `each` partial sums of each of `n` jobs to the job's score.
    fn add_partials(&self, scores: &mut Scores, partial: &Array<f64>, jobs: In<'_, u64>, each: usize, n: usize) {
        kernels::add_magnitudes(self.call.cuda, Grid::row(n, 256), scores.0.inout(), partial.input(), jobs, each);
    }

    /// to = rows `out` of one gradient + beta · to.
    fn product(&self, rows: &Range<usize>, index: usize, out: Range<usize>, to: Address, beta: f32) {
        let call = &self.call;
        let first = (index * call.outputs + out.start) * call.dtype.size();
        let a = Operand { at: self.dy.row(rows.start).offset(first), stride: self.dy.cols(), transposed: true };
        let b = Operand { at: self.x.row(rows.start), stride: call.inputs, transposed: false };
        call.gemm([out.len(), call.inputs, rows.len()], [a, b], (to, call.inputs, Dtype::F32), beta);
    }
}

/// Rows of a slab of a gradient: within the scratch, and in whole tiles of cuBLAS where one fits, because a product
/// computes whole tiles in any case.
fn slab_rows(inputs: usize, outputs: usize) -> usize {
    const TILE: usize = 256;
    let fit = (SCRATCH / (4 * inputs)).max(1);
    let whole = if fit > TILE { fit / TILE * TILE } else { fit };
    whole.min(outputs)
}

/// The code of a reduction in gradient_magnitude.cu.
fn code(reduction: GradReduction) -> u64 {
    match reduction {
        GradReduction::Abs => 0,
        GradReduction::Square => 1,
        GradReduction::AbsTimesWeight => 2,
    }
}

#[cfg(test)]
mod tests {
    use super::slab_rows;

    #[test]
    fn a_slab_is_whole_tiles_within_the_scratch() {
        // Mixtral-8x7B's gate and up projections, and its down projection, of which 292 rows would fit.
        assert_eq!((slab_rows(4096, 14336), slab_rows(14336, 4096)), (1024, 256));
        assert_eq!(slab_rows(2048, 768), 768, "no more than the gradient has");
        assert_eq!((slab_rows(1 << 20, 64), slab_rows(1 << 23, 64)), (4, 1), "wide rows");
    }
}
