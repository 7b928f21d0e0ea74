//! Ranks as threads of one process.
//!
//! Every operation consists of exchanges: each rank posts a copy of its data, waits until all ranks have posted, and
//! reads all posts. Long vectors are exchanged in chunks, so that the copies stay small. (Sharing pointers would avoid
//! the copies, but is unsafe: a rank whose wait times out frees memory that others still read.)

use std::any::Any;
use std::ops::{AddAssign, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::{Call, Collective, Error, Result, check_counts};
use crate::exit;

/// Elements of a chunk of a long vector: small enough that the chunks of several ranks fit the shared cache.
const CHUNK: usize = 1 << 16;

/// How long ranks may take to return after their group has failed.
const ABORT_GRACE: Duration = Duration::from_secs(5);

/// One rank's contribution to an exchange.
struct Post {
    call: Call,
    values: Box<dyn Any + Send + Sync>,
}

impl Post {
    /// The posted vector. All posts of an exchange belong to the same operation (checked), so they have the same type.
    fn values<T: 'static>(&self) -> &[T] {
        self.values.downcast_ref::<Vec<T>>().expect("an operation always posts the same type")
    }
}

type Posts = Arc<Vec<Post>>;

/// State shared by the ranks, under the lock.
struct State {
    /// Posts of the current exchange, by rank.
    slots: Vec<Option<Post>>,
    /// Number of completed exchanges.
    completed: u64,
    /// Posts of the last completed exchange. All ranks read them before the next exchange can complete.
    last: Posts,
    /// The error with which the group failed.
    failed: Option<Error>,
    /// How many ranks wait in [`Threads::renew`], and how often all have.
    renewing: usize,
    renewed: u64,
    /// Whether each rank has ended.
    ended: Vec<bool>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    timeout: Duration,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic runs under the lock, so the state is consistent even if the mutex is poisoned.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails the group, unless it has failed before. Returns the error that all ranks get.
    fn fail(&self, state: &mut State, error: Error) -> Error {
        let error = state.failed.get_or_insert(error).clone();
        self.changed.notify_all();
        error
    }

    /// Whether the group has failed. Fails it if the timeout has passed since the first rank ended (`first`: the rank
    /// and when) and others still run.
    fn check_end(&self, first: Option<(usize, Instant)>) -> bool {
        let mut state = self.lock();
        if let Some((rank, at)) = first.filter(|(_, at)| at.elapsed() >= self.timeout) {
            let missing = (0..state.ended.len()).filter(|r| !state.ended[*r]).collect();
            let (at, seconds) = ("the end of the run".to_owned(), at.elapsed().as_secs());
            self.fail(&mut state, Error::Timeout { rank, at, seconds, missing });
        }
        state.failed.is_some()
    }
}

/// One rank of a group of threads, created by [`group`] or [`single`].
pub struct Threads {
    rank: usize,
    world_size: usize,
    shared: Arc<Shared>,
    activity: Mutex<String>,
}

/// Creates a group of `world_size` ranks, returned in rank order; each is to be moved to its own thread. A rank that
/// waits longer than `timeout` for another fails the group with [`Error::Timeout`].
pub fn group(world_size: usize, timeout: Duration) -> Vec<Threads> {
    assert!(world_size > 0, "a group has at least one rank");
    let state = State {
        slots: (0..world_size).map(|_| None).collect(),
        completed: 0,
        last: Arc::default(),
        failed: None,
        renewing: 0,
        renewed: 0,
        ended: vec![false; world_size],
    };
    let shared = Arc::new(Shared { state: Mutex::new(state), changed: Condvar::new(), timeout });
    (0..world_size)
        .map(|rank| Threads { rank, world_size, shared: shared.clone(), activity: Mutex::default() })
        .collect()
}

/// The rank of a group of one: its operations return at once.
pub fn single() -> Threads {
    group(1, Duration::MAX).remove(0)
}

/// How a rank's thread ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RankOutcome<T> {
    /// It returned this value.
    Done(T),
    /// It panicked with this message.
    Panicked(String),
    /// It did not end: its thread hangs until the process exits.
    Lost,
}

impl<T> RankOutcome<T> {
    /// The value that the rank returned.
    ///
    /// # Panics
    /// If the rank panicked or did not end.
    pub fn unwrap(self) -> T {
        match self {
            RankOutcome::Done(value) => value,
            RankOutcome::Panicked(message) => panic!("a rank panicked: {message}"),
            RankOutcome::Lost => panic!("a rank did not end"),
        }
    }
}

/// Runs `rank_main` on `world_size` ranks, each on its own thread; a single rank runs on the calling thread. Returns
/// the outcomes by rank.
///
/// A rank that hangs does not block it: once the first rank has ended, the others have `timeout` to end, and once the
/// group has failed, 5 s. A rank that takes longer is [`RankOutcome::Lost`].
pub fn run<T: Send + 'static>(
    world_size: usize,
    timeout: Duration,
    rank_main: impl Fn(Threads) -> T + Send + Sync + 'static,
) -> Vec<RankOutcome<T>> {
    let mut ranks = group(world_size, timeout);
    if world_size == 1 {
        return vec![outcome(&rank_main, ranks.remove(0))];
    }
    let shared = ranks[0].shared.clone();
    let rank_main = Arc::new(rank_main);
    let (sender, ended) = mpsc::channel();
    for rank in ranks {
        let (id, rank_main, sender) = (rank.rank, rank_main.clone(), sender.clone());
        std::thread::Builder::new()
            .name(format!("rank {id}"))
            // Sending fails if this rank was given up: then the receiver is dropped.
            .spawn(move || _ = sender.send((id, outcome(&*rank_main, rank))))
            .expect("cannot start a thread");
    }
    let mut outcomes: Vec<_> = (0..world_size).map(|_| RankOutcome::Lost).collect();
    let (mut running, mut first_end, mut failed) = (world_size, None, None);
    while running > 0 && failed.is_none_or(|at: Instant| at.elapsed() < ABORT_GRACE) {
        if let Ok((id, outcome)) = ended.recv_timeout(Duration::from_millis(50)) {
            outcomes[id] = outcome;
            running -= 1;
            first_end.get_or_insert((id, Instant::now()));
        }
        if failed.is_none() && shared.check_end(first_end) {
            failed = Some(Instant::now());
        }
    }
    outcomes
}

