//! Ranks as processes, joined by MPI.
//!
//! MPI's own collectives wait for ever for a rank that hangs, and are undefined when ranks call different ones. So this
//! uses nothing of MPI but messages, and polls with a deadline. Every operation begins at rank 0: each rank says where it
//! is; once all are at the same place, rank 0 lets them go, else it tells all what is wrong. Then parts of vectors go from
//! rank to rank. An error that comes up later reaches all by way of rank 0.

mod lifeline;
mod link;
mod wire;

use std::io::Write;
use std::ops::{AddAssign, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use bytemuck::Pod;

use self::lifeline::{Lifelines, Offer};
use self::link::{Arrival, LAST_WORDS, Link, Message, pause};
use self::wire::{Pending, Tag};
use super::{At, Collective, Error, Result, check_counts};
use crate::exit;

/// Bytes that one rank sends another at a time: the buffers stay small.
const PIECE: usize = 1 << 20;

/// Elements up to which every rank sums whole vectors: half the messages one after another, for more bytes.
const SHORT: usize = 4096;

/// A rank that is told to stop says whom it waits for, unless they come within this time.
const STILL_WAITING: Duration = Duration::from_millis(100);

/// How long the last messages of a rank that has ended may take to be seen.
const LAST_MAIL: Duration = Duration::from_millis(200);

/// The timeout of [`init`], for [`leave`].
static TIMEOUT: OnceLock<Duration> = OnceLock::new();

/// One rank of a group of processes.
pub struct Mpi {
    rank: usize,
    world_size: usize,
    timeout: Duration,
    stopping: Arc<AtomicBool>,
    doing: Mutex<String>,
    link: Mutex<Link>,
    lifelines: Lifelines,
}

/// Starts MPI and joins all processes of the launch. A rank that waits longer than `timeout` for another ends the group.
/// When `stopping` becomes true, as on SIGTERM, a rank that waits for others says for whom, and goes on waiting.
///
/// # Errors
/// [`Error::Library`] if MPI does not start, or allows calls from its first thread only.
pub fn init(timeout: Duration, stopping: Arc<AtomicBool>) -> Result<Mpi> {
    let wire = wire::init().map_err(|message| Error::Library { rank: 0, message })?;
    let (rank, world_size) = (wire.rank, wire.world_size);
    if !wire.any_thread {
        let message = "it was built without support for threads (MPI_THREAD_SERIALIZED), which moewarden needs";
        return Err(Error::Library { rank, message: message.to_owned() });
    }
    _ = TIMEOUT.set(timeout);
    let link = Mutex::new(Link::new(wire));
    let lifelines = Lifelines::default();
    let mut mpi = Mpi { rank, world_size, timeout, stopping, doing: Mutex::default(), link, lifelines };
    mpi.doing("the start");
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
                "error: this rank is done and waited {seconds} s for others to be done too"
            );
            std::process::exit(exit::HANG.into());
        });
    }
    wire::finalize();
}

impl Mpi {
    /// The lines by which ranks notice each other's end.
    fn connect(&self) -> Result<Lifelines> {
        let offer = if self.rank == 0 { Offer::new() } else { None };
        let bytes = offer.as_ref().map_or_else(Vec::new, Offer::to_bytes);
        let theirs = self.all_gather(&bytes)?.swap_remove(0);
        let Some(offer) = offer else {
            let lines = if self.rank == 0 { Lifelines::default() } else { Lifelines::take(&theirs, self.rank) };
            self.barrier()?;
            return Ok(lines);
        };
        let mut met = Ok(());
        let lines = offer.accept(self.world_size, || {
            met = self.barrier();
            met.is_ok()
        });
        met.map(|()| lines)
    }

