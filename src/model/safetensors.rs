//! The safetensors format: a strict reader and a writer of headers.
//!
//! A file is `u64` header length (little-endian), a JSON object `{name: {dtype, shape, data_offsets}}` with optional
//! string metadata under `__metadata__`, then the tensors' bytes, which cover the rest of the file without gaps or overlaps.
//! Format: <https://huggingface.co/docs/safetensors>. Checkpoints are untrusted input, and the `safetensors` crate (0.8)
//! accepts duplicate tensor names and keeps the last; this reader refuses them.

use std::fmt;
use std::io::{self, Write};
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::json::{Members, each_member};
use crate::backend::Dtype;
use crate::input;
use crate::quote::{cut, quote};

/// The format's limit on the JSON header, in bytes; a false length field cannot cause a larger allocation.
const MAX_HEADER: u64 = 100_000_000;

/// Names of the number formats and bits of one element.
const DTYPES: [(&str, usize); 22] = [
    ("F64", 64),
    ("F32", 32),
    ("F16", 16),
    ("BF16", 16),
    ("I64", 64),
    ("I32", 32),
    ("I16", 16),
    ("I8", 8),
    ("U64", 64),
    ("U32", 32),
    ("U16", 16),
    ("U8", 8),
    ("BOOL", 8),
    ("C64", 64),
    ("F8_E4M3", 8),
    ("F8_E5M2", 8),
    ("F8_E8M0", 8),
    ("F8_E4M3FNUZ", 8),
    ("F8_E5M2FNUZ", 8),
    ("F6_E2M3", 6),
    ("F6_E3M2", 6),
    ("F4", 4),
];

/// The number format of a stored tensor: name in the file, bits of an element.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct StoredDtype(&'static str, usize);

impl StoredDtype {
    fn parse(name: &str) -> Option<Self> {
        DTYPES.iter().find(|(known, _)| *known == name).map(|&(name, bits)| Self(name, bits))
    }

    /// The corresponding [`Dtype`], if moewarden computes in this format.
    pub fn float(self) -> Option<Dtype> {
        match self.0 {
            "F32" => Some(Dtype::F32),
            "F16" => Some(Dtype::F16),
            "BF16" => Some(Dtype::Bf16),
            _ => None,
        }
    }
}

impl From<Dtype> for StoredDtype {
    fn from(dtype: Dtype) -> Self {
        match dtype {
            Dtype::F32 => Self("F32", 32),
            Dtype::F16 => Self("F16", 16),
            Dtype::Bf16 => Self("BF16", 16),
        }
    }
}

impl fmt::Display for StoredDtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl fmt::Debug for StoredDtype {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorInfo {
    /// Unique in the file.
    pub name: String,
    /// Its number format.
    pub dtype: StoredDtype,
    /// Row-major: the last dimension is contiguous.
    pub shape: Vec<usize>,
    /// Byte range of the data, from the start of the file.
    pub file_range: Range<usize>,
}

/// A file's header, validated against the length of the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Bytes before the first tensor: the length field and the JSON.
    pub len: usize,
    /// `__metadata__`, in the order of the file.
    pub metadata: Vec<(String, String)>,
    /// The tensors, in the order of the header.
    pub tensors: Vec<TensorInfo>,
}

/// Why a header is invalid.
#[derive(Debug, thiserror::Error, PartialEq)]
#[allow(missing_docs)] // the messages are the documentation
pub enum HeaderError {
    #[error("the file has {0} bytes, too few for a safetensors file; is the download complete?")]
    TooShort(usize),
    #[error(
        "the length field claims a header of {claimed} bytes, but only {available} bytes follow; is the download complete?"
    )]
    BeyondFile { claimed: u64, available: usize },
    #[error("the length field claims a header of {0} bytes, more than the limit of {MAX_HEADER}")]
    TooLong(u64),
    #[error("the header is not JSON in the safetensors schema: {}; if the file is damaged, fetch or write it again", cut(.0, 300))]
    NotJson(String),
    #[error("tensor {}: the number format {} is unknown", quote(.tensor), quote(.dtype))]
    UnknownDtype { tensor: String, dtype: String },
    #[error("tensor {}: shape {shape:?} is too large for this machine", quote(.tensor))]
    TooLarge { tensor: String, shape: Vec<usize> },
    #[error("tensor {}: shape {shape:?} of {dtype} does not fill whole bytes", quote(.tensor))]
    BrokenBytes { tensor: String, shape: Vec<usize>, dtype: StoredDtype },
    #[error("tensor {}: data_offsets {begin}..{end} run backwards", quote(.tensor))]
    Backwards { tensor: String, begin: usize, end: usize },
    #[error("tensor {}: data_offsets span {found} bytes, but shape {shape:?} of {dtype} needs {needed}", quote(.tensor))]
    WrongSize { tensor: String, shape: Vec<usize>, dtype: StoredDtype, found: usize, needed: usize },
    #[error("tensor {} ends at byte {end} of the data, which has {available} bytes; is the download complete?", quote(.tensor))]
    Truncated { tensor: String, end: usize, available: usize },
    #[error("tensors {} and {} overlap", quote(.first), quote(.second))]
    Overlap { first: String, second: String },
    #[error("bytes {from}..{to} of the data belong to no tensor")]
    Hole { from: usize, to: usize },
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

