//! Copies between pageable host memory and the GPU in chunks, through two pinned buffers: while one chunk is
//! transferred, the next is copied into (or out of) the other buffer. Weights are read directly from the mapped file,
//! without a second full copy in host memory.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::{DriverError, result, sys};

/// Bytes of a chunk: large enough to keep the bus busy, small enough for the host's caches.
const CHUNK: usize = 8 << 20;

/// Two pinned buffers of the current context, allocated at the first use.
pub(super) struct Staging {
    slots: [Slot; 2],
}

struct Slot {
    buffer: *mut c_void,
    /// Recorded after the last copy from or to the buffer.
    done: sys::CUevent,
}

// SAFETY: only this value owns the buffers and events, and the driver accepts them from any thread.
unsafe impl Send for Staging {}

impl Staging {
    pub(super) fn new() -> Result<Self, DriverError> {
        let slot = || {
            // SAFETY: freed once, on drop. If creating the event fails, the buffer leaks, but the process is about to
            // end.
            let buffer = unsafe { result::malloc_host(CHUNK, 0) }?;
            let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            Ok::<_, DriverError>(Slot { buffer, done })
        };
        Ok(Self { slots: [slot()?, slot()?] })
    }

    /// Queues a copy to the GPU. Returns when all of `bytes` has been read.
    pub(super) fn copy_in(&mut self, to: u64, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            let slot = &self.slots[i % 2];
            // SAFETY: after the event nothing uses the buffer (an event never recorded counts as complete); a chunk
            // fits; and the range is in the caller's allocation.
            unsafe {
                result::event::synchronize(slot.done)?;
                ptr::copy_nonoverlapping(chunk.as_ptr(), slot.buffer.cast(), chunk.len());
                let staged = std::slice::from_raw_parts(slot.buffer.cast::<u8>(), chunk.len());
                result::memcpy_htod_async(to + (i * CHUNK) as u64, staged, stream)?;
                result::event::record(slot.done, stream)?;
            }
        }
        Ok(())
    }

    /// Copies to the host, after the work in the stream.
    pub(super) fn copy_out(&mut self, from: u64, bytes: &mut [u8], stream: sys::CUstream) -> Result<(), DriverError> {
        let chunks: Vec<_> = bytes.chunks_mut(CHUNK).collect();
        let lens: Vec<_> = chunks.iter().map(|chunk| chunk.len()).collect();
        // Chunk i + 1 is transferred while chunk i is copied out.
        let start = |i: usize| -> Result<(), DriverError> {
            let slot = &self.slots[i % 2];
            // SAFETY: chunk i - 2, the last one in the buffer, was copied out; a chunk fits; and the range is in the
            // caller's allocation.
            unsafe {
                let staged = std::slice::from_raw_parts_mut(slot.buffer.cast::<u8>(), lens[i]);
                result::memcpy_dtoh_async(staged, from + (i * CHUNK) as u64, stream)?;
                result::event::record(slot.done, stream)
            }
        };
        if !lens.is_empty() {
            start(0)?;
        }
        for (i, chunk) in chunks.into_iter().enumerate() {
            if i + 1 < lens.len() {
                start(i + 1)?;
            }
            let slot = &self.slots[i % 2];
            // SAFETY: after the event the chunk has arrived.
            unsafe {
                result::event::synchronize(slot.done)?;
                ptr::copy_nonoverlapping(slot.buffer.cast::<u8>(), chunk.as_mut_ptr(), chunk.len());
            }
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        for slot in &self.slots {
            // SAFETY: after the last copy, nothing uses them any more. A failure has shown elsewhere.
            unsafe {
                _ = result::event::synchronize(slot.done);
                _ = result::event::destroy(slot.done);
                _ = result::free_host(slot.buffer);
            }
        }
    }
}
