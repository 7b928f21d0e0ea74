//! What ranks say to each other: sums, copies, and that something went wrong. Nothing about models.
//!
//! [`threads`] runs n ranks as threads of one process; with n = 1 it is the single process. `mpi` (the cargo feature of
//! that name) joins processes. Every implementation passes [`conformance::check`]. [`nccl`] adds operations between the
//! memories of GPUs to either.

pub mod conformance;
#[cfg(feature = "mpi")]
pub mod mpi;
pub mod nccl;
pub mod threads;

use std::borrow::Cow;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::exit::{self, Coded, Failure};

/// Why ranks could not work together. All ranks get an error when one does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum Error {
    /// Two ranks called different operations, or the same one with different lengths.
    #[error("rank {rank} is at {theirs} while rank 0 is at {ours}: the ranks no longer run the same program")]
    Mismatch {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Operation, length and place of that rank.
        theirs: String,
        /// Those of rank 0.
        ours: String,
    },
    /// Ranks hold different values of something that decides what happens next.
    #[error("rank {rank} holds another {what} than rank 0: the ranks would train different models")]
    Disagree {
        /// What was compared.
        what: String,
        /// The first rank that differs from rank 0.
        rank: usize,
    },
    /// Ranks did not arrive in time.
    #[error("rank {rank} waited {seconds} s at {at} for rank(s) {missing:?}: they hang, or a longer timeout is needed")]
    Timeout {
        /// The rank that gave up.
        rank: usize,
        /// The operation it was at, and what for.
        at: String,
        /// How long it waited.
        seconds: u64,
        /// The ranks that had not come.
        missing: Vec<usize>,
    },
    /// A rank ended without finishing what the others were doing.
    #[error("rank {gone} ended while rank {rank} waited for it at {at}")]
    Gone {
        /// The rank that found out.
        rank: usize,
        /// The rank that is no more.
        gone: usize,
        /// The operation that cannot end, and what for.
        at: String,
    },
    /// A rank called [`Collective::abort`].
    #[error("rank {rank} stopped the run: {reason}")]
    Aborted {
        /// The rank that did.
        rank: usize,
        /// The exit code of its own error.
        code: u8,
        /// Its own words.
        reason: String,
    },
    /// The library that joins the ranks is missing something or failed.
    #[error("rank {rank}: MPI: {message}")]
    Library {
        /// The rank where it did.
        rank: usize,
        /// What it said, at which operation.
        message: String,
    },
    /// NCCL is missing something or failed.
    #[error("rank {rank}: NCCL: {message}")]
    Nccl {
        /// The rank where it did.
        rank: usize,
        /// What it said, at which operation.
        message: String,
    },
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Mismatch { .. } | Error::Disagree { .. } => exit::RANKS_DIFFER,
            Error::Timeout { .. } => exit::HANG,
            Error::Gone { .. } | Error::Library { .. } | Error::Nccl { .. } => exit::LAUNCHER,
            Error::Aborted { code, .. } => *code,
        }
    }
}

/// The result of a collective operation.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A group of ranks, seen from one of them.
///
/// Every operation is entered by all ranks in the same order, and with the same lengths except where it says otherwise;
/// it returns when its result is there. Sums add the ranks' values in the order of the ranks, so that all ranks, and two
/// runs, get the same bits. An error on one rank is an error on all: the group cannot be used after it.
pub trait Collective: Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks, at least 1.
    fn world_size(&self) -> usize;

    /// Returns when all ranks have come.
    ///
    /// # Errors
    /// As all operations: [`Error::Mismatch`], [`Error::Timeout`], [`Error::Gone`], [`Error::Aborted`].
    fn barrier(&self) -> Result<()>;

    /// Overwrites `bytes` with those of rank 0.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn broadcast(&self, bytes: &mut [u8]) -> Result<()>;

    /// Overwrites `values` with their sum over the ranks.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()>;

    /// Overwrites `values` with their sum over the ranks.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_reduce_f32(&self, values: &mut [f32]) -> Result<()>;

    /// The bytes of all ranks, by rank; their lengths may differ.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// Sums `values` over the ranks and gives each rank its own part: with parts of lengths `counts` (one a rank, in order,
    /// together `values.len()`), `part` becomes the sum of part `rank()`.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn reduce_scatter_f32(&self, values: &[f32], counts: &[usize], part: &mut [f32]) -> Result<()>;

    /// Puts the ranks' parts, of `counts` bytes, one after another into `out`. A part may be empty.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()>;

    /// Says what this rank does from here on ("round 1, expert step 7"): errors and warnings name it. Tells nobody, and
    /// waits for nobody.
    fn doing(&self, what: &str);

    /// What this rank has said last that it does; empty if nothing.
    fn place(&self) -> String;

    /// Makes every operation of every rank, waiting or to come, fail with [`Error::Aborted`]. `code` is the exit code of the
    /// error that is the reason. Does not wait for the others; the first abort of a group counts.
    fn abort(&self, code: u8, reason: &str);
}

