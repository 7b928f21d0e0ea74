//! Grouped products of bf16 values, by `product/`: the counterparts of the f32 ones in `grouped.rs`.
//!
//! Activations are rounded to bf16 as they are packed; 16-bit weights are packed as they are stored. Sums are in f32. One
//! list of tasks covers all experts; it depends on shapes and on the sizes of the caches, not on the number of threads.

use std::ops::Range;

use rayon::prelude::*;

use super::groups::{RowGroup, Sink, WeightGrad};
use super::parallel::SharedSlice;
use super::product::{Part, Products, Side, Tile};
use super::simd::{simd, sum, sum2};
use super::tensor::Tensor;
use super::weight::Weight;
use crate::backend::GradReduction;

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

/// A part of a group's product.
struct Task<'g, 'w> {
    group: &'g RowGroup<'w>,
    rows: Range<usize>,
    /// Which of the pieces that the columns consist of, and its first column.
    piece: (usize, usize),
    /// Columns, counted from the piece's first one.
    columns: Range<usize>,
}

/// The tasks of a product of this depth, whose columns consist of pieces of these widths. They are split into blocks of weights
/// that fit into the L2 cache. What is too little for all cores is split further: tall groups between their rows, so that
/// weights are packed once more; flat ones between their columns.
fn tasks<'g, 'w>(
    products: &Products,
    groups: &'g [RowGroup<'w>],
    depth: usize,
    widths: impl Fn(&RowGroup<'w>) -> Vec<usize>,
) -> Vec<Task<'g, 'w>> {
    /// Rows that are worth packing the weights once more.
    const TALL: usize = 4 * STEP;
    let mut tasks = Vec::new();
    for group in groups.iter().filter(|group| !group.rows.is_empty()) {
        let mut first = 0;
        for (i, width) in widths(group).into_iter().enumerate() {
            let blocks = products.blocks(Side::B, depth, 0..width);
            tasks.extend(blocks.map(|columns| Task { group, rows: group.rows.clone(), piece: (i, first), columns }));
            first += width;
        }
    }
    let parts = parts(tasks.len());
    let split = |Task { group, rows, piece, columns }: Task<'g, 'w>| {
        let by_rows = parts.min(rows.len().div_ceil(TALL));
        let by_columns = parts.div_ceil(by_rows);
        let within = |range: &Range<usize>, i, parts| {
            let part = part_of(range.len(), i, parts);
            range.start + part.start..range.start + part.end
        };
        (0..by_columns).flat_map(move |c| {
            let (rows, columns) = (rows.clone(), within(&columns, c, by_columns));
            (0..by_rows).map(move |r| Task { group, rows: within(&rows, r, by_rows), piece, columns: columns.clone() })
        })
    };
    tasks.into_iter().flat_map(split).filter(|task| !task.rows.is_empty() && !task.columns.is_empty()).collect()
}

fn part(w: &Weight) -> Part<'_> {
    Part::weight(w.dtype(), w.bytes(), w.cols())
}

/// Copies a tile to the rows and columns of a row-major matrix of `width` columns, whose element of the tile's first lines is
/// at `at`.
///
/// # Safety
/// Nothing else accesses these elements.
unsafe fn store(tile: &Tile<'_>, to: &SharedSlice<'_, f32>, at: usize, width: usize) {
    simd!({
        for (i, row) in tile.a.clone().enumerate() {
            // SAFETY: by the caller's guarantee.
            tile.copy_row(i, unsafe { to.slice(at + row * width + tile.b.start, tile.b.len()) });
        }
    });
}

/// y = x · wᵀ for each group. The outputs of stacked weights are concatenated.
pub(super) fn forward(products: &Products, x: &Tensor, groups: &[RowGroup<'_>], y: &mut Tensor) {
    let (k, width) = (x.cols(), y.cols());
    for group in groups {
        let rows: usize = group.stack.iter().map(|weight| weight.rows()).sum();
        assert!(rows == width, "stacked weights have {rows} rows, y {width} columns");
    }
    let tasks = tasks(products, groups, k, |group| group.stack.iter().map(|weight| weight.rows()).collect());
    let out = SharedSlice::new(y.values_mut());
    tasks.into_par_iter().with_max_len(1).for_each(|Task { group, rows, piece: (i, first), columns }| {
        let weight = group.stack[i];
        assert!(weight.cols() == k, "x has {k} columns, its weight [{}, {}]", weight.rows(), weight.cols());
        let block = products.block(Side::B, &[part(weight).by_rows(k)], columns.clone());
        products.stream(&block, &[Part::activations(x.values(), k).by_rows(k)], rows.clone(), |tile| {
            // SAFETY: tasks have different rows or columns.
            unsafe { store(tile, &out, rows.start * width + first + columns.start, width) };
        });
    });
}

/// dx = dy · w for each group, summed over its stacked weights.
pub(super) fn backward_input(products: &Products, dy: &Tensor, groups: &[RowGroup<'_>], dx: &mut Tensor) {
    let (n, k) = (dy.cols(), dx.cols());
    let tasks = tasks(products, groups, n, |_| vec![k]);
    let out = SharedSlice::new(dx.values_mut());
    tasks.into_par_iter().with_max_len(1).for_each(|Task { group, rows, columns, .. }| {
        let (mut dy_parts, mut w_parts, mut first) = (Vec::new(), Vec::new(), 0);
        for weight in group.stack {
            dy_parts.push(Part::activations(&dy.values()[first..], n).by_rows(weight.rows()));
            w_parts.push(part(weight).by_columns(weight.rows()));
            first += weight.rows();
        }
        assert!(first == n, "dy has {n} columns, its stacked weights {first} rows");
        let block = products.block(Side::B, &w_parts, columns.clone());
        products.stream(&block, &dy_parts, rows.clone(), |tile| {
            // SAFETY: tasks have different rows or columns.
            unsafe { store(tile, &out, rows.start * k + columns.start, k) };
        });
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
    let (n, k) = (dy.cols(), x.cols());
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
            let x = Part::activations(&x.values()[rows.start * k..], k).by_columns(rows.len());
            let dy = Part::activations(&dy.values()[rows.start * n..], n).by_columns(rows.len());
            let block = products.block(Side::B, &[x], task.columns.clone());
            let one = |job: &WeightGrad<'_>| {
                let outputs = task.outputs(job);
                let lines = job.out.start + outputs.start..job.out.start + outputs.end;
                let mut total = 0.0;
                products.stream(&block, &[dy], lines, |tile| match job.sink {
                    Sink::Add(at) => {
                        for (i, row) in tile.a.clone().enumerate() {
                            let at = at + (outputs.start + row) * k + task.columns.start + tile.b.start;
                            // SAFETY: tasks have different outputs or columns, and jobs do not overlap.
                            let to = unsafe { dw.slice(at, tile.b.len()) };
                            simd!({
                                for (to, x) in to.iter_mut().zip(tile.row(i)) {
                                    *to += x;
                                }
                            });
                        }
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
