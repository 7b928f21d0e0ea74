//! RMS norm and rotary position embedding of queries or keys, in one pass where the norm is that of a head.

use super::elements::weight_in;
use super::{flat_grid, norm, rope};
use crate::backend::Dtype;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::{Buffer, Cuda, Sequences, Tensor, Weight, kernels};

/// A call of norm_rope.cu.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Heads {
    heads: u32,
    heads_per_row: u32,
    half: u32,
    /// Threads of a head.
    lanes: usize,
}

impl Heads {
    /// `None` unless a group of `n` columns is one head, whose halves are a power of two of 16-byte loads, at most a warp together.
    fn of(rows: usize, cols: usize, n: usize, head_dim: usize, dtype: Dtype) -> Option<Self> {
        let (half, width) = (head_dim / 2, 16 / dtype.size());
        let lanes = half / width;
        let fits = n == head_dim && head_dim.is_multiple_of(2 * width) && lanes.is_power_of_two() && lanes <= 16;
        let heads = u32::try_from(rows * cols / n).ok().filter(|heads| heads.checked_mul(lanes as u32).is_some())?;
        (fits && heads > 0).then(|| Self { heads, heads_per_row: (cols / n) as u32, half: half as u32, lanes })
    }

    fn checked(x: &Tensor, w: &Weight, head_dim: usize, seqs: &Sequences) -> Option<Self> {
        let half = seqs.angles.rope.inv_freq.len();
        assert!(head_dim == 2 * half, "heads of {head_dim}, rotations of {half} pairs");
        let fits = !w.is_empty() && x.cols().is_multiple_of(w.len()) && x.cols().is_multiple_of(head_dim);
        assert!(fits, "{} columns, norms over {}, heads of {head_dim}", x.cols(), w.len());
        assert!(x.rows() == seqs.packing.rows(), "{} rows, sequences of {}", x.rows(), seqs.packing.rows());
        Self::of(x.rows(), x.cols(), w.len(), head_dim, x.dtype())
    }

    fn grid(&self) -> Grid {
        flat_grid(self.heads as usize * self.lanes, 1)
    }
}

/// The norm of each group of x, then the rotation of each head.
pub fn forward(cuda: &Cuda, x: &Tensor, w: &Weight, eps: f32, head_dim: usize, seqs: &Sequences) -> Tensor {
    let Some(h) = Heads::checked(x, w, head_dim, seqs) else {
        let mut y = norm::rms_norm(cuda, x, w, eps);
        rope::rotate(cuda, &mut y, head_dim, seqs, 1.0);
        return y;
    };
    let w = weight_in(cuda, w, x.dtype());
    let mut y = cuda.tensor(x.rows(), x.cols(), x.dtype());
    kernels::rms_norm_rope(
        cuda,
        h.grid(),
        x.input(),
        w.input(),
        y.output(),
        eps,
        seqs.positions.input(),
        seqs.angles.cos.input(),
        seqs.angles.sin.input(),
        h.heads,
        h.heads_per_row,
        h.half,
    );
    y
}

/// dx of [`forward`]; adds to `dw` if it is given.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    cuda: &Cuda,
    mut dy: Tensor,
    x: &Tensor,
    w: &Weight,
    eps: f32,
    head_dim: usize,
    seqs: &Sequences,
    dw: Option<(&mut Buffer, usize)>,
) -> Tensor {
    // dw wants the gradient behind the norm as a tensor.
    let Some(h) = Heads::checked(x, w, head_dim, seqs).filter(|_| dw.is_none()) else {
        rope::rotate(cuda, &mut dy, head_dim, seqs, -1.0);
        return norm::backward(cuda, &dy, x, w, eps, dw);
    };
    dy.expect_shape("dy of the norm", x.rows(), x.cols());
    let w = weight_in(cuda, w, x.dtype());
    let mut dx = cuda.tensor(x.rows(), x.cols(), x.dtype());
    kernels::rms_norm_rope_backward(
        cuda,
        h.grid(),
        dy.input(),
        x.input(),
        w.input(),
        dx.output(),
        eps,
        seqs.positions.input(),
        seqs.angles.cos.input(),
        seqs.angles.sin.input(),
        h.heads,
        h.heads_per_row,
        h.half,
    );
    dx
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_pass_is_for_heads_of_a_power_of_two() {
        let lanes =
            |cols, n, dim, dtype| Heads::of(3, cols, n, dim, dtype).map(|h| (h.heads, h.heads_per_row, h.lanes));
        assert_eq!(lanes(4096, 128, 128, Dtype::Bf16), Some((96, 32, 8)));
        assert_eq!(lanes(128, 128, 128, Dtype::F32), Some((3, 1, 16)));
        assert_eq!(lanes(32, 16, 16, Dtype::Bf16), Some((6, 2, 1)));
        assert_eq!(lanes(2048, 2048, 128, Dtype::Bf16), None, "a norm over several heads");
        assert_eq!(lanes(96, 96, 96, Dtype::Bf16), None, "six loads");
        assert_eq!(lanes(256, 256, 256, Dtype::F32), None, "two warps");
        assert_eq!(lanes(8, 8, 8, Dtype::Bf16), None, "half a load");
        assert_eq!(Heads::of(0, 128, 128, 128, Dtype::Bf16), None, "no rows");
    }
}
