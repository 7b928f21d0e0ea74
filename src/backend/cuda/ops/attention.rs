//! Causal attention over packed sequences with grouped queries and an optional window.

use crate::backend::cuda::gpu::{Address, Arg, Grid, Kernel};
use crate::backend::cuda::kernels::{Typed, kernel, typed};
use crate::backend::cuda::plan::AttentionForm;
use crate::backend::cuda::{Cuda, Sequences, Tensor};
use crate::backend::{Dtype, Heads};

/// The three kernels of a form, and what their blocks need.
struct Kernels {
    forward: Kernel,
    backward_queries: Kernel,
    backward_keys: Kernel,
    /// Rows of a block, of queries or of keys.
    rows: usize,
    threads: u32,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

impl Kernels {
    fn choose(cuda: &Cuda, heads: &Heads) -> Self {
        const FORWARD: Typed = typed!(ATTENTION, "attention");
        const BACKWARD_QUERIES: Typed = typed!(ATTENTION, "attention_backward_queries");
        const BACKWARD_KEYS: Typed = typed!(ATTENTION, "attention_backward_keys");
        let dtype = cuda.compute();
        match cuda.attention_form(heads.dim) {
            AttentionForm::Arithmetic => Self {
                forward: *FORWARD.of(dtype),
                backward_queries: *BACKWARD_QUERIES.of(dtype),
                backward_keys: *BACKWARD_KEYS.of(dtype),
                rows: 32,
                threads: 256,
                shared: 3 * 32 * (heads.dim | 1) * 4,
            },
            // A row is a head's padded width in BF16: 3 · 64 of them, twice 64 and twice 32, the same.
            AttentionForm::TensorCores(64) => Self {
                forward: kernel!(ATTENTION_MMA, "attention_64"),
                backward_queries: kernel!(ATTENTION_MMA, "attention_backward_queries_64"),
                backward_keys: kernel!(ATTENTION_MMA, "attention_backward_keys_64"),
                rows: 64,
                threads: 128,
                shared: 192 * 64 * 2,
            },
            AttentionForm::TensorCores(width) => Self {
                forward: kernel!(ATTENTION_MMA, "attention_128"),
                backward_queries: kernel!(ATTENTION_MMA, "attention_backward_queries_128"),
                backward_keys: kernel!(ATTENTION_MMA, "attention_backward_keys_128"),
                rows: 64,
                threads: 128,
                shared: 192 * width * 2,
            },
        }
    }

    /// A block for each tile of rows of each sequence and head.
    fn grid(&self, offsets: &[usize], heads: usize) -> Grid {
        let tiles: usize = offsets.windows(2).map(|w| (w[1] - w[0]).div_ceil(self.rows)).sum();
        Grid::row(tiles * heads, self.threads).shared(self.shared)
    }
}

/// q `[T, queries·dim]`; k, v `[keys, keys·dim]` → `[T, queries·dim]`.
pub fn attention(cuda: &Cuda, q: &Tensor, k: &Tensor, v: &Tensor, seqs: &Sequences, heads: &Heads) -> Tensor {
    check(cuda, q, k, v, seqs, heads);
    let y = cuda.tensor(q.rows(), q.cols(), q.dtype());
    let args = arguments([&y, q, k, v].map(Tensor::address), seqs, heads);
    let kernels = Kernels::choose(cuda, heads);
    cuda.launch(&kernels.forward, kernels.grid(&seqs.packing.queries, heads.queries), &args);
    y
}

/// (dq, dk, dv). The queries' pass leaves what normalises each row of probabilities for the keys' pass.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    cuda: &Cuda,
    dy: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    y: &Tensor,
    seqs: &Sequences,
    heads: &Heads,
) -> (Tensor, Tensor, Tensor) {
    check(cuda, q, k, v, seqs, heads);
    for (what, x) in [("dy of attention", dy), ("y of attention", y)] {
        x.expect_shape(what, q.rows(), q.cols());
        assert!(x.dtype() == q.dtype(), "{what} in {:?}, q in {:?}", x.dtype(), q.dtype());
    }
    let like = |x: &Tensor| cuda.tensor(x.rows(), x.cols(), x.dtype());
    let (dq, dk, dv) = (like(q), like(k), like(v));
    let [normaliser, delta] = [0; 2].map(|_| cuda.tensor(q.rows(), heads.queries, Dtype::F32));

    let kernels = Kernels::choose(cuda, heads);
    let args = arguments([&dq, &normaliser, &delta, dy, q, k, v, y].map(Tensor::address), seqs, heads);
    cuda.launch(&kernels.backward_queries, kernels.grid(&seqs.packing.queries, heads.queries), &args);
    let args = arguments([&dk, &dv, &normaliser, &delta, dy, q, k, v].map(Tensor::address), seqs, heads);
    cuda.launch(&kernels.backward_keys, kernels.grid(&seqs.packing.keys, heads.keys), &args);
    (dq, dk, dv)
}

/// The tensors, then the geometry.
fn arguments<const N: usize>(tensors: [Address; N], seqs: &Sequences, heads: &Heads) -> Vec<Arg> {
    let mut args = tensors.map(Arg::from).to_vec();
    args.extend([
        Arg::from(seqs.queries.address()),
        seqs.keys.address().into(),
        seqs.packing.len().into(),
        heads.queries.into(),
        heads.keys.into(),
        heads.dim.into(),
        heads.window.map_or(u64::MAX, |w| w as u64).into(),
    ]);
    args
}

fn check(cuda: &Cuda, q: &Tensor, k: &Tensor, v: &Tensor, seqs: &Sequences, heads: &Heads) {
    assert!(heads.keys > 0 && heads.queries.is_multiple_of(heads.keys), "{heads:?}");
    assert!((1..=256).contains(&heads.dim), "heads of width {}: at most 256 fit", heads.dim);
    assert!(heads.window != Some(0), "a window of no position");
    let p = &seqs.packing;
    for (q, k) in p.queries.windows(2).zip(p.keys.windows(2)) {
        assert!(q[1] - q[0] <= k[1] - k[0], "{} queries of {} keys", q[1] - q[0], k[1] - k[0]);
    }
    q.expect_shape("q", p.rows(), heads.queries * heads.dim);
    for (what, x) in [("k", k), ("v", v)] {
        x.expect_shape(what, p.keys[p.len()], heads.keys * heads.dim);
        assert!(x.dtype() == q.dtype(), "{what} in {:?}, q in {:?}", x.dtype(), q.dtype());
    }
    assert!(q.dtype() == cuda.compute(), "q in {:?}", q.dtype());
}
