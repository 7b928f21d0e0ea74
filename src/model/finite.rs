//! Fast search for NaN and infinite weights by their exponent bits.

use rayon::prelude::*;

use super::ids::{ParamId, ParamSpec};
use crate::backend::{Dtype, HostTensor};
use crate::exit::{self, Coded};
use crate::meter::{Meter, Unit};

/// A weight is NaN or infinite.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("the weight `{tensor}` is NaN or infinite at element {index}")]
pub struct NotFinite {
    /// The parameter's name.
    pub tensor: String,
    /// Row-major index of the element.
    pub index: usize,
}

impl Coded for NotFinite {
    fn exit_code(&self) -> u8 {
        exit::NOT_FINITE
    }
}

/// Bytes that one thread checks at a time; a multiple of every element size.
const CHUNK: usize = 1 << 20;

/// The first parameter, in order, with a non-finite element, and the index of that element.
pub(super) fn first(params: &[ParamSpec]) -> Option<(ParamId, usize)> {
    let chunks: Vec<(ParamId, usize)> = params
        .iter()
        .enumerate()
        .flat_map(|(id, spec)| (0..spec.base.bytes.len()).step_by(CHUNK).map(move |at| (id, at)))
        .collect();
    let meter = Meter::start("checking the weights", Unit::Bytes, chunks.len() as u64 * CHUNK as u64);
    chunks.par_iter().find_map_first(|&(id, at)| {
        meter.add(CHUNK);
        let value = &params[id].base;
        let end = value.bytes.len().min(at + CHUNK);
        let found = in_bytes(value.dtype, &value.bytes[at..end])?;
        Some((id, at / value.dtype.size() + found))
    })
}

/// Row-major index of the first NaN or infinite element.
pub fn find_non_finite(value: &HostTensor) -> Option<usize> {
    in_bytes(value.dtype, &value.bytes)
}

/// An element is NaN or infinite if all bits of its exponent are set.
fn in_bytes(dtype: Dtype, bytes: &[u8]) -> Option<usize> {
    let half = |mask: u16| {
        let (entries, _) = bytes.as_chunks::<2>();
        let bad = |entry: &[u8; 2]| u16::from_le_bytes(*entry) & mask == mask;
        // Two passes: the first has no early exit, so that the compiler vectorises it.
        let any = entries.iter().fold(false, |any, entry| any | bad(entry));
        if any { entries.iter().position(bad) } else { None }
    };
    match dtype {
        Dtype::F16 => half(0x7c00),
        Dtype::Bf16 => half(0x7f80),
        Dtype::F32 => {
            const MASK: u32 = 0x7f80_0000;
            let (entries, _) = bytes.as_chunks::<4>();
            let bad = |entry: &[u8; 4]| u32::from_le_bytes(*entry) & MASK == MASK;
            let any = entries.iter().fold(false, |any, entry| any | bad(entry));
            if any { entries.iter().position(bad) } else { None }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::ParamKind;

    #[test]
    fn the_first_non_finite_element_is_found_in_every_format() {
        let largest = [f32::MAX, 65504.0, 3.38e38];
        for (dtype, largest) in [Dtype::F32, Dtype::F16, Dtype::Bf16].into_iter().zip(largest) {
            let mut values = vec![largest; CHUNK + 5]; // more than one chunk
            values[3] = -0.0;
            let spec = |values: &[f32]| {
                let value = HostTensor::encode(dtype, vec![values.len()], values);
                ParamSpec::new(ParamKind::Embedding, "t".into(), 0..value.bytes.len(), value)
            };
            let good = spec(&values);
            assert_eq!(first(std::slice::from_ref(&good)), None, "{dtype:?}");
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let mut values = values.clone();
                values[CHUNK + 2] = bad;
                values[CHUNK + 4] = bad;
                assert_eq!(first(&[good.clone(), spec(&values)]), Some((1, CHUNK + 2)), "{dtype:?} {bad}");
            }
        }
    }
}
