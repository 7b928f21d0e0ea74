//! SIGTERM and SIGUSR1: a run saves a checkpoint and ends with the requeue code; a second signal ends it at once.

use std::thread::sleep;
use std::time::Duration;

use moewarden::exit;
use rand::RngExt;

use super::campaign::{Tries, campaign};
use super::ranks::place;
use super::scene::{By, SOON, Scene, duration};

/// From the signal to the end.
const GRACE: Duration = Duration::from_secs(30);

#[test]
fn a_signal_at_any_point() {
    for &by in By::ALL {
        for action in ["term", "usr1"] {
            let row = format!("SIG{} to one rank, {}", action.to_uppercase(), by.name());
            campaign(&row, Tries::AtLeast(if by == By::Threads { 2 } else { 1 }), |i, random| {
                let scene = Scene::new();
                let place = place(i, random.random_range(0..2), random);
                let ended = scene.run(by, "", Some(&format!("{place},do={action}")));
                ended.expect(exit::REQUEUE, &["stopped by a signal, and saved", "--resume"]);
                ended.soon(GRACE);
                scene.resumes(by);
            });
        }
    }
}

/// As sent by a scheduler: to all processes, at any time.
#[test]
fn a_signal_from_outside() {
    for &by in By::ALL {
        let row = format!("SIGTERM or SIGUSR1 from outside, {}", by.name());
        campaign(&row, Tries::AtLeast(1), |i, random| {
            let scene = Scene::new();
            let mut run = scene.start(by, "", None);
            run.wait_for(|run| run.text().contains("options:"));
            sleep(duration(by).mul_f64(random.random_range(0.0..0.7)));
            let signal = [libc::SIGTERM, libc::SIGUSR1][i % 2];
            // Open MPI's mpirun forwards SIGUSR1; on SIGTERM it kills the ranks after a second.
            if by == By::Mpirun && signal == libc::SIGUSR1 {
                run.signal_launcher(signal);
            } else {
                (0..if by == By::Threads { 1 } else { 2 }).for_each(|rank| run.signal(rank, signal));
            }
            let ended = run.wait();
            ended.soon(GRACE);
            if ended.code == Some(exit::OK.into()) {
                scene.equals_undisturbed(&ended); // it ended before the signal
            } else {
                ended.expect(exit::REQUEUE, &["stopped by a signal, and saved"]);
                scene.resumes(by);
            }
        });
    }
}

/// As `timeout` of GNU coreutils sends its signal: to the program and to its process group.
#[test]
fn two_signals_at_once_are_one() {
    campaign("a signal twice at once, threads", Tries::AtLeast(2), |i, _| {
        let scene = Scene::new();
        let mut run = scene.start(By::Threads, "", None);
        run.wait_for(|run| run.text().contains("options:"));
        let signal = [libc::SIGTERM, libc::SIGUSR1][i % 2];
        run.signal(0, signal);
        sleep(Duration::from_millis(5)); // so that the system does not take them for one
        run.signal(0, signal);
        let ended = run.wait();
        ended.expect(exit::REQUEUE, &["stopped by a signal, and saved"]);
        scene.resumes(By::Threads);
    });
}

#[test]
fn a_second_signal_ends_the_run_at_once() {
    for &by in By::ALL {
        campaign(&format!("two signals, {}", by.name()), Tries::AtLeast(1), |_, random| {
            let scene = Scene::new();
            // A hanging rank cannot react to the first signal.
            let step = random.random_range(1..=6);
            let mut run = scene.start(by, "", Some(&format!("rank=1,at=step:{step},do=hang")));
            assert!(run.wait_for(|run| run.text().contains("MOEWARDEN_FAULT: ")));
            run.signal(0, libc::SIGTERM);
            sleep(Duration::from_millis(300));
            run.signal(0, libc::SIGTERM);
            let ended = run.wait();
            ended.expect(exit::TERMINATED, &[]);
            ended.soon(SOON);
            scene.resumes(by);
        });
    }
}
