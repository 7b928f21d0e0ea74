//! Dense matrix products in f32 on one thread (the only place that calls the `gemm` crate), and their tiling for several
//! threads. `product/` has those of bf16 values.
//!
//! A product is tiled by its shape alone ([`TileSize::choose`]); each tile is one task and one `gemm` call on one
//! thread. The tiles of all experts form one list of tasks, which balances uneven experts as well as a single large
//! product. No sum depends on the number of threads.

use std::marker::PhantomData;
use std::ops::Range;

use ::gemm::Parallelism;

use super::parallel::{Scratch, SharedSlice};

/// A view of a matrix in a slice, with strides.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    values: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Matrix<'a> {
    /// A row-major matrix; consecutive rows are `stride` elements apart.
    pub(super) fn new(values: &'a [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check(values.len(), rows, cols, stride, 1);
        Self { values, rows, cols, row_stride: stride, col_stride: 1 }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        let Self { values, rows, cols, row_stride, col_stride } = self;
        Self { values, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride }
    }

    pub(super) fn rows(self) -> usize {
        self.rows
    }

    pub(super) fn cols(self) -> usize {
        self.cols
    }

    /// A row of a row-major matrix.
    pub(super) fn row(self, row: usize) -> &'a [f32] {
        assert!(
            row < self.rows && self.col_stride == 1,
            "row {row} of {}, columns {} apart",
            self.rows,
            self.col_stride
        );
        &self.values[row * self.row_stride..][..self.cols]
    }

    /// Some columns.
    fn columns(self, columns: Range<usize>) -> Self {
        Self {
            values: &self.values[(columns.start * self.col_stride).min(self.values.len())..],
            cols: columns.len(),
            ..self
        }
    }
}

/// A mutable view of a matrix, with strides. It has exclusive access to the elements of the matrix.
pub(super) struct MatrixMut<'a> {
    start: *mut f32,
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
    life: PhantomData<&'a mut [f32]>,
}

impl<'a> MatrixMut<'a> {
    /// A row-major matrix; consecutive rows are `stride` elements apart.
    pub(super) fn new(values: &'a mut [f32], rows: usize, cols: usize, stride: usize) -> Self {
        check(values.len(), rows, cols, stride, 1);
        Self { start: values.as_mut_ptr(), rows, cols, row_stride: stride, col_stride: 1, life: PhantomData }
    }

    /// As [`Self::new`], starting at element `at` of a slice that other tasks write too.
    ///
    /// # Safety
    /// Nothing else may access the elements of this matrix during its lifetime.
    pub(super) unsafe fn shared(
        values: &'a SharedSlice<'_, f32>,
        at: usize,
        rows: usize,
        cols: usize,
        stride: usize,
    ) -> Self {
        let (start, len) = values.tail(at);
        check(len, rows, cols, stride, 1);
        Self { start, rows, cols, row_stride: stride, col_stride: 1, life: PhantomData }
    }

    /// The transpose.
    pub(super) fn t(self) -> Self {
        let Self { start, rows, cols, row_stride, col_stride, life } = self;
        Self { start, rows: cols, cols: rows, row_stride: col_stride, col_stride: row_stride, life }
    }

    /// (rows, columns)
    pub(super) fn shape(&self) -> (usize, usize) {
        (self.rows, self.cols)
    }

    /// A row of a row-major matrix.
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [f32] {
        assert!(
            row < self.rows && self.col_stride == 1,
            "row {row} of {}, columns {} apart",
            self.rows,
            self.col_stride
        );
        // SAFETY: the row is inside the slice (by `check`), and this matrix has exclusive access to it.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(row * self.row_stride), self.cols) }
    }

    /// The same matrix, for a shorter time.
    fn reborrow(&mut self) -> MatrixMut<'_> {
        MatrixMut { life: PhantomData, ..*self }
    }
}

fn check(len: usize, rows: usize, cols: usize, row_stride: usize, col_stride: usize) {
    let inside = rows == 0 || cols == 0 || (rows - 1) * row_stride + (cols - 1) * col_stride < len;
    assert!(inside, "a [{rows}, {cols}] matrix with strides ({row_stride}, {col_stride}) exceeds {len} elements");
}

