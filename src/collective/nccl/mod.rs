//! NCCL: sums and copies between the memories of GPUs, one GPU a rank, beside the computation.
//!
//! A [`Communicator`] is made by ranks that already have a [`Collective`](super::Collective) (threads or MPI), which spreads
//! NCCL's id and stays in charge of everything that is small or decides something. NCCL moves gradients and weights:
//!
//! ```text
//! backward, top to bottom                    compute stream     NCCL's stream
//!   the gradient of the last parameter       ...
//!   reduce_scatter_f32(that gradient)        layer below        waits for it, sums it
//!   the gradient of the one before           ...                sums it when both are there
//! wait(), join()                             waits for the parts
//! norm and finiteness, AdamW on the shard    ...
//! all_gather_into(new weights)                                  gathers, parameter by parameter
//! wait(), join()                             next forward
//! ```
//!
//! A parameter's gradient goes as soon as the backward has finished it, where it lies, in the parts of the optimizer's shard
//! plan; it must not be written again before [`DeviceCollective::join`].
//!
//! A GPU cannot be told to give up: a stream that waits for an operation that a lost rank never joins waits for ever, and so
//! would the host at its next copy from the GPU. So the host calls [`DeviceCollective::wait`] before it blocks on the compute
//! stream: it asks for errors, gives up after the timeout, and then ends NCCL's kernels, which frees the stream.
//!
//! For the same bits in every run NCCL has to choose the same algorithm, which it does for the same sizes on the same
//! machines; `NCCL_ALGO=Ring` pins it. After a reduce-scatter and an all-gather all ranks hold the same bits in any case: each
//! part was summed once.

mod communicator;
mod library;

pub use self::communicator::Communicator;
pub use self::library::{Nccl, UniqueId};
use super::Result;

/// Operations on memory of GPUs, by its address.
///
/// All ranks queue the same operations in the same order. An operation starts when everything is done that was queued in the
/// rank's compute stream before the call; it runs beside what is queued there later. Its memory may not be touched before
/// [`Self::join`].
///
/// Addresses are the caller's part, as in the backend: they are of memory on this rank's GPU, of the length that is said,
/// which lives until the host has waited.
pub trait DeviceCollective: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn world_size(&self) -> usize;

    /// Overwrites `len` f32 values with their sum over the ranks.
    ///
    /// # Errors
    /// [`Error::Nccl`](super::Error::Nccl), [`Error::Timeout`](super::Error::Timeout). After an error every call returns it again.
    fn all_reduce_f32(&self, values: u64, len: usize) -> Result<()>;

    /// Sums `values` over the ranks and gives each rank its own part: with parts of `counts` values (one a rank, in order),
    /// `part` becomes the sum of part `rank()`. `part` may lie where that part of `values` does.
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn reduce_scatter_f32(&self, values: u64, counts: &[usize], part: u64) -> Result<()>;

    /// Puts the ranks' parts, of `counts` bytes, one after another into `out`. `part` may lie where it comes to lie there.
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn all_gather_into(&self, part: u64, counts: &[usize], out: u64) -> Result<()>;

    /// Lets the compute stream wait for all operations queued so far. The host does not wait.
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn join(&self) -> Result<()>;

    /// Waits on the host until all operations queued so far are done.
    ///
    /// # Errors
    /// See [`Self::all_reduce_f32`].
    fn wait(&self) -> Result<()>;

    /// Ends all operations, also those that another thread waits for; they and all to come fail. Tells no other rank.
    fn abort(&self);
}
