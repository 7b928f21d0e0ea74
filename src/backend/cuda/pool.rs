//! A memory pool on top of the GPU's allocator: in steady state no step allocates, whatever lengths its rows have.
//!
//! The pool allocates large segments and divides them into blocks by best fit. A freed block is merged with free
//! neighbours. All work goes to one stream, so a block may be reused while the kernels that last used it are still
//! queued.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use super::gpu::{Address, Error, Gpu};

/// What happens to freed memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// The pool keeps it for later requests.
    Segments,
    /// It is returned to the GPU, and every allocation has exactly the requested size, as memory checkers need it.
    Never,
}

/// Statistics of a pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// In use now.
    pub used: usize,
    /// Allocated from the GPU: in use, or kept for reuse.
    pub held: usize,
    /// The peak of `held`.
    pub peak: usize,
    /// Number of allocations from the GPU since the start.
    pub allocations: usize,
}

/// The pool of one GPU.
pub struct Pool {
    gpu: Arc<dyn Gpu>,
    reuse: Reuse,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    usage: Usage,
    /// The segments: bytes by address.
    segments: BTreeMap<Address, usize>,
    /// The free blocks: bytes by address. No two free blocks of a segment are adjacent.
    free: BTreeMap<Address, usize>,
    /// The same free blocks, ordered by size.
    by_size: BTreeSet<(usize, Address)>,
}

/// A block of the GPU's memory that returns to its pool on drop.
pub struct Memory {
    pool: Arc<Pool>,
    at: Address,
    /// The size of the whole block, at least the requested size.
    bytes: usize,
}

impl Memory {
    /// Its first byte.
    pub fn address(&self) -> Address {
        self.at
    }

