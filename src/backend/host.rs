//! Tensors in host memory: dtype, shape, and bytes that may be memory-mapped.

use std::ops::{Deref, Range};
use std::sync::Arc;

use half::{bf16, f16};
use memmap2::Mmap;

/// The element types of the checkpoints that moewarden reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16: the upper 16 bits of an f32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

/// A reference-counted range of bytes: part of a memory-mapped file, or of an owned vector.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Owner,
    range: Range<usize>,
}

#[derive(Clone)]
enum Owner {
    Mapped(Arc<Mmap>),
    Other(Arc<dyn AsRef<[u8]> + Send + Sync>),
}

impl Owner {
    fn bytes(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Other(owner) => (**owner).as_ref(),
        }
    }
}

impl SharedBytes {
    /// Bytes `range` of `owner`.
    ///
    /// # Panics
    /// If the range exceeds the owner.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        Self { range: 0..(*owner).as_ref().len(), owner: Owner::Other(owner) }.slice(range)
    }

    /// All bytes of a memory-mapped file.
    pub fn mapped(map: Mmap) -> Self {
        Self { range: 0..map.len(), owner: Owner::Mapped(Arc::new(map)) }
    }

    /// Adds the bytes that follow in the same memory-mapped file, if `next` is just these. Returns whether it is.
    pub(super) fn extend(&mut self, next: &Self) -> bool {
        let follows = match (&self.owner, &next.owner) {
            (Owner::Mapped(a), Owner::Mapped(b)) => Arc::ptr_eq(a, b) && self.range.end == next.range.start,
            _ => false,
        };
        if follows {
            self.range.end = next.range.end;
        }
        follows
    }

    /// Whether they are part of a memory-mapped file.
    pub(super) fn is_mapped(&self) -> bool {
        matches!(self.owner, Owner::Mapped(_))
    }

    /// Reads those of a memory-mapped file into memory, if they are not there, and returns once that is done. It is a hint: other
    /// bytes, other systems than Linux, and kernels before 5.14 do nothing.
    pub(super) fn populate(&self) {
        #[cfg(target_os = "linux")]
        if let Owner::Mapped(map) = &self.owner {
            // A read that fails now fails again, with a message, where the bytes are used.
            let _ = map.advise_range(memmap2::Advice::PopulateRead, self.range.start, self.range.len());
        }
    }

    /// Number of bytes. Does not access them.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there are no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Bytes `range` of these, sharing the owner.
    ///
    /// # Panics
    /// If the range exceeds these bytes.
    pub fn slice(&self, range: Range<usize>) -> Self {
        let fits = range.start <= range.end && range.end <= self.range.len();
        assert!(fits, "byte range {range:?} outside {} bytes", self.range.len());
        let start = self.range.start + range.start;
        Self { owner: self.owner.clone(), range: start..start + range.len() }
    }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        Self { range: 0..bytes.len(), owner: Owner::Other(Arc::new(bytes)) }
    }
}

impl Deref for SharedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner.bytes()[self.range.clone()]
    }
}

/// The owner of bytes that exist only on a device: see [`HostTensor::absent`].
struct Absent;

impl AsRef<[u8]> for Absent {
    fn as_ref(&self) -> &[u8] {
        panic!("these values exist only on the device and cannot be read on the host")
    }
}

/// A dense row-major tensor in host memory, little-endian.
#[derive(Clone)]
pub struct HostTensor {
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// `shape.product() * dtype.size()` bytes; not necessarily aligned.
    pub bytes: SharedBytes,
}

impl HostTensor {
    /// A tensor over existing bytes.
    ///
    /// # Panics
    /// If the number of bytes does not match dtype and shape.
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: SharedBytes) -> Self {
        assert_eq!(
            bytes.len(),
            shape.iter().product::<usize>() * dtype.size(),
            "bytes of a {dtype:?} tensor {shape:?}"
        );
        Self { dtype, shape, bytes }
    }

    /// A tensor with dtype and shape but without values on the host. Accessing its bytes panics.
    pub fn absent(dtype: Dtype, shape: Vec<usize>) -> Self {
        let range = 0..shape.iter().product::<usize>() * dtype.size();
        Self::new(dtype, shape, SharedBytes { owner: Owner::Other(Arc::new(Absent)), range })
    }

    /// An f32 tensor that owns a copy of `values`.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        Self::encode(Dtype::F32, shape, values)
    }

    /// A tensor that owns `values`, converted to `dtype` (rounded to nearest even).
    pub fn encode(dtype: Dtype, shape: Vec<usize>, values: &[f32]) -> Self {
        let mut bytes = vec![0; values.len() * dtype.size()];
        encode_into(dtype, values, &mut bytes);
        Self::new(dtype, shape, bytes.into())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it has no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All values, converted to f32 (exact).
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        decode_into(self.dtype, &self.bytes, &mut out);
        out
    }
}

/// Converts `values` to `dtype` (rounded to nearest even) and writes them to `bytes`, little-endian.
pub fn encode_into(dtype: Dtype, values: &[f32], bytes: &mut [u8]) {
    match dtype {
        Dtype::F32 => {
            for (b, x) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *b = x.to_le_bytes();
            }
        }
        Dtype::F16 => {
            for (b, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *b = f16::from_f32(*x).to_le_bytes();
            }
        }
        Dtype::Bf16 => {
            for (b, x) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *b = bf16::from_f32(*x).to_le_bytes();
            }
        }
    }
}

/// Converts little-endian `bytes` of `dtype` to f32 (exact) and writes them to `out`.
pub fn decode_into(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            for (b, x) in bytes.as_chunks::<4>().0.iter().zip(out) {
                *x = f32::from_le_bytes(*b);
            }
        }
        Dtype::F16 => {
            for (b, x) in bytes.as_chunks::<2>().0.iter().zip(out) {
                *x = f16::from_le_bytes(*b).to_f32();
            }
        }
        Dtype::Bf16 => {
            for (b, x) in bytes.as_chunks::<2>().0.iter().zip(out) {
                *x = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
    }
}
