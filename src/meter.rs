//! How far long work is: counted where it is done, on any thread, and shown by [`crate::ui`] where it takes more than a second.
//!
//! A module that only computes does not know who watches: it starts a [`Meter`] and adds to it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// What a meter counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Bytes that are read, written or hashed.
    Bytes,
    /// Rows of a data file.
    Rows,
    /// Tokens of forward passes.
    Tokens,
}

/// Work that is being done.
pub struct Activity {
    /// What is being done, with the file or folder.
    pub what: String,
    /// What is counted.
    pub unit: Unit,
    /// How much there is to do.
    pub total: u64,
    /// When it began.
    pub started: Instant,
    done: AtomicU64,
    on_end: Mutex<Option<OnEnd>>,
}

type OnEnd = Box<dyn FnOnce() + Send>;

/// The activities, the innermost last.
static ACTIVITIES: Mutex<Vec<Arc<Activity>>> = Mutex::new(Vec::new());

impl Activity {
    /// How much is done.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Calls `then` when the activity ends, before anything else is printed: at once if it has ended.
    pub fn on_end(self: &Arc<Self>, then: impl FnOnce() + Send + 'static) {
        let activities = lock(&ACTIVITIES);
        if activities.iter().any(|activity| Arc::ptr_eq(activity, self)) {
            *lock(&self.on_end) = Some(Box::new(then));
        } else {
            then();
        }
    }
}

/// Counts what is done of an activity, which ends when this is dropped.
pub struct Meter(Arc<Activity>);

impl Meter {
    /// Begins an activity.
    pub fn start(what: impl Into<String>, unit: Unit, total: u64) -> Self {
        let activity = Activity {
            what: what.into(),
            unit,
            total,
            started: Instant::now(),
            done: AtomicU64::new(0),
            on_end: Mutex::new(None),
        };
        let activity = Arc::new(activity);
        lock(&ACTIVITIES).push(Arc::clone(&activity));
        Self(activity)
    }

    /// Counts `n` more units as done.
    pub fn add(&self, n: usize) {
        self.0.done.fetch_add(n as u64, Ordering::Relaxed);
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        lock(&ACTIVITIES).retain(|activity| !Arc::ptr_eq(activity, &self.0));
        let then = lock(&self.0.on_end).take();
        then.into_iter().for_each(|then| then());
    }
}

/// The activity that was begun last and has not ended.
pub fn current() -> Option<Arc<Activity>> {
    lock(&ACTIVITIES).last().cloned()
}

/// No panic can leave the state inconsistent.
fn lock<T>(state: &Mutex<T>) -> MutexGuard<'_, T> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_activity_is_current_until_it_ends() {
        let ours = |what: &str| lock(&ACTIVITIES).iter().rfind(|a| a.what == what).cloned();
        let outer = Meter::start("test: outer", Unit::Rows, 10);
        let inner = Meter::start("test: inner", Unit::Bytes, 4);
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(|| inner.add(1)))));
        outer.add(3);
        let (seen, ended) = (ours("test: inner").unwrap(), Arc::new(AtomicU64::new(0)));
        assert_eq!((seen.done(), ours("test: outer").unwrap().done()), (4, 3));
        let times = Arc::clone(&ended);
        seen.on_end(move || _ = times.fetch_add(1, Ordering::Relaxed));
        assert_eq!(ended.load(Ordering::Relaxed), 0);
        drop(inner);
        assert!(ours("test: inner").is_none() && ended.load(Ordering::Relaxed) == 1);
        let times = Arc::clone(&ended);
        seen.on_end(move || _ = times.fetch_add(1, Ordering::Relaxed));
        assert_eq!(ended.load(Ordering::Relaxed), 2, "after the end, at once");
    }
}
