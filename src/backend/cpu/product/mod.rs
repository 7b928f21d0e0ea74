//! Products of bf16 values with sums in f32, by the widest instructions of the processor.
//!
//! A product is A·Bᵀ: element (i, j) is the sum over the depth of line i of A times line j of B. One operand is packed as a
//! whole ([`Products::block`]), in parts that stay in the L2 cache. The other is packed a few panels at a time
//! ([`Products::stream`]), or as a whole, too, where several blocks follow ([`Products::multiply`]); its panels pass by the whole
//! block. Weights in bf16 need no packing where [`Products::takes_stored`] says so. The caller gets C tile by tile from the L1
//! cache, and stores, transposes, adds or reduces it: no tile reaches main memory for its own sake.
//!
//! Everything here runs on the calling thread. A sum's order depends on the depth alone, not on the block sizes, because
//! sums that are interrupted continue from their value.

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod emulated;
mod instructions;
mod kernel;
mod operand;
mod pack;
#[cfg(target_arch = "x86_64")]
mod pack_amx;
mod portable;
mod shape;

use std::ops::Range;

pub use self::instructions::{Caches, Instructions, Processor};
pub(super) use self::operand::{Part, Side};
pub(super) use self::pack::round;
use self::shape::{BLOCK, Shape};
use super::dot;
use super::element::Element;
use super::parallel::{Scratch, SharedSlice};
use super::simd::{axpy, simd};
use crate::backend::Dtype;

/// How products of bf16 values are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Products {
    instructions: Instructions,
    caches: Caches,
}

/// An operand that is packed as a whole.
pub(super) struct Block {
    shape: Shape,
    side: Side,
    panels: Scratch,
    lines: usize,
    units: usize,
}

/// A part of a block.
pub(super) struct Portion {
    lines: Range<usize>,
    units: Range<usize>,
}

impl Block {
    fn whole(&self) -> Portion {
        Portion { lines: 0..self.lines, units: 0..self.units }
    }

    /// Some of the lines, from the start of a panel on.
    pub(super) fn lines(&self, lines: Range<usize>) -> Portion {
        Portion { lines, ..self.whole() }
    }

    /// A part of the depth of a block that was packed from one part. Its start is a multiple of two [`BLOCK`]s.
    pub(super) fn depth(&self, depth: Range<usize>) -> Portion {
        let per_unit = if self.shape.pairs { 2 } else { 1 };
        let units = depth.start / per_unit..depth.start / per_unit + self.shape.units(depth.len());
        Portion { units, ..self.whole() }
    }
}

/// A tile of C. The lines count from the start of the ranges that the operands were packed from.
pub(super) struct Tile<'c> {
    /// Lines of A.
    pub(super) a: Range<usize>,
    /// Lines of B.
    pub(super) b: Range<usize>,
    values: &'c [f32],
    stride: usize,
}

impl Tile<'_> {
    /// Line `i` of the tile: its sums with each line of B.
    #[inline(always)]
    pub(super) fn row(&self, i: usize) -> &[f32] {
        &self.values[i * self.stride..][..self.b.len()]
    }

    /// Copies the tile into a row-major matrix of `width` columns, whose first element is that of the first lines.
    pub(super) fn copy_to(&self, to: &mut [f32], width: usize) {
        simd!({
            for (i, row) in self.a.clone().enumerate() {
                self.copy_row(i, &mut to[row * width + self.b.start..][..self.b.len()]);
            }
        });
    }

    /// As [`Self::copy_to`], into a matrix that other tasks write too, whose first element is at `at`.
    ///
    /// # Safety
    /// Nothing else accesses the elements of the tile.
    pub(super) unsafe fn copy_to_shared<E: Element>(&self, to: &SharedSlice<'_, E>, at: usize, width: usize) {
        simd!({
            for (i, row) in self.a.clone().enumerate() {
                // SAFETY: by the caller's guarantee.
                self.copy_row(i, unsafe { to.slice(at + row * width + self.b.start, self.b.len()) });
            }
        });
    }

    /// Adds the tile to a matrix: see [`Self::copy_to`].
    pub(super) fn add_to(&self, to: &mut [f32], width: usize) {
        simd!({
            for (i, row) in self.a.clone().enumerate() {
                axpy(&mut to[row * width + self.b.start..][..self.b.len()], 1.0, self.row(i));
            }
        });
    }

    /// As [`Self::add_to`], to a matrix that other tasks write too, whose first element is at `at`.
    ///
    /// # Safety
    /// Nothing else accesses the elements of the tile.
    pub(super) unsafe fn add_to_shared(&self, to: &SharedSlice<'_, f32>, at: usize, width: usize) {
        simd!({
            for (i, row) in self.a.clone().enumerate() {
                // SAFETY: by the caller's guarantee.
                axpy(unsafe { to.slice(at + row * width + self.b.start, self.b.len()) }, 1.0, self.row(i));
            }
        });
    }

    /// Copies line `i` of the tile.
    #[inline(always)]
    fn copy_row<E: Element>(&self, i: usize, to: &mut [E]) {
        // Of a length that the compiler knows where the tile is whole: a call of memcpy takes longer than the copy.
        match self.b.len() {
            WHOLE => E::store(&self.row(i)[..WHOLE], &mut to[..WHOLE]),
            dot::OUTPUTS => E::store(&self.row(i)[..dot::OUTPUTS], &mut to[..dot::OUTPUTS]),
            _ => E::store(self.row(i), to),
        }
    }

    /// All sums of a tile of a whole block, line by line. Lines that are missing at the edges are zeros.
    #[inline(always)]
    pub(super) fn padded(&self) -> &[f32] {
        self.values
    }
}

