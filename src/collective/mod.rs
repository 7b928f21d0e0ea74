//! What ranks say to each other: sums, copies, and that something went wrong. Nothing about models.
//!
//! [`threads`] runs n ranks as threads of one process; with n = 1 it is the single process. Every implementation passes
//! [`conformance::check`].

pub mod conformance;
pub mod threads;

use crate::exit::{self, Coded};

/// Why ranks could not work together. All ranks get an error when one does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Two ranks called different operations, or the same one with different lengths.
    #[error("rank {rank} is at {theirs} while rank 0 is at {ours}: the ranks no longer run the same program")]
    Mismatch {
        /// The first rank that differs from rank 0.
        rank: usize,
        /// Operation and length of that rank.
        theirs: String,
        /// Operation and length of rank 0.
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
        /// The operation it was at.
        at: String,
        /// How long it waited.
        seconds: u64,
        /// The ranks that had not come.
        missing: Vec<usize>,
    },
    /// A rank ended without finishing what the others were doing.
    #[error("rank {rank} ended while the others were at {at}")]
    Gone {
        /// The rank that is no more.
        rank: usize,
        /// Where the others wait.
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
}

impl Coded for Error {
    fn exit_code(&self) -> u8 {
        match self {
            Error::Mismatch { .. } | Error::Disagree { .. } => exit::RANKS_DIFFER,
            Error::Timeout { .. } => exit::HANG,
            Error::Gone { .. } => exit::LAUNCHER,
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

    /// The reverse: puts the ranks' parts, of lengths `counts`, one after another into `values`.
    ///
    /// # Errors
    /// See [`Self::barrier`].
    fn all_gather_f32(&self, part: &[f32], counts: &[usize], values: &mut [f32]) -> Result<()>;

    /// Makes every operation of every rank, waiting or to come, fail with [`Error::Aborted`]. `code` is the exit code of the
    /// error that is the reason. Does not wait; the first abort of a group counts.
    fn abort(&self, code: u8, reason: &str);
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

/// Panics unless `counts` names one part a rank, which together make `total` and of which this rank's is `part`.
fn check_counts(rank: usize, world_size: usize, counts: &[usize], part: usize, total: usize) {
    assert_eq!(counts.len(), world_size, "one count a rank");
    assert_eq!(counts[rank], part, "length of the part of rank {rank}");
    assert_eq!(counts.iter().sum::<usize>(), total, "the parts together");
}
