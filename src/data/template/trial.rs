//! Trial renderings: templates that take unbounded time or memory are found before any data are read.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use super::{ChatTemplate, TemplateError};
use crate::data::Message;

/// Limits of the trial renderings; no usable template comes near them.
const TRIAL_TIME: Duration = Duration::from_secs(10);
/// Half the stack of the thread (`deep`), so that endless recursion is stopped before it exhausts that.
const TRIAL_MEMORY: u64 = 256 << 20;

impl ChatTemplate {
    /// Renders short conversations of common shapes on a thread of their own, to find a template that takes unbounded
    /// time or memory before any data are read. (The limit on steps does not find all of them: doubling a string takes
    /// few steps.) A template that raises an exception for a shape passes.
    ///
    /// # Errors
    /// The limit that was exceeded. The thread cannot be stopped and keeps rendering: the process should exit soon.
    pub fn check_limits(self: &Arc<Self>) -> Result<(), TemplateError> {
        let turn = |role: &str| Message::new(role, "It is 7 o'clock.");
        let conversations =
            [vec!["user"], vec!["system", "user"], vec!["system", "user", "assistant", "user", "assistant"]];
        let (done, outcome) = mpsc::channel();
        let template = Arc::clone(self);
        thread::spawn(move || {
            let outcome = conversations.iter().try_for_each(|roles| {
                let messages: Vec<_> = roles.iter().map(|r| turn(r)).collect();
                [false, true].into_iter().try_for_each(|add_generation_prompt| {
                    match template.render(&messages, add_generation_prompt) {
                        Err(e @ TemplateError::Bounds(_)) => Err(e),
                        _ => Ok(()),
                    }
                })
            });
            // The receiver is gone if a limit was exceeded.
            let _ = done.send(outcome);
        });
        let (start, before) = (Instant::now(), anonymous_bytes());
        loop {
            match outcome.recv_timeout(Duration::from_millis(2)) {
                Ok(outcome) => return outcome,
                Err(mpsc::RecvTimeoutError::Disconnected) => unreachable!("rendering catches panics"),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
            }
            if start.elapsed() > TRIAL_TIME {
                return Err(TemplateError::Bounds(format!("a short conversation took more than {TRIAL_TIME:?}")));
            }
            // Checked only after the first timeout: most templates have finished by then.
            if anonymous_bytes() > before + TRIAL_MEMORY {
                return Err(TemplateError::Bounds("a short conversation took more than 256 MiB of memory".into()));
            }
        }
    }
}

/// Resident memory of this process without mapped files, in bytes; 0 where /proc does not exist.
fn anonymous_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Vec<u64> = pages.split(' ').map_while(|n| n.trim().parse().ok()).collect();
    match pages[..] {
        [_, resident, shared, ..] => resident.saturating_sub(shared) * 4096,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> Arc<ChatTemplate> {
        Arc::new(ChatTemplate::new(source, []).unwrap())
    }

    #[test]
    fn the_trial_rendering_finds_a_string_that_doubles() {
        let doubling = "{% set ns = namespace(x='a') %}{% for i in range(30) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x[:1] }}";
        assert!(matches!(template(doubling).check_limits(), Err(TemplateError::Bounds(_))));
        assert_eq!(template("{{ messages[5].x.y }}").check_limits(), Ok(()));
        assert_eq!(template("{{ raise_exception('never') }}").check_limits(), Ok(()));
    }
}
