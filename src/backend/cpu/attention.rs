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
use super::attention_blocks::{BLOCK, Block, Task};
use super::gemm::{Matrix, MatrixMut, matmul};
use super::parallel::{Scratch, SharedSlice};
use super::rope::Sequences;
use super::simd::{dot, exp, simd};
use super::tensor::Tensor;
use crate::backend::Heads;

impl Block {
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
