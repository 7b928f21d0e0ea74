//! Files of a checkpoint that are no longer what was written: found, named, and the checkpoint before is taken.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::campaign::{Tries, campaign};
use super::scene::{By, Scene, names};

const NEWEST: &str = "round_1-router-step_4";
const BEFORE: &str = "round_1-router-step_3";

/// A run that was killed, to be copied.
fn killed() -> &'static Scene {
    static SCENE: OnceLock<Scene> = OnceLock::new();
    SCENE.get_or_init(|| {
        let scene = Scene::new();
        scene.run(By::Threads, "", Some("rank=0,at=step:11,do=kill")).says(&["MOEWARDEN_FAULT"]);
        assert_eq!(names(&scene.checkpoints()), [BEFORE, NEWEST]);
        scene
    })
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for name in names(from) {
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() { copy(&from, &to) } else { _ = fs::copy(from, to).unwrap() }
    }
}

/// Damages a file in the `kind`th way; the reason that is to be given.
fn damage(path: &Path, kind: usize, random: &mut ChaCha8Rng) -> &'static str {
    let mut bytes = fs::read(path).unwrap();
    let is_manifest = path.ends_with("manifest.json");
    match kind {
        0 => {
            let bit = random.random_range(0..8 * bytes.len());
            bytes[bit / 8] ^= 1 << (bit % 8);
            fs::write(path, bytes).unwrap();
            "it is damaged"
        }
        1 => {
            let len = random.random_range(0..bytes.len());
            fs::write(path, &bytes[..len]).unwrap();
            if is_manifest { "it is damaged" } else { "bytes, not " }
        }
        _ => {
            fs::remove_file(path).unwrap();
            if is_manifest { "manifest.json" } else { "it is missing" }
        }
    }
}

/// The newest checkpoint of a copied run is damaged by `spoil`, which returns the file and the reason.
fn is_passed_over(by: By, spoil: impl FnOnce(&Path, &[String]) -> (String, &'static str)) {
    let scene = Scene::new();
    copy(&killed().out(), &scene.out());
    let newest = scene.checkpoints().join(NEWEST);
    let files = names(&newest);
    assert_eq!(files.len(), 5, "{files:?}");
    let (file, reason) = spoil(&newest, &files);
    let ended = scene.run(by, "--resume", None);
    scene.has_come_to_the_same(&ended);
    ended.says(&[&format!("resuming from out/checkpoints/{BEFORE}")]);
    let says = |line: &str| [NEWEST, "is passed over", &file, reason].iter().all(|what| line.contains(what));
    assert!(ended.text.lines().any(says), "{file}, {reason:?} are not in\n{}", ended.text);
}

#[test]
fn a_damaged_file() {
    for (kind, what) in ["one flipped bit in a", "a truncated", "a deleted"].into_iter().enumerate() {
        let row = format!("{what} file of a checkpoint");
        campaign(&row, Tries::AtLeast50([5, 1, 1][kind]), |i, random| {
            is_passed_over(By::ALL[i / 5 % By::ALL.len()], |folder, files| {
                let file = &files[i % files.len()];
                let reason = damage(&folder.join(file), kind, random);
                // A manifest with another bit may still be one: then it is at odds with a file, and that is named.
                if kind == 0 && file == "manifest.json" { (String::new(), "") } else { (file.clone(), reason) }
            });
        });
    }
}

#[test]
fn swapped_files() {
    campaign("two swapped files of a checkpoint", Tries::AtLeast(2), |i, random| {
        is_passed_over(By::Threads, |folder, files| {
            // First the two that are alike but for their contents.
            let a = if i == 0 { 1 } else { random.random_range(0..files.len()) };
            let b = if i == 0 { 2 } else { (a + random.random_range(1..files.len())) % files.len() };
            let [a, b] = [a, b].map(|i| folder.join(&files[i]));
            let (of_a, of_b) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
            fs::write(&a, of_b).unwrap();
            fs::write(&b, of_a).unwrap();
            (String::new(), "")
        });
    });
}