/// Lines of B in a whole tile, but for the portable instructions.
const WHOLE: usize = 32;
/// Calls of the kernel in a measurement of its rate.
const REPEATS: usize = 100;
/// Panels that are packed at a time, so that neighbouring columns are read together.
const STREAMED: usize = 8;

impl Processor {
    /// The processor this program runs on. AMX counts only if Linux permits it and a trial gives the right result.
    pub fn detect() -> Self {
        static FOUND: std::sync::OnceLock<Processor> = std::sync::OnceLock::new();
        *FOUND.get_or_init(|| {
            let found = Self::of_this_machine();
            Self { amx: found.amx && kernel::amx_agrees_with_emulation(), ..found }
        })
    }
}

impl Products {
    /// Products by these instructions.
    ///
    /// # Panics
    /// The processor lacks them: the kernels rely on this check. [`Processor::choose`] reports it as an error.
    pub fn new(instructions: Instructions, caches: Caches) -> Self {
        assert!(Processor::detect().has(instructions), "this processor has no {instructions} instructions");
        Self { instructions, caches }
    }

    /// The instructions.
    pub fn instructions(&self) -> Instructions {
        self.instructions
    }

    /// Floating-point operations a second of the innermost loop on one thread, with panels in the caches: the bound of all
    /// products of packed operands. Takes some milliseconds.
    pub fn kernel_rate(&self) -> f64 {
        let shape = Shape::of(self.instructions);
        let units = shape.units(512);
        let mut c = Scratch::take(shape.block());
        let (mut a, mut b) = (Scratch::take(shape.a * units), Scratch::take(shape.b * units));
        a.fill(1.0);
        b.fill(1.0);
        let (a, b) = (bytemuck::cast_slice(&a), bytemuck::cast_slice(&b));
        let depth = if shape.pairs { 2 * units } else { units };
        let flops = (REPEATS * 2 * shape.block() * depth) as f64;
        let rate = |_| {
            let clock = std::time::Instant::now();
            for _ in 0..REPEATS {
                kernel::multiply(self.instructions, a, b, &mut c, false);
            }
            std::hint::black_box(&c);
            flops / clock.elapsed().as_secs_f64()
        };
        (0..8).map(rate).fold(0.0, f64::max)
    }

