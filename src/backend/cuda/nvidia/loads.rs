//! Copies of parameters from pinned host memory on a stream of their own, beside the computation.

use cudarc::driver::{DriverError, result, sys};

use crate::backend::cuda::gpu::Load;

/// Bytes of one copy: a small copy of the other stream that the same copy engine executes waits for at most one of them,
/// some 0.3 ms on PCIe 5.
const CHUNK: usize = 16 << 20;
/// Events in turn. A wait for a load whose event has been recorded again waits for a later load, too, which is correct, because
/// loads run in order.
const EVENTS: usize = 4;

/// The stream and its events, in the current context.
pub(super) struct Loads {
    stream: sys::CUstream,
    /// Recorded in the stream of the computation: what a load has to wait for.
    before: sys::CUevent,
    done: [sys::CUevent; EVENTS],
    /// The number of the next load.
    next: u64,
}

// SAFETY: only this value owns the stream and the events, and the driver accepts them from any thread.
unsafe impl Send for Loads {}

impl Loads {
    pub(super) fn new() -> Result<Self, DriverError> {
        // If one of these fails, the earlier ones leak, but the process is about to end.
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        Ok(Self { stream, before: event()?, done: [event()?, event()?, event()?, event()?], next: 0 })
    }

    /// Queues a copy that begins after the work in `computation` so far.
    ///
    /// # Safety
    /// Both ranges are allocated, `from` is pinned, and it is neither freed nor written by the host before the load is done.
    pub(super) unsafe fn load(
        &mut self,
        from: *const u8,
        to: u64,
        bytes: usize,
        computation: sys::CUstream,
    ) -> Result<Load, DriverError> {
        // SAFETY: the caller's promise; the streams and events live.
        unsafe {
            result::event::record(self.before, computation)?;
            result::stream::wait_event(self.stream, self.before, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)?;
            for at in (0..bytes).step_by(CHUNK) {
                let part = std::slice::from_raw_parts(from.add(at), CHUNK.min(bytes - at));
                result::memcpy_htod_async(to + at as u64, part, self.stream)?;
            }
            result::event::record(self.done[self.next as usize % EVENTS], self.stream)?;
        }
        self.next += 1;
        Ok(Load(self.next - 1))
    }

    /// Makes later work in `computation` wait for a load.
    pub(super) fn await_load(&self, load: Load, computation: sys::CUstream) -> Result<(), DriverError> {
        let done = self.done[load.0 as usize % EVENTS];
        // SAFETY: stream and event live.
        unsafe { result::stream::wait_event(computation, done, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
    }

    /// Waits for all loads.
    pub(super) fn synchronize(&self) -> Result<(), DriverError> {
        // SAFETY: the stream lives.
        unsafe { result::stream::synchronize(self.stream) }
    }
}

impl Drop for Loads {
    fn drop(&mut self) {
        _ = self.synchronize();
        // SAFETY: the queued work is complete, and nothing else uses them. A failure has shown elsewhere.
        unsafe {
            for event in self.done.into_iter().chain([self.before]) {
                _ = result::event::destroy(event);
            }
            _ = result::stream::destroy(self.stream);
        }
    }
}
