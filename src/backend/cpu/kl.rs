//! KL divergence of distributions given by logits: of a linear head against another head, in chunks of rows, and of a
//! router against given logits.
//!
//! The logits are f32, everything behind them is f64: a divergence is a small difference of large sums.

use std::ops::Range;

use rayon::prelude::*;

use super::Cpu;
use super::linear;
use super::simd::{exp_f64, max, simd, sum2_f64};
use super::tensor::Tensor;
use super::weight::Weight;

/// Bytes of the logits of a chunk of rows, the base's included.
const BUDGET: usize = 64 << 20;

/// Rows of a chunk for `v` classes: few enough for the budget, enough that each product reads the head for many rows.
fn chunk_rows(v: usize) -> usize {
    (BUDGET / (8 * v).max(1)).clamp(16, 512)
}

/// ln Σ e^logit.
fn log_sum(row: &[f32]) -> f64 {
    simd!({
        let highest = f64::from(max(row));
        highest
            + sum2_f64(
                row,
                row,
                #[inline(always)]
                |l, _| exp_f64(l - highest),
            )
            .ln()
    })
}

/// ln Σ e^logit of a row, and of the base's row.
#[derive(Clone, Copy)]
struct LogSums {
    own: f64,
    base: f64,
}

impl LogSums {
    fn of(logits: &[f32], base: &[f32]) -> Self {
        Self { own: log_sum(logits), base: log_sum(base) }
    }

    /// KL(softmax(base) ‖ softmax(logits)).
    fn divergence(self, logits: &[f32], base: &[f32]) -> f64 {
        let kl = simd!(sum2_f64(
            logits,
            base,
            #[inline(always)]
            |l, b| {
                let (log_p, log_base) = (l - self.own, b - self.base);
                let p = exp_f64(log_base);
                // An impossible class may have an infinite difference.
                if p == 0.0 { 0.0 } else { p * (log_base - log_p) }
            },
        ));
        if kl < 0.0 { 0.0 } else { kl } // rounding may make a divergence of 0 negative; NaN stays NaN
    }

    /// The gradient of `scale` times the divergence by one logit: scale · (p − p₀).
    #[inline(always)]
    fn gradient(self, logit: f32, base: f32, scale: f32) -> f32 {
        let (p, p_base) = (exp_f64(f64::from(logit) - self.own), exp_f64(f64::from(base) - self.base));
        (f64::from(scale) * (p - p_base)) as f32
    }
}

/// The first of the largest.
fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, &l)| if l > best.1 { (i, l) } else { best }).0
}

fn rows_of(cpu: &Cpu, x: &Tensor, rows: Range<usize>) -> Tensor {
    let mut out = cpu.pool.take(rows.len(), x.cols());
    out.values_mut().copy_from_slice(&x.values()[rows.start * x.cols()..rows.end * x.cols()]);
    out
}

fn check(x: &Tensor, w: &Weight, base_x: &Tensor, base_w: &Weight) {
    for (x, w) in [(x, w), (base_x, base_w)] {
        assert!(x.cols() == w.cols(), "x [{}, {}], head [{}, {}]", x.rows(), x.cols(), w.rows(), w.cols());
    }
    assert!(x.rows() == base_x.rows(), "{} rows, {} of the base", x.rows(), base_x.rows());
    assert!(w.rows() == base_w.rows(), "{} classes, {} of the base", w.rows(), base_w.rows());
}

/// Calls `chunk(rows, x of these rows, logits, logits of the base)` for all rows in order.
fn chunks(
    cpu: &Cpu,
    [x, base_x]: [&Tensor; 2],
    [w, base_w]: [&Weight; 2],
    mut chunk: impl FnMut(Range<usize>, &Tensor, &mut Tensor, &Tensor),
) {
    check(x, w, base_x, base_w);
    let (n, step) = (x.rows(), chunk_rows(w.rows()));
    for start in (0..n).step_by(step) {
        let rows = start..n.min(start + step);
        let part = rows_of(cpu, x, rows.clone());
        let mut logits = linear::linear(cpu, &part, w, None);
        let base = linear::linear(cpu, &rows_of(cpu, base_x, rows.clone()), base_w, None);
        chunk(rows, &part, &mut logits, &base);
    }
}

