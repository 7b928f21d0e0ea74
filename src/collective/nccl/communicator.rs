//! A non-blocking NCCL communicator: queues operations, polls for asynchronous errors, and aborts on error or timeout.

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

/// One rank's handle to an NCCL communicator; each rank has its own GPU. The threads that use and drop it must have
/// that GPU's context current.
pub struct Communicator {
    nccl: Nccl,
    rank: usize,
    world_size: usize,
    timeout: Duration,
    compute: sys::CUstream,
    stream: sys::CUstream,
    /// Event recorded in the compute stream when an operation is queued: NCCL's stream waits for it.
    ready: sys::CUevent,
    /// Event recorded in NCCL's stream by `join` and `wait`: the compute stream or the host waits for it.
    done: sys::CUevent,
    /// The communicator, or the error that ended it.
    comm: Mutex<Result<Comm>>,
    /// Set by `abort`, so that a thread which waits with the lock held gives up.
    aborted: AtomicBool,
}

// SAFETY: CUDA's handles may be used from any thread; NCCL's, which allows one thread at a time, is behind the mutex.
unsafe impl Send for Communicator {}
// SAFETY: as for Send.
unsafe impl Sync for Communicator {}

impl Communicator {
    /// Creates the communicator; collective over all ranks of `host`. This rank's GPU is the one whose context is
    /// current, and `compute` is its compute stream. `timeout` applies to the creation and to every later wait.
    ///
    /// # Errors
    /// NCCL versions that differ between ranks, two ranks on one GPU, NCCL's own errors, and ranks missing at the
    /// timeout.
    pub fn new(nccl: Nccl, host: &dyn Collective, compute: sys::CUstream, timeout: Duration) -> Result<Self> {
        let (rank, world_size) = (host.rank(), host.world_size());
        let failed = |message| Error::Nccl { rank, message };
        all_agree(host, "version of NCCL", &nccl.version().to_le_bytes())?;
        // NCCL may hang if two ranks share a GPU (NCCL manual, "Creating a Communicator").
        let gpus = host.all_gather(&gpu_uuid().map_err(|e| failed(driver_message("cuDeviceGetUuid", e)))?)?;
        if let Some((first, second)) = first_duplicate(&gpus) {
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

        let (stream, ready, done) = stream_and_events().map_err(|e| failed(driver_message("cuStreamCreate", e)))?;
        let mut comm = ptr::null_mut();
        let as_int = |n: usize| i32::try_from(n).expect("fewer than 2³¹ ranks");
        // SAFETY: the configuration outlives the call, which copies it.
        let code = unsafe {
            (nccl.functions.init)(&mut comm, as_int(world_size), id, as_int(rank), &mut Config::non_blocking())
        };
        let comm = Mutex::new(Ok(comm));
        let aborted = AtomicBool::new(false);
        let new = Self { nccl, rank, world_size, timeout, compute, stream, ready, done, comm, aborted };
        new.finish_call(&mut new.lock(), code, &"ncclCommInitRank")?;
        new.connect()?;
        Ok(new)
    }

    /// Runs each operation once, because NCCL connects ranks lazily at first use. Here all ranks are known to be alive;
    /// later, a connection could wait for a rank that was lost before the host noticed.
    fn connect(&self) -> Result<()> {
        let (ones, bytes) = (vec![1; self.world_size], vec![size_of::<f32>(); self.world_size]);
        let failed = |e| Error::Nccl { rank: self.rank, message: driver_message("memory for ncclAllReduce", e) };
        // SAFETY: a plain allocation; it is freed below, when no operation uses it any more.
        let values = unsafe { result::malloc_sync(4 * self.world_size) }.map_err(failed)?;
        let part = values + 4 * self.rank as u64;
        // SAFETY: the allocation above has this length, and is freed only after the stream is done.
        let connected = unsafe { result::memset_d8_async(values, 0, 4 * self.world_size, self.compute) }
            .map_err(failed)
            .and_then(|()| self.all_reduce_f32(values, self.world_size))
            .and_then(|()| self.reduce_scatter_f32(values, &ones, part))
            .and_then(|()| self.all_gather_into(part, &bytes, values))
            .and_then(|()| self.wait());
        // SAFETY: the wait has returned, or an error has ended NCCL's operations.
        unsafe { result::free_sync(values) }.map_err(failed).and(connected)
    }

    /// The loaded NCCL library; its `Display` gives version and path.
    pub fn library(&self) -> &Nccl {
        &self.nccl
    }

    fn lock(&self) -> MutexGuard<'_, Result<Comm>> {
        self.comm.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queues an operation in NCCL's stream, after all work queued in the compute stream so far.
    fn queue(&self, at: &dyn fmt::Display, call: impl FnOnce(Comm, *mut c_void) -> Code) -> Result<()> {
        let mut state = self.lock();
        let comm = state.clone()?;
        // SAFETY: streams and events live as long as this value.
        let ordered = unsafe {
            result::event::record(self.ready, self.compute)
                .and_then(|()| result::stream::wait_event(self.stream, self.ready, WAIT_DEFAULT))
        };
        self.check_driver(&mut state, at, ordered)?;
        let code = call(comm, self.stream.cast());
        // The operation is in the stream only when the call is no longer in progress; NCCL forbids queueing anything
        // else before (NCCL manual, "ncclCommGetAsyncError").
        self.finish_call(&mut state, code, at)
    }

    /// Polls until a non-blocking NCCL call has finished, that is, until its operation is queued. Does not wait for the
    /// operation itself.
    fn finish_call(&self, state: &mut Result<Comm>, mut code: Code, at: &dyn fmt::Display) -> Result<()> {
        let comm = state.clone()?;
        let started = Instant::now();
        while code == IN_PROGRESS {
            self.pause_poll(state, started, at)?;
            code = self.async_error(comm);
        }
        match self.nccl.check(code) {
            Ok(()) => Ok(()),
            Err(why) => self.fail(state, Error::Nccl { rank: self.rank, message: format!("{why}, at {at}") }),
        }
    }

    /// `ncclCommGetAsyncError`: [`IN_PROGRESS`] while a call is running, else [`SUCCESS`] or the communicator's error.
    fn async_error(&self, comm: Comm) -> Code {
        let mut error = SUCCESS;
        // SAFETY: the caller took `comm` from a state that is Ok, so it has not been aborted.
        let code = unsafe { (self.nccl.functions.async_error)(comm, &mut error) };
        if code == SUCCESS { error } else { code }
    }

    /// The pause between two polls. Fails after the timeout, or if `abort` was called.
    fn pause_poll(&self, state: &mut Result<Comm>, started: Instant, at: &dyn fmt::Display) -> Result<()> {
        let waited = started.elapsed();
        if self.aborted.load(Ordering::Acquire) {
            return self.fail(state, Error::Nccl { rank: self.rank, message: format!("aborted, at {at}") });
        }
        if waited > self.timeout {
            // NCCL does not tell which rank is missing: name all others.
            let missing = (0..self.world_size).filter(|&rank| rank != self.rank).collect();
            let (rank, seconds) = (self.rank, self.timeout.as_secs());
            return self.fail(state, Error::Timeout { rank, at: at.to_string(), seconds, missing });
        }
        // Most waits take microseconds; a longer one must not keep a core busy.
        if waited < Duration::from_millis(1) {
            std::thread::yield_now();
        } else {
            std::thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    /// Fails the communicator if a call of the CUDA driver failed.
    fn check_driver<T>(
        &self,
        state: &mut Result<Comm>,
        at: &dyn fmt::Display,
        result: std::result::Result<T, DriverError>,
    ) -> Result<()> {
        match result {
            Ok(_) => Ok(()),
            Err(e) => self.fail(state, Error::Nccl { rank: self.rank, message: driver_message(&at.to_string(), e) }),
        }
    }

    /// Aborts the communicator, unless it has failed before. That ends its kernels, so streams that wait for them
    /// continue.
    fn fail(&self, state: &mut Result<Comm>, error: Error) -> Result<()> {
        if let Ok(comm) = std::mem::replace(state, Err(error.clone())) {
            // SAFETY: the state no longer holds the communicator, so it is not used again.
            unsafe { (self.nccl.functions.abort)(comm) };
        }
        Err(error)
    }

    /// An NCCL group of one operation per rank with a non-empty part: `call(root, offset, count)`.
    fn group(&self, counts: &[usize], mut call: impl FnMut(i32, usize, usize) -> Code) -> Code {
        // SAFETY: group start and end are paired, on the same thread.
        let mut code = unsafe { (self.nccl.functions.group_start)() };
        let fine = |code| code == SUCCESS || code == IN_PROGRESS;
        let mut offset = 0;
        for (root, &count) in (0i32..).zip(counts) {
            if count > 0 && fine(code) {
                code = call(root, offset, count);
            }
            offset += count;
        }
        // SAFETY: the group was started above, on this thread.
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
            // SAFETY: the addresses are valid by the trait's contract, and the communicator is not aborted.
            unsafe { (self.nccl.functions.all_reduce)(at(values), at_mut(values), len, F32, SUM, comm, stream) }
        })
    }

    fn reduce_scatter_f32(&self, values: u64, counts: &[usize], part: u64) -> Result<()> {
        let total = counts.iter().sum();
        check_counts(self.rank, self.world_size, counts, counts[self.rank], total);
        let functions = &self.nccl.functions;
        self.queue(&format_args!("reduce_scatter_f32 of {total}"), |comm, stream| match common_count(counts) {
            // SAFETY: the addresses are valid by the trait's contract, and the communicator is not aborted.
            Some(len) => unsafe { (functions.reduce_scatter)(at(values), at_mut(part), len, F32, SUM, comm, stream) },
            // SAFETY: as above; the offset stays within the buffer that all counts add up to.
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
        self.queue(&format_args!("all_gather_into of {total} bytes"), |comm, stream| match common_count(counts) {
            // SAFETY: the addresses are valid by the trait's contract, and the communicator is not aborted.
            Some(len) => unsafe { (functions.all_gather)(at(part), at_mut(out), len, BYTE, comm, stream) },
            // SAFETY: as above; the offset stays within the buffer that all counts add up to.
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
        self.check_driver(&mut state, &"join", joined)
    }

    fn wait(&self) -> Result<()> {
        let mut state = self.lock();
        let comm = state.clone()?;
        // SAFETY: streams and events live as long as this value.
        let recorded = unsafe { result::event::record(self.done, self.stream) };
        self.check_driver(&mut state, &"wait", recorded)?;
        let started = Instant::now();
        loop {
            // SAFETY: the event is this communicator's, and alive.
            match unsafe { result::event::query(self.done) } {
                Ok(()) => return Ok(()),
                Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => {}
                error => return self.check_driver(&mut state, &"wait", error),
            }
            self.finish_call(&mut state, self.async_error(comm), &"wait")?;
            self.pause_poll(&mut state, started, &"wait")?;
        }
    }

    fn abort(&self) {
        // Set the flag before locking: a thread that waits with the lock held sees it and releases the lock.
        self.aborted.store(true, Ordering::Release);
        let error = Error::Nccl { rank: self.rank, message: "aborted".into() };
        _ = self.fail(&mut self.lock(), error);
    }
}

impl Drop for Communicator {
    /// Aborts, even if operations are queued: a failed rank must not wait for the others. In a successful run nothing
    /// is queued, because ranks wait for their operations, and synchronise on the host before they end.
    fn drop(&mut self) {
        _ = self.fail(&mut self.lock(), Error::Nccl { rank: self.rank, message: "the communicator is closed".into() });
        // SAFETY: no operation is queued any more, and CUDA keeps an event alive while the compute stream waits for it.
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

/// The count of every part, if all are equal: NCCL's own reduce-scatter and all-gather require that.
fn common_count(counts: &[usize]) -> Option<usize> {
    let first = *counts.first()?;
    counts.iter().all(|&count| count == first).then_some(first)
}

/// The first pair of ranks with the same GPU.
fn first_duplicate(gpus: &[Vec<u8>]) -> Option<(usize, usize)> {
    (0..gpus.len()).find_map(|second| Some((gpus[..second].iter().position(|gpu| *gpu == gpus[second])?, second)))
}

/// The UUID of the GPU whose context is current.
fn gpu_uuid() -> std::result::Result<Vec<u8>, DriverError> {
    let mut device = 0;
    // SAFETY: the function writes one integer.
    unsafe { sys::cuCtxGetDevice(&mut device) }.result()?;
    Ok(result::device::get_uuid(device)?.bytes.map(|byte| byte as u8).to_vec())
}

/// Creates NCCL's stream and the two events. The stream has the highest priority, because its kernels are small and
/// other ranks wait for them.
fn stream_and_events() -> std::result::Result<(sys::CUstream, sys::CUevent, sys::CUevent), DriverError> {
    let (_, greatest) = result::stream::get_priority_range()?;
    let stream = result::stream::create_with_priority(result::stream::StreamKind::NonBlocking, greatest)?;
    let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
    Ok((stream, event()?, event()?))
}

/// The message for an error of the CUDA driver in `call`.
fn driver_message(call: &str, error: DriverError) -> String {
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

    /// Rank 1 of 3, with the fake NCCL and without streams.
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
            aborted: AtomicBool::new(false),
        })
    }

    /// Finishes a call that is in progress for `busy` polls and then has the result `then`.
    fn finish(communicator: &Communicator, busy: u32, then: Code) -> Result<()> {
        BUSY.set(busy);
        THEN.set(then);
        communicator.finish_call(&mut communicator.lock(), IN_PROGRESS, &"all_reduce_f32 of 7")
    }

    #[test]
    fn a_call_in_progress_is_polled_until_it_finishes() {
        let communicator = communicator(Duration::from_secs(60));
        finish(&communicator, 50, SUCCESS).unwrap();
        assert_eq!((BUSY.get(), ABORTS.get()), (0, 0));
    }

    #[test]
    fn an_asynchronous_error_aborts_the_communicator_for_good() {
        let communicator = communicator(Duration::from_secs(60));
        let error = finish(&communicator, 3, 6).unwrap_err();
        let message = error.to_string();
        assert!(
            message.contains("rank 1") && message.contains("remote process exited, at all_reduce_f32 of 7"),
            "{message}"
        );
        assert_eq!(ABORTS.get(), 1);
        // Every later call returns the same error, without calling NCCL on the aborted communicator.
        assert_eq!(communicator.join(), Err(error.clone()));
        assert_eq!(communicator.wait(), Err(error.clone()));
        assert_eq!(communicator.all_reduce_f32(0, 7), Err(error));
        communicator.abort();
        assert_eq!(ABORTS.get(), 1);
    }

    #[test]
    fn a_timeout_names_the_other_ranks() {
        let communicator = communicator(Duration::from_millis(20));
        let error = finish(&communicator, u32::MAX, SUCCESS).unwrap_err();
        assert!(matches!(&error, Error::Timeout { rank: 1, missing, .. } if *missing == [0, 2]), "{error}");
        assert_eq!((error.exit_code(), ABORTS.get()), (exit::HANG, 1));
    }

    #[test]
    fn an_abort_ends_a_wait_on_another_thread() {
        let communicator = communicator(Duration::from_secs(60));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| finish(&communicator, u32::MAX, SUCCESS));
            std::thread::sleep(Duration::from_millis(20));
            communicator.abort();
            assert!(waiting.join().unwrap().is_err());
        });
    }

    #[test]
    fn a_group_has_one_call_per_nonempty_part() {
        let communicator = communicator(Duration::from_secs(60));
        let mut calls = Vec::new();
        let code = communicator.group(&[4, 0, 3], |root, offset, len| {
            calls.push((root, offset, len));
            SUCCESS
        });
        assert_eq!((code, calls), (SUCCESS, vec![(0, 0, 4), (2, 4, 3)]));
        // An error is the result of the group, and stops the calls.
        let mut count = 0;
        let code = communicator.group(&[1, 2, 3], |_, _, _| {
            count += 1;
            4
        });
        assert_eq!((code, count), (4, 1));
    }

    #[test]
    fn equal_parts_have_a_common_count() {
        assert_eq!(common_count(&[4, 4, 4]), Some(4));
        assert_eq!(common_count(&[5]), Some(5));
        assert_eq!(common_count(&[4, 4, 3]), None);
        assert_eq!(common_count(&[0, 0]), Some(0));
    }

    #[test]
    fn ranks_that_share_a_gpu_are_named() {
        let gpu = |n: u8| vec![n; 16];
        assert_eq!(first_duplicate(&[gpu(1), gpu(2), gpu(3)]), None);
        assert_eq!(first_duplicate(&[gpu(1), gpu(2), gpu(1), gpu(2)]), Some((0, 2)));
        assert_eq!(first_duplicate(&[]), None);
    }
}
