//! NCCL: collectives on GPU memory, one GPU per rank, concurrent with computation.
//!
//! Ranks that already have a [`Collective`](super::Collective) (threads or MPI) create a [`Communicator`]. The host
//! collective broadcasts NCCL's unique id, and continues to carry small data and all decisions. NCCL carries gradients
//! and weights:
//!
//! ```text
//! backward, top to bottom                    compute stream     NCCL's stream
//!   gradient of the last parameter           ...
//!   reduce_scatter_f32(that gradient)        layer below        waits for the gradient, sums it
//!   gradient of the parameter before         ...                ...
//! wait(), join()                             waits for the sums
//! norm, finiteness check, AdamW on the shard ...
//! all_gather_into(new weights)                                  gathers, parameter by parameter
//! wait(), join()                             next forward
//! ```
//!
//! A parameter's gradient is sent from where the backward pass wrote it, as soon as it is complete, split as in the
//! optimizer's shard plan. It must not be written again before [`DeviceCollective::join`].
//!
//! A GPU has no timeout: a stream that waits for an operation which a lost rank never joins waits forever, and the host
//! blocks at its next copy from the GPU. So the host calls [`DeviceCollective::wait`] before it blocks on the compute
//! stream. `wait` polls for errors; after the timeout it aborts the communicator, which ends NCCL's kernels and frees
//! the stream.
//!
//! Results are bit-identical between runs if NCCL chooses the same algorithm, which it does for the same sizes on the
//! same machines; `NCCL_ALGO=Ring` fixes the choice. After a reduce-scatter and an all-gather all ranks hold the same
//! bits in any case, as only one rank sums each part.

mod communicator;
mod library;

pub use self::communicator::Communicator;
pub use self::library::{Nccl, UniqueId};
use super::Result;

/// Collective operations on device memory, given by address.
///
/// All ranks must queue the same operations in the same order. An operation starts when all work that was queued in the
/// rank's compute stream before the call is done, and runs concurrently with work queued later. Later work must not
/// access its memory before [`Self::join`].
///
/// The caller guarantees that an address points to memory on this rank's GPU of at least the given length, which stays
/// allocated until [`Self::wait`] has returned.
pub trait DeviceCollective: Send + Sync {
    /// This rank, from 0 to `world_size - 1`.
    fn rank(&self) -> usize;

    /// Number of ranks in the group, at least 1.
    fn world_size(&self) -> usize;

    /// Overwrites `len` f32 values with their elementwise sum over the ranks.
    ///
    /// # Errors
    /// [`Error::Nccl`](super::Error::Nccl), [`Error::Timeout`](super::Error::Timeout). After an error every
    /// call returns the same error.
    fn all_reduce_f32(&self, values: u64, len: usize) -> Result<()>;

    /// Sums `values` over the ranks and scatters the sum: `counts[r]` consecutive values of it go to rank r. Overwrites
    /// `part` with this rank's values. `part` may be the address of these values inside `values` (in place).
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn reduce_scatter_f32(&self, values: u64, counts: &[usize], part: u64) -> Result<()>;

    /// Concatenates the ranks' parts, `counts[r]` bytes of rank r, into `out`. `part` may be the address of this rank's
    /// part inside `out` (in place).
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn all_gather_into(&self, part: u64, counts: &[usize], out: u64) -> Result<()>;

    /// Makes the compute stream wait for all operations queued so far. Does not block the host.
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn join(&self) -> Result<()>;

    /// Blocks the host until all operations queued so far are done, at most for the timeout.
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn wait(&self) -> Result<()>;

    /// Fails all pending and future operations, also those that another thread waits for. Local: the other ranks are
    /// not notified.
    fn abort(&self);
}
