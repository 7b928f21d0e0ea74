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
    for (bytes, tiles, steps) in [(4096, 1, 32), (8192, 1, 64), (8192, 2, 64), (16384, 6, 64), (640, 3, 5), (100, 1, 1)]
    {
        // Of each tile, the cache lines that it asks for.
        let of_tile = |tile: usize| {
            let ahead = Ahead::of(w.as_ptr(), bytes, tile * steps, tiles * steps);
            let first = (ahead.start as usize - w.as_ptr() as usize) / Ahead::LINE;
            first..first + steps * ahead.lines
        };
        let lines: Vec<usize> = (0..tiles).flat_map(of_tile).collect();
        let all = bytes.div_ceil(Ahead::LINE);
        assert!(lines.iter().copied().eq(0..lines.len()), "{bytes} {tiles} {steps}: one after another");
        assert!((all..all + tiles * steps).contains(&lines.len()), "{bytes} {tiles} {steps}: {} of {all}", lines.len());
    }
}
