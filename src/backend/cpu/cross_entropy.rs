//! Fused linear cross-entropy: the loss of a linear head without its full logit matrix.
//!
//! It has the form of attention with the head's rows as both keys and values, and is computed like FlashAttention (Dao
//! et al., arXiv 2205.14135): a block of rows iterates over tiles of the vocabulary with a running maximum and sum
//! (online softmax). The gradient needs Σ_v p_v·w_v, which is accumulated in the same pass and rescaled when the
//! maximum grows. So each tile of the head stays in the L2 cache for both of its products (in f32, converted once); only the logits of one block against one tile are stored. The gradient of the head itself needs the
//! logits again, in a second pass.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::gemm::{Matrix, MatrixMut, matmul};
use super::parallel::{Scratch, SharedSlice};
use super::product::{self, Part, Products, Side, round};
use super::simd::{axpy, dot, exp, simd};
use super::tensor::Tensor;
use super::weight::{self, Weight};
use crate::backend::RowLoss;

/// Rows per block: the SIMD lanes of its running sums.
const BLOCK: usize = 128;
/// Rows per pass over the vocabulary; bounds the memory of the partial gradients.
const STRIP: usize = 4 * BLOCK;
/// Parts of the vocabulary that are processed in parallel and merged in order.
const SEGMENTS: usize = 8;

/// The state of an online softmax over the vocabulary, one lane per row.
#[derive(Clone)]
struct OnlineSoftmax {
    /// Highest logit so far.
    highest: [f32; BLOCK],
    /// Σ e^(logit − highest) so far.
    total: [f64; BLOCK],
    /// The first class with the highest logit so far, where it is asked for.
    best: [u32; BLOCK],
}

impl OnlineSoftmax {
    fn new() -> Self {
        Self { highest: [f32::NEG_INFINITY; BLOCK], total: [0.0; BLOCK], best: [0; BLOCK] }
    }

    /// Updates `best` by a tile of logits `[tile, rows]`, whose first row is the class `first`. To be called before `update`.
    fn update_best(&mut self, logits: &[f32], rows: usize, first: usize) {
        let mut highest = self.highest;
        for (class, row) in (first as u32..).zip(logits.chunks_exact(rows)) {
            for ((h, best), &l) in highest.iter_mut().zip(&mut self.best).zip(row) {
                if l > *h {
                    (*h, *best) = (l, class);
                }
            }
        }
    }

    /// Adds a tile of logits `[tile, rows]` and overwrites them with e^(logit − highest). Returns the factors by which
    /// earlier sums must be rescaled, because `highest` may have grown.
    #[inline(always)]
    fn update(&mut self, logits: &mut [f32], rows: usize) -> [f32; BLOCK] {
        let mut highest = self.highest;
        for row in logits.chunks_exact(rows) {
            for (h, &l) in highest.iter_mut().zip(row) {
                *h = if l > *h { l } else { *h };
            }
        }
        let mut sums = [0f32; BLOCK];
        for row in logits.chunks_exact_mut(rows) {
            for ((l, h), s) in row.iter_mut().zip(&highest).zip(&mut sums) {
                *l = exp(*l - h);
                *s += *l;
            }
        }
        let mut rescale = [1f32; BLOCK];
        for i in 0..rows {
            // The difference of equal infinities would be NaN.
            rescale[i] = if self.highest[i] == highest[i] { 1.0 } else { exp(self.highest[i] - highest[i]) };
            self.total[i] = self.total[i] * f64::from(rescale[i]) + f64::from(sums[i]);
        }
        self.highest = highest;
        rescale
    }
}

/// Elements of a tile of the head: 1 MiB of f32, half of a typical L2 cache.
const TILE: usize = 256 * 1024;

/// Rows of the head `[V, d]` per tile.
fn tile_rows(d: usize) -> usize {
    (TILE / d.max(1)).clamp(16, 256)
}

/// Rows of x, ready for products with tiles of the head.
struct Block<'a> {
    head: &'a Head<'a>,
    rows: usize,
    x: Operand<'a>,
}

/// `[rows, D]`
enum Operand<'a> {
    F32(&'a [f32]),
    /// Packed once for all tiles.
    Bf16(&'a Products, product::Block),
}

/// A tile of the head, and the block it is multiplied with.
enum HeadTile<'b> {
    F32 {
        x: Matrix<'b>,
        w: weight::Rows<'b>,
    },
    /// The rows of the head from the tile's first one on, as they are stored.
    Bf16 {
        products: &'b Products,
        x: &'b product::Block,
        w: Part<'b>,
    },
}

