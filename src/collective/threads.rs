//! Ranks as threads of one process.
//!
//! All operations are one exchange: each rank posts what it has, waits for the others, and reads what all have posted.
//! Long vectors go through it in pieces, so that the copies stay small. (Handing out pointers instead would save the
//! copies and could not be made safe: a rank that gives up waiting frees what the others still read.)

use std::any::Any;
use std::ops::{AddAssign, Range};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Collective, Error, Result, check_counts};
use crate::exit;

/// Elements a piece of a long vector: the pieces of a few ranks stay in the caches that they share.
const PIECE: usize = 1 << 16;

/// What one rank brings to an exchange.
struct Post {
    op: &'static str,
    /// Length that all ranks must have in common; `None` where each has its own.
    len: Option<usize>,
    values: Box<dyn Any + Send + Sync>,
}

impl Post {
    fn describe(&self) -> String {
        match self.len {
            Some(len) => format!("{} of {len}", self.op),
            None => self.op.to_owned(),
        }
    }

    /// The posted vector. Exchanges of one operation, which is checked, have one type.
    fn values<T: 'static>(&self) -> &[T] {
        self.values.downcast_ref::<Vec<T>>().expect("one operation, one type")
    }
}

type Posts = Arc<Vec<Post>>;

/// What the ranks share.
struct State {
    /// Posts of the exchange under way, by rank.
    slots: Vec<Option<Post>>,
    /// The exchanges that are complete.
    completed: u64,
    /// Posts of the last complete exchange. It is read by all before the next can be complete.
    last: Posts,
    /// The error that ended the group.
    failed: Option<Error>,
    /// Ranks that have ended.
    gone: Vec<bool>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    timeout: Duration,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock: a poisoned state is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fail(&self, state: &mut State, error: Error) -> Error {
        let error = state.failed.get_or_insert(error).clone();
        self.changed.notify_all();
        error
    }
}

/// One rank of a group of threads.
pub struct Threads {
    rank: usize,
    world_size: usize,
    shared: Arc<Shared>,
}

/// A group of `world_size` ranks; each goes to a thread of its own. A rank that waits longer than `timeout` for another
/// ends the group with [`Error::Timeout`].
pub fn group(world_size: usize, timeout: Duration) -> Vec<Threads> {
    assert!(world_size > 0, "a group has at least one rank");
    let state = State {
        slots: (0..world_size).map(|_| None).collect(),
        completed: 0,
        last: Arc::default(),
        failed: None,
        gone: vec![false; world_size],
    };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), timeout });
    (0..world_size).map(|rank| Threads { rank, world_size, shared: shared.clone() }).collect()
}

/// The only rank of a group of one.
pub fn single() -> Threads {
    group(1, Duration::MAX).remove(0)
}

