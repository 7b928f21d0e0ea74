//! Gradients and new weights on their way between the memories of the ranks' devices, without the host.

use std::ops::Range;
use std::sync::Arc;

use crate::backend::Backend;
use crate::backend::cuda::{Buffer, Cuda, Weight};
use crate::collective::nccl::DeviceCollective;
use crate::collective::{Collective, Result};

/// What a sharded update sends between devices (a single rank: to itself). All ranks call the same in the same order.
///
/// What is sent may not be written, and what is received not be read, before [`Self::finish`].
pub trait Direct<B: Backend>: Send + Sync {
    /// Sums a parameter's gradient, which lies at element `at`, over the ranks, once everything queued so far is done: each
    /// rank gets its piece, of `counts` elements, in `shard` at `shard_at`. Does not wait.
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

    /// Gives all ranks a parameter's new value, of whose pieces, of `counts` elements, each rank has its own at `at` in
    /// `master`. Does not wait.
    ///
    /// # Errors
    /// Those of [`DeviceCollective`].
    fn all_gather(&self, master: &B::Buffer, at: Range<usize>, counts: &[usize], weight: &mut B::Weight) -> Result<()>;

    /// Waits until everything queued above is done.
    ///
    /// # Errors
    /// Those of [`Collective::barrier`] and of [`DeviceCollective`].
    fn finish(&self) -> Result<()>;
}

/// GPUs, each with its own memory.
pub struct BetweenGpus {
    device: Box<dyn DeviceCollective>,
    host: Arc<dyn Collective>,
    /// Its stream and its memory outlive what is queued.
    backend: Arc<Cuda>,
}

impl BetweenGpus {
    /// Joins the GPUs of the ranks of `host` by `device`.
    pub fn new(device: Box<dyn DeviceCollective>, host: Arc<dyn Collective>, backend: Arc<Cuda>) -> Self {
        Self { device, host, backend }
    }
}

impl Direct<Cuda> for BetweenGpus {
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
        let before: usize = counts[..self.device.rank()].iter().sum();
        self.backend.set_weight_part(weight, before, master, at);
        let size = weight.dtype().size();
        let bytes: Vec<usize> = counts.iter().map(|n| n * size).collect();
        // Each piece already lies where it belongs.
        self.device.all_gather_into(weight.address().offset(before * size).0, &bytes, weight.address().0)
    }

    /// A rank that was lost is found at the barrier, by name and soon; a GPU that waits for it can only wait. Once all are
    /// there, everything they wait for is queued.
    fn finish(&self) -> Result<()> {
        self.host.barrier().inspect_err(|_| self.device.abort())?;
        self.device.wait()?;
        self.device.join()
    }
}
