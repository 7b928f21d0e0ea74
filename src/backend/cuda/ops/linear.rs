//! Dense layers: y = x · wᵀ + b.

use super::{flat_grid, row_grid};
use crate::backend::Dtype;
use crate::backend::cuda::gpu::{Address, Gemm, Grid, Operand};
use crate::backend::cuda::launch::{Any, In, InOut, OrNull};
use crate::backend::cuda::ops::elements::{add_assign, cast, in_dtype, weight_in};
use crate::backend::cuda::{Buffer, Cuda, Tensor, Weight, kernels};

/// An operand of a product: a stored matrix, or its transpose.
pub fn operand(at: Address, stride: usize, transposed: bool) -> Operand {
    Operand { at, stride, transposed }
}

/// x · wᵀ (+ bias), in x's number format or in F32.
pub fn linear(cuda: &Cuda, x: &Tensor, w: &Weight, bias: Option<&Weight>, dtype: Dtype) -> Tensor {
    let (m, n, k) = (x.rows(), w.rows(), w.cols());
    x.expect_shape("x of a dense layer", m, k);
    let w = weight_in(cuda, w, x.dtype());
    let mut y = cuda.tensor(m, n, dtype);
    if let Some(bias) = bias {
        assert!(bias.len() == n, "a bias of {} for {n} outputs", bias.len());
        // The product adds to y (beta 1), so that the sum is rounded once.
        let bias = weight_in(cuda, bias, dtype);
        kernels::repeat_row(cuda, row_grid(m, n, dtype), bias.input(), y.output(), n);
    }
    cuda.gemm(&Gemm {
        m,
        n,
        k,
        a: operand(x.address(), k, false),
        b: operand(w.address(), k, true),
        dtype: x.dtype(),
        c: y.address(),
        c_stride: n,
        c_dtype: dtype,
        alpha: 1.0,
        beta: if bias.is_some() { 1.0 } else { 0.0 },
    });
    y
}

/// dx = dy · w in the compute format.
pub fn backward_input(cuda: &Cuda, dy: &Tensor, w: &Weight) -> Tensor {
    let mut dx = cuda.tensor(dy.rows(), w.cols(), cuda.compute());
    input_gradient(cuda, dy, w, &mut dx, 0.0);
    dx
}

/// dx += dy · w. The sum is rounded once.
pub fn add_backward_input(cuda: &Cuda, dy: &Tensor, w: &Weight, dx: &mut Tensor) {
    dx.expect_shape("dx of a dense layer", dy.rows(), w.cols());
    input_gradient(cuda, dy, w, dx, 1.0);
}

/// dx = dy · w + beta · dx. An F32 dy (of router logits) beside activations and weights in BF16 is split into two BF16
/// numbers, `[high | low] · [w; w]`: the rest of 2^-17 of dy is far below the rounding of dx, and the product runs on tensor
/// cores.
fn input_gradient(cuda: &Cuda, dy: &Tensor, w: &Weight, dx: &mut Tensor, beta: f32) {
    let (m, n, k) = (dy.rows(), w.cols(), w.rows());
    dy.expect_shape("dy of a dense layer", m, k);
    let product = |dy: Address, w: Address, k: usize, dtype: Dtype, dx: &mut Tensor, beta: f32| {
        let (a, b) = (operand(dy, k, false), operand(w, n, false));
        let (c, c_dtype) = (dx.address(), dx.dtype());
        cuda.gemm(&Gemm { m, n, k, a, b, dtype, c, c_stride: n, c_dtype, alpha: 1.0, beta });
    };
    if dy.dtype() == Dtype::F32 && dx.dtype() == Dtype::Bf16 && w.dtype() == Dtype::Bf16 {
        let mut halves = cuda.tensor(m, 2 * k, Dtype::Bf16);
        kernels::split_f32(cuda, flat_grid(m * k, 1), dy.input().of(), halves.output().of(), k, m * k);
        let twice = cuda.scratch(2 * w.len() * Dtype::Bf16.size());
        let bytes = w.len() * Dtype::Bf16.size();
        for half in 0..2 {
            cuda.copy(w.address(), twice.address().offset(half * bytes), bytes);
        }
        product(halves.address(), twice.address(), 2 * k, Dtype::Bf16, dx, beta);
        return;
    }
    let w = weight_in(cuda, w, dy.dtype());
    if dy.dtype() == dx.dtype() {
        product(dy.address(), w.address(), k, dy.dtype(), dx, beta);
        return;
    }
    let mut exact = cuda.tensor(m, n, dy.dtype());
    product(dy.address(), w.address(), k, dy.dtype(), &mut exact, 0.0);
    if beta == 0.0 {
        cast(cuda, exact.input(), dx.output(), m * n);
    } else {
        add_assign(cuda, dx, &exact);
    }
}

