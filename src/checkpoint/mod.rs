//! Models and parts of models on their way to disk.
//!
//! Everything is written aside, brought to the disk, and renamed: an output either exists whole or not at all.

mod aside;
mod delta;
mod error;
mod export;
mod manifest;
mod shard_state;
mod snapshot;

pub use aside::{AsideDir, clear_left, is_left_of, partial_path, remove};
pub use delta::{DELTA_SCHEMA, apply_delta, apply_delta_over, load_delta, save_delta};
pub use error::Error;
pub use export::{export, export_over, is_model_file, is_model_folder};
pub use manifest::{Entry, Manifest};
pub use shard_state::{read_optimizer, write_optimizer};
pub use snapshot::{Identity, PhaseSnapshot, Position, Snapshot, SnapshotStore, State};
