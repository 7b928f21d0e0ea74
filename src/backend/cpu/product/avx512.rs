//! The kernels for AVX-512: 12 lines by 2 vectors of sums, 24 of the 32 registers.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_fmadd_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_shuffle_i32x4, _mm512_storeu_ps, _mm512_unpackhi_epi32,
    _mm512_unpackhi_epi64, _mm512_unpacklo_epi32, _mm512_unpacklo_epi64,
};

use super::instructions::Instructions;
use super::shape::{BLOCK, Shape};

const LANES: usize = 16;
const A: usize = Shape::of(Instructions::Avx512).a;
const B: usize = Shape::of(Instructions::Avx512).b;
const VECTORS: usize = B / LANES;
const _: () = assert!(Shape::of(Instructions::Avx512Bf16).a == A && Shape::of(Instructions::Avx512Bf16).b == B);

/// Implements a kernel; `$step` is `(sum, a, b) -> sum` on vectors of units.
macro_rules! kernel {
    ($name:ident, $features:literal, $step:expr) => {
        #[target_feature(enable = $features)]
        fn $name(a: &[u32], b: &[u32], c: &mut [f32], accumulate: bool) {
            let (c, _) = c.as_chunks_mut::<LANES>();
            let mut sums = [[_mm512_setzero_ps(); VECTORS]; A];
            if accumulate {
                for (sum, c) in sums.as_flattened_mut().iter_mut().zip(&*c) {
                    // SAFETY: c has 16 elements.
                    *sum = unsafe { _mm512_loadu_ps(c.as_ptr()) };
                }
            }
            for (a, b) in a.as_chunks::<{ A * BLOCK }>().0.iter().zip(b.as_chunks::<{ B * BLOCK }>().0) {
                for (u, b) in b.as_chunks::<B>().0.iter().enumerate() {
                    let b: [__m512; VECTORS] = std::array::from_fn(|v| {
                        // SAFETY: b has 16 elements a vector.
                        unsafe { _mm512_loadu_ps(b.as_ptr().add(v * LANES).cast()) }
                    });
                    for (line, sums) in sums.iter_mut().enumerate() {
                        let a = _mm512_set1_ps(f32::from_bits(a[line * BLOCK + u]));
                        for (sum, b) in sums.iter_mut().zip(b) {
                            *sum = $step(*sum, a, b);
                        }
                    }
                }
            }
            for (sum, c) in sums.as_flattened().iter().zip(c) {
                // SAFETY: c has 16 elements.
                unsafe { _mm512_storeu_ps(c.as_mut_ptr(), *sum) };
            }
        }
    };
}

kernel!(fma, "avx512f", |sum, a, b| _mm512_fmadd_ps(a, b, sum));
kernel!(dot_pairs, "avx512f,avx512bf16", |sum, a: __m512, b: __m512| _mm512_dpbf16_ps(sum, pairs(a), pairs(b)));

#[inline]
#[target_feature(enable = "avx512f")]
fn pairs(units: __m512) -> __m512bh {
    // SAFETY: both are 64 bytes, and all bit patterns are valid.
    unsafe { std::mem::transmute::<__m512, __m512bh>(units) }
}

/// Units of one f32.
pub(super) fn multiply(a: &[u32], b: &[u32], c: &mut [f32], accumulate: bool) {
    // SAFETY: `Products::new` refuses these instructions where they do not exist.
    unsafe { fma(a, b, c, accumulate) }
}

/// Units of two bf16.
pub(super) fn multiply_pairs(a: &[u32], b: &[u32], c: &mut [f32], accumulate: bool) {
    // SAFETY: `Products::new` refuses these instructions where they do not exist.
    unsafe { dot_pairs(a, b, c, accumulate) }
}

/// The transpose of 16 by 16 units.
pub(super) fn transpose(block: &[[u32; 16]; 16]) -> [[u32; 16]; 16] {
    #[target_feature(enable = "avx512f")]
    fn of_memory(block: &[[u32; 16]; 16]) -> [[u32; 16]; 16] {
        let mut rows = [_mm512_setzero_si512(); 16];
        for (row, block) in rows.iter_mut().zip(block) {
            // SAFETY: 16 units.
            *row = unsafe { _mm512_loadu_si512(block.as_ptr().cast()) };
        }
        // SAFETY: both types are 16 vectors of 64 bytes, and all bit patterns are valid.
        unsafe { std::mem::transmute::<[__m512i; 16], [[u32; 16]; 16]>(transposed(&rows)) }
    }
    // SAFETY: `Products::new` refuses all instructions that come with it where AVX-512 does not exist.
    unsafe { of_memory(block) }
}

/// The transpose of 16 by 16 units. Pairs, then quadruples of rows are interleaved within 128-bit lanes; then the lanes are
/// transposed.
#[inline]
#[target_feature(enable = "avx512f")]
pub(super) fn transposed(rows: &[__m512i; 16]) -> [__m512i; 16] {
    // quads[g][j]: lane L has rows 4g to 4g + 3 of column 4L + j.
    let mut quads = [[_mm512_setzero_si512(); 4]; 4];
    for (quad, rows) in quads.iter_mut().zip(rows.as_chunks::<4>().0) {
        let (a, b) = (_mm512_unpacklo_epi32(rows[0], rows[1]), _mm512_unpackhi_epi32(rows[0], rows[1]));
        let (c, d) = (_mm512_unpacklo_epi32(rows[2], rows[3]), _mm512_unpackhi_epi32(rows[2], rows[3]));
        *quad = [
            _mm512_unpacklo_epi64(a, c),
            _mm512_unpackhi_epi64(a, c),
            _mm512_unpacklo_epi64(b, d),
            _mm512_unpackhi_epi64(b, d),
        ];
    }
    let mut columns = [_mm512_setzero_si512(); 16];
    for j in 0..4 {
        let (a, b, c, d) = (quads[0][j], quads[1][j], quads[2][j], quads[3][j]);
        let even = [_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0x88>(c, d)];
        let odd = [_mm512_shuffle_i32x4::<0xdd>(a, b), _mm512_shuffle_i32x4::<0xdd>(c, d)];
        columns[j] = _mm512_shuffle_i32x4::<0x88>(even[0], even[1]);
        columns[4 + j] = _mm512_shuffle_i32x4::<0x88>(odd[0], odd[1]);
        columns[8 + j] = _mm512_shuffle_i32x4::<0xdd>(even[0], even[1]);
        columns[12 + j] = _mm512_shuffle_i32x4::<0xdd>(odd[0], odd[1]);
    }
    columns
}
