//! The innermost loop, for every instruction set.

use super::{Ahead, LANES, OUTPUTS, Sums};
use crate::backend::Dtype;

/// Most rows of x in a tile.
pub(super) const ROWS: usize = 6;

/// Some rows of x and of w over the same depth.
pub(super) struct Tile<'a> {
    /// Units `[steps][stride][LANES]`, padded with zeros to whole steps. The first `rows` rows of each step are multiplied.
    pub(super) x: &'a [f32],
    pub(super) stride: usize,
    pub(super) rows: usize,
    /// Each row of w as it is stored.
    pub(super) w: &'a [&'a [u8]],
    /// Of w, if units are f32.
    pub(super) dtype: Dtype,
    /// Whether the sums begin here. Otherwise they are added to.
    pub(super) begins: bool,
    pub(super) ahead: Ahead,
}

/// [`LANES`] units in registers, or as many sums in f32. A unit has 32 bits: one f32, or a pair of bf16 values.
///
/// All functions may only be called where the processor has their instructions, and are inlined into one that is compiled with them.
pub(super) trait Lanes: Copy {
    unsafe fn zero() -> Self;
    /// Units as they are stored, from 64 bytes.
    unsafe fn load(from: *const u8) -> Self;
    /// The products of the values of self and factor, added to the sums.
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self;
    /// Of each, the sum of its lanes: in each group of four (lane 0 + lane 2) + (lane 1 + lane 3), and so the groups.
    unsafe fn totals(of: [Self; OUTPUTS]) -> [f32; OUTPUTS];
    /// Asks for a cache line, if there is such an instruction.
    unsafe fn prefetch(line: *const u8);
}

/// Lanes of f32 units, which can be made of 16-bit values.
pub(super) trait Widened: Lanes {
    /// From 32 bytes.
    unsafe fn of_bf16(from: *const u8) -> Self;
    /// From 32 bytes.
    unsafe fn of_f16(from: *const u8) -> Self;
}

/// How units of w are stored.
trait Stored<V> {
    /// Bytes of a unit.
    const SIZE: usize;
    /// # Safety
    /// As for [`Lanes`]; `from` has [`LANES`] units.
    unsafe fn load(from: *const u8) -> V;
}

struct Unit;
struct Bf16;
struct F16;

impl<V: Lanes> Stored<V> for Unit {
    const SIZE: usize = 4;
    #[inline(always)]
    unsafe fn load(from: *const u8) -> V {
        // SAFETY: by the caller's guarantee.
        unsafe { V::load(from) }
    }
}

impl<V: Widened> Stored<V> for Bf16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load(from: *const u8) -> V {
        // SAFETY: by the caller's guarantee.
        unsafe { V::of_bf16(from) }
    }
}

impl<V: Widened> Stored<V> for F16 {
    const SIZE: usize = 2;
    #[inline(always)]
    unsafe fn load(from: *const u8) -> V {
        // SAFETY: by the caller's guarantee.
        unsafe { V::of_f16(from) }
    }
}

/// The sums of a tile with `N` rows of w, or with one, for each row of x.
///
/// # Safety
/// The processor has the instructions of V.
#[inline(always)]
pub(super) unsafe fn multiply<V: Widened, const N: usize>(tile: &Tile<'_>, sums: &mut [Sums]) {
    // SAFETY: by the caller's guarantee.
    unsafe {
        match tile.dtype {
            Dtype::F32 => of_units::<V, N>(tile, sums),
            Dtype::Bf16 => of_dtype::<V, Bf16, N>(tile, sums),
            Dtype::F16 => of_dtype::<V, F16, N>(tile, sums),
        }
    }
}

/// As [`multiply`], where w is stored as the units that are multiplied.
///
/// # Safety
/// The processor has the instructions of V.
#[inline(always)]
pub(super) unsafe fn of_units<V: Lanes, const N: usize>(tile: &Tile<'_>, sums: &mut [Sums]) {
    // SAFETY: by the caller's guarantee.
    unsafe { of_dtype::<V, Unit, N>(tile, sums) }
}

