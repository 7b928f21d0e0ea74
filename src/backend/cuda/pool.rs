//! A caching pool over the GPU's allocator: in steady state no step allocates.
//!
//! All work goes to one stream, so memory may be handed out again while the kernels that last used it still wait in it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use super::gpu::{Address, Error, Gpu};

/// What becomes of memory that is given back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reuse {
    /// It is kept for the next request of its size class.
    Classes,
    /// It goes back to the GPU, and every allocation has exactly the size asked for: what memory checkers need.
    Never,
}

/// Counts of a pool, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Handed out now.
    pub used: usize,
    /// The most that was ever handed out at once.
    pub peak: usize,
    /// Kept for reuse.
    pub idle: usize,
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
    /// Blocks by size class.
    idle: BTreeMap<usize, Vec<Address>>,
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

/// At most an eighth beyond `bytes`, from 512 on: few enough sizes that most requests find one of theirs idle.
fn size_class(bytes: usize) -> usize {
    let step = (bytes.next_power_of_two() / 16).max(512);
    bytes.next_multiple_of(step)
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
        let bytes = match self.reuse {
            Reuse::Classes => size_class(bytes.max(1)),
            Reuse::Never => bytes.max(1),
        };
        let mut state = self.lock();
        let at = match state.take_idle(bytes) {
            Some(at) => at,
            None => {
                state.usage.allocations += 1;
                match self.gpu.allocate(bytes)? {
                    Some(at) => at,
                    None => {
                        state.release(&*self.gpu)?;
                        let used = state.usage.used;
                        let info = self.gpu.memory()?;
                        self.gpu.allocate(bytes)?.ok_or(Error::OutOfMemory { asked: bytes, used, info })?
                    }
                }
            }
        };
        state.usage.used += bytes;
        state.usage.peak = state.usage.peak.max(state.usage.used);
        drop(state);
        Ok(Memory { pool: self.clone(), at, bytes })
    }

    /// Present counts.
    pub fn usage(&self) -> Usage {
        self.lock().usage
    }

    /// Gives everything idle back to the GPU.
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
            Reuse::Classes => {
                state.usage.idle += bytes;
                state.idle.entry(bytes).or_default().push(at);
            }
            // A fault will show in whatever is asked of the GPU next.
            Reuse::Never => drop(self.gpu.free(at)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl State {
    fn take_idle(&mut self, bytes: usize) -> Option<Address> {
        let shelf = self.idle.get_mut(&bytes)?;
        let at = shelf.pop();
        if shelf.is_empty() {
            self.idle.remove(&bytes);
        }
        self.usage.idle -= if at.is_some() { bytes } else { 0 };
        at
    }

    fn release(&mut self, gpu: &dyn Gpu) -> Result<(), Error> {
        for (_, shelf) in std::mem::take(&mut self.idle) {
            for at in shelf {
                gpu.free(at)?;
            }
        }
        self.usage.idle = 0;
        Ok(())
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        drop(self.release());
    }
}
