//! Tensors, weights and other data in the GPU's memory.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::gpu::Address;
use super::launch::{Any, Element, In, InOut, Out, Pointer};
use super::must;
use super::pool::Memory;
use super::ranges::Ranges;
use super::ring::Block;
use crate::backend::Dtype;

/// Activations: a dense row-major matrix of F32 or BF16.
pub struct Tensor {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) dtype: Dtype,
    pub(super) memory: Memory,
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

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows * self.cols
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number format of its elements.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// The first element.
    pub fn address(&self) -> Address {
        self.memory.address()
    }

    /// The first element of a row.
    pub fn row(&self, row: usize) -> Address {
        self.address().offset(row * self.cols * self.dtype.size())
    }

    /// The elements, for a kernel that reads them.
    pub(super) fn input(&self) -> In<'_, Any> {
        Pointer::new(self.address(), self.dtype)
    }

    /// The elements, for a kernel that overwrites them.
    pub(super) fn output(&mut self) -> Out<'_, Any> {
        Pointer::new(self.address(), self.dtype)
    }

    /// The elements, for a kernel that reads and overwrites them.
    pub(super) fn inout(&mut self) -> InOut<'_, Any> {
        Pointer::new(self.address(), self.dtype)
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
}

/// A parameter in its stored number format; a training step overwrites its value.
pub struct Weight {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) place: Place,
}

/// Where a parameter lies.
pub(super) enum Place {
    /// On the GPU, at an address that never changes.
    Gpu(Memory),
    /// In the host's memory, or divided among the GPUs of several ranks; copied to this GPU for each use.
    Block(InBlock),
}

/// A parameter in a block.
#[derive(Clone)]
pub(super) struct InBlock {
    pub(super) block: Arc<Block>,
    /// Its offset in bytes.
    pub(super) offset: usize,
}

/// Room on the GPU for the new value of a parameter that lies in a block.
pub struct Staged {
    pub(super) weight: Weight,
    pub(super) to: InBlock,
}

impl Staged {
    /// The room.
    pub fn weight(&self) -> &Weight {
        &self.weight
    }

    /// The room, to be written.
    pub fn weight_mut(&mut self) -> &mut Weight {
        &mut self.weight
    }
}

impl Weight {
    /// Output width; 1 for a vector.
    pub fn rows(&self) -> usize {
        if self.shape.len() == 2 { self.shape[0] } else { 1 }
    }

    /// Input width, or the length of a vector.
    pub fn cols(&self) -> usize {
        self.shape[self.shape.len() - 1]
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.rows() * self.cols()
    }

    /// Whether it holds no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The stored number format.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of all elements.
    pub(super) fn bytes(&self) -> usize {
        self.len() * self.dtype.size()
    }

    /// Its place in a block, if it lies in one.
    pub(super) fn in_block(&self) -> Option<&InBlock> {
        match &self.place {
            Place::Gpu(_) => None,
            Place::Block(at) => Some(at),
        }
    }

    /// The first element, for reading. That of a parameter in a block is in a slot on the GPU, for work that is queued before
    /// parameters of other layers are used.
    pub fn address(&self) -> Address {
        match &self.place {
            Place::Gpu(memory) => memory.address(),
            Place::Block(at) => at.block.address().offset(at.offset),
        }
    }

    /// The elements, for a kernel that reads them.
    pub(super) fn input(&self) -> In<'_, Any> {
        Pointer::new(self.address(), self.dtype)
    }

    /// The elements, for a kernel that overwrites them. Panics if they lie in a block.
    pub(super) fn output(&mut self) -> Out<'_, Any> {
        match &self.place {
            Place::Gpu(memory) => Pointer::new(memory.address(), self.dtype),
            Place::Block(_) => panic!("a kernel cannot write a parameter in a block"),
        }
    }
}

/// Numbers that only kernels see: ids, offsets, partial sums.
pub(super) struct Array<T> {
    memory: Memory,
    len: usize,
    elements: PhantomData<T>,
}

