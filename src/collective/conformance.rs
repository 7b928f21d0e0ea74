//! The conformance suite of [`Collective`]. A test calls [`check`] on all ranks of a group, for every implementation.

use std::time::Duration;

use super::{Collective, threads};
use crate::exit;

/// Vector lengths: empty, one, odd, and longer than the chunks into which the implementations split long vectors.
const LENGTHS: [usize; 4] = [0, 1, 7, 200_003];

/// A value that depends on rank and index. Its sums over ranks are exact in f32 at even indices and rounded at odd
/// ones.
fn value(rank: usize, i: usize) -> f32 {
    let x = ((rank * 31 + i * 17) % 101) as f32 - 50.0;
    if i.is_multiple_of(2) { x } else { x / 3.0 }
}

/// Element `i` of the sum over the ranks, added in rank order.
fn expected(world_size: usize, i: usize) -> f32 {
    (1..world_size).fold(value(0, i), |sum, rank| sum + value(rank, i))
}

/// One length per rank, unequal and some of them 0, adding up to `total`.
fn uneven(world_size: usize, total: usize) -> Vec<usize> {
    let mut counts: Vec<_> = (0..world_size).map(|r| if r % 2 == 1 { 0 } else { total / (world_size + r) }).collect();
    counts[world_size - 1] += total - counts.iter().sum::<usize>();
    counts
}

/// Checks every operation, in a new group and in one that has failed. All ranks of a group call it together.
///
/// # Panics
/// If a result is wrong.
pub fn check(c: &dyn Collective) {
    check_operations(c);
    // The last rank fails while the others wait for it, or still leave the barrier, which the abort may overtake.
    for failure in 0..3 {
        let met = c.barrier();
        if c.rank() + 1 == c.world_size() {
            c.abort(exit::NOT_FINITE, "on purpose");
        } else if met.is_ok() {
            let mut values = vec![1.0; 10_000];
            c.all_reduce_f32(&mut values).expect_err("the group has failed");
        }
        c.barrier().expect_err("the group stays failed");
        c.renew().unwrap_or_else(|error| panic!("renewal {failure}: {error}"));
    }
    check_operations(c);
}

/// Checks every operation except aborts and renewals.
fn check_operations(c: &dyn Collective) {
    let (rank, n) = (c.rank(), c.world_size());
    assert!(rank < n, "rank {rank} of {n}");
    c.barrier().expect("barrier");

    for len in LENGTHS {
        let mut bytes: Vec<u8> = (0..len).map(|i| (i * 7 + rank * 13) as u8).collect();
        c.broadcast(&mut bytes).expect("broadcast");
        assert!(bytes.iter().enumerate().all(|(i, b)| *b == (i * 7) as u8), "broadcast of {len}");

        let mut values: Vec<f32> = (0..len).map(|i| value(rank, i)).collect();
        let counts = uneven(n, len);
        let mut part = vec![f32::NAN; counts[rank]];
        c.reduce_scatter_f32(&values, &counts, &mut part).expect("reduce_scatter_f32");
        let start: usize = counts[..rank].iter().sum();
        for (i, x) in part.iter().enumerate() {
            assert_close(*x, expected(n, start + i), "reduce_scatter_f32", start + i);
        }

        let mut whole = vec![f32::NAN; len];
        let bytes: Vec<_> = counts.iter().map(|n| n * size_of::<f32>()).collect();
        let (from, to) = (bytemuck::cast_slice(&part), bytemuck::cast_slice_mut(&mut whole));
        c.all_gather_into(from, &bytes, to).expect("all_gather_into");
        c.all_reduce_f32(&mut values).expect("all_reduce_f32");
        for (i, x) in values.iter().enumerate() {
            assert_close(*x, expected(n, i), "all_reduce_f32", i);
            assert_close(whole[i], expected(n, i), "all_gather_into", i);
        }

        let mut doubles: Vec<f64> = (0..len).map(|i| f64::from(value(rank, i))).collect();
        c.all_reduce_f64(&mut doubles).expect("all_reduce_f64");
        for (i, x) in doubles.iter().enumerate() {
            let sum: f64 = (0..n).map(|r| f64::from(value(r, i))).sum();
            // Four doubles of magnitude 50 in any order of summation.
            assert!((x - sum).abs() < 1e-12, "all_reduce_f64[{i}]: {x}, not {sum}");
        }

        // All ranks must hold the same bits, whatever order of summation the implementation uses.
        let bits: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        super::all_agree(c, "sum", &bits).expect("the same bits on all ranks");
    }

    let slow = super::with_heartbeat(c, || std::thread::sleep(Duration::from_millis(150 * rank as u64)));
    slow.expect("with_heartbeat");

    let mine: Vec<u8> = vec![rank as u8; rank * 3];
    let all = c.all_gather(&mine).expect("all_gather");
    assert_eq!(all, (0..n).map(|r| vec![r as u8; r * 3]).collect::<Vec<_>>(), "all_gather of different lengths");
    c.barrier().expect("barrier");
}

/// Runs `rank_main` on `world_size` ranks, each a thread, and returns their results by rank. For tests.
///
/// # Panics
/// If a rank panics or does not end within 60 s.
pub fn on_threads<T: Send + 'static>(
    world_size: usize,
    rank_main: impl Fn(threads::Threads) -> T + Send + Sync + 'static,
) -> Vec<T> {
    threads::run(world_size, Duration::from_secs(60), rank_main).into_iter().map(threads::RankOutcome::unwrap).collect()
}

fn assert_close(x: f32, y: f32, what: &str, i: usize) {
    // An implementation may sum in another order, which changes a few roundings; each rank adds at most 50.
    assert!((x - y).abs() < 1e-4, "{what}[{i}]: {x}, not {y}");
}
