//! Grouped matrix products: each group of rows has its own weights. The groups are the experts; a dense layer is one
//! group. In f32 here, in bf16 (given [`Products`]) in `bf16.rs`.

use std::ops::Range;

use rayon::prelude::*;

use super::bf16;
use super::dot;
use super::gemm::{Matrix, MatrixMut, TileSize, matmul};
use super::groups::{RowGroup, Sink, WeightGrad};
use super::parallel::{Scratch, SharedSlice};
use super::product::Products;
use super::simd::{simd, sum, sum2};
use super::tensor::Tensor;
use super::weight::Weight;
use crate::backend::GradReduction;

/// Elements of a tile in scratch memory, converted weights or a gradient to be scored: 1 MiB, so that it stays in the
/// L2 cache together with its operands.
const SCRATCH_TILE: usize = 256 * 1024;

/// y = x · wᵀ for each group. The outputs of stacked weights are concatenated.
pub(super) fn forward(products: Option<&Products>, x: &Tensor, groups: &[RowGroup<'_>], y: &mut Tensor) {
    if let Some(products) = products {
        return bf16::forward(products, x, groups, y);
    }
    struct Task<'a> {
        rows: Range<usize>,
        weight: &'a Weight,
        out: Range<usize>,
        /// First column of the weight's outputs in y.
        first: usize,
    }
    let (k, width) = (x.cols(), y.cols());
    let tile = TileSize::choose(groups.iter().map(|g| g.rows.len()), width, dot::SMALLEST);
    let mut tasks = Vec::new();
    for group in groups {
        let mut first = 0;
        for weight in group.stack {
            assert!(weight.cols() == k, "x has {k} columns, its weight [{}, {}]", weight.rows(), weight.cols());
            for (rows, out) in tile.tiles(group.rows.len(), weight.rows()) {
                tasks.push(Task {
                    rows: group.rows.start + rows.start..group.rows.start + rows.end,
                    weight,
                    out,
                    first,
                });
            }
            first += weight.rows();
        }
        assert!(first == width, "stacked weights have {first} rows, y {width} columns");
    }
    let out = SharedSlice::new(y.values_mut());
    tasks.into_par_iter().with_max_len(1).for_each(|t| {
        let (m, n) = (t.rows.len(), t.out.len());
        // SAFETY: tiles are disjoint by construction.
        let y = unsafe { MatrixMut::shared(&out, t.rows.start * width + t.first + t.out.start, m, n, width) };
        let x = Matrix::new(&x.values()[t.rows.start * k..], m, k, k);
        dot::product(y, x, t.weight, t.out);
    });
}

