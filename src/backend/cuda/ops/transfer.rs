//! Transfers between host and GPU.

use std::sync::Arc;

use crate::backend::cuda::tensor::{Angles, Place};
use crate::backend::cuda::{Buffer, Cuda, Indices, Scores, Sequences, Tensor, Weight};
use crate::backend::{Dtype, HostTensor, Packing, Rope, decode_into, encode_into};

/// A tensor of host values, rounded into `dtype`.
pub fn upload(cuda: &Cuda, rows: usize, cols: usize, values: &[f32], dtype: Dtype) -> Tensor {
    assert!(values.len() == rows * cols, "{} values for a [{rows}, {cols}] tensor", values.len());
    let x = cuda.tensor(rows, cols, dtype);
    let mut bytes = vec![0; values.len() * dtype.size()];
    encode_into(dtype, values, &mut bytes);
    cuda.copy_in(x.address(), &bytes);
    x
}

/// A tensor's values.
pub fn download(cuda: &Cuda, x: &Tensor) -> Vec<f32> {
    let bytes: Vec<u8> = cuda.copy_out(x.address(), x.len() * x.dtype().size());
    let mut values = vec![0.0; x.len()];
    decode_into(x.dtype(), &bytes, &mut values);
    values
}

/// A tensor of zeros.
pub fn zeros(cuda: &Cuda, rows: usize, cols: usize, dtype: Dtype) -> Tensor {
    let x = cuda.tensor(rows, cols, dtype);
    cuda.zero(x.address(), x.len() * dtype.size());
    x
}

/// Row numbers or ids.
pub fn indices(cuda: &Cuda, values: &[u32]) -> Indices {
    Indices { host: values.to_vec(), on_gpu: cuda.uploaded(values) }
}

/// A parameter, copied from the host's memory-mapped file without a second host copy.
pub fn weight(cuda: &Cuda, host: &HostTensor) -> Weight {
    check_shape(host);
    let memory = cuda.scratch(host.bytes.len());
    cuda.copy_in(memory.address(), &host.bytes);
    Weight { dtype: host.dtype, shape: host.shape.clone(), place: Place::Gpu(memory) }
}

/// Panics unless it has the shape of a parameter.
pub(super) fn check_shape(host: &HostTensor) {
    assert!(matches!(host.shape.len(), 1 | 2), "a parameter has one or two dimensions, not {:?}", host.shape);
}

/// A parameter's current value.
pub fn weight_host(cuda: &Cuda, w: &Weight) -> HostTensor {
    let bytes: Vec<u8> = match w.in_block() {
        None => cuda.copy_out(w.address(), w.bytes()),
        Some(at) => {
            let mut bytes = vec![0; w.bytes()];
            at.block.read(at.offset, &mut bytes);
            bytes
        }
    };
    HostTensor::new(w.dtype(), w.shape.clone(), bytes.into())
}

/// A buffer of zeros.
pub fn buffer(cuda: &Cuda, len: usize) -> Buffer {
    Buffer::new(cuda.scratch(4 * len), len)
}

/// `n` sums, all zero.
pub fn scores(cuda: &Cuda, n: usize) -> Scores {
    let sums = cuda.array(n);
    cuda.zero(sums.address(), 8 * n);
    Scores(sums)
}

/// Reads the sums and sets them to zero.
pub fn scores_take(cuda: &Cuda, s: &mut Scores) -> Vec<f64> {
    let values = cuda.copy_out(s.0.address(), s.0.len());
    cuda.zero(s.0.address(), 8 * s.0.len());
    values
}

/// Packed sequences. The angles of the positions are computed on the host, as for the CPU backend, and kept for the
/// next batch.
pub fn sequences(cuda: &Cuda, packing: &Packing, rope: &Rope) -> Sequences {
    let ends = [&packing.queries, &packing.keys];
    let ordered = ends.iter().all(|ends| ends[0] == 0 && ends.is_sorted());
    assert!(ordered && packing.queries.len() == packing.keys.len(), "row offsets of a packing: {packing:?}");
    let positions = packing.positions();
    let needed = positions.iter().max().map_or(0, |&p| p as usize + 1);
    let mut kept = cuda.angles.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let angles = match &*kept {
        Some(angles) if angles.rope == *rope && angles.positions >= needed => angles.clone(),
        // Rounded up to a power of two, so that decoding token by token makes few tables.
        _ => kept.insert(Arc::new(make_angles(cuda, rope, needed.next_power_of_two()))).clone(),
    };
    let offsets = |ends: &[usize]| {
        let ends: Vec<u32> = ends.iter().map(|&x| u32::try_from(x).expect("fewer than 2^32 rows")).collect();
        cuda.uploaded(&ends)
    };
    Sequences {
        queries: offsets(&packing.queries),
        keys: offsets(&packing.keys),
        positions: cuda.uploaded(&positions),
        packing: packing.clone(),
        angles,
    }
}

fn make_angles(cuda: &Cuda, rope: &Rope, positions: usize) -> Angles {
    // The angle is rounded to f32 as the Hugging Face implementations do; its cosine is the correctly rounded one.
    let (sin, cos): (Vec<f32>, Vec<f32>) = (0..positions)
        .flat_map(|p| rope.inv_freq.iter().map(move |f| f64::from(p as f32 * f).sin_cos()))
        .map(|(sin, cos)| (sin as f32 * rope.scale, cos as f32 * rope.scale))
        .unzip();
    Angles { rope: rope.clone(), positions, cos: cuda.uploaded(&cos), sin: cuda.uploaded(&sin) }
}
