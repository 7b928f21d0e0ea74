//! Packing for AMX (the panels of `shape.rs`), 32 by 32 values at a time, by AVX-512 and its BF16 conversions, which every
//! processor with AMX has. Subnormal values become zero, as AMX itself takes them.

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _mm512_castsi512_si256, _mm512_cvtne2ps_pbh, _mm512_cvtph_ps, _mm512_extracti64x4_epi64,
    _mm512_maskz_loadu_epi16, _mm512_maskz_loadu_ps, _mm512_permutexvar_epi64, _mm512_set_epi64, _mm512_setzero_si512,
    _mm512_storeu_si512, _mm512_unpackhi_epi16, _mm512_unpacklo_epi16,
};

use super::avx512::transposed;
use super::instructions::Instructions;
use super::operand::{Packer, Part, Side, Values};
use super::shape::{BLOCK, Shape};
use crate::backend::Dtype;

/// Lines of a panel, on either side.
const P: usize = Shape::of(Instructions::Amx).a;
const _: () = assert!(P == 2 * BLOCK && Shape::of(Instructions::Amx).b == P && Shape::of(Instructions::Amx).pairs);

/// How consecutive stored values become bf16.
trait Stored {
    type Raw: Copy;
    /// 32 values from `at` on. Those whose bit in `mask` is clear are zero, and are not read.
    ///
    /// # Safety
    /// The others may be read, and the processor has the instructions.
    unsafe fn load(at: *const Self::Raw, mask: u32) -> __m512i;
}

struct F32;
struct F16;
struct Bf16;

/// Two vectors of f32, rounded, as one of bf16.
#[inline]
#[target_feature(enable = "avx512f,avx512bf16")]
fn rounded(low: __m512, high: __m512) -> __m512i {
    // SAFETY: both types are 64 bytes, and all bit patterns are valid.
    unsafe { std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low)) }
}

impl Stored for F32 {
    /// Its bytes, which may be unaligned.
    type Raw = [u8; 4];
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn load(at: *const [u8; 4], mask: u32) -> __m512i {
        // SAFETY: by the caller's guarantee; masked elements are not accessed.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as u16, at.cast());
            let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, at.wrapping_add(BLOCK).cast());
            rounded(low, high)
        }
    }
}

impl Stored for F16 {
    type Raw = [u8; 2];
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn load(at: *const [u8; 2], mask: u32) -> __m512i {
        // SAFETY: as above.
        unsafe {
            let halves = _mm512_maskz_loadu_epi16(mask, at.cast());
            let low = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
            let high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64::<1>(halves));
            rounded(low, high)
        }
    }
}

impl Stored for Bf16 {
    type Raw = [u8; 2];
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn load(at: *const [u8; 2], mask: u32) -> __m512i {
        // SAFETY: as above.
        unsafe { _mm512_maskz_loadu_epi16(mask, at.cast()) }
    }
}

/// The lowest `n` bits, at most 32.
fn lowest(n: usize) -> u32 {
    if n >= 32 { u32::MAX } else { (1 << n) - 1 }
}

/// Packs one part of an operand.
pub(super) fn pack(packer: &Packer<'_>, out: &mut [u32]) {
    match packer.part.values {
        Values::F32(values) => pack_values::<F32>(packer, bytemuck::cast_slice(values), out),
        Values::Stored(Dtype::F32, bytes) => pack_values::<F32>(packer, bytes.as_chunks().0, out),
        Values::Stored(Dtype::F16, bytes) => pack_values::<F16>(packer, bytes.as_chunks().0, out),
        Values::Stored(Dtype::Bf16, bytes) => pack_values::<Bf16>(packer, bytes.as_chunks().0, out),
    }
}

fn pack_values<S: Stored>(packer: &Packer<'_>, values: &[S::Raw], out: &mut [u32]) {
    let part = packer.part;
    let (rows, columns) =
        if part.rows_are_lines { (packer.lines.clone(), 0..part.depth) } else { (0..part.depth, packer.lines.clone()) };
    if rows.is_empty() || columns.is_empty() {
        return; // no panels, or none of their units
    }
    let end = rows.clone().map(|row| part.at(row)).max().unwrap_or(0) + columns.end;
    assert!(end <= values.len(), "a part of {rows:?} by {columns:?} with stride {} in {}", part.stride, values.len());
    assert!(packer.p == P && packer.panel * packer.lines.len().div_ceil(P) == out.len());
    // SAFETY: `Products::new` refuses AMX where these instructions do not exist. Values outside the ranges, which are inside the
    // slice, are masked.
    unsafe { if part.rows_are_lines { lines::<S>(packer, values, out) } else { depths::<S>(packer, values, out) } }
}

