//! y = x · wᵀ in f32: every element of y is the dot product of a row of x and a row of w.
//!
//! The lanes of a SIMD vector lie along the depth. So w is read once, as the checkpoint stores it, row after row and in any dtype:
//! nothing is transposed, and no weight is converted in memory. The rows of x are copied into panels, from which a tile of the
//! kernel takes one vector of each row after the other.
//!
//! Every element is summed in the same order, whatever the shape of the product and the instruction set: in each [`SLAB`] of the
//! depth [`LANES`] partial sums with fused multiply-adds, which are then added as [`tile::Lanes::totals`] says, slab after slab. So a
//! token's logits have the same bits in every batch.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;
mod tile;

use std::ops::Range;

use self::tile::Tile;
use super::gemm::{Matrix, MatrixMut, TileSize};
use super::parallel::Scratch;
use super::product::Caches;
use super::weight::Weight;
use crate::backend::Dtype;

/// Partial sums of a dot product: one of AVX-512's vectors, two of AVX2's.
const LANES: usize = 16;
/// Depth that is summed into the same partial sums: in units, f32 values or pairs of bf16 values. The rows of w in a tile take at most
/// 16 KiB of the L1 cache; each panel of x passes by them.
const SLAB: usize = 1024;

/// The smallest efficient size of a product: packing x takes little of its time.
pub(super) const SMALLEST: TileSize = TileSize { rows: 128, cols: 64 };

/// Most rows of w in a tile.
pub(super) const OUTPUTS: usize = 4;

/// The dot products of a row of x with the rows of w in a tile.
type Sums = [f32; OUTPUTS];

/// How an instruction set computes [`Tile`]s.
#[derive(Clone, Copy)]
struct Kernel {
    /// Rows of x in a panel.
    rows: usize,
    /// Rows of w in a tile. The last ones come one at a time.
    outputs: usize,
    multiply: fn(&Tile<'_>, &mut [Sums]),
}

impl Kernel {
    /// That of this processor's widest instructions.
    fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        if avx512::is_supported() {
            return avx512::KERNEL;
        } else if avx2::is_supported() {
            return avx2::KERNEL;
        }
        portable::KERNEL
    }
}

/// y = x · w[out]ᵀ for row-major x `[m, k]`, w `[N, k]`, y `[m, out.len()]`.
pub(super) fn product(y: MatrixMut<'_>, x: Matrix<'_>, w: &Weight, out: Range<usize>) {
    product_by(Kernel::detect(), Caches::detect(), y, x, w, out);
}

fn product_by(kernel: Kernel, caches: Caches, mut y: MatrixMut<'_>, x: Matrix<'_>, w: &Weight, out: Range<usize>) {
    let (m, k, n) = (x.rows(), x.cols(), out.len());
    assert!(w.cols() == k && y.shape() == (m, n), "x [{m}, {k}], w [{n}, {}], y {:?}", w.cols(), y.shape());
    let row_bytes = k * w.dtype().size();
    let bytes = &w.bytes()[out.start * row_bytes..out.end * row_bytes];
    let w = Rows { bytes, count: n, row_bytes, unit: w.dtype().size(), dtype: w.dtype() };
    let most = rows_at_a_time(caches, k);
    for start in (0..m).step_by(most) {
        let rows = start..m.min(start + most);
        // Panels of nearly equal height.
        let height = rows.len().div_ceil(rows.len().div_ceil(kernel.rows));
        let units = pack(x, rows.clone(), height);
        multiply(kernel, Panels { units: &units, height, rows: rows.len() }, w, |outputs, sums| {
            for (row, sums) in (start..).zip(sums) {
                copy(&sums[..outputs.len()], &mut y.row_mut(row)[outputs.clone()]);
            }
        });
    }
}

