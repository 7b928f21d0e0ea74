//! The CPU backend's tensor, and the memory pool that recycles its storage.
//!
//! Why not `candle_core::Tensor`: each of its operations allocates a zero-filled output. That means page faults and
//! zeroing of fresh pages by the kernel for every operation of every layer, which costs about as much as a memory-bound
//! operation itself. Here, the storage of a dropped tensor returns to a pool and is reused for the next tensor of
//! similar size. So a training loop in its steady state allocates nothing and causes no page faults.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// A memory pool for the storage of tensors.
///
/// Its idle storage never exceeds the peak of storage in use. Beyond that, it frees the storage that has been idle
/// longest.
#[derive(Default)]
pub(super) struct TensorPool {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Idle storage by length. Each list is in order of return, with the value of `clock` at the return.
    idle: BTreeMap<usize, Vec<(u64, Vec<f32>)>>,
    /// Idle elements.
    idle_len: usize,
    /// Elements in use.
    live_len: usize,
    /// Maximum of `live_len` so far.
    peak_len: usize,
    /// Number of returns so far.
    clock: u64,
}

/// Rounds a length up to its size class, eight per power of two: tensors of slightly different sizes (ragged batches)
/// share storage.
fn size_class(len: usize) -> usize {
    let step = (len.max(512).next_power_of_two() / 16).max(64);
    len.max(1).next_multiple_of(step)
}

impl TensorPool {
    /// A tensor with **unspecified** values (initialised memory, with old values), which the caller must overwrite.
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
            // Storage up to a quarter too large is cheaper than a fresh allocation.
            let fit = state.idle.range(class..=class + class / 4).next().map(|(&len, _)| len);
            let storage = fit.and_then(|len| {
                let list = state.idle.get_mut(&len)?;
                let (_, storage) = list.pop()?;
                if list.is_empty() {
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
        // Allocate outside the lock: this is the slow path.
        recycled.unwrap_or_else(|| vec![0.0; class])
    }

    fn recycle(&self, storage: Vec<f32>) {
        let mut evicted = Vec::new();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.live_len -= storage.len();
        state.idle_len += storage.len();
        state.clock += 1;
        let now = state.clock;
        state.idle.entry(storage.len()).or_default().push((now, storage));
        while state.idle_len > state.peak_len {
            let oldest = state.idle.iter().min_by_key(|(_, list)| list[0].0).map(|(&len, _)| len);
            let Some(len) = oldest else { break };
            let list = state.idle.get_mut(&len).expect("the length was just found");
            evicted.push(list.remove(0).1);
            if list.is_empty() {
                state.idle.remove(&len);
            }
            state.idle_len -= len;
        }
        drop(state);
        // `evicted` is freed here, after the lock is released.
    }
}

/// Activations: a dense row-major f32 matrix. Its storage returns to the pool when it is dropped.
pub struct Tensor {
    rows: usize,
    cols: usize,
    /// At least `rows · cols` elements.
    storage: Vec<f32>,
    pool: Arc<TensorPool>,
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

    /// All values in row-major order, `rows · cols`.
    pub fn values(&self) -> &[f32] {
        &self.storage[..self.rows * self.cols]
    }

    /// All values in row-major order, `rows · cols`.
    pub fn values_mut(&mut self) -> &mut [f32] {
        &mut self.storage[..self.rows * self.cols]
    }

    /// The values of one row, `[cols]`.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.storage[row * self.cols..(row + 1) * self.cols]
    }

    /// Panics with both shapes unless the shape is `[rows, cols]`; `what` names the tensor.
    #[track_caller]
    pub(super) fn expect_shape(&self, what: &str, rows: usize, cols: usize) {
        assert!(
            (self.rows, self.cols) == (rows, cols),
            "{what} has shape [{}, {}], expected [{rows}, {cols}]",
            self.rows,
            self.cols
        );
    }
}

impl Drop for Tensor {
    fn drop(&mut self) {
        self.pool.recycle(std::mem::take(&mut self.storage));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn storage_is_recycled_with_its_old_values() {
        let pool = Arc::new(TensorPool::default());
        let mut a = pool.take(30, 40);
        a.values_mut().fill(f32::NAN);
        let address = a.values().as_ptr();
        drop(a);
        // 1190 elements are in the size class of 1200.
        let b = pool.take(1, 1190);
        assert_eq!(b.values().as_ptr(), address);
        assert!(b.values()[0].is_nan());
        assert!(pool.zeros(30, 40).values().iter().all(|&x| x == 0.0));
    }

    #[test]
    fn idle_storage_is_bounded_by_the_peak_in_use() {
        let pool = Arc::new(TensorPool::default());
        for rows in 1..200 {
            drop(pool.take(rows, 1000));
        }
        let state = pool.state.lock().unwrap();
        assert_eq!(state.live_len, 0);
        assert!(state.idle_len <= state.peak_len, "{} idle, {} at peak", state.idle_len, state.peak_len);
        assert_eq!(state.idle_len, state.idle.iter().map(|(len, list)| len * list.len()).sum::<usize>());
    }

    #[test]
    fn size_classes_waste_at_most_an_eighth_beyond_small_sizes() {
        for len in (1..100_000).step_by(7) {
            let class = size_class(len);
            assert!(class >= len && class <= len + len / 8 + 64, "{len} -> {class}");
        }
    }
}