    /// Its size in bytes; it may exceed the requested size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Queues the clearing of `bytes` bytes from `offset` on.
    ///
    /// # Errors
    /// A fault of the GPU.
    pub fn zero(&self, offset: usize, bytes: usize) -> Result<(), Error> {
        assert!(offset + bytes <= self.bytes, "bytes {offset}..{} of {}", offset + bytes, self.bytes);
        self.pool.gpu.zero(self.at.offset(offset), bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.pool.free_block(self.at, self.bytes);
    }
}

/// Granularity of blocks in bytes: whole cache lines.
const GRAIN: usize = 512;
/// Granularity of segments in bytes: the GPU's page size.
const PAGE: usize = 2 << 20;
/// The least size in bytes of a segment that several smaller requests share.
const SHARED: usize = 32 << 20;

/// The size of a new segment for a request of `bytes`. A shared one has room for a whole number of such requests, so that many of
/// equal size, experts for example, leave nothing unused but the rest of a page; and it has room for any other request below
/// [`SHARED`] once it is free.
fn segment(bytes: usize) -> usize {
    match bytes {
        ..PAGE => PAGE,
        PAGE..SHARED => (SHARED.div_ceil(bytes) * bytes).next_multiple_of(PAGE),
        _ => bytes.next_multiple_of(PAGE),
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(gpu: Arc<dyn Gpu>, reuse: Reuse) -> Arc<Self> {
        Arc::new(Self { gpu, reuse, state: Mutex::default() })
    }

    /// Allocates `bytes` bytes of uninitialized memory.
    ///
    /// # Errors
    /// The memory is full, even after free segments were released; a fault of the GPU.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Result<Memory, Error> {
        let mut state = self.lock();
        let (at, bytes) = match self.reuse {
            Reuse::Segments => {
                let bytes = bytes.max(1).next_multiple_of(GRAIN);
                let at = match state.take_free(bytes) {
                    Some(at) => at,
                    None => {
                        state.grow(&*self.gpu, bytes)?;
                        state.take_free(bytes).expect("a segment of at least as much")
                    }
                };
                (at, bytes)
            }
            Reuse::Never => {
                let bytes = bytes.max(1);
                let at = state.allocate(&*self.gpu, bytes)?;
                (at.ok_or_else(|| state.full(&*self.gpu, bytes))?, bytes)
            }
        };
        state.usage.used += bytes;
        drop(state);
        Ok(Memory { pool: self.clone(), at, bytes })
    }

    /// The current statistics.
    pub fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// Returns segments without blocks in use to the GPU.
    ///
    /// # Errors
    /// A fault of the GPU.
    pub fn release(&self) -> Result<(), Error> {
        self.lock().release(&*self.gpu)
    }

    fn free_block(&self, at: Address, bytes: usize) {
        let mut state = self.lock();
        state.usage.used -= bytes;
        match self.reuse {
            Reuse::Segments => state.add_free(at, bytes),
            Reuse::Never => {
                state.usage.held -= bytes;
                // A fault is reported again by the next call.
                drop(self.gpu.free(at));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl State {
    /// Takes `bytes` from the smallest free block that is large enough.
    fn take_free(&mut self, bytes: usize) -> Option<Address> {
        let &(size, at) = self.by_size.range((bytes, Address::NULL)..).next()?;
        self.remove_free(at, size);
        if size > bytes {
            self.insert_free(at.offset(bytes), size - bytes);
        }
        Some(at)
    }

    /// Frees a block and merges it with adjacent free blocks of the same segment.
    fn add_free(&mut self, mut at: Address, mut bytes: usize) {
        let before = self.free.range(..at).next_back().map(|(&at, &bytes)| (at, bytes));
        if let Some((start, size)) = before.filter(|&(start, size)| start.offset(size) == at)
            && !self.segments.contains_key(&at)
        {
            self.remove_free(start, size);
            (at, bytes) = (start, size + bytes);
        }
        let end = at.offset(bytes);
        if let Some(&size) = self.free.get(&end)
            && !self.segments.contains_key(&end)
        {
            self.remove_free(end, size);
            bytes += size;
        }
        self.insert_free(at, bytes);
    }

    fn insert_free(&mut self, at: Address, bytes: usize) {
        self.free.insert(at, bytes);
        self.by_size.insert((bytes, at));
    }

    fn remove_free(&mut self, at: Address, bytes: usize) {
        self.free.remove(&at);
        self.by_size.remove(&(bytes, at));
    }

    /// Adds a segment with room for `bytes`. If the GPU has no room for a shared one, free segments are released, then
    /// an exact size is tried.
    fn grow(&mut self, gpu: &dyn Gpu, bytes: usize) -> Result<(), Error> {
        let mut size = segment(bytes);
        // Enough memory is free, but fragmented: release free segments in favour of a larger one. This stops happening
        // once the longest rows have been seen.
        if self.usage.held - self.usage.used >= bytes {
            self.release(gpu)?;
        }
        let mut at = self.allocate(gpu, size)?;
        if at.is_none() {
            self.release(gpu)?;
            at = self.allocate(gpu, size)?;
        }
        if at.is_none() {
            size = bytes;
            at = self.allocate(gpu, size)?;
        }
        let at = at.ok_or_else(|| self.full(gpu, bytes))?;
        self.segments.insert(at, size);
        self.insert_free(at, size);
        Ok(())
    }

    fn allocate(&mut self, gpu: &dyn Gpu, bytes: usize) -> Result<Option<Address>, Error> {
        self.usage.allocations += 1;
        let at = gpu.allocate(bytes)?;
        if at.is_some() {
            self.usage.held += bytes;
            self.usage.peak = self.usage.peak.max(self.usage.held);
        }
        Ok(at)
    }

    fn full(&self, gpu: &dyn Gpu, asked: usize) -> Error {
        match gpu.memory() {
            Ok(info) => Error::OutOfMemory { asked, used: self.usage.used, info },
            Err(fault) => fault,
        }
    }

    fn release(&mut self, gpu: &dyn Gpu) -> Result<(), Error> {
        let whole = |(at, bytes): (&Address, &usize)| (self.free.get(at) == Some(bytes)).then_some((*at, *bytes));
        for (at, bytes) in self.segments.iter().filter_map(whole).collect::<Vec<_>>() {
            gpu.free(at)?;
            self.segments.remove(&at);
            self.remove_free(at, bytes);
            self.usage.held -= bytes;
        }
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.release());
    }
}