    /// Splits lines into blocks of nearly equal size for this depth. A block takes at most half of the L2 cache, and is a
    /// whole number of panels.
    pub(super) fn blocks(
        &self,
        side: Side,
        depth: usize,
        lines: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + use<> {
        let shape = Shape::of(self.instructions);
        let p = side.lines(shape);
        let most = (self.caches.l2 / 2 / (4 * shape.units(depth).max(1))).max(2 * p);
        let step = lines.len().div_ceil(lines.len().div_ceil(most).max(1)).next_multiple_of(p).max(p);
        lines.clone().step_by(step).map(move |at| at..lines.end.min(at + step))
    }

    /// Packs `lines` of an operand.
    pub(super) fn block(&self, side: Side, parts: &[Part<'_>], lines: Range<usize>) -> Block {
        let shape = Shape::of(self.instructions);
        let units = operand::units(shape, parts);
        let p = side.lines(shape);
        let mut panels = Scratch::take(lines.len().div_ceil(p) * p * units);
        let n = lines.len();
        pack::pack(self.instructions, side, parts, lines, bytemuck::cast_slice_mut(&mut panels));
        Block { shape, side, panels, lines: n, units }
    }

    /// Multiplies `lines` of the other operand with a block, and gives each tile to `take`: for each panel of lines in
    /// order, the block's panels in order.
    pub(super) fn stream(&self, block: &Block, parts: &[Part<'_>], lines: Range<usize>, take: impl FnMut(&Tile<'_>)) {
        self.stream_portion(block, block.whole(), parts, lines, take);
    }

    /// As [`Self::stream`], with a part of the block. Its lines are counted from the first one in the portion.
    pub(super) fn stream_portion(
        &self,
        block: &Block,
        portion: Portion,
        parts: &[Part<'_>],
        lines: Range<usize>,
        mut take: impl FnMut(&Tile<'_>),
    ) {
        let (side, p) = (block.side.other(), block.side.other().lines(block.shape));
        let units = portion.units.len();
        assert!(operand::units(block.shape, parts) == units, "operands of different depth");
        let chunk = (self.caches.l2 / 4 / (4 * p * units.max(1))).clamp(1, STREAMED);
        let mut panels = Scratch::take(0);
        for start in (0..lines.len()).step_by(chunk * p) {
            let now = start..lines.len().min(start + chunk * p);
            panels.resize(now.len().div_ceil(p) * p * units);
            let streamed: &mut [u32] = bytemuck::cast_slice_mut(&mut panels);
            pack::pack(self.instructions, side, parts, lines.start + now.start..lines.start + now.end, streamed);
            self.pass(streamed, now, block, &portion, &mut take);
        }
    }

    /// Multiplies two blocks: as [`Self::stream`], with the lines of the first one.
    pub(super) fn multiply(&self, streamed: &Block, block: &Block, mut take: impl FnMut(&Tile<'_>)) {
        assert!(streamed.side == block.side.other() && streamed.units == block.units, "operands that do not match");
        let panels = bytemuck::cast_slice(&streamed.panels);
        self.pass(panels, 0..streamed.lines, block, &block.whole(), &mut take);
    }

    /// Whether [`Self::multiply_stored`] takes lines of B that are stored in this format: packing them is not needed.
    pub(super) fn takes_stored(&self, dtype: Dtype) -> bool {
        self.instructions == Instructions::Avx512Bf16 && dtype == Dtype::Bf16 && dot::has_pairs()
    }

    /// As [`Self::multiply`], of lines of A with lines of B that are stored as `depth` bf16 values each, but with sums in the order of
    /// [`dot`].
    pub(super) fn multiply_stored(&self, a: &Block, b: &[u8], depth: usize, mut take: impl FnMut(&Tile<'_>)) {
        assert!(a.side == Side::A && a.units == a.shape.units(depth), "operands that do not match");
        let panels = dot::Panels { units: &a.panels, height: a.shape.a, rows: a.lines };
        dot::product_of_pairs(panels, b, depth, self.caches, |a, b, sums| {
            take(&Tile { a, b, values: sums.as_flattened(), stride: dot::OUTPUTS });
        });
    }

    /// Multiplies panels, which hold these lines, with a part of a block.
    fn pass(
        &self,
        streamed: &[u32],
        lines: Range<usize>,
        block: &Block,
        portion: &Portion,
        take: &mut impl FnMut(&Tile<'_>),
    ) {
        let (shape, side) = (block.shape, block.side.other());
        let (p, q, units) = (side.lines(shape), block.side.lines(shape), portion.units.len());
        assert!(portion.lines.start.is_multiple_of(q) && portion.lines.end <= block.lines, "{:?}", portion.lines);
        assert!(portion.units.start.is_multiple_of(BLOCK) && portion.units.end <= block.units, "{:?}", portion.units);
        let panels: &[u32] = bytemuck::cast_slice(&block.panels);
        let width = portion.lines.len();
        // A piece of a streamed panel stays in the L2 cache while the block passes by.
        let piece = (self.caches.l2 / 8 / (4 * p) / BLOCK * BLOCK).max(BLOCK);
        let mut c = Scratch::take(width.div_ceil(q) * shape.block());
        for (i, start) in lines.clone().step_by(p).enumerate() {
            let panel = &streamed[i * p * units..][..p * units];
            for unit in (0..units.max(1)).step_by(piece) {
                let to = units.min(unit + piece);
                let part = &panel[unit * p..to * p];
                for (j, c) in c.chunks_exact_mut(shape.block()).enumerate() {
                    let fixed = &panels[(portion.lines.start + j * q) * block.units + portion.units.start * q..];
                    let fixed = &fixed[unit * q..to * q];
                    let (a, b) = if side == Side::A { (part, fixed) } else { (fixed, part) };
                    kernel::multiply(self.instructions, a, b, c, unit > 0);
                    if to == units {
                        let (lines, fixed) = (start..lines.end.min(start + p), j * q..width.min((j + 1) * q));
                        let (a, b) = if side == Side::A { (lines, fixed) } else { (fixed, lines) };
                        take(&Tile { a, b, values: c, stride: shape.b });
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
