//! Causal attention over packed sequences with grouped queries and an optional window.

use crate::backend::Heads;
use crate::backend::cuda::gpu::Grid;
use crate::backend::cuda::plan::AttentionForm;
use crate::backend::cuda::{Cuda, Normaliser, Sequences, Tensor, kernels};

/// The form of a call and its launch configuration.
struct Tiling {
    form: AttentionForm,
    /// Rows per block, of queries or of keys.
    rows: usize,
    threads: u32,
    /// Bytes of dynamic shared memory.
    shared: usize,
}

impl Tiling {
    fn choose(cuda: &Cuda, heads: &Heads, backward: bool) -> Self {
        let form = cuda.attention_form(heads.dim);
        match form {
            AttentionForm::Arithmetic => Self { form, rows: 32, threads: 256, shared: 3 * 32 * (heads.dim | 1) * 4 },
            // 3 · 64 rows of a head's padded width in BF16, backward 2 · 64 and 4 · 32.
            AttentionForm::TensorCores(width) => {
                Self { form, rows: 64, threads: 128, shared: if backward { 256 } else { 192 } * width * 2 }
            }
        }
    }

    /// One block per tile of rows, for each sequence and head.
    fn grid(&self, offsets: &[usize], heads: usize) -> Grid {
        let tiles: usize = offsets.windows(2).map(|w| (w[1] - w[0]).div_ceil(self.rows)).sum();
        Grid::row(tiles * heads, self.threads).shared(self.shared)
    }
}

/// The window as a kernel argument.
fn window(heads: &Heads) -> u64 {
    heads.window.map_or(u64::MAX, |w| w as u64)
}

/// q `[T, queries·dim]`; k, v `[keys, keys·dim]` → `[T, queries·dim]`, with the normaliser of each row of probabilities.
pub fn attention(
    cuda: &Cuda,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    seqs: &Sequences,
    heads: &Heads,
) -> (Tensor, Normaliser) {
    check(cuda, q, k, v, seqs, heads);
    let mut y = cuda.tensor(q.rows(), q.cols(), q.dtype());
    let mut normaliser = cuda.array::<f32>(q.rows() * heads.queries);
    let tiling = Tiling::choose(cuda, heads, false);
    kernels::attention(
        cuda,
        tiling.form,
        tiling.grid(&seqs.packing.queries, heads.queries),
        y.output(),
        normaliser.output(),
        q.input(),
        k.input(),
        v.input(),
        seqs.queries.input(),
        seqs.keys.input(),
        seqs.packing.len(),
        heads.queries,
        heads.keys,
        heads.dim,
        window(heads),
    );
    (y, Normaliser(normaliser))
}

/// (dq, dk, dv). The first kernel also stores δ of each row of probabilities for the second one.
#[allow(clippy::too_many_arguments)]
pub fn backward(
    cuda: &Cuda,
    dy: &Tensor,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    (y, Normaliser(normaliser)): (&Tensor, &Normaliser),
    seqs: &Sequences,
    heads: &Heads,
) -> (Tensor, Tensor, Tensor) {
    check(cuda, q, k, v, seqs, heads);
    assert!(normaliser.len() == q.rows() * heads.queries, "{} normalisers of {} rows", normaliser.len(), q.rows());
    for (what, x) in [("dy of attention", dy), ("y of attention", y)] {
        x.expect_shape(what, q.rows(), q.cols());
        assert!(x.dtype() == q.dtype(), "{what} in {:?}, q in {:?}", x.dtype(), q.dtype());
    }
    let like = |x: &Tensor| cuda.tensor(x.rows(), x.cols(), x.dtype());
    let (mut dq, mut dk, mut dv) = (like(q), like(k), like(v));
    let mut delta = cuda.array::<f32>(q.rows() * heads.queries);

    let tiling = Tiling::choose(cuda, heads, true);
    kernels::attention_backward_queries(
        cuda,
        tiling.form,
        tiling.grid(&seqs.packing.queries, heads.queries),
        dq.output(),
        delta.output(),
        normaliser.input(),
        dy.input(),
        q.input(),
        k.input(),
        v.input(),
        y.input(),
        seqs.queries.input(),
        seqs.keys.input(),
        seqs.packing.len(),
        heads.queries,
        heads.keys,
        heads.dim,
        window(heads),
    );
    kernels::attention_backward_keys(
        cuda,
        tiling.form,
        tiling.grid(&seqs.packing.keys, heads.keys),
        dk.output(),
        dv.output(),
        normaliser.input(),
        delta.input(),
        dy.input(),
        q.input(),
        k.input(),
        v.input(),
        seqs.queries.input(),
        seqs.keys.input(),
        seqs.packing.len(),
        heads.queries,
        heads.keys,
        heads.dim,
        window(heads),
    );
    (dq, dk, dv)
}

fn check(cuda: &Cuda, q: &Tensor, k: &Tensor, v: &Tensor, seqs: &Sequences, heads: &Heads) {
    assert!(heads.keys > 0 && heads.queries.is_multiple_of(heads.keys), "{heads:?}");
    assert!((1..=256).contains(&heads.dim), "heads of width {}: at most 256 fit", heads.dim);
    assert!(heads.window != Some(0), "a window of 0 positions");
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
