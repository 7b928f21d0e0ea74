//! The innermost loop: one block of C from a panel of A and a panel of B (`shape.rs`).

use super::instructions::Instructions;
use super::shape::{BLOCK, Shape};

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

/// There is no AMX on other architectures.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn amx_agrees_with_emulation() -> bool {
    false
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
