//! One vector of AVX-512 has all lanes. 24 of the 32 registers hold sums. AVX-512VL is needed for the upper 16
//! registers in code that also uses shorter vectors.

use std::arch::x86_64::{
    __m512, __m512bh, _MM_HINT_T1, _mm_add_ps, _mm_prefetch, _mm256_add_ps, _mm256_castpd_ps, _mm256_castps256_ps128,
    _mm256_extractf128_ps, _mm256_loadu_si256, _mm512_add_ps, _mm512_castps_pd, _mm512_castps512_ps256,
    _mm512_castsi512_ps, _mm512_cvtepu16_epi32, _mm512_cvtph_ps, _mm512_dpbf16_ps, _mm512_extractf64x4_pd,
    _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_setzero_ps, _mm512_shuffle_ps, _mm512_slli_epi32, _mm512_unpackhi_ps,
    _mm512_unpacklo_ps,
};

use super::tile::{self, Lanes, Tile, Widened};
use super::{Kernel, OUTPUTS, Sums};

pub(super) const KERNEL: Kernel = Kernel { rows: 6, outputs: OUTPUTS, multiply };

pub(super) fn is_supported() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vl")
}

fn multiply(tile: &Tile<'_>, sums: &mut [Sums]) {
    #[target_feature(enable = "avx512f,avx512vl")]
    fn multiply(tile: &Tile<'_>, sums: &mut [Sums]) {
        // SAFETY: this function is compiled for them.
        unsafe { tile::multiply::<__m512, OUTPUTS>(tile, sums) }
    }
    // SAFETY: `Kernel::detect` takes this kernel where the processor has both.
    unsafe { multiply(tile, sums) }
}

impl Lanes for __m512 {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as the trait says; so below.
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: 64 bytes.
        unsafe { _mm512_loadu_ps(from.cast()) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        // SAFETY: as the trait says.
        unsafe { _mm512_fmadd_ps(self, factor, sum) }
    }

    #[inline(always)]
    unsafe fn totals(of: [Self; OUTPUTS]) -> [f32; OUTPUTS] {
        // SAFETY: as the trait says.
        unsafe {
            let [a, b, c, d] = of;
            // Lanes 0 + 2 and 1 + 3 of each group of a and b, in turns, and of c and d.
            let ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
            let cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
            // The groups' sums of a, b, c and d.
            let groups = _mm512_add_ps(_mm512_shuffle_ps::<0x44>(ab, cd), _mm512_shuffle_ps::<0xee>(ab, cd));
            let upper = _mm256_castpd_ps(_mm512_extractf64x4_pd::<1>(_mm512_castps_pd(groups)));
            let half = _mm256_add_ps(_mm512_castps512_ps256(groups), upper);
            bytemuck::cast(_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps::<1>(half)))
        }
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        // SAFETY: any address may be prefetched.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(line.cast()) };
    }
}

impl Widened for __m512 {
    #[inline(always)]
    unsafe fn of_bf16(from: *const u8) -> Self {
        // SAFETY: 32 bytes.
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    unsafe fn of_f16(from: *const u8) -> Self {
        // SAFETY: 32 bytes.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }
}

/// Pairs of bf16 values, multiplied by `vdpbf16ps`.
#[derive(Clone, Copy)]
struct Pairs(__m512);

pub(super) const PAIRS: Kernel = Kernel { rows: 6, outputs: OUTPUTS, multiply: multiply_pairs };

fn multiply_pairs(tile: &Tile<'_>, sums: &mut [Sums]) {
    #[target_feature(enable = "avx512f,avx512vl,avx512bf16")]
    fn multiply(tile: &Tile<'_>, sums: &mut [Sums]) {
        // SAFETY: this function is compiled for them.
        unsafe { tile::of_units::<Pairs, OUTPUTS>(tile, sums) }
    }
    // SAFETY: `product_of_pairs` asserts that the processor has them.
    unsafe { multiply(tile, sums) }
}

pub(super) fn has_pairs() -> bool {
    is_supported() && is_x86_feature_detected!("avx512bf16")
}

impl Lanes for Pairs {
    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: as the trait says; so below.
        unsafe { Self(_mm512_setzero_ps()) }
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Self {
        // SAFETY: 64 bytes.
        unsafe { Self(_mm512_loadu_ps(from.cast())) }
    }

    #[inline(always)]
    unsafe fn multiply_add(self, factor: Self, sum: Self) -> Self {
        // SAFETY: as the trait says; the types of vectors have 64 bytes, and all bit patterns are valid.
        unsafe {
            let a = std::mem::transmute::<__m512, __m512bh>(self.0);
            let b = std::mem::transmute::<__m512, __m512bh>(factor.0);
            Self(_mm512_dpbf16_ps(sum.0, a, b))
        }
    }

    #[inline(always)]
    unsafe fn totals(of: [Self; OUTPUTS]) -> [f32; OUTPUTS] {
        let [a, b, c, d] = of;
        // SAFETY: as the trait says.
        unsafe { __m512::totals([a.0, b.0, c.0, d.0]) }
    }

    #[inline(always)]
    unsafe fn prefetch(line: *const u8) {
        // SAFETY: as the trait says.
        unsafe { __m512::prefetch(line) };
    }
}
