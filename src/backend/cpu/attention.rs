//! Causal grouped-query attention over packed sequences, with an optional sliding window.
//!
//! A task computes one (sequence, key head) with all query heads that share the key head, so sums over these query
//! heads need no atomics and have a fixed order. It processes queries in blocks of [`BLOCK`] rows, each against only
//! the keys that some row of the block attends to.
//!
//! Here are the products in f32; `attention_bf16.rs` has those of bf16 values. The scores of a block are stored transposed,
//! `[keys, rows]`: the softmax then runs over all rows of the block at once, with one SIMD lane per row.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::attention_bf16;
use super::gemm::{Matrix, MatrixMut, matmul};
use super::parallel::{Scratch, SharedSlice};
use super::rope::Sequences;
use super::simd::{dot, exp, simd};
use super::tensor::Tensor;
use crate::backend::Heads;

/// Query rows per block: four AVX-512 vectors.
const BLOCK: usize = 64;

/// One (sequence, key head).
pub(super) struct Task {
    /// The sequence's query rows.
    pub(super) queries: Range<usize>,
    /// The sequence's key rows.
    pub(super) keys: Range<usize>,
    pub(super) key_head: usize,
}

/// A block of queries of one sequence.
pub(super) struct Block {
    /// Query rows, relative to the sequence's first query.
    pub(super) rows: Range<usize>,
    /// Keys that some row attends to, relative to the sequence's first key.
    pub(super) keys: Range<usize>,
    /// Position of the block's first row in the sequence.
    pub(super) position: usize,
    /// Size of the sliding window; `usize::MAX` without one.
    pub(super) window: usize,
}

impl Task {
    /// All tasks, the most expensive first, so that no long one starts last.
    pub(super) fn all(seqs: &Sequences, heads: &Heads) -> Vec<Task> {
        let p = &seqs.packing;
        let mut tasks: Vec<Task> = (0..p.len())
            .flat_map(|s| {
                (0..heads.keys).map(move |key_head| Task {
                    queries: p.queries[s]..p.queries[s + 1],
                    keys: p.keys[s]..p.keys[s + 1],
                    key_head,
                })
            })
            .filter(|t| !t.keys.is_empty())
            .collect();
        for t in &tasks {
            assert!(t.queries.len() <= t.keys.len(), "{} queries, but only {} keys", t.queries.len(), t.keys.len());
        }
        tasks.sort_by_key(|t| std::cmp::Reverse(t.queries.len() * t.keys.len()));
        tasks
    }

    pub(super) fn blocks(&self, heads: &Heads) -> impl Iterator<Item = Block> {
        let (n, first_position) = (self.queries.len(), self.keys.len() - self.queries.len());
        let window = heads.window.unwrap_or(usize::MAX);
        assert!(window > 0, "a sliding window of 0 positions");
        (0..n).step_by(BLOCK).map(move |start| {
            let rows = start..n.min(start + BLOCK);
            let position = first_position + start;
            Block { keys: (position + 1).saturating_sub(window)..first_position + rows.end, rows, position, window }
        })
    }
}

impl Block {
    /// Rows, relative to the block, that attend to key `j`.
    #[inline(always)]
    fn rows_of_key(&self, j: usize) -> Range<usize> {
        let first = j.saturating_sub(self.position);
        let end = j.saturating_add(self.window).saturating_sub(self.position).min(self.rows.len());
        first..end.max(first)
    }

    /// Turns scores `[keys, rows]` into probabilities in place: a masked softmax of each row over the keys.
    #[inline(always)]
    fn softmax(&self, scores: &mut [f32]) {
        let n = self.rows.len();
        let (mut highest, mut total) = ([f32::NEG_INFINITY; BLOCK], [0f32; BLOCK]);
        for (j, row) in self.keys.clone().zip(scores.chunks_exact_mut(n)) {
            let unmasked = self.rows_of_key(j);
            row[..unmasked.start].fill(f32::NEG_INFINITY);
            row[unmasked.end..].fill(f32::NEG_INFINITY);
            for (h, &s) in highest.iter_mut().zip(&*row) {
                *h = if s > *h { s } else { *h };
            }
        }
        for row in scores.chunks_exact_mut(n) {
            for ((s, h), t) in row.iter_mut().zip(&highest).zip(&mut total) {
                *s = exp(*s - h);
                *t += *s;
            }
        }
        for t in &mut total {
            *t = 1.0 / *t;
        }
        for row in scores.chunks_exact_mut(n) {
            for (s, t) in row.iter_mut().zip(&total) {
                *s *= t;
            }
        }
    }
}

