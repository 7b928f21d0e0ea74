//! What lets several threads write one slice, and their scratch memory.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Elements a task of an element-wise operation takes: enough to pay for its scheduling, small enough for L1 and L2.
/// A constant, so that sums over chunks do not depend on the number of threads.
pub(super) const CHUNK: usize = 16 * 1024;

/// Rows of `cols` columns that make up about one [`CHUNK`].
pub(super) fn chunk_rows(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}

/// A mutable slice that tasks write at places no two of them share.
pub(super) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: the only ways to the elements are the unsafe methods below, whose callers promise disjoint places; sending
// `&mut T` to another thread is sound for `T: Send`.
unsafe impl<T: Send> Sync for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Elements `at .. at + len`. Panics if they lie outside the slice.
    ///
    /// # Safety
    /// While the result lives nothing else may access these elements.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "{at} + {len} outside {}", self.len);
        // SAFETY: inside the slice by the assertion; unique by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// The address of element `at` and the number of elements from there to the end.
    pub(super) fn from(&self, at: usize) -> (*mut T, usize) {
        assert!(at <= self.len, "{at} outside {}", self.len);
        // SAFETY: at most one past the end.
        (unsafe { self.start.add(at) }, self.len - at)
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Scratch memory of this thread, kept for its next use; its content is unspecified (old values).
pub(super) struct Scratch {
    storage: Vec<f32>,
    len: usize,
}

impl Scratch {
    /// `len` elements. Nested uses get different memory; each nesting depth meets its own again.
    pub(super) fn take(len: usize) -> Self {
        let mut storage = SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default();
        if storage.len() < len {
            // A fresh allocation rather than a growing one: the old values need not be copied.
            storage = vec![0.0; len.next_multiple_of(1024)];
        }
        Self { storage, len }
    }

    /// Changes the length; the content is unspecified afterwards.
    pub(super) fn resize(&mut self, len: usize) {
        if self.storage.len() < len {
            self.storage = vec![0.0; len.next_multiple_of(1024)];
        }
        self.len = len;
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.storage[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.storage[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let storage = std::mem::take(&mut self.storage);
        SCRATCH.with_borrow_mut(|all| all.push(storage));
    }
}
