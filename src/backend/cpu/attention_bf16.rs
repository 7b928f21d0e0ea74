//! Causal attention with products of bf16 values. The tasks and blocks are those of the products in f32; keys and values are packed
//! once for all blocks of a task, and the scores of a block are `[rows, keys]`, so that they are packed as they are stored.

use std::ops::Range;

use rayon::prelude::*;

use super::attention_blocks::{Block, Task};
use super::parallel::{Scratch, SharedSlice};
use super::product::{self, Part, Products, Side};
use super::rope::Sequences;
use super::simd::{dot, exp, fold, simd};
use super::tensor::Tensor;
use crate::backend::Heads;

/// Keys of a block start at a multiple of this, where panels of lines and of depth start, and end at one, where the sums of a
/// softmax end.
const STEP: usize = 32;

/// A query block, with its keys extended to whole steps. Those that no row attends to get a probability of 0.
struct Scores {
    block: Block,
    keys: Range<usize>,
    /// Keys, padded: elements from one row to the next.
    stride: usize,
}

impl Scores {
    fn of(block: Block) -> Self {
        let keys = block.keys.start / STEP * STEP..block.keys.end;
        Self { stride: keys.len().next_multiple_of(STEP), keys, block }
    }

    fn rows(&self) -> usize {
        self.block.rows.len()
    }

    /// The keys that row `i` attends to, counted from the first one.
    fn of_row(&self, i: usize) -> Range<usize> {
        let position = self.block.position + i;
        (position + 1).saturating_sub(self.block.window) - self.keys.start..position + 1 - self.keys.start
    }

    /// The products of rows `a` with the keys as lines of `b`: `[rows, stride]`.
    fn products(&self, products: &Products, a: Part<'_>, first: usize, b: &product::Block, out: &mut [f32]) {
        let rows = first..first + self.rows();
        products.stream_portion(b, b.lines(self.keys.clone()), &[a], rows, |tile| tile.copy_to(out, self.stride));
    }

    /// Turns scores into e^(scale · (score − the row's highest)), and writes the inverse of each row's sum to `inverse`.
    fn softmax(&self, scale: f32, scores: &mut [f32], inverse: &mut [f32]) {
        simd!({
            for ((i, row), inverse) in scores.chunks_exact_mut(self.stride).enumerate().zip(inverse) {
                let keys = self.of_row(i);
                let (start, end) = (keys.start / STEP * STEP, keys.end.next_multiple_of(STEP));
                row[..start].fill(0.0);
                row[end..].fill(0.0);
                row[start..keys.start].fill(f32::NEG_INFINITY);
                row[keys.end..end].fill(f32::NEG_INFINITY);
                let (chunks, _) = row[start..end].as_chunks_mut::<STEP>();
                let mut highest = [f32::NEG_INFINITY; STEP];
                for chunk in &*chunks {
                    for (h, &s) in highest.iter_mut().zip(chunk) {
                        *h = if s > *h { s } else { *h };
                    }
                }
                let highest = scale * fold(highest, |a, b| if b > a { b } else { a });
                let mut total = [0.0; STEP];
                for chunk in chunks {
                    for (t, s) in total.iter_mut().zip(chunk) {
                        *s = exp(scale * *s - highest);
                        *t += *s;
                    }
                }
                *inverse = 1.0 / fold(total, |a, b| a + b);
            }
        });
    }
}

/// One head of `rows`, as an operand's part without orientation.
fn head<'x>(x: &'x Tensor, rows: &Range<usize>, head: usize, dim: usize) -> Part<'x> {
    // Empty if no row follows.
    let values = x.values().get(rows.start * x.cols() + head * dim..).unwrap_or_default();
    Part::activations(values, x.cols())
}

pub(super) fn forward(products: &Products, [q, k, v]: [&Tensor; 3], y: &mut Tensor, seqs: &Sequences, heads: &Heads) {
    let (dim, group, width) = (heads.dim, heads.queries / heads.keys, q.cols());
    let scale = 1.0 / (dim as f32).sqrt();
    let out = SharedSlice::new(y.values_mut());
    let mut tasks = Task::all(seqs, heads);
    tasks.retain(|task| !task.queries.is_empty()); // keys that nothing attends to
    tasks.into_par_iter().with_max_len(1).for_each(|task| {
        let all = task.keys.len();
        let k = products.block(Side::B, &[head(k, &task.keys, task.key_head, dim).by_rows(dim)], 0..all);
        let v = products.block(Side::B, &[head(v, &task.keys, task.key_head, dim).by_columns(all)], 0..dim);
        let (mut p, mut inverse) = (Scratch::take(0), Scratch::take(0));
        for h in task.key_head * group..(task.key_head + 1) * group {
            for scores in task.blocks(heads).map(Scores::of) {
                let (n, stride) = (scores.rows(), scores.stride);
                p.resize(n * stride);
                inverse.resize(n);
                let q = head(q, &task.queries, h, dim).by_rows(dim);
                scores.products(products, q, scores.block.rows.start, &k, &mut p);
                scores.softmax(scale, &mut p, &mut inverse);
                let first = (task.queries.start + scores.block.rows.start) * width + h * dim;
                let p = Part::activations(&p, stride).by_rows(scores.keys.len());
                products.stream_portion(&v, v.depth(scores.keys.clone()), &[p], 0..n, |tile| {
                    simd!({
                        for (i, row) in tile.a.clone().enumerate() {
                            // SAFETY: no other task writes this query head's columns of this sequence's rows.
                            let to = unsafe { out.slice(first + row * width + tile.b.start, tile.b.len()) };
                            for (to, y) in to.iter_mut().zip(tile.row(i)) {
                                *to = inverse[row] * y;
                            }
                        }
                    });
                });
            }
        }
    });
}

