//! What a rank and rank 0 tell each other: who is where, and what went wrong.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::{At, Error};
use super::wire::{self, Pending, Tag, Wire};

/// How long a failing rank waits for rank 0's view of the failure, and a rank that aborts for its words to be on their way.
pub(super) const LAST_WORDS: Duration = Duration::from_secs(1);

/// What ranks and rank 0 tell each other.
#[derive(Serialize, Deserialize)]
pub(super) enum Message {
    /// To rank 0.
    Here(Arrival),
    /// From rank 0: all have come, and bring this many bytes each.
    Go(Vec<usize>),
    /// Either way: the group has failed.
    Failed(Error),
}

/// A rank at the beginning of an operation.
#[derive(Serialize, Deserialize)]
pub(super) struct Arrival {
    pub at: At,
    /// Length of what it brings, where each rank has its own.
    pub bytes: usize,
}

/// This process's end of the connections.
pub(super) struct Link {
    pub wire: Wire,
    /// What is on its way, and to whom.
    outgoing: Vec<(usize, Pending)>,
    /// On rank 0: who has come, by rank.
    pub arrivals: Vec<Option<Arrival>>,
    /// On the others: rank 0's answer.
    pub go: Option<Vec<usize>>,
    /// The error that ended the group.
    pub failed: Option<Error>,
    /// On rank 0: which ranks have waited too long, and for whom.
    pub waits: Vec<(usize, Vec<usize>)>,
    /// Whether rank 0 has seen it: what others say is not final before.
    pub told: bool,
    /// Whether this rank has said whom it waits for.
    pub warned: bool,
}

/// A pause between two looks. A piece needs both its ranks to look often; who waits longer than a piece takes leaves the
/// core to others.
pub(super) fn pause(waited: Duration) {
    if waited < Duration::from_millis(5) {
        std::thread::yield_now();
    } else {
        std::thread::sleep(Duration::from_micros(200));
    }
}

impl Link {
    pub fn new(wire: Wire) -> Self {
        let arrivals = (0..wire.world_size).map(|_| None).collect();
        Self {
            wire,
            outgoing: Vec::new(),
            arrivals,
            go: None,
            failed: None,
            waits: Vec::new(),
            told: false,
            warned: false,
        }
    }

    /// Sends without waiting.
    pub fn tell(&mut self, rank: usize, message: &Message) -> wire::Result<()> {
        let bytes = serde_json::to_vec(message).expect("strings and numbers");
        let pending = self.wire.send(rank, Tag::Control, bytes)?;
        self.outgoing.push((rank, pending));
        Ok(())
    }

    /// Takes in what the others say, and lets go of what has been sent.
    pub fn listen(&mut self) -> wire::Result<()> {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        for (rank, mut message) in outgoing.drain(..) {
            if !message.is_done(&mut self.wire)? {
                self.outgoing.push((rank, message));
            }
        }
        while let Some((from, len)) = self.wire.probe(Tag::Control)? {
            let mut message = self.wire.receive(from, Tag::Control, len)?;
            // It is here already, but for the rest of a very long one.
            let start = Instant::now();
            while !message.is_done(&mut self.wire)? {
                if start.elapsed() > LAST_WORDS {
                    return Err(format!("rank {from} broke off in the middle of a message"));
                }
                std::thread::yield_now();
            }
            let message = serde_json::from_slice(&message.into_bytes());
            match message.map_err(|e| format!("rank {from} sent what cannot be read: {e}"))? {
                Message::Here(arrival) => self.arrivals[from] = Some(arrival),
                Message::Go(bytes) => self.go = Some(bytes),
                Message::Failed(error) => {
                    if let Error::Timeout { rank, missing, .. } = &error {
                        self.waits.push((*rank, missing.clone()));
                    }
                    self.failed.get_or_insert(error);
                    self.told |= from == 0;
                }
            }
        }
        Ok(())
    }

    /// The ranks to whom something is on its way.
    pub fn untold(&self) -> Vec<usize> {
        self.outgoing.iter().map(|(rank, _)| *rank).collect()
    }

    /// Listens until `done`, for `time` at most.
    pub fn linger(&mut self, time: Duration, done: impl Fn(&Link) -> bool) {
        let start = Instant::now();
        while start.elapsed() < time && self.listen().is_ok() && !done(self) {
            pause(start.elapsed());
        }
    }
}
