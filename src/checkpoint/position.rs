//! Positions in a run, which name its checkpoints.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::train::Phase;

/// Whether a folder of this name among the checkpoints is one.
pub fn is_snapshot_folder(name: &str) -> bool {
    Position::of_folder(name).is_some()
}

/// The position of the newest checkpoint in a folder of them; `None` without any. It may be damaged.
pub fn newest_position(folder: &Path) -> Option<Position> {
    positions(folder).map(|(position, _)| position).max()
}

/// The checkpoints in a folder, in no order.
pub(super) fn positions(folder: &Path) -> impl Iterator<Item = (Position, PathBuf)> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((Position::of_folder(entry.file_name().to_str()?)?, entry.path())))
}

/// A position in a run: the phase and the step that come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// From 0.
    pub round: usize,
    /// If the run does not have this phase, the next one that it has.
    pub phase: Phase,
    /// Steps of the phase that are done; in an identification, micro-batches.
    pub step: usize,
}

impl Position {
    /// The beginning of a phase.
    pub fn start(round: usize, phase: Phase) -> Self {
        Self { round, phase, step: 0 }
    }

    /// The name of the checkpoint's folder.
    pub(super) fn folder(self) -> String {
        let phase = serde_json::to_value(self.phase).expect("a phase has a name");
        format!("round_{}-{}-step_{}", self.round + 1, phase.as_str().unwrap_or_default(), self.step)
    }

    fn of_folder(name: &str) -> Option<Self> {
        let [round, phase, step] = name.split('-').collect::<Vec<_>>().try_into().ok()?;
        let round = round.strip_prefix("round_")?.parse::<usize>().ok()?.checked_sub(1)?;
        let phase = serde_json::from_value(phase.into()).ok()?;
        Some(Self { round, phase, step: step.strip_prefix("step_")?.parse().ok()? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_names_its_position() {
        for phase in [Phase::Identify, Phase::Expert, Phase::Router, Phase::Joint] {
            let position = Position { round: 1, phase, step: 40 };
            assert_eq!(Position::of_folder(&position.folder()), Some(position));
        }
        assert_eq!(Position::start(1, Phase::Expert).folder(), "round_2-expert-step_0");
        for other in ["round_2", ".round_2-expert-step_0.partial", "round_0-expert-step_0", "round_2-lunch-step_0"] {
            assert_eq!(Position::of_folder(other), None, "{other}");
        }
        let order = [
            (0, Phase::Identify, 7),
            (0, Phase::Expert, 0),
            (0, Phase::Expert, 2),
            (0, Phase::Router, 1),
            (1, Phase::Identify, 0),
        ];
        assert!(order.map(|(round, phase, step)| Position { round, phase, step }).is_sorted());
    }
}
