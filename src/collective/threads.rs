//! Ranks as threads of one process.
//!
//! All operations are one exchange: each rank posts what it has, waits for the others, and reads what all have posted.
//! Long vectors go through it in pieces, so that the copies stay small. (Handing out pointers instead would save the
//! copies and could not be made safe: a rank that gives up waiting frees what the others still read.)

use std::any::Any;
use std::ops::{AddAssign, Range};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::{Duration, Instant};

use super::{At, Collective, Error, Result, check_counts};
use crate::exit;

/// Elements a piece of a long vector: the pieces of a few ranks stay in the caches that they share.
const PIECE: usize = 1 << 16;

/// How long ranks may take to end after their group has failed.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What one rank brings to an exchange.
struct Post {
    at: At,
    values: Box<dyn Any + Send + Sync>,
}

impl Post {
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

    /// Whether the group has failed, as it does when the others do not end within the timeout of the first that did.
    fn end(&self, first: Option<(usize, Instant)>) -> bool {
        let mut state = self.lock();
        if let Some((rank, at)) = first.filter(|(_, at)| at.elapsed() >= self.timeout) {
            let missing = (0..state.gone.len()).filter(|r| !state.gone[*r]).collect();
            let (at, seconds) = ("the end of the run".to_owned(), at.elapsed().as_secs());
            self.fail(&mut state, Error::Timeout { rank, at, seconds, missing });
        }
        state.failed.is_some()
    }
}

/// One rank of a group of threads.
pub struct Threads {
    rank: usize,
    world_size: usize,
    shared: Arc<Shared>,
    doing: Mutex<String>,
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
    (0..world_size).map(|rank| Threads { rank, world_size, shared: shared.clone(), doing: Mutex::default() }).collect()
}

/// The only rank of a group of one.
pub fn single() -> Threads {
    group(1, Duration::MAX).remove(0)
}

/// How a rank ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome<T> {
    /// It returned.
    Done(T),
    /// With this message.
    Panicked(String),
    /// Not at all: it hangs, and ends with the process.
    Lost,
}

impl<T> Outcome<T> {
    /// What the rank returned.
    ///
    /// # Panics
    /// If it did not.
    pub fn unwrap(self) -> T {
        match self {
            Outcome::Done(value) => value,
            Outcome::Panicked(message) => panic!("a rank panicked: {message}"),
            Outcome::Lost => panic!("a rank did not end"),
        }
    }
}

/// Runs `rank_main` on `world_size` ranks, each a thread; a single one runs on the calling thread. Outcomes by rank.
///
/// Waits for no rank for ever: their end is a meeting like any other. Once the first has ended, the rest have `timeout`,
/// and, once the group has failed, 5 s.
pub fn run<T: Send + 'static>(
    world_size: usize,
    timeout: Duration,
    rank_main: impl Fn(Threads) -> T + Send + Sync + 'static,
) -> Vec<Outcome<T>> {
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
            // Nobody listens any more to a rank that was given up.
            .spawn(move || _ = sender.send((id, outcome(&*rank_main, rank))))
            .expect("the system starts a thread");
    }
    let mut outcomes: Vec<_> = (0..world_size).map(|_| Outcome::Lost).collect();
    let (mut running, mut first_end, mut failed) = (world_size, None, None);
    while running > 0 && failed.is_none_or(|at: Instant| at.elapsed() < LAST_WORDS) {
        if let Ok((id, outcome)) = ended.recv_timeout(Duration::from_millis(50)) {
            outcomes[id] = outcome;
            running -= 1;
            first_end.get_or_insert((id, Instant::now()));
        }
        if failed.is_none() && shared.end(first_end) {
            failed = Some(Instant::now());
        }
    }
    outcomes
}

fn outcome<T>(rank_main: &impl Fn(Threads) -> T, rank: Threads) -> Outcome<T> {
    // Nothing that a panic may have left half done is looked at again: the group has failed.
    match catch_unwind(AssertUnwindSafe(|| rank_main(rank))) {
        Ok(value) => Outcome::Done(value),
        Err(panic) => Outcome::Panicked(panic_message(&*panic)),
    }
}

