//! What a grouped product multiplies: rows and stacked weights of each expert, and where weight gradients go.

use std::ops::Range;

use super::weight::Weight;
use crate::backend::{ExpertGrad, GradReduction};

/// Consecutive rows that are multiplied by the same stacked weights.
pub(super) struct RowGroup<'a> {
    pub(super) rows: Range<usize>,
    pub(super) stack: &'a [&'a Weight],
}

/// The destination of one stacked matrix's gradient.
pub(super) enum Sink<'a> {
    /// Accumulated in the gradient buffer at this element offset.
    Add(usize),
    /// Reduced to one number, which is added to the score at this index. [`GradReduction::AbsTimesWeight`] needs the weight
    /// itself.
    Score(GradReduction, usize, &'a Weight),
}

/// A weight gradient to compute, dyᵀ · x: from rows `rows` of dy and x, and columns `out` of dy.
pub(super) struct WeightGrad<'a> {
    pub(super) rows: Range<usize>,
    pub(super) out: Range<usize>,
    pub(super) sink: Sink<'a>,
}

/// The weight gradients of all experts, as `plan` says.
pub(super) fn weight_grad_jobs<'a>(
    offsets: &[usize],
    stacks: &'a [Vec<&'a Weight>],
    plan: &[ExpertGrad],
) -> Vec<WeightGrad<'a>> {
    assert!(plan.len() == stacks.len(), "a plan for {} experts, weights of {}", plan.len(), stacks.len());
    let mut jobs = Vec::new();
    for (expert, (stack, grad)) in stacks.iter().zip(plan).enumerate() {
        let mut first = 0;
        for (i, weight) in stack.iter().enumerate() {
            let sink = match grad {
                ExpertGrad::Skip => None,
                ExpertGrad::Score(reduction, index) => Some(Sink::Score(*reduction, *index, weight)),
                ExpertGrad::Accumulate(at) => {
                    assert!(at.len() == stack.len(), "{} offsets for {} stacked matrices", at.len(), stack.len());
                    Some(Sink::Add(at[i]))
                }
            };
            let out = first..first + weight.rows();
            first = out.end;
            jobs.extend(sink.map(|sink| WeightGrad { rows: offsets[expert]..offsets[expert + 1], out, sink }));
        }
    }
    jobs
}
