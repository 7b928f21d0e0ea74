//! Packing: operands as they are stored, to the panels of a kernel, rounded to bf16 on the way.

use std::ops::Range;

use super::instructions::Instructions;
use super::operand::{Packer, Part, Side, Values, units};
#[cfg(target_arch = "x86_64")]
use super::pack_amx;
use super::shape::{BLOCK, Shape};
use crate::backend::Dtype;
use crate::backend::cpu::element::rounded;
use crate::backend::cpu::simd::simd;
use crate::backend::cpu::weight::f16_bits_to_f32;

/// Packs `lines` of an operand into panels, one after another in `out`. Missing lines and depth become zeros.
pub(super) fn pack(instructions: Instructions, side: Side, parts: &[Part<'_>], lines: Range<usize>, out: &mut [u32]) {
    let shape = Shape::of(instructions);
    let p = side.lines(shape);
    let (panel, panels) = (units(shape, parts) * p, lines.len().div_ceil(p));
    assert!(out.len() == panels * panel, "{} units for {panels} panels of {panel}", out.len());
    let mut first = 0;
    for part in parts {
        let packer = Packer { side, p, panel, first, lines: lines.clone(), part, instructions };
        match instructions {
            #[cfg(target_arch = "x86_64")]
            Instructions::Amx => pack_amx::pack(&packer, out),
            _ => packer.pack(shape.pairs, out),
        }
        first += shape.units(part.depth);
    }
}

/// How values are stored, and how they become bf16.
trait Stored {
    type Raw: Copy + Sync;
    /// The bits of the value as an f32, rounded to bf16: the low half is zero.
    fn bits(raw: Self::Raw) -> u32;
    /// Two values as one unit.
    #[inline(always)]
    fn pair(low: Self::Raw, high: Self::Raw) -> u32 {
        Self::bits(low) >> 16 | Self::bits(high)
    }
}

struct F32;
struct StoredF32;
struct F16;
struct Bf16;

impl Stored for F32 {
    type Raw = f32;
    #[inline(always)]
    fn bits(x: f32) -> u32 {
        rounded(x)
    }
}

impl Stored for StoredF32 {
    type Raw = [u8; 4];
    #[inline(always)]
    fn bits(bytes: [u8; 4]) -> u32 {
        rounded(f32::from_le_bytes(bytes))
    }
}

impl Stored for F16 {
    type Raw = [u8; 2];
    #[inline(always)]
    fn bits(bytes: [u8; 2]) -> u32 {
        rounded(f16_bits_to_f32(u16::from_le_bytes(bytes)))
    }
}

impl Stored for Bf16 {
    type Raw = [u8; 2];
    #[inline(always)]
    fn bits(bytes: [u8; 2]) -> u32 {
        u32::from(u16::from_le_bytes(bytes)) << 16
    }
    #[inline(always)]
    fn pair(low: [u8; 2], high: [u8; 2]) -> u32 {
        u32::from_le_bytes([low[0], low[1], high[0], high[1]])
    }
}

/// 16 units side by side in a panel.
pub(super) type Row = [u32; BLOCK];

impl Packer<'_> {
    fn pack(&self, pairs: bool, out: &mut [u32]) {
        match self.part.values {
            Values::F32(values) => self.pack_values::<F32>(pairs, values, out),
            Values::Stored(Dtype::F32, bytes) => self.pack_values::<StoredF32>(pairs, bytes.as_chunks().0, out),
            Values::Stored(Dtype::F16, bytes) => self.pack_values::<F16>(pairs, bytes.as_chunks().0, out),
            Values::Stored(Dtype::Bf16, bytes) => self.pack_values::<Bf16>(pairs, bytes.as_chunks().0, out),
        }
    }

    fn pack_values<S: Stored>(&self, pairs: bool, values: &[S::Raw], out: &mut [u32]) {
        match (pairs, self.part.rows_are_lines) {
            (true, true) => simd!(self.rows::<S, true, true>(values, out)),
            (true, false) => simd!(self.rows::<S, true, false>(values, out)),
            (false, true) => simd!(self.rows::<S, false, true>(values, out)),
            (false, false) => simd!(self.rows::<S, false, false>(values, out)),
        }
    }

    /// `LINES`: the stored rows are lines of the operand; otherwise they are its depth.
    #[inline(always)]
    fn rows<S: Stored, const PAIRS: bool, const LINES: bool>(&self, values: &[S::Raw], out: &mut [u32]) {
        let depth = if PAIRS { self.part.depth.div_ceil(2) } else { self.part.depth };
        let units = depth.next_multiple_of(BLOCK);
        let lines = out.len() / self.panel.max(1) * self.p;
        // Always 16 stored rows together, so that a panel is written from beginning to end.
        if LINES {
            for line in (0..lines).step_by(self.p) {
                let out = &mut out[line / self.p * self.panel..][..self.panel];
                for first in (0..self.p).step_by(BLOCK) {
                    let rows: [_; BLOCK] = std::array::from_fn(
                        #[inline(always)]
                        |i| self.line::<S>(values, line + first + i),
                    );
                    for unit in (0..units).step_by(BLOCK) {
                        self.place::<S, PAIRS, LINES>(&rows, unit, first, unit, out);
                    }
                }
            }
        } else {
            for unit in (0..units).step_by(BLOCK) {
                let rows: [_; BLOCK] = std::array::from_fn(
                    #[inline(always)]
                    |i| self.unit::<S, PAIRS>(values, unit + i),
                );
                for line in (0..lines).step_by(self.p) {
                    let out = &mut out[line / self.p * self.panel..][..self.panel];
                    for first in (0..self.p).step_by(BLOCK) {
                        self.place::<S, PAIRS, LINES>(&rows, line + first, first, unit, out);
                    }
                }
            }
        }
    }

    /// Writes 16 units, from element or unit `at` of 16 stored rows, to the panel `out`: lines from `line` on, units from `unit`
    /// on. A panel of A has no place for lines beyond its own.
    #[inline(always)]
    fn place<S: Stored, const PAIRS: bool, const LINES: bool>(
        &self,
        rows: &[[&[S::Raw]; 2]; BLOCK],
        at: usize,
        line: usize,
        unit: usize,
        out: &mut [u32],
    ) {
        let (p, unit) = (self.p, self.first + unit);
        let keep = BLOCK.min(p - line);
        match (self.side, LINES) {
            (Side::A, true) => {
                let out = &mut out[unit * p + line * BLOCK..][..keep * BLOCK];
                for (out, row) in out.as_chunks_mut::<BLOCK>().0.iter_mut().zip(rows) {
                    *out = read::<S, PAIRS, LINES>(*row, at);
                }
            }
            (Side::B, false) => {
                for (out, row) in out[unit * p..][..BLOCK * p].chunks_exact_mut(p).zip(rows) {
                    out[line..line + BLOCK].copy_from_slice(&read::<S, PAIRS, LINES>(*row, at));
                }
            }
            (side, _) => {
                let mut block = [[0; BLOCK]; BLOCK];
                for (to, row) in block.iter_mut().zip(rows) {
                    *to = read::<S, PAIRS, LINES>(*row, at);
                }
                let block = transpose(self.instructions, &block);
                if side == Side::A {
                    out[unit * p + line * BLOCK..][..keep * BLOCK].copy_from_slice(block[..keep].as_flattened());
                } else {
                    for (out, row) in out[unit * p..][..BLOCK * p].chunks_exact_mut(p).zip(&block) {
                        out[line..line + BLOCK].copy_from_slice(row);
                    }
                }
            }
        }
    }

    /// The depth of a line, counted from the first one; nothing of a missing line.
    #[inline(always)]
    fn line<'v, S: Stored>(&self, values: &'v [S::Raw], line: usize) -> [&'v [S::Raw]; 2] {
        let line = self.lines.start + line;
        let values = if line < self.lines.end { &values[self.part.at(line)..][..self.part.depth] } else { &[] };
        [values, &[]]
    }

    /// All lines of the one or two rows of a unit; nothing of missing rows.
    #[inline(always)]
    fn unit<'v, S: Stored, const PAIRS: bool>(&self, values: &'v [S::Raw], unit: usize) -> [&'v [S::Raw]; 2] {
        let mut rows: [&[S::Raw]; 2] = [&[]; 2];
        let per_unit = if PAIRS { 2 } else { 1 };
        for (i, row) in rows.iter_mut().enumerate().take(per_unit) {
            let depth = unit * per_unit + i;
            if depth < self.part.depth {
                *row = &values[self.part.at(depth) + self.lines.start..][..self.lines.len()];
            }
        }
        rows
    }
}

