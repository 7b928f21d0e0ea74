//! Fault injection, for builds with debug assertions or the feature `faults`.
//!
//! `MOEWARDEN_FAULT=rank=1,at=step:3,do=kill` kills rank 1 at the start of the third training step of this process;
//! `at=step:3-7` triggers at each of five steps. A triggered fault is reported on stderr.

use std::fmt;
use std::io::Write;
use std::ops::RangeInclusive;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::collective::{Collective, Result};
use crate::exit::{self, Failure};

use super::{Corruption, Point};

/// A fault of one rank.
#[derive(Debug, Clone)]
pub struct Fault {
    rank: usize,
    point: Point,
    /// Which visits to this point trigger the fault (1-based, inclusive).
    visits: RangeInclusive<u64>,
    action: Action,
    /// Visits so far, of all clones together.
    visited: Arc<AtomicU64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Action {
    /// SIGKILL.
    Kill,
    /// SIGSTOP: the process exists and does nothing.
    Stop,
    /// SIGTERM, which sets the stop flag.
    Term,
    /// SIGUSR1, which sets the stop flag.
    Usr1,
    /// The thread of the rank sleeps forever.
    Hang,
    /// A panic.
    Panic,
    /// An error.
    Fail,
    /// A gradient becomes NaN (at a step).
    Nan,
    /// One bit of a trained weight flips (at a step).
    Perturb,
}

const POINTS: [(&str, Point); 4] =
    [("batch", Point::Batch), ("step", Point::Step), ("collective", Point::Collective), ("save", Point::Save)];

const ACTIONS: [(&str, Action); 9] = [
    ("kill", Action::Kill),
    ("stop", Action::Stop),
    ("term", Action::Term),
    ("usr1", Action::Usr1),
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
            let (point, visits) = at.strip_prefix("at=")?.split_once(':')?;
            let (first, last) = visits.split_once('-').unwrap_or((visits, visits));
            let named = |name: &str| POINTS.iter().find(|(n, _)| *n == name).map(|(_, p)| *p);
            let action = action.strip_prefix("do=")?;
            let fault = Self {
                rank: rank.strip_prefix("rank=")?.parse().ok()?,
                point: named(point)?,
                visits: first.parse().ok()?..=last.parse().ok()?,
                action: ACTIONS.iter().find(|(n, _)| *n == action)?.1,
                visited: Arc::default(),
            };
            let needs_a_step = matches!(fault.action, Action::Nan | Action::Perturb);
            (fault.point == Point::Step || !needs_a_step).then_some(fault)
        };
        parse().ok_or_else(|| {
            Failure::new(
                exit::CONFIG,
                format!("MOEWARDEN_FAULT={text}: expected rank=R,at=POINT:NUMBER[-NUMBER],do=ACTION"),
            )
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (first, last) = (self.visits.start(), self.visits.end());
        write!(f, "{:?} on rank {} at {:?} {first}", self.action, self.rank, self.point)?;
        if last > first { write!(f, " to {last}") } else { Ok(()) }
    }
}

impl Fault {
    /// The rank on which the fault is injected.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Counts a visit to `point`, and triggers the fault if it is due. What only the caller can do to itself is returned.
    ///
    /// # Errors
    /// The injected error.
    pub fn visit(&self, point: Point) -> Result<Option<Corruption>, Failure> {
        let due = self.point == point && self.visits.contains(&(self.visited.fetch_add(1, Ordering::Relaxed) + 1));
        if !due {
            return Ok(None);
        }
        _ = std::io::stderr().write_all(format!("MOEWARDEN_FAULT: {self}\n").as_bytes());
        match self.action {
            Action::Kill => raise(libc::SIGKILL),
            Action::Stop => raise(libc::SIGSTOP),
            Action::Term => raise(libc::SIGTERM),
            Action::Usr1 => raise(libc::SIGUSR1),
            Action::Hang => loop {
                std::thread::park();
            },
            Action::Panic => panic!("a panic on purpose ({self})"),
            Action::Fail => return Err(Failure::new(exit::IO, format!("an error on purpose ({self})"))),
            Action::Nan => return Ok(Some(Corruption::NanGradient)),
            Action::Perturb => return Ok(Some(Corruption::FlippedBit)),
        }
        Ok(None)
    }

    /// A communicator whose operations are visits to [`Point::Collective`].
    pub fn wrap(&self, inner: Arc<dyn Collective>) -> Arc<dyn Collective> {
        Arc::new(FaultInjecting { inner, fault: self.clone() })
    }
}

fn raise(signal: i32) {
    // SAFETY: kill and getpid take and return integers; no memory is involved.
    unsafe { libc::kill(libc::getpid(), signal) };
}

struct FaultInjecting {
    inner: Arc<dyn Collective>,
    fault: Fault,
}

impl FaultInjecting {
    fn visit(&self) {
        // No variant of `collective::Error` means "injected": the rank ends by a panic instead.
        if let Err(failure) = self.fault.visit(Point::Collective) {
            panic!("{failure}");
        }
    }
}

impl Collective for FaultInjecting {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn set_activity(&self, activity: &str) {
        self.inner.set_activity(activity);
    }

    fn activity(&self) -> String {
        self.inner.activity()
    }

    fn barrier(&self) -> Result<()> {
        self.visit();
        self.inner.barrier()
    }

    fn broadcast(&self, bytes: &mut [u8]) -> Result<()> {
        self.visit();
        self.inner.broadcast(bytes)
    }

    fn all_reduce_f64(&self, values: &mut [f64]) -> Result<()> {
        self.visit();
        self.inner.all_reduce_f64(values)
    }

    fn all_reduce_f32(&self, values: &mut [f32]) -> Result<()> {
        self.visit();
        self.inner.all_reduce_f32(values)
    }

    fn all_gather(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.visit();
        self.inner.all_gather(bytes)
    }

    fn reduce_scatter_f32(&self, values: &[f32], counts: &[usize], part: &mut [f32]) -> Result<()> {
        self.visit();
        self.inner.reduce_scatter_f32(values, counts, part)
    }

    fn all_gather_into(&self, part: &[u8], counts: &[usize], out: &mut [u8]) -> Result<()> {
        self.visit();
        self.inner.all_gather_into(part, counts, out)
    }

    fn abort(&self, code: u8, reason: &str) {
        self.inner.abort(code, reason);
    }

    fn renew(&self) -> Result<()> {
        self.inner.renew()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_triggers_at_its_visits_only() {
        let fault: Fault = "rank=1,at=step:2,do=fail".parse().unwrap();
        assert_eq!(fault.rank, 1);
        assert!(fault.visit(Point::Save).unwrap().is_none());
        assert!(fault.visit(Point::Step).unwrap().is_none());
        assert!(fault.clone().visit(Point::Step).is_err(), "clones count together");
        assert!(fault.visit(Point::Step).unwrap().is_none());
        assert_eq!(
            "rank=0,at=step:1,do=nan".parse::<Fault>().unwrap().visit(Point::Step).unwrap(),
            Some(Corruption::NanGradient)
        );
        let often: Fault = "rank=0,at=save:2-3,do=fail".parse().unwrap();
        assert_eq!([(); 4].map(|()| often.visit(Point::Save).is_err()), [false, true, true, false]);
        for wrong in [
            "",
            "rank=0",
            "rank=x,at=step:1,do=kill",
            "rank=0,at=lunch:1,do=kill",
            "rank=0,at=step:1-,do=kill",
            "rank=0,at=step:1,do=eat",
            "rank=0,at=save:1,do=nan",
        ] {
            assert!(wrong.parse::<Fault>().is_err(), "{wrong}");
        }
    }
}
