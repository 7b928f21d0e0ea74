//! Signals that ask a run to save what it has and leave.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGTERM, SIGUSR1};

use crate::exit::{self, Failure, Result};

/// Whether this process was asked to stop. Ranks agree on it at each step, and then stop together.
#[derive(Debug, Clone, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// Listens to SIGUSR1 and SIGTERM. The second signal ends the process at once, with the shell's code for it.
    ///
    /// # Errors
    /// A system that refuses handlers.
    pub fn on_signals() -> Result<Self> {
        let stop = Self::default();
        for signal in [SIGUSR1, SIGTERM] {
            // In this order: a first signal finds the flag down and raises it, a second one finds it up.
            signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stop.0.clone())
                .and_then(|_| signal_hook::flag::register(signal, stop.0.clone()))
                .map_err(|e| Failure::new(exit::INTERNAL, format!("cannot listen to signal {signal}: {e}")))?;
        }
        Ok(stop)
    }

    /// Whether this process was asked.
    pub fn is_asked(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks.
    pub fn ask(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// What is up while the process has been asked, for who waits.
    pub fn flag(&self) -> Arc<AtomicBool> {
        self.0.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_signal_asks() {
        let stop = Stop::on_signals().unwrap();
        assert!(!stop.is_asked());
        signal_hook::low_level::raise(SIGUSR1).unwrap();
        assert!(stop.is_asked() && !Stop::default().is_asked());
    }
}
