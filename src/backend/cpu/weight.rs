//! Parameters in their stored dtype, read in place.
//!
//! A 16-bit weight is never converted to f32 as a whole: a matrix product reads a few rows at a time, and these are
//! converted into the thread's scratch memory. So a memory-mapped bf16 checkpoint takes 16 bits per element in the page
//! cache, and one larger than half the memory still runs. Aligned f32 weights are used without a copy.

use std::ops::Range;
use std::sync::Arc;

use super::parallel::Scratch;
use super::simd::simd;
use crate::backend::{Dtype, HostTensor, SharedBytes};

/// A parameter `[rows, cols]` (or `[n]`, treated as `[1, n]`) in its stored dtype.
pub struct Weight {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Bytes,
}

enum Bytes {
    /// The checkpoint's bytes: memory-mapped, possibly unaligned.
    Loaded(SharedBytes),
    /// Own bytes, written by an update.
    Written(Arc<AlignedBytes>),
}

/// Bytes aligned for f32.
struct AlignedBytes {
    words: Vec<u32>,
    len: usize,
}

impl AsRef<[u8]> for AlignedBytes {
    fn as_ref(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.words)[..self.len]
    }
}

/// Rows of a weight as f32: a slice of the weight itself, or converted into scratch memory.
pub(super) enum Rows<'a> {
    InPlace(&'a [f32]),
    Widened(Scratch),
}

impl std::ops::Deref for Rows<'_> {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match self {
            Rows::InPlace(values) => values,
            Rows::Widened(scratch) => scratch,
        }
    }
}

impl Weight {
    pub(super) fn new(host: HostTensor) -> Self {
        assert!(matches!(host.shape.len(), 1 | 2), "a parameter has one or two dimensions, not {:?}", host.shape);
        Self { dtype: host.dtype, shape: host.shape, bytes: Bytes::Loaded(host.bytes) }
    }

    pub(super) fn host(&self) -> HostTensor {
        let bytes = match &self.bytes {
            Bytes::Loaded(bytes) => bytes.clone(),
            Bytes::Written(words) => SharedBytes::new(words.clone(), 0..words.len),
        };
        HostTensor::new(self.dtype, self.shape.clone(), bytes)
    }

    /// The bytes of the checkpoint, unless an update has replaced them.
    pub(super) fn loaded(&self) -> Option<&SharedBytes> {
        match &self.bytes {
            Bytes::Loaded(bytes) => Some(bytes),
            Bytes::Written(_) => None,
        }
    }

    /// Output width; 1 for a vector.
    pub fn rows(&self) -> usize {
        if self.shape.len() == 2 { self.shape[0] } else { 1 }
    }

    /// Input width; the length of a vector.
    pub fn cols(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows() * self.cols()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The values as little-endian bytes of [`Self::dtype`].
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Loaded(bytes) => bytes,
            Bytes::Written(words) => (**words).as_ref(),
        }
    }

    /// All values without a copy, if they are aligned f32.
    pub(super) fn in_place(&self) -> Option<&[f32]> {
        (self.dtype == Dtype::F32).then(|| bytemuck::try_cast_slice(self.bytes()).ok()).flatten()
    }

    /// The rows in the range `rows` as f32, `[rows.len(), cols]`.
    pub(super) fn read(&self, rows: Range<usize>) -> Rows<'_> {
        let cols = self.cols();
        match self.in_place() {
            Some(values) => Rows::InPlace(&values[rows.start * cols..rows.end * cols]),
            None => {
                let mut scratch = Scratch::take(rows.len() * cols);
                self.read_into(rows.start * cols, &mut scratch);
                Rows::Widened(scratch)
            }
        }
    }

    /// All values, as f32.
    pub(super) fn read_all(&self) -> Rows<'_> {
        self.read(0..self.rows())
    }

    /// Converts `out.len()` elements from `start` to f32 and writes them to `out`.
    pub(super) fn read_into(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        widen(self.dtype, &self.bytes()[start * size..(start + out.len()) * size], out);
    }

    /// The bytes, with unspecified content, to be overwritten completely. Reuses the old allocation unless the
    /// checkpoint owns it or a [`HostTensor`] from [`Self::host`] still shares it.
    pub(super) fn bytes_mut(&mut self) -> &mut [u8] {
        let len = self.len() * self.dtype.size();
        let reusable = match &mut self.bytes {
            Bytes::Written(words) => Arc::get_mut(words).is_some(),
            Bytes::Loaded(_) => false,
        };
        if !reusable {
            self.bytes = Bytes::Written(Arc::new(AlignedBytes { words: vec![0; len.div_ceil(4)], len }));
        }
        match &mut self.bytes {
            Bytes::Written(words) => {
                let words = Arc::get_mut(words).expect("just allocated, or not shared");
                &mut bytemuck::cast_slice_mut(&mut words.words)[..len]
            }
            Bytes::Loaded(_) => unreachable!("replaced above"),
        }
    }

    /// The stored dtype.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }
}

