use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::collective::conformance::{self, on_threads};
use crate::collective::{all_agree, all_ok};
use crate::exit::{Coded, Failure};

/// [`run`] with a timeout in milliseconds.
fn run_ms<T: Send + 'static>(
    world_size: usize,
    timeout_ms: u64,
    rank_main: impl Fn(Threads) -> T + Send + Sync + 'static,
) -> Vec<RankOutcome<T>> {
    run(world_size, Duration::from_millis(timeout_ms), rank_main)
}

#[test]
fn one_to_four_ranks_conform() {
    for world_size in 1..=4 {
        let ran = Arc::new(AtomicUsize::new(0));
        let count = ran.clone();
        on_threads(world_size, move |rank| {
            conformance::check(&rank);
            count.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(ran.load(Ordering::Relaxed), world_size);
    }
}

#[test]
fn an_abort_ends_pending_operations() {
    let errors = on_threads(3, |rank| {
        if rank.rank() == 1 {
            rank.abort(exit::NOT_FINITE, "the loss of step 7 is NaN");
        }
        rank.barrier().unwrap_err()
    });
    for error in errors {
        assert_eq!(error.exit_code(), exit::NOT_FINITE);
        assert_eq!(error.to_string(), "rank 1 stopped the run: the loss of step 7 is NaN");
    }
}

#[test]
fn a_timeout_names_the_missing_rank() {
    let outcomes = run_ms(3, 100, |rank| {
        rank.set_activity("round 1, expert step 7");
        if rank.rank() == 2 {
            std::thread::sleep(Duration::from_millis(400));
        }
        rank.all_reduce_f32(&mut [0.0; 1000]).unwrap_err()
    });
    for error in outcomes.into_iter().map(RankOutcome::unwrap) {
        assert_eq!(error.exit_code(), exit::HANG);
        assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [2]), "{error}");
        assert!(error.to_string().contains("at all_reduce_f32 of 1000 in round 1, expert step 7 for"), "{error}");
    }
}

#[test]
fn a_rank_that_ended_is_named_without_a_timeout() {
    let errors = on_threads(2, |rank| (rank.rank() == 0).then(|| rank.barrier().unwrap_err()));
    assert_eq!(errors[0], Some(Error::RankEnded { rank: 0, ended: 1, at: "barrier".into() }));
}

#[test]
fn a_panic_aborts_the_group() {
    let outcomes = run_ms(2, 60_000, |rank| {
        assert_eq!(rank.rank(), 0, "rank 1 panics on purpose");
        rank.barrier().unwrap_err()
    });
    assert!(matches!(outcomes[0], RankOutcome::Done(Error::Aborted { rank: 1, code: exit::INTERNAL, .. })));
    assert!(matches!(&outcomes[1], RankOutcome::Panicked(text) if text.contains("rank 1 panics on purpose")));
    let alone = run_ms(1, 60_000, |_| {
        if true {
            panic!("alone")
        }
    });
    assert_eq!(alone, [RankOutcome::Panicked("alone".into())]);
}

#[test]
fn a_rank_that_hangs_does_not_block_the_end() {
    let hang = |rank: Threads| match rank.rank() {
        1 => loop {
            std::thread::park();
        },
        // Rank 0 waits for rank 1; rank 2 returns at once.
        0 => rank.barrier().err(),
        _ => None,
    };
    let outcomes = run_ms(2, 100, hang);
    assert!(matches!(&outcomes[0], RankOutcome::Done(Some(Error::Timeout { missing, .. })) if *missing == [1]));
    assert_eq!(outcomes[1], RankOutcome::Lost);
    let outcomes = run_ms(3, 100, move |rank| if rank.rank() == 0 { None } else { hang(rank) });
    assert_eq!(outcomes, [RankOutcome::Done(None), RankOutcome::Lost, RankOutcome::Done(None)]);
}

#[test]
fn mismatched_calls_are_found() {
    let lengths = on_threads(3, |rank| {
        rank.set_activity(if rank.rank() == 0 { "step 1" } else { "step 2" });
        rank.barrier().expect("activities are not compared");
        rank.all_reduce_f64(&mut vec![0.0; 4 + rank.rank() / 2]).unwrap_err()
    });
    for error in lengths {
        assert_eq!(error.exit_code(), exit::RANKS_DIFFER);
        let expected = "rank 2 is at all_reduce_f64 of 5 in step 2 while rank 0 is at all_reduce_f64 of 4 in step 1:";
        assert!(error.to_string().starts_with(expected), "{error}");
    }
    let ops = on_threads(2, |rank| if rank.rank() == 0 { rank.barrier() } else { rank.all_gather(&[]).map(drop) });
    assert!(ops.iter().all(|r| matches!(r, Err(Error::Mismatch { rank: 1, .. }))));
}

#[test]
fn a_disagreement_names_the_rank() {
    let same = on_threads(3, |rank| all_agree(&rank, "selection", b"abc"));
    assert!(same.iter().all(Result::is_ok));
    let other = on_threads(3, |rank| all_agree(&rank, "selection", &[rank.rank() as u8 / 2]).unwrap_err());
    for error in other {
        assert_eq!(error, Error::Disagreement { what: "selection".into(), rank: 2 });
    }
}

#[test]
fn all_ok_fails_on_all_ranks_if_one_fails() {
    let results = on_threads(4, |rank| {
        let id = rank.rank();
        assert_eq!(all_ok(&rank, Ok(id)).unwrap(), id);
        let mine = if id >= 2 { Err(Failure::new(exit::IO, format!("disk {id} is full"))) } else { Ok(()) };
        let error = all_ok(&rank, mine).unwrap_err();
        rank.barrier().expect("the group stays usable");
        (error.code(), error.to_string())
    });
    let expected =
        ["rank 2 stopped the run: disk 2 is full"; 2].into_iter().chain(["disk 2 is full", "disk 3 is full"]);
    assert_eq!(results, expected.map(|text| (exit::IO, text.to_owned())).collect::<Vec<_>>());
}
