//! Room for chat templates: threads with a stack that the deepest template and the deepest value cannot exhaust.
//!
//! minijinja compiles, drops and prints recursively, and a stack overflow ends the process. What bounds the depth: of a
//! template its tokens a tag (`jinja_source`) and its length, of values the steps of a rendering. Unoptimised code takes at
//! most 3 KiB a level of a template and 1.3 KiB a level of a value: 200 MiB for the longest template, 330 MiB for the deepest
//! value.

use std::cell::Cell;
use std::thread;

use rayon::{ThreadPool, ThreadPoolBuilder};

/// Reserved, not used: the system gives memory to what a thread really touches.
const STACK: usize = 512 << 20;

thread_local! {
    /// Whether this thread has a stack of [`STACK`].
    static IS_DEEP: Cell<bool> = const { Cell::new(false) };
}

/// Runs `f` on a thread with a large stack: this one, if it has one.
///
/// # Errors
/// The system refuses such a thread.
pub(super) fn run<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T, String> {
    if IS_DEEP.get() {
        return Ok(f());
    }
    thread::scope(|scope| {
        let f = || {
            IS_DEEP.set(true);
            f()
        };
        let started = thread::Builder::new().stack_size(STACK).spawn_scoped(scope, f).map_err(refused)?;
        Ok(started.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Threads with a large stack: as many as rayon has, or as many as the system allows.
///
/// # Errors
/// The system refuses even one.
pub(super) fn pool() -> Result<ThreadPool, String> {
    let mut threads = rayon::current_num_threads();
    loop {
        let pool = ThreadPoolBuilder::new().num_threads(threads).stack_size(STACK);
        match pool.start_handler(|_| IS_DEEP.set(true)).build() {
            Ok(pool) => return Ok(pool),
            Err(_) if threads > 1 => threads /= 2,
            Err(e) => return Err(refused(e)),
        }
    }
}

fn refused(error: impl std::fmt::Display) -> String {
    format!("the system refuses a thread with a stack of {} MiB (is virtual memory limited?): {error}", STACK >> 20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_deep_thread_is_used_again() {
        let outer = run(|| (thread::current().id(), run(|| thread::current().id()).unwrap())).unwrap();
        assert!(outer.0 == outer.1 && outer.0 != thread::current().id());
        let pool = pool().unwrap();
        assert!(pool.install(|| IS_DEEP.get()) && !IS_DEEP.get());
    }
}
