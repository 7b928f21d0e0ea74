//! Copies between pageable host memory and the GPU in pieces, through two buffers of pinned memory: while one piece crosses
//! the bus, the next is copied into (or out of) the other buffer. Weights come straight from the mapped file, and no second
//! full copy of them is ever in the host's memory.

use std::ffi::c_void;
use std::ptr;

use cudarc::driver::{DriverError, result, sys};

/// Bytes of a piece: large enough that the bus is busy, small enough to stay in the host's caches' reach.
const PIECE: usize = 8 << 20;

/// Two pinned buffers of the current context, made at the first use.
pub(super) struct Staging {
    slots: [Slot; 2],
}

struct Slot {
    buffer: *mut c_void,
    /// The end of the last copy from or to the buffer.
    done: sys::CUevent,
}

// SAFETY: the buffers and events belong to this value alone, and the driver takes them from any thread.
unsafe impl Send for Staging {}

impl Staging {
    pub(super) fn new() -> Result<Self, DriverError> {
        let slot = || {
            // SAFETY: freed once, on drop. If the event fails, the process is about to end.
            let buffer = unsafe { result::malloc_host(PIECE, 0) }?;
            let done = result::event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING)?;
            Ok::<_, DriverError>(Slot { buffer, done })
        };
        Ok(Self { slots: [slot()?, slot()?] })
    }

    /// Queues a copy to the GPU. Returns when all of `bytes` was read.
    pub(super) fn copy_in(&mut self, to: u64, bytes: &[u8], stream: sys::CUstream) -> Result<(), DriverError> {
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            let slot = &self.slots[i % 2];
            // SAFETY: the event says that nothing uses the buffer any more (one never recorded says so, too); a piece fits
            // into it; and the range lies in the caller's allocation.
            unsafe {
                result::event::synchronize(slot.done)?;
                ptr::copy_nonoverlapping(piece.as_ptr(), slot.buffer.cast(), piece.len());
                let staged = std::slice::from_raw_parts(slot.buffer.cast::<u8>(), piece.len());
                result::memcpy_htod_async(to + (i * PIECE) as u64, staged, stream)?;
                result::event::record(slot.done, stream)?;
            }
        }
        Ok(())
    }

    /// Copies to the host, after the work in the stream.
    pub(super) fn copy_out(&mut self, from: u64, bytes: &mut [u8], stream: sys::CUstream) -> Result<(), DriverError> {
        let pieces: Vec<_> = bytes.chunks_mut(PIECE).collect();
        let lens: Vec<_> = pieces.iter().map(|piece| piece.len()).collect();
        // Piece i + 1 crosses the bus while piece i is copied out.
        let start = |i: usize| -> Result<(), DriverError> {
            let slot = &self.slots[i % 2];
            // SAFETY: piece i - 2, the buffer's last, was copied out; a piece fits into it; and the range lies in the caller's
            // allocation.
            unsafe {
                let staged = std::slice::from_raw_parts_mut(slot.buffer.cast::<u8>(), lens[i]);
                result::memcpy_dtoh_async(staged, from + (i * PIECE) as u64, stream)?;
                result::event::record(slot.done, stream)
            }
        };
        if !lens.is_empty() {
            start(0)?;
        }
        for (i, piece) in pieces.into_iter().enumerate() {
            if i + 1 < lens.len() {
                start(i + 1)?;
            }
            let slot = &self.slots[i % 2];
            // SAFETY: the event says that the piece has arrived.
            unsafe {
                result::event::synchronize(slot.done)?;
                ptr::copy_nonoverlapping(slot.buffer.cast::<u8>(), piece.as_mut_ptr(), piece.len());
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
