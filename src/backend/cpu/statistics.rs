//! Sums over rows for router statistics, in f64 and in a fixed order.

use std::ops::Range;

use rayon::prelude::*;

use super::parallel::Scratch;
use super::route::softmax_backward;
use super::simd::{axpy, simd, softmax};
use super::tensor::Tensor;

/// Rows per partial sum.
const ROWS: usize = 64;

/// Calls `add(row, sums)` for each of `rows` to accumulate `cols` sums. Chunks of [`ROWS`] rows make partial sums in
/// parallel, which are then added in order. `add` runs inside [`simd!`].
fn row_sums(rows: Range<usize>, cols: usize, add: impl Fn(usize, &mut [f64]) + Sync) -> Vec<f64> {
    let partial: Vec<Vec<f64>> = (0..rows.len().div_ceil(ROWS))
        .into_par_iter()
        .map(|chunk| {
            let start = rows.start + chunk * ROWS;
            let mut sums = vec![0.0; cols];
            simd!({
                for row in start..rows.end.min(start + ROWS) {
                    add(row, &mut sums);
                }
            });
            sums
        })
        .collect();
    let mut total = vec![0.0; cols];
    for sums in &partial {
        total.iter_mut().zip(sums).for_each(|(t, s)| *t += s);
    }
    total
}

#[inline(always)]
fn add_row(sums: &mut [f64], row: &[f32]) {
    for (s, x) in sums.iter_mut().zip(row) {
        *s += f64::from(*x);
    }
}

pub(super) fn softmax_sum(logits: &Tensor, rows: Range<usize>) -> Vec<f64> {
    row_sums(
        rows,
        logits.cols(),
        #[inline(always)]
        |row, sums| {
            let mut p = Scratch::take(logits.cols());
            softmax(logits.row(row), &mut p);
            add_row(sums, &p);
        },
    )
}

pub(super) fn softmax_sum_backward(dy: &[f32], logits: &Tensor, rows: Range<usize>, dlogits: &mut Tensor) {
    let e = logits.cols();
    assert!(dy.len() == e, "dy of {} for {e} experts", dy.len());
    dlogits.expect_shape("dlogits", logits.rows(), e);
    let range = rows.start * e..rows.end * e;
    let inputs = logits.values()[range.clone()].par_chunks(e);
    dlogits.values_mut()[range].par_chunks_mut(e).zip(inputs).with_min_len(ROWS).for_each(|(dlogits, logits)| {
        let mut p = Scratch::take(e);
        let mut grad = Scratch::take(e);
        simd!({
            softmax(logits, &mut p);
            grad.copy_from_slice(dy);
            softmax_backward(&p, &mut grad);
            axpy(dlogits, 1.0, &grad);
        });
    });
}

pub(super) fn segment_sum(x: &Tensor, segments: &[Range<usize>]) -> Vec<f64> {
    let sum = |rows: &Range<usize>| {
        row_sums(
            rows.clone(),
            x.cols(),
            #[inline(always)]
            |row, sums| add_row(sums, x.row(row)),
        )
    };
    segments.par_iter().flat_map_iter(sum).collect()
}

pub(super) fn segment_sum_backward(dy: &[f32], segments: &[Range<usize>], dx: &mut Tensor) {
    let d = dx.cols();
    assert!(dy.len() == segments.len() * d, "dy of {} for {} segments of {d} columns", dy.len(), segments.len());
    // Sequentially, because segments may overlap.
    for (rows, dy) in segments.iter().zip(dy.chunks_exact(d.max(1))) {
        let rows = &mut dx.values_mut()[rows.start * d..rows.end * d];
        rows.par_chunks_mut(d).with_min_len(ROWS).for_each(|row| simd!(axpy(row, 1.0, dy)));
    }
}
