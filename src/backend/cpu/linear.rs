//! Dense layers, y = x · wᵀ + b: grouped products (`grouped.rs`) with a single group.

use rayon::prelude::*;

use super::Cpu;
use super::grouped;
use super::groups::{RowGroup, Sink, WeightGrad};
use super::parallel::chunk_rows;
use super::product::Products;
use super::simd::{axpy, simd};
use super::tensor::Tensor;
use super::weight::Weight;

pub(super) fn linear(cpu: &Cpu, x: &Tensor, w: &Weight, bias: Option<&Weight>) -> Tensor {
    let mut y = product(cpu, cpu.products(), x, w);
    if let Some(bias) = bias {
        let n = y.cols();
        assert!(bias.len() == n, "a bias of {} for {n} outputs", bias.len());
        let bias = bias.read_all();
        y.values_mut().par_chunks_mut((chunk_rows(n) * n).max(1)).for_each(|rows| {
            simd!({
                for row in rows.chunks_exact_mut(n) {
                    axpy(row, 1.0, &bias);
                }
            });
        });
    }
    y
}

/// y = x · wᵀ in f32, whatever the precision of other products.
pub(super) fn linear_f32(cpu: &Cpu, x: &Tensor, w: &Weight) -> Tensor {
    product(cpu, None, x, w)
}

fn product(cpu: &Cpu, products: Option<&Products>, x: &Tensor, w: &Weight) -> Tensor {
    let mut y = cpu.pool.take(x.rows(), w.rows());
    grouped::forward(products, x, &[RowGroup { rows: 0..x.rows(), stack: &[w] }], &mut y);
    y
}

pub(super) fn backward_input(cpu: &Cpu, dy: &Tensor, w: &Weight) -> Tensor {
    let mut dx = cpu.pool.take(dy.rows(), w.cols());
    grouped::backward_input(cpu.products(), dy, &[RowGroup { rows: 0..dy.rows(), stack: &[w] }], &mut dx);
    dx
}

pub(super) fn backward_weight(cpu: &Cpu, dy: &Tensor, x: &Tensor, dw: &mut [f32], offset: usize) {
    assert!(dy.rows() == x.rows(), "dy has {} rows, x {}", dy.rows(), x.rows());
    let job = WeightGrad { rows: 0..x.rows(), out: 0..dy.cols(), sink: Sink::Add(offset) };
    grouped::backward_weight(cpu.products(), dy, x, &[job], dw, &mut []);
}

/// db += column sums of dy, in the fixed order of [`add_row_sums`].
pub(super) fn bias_backward(dy: &Tensor, db: &mut [f32], offset: usize) {
    add_row_sums(
        dy.rows(),
        &mut db[offset..offset + dy.cols()],
        #[inline(always)]
        |row, sums| axpy(sums, 1.0, dy.row(row)),
    );
}

/// Calls `add(row, sums)` for each row to accumulate sums, and adds them to `into`. Fixed chunks of rows make partial
/// sums in parallel, which are added in order. `add` runs inside [`simd!`] and must be `#[inline(always)]`.
pub(super) fn add_row_sums(rows: usize, into: &mut [f32], add: impl Fn(usize, &mut [f32]) + Sync) {
    const ROWS: usize = 64;
    let partial: Vec<Vec<f32>> = (0..rows.div_ceil(ROWS))
        .into_par_iter()
        .map(|chunk| {
            let mut sums = vec![0.0; into.len()];
            simd!({
                for row in chunk * ROWS..rows.min((chunk + 1) * ROWS) {
                    add(row, &mut sums);
                }
            });
            sums
        })
        .collect();
    for sums in &partial {
        axpy(into, 1.0, sums);
    }
}
