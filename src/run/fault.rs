//! Faults on purpose: how the tests show that a run survives them, and how anybody can repeat it.
//!
//! `MOEWARDEN_FAULT=rank=1,at=step:3,do=kill` lets rank 1 die as it begins the third training step of this process. Never
//! set it in earnest.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::collective::{Collective, Result};
use crate::exit::{self, Failure};

/// What happens on one rank.
#[derive(Debug, Clone)]
pub struct Fault {
    /// To whom.
    pub rank: usize,
    at: Point,
    /// The how manieth passing of that point, from 1.
    number: u64,
    action: Action,
    passed: Arc<AtomicU64>,
}

/// A place of the program that is passed again and again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The beginning of a micro-batch of an identification.
    Batch,
    /// The beginning of a training step.
    Step,
    /// The beginning of a collective operation.
    Collective,
    /// A stage of saving a checkpoint.
    Save,
}

/// What happens there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// SIGKILL.
    Kill,
    /// SIGSTOP: the process is there and does nothing.
    Stop,
    /// The rank sleeps for ever.
    Hang,
    /// A panic.
    Panic,
    /// An error.
    Fail,
    /// A gradient becomes NaN (at a step).
    Nan,
    /// A trained weight changes by one bit (at a step).
    Perturb,
}

const POINTS: [(&str, Point); 4] =
    [("batch", Point::Batch), ("step", Point::Step), ("collective", Point::Collective), ("save", Point::Save)];

const ACTIONS: [(&str, Action); 7] = [
    ("kill", Action::Kill),
    ("stop", Action::Stop),
    ("hang", Action::Hang),
    ("panic", Action::Panic),
    ("fail", Action::Fail),
    ("nan", Action::Nan),
    ("perturb", Action::Perturb),
];

impl FromStr for Fault {
    type Err = Failure;

    fn from_str(text: &str) -> Result<Self, Failure> {
        let parse = || {
            let [rank, at, action] = text.split(',').collect::<Vec<_>>().try_into().ok()?;
            let (point, number) = at.strip_prefix("at=")?.split_once(':')?;
            let named = |name: &str| POINTS.iter().find(|(n, _)| *n == name).map(|(_, p)| *p);
            let action = action.strip_prefix("do=")?;
            Some(Self {
                rank: rank.strip_prefix("rank=")?.parse().ok()?,
                at: named(point)?,
                number: number.parse().ok()?,
                action: ACTIONS.iter().find(|(n, _)| *n == action)?.1,
                passed: Arc::default(),
            })
        };
        parse().ok_or_else(|| {
            Failure::new(exit::CONFIG, format!("MOEWARDEN_FAULT={text}: expected rank=R,at=POINT:NUMBER,do=ACTION"))
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on rank {} at {:?} {}", self.action, self.rank, self.at, self.number)
    }
}

impl Fault {
    /// Whether this rank, passing `point`, has come to the place; every call is one passing.
    fn is_due(&self, point: Point) -> bool {
        self.at == point && self.passed.fetch_add(1, Ordering::Relaxed) + 1 == self.number
    }

    /// Passes a point. What only the caller can do to itself is returned.
    ///
    /// # Errors
    /// The error on purpose.
    pub fn pass(&self, point: Point) -> Result<Option<Action>, Failure> {
        if !self.is_due(point) {
            return Ok(None);
        }
        match self.action {
            Action::Kill => raise(libc::SIGKILL),
            Action::Stop => raise(libc::SIGSTOP),
            Action::Hang => loop {
                std::thread::park();
            },
            Action::Panic => panic!("a panic on purpose ({self})"),
            Action::Fail => return Err(Failure::new(exit::IO, format!("an error on purpose ({self})"))),
            Action::Nan | Action::Perturb => return Ok(Some(self.action)),
        }
        Ok(None)
    }
}

fn raise(signal: i32) {
    // SAFETY: sends this process a signal; no memory is involved.
    unsafe { libc::kill(libc::getpid(), signal) };
}

/// A collective whose operations pass [`Point::Collective`].
pub struct Faulty {
    /// What does the work.
    pub inner: Arc<dyn Collective>,
    /// What happens on the way.
    pub fault: Fault,
}

impl Faulty {
    fn pass(&self) {
        // A collective has no errors of its own making: this one ends its rank in another way.
        if let Err(failure) = self.fault.pass(Point::Collective) {
            panic!("{failure}");
        }
    }
}

impl Collective for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn doing(&self, what: &str) {
        self.inner.doing(what);
    }

    fn barrier(&self) -> Result<()> {
        self.pass();
        self.inner.barrier()
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        self.pass();
        self.inner.broadcast(bytes)
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        self.pass();
        self.inner.all_reduce_f64(values)
    }

    fn all_reduce_f32(&self, values: &mut [f32]) -> Result<()> {
        self.pass();
        self.inner.all_reduce_f32(values)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.pass();
        self.inner.all_gather(bytes)
    }

    fn reduce_scatter_f32(&self, values: &[f32], counts: &[usize], part: &mut [f32]) -> Result<()> {
        self.pass();
        self.inner.reduce_scatter_f32(values, counts, part)
    }

    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        self.pass();
        self.inner.all_gather_into(part, counts, out)
    }

    fn abort(&self, code: u8, reason: &str) {
        self.inner.abort(code, reason);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_strikes_once_and_where_it_was_told() {
        let fault: Fault = "rank=1,at=step:2,do=fail".parse().unwrap();
        assert_eq!(fault.rank, 1);
        assert!(fault.pass(Point::Save).unwrap().is_none());
        assert!(fault.pass(Point::Step).unwrap().is_none());
        assert!(fault.clone().pass(Point::Step).is_err(), "clones count together");
        assert!(fault.pass(Point::Step).unwrap().is_none());
        assert_eq!("rank=0,at=step:1,do=nan".parse::<Fault>().unwrap().pass(Point::Step).unwrap(), Some(Action::Nan));
        for wrong in ["", "rank=0", "rank=x,at=step:1,do=kill", "rank=0,at=lunch:1,do=kill", "rank=0,at=step:1,do=eat"] {
            assert!(wrong.parse::<Fault>().is_err(), "{wrong}");
        }
    }
}
