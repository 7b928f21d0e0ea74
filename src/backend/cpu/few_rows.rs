//! y = x · wᵀ for few rows of x: a step of generation, and experts to which few tokens go.
//!
//! The time of such a product is that of reading w once. `gemm` computes at least a SIMD vector of rows and reads w element by
//! element. Here the lanes of a SIMD vector are outputs, eight with AVX2 and sixteen with AVX-512: blocks of as many rows of w by 32 or
//! 64 bytes are transposed in registers, straight from the checkpoint's bytes in any dtype, and multiplied with a value of x for all
//! lanes.
//!
//! Every sum is taken in the order of `gemm`, with fused multiply-adds, so that the results are the same bits: a token's logits do
//! not depend on how many other tokens are in the batch.

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use super::gemm::{Matrix, MatrixMut};
use super::weight::Weight;

/// Whether [`product`] takes a product of this shape, and is faster than `gemm`.
pub(super) fn suits(rows: usize, outputs: usize) -> bool {
    rows <= MOST_ROWS && outputs >= LANES && is_supported()
}

/// More rows than this are faster in `gemm`, whose kernel computes 16 rows of y at a time.
const MOST_ROWS: usize = 8;

/// Outputs computed at a time.
const LANES: usize = 8;

#[cfg(not(target_arch = "x86_64"))]
fn is_supported() -> bool {
    false
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn product(_: MatrixMut<'_>, _: Matrix<'_>, _: &Weight, _: Range<usize>) {
    unreachable!("no shape suits");
}

#[cfg(target_arch = "x86_64")]
fn is_supported() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}

/// y = x · w[out]ᵀ for row-major x `[m, k]`, w `[N, k]`, y `[m, out.len()]`, of a shape that [`suits`].
#[cfg(target_arch = "x86_64")]
pub(super) fn product(y: MatrixMut<'_>, x: Matrix<'_>, w: &Weight, out: Range<usize>) {
    assert!(suits(x.rows(), out.len()) && w.cols() == x.cols() && y.shape() == (x.rows(), out.len()));
    let row_bytes = w.cols() * w.dtype().size();
    let bytes = &w.bytes()[out.start * row_bytes..out.end * row_bytes];
    if is_x86_feature_detected!("avx512f") && out.len() >= avx512::LANES {
        // SAFETY: the processor has AVX-512F.
        unsafe { avx512::product(y, x, bytes, w.dtype()) }
    } else {
        // SAFETY: the processor has AVX2 and FMA, by `suits`.
        unsafe { avx2::product(y, x, bytes, w.dtype()) }
    }
}

