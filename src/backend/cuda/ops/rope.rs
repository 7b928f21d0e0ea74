//! Rotary position embedding.

use super::row_grid;
use crate::backend::cuda::kernels::{Typed, typed};
use crate::backend::cuda::{Cuda, Sequences, Tensor};

const ROPE: Typed = typed!(ROPE, "rope");

/// Rotates each head of each row by its position's angles, in place; `direction` is 1, or -1 for the transpose.
pub fn rotate(cuda: &Cuda, x: &mut Tensor, head_dim: usize, seqs: &Sequences, direction: f32) {
    let half = seqs.angles.rope.inv_freq.len();
    assert!(head_dim == 2 * half, "heads of {head_dim}, rotations of {half} pairs");
    assert!(x.cols().is_multiple_of(head_dim), "{} columns are not heads of {head_dim}", x.cols());
    assert!(x.rows() == seqs.packing.rows(), "{} rows, sequences of {}", x.rows(), seqs.packing.rows());
    let heads = x.cols() / head_dim;
    let args = [
        x.address().into(),
        seqs.positions.address().into(),
        seqs.angles.cos.address().into(),
        seqs.angles.sin.address().into(),
        (heads as u32).into(),
        (half as u32).into(),
        direction.into(),
    ];
    cuda.launch(ROPE.of(x.dtype()), row_grid(x.rows(), x.cols() / 2, x.dtype()), &args);
}