/// Runs `rank_main` on `world_size` ranks, each a thread; one rank runs on the calling thread. Results by rank.
///
/// # Panics
/// With the panic of a rank, after all have ended: the others get [`Error::Aborted`].
pub fn run<T: Send>(world_size: usize, timeout: Duration, rank_main: impl Fn(Threads) -> T + Sync) -> Vec<T> {
    let mut ranks = group(world_size, timeout);
    if world_size == 1 {
        return vec![rank_main(ranks.remove(0))];
    }
    std::thread::scope(|scope| {
        let rank_main = &rank_main;
        let threads: Vec<_> = ranks
            .into_iter()
            .map(|rank| {
                std::thread::Builder::new()
                    .name(format!("rank {}", rank.rank))
                    .spawn_scoped(scope, move || rank_main(rank))
                    .expect("the system starts a thread")
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect()
    })
}

impl Threads {
    /// Posts a vector and returns those of all ranks, by rank.
    fn exchange<T: Send + Sync + 'static>(
        &self,
        op: &'static str,
        len: Option<usize>,
        values: Vec<T>,
    ) -> Result<Posts> {
        let mut state = self.shared.lock();
        if let Some(error) = &state.failed {
            return Err(error.clone());
        }
        let exchange = state.completed;
        let post = Post { op, len, values: Box::new(values) };
        let at = post.describe();
        state.slots[self.rank] = Some(post);
        if state.slots.iter().all(Option::is_some) {
            let posts: Vec<Post> = state.slots.iter_mut().filter_map(Option::take).collect();
            if let Some(rank) = posts.iter().position(|p| (p.op, p.len) != (posts[0].op, posts[0].len)) {
                let (theirs, ours) = (posts[rank].describe(), posts[0].describe());
                return Err(self.shared.fail(&mut state, Error::Mismatch { rank, theirs, ours }));
            }
            state.last = Arc::new(posts);
            state.completed += 1;
            self.shared.changed.notify_all();
            return Ok(state.last.clone());
        }
        self.wait(state, exchange, at)
    }

    /// Waits until `exchange` is complete or the group has failed.
    fn wait(&self, mut state: MutexGuard<'_, State>, exchange: u64, at: String) -> Result<Posts> {
        let start = Instant::now();
        while state.completed == exchange {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let missing = || (0..self.world_size).filter(|r| state.slots[*r].is_none());
            if let Some(rank) = missing().find(|r| state.gone[*r]) {
                return Err(self.shared.fail(&mut state, Error::Gone { rank, at }));
            }
            let waited = start.elapsed();
            if waited >= self.shared.timeout {
                let (rank, missing, seconds) = (self.rank, missing().collect(), waited.as_secs());
                return Err(self.shared.fail(&mut state, Error::Timeout { rank, at, seconds, missing }));
            }
            let left = self.shared.timeout - waited;
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.last.clone())
    }

    /// Writes into `out` the sum over the ranks, in their order, of what they posted at `range`.
    fn sum<T: Copy + AddAssign + 'static>(posts: &Posts, range: Range<usize>, out: &mut [T]) {
        out.copy_from_slice(&posts[0].values::<T>()[range.clone()]);
        for post in &posts[1..] {
            for (sum, x) in out.iter_mut().zip(&post.values::<T>()[range.clone()]) {
                *sum += *x;
            }
        }
    }

    fn all_reduce<T: Copy + AddAssign + Send + Sync + 'static>(
        &self,
        op: &'static str,
        values: &mut [T],
    ) -> Result<()> {
        let len = values.len();
        for piece in pieces(len) {
            let posts = self.exchange(op, Some(len), values[piece.clone()].to_vec())?;
            Self::sum(&posts, 0..piece.len(), &mut values[piece]);
        }
        Ok(())
    }
}

/// `0..len` in pieces; an empty one for an empty vector, so that all ranks still meet and lengths are compared.
fn pieces(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(PIECE).max(1)).map(move |i| i * PIECE..((i + 1) * PIECE).min(len))
}

impl Collective for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn barrier(&self) -> Result<()> {
        self.exchange("barrier", None, Vec::<u8>::new()).map(drop)
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        let mine = if self.rank == 0 { bytes.to_vec() } else { Vec::new() };
        let posts = self.exchange("broadcast", Some(bytes.len()), mine)?;
        bytes.copy_from_slice(posts[0].values());
        Ok(())
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        self.all_reduce("all_reduce_f64", values)
    }

    fn all_reduce_f32(&self, values: &mut [f32]) -> Result<()> {
        self.all_reduce("all_reduce_f32", values)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let posts = self.exchange("all_gather", None, bytes.to_vec())?;
        Ok(posts.iter().map(|p| p.values().to_vec()).collect())
    }

    fn reduce_scatter_f32(&self, values: &[f32], counts: &[usize], part: &mut [f32]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), values.len());
        let start: usize = counts[..self.rank].iter().sum();
        let mine = start..start + part.len();
        for piece in pieces(values.len()) {
            let posts = self.exchange("reduce_scatter_f32", Some(values.len()), values[piece.clone()].to_vec())?;
            let (from, to) = (mine.start.max(piece.start), mine.end.min(piece.end));
            if from < to {
                Self::sum(&posts, from - piece.start..to - piece.start, &mut part[from - start..to - start]);
            }
        }
        Ok(())
    }

    fn all_gather_f32(&self, part: &[f32], counts: &[usize], values: &mut [f32]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), values.len());
        let posts = self.exchange("all_gather_f32", Some(values.len()), part.to_vec())?;
        let mut rest = values;
        for (post, count) in posts.iter().zip(counts) {
            let (here, after) = rest.split_at_mut(*count);
            here.copy_from_slice(post.values());
            rest = after;
        }
        Ok(())
    }

    fn abort(&self, code: u8, reason: &str) {
        let error = Error::Aborted { rank: self.rank, code, reason: reason.to_owned() };
        self.shared.fail(&mut self.shared.lock(), error);
    }
}