/// Does work that each rank does by itself, and that may take one of them longer than ranks wait for each other (writing a
/// model, say): meanwhile they go on meeting, so that a rank that dies or stops is still found. Returns when all are done.
///
/// # Errors
/// Those of [`Collective::barrier`].
pub fn meanwhile<T: Send>(collective: &dyn Collective, work: impl FnOnce() -> T + Send) -> Result<T> {
    const BEAT: std::time::Duration = std::time::Duration::from_millis(100);
    if collective.world_size() == 1 {
        return Ok(work());
    }
    std::thread::scope(|scope| {
        let (tell, told) = std::sync::mpsc::channel::<()>();
        let worker = scope.spawn(move || {
            let _told_when_dropped = tell;
            work()
        });
        let mut beat = std::time::Duration::ZERO; // short work is not made longer
        loop {
            let done = told.recv_timeout(beat) != Err(std::sync::mpsc::RecvTimeoutError::Timeout);
            if collective.all_gather(&[u8::from(done)])?.iter().all(|done| *done == [1]) {
                return Ok(worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            }
            beat = BEAT;
        }
    })
}

/// Proves that all ranks hold the same `bytes` (a hash, say) of `what`.
///
/// # Errors
/// [`Error::Disagree`] on all ranks if one differs, and those of [`Collective::barrier`].
pub fn all_agree(collective: &dyn Collective, what: &str, bytes: &[u8]) -> Result<()> {
    let all = collective.all_gather(bytes)?;
    match all.iter().position(|other| *other != all[0]) {
        Some(rank) => Err(Error::Disagree { what: what.to_owned(), rank }),
        None => Ok(()),
    }
}

/// Lets no rank go on where another could not: every rank brings its own result, and all learn whether one is an error.
/// The rank's own error comes back as it is.
///
/// # Errors
/// The rank's own; else [`Error::Aborted`] with that of the lowest rank that has one; or those of [`Collective::barrier`].
pub fn all_ok<T>(collective: &dyn Collective, result: Result<T, Failure>) -> Result<T, Failure> {
    // Nothing, or an exit code and a message.
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

/// How a process leaves the other ranks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Leave {
    /// All ranks come to this end: wait for them (`MPI_Finalize`).
    Together,
    /// End the other processes too (`MPI_Abort`), so that none waits forever.
    Abort,
}

/// Ends MPI, if it is initialised, and the process, with whatever threads still run.
pub fn leave(code: u8, how: Leave) -> ! {
    #[cfg(feature = "mpi")]
    mpi::leave(code, how);
    let _ = how; // without MPI there is nobody to leave
    std::process::exit(code.into())
}

/// The place of a rank in its program: operation, length that all ranks must have in common, and what for.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct At {
    op: Cow<'static, str>,
    /// `None` where each rank has its own.
    len: Option<usize>,
    doing: String,
}

impl At {
    /// Whether two ranks may meet here.
    fn meets(&self, other: &At) -> bool {
        (&self.op, self.len) == (&other.op, other.len)
    }

    /// The error of the first rank that is elsewhere than rank 0.
    fn first_mismatch<'a>(mut places: impl Iterator<Item = &'a At>) -> Option<Error> {
        let ours = places.next()?;
        let (i, theirs) = places.enumerate().find(|(_, place)| !place.meets(ours))?;
        Some(Error::Mismatch { rank: i + 1, theirs: theirs.to_string(), ours: ours.to_string() })
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.op)?;
        if let Some(len) = self.len {
            write!(f, " of {len}")?;
        }
        if !self.doing.is_empty() {
            write!(f, " in {}", self.doing)?;
        }
        Ok(())
    }
}

/// Panics unless `counts` names one part a rank, which together make `total` and of which this rank's is `part`.
fn check_counts(rank: usize, world_size: usize, counts: &[usize], part: usize, total: usize) {
    assert_eq!(counts.len(), world_size, "one count a rank");
    assert_eq!(counts[rank], part, "length of the part of rank {rank}");
    assert_eq!(counts.iter().sum::<usize>(), total, "the parts together");
}
