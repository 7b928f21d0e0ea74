use super::*;
use crate::backend::Dtype;

/// The instructions that run on this processor. Says which do not.
fn available() -> Vec<Instructions> {
    let processor = Processor::detect();
    let (run, skipped): (Vec<_>, Vec<_>) = Instructions::ALL.into_iter().partition(|&i| processor.has(i));
    println!("products by {run:?}; skipped, because this processor lacks them: {skipped:?}");
    run
}

fn values(n: usize, seed: usize) -> Vec<f32> {
    (0..n).map(|i| (((i * 37 + seed * 11) % 17) as f32 - 8.0) / 4.0).collect()
}

fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect()
}

/// C of a product of `m` by `n` lines, `[m, n]`, with the block on one side.
fn product(products: &Products, block_side: Side, a: (&[Part<'_>], usize), b: (&[Part<'_>], usize)) -> Vec<f32> {
    let (m, n) = (a.1, b.1);
    let mut c = vec![f32::NAN; m * n];
    let mut seen = vec![0; m * n];
    let (block, stream) = if block_side == Side::A { (a, b) } else { (b, a) };
    let packed = products.block(block_side, block.0, 0..block.1);
    products.stream(&packed, stream.0, 0..stream.1, |tile| {
        for (i, row) in tile.a.clone().enumerate() {
            c[row * n + tile.b.start..][..tile.b.len()].copy_from_slice(tile.row(i));
            tile.b.clone().for_each(|j| seen[row * n + j] += 1);
        }
    });
    assert!(seen.iter().all(|&s| s == 1));
    c
}

/// A matrix in bf16 whose rows are stored in reverse order, behind three other columns and two other rows.
struct Scattered {
    bytes: Vec<u8>,
    index: Vec<u32>,
    stride: usize,
}

impl Scattered {
    fn new(x: &[f32], columns: usize) -> Self {
        let rows = x.len() / columns.max(1);
        let row = |i: usize| [&[9.0; 3], &x[i * columns..][..columns]].concat();
        let stored: Vec<f32> = [vec![9.0; columns + 3]].into_iter().chain((0..rows).rev().map(row)).flatten().collect();
        let index = [0, 0].into_iter().chain((0..rows).map(|i| (rows - i) as u32)).collect();
        Self { bytes: bf16_bytes(&stored), index, stride: columns + 3 }
    }

    fn part(&self) -> Part<'_> {
        let whole = Part::stored(Dtype::Bf16, &self.bytes, self.stride).indexed(Some(&self.index));
        whole.skip_rows(2).skip_columns(3)
    }
}

#[test]
fn lines_of_b_are_multiplied_as_they_are_stored() {
    let products = |l2: usize| Products::new(Instructions::Avx512Bf16, Caches { l2 });
    if !Processor::detect().has(Instructions::Avx512Bf16) || !products(1 << 20).takes_stored(Dtype::Bf16) {
        return eprintln!("skipped: this processor has no AVX-512 BF16");
    }
    assert!(!products(1 << 20).takes_stored(Dtype::F16));
    // Sums that round.
    let noise = |n: usize, seed: usize| -> Vec<f32> { values(n, seed).iter().map(|x| x * 0.3137 + 0.011).collect() };
    for (m, n, depth) in
        [(1, 32, 1), (3, 33, 7), (12, 64, 512), (13, 3, 1001), (150, 10, 2048), (40, 5, 4100), (14, 6, 4097), (2, 0, 8)]
    {
        let (a, b) = (noise(m * depth, m), bf16_bytes(&noise(n * depth, 3)));
        let product = |first: usize, lines: usize, l2: usize| {
            let products = products(l2);
            let block = products.block(Side::A, &[Part::activations(&a, depth).by_rows(depth)], first..first + lines);
            let mut c = vec![f32::NAN; lines * n];
            products.multiply_stored(&block, &b, depth, |tile| tile.copy_to(&mut c, n));
            // Activations that are stored in bf16 already.
            let rounded = bf16_bytes(&a);
            let part = Part::stored(Dtype::Bf16, &rounded, depth).by_rows(depth);
            let block = products.block(Side::A, &[part], first..first + lines);
            let mut of_stored = vec![f32::NAN; lines * n];
            products.multiply_stored(&block, &b, depth, |tile| tile.copy_to(&mut of_stored, n));
            assert_eq!(c, of_stored);
            c
        };
        let bits = |c: &[f32]| c.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        let whole = product(0, m, 1 << 20);
        assert_eq!(bits(&whole), bits(&product(0, m, 8 << 10)), "[{m}, {depth}] · [{depth}, {n}] with a small cache");
        for lines in [1, 5, 12] {
            let lines = lines.min(m);
            let first = (m - lines) / 2;
            let want = &whole[first * n..][..lines * n];
            assert_eq!(bits(want), bits(&product(first, lines, 1 << 20)), "{lines} of [{m}, {depth}] · [{depth}, {n}]");
        }
        let [a, b] = [bf16_bytes(&a), b.clone()].map(|bytes| -> Vec<f64> {
            bytes.as_chunks().0.iter().map(|x| half::bf16::from_le_bytes(*x).to_f64()).collect()
        });
        for (i, got) in whole.iter().enumerate() {
            let terms = || (0..depth).map(|d| a[i / n * depth + d] * b[i % n * depth + d]);
            let (exact, size) = (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>());
            assert!((f64::from(*got) - exact).abs() <= 1e-6 * size, "[{m}, {depth}] · [{depth}, {n}]: {got} {exact}");
        }
    }
}

