//! RMS norm (Zhang & Sennrich, arXiv 1910.07467) over groups of columns.

use rayon::prelude::*;

use super::Cpu;
use super::linear::add_row_sums;
use super::parallel::chunk_rows;
use super::simd::{dot, simd, sum2};
use super::tensor::Tensor;
use super::weight::Weight;

/// 1 / sqrt(mean(x²) + eps)
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    (1.0 / (dot(x, x) / x.len() as f64 + f64::from(eps)).sqrt()) as f32
}

fn check(x: &Tensor, w: &Weight) {
    let fits = !w.is_empty() && x.cols().is_multiple_of(w.len());
    assert!(fits, "the columns of x [{}, {}] are not a multiple of {}", x.rows(), x.cols(), w.len());
}

pub(super) fn rms_norm(cpu: &Cpu, x: &Tensor, w: &Weight, eps: f32) -> Tensor {
    check(x, w);
    let n = w.len();
    let w = w.read_all();
    let mut y = cpu.pool.take(x.rows(), x.cols());
    let chunk = chunk_rows(n) * n;
    y.values_mut().par_chunks_mut(chunk).zip(x.values().par_chunks(chunk)).for_each(|(y, x)| {
        simd!({
            for (y, x) in y.chunks_exact_mut(n).zip(x.chunks_exact(n)) {
                let r = inverse_rms(x, eps);
                for ((y, x), w) in y.iter_mut().zip(x).zip(&*w) {
                    *y = w * (x * r);
                }
            }
        });
    });
    y
}

/// With r = 1/rms(x) and x̂ = r·x: dx = r · (w·dy − x̂ · mean(w·dy·x̂)), dw = Σ dy · x̂.
pub(super) fn backward(
    cpu: &Cpu,
    dy: &Tensor,
    x: &Tensor,
    w: &Weight,
    eps: f32,
    dw: Option<(&mut [f32], usize)>,
) -> Tensor {
    check(x, w);
    dy.expect_shape("dy of the norm", x.rows(), x.cols());
    let n = w.len();
    let weights = w.read_all();
    let mut dx = cpu.pool.take(x.rows(), x.cols());
    let chunk = chunk_rows(n) * n;
    let (dys, xs) = (dy.values().par_chunks(chunk), x.values().par_chunks(chunk));
    dx.values_mut().par_chunks_mut(chunk).zip(dys.zip(xs)).for_each(|(dx, (dy, x))| {
        simd!({
            for ((dx, dy), x) in dx.chunks_exact_mut(n).zip(dy.chunks_exact(n)).zip(x.chunks_exact(n)) {
                let r = inverse_rms(x, eps);
                for ((dx, dy), w) in dx.iter_mut().zip(dy).zip(&*weights) {
                    *dx = w * dy;
                }
                let mean = sum2(dx, x, |g, x| g * (x * r)) / n as f64;
                let along = mean as f32 * r;
                for (dx, x) in dx.iter_mut().zip(x) {
                    *dx = r * (*dx - along * x);
                }
            }
        });
    });
    if let Some((dw, offset)) = dw {
        let groups = x.values().len() / n;
        add_row_sums(
            groups,
            &mut dw[offset..offset + n],
            #[inline(always)]
            |i, sums| {
                let (x, dy) = (&x.values()[i * n..(i + 1) * n], &dy.values()[i * n..(i + 1) * n]);
                let r = inverse_rms(x, eps);
                for ((s, dy), x) in sums.iter_mut().zip(dy).zip(x) {
                    *s += dy * (x * r);
                }
            },
        );
    }
    dx
}
