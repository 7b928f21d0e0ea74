//! The model whose routing an evaluation used, if not the evaluated model's own.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// How another model decides the routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RoutingFrom {
    /// Its router weights replace those of the evaluated model (`--routers`).
    Routers,
    /// The experts and routing weights of each token are those that it computes (`--route-as`).
    LockedRouting,
}

/// The model that decided the routing of an evaluation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherRouting {
    /// How.
    pub from: RoutingFrom,
    /// Its folder.
    pub path: PathBuf,
    /// blake3 hash over its parameters, as that of the evaluated model.
    pub sha: String,
}

impl RoutingFrom {
    /// In a table, behind the name of the evaluation.
    pub(super) fn phrase(self) -> &'static str {
        match self {
            Self::Routers => "restored routers",
            Self::LockedRouting => "locked routing",
        }
    }
}

impl fmt::Display for OtherRouting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match self.from {
            RoutingFrom::Routers => write!(f, "restored routers: the router weights are those of {path}"),
            RoutingFrom::LockedRouting => write!(f, "locked routing: experts and routing weights are those of {path}"),
        }
    }
}