/// The words of a panic.
pub fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(ToString::to_string);
    text.or_else(|| panic.downcast_ref().cloned()).unwrap_or_default()
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
        let at = At { op: op.into(), len, doing: self.what().clone() };
        state.slots[self.rank] = Some(Post { at: at.clone(), values: Box::new(values) });
        if state.slots.iter().all(Option::is_some) {
            let posts: Vec<Post> = state.slots.iter_mut().filter_map(Option::take).collect();
            if let Some(error) = At::first_mismatch(posts.iter().map(|p| &p.at)) {
                return Err(self.shared.fail(&mut state, error));
            }
            state.last = Arc::new(posts);
            state.completed += 1;
            self.shared.changed.notify_all();
            return Ok(state.last.clone());
        }
        self.wait(state, exchange, &at)
    }

    /// Waits until `exchange` is complete or the group has failed.
    fn wait(&self, mut state: MutexGuard<'_, State>, exchange: u64, at: &At) -> Result<Posts> {
        let (rank, start) = (self.rank, Instant::now());
        while state.completed == exchange {
            if let Some(error) = &state.failed {
                return Err(error.clone());
            }
            let missing = || (0..self.world_size).filter(|r| state.slots[*r].is_none());
            if let Some(gone) = missing().find(|r| state.gone[*r]) {
                return Err(self.shared.fail(&mut state, Error::Gone { rank, gone, at: at.to_string() }));
            }
            let waited = start.elapsed();
            if waited >= self.shared.timeout {
                let (at, missing, seconds) = (at.to_string(), missing().collect(), waited.as_secs());
                return Err(self.shared.fail(&mut state, Error::Timeout { rank, at, seconds, missing }));
            }
            let left = self.shared.timeout - waited;
            state = self.shared.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(state.last.clone())
    }

    fn what(&self) -> MutexGuard<'_, String> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
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

    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), out.len());
        let posts = self.exchange("all_gather_into", Some(out.len()), part.to_vec())?;
        let mut rest = out;
        for (post, count) in posts.iter().zip(counts) {
            let (here, after) = rest.split_at_mut(*count);
            here.copy_from_slice(post.values());
            rest = after;
        }
        Ok(())
    }

    fn doing(&self, what: &str) {
        what.clone_into(&mut self.what());
    }

    fn place(&self) -> String {
        self.what().clone()
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
    use crate::collective::conformance::{self, on_threads};
    use crate::collective::{all_agree, all_ok};
    use crate::exit::{Coded, Failure};

    /// The outcomes of ranks that have this long to meet.
    fn run_ms<T: Send + 'static>(
        world_size: usize,
        timeout: u64,
        rank_main: impl Fn(Threads) -> T + Send + Sync + 'static,
    ) -> Vec<Outcome<T>> {
        run(world_size, Duration::from_millis(timeout), rank_main)
    }

    #[test]
    fn one_to_four_ranks_conform() {
        for world_size in 1..=4 {
            let ran = Arc::new(AtomicUsize::new(0));
            let count = ran.clone();
            on_threads(world_size, move |rank| {
                conformance::check(&rank);
                count.fetch_add(1, Ordering::Relaxed);
            });
            assert_eq!(ran.load(Ordering::Relaxed), world_size);
        }
    }

    #[test]
    fn an_abort_wakes_those_who_wait() {
        let errors = on_threads(3, |rank| {
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
        let outcomes = run_ms(3, 100, |rank| {
            rank.doing("round 1, expert step 7");
            if rank.rank() == 2 {
                std::thread::sleep(Duration::from_millis(400));
            }
            rank.all_reduce_f32(&mut [0.0; 1000]).unwrap_err()
        });
        for error in outcomes.into_iter().map(Outcome::unwrap) {
            assert_eq!(error.exit_code(), exit::HANG);
            assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [2]), "{error}");
            assert!(error.to_string().contains("at all_reduce_f32 of 1000 in round 1, expert step 7 for"), "{error}");
        }
    }

    #[test]
    fn a_rank_that_ended_is_named_at_once() {
        let errors = on_threads(2, |rank| (rank.rank() == 0).then(|| rank.barrier().unwrap_err()));
        assert_eq!(errors[0], Some(Error::Gone { rank: 0, gone: 1, at: "barrier".into() }));
    }

    #[test]
    fn a_panic_reaches_the_others() {
        let outcomes = run_ms(2, 60_000, |rank| {
            assert_eq!(rank.rank(), 0, "rank 1 panics on purpose");
            rank.barrier().unwrap_err()
        });
        assert!(matches!(outcomes[0], Outcome::Done(Error::Aborted { rank: 1, code: exit::INTERNAL, .. })));
        assert!(matches!(&outcomes[1], Outcome::Panicked(text) if text.contains("rank 1 panics on purpose")));
        let alone = run_ms(1, 60_000, |_| {
            if true {
                panic!("alone")
            }
        });
        assert_eq!(alone, [Outcome::Panicked("alone".into())]);
    }

    #[test]
    fn nobody_waits_for_ever_for_a_rank_that_hangs() {
        let hang = |rank: Threads| match rank.rank() {
            1 => loop {
                std::thread::park();
            },
            // Rank 0 waits for rank 1; rank 2 just ends.
            0 => rank.barrier().err(),
            _ => None,
        };
        let outcomes = run_ms(2, 100, hang);
        assert!(matches!(&outcomes[0], Outcome::Done(Some(Error::Timeout { missing, .. })) if *missing == [1]));
        assert_eq!(outcomes[1], Outcome::Lost);
        let outcomes = run_ms(3, 100, move |rank| if rank.rank() == 0 { None } else { hang(rank) });
        assert_eq!(outcomes, [Outcome::Done(None), Outcome::Lost, Outcome::Done(None)]);
    }

    #[test]
    fn different_programs_are_found_out() {
        let lengths = on_threads(3, |rank| {
            rank.doing(if rank.rank() == 0 { "step 1" } else { "step 2" });
            rank.barrier().expect("what a rank is doing is compared with nobody");
            rank.all_reduce_f64(&mut vec![0.0; 4 + rank.rank() / 2]).unwrap_err()
        });
        for error in lengths {
            assert_eq!(error.exit_code(), exit::RANKS_DIFFER);
            let expected =
                "rank 2 is at all_reduce_f64 of 5 in step 2 while rank 0 is at all_reduce_f64 of 4 in step 1:";
            assert!(error.to_string().starts_with(expected), "{error}");
        }
        let ops = on_threads(2, |rank| if rank.rank() == 0 { rank.barrier() } else { rank.all_gather(&[]).map(drop) });
        assert!(ops.iter().all(|r| matches!(r, Err(Error::Mismatch { rank: 1, .. }))));
    }

    #[test]
    fn disagreement_is_found_out() {
        let same = on_threads(3, |rank| all_agree(&rank, "selection", b"abc"));
        assert!(same.iter().all(Result::is_ok));
        let other = on_threads(3, |rank| all_agree(&rank, "selection", &[rank.rank() as u8 / 2]).unwrap_err());
        for error in other {
            assert_eq!(error, Error::Disagree { what: "selection".into(), rank: 2 });
        }
    }

    #[test]
    fn one_failure_is_the_failure_of_all() {
        let results = on_threads(4, |rank| {
            let id = rank.rank();
            assert_eq!(all_ok(&rank, Ok(id)).unwrap(), id);
            let mine = if id >= 2 { Err(Failure::new(exit::IO, format!("disk {id} is full"))) } else { Ok(()) };
            let error = all_ok(&rank, mine).unwrap_err();
            rank.barrier().expect("the group is whole");
            (error.code(), error.to_string())
        });
        let expected =
            ["rank 2 stopped the run: disk 2 is full"; 2].into_iter().chain(["disk 2 is full", "disk 3 is full"]);
        assert_eq!(results, expected.map(|text| (exit::IO, text.to_owned())).collect::<Vec<_>>());
    }
}
