//! The tiles of AMX in ordinary instructions: the same panels, loads and sums as `amx.rs`, for tests on other processors.

use super::instructions::Instructions;
use super::shape::{BLOCK, Shape};

const SHAPE: Shape = Shape::of(Instructions::AmxEmulated);
/// Rows of a tile, and f32 or pairs of bf16 in one of its rows.
const ROWS: usize = 16;

type Tile = [[u32; BLOCK]; ROWS];

/// `tileloadd`: rows `stride` units apart.
fn load(from: &[u32], stride: usize) -> Tile {
    std::array::from_fn(|row| std::array::from_fn(|i| from[row * stride + i]))
}

/// Subnormal values count as zero, in operands and results.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() { 0.0f32.copysign(x) } else { x }
}

fn halves(unit: u32) -> [f32; 2] {
    [f32::from_bits(unit << 16), f32::from_bits(unit & 0xffff_0000)].map(flush)
}

/// `tdpbf16ps`: the even and the odd values of depth are summed apart with fused multiply-adds, then added to the tile
/// (Software Developer's Manual, volume 2, TDPBF16PS).
fn dot_pairs(sums: &mut Tile, a: &Tile, b: &Tile) {
    for (sums, a) in sums.iter_mut().zip(a) {
        let mut parts = [[0f32; 2]; BLOCK];
        for (&a, b) in a.iter().zip(b) {
            let a = halves(a);
            for (part, &b) in parts.iter_mut().zip(b) {
                let b = halves(b);
                *part = [0, 1].map(|i| flush(a[i].mul_add(b[i], part[i])));
            }
        }
        for (sum, part) in sums.iter_mut().zip(parts) {
            *sum = flush(f32::from_bits(*sum) + flush(part[0] + part[1])).to_bits();
        }
    }
}

pub(super) fn multiply(a: &[u32], b: &[u32], c: &mut [f32], accumulate: bool) {
    let mut sums = [[[[0; BLOCK]; ROWS]; 2]; 2];
    let corner = |i: usize, j: usize| i * ROWS * SHAPE.b + j * BLOCK;
    let places = [(0, 0), (0, 1), (1, 0), (1, 1)];
    if accumulate {
        for (i, j) in places {
            let values: Vec<u32> = c[corner(i, j)..].iter().map(|x| x.to_bits()).collect();
            sums[i][j] = load(&values, SHAPE.b);
        }
    }
    for (a, b) in a.chunks_exact(SHAPE.a * BLOCK).zip(b.chunks_exact(SHAPE.b * BLOCK)) {
        let a = [load(a, BLOCK), load(&a[ROWS * BLOCK..], BLOCK)];
        let b = [load(b, SHAPE.b), load(&b[BLOCK..], SHAPE.b)];
        for (i, j) in places {
            dot_pairs(&mut sums[i][j], &a[i], &b[j]);
        }
    }
    for (i, j) in places {
        for (row, values) in sums[i][j].iter().enumerate() {
            for (x, bits) in c[corner(i, j) + row * SHAPE.b..].iter_mut().zip(values) {
                *x = f32::from_bits(*bits);
            }
        }
    }
}
