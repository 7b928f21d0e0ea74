//! A pool over the GPU's allocator: in steady state no step allocates, whatever lengths its rows have.
//!
//! The GPU gives large segments; tensors are parts of them, the smallest free part that is large enough. A part that is given
//! back grows together with free neighbours. All work goes to one stream, so memory may be handed out again while the kernels
//! that last used it still wait in it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};

use super::gpu::{Address, Error, Gpu};

/// What becomes of memory that is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// It is kept for later requests.
    Segments,
    /// It goes back to the GPU, and every allocation has exactly the size asked for: what memory checkers need.
    Never,
}

/// Counts of a pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Handed out now.
    pub used: usize,
    /// Taken from the GPU: handed out, or kept for reuse.
    pub held: usize,
    /// The most that was ever taken from the GPU at once.
    pub peak: usize,
    /// Allocations that the GPU was asked for since the start.
    pub allocations: usize,
}

/// The GPU's memory, as tensors see it.
pub struct Pool {
    gpu: Arc<dyn Gpu>,
    reuse: Reuse,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    usage: Usage,
    /// What the GPU gave, by address: bytes.
    segments: BTreeMap<Address, usize>,
    /// Free parts by address: bytes. No two of a segment touch.
    free: BTreeMap<Address, usize>,
    /// The same by size.
    by_size: BTreeSet<(usize, Address)>,
}

/// A block of the GPU's memory that returns to its pool on drop.
pub struct Memory {
    pool: Arc<Pool>,
    at: Address,
    /// The size of the whole block, at least what was asked for.
    bytes: usize,
}

impl Memory {
    /// Its first byte.
    pub fn address(&self) -> Address {
        self.at
    }

    /// How much it holds; may be more than was asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.pool.give_back(self.at, self.bytes);
    }
}

/// Blocks begin and end at multiples of this: whole lines of all caches.
const GRAIN: usize = 512;
/// The GPU's own pages: segments are whole ones.
const PAGE: usize = 2 << 20;
/// A segment for a smaller request is as large as this, for others to share.
const SHARED: usize = 32 << 20;

/// How much to ask the GPU for where no free part has `bytes`.
fn segment(bytes: usize) -> usize {
    match bytes {
        ..PAGE => PAGE,
        PAGE..SHARED => SHARED,
        _ => bytes.next_multiple_of(PAGE),
    }
}

impl Pool {
    /// An empty pool.
    pub fn new(gpu: Arc<dyn Gpu>, reuse: Reuse) -> Arc<Self> {
        Arc::new(Self { gpu, reuse, state: Mutex::default() })
    }

    /// Memory for `bytes` bytes, holding anything.
    ///
    /// # Errors
    /// No room, even after everything idle was released; a fault of the GPU.
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

    /// Present counts.
    pub fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// Gives segments of which nothing is in use back to the GPU.
    ///
    /// # Errors
    /// A fault of the GPU.
    pub fn release(&self) -> Result<(), Error> {
        self.lock().release(&*self.gpu)
    }

    fn give_back(&self, at: Address, bytes: usize) {
        let mut state = self.lock();
        state.usage.used -= bytes;
        match self.reuse {
            Reuse::Segments => state.add_free(at, bytes),
            Reuse::Never => {
                state.usage.held -= bytes;
                // A fault will show in whatever is asked of the GPU next.
                drop(self.gpu.free(at));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl State {
    /// The smallest free part with room for `bytes`, or the beginning of it.
    fn take_free(&mut self, bytes: usize) -> Option<Address> {
        let &(size, at) = self.by_size.range((bytes, Address::NULL)..).next()?;
        self.remove_free(at, size);
        if size > bytes {
            self.insert_free(at.offset(bytes), size - bytes);
        }
        Some(at)
    }

    /// Joins it with the free parts of the same segment that it touches.
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

    /// Another segment, with room for `bytes`: a shared one, else one of its own, after what is idle was released.
    fn grow(&mut self, gpu: &dyn Gpu, bytes: usize) -> Result<(), Error> {
        let mut size = segment(bytes);
        // As much lies idle, but in smaller parts: they make way for one that others find room in, too. That ends once the
        // longest rows have come.
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
