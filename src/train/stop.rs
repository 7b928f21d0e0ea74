//! The stop flag.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether this process was asked to save a checkpoint and stop. Ranks agree on it at each step, and then stop together.
#[derive(Debug, Clone, Default)]
pub struct StopFlag(Arc<AtomicBool>);

impl StopFlag {
    /// Whether the flag is set.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Sets the flag.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// The flag itself, for code that polls it: signal handlers, and ranks that wait in MPI.
    pub fn shared(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}
