//! Ranks over MPI. Each test starts its own test binary under `mpirun`; in each of those processes, [`worker`] runs one
//! rank.

use std::io::Read;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};
use std::{env, process};

use crate::CORES;
use crate::processes::{MARK, marked, mpirun};
use moewarden::collective::conformance::{self, on_threads};
use moewarden::collective::mpi::{self, Mpi};
use moewarden::collective::{Collective, Error, Leave, all_agree, all_ok, leave};
use moewarden::exit::{self, Coded, Failure};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const CASE: &str = "MOEWARDEN_MPI_CASE";

/// The collective timeout. A launch that takes longer noticed a failure only by this timeout.
const LONG: Duration = Duration::from_secs(60);
/// The collective timeout of the cases in which a rank hangs.
const SHORT: Duration = Duration::from_secs(2);

/// The result of a launch.
struct Ended {
    code: Option<i32>,
    text: String,
    took: Duration,
}

impl Ended {
    fn expect(&self, code: u8, lines: &[&str]) {
        assert_eq!(self.code, Some(code.into()), "{}", self.text);
        for line in lines {
            assert!(self.text.contains(line), "no \"{line}\" in\n{}", self.text);
        }
    }
}

/// Runs a case on `ranks` processes, and checks that no process outlives the launch.
fn launch(case: &str, ranks: usize) -> Ended {
    static LAUNCHES: AtomicU32 = AtomicU32::new(0);
    let _alone = CORES.write().unwrap_or_else(PoisonError::into_inner);
    let mark = format!("{}-{}", process::id(), LAUNCHES.fetch_add(1, Ordering::Relaxed));

    let mut mpirun = mpirun();
    mpirun.args(["-n", &ranks.to_string()]).arg(env::current_exe().unwrap());
    mpirun.args(["collective::worker", "--exact", "--ignored", "--nocapture", "--test-threads=1"]);
    mpirun.env(CASE, case).env(MARK, &mark).stdin(Stdio::null());
    let mut log = tempfile::tempfile().unwrap();
    mpirun.stdout(log.try_clone().unwrap()).stderr(log.try_clone().unwrap());

    let start = Instant::now();
    let mut child = mpirun.spawn().unwrap();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break Some(status);
        }
        if start.elapsed() > LONG * 2 {
            child.kill().unwrap();
            child.wait().unwrap();
            break None;
        }
        sleep(Duration::from_millis(20));
    };
    let took = start.elapsed();
    // A killed process takes a moment to disappear.
    while start.elapsed() < took + Duration::from_secs(5) && !marked(&mark).is_empty() {
        sleep(Duration::from_millis(50));
    }
    let mut text = String::new();
    std::io::Seek::rewind(&mut log).unwrap();
    log.read_to_string(&mut text).unwrap();
    let left = marked(&mark);
    left.iter().for_each(|process| process.signal(libc::SIGKILL));
    let left: Vec<_> = left.iter().map(|process| process.pid).collect();
    assert!(left.is_empty(), "{case}: processes {left:?} are left behind\n{text}");
    let status = status.unwrap_or_else(|| panic!("{case} does not end\n{text}"));
    Ended { code: status.code(), text, took }
}

/// Runs one rank of the case that the environment variable names. Never returns to the test harness.
#[test]
#[ignore = "the tests start it under mpirun"]
fn worker() {
    // With --include-ignored it also runs outside of mpirun: then there is no case to run.
    let Ok(case) = env::var(CASE) else { return };
    let code = std::panic::catch_unwind(|| play(&case)).unwrap_or(exit::INTERNAL);
    leave(code, if code == exit::OK { Leave::Together } else { Leave::Abort })
}

/// Prints a line in one write, so that the lines of several ranks do not mix.
fn say(line: &str) {
    _ = std::io::Write::write_all(&mut std::io::stdout(), format!("{line}\n").as_bytes());
}

fn join(timeout: Duration) -> Mpi {
    let stop_requested = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, stop_requested.clone()).unwrap();
    let c = mpi::init(timeout, stop_requested).unwrap();
    c.set_activity("round 1, expert step 7");
    c
}

/// Prints the error with which the group failed, and returns its exit code.
fn failed<T>(c: &Mpi, result: Result<T, Error>) -> u8 {
    let error = result.err().expect("the group has failed");
    say(&format!("rank {} got: {error}", c.rank()));
    assert_eq!(c.barrier().err().as_ref(), Some(&error), "a failed group stays failed");
    error.exit_code()
}

fn raise(signal: i32) {
    // SAFETY: sends a signal to this process only.
    unsafe { libc::raise(signal) };
}

