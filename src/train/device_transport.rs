//! Collective operations between the memories of the ranks' devices: gradients and new weights do not go through the host.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use crate::backend::Backend;
use crate::backend::cuda::{Buffer, Cuda, Staged, Weight};
use crate::collective::nccl::DeviceCollective;
use crate::collective::{Collective, Result};

/// The device-to-device operations of a sharded update. All ranks call the same operations in the same order. They are
/// asynchronous: until [`Self::finish`] returns, do not write what is sent nor read what is received.
pub trait DeviceTransport<B: Backend>: Send + Sync {
    /// Reduce-scatters the gradient of one parameter, at element `at` of `gradients`: rank r receives the sum of its piece, of
    /// `counts[r]` elements, at element `shard_at` of its `shard`. Starts after all kernels queued so far.
    ///
    /// # Errors
    /// Those of [`DeviceCollective`].
    fn reduce_scatter(
        &self,
        gradients: &B::Buffer,
        at: usize,
        counts: &[usize],
        shard: &B::Buffer,
        shard_at: usize,
    ) -> Result<()>;

    /// All-gathers the new value of one parameter into `weight`, in its stored dtype: this rank's piece is `master[at]`, and
    /// rank r's has `counts[r]` elements.
    ///
    /// # Errors
    /// Those of [`DeviceCollective`].
    fn all_gather(&self, master: &B::Buffer, at: Range<usize>, counts: &[usize], weight: &mut B::Weight) -> Result<()>;

    /// Waits until all operations have completed on all ranks.
    ///
    /// # Errors
    /// Those of [`Collective::barrier`] and of [`DeviceCollective`].
    fn finish(&self) -> Result<()>;
}

/// Transport between GPUs, each with its own memory, by NCCL.
pub struct GpuTransport {
    device: Box<dyn DeviceCollective>,
    host: Arc<dyn Collective>,
    /// Owns the stream and the memory that queued operations use.
    backend: Arc<Cuda>,
    /// New values of parameters that lie in blocks (see [`crate::backend::cuda`]), until they have been received.
    staged: Mutex<Vec<Staged>>,
}

/// Bytes of such values that wait on the GPU at the same time.
const STAGED: usize = 256 << 20;

impl GpuTransport {
    /// Connects the GPUs of the ranks of `host` by `device`. The same parameters of all ranks lie in blocks.
    pub fn new(device: Box<dyn DeviceCollective>, host: Arc<dyn Collective>, backend: Arc<Cuda>) -> Self {
        Self { device, host, backend, staged: Mutex::default() }
    }

    /// Gathers into a parameter on the GPU.
    fn gather(&self, master: &Buffer, at: Range<usize>, counts: &[usize], weight: &mut Weight) -> Result<()> {
        let before: usize = counts[..self.device.rank()].iter().sum();
        self.backend.set_weight_part(weight, before, master, at);
        let size = weight.dtype().size();
        let bytes: Vec<usize> = counts.iter().map(|n| n * size).collect();
        // In-place all-gather: this rank's piece is already at its offset in the weight.
        self.device.all_gather_into(weight.address().offset(before * size).0, &bytes, weight.address().0)
    }
}

impl DeviceTransport<Cuda> for GpuTransport {
    fn reduce_scatter(
        &self,
        gradients: &Buffer,
        at: usize,
        counts: &[usize],
        shard: &Buffer,
        shard_at: usize,
    ) -> Result<()> {
        let values = gradients.at(at, counts.iter().sum());
        let part = shard.at(shard_at, counts[self.device.rank()]);
        self.device.reduce_scatter_f32(values.0, counts, part.0)
    }

    fn all_gather(&self, master: &Buffer, at: Range<usize>, counts: &[usize], weight: &mut Weight) -> Result<()> {
        let Some(mut staged) = self.backend.stage(weight) else { return self.gather(master, at, counts, weight) };
        self.gather(master, at, counts, staged.weight_mut())?;
        let mut waiting = self.staged.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.push(staged);
        let bytes: usize = waiting.iter().map(|staged| staged.weight().len() * staged.weight().dtype().size()).sum();
        drop(waiting);
        // The same on all ranks, which meet in `finish`.
        if bytes >= STAGED { self.finish() } else { Ok(()) }
    }

    /// The host's barrier names a rank that is gone, which a waiting NCCL kernel cannot. After the barrier every rank has
    /// queued its operations, so that all of them complete.
    fn finish(&self) -> Result<()> {
        self.host.barrier().inspect_err(|_| self.device.abort())?;
        self.device.wait()?;
        self.device.join()?;
        let received = std::mem::take(&mut *self.staged.lock().unwrap_or_else(PoisonError::into_inner));
        received.into_iter().for_each(Cuda::store);
        Ok(())
    }
}