/// Whether [`product_of_pairs`] can run on this processor.
pub(super) fn has_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    return avx512::has_pairs();
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// The dot products of rows of x, packed as pairs of bf16 values, with the rows of w, stored as `depth` bf16 values each: by `vdpbf16ps`
/// in the order of f32 products, where a unit is a pair. `take` gets rows of x, rows of w, and their products.
///
/// # Panics
/// The processor lacks the instruction: see [`has_pairs`].
pub(super) fn product_of_pairs(
    x: Panels<'_>,
    w: &[u8],
    depth: usize,
    caches: Caches,
    mut take: impl FnMut(Range<usize>, Range<usize>, &[Sums]),
) {
    assert!(has_pairs(), "this processor has no AVX-512 BF16");
    assert!(depth > 0 && x.height > 0 && x.height <= 4 * tile::ROWS, "panels of {} rows, depth {depth}", x.height);
    let row_bytes = Dtype::Bf16.size() * depth;
    let count = w.len() / row_bytes;
    let w = Rows { bytes: w, count, row_bytes, unit: 2 * Dtype::Bf16.size(), dtype: Dtype::F32 };
    let most = rows_at_a_time(caches, depth.div_ceil(2)) / x.height * x.height;
    for start in (0..x.rows).step_by(most) {
        let rows = start..x.rows.min(start + most);
        #[cfg(target_arch = "x86_64")]
        multiply(avx512::PAIRS, x.some(rows.clone()), w, |outputs, sums| take(rows.clone(), outputs, sums));
    }
}

/// Copies the sums of a row.
#[inline(always)]
fn copy(sums: &[f32], to: &mut [f32]) {
    // Of a length that the compiler knows, if all are there: a call of memcpy takes longer than the copy.
    match (sums.first_chunk::<{ OUTPUTS }>(), to.first_chunk_mut()) {
        (Some(sums), Some(to)) => *to = *sums,
        _ => to.copy_from_slice(sums),
    }
}

/// Rows of x of so many units whose panels take at most half of the L2 cache, while w passes by. Not fewer than a few tiles, so that w
/// is not read too often.
fn rows_at_a_time(caches: Caches, units: usize) -> usize {
    (caches.l2 / 2 / (4 * units.max(1))).clamp(4 * tile::ROWS, 20 * tile::ROWS)
}

/// Rows of w: all that are multiplied, one after another.
#[derive(Clone, Copy)]
struct Rows<'a> {
    bytes: &'a [u8],
    count: usize,
    row_bytes: usize,
    /// Bytes of a unit.
    unit: usize,
    dtype: Dtype,
}

impl<'a> Rows<'a> {
    /// The units in `depth` of a row.
    fn part(self, row: usize, depth: &Range<usize>) -> &'a [u8] {
        let at = row * self.row_bytes;
        &self.bytes[at + self.unit * depth.start..at + (self.unit * depth.end).min(self.row_bytes)]
    }
}

/// Rows of x as units `[panel][step][row of the panel][LANES]`, padded to whole panels, and with zeros to whole steps.
#[derive(Clone, Copy)]
pub(super) struct Panels<'a> {
    pub(super) units: &'a [f32],
    /// Rows of a panel.
    pub(super) height: usize,
    pub(super) rows: usize,
}

impl<'a> Panels<'a> {
    /// Steps of each row.
    fn steps(self) -> usize {
        self.units.len() / (self.rows.next_multiple_of(self.height) * LANES).max(1)
    }

    /// The rows of each tile: of nearly equal number, at most `most`, none of two panels.
    fn tiles(self, most: usize) -> impl Iterator<Item = Range<usize>> {
        (0..self.rows).step_by(self.height).flat_map(move |start| {
            let rows = self.height.min(self.rows - start);
            let tiles = rows.div_ceil(most);
            (0..tiles).map(move |i| start + rows * i / tiles..start + rows * (i + 1) / tiles)
        })
    }

    /// Some of the rows, from the start of a panel on.
    fn some(self, rows: Range<usize>) -> Self {
        let at = |row: usize| row.next_multiple_of(self.height) * self.steps() * LANES;
        Self { units: &self.units[at(rows.start)..at(rows.end)], rows: rows.len(), ..self }
    }