impl Drop for Threads {
    /// The others must not wait for a rank that has ended, least of all for one that panicked.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(exit::INTERNAL, "it panicked (its message stands above)");
        }
        self.shared.lock().gone[self.rank] = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::collective::{all_agree, conformance};
    use crate::exit::Coded;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn one_to_four_ranks_conform() {
        for world_size in 1..=4 {
            let ran = AtomicUsize::new(0);
            run(world_size, LONG, |rank| {
                conformance::check(&rank);
                ran.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.into_inner(), world_size);
        }
    }

    #[test]
    fn an_abort_wakes_those_who_wait() {
        let errors = run(3, LONG, |rank| {
            if rank.rank() == 1 {
                rank.abort(exit::NOT_FINITE, "the loss of step 7 is NaN");
            }
            rank.barrier().unwrap_err()
        });
        for error in errors {
            assert_eq!(error.exit_code(), exit::NOT_FINITE);
            assert_eq!(error.to_string(), "rank 1 stopped the run: the loss of step 7 is NaN");
        }
    }

    #[test]
    fn a_rank_that_does_not_come_is_named() {
        let errors = run(3, Duration::from_millis(100), |rank| {
            if rank.rank() == 2 {
                std::thread::sleep(Duration::from_millis(400));
            }
            rank.barrier().unwrap_err()
        });
        for error in errors {
            assert_eq!(error.exit_code(), exit::HANG);
            assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [2]), "{error}");
        }
    }

    #[test]
    fn a_rank_that_ended_is_named_at_once() {
        let errors = run(2, LONG, |rank| (rank.rank() == 0).then(|| rank.barrier().unwrap_err()));
        assert_eq!(errors[0], Some(Error::Gone { rank: 1, at: "barrier".into() }));
    }

    #[test]
    fn a_panic_reaches_the_others() {
        let seen = Mutex::new(None);
        let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            run(2, LONG, |rank| {
                assert_eq!(rank.rank(), 0, "rank 1 panics on purpose");
                *seen.lock().unwrap() = rank.barrier().err();
            })
        }));
        assert!(ended.is_err());
        assert!(matches!(seen.into_inner().unwrap(), Some(Error::Aborted { rank: 1, code: exit::INTERNAL, .. })));
    }

    #[test]
    fn different_programs_are_found_out() {
        let lengths = run(3, LONG, |rank| rank.all_reduce_f64(&mut vec![0.0; 4 + rank.rank() / 2]).unwrap_err());
        for error in lengths {
            assert_eq!(error.exit_code(), exit::RANKS_DIFFER);
            let text = error.to_string();
            assert!(
                text.contains("rank 2 is at all_reduce_f64 of 5") && text.contains("all_reduce_f64 of 4"),
                "{text}"
            );
        }
        let ops = run(2, LONG, |rank| if rank.rank() == 0 { rank.barrier() } else { rank.all_gather(&[]).map(drop) });
        assert!(ops.iter().all(|r| matches!(r, Err(Error::Mismatch { rank: 1, .. }))));
    }

    #[test]
    fn disagreement_is_found_out() {
        let same = run(3, LONG, |rank| all_agree(&rank, "selection", b"abc"));
        assert!(same.iter().all(Result::is_ok));
        let other = run(3, LONG, |rank| all_agree(&rank, "selection", &[rank.rank() as u8 / 2]).unwrap_err());
        for error in other {
            assert_eq!(error, Error::Disagree { what: "selection".into(), rank: 2 });
        }
    }
}