fn check_shapes(dst: &MatrixMut<'_>, a: &Matrix<'_>, b: &Matrix<'_>) {
    let fits = a.cols == b.rows && dst.rows == a.rows && dst.cols == b.cols;
    assert!(fits, "[{}, {}] = [{}, {}] · [{}, {}]", dst.rows, dst.cols, a.rows, a.cols, b.rows, b.cols);
}

/// dst = scale · a · b, or, if `accumulate`, dst += scale · a · b, on this thread.
pub(super) fn matmul(dst: MatrixMut<'_>, a: Matrix<'_>, b: Matrix<'_>, scale: f32, accumulate: bool) {
    check_shapes(&dst, &a, &b);
    // SAFETY: all three matrices are inside their slices (by `check`; transposing keeps the set of elements), and dst
    // has exclusive access (`MatrixMut`), so it overlaps neither a nor b.
    unsafe {
        ::gemm::gemm(
            dst.rows,
            dst.cols,
            a.cols,
            dst.start,
            dst.col_stride as isize,
            dst.row_stride as isize,
            accumulate,
            a.values.as_ptr(),
            a.col_stride as isize,
            a.row_stride as isize,
            b.values.as_ptr(),
            b.col_stride as isize,
            b.row_stride as isize,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
}

/// y = x · wᵀ for row-major x `[m, k]`, w `[n, k]`, y `[m, n]`.
///
/// The `gemm` kernel computes a column-major result and needs one operand contiguous along its rows; otherwise it packs
/// (transposes) that operand. Computed directly into y, the operand to pack is w, which costs as much as multiplying
/// about 100 rows. So unless x is much taller than w, compute yᵀ from xᵀ, both in scratch memory: [`transpose`] is
/// several times as fast as the kernel's packing. A single row takes the same way, and so does a w of few rows: otherwise `gemm`
/// takes kernels of its own for them, whose sums have another order.
///
/// The sums of a row do not depend on the other rows, nor on their number: generated tokens would depend on the batch.
pub(super) fn matmul_nt(y: MatrixMut<'_>, x: Matrix<'_>, w: Matrix<'_>) {
    let (m, n, k) = (x.rows, w.rows, x.cols);
    if m > 4 * n && n >= 8 {
        return matmul_by_depth(y, x, w.t());
    }
    // Padded to whole SIMD vectors; rows beyond m are zero.
    let height = m.next_multiple_of(16);
    let mut x_t = Scratch::take(k * height);
    let mut y_t = Scratch::take(n * height);
    x_t.chunks_exact_mut(height).for_each(|column| column[m..].fill(0.0));
    transpose(x, MatrixMut::new(&mut x_t, k, m, height));
    let left = Matrix::new(&x_t, k, height, height).t();
    matmul_by_depth(MatrixMut::new(&mut y_t, n, height, height).t(), left, w.t());
    transpose(Matrix::new(&y_t, n, m, height), y);
}

/// dst = a · b, one block of [`depth_blocks`] after the other.
fn matmul_by_depth(mut dst: MatrixMut<'_>, a: Matrix<'_>, b: Matrix<'_>) {
    if a.cols == 0 {
        return matmul(dst, a, b, 1.0, false);
    }
    for depth in depth_blocks(a.cols) {
        matmul(dst.reborrow(), a.columns(depth.clone()), b.t().columns(depth.clone()).t(), 1.0, depth.start > 0);
    }
}

/// The order of a sum over `depth` products: within each of these blocks one fused multiply-add after the other, beginning at 0, then
/// the sums of the blocks. `gemm` takes no block apart that is as short; left to itself, it chooses blocks by the number of rows and
/// by the processor's caches.
pub(super) fn depth_blocks(depth: usize) -> impl Iterator<Item = Range<usize>> {
    const LONGEST: usize = 512;
    let len = depth.div_ceil(depth.div_ceil(LONGEST).max(1)).max(1);
    (0..depth).step_by(len).map(move |at| at..depth.min(at + len))
}

/// dst = srcᵀ, both row-major.
fn transpose(src: Matrix<'_>, dst: MatrixMut<'_>) {
    let (rows, cols) = (src.rows, src.cols);
    assert!(dst.rows == cols && dst.cols == rows && src.col_stride == 1 && dst.col_stride == 1);
    let from = src.values.as_ptr();
    let (whole_rows, whole_cols) = (rows / 4 * 4, cols / 4 * 4);
    // Four rows of dst at a time, each written from beginning to end: rows are often 4 KiB apart and so compete for the
    // same L1 cache set, and blocks that write to more rows at once cause conflict misses.
    for j in (0..whole_cols).step_by(4) {
        for i in (0..whole_rows).step_by(4) {
            // SAFETY: the block is inside both matrices, which are inside their slices; dst has exclusive access, so
            // they do not overlap; all accesses are unaligned.
            unsafe {
                let row = |r: usize| from.add((i + r) * src.row_stride + j).cast::<[f32; 4]>().read_unaligned();
                for (c, column) in transpose_4x4([row(0), row(1), row(2), row(3)]).into_iter().enumerate() {
                    dst.start.add((j + c) * dst.row_stride + i).cast::<[f32; 4]>().write_unaligned(column);
                }
            }
        }
    }
    for j in 0..cols {
        for i in if j < whole_cols { whole_rows } else { 0 }..rows {
            // SAFETY: (i, j) is inside src, so (j, i) is inside dst, which has exclusive access.
            unsafe { *dst.start.add(j * dst.row_stride + i) = *from.add(i * src.row_stride + j) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose_4x4(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    use std::arch::x86_64::{__m128, _mm_movehl_ps, _mm_movelh_ps, _mm_unpackhi_ps, _mm_unpacklo_ps};
    let [a, b, c, d] = rows.map(bytemuck::cast::<[f32; 4], __m128>);
    // SAFETY: SSE is part of every x86-64 processor.
    let columns = unsafe {
        let (ab, cd) = (_mm_unpacklo_ps(a, b), _mm_unpacklo_ps(c, d));
        let (ab_high, cd_high) = (_mm_unpackhi_ps(a, b), _mm_unpackhi_ps(c, d));
        [_mm_movelh_ps(ab, cd), _mm_movehl_ps(cd, ab), _mm_movelh_ps(ab_high, cd_high), _mm_movehl_ps(cd_high, ab_high)]
    };
    columns.map(bytemuck::cast::<__m128, [f32; 4]>)
}

#[cfg(not(target_arch = "x86_64"))]
#[inline(always)]
fn transpose_4x4(rows: [[f32; 4]; 4]) -> [[f32; 4]; 4] {
    std::array::from_fn(|j| std::array::from_fn(|i| rows[i][j]))
}

/// The tile size of a product's result: `rows` by `cols`. The last tiles may be smaller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TileSize {
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl TileSize {
    /// Chooses the tile size, that is, how much parallelism is across products (experts) and how much inside each.
    ///
    /// `heights` are the numbers of rows of the products, which all have `width` columns. Many products get large
    /// tiles, for which the kernel is most efficient. Otherwise tiles shrink until there are [`Self::TASKS`] of them or
    /// the smallest efficient size is reached. The choice depends only on shapes.
    pub(super) fn choose(heights: impl Iterator<Item = usize> + Clone, width: usize) -> Self {
        let mut size = Self { rows: Self::LARGEST.rows, cols: Self::LARGEST.cols };
        let tasks = |t: Self| heights.clone().map(|m| m.div_ceil(t.rows)).sum::<usize>() * width.div_ceil(t.cols);
        loop {
            let smaller = if size.rows > Self::SMALLEST.rows && size.rows >= size.cols {
                Self { rows: size.rows / 2, ..size }
            } else if size.cols > Self::SMALLEST.cols {
                Self { cols: size.cols / 2, ..size }
            } else {
                return size;
            };
            if tasks(size) >= Self::TASKS {
                return size;
            }
            size = smaller;
        }
    }

    /// Enough tasks to keep some tens of cores busy.
    const TASKS: usize = 32;
    const LARGEST: Self = Self { rows: 512, cols: 512 };
    const SMALLEST: Self = Self { rows: 128, cols: 256 };

    /// The tiles of an `[m, n]` result, each as `(rows, cols)`.
    pub(super) fn tiles(
        self,
        m: usize,
        n: usize,
    ) -> impl Iterator<Item = (std::ops::Range<usize>, std::ops::Range<usize>)> {
        let split = |len: usize, step: usize| (0..len).step_by(step).map(move |at| at..len.min(at + step));
        split(n, self.cols).flat_map(move |cols| split(m, self.rows).map(move |rows| (rows, cols.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(n: usize) -> Vec<f32> {
        (0..n).map(|i| ((i * 37 + 11) % 17) as f32 - 8.0).collect()
    }

    #[test]
    fn products_of_small_integers_are_exact_in_every_orientation() {
        for (m, n, k) in [(1, 1, 1), (5, 3, 7), (64, 9, 33), (130, 17, 40), (3, 100, 300), (90, 20, 5), (7, 7, 0)] {
            let (x, w) = (values(m * k), values(n * k));
            let want: Vec<f32> =
                (0..m * n).map(|i| (0..k).map(|c| x[i / n * k + c] * w[i % n * k + c]).sum()).collect();
            let mut y = vec![f32::NAN; m * n];
            matmul_nt(MatrixMut::new(&mut y, m, n, n), Matrix::new(&x, m, k, k), Matrix::new(&w, n, k, k));
            assert_eq!(y, want, "{m} {n} {k}");
            matmul(MatrixMut::new(&mut y, m, n, n), Matrix::new(&x, m, k, k), Matrix::new(&w, n, k, k).t(), 2.0, true);
            assert!(y.iter().zip(&want).all(|(y, w)| *y == 3.0 * w), "{m} {n} {k}");
        }
    }

    #[test]
    fn a_row_does_not_depend_on_the_other_rows() {
        let noise = |n: usize| -> Vec<f32> {
            (0..n as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 9) as f32 / 8_388_608.0 - 0.5).collect()
        };
        for (n, k) in [(1, 300), (1, 1500), (3, 768), (6, 64), (8, 768), (30, 2), (40, 1536), (64, 1025), (100, 513)] {
            let most = 5 * n + 70;
            let (x, w) = (noise(most * k), noise(n * k));
            let product = |m: usize| {
                let mut y = vec![f32::NAN; m * n];
                matmul_nt(MatrixMut::new(&mut y, m, n, n), Matrix::new(&x, m, k, k), Matrix::new(&w, n, k, k));
                y
            };
            let all = product(most);
            for m in [1, 2, 16, 17, 64, 65, 4 * n, 4 * n + 1] {
                assert!(product(m)[..] == all[..m * n], "[{m}, {k}] · [{k}, {n}]");
            }
        }
    }

    #[test]
    fn tiles_cover_the_result_once() {
        for (m, n) in [(0, 5), (1, 1), (513, 700), (230, 1024)] {
            let mut seen = vec![0; m * n];
            for (rows, cols) in (TileSize { rows: 128, cols: 256 }).tiles(m, n) {
                rows.for_each(|i| cols.clone().for_each(|j| seen[i * n + j] += 1));
            }
            assert!(seen.iter().all(|&s| s == 1));
        }
    }

    #[test]
    fn many_experts_get_large_tiles_and_a_single_product_small_ones() {
        assert_eq!(TileSize::choose(std::iter::repeat_n(230, 64), 1024), TileSize { rows: 512, cols: 512 });
        assert_eq!(TileSize::choose(std::iter::once(1840), 1024), TileSize { rows: 256, cols: 256 });
        assert_eq!(TileSize::choose(std::iter::once(1), 64), TileSize { rows: 128, cols: 256 });
        assert_eq!(TileSize::choose(std::iter::once(1 << 16), 4096), TileSize { rows: 512, cols: 512 });
        assert_eq!(TileSize::choose(std::iter::empty(), 8), TileSize { rows: 128, cols: 256 });
    }
}
