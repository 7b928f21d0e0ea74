//! Grouped products of bf16 values, by `product/`: the counterparts of the f32 ones in `grouped.rs`.
//!
//! Activations in f32 are rounded to bf16 as they are packed; those in bf16, and 16-bit weights, are packed as they are stored, but for
//! weights that are multiplied as they lie ([`Products::takes_stored`]). Sums are in f32. One list of tasks covers all experts. Where
//! sums are spread over tasks, those of a score, the list depends on shapes and on the sizes of the caches, not on the number of
//! threads.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::element::{Element, by_element};
use super::groups::{RowGroup, Sink, WeightGrad};
use super::parallel::SharedSlice;
use super::product::{Part, Products, Side, Tile};
use super::simd::{simd, sum, sum2};
use super::tensor::Tensor;
use super::weight::Weight;
use crate::backend::{Dtype, GradReduction};

/// Enough tasks to keep some tens of cores busy.
const TASKS: usize = 32;
/// Rows and columns of a product that are split among tasks come in multiples of this.
const STEP: usize = 64;

/// In how many parts each of so many tasks is split, to reach [`TASKS`].
fn parts(tasks: usize) -> usize {
    TASKS.div_ceil(tasks.max(1))
}

/// Part `i` of `parts` of `0..n`; the last ones may be empty.
fn part_of(n: usize, i: usize, parts: usize) -> Range<usize> {
    let step = n.div_ceil(parts).next_multiple_of(STEP);
    let at = |i: usize| (i * step).min(n);
    at(i)..at(i + 1)
}

/// A part of a group's product: some of its rows and columns.
struct Task<'g, 'w> {
    group: &'g RowGroup<'w>,
    rows: Range<usize>,
    columns: Range<usize>,
}

/// The tasks of a product of `width` columns. Each packs its rows of activations once, and, if they must be packed, the weights of its
/// columns. What is too little for all threads is split: tall groups between their rows, flat ones between their columns. An element's
/// sum does not depend on the task that computes it.
fn tasks<'g, 'w>(groups: &'g [RowGroup<'w>], width: usize) -> Vec<Task<'g, 'w>> {
    /// Rows that are worth reading, or packing, the weights once more.
    const TALL: usize = 4 * STEP;
    /// Rows whose packed values a thread keeps.
    const MOST: usize = 16 * STEP;
    let groups: Vec<_> = groups.iter().filter(|group| !group.rows.is_empty()).collect();
    let parts = (4 * rayon::current_num_threads()).div_ceil(groups.len().max(1));
    let split = |group: &'g RowGroup<'w>| {
        let rows = group.rows.len();
        let by_rows = parts.min(rows.div_ceil(TALL)).max(rows.div_ceil(MOST));
        let by_columns = parts.div_ceil(by_rows);
        (0..by_rows).flat_map(move |r| {
            let part = part_of(rows, r, by_rows);
            let rows = group.rows.start + part.start..group.rows.start + part.end;
            (0..by_columns).map(move |c| Task { group, rows: rows.clone(), columns: part_of(width, c, by_columns) })
        })
    };
    groups.into_iter().flat_map(split).filter(|task| !task.rows.is_empty() && !task.columns.is_empty()).collect()
}

/// Rows of activations.
fn activations(x: &Tensor) -> Part<'_> {
    let stored = match x.dtype() {
        Dtype::F32 => Part::activations(x.stored(), x.cols()),
        dtype => Part::stored(dtype, bytemuck::cast_slice(x.stored::<bf16>()), x.cols()),
    };
    stored.indexed(x.index())
}

fn part(w: &Weight) -> Part<'_> {
    Part::stored(w.dtype(), w.bytes(), w.cols())
}

/// The part of `columns` that lies in `of`, counted from its start; where none does, an empty range within it.
fn intersect(columns: &Range<usize>, of: Range<usize>) -> Range<usize> {
    let end = columns.end.min(of.end).saturating_sub(of.start);
    columns.start.saturating_sub(of.start).min(end)..end
}