    fn what(&self) -> MutexGuard<'_, String> {
        self.doing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The place of this rank, and its link, once all ranks have come to the same place; and how many bytes each brings.
    fn meet(
        &self,
        op: &'static str,
        len: Option<usize>,
        bytes: usize,
    ) -> Result<(At, MutexGuard<'_, Link>, Vec<usize>)> {
        let at = At { op: op.into(), len, doing: self.what().clone() };
        let mut guard = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        let link = &mut *guard;
        let arrival = Arrival { at: at.clone(), bytes };
        if self.rank > 0 {
            if link.failed.is_none() {
                link.tell(0, &Message::Here(arrival)).map_err(|e| self.library(link, &at, &e))?;
            }
            self.wait(link, &at, |link| Ok(if link.go.is_none() { vec![0] } else { Vec::new() }))?;
            let lengths = link.go.take().expect("waited for");
            return Ok((at, guard, lengths));
        }
        link.arrivals[0] = Some(arrival);
        let absent = |link: &mut Link| Ok((0..self.world_size).filter(|r| link.arrivals[*r].is_none()).collect());
        self.wait(link, &at, absent)?;
        let arrivals: Vec<_> = link.arrivals.iter_mut().filter_map(Option::take).collect();
        if let Some(error) = At::first_mismatch(arrivals.iter().map(|a| &a.at)) {
            return Err(self.fail(link, error));
        }
        let lengths: Vec<usize> = arrivals.iter().map(|a| a.bytes).collect();
        let go = Message::Go(lengths.clone());
        for rank in 1..self.world_size {
            link.tell(rank, &go).map_err(|e| self.library(link, &at, &e))?;
        }
        // Nothing moves once this rank computes again.
        self.wait(link, &at, |link| Ok(link.untold()))?;
        Ok((at, guard, lengths))
    }

    /// Waits until `missing` names no rank, or the group fails.
    fn wait(
        &self,
        link: &mut Link,
        at: &At,
        mut missing: impl FnMut(&mut Link) -> wire::Result<Vec<usize>>,
    ) -> Result<()> {
        let start = Instant::now();
        let mut noticed: Option<(usize, Instant)> = None;
        loop {
            let absent = link.listen().and_then(|()| missing(link)).map_err(|e| self.library(link, at, &e))?;
            if let Some(error) = link.failed.clone() {
                if link.told {
                    return Err(error);
                }
                let error = self.blame(link, error, &absent);
                return Err(self.fail(link, error));
            }
            if absent.is_empty() {
                return Ok(());
            }
            let waited = start.elapsed();
            if waited >= self.timeout {
                let (rank, at, seconds) = (self.rank, at.to_string(), waited.as_secs());
                let error = Error::Timeout { rank, at, seconds, missing: absent.clone() };
                let error = self.blame(link, error, &absent);
                return Err(self.fail(link, error));
            }
            if waited >= STILL_WAITING
                && let Some(gone) = self.lifelines.ended(&absent)
            {
                // What it said before may take several looks to arrive, and says more.
                let since = noticed.filter(|(rank, _)| *rank == gone).map_or_else(Instant::now, |(_, since)| since);
                noticed = Some((gone, since));
                if since.elapsed() >= LAST_MAIL {
                    return Err(self.fail(link, Error::Gone { rank: self.rank, gone, at: at.to_string() }));
                }
            }
            if waited >= STILL_WAITING && !link.warned && self.stopping.load(Ordering::Relaxed) {
                link.warned = true;
                self.say_for_whom(at, &absent);
            }
            pause(waited);
        }
    }

    /// On rank 0, a timeout with the ranks that hang for those missing: a rank that waits for one that hangs is missing too, and
    /// who waits for rank 0's answer does not know for whom rank 0 waits. But who says that it waits does not hang.
    fn blame(&self, link: &mut Link, mut error: Error, absent: &[usize]) -> Error {
        let Error::Timeout { missing, .. } = &mut error else { return error };
        if self.rank > 0 {
            return error;
        }
        let hung = |link: &Link| {
            let named = |r: &usize| absent.contains(r) || link.waits.iter().any(|(_, missing)| missing.contains(r));
            let speaks = |r: &usize| link.waits.iter().any(|(rank, _)| rank == r);
            let (hung, rest): (Vec<_>, _) = (1..self.world_size).partition(|r| named(r) && !speaks(r));
            let clear = hung.len() <= 1 && rest.iter().all(speaks);
            (hung, clear)
        };
        // They began to wait at about the same time.
        link.linger(LAST_WORDS / 2, |link| hung(link).1);
        let (hung, _) = hung(link);
        if !hung.is_empty() {
            *missing = hung;
        }
        error
    }

