//! Parameters that lie elsewhere than at a fixed address of the GPU, and the room on it through which they pass: a ring of two slots.
//!
//! A [`Block`] holds parameters that are used together, the routed experts of a layer: in pinned memory of the host, or divided among
//! the GPUs of several ranks. Where an operation uses one of them, the ring copies the whole block into the slot that was used least
//! recently, unless a slot holds it already. The copy runs on a stream of its own and begins after all work that was queued before,
//! which includes the last use of the slot; the operation waits for the copy. So results never depend on the order of requests.
//! [`Block::request`] only begins the copy: with it, the next layer is copied while the present one is computed, and more than two
//! slots would not make a slow bus faster.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use super::gpu::{Address, Error, Gpu, HostAddress, Load, LoadPart, Source};
use super::must;
use super::pool::{Memory, Pool};
use super::shares::{Offer, Peers, Shares};

/// Number of slots.
pub const SLOTS: usize = 2;

/// The slots of one GPU. It has none before the first request: while weights are loaded, their memory is free for other things.
pub(super) struct Ring {
    gpu: Arc<dyn Gpu>,
    pool: Arc<Pool>,
    /// The ranks among whose GPUs blocks are divided; `None`: blocks are in the host's memory.
    peers: Option<Arc<dyn Peers>>,
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
    /// Divided blocks whose other parts are not known yet.
    fresh: Vec<Weak<Shares>>,
    /// This rank's parts of blocks that it has dropped, which other ranks may still read.
    retired: Vec<Arc<Memory>>,
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

/// Parameters that are copied to the GPU together.
pub(super) struct Block {
    ring: Arc<Ring>,
    number: u64,
    home: Home,
    bytes: usize,
}

/// Where a block lies.
enum Home {
    /// In pinned memory of the host.
    Host(HostAddress),
    /// On the GPUs of the ranks of this machine.
    Shared(Arc<Shares>),
}

impl Ring {
    pub(super) fn new(gpu: Arc<dyn Gpu>, pool: Arc<Pool>, peers: Option<Arc<dyn Peers>>) -> Arc<Self> {
        Arc::new(Self { gpu, pool, peers, state: Mutex::default() })
    }

    /// A new block of uninitialized memory.
    ///
    /// # Errors
    /// The host's memory is full, or the GPU's; a fault of the GPU.
    pub(super) fn block(self: &Arc<Self>, bytes: usize) -> Result<Arc<Block>, Error> {
        let mut state = self.lock();
        let home = match &self.peers {
            Some(peers) => {
                let shares = Arc::new(Shares::new(&self.gpu, &**peers, &self.pool, bytes)?);
                state.fresh.push(Arc::downgrade(&shares));
                Home::Shared(shares)
            }
            None => {
                let full = Error::OutOfHostMemory { asked: bytes, used: state.pinned };
                let at = self.gpu.allocate_host(bytes)?.ok_or(full)?;
                state.pinned += bytes;
                Home::Host(at)
            }
        };
        state.blocks += 1;
        state.largest = state.largest.max(bytes);
        state.next_block += 1;
        Ok(Arc::new(Block { ring: self.clone(), number: state.next_block, home, bytes }))
    }

    /// The number of ranks among which blocks are divided; `None`: they are in the host's memory.
    pub(super) fn ranks(&self) -> Option<usize> {
        self.peers.as_ref().map(|peers| peers.count())
    }

    /// Waits until all ranks have read and written what they queued in blocks that are divided among them, learns where the parts of
    /// new ones are, and frees the parts of dropped ones. All ranks call it together: after blocks were made or dropped, and before
    /// and after they are written.
    ///
    /// # Errors
    /// A fault of the GPU; memory of another rank that cannot be read.
    pub(super) fn fence(&self) -> Result<(), Error> {
        let Some(peers) = &self.peers else { return Ok(()) };
        let (fresh, retired) = {
            let mut state = self.lock();
            if state.blocks == 0 && state.retired.is_empty() {
                return Ok(()); // on all ranks
            }
            self.await_loads(&mut state)?;
            (std::mem::take(&mut state.fresh), std::mem::take(&mut state.retired))
        };
        self.gpu.synchronize()?;
        let fresh: Vec<Arc<Shares>> = fresh.iter().filter_map(Weak::upgrade).collect();
        let own = fresh.iter().map(|shares| shares.offer(&**peers)).collect::<Result<Vec<Offer>, _>>()?;
        let all = peers.exchange(&serde_json::to_vec(&own).expect("numbers are JSON"));
        let offers = |bytes: &Vec<u8>| serde_json::from_slice::<Vec<Offer>>(bytes).expect("all ranks run this program");
        let mut offers: Vec<_> = all.iter().map(|bytes| offers(bytes).into_iter()).collect();
        for shares in fresh {
            let of_block: Vec<_> = offers.iter_mut().filter_map(Iterator::next).collect();
            assert!(of_block.len() == peers.count(), "ranks of a machine divide the same blocks");
            shares.accept(&of_block, &**peers)?;
        }
        drop(retired);
        Ok(())
    }