/// The parsed header, before validation.
#[derive(Default)]
struct RawHeader {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, Entry)>,
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Walk;
        impl<'de> Visitor<'de> for Walk {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                each_member(map, |name, map| {
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Members<String>>()?.0;
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                    Ok(())
                })?;
                Ok(header)
            }
        }
        deserializer.deserialize_map(Walk)
    }
}

impl Header {
    /// Parses and validates the header of a file with these bytes.
    ///
    /// # Errors
    /// A header that violates the format, contradicts itself, or does not fit the length of the file.
    pub fn parse(file: &[u8]) -> Result<Self, HeaderError> {
        let (length, rest) = file.split_first_chunk::<8>().ok_or(HeaderError::TooShort(file.len()))?;
        let claimed = u64::from_le_bytes(*length);
        if claimed > MAX_HEADER {
            return Err(HeaderError::TooLong(claimed));
        }
        let json = rest.get(..claimed as usize).ok_or(HeaderError::BeyondFile { claimed, available: rest.len() })?;
        if json.first() != Some(&b'{') {
            return Err(HeaderError::NotJson("it does not begin with `{`".into()));
        }
        let raw: RawHeader = serde_json::from_slice(json).map_err(|e| HeaderError::NotJson(input::json_problem(&e)))?;
        let len = 8 + json.len();
        let check = |(name, entry): (String, Entry)| entry.check(name, len, file.len());
        let tensors = raw.tensors.into_iter().map(check).collect::<Result<_, _>>()?;
        let header = Self { len, metadata: raw.metadata, tensors };
        header.check_cover(file.len())?;
        Ok(header)
    }

    /// Checks that every byte of the data belongs to exactly one tensor.
    fn check_cover(&self, file_len: usize) -> Result<(), HeaderError> {
        let mut order: Vec<&TensorInfo> = self.tensors.iter().filter(|t| !t.file_range.is_empty()).collect();
        order.sort_by_key(|t| t.file_range.start);
        let (mut at, mut before) = (self.len, "");
        for t in order {
            if t.file_range.start < at {
                return Err(HeaderError::Overlap { first: before.into(), second: t.name.clone() });
            }
            if t.file_range.start > at {
                return Err(HeaderError::Hole { from: at - self.len, to: t.file_range.start - self.len });
            }
            (at, before) = (t.file_range.end, &t.name);
        }
        if at < file_len {
            return Err(HeaderError::Hole { from: at - self.len, to: file_len - self.len });
        }
        Ok(())
    }
}

impl Entry {
    fn check(self, tensor: String, data_at: usize, file_len: usize) -> Result<TensorInfo, HeaderError> {
        let Self { dtype, shape, data_offsets: (begin, end) } = self;
        let Some(dtype) = StoredDtype::parse(&dtype) else {
            return Err(HeaderError::UnknownDtype { tensor, dtype });
        };
        // A zero counts as one here, so that it cannot hide an overflow of the other sizes.
        let size = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d.max(1))).and_then(|n| n.checked_mul(dtype.1));
        let Some(size) = size else {
            return Err(HeaderError::TooLarge { tensor, shape });
        };
        let bits = if shape.contains(&0) { 0 } else { size };
        if bits % 8 != 0 {
            return Err(HeaderError::BrokenBytes { tensor, shape, dtype });
        }
        if begin > end {
            return Err(HeaderError::Backwards { tensor, begin, end });
        }
        if end - begin != bits / 8 {
            return Err(HeaderError::WrongSize { tensor, shape, dtype, found: end - begin, needed: bits / 8 });
        }
        if end > file_len - data_at {
            return Err(HeaderError::Truncated { tensor, end, available: file_len - data_at });
        }
        Ok(TensorInfo { name: tensor, dtype, shape, file_range: data_at + begin..data_at + end })
    }
}

/// Writes the length field and the header of a file with these tensors; their bytes must follow in this order.
///
/// # Errors
/// Write errors of `out`.
pub fn write_header(
    out: &mut impl Write,
    metadata: &[(String, String)],
    tensors: &[(String, Dtype, Vec<usize>)],
) -> io::Result<()> {
    let mut object = serde_json::Map::new();
    if !metadata.is_empty() {
        let metadata = metadata.iter().map(|(k, v)| (k.clone(), v.clone().into())).collect();
        object.insert("__metadata__".into(), serde_json::Value::Object(metadata));
    }
    let mut at = 0;
    for (name, dtype, shape) in tensors {
        let end = at + shape.iter().product::<usize>() * dtype.size();
        let dtype = StoredDtype::from(*dtype).0;
        object.insert(name.clone(), serde_json::json!({"dtype": dtype, "shape": shape, "data_offsets": [at, end]}));
        at = end;
    }
    let mut json = serde_json::to_vec(&object)?;
    json.resize(json.len().next_multiple_of(8), b' '); // aligns the data to 8 bytes
    out.write_all(&(json.len() as u64).to_le_bytes())?;
    out.write_all(&json)
}