/// dx = dy · w for each group, summed over its stacked weights.
pub(super) fn backward_input(products: Option<&Products>, dy: &Tensor, groups: &[RowGroup<'_>], dx: &mut Tensor) {
    if let Some(products) = products {
        return bf16::backward_input(products, dy, groups, dx);
    }
    let (n, k) = (dy.cols(), dx.cols());
    let tile = TileSize::choose(groups.iter().map(|g| g.rows.len()), k, TileSize::SMALLEST);
    let mut tasks = Vec::new();
    for group in groups {
        let height: usize = group.stack.iter().map(|w| w.rows()).sum();
        assert!(height == n, "dy has {n} columns, its stacked weights {height} rows");
        for (rows, cols) in tile.tiles(group.rows.len(), k) {
            tasks.push((group.rows.start + rows.start..group.rows.start + rows.end, cols, group.stack));
        }
    }
    let out = SharedSlice::new(dx.values_mut());
    tasks.into_par_iter().with_max_len(1).for_each(|(rows, cols, stack)| {
        let m = rows.len();
        let mut first = 0;
        for weight in stack {
            // A weight in place is one product over the whole depth; otherwise there is one per slab of converted rows.
            let slab = if weight.in_place().is_some() { weight.rows() } else { (SCRATCH_TILE / cols.len()).max(1) };
            let mut widened = Scratch::take(0);
            for at in (0..weight.rows()).step_by(slab.max(1)) {
                let depth = slab.min(weight.rows() - at);
                let dy = Matrix::new(&dy.values()[rows.start * n + first + at..], m, depth, n);
                let w = match weight.in_place() {
                    Some(w) => Matrix::new(&w[at * k + cols.start..], depth, cols.len(), k),
                    None => {
                        widened.resize(depth * cols.len());
                        for (i, row) in widened.chunks_exact_mut(cols.len()).enumerate() {
                            weight.read_into((at + i) * k + cols.start, row);
                        }
                        Matrix::new(&widened, depth, cols.len(), cols.len())
                    }
                };
                // SAFETY: tiles are disjoint by construction.
                let dx = unsafe { MatrixMut::shared(&out, rows.start * k + cols.start, m, cols.len(), k) };
                matmul(dx, dy, w, 1.0, first + at > 0);
            }
            first += weight.rows();
        }
    });
}

/// Computes each job's gradient into its sink. [`Sink::Add`] ranges must not overlap.
///
/// A scored gradient is computed tile by tile in scratch memory that fits the L2 cache, and reduced there. A tile has
/// whole rows, so its sum is in the matrix's memory order; the sums of tiles are added in the order of the jobs.
pub(super) fn backward_weight(
    products: Option<&Products>,
    dy: &Tensor,
    x: &Tensor,
    jobs: &[WeightGrad<'_>],
    dw: &mut [f32],
    scores: &mut [f64],
) {
    let (n, k) = (dy.cols(), x.cols());
    let mut claimed: Vec<Range<usize>> = Vec::new();
    for job in jobs.iter().filter(|j| !j.rows.is_empty()) {
        if let Sink::Add(at) = job.sink {
            claimed.push(at..at + job.out.len() * k);
        }
    }
    claimed.sort_by_key(|r| r.start);
    assert!(claimed.windows(2).all(|w| w[0].end <= w[1].start), "two gradients overlap in the buffer");
    if let Some(products) = products {
        return bf16::backward_weight(products, dy, x, jobs, dw, scores);
    }
    let tile = TileSize::choose(jobs.iter().map(|j| j.out.len()), k, TileSize::SMALLEST);
    struct Task<'a> {
        job: &'a WeightGrad<'a>,
        out: Range<usize>,
        cols: Range<usize>,
    }
    let mut tasks = Vec::new();
    for job in jobs.iter().filter(|j| !j.rows.is_empty()) {
        let tile = match job.sink {
            Sink::Add(_) => TileSize { rows: tile.rows.min(256), cols: tile.cols },
            Sink::Score(..) => TileSize { rows: (SCRATCH_TILE / k.max(1)).clamp(16, 256), cols: k.max(1) },
        };
        tasks.extend(tile.tiles(job.out.len(), k).map(|(out, cols)| Task { job, out, cols }));
    }
    let dw = SharedSlice::new(dw);
    let sums: Vec<f64> = tasks
        .par_iter()
        .with_max_len(1)
        .map(|t| {
            let (rows, depth) = (&t.job.rows, t.job.rows.len());
            let dy_t =
                Matrix::new(&dy.values()[rows.start * n + t.job.out.start + t.out.start..], depth, t.out.len(), n).t();
            let x = Matrix::new(&x.values()[rows.start * k + t.cols.start..], depth, t.cols.len(), k);
            match t.job.sink {
                Sink::Add(at) => {
                    let at = at + t.out.start * k + t.cols.start;
                    // SAFETY: tiles of one job are disjoint by construction, jobs by the assertion above.
                    let dw = unsafe { MatrixMut::shared(&dw, at, t.out.len(), t.cols.len(), k) };
                    matmul(dw, dy_t, x, 1.0, true);
                    0.0
                }
                Sink::Score(reduction, _, weight) => {
                    let mut g = Scratch::take(t.out.len() * k);
                    matmul(MatrixMut::new(&mut g, t.out.len(), k, k), dy_t, x, 1.0, false);
                    match reduction {
                        GradReduction::Abs => simd!(sum(&g, f32::abs)),
                        GradReduction::Square => simd!(sum(&g, |g| g * g)),
                        GradReduction::AbsTimesWeight => {
                            let w = weight.read(t.out.clone());
                            simd!(sum2(&g, &w, |g, w| (g * w).abs()))
                        }
                    }
                }
            }
        })
        .collect();
    for (task, sum) in tasks.iter().zip(sums) {
        if let Sink::Score(_, index, _) = task.job.sink {
            scores[index] += sum;
        }
    }
}
