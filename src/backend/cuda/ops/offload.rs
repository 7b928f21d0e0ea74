//! Parameters in the host's memory, or divided among the GPUs of several ranks. See [`ring`](crate::backend::cuda::ring).

use std::time::Instant;

use super::transfer;
use crate::backend::HostTensor;
use crate::backend::cuda::gpu::{Error, LoadPart, Source};
use crate::backend::cuda::tensor::{InBlock, Place, Staged};
use crate::backend::cuda::{Cuda, Weight, must};

/// Parameters begin at multiples of this many bytes in a block, as tensors do in the pool: kernels load whole vectors.
const ALIGNMENT: usize = 512;
/// Bytes of a copy that measures the bus, and the number of copies: some 5 to 20 ms.
const MEASURED: usize = 8 << 20;
const COPIES: usize = 32;

/// Where parameters of these sizes begin in a block, and the size of the block, in bytes.
fn layout(sizes: impl Iterator<Item = usize>) -> (Vec<usize>, usize) {
    let mut bytes = 0;
    let offsets = sizes.map(|size| {
        let offset = bytes;
        bytes += size.next_multiple_of(ALIGNMENT);
        offset
    });
    (offsets.collect(), bytes)
}

/// Parameters with these values in one block. On their way to the host's memory they do not pass through the GPU, whose memory the
/// other weights may fill.
pub fn weights(cuda: &Cuda, values: &[HostTensor]) -> Vec<Weight> {
    let (offsets, bytes) = layout(values.iter().map(|value| value.bytes.len()));
    if bytes == 0 {
        return values.iter().map(|value| transfer::weight(cuda, value)).collect();
    }
    let block = must(cuda.ring.block(bytes));
    let copied = values.iter().zip(offsets).map(|(value, offset)| {
        transfer::check_shape(value);
        block.write(offset, &value.bytes);
        let place = Place::Block(InBlock { block: block.clone(), offset });
        Weight { dtype: value.dtype, shape: value.shape.clone(), place }
    });
    copied.collect()
}

/// Moves parameters to one block.
pub fn offload(cuda: &Cuda, weights: Vec<Weight>) -> Vec<Weight> {
    let (offsets, bytes) = layout(weights.iter().map(Weight::bytes));
    if bytes == 0 {
        return weights;
    }
    let block = must(cuda.ring.block(bytes));
    let moved = weights.into_iter().zip(offsets).map(|(weight, offset)| {
        let to = InBlock { block: block.clone(), offset };
        let (dtype, shape) = (weight.dtype, weight.shape.clone());
        store(Staged { weight, to: to.clone() });
        Weight { dtype, shape, place: Place::Block(to) }
    });
    moved.collect()
}

/// Begins to copy the block of these parameters to the GPU. A layer has at most one.
pub fn request<'w>(mut weights: impl Iterator<Item = &'w Weight>) {
    if let Some(at) = weights.find_map(Weight::in_block) {
        at.block.request();
    }
}

/// Room on the GPU for a new value of `w`, if it lies in a block.
pub fn stage(cuda: &Cuda, w: &Weight) -> Option<Staged> {
    let to = w.in_block()?.clone();
    let place = Place::Gpu(cuda.scratch(w.bytes()));
    Some(Staged { weight: Weight { dtype: w.dtype, shape: w.shape.clone(), place }, to })
}

/// Queues the copy of a new value to its block. Copies from there begin after the work queued so far, and so after this one.
pub fn store(Staged { weight, to }: Staged) {
    to.block.store(to.offset, weight.address(), weight.bytes());
}

/// Overwrites a parameter if it lies in a block. Returns whether it does.
pub fn write(w: &mut Weight, value: &HostTensor) -> bool {
    let Some(at) = w.in_block() else { return false };
    assert!(w.dtype == value.dtype && w.shape == value.shape, "another shape than that of the parameter");
    at.block.write(at.offset, &value.bytes);
    true
}

/// Bytes per second from pinned memory of the host to the GPU; `None` if the memory of either is full.
pub fn measure_bus(cuda: &Cuda) -> Result<Option<f64>, Error> {
    let gpu = &cuda.gpu;
    let Ok(memory) = cuda.pool.take(MEASURED) else { return Ok(None) };
    let Some(from) = gpu.allocate_host(MEASURED)? else { return Ok(None) };
    let copies = || {
        for _ in 0..COPIES {
            let load = gpu.load(&[LoadPart { from: Source::Host(from), to: memory.address(), bytes: MEASURED }])?;
            gpu.await_load(load)?;
        }
        gpu.synchronize()
    };
    let seconds = copies().and_then(|()| {
        let clock = Instant::now();
        copies().map(|()| clock.elapsed().as_secs_f64())
    });
    gpu.free_host(from)?;
    Ok(Some((MEASURED * COPIES) as f64 / seconds?.max(f64::MIN_POSITIVE)))
}
