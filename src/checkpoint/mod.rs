//! Writes and reads models, deltas and the optimizer state.
//!
//! Files and folders are written under a temporary name, synced (fsync) and renamed, so an output is complete or
//! absent.

mod atomic_dir;
mod base_outputs;
mod delta;
mod error;
mod export;
mod manifest;
mod optimizer_state;
mod position;
mod resumed;
mod snapshot;
mod state;

pub use atomic_dir::{AtomicDir, partial_path, remove, remove_temporaries, target_of_temporary};
pub use base_outputs::{BaseCache, is_base_cache_file, is_base_cache_folder};
pub use delta::{DELTA_SCHEMA, apply_delta, apply_delta_replacing, load_delta, save_delta};
pub use error::Error;
pub use export::{check_copied, export, export_replacing, is_export, is_model_file, is_model_folder};
pub use manifest::{Manifest, ManifestEntry};
pub use optimizer_state::{read_optimizer, write_optimizer};
pub use position::{Position, is_snapshot_folder, newest_position};
pub use resumed::TrainingSnapshot;
pub use snapshot::{Identity, PhaseSnapshot, SnapshotStore};
pub use state::{Snapshot, State, is_snapshot_file};