/// Copies one head of `rows` into contiguous scratch memory, `[rows, dim]`.
fn copy_head(x: &Tensor, rows: Range<usize>, head: usize, dim: usize) -> Scratch {
    let mut out = Scratch::take(rows.len() * dim);
    for (out, row) in out.chunks_exact_mut(dim).zip(rows) {
        out.copy_from_slice(&x.row(row)[head * dim..(head + 1) * dim]);
    }
    out
}

/// A view of one head of `rows`, `[rows, dim]`.
fn head_view(x: &Tensor, rows: Range<usize>, head: usize, dim: usize) -> Matrix<'_> {
    Matrix::new(&x.values()[rows.start * x.cols() + head * dim..], rows.len(), dim, x.cols())
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, seqs: &Sequences, heads: &Heads) {
    assert!(heads.keys > 0 && heads.queries.is_multiple_of(heads.keys), "{heads:?}");
    let keys = seqs.packing.keys[seqs.packing.len()];
    q.expect_shape("q", seqs.packing.rows(), heads.queries * heads.dim);
    k.expect_shape("k", keys, heads.keys * heads.dim);
    v.expect_shape("v", keys, heads.keys * heads.dim);
}

/// Computes the probabilities of a block, `[keys, rows]`, into `scores`.
fn probabilities(q: Matrix<'_>, k: &[f32], block: &Block, dim: usize, scores: &mut [f32]) {
    let (n, m) = (block.rows.len(), block.keys.len());
    let k = Matrix::new(&k[block.keys.start * dim..], m, dim, dim);
    matmul(MatrixMut::new(scores, m, n, n).t(), q, k.t(), 1.0 / (dim as f32).sqrt(), false);
    simd!(block.softmax(scores));
}

pub(super) fn attention(cpu: &Cpu, q: &Tensor, k: &Tensor, v: &Tensor, seqs: &Sequences, heads: &Heads) -> Tensor {
    check(q, k, v, seqs, heads);
    let (dim, group) = (heads.dim, heads.queries / heads.keys);
    let width = q.cols();
    let mut y = cpu.pool.take(q.rows(), width);
    if let Some(products) = cpu.products() {
        attention_bf16::forward(products, [q, k, v], &mut y, seqs, heads);
        return y;
    }
    let out = SharedSlice::new(y.values_mut());
    let mut tasks = Task::all(seqs, heads);
    tasks.retain(|task| !task.queries.is_empty()); // keys that nothing attends to
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let k = copy_head(k, task.keys.clone(), task.key_head, dim);
        let v = copy_head(v, task.keys.clone(), task.key_head, dim);
        let mut scores = Scratch::take(0);
        for h in task.key_head * group..(task.key_head + 1) * group {
            for block in task.blocks(heads) {
                let (n, m) = (block.rows.len(), block.keys.len());
                let rows = task.queries.start + block.rows.start..task.queries.start + block.rows.end;
                scores.resize(m * n);
                probabilities(head_view(q, rows.clone(), h, dim), &k, &block, dim, &mut scores);
                // SAFETY: no other task writes this query head's columns of this sequence's rows.
                let y = unsafe { MatrixMut::shared(&out, rows.start * width + h * dim, n, dim, width) };
                let v = Matrix::new(&v[block.keys.start * dim..], m, dim, dim);
                matmul(y, Matrix::new(&scores, m, n, n).t(), v, 1.0, false);
            }
        }
    });
    y
}

