//! Parameters divided among the GPUs of a machine: each of its ranks holds a part, and reads the others from the other GPUs.
//!
//! Ranks read without asking: the owner of a part takes no part in a copy, so ranks need not run the same passes. For that they meet
//! (`Ring::fence`) after parts were made, and before and after they are written. The memory of a part lives until they meet after the
//! block was dropped. If a rank fails, and they do not, it lives until the last rank of its process has dropped the block, or until the
//! process ends.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use serde::{Deserialize, Serialize};

use super::gpu::{Address, Error, Gpu, Imported, Load, LoadPart, Source};
use super::pool::{Memory, Pool};

/// The ranks of this machine, among whose GPUs parameters are divided.
pub trait Peers: Send + Sync {
    /// This rank among them, from 0.
    fn index(&self) -> usize;
    /// Their number.
    fn count(&self) -> usize;
    /// Whether all of them are threads of this process.
    fn in_process(&self) -> bool;
    /// The bytes of each of them, by index. Waits for all ranks of the run, and unwinds with a
    /// [`DeviceFault`](crate::backend::DeviceFault) if one has failed.
    fn exchange(&self, bytes: &[u8]) -> Vec<Vec<u8>>;
}

/// Parts begin at multiples of this many bytes.
const ALIGNMENT: usize = 512;

/// A block of parameters, divided in as many parts as there are ranks on this machine.
pub(super) struct Shares {
    gpu: Arc<dyn Gpu>,
    index: usize,
    bytes: usize,
    /// Bytes of a part; the last ones may be shorter, or empty.
    part: usize,
    own: Arc<Memory>,
    /// The number of this rank's part in [`OFFERED`].
    number: u64,
    /// The parts of all ranks, once they have met.
    parts: OnceLock<Vec<Part>>,
}

/// The part of a rank.
enum Part {
    InProcess(Arc<Memory>),
    OtherProcess(Opened),
}

/// Memory of another process, until it is closed.
struct Opened {
    gpu: Arc<dyn Gpu>,
    imported: Imported,
}

impl Drop for Opened {
    /// A fault is reported again by the next call.
    fn drop(&mut self) {
        drop(self.gpu.close(self.imported));
    }
}

/// What a rank tells the others of its part.
#[derive(Serialize, Deserialize)]
pub(super) struct Offer {
    number: u64,
    /// What another process needs; empty if there is none.
    exported: Vec<u8>,
}

/// The parts of the ranks of this process, by number.
static OFFERED: Mutex<BTreeMap<u64, Arc<Memory>>> = Mutex::new(BTreeMap::new());

fn offered() -> MutexGuard<'static, BTreeMap<u64, Arc<Memory>>> {
    OFFERED.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shares {
    /// A block of uninitialized memory, of which this rank allocates its part.
    pub(super) fn new(gpu: &Arc<dyn Gpu>, peers: &dyn Peers, pool: &Arc<Pool>, bytes: usize) -> Result<Self, Error> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let (index, part) = (peers.index(), bytes.div_ceil(peers.count()).next_multiple_of(ALIGNMENT));
        let own = Arc::new(pool.take(range_of(index, part, bytes).len())?);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        offered().insert(number, own.clone());
        Ok(Self { gpu: gpu.clone(), index, bytes, part, own, number, parts: OnceLock::new() })
    }

    /// The part of these bytes of the block that lies in this rank's part: its place among these bytes, and its address.
    pub(super) fn owned(&self, bytes: Range<usize>) -> (Range<usize>, Address) {
        let own = range_of(self.index, self.part, self.bytes);
        let (start, end) = (bytes.start.max(own.start), bytes.end.min(own.end));
        if start >= end {
            return (0..0, self.own.address());
        }
        (start - bytes.start..end - bytes.start, self.own.address().offset(start - own.start))
    }

    /// This rank's part.
    pub(super) fn own(&self) -> Arc<Memory> {
        self.own.clone()
    }

    /// What the other ranks need to read this rank's part.
    pub(super) fn offer(&self, peers: &dyn Peers) -> Result<Offer, Error> {
        let exported = if peers.in_process() { Vec::new() } else { self.gpu.export(self.own.address())? };
        Ok(Offer { number: self.number, exported })
    }

    /// Takes the offers of all ranks, by index.
    pub(super) fn accept(&self, offers: &[Offer], peers: &dyn Peers) -> Result<(), Error> {
        let part = |(rank, offer): (usize, &Offer)| {
            if rank == self.index {
                return Ok(Part::InProcess(self.own.clone()));
            }
            if !peers.in_process() {
                let imported = self.gpu.import(&offer.exported)?;
                return Ok(Part::OtherProcess(Opened { gpu: self.gpu.clone(), imported }));
            }
            let gone = || {
                peers.exchange(&[]); // it says why the rank has failed
                let call = format!("the part of expert weights on the GPU of rank {rank} of this machine");
                Error::Fault { call, message: "that rank has ended".into() }
            };
            let memory = offered().get(&offer.number).cloned().ok_or_else(gone)?;
            self.gpu.reach(memory.address())?;
            Ok(Part::InProcess(memory))
        };
        let parts = offers.iter().enumerate().map(part).collect::<Result<_, _>>()?;
        assert!(self.parts.set(parts).is_ok(), "ranks meet once for each block");
        Ok(())
    }

    /// Begins to copy the whole block to `to`. Each rank begins with the part behind its own, so that they do not all read from
    /// one GPU.
    pub(super) fn load(&self, to: Address) -> Result<Load, Error> {
        let parts = self.parts.get().expect("ranks meet after parameters are loaded");
        let copies = (1..=parts.len()).filter_map(|i| {
            let rank = (self.index + i) % parts.len();
            let range = range_of(rank, self.part, self.bytes);
            let from = match &parts[rank] {
                Part::InProcess(memory) => memory.address(),
                Part::OtherProcess(opened) => opened.imported.at,
            };
            let to = to.offset(range.start);
            (!range.is_empty()).then(|| LoadPart { from: Source::Gpu(from), to, bytes: range.len() })
        });
        self.gpu.load(&copies.collect::<Vec<_>>())
    }
}

/// The bytes of a rank's part.
fn range_of(rank: usize, part: usize, bytes: usize) -> Range<usize> {
    (rank * part).min(bytes)..((rank + 1) * part).min(bytes)
}

impl Drop for Shares {
    /// The queued loads must be complete.
    fn drop(&mut self) {
        offered().remove(&self.number);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_cover_the_block_once() {
        for (bytes, ranks) in [(1, 1), (512, 2), (513, 2), (5000, 3), (100, 8), (1 << 20, 7)] {
            let part = usize::div_ceil(bytes, ranks).next_multiple_of(ALIGNMENT);
            let parts: Vec<_> = (0..ranks).map(|rank| range_of(rank, part, bytes)).collect();
            assert_eq!((parts[0].start, parts[ranks - 1].end), (0, bytes));
            assert!(parts.windows(2).all(|two| two[0].end == two[1].start), "{parts:?}");
        }
    }
}
