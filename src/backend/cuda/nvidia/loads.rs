//! Copies of parameters to the GPU on a stream of their own, beside the computation: from pinned host memory, and from other GPUs.

use cudarc::driver::{DriverError, result, sys};

use crate::backend::cuda::gpu::{Load, LoadPart, Source};

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

    /// Queues copies that begin after the work in `computation` so far.
    ///
    /// # Safety
    /// All ranges are allocated; what is read can be read from this GPU, and is neither freed nor written before the load is done.
    pub(super) unsafe fn load(&mut self, parts: &[LoadPart], computation: sys::CUstream) -> Result<Load, DriverError> {
        // SAFETY: the caller's promise; the streams and events live.
        unsafe {
            result::event::record(self.before, computation)?;
            result::stream::wait_event(self.stream, self.before, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)?;
            for part in parts {
                for at in (0..part.bytes).step_by(CHUNK) {
                    let (to, bytes) = (part.to.offset(at).0, CHUNK.min(part.bytes - at));
                    match part.from {
                        Source::Host(from) => {
                            let from = std::slice::from_raw_parts(from.offset(at).0 as *const u8, bytes);
                            result::memcpy_htod_async(to, from, self.stream)?;
                        }
                        // Addresses are unique among all GPUs, by which the driver finds the one that it copies from.
                        Source::Gpu(from) => sys::cuMemcpyAsync(to, from.offset(at).0, bytes, self.stream).result()?,
                    }
                }
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