/// 16 units of a stored row from element or unit `at` on. What is missing is zero.
#[inline(always)]
fn read<S: Stored, const PAIRS: bool, const LINES: bool>([low, high]: [&[S::Raw]; 2], at: usize) -> Row {
    let mut out = [0; BLOCK];
    if PAIRS && LINES {
        let low = low.get(2 * at..).unwrap_or(&[]);
        if let Some(low) = low.first_chunk::<{ 2 * BLOCK }>() {
            for (out, &[low, high]) in out.iter_mut().zip(low.as_chunks::<2>().0) {
                *out = S::pair(low, high);
            }
        } else {
            for (out, pair) in out.iter_mut().zip(low.chunks(2)) {
                *out = if let [low, high] = *pair { S::pair(low, high) } else { S::bits(pair[0]) >> 16 };
            }
        }
        return out;
    }
    let low = low.get(at..).unwrap_or(&[]);
    let high = high.get(at..).unwrap_or(&[]);
    let shift = if PAIRS { 16 } else { 0 };
    match (low.first_chunk::<BLOCK>(), high.first_chunk::<BLOCK>()) {
        (Some(low), Some(high)) if PAIRS => {
            for ((out, &low), &high) in out.iter_mut().zip(low).zip(high) {
                *out = S::pair(low, high);
            }
        }
        (Some(low), _) if high.is_empty() => {
            for (out, &low) in out.iter_mut().zip(low) {
                *out = S::bits(low) >> shift;
            }
        }
        _ => {
            for (i, (out, &low)) in out.iter_mut().zip(low).enumerate() {
                *out = high.get(i).map_or(S::bits(low) >> shift, |&high| S::pair(low, high));
            }
        }
    }
    out
}

/// The transpose of 16 by 16 units.
#[inline(always)]
pub(super) fn transpose(instructions: Instructions, rows: &[Row; BLOCK]) -> [Row; BLOCK] {
    match instructions {
        #[cfg(target_arch = "x86_64")]
        Instructions::Amx | Instructions::Avx512Bf16 | Instructions::Avx512 => super::avx512::transpose(rows),
        _ => std::array::from_fn(|j| std::array::from_fn(|i| rows[i][j])),
    }
}

/// Rounds values to bf16.
pub(in crate::backend::cpu) fn round(values: &[f32], out: &mut [f32]) {
    simd!({
        for (out, &x) in out.iter_mut().zip(values) {
            *out = f32::from_bits(rounded(x));
        }
    });
}
