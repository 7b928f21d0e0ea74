//! Embedding lookup, and gathering and writing rows of activations by index.

use rayon::prelude::*;

use super::Cpu;
use super::parallel::{SharedSlice, chunk_rows};
use super::simd::{axpy, simd};
use super::tensor::Tensor;
use super::weight::Weight;

pub(super) fn embedding(cpu: &Cpu, ids: &[u32], w: &Weight) -> Tensor {
    let d = w.cols();
    let mut y = cpu.pool.take(ids.len(), d);
    y.values_mut().par_chunks_mut(d).zip(ids).with_min_len(chunk_rows(d)).for_each(|(row, &id)| {
        assert!((id as usize) < w.rows(), "token id {id} in a vocabulary of {}", w.rows());
        w.read_into(id as usize * d, row);
    });
    y
}

/// Each row of dw accumulates its tokens' gradients in token order.
pub(super) fn backward(dy: &Tensor, ids: &[u32], dw: &mut [f32]) {
    dy.expect_shape("dy of the embedding", ids.len(), dy.cols());
    scatter_add(dy, ids, dw);
}

pub(super) fn gather_rows(cpu: &Cpu, x: &Tensor, rows: &[u32]) -> Tensor {
    let d = x.cols();
    let mut y = cpu.pool.take(rows.len(), d);
    y.values_mut()
        .par_chunks_mut(d)
        .zip(rows)
        .with_min_len(chunk_rows(d))
        .for_each(|(row, &from)| row.copy_from_slice(x.row(from as usize)));
    y
}

pub(super) fn gather_rows_backward(dy: &Tensor, rows: &[u32], dx: &mut Tensor) {
    dy.expect_shape("dy of gathered rows", rows.len(), dx.cols());
    scatter_add(dy, rows, dx.values_mut());
}

/// `x[rows[i]] = y[i]`, for distinct rows.
pub(super) fn write_rows(x: &mut Tensor, rows: &[u32], y: &Tensor) {
    let d = x.cols();
    y.expect_shape("y of written rows", rows.len(), d);
    for (i, &row) in rows.iter().enumerate() {
        x.values_mut()[row as usize * d..][..d].copy_from_slice(y.row(i));
    }
}

/// `into[rows[i]] += dy[i]`. A stable sort makes each target row one task, which adds in ascending order of i.
fn scatter_add(dy: &Tensor, rows: &[u32], into: &mut [f32]) {
    let d = dy.cols();
    let mut order: Vec<usize> = (0..rows.len()).collect();
    order.sort_by_key(|&i| rows[i]);
    let into = SharedSlice::new(into);
    let same_row: Vec<&[usize]> = order.chunk_by(|&a, &b| rows[a] == rows[b]).collect();
    same_row.into_par_iter().with_min_len(chunk_rows(d)).for_each(|same| {
        // SAFETY: each target row is in only one element of `same_row`.
        let row = unsafe { into.slice(rows[same[0]] as usize * d, d) };
        simd!({
            for &i in same {
                axpy(row, 1.0, dy.row(i));
            }
        });
    });
}
