//! The files of a checkpoint, and the state that all ranks have in common.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Manifest, Position};
use crate::backend::Backend;
use crate::train::{Measured, PhaseProgress, Replica};

/// The value of [`State::schema`].
pub(super) const SCHEMA: &str = "moewarden.checkpoint/2";
pub(super) const WEIGHTS: &str = "weights.safetensors";
pub(super) const STATE: &str = "state.json";
pub(super) const METRICS: &str = "metrics.jsonl";
pub(super) const PREPARED: &str = "prepared.bin";

/// Whether a checkpoint has a file of this name.
pub fn is_snapshot_file(name: &str) -> bool {
    let of_ranks = |start: &str, end: &str| {
        let middle = name.strip_prefix(start).and_then(|rest| rest.strip_suffix(end));
        let numbers = middle.and_then(|middle| middle.split_once("-of-"));
        numbers.is_some_and(|(rank, ranks)| rank.parse::<usize>().is_ok() && ranks.parse::<usize>().is_ok())
    };
    [STATE, METRICS, WEIGHTS, PREPARED, Manifest::FILE].contains(&name)
        || of_ranks("optimizer-", ".safetensors")
        || of_ranks("identify-", ".json")
}

/// The number format of a replica's products, in words.
pub(super) fn precision<B: Backend>(replica: &Replica<B>) -> String {
    format!("{:?}", replica.model().backend.precision())
}

/// The state of a run between two steps, the same on all ranks. `O`: what the outputs need to be continued.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State<O> {
    pub(super) schema: String,
    /// The options that decide results, as YAML.
    pub(super) config: String,
    /// blake3 of the other inputs that decide results: the base model and the data.
    pub(super) inputs: String,
    /// blake3 of each of them, by name; empty in checkpoints of earlier versions.
    #[serde(default)]
    pub(super) named_inputs: BTreeMap<String, String>,
    /// World size of the run that wrote it.
    pub(super) world_size: usize,
    /// The number format of products; empty in checkpoints of earlier versions, which have [`Self::activation_size`] instead.
    #[serde(default)]
    pub(super) precision: String,
    /// Bytes of an activation, from which the number format of earlier versions follows.
    #[serde(default, skip_serializing)]
    pub(super) activation_size: usize,
    /// World size that the run was started with.
    #[serde(rename = "step_ranks")]
    pub(super) step_world_size: usize,
    /// What comes next.
    pub position: Position,
    /// The progress of a training phase.
    #[serde(rename = "so_far")]
    pub(super) progress: Option<PhaseProgress>,
    /// The outputs so far.
    pub outputs: O,
    /// What was measured before the first round.
    pub before: Measured,
}

/// A checkpoint to resume from.
pub struct Snapshot<O> {
    /// The state that all ranks have in common.
    pub state: State<O>,
    pub(super) folder: PathBuf,
}

pub(super) fn identify_name(rank: usize, world_size: usize) -> String {
    format!("identify-{rank}-of-{world_size}.json")
}

pub(super) fn optimizer_name(rank: usize, world_size: usize) -> String {
    format!("optimizer-{rank}-of-{world_size}.safetensors")
}
