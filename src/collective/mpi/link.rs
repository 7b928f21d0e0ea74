//! Control messages between rank 0 and the other ranks: arrivals at operations, permission to proceed, and failures.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::super::{Call, Error};
use super::wire::{self, Pending, Tag, Wire};

/// How long a failing rank waits for rank 0's answer to its error, and an aborting rank for its error to be sent.
pub(super) const ABORT_GRACE: Duration = Duration::from_secs(1);

/// A control message, sent as JSON.
#[derive(Serialize, Deserialize)]
pub(super) enum Message {
    /// To rank 0: the sender has started an operation.
    Arrived(Arrival),
    /// From rank 0: all ranks have arrived, and contribute these numbers of bytes, by rank.
    Proceed(Vec<usize>),
    /// In both directions: the group has failed.
    Failed(Error),
}

/// A rank at the start of an operation.
#[derive(Serialize, Deserialize)]
pub(super) struct Arrival {
    pub call: Call,
    /// Number of bytes that it contributes, if that may differ between ranks; else 0.
    pub bytes: usize,
}

/// This rank's state of the control messages.
pub(super) struct Link {
    pub wire: Wire,
    /// Messages being sent, with their receivers.
    outgoing: Vec<(usize, Pending)>,
    /// On rank 0: the ranks that have arrived at the current operation, by rank.
    pub arrivals: Vec<Option<Arrival>>,
    /// On the other ranks: rank 0's permission to proceed, see [`Message::Proceed`].
    pub proceed: Option<Vec<usize>>,
    /// The error with which the group failed.
    pub failed: Option<Error>,
    /// On rank 0: the ranks that have reported a timeout, each with the ranks missing there.
    pub timeouts: Vec<(usize, Vec<usize>)>,
    /// Whether the failure has been exchanged with rank 0: rank 0 has sent it to all ranks, or this rank has reported its
    /// error to rank 0 or received the one of rank 0. Until then another error may replace `failed`.
    pub failure_reported: bool,
    /// Whether this rank has printed which ranks it waits for.
    pub warned: bool,
}

/// The pause between two polls. Transferring a chunk needs frequent polls by both of its ranks. A wait longer than a
/// transfer sleeps instead, and leaves the core to other threads.
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
            proceed: None,
            failed: None,
            timeouts: Vec::new(),
            failure_reported: false,
            warned: false,
        }
    }

    /// Forgets a failure, and what was under way: its messages have tags of their own, which nobody receives any more.
    pub fn renew(&mut self) {
        self.wire.next_tags();
        self.outgoing.clear();
        self.arrivals.fill_with(|| None);
        (self.proceed, self.failed) = (None, None);
        self.timeouts.clear();
        (self.failure_reported, self.warned) = (false, false);
    }

    /// Starts sending a message, without waiting for its completion.
    pub fn send(&mut self, rank: usize, message: &Message) -> wire::Result<()> {
        let bytes = serde_json::to_vec(message).expect("strings and numbers");
        let pending = self.wire.send(rank, Tag::Control, bytes)?;
        self.outgoing.push((rank, pending));
        Ok(())
    }

    /// Receives the messages that have arrived, and frees those that have been sent.
    pub fn poll(&mut self) -> wire::Result<()> {
        let mut outgoing = std::mem::take(&mut self.outgoing);
        for (rank, mut message) in outgoing.drain(..) {
            if !message.is_done(&mut self.wire)? {
                self.outgoing.push((rank, message));
            }
        }
        while let Some((from, len)) = self.wire.probe(Tag::Control)? {
            let mut message = self.wire.receive(from, Tag::Control, len)?;
            // A message that the probe has found is complete, unless it is very long.
            let start = Instant::now();
            while !message.is_done(&mut self.wire)? {
                if start.elapsed() > ABORT_GRACE {
                    return Err(format!("rank {from} stopped in the middle of a message"));
                }
                std::thread::yield_now();
            }
            let message = serde_json::from_slice(&message.into_bytes());
            match message.map_err(|e| format!("rank {from} sent a message that cannot be parsed: {e}"))? {
                Message::Arrived(arrival) => self.arrivals[from] = Some(arrival),
                Message::Proceed(bytes) => self.proceed = Some(bytes),
                Message::Failed(error) => {
                    if let Error::Timeout { rank, missing, .. } = &error {
                        self.timeouts.push((*rank, missing.clone()));
                    }
                    self.failed.get_or_insert(error);
                    self.failure_reported |= from == 0;
                }
            }
        }
        Ok(())
    }

    /// The receivers of messages whose send is not complete.
    pub fn unsent(&self) -> Vec<usize> {
        self.outgoing.iter().map(|(rank, _)| *rank).collect()
    }

    /// Polls until `done`, for at most `time`.
    pub fn poll_until(&mut self, time: Duration, done: impl Fn(&Link) -> bool) {
        let start = Instant::now();
        while start.elapsed() < time && self.poll().is_ok() && !done(self) {
            pause(start.elapsed());
        }
    }
}
