//! Rotary position embedding.

use super::row_grid;
use crate::backend::cuda::{Cuda, Sequences, Tensor, kernels};

/// Rotates each head of each row by the angles of the row's position, in place. `direction` is 1, or -1 for the
/// transpose.
pub fn rotate(cuda: &Cuda, x: &mut Tensor, head_dim: usize, seqs: &Sequences, direction: f32) {
    let half = seqs.angles.rope.inv_freq.len();
    assert!(head_dim == 2 * half, "heads of {head_dim}, rotations of {half} pairs");
    assert!(x.cols().is_multiple_of(head_dim), "{} columns are not heads of {head_dim}", x.cols());
    assert!(x.rows() == seqs.packing.rows(), "{} rows, sequences of {}", x.rows(), seqs.packing.rows());
    let (grid, heads) = (row_grid(x.rows(), x.cols() / 2, x.dtype()), x.cols() / head_dim);
    let (positions, cosines, sines) = (seqs.positions.input(), seqs.angles.cos.input(), seqs.angles.sin.input());
    kernels::rope(cuda, grid, x.inout(), positions, cosines, sines, heads as u32, half as u32, direction);
}
