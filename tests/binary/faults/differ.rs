//! Processes with different inputs, or started otherwise than the options say: refused before anything is written.

#![cfg(feature = "mpi")]

use std::fs;
use std::path::Path;

use moewarden::exit;

use super::campaign::{Tries, campaign};
use super::scene::{By, Ended, SOON, Scene, golden, names};
use crate::processes::mpirun;

/// The folder of a machine, with model and rows under the same names on all machines.
fn machine(scene: &Scene, name: &str) -> std::path::PathBuf {
    let dir = scene.path(name);
    fs::create_dir_all(dir.join("model")).unwrap();
    for file in names(&golden().join("model")) {
        fs::copy(golden().join("model").join(&file), dir.join("model").join(&file)).unwrap();
    }
    fs::copy(scene.path("data.json"), dir.join("data.json")).unwrap();
    dir
}

/// Starts rank 0 in one folder and rank 1 in another, each with its own options.
fn two(scene: &Scene, folders: [&Path; 2], more: [&str; 2]) -> Ended {
    let mut command = mpirun();
    let out = scene.out().display().to_string();
    for (i, (folder, more)) in folders.into_iter().zip(more).enumerate() {
        command.args(if i == 0 { &[][..] } else { &[":"] });
        command.arg("-wdir").arg(folder).args(["-n", "1", env!("CARGO_BIN_EXE_moewarden")]);
        command.args(scene.args(&format!("--model-name model --output-dir {out} {more}")));
    }
    scene.spawn(command).wait()
}

#[test]
fn ranks_with_different_inputs() {
    let cases = ["nothing", "an option", "a row of the data", "a weight of the model", "config.json"];
    campaign("options, data or model differ on one process", Tries::Exactly(cases.len()), |i, _| {
        let scene = Scene::new();
        let folders = [machine(&scene, "here"), machine(&scene, "there")];
        let spoil = |name: &str, change: fn(&mut Vec<u8>)| {
            let path = folders[1].join(name);
            let mut bytes = fs::read(&path).unwrap();
            change(&mut bytes);
            fs::write(path, bytes).unwrap();
        };
        let (more, says) = match cases[i] {
            "an option" => (["", "--expert-lr 2e-3"], "`expert-lr: 0.002`, not `expert-lr: 0.001`"),
            "a row of the data" => {
                spoil("data.json", |bytes| {
                    let text = String::from_utf8(std::mem::take(bytes)).unwrap();
                    *bytes = text.replacen("midnight", "noon", 1).into_bytes();
                });
                (["", ""], "file of rows")
            }
            "a weight of the model" => {
                spoil("model/model.safetensors", |bytes| *bytes.last_mut().unwrap() ^= 1);
                (["", ""], "set of model weights")
            }
            "config.json" => {
                spoil("model/config.json", |bytes| bytes.push(b'\n'));
                (["", ""], "config.json")
            }
            _ => (["", ""], ""),
        };
        let ended = two(&scene, [&folders[0], &folders[1]], more);
        if cases[i] == "nothing" {
            return ended.expect(exit::OK, &[]); // different folders alone are accepted
        }
        ended.expect(exit::RANKS_DIFFER, &["rank 1 has a different ", says]);
        ended.soon(SOON);
        assert!(!scene.out().exists(), "something was written: {:?}", names(&scene.out()));
    });
}

#[test]
fn ranks_given_twice() {
    campaign("--ranks 2 under mpirun -n 2", Tries::Exactly(1), |_, _| {
        let scene = Scene::new();
        scene.run(By::Mpirun, "--ranks 2", None).expect(exit::LAUNCHER, &["--ranks 2 asks for threads", "mpirun"]);
        assert!(!scene.out().exists());
    });
}
