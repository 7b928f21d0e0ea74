//! The phases of a round.

use serde::{Deserialize, Serialize};

use super::training::{ExpertPhase, JointPhase, RouterPhase};

/// A part of a round, in the order in which the parts run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Scores and selects experts; trains nothing.
    Identify,
    /// Trains experts by cross-entropy.
    Expert,
    /// Aligns routers.
    Router,
    /// Trains experts and routers in one step.
    Joint,
}

impl Phase {
    /// The name of the phase in messages: `expert` in "round 1, expert step 7".
    pub fn name(self) -> &'static str {
        match self {
            Phase::Identify => "identification",
            Phase::Expert => "expert",
            Phase::Router => "router",
            Phase::Joint => "joint",
        }
    }

    /// The label of the phase in the progress bar.
    pub fn label(self) -> &'static str {
        match self {
            Phase::Identify => "identify",
            Phase::Expert => "experts",
            Phase::Router => "routers",
            Phase::Joint => "joint",
        }
    }
}

/// A phase of a round, with its options.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum PhasePlan<'r> {
    /// Scores and selects experts; its options are those of the run ([`super::Recipe::identify`]).
    Identify,
    /// Trains experts by cross-entropy.
    Expert(&'r ExpertPhase),
    /// Aligns routers.
    Router(&'r RouterPhase),
    /// Trains experts and routers in one step.
    Joint(&'r JointPhase),
}

impl PhasePlan<'_> {
    /// Which phase it is.
    pub fn phase(self) -> Phase {
        match self {
            PhasePlan::Identify => Phase::Identify,
            PhasePlan::Expert(_) => Phase::Expert,
            PhasePlan::Router(_) => Phase::Router,
            PhasePlan::Joint(_) => Phase::Joint,
        }
    }
}