/// Converts little-endian `bytes` of `dtype` to f32, vectorised.
fn widen(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => simd!({
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *x = f32::from_le_bytes(*b);
            }
        }),
        Dtype::Bf16 => simd!({
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = bf16_bits_to_f32(u16::from_le_bytes(*b));
            }
        }),
        Dtype::F16 => simd!({
            for (x, b) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *x = f16_bits_to_f32(u16::from_le_bytes(*b));
            }
        }),
    }
}

#[inline(always)]
fn bf16_bits_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Branch-free, so that it vectorises. A multiplication by 2^112 changes the exponent bias from 15 to 127; it is exact,
/// also for subnormals. Infinities and NaN keep an all-ones exponent.
#[inline(always)]
pub(super) fn f16_bits_to_f32(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let sign = u32::from(bits & 0x8000) << 16;
    let finite = (f32::from_bits(magnitude) * f32::from_bits((127 + 112) << 23)).to_bits();
    let special = magnitude | 0x7f80_0000;
    f32::from_bits(sign | if magnitude >= 0x7c00 << 13 { special } else { finite })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::decode_into;

    #[test]
    fn every_16_bit_pattern_converts_as_in_the_half_crate() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        for dtype in [Dtype::F16, Dtype::Bf16] {
            let (mut got, mut want) = (vec![0.0; 1 << 16], vec![0.0f32; 1 << 16]);
            widen(dtype, &bytes, &mut got);
            decode_into(dtype, &bytes, &mut want);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                assert!(g.to_bits() == w.to_bits() || g.is_nan() && w.is_nan(), "{dtype:?} {i:#06x}: {g} {w}");
            }
        }
    }

    #[test]
    fn unaligned_f32_is_read_correctly() {
        let mut bytes = vec![0u8; 1];
        bytes.extend([1.5f32, -2.0, 3.25, 0.0].iter().flat_map(|x| x.to_le_bytes()));
        let shared = SharedBytes::from(bytes).slice(1..17);
        let w = Weight::new(HostTensor::new(Dtype::F32, vec![2, 2], shared));
        assert_eq!(&*w.read(1..2), [3.25, 0.0]);
        assert_eq!(&*w.read_all(), [1.5, -2.0, 3.25, 0.0]);
    }

    #[test]
    fn writing_reuses_the_bytes_unless_they_are_shared() {
        let mut w = Weight::new(HostTensor::from_f32(vec![2], &[1.0, 2.0]));
        let first = w.bytes_mut().as_ptr();
        assert_eq!(w.bytes_mut().as_ptr(), first);
        w.bytes_mut().fill(0);
        let held = w.host();
        w.bytes_mut().fill(0xff);
        assert_eq!(held.to_f32(), [0.0, 0.0]);
        assert!(w.host().to_f32()[0].is_nan());
    }
}