/// y = x · wᵀ for each group, in the element type of y. The outputs of stacked weights are concatenated.
pub(super) fn forward(products: &Products, x: &Tensor, groups: &[RowGroup<'_>], y: &mut Tensor) {
    by_element!(y.dtype(), forward_as(products, x, groups, y));
}

fn forward_as<E: Element>(products: &Products, x: &Tensor, groups: &[RowGroup<'_>], y: &mut Tensor) {
    let (k, width) = (x.cols(), y.cols());
    let out = SharedSlice::new(y.stored_mut::<E>());
    tasks(groups, width).into_par_iter().with_max_len(1).for_each(|Task { group, rows, columns }| {
        let x = products.block(Side::A, &[activations(x).by_rows(k)], rows.clone());
        let mut first = 0;
        for weight in group.stack {
            assert!(weight.cols() == k, "x has {k} columns, its weight [{}, {}]", weight.rows(), weight.cols());
            let columns = intersect(&columns, first..first + weight.rows());
            let store = |outputs: &Range<usize>, tile: &Tile<'_>| {
                // SAFETY: tasks have different rows or columns.
                unsafe { tile.copy_to_shared(&out, rows.start * width + first + outputs.start, width) };
            };
            if products.takes_stored(weight.dtype()) {
                let bytes = &weight.bytes()[2 * k * columns.start..2 * k * columns.end];
                products.multiply_stored(&x, bytes, k, |tile| store(&columns, tile));
            } else {
                for outputs in products.blocks(Side::B, k, columns) {
                    let block = products.block(Side::B, &[part(weight).by_rows(k)], outputs.clone());
                    products.multiply(&x, &block, |tile| store(&outputs, tile));
                }
            }
            first += weight.rows();
        }
        assert!(first == width, "stacked weights have {first} rows, y {width} columns");
    });
}

/// dx = dy · w for each group, summed over its stacked weights, in the element type of dx.
pub(super) fn backward_input(products: &Products, dy: &Tensor, groups: &[RowGroup<'_>], dx: &mut Tensor) {
    by_element!(dx.dtype(), backward_input_as(products, dy, groups, dx));
}

fn backward_input_as<E: Element>(products: &Products, dy: &Tensor, groups: &[RowGroup<'_>], dx: &mut Tensor) {
    let (n, k) = (dy.cols(), dx.cols());
    let out = SharedSlice::new(dx.stored_mut::<E>());
    tasks(groups, k).into_par_iter().with_max_len(1).for_each(|Task { group, rows, columns }| {
        let (mut dy_parts, mut w_parts, mut first) = (Vec::new(), Vec::new(), 0);
        for weight in group.stack {
            dy_parts.push(activations(dy).skip_columns(first).by_rows(weight.rows()));
            w_parts.push(part(weight).by_columns(weight.rows()));
            first += weight.rows();
        }
        assert!(first == n, "dy has {n} columns, its stacked weights {first} rows");
        let dy = products.block(Side::A, &dy_parts, rows.clone());
        for columns in products.blocks(Side::B, n, columns) {
            let block = products.block(Side::B, &w_parts, columns.clone());
            products.multiply(&dy, &block, |tile| {
                // SAFETY: tasks have different rows or columns.
                unsafe { tile.copy_to_shared(&out, rows.start * k + columns.start, k) };
            });
        }
    });
}

/// The jobs of one group of rows, the columns of x they take, and which part of their outputs.
struct GradTask<'a> {
    jobs: &'a [WeightGrad<'a>],
    columns: Range<usize>,
    /// Part `part.0` of `part.1`.
    part: (usize, usize),
}

impl GradTask<'_> {
    /// This task's outputs of a job, counted from the job's first one.
    fn outputs(&self, job: &WeightGrad<'_>) -> Range<usize> {
        part_of(job.out.len(), self.part.0, self.part.1)
    }
}

