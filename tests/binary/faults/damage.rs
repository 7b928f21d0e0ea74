//! Damaged files of a checkpoint: the damage is reported by file name, and the checkpoint before is used.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;

use super::campaign::{Tries, campaign};
use super::scene::{By, Scene, names};

const NEWEST: &str = "round_1-router-step_4";
const BEFORE: &str = "round_1-router-step_3";
/// Files of a checkpoint, in the order of their names: manifest, metrics, two of the optimizer, state, weights.
const FILES: usize = 6;

/// A killed run, which the tests copy.
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

/// Damages a file in one of three ways, and returns the expected reason in the message.
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

/// Asserts that the newest checkpoint of a copied run is skipped after `spoil` damaged it; `spoil` returns the file and the
/// reason in the message.
fn is_skipped(by: By, spoil: impl FnOnce(&Path, &[String]) -> (String, &'static str)) {
    let scene = Scene::new();
    copy(&killed().out(), &scene.out());
    let newest = scene.checkpoints().join(NEWEST);
    let files = names(&newest);
    assert_eq!(files.len(), FILES, "{files:?}");
    let (file, reason) = spoil(&newest, &files);
    let ended = scene.run(by, "--resume", None);
    scene.equals_undisturbed(&ended);
    ended.says(&[&format!("resuming from out/checkpoints/{BEFORE}")]);
    let says = |line: &str| [NEWEST, "is skipped", &file, reason].iter().all(|what| line.contains(what));
    assert!(ended.text.lines().any(says), "{file}, {reason:?} are not in\n{}", ended.text);
}

#[test]
fn a_damaged_file() {
    for (kind, what) in ["one flipped bit in a", "a truncated", "a deleted"].into_iter().enumerate() {
        let row = format!("{what} file of a checkpoint");
        campaign(&row, Tries::AtLeast50([FILES, 1, 1][kind]), |i, random| {
            is_skipped(By::ALL[i / FILES % By::ALL.len()], |folder, files| {
                let file = &files[i % files.len()];
                let reason = damage(&folder.join(file), kind, random);
                // A manifest with a flipped bit may still parse: then it contradicts another file, which is named.
                if kind == 0 && file == "manifest.json" { (String::new(), "") } else { (file.clone(), reason) }
            });
        });
    }
}

#[test]
fn swapped_files() {
    campaign("two swapped files of a checkpoint", Tries::AtLeast(2), |i, random| {
        is_skipped(By::Threads, |folder, files| {
            // First the two files of the same size.
            let a = if i == 0 { 2 } else { random.random_range(0..files.len()) };
            let b = if i == 0 { 3 } else { (a + random.random_range(1..files.len())) % files.len() };
            let [a, b] = [a, b].map(|i| folder.join(&files[i]));
            let (of_a, of_b) = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
            fs::write(&a, of_b).unwrap();
            fs::write(&b, of_a).unwrap();
            (String::new(), "")
        });
    });
}
