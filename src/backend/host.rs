//! Tensors in host memory: a dtype, a shape and bytes that may be memory-mapped.

use std::ops::{Deref, Range};
use std::sync::Arc;

use half::{bf16, f16};

/// The number formats of checkpoints that moewarden reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// The upper half of an f32.
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

/// A range of bytes that several tensors may share: part of a memory-mapped file, or owned.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBytes {
    /// Part of `owner`. Panics if the range lies outside it.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> Self {
        assert!(
            range.start <= range.end && range.end <= (*owner).as_ref().len(),
            "byte range {range:?} outside its owner"
        );
        Self { owner, range }
    }

    /// How many; does not read them.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Part of these bytes, sharing the owner.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.end <= self.range.len(), "byte range {range:?} outside {} bytes", self.range.len());
        let start = self.range.start + range.start;
        Self { owner: self.owner.clone(), range: start..start + range.len() }
    }
}

impl From<Vec<u8>> for SharedBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let range = 0..bytes.len();
        Self { owner: Arc::new(bytes), range }
    }
}

impl Deref for SharedBytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

/// What owns bytes that are nowhere on the host.
struct Absent;

impl AsRef<[u8]> for Absent {
    fn as_ref(&self) -> &[u8] {
        panic!("these values were made on the device; the host has none to read")
    }
}

/// A dense row-major tensor in host memory, little-endian.
#[derive(Clone)]
pub struct HostTensor {
    /// Number format.
    pub dtype: Dtype,
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
    /// `shape.product() * dtype.size()` bytes; not necessarily aligned.
    pub bytes: SharedBytes,
}

impl HostTensor {
    /// A tensor over these bytes. Panics if their number contradicts the shape.
    pub fn new(dtype: Dtype, shape: Vec<usize>, bytes: SharedBytes) -> Self {
        assert_eq!(
            bytes.len(),
            shape.iter().product::<usize>() * dtype.size(),
            "bytes of a {dtype:?} tensor {shape:?}"
        );
        Self { dtype, shape, bytes }
    }

    /// A tensor that the host knows by format and shape alone. Reading its bytes panics.
    pub fn absent(dtype: Dtype, shape: Vec<usize>) -> Self {
        let range = 0..shape.iter().product::<usize>() * dtype.size();
        Self::new(dtype, shape, SharedBytes { owner: Arc::new(Absent), range })
    }

    /// An owned f32 tensor.
    pub fn from_f32(shape: Vec<usize>, values: &[f32]) -> Self {
        Self::encode(Dtype::F32, shape, values)
    }

    /// An owned tensor of `values` rounded (to nearest even) into `dtype`.
    pub fn encode(dtype: Dtype, shape: Vec<usize>, values: &[f32]) -> Self {
        let mut bytes = vec![0; values.len() * dtype.size()];
        encode_into(dtype, values, &mut bytes);
        Self::new(dtype, shape, bytes.into())
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All values, widened to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.len()];
        decode_into(self.dtype, &self.bytes, &mut out);
        out
    }
}

/// Rounds `values` (to nearest even) into little-endian `bytes` of `dtype`.
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

/// Widens little-endian `bytes` of `dtype` into `out`.
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