fn play(case: &str) -> u8 {
    match case {
        "conform" => {
            let c = join(LONG);
            conformance::check(&c);
            say(&format!("rank {} of {} conforms", c.rank(), c.world_size()));
            exit::OK
        }
        "bits" => {
            let c = join(LONG);
            let n = c.world_size();
            for len in [1, 1000, 4096, 4097, 700_001] {
                let over_threads = on_threads(n, move |t| sums(&t, len)).remove(c.rank());
                assert!(sums(&c, len) == over_threads, "{len} values on {n} ranks");
            }
            exit::OK
        }
        "mismatch" => {
            let c = join(LONG);
            c.all_reduce_f32(&mut [1.0; 5]).unwrap();
            let len = if c.rank() == 2 { 1001 } else { 1000 };
            failed(&c, c.all_reduce_f32(&mut vec![0.0; len]))
        }
        "disagree" => {
            let c = join(LONG);
            let error = all_agree(&c, "selection", &[u8::from(c.rank() == 1)]).unwrap_err();
            say(&format!("rank {} got: {error}", c.rank()));
            error.exit_code()
        }
        "all-ok" => {
            let c = join(LONG);
            let mine = if c.rank() == 1 { Err(Failure::new(exit::IO, "the disk is full")) } else { Ok(()) };
            let failure = all_ok(&c, mine).unwrap_err();
            say(&format!("rank {} got: {failure}", c.rank()));
            failure.code()
        }
        "abort-0" | "abort-1" => {
            let c = join(LONG);
            if case.ends_with(&c.rank().to_string()) {
                // The others wait in an operation by now.
                sleep(Duration::from_millis(200));
                c.abort(exit::NOT_FINITE, "the loss of step 7 is NaN");
            }
            failed(&c, c.all_reduce_f64(&mut [0.0; 10]))
        }
        "panic" => {
            let c = join(LONG);
            assert!(c.rank() != 1, "rank 1 panics on purpose");
            failed(&c, c.barrier())
        }
        "killed" => {
            let c = join(LONG);
            c.barrier().unwrap();
            if c.rank() == 1 {
                sleep(Duration::from_millis(300));
                raise(libc::SIGKILL);
            }
            failed(&c, c.all_reduce_f32(&mut [0.0; 1000]))
        }
        "stopped-0" | "stopped-1" => {
            let c = join(SHORT);
            c.barrier().unwrap();
            if case.ends_with(&c.rank().to_string()) {
                raise(libc::SIGSTOP);
            }
            failed(&c, c.all_reduce_f32(&mut [0.0; 1000]))
        }
        // The signal arrives at some moment of an operation, most likely during the transfer.
        "stopped-within" => {
            let c = join(SHORT);
            if c.rank() == 1 {
                std::thread::spawn(|| {
                    sleep(Duration::from_millis(400));
                    // SAFETY: sends a signal to this process only.
                    unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
                });
            }
            let mut values = vec![0.0; 1 << 20];
            let error = std::iter::repeat_with(|| c.all_reduce_f32(&mut values)).find(Result::is_err);
            failed(&c, error.expect("an endless loop"))
        }
        // Rank 1 arrives first, rank 0 in time, and rank 2 never.
        "absent" => {
            let c = join(SHORT);
            c.barrier().unwrap();
            match c.rank() {
                0 => sleep(SHORT / 2),
                2 => sleep(LONG),
                _ => {}
            }
            failed(&c, c.barrier())
        }
        "told-to-stop" => {
            let c = join(LONG);
            c.barrier().unwrap();
            match c.rank() {
                1 => sleep(SHORT),
                _ => raise(libc::SIGTERM),
            }
            for _ in 0..3 {
                c.all_reduce_f32(&mut [0.0; 1000]).unwrap();
            }
            exit::REQUEUE
        }
        "never-done" => {
            let c = join(SHORT);
            if c.rank() == 1 {
                sleep(LONG);
            }
            exit::OK
        }
        "measure" => {
            let c = join(LONG);
            let lines = measure(&c);
            if c.rank() == 0 {
                lines.iter().for_each(|line| say(line));
            }
            exit::OK
        }
        _ => panic!("no case {case}"),
    }
}

/// The bytes of the sums of random values, by every summing operation.
fn sums(c: &dyn Collective, len: usize) -> Vec<u8> {
    let mut random = ChaCha8Rng::seed_from_u64((len * 10 + c.rank()) as u64);
    let mut doubles: Vec<f64> = (0..len).map(|_| random.random_range(-1.0..1.0)).collect();
    let mut floats: Vec<f32> = (0..len).map(|_| random.random_range(-1.0..1.0)).collect();
    let n = c.world_size();
    let counts: Vec<usize> =
        (0..n).map(|r| if r + 1 < n { len / (n + 1) } else { len - r * (len / (n + 1)) }).collect();
    let mut part = vec![0.0; counts[c.rank()]];
    c.reduce_scatter_f32(&floats, &counts, &mut part).unwrap();
    c.all_reduce_f64(&mut doubles).unwrap();
    c.all_reduce_f32(&mut floats).unwrap();
    let parts = part.iter().chain(&floats).flat_map(|x| x.to_bits().to_le_bytes());
    parts.chain(doubles.iter().flat_map(|x| x.to_bits().to_le_bytes())).collect()
}

#[test]
fn one_to_four_ranks_conform() {
    for ranks in 1..=4 {
        let ended = launch("conform", ranks);
        ended.expect(exit::OK, &[]);
        for rank in 0..ranks {
            ended.expect(exit::OK, &[&format!("rank {rank} of {ranks} conforms")]);
        }
    }
}

