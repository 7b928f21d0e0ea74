//! A rank's end of NCCL: calls that do not wait, errors that come later, and an end to both.

use std::ffi::c_void;
use std::fmt;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::{DriverError, result, sys};

use super::DeviceCollective;
use super::library::{BYTE, Code, Comm, Config, F32, IN_PROGRESS, Nccl, SUCCESS, SUM, UniqueId};
use crate::collective::{Collective, Error, Result, all_agree, check_counts};

/// A group of ranks, each with a GPU of its own, seen from one of them. It is used, and dropped, where that GPU is the
/// thread's.
pub struct Communicator {
    nccl: Nccl,
    rank: usize,
    world_size: usize,
    timeout: Duration,
    compute: sys::CUstream,
    stream: sys::CUstream,
    /// The end of what the compute stream had queued when an operation was.
    ready: sys::CUevent,
    /// The end of what this stream had queued when it was joined or waited for.
    done: sys::CUevent,
    /// The error, once there was one.
    comm: Mutex<Result<Comm>>,
    stopped: AtomicBool,
}

// SAFETY: the handles may be used from any thread; NCCL's, one thread at a time, is behind a mutex.
unsafe impl Send for Communicator {}
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Joins the ranks of `host`, which all come here. The thread's GPU is this rank's, `compute` the stream of its work.
    /// `timeout` is for this and for every later wait.
    ///
    /// # Errors
    /// Versions that differ, two ranks on one GPU, NCCL's own errors, ranks that do not come in time.
    pub fn new(nccl: Nccl, host: &dyn Collective, compute: sys::CUstream, timeout: Duration) -> Result<Self> {
        let (rank, world_size) = (host.rank(), host.world_size());
        let failed = |message| Error::Nccl { rank, message };
        all_agree(host, "version of NCCL", &nccl.version().to_le_bytes())?;
        // NCCL may hang where two ranks share a GPU ("Creating a Communicator").
        let gpus = host.all_gather(&this_gpu().map_err(|e| failed(said("cuDeviceGetUuid", e)))?)?;
        if let Some((first, second)) = first_twins(&gpus) {
            return Err(failed(format!(
                "ranks {first} and {second} use the same GPU, and NCCL needs one for each rank: start as many ranks as there \
                 are GPUs"
            )));
        }
        let mut id = UniqueId([0; 128]);
        if rank == 0 {
            id = nccl.unique_id().map_err(failed)?;
        }
        host.broadcast(&mut id.0)?;

        let (stream, ready, done) = stream_and_events().map_err(|e| failed(said("cuStreamCreate", e)))?;
        let mut comm = ptr::null_mut();
        let (ranks, me) = (world_size.try_into().expect("few ranks"), rank.try_into().expect("few ranks"));
        // SAFETY: the configuration outlives the call, which copies it.
        let code = unsafe { (nccl.functions.init)(&mut comm, ranks, id, me, &mut Config::non_blocking()) };
        let comm = Mutex::new(Ok(comm));
        let stopped = AtomicBool::new(false);
        let new = Self { nccl, rank, world_size, timeout, compute, stream, ready, done, comm, stopped };
        new.settle(&mut new.lock(), code, &"ncclCommInitRank")?;
        new.connect()?;
        Ok(new)
    }

    /// One of each operation, for NCCL connects ranks when they first need it. Here all of them come; later, a rank could wait
    /// in vain for one that was lost meanwhile, before the host has found that out.
    fn connect(&self) -> Result<()> {
        let (ones, bytes) = (vec![1; self.world_size], vec![size_of::<f32>(); self.world_size]);
        let failed = |e| Error::Nccl { rank: self.rank, message: said("memory for ncclAllReduce", e) };
        // SAFETY: its own memory, which is freed when nothing uses it any more.
        let values = unsafe { result::malloc_sync(4 * self.world_size) }.map_err(failed)?;
        let part = values + 4 * self.rank as u64;
        let connected = unsafe { result::memset_d8_async(values, 0, 4 * self.world_size, self.compute) }
            .map_err(failed)
            .and_then(|()| self.all_reduce_f32(values, self.world_size))
            .and_then(|()| self.reduce_scatter_f32(values, &ones, part))
            .and_then(|()| self.all_gather_into(part, &bytes, values))
            .and_then(|()| self.wait());
        // SAFETY: after the wait, or after an error that ended NCCL's work.
        unsafe { result::free_sync(values) }.map_err(failed).and(connected)
    }

    /// NCCL and its version, for the log.
    pub fn library(&self) -> &Nccl {
        &self.nccl
    }

    fn lock(&self) -> MutexGuard<'_, Result<Comm>> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues `call` behind what the compute stream holds.
    fn queue(&self, at: &dyn fmt::Display, call: impl FnOnce(Comm, *mut c_void) -> Code) -> Result<()> {
        let mut state = self.lock();
        let comm = state.clone()?;
        // SAFETY: streams and events live as long as this value.
        let behind = unsafe {
            result::event::record(self.ready, self.compute)
                .and_then(|()| result::stream::wait_event(self.stream, self.ready, WAIT_DEFAULT))
        };
        self.driver(&mut state, at, behind)?;
        let code = call(comm, self.stream.cast());
        // Only then is the operation in the stream ("ncclCommGetAsyncError": nothing else may be queued before).
        self.settle(&mut state, code, at)
    }

    /// Waits until a call that does not wait is through: never for the operation, only until it stands in the stream.
    fn settle(&self, state: &mut Result<Comm>, mut code: Code, at: &dyn fmt::Display) -> Result<()> {
        let comm = state.clone()?;
        let started = Instant::now();
        while code == IN_PROGRESS {
            self.pause(state, started, at)?;
            code = self.async_error(comm);
        }
        match self.nccl.check(code) {
            Ok(()) => Ok(()),
            Err(why) => self.fail(state, Error::Nccl { rank: self.rank, message: format!("{why}, at {at}") }),
        }
    }

    fn async_error(&self, comm: Comm) -> Code {
        let mut error = SUCCESS;
        // SAFETY: the communicator is alive while the state is Ok.
        let code = unsafe { (self.nccl.functions.async_error)(comm, &mut error) };
        if code == SUCCESS { error } else { code }
    }

    /// A moment, unless time is up or somebody called `abort`.
    fn pause(&self, state: &mut Result<Comm>, started: Instant, at: &dyn fmt::Display) -> Result<()> {
        let waited = started.elapsed();
        if self.stopped.load(Ordering::Acquire) {
            return self.fail(state, Error::Nccl { rank: self.rank, message: format!("ended on request, at {at}") });
        }
        if waited > self.timeout {
            // NCCL does not tell which of the others.
            let missing = (0..self.world_size).filter(|&rank| rank != self.rank).collect();
            let (rank, seconds) = (self.rank, self.timeout.as_secs());
            return self.fail(state, Error::Timeout { rank, at: at.to_string(), seconds, missing });
        }
        // Most waits are for microseconds; a core is not to be burnt in the others.
        if waited < Duration::from_millis(1) {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn driver<T>(
        &self,
        state: &mut Result<Comm>,
        at: &dyn fmt::Display,
        answer: std::result::Result<T, DriverError>,
    ) -> Result<()> {
        match answer {
            Ok(_) => Ok(()),
            Err(e) => self.fail(state, Error::Nccl { rank: self.rank, message: said(&at.to_string(), e) }),
        }
    }

    /// Ends the communicator, and with it its kernels, so that streams that wait for them go on.
    fn fail(&self, state: &mut Result<Comm>, error: Error) -> Result<()> {
        if let Ok(comm) = std::mem::replace(state, Err(error.clone())) {
            // SAFETY: the state no longer holds it, so that it is not used again.
            unsafe { (self.nccl.functions.abort)(comm) };
        }
        Err(error)
    }

    /// Operations that start together, one for each rank with a part.
    fn group(&self, counts: &[usize], mut call: impl FnMut(i32, usize, usize) -> Code) -> Code {
        // SAFETY: start and end are paired, in one thread.
        let mut code = unsafe { (self.nccl.functions.group_start)() };
        let fine = |code| code == SUCCESS || code == IN_PROGRESS;
        let mut offset = 0;
        for (root, &count) in (0i32..).zip(counts) {
            if count > 0 && fine(code) {
                code = call(root, offset, count);
            }
            offset += count;
        }
        let end = unsafe { (self.nccl.functions.group_end)() };
        if fine(code) { end } else { code }
    }
}

impl DeviceCollective for Communicator {
    fn rank(&self) -> usize {
        self.rank
    }

    fn world_size(&self) -> usize {
        self.world_size
    }

    fn all_reduce_f32(&self, values: u64, len: usize) -> Result<()> {
        self.queue(&format_args!("all_reduce_f32 of {len}"), |comm, stream| {
            // SAFETY: the trait's contract on addresses; the communicator is alive.
            unsafe { (self.nccl.functions.all_reduce)(at(values), at_mut(values), len, F32, SUM, comm, stream) }
        })
    }

    fn reduce_scatter_f32(&self, values: u64, counts: &[usize], part: u64) -> Result<()> {
        let total = counts.iter().sum();
        check_counts(self.rank, self.world_size, counts, counts[self.rank], total);
        let functions = &self.nccl.functions;
        self.queue(&format_args!("reduce_scatter_f32 of {total}"), |comm, stream| match even(counts) {
            // SAFETY: the trait's contract on addresses; the communicator is alive.
            Some(len) => unsafe { (functions.reduce_scatter)(at(values), at_mut(part), len, F32, SUM, comm, stream) },
            None => self.group(counts, |root, offset, len| unsafe {
                let from = at(values + (offset * size_of::<f32>()) as u64);
                (functions.reduce)(from, at_mut(part), len, F32, SUM, root, comm, stream)
            }),
        })
    }

    fn all_gather_into(&self, part: u64, counts: &[usize], out: u64) -> Result<()> {
        let total = counts.iter().sum();
        check_counts(self.rank, self.world_size, counts, counts[self.rank], total);
        let functions = &self.nccl.functions;
        self.queue(&format_args!("all_gather_into of {total} bytes"), |comm, stream| match even(counts) {
            // SAFETY: the trait's contract on addresses; the communicator is alive.
            Some(len) => unsafe { (functions.all_gather)(at(part), at_mut(out), len, BYTE, comm, stream) },
            None => self.group(counts, |root, offset, len| unsafe {
                (functions.broadcast)(at(part), at_mut(out + offset as u64), len, BYTE, root, comm, stream)
            }),
        })
    }

    fn join(&self) -> Result<()> {
        let mut state = self.lock();
        state.clone()?;
        // SAFETY: streams and events live as long as this value.
        let joined = unsafe {
            result::event::record(self.done, self.stream)
                .and_then(|()| result::stream::wait_event(self.compute, self.done, WAIT_DEFAULT))
        };
        self.driver(&mut state, &"join", joined)
    }

    fn wait(&self) -> Result<()> {
        let mut state = self.lock();
        let comm = state.clone()?;
        // SAFETY: streams and events live as long as this value.
        let recorded = unsafe { result::event::record(self.done, self.stream) };
        self.driver(&mut state, &"wait", recorded)?;
        let started = Instant::now();
        loop {
            match unsafe { result::event::query(self.done) } {
                Ok(()) => return Ok(()),
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => {}
                error => return self.driver(&mut state, &"wait", error),
            }
            self.settle(&mut state, self.async_error(comm), &"wait")?;
            self.pause(&mut state, started, &"wait")?;
        }
    }

    fn abort(&self) {
        // First the word, so that a thread that waits lets go of the state.
        self.stopped.store(true, Ordering::Release);
        let error = Error::Nccl { rank: self.rank, message: "ended on request".into() };
        _ = self.fail(&mut self.lock(), error);
    }
}

impl Drop for Communicator {
    /// At once, whatever is queued: a rank that fails must not wait for the others. Where all is well nothing is queued, for
    /// ranks wait for their operations, and meet on the host before they end.
    fn drop(&mut self) {
        _ = self.fail(&mut self.lock(), Error::Nccl { rank: self.rank, message: "the communicator is closed".into() });
        // SAFETY: nothing is queued any more; the compute stream keeps what it waits for.
        unsafe {
            _ = result::event::destroy(self.ready);
            _ = result::event::destroy(self.done);
            _ = result::stream::destroy(self.stream);
        }
    }
}

const WAIT_DEFAULT: sys::CUevent_wait_flags = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;

fn at(address: u64) -> *const c_void {
    address as *const c_void
}

fn at_mut(address: u64) -> *mut c_void {
    address as *mut c_void
}

/// The length of all parts, if they have the same: what NCCL's own operations want.
fn even(counts: &[usize]) -> Option<usize> {
    let first = *counts.first()?;
    counts.iter().all(|&count| count == first).then_some(first)
}

/// The first two ranks with the same GPU.
fn first_twins(gpus: &[Vec<u8>]) -> Option<(usize, usize)> {
    (0..gpus.len()).find_map(|second| Some((gpus[..second].iter().position(|gpu| *gpu == gpus[second])?, second)))
}

/// What tells the thread's GPU from all others.
fn this_gpu() -> std::result::Result<Vec<u8>, DriverError> {
    let mut device = 0;
    // SAFETY: it writes an integer.
    unsafe { sys::cuCtxGetDevice(&mut device) }.result()?;
    Ok(result::device::get_uuid(device)?.bytes.map(|byte| byte as u8).to_vec())
}

/// A stream that goes before computation where both are ready: its kernels are small, and others wait for them.
fn stream_and_events() -> std::result::Result<(sys::CUstream, sys::CUevent, sys::CUevent), DriverError> {
    let (_, greatest) = result::stream::get_priority_range()?;
    let stream = result::stream::create_with_priority(result::stream::StreamKind::NonBlocking, greatest)?;
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
    Ok((stream, event()?, event()?))
}

/// An error of the driver, with its words.
fn said(call: &str, error: DriverError) -> String {
    let text =
        error.error_string().map_or_else(|_| format!("{:?}", error.0), |text| text.to_string_lossy().into_owned());
    format!("{call}: the NVIDIA driver: {text}")
}

#[cfg(test)]
mod tests {
    use std::mem::ManuallyDrop;

    use super::super::library::fake::{self, ABORTS, BUSY, THEN};
    use super::*;
    use crate::exit::{self, Coded};

    /// Rank 1 of 3, on a stand-in for NCCL and without streams.
    fn communicator(timeout: Duration) -> ManuallyDrop<Communicator> {
        ABORTS.set(0);
        let (stream, event) = (ptr::null_mut(), ptr::null_mut());
        ManuallyDrop::new(Communicator {
            nccl: fake::nccl(),
            rank: 1,
            world_size: 3,
            timeout,
            compute: stream,
            stream,
            ready: event,
            done: event,
            comm: Mutex::new(Ok(ptr::dangling_mut())),
            stopped: AtomicBool::new(false),
        })
    }

    fn settled(communicator: &Communicator, busy: u32, then: Code) -> Result<()> {
        BUSY.set(busy);
        THEN.set(then);
        communicator.settle(&mut communicator.lock(), IN_PROGRESS, &"all_reduce_f32 of 7")
    }

    #[test]
    fn a_call_under_way_is_waited_for() {
        let communicator = communicator(Duration::from_secs(60));
        settled(&communicator, 50, SUCCESS).unwrap();
        assert_eq!((BUSY.get(), ABORTS.get()), (0, 0));
    }

    #[test]
    fn an_error_that_comes_later_ends_the_communicator_for_good() {
        let communicator = communicator(Duration::from_secs(60));
        let error = settled(&communicator, 3, 6).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("rank 1") && message.contains("remote process exited, at all_reduce_f32 of 7"),
            "{message}"
        );
        assert_eq!(ABORTS.get(), 1);
        // Every call says so again, and nothing is called on a communicator that is no more.
        assert_eq!(communicator.join(), Err(error.clone()));
        assert_eq!(communicator.wait(), Err(error.clone()));
        assert_eq!(communicator.all_reduce_f32(0, 7), Err(error));
        communicator.abort();
        assert_eq!(ABORTS.get(), 1);
    }

    #[test]
    fn a_rank_that_does_not_come_is_given_up() {
        let communicator = communicator(Duration::from_millis(20));
        let error = settled(&communicator, u32::MAX, SUCCESS).unwrap_err();
        assert!(matches!(&error, Error::Timeout { rank: 1, missing, .. } if *missing == [0, 2]), "{error}");
        assert_eq!((error.exit_code(), ABORTS.get()), (exit::HANG, 1));
    }

    #[test]
    fn an_abort_ends_those_who_wait() {
        let communicator = communicator(Duration::from_secs(60));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| settled(&communicator, u32::MAX, SUCCESS));
            std::thread::sleep(Duration::from_millis(20));
            communicator.abort();
            assert!(waiting.join().unwrap().is_err());
        });
    }

    #[test]
    fn uneven_parts_go_to_their_ranks_and_empty_ones_to_nobody() {
        let communicator = communicator(Duration::from_secs(60));
        let mut calls = Vec::new();
        let code = communicator.group(&[4, 0, 3], |root, offset, len| {
            calls.push((root, offset, len));
            SUCCESS
        });
        assert_eq!((code, calls), (SUCCESS, vec![(0, 0, 4), (2, 4, 3)]));
        // An error is the group's, and what would follow is not asked for.
        let mut count = 0;
        let code = communicator.group(&[1, 2, 3], |_, _, _| {
            count += 1;
            4
        });
        assert_eq!((code, count), (4, 1));
    }

    #[test]
    fn parts_of_one_length_are_told_from_others() {
        assert_eq!(even(&[4, 4, 4]), Some(4));
        assert_eq!(even(&[5]), Some(5));
        assert_eq!(even(&[4, 4, 3]), None);
        assert_eq!(even(&[0, 0]), Some(0));
    }

    #[test]
    fn ranks_that_share_a_gpu_are_named() {
        let gpu = |n: u8| vec![n; 16];
        assert_eq!(first_twins(&[gpu(1), gpu(2), gpu(3)]), None);
        assert_eq!(first_twins(&[gpu(1), gpu(2), gpu(1), gpu(2)]), Some((0, 2)));
        assert_eq!(first_twins(&[]), None);
    }
}