#[test]
fn products_of_small_numbers_are_exact_in_every_orientation() {
    // Small caches, so that depth and lines are split.
    let caches = [Caches { l2: 8 << 10 }, Caches { l2: 1 << 20 }];
    for instructions in available() {
        for (m, n, k) in [(1, 1, 1), (5, 3, 7), (64, 9, 33), (130, 17, 40), (3, 100, 301), (37, 70, 128), (7, 7, 0)] {
            let (a, b) = (values(m * k, 1), values(n * k, 2));
            let want: Vec<f32> =
                (0..m * n).map(|i| (0..k).map(|d| a[i / n * k + d] * b[i % n * k + d]).sum()).collect();
            let transposed =
                |x: &[f32], rows: usize| -> Vec<f32> { (0..rows * k).map(|i| x[i % rows * k + i / rows]).collect() };
            let (a_t, b_t) = (transposed(&a, m), transposed(&b, n));
            let (a_bytes, b_bytes, a_t_bytes) = (bf16_bytes(&a), bf16_bytes(&b), bf16_bytes(&a_t));
            let f16: Vec<u8> = b_t.iter().flat_map(|x| half::f16::from_f32(*x).to_le_bytes()).collect();
            let (a_rows, b_columns) = (Scattered::new(&a, k), Scattered::new(&b_t, n));
            let a_ways = [
                a_rows.part().by_rows(k),
                Part::activations(&a, k).by_rows(k),
                Part::activations(&a_t, m).by_columns(k),
                Part::stored(Dtype::Bf16, &a_bytes, k).by_rows(k),
                Part::stored(Dtype::Bf16, &a_t_bytes, m).by_columns(k),
            ];
            let b_ways = [
                Part::activations(&b, k).by_rows(k),
                Part::activations(&b_t, n).by_columns(k),
                Part::stored(Dtype::Bf16, &b_bytes, k).by_rows(k),
                Part::stored(Dtype::F16, &f16, n).by_columns(k),
                b_columns.part().by_columns(k),
            ];
            for caches in caches {
                let products = Products::new(instructions, caches);
                for a in a_ways {
                    for b in b_ways {
                        for side in [Side::A, Side::B] {
                            assert_eq!(
                                product(&products, side, (&[a], m), (&[b], n)),
                                want,
                                "{instructions} {m} {n} {k}"
                            );
                        }
                    }
                }
                // The depth in two parts.
                let at = k / 2;
                let split = |x| {
                    [Part::activations(x, k).by_rows(at), Part::activations(&x[at.min(x.len())..], k).by_rows(k - at)]
                };
                assert_eq!(
                    product(&products, Side::B, (&split(&a), m), (&split(&b), n)),
                    want,
                    "{instructions} {m} {n} {k}"
                );
            }
        }
    }
}

#[test]
fn operands_are_rounded_to_bf16_and_sums_are_not() {
    // 1 + 2^-8 rounds to 1, 1 + 3·2^-8 to 1 + 2^-6.
    let (a, b) = ([1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0], [1.0, 1.0 / 4096.0]);
    for instructions in available() {
        let products = Products::new(instructions, Caches { l2: 1 << 20 });
        let part = |x| Part::activations(x, 2).by_rows(2);
        let got = product(&products, Side::A, (&[part(&a)], 1), (&[part(&b)], 1));
        assert_eq!(got, [1.0 + (1.0 + 1.0 / 64.0) / 4096.0], "{instructions}");
    }
}

#[test]
fn sums_do_not_depend_on_the_sizes_of_the_caches() {
    let noise = |n: usize, seed: u32| -> Vec<f32> {
        (0..n as u32)
            .map(|i| (i.wrapping_add(seed).wrapping_mul(2_654_435_761) >> 8) as f32 / 8_388_608.0 - 1.0)
            .collect()
    };
    let (m, n, k) = (40, 50, 700);
    let (a, b) = (noise(m * k, 1), noise(n * k, 99));
    for instructions in available() {
        let [small, large] = [Caches { l2: 8 << 10 }, Caches { l2: 8 << 20 }].map(|caches| {
            let products = Products::new(instructions, caches);
            let part = |x| Part::activations(x, k).by_rows(k);
            product(&products, Side::B, (&[part(&a)], m), (&[part(&b)], n))
        });
        assert_eq!(small, large, "{instructions}");
        let exact = |i: usize| -> f64 {
            let round = |x: f32| half::bf16::from_f32(x).to_f64();
            (0..k).map(|d| round(a[i / n * k + d]) * round(b[i % n * k + d])).sum()
        };
        for (i, got) in small.iter().enumerate() {
            assert!((f64::from(*got) - exact(i)).abs() < 1e-3, "{instructions}: {got} {}", exact(i));
        }
    }
}