impl<'a> Block<'a> {
    fn new(head: &'a Head<'a>, rows: Range<usize>) -> Self {
        let x = match head.products {
            None => Operand::F32(head.rows(&rows)),
            Some(products) => {
                let x = Part::activations(head.rows(&rows), head.x.cols()).by_rows(head.x.cols());
                Operand::Bf16(products, products.block(Side::B, &[x], 0..rows.len()))
            }
        };
        Self { head, rows: rows.len(), x }
    }

    /// The tile of these rows of the head.
    fn tile(&self, rows: Range<usize>) -> HeadTile<'_> {
        let (w, d) = (self.head.w, self.head.w.cols());
        match &self.x {
            Operand::F32(x) => HeadTile::F32 { x: Matrix::new(x, self.rows, d, d), w: w.read(rows) },
            Operand::Bf16(products, x) => {
                let w = Part::stored(w.dtype(), w.bytes(), d).skip_rows(rows.start);
                HeadTile::Bf16 { products, x, w }
            }
        }
    }

    /// Computes the logits of the rows against a tile of the head, transposed: `[tile, rows]`.
    fn logits(&self, tile: &HeadTile<'_>, out: &mut [f32]) {
        let (n, rows, d) = (out.len() / self.rows, self.rows, self.head.x.cols());
        match tile {
            HeadTile::F32 { x, w } => {
                matmul(MatrixMut::new(out, n, rows, rows).t(), *x, Matrix::new(w, n, d, d).t(), 1.0, false);
            }
            HeadTile::Bf16 { products, x, w } => {
                products.stream(x, &[w.by_rows(d)], 0..n, |tile| tile.copy_to(out, rows));
            }
        }
    }

    /// to = pᵀ · w, or to += pᵀ · w, for p `[tile, rows]` and a tile w of the head: `[rows, D]`.
    fn weighted_sum(&self, p: &[f32], tile: &HeadTile<'_>, to: &mut [f32], accumulate: bool) {
        let (n, rows, d) = (p.len() / self.rows, self.rows, self.head.x.cols());
        match tile {
            HeadTile::F32 { w, .. } => {
                let (p, w) = (Matrix::new(p, n, rows, rows), Matrix::new(w, n, d, d));
                matmul(MatrixMut::new(to, rows, d, d), p.t(), w, 1.0, accumulate);
            }
            HeadTile::Bf16 { products, w, .. } => {
                let p = products.block(Side::A, &[Part::activations(p, rows).by_columns(n)], 0..rows);
                products.stream(&p, &[w.by_columns(n)], 0..d, |tile| {
                    if accumulate { tile.add_to(to, d) } else { tile.copy_to(to, d) }
                });
            }
        }
    }
}

/// What a pass over the vocabulary computes besides the losses.
enum Want<T> {
    /// Nothing.
    Losses,
    /// The class with the highest logit.
    Best,
    /// The gradient, or what it is made of.
    Gradient(T),
}

/// Online softmax of rows `block` of x over the vocabulary range `segment`. A wanted gradient (`[rows, D]`) is overwritten
/// with Σ_v e^(logit_v − highest)·w_v.
fn scan_segment(head: &Head<'_>, block: Range<usize>, segment: Range<usize>, want: Want<&mut [f32]>) -> OnlineSoftmax {
    let (best, mut weighted_sum) = match want {
        Want::Losses => (false, None),
        Want::Best => (true, None),
        Want::Gradient(sum) => (false, Some(sum)),
    };
    let (d, rows) = (head.x.cols(), block.len());
    let block = Block::new(head, block);
    let step = tile_rows(d);
    let mut softmax = OnlineSoftmax::new();
    let mut scores = Scratch::take(step * rows);
    for start in segment.clone().step_by(step) {
        let tile = step.min(segment.end - start);
        let w = block.tile(start..start + tile);
        let scores = &mut scores[..tile * rows];
        block.logits(&w, scores);
        if best {
            softmax.update_best(scores, rows, start);
        }
        let rescale = simd!(softmax.update(scores, rows));
        if let Some(weighted_sum) = weighted_sum.as_deref_mut() {
            let first = start == segment.start;
            if !first && rescale.iter().any(|&r| r != 1.0) {
                simd!({
                    for (row, r) in weighted_sum.chunks_exact_mut(d).zip(rescale) {
                        for x in row {
                            *x *= r;
                        }
                    }
                });
            }
            block.weighted_sum(scores, &w, weighted_sum, !first);
        }
    }
    softmax
}

/// The first class with the highest logit of one row, over all its segments.
fn best(parts: &[OnlineSoftmax], lane: usize) -> u32 {
    let mut first = &parts[0];
    for part in &parts[1..] {
        if part.highest[lane] > first.highest[lane] {
            first = part;
        }
    }
    first.best[lane]
}

