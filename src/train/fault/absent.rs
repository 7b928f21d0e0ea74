//! Fault injection in builds without it: a type without values.

use std::str::FromStr;
use std::sync::Arc;

use super::{Corruption, Point};
use crate::collective::Collective;
use crate::exit::{self, Failure};

/// Never exists in this build.
#[derive(Debug, Clone)]
pub enum Fault {}

impl FromStr for Fault {
    type Err = Failure;

    fn from_str(_: &str) -> Result<Self, Failure> {
        Err(Failure::new(exit::CONFIG, "this build has no fault injection (feature `faults`)"))
    }
}

impl Fault {
    /// The rank on which the fault is injected.
    pub fn rank(&self) -> usize {
        match *self {}
    }

    /// Counts a visit to a point.
    ///
    /// # Errors
    /// None.
    pub fn visit(&self, _: Point) -> Result<Option<Corruption>, Failure> {
        match *self {}
    }

    /// A communicator whose operations are visits to [`Point::Collective`].
    pub fn wrap(&self, _: Arc<dyn Collective>) -> Arc<dyn Collective> {
        match *self {}
    }
}
