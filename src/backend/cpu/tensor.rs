//! The CPU's tensor and the pool its storage comes from.
//!
//! Why not `candle_core::Tensor`: each of its operations allocates a zero-filled output. The kernel then maps and clears
//! fresh pages for it, on every operation of every layer, which costs about as much as a memory-bound operation itself.
//! Here a dropped tensor's storage waits in the pool for the next one of about its size, so that a training loop in its
//! steady state allocates nothing and touches only pages it already owns.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// Recycles the storage of tensors.
///
/// What lies idle never exceeds the most that was ever in use at one time; beyond that the longest idle goes first.
#[derive(Default)]
pub(super) struct Pool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Idle storage by length, each with the time it was given back, oldest first.
    idle: BTreeMap<usize, Vec<(u64, Vec<f32>)>>,
    /// Elements lying idle, in use now, and in use at most so far.
    idle_len: usize,
    live_len: usize,
    peak_len: usize,
    clock: u64,
}

/// Lengths are rounded up to eight steps an octave: sizes that differ a little (ragged batches) share storage.
fn size_class(len: usize) -> usize {
    let step = (len.max(512).next_power_of_two() / 16).max(64);
    len.max(1).next_multiple_of(step)
}

impl Pool {
    /// A tensor of **unspecified** content (always initialised memory: old values); the caller overwrites all of it.
    pub(super) fn take(self: &Arc<Self>, rows: usize, cols: usize) -> Tensor {
        let storage = self.storage(rows * cols);
        Tensor { rows, cols, storage, pool: self.clone() }
    }

    /// A tensor of zeros.
    pub(super) fn zeros(self: &Arc<Self>, rows: usize, cols: usize) -> Tensor {
        let mut out = self.take(rows, cols);
        out.values_mut().fill(0.0);
        out
    }

    fn storage(&self, len: usize) -> Vec<f32> {
        let class = size_class(len);
        let recycled = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            // A quarter more than asked for is cheaper than a fresh allocation.
            let fit = state.idle.range(class..=class + class / 4).next().map(|(&len, _)| len);
            let storage = fit.and_then(|len| {
                let shelf = state.idle.get_mut(&len)?;
                let (_, storage) = shelf.pop()?;
                if shelf.is_empty() {
                    state.idle.remove(&len);
                }
                Some(storage)
            });
            let taken = storage.as_ref().map_or(class, Vec::len);
            state.idle_len -= storage.as_ref().map_or(0, Vec::len);
            state.live_len += taken;
            state.peak_len = state.peak_len.max(state.live_len);
            storage
        };
        // Outside the lock: this is the slow path.
        recycled.unwrap_or_else(|| vec![0.0; class])
    }

    fn give_back(&self, storage: Vec<f32>) {
        let mut evicted = Vec::new();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.live_len -= storage.len();
        state.idle_len += storage.len();
        state.clock += 1;
        let now = state.clock;
        state.idle.entry(storage.len()).or_default().push((now, storage));
        while state.idle_len > state.peak_len {
            let oldest = state.idle.iter().min_by_key(|(_, shelf)| shelf[0].0).map(|(&len, _)| len);
            let Some(len) = oldest else { break };
            let shelf = state.idle.get_mut(&len).expect("a shelf just found");
            evicted.push(shelf.remove(0).1);
            if shelf.is_empty() {
                state.idle.remove(&len);
            }
            state.idle_len -= len;
        }
        drop(state);
        // `evicted` is unmapped here, after the lock.
    }
}

/// Activations: a dense row-major f32 matrix whose storage returns to the pool on drop.
pub struct Tensor {
    rows: usize,
    cols: usize,
    /// At least `rows · cols` long.
    storage: Vec<f32>,
    pool: Arc<Pool>,
}

impl Tensor {
    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All values, row by row.
    pub fn values(&self) -> &[f32] {
        &self.storage[..self.rows * self.cols]
    }

    /// All values, row by row.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.storage[..self.rows * self.cols]
    }

    /// Values of one row.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.storage[row * self.cols..(row + 1) * self.cols]
    }

    /// Panics with both shapes unless this is `[rows, cols]`.
    #[track_caller]
    pub(super) fn expect_shape(&self, what: &str, rows: usize, cols: usize) {
        assert!(
            (self.rows, self.cols) == (rows, cols),
            "{what} has shape [{}, {}], expected [{rows}, {cols}]",
            self.rows,
            self.cols
        );
    }

    /// Appends rows below. Storage at least doubles when it is too small, so that a growing key/value cache costs
    /// amortised O(1) a row.
    pub(super) fn append(&mut self, below: &Tensor) {
        assert!(self.cols == below.cols, "appending rows of {} columns to rows of {}", below.cols, self.cols);
        let (old, new) = (self.rows * self.cols, (self.rows + below.rows) * self.cols);
        if new > self.storage.len() {
            let mut grown = self.pool.storage(new.max(2 * old));
            grown[..old].copy_from_slice(self.values());
            self.pool.give_back(std::mem::replace(&mut self.storage, grown));
        }
        self.storage[old..new].copy_from_slice(below.values());
        self.rows += below.rows;
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        self.pool.give_back(std::mem::take(&mut self.storage));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_recycled_and_old_values_show_until_overwritten() {
        let pool = Arc::new(Pool::default());
        let mut a = pool.take(30, 40);
        a.values_mut().fill(f32::NAN);
        let address = a.values().as_ptr();
        drop(a);
        // 1190 elements share the class of 1200.
        let b = pool.take(1, 1190);
        assert_eq!(b.values().as_ptr(), address);
        assert!(b.values()[0].is_nan());
        assert!(pool.zeros(30, 40).values().iter().all(|&x| x == 0.0));
    }

    #[test]
    fn what_lies_idle_is_bounded_by_what_was_in_use() {
        let pool = Arc::new(Pool::default());
        for rows in 1..200 {
            drop(pool.take(rows, 1000));
        }
        let state = pool.state.lock().unwrap();
        assert_eq!(state.live_len, 0);
        assert!(state.idle_len <= state.peak_len, "{} idle, {} at peak", state.idle_len, state.peak_len);
        assert_eq!(state.idle_len, state.idle.iter().map(|(len, shelf)| len * shelf.len()).sum::<usize>());
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth_beyond_small_sizes() {
        for len in (1..100_000).step_by(7) {
            let class = size_class(len);
            assert!(class >= len && class <= len + len / 8 + 64, "{len} -> {class}");
        }
    }

    #[test]
    fn appending_keeps_all_rows() {
        let pool = Arc::new(Pool::default());
        let mut all = pool.take(0, 3);
        for i in 0..500 {
            let mut one = pool.take(1, 3);
            one.values_mut().fill(i as f32);
            all.append(&one);
        }
        assert_eq!(all.rows(), 500);
        assert!((0..500).all(|i| all.row(i) == [i as f32; 3]));
    }
}
