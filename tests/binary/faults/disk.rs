//! Full disks, read-only folders, and folders that another run uses.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use moewarden::exit;
use rand::RngExt;

use super::campaign::{Tries, campaign};
use super::scene::{By, SOON, Scene, names};

/// A tmpfs, if this process may mount one.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: PathBuf, options: &str) -> Option<Self> {
        fs::create_dir(&at).unwrap();
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", options, "none"]).arg(&at).output();
        if !mount.is_ok_and(|output| output.status.success()) {
            println!("skipped: this process may not mount a file system");
            return None;
        }
        Some(Self(at))
    }

    fn remount(&self, options: &str) {
        let options = format!("remount,{options}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk() {
    for &by in By::ALL {
        campaign(&format!("a full disk, {}", by.name()), Tries::AtLeast(1), |_, random| {
            let scene = Scene::new();
            // Two checkpoints, a third that is being written and the model need 400 KiB.
            let size = random.random_range(4..300) << 10;
            let Some(disk) = Disk::mount(scene.out(), &format!("size={size}")) else { return };
            let ended = scene.run(by, "", None);
            ended.expect(exit::IO, &["error: ", "out/", "No space left on device"]);
            ended.soon(SOON);
            assert!(!names(&scene.out()).iter().any(|name| name == "final_model"));
            disk.remount("size=64m");
            scene.resumes(by);
        });
    }
}

#[test]
fn a_read_only_folder() {
    for &by in By::ALL {
        campaign(&format!("a read-only folder, {}", by.name()), Tries::AtLeast(1), |i, _| {
            let scene = Scene::new();
            let Some(disk) = Disk::mount(scene.out(), "size=64m") else { return };
            if i % 2 == 0 {
                scene.run(by, "", Some("rank=0,at=step:4,do=fail")).expect(exit::IO, &[]);
            }
            let before = names(&scene.checkpoints());
            disk.remount("ro");
            scene.run(by, "--resume", None).expect(exit::CANNOT_CREATE, &["error: ", "out", "Read-only file system"]);
            assert_eq!(names(&scene.checkpoints()), before);
            disk.remount("rw");
            scene.resumes(by);
        });
    }
}

#[test]
fn two_runs_in_one_folder() {
    for &by in By::ALL {
        campaign(&format!("a second run in the same folder, {}", by.name()), Tries::AtLeast(1), |_, random| {
            let scene = Scene::new();
            let step = random.random_range(1..=12);
            let mut first = scene.start(by, "", Some(&format!("rank=0,at=step:{step},do=hang")));
            assert!(first.wait_for(|run| run.text().contains("MOEWARDEN_FAULT: ")));
            let holder =
                first.ranks().iter().find(|p| p.var("OMPI_COMM_WORLD_RANK").is_none_or(|r| r == "0")).unwrap().pid;
            for more in ["--resume", "--overwrite"] {
                let second = scene.run(by, more, None);
                second.expect(exit::CANNOT_CREATE, &["another run works here", &format!("process {holder} on ")]);
            }
            first.signal(0, libc::SIGKILL);
            first.wait().failed();
            assert!(scene.out().join(".moewarden.lock").exists(), "the killed run left its lock file");
            scene.resumes(by);
        });
    }
}