    /// One line on stderr, which may be closed.
    fn say_for_whom(&self, at: &At, missing: &[usize]) {
        let whom = match missing {
            [0] => "rank 0's answer".to_owned(),
            _ => format!("rank(s) {missing:?}"),
        };
        let line = format!("rank {} was told to stop while it waited at {at} for {whom}\n", self.rank);
        _ = std::io::stderr().write_all(line.as_bytes());
    }

    /// Ends the group with `error`, or with what rank 0 holds for the cause; all get the same.
    fn fail(&self, link: &mut Link, error: Error) -> Error {
        if let (true, Some(first)) = (link.told, &link.failed) {
            return first.clone();
        }
        link.told = true;
        if self.rank > 0 {
            // Where rank 0 cannot be told, the ranks find out by themselves.
            if !matches!(error, Error::Gone { gone: 0, .. }) {
                _ = link.tell(0, &Message::Failed(error.clone()));
                link.linger(LAST_WORDS, |link| link.failed.is_some());
            }
            return link.failed.get_or_insert(error).clone();
        }
        for rank in 1..self.world_size {
            _ = link.tell(rank, &Message::Failed(error.clone()));
        }
        link.linger(LAST_WORDS, |link| link.untold().is_empty());
        link.failed = Some(error.clone());
        error
    }

    fn library(&self, link: &mut Link, at: &At, message: &str) -> Error {
        self.fail(link, Error::Library { rank: self.rank, message: format!("{message}, at {at}") })
    }