fn outcome<T>(rank_main: &impl Fn(Threads) -> T, rank: Threads) -> RankOutcome<T> {
    // State that a panic left inconsistent is not used again: the group has failed.
    match catch_unwind(AssertUnwindSafe(|| rank_main(rank))) {
        Ok(value) => RankOutcome::Done(value),
        Err(panic) => RankOutcome::Panicked(panic_message(&*panic)),
    }
}

/// The message of a panic, from its payload; empty if the payload is not a string.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref().cloned()).unwrap_or_default()
}

impl Threads {
    /// Posts `values` and returns the posts of all ranks, by rank.
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
        let call = Call { op: op.into(), len, activity: self.lock_activity().clone() };
        state.slots[self.rank] = Some(Post { call: call.clone(), values: Box::new(values) });
        if state.slots.iter().all(Option::is_some) {
            let posts: Vec<Post> = state.slots.iter_mut().filter_map(Option::take).collect();
            if let Some(error) = Call::first_mismatch(posts.iter().map(|p| &p.call)) {
                return Err(self.shared.fail(&mut state, error));
            }
            state.last = Arc::new(posts);
            state.completed += 1;
            self.shared.changed.notify_all();
            return Ok(state.last.clone());
        }
        self.wait(state, exchange, &call)
    }

    /// Waits until exchange number `exchange` is complete. Fails if the group fails, if a missing rank has ended, or
    /// after the timeout.
    fn wait(&self, mut state: MutexGuard<'_, State>, exchange: u64, call: &Call) -> Result<Posts> {
        let (rank, start) = (self.rank, Instant::now());
        while state.completed == exchange {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let missing = || (0..self.world_size).filter(|r| state.slots[*r].is_none());
            if let Some(ended) = missing().find(|r| state.ended[*r]) {
                return Err(self.shared.fail(&mut state, Error::RankEnded { rank, ended, at: call.to_string() }));
            }
            let waited = start.elapsed();
            if waited >= self.shared.timeout {
                let (at, missing, seconds) = (call.to_string(), missing().collect(), waited.as_secs());
                return Err(self.shared.fail(&mut state, Error::Timeout { rank, at, seconds, missing }));
            }
            let left = self.shared.timeout - waited;
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.last.clone())
    }

    fn lock_activity(&self) -> MutexGuard<'_, String> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Overwrites `out` with the sum over the ranks of elements `range` of their posts, added in rank order.
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
        for chunk in chunks(len) {
            let posts = self.exchange(op, Some(len), values[chunk.clone()].to_vec())?;
            Self::sum(&posts, 0..chunk.len(), &mut values[chunk]);
        }
        Ok(())
    }
}

/// `0..len` in chunks. An empty vector has one empty chunk, so that its ranks still synchronise and compare lengths.
fn chunks(len: usize) -> impl Iterator<Item = Range<usize>> {
    (0..len.div_ceil(CHUNK).max(1)).map(move |i| i * CHUNK..((i + 1) * CHUNK).min(len))
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
        for chunk in chunks(values.len()) {
            let posts = self.exchange("reduce_scatter_f32", Some(values.len()), values[chunk.clone()].to_vec())?;
            let (from, to) = (mine.start.max(chunk.start), mine.end.min(chunk.end));
            if from < to {
                Self::sum(&posts, from - chunk.start..to - chunk.start, &mut part[from - start..to - start]);
            }
        }
        Ok(())
    }

    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), out.len());
        let posts = self.exchange("all_gather_into", Some(out.len()), part.to_vec())?;
        let mut rest = out;
        for (post, count) in posts.iter().zip(counts) {
            let (place, after) = rest.split_at_mut(*count);
            place.copy_from_slice(post.values());
            rest = after;
        }
        Ok(())
    }

    fn set_activity(&self, activity: &str) {
        activity.clone_into(&mut self.lock_activity());
    }

    fn activity(&self) -> String {
        self.lock_activity().clone()
    }

    fn abort(&self, code: u8, reason: &str) {
        let error = Error::Aborted { rank: self.rank, code, reason: reason.to_owned() };
        self.shared.fail(&mut self.shared.lock(), error);
    }

    fn renew(&self) -> Result<()> {
        let (rank, start) = (self.rank, Instant::now());
        let call = Call { op: "renew".into(), len: None, activity: self.lock_activity().clone() };
        let mut state = self.shared.lock();
        let renewed = state.renewed;
        state.renewing += 1;
        if state.renewing == self.world_size {
            state.slots.fill_with(|| None);
            (state.failed, state.renewing) = (None, 0);
            state.renewed += 1;
            self.shared.changed.notify_all();
        }
        while state.renewed == renewed {
            let waited = start.elapsed();
            let Some(left) = self.shared.timeout.checked_sub(waited).filter(|left| !left.is_zero()) else {
                let (at, seconds) = (call.to_string(), waited.as_secs());
                return Err(Error::Timeout { rank, at, seconds, missing: Vec::new() });
            };
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }
}

impl Drop for Threads {
    /// Marks this rank as ended, so that no other waits for it, and aborts the group if it panicked.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(exit::INTERNAL, "it panicked (see its message above)");
        }
        self.shared.lock().ended[self.rank] = true;
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests;