impl<T: Element<Format = ()>> Array<T> {
    /// `len` numbers in this memory.
    pub(super) fn new(memory: Memory, len: usize) -> Self {
        assert!(len * size_of::<T>() <= memory.bytes(), "{len} numbers in {} bytes", memory.bytes());
        Self { memory, len, elements: PhantomData }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn address(&self) -> Address {
        self.memory.address()
    }

    pub(super) fn input(&self) -> In<'_, T> {
        Pointer::new(self.address(), ())
    }

    pub(super) fn output(&mut self) -> Out<'_, T> {
        Pointer::new(self.address(), ())
    }

    pub(super) fn inout(&mut self) -> InOut<'_, T> {
        Pointer::new(self.address(), ())
    }
}

/// A flat row of f32. Clearing it only marks its elements as unwritten: the first operation that adds to a range of them stores its
/// result instead, and what is read before it is written is cleared then. So the gradients of a step, which are as large as
/// the optimizer's moments, are neither cleared nor read before they are first written.
pub struct Buffer {
    pub(super) len: usize,
    memory: Memory,
    /// The elements that count as zero, whatever their memory contains.
    unwritten: Mutex<Ranges>,
}

impl Buffer {
    /// `len` zeros in this memory.
    pub(super) fn new(memory: Memory, len: usize) -> Self {
        assert!(4 * len <= memory.bytes(), "{len} numbers in {} bytes", memory.bytes());
        Self { len, memory, unwritten: Mutex::new(Ranges::of(0..len)) }
    }

    /// Sets all elements to zero.
    pub(super) fn clear(&mut self) {
        *self.unwritten() = Ranges::of(0..self.len);
    }

    fn unwritten(&self) -> MutexGuard<'_, Ranges> {
        self.unwritten.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Panics unless the buffer has `len` elements from `index` on.
    #[track_caller]
    pub(super) fn expect(&self, index: usize, len: usize) -> Range<usize> {
        assert!(index + len <= self.len, "elements {index}..{} of a buffer of {}", index + len, self.len);
        index..index + len
    }

    fn address(&self, index: usize) -> Address {
        self.memory.address().offset(4 * index)
    }

    /// `len` elements from `index` on, for a kernel that reads them.
    #[track_caller]
    pub(super) fn input(&self, index: usize, len: usize) -> In<'_, f32> {
        Pointer::new(self.at(index, len), ())
    }

    /// `len` elements from `index` on, for a kernel that overwrites all of them.
    #[track_caller]
    pub(super) fn output(&mut self, index: usize, len: usize) -> Out<'_, f32> {
        Pointer::new(self.overwritten(index, len), ())
    }

    /// `len` elements from `index` on, for a kernel that reads and overwrites them.
    #[track_caller]
    pub(super) fn inout(&mut self, index: usize, len: usize) -> InOut<'_, f32> {
        Pointer::new(self.at(index, len), ())
    }

    /// The whole buffer, for a kernel that updates ranges of it, of each of which [`Self::at`] or [`Self::overwritten`] was asked.
    pub(super) fn ranges(&mut self) -> InOut<'_, f32> {
        Pointer::new(self.address(0), ())
    }

    /// The address of the element at `index`. Panics unless the buffer has `len` elements from there on.
    #[track_caller]
    pub fn at(&self, index: usize, len: usize) -> Address {
        let range = self.expect(index, len);
        for part in self.unwritten().take(&range) {
            must(self.memory.zero(4 * part.start, 4 * part.len()));
        }
        self.address(index)
    }

    /// The address of `len` elements that are overwritten next, all of them.
    #[track_caller]
    pub(super) fn overwritten(&mut self, index: usize, len: usize) -> Address {
        let range = self.expect(index, len);
        self.unwritten().take(&range);
        self.address(index)
    }

    /// Whether `len` elements are zeros that were never written, so that what would be added to all of them can be stored.
    #[track_caller]
    pub(super) fn is_unwritten(&self, index: usize, len: usize) -> bool {
        let range = self.expect(index, len);
        self.unwritten().contains(&range)
    }

    /// The address of `len` elements that a product adds to next, and its factor beta of what is there.
    #[track_caller]
    pub(super) fn sum(&mut self, index: usize, len: usize) -> (Address, f32) {
        if self.is_unwritten(index, len) { (self.overwritten(index, len), 0.0) } else { (self.at(index, len), 1.0) }
    }
}

