//! Parameters that lie in pinned memory of the host, and the room on the GPU through which they pass: a ring of two slots.
//!
//! A [`Block`] holds parameters that are used together, the routed experts of a layer. Where an operation uses one of them, the
//! ring copies the whole block into the slot that was used least recently, unless a slot holds it already. The copy runs on a
//! stream of its own and begins after all work that was queued before, which includes the last use of the slot; the operation
//! waits for the copy. So results never depend on the order of requests. [`Block::request`] only begins the copy: with it, the
//! next layer is copied while the present one is computed, and more than two slots would not make a slow bus faster.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::gpu::{Address, Error, Gpu, HostAddress, Load};
use super::must;
use super::pool::{Memory, Pool};

/// Number of slots.
pub const SLOTS: usize = 2;

/// The slots of one GPU. It has none before the first request: while weights are loaded, their memory is free for other things.
pub(super) struct Ring {
    gpu: Arc<dyn Gpu>,
    pool: Arc<Pool>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: Vec<Slot>,
    /// The number of the next block.
    next_block: u64,
    blocks: usize,
    /// Pinned bytes of all blocks.
    pinned: usize,
    /// Bytes of the largest block so far, and of each slot from the next request on.
    largest: usize,
    /// Counts the uses of slots.
    clock: u64,
}

struct Slot {
    memory: Memory,
    /// The block that it holds, or that is being copied into it.
    holds: Option<u64>,
    /// The copy, until work was queued that waits for it.
    load: Option<Load>,
    last_use: u64,
}

/// Parameters in pinned memory of the host.
pub(super) struct Block {
    ring: Arc<Ring>,
    number: u64,
    at: HostAddress,
    bytes: usize,
}

impl Ring {
    pub(super) fn new(gpu: Arc<dyn Gpu>, pool: Arc<Pool>) -> Arc<Self> {
        Arc::new(Self { gpu, pool, state: Mutex::default() })
    }

    /// A new block of uninitialized memory.
    ///
    /// # Errors
    /// The host's memory is full; a fault of the GPU.
    pub(super) fn block(self: &Arc<Self>, bytes: usize) -> Result<Arc<Block>, Error> {
        let mut state = self.lock();
        let full = Error::OutOfHostMemory { asked: bytes, used: state.pinned };
        let at = self.gpu.allocate_host(bytes)?.ok_or(full)?;
        state.blocks += 1;
        state.pinned += bytes;
        state.largest = state.largest.max(bytes);
        state.next_block += 1;
        Ok(Arc::new(Block { ring: self.clone(), number: state.next_block, at, bytes }))
    }

    /// Gives all slots room for the largest block.
    fn reserve(&self, state: &mut State) -> Result<(), Error> {
        let largest = state.largest;
        if state.slots.len() == SLOTS && state.slots.iter().all(|slot| slot.memory.bytes() >= largest) {
            return Ok(());
        }
        self.clear(state)?;
        // Parameters that were made on the GPU and moved to the host leave free parts of the pool, which are smaller than a slot.
        self.pool.release()?;
        for _ in 0..SLOTS {
            let memory = self.pool.take(largest)?;
            state.slots.push(Slot { memory, holds: None, load: None, last_use: 0 });
        }
        Ok(())
    }

    /// Frees the slots. The pool reuses memory in the order of the stream, so the stream has to wait for copies into them.
    fn clear(&self, state: &mut State) -> Result<(), Error> {
        for load in state.slots.iter_mut().filter_map(|slot| slot.load.take()) {
            self.gpu.await_load(load)?;
        }
        state.slots.clear();
        Ok(())
    }

    /// The slot of a block; begins to copy it if no slot holds it.
    fn request(&self, state: &mut State, block: &Block) -> Result<usize, Error> {
        self.reserve(state)?;
        state.clock += 1;
        let held = state.slots.iter().position(|slot| slot.holds == Some(block.number));
        let index = match held {
            Some(index) => index,
            None => {
                let oldest = (0..state.slots.len()).min_by_key(|&i| state.slots[i].last_use);
                let index = oldest.expect("slots are reserved");
                let slot = &mut state.slots[index];
                slot.holds = None; // if the copy fails
                slot.load = Some(self.gpu.load(block.at, slot.memory.address(), block.bytes)?);
                slot.holds = Some(block.number);
                index
            }
        };
        state.slots[index].last_use = state.clock;
        Ok(index)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Block {
    /// The byte at this offset.
    pub(super) fn host(&self, offset: usize) -> HostAddress {
        self.at.offset(offset)
    }

    /// Begins to copy the block to the GPU, unless it is there.
    pub(super) fn request(&self) {
        must(self.ring.request(&mut self.ring.lock(), self));
    }

    /// Where the block is for the work that is queued from now on, until [`SLOTS`] other blocks have been requested.
    pub(super) fn address(&self) -> Address {
        let mut state = self.ring.lock();
        let index = must(self.ring.request(&mut state, self));
        let slot = &mut state.slots[index];
        if let Some(load) = slot.load.take() {
            must(self.ring.gpu.await_load(load));
        }
        slot.memory.address()
    }

    /// Says that the block has been written, or that a queued copy to the host is going to: what a slot holds is outdated.
    pub(super) fn written(&self) {
        let mut state = self.ring.lock();
        for slot in state.slots.iter_mut().filter(|slot| slot.holds == Some(self.number)) {
            slot.holds = None;
            slot.last_use = 0;
        }
    }
}

impl Drop for Block {
    /// A fault is reported again by the next call.
    fn drop(&mut self) {
        self.written();
        let mut state = self.ring.lock();
        state.blocks -= 1;
        state.pinned -= self.bytes;
        if state.blocks == 0 {
            drop(self.ring.clear(&mut state));
            state.largest = 0;
        }
        drop(self.ring.gpu.free_host(self.at));
    }
}
