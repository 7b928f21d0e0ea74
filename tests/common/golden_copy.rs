//! Golden cases as folders that stand alone: the fixtures share tokenizers by symbolic links, which an export refuses to follow
//! out of a model's folder.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// The folder of a golden case, with `model` and `data.json`: a copy below the target folder, without links.
pub fn golden_copy(case: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("golden");
    fs::create_dir_all(&target).unwrap();
    // Other tests, in other processes too, may want the same case now.
    let lock = File::create(target.join("lock")).unwrap();
    lock.lock().unwrap();
    let copy = target.join(case);
    copy_changed(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(case), &copy);
    copy
}

/// Copies a folder. Files that are there already with the same content are not written, since others may read them.
fn copy_changed(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let name = entry.unwrap().file_name();
        let (from, to) = (from.join(&name), to.join(&name));
        if from.is_dir() {
            copy_changed(&from, &to);
            continue;
        }
        let bytes = fs::read(&from).unwrap();
        if fs::read(&to).ok().is_none_or(|there| there != bytes) {
            fs::write(&to, bytes).unwrap();
        }
    }
}
