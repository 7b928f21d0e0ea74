//! The kernel for any processor: f32 units, plain loops.

use super::instructions::Instructions;
use super::shape::{BLOCK, Shape};
use crate::backend::cpu::simd::simd;

const SHAPE: Shape = Shape::of(Instructions::Portable);
const A: usize = SHAPE.a;
const B: usize = SHAPE.b;

pub(super) fn multiply(a: &[u32], b: &[u32], c: &mut [f32], accumulate: bool) {
    let (c, _) = c.as_chunks_mut::<B>();
    simd!({
        let mut sums = [[0f32; B]; A];
        if accumulate {
            sums.copy_from_slice(c);
        }
        for (a, b) in a.as_chunks::<{ A * BLOCK }>().0.iter().zip(b.as_chunks::<{ B * BLOCK }>().0) {
            for (u, b) in b.as_chunks::<B>().0.iter().enumerate() {
                for (line, sums) in sums.iter_mut().enumerate() {
                    let x = f32::from_bits(a[line * BLOCK + u]);
                    for (sum, &y) in sums.iter_mut().zip(b) {
                        *sum += x * f32::from_bits(y);
                    }
                }
            }
        }
        c.copy_from_slice(&sums);
    });
}