/// Computes each job's gradient into its sink. [`Sink::Add`] ranges must not overlap. The jobs of a group of rows are
/// consecutive. A scored gradient is reduced tile by tile; the sums of tiles are added in a fixed order.
pub(super) fn backward_weight(
    products: &Products,
    dy: &Tensor,
    x: &Tensor,
    jobs: &[WeightGrad<'_>],
    dw: &mut [f32],
    scores: &mut [f64],
) {
    let k = x.cols();
    let mut tasks: Vec<GradTask<'_>> = Vec::new();
    for jobs in jobs.chunk_by(|a, b| a.rows == b.rows).filter(|jobs| !jobs[0].rows.is_empty()) {
        let blocks = products.blocks(Side::B, jobs[0].rows.len(), 0..k);
        tasks.extend(blocks.map(|columns| GradTask { jobs, columns, part: (0, 1) }));
    }
    let parts = parts(tasks.len());
    let tasks: Vec<GradTask<'_>> = tasks
        .iter()
        .flat_map(|t| (0..parts).map(|i| GradTask { columns: t.columns.clone(), part: (i, parts), ..*t }))
        .filter(|t| t.jobs.iter().any(|job| !t.outputs(job).is_empty()))
        .collect();
    let dw = SharedSlice::new(dw);
    let sums: Vec<Vec<f64>> = tasks
        .par_iter()
        .with_max_len(1)
        .map(|task| {
            let rows = &task.jobs[0].rows;
            let x = activations(x).skip_rows(rows.start).by_columns(rows.len());
            let dy = activations(dy).skip_rows(rows.start).by_columns(rows.len());
            let block = products.block(Side::B, &[x], task.columns.clone());
            let one = |job: &WeightGrad<'_>| {
                let outputs = task.outputs(job);
                let lines = job.out.start + outputs.start..job.out.start + outputs.end;
                let mut total = 0.0;
                products.stream(&block, &[dy], lines, |tile| match job.sink {
                    Sink::Add(at) => {
                        let at = at + outputs.start * k + task.columns.start;
                        // SAFETY: tasks have different outputs or columns, and jobs do not overlap.
                        unsafe { tile.add_to_shared(&dw, at, k) };
                    }
                    Sink::Score(reduction, _, weight) => {
                        total += reduce(tile, reduction, weight, outputs.start * k + task.columns.start);
                    }
                });
                total
            };
            task.jobs.iter().map(one).collect()
        })
        .collect();
    for (task, sums) in tasks.iter().zip(sums) {
        for (job, sum) in task.jobs.iter().zip(sums) {
            if let Sink::Score(_, index, _) = job.sink {
                scores[index] += sum;
            }
        }
    }
}

/// The reduction of a tile of a gradient. The weight's element of the tile's first lines is at `at`.
fn reduce(tile: &Tile<'_>, reduction: GradReduction, weight: &Weight, at: usize) -> f64 {
    match reduction {
        GradReduction::Abs => simd!(sum(tile.padded(), f32::abs)),
        GradReduction::Square => simd!(sum(tile.padded(), |g| g * g)),
        GradReduction::AbsTimesWeight => {
            let (mut total, mut w) = (0.0, vec![0.0; tile.b.len()]);
            for (i, row) in tile.a.clone().enumerate() {
                weight.read_into(at + row * weight.cols() + tile.b.start, &mut w);
                total += simd!(sum2(tile.row(i), &w, |g, w| (g * w).abs()));
            }
            total
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_of_a_stacked_weight_are_within_it() {
        for (columns, of, within) in
            [(0..8, 2..5, 0..3), (3..4, 2..5, 1..2), (6..8, 2..5, 3..3), (0..2, 2..5, 0..0), (4..9, 2..5, 2..3)]
        {
            assert_eq!(intersect(&columns, of.clone()), within, "{columns:?} of {of:?}");
        }
    }
}
