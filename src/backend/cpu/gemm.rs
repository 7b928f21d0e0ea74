//! Dense matrix products in f32 on one thread (the only place that calls the `gemm` crate), and their tiling for several
//! threads. `dot` has those of forward passes, `product/` those of bf16 values.
//!
//! A product is tiled by its shape alone ([`TileSize::choose`]); each tile is one task on one thread: a call of `gemm`, or, in a
//! forward, of `dot`. The tiles of all experts form one list of tasks, which balances uneven experts as well as a single large
//! product. No sum depends on the number of threads.

use std::marker::PhantomData;

use ::gemm::Parallelism;

use super::parallel::SharedSlice;

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
    /// `smallest` is reached, the smallest efficient size. The choice depends only on shapes.
    pub(super) fn choose(heights: impl Iterator<Item = usize> + Clone, width: usize, smallest: Self) -> Self {
        let mut size = Self { rows: Self::LARGEST.rows, cols: Self::LARGEST.cols };
        let tasks = |t: Self| heights.clone().map(|m| m.div_ceil(t.rows)).sum::<usize>() * width.div_ceil(t.cols);
        loop {
            let smaller = if size.rows > smallest.rows && size.rows >= size.cols {
                Self { rows: size.rows / 2, ..size }
            } else if size.cols > smallest.cols {
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
    /// The smallest efficient size of products by `gemm`.
    pub(super) const SMALLEST: Self = Self { rows: 128, cols: 256 };

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
            matmul(MatrixMut::new(&mut y, m, n, n), Matrix::new(&x, m, k, k), Matrix::new(&w, n, k, k).t(), 1.0, false);
            assert_eq!(y, want, "{m} {n} {k}");
            matmul(MatrixMut::new(&mut y, m, n, n), Matrix::new(&x, m, k, k), Matrix::new(&w, n, k, k).t(), 2.0, true);
            assert!(y.iter().zip(&want).all(|(y, w)| *y == 3.0 * w), "{m} {n} {k}");
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
        fn choose(heights: impl Iterator<Item = usize> + Clone, width: usize) -> TileSize {
            TileSize::choose(heights, width, TileSize::SMALLEST)
        }
        assert_eq!(choose(std::iter::repeat_n(230, 64), 1024), TileSize { rows: 512, cols: 512 });
        assert_eq!(choose(std::iter::once(1840), 1024), TileSize { rows: 256, cols: 256 });
        assert_eq!(choose(std::iter::once(1), 64), TileSize { rows: 128, cols: 256 });
        assert_eq!(choose(std::iter::once(1 << 16), 4096), TileSize { rows: 512, cols: 512 });
        assert_eq!(choose(std::iter::empty(), 8), TileSize { rows: 128, cols: 256 });
        let narrow = TileSize { rows: 128, cols: 64 };
        assert_eq!(TileSize::choose(std::iter::once(1), 1024, narrow), narrow);
    }
}