    /// Sends `data[to[r]]` to each rank r, and hands on `from[r]` bytes of each, a piece of every rank at a time: `take` gets
    /// the place of the pieces and the pieces by rank. A rank's own is neither sent nor handed on.
    fn trade(
        &self,
        link: &mut Link,
        at: &At,
        data: &[u8],
        to: &[Range<usize>],
        from: &[usize],
        mut take: impl FnMut(usize, &[Vec<u8>]),
    ) -> Result<()> {
        let others = || (0..self.world_size).filter(|r| *r != self.rank);
        let longest = to.iter().map(Range::len).chain(from.iter().copied()).max().unwrap_or(0);
        for start in (0..longest).step_by(PIECE) {
            let piece = |len: usize| start.min(len)..(start + PIECE).min(len);
            let mut sent: Vec<Option<Pending>> = (0..self.world_size).map(|_| None).collect();
            let mut received: Vec<Option<Pending>> = (0..self.world_size).map(|_| None).collect();
            let mut begin = |link: &mut Link| {
                for r in others().filter(|r| !piece(from[*r]).is_empty()) {
                    received[r] = Some(link.wire.receive(r, Tag::Data, piece(from[r]).len())?);
                }
                for r in others().filter(|r| !piece(to[*r].len()).is_empty()) {
                    sent[r] = Some(link.wire.send(r, Tag::Data, data[to[r].clone()][piece(to[r].len())].to_vec())?);
                }
                Ok(())
            };
            begin(link).map_err(|e: String| self.library(link, at, &e))?;
            self.wait(link, at, |link| {
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

    /// Part `rank` of the sum over the ranks, in their order.
    fn reduce_scatter<T: Pod + AddAssign>(
        &self,
        link: &mut Link,
        at: &At,
        values: &[T],
        counts: &[usize],
        part: &mut [T],
    ) -> Result<()> {
        let data: &[u8] = bytemuck::cast_slice(values);
        let to = ranges(counts.iter().map(|n| n * size_of::<T>()));
        let own = &data[to[self.rank].clone()];
        self.trade(link, at, data, &to, &vec![own.len(); self.world_size], |start, pieces| {
            let (start, end) = (start.min(own.len()), (start + PIECE).min(own.len()));
            let part = &mut part[start / size_of::<T>()..end / size_of::<T>()];
            sum(part, (0..self.world_size).map(|r| if r == self.rank { &own[start..end] } else { &pieces[r] }));
        })
    }

    /// Puts the ranks' parts one after another into `out`.
    fn gather(&self, link: &mut Link, at: &At, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        let places = ranges(counts.iter().copied());
        out[places[self.rank].clone()].copy_from_slice(part);
        self.trade(link, at, part, &vec![0..part.len(); self.world_size], counts, |start, pieces| {
            for (place, piece) in places.iter().zip(pieces).filter(|(_, piece)| !piece.is_empty()) {
                out[place.start..][start..][..piece.len()].copy_from_slice(piece);
            }
        })
    }

    fn all_reduce<T: Pod + AddAssign>(&self, op: &'static str, values: &mut [T]) -> Result<()> {
        let (at, mut link, _) = self.meet(op, Some(values.len()), 0)?;
        if values.is_empty() {
            return Ok(());
        }
        if values.len() <= SHORT {
            let len = size_of_val(values);
            let mut all = vec![0; len * self.world_size];
            self.gather(&mut link, &at, bytemuck::cast_slice(values), &vec![len; self.world_size], &mut all)?;
            sum(values, all.chunks_exact(len));
            return Ok(());
        }
        let ends = |r: usize| values.len() * r / self.world_size;
        let counts: Vec<_> = (0..self.world_size).map(|r| ends(r + 1) - ends(r)).collect();
        let mut part = vec![T::zeroed(); counts[self.rank]];
        self.reduce_scatter(&mut link, &at, values, &counts, &mut part)?;
        let bytes: Vec<_> = counts.iter().map(|n| n * size_of::<T>()).collect();
        self.gather(&mut link, &at, bytemuck::cast_slice(&part), &bytes, bytemuck::cast_slice_mut(values))
    }
}

/// Places one after another, of these lengths.
fn ranges(lengths: impl Iterator<Item = usize>) -> Vec<Range<usize>> {
    let mut end = 0;
    lengths
        .map(|len| {
            end += len;
            end - len..end
        })
        .collect()
}

/// Writes into `out` the sum of vectors that are given as bytes, in their order.
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
        self.meet("barrier", None, 0).map(drop)
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        let len = bytes.len();
        let (at, mut link, _) = self.meet("broadcast", Some(len), 0)?;
        let (mut to, mut from) = (vec![0..0; self.world_size], vec![0; self.world_size]);
        if self.rank == 0 {
            to[1..].fill(0..len);
            return self.trade(&mut link, &at, bytes, &to, &from, |_, _| {});
        }
        from[0] = len;
        self.trade(&mut link, &at, &[], &to, &from, |start, pieces| {
            bytes[start..][..pieces[0].len()].copy_from_slice(&pieces[0]);
        })
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        self.all_reduce("all_reduce_f64", values)
    }

    fn all_reduce_f32(&self, values: &mut [f32]) -> Result<()> {
        self.all_reduce("all_reduce_f32", values)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let (at, mut link, lengths) = self.meet("all_gather", None, bytes.len())?;
        let mut all = vec![0; lengths.iter().sum()];
        self.gather(&mut link, &at, bytes, &lengths, &mut all)?;
        Ok(ranges(lengths.into_iter()).into_iter().map(|place| all[place].to_vec()).collect())
    }

    fn reduce_scatter_f32(&self, values: &[f32], counts: &[usize], part: &mut [f32]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), values.len());
        let (at, mut link, _) = self.meet("reduce_scatter_f32", Some(values.len()), 0)?;
        self.reduce_scatter(&mut link, &at, values, counts, part)
    }

    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        check_counts(self.rank, self.world_size, counts, part.len(), out.len());
        let (at, mut link, _) = self.meet("all_gather_into", Some(out.len()), 0)?;
        self.gather(&mut link, &at, part, counts, out)
    }

    fn doing(&self, what: &str) {
        what.clone_into(&mut self.what());
    }

    fn place(&self) -> String {
        self.what().clone()
    }

    fn abort(&self, code: u8, reason: &str) {
        let start = Instant::now();
        let mut link = loop {
            match self.link.try_lock() {
                Ok(link) => break link,
                Err(TryLockError::Poisoned(poisoned)) => break poisoned.into_inner(),
                // Another thread is within an operation, and may be for long: the end of the process must do.
                Err(TryLockError::WouldBlock) if start.elapsed() >= LAST_WORDS => return,
                Err(TryLockError::WouldBlock) => pause(start.elapsed()),
            }
        };
        if link.failed.is_none() {
            self.fail(&mut link, Error::Aborted { rank: self.rank, code, reason: reason.to_owned() });
        }
    }
}

impl Drop for Mpi {
    /// The others must not wait for a rank that panicked.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.abort(exit::INTERNAL, "it panicked (its message stands above)");
        }
    }
}