/// Element `at`, of `SIZE` bytes, of each row: the first of a word that is zero otherwise.
#[cfg(target_arch = "x86_64")]
#[inline]
fn elements<const ROWS: usize, const SIZE: usize>(rows: [&[u8]; ROWS], at: usize) -> [u32; ROWS] {
    rows.map(|row| {
        let mut bytes = [0; 4];
        bytes[..SIZE].copy_from_slice(&row[SIZE * at..SIZE * (at + 1)]);
        u32::from_le_bytes(bytes)
    })
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::{
        __m256, _mm256_add_ps, _mm256_fmadd_ps, _mm256_permute2f128_ps, _mm256_set1_ps, _mm256_setzero_ps,
        _mm256_shuffle_ps, _mm256_unpackhi_ps, _mm256_unpacklo_ps,
    };

    use super::super::gemm::{Matrix, MatrixMut, depth_blocks};
    use super::super::weight::f16_bits_to_f32;
    use super::{LANES, elements};
    use crate::backend::Dtype;

    /// Rows of x whose sums stay in registers together with eight columns of w.
    const GROUP: usize = 6;

    /// As [`super::product`], for w in the number format `dtype`.
    #[target_feature(enable = "avx2,fma")]
    pub(super) fn product(y: MatrixMut<'_>, x: Matrix<'_>, w: &[u8], dtype: Dtype) {
        match dtype {
            Dtype::F32 => of_words::<4>(y, x, w, |word, _| f32::from_bits(word)),
            Dtype::Bf16 => of_words::<2>(y, x, w, |word, upper| {
                f32::from_bits(if upper == 0 { word << 16 } else { word & 0xffff_0000 })
            }),
            Dtype::F16 => of_words::<2>(y, x, w, |word, upper| f16_bits_to_f32((word >> (16 * upper)) as u16)),
        }
    }

    /// With elements of w of `SIZE` bytes. `value` converts one: it gets four bytes of a row as a word, and which element of the word
    /// is meant.
    #[target_feature(enable = "avx2,fma")]
    fn of_words<const SIZE: usize>(
        mut y: MatrixMut<'_>,
        x: Matrix<'_>,
        w: &[u8],
        value: impl Fn(u32, u32) -> f32 + Copy,
    ) {
        let (m, n) = y.shape();
        let row_bytes = w.len() / n;
        for first in (0..n).step_by(LANES) {
            // The last block overlaps the one before if the outputs are not whole blocks.
            let first = first.min(n - LANES);
            let mut rows: [&[u8]; LANES] = [&[]; LANES];
            for (row, bytes) in rows.iter_mut().zip(w[first * row_bytes..].chunks_exact(row_bytes.max(1))) {
                *row = bytes;
            }
            let mut at = 0;
            while at < m {
                // Groups of about the same size.
                let group = (m - at).div_ceil((m - at).div_ceil(GROUP));
                macro_rules! sums {
                    ($($rows:literal)*) => {
                        match group {
                            $($rows => {
                                let mut x_rows: [&[f32]; $rows] = [&[]; $rows];
                                for (i, row) in x_rows.iter_mut().enumerate() {
                                    *row = x.row(at + i);
                                }
                                for (i, sums) in block::<$rows, SIZE>(x_rows, rows, value).iter().enumerate() {
                                    y.row_mut(at + i)[first..first + LANES].copy_from_slice(sums);
                                }
                            })*
                            _ => unreachable!("groups have 1 to {GROUP} rows"),
                        }
                    };
                }
                sums!(1 2 3 4 5 6);
                at += group;
            }
        }
    }

    /// The products of `M` rows of x with eight rows of w. Not with more: rows are often 4 KiB apart, and more than eight compete for
    /// the same set of the L1 cache.
    #[target_feature(enable = "avx2,fma")]
    fn block<const M: usize, const SIZE: usize>(
        x: [&[f32]; M],
        w: [&[u8]; LANES],
        value: impl Fn(u32, u32) -> f32 + Copy,
    ) -> [[f32; LANES]; M] {
        /// Bytes of a row of w that are transposed at a time: eight words.
        const CHUNK: usize = 4 * LANES;
        let parts = 4 / SIZE;
        let mut totals = [_mm256_setzero_ps(); M];
        for depth in depth_blocks(x[0].len()) {
            let whole = depth.len() / (LANES * parts);
            let mut x = x;
            let mut x_chunks: [&[[f32; LANES]]; M] = [&[]; M];
            for (row, chunks) in x.iter_mut().zip(&mut x_chunks) {
                *row = &row[depth.clone()];
                *chunks = &row.as_chunks().0[..parts * whole];
            }
            let mut w = w;
            let mut w_chunks: [&[[u8; CHUNK]]; LANES] = [&[]; LANES];
            for (row, chunks) in w.iter_mut().zip(&mut w_chunks) {
                *row = &row[SIZE * depth.start..SIZE * depth.end];
                *chunks = &row.as_chunks().0[..whole];
            }
            let mut sums = [_mm256_setzero_ps(); M];
            for c in 0..whole {
                let mut words = [_mm256_setzero_ps(); LANES];
                for (words, chunks) in words.iter_mut().zip(w_chunks) {
                    *words = bytemuck::cast(chunks[c]);
                }
                for (i, words) in transpose_8x8(words).into_iter().enumerate() {
                    for part in 0..parts {
                        let column = convert(words, part as u32, value);
                        let at = parts * i + part;
                        for (sum, chunks) in sums.iter_mut().zip(x_chunks) {
                            let x = chunks[parts * c + at / LANES][at % LANES];
                            *sum = _mm256_fmadd_ps(column, _mm256_set1_ps(x), *sum);
                        }
                    }
                }
            }
            for at in LANES * parts * whole..depth.len() {
                let column = convert(bytemuck::cast(elements::<LANES, SIZE>(w, at)), 0, value);
                for (sum, row) in sums.iter_mut().zip(x) {
                    *sum = _mm256_fmadd_ps(column, _mm256_set1_ps(row[at]), *sum);
                }
            }
            for (total, sum) in totals.iter_mut().zip(sums) {
                *total = if depth.start == 0 { sum } else { _mm256_add_ps(*total, sum) };
            }
        }
        totals.map(bytemuck::cast)
    }

    /// One element of each of eight words.
    #[target_feature(enable = "avx2,fma")]
    #[inline]
    fn convert(words: __m256, part: u32, value: impl Fn(u32, u32) -> f32) -> __m256 {
        let words: [u32; LANES] = bytemuck::cast(words);
        let mut values = [0f32; LANES];
        for (to, word) in values.iter_mut().zip(words) {
            *to = value(word, part);
        }
        bytemuck::cast(values)
    }

    #[target_feature(enable = "avx2")]
    #[inline]
    fn transpose_8x8(rows: [__m256; 8]) -> [__m256; 8] {
        // Each vector: one half of four rows in the lower, one of the same rows in the upper 128 bits.
        let mut quads = [_mm256_setzero_ps(); 8];
        for (quads, rows) in quads.as_chunks_mut::<4>().0.iter_mut().zip(rows.as_chunks::<4>().0) {
            let [a, b, c, d] = *rows;
            let (ab, cd) = (_mm256_unpacklo_ps(a, b), _mm256_unpacklo_ps(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_ps(a, b), _mm256_unpackhi_ps(c, d));
            *quads = [
                _mm256_shuffle_ps::<0x44>(ab, cd),
                _mm256_shuffle_ps::<0xee>(ab, cd),
                _mm256_shuffle_ps::<0x44>(ab_high, cd_high),
                _mm256_shuffle_ps::<0xee>(ab_high, cd_high),
            ];
        }
        let mut columns = [_mm256_setzero_ps(); 8];
        for i in 0..4 {
            columns[i] = _mm256_permute2f128_ps::<0x20>(quads[i], quads[i + 4]);
            columns[i + 4] = _mm256_permute2f128_ps::<0x31>(quads[i], quads[i + 4]);
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use super::super::gemm::matmul_nt;
    use super::*;
    use crate::backend::{Dtype, HostTensor};

    fn values(n: usize, seed: u32) -> Vec<f32> {
        let noise = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) % 4001;
        (0..n as u32).map(|i| noise(i) as f32 / 2000.0 - 1.0).collect()
    }

    #[test]
    fn few_rows_have_the_bits_of_gemm_in_every_dtype() {
        if !is_supported() {
            return eprintln!("skipped: this processor has no AVX2 and FMA");
        }
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for (n, k) in
                [(8, 1), (9, 7), (8, 8), (23, 33), (64, 512), (70, 1000), (256, 1024), (300, 1536), (12, 2049)]
            {
                let w = Weight::new(HostTensor::encode(dtype, vec![n + 3, k], &values((n + 3) * k, 5)));
                for m in 1..=MOST_ROWS {
                    // x and y are parts of wider matrices.
                    let (x, wide) = (values(m * (k + 2), 9), n + 5);
                    let x = Matrix::new(&x, m, k, k + 2);
                    let mut want = vec![7.0; m * wide];
                    let read = w.read(2..n + 2);
                    matmul_nt(MatrixMut::new(&mut want, m, n, wide), x, Matrix::new(&read, n, k, k));
                    let check = |product: &dyn Fn(MatrixMut<'_>)| {
                        let mut y = vec![7.0; m * wide];
                        product(MatrixMut::new(&mut y, m, n, wide));
                        assert!(y.iter().zip(&want).all(|(y, w)| y.to_bits() == w.to_bits()), "{dtype:?} {m} {n} {k}");
                    };
                    check(&|y| product(y, x, &w, 2..n + 2));
                    let bytes = &w.bytes()[2 * k * dtype.size()..(n + 2) * k * dtype.size()];
                    // SAFETY: the processor has AVX2 and FMA.
                    check(&|y| unsafe { avx2::product(y, x, bytes, dtype) });
                }
            }
        }
    }
}
