//! One of two ranks dies, fails or hangs at any point: the other ends soon with the cause, and the run can be resumed.

use std::time::Duration;

use moewarden::exit;
use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::campaign::{Tries, campaign};
use super::saves::STAGES;
use super::scene::{By, SAVES, SOON, STEPS, Scene, TIMEOUT};

/// A number of collective operations that every rank reaches.
const COLLECTIVES: u64 = 100;

/// A fault point on a rank, of the `i`th of four kinds, in the syntax of `MOEWARDEN_FAULT`.
pub fn place(i: usize, rank: usize, random: &mut ChaCha8Rng) -> String {
    let (point, visits) = match i % 4 {
        0 => ("step", STEPS),
        1 => ("save", SAVES * STAGES[rank]),
        2 => ("collective", COLLECTIVES),
        _ => ("batch", STEPS / 2),
    };
    format!("rank={rank},at={point}:{}", random.random_range(1..=visits))
}

/// The description of a fault point in the messages of a failing rank.
fn in_words(place: &str) -> &'static str {
    match place {
        _ if place.contains("step") => "in round 1, ",
        _ if place.contains("save") => "in saving round_",
        _ if place.contains("batch") => "in identification",
        _ => "in ",
    }
}

/// Tries an action on a random rank at fault points of all kinds; `check` gets the rank and the fault point.
fn strikes(by: By, action: &str, check: impl Fn(&Scene, super::scene::Ended, usize, &str)) {
    let row = format!("do={action} on one rank, {}", by.name());
    // The process waits for threads that hang.
    let threads = if action == "hang" { 1 } else { 2 };
    campaign(&row, Tries::AtLeast(if by == By::Threads { threads } else { 1 }), |i, random| {
        let scene = Scene::new();
        let rank = random.random_range(0..2);
        let place = place(i, rank, random);
        let timeout = format!("--timeout {TIMEOUT}");
        let ended = scene.run(by, &timeout, Some(&format!("{place},do={action}")));
        ended.says(&["MOEWARDEN_FAULT: "]);
        ended.failed();
        check(&scene, ended, rank, &place);
        scene.resumes(by);
    });
}

#[test]
fn an_error_of_one_rank() {
    for &by in By::ALL {
        strikes(by, "fail", |_, ended, rank, place| {
            // Within a collective operation, a fault can only panic.
            let code = if place.contains("collective") { exit::INTERNAL } else { exit::IO };
            ended.expect(code, &["on purpose", &format!("rank {rank}"), in_words(place)]);
            ended.soon(SOON);
        });
    }
}

#[test]
fn a_panic_of_one_rank() {
    for &by in By::ALL {
        strikes(by, "panic", |_, ended, rank, place| {
            let whose = format!("rank {rank} of 2, {}", in_words(place));
            ended.expect(exit::INTERNAL, &["panicked: a panic on purpose", &whose]);
            ended.soon(SOON);
        });
    }
}

#[test]
fn a_rank_that_hangs() {
    for &by in By::ALL {
        strikes(by, "hang", |_, ended, rank, _| {
            ended.expect(exit::HANG, &["waited 5 s at ", " in ", &format!("for rank(s) [{rank}]")]);
            ended.soon(SOON + Duration::from_secs(TIMEOUT));
        });
    }
}

#[test]
#[cfg(feature = "mpi")]
fn a_process_that_is_stopped() {
    strikes(By::Mpirun, "stop", |_, ended, rank, _| {
        ended.expect(exit::HANG, &["waited 5 s at ", " in ", &format!("for rank(s) [{rank}]")]);
        ended.soon(SOON + Duration::from_secs(TIMEOUT));
    });
}

#[test]
#[cfg(feature = "mpi")]
fn a_process_that_is_killed() {
    strikes(By::Mpirun, "kill", |_, ended, rank, _| {
        ended.says(&[&format!("rank {rank} ended while rank {} waited for it at ", 1 - rank)]);
        ended.soon(SOON);
    });
}
