//! Ranks as processes, over MPI.
//!
//! MPI's blocking collectives never return if a rank hangs, and are undefined if ranks call different operations. So
//! this uses only non-blocking point-to-point messages and polls them with a deadline. Every operation starts with a
//! rendezvous at rank 0: each rank sends its call (operation, length, activity); once all calls have arrived and match,
//! rank 0 sends every rank permission to proceed, otherwise the error. Then the ranks exchange parts of vectors
//! directly. A rank that fails during the exchange reports the error to rank 0, which sends it to all.

mod lifeline;
mod link;
mod wire;

use std::io::Write;
use std::ops::{AddAssign, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use bytemuck::Pod;

use self::lifeline::{Lifelines, Listener};
use self::link::{ABORT_GRACE, Arrival, Link, Message, pause};
use self::wire::{Pending, Tag};
use super::{Call, Collective, Error, Result, check_counts};
use crate::exit;

/// Bytes per message: longer data is exchanged in chunks of this size, so that the buffers stay small.
const CHUNK: usize = 1 << 20;

/// Up to this many elements an all-reduce gathers the whole vectors on every rank and sums them there. That halves the
/// number of sequential messages, and sends more bytes; longer vectors use reduce-scatter and all-gather.
const SHORT: usize = 4096;

/// A wait shorter than this is normal: after it, look for dead ranks and, if the process was asked to stop, warn.
const SHORT_WAIT: Duration = Duration::from_millis(100);

/// How long to keep receiving after a rank's connection has closed: its last messages may still be in flight, and the
/// error they report says more than its death.
const DRAIN: Duration = Duration::from_millis(200);

/// The timeout passed to [`init`]; [`leave`] uses it too.
static TIMEOUT: OnceLock<Duration> = OnceLock::new();

/// One rank of a group of processes connected by MPI.
pub struct Mpi {
    rank: usize,
    world_size: usize,
    timeout: Duration,
    stop_requested: Arc<AtomicBool>,
    activity: Mutex<String>,
    link: Mutex<Link>,
    lifelines: Lifelines,
}

/// Initialises MPI and connects all processes of the launch. A rank that waits longer than `timeout` for another fails
/// the group with [`Error::Timeout`]. Once `stop_requested` is true (set on SIGTERM), a waiting rank prints which ranks
/// it waits for, and keeps waiting.
///
/// # Errors
/// [`Error::Mpi`] if MPI does not initialise, or was built without `MPI_THREAD_SERIALIZED`.
pub fn init(timeout: Duration, stop_requested: Arc<AtomicBool>) -> Result<Mpi> {
    let wire = wire::init().map_err(|message| Error::Mpi { rank: 0, message })?;
    let (rank, world_size) = (wire.rank, wire.world_size);
    if !wire.any_thread {
        let message = "it was built without support for threads (MPI_THREAD_SERIALIZED), which moewarden needs";
        return Err(Error::Mpi { rank, message: message.to_owned() });
    }
    _ = TIMEOUT.set(timeout);
    let link = Mutex::new(Link::new(wire));
    let lifelines = Lifelines::default();
    let mut mpi = Mpi { rank, world_size, timeout, stop_requested, activity: Mutex::default(), link, lifelines };
    mpi.set_activity("the start");
    mpi.lifelines = mpi.connect()?;
    Ok(mpi)
}

/// Ends MPI if it is initialised.
pub(super) fn leave(code: u8, how: super::Leave) {
    if !wire::is_running() {
        return;
    }
    _ = std::io::stdout().flush();
    if how == super::Leave::Abort {
        // The other ranks report first what they know.
        std::thread::sleep(Duration::from_millis(300));
        return wire::abort(code);
    }
    if let Some(timeout) = TIMEOUT.get() {
        std::thread::spawn(|| {
            std::thread::sleep(*timeout);
            let seconds = timeout.as_secs();
            _ = writeln!(
                std::io::stderr(),
                "error: this rank has finished and waited {seconds} s for the other ranks to finish"
            );
            #[expect(clippy::exit, reason = "MPI_Finalize would wait for ever")]
            std::process::exit(exit::HANG.into());
        });
    }
    wire::finalize();
}

impl Mpi {
    /// Connects every rank to rank 0, so that a rank's death is noticed.
    fn connect(&self) -> Result<Lifelines> {
        let listener = if self.rank == 0 { Listener::bind() } else { None };
        let address = listener.as_ref().map_or_else(Vec::new, Listener::address);
        let address = self.all_gather(&address)?.swap_remove(0);
        let Some(listener) = listener else {
            let lifelines = if self.rank == 0 { Lifelines::default() } else { Lifelines::connect(&address, self.rank) };
            self.barrier()?;
            return Ok(lifelines);
        };
        let mut barrier = Ok(());
        let lifelines = listener.accept(self.world_size, || {
            barrier = self.barrier();
            barrier.is_ok()
        });
        barrier.map(|()| lifelines)
    }

    fn lock_activity(&self) -> MutexGuard<'_, String> {
        self.activity.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all ranks have made the same call. Returns that call, the locked link, and how many bytes each rank
    /// contributes (`bytes` of each, by rank).
    fn rendezvous(
        &self,
        op: &'static str,
        len: Option<usize>,
        bytes: usize,
    ) -> Result<(Call, MutexGuard<'_, Link>, Vec<usize>)> {
        let call = Call { op: op.into(), len, activity: self.lock_activity().clone() };
        let mut guard = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let link = &mut *guard;
        let arrival = Arrival { call: call.clone(), bytes };
        if self.rank > 0 {
            if link.failed.is_none() {
                link.send(0, &Message::Arrived(arrival)).map_err(|e| self.mpi_error(link, &call, &e))?;
            }
            self.wait(link, &call, |link| Ok(if link.proceed.is_none() { vec![0] } else { Vec::new() }))?;
            let lengths = link.proceed.take().expect("the wait ends when it is set");
            return Ok((call, guard, lengths));
        }
        link.arrivals[0] = Some(arrival);
        let absent = |link: &mut Link| Ok((0..self.world_size).filter(|r| link.arrivals[*r].is_none()).collect());
        self.wait(link, &call, absent)?;
        let arrivals: Vec<_> = link.arrivals.iter_mut().filter_map(Option::take).collect();
        if let Some(error) = Call::first_mismatch(arrivals.iter().map(|a| &a.call)) {
            return Err(self.fail(link, error));
        }
        let lengths: Vec<usize> = arrivals.iter().map(|a| a.bytes).collect();
        let proceed = Message::Proceed(lengths.clone());
        for rank in 1..self.world_size {
            link.send(rank, &proceed).map_err(|e| self.mpi_error(link, &call, &e))?;
        }
        // MPI makes progress only inside its calls: complete the sends before this rank goes back to computing.
        self.wait(link, &call, |link| Ok(link.unsent()))?;
        Ok((call, guard, lengths))
    }

    /// Polls until `missing` returns no rank. Fails after the timeout, if a missing rank has died, or if the group
    /// failed.
    fn wait(
        &self,
        link: &mut Link,
        call: &Call,
        mut missing: impl FnMut(&mut Link) -> wire::Result<Vec<usize>>,
    ) -> Result<()> {
        let start = Instant::now();
        // A dead rank, and since when it is known.
        let mut dead: Option<(usize, Instant)> = None;
        loop {
            let absent = link.poll().and_then(|()| missing(link)).map_err(|e| self.mpi_error(link, call, &e))?;
            if let Some(error) = link.failed.clone() {
                if link.failure_reported {
                    return Err(error);
                }
                let error = self.find_culprits(link, error, &absent);
                return Err(self.fail(link, error));
            }
            if absent.is_empty() {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited >= self.timeout {
                let (rank, at, seconds) = (self.rank, call.to_string(), waited.as_secs());
                let error = Error::Timeout { rank, at, seconds, missing: absent.clone() };
                let error = self.find_culprits(link, error, &absent);
                return Err(self.fail(link, error));
            }
            if waited >= SHORT_WAIT
                && let Some(ended) = self.lifelines.ended(&absent)
            {
                let since = dead.filter(|(rank, _)| *rank == ended).map_or_else(Instant::now, |(_, since)| since);
                dead = Some((ended, since));
                if since.elapsed() >= DRAIN {
                    return Err(self.fail(link, Error::RankEnded { rank: self.rank, ended, at: call.to_string() }));
                }
            }
            if waited >= SHORT_WAIT && !link.warned && self.stop_requested.load(Ordering::Relaxed) {
                link.warned = true;
                self.warn_of_wait(call, &absent);
            }
            pause(waited);
        }
    }

    /// On rank 0, narrows the missing ranks of a timeout down to its culprits. A rank that is itself waiting for the
    /// culprit looks absent too, and a rank that waits for rank 0's answer cannot know for whom rank 0 waits. But a
    /// rank that reports its own timeout is alive: the culprits are the missing ranks that have not reported.
    fn find_culprits(&self, link: &mut Link, mut error: Error, absent: &[usize]) -> Error {
        let Error::Timeout { missing, .. } = &mut error else { return error };
        if self.rank > 0 {
            return error;
        }
        let culprits = |link: &Link| {
            let is_missing =
                |r: &usize| absent.contains(r) || link.timeouts.iter().any(|(_, missing)| missing.contains(r));
            let has_reported = |r: &usize| link.timeouts.iter().any(|(rank, _)| rank == r);
            let (culprits, rest): (Vec<_>, _) = (1..self.world_size).partition(|r| is_missing(r) && !has_reported(r));
            let certain = culprits.len() <= 1 && rest.iter().all(has_reported);
            (culprits, certain)
        };
        // All waits began at about the same time, so the other ranks' reports arrive soon.
        link.poll_until(ABORT_GRACE / 2, |link| culprits(link).1);
        let (culprits, _) = culprits(link);
        if !culprits.is_empty() {
            *missing = culprits;
        }
        error
    }

    /// Prints one line on stderr, ignoring errors: stderr may be closed.
    fn warn_of_wait(&self, call: &Call, missing: &[usize]) {
        let whom = match missing {
            [0] => "rank 0's answer".to_owned(),
            _ => format!("rank(s) {missing:?}"),
        };
        let line = format!("rank {} was told to stop while it waited at {call} for {whom}\n", self.rank);
        _ = std::io::stderr().write_all(line.as_bytes());
    }

    /// Fails the group with `error`. Returns the error that all ranks get, which rank 0 chooses: on another rank, its
    /// answer replaces `error`.
    fn fail(&self, link: &mut Link, error: Error) -> Error {
        if let (true, Some(first)) = (link.failure_reported, &link.failed) {
            return first.clone();
        }
        link.failure_reported = true;
        if self.rank > 0 {
            // If rank 0 is dead, every rank notices that by itself.
            if !matches!(error, Error::RankEnded { ended: 0, .. }) {
                _ = link.send(0, &Message::Failed(error.clone()));
                link.poll_until(ABORT_GRACE, |link| link.failed.is_some());
            }
            return link.failed.get_or_insert(error).clone();
        }
        for rank in 1..self.world_size {
            _ = link.send(rank, &Message::Failed(error.clone()));
        }
        link.poll_until(ABORT_GRACE, |link| link.unsent().is_empty());
        link.failed = Some(error.clone());
        error
    }

    /// Fails the group with the message of a failed MPI call.
    fn mpi_error(&self, link: &mut Link, call: &Call, message: &str) -> Error {
        self.fail(link, Error::Mpi { rank: self.rank, message: format!("{message}, at {call}") })
    }

    /// Sends `data[to[r]]` to each rank r and receives `from[r]` bytes from it, chunk by chunk. `take` gets the byte
    /// offset of the current chunks and one chunk per rank. Nothing goes from a rank to itself: its own chunk is empty.
    fn all_to_all(
        &self,
        link: &mut Link,
        call: &Call,
        data: &[u8],
        to: &[Range<usize>],
        from: &[usize],
        mut take: impl FnMut(usize, &[Vec<u8>]),
    ) -> Result<()> {
        let others = || (0..self.world_size).filter(|r| *r != self.rank);
        let longest = to.iter().map(Range::len).chain(from.iter().copied()).max().unwrap_or(0);
        for start in (0..longest).step_by(CHUNK) {
            let chunk = |len: usize| start.min(len)..(start + CHUNK).min(len);
            let mut sent: Vec<Option<Pending>> = (0..self.world_size).map(|_| None).collect();
            let mut received: Vec<Option<Pending>> = (0..self.world_size).map(|_| None).collect();
            let mut begin = |link: &mut Link| {
                for r in others().filter(|r| !chunk(from[*r]).is_empty()) {
                    received[r] = Some(link.wire.receive(r, Tag::Data, chunk(from[r]).len())?);
                }
                for r in others().filter(|r| !chunk(to[*r].len()).is_empty()) {
                    sent[r] = Some(link.wire.send(r, Tag::Data, data[to[r].clone()][chunk(to[r].len())].to_vec())?);
                }
                Ok(())
            };
            begin(link).map_err(|e: String| self.mpi_error(link, call, &e))?;
            self.wait(link, call, |link| {
                let mut missing = Vec::new();
                for r in others() {
                    let both = [&mut sent[r], &mut received[r]].into_iter().flatten();
                    let done: wire::Result<Vec<bool>> = both.map(|m| m.is_done(&mut link.wire)).collect();
                    if done?.contains(&false) {
                        missing.push(r);
                    }
                }
                Ok(missing)
            })?;
            let received: Vec<_> = received.into_iter().map(|m| m.map_or(Vec::new(), Pending::into_bytes)).collect();
            take(start, &received);
        }
        Ok(())
    }

    /// Overwrites `part` with this rank's part of the sum over the ranks, added in rank order.
    fn reduce_scatter<T: Pod + AddAssign>(
        &self,
        link: &mut Link,
        call: &Call,
        values: &[T],
        counts: &[usize],
        part: &mut [T],
    ) -> Result<()> {
        let data: &[u8] = bytemuck::cast_slice(values);
        let to = ranges(counts.iter().map(|n| n * size_of::<T>()));
        let own = &data[to[self.rank].clone()];
        self.all_to_all(link, call, data, &to, &vec![own.len(); self.world_size], |start, chunks| {
            let (start, end) = (start.min(own.len()), (start + CHUNK).min(own.len()));
            let part = &mut part[start / size_of::<T>()..end / size_of::<T>()];
            sum(part, (0..self.world_size).map(|r| if r == self.rank { &own[start..end] } else { &chunks[r] }));
        })
    }

    /// Concatenates the ranks' parts into `out`.
    fn gather(&self, link: &mut Link, call: &Call, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        let parts = ranges(counts.iter().copied());
        out[parts[self.rank].clone()].copy_from_slice(part);
        self.all_to_all(link, call, part, &vec![0..part.len(); self.world_size], counts, |start, chunks| {
            for (part, chunk) in parts.iter().zip(chunks).filter(|(_, chunk)| !chunk.is_empty()) {
                out[part.start..][start..][..chunk.len()].copy_from_slice(chunk);
            }
        })
    }

    fn all_reduce<T: Pod + AddAssign>(&self, op: &'static str, values: &mut [T]) -> Result<()> {
        let (call, mut link, _) = self.rendezvous(op, Some(values.len()), 0)?;
        if values.is_empty() {
            return Ok(());
        }
        if values.len() <= SHORT {
            let len = size_of_val(values);
            let mut all = vec![0; len * self.world_size];
            self.gather(&mut link, &call, bytemuck::cast_slice(values), &vec![len; self.world_size], &mut all)?;
            sum(values, all.chunks_exact(len));
            return Ok(());
        }
        let ends = |r: usize| values.len() * r / self.world_size;
        let counts: Vec<_> = (0..self.world_size).map(|r| ends(r + 1) - ends(r)).collect();
        let mut part = vec![T::zeroed(); counts[self.rank]];
        self.reduce_scatter(&mut link, &call, values, &counts, &mut part)?;
        let bytes: Vec<_> = counts.iter().map(|n| n * size_of::<T>()).collect();
        self.gather(&mut link, &call, bytemuck::cast_slice(&part), &bytes, bytemuck::cast_slice_mut(values))
    }
}

/// Consecutive ranges of these lengths, from 0.
fn ranges(lengths: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut end = 0;
    lengths
        .map(|len| {
            end += len;
            end - len..end
        })
        .collect()
}

/// Overwrites `out` with the sum of `vectors`, added in order. They are byte slices without alignment.
fn sum<'a, T: Pod + AddAssign>(out: &mut [T], vectors: impl Iterator<Item = &'a [u8]>) {
    for (i, bytes) in vectors.enumerate() {
        let values = bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned::<T>);
        for (sum, x) in out.iter_mut().zip(values) {
            if i == 0 {
                *sum = x;
            } else {
                *sum += x;
            }
        }
    }
}

