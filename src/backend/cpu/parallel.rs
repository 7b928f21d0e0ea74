//! Writing disjoint parts of a slice from several threads, and per-thread scratch memory.

use std::cell::RefCell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// Elements per task of an elementwise operation: enough to outweigh scheduling, few enough for the L1 and L2 caches. A
/// constant, so that sums over chunks do not depend on the number of threads.
pub(super) const CHUNK: usize = 16 * 1024;

/// Number of rows of `cols` columns in about one [`CHUNK`], at least 1.
pub(super) fn chunk_rows(cols: usize) -> usize {
    (CHUNK / cols.max(1)).max(1)
}

/// A mutable slice of which several tasks write disjoint parts.
pub(super) struct SharedSlice<'a, T> {
    start: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: elements are only accessible through unsafe methods whose callers guarantee disjoint parts; sending `&mut T`
// to another thread is sound for `T: Send`.
unsafe impl<T: Send> Sync for SharedSlice<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Send for SharedSlice<'_, T> {}

impl<'a, T> SharedSlice<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { start: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Elements `at .. at + len`. Panics if they exceed the slice.
    ///
    /// # Safety
    /// Nothing else may access these elements during the lifetime of the result.
    #[allow(clippy::mut_from_ref)]
    pub(super) unsafe fn slice(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at, "elements {at} + {len} of {}", self.len);
        // SAFETY: inside the slice by the assertion; not aliased by the caller's guarantee.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(at), len) }
    }

    /// The address of element `at`, and the number of elements from there to the end.
    pub(super) fn tail(&self, at: usize) -> (*mut T, usize) {
        assert!(at <= self.len, "element {at} of {}", self.len);
        // SAFETY: the address is inside the slice or one past its end.
        (unsafe { self.start.add(at) }, self.len - at)
    }
}

/// Asks the kernel to back fresh memory with pages of 2 MiB, where it has any: fewer page faults at the first use, and fewer misses of
/// the TLB afterwards. A hint.
pub(super) fn huge_pages<T>(memory: &[T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 2 << 20;
        let (start, end) = (memory.as_ptr() as usize, memory.as_ptr_range().end as usize);
        let (start, end) = (start.next_multiple_of(PAGE), end / PAGE * PAGE);
        if start < end {
            // SAFETY: whole pages inside the slice; the advice changes no contents.
            unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
        }
    }
}

/// A cache line, so that vectors in scratch memory do not cross one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

// SAFETY: 64 bytes of f32 without padding; all bit patterns are valid, zeros among them.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above.
unsafe impl bytemuck::Pod for Line {}

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<Line>>> = const { RefCell::new(Vec::new()) };
}

/// Scratch memory of this thread, aligned to cache lines and recycled by later uses. Its content is unspecified (old
/// values).
pub(super) struct Scratch {
    storage: Vec<Line>,
    len: usize,
}

impl Scratch {
    /// `len` elements. The storage is a per-thread stack: nested uses get different storage, and each nesting depth
    /// gets the same storage again.
    pub(super) fn take(len: usize) -> Self {
        let mut scratch = Self { storage: SCRATCH.with_borrow_mut(Vec::pop).unwrap_or_default(), len: 0 };
        scratch.resize(len);
        scratch
    }

    /// Changes the length; the content is unspecified afterwards.
    pub(super) fn resize(&mut self, len: usize) {
        let lines = len.div_ceil(16);
        if self.storage.len() < lines {
            // A fresh allocation instead of a resize of the vector, which would copy the old values.
            let lines = lines.next_multiple_of(64);
            self.storage = Vec::with_capacity(lines);
            huge_pages(self.storage.spare_capacity_mut());
            self.storage.resize(lines, bytemuck::Zeroable::zeroed());
        }
        self.len = len;
    }
}

impl Deref for Scratch {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &bytemuck::cast_slice(&self.storage)[..self.len]
    }
}

impl DerefMut for Scratch {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut bytemuck::cast_slice_mut(&mut self.storage)[..self.len]
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let storage = std::mem::take(&mut self.storage);
        SCRATCH.with_borrow_mut(|all| all.push(storage));
    }
}
