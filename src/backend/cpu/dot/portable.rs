//! For every processor. On ARM, the compiler makes NEON instructions of it.

use half::{bf16, f16};

use super::tile::{self, Lanes, Tile, Widened};
use super::{Kernel, LANES, OUTPUTS, Sums};

pub(super) const KERNEL: Kernel = Kernel { rows: 2, outputs: TILE_OUTPUTS, multiply };
const TILE_OUTPUTS: usize = 2;

fn multiply(tile: &Tile<'_>, sums: &mut [Sums]) {
    // SAFETY: no special instructions.
    unsafe { tile::multiply::<[f32; LANES], TILE_OUTPUTS>(tile, sums) }
}

/// # Safety
/// `from` has `LANES` values of `SIZE` bytes.
#[inline(always)]
unsafe fn load<const SIZE: usize>(from: *const u8, value: impl Fn([u8; SIZE]) -> f32) -> [f32; LANES] {
    // SAFETY: by the caller's guarantee; arrays of bytes have no alignment.
    unsafe { from.cast::<[[u8; SIZE]; LANES]>().read() }.map(value)
}

impl Lanes for [f32; LANES] {
    #[inline(always)]
    unsafe fn zero() -> Self {
        [0.0; LANES]
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: 64 bytes.
        unsafe { load(from, f32::from_le_bytes) }
    }

    /// Correctly rounded by a function of the C library where there is no such instruction, as on x86 processors before 2013.
    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        std::array::from_fn(|i| self[i].mul_add(factor[i], sum[i]))
    }

    #[inline(always)]
    unsafe fn totals(of: [Self; OUTPUTS]) -> [f32; OUTPUTS] {
        let four = |x: [f32; 4]| (x[0] + x[2]) + (x[1] + x[3]);
        of.map(|lanes| four(std::array::from_fn(|group| four(std::array::from_fn(|i| lanes[4 * group + i])))))
    }

    #[inline(always)]
    unsafe fn prefetch(_: *const u8) {}
}

impl Widened for [f32; LANES] {
    #[inline(always)]
    unsafe fn of_bf16(from: *const u8) -> Self {
        // SAFETY: 32 bytes.
        unsafe { load(from, |x| bf16::from_le_bytes(x).to_f32()) }
    }

    #[inline(always)]
    unsafe fn of_f16(from: *const u8) -> Self {
        // SAFETY: 32 bytes.
        unsafe { load(from, |x| f16::from_le_bytes(x).to_f32()) }
    }
}
