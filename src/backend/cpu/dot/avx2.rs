//! Two vectors of AVX2 have all lanes. 12 of the 16 registers hold sums.

use std::arch::x86_64::{
    __m256, _MM_HINT_T0, _mm_add_ps, _mm_loadu_si128, _mm_prefetch, _mm256_add_ps, _mm256_castps256_ps128,
    _mm256_castsi256_ps, _mm256_cvtepu16_epi32, _mm256_cvtph_ps, _mm256_extractf128_ps, _mm256_fmadd_ps,
    _mm256_loadu_ps, _mm256_setzero_ps, _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
};

use super::tile::{self, Lanes, Tile, Widened};
use super::{Kernel, OUTPUTS, Sums};

pub(super) const KERNEL: Kernel = Kernel { rows: 3, outputs: TILE_OUTPUTS, multiply };
const TILE_OUTPUTS: usize = 2;

pub(super) fn is_supported() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
}

fn multiply(tile: &Tile<'_>, sums: &mut [Sums]) {
    #[target_feature(enable = "avx2,fma,f16c")]
    fn multiply(tile: &Tile<'_>, sums: &mut [Sums]) {
        // SAFETY: this function is compiled for AVX2, FMA and F16C.
        unsafe { tile::multiply::<Pair, TILE_OUTPUTS>(tile, sums) }
    }
    // SAFETY: `Kernel::detect` takes this kernel where the processor has them.
    unsafe { multiply(tile, sums) }
}

#[derive(Clone, Copy)]
struct Pair(__m256, __m256);

impl Lanes for Pair {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as the trait says; so below.
        unsafe { Self(_mm256_setzero_ps(), _mm256_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: 64 bytes.
        unsafe { Self(_mm256_loadu_ps(from.cast()), _mm256_loadu_ps(from.add(32).cast())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        // SAFETY: as the trait says.
        unsafe { Self(_mm256_fmadd_ps(self.0, factor.0, sum.0), _mm256_fmadd_ps(self.1, factor.1, sum.1)) }
    }

    #[inline(always)]
    unsafe fn totals(of: [Self; OUTPUTS]) -> [f32; OUTPUTS] {
        // SAFETY: as the trait says.
        unsafe {
            // Groups 0 and 1, and groups 2 and 3.
            let [a, b, c, d] = of;
            let half = _mm256_add_ps(groups([a.0, b.0, c.0, d.0]), groups([a.1, b.1, c.1, d.1]));
            bytemuck::cast(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half)))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        // SAFETY: any address may be prefetched.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(line.cast()) };
    }
}

impl Widened for Pair {
    #[inline(always)]
    unsafe fn of_bf16(from: *const u8) -> Self {
        #[inline(always)]
        unsafe fn eight(from: *const u8) -> __m256 {
            // SAFETY: 16 bytes.
            unsafe {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            }
        }
        // SAFETY: 32 bytes.
        unsafe { Self(eight(from), eight(from.add(16))) }
    }

    #[inline(always)]
    unsafe fn of_f16(from: *const u8) -> Self {
        // SAFETY: 32 bytes.
        unsafe {
            Self(_mm256_cvtph_ps(_mm_loadu_si128(from.cast())), _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())))
        }
    }
}

/// The sums of the groups of four lanes of a, b, c and d.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
unsafe fn groups([a, b, c, d]: [__m256; OUTPUTS]) -> __m256 {
    // SAFETY: by the caller's guarantee.
    unsafe {
        let ab = _mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b));
        let cd = _mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
        _mm256_add_ps(_mm256_shuffle_ps::<0x44>(ab, cd), _mm256_shuffle_ps::<0xee>(ab, cd))
    }
}
