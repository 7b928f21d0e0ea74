//! Collective communication between ranks: all-reduce, reduce-scatter, all-gather, broadcast, barrier and abort.
//!
//! [`threads`] runs the ranks as threads of one process; a world of one rank is the single process. `mpi` (cargo
//! feature `mpi`) runs one process per rank. Both pass [`conformance::check`]. [`nccl`] adds collectives on GPU memory
//! to either.
//!
//! Each operation has a deadline, and each error names the rank at fault: a rank that died, that does not arrive before
//! the timeout, or that called another operation. This module knows nothing about models.

#[doc(hidden)]
pub mod conformance;
#[cfg(feature = "mpi")]
#[doc(hidden)]
pub mod mpi;
#[doc(hidden)]
pub mod nccl;
#[doc(hidden)]
pub mod threads;

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::exit::{self, Coded, Failure};

/// Why a collective operation failed. If one rank gets an error, all ranks do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Error {
    /// Two ranks called different operations, or the same operation with different lengths.
    #[error("rank {rank} is at {theirs} while rank 0 is at {ours}: the ranks no longer run the same program")]
    Mismatch {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Operation, length and activity of that rank.
        theirs: String,
        /// Operation, length and activity of rank 0.
        ours: String,
    },
    /// The ranks hold different values where they must hold the same, such as options, inputs or weights.
    #[error("rank {rank} has a different {what} than rank 0: the ranks would train different models")]
    Disagreement {
        /// What was compared, as a noun without an article.
        what: String,
        /// The first rank that differs from rank 0.
        rank: usize,
    },
    /// Some ranks did not arrive at an operation before the timeout.
    #[error("rank {rank} waited {seconds} s at {at} for rank(s) {missing:?}: they hang, or need a longer --timeout")]
    Timeout {
        /// The rank whose wait timed out.
        rank: usize,
        /// The operation that it waited in, and its activity.
        at: String,
        /// Length of the wait in seconds.
        seconds: u64,
        /// The ranks that did not arrive.
        missing: Vec<usize>,
    },
    /// A rank ended (its process died or its thread returned) while another waited for it.
    #[error("rank {ended} ended while rank {rank} waited for it at {at}")]
    RankEnded {
        /// The rank that noticed.
        rank: usize,
        /// The rank that ended.
        ended: usize,
        /// The operation that cannot complete, and the activity of the rank that noticed.
        at: String,
    },
    /// A rank called [`Collective::abort`].
    #[error("rank {rank} stopped the run: {reason}")]
    Aborted {
        /// The rank that called it.
        rank: usize,
        /// Exit code of that rank's error.
        code: u8,
        /// Message of that rank's error.
        reason: String,
    },
    /// The MPI library lacks a feature, or one of its calls failed.
    #[error("rank {rank}: MPI: {message}")]
    Mpi {
        /// The rank on which it failed.
        rank: usize,
        /// The library's message and the operation.
        message: String,
    },
    /// NCCL cannot be loaded or used, or one of its calls failed.
    #[error("rank {rank}: NCCL: {message}")]
    Nccl {
        /// The rank on which it failed.
        rank: usize,
        /// The library's message and the operation.
        message: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Mismatch { .. } | Error::Disagreement { .. } => exit::RANKS_DIFFER,
            Error::Timeout { .. } => exit::HANG,
            Error::RankEnded { .. } | Error::Mpi { .. } | Error::Nccl { .. } => exit::LAUNCHER,
            Error::Aborted { code, .. } => *code,
        }
    }
}

/// The result of a collective operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// One rank's handle to its group of ranks.
///
/// All ranks must call the same operations in the same order, with the same lengths unless an operation says otherwise.
/// Every operation blocks until its result is complete. Sums add the ranks' values in rank order, so all ranks, and
/// repeated runs, get the same bits. An error on one rank is an error on all; the group cannot be used afterwards.
pub trait Collective: Send + Sync {
    /// This rank, from 0 to `world_size - 1`.
    fn rank(&self) -> usize;

    /// Number of ranks in the group, at least 1.
    fn world_size(&self) -> usize;

    /// Returns once all ranks have called it.
    ///
    /// # Errors
    /// As for every operation: [`Error::Mismatch`], [`Error::Timeout`], [`Error::RankEnded`], [`Error::Aborted`]; over MPI
    /// also [`Error::Mpi`].
    fn barrier(&self) -> Result<()>;

    /// Copies `bytes` of rank 0 into `bytes` of every rank.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()>;

    /// Overwrites `values` with their elementwise sum over the ranks.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()>;

    /// Overwrites `values` with their elementwise sum over the ranks.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_reduce_f32(&self, values: &mut [f32]) -> Result<()>;

    /// Returns the bytes of every rank, indexed by rank. The lengths may differ between ranks.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Sums `values` over the ranks and scatters the sum: `counts[r]` consecutive elements of it go to rank r (the
    /// counts add up to `values.len()`). Overwrites `part`, of length `counts[rank()]`, with this rank's elements.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn reduce_scatter_f32(&self, values: &[f32], counts: &[usize], part: &mut [f32]) -> Result<()>;

    /// Concatenates the ranks' parts, `counts[r]` bytes of rank r, into `out` on every rank. A part may be empty.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()>;

    /// Sets the activity of this rank ("round 1, expert step 7"), which its errors and warnings name. Local: it sends
    /// nothing and does not block.
    fn set_activity(&self, activity: &str);

    /// The activity of this rank as last set; empty before the first call.
    fn activity(&self) -> String;

    /// Makes every pending and future operation of all ranks fail with [`Error::Aborted`]. `code` is the exit code of
    /// the error behind it, `reason` its message. Does not wait for the other ranks. If several ranks abort, the first
    /// wins.
    fn abort(&self, code: u8, reason: &str);