/// Σ KL(p₀ ‖ p), and the number of rows with the same most probable class.
pub(super) fn forward(cpu: &Cpu, x: [&Tensor; 2], w: [&Weight; 2]) -> (f64, usize) {
    let (mut sum, mut same) = (0.0, 0);
    chunks(cpu, x, w, |rows, _, logits, base| {
        let found: Vec<(f64, bool)> = (0..rows.len())
            .into_par_iter()
            .map(|row| {
                let (l, b) = (logits.row(row), base.row(row));
                (LogSums::of(l, b).divergence(l, b), argmax(l) == argmax(b))
            })
            .collect();
        sum += found.iter().map(|f| f.0).sum::<f64>();
        same += found.iter().filter(|f| f.1).count();
    });
    (sum, same)
}

/// The same sum, and the gradient of `scale` times the sum by x; adds that by w to `dw` at its offset.
pub(super) fn backward(
    cpu: &Cpu,
    x: [&Tensor; 2],
    w: [&Weight; 2],
    scale: f32,
    mut dw: Option<(&mut [f32], usize)>,
) -> (f64, Tensor) {
    let (d, v) = (x[0].cols(), w[0].rows());
    let mut dx = cpu.pool.take(x[0].rows(), d);
    let mut sum = 0.0;
    chunks(cpu, x, w, |rows, part, logits, base| {
        let found: Vec<f64> = logits
            .values_mut()
            .par_chunks_mut(v)
            .enumerate()
            .map(|(row, logits)| {
                let base = base.row(row);
                let sums = LogSums::of(logits, base);
                let kl = sums.divergence(logits, base);
                simd!({
                    for (l, &b) in logits.iter_mut().zip(base) {
                        *l = sums.gradient(*l, b, scale);
                    }
                });
                kl
            })
            .collect();
        sum += found.iter().sum::<f64>();
        let part_dx = linear::backward_input(cpu, logits, w[0]);
        dx.values_mut()[rows.start * d..rows.end * d].copy_from_slice(part_dx.values());
        if let Some((dw, offset)) = &mut dw {
            linear::backward_weight(cpu, logits, part, dw, *offset);
        }
    });
    (sum, dx)
}

/// Σ over rows of KL(softmax(base) ‖ softmax(logits)).
pub(super) fn softmax(logits: &Tensor, base: &[f32]) -> f64 {
    let e = logits.cols();
    assert!(base.len() == logits.rows() * e, "{} base logits for [{}, {e}]", base.len(), logits.rows());
    let rows: Vec<f64> = (0..logits.rows())
        .into_par_iter()
        .with_min_len(16)
        .map(|row| {
            let (l, b) = (logits.row(row), &base[row * e..][..e]);
            LogSums::of(l, b).divergence(l, b)
        })
        .collect();
    rows.iter().sum()
}

/// dlogits += the gradient of `scale` times [`softmax`].
pub(super) fn softmax_backward(base: &[f32], logits: &Tensor, scale: f32, dlogits: &mut Tensor) {
    let e = logits.cols();
    assert!(base.len() == logits.rows() * e, "{} base logits for [{}, {e}]", base.len(), logits.rows());
    dlogits.expect_shape("dlogits", logits.rows(), e);
    dlogits.values_mut().par_chunks_mut(e).enumerate().with_min_len(16).for_each(|(row, dlogits)| {
        let (logits, base) = (logits.row(row), &base[row * e..][..e]);
        let sums = LogSums::of(logits, base);
        simd!({
            for ((d, &l), &b) in dlogits.iter_mut().zip(logits).zip(base) {
                *d += sums.gradient(l, b, scale);
            }
        });
    });
}