/// Merges the segments of one row: the highest logit and Σ e^(logit − highest) over the whole vocabulary.
fn merge(parts: &[OnlineSoftmax], lane: usize) -> (f32, f64) {
    let highest = parts.iter().map(|p| p.highest[lane]).fold(f32::NEG_INFINITY, f32::max);
    let total = parts.iter().map(|p| p.total[lane] * f64::from(p.highest[lane] - highest).exp()).sum();
    (highest, total)
}

fn segments(v: usize) -> Vec<Range<usize>> {
    let step = v.div_ceil(SEGMENTS).max(1);
    (0..v).step_by(step).map(|at| at..v.min(at + step)).collect()
}

/// A linear head and its input.
#[derive(Clone, Copy)]
struct Head<'a> {
    /// `[n, D]`; rounded to bf16 if products are.
    x: &'a Tensor,
    /// `[V, D]`
    w: &'a Weight,
    /// `[n]`
    targets: &'a [u32],
    products: Option<&'a Products>,
}

impl Head<'_> {
    /// Rows of x.
    fn rows(&self, rows: &Range<usize>) -> &[f32] {
        &self.x.values()[rows.start * self.x.cols()..rows.end * self.x.cols()]
    }

    /// Calls `f` with the head. In bf16 x is rounded first, because the target's logit is computed apart from the others.
    fn with<R>(cpu: &Cpu, x: &Tensor, w: &Weight, targets: &[u32], f: impl FnOnce(&Head<'_>) -> R) -> R {
        assert!(x.cols() == w.cols(), "x [{}, {}], head [{}, {}]", x.rows(), x.cols(), w.rows(), w.cols());
        assert!(x.rows() == targets.len(), "{} rows, {} targets", x.rows(), targets.len());
        let bad = targets.iter().find(|&&t| t as usize >= w.rows());
        assert!(bad.is_none(), "target {} of {} classes", bad.unwrap_or(&0), w.rows());
        let products = cpu.products();
        let rounded = products.map(|_| {
            let mut rounded = cpu.pool.take(x.rows(), x.cols());
            round(x.values(), rounded.values_mut());
            rounded
        });
        f(&Head { x: rounded.as_ref().unwrap_or(x), w, targets, products })
    }
}

pub(super) fn forward(cpu: &Cpu, x: &Tensor, w: &Weight, targets: &[u32]) -> f64 {
    Head::with(cpu, x, w, targets, |head| {
        strips(x.rows()).map(|strip| strip_loss(head, strip, Want::Losses).loss()).sum()
    })
}

pub(super) fn rows(cpu: &Cpu, x: &Tensor, w: &Weight, targets: &[u32]) -> Vec<RowLoss> {
    Head::with(cpu, x, w, targets, |head| {
        strips(x.rows())
            .flat_map(|strip| strip_loss(head, strip, Want::Best).rows)
            .map(|row| RowLoss { loss: row.loss, greedy: row.greedy })
            .collect()
    })
}

/// The results of the rows of a strip.
struct Strip {
    rows: Vec<StripRow>,
}

struct StripRow {
    loss: f64,
    /// log Σ e^logit
    log_sum: f64,
    /// Whether the target is the best class, where it is asked for.
    greedy: bool,
}

impl Strip {
    fn loss(&self) -> f64 {
        self.rows.iter().map(|row| row.loss).sum()
    }
}

fn strips(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(STRIP).map(move |at| at..rows.min(at + STRIP))
}