    /// Gives all slots room for the largest block.
    fn reserve(&self, state: &mut State) -> Result<(), Error> {
        let largest = state.largest;
        if state.slots.len() == SLOTS && state.slots.iter().all(|slot| slot.memory.bytes() >= largest) {
            return Ok(());
        }
        self.clear(state)?;
        // Parameters that were made on the GPU and moved away leave free parts of the pool, which are smaller than a slot.
        self.pool.release()?;
        for _ in 0..SLOTS {
            let memory = self.pool.take(largest)?;
            state.slots.push(Slot { memory, holds: None, load: None, last_use: 0 });
        }
        Ok(())
    }

    /// Frees the slots. The pool reuses memory in the order of the stream, so the stream has to wait for copies into them.
    fn clear(&self, state: &mut State) -> Result<(), Error> {
        self.await_loads(state)?;
        state.slots.clear();
        Ok(())
    }

    /// Makes the stream wait for all copies.
    fn await_loads(&self, state: &mut State) -> Result<(), Error> {
        state.slots.iter_mut().filter_map(|slot| slot.load.take()).try_for_each(|load| self.gpu.await_load(load))
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
                slot.load = Some(block.load(slot.memory.address())?);
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

impl Drop for Ring {
    /// At the end of a command the ranks have met. If one has failed, another process may still read its parts, which the driver frees
    /// at the end of this one.
    fn drop(&mut self) {
        if self.peers.as_ref().is_some_and(|peers| !peers.in_process()) {
            std::mem::forget(std::mem::take(&mut self.lock().retired));
        }
    }
}

impl Block {
    /// Begins to copy the block to a slot.
    fn load(&self, to: Address) -> Result<Load, Error> {
        match &self.home {
            Home::Host(from) => self.ring.gpu.load(&[LoadPart { from: Source::Host(*from), to, bytes: self.bytes }]),
            Home::Shared(shares) => shares.load(to),
        }
    }

    /// Overwrites part of the block, from this offset on, with host values: this rank's part of it, if it is divided.
    pub(super) fn write(&self, offset: usize, values: &[u8]) {
        if values.is_empty() {
            return;
        }
        let gpu = &self.ring.gpu;
        match &self.home {
            Home::Host(at) => must(gpu.write_host(at.offset(offset), values)),
            Home::Shared(shares) => {
                let (own, to) = shares.owned(offset..offset + values.len());
                if !own.is_empty() {
                    must(gpu.copy_in(to, &values[own]));
                }
            }
        }
        self.written();
    }

    /// Queues a copy from the GPU to part of the block: to this rank's part of it, if it is divided.
    pub(super) fn store(&self, offset: usize, from: Address, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let gpu = &self.ring.gpu;
        match &self.home {
            Home::Host(at) => must(gpu.store(from, at.offset(offset), bytes)),
            Home::Shared(shares) => {
                let (own, to) = shares.owned(offset..offset + bytes);
                if !own.is_empty() {
                    must(gpu.copy(from.offset(own.start), to, own.len()));
                }
            }
        }
        self.written();
    }

    /// Reads part of the block.
    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        let gpu = &self.ring.gpu;
        match &self.home {
            Home::Host(at) => must(gpu.read_host(at.offset(offset), bytes)),
            Home::Shared(_) => {
                let mut state = self.ring.lock(); // no other thread requests the slot meanwhile
                let at = self.address_in(&mut state);
                must(gpu.copy_out(at.offset(offset), bytes));
            }
        }
    }

    /// Begins to copy the block to the GPU, unless it is there.
    pub(super) fn request(&self) {
        must(self.ring.request(&mut self.ring.lock(), self));
    }

    /// Where the block is for the work that is queued from now on, until [`SLOTS`] other blocks have been requested.
    pub(super) fn address(&self) -> Address {
        self.address_in(&mut self.ring.lock())
    }

    fn address_in(&self, state: &mut State) -> Address {
        let index = must(self.ring.request(state, self));
        let slot = &mut state.slots[index];
        if let Some(load) = slot.load.take() {
            must(self.ring.gpu.await_load(load));
        }
        slot.memory.address()
    }

    /// What a slot holds of the block is outdated.
    fn written(&self) {
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
        let (ring, mut state) = (&self.ring, self.ring.lock());
        state.blocks -= 1;
        if state.blocks == 0 {
            drop(ring.clear(&mut state));
            state.largest = 0;
        }
        match &self.home {
            Home::Host(at) => {
                state.pinned -= self.bytes;
                drop(ring.gpu.free_host(*at));
            }
            Home::Shared(shares) => {
                // Then this rank reads no part any more.
                drop(ring.await_loads(&mut state).and_then(|()| ring.gpu.synchronize()));
                state.retired.push(shares.own());
            }
        }
    }
}