/// The first elements of 32 rows from `first` on, of which those from `end` on are missing.
#[inline]
fn starts(part: &Part<'_>, first: usize, end: usize) -> [usize; P] {
    std::array::from_fn(|i| if first + i < end { part.at(first + i) } else { 0 })
}

/// Stored rows are lines.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn lines<S: Stored>(packer: &Packer<'_>, values: &[S::Raw], out: &mut [u32]) {
    let part = packer.part;
    for (panel, first) in out.chunks_exact_mut(packer.panel).zip(packer.lines.clone().step_by(P)) {
        let panel = &mut panel[packer.first * P..];
        let starts = starts(part, first, packer.lines.end);
        for (depth, block) in (0..part.depth).step_by(P).zip(panel.chunks_exact_mut(BLOCK * P)) {
            let mask = lowest(part.depth - depth);
            for half in [0, BLOCK] {
                let mut units = [_mm512_setzero_si512(); BLOCK];
                for (line, units) in (first + half..).zip(&mut units) {
                    let at = values.as_ptr().wrapping_add(starts[line - first] + depth);
                    // SAFETY: inside the part, which is inside the slice, or masked.
                    *units = unsafe { S::load(at, if line < packer.lines.end { mask } else { 0 }) };
                }
                match packer.side {
                    Side::A => store(&units, &mut block[half * BLOCK..], BLOCK),
                    Side::B => store(&transposed(&units), &mut block[half..], P),
                }
            }
        }
    }
}

/// Stored rows are depth.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn depths<S: Stored>(packer: &Packer<'_>, values: &[S::Raw], out: &mut [u32]) {
    let part = packer.part;
    // 32 rows are read side by side from their beginning to their end.
    for depth in (0..part.depth).step_by(P) {
        let start = packer.first * P + depth / P * BLOCK * P;
        let starts = starts(part, depth, part.depth);
        for (panel, first) in out.chunks_exact_mut(packer.panel).zip(packer.lines.clone().step_by(P)) {
            let block = &mut panel[start..start + BLOCK * P];
            let mask = lowest(packer.lines.end - first);
            let [mut low, mut high] = [[_mm512_setzero_si512(); BLOCK]; 2];
            for (unit, (low, high)) in low.iter_mut().zip(&mut high).enumerate() {
                let row = depth + 2 * unit;
                let at = values.as_ptr().wrapping_add(starts[2 * unit] + first);
                // SAFETY: inside the part, which is inside the slice, or masked.
                let even = unsafe { S::load(at, if row < part.depth { mask } else { 0 }) };
                let at = values.as_ptr().wrapping_add(starts[2 * unit + 1] + first);
                // SAFETY: as above.
                let odd = unsafe { S::load(at, if row + 1 < part.depth { mask } else { 0 }) };
                // Quarters of a row are ordered so that interleaving within 128 bits gives lines 0 to 15, and 16 to 31.
                let order = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
                let (even, odd) = (_mm512_permutexvar_epi64(order, even), _mm512_permutexvar_epi64(order, odd));
                *low = _mm512_unpacklo_epi16(even, odd);
                *high = _mm512_unpackhi_epi16(even, odd);
            }
            for (half, units) in [low, high].iter().enumerate() {
                match packer.side {
                    Side::A => store(&transposed(units), &mut block[half * BLOCK * BLOCK..], BLOCK),
                    Side::B => store(units, &mut block[half * BLOCK..], P),
                }
            }
        }
    }
}

/// Writes 16 vectors, `stride` units apart.
#[inline]
#[target_feature(enable = "avx512f")]
fn store(vectors: &[__m512i; BLOCK], to: &mut [u32], stride: usize) {
    for (vector, to) in vectors.iter().zip(to.chunks_mut(stride)) {
        let to = &mut to[..BLOCK];
        // SAFETY: 16 units.
        unsafe { _mm512_storeu_si512(to.as_mut_ptr().cast(), *vector) };
    }
}