/// With probabilities P and δ_i = ⟨dy_i, y_i⟩ (Dao et al., arXiv 2205.14135, appendix B): dV = Pᵀ·dY,
/// dS = P ∘ (dY·Vᵀ − δ) / sqrt(dim), dQ = dS·K, dK = dSᵀ·Q.
#[allow(clippy::too_many_arguments)]
pub(super) fn backward(
    cpu: &Cpu,
    dy: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    y: &Tensor,
    seqs: &Sequences,
    heads: &Heads,
) -> (Tensor, Tensor, Tensor) {
    check(q, k, v, seqs, heads);
    dy.expect_shape("dy of attention", q.rows(), q.cols());
    y.expect_shape("y of attention", q.rows(), q.cols());
    let (dim, group) = (heads.dim, heads.queries / heads.keys);
    let (width, key_width) = (q.cols(), k.cols());
    let mut dq = cpu.pool.take(q.rows(), width);
    let mut dk = cpu.pool.take(k.rows(), key_width);
    let mut dv = cpu.pool.take(k.rows(), key_width);
    if let Some(products) = cpu.products() {
        attention_bf16::backward(products, [dy, q, k, v, y], [&mut dq, &mut dk, &mut dv], seqs, heads);
        return (dq, dk, dv);
    }
    let (out_q, out_k, out_v) =
        (SharedSlice::new(dq.values_mut()), SharedSlice::new(dk.values_mut()), SharedSlice::new(dv.values_mut()));
    Task::all(seqs, heads).into_par_iter().with_max_len(1).for_each(|task| {
        let k = copy_head(k, task.keys.clone(), task.key_head, dim);
        let v = copy_head(v, task.keys.clone(), task.key_head, dim);
        let (mut dk, mut dv) = (Scratch::take(k.len()), Scratch::take(k.len()));
        dk.fill(0.0);
        dv.fill(0.0);
        let (mut p, mut ds) = (Scratch::take(0), Scratch::take(0));
        for h in task.key_head * group..(task.key_head + 1) * group {
            for block in task.blocks(heads) {
                let (n, m) = (block.rows.len(), block.keys.len());
                let rows = task.queries.start + block.rows.start..task.queries.start + block.rows.end;
                let keys = block.keys.start * dim..block.keys.end * dim;
                let (q, dy_block) = (head_view(q, rows.clone(), h, dim), head_view(dy, rows.clone(), h, dim));
                p.resize(m * n);
                ds.resize(m * n);
                probabilities(q, &k, &block, dim, &mut p);
                let probabilities = Matrix::new(&p, m, n, n);
                matmul(MatrixMut::new(&mut dv[keys.clone()], m, dim, dim), probabilities, dy_block, 1.0, true);

                let values = Matrix::new(&v[keys.clone()], m, dim, dim);
                matmul(MatrixMut::new(&mut ds, m, n, n).t(), dy_block, values.t(), 1.0, false);
                let mut delta = [0f32; BLOCK];
                simd!({
                    for (delta, row) in delta.iter_mut().zip(rows.clone()) {
                        let columns = h * dim..(h + 1) * dim;
                        *delta = dot(&dy.row(row)[columns.clone()], &y.row(row)[columns]) as f32;
                    }
                    let scale = 1.0 / (dim as f32).sqrt();
                    for (ds, p) in ds.chunks_exact_mut(n).zip(p.chunks_exact(n)) {
                        for ((ds, p), delta) in ds.iter_mut().zip(p).zip(&delta) {
                            *ds = p * (*ds - delta) * scale;
                        }
                    }
                });
                let ds = Matrix::new(&ds, m, n, n);
                matmul(MatrixMut::new(&mut dk[keys.clone()], m, dim, dim), ds, q, 1.0, true);
                // SAFETY: no other task writes this query head's columns of this sequence's rows.
                let dq = unsafe { MatrixMut::shared(&out_q, rows.start * width + h * dim, n, dim, width) };
                matmul(dq, ds.t(), Matrix::new(&k[keys], m, dim, dim), 1.0, false);
            }
        }
        for (i, row) in task.keys.clone().enumerate() {
            let at = row * key_width + task.key_head * dim;
            // SAFETY: no other task writes this key head's columns of this sequence's rows.
            let (to_k, to_v) = unsafe { (out_k.slice(at, dim), out_v.slice(at, dim)) };
            to_k.copy_from_slice(&dk[i * dim..(i + 1) * dim]);
            to_v.copy_from_slice(&dv[i * dim..(i + 1) * dim]);
        }
    });
    (dq, dk, dv)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_attend_to_the_keys_of_the_definition() {
        for (queries, keys, window) in
            [(5, 5, None), (130, 130, Some(3)), (70, 200, Some(64)), (1, 90, None), (3, 9, Some(1))]
        {
            let heads = Heads { queries: 1, keys: 1, dim: 2, window };
            let task = Task { queries: 0..queries, keys: 0..keys, key_head: 0 };
            let mut rows = 0;
            for block in task.blocks(&heads) {
                assert_eq!(block.rows.start, rows);
                rows = block.rows.end;
                for i in block.rows.clone() {
                    let position = keys - queries + i;
                    for j in 0..keys {
                        let want = j <= position && window.is_none_or(|w| position - j < w);
                        let got = block.keys.contains(&j) && block.rows_of_key(j).contains(&(i - block.rows.start));
                        assert_eq!(got, want, "query {i} of {queries}, key {j} of {keys}, window {window:?}");
                    }
                }
            }
            assert_eq!(rows, queries);
        }
    }
}
