//! The optional folder of shared test data.

use std::path::{Path, PathBuf};

/// Where it is, or would be: the folder that `MOEWARDEN_SHARED` names, or `shared` beside the project.
pub fn shared() -> PathBuf {
    let beside = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared");
    std::env::var_os("MOEWARDEN_SHARED").map_or_else(beside, PathBuf::from)
}