/// The gradients by q, k and v: see [`super::attention::backward`].
pub(super) fn backward(
    products: &Products,
    [dy, q, k, v, y]: [&Tensor; 5],
    [dq, dk, dv]: [&mut Tensor; 3],
    seqs: &Sequences,
    heads: &Heads,
) {
    let (dim, group) = (heads.dim, heads.queries / heads.keys);
    let (width, key_width) = (q.cols(), k.cols());
    let scale = 1.0 / (dim as f32).sqrt();
    let [out_q, out_k, out_v] = [dq, dk, dv].map(|out| SharedSlice::new(out.values_mut()));
    Task::all(seqs, heads).into_par_iter().with_max_len(1).for_each(|task| {
        let all = task.keys.len();
        let (k, v) = (head(k, &task.keys, task.key_head, dim), head(v, &task.keys, task.key_head, dim));
        let k_lines = products.block(Side::B, &[k.by_rows(dim)], 0..all);
        let k_depth = products.block(Side::B, &[k.by_columns(all)], 0..dim);
        let v_lines = products.block(Side::B, &[v.by_rows(dim)], 0..all);
        let (mut dk, mut dv) = (Scratch::take(all * dim), Scratch::take(all * dim));
        dk.fill(0.0);
        dv.fill(0.0);
        let [mut p, mut ds, mut inverse] = [(); 3].map(|()| Scratch::take(0));
        for h in task.key_head * group..(task.key_head + 1) * group {
            let (q, dy_part) = (head(q, &task.queries, h, dim), head(dy, &task.queries, h, dim));
            for scores in task.blocks(heads).map(Scores::of) {
                let (n, stride, first) = (scores.rows(), scores.stride, scores.block.rows.start);
                let keys = scores.keys.clone();
                p.resize(n * stride);
                ds.resize(n * stride);
                inverse.resize(n);
                scores.products(products, q.by_rows(dim), first, &k_lines, &mut p);
                scores.softmax(scale, &mut p, &mut inverse);
                scores.products(products, dy_part.by_rows(dim), first, &v_lines, &mut ds);
                simd!({
                    for (i, (p, ds)) in p.chunks_exact_mut(stride).zip(ds.chunks_exact_mut(stride)).enumerate() {
                        let (row, columns) = (task.queries.start + first + i, h * dim..(h + 1) * dim);
                        let delta = dot(&dy.row(row)[columns.clone()], &y.row(row)[columns]) as f32;
                        // Beyond the keys, where ds has no values, p is 0.
                        ds[keys.len()..].fill(0.0);
                        for (p, ds) in p.iter_mut().zip(ds) {
                            *p *= inverse[i];
                            *ds = *p * (*ds - delta) * scale;
                        }
                    }
                });
                let rows = scores.block.rows.clone();
                let (p, ds) = (Part::activations(&p, stride), Part::activations(&ds, stride));
                let dy_depth = products.block(Side::B, &[dy_part.skip_rows(first).by_columns(n)], 0..dim);
                let q_depth = products.block(Side::B, &[q.skip_rows(first).by_columns(n)], 0..dim);
                let at = keys.start * dim;
                products.stream(&dy_depth, &[p.by_columns(n)], 0..keys.len(), |tile| tile.add_to(&mut dv[at..], dim));
                products.stream(&q_depth, &[ds.by_columns(n)], 0..keys.len(), |tile| tile.add_to(&mut dk[at..], dim));
                let at = (task.queries.start + rows.start) * width + h * dim;
                products.stream_portion(
                    &k_depth,
                    k_depth.depth(keys.clone()),
                    &[ds.by_rows(keys.len())],
                    0..n,
                    |tile| {
                        // SAFETY: no other task writes this query head's columns of this sequence's rows.
                        unsafe { tile.copy_to_shared(&out_q, at, width) };
                    },
                );
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
}
