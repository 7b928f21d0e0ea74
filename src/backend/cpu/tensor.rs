//! The CPU backend's tensor, and the memory pool that recycles its storage.
//!
//! Why not `candle_core::Tensor`: each of its operations allocates a zero-filled output. That means page faults and
//! zeroing of fresh pages by the kernel for every operation of every layer, which costs about as much as a memory-bound
//! operation itself. Here, the storage of a dropped tensor returns to a pool and is reused for the next tensor of
//! similar size. So a training loop in its steady state allocates nothing and causes no page faults.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::element::{Element, by_element};
use super::parallel::huge_pages;
use crate::backend::Dtype;

/// A memory pool for the storage of tensors.
///
/// Its idle storage never exceeds the peak of storage in use by more than a quarter: sizes change in the course of a pass, and what
/// is freed costs page faults again. Beyond that, it frees the storage that has been idle longest.
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
    /// A tensor of f32 with **unspecified** values (initialised memory, with old values), which the caller must overwrite.
    pub(super) fn take(self: &Arc<Self>, rows: usize, cols: usize) -> Tensor {
        self.take_as(Dtype::F32, rows, cols)
    }

    /// As [`Self::take`], of f32 or bf16.
    pub(super) fn take_as(self: &Arc<Self>, dtype: Dtype, rows: usize, cols: usize) -> Tensor {
        let storage = self.storage((rows * cols * dtype.size()).div_ceil(size_of::<f32>()));
        Tensor { rows, cols, dtype, stored: rows * cols, storage, index: None, pool: self.clone() }
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
        recycled.unwrap_or_else(|| {
            let fresh = vec![0.0; class];
            huge_pages(&fresh);
            fresh
        })
    }

    fn recycle(&self, storage: Vec<f32>) {
        let mut evicted = Vec::new();
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.live_len -= storage.len();
        state.idle_len += storage.len();
        state.clock += 1;
        let now = state.clock;
        state.idle.entry(storage.len()).or_default().push((now, storage));
        while state.idle_len > state.peak_len + state.peak_len / 4 {
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

/// Activations: a row-major matrix. Its storage returns to the pool when it is dropped.
///
/// Elements are f32. Where products are of bf16 values, the rows of experts are bf16: they are only multiplied, summed in f32, and
/// passed through SwiGLU.
pub struct Tensor {
    rows: usize,
    cols: usize,
    dtype: Dtype,
    /// Elements that are stored.
    stored: usize,
    /// At least as large as these elements.
    storage: Vec<f32>,
    /// The stored row of each row; `None`: the same. Rows that are copies of others are not stored again.
    index: Option<Arc<[u32]>>,
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

    /// All values of a tensor of f32 in row-major order, `rows · cols`.
    pub fn values(&self) -> &[f32] {
        assert!(self.index.is_none(), "rows with an index");
        self.stored()
    }

    /// All values of a tensor of f32 in row-major order, `rows · cols`.
    pub fn values_mut(&mut self) -> &mut [f32] {
        self.stored_mut()
    }

    /// The values of one row of a tensor of f32, `[cols]`.
    pub fn row(&self, row: usize) -> &[f32] {
        &self.values()[row * self.cols..(row + 1) * self.cols]
    }

    /// Element type.
    pub(super) fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The stored row of each row; `None`: the same.
    pub(super) fn index(&self) -> Option<&[u32]> {
        self.index.as_deref()
    }

    /// These rows of this one.
    pub(super) fn with_index(mut self, index: Arc<[u32]>) -> Self {
        assert!(self.index.is_none() && index.iter().all(|&row| (row as usize) < self.rows), "{} rows", self.rows);
        self.rows = index.len();
        self.index = Some(index);
        self
    }

    /// The elements of the stored rows.
    pub(super) fn stored<E: Element>(&self) -> &[E] {
        assert!(E::DTYPE == self.dtype, "a tensor of {:?}, not {:?}", self.dtype, E::DTYPE);
        &bytemuck::cast_slice(&self.storage)[..self.stored]
    }

    /// The elements of the stored rows.
    pub(super) fn stored_mut<E: Element>(&mut self) -> &mut [E] {
        assert!(E::DTYPE == self.dtype, "a tensor of {:?}, not {:?}", self.dtype, E::DTYPE);
        assert!(self.index.is_none(), "rows with an index");
        &mut bytemuck::cast_slice_mut(&mut self.storage)[..self.stored]
    }

    /// Reads a row, `[cols]`.
    #[inline(always)]
    pub(super) fn read_row(&self, row: usize, into: &mut [f32]) {
        #[inline(always)]
        fn read<E: Element>(x: &Tensor, row: usize, into: &mut [f32]) {
            let row = x.index.as_ref().map_or(row, |index| index[row] as usize);
            for (into, e) in into.iter_mut().zip(&x.stored::<E>()[row * x.cols..][..x.cols]) {
                *into = e.get();
            }
        }
        by_element!(self.dtype, read(self, row, into));
    }

    /// All values in f32, in row-major order.
    pub(super) fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        for (row, into) in out.chunks_exact_mut(self.cols.max(1)).enumerate() {
            self.read_row(row, into);
        }
        out
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
        assert!(state.idle_len <= state.peak_len / 4 * 5, "{} idle, {} at peak", state.idle_len, state.peak_len);
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