#[inline(always)]
unsafe fn of_dtype<V: Lanes, W: Stored<V>, const N: usize>(tile: &Tile<'_>, sums: &mut [Sums]) {
    // SAFETY: by the caller's guarantee.
    unsafe {
        match (tile.rows, tile.w.len()) {
            (1, 1) => of_shape::<V, W, 1, 1>(tile, sums),
            (2, 1) => of_shape::<V, W, 2, 1>(tile, sums),
            (3, 1) => of_shape::<V, W, 3, 1>(tile, sums),
            (4, 1) => of_shape::<V, W, 4, 1>(tile, sums),
            (5, 1) => of_shape::<V, W, 5, 1>(tile, sums),
            (6, 1) => of_shape::<V, W, 6, 1>(tile, sums),
            (1, _) => of_shape::<V, W, 1, N>(tile, sums),
            (2, _) => of_shape::<V, W, 2, N>(tile, sums),
            (3, _) => of_shape::<V, W, 3, N>(tile, sums),
            (4, _) => of_shape::<V, W, 4, N>(tile, sums),
            (5, _) => of_shape::<V, W, 5, N>(tile, sums),
            (6, _) => of_shape::<V, W, 6, N>(tile, sums),
            (rows, _) => unreachable!("{rows} rows of {ROWS}"),
        }
    }
}

#[inline(always)]
unsafe fn of_shape<V: Lanes, W: Stored<V>, const M: usize, const N: usize>(tile: &Tile<'_>, sums: &mut [Sums]) {
    let step_bytes = LANES * W::SIZE;
    let bytes = tile.w[0].len();
    let fits = tile.w.len() == N && tile.w.iter().all(|row| row.len() == bytes);
    let steps = bytes.div_ceil(step_bytes);
    let needed = if steps > 0 { ((steps - 1) * tile.stride + M) * LANES } else { 0 };
    assert!(fits && sums.len() == M && tile.x.len() >= needed, "{} of x, {bytes} bytes of w", tile.x.len());
    let whole = bytes / step_bytes;
    // SAFETY: the processor has the instructions by the caller's guarantee. Step i reads M · LANES units of x and LANES of each row of
    // w, which are inside their slices by the assertion; the last one reads w from `padded`. A prefetch may have any address.
    unsafe {
        let mut lanes = [[V::zero(); N]; M];
        let mut rows = [std::ptr::null(); N];
        for (row, w) in rows.iter_mut().zip(tile.w) {
            *row = w.as_ptr();
        }
        let mut x = tile.x.as_ptr();
        let mut ahead = tile.ahead.start;
        for _ in 0..whole {
            for line in 0..tile.ahead.lines {
                V::prefetch(ahead.wrapping_add(Ahead::LINE * line));
            }
            ahead = ahead.wrapping_add(Ahead::LINE * tile.ahead.lines);
            step::<V, W, M, N>(&mut lanes, x, &rows);
            x = x.add(tile.stride * LANES);
            for row in &mut rows {
                *row = row.add(step_bytes);
            }
        }
        if bytes > whole * step_bytes {
            let mut padded = [[0u8; 4 * LANES]; N];
            for ((padded, row), w) in padded.iter_mut().zip(&mut rows).zip(tile.w) {
                padded[..bytes - whole * step_bytes].copy_from_slice(&w[whole * step_bytes..]);
                *row = padded.as_ptr();
            }
            step::<V, W, M, N>(&mut lanes, x, &rows);
        }
        for (sums, lanes) in sums.iter_mut().zip(lanes) {
            let mut of = [V::zero(); OUTPUTS];
            of[..N].copy_from_slice(&lanes);
            let more = V::totals(of);
            for (sum, more) in sums.iter_mut().zip(more) {
                *sum = if tile.begins { more } else { *sum + more };
            }
        }
    }
}

/// Adds the products of [`LANES`] units of each row of x and of each row of w.
///
/// # Safety
/// As for [`Lanes`]; x has `M` · [`LANES`] units, each row [`LANES`].
#[inline(always)]
unsafe fn step<V: Lanes, W: Stored<V>, const M: usize, const N: usize>(
    lanes: &mut [[V; N]; M],
    x: *const f32,
    rows: &[*const u8; N],
) {
    // SAFETY: by the caller's guarantee.
    unsafe {
        let mut w = [V::zero(); N];
        for (w, row) in w.iter_mut().zip(rows) {
            *w = W::load(*row);
        }
        for (i, lanes) in lanes.iter_mut().enumerate() {
            let x = V::load(x.add(i * LANES).cast());
            for (sum, w) in lanes.iter_mut().zip(w) {
                *sum = x.multiply_add(w, *sum);
            }
        }
    }
}
