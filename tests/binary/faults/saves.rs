//! SIGKILL during a save: afterwards the old or the new checkpoint exists, never a mixture.

use std::time::Duration;

use rand::RngExt;

use super::campaign::{Tries, campaign};
use super::scene::{By, SAVES, SOON, Scene, duration, names};

/// Stages of a save, by rank.
pub const STAGES: [u64; 2] = [5, 3];

#[test]
fn killed_at_a_stage_of_a_save() {
    for &by in By::ALL {
        campaign(&format!("SIGKILL at a stage of a save, {}", by.name()), Tries::AtLeast50(1), |i, random| {
            let scene = Scene::new();
            // Ranks as threads are in one process.
            let rank = if by == By::Threads { 0 } else { i % 2 };
            let passing = random.random_range(1..=SAVES * STAGES[rank]);
            let ended = scene.run(by, "", Some(&format!("rank={rank},at=save:{passing},do=kill")));
            ended.says(&["MOEWARDEN_FAULT: Kill"]);
            ended.failed();
            ended.soon(SOON);
            scene.resumes(by);
        });
    }
}

#[test]
fn killed_at_any_time_of_a_save() {
    for &by in By::ALL {
        campaign(&format!("SIGKILL at a moment of a save, {}", by.name()), Tries::AtLeast50(1), |_, random| {
            let scene = Scene::new();
            let mut run = scene.start(by, "", None);
            let save = random.random_range(0..SAVES);
            let pause = random.random_range(0..4000);
            // Counts saves by their temporary folders.
            let (mut seen, mut last) = (0, None);
            let begun = run.wait_for(|_| {
                let partial = names(&scene.checkpoints()).into_iter().find(|name| name.ends_with(".partial"));
                if partial.is_some() && partial != last {
                    (seen, last) = (seen + 1, partial);
                }
                seen > save
            });
            std::thread::sleep(Duration::from_micros(pause));
            run.signal(random.random_range(0..2), libc::SIGKILL);
            let ended = run.wait();
            if begun && ended.after > Duration::ZERO {
                ended.failed();
            }
            ended.soon(SOON);
            scene.resumes(by);
        });
    }
}

#[test]
fn killed_at_any_time_of_a_run() {
    for &by in By::ALL {
        campaign(&format!("SIGKILL at a moment of a run, {}", by.name()), Tries::AtLeast50(1), |_, random| {
            let scene = Scene::new();
            let mut run = scene.start(by, "", None);
            std::thread::sleep(duration(by).mul_f64(random.random_range(0.0..1.0)));
            run.signal(random.random_range(0..2), libc::SIGKILL);
            run.wait().soon(SOON);
            scene.resumes(by);
            // Resumed repeatedly, and killed each time.
            let mut run = scene.start(by, "--resume", None);
            std::thread::sleep(duration(by).mul_f64(random.random_range(0.0..0.5)));
            run.signal(random.random_range(0..2), libc::SIGKILL);
            run.wait();
            scene.resumes(by);
        });
    }
}
