//! Panics of a dependency that are caught on purpose, so that the panic hook does not report them as a bug.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    /// How many calls of [`catch_expected`] are running on this thread.
    static DEPTH: Cell<usize> = const { Cell::new(0) };
}

/// Runs `f`; `None` if it panics. The panic hook, which runs on the panicking thread before the stack unwinds, can ask
/// [`is_expected`]. A panic on a thread that `f` starts is neither caught nor expected.
///
/// `f` should not leave a shared value half-changed when it panics: unwind safety is not checked.
pub fn catch_expected<T>(f: impl FnOnce() -> T) -> Option<T> {
    DEPTH.set(DEPTH.get() + 1);
    let result = catch_unwind(AssertUnwindSafe(f));
    DEPTH.set(DEPTH.get() - 1);
    result.ok()
}

/// Whether a panic on this thread would be caught by [`catch_expected`].
pub fn is_expected() -> bool {
    DEPTH.get() > 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_expected_only_while_the_call_runs() {
        assert!(!is_expected());
        assert_eq!(catch_expected(is_expected), Some(true));
        let outer = catch_expected(|| {
            let inner: Option<()> = catch_expected(|| panic!("on purpose"));
            (inner, is_expected())
        });
        assert_eq!(outer, Some((None, true)));
        assert!(!is_expected());
    }

    #[test]
    fn other_threads_are_not_affected() {
        let elsewhere = catch_expected(|| std::thread::spawn(is_expected).join().unwrap());
        assert_eq!(elsewhere, Some(false));
    }
}
