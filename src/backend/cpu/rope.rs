//! Rotary position embedding (Su et al., arXiv 2104.09864) in the half-split layout.

use rayon::prelude::*;

use super::parallel::chunk_rows;
use super::simd::simd;
use super::tensor::Tensor;
use crate::backend::{Packing, Rope};

/// Row offsets of packed sequences, with the rotary angles of their positions.
pub struct Sequences {
    pub(super) packing: Packing,
    /// cos of each query row's angles, times the rope's scale: `[T, half]`.
    cos: Vec<f32>,
    /// sin of the same angles, times the scale: `[T, half]`.
    sin: Vec<f32>,
    /// Pairs of a head: half of its width.
    half: usize,
}

impl Sequences {
    pub(super) fn new(packing: &Packing, rope: &Rope) -> Self {
        let ends = [&packing.queries, &packing.keys];
        let ordered = ends.iter().all(|ends| ends[0] == 0 && ends.is_sorted());
        assert!(ordered && packing.queries.len() == packing.keys.len(), "invalid row offsets: {packing:?}");
        let half = rope.inv_freq.len();
        // The angle is rounded to f32, as in the Hugging Face implementations; its cosine and sine are computed in f64.
        let angles: Vec<(f32, f32)> = packing
            .positions()
            .par_iter()
            .flat_map_iter(|&p| {
                rope.inv_freq.iter().map(move |f| {
                    let (sin, cos) = f64::from(p as f32 * f).sin_cos();
                    (cos as f32 * rope.scale, sin as f32 * rope.scale)
                })
            })
            .collect();
        let (cos, sin) = angles.into_iter().unzip();
        Self { packing: packing.clone(), cos, sin, half }
    }
}

/// Rotates each head of each row by the angles of its position. `direction` is 1, or -1 for the transposed rotation.
fn rotate(x: &mut Tensor, head_dim: usize, seqs: &Sequences, direction: f32) {
    let (rows, cols, half) = (x.rows(), x.cols(), seqs.half);
    assert!(head_dim == 2 * half, "heads of {head_dim}, rotations of {half} pairs");
    assert!(cols.is_multiple_of(head_dim), "{cols} columns are not heads of {head_dim}");
    assert!(rows == seqs.packing.rows(), "{rows} rows, sequences of {}", seqs.packing.rows());
    let step = chunk_rows(cols);
    x.values_mut().par_chunks_mut((step * cols).max(1)).enumerate().for_each(|(chunk, rows)| {
        simd!({
            for (i, row) in rows.chunks_exact_mut(cols).enumerate() {
                let at = (chunk * step + i) * half;
                let (cos, sin) = (&seqs.cos[at..at + half], &seqs.sin[at..at + half]);
                for head in row.chunks_exact_mut(head_dim) {
                    let (a, b) = head.split_at_mut(half);
                    for i in 0..half {
                        let s = direction * sin[i];
                        let (x, y) = (a[i], b[i]);
                        a[i] = x * cos[i] - y * s;
                        b[i] = y * cos[i] + x * s;
                    }
                }
            }
        });
    });
}

pub(super) fn rope(x: &mut Tensor, head_dim: usize, seqs: &Sequences) {
    rotate(x, head_dim, seqs, 1.0);
}

/// The transpose of a rotation times the scale is the opposite rotation times the scale.
pub(super) fn backward(dy: &mut Tensor, head_dim: usize, seqs: &Sequences) {
    rotate(dy, head_dim, seqs, -1.0);
}
