//! Sixteen outputs at a time: a block of sixteen rows of w takes a whole cache line of each row, and reads it once.

use std::arch::x86_64::{
    __m512, __m512i, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtepi32_epi16, _mm512_cvtph_ps,
    _mm512_fmadd_ps, _mm512_loadu_si512, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setzero_ps, _mm512_setzero_si512,
    _mm512_slli_epi32, _mm512_srli_epi32, _mm512_storeu_ps,
};

use super::super::gemm::{Matrix, MatrixMut, depth_blocks};
use super::super::product::transposed_16x16;
use super::elements;
use crate::backend::Dtype;

/// Outputs computed at a time.
pub(super) const LANES: usize = 16;

/// As [`super::product`], for w in the number format `dtype`.
#[target_feature(enable = "avx512f")]
pub(super) fn product(y: MatrixMut<'_>, x: Matrix<'_>, w: &[u8], dtype: Dtype) {
    match dtype {
        Dtype::F32 => of_words::<4>(y, x, w, |words, _| _mm512_castsi512_ps(words)),
        Dtype::Bf16 => of_words::<2>(y, x, w, |words, upper| {
            let upper_half = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            _mm512_castsi512_ps(match upper {
                0 => _mm512_slli_epi32::<16>(words),
                _ => _mm512_and_si512(words, upper_half),
            })
        }),
        Dtype::F16 => of_words::<2>(y, x, w, |words, upper| {
            let words = if upper == 0 { words } else { _mm512_srli_epi32::<16>(words) };
            _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words))
        }),
    }
}

/// With elements of w of `SIZE` bytes. `value` converts one of each word: it gets words of sixteen rows, and which element is meant.
#[target_feature(enable = "avx512f")]
fn of_words<const SIZE: usize>(
    mut y: MatrixMut<'_>,
    x: Matrix<'_>,
    w: &[u8],
    value: impl Fn(__m512i, usize) -> __m512 + Copy,
) {
    let (m, n) = y.shape();
    let row_bytes = w.len() / n;
    for first in (0..n).step_by(LANES) {
        // The last block overlaps the one before if the outputs are not whole blocks.
        let first = first.min(n - LANES);
        let rows: [&[u8]; LANES] = std::array::from_fn(|i| &w[(first + i) * row_bytes..][..row_bytes]);
        macro_rules! sums {
            ($($rows:literal)*) => {
                match m {
                    $($rows => {
                        let x_rows: [&[f32]; $rows] = std::array::from_fn(|i| x.row(i));
                        for (i, sums) in block::<$rows, SIZE>(x_rows, rows, value).iter().enumerate() {
                            y.row_mut(i)[first..first + LANES].copy_from_slice(sums);
                        }
                    })*
                    _ => unreachable!("more rows do not suit"),
                }
            };
        }
        sums!(1 2 3 4 5 6 7 8);
    }
}

/// The products of `M` rows of x with sixteen rows of w.
#[target_feature(enable = "avx512f")]
fn block<const M: usize, const SIZE: usize>(
    x: [&[f32]; M],
    w: [&[u8]; LANES],
    value: impl Fn(__m512i, usize) -> __m512 + Copy,
) -> [[f32; LANES]; M] {
    /// Bytes of a row of w that are transposed at a time: sixteen words.
    const CHUNK: usize = 4 * LANES;
    let parts = 4 / SIZE;
    let mut totals = [_mm512_setzero_ps(); M];
    for depth in depth_blocks(x[0].len()) {
        let whole = depth.len() / (LANES * parts);
        let x = x.map(|row| &row[depth.clone()]);
        let x_chunks = x.map(|row| &row.as_chunks::<LANES>().0[..parts * whole]);
        let w = w.map(|row| &row[SIZE * depth.start..SIZE * depth.end]);
        let w_chunks = w.map(|row| &row.as_chunks::<CHUNK>().0[..whole]);
        let mut sums = [_mm512_setzero_ps(); M];
        for c in 0..whole {
            let mut words = [_mm512_setzero_si512(); LANES];
            for (words, chunks) in words.iter_mut().zip(w_chunks) {
                // SAFETY: 64 bytes.
                *words = unsafe { _mm512_loadu_si512(chunks[c].as_ptr().cast()) };
            }
            for (i, words) in transposed_16x16(&words).into_iter().enumerate() {
                for part in 0..parts {
                    let column = value(words, part);
                    let at = parts * i + part;
                    for (sum, chunks) in sums.iter_mut().zip(x_chunks) {
                        let x = chunks[parts * c + at / LANES][at % LANES];
                        *sum = _mm512_fmadd_ps(column, _mm512_set1_ps(x), *sum);
                    }
                }
            }
        }
        for at in LANES * parts * whole..depth.len() {
            let words = elements::<LANES, SIZE>(w, at);
            // SAFETY: 16 words.
            let column = value(unsafe { _mm512_loadu_si512(words.as_ptr().cast()) }, 0);
            for (sum, row) in sums.iter_mut().zip(x) {
                *sum = _mm512_fmadd_ps(column, _mm512_set1_ps(row[at]), *sum);
            }
        }
        for (total, sum) in totals.iter_mut().zip(sums) {
            *total = if depth.start == 0 { sum } else { _mm512_add_ps(*total, sum) };
        }
    }
    let mut out = [[0.0; LANES]; M];
    for (out, total) in out.iter_mut().zip(totals) {
        // SAFETY: 16 sums.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), total) };
    }
    out
}
