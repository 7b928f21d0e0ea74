use super::*;
use crate::backend::HostTensor;

fn values(n: usize, seed: u32) -> Vec<f32> {
    let noise = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 7) % 4001;
    (0..n as u32).map(|i| noise(i) as f32 / 2000.0 - 1.0).collect()
}

/// The sum of one element, as the head of this module defines it.
fn element(x: &[f32], w: &[f32]) -> f32 {
    let of_slab = |(x, w): (&[f32], &[f32])| {
        let mut lanes = [0f32; LANES];
        for (i, (x, w)) in x.iter().zip(w).enumerate() {
            lanes[i % LANES] = x.mul_add(*w, lanes[i % LANES]);
        }
        let four = |x: &[f32]| (x[0] + x[2]) + (x[1] + x[3]);
        four(&lanes.chunks(4).map(four).collect::<Vec<_>>())
    };
    x.chunks(SLAB).zip(w.chunks(SLAB)).map(of_slab).reduce(|a, b| a + b).unwrap_or(0.0)
}

fn kernels() -> Vec<(&'static str, Kernel)> {
    let mut kernels = vec![("portable", portable::KERNEL)];
    #[cfg(target_arch = "x86_64")]
    for (name, is_supported, kernel) in
        [("AVX2", avx2::is_supported(), avx2::KERNEL), ("AVX-512", avx512::is_supported(), avx512::KERNEL)]
    {
        if is_supported {
            kernels.push((name, kernel));
        } else {
            eprintln!("skipped: this processor has no {name}");
        }
    }
    kernels
}

#[test]
fn every_element_is_the_same_sum_in_every_shape_and_by_every_instruction_set() {
    let shapes =
        [(1, 1, 1), (2, 9, 7), (3, 8, 16), (4, 1, 33), (5, 23, 1000), (9, 6, 1024), (17, 5, 1025), (131, 7, 20)];
    for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        for (m, n, k) in shapes.into_iter().chain([(6, 3, 3000), (33, 4, 2048)]) {
            let w = Weight::new(HostTensor::encode(dtype, vec![n + 3, k], &values((n + 3) * k, 5)));
            // x and y are parts of wider matrices.
            let (x, wide) = (values(m * (k + 2), 9), n + 5);
            let x = Matrix::new(&x, m, k, k + 2);
            let rows = w.read(2..n + 2);
            let mut want = vec![7.0; m * wide];
            for (i, y) in want.chunks_mut(wide).enumerate() {
                for (y, w) in y.iter_mut().zip(rows.chunks(k)) {
                    *y = element(x.row(i), w);
                }
            }
            for (name, kernel) in kernels() {
                // With the smaller cache, the panels of 131 rows are made in parts.
                for l2 in [1 << 15, 1 << 20] {
                    let mut y = vec![7.0; m * wide];
                    product_by(kernel, Caches { l2 }, MatrixMut::new(&mut y, m, n, wide), x, &w, 2..n + 2);
                    let same = y.iter().zip(&want).all(|(y, want)| y.to_bits() == want.to_bits());
                    assert!(same, "{name} {dtype:?} x [{m}, {k}], w [{n}, {k}], L2 {l2}");
                }
            }
        }
    }
}

#[test]
fn sums_over_no_depth_are_zero() {
    let w = Weight::new(HostTensor::from_f32(vec![3, 0], &[]));
    let mut y = [f32::NAN; 6];
    product(MatrixMut::new(&mut y, 2, 3, 3), Matrix::new(&[], 2, 0, 0), &w, 0..3);
    assert_eq!(y, [0.0; 6]);
}

#[test]
fn the_rows_of_w_that_follow_are_prefetched_once() {
    let w = vec![0u8; 1 << 16];
    // The cache lines of w that all tiles ask for, in a slab of 32 steps.
    let lines = |row_bytes: usize, bytes: usize, tiles: usize| -> Vec<usize> {
        let rows: [&[u8]; 4] = std::array::from_fn(|j| &w[j * row_bytes..][..bytes]);
        let of_tile = |tile: usize| {
            let ahead = Ahead::of(&rows, row_bytes, 32, tile, tiles);
            let first = (ahead.start as usize - w.as_ptr() as usize) / Ahead::LINE;
            first..first + 32 * ahead.lines
        };
        (0..tiles).flat_map(of_tile).collect()
    };
    for (row_bytes, tiles) in [(2048, 1), (2048, 2), (2048, 4), (2048, 9), (1024, 1), (1024, 2), (1024, 5)] {
        // The four rows that follow, of so many lines each.
        let next = row_bytes / 16..row_bytes / 8;
        assert_eq!(lines(row_bytes, row_bytes, tiles), next.collect::<Vec<_>>(), "{row_bytes} {tiles}");
    }
    // Half of longer rows: a tile asks for that half of one of them.
    let halves: Vec<usize> = (4..8).flat_map(|row| 64 * row..64 * row + 32).collect();
    assert_eq!(lines(4096, 2048, 6), halves);
    assert_eq!(lines(4096, 2048, 2), halves[..64]);
}
