//! The rates that this GPU reaches at best: of a large product, and of copies.

use std::sync::Arc;
use std::time::Instant;

use moewarden::backend::cuda::Cuda;
use moewarden::backend::cuda::gpu::{Error, Gpu};
use moewarden::backend::cuda::pool::Reuse;
use moewarden::backend::{Backend, Dtype};
use serde::Serialize;

use crate::layer::noise_rows;

/// Seconds per measurement, and number of measurements.
const SPAN: f64 = 0.1;
const ROUNDS: usize = 5;

/// Measured, not taken from a data sheet: the bounds that operations are compared with.
#[derive(Clone, Serialize)]
pub struct Ceilings {
    /// The GPU's name.
    pub gpu: String,
    /// Bytes of its memory.
    pub memory: usize,
    /// FLOP/s of a square product of random BF16 numbers by cuBLAS.
    pub flops: f64,
    /// Bytes/s of a copy within the GPU's memory, read and written.
    pub bytes: f64,
    /// Bytes/s of copies from pageable host memory, as weights are loaded.
    pub to_gpu: f64,
    /// Bytes/s of copies to pageable host memory.
    pub from_gpu: f64,
}

impl Ceilings {
    /// Measures with products of this many rows and columns, and copies of this many bytes.
    pub fn measure(gpu: &Arc<dyn Gpu>, side: usize, bytes: usize) -> Result<Self, Error> {
        let name = gpu.name();
        let flops = {
            let b = Cuda::new(gpu.clone(), Dtype::Bf16, Reuse::Segments);
            let (x, w) = (noise_rows(&b, side, side, 1.0), b.random_weight(Dtype::Bf16, vec![side, side], 2, 0.02));
            2.0 * (side as f64).powi(3) / best(gpu, || drop(b.linear(&x, &w, None)))?
        };
        let allocate = || {
            let full = Error::Fault { call: "ceilings".into(), message: "the GPU's memory is full".into() };
            gpu.allocate(bytes)?.ok_or(full)
        };
        let (first, second) = (allocate()?, allocate()?);
        let mut host = vec![1u8; bytes / 4];
        gpu.copy_in(first, &host)?;
        let rate = |bytes: usize, seconds: f64| bytes as f64 / seconds;
        let within = rate(2 * bytes, best(gpu, || gpu.copy(first, second, bytes).expect("a copy within the GPU"))?);
        let to_gpu = rate(host.len(), best(gpu, || gpu.copy_in(first, &host).expect("a copy to the GPU"))?);
        let from = best(gpu, || gpu.copy_out(first, &mut host).expect("a copy from the GPU"))?;
        let from_gpu = rate(host.len(), from);
        gpu.free(first)?;
        gpu.free(second)?;
        Ok(Self { gpu: name, memory: gpu.memory()?.total, flops, bytes: within, to_gpu, from_gpu })
    }
}

/// The seconds of the fastest of a few loops: interference only slows them down.
fn best(gpu: &Arc<dyn Gpu>, mut f: impl FnMut()) -> Result<f64, Error> {
    let mut run = |n: usize| {
        let start = Instant::now();
        (0..n).for_each(|_| f());
        gpu.synchronize().map(|()| start.elapsed().as_secs_f64() / n as f64)
    };
    run(1)?; // warm-up: allocates, loads the kernel
    let n = ((SPAN / run(1)?.max(1e-9)) as usize).clamp(1, 1000);
    let times = (0..ROUNDS).map(|_| run(n)).collect::<Result<Vec<f64>, Error>>()?;
    Ok(times.into_iter().fold(f64::INFINITY, f64::min))
}
