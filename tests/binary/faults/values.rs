//! Wrong values: a gradient that is NaN, a weight that differs between ranks.

use std::fs;

use moewarden::exit;
use rand::RngExt;

use super::campaign::{Tries, campaign};
use super::scene::{By, SOON, STEPS, Scene, names};

#[test]
fn a_gradient_that_is_nan() {
    for &by in By::ALL {
        campaign(&format!("NaN in the gradient of one rank, {}", by.name()), Tries::AtLeast(1), |_, random| {
            // Neither the first nor the last step of its phase, so that there are checkpoints of this phase before and after it.
            let (phase, step) = (random.random_range(0..2), random.random_range(2..STEPS / 2));
            let number = phase * STEPS / 2 + step;
            let models = [0, 1].map(|rank| {
                let scene = Scene::new();
                let fault = format!("rank={rank},at=step:{number},do=nan");
                let ended = scene.run(by, "--keep-checkpoints 100", Some(&fault));
                ended.expect(exit::OK, &["is skipped: the gradient of model.layers.", "have the source's bits"]);
                let rows = scene.metrics();
                let skipped: Vec<_> = rows.iter().filter(|row| row["skipped"] == true).collect();
                assert!(skipped.len() == 1 && skipped[0]["step"] == STEPS + number, "{skipped:?}");

                let name = ["expert", "router"][phase as usize];
                let folder = |step: u64| scene.checkpoints().join(format!("round_1-{name}-step_{step}"));
                let files = names(&folder(step));
                assert_eq!(files.len(), 6, "{files:?}");
                for file in files.iter().filter(|name| name.ends_with(".safetensors")) {
                    let [before, after] = [step - 1, step].map(|step| fs::read(folder(step).join(file)).unwrap());
                    assert!(before == after, "the skipped step changed {file}");
                }
                scene.results()
            });
            assert!(models[0] == models[1], "it matters which rank had the NaN");
        });
    }
}

#[test]
fn gradients_that_stay_nan() {
    for &by in By::ALL {
        campaign(&format!("NaN in more steps than --max-skipped-steps, {}", by.name()), Tries::AtLeast(1), |i, _| {
            let scene = Scene::new();
            let fault = format!("rank={},at=step:2-12,do=nan", i % 2);
            let ended = scene.run(by, "--max-skipped-steps 2", Some(&fault));
            ended.expect(exit::NOT_FINITE, &["round 1, expert step 4", "(as in the 2 steps before)"]);
            ended.soon(SOON);
            assert_eq!(ended.text.matches("is skipped").count(), 2, "{}", ended.text);
            scene.checkpoints_are_whole();
            scene.run(by, "--max-skipped-steps 2 --resume", None).expect(exit::OK, &["have the source's bits"]);
        });
    }
}

#[test]
fn a_weight_that_differs_on_one_rank() {
    for &by in By::ALL {
        campaign(&format!("one bit of a weight on one rank, {}", by.name()), Tries::AtLeast(1), |_, random| {
            let scene = Scene::new();
            let step = random.random_range(2..=STEPS);
            let fault = format!("rank=1,at=step:{step},do=perturb");
            let ended = scene.run(by, "--check-replicas 1", Some(&fault));
            ended.expect(exit::RANKS_DIFFER, &["the weights of model.layers.", "on rank(s) [1] differ"]);
            let phase = if step > STEPS / 2 { "router" } else { "expert" };
            assert!(
                ended.text.contains(&format!("round 1, {phase} step {}", (step - 1) % (STEPS / 2) + 1)),
                "{}",
                ended.text
            );
            ended.soon(SOON);
            scene.resumes(by);
        });
    }
}

/// Without `--check-replicas`: a flipped bit in an expert while the routers are trained.
#[test]
fn a_weight_that_differs_is_found_at_the_next_checkpoint() {
    for &by in By::ALL {
        let row = format!("one bit of a weight on one rank, until the next checkpoint, {}", by.name());
        campaign(&row, Tries::AtLeast(1), |_, _| {
            let scene = Scene::new();
            let fault = format!("rank=1,at=step:{},do=perturb", STEPS / 2 + 1);
            let ended = scene.run(by, "", Some(&fault));
            ended.expect(exit::RANKS_DIFFER, &["the weights of model.layers.", "experts", "on rank(s) [1] differ"]);
            ended.soon(SOON);
            scene.resumes(by);
        });
    }
}
