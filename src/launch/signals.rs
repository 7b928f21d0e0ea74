//! Signals that ask a run to save a checkpoint and stop.

use signal_hook::consts::{SIGTERM, SIGUSR1};

use crate::exit::{self, Failure, Result};
use crate::train::StopFlag;

/// A stop flag that SIGUSR1 and SIGTERM set. The second signal ends the process at once, with the exit code of a shell for it
/// (128 + signal).
///
/// # Errors
/// The system refuses a signal handler.
pub fn stop_on_signals() -> Result<StopFlag> {
    let stop = StopFlag::default();
    for signal in [SIGUSR1, SIGTERM] {
        // In this order: at the first signal the flag is not set yet, and the handler sets it; at the second it is set.
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, stop.shared())
            .and_then(|_| signal_hook::flag::register(signal, stop.shared()))
            .map_err(|e| Failure::new(exit::INTERNAL, format!("cannot listen to signal {signal}: {e}")))?;
    }
    Ok(stop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_signal_sets_the_flag() {
        let stop = stop_on_signals().unwrap();
        assert!(!stop.is_set());
        signal_hook::low_level::raise(SIGUSR1).unwrap();
        assert!(stop.is_set() && !StopFlag::default().is_set());
    }
}
