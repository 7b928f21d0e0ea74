//! The shapes of panels: what a kernel multiplies, one block of C from a panel of A and a panel of B.
//!
//! A **unit** is 32 bits of depth: one f32, or a pair of consecutive bf16 values, the first in the low half. Panels hold
//! units, padded with zeros to a whole number of [`BLOCK`]s, in these layouts (u: unit, p: panel's lines):
//!
//! - A `[u / 16][p][16]`: each line has 64 bytes in a row, as a tile register wants them.
//! - B `[u][p]`: one unit of all lines side by side, as a vector register wants them.
//! - C `[lines of A][lines of B]` in f32.

use super::instructions::Instructions;

/// Units per block of depth: 64 bytes.
pub(super) const BLOCK: usize = 16;

/// How a kernel wants its panels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shape {
    /// Lines of a panel of A.
    pub(super) a: usize,
    /// Lines of a panel of B.
    pub(super) b: usize,
    /// Whether a unit is a pair of bf16 values. Otherwise it is one f32.
    pub(super) pairs: bool,
}

impl Shape {
    pub(super) const fn of(instructions: Instructions) -> Self {
        match instructions {
            Instructions::Amx | Instructions::AmxEmulated => Self { a: 32, b: 32, pairs: true },
            Instructions::Avx512Bf16 => Self { a: 12, b: 32, pairs: true },
            Instructions::Avx512 => Self { a: 12, b: 32, pairs: false },
            Instructions::Portable => Self { a: 4, b: 16, pairs: false },
        }
    }

    /// Units for this many values of depth, padded.
    pub(super) fn units(self, depth: usize) -> usize {
        (if self.pairs { depth.div_ceil(2) } else { depth }).next_multiple_of(BLOCK)
    }

    /// Elements of a block of C.
    pub(super) fn block(self) -> usize {
        self.a * self.b
    }
}