/// dw += dyᵀ · x. If dy or x is F32, the product is computed in F32.
pub fn backward_weight(cuda: &Cuda, dy: &Tensor, x: &Tensor, dw: &mut Buffer, offset: usize) {
    assert!(dy.rows() == x.rows(), "dy has {} rows, x {}", dy.rows(), x.rows());
    let (m, n, k) = (dy.cols(), x.cols(), dy.rows());
    let dtype = if dy.dtype() == x.dtype() { dy.dtype() } else { Dtype::F32 };
    let (dy, x) = (in_dtype(cuda, dy, dtype), in_dtype(cuda, x, dtype));
    let (a, b) = (operand(dy.address(), m, true), operand(x.address(), n, false));
    let (c, beta) = dw.sum(offset, m * n);
    cuda.gemm(&Gemm { m, n, k, a, b, dtype, c, c_stride: n, c_dtype: Dtype::F32, alpha: 1.0, beta });
}

/// db += column sums of dy.
pub fn bias_backward(cuda: &Cuda, dy: &Tensor, db: &mut Buffer, offset: usize) {
    let n = dy.cols();
    add_column_sums(cuda, dy, None, dy.rows(), n, db.inout(offset, n));
}

/// How [`add_column_sums`] divides its rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Parts {
    /// Parts per block: with few columns, the threads of a block are divided among several parts.
    lanes: usize,
    /// Rows per part.
    chunk: usize,
    blocks: usize,
}

fn parts(rows: usize, cols: usize, dtype: Dtype) -> Parts {
    let width = 16 / dtype.size();
    let loads = if cols.is_multiple_of(width) { cols / width } else { cols };
    let lanes = 256 / loads.next_power_of_two().clamp(1, 256);
    // Short parts keep all multiprocessors busy; long parts give few partial sums.
    let chunk = rows.div_ceil(lanes * 1024).clamp(16, 256);
    Parts { lanes, chunk, blocks: rows.div_ceil(lanes * chunk) }
}

/// `into[c] += Σ over rows of dy[row, c]`, or of `dy[row, c] · x[row, c] · r[row]`; dy and x are read as `[rows,
/// cols]`.
pub fn add_column_sums(
    cuda: &Cuda,
    dy: &Tensor,
    x: Option<(In<'_, Any>, In<'_, f32>)>,
    rows: usize,
    cols: usize,
    into: InOut<'_, f32>,
) {
    let Parts { lanes, chunk, blocks } = parts(rows, cols, dy.dtype());
    let mut partial = cuda.array::<f32>(blocks * lanes * cols);
    let (x, r) = x.map_or((OrNull::null(dy.dtype()), OrNull::null(())), |(x, r)| (x.into(), r.into()));
    let (grid, sums) = (Grid::row(blocks, 256), partial.output());
    kernels::column_sums(cuda, grid, dy.input(), x, r, sums, rows, cols, lanes as u32, chunk as u32);
    let grid = Grid::row(cols.div_ceil(32), 256);
    kernels::add_partials(cuda, grid, into, partial.input(), blocks * lanes, cols);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_rows_are_covered_and_all_threads_have_work() {
        for (rows, cols) in [(1, 1), (0, 5), (4096, 2048), (131_072, 128), (70, 4097), (1 << 20, 64)] {
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let p = parts(rows, cols, dtype);
                assert!(p.blocks * p.lanes * p.chunk >= rows && (1..=256).contains(&p.lanes), "{p:?}");
                assert!(rows == 0 || (p.blocks - 1) * p.lanes * p.chunk < rows, "{p:?} has an idle block");
            }
        }
        assert_eq!(parts(4096, 2048, Dtype::Bf16), Parts { lanes: 1, chunk: 16, blocks: 256 });
        assert_eq!(parts(131_072, 128, Dtype::Bf16), Parts { lanes: 16, chunk: 16, blocks: 512 });
    }
}