/// The losses of the rows in `strip`. A wanted gradient (dx of the strip's rows, and `scale`) is overwritten with that of
/// `scale` times the sum of the losses.
fn strip_loss(head: &Head<'_>, strip: Range<usize>, want: Want<(&mut [f32], f32, &Cpu)>) -> Strip {
    let Head { x, w, targets, .. } = *head;
    let want_best = matches!(want, Want::Best);
    let dx = if let Want::Gradient(dx) = want { Some(dx) } else { None };
    let d = x.cols();
    let segments = segments(w.rows());
    let blocks: Vec<Range<usize>> = strip.clone().step_by(BLOCK).map(|at| at..strip.end.min(at + BLOCK)).collect();
    // The partial Σ e^(logit − highest)·w of each segment and row, `[segments · rows, D]`.
    let mut weighted_sums = dx.as_ref().map(|(_, _, cpu)| cpu.pool.take(segments.len() * strip.len(), d));
    let shared = weighted_sums.as_mut().map(|m| SharedSlice::new(m.values_mut()));
    let tasks: Vec<(usize, usize)> = (0..blocks.len()).flat_map(|b| (0..segments.len()).map(move |s| (b, s))).collect();
    let parts: Vec<OnlineSoftmax> = tasks
        .into_par_iter()
        .with_max_len(1)
        .map(|(b, s)| {
            let (block, segment) = (blocks[b].clone(), segments[s].clone());
            let at = (s * strip.len() + block.start - strip.start) * d;
            // SAFETY: no other task writes this block's rows of this segment.
            let weighted_sum = shared.as_ref().map(|m| unsafe { m.slice(at, block.len() * d) });
            let want = match weighted_sum {
                Some(sum) => Want::Gradient(sum),
                None if want_best => Want::Best,
                None => Want::Losses,
            };
            scan_segment(head, block, segment, want)
        })
        .collect();
    let parts_of = |row: usize| {
        let i = row - strip.start;
        (&parts[i / BLOCK * segments.len()..][..segments.len()], i % BLOCK)
    };
    let rows: Vec<StripRow> = strip
        .clone()
        .into_par_iter()
        .with_min_len(16)
        .map(|row| {
            let (parts, lane) = parts_of(row);
            let (highest, total) = merge(parts, lane);
            let log_sum = f64::from(highest) + total.ln();
            let target = targets[row] as usize;
            let greedy = want_best && best(parts, lane) as usize == target;
            let w = w.read(target..target + 1);
            StripRow { loss: log_sum - simd!(dot(x.row(row), &w)), log_sum, greedy }
        })
        .collect();
    if let (Some((dx, scale, _)), Some(weighted_sums)) = (dx, &weighted_sums) {
        // dx = scale · (Σ_v p_v·w_v − w_target)
        dx.par_chunks_mut(d).zip(strip.clone()).with_min_len(16).for_each(|(dx, row)| {
            let (parts, lane) = parts_of(row);
            let (highest, total) = merge(parts, lane);
            let target = targets[row] as usize;
            let w = w.read(target..target + 1);
            simd!({
                dx.fill(0.0);
                for (s, part) in parts.iter().enumerate() {
                    let share = f64::from(part.highest[lane] - highest).exp() / total;
                    axpy(dx, scale * share as f32, weighted_sums.row(s * strip.len() + row - strip.start));
                }
                axpy(dx, -scale, &w);
            });
        });
    }
    Strip { rows }
}

pub(super) fn backward(
    cpu: &Cpu,
    x: &Tensor,
    w: &Weight,
    targets: &[u32],
    scale: f32,
    mut dw: Option<(&mut [f32], usize)>,
) -> (f64, Tensor) {
    let d = x.cols();
    let mut dx = cpu.pool.take(x.rows(), d);
    let mut loss = 0.0;
    Head::with(cpu, x, w, targets, |head| {
        for strip in strips(x.rows()) {
            let rows = &mut dx.values_mut()[strip.start * d..strip.end * d];
            let part = strip_loss(head, strip.clone(), Want::Gradient((rows, scale, cpu)));
            loss += part.loss();
            if let Some((dw, offset)) = &mut dw {
                let dw = &mut dw[*offset..*offset + w.len()];
                weight_gradient(head, strip, &part.rows, scale, dw);
            }
        }
    });
    (loss, dx)
}

/// dw += scale · (p − one_hot(target))ᵀ · x over the rows in `strip`, one task per tile of the vocabulary.
fn weight_gradient(head: &Head<'_>, strip: Range<usize>, rows_of_strip: &[StripRow], scale: f32, dw: &mut [f32]) {
    let Head { targets, products, .. } = *head;
    let (d, rows) = (head.x.cols(), strip.len());
    let step = tile_rows(d);
    let block = Block::new(head, strip.clone());
    let x = head.rows(&strip);
    // x as the other operand of dw, packed once for all tiles.
    let by_columns = products.map(|p| (p, p.block(Side::B, &[Part::activations(x, d).by_columns(rows)], 0..d)));
    let log_sums: Vec<f32> = rows_of_strip.iter().map(|row| row.log_sum as f32).collect();
    dw.par_chunks_mut(step * d).enumerate().with_max_len(1).for_each(|(i, dw)| {
        let (first, tile) = (i * step, dw.len() / d);
        let mut grad = Scratch::take(tile * rows);
        block.logits(&block.tile(first..first + tile), &mut grad);
        simd!({
            for row in grad.chunks_exact_mut(rows) {
                for (g, l) in row.iter_mut().zip(&log_sums) {
                    *g = scale * exp(*g - l);
                }
            }
        });
        for (row, &target) in targets[strip.clone()].iter().enumerate() {
            if let Some(t) = (target as usize).checked_sub(first).filter(|&t| t < tile) {
                grad[t * rows + row] -= scale;
            }
        }
        match &by_columns {
            None => {
                let (grad, x) = (Matrix::new(&grad, tile, rows, rows), Matrix::new(x, rows, d, d));
                matmul(MatrixMut::new(dw, tile, d, d), grad, x, 1.0, true);
            }
            Some((products, x)) => {
                let grad = products.block(Side::A, &[Part::activations(&grad, rows).by_rows(rows)], 0..tile);
                products.multiply(x, &grad, |tile| tile.add_to(dw, d));
            }
        }
    });
}