/// For each query and head the logarithm of the sum of a row's exponentials, which normalises its probabilities: `[T, heads]`, to
/// the base of the form of attention that made it.
pub struct Normaliser(pub(super) Array<f32>);

/// Running sums in f64.
pub struct Scores(pub(super) Array<f64>);

/// Row numbers, token ids or class ids (u32), on the GPU and on the host.
pub struct Indices {
    pub(super) host: Vec<u32>,
    pub(super) on_gpu: Array<u32>,
}

impl Indices {
    /// Number of indices.
    pub fn len(&self) -> usize {
        self.host.len()
    }

    /// Whether it is empty.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty()
    }

    /// The numbers, for a kernel that reads them.
    pub(super) fn input(&self) -> In<'_, u32> {
        self.on_gpu.input()
    }
}

/// The chosen experts of each token and their weights, with the probabilities for the backward.
pub struct Routing {
    /// `[T·K]`, by decreasing probability.
    pub(super) ids: Array<u32>,
    /// F32 `[T, K]`
    pub(super) weights: Tensor,
    /// Softmax over all experts, F32 `[T, E]`.
    pub(super) probabilities: Tensor,
    pub(super) renormalize: bool,
}

impl Routing {
    /// Tokens, T.
    pub fn tokens(&self) -> usize {
        self.weights.rows
    }

    /// Experts per token, K.
    pub fn top_k(&self) -> usize {
        self.weights.cols
    }
}

/// A stable counting sort by expert of the routed rows (t, k), in order of t·K + k. It stays on the GPU, and the host
/// does not wait for it.
pub struct Dispatch {
    /// Rows of all experts together, R.
    pub(super) rows: usize,
    /// Number of experts, E.
    pub(super) num_experts: usize,
    /// Experts per token, K.
    pub(super) top_k: usize,
    /// `[E + 1]`: expert `e` owns sorted rows `offsets[e]..offsets[e + 1]`.
    pub(super) offsets: Array<u32>,
    /// The offsets on the host, once they have been read.
    pub(super) host_offsets: std::sync::OnceLock<Vec<u32>>,
    /// The permutation of the rows; `None` for [`one_group`](super::ops::dispatch::one_group), whose rows have no
    /// tokens.
    pub(super) order: Option<RowOrder>,
}

/// The permutation between tokens and sorted rows.
pub(super) struct RowOrder {
    /// `[T·K]`: the sorted row of each (t, k).
    pub(super) row_of: Array<u32>,
    /// `[R]`: t·K + k of each sorted row.
    pub(super) slot_of: Array<u32>,
}

impl Dispatch {
    /// Panics for rows without tokens.
    pub(super) fn order(&self) -> &RowOrder {
        self.order.as_ref().expect("rows that tokens were routed to")
    }

    pub(super) fn tokens(&self) -> usize {
        self.rows / self.top_k
    }
}

/// Packed sequences and the rotary angles of their positions.
pub struct Sequences {
    /// The packing on the host.
    pub(super) packing: crate::backend::Packing,
    /// `[sequences + 1]`: row offsets of the queries.
    pub(super) queries: Array<u32>,
    /// `[sequences + 1]`: row offsets of the keys.
    pub(super) keys: Array<u32>,
    /// `[T]`: position of each query row within its sequence.
    pub(super) positions: Array<u32>,
    /// The angles of at least these positions.
    pub(super) angles: std::sync::Arc<Angles>,
}

/// `[positions, half]`: cos and sin of the angles, times the rope's scale.
pub(super) struct Angles {
    pub(super) rope: crate::backend::Rope,
    pub(super) positions: usize,
    pub(super) cos: Array<f32>,
    pub(super) sin: Array<f32>,
}