    /// Makes the group usable again after it has failed. Every rank calls it once its failed work has ended; returns once all have.
    ///
    /// # Errors
    /// See [`Self::barrier`]: a rank that has died, or still does other work.
    fn renew(&self) -> Result<()>;
}

/// Runs rank-local `work` (writing a model, for example) that may take longer than the collective timeout. A worker
/// thread runs it; meanwhile the ranks exchange heartbeats, so that a rank that dies or hangs is still noticed. Returns
/// once all ranks have finished their work.
///
/// # Errors
/// Those of [`Collective::barrier`].
///
/// # Panics
/// Resumes a panic of `work`.
pub fn with_heartbeat<T: Send>(collective: &dyn Collective, work: impl FnOnce() -> T + Send) -> Result<T> {
    const HEARTBEAT: std::time::Duration = std::time::Duration::from_millis(100);
    if collective.world_size() == 1 {
        return Ok(work());
    }
    std::thread::scope(|scope| {
        // The receiver sees the sender's drop, also when the work panics.
        let (done_sender, done_receiver) = std::sync::mpsc::channel::<()>();
        let worker = scope.spawn(move || {
            let _dropped_at_the_end = done_sender;
            work()
        });
        let mut interval = std::time::Duration::ZERO; // the first heartbeat is immediate: short work is not delayed
        loop {
            let done = done_receiver.recv_timeout(interval) != Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if collective.all_gather(&[u8::from(done)])?.iter().all(|done| *done == [1]) {
                return Ok(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            interval = HEARTBEAT;
        }
    })
}

/// Checks that all ranks hold the same `bytes`, usually a hash. `what` names them in the error.
///
/// # Errors
/// [`Error::Disagreement`] on all ranks if the bytes of one differ from those of rank 0; those of [`Collective::barrier`].
pub fn all_agree(collective: &dyn Collective, what: &str, bytes: &[u8]) -> Result<()> {
    let all = collective.all_gather(bytes)?;
    match all.iter().position(|other| *other != all[0]) {
        Some(rank) => Err(Error::Disagreement { what: what.to_owned(), rank }),
        None => Ok(()),
    }
}

/// Agrees on success: every rank passes its own result, and all ranks fail if one has failed. The group stays usable
/// after a failure.
///
/// # Errors
/// A rank that failed gets its own error back. The others get [`Error::Aborted`] with the error of the lowest failed
/// rank. Also those of [`Collective::barrier`].
pub fn all_ok<T>(collective: &dyn Collective, result: Result<T, Failure>) -> Result<T, Failure> {
    // Empty on success, else the exit code followed by the message.
    let mine = result.as_ref().err().map_or(Vec::new(), |e| [&[e.code()], e.to_string().as_bytes()].concat());
    let all = collective.all_gather(&mine);
    let value = result?;
    for (rank, theirs) in all?.iter().enumerate() {
        if let Some((code, reason)) = theirs.split_first() {
            let reason = String::from_utf8_lossy(reason).into_owned();
            return Err(Error::Aborted { rank, code: *code, reason }.into());
        }
    }
    Ok(value)
}

/// Lets rank 0 do some work, such as writing a file; all ranks fail if it fails.
///
/// # Errors
/// Those of the work and of [`all_ok`].
pub fn on_first(collective: &dyn Collective, work: impl FnOnce() -> Result<(), Failure>) -> Result<(), Failure> {
    all_ok(collective, if collective.rank() == 0 { work() } else { Ok(()) })
}

/// How a process leaves the other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// All ranks come to this end: wait for them (`MPI_Finalize`).
    Together,
    /// End the other processes too (`MPI_Abort`), so that none waits forever.
    Abort,
}

/// Ends MPI, if it is initialised, and then the process. Threads that still run are stopped.
pub fn leave(code: u8, how: Leave) -> ! {
    #[cfg(feature = "mpi")]
    mpi::leave(code, how);
    let _ = how; // only MPI needs it
    #[expect(clippy::exit, reason = "the one place where the process ends")]
    std::process::exit(code.into())
}

/// One rank's call of a collective operation: what ranks compare before they exchange data.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Call {
    op: Cow<'static, str>,
    /// Length that all ranks must share; `None` where it may differ between ranks.
    len: Option<usize>,
    /// What the rank was doing, for messages only.
    activity: String,
}

impl Call {
    /// Whether two ranks called the same operation with the same length.
    fn matches(&self, other: &Call) -> bool {
        (&self.op, self.len) == (&other.op, other.len)
    }

    /// The error for the first rank whose call differs from that of rank 0. `calls` is in rank order.
    fn first_mismatch<'a>(mut calls: impl Iterator<Item = &'a Call>) -> Option<Error> {
        let ours = calls.next()?;
        let (i, theirs) = calls.enumerate().find(|(_, call)| !call.matches(ours))?;
        Some(Error::Mismatch { rank: i + 1, theirs: theirs.to_string(), ours: ours.to_string() })
    }
}

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.op)?;
        if let Some(len) = self.len {
            write!(f, " of {len}")?;
        }
        if !self.activity.is_empty() {
            write!(f, " in {}", self.activity)?;
        }
        Ok(())
    }
}

/// Panics unless `counts` has one entry per rank, they add up to `total`, and this rank's entry is `part`.
fn check_counts(rank: usize, world_size: usize, counts: &[usize], part: usize, total: usize) {
    assert_eq!(counts.len(), world_size, "one count per rank");
    assert_eq!(counts[rank], part, "length of the part of rank {rank}");
    assert_eq!(counts.iter().sum::<usize>(), total, "sum of the counts");
}
