//! Signals that ask a run to save a checkpoint and stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use signal_hook::consts::{SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;

use crate::exit::{self, Failure, Result};
use crate::train::StopFlag;

const SIGNALS: [i32; 2] = [SIGUSR1, SIGTERM];

/// Signals that follow the first one within this time belong to it: `timeout` of GNU coreutils sends its signal to the program, and then
/// to the process group of that.
const TOGETHER: Duration = Duration::from_millis(100);

/// A stop flag that SIGUSR1 and SIGTERM set. A second signal, a tenth of a second later or more, ends the process at once, with the exit code of a shell
/// for it (128 + signal).
///
/// # Errors
/// The system refuses a signal handler or a thread.
pub fn stop_on_signals() -> Result<StopFlag> {
    let (stop, is_second) = (StopFlag::default(), Arc::new(AtomicBool::new(false)));
    let failed = |e| Failure::new(exit::INTERNAL, format!("cannot listen to signals: {e}"));
    for signal in SIGNALS {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, is_second.clone())
            .and_then(|_| signal_hook::flag::register(signal, stop.shared()))
            .map_err(failed)?;
    }
    let mut signals = Signals::new(SIGNALS).map_err(failed)?;
    let wait = move || {
        if signals.forever().next().is_some() {
            thread::sleep(TOGETHER);
            is_second.store(true, Ordering::Relaxed);
        }
    };
    thread::Builder::new().name("signals".into()).spawn(wait).map_err(failed)?;
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
