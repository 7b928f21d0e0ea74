//! The innermost loops: one block of C from a panel of A and a panel of B.
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

/// Whether a product by AMX is that of its emulation. A trial on the processor itself, before the first use.
#[cfg(target_arch = "x86_64")]
pub(super) fn amx_agrees_with_emulation() -> bool {
    const UNITS: usize = 3 * BLOCK;
    let shape = Shape::of(Instructions::Amx);
    // Pairs of bf16 values in (-2, 2), all different.
    let pair =
        |i: usize| (0x3f80_3f80 + 0x0001_0003 * (i as u32 % 113)) ^ if i.is_multiple_of(3) { 0x8000_0000 } else { 0 };
    let a: Vec<u32> = (0..shape.a * UNITS).map(pair).collect();
    let b: Vec<u32> = (0..shape.b * UNITS).map(|i| pair(i + 57)).collect();
    let [mut ours, mut emulated] = [(); 2].map(|()| vec![1.0; shape.block()]);
    for accumulate in [false, true] {
        super::amx::multiply(&a, &b, &mut ours, accumulate);
        super::emulated::multiply(&a, &b, &mut emulated, accumulate);
    }
    ours.iter().zip(&emulated).all(|(x, y)| (x - y).abs() <= 1e-3)
}

/// c = A·Bᵀ, or c += A·Bᵀ if `accumulate`, over the whole depth of the panels.
pub(super) fn multiply(instructions: Instructions, a: &[u32], b: &[u32], c: &mut [f32], accumulate: bool) {
    let shape = Shape::of(instructions);
    let blocks = a.len() / (shape.a * BLOCK);
    let fits = a.len() == blocks * shape.a * BLOCK && b.len() == blocks * shape.b * BLOCK && c.len() == shape.block();
    assert!(fits, "{shape:?}: panels of {} and {} units, a block of {}", a.len(), b.len(), c.len());
    match instructions {
        Instructions::Portable => super::portable::multiply(a, b, c, accumulate),
        Instructions::AmxEmulated => super::emulated::multiply(a, b, c, accumulate),
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512 => super::avx512::multiply(a, b, c, accumulate),
        #[cfg(target_arch = "x86_64")]
        Instructions::Avx512Bf16 => super::avx512::multiply_pairs(a, b, c, accumulate),
        #[cfg(target_arch = "x86_64")]
        Instructions::Amx => super::amx::multiply(a, b, c, accumulate),
        #[cfg(not(target_arch = "x86_64"))]
        other => unreachable!("{other} on another architecture"),
    }
}
