//! Copies between pageable host memory and the GPU through pinned buffers.
//!
//! Large ones go in chunks through two buffers: while one chunk is transferred, the next is copied into (or out of) the
//! other. Weights are read directly from the mapped file, without a second full copy in host memory. Small ones to the GPU
//! follow each other in a ring, so that none waits for the stream: a direct copy of pageable memory would have to, wherever
//! the GPU can read such memory itself (Grace, and any GPU under Linux' heterogeneous memory management).

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::{DriverError, result, sys};
use rayon::prelude::*;

/// Bytes of a chunk: large enough to keep the bus busy, small enough for the host's caches.
const CHUNK: usize = 8 << 20;

/// Bytes that a thread copies at a time.
const SHARE: usize = 1 << 20;
/// Bytes of one half of the ring: hundreds of the arrays that a step uploads.
const HALF: usize = 1 << 20;
/// Small copies begin at multiples of this many bytes.
const ALIGNMENT: usize = 64;

/// Pinned buffers of the current context, allocated at the first use.
pub(super) struct Staging {
    slots: [Slot; 2],
    ring: Ring,
}

/// Two buffers that are filled in turns.
struct Ring {
    halves: [Slot; 2],
    /// The half that is being filled, and its bytes in use.
    current: usize,
    used: usize,
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
        let slot = |bytes: usize| {
            // SAFETY: freed once, on drop. If creating the event fails, the buffer leaks, but the process is about to
            // end.
            let buffer = unsafe { result::malloc_host(bytes, 0) }?;
            let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            Ok::<_, DriverError>(Slot { buffer, done })
        };
        let ring = Ring { halves: [slot(HALF)?, slot(HALF)?], current: 0, used: 0 };
        Ok(Self { slots: [slot(CHUNK)?, slot(CHUNK)?], ring })
    }

    /// Queues a copy of at most half a ring to the GPU. Returns when `bytes` has been read, and waits only for what was
    /// queued before the other half of the ring.
    pub(super) fn copy_in_small(&mut self, to: u64, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        let Ring { halves, current, used } = &mut self.ring;
        assert!(bytes.len() <= HALF, "{} bytes for a ring", bytes.len());
        // SAFETY: the half that is entered is free after its event (an event never recorded counts as complete); the bytes
        // fit behind those in use; and the range is in the caller's allocation.
        unsafe {
            if *used + bytes.len() > HALF {
                result::event::record(halves[*current].done, stream)?;
                (*current, *used) = (1 - *current, 0);
                result::event::synchronize(halves[*current].done)?;
            }
            let at = halves[*current].buffer.cast::<u8>().add(*used);
            ptr::copy_nonoverlapping(bytes.as_ptr(), at, bytes.len());
            result::memcpy_htod_async(to, std::slice::from_raw_parts(at, bytes.len()), stream)?;
        }
        *used = (*used + bytes.len()).next_multiple_of(ALIGNMENT);
        Ok(())
    }

    /// Queues a copy to the GPU. Returns when all of `bytes` has been read.
    pub(super) fn copy_in(&mut self, to: u64, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        for (i, chunk) in bytes.chunks(CHUNK).enumerate() {
            let slot = &self.slots[i % 2];
            // SAFETY: after the event nothing uses the buffer (an event never recorded counts as complete); a chunk
            // fits; and the range is in the caller's allocation.
            unsafe {
                result::event::synchronize(slot.done)?;
                let staged = std::slice::from_raw_parts_mut(slot.buffer.cast::<u8>(), chunk.len());
                copy_together(chunk, staged);
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

/// Copies with all threads: where the source is a mapped file, each page must first be mapped, which takes one thread longer
/// than the bus needs for the page.
fn copy_together(from: &[u8], to: &mut [u8]) {
    from.par_chunks(SHARE).zip(to.par_chunks_mut(SHARE)).for_each(|(from, to)| to.copy_from_slice(from));
}

impl Drop for Staging {
    fn drop(&mut self) {
        for slot in self.slots.iter().chain(&self.ring.halves) {
            // SAFETY: after the last copy, nothing uses them any more. A failure has shown elsewhere.
            unsafe {
                _ = result::event::synchronize(slot.done);
                _ = result::event::destroy(slot.done);
                _ = result::free_host(slot.buffer);
            }
        }
    }
}