impl Collective for Mpi {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn barrier(&self) -> Result<()> {
        self.rendezvous("barrier", None, 0).map(drop)
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len();
        let (call, mut link, _) = self.rendezvous("broadcast", Some(len), 0)?;
        let (mut to, mut from) = (vec![0..0; self.world_size], vec![0; self.world_size]);
        if self.rank == 0 {
            to[1..].fill(0..len);
            return self.all_to_all(&mut link, &call, bytes, &to, &from, |_, _| {});
        }
        from[0] = len;
        self.all_to_all(&mut link, &call, &[], &to, &from, |start, chunks| {
            bytes[start..][..chunks[0].len()].copy_from_slice(&chunks[0]);
        })
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        self.all_reduce("all_reduce_f64", values)
    }

    fn all_reduce_f32(&self, values: &mut [f32]) -> Result<()> {
        self.all_reduce("all_reduce_f32", values)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (call, mut link, lengths) = self.rendezvous("all_gather", None, bytes.len())?;
        let mut all = vec![0; lengths.iter().sum()];
        self.gather(&mut link, &call, bytes, &lengths, &mut all)?;
        Ok(ranges(lengths.into_iter()).into_iter().map(|range| all[range].to_vec()).collect())
    }

    fn reduce_scatter_f32(&self, values: &[f32], counts: &[usize], part: &mut [f32]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), values.len());
        let (call, mut link, _) = self.rendezvous("reduce_scatter_f32", Some(values.len()), 0)?;
        self.reduce_scatter(&mut link, &call, values, counts, part)
    }

    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), out.len());
        let (call, mut link, _) = self.rendezvous("all_gather_into", Some(out.len()), 0)?;
        self.gather(&mut link, &call, part, counts, out)
    }

    fn set_activity(&self, activity: &str) {
        activity.clone_into(&mut self.lock_activity());
    }

    fn activity(&self) -> String {
        self.lock_activity().clone()
    }

    fn abort(&self, code: u8, reason: &str) {
        let start = Instant::now();
        let mut link = loop {
            match self.link.try_lock() {
                Ok(link) => break link,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                // Another thread is inside an operation, perhaps for long: give up, the other ranks will notice that
                // this process ends.
                Err(TryLockError::WouldBlock) if start.elapsed() >= ABORT_GRACE => return,
                Err(TryLockError::WouldBlock) => pause(start.elapsed()),
            }
        };
        if link.failed.is_none() {
            self.fail(&mut link, Error::Aborted { rank: self.rank, code, reason: reason.to_owned() });
        }
    }

    fn renew(&self) -> Result<()> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner).renew();
        self.barrier()
    }
}

impl Drop for Mpi {
    /// Aborts the group if this rank panicked: no other rank must wait for it.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(exit::INTERNAL, "it panicked (see its message above)");
        }
    }
}
