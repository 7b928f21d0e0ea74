//! What is packed: the operands of a product, as they are stored.

use std::ops::Range;

use super::instructions::Instructions;
use super::shape::Shape;
use crate::backend::Dtype;

/// A side of a product A·Bᵀ.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::backend::cpu) enum Side {
    A,
    B,
}

impl Side {
    pub(super) fn other(self) -> Self {
        if self == Self::A { Self::B } else { Self::A }
    }

    /// Lines of a panel.
    pub(super) fn lines(self, shape: Shape) -> usize {
        if self == Self::A { shape.a } else { shape.b }
    }
}

/// The elements of a matrix, row by row.
#[derive(Clone, Copy)]
pub(super) enum Values<'a> {
    F32(&'a [f32]),
    /// Little-endian bytes.
    Stored(Dtype, &'a [u8]),
}

/// A part of an operand's depth. The parts of an operand have the same lines, side by side in depth.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Part<'a> {
    pub(super) values: Values<'a>,
    /// Elements from one stored row to the next.
    pub(super) stride: usize,
    /// The stored row of each row, if they are not the same.
    pub(super) index: Option<&'a [u32]>,
    /// Whether the rows are the lines of the operand; otherwise the columns are.
    pub(super) rows_are_lines: bool,
    pub(super) depth: usize,
}

impl<'a> Part<'a> {
    /// Activations; consecutive rows are `stride` elements apart.
    pub(in crate::backend::cpu) fn activations(values: &'a [f32], stride: usize) -> Self {
        Self { values: Values::F32(values), stride, index: None, rows_are_lines: true, depth: 0 }
    }

    /// Little-endian bytes; consecutive rows are `stride` elements apart.
    pub(in crate::backend::cpu) fn stored(dtype: Dtype, bytes: &'a [u8], stride: usize) -> Self {
        Self { values: Values::Stored(dtype, bytes), stride, index: None, rows_are_lines: true, depth: 0 }
    }

    /// Row i is the stored row `index[i]`.
    pub(in crate::backend::cpu) fn indexed(self, index: Option<&'a [u32]>) -> Self {
        Self { index, ..self }
    }

    /// Without the first rows.
    pub(in crate::backend::cpu) fn skip_rows(self, first: usize) -> Self {
        match self.index {
            Some(index) => Self { index: Some(&index[first..]), ..self },
            None => self.skip(first * self.stride),
        }
    }

    /// Without the first columns.
    pub(in crate::backend::cpu) fn skip_columns(self, first: usize) -> Self {
        self.skip(first)
    }

    fn skip(self, elements: usize) -> Self {
        let values = match self.values {
            Values::F32(values) => Values::F32(&values[elements..]),
            Values::Stored(dtype, bytes) => Values::Stored(dtype, &bytes[elements * dtype.size()..]),
        };
        Self { values, ..self }
    }

    /// The first element of a row.
    #[inline(always)]
    pub(super) fn at(&self, row: usize) -> usize {
        self.index.map_or(row, |index| index[row] as usize) * self.stride
    }

    /// With the rows as lines, and their first `depth` elements as depth.
    pub(in crate::backend::cpu) fn by_rows(self, depth: usize) -> Self {
        Self { rows_are_lines: true, depth, ..self }
    }

    /// With the columns as lines, and the first `depth` rows as depth.
    pub(in crate::backend::cpu) fn by_columns(self, depth: usize) -> Self {
        Self { rows_are_lines: false, depth, ..self }
    }
}

/// Units of a whole operand: each part is padded by itself.
pub(super) fn units(shape: Shape, parts: &[Part<'_>]) -> usize {
    parts.iter().map(|part| shape.units(part.depth)).sum()
}

/// Packs one part of an operand.
pub(super) struct Packer<'a> {
    pub(super) side: Side,
    /// Lines of a panel.
    pub(super) p: usize,
    /// Units of a panel.
    pub(super) panel: usize,
    /// First unit of the part in its panel.
    pub(super) first: usize,
    pub(super) lines: Range<usize>,
    pub(super) part: &'a Part<'a>,
    pub(super) instructions: Instructions,
}
