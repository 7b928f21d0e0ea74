//! Tests of ranks over MPI, and of the SLURM scripts that start them.

#[path = "../common/golden_copy.rs"]
mod golden_copy;
#[path = "../common/processes.rs"]
mod processes;

mod collective;
mod slurm;

use std::sync::RwLock;

/// Held for writing while `collective` runs ranks, and for reading while a SLURM runs: ranks with short deadlines that share
/// the cores with other ranks look as if they hung.
static CORES: RwLock<()> = RwLock::new(());