#[test]
fn sums_are_bit_identical_to_those_over_threads() {
    for ranks in 1..=4 {
        launch("bits", ranks).expect(exit::OK, &[]);
    }
}

#[test]
fn an_error_on_one_rank_reaches_all() {
    for (case, code, error) in [
        (
            "mismatch",
            exit::RANKS_DIFFER,
            "rank 2 is at all_reduce_f32 of 1001 in round 1, expert step 7 while rank 0 is",
        ),
        ("disagree", exit::RANKS_DIFFER, "rank 1 has a different selection than rank 0"),
        ("abort-0", exit::NOT_FINITE, "rank 0 stopped the run: the loss of step 7 is NaN"),
        ("abort-1", exit::NOT_FINITE, "rank 1 stopped the run: the loss of step 7 is NaN"),
        ("panic", exit::INTERNAL, "rank 1 stopped the run: it panicked"),
        ("all-ok", exit::IO, "the disk is full"),
    ] {
        let ended = launch(case, 3);
        ended.expect(code, &[]);
        assert!(ended.took < LONG, "{case} took {:?}", ended.took);
        for rank in (0..3).filter(|r| case != "panic" || *r != 1) {
            let heard = ended.text.lines().any(|l| l.contains(&format!("rank {rank} got: ")) && l.contains(error));
            assert!(heard, "{case}: rank {rank} did not get \"{error}\"\n{}", ended.text);
        }
    }
}

#[test]
fn a_killed_rank_ends_the_run_and_is_named() {
    let ended = launch("killed", 3);
    assert!(ended.code.is_some_and(|code| code != 0), "{}", ended.text);
    assert!(ended.took < LONG, "{:?}", ended.took);
    let error = "rank 1 ended while rank 0 waited for it at all_reduce_f32 of 1000 in round 1, expert step 7";
    for rank in [0, 2] {
        assert!(
            ended.text.contains(&format!("rank {rank} got: {error}")),
            "rank {rank} did not get the error:\n{}",
            ended.text
        );
    }
}

#[test]
fn a_rank_that_hangs_is_named() {
    for (case, ranks, missing) in
        [("stopped-0", 3, 0), ("stopped-1", 3, 1), ("stopped-within", 2, 1), ("stopped-within", 3, 1), ("absent", 3, 2)]
    {
        let ended = launch(case, ranks);
        ended.expect(exit::HANG, &[&format!("in round 1, expert step 7 for rank(s) [{missing}]")]);
        assert!(ended.took < LONG, "{case} took {:?}", ended.took);
        if case == "absent" {
            ended.expect(exit::HANG, &["rank 0 got: rank 1 waited 2 s", "rank 1 got: rank 1 waited 2 s"]);
        }
    }
}

#[test]
fn a_waiting_rank_warns_once_after_a_stop_signal() {
    let ended = launch("told-to-stop", 3);
    ended.expect(exit::REQUEUE, &["1000 in round 1, expert step 7 for rank(s) [1]"]);
    assert_eq!(ended.text.matches("was told to stop").count(), 2, "one line of rank 0, one of rank 2\n{}", ended.text);
}

#[test]
fn finalize_times_out() {
    let ended = launch("never-done", 2);
    ended.expect(exit::HANG, &["waited 2 s for the other ranks to finish"]);
}

/// Measures a short all-reduce (latency) and a long reduce-scatter (bandwidth); lines of text.
fn measure(c: &dyn Collective) -> Vec<String> {
    let mut short = [1.0; 64];
    let latency = time(c, 300, || c.all_reduce_f64(&mut short).unwrap());
    let values = vec![1.0; 8 << 20];
    let mut part = vec![0.0; (8 << 20) / c.world_size()];
    let counts = vec![part.len(); c.world_size()];
    let long = time(c, 5, || c.reduce_scatter_f32(&values, &counts, &mut part).unwrap());
    vec![
        format!("all_reduce_f64 of 64 on {} ranks: {:.1} us", c.world_size(), latency * 1e6),
        format!("reduce_scatter_f32 of 8 Mi on {} ranks: {:.1} ms", c.world_size(), long * 1e3),
    ]
}

/// Mean seconds of `repeats` calls, after one warm-up call.
fn time(c: &dyn Collective, repeats: u32, mut call: impl FnMut()) -> f64 {
    call();
    c.barrier().unwrap();
    let start = Instant::now();
    (0..repeats).for_each(|_| call());
    start.elapsed().as_secs_f64() / f64::from(repeats)
}

#[test]
#[ignore = "prints measurements, asserts nothing"]
fn measures() {
    for ranks in [2, 4] {
        let over_threads = on_threads(ranks, |t| measure(&t)).remove(0);
        let over_mpi = launch("measure", ranks).text;
        for line in over_threads {
            println!("threads: {line}");
        }
        for line in over_mpi.lines().filter(|line| line.contains(" ranks: ")) {
            println!("mpi:     {line}");
        }
    }
}
