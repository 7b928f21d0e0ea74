//! The launchers: each operation checks shapes, allocates its results and queues kernels. One file per family of
//! operations, with the same names as in `backend/cpu`.

pub mod attention;
pub mod cross_entropy;
pub mod dispatch;
pub mod elements;
pub mod grouped;
pub mod kl;
pub mod linear;
pub mod norm;
pub mod norm_rope;
pub mod offload;
pub mod rope;
pub mod route;
pub mod rows;
pub mod statistics;
pub mod swiglu;
pub mod transfer;
pub mod update;

use super::gpu::Grid;
use crate::backend::Dtype;

/// One block per row of `cols` elements, with one thread per 16-byte load, in whole warps, at most 256.
fn row_grid(rows: usize, cols: usize, dtype: Dtype) -> Grid {
    let width = 16 / dtype.size();
    let loads = if cols.is_multiple_of(width) { cols / width } else { cols };
    Grid::row(rows, loads.next_multiple_of(32).clamp(32, 256) as u32)
}

/// Blocks of 256 threads for `n` elements, `each` per thread.
fn flat_grid(n: usize, each: usize) -> Grid {
    Grid::row(n.div_ceil(256 * each), 256)
}