    /// Some steps of a panel, from its row `first` on.
    fn part(self, first: usize, steps: &Range<usize>) -> &'a [f32] {
        let panel = first / self.height * self.height * self.steps();
        let at = |step: usize| (panel + step * self.height) * LANES;
        &self.units[at(steps.start) + first % self.height * LANES..at(steps.end)]
    }
}

/// The panels of some rows of x.
fn pack(x: Matrix<'_>, rows: Range<usize>, height: usize) -> Scratch {
    let steps = x.cols().div_ceil(LANES);
    let mut values = Scratch::take(rows.len().next_multiple_of(height) * steps * LANES);
    for (panel, start) in values.chunks_mut((height * steps * LANES).max(1)).zip(rows.clone().step_by(height)) {
        for i in 0..height {
            // Rows that are missing are never read.
            let Some(row) = (start + i < rows.end).then(|| x.row(start + i)) else { break };
            for (to, from) in panel[LANES * i..].chunks_mut(LANES).step_by(height).zip(row.chunks(LANES)) {
                match from.first_chunk::<LANES>() {
                    Some(from) => to.copy_from_slice(from),
                    None => {
                        to[..from.len()].copy_from_slice(from);
                        to[from.len()..].fill(0.0);
                    }
                }
            }
        }
    }
    values
}

/// Multiplies the panels with each row of w. `take` gets rows of w, and their products with each row of x.
fn multiply(kernel: Kernel, panels: Panels<'_>, w: Rows<'_>, mut take: impl FnMut(Range<usize>, &[Sums])) {
    const STEPS: usize = SLAB / LANES;
    let tiles: Vec<_> = panels.tiles(kernel.rows).collect();
    let steps = panels.steps();
    let mut sums = vec![Sums::default(); panels.rows];
    let mut first = 0;
    while first < w.count {
        let outputs = if w.count - first < kernel.outputs { 1 } else { kernel.outputs };
        // While these rows are multiplied, the same number of following ones is prefetched.
        let next = w.bytes.as_ptr().wrapping_add((first + outputs) * w.row_bytes);
        let (mut done, all) = (0, tiles.len() * steps);
        for slab in (0..steps.max(1)).step_by(STEPS).map(|at| at..steps.min(at + STEPS)) {
            let mut rows: [&[u8]; OUTPUTS] = [&[]; OUTPUTS];
            for (j, row) in rows[..outputs].iter_mut().enumerate() {
                *row = w.part(first + j, &(LANES * slab.start..LANES * slab.end));
            }
            let rows = &rows[..outputs];
            for of_x in &tiles {
                let tile = Tile {
                    x: panels.part(of_x.start, &slab),
                    stride: panels.height,
                    rows: of_x.len(),
                    w: rows,
                    dtype: w.dtype,
                    begins: slab.start == 0,
                    ahead: Ahead::of(next, outputs * w.row_bytes, done, all),
                };
                (kernel.multiply)(&tile, &mut sums[of_x.clone()]);
                done += slab.len();
            }
        }
        take(first..first + outputs, &sums);
        first += outputs;
    }
}

/// Memory that a tile asks for, so that it is in the L2 cache when it is needed.
#[derive(Clone, Copy)]
struct Ahead {
    start: *const u8,
    /// Cache lines in each step.
    lines: usize,
}

impl Ahead {
    /// Bytes of a cache line.
    const LINE: usize = 64;

    /// The part of `bytes` bytes from `next` on that falls to a tile whose first step is step `done` of `all`, if every step asks for
    /// as many cache lines.
    fn of(next: *const u8, bytes: usize, done: usize, all: usize) -> Self {
        let lines = bytes.div_ceil(Self::LINE * all.max(1));
        let at = Self::LINE * lines * done;
        Self { start: next.wrapping_add(at), lines: if at < bytes { lines } else { 0 } }
    }
}

#[cfg(test)]
mod tests;
