//! What a checkpoint gives back.

use std::collections::BTreeMap;
use std::path::Path;
use std::{fs, io};

use super::state::{METRICS, PREPARED, Snapshot, State, WEIGHTS, identify_name, optimizer_name, precision};
use super::{SnapshotStore, load_delta, read_optimizer};
use crate::backend::{Backend, HostTensor};
use crate::collective::all_ok;
use crate::exit::{self, Failure, Result};
use crate::input;
use crate::model::ParamId;
use crate::optim::ParamState;
use crate::train::{Phase, PhaseProgress, Replica, Scan};

/// What a checkpoint holds of a training phase under way, for one rank.
pub struct TrainingSnapshot {
    /// What the phase carries from step to step.
    pub progress: PhaseProgress,
    /// This rank's shard of the optimizer state.
    pub optimizer: Vec<ParamState>,
    /// What the objective computed before the first step.
    pub prepared: Option<Vec<u8>>,
}

impl<O> Snapshot<O> {
    /// The checkpoint's folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The log so far; `None` in checkpoints of earlier versions.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn metrics(&self) -> Result<Option<Vec<u8>>> {
        read_if_exists(&self.folder.join(METRICS))
    }

    /// Whether the state agrees with itself and with the files beside it: sizes are held against the files before anything is
    /// allocated by them.
    pub(super) fn check_form(&self) -> Result<(), String> {
        let State { world_size, step_world_size, position, progress, .. } = &self.state;
        if self.folder.file_name().and_then(|name| name.to_str()) != Some(&position.folder()) {
            return Err(format!("its position is {}", position.folder()));
        }
        // More ranks than in any run that can write a checkpoint.
        if *world_size == 0 || *step_world_size == 0 || *step_world_size > 1 << 20 {
            return Err(format!("it is of {world_size} ranks, in steps of {step_world_size}"));
        }
        let identifies = position.phase == Phase::Identify;
        if let Some(progress) = progress.as_ref().filter(|progress| identifies || progress.steps != position.step) {
            return Err(format!("{} steps of a training phase are done at {}", progress.steps, position.folder()));
        }
        let kind = match progress {
            Some(_) => "optimizer-",
            None if identifies && position.step > 0 => "identify-",
            None if position.step > 0 => return Err("the progress of its phase is missing".into()),
            None => return Ok(()),
        };
        let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
        let written = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(kind)).count();
        match written == *world_size {
            true => Ok(()),
            false => Err(format!("it is of {world_size} ranks, but {written} of them have a file {kind}*")),
        }
    }

    /// Restores the weights. All ranks call it together.
    ///
    /// # Errors
    /// A delta that does not fit the model; products in another number format; another rank's error.
    pub fn restore_weights<B: Backend>(&self, store: &SnapshotStore<'_>, replica: &mut Replica<B>) -> Result<()> {
        let weights = all_ok(&*replica.world, self.weights(store, &precision(replica)))?;
        replica.step_world_size = self.state.step_world_size;
        replica.restore(weights);
        Ok(())
    }

    /// The weights, for a run with products in the format `ours`.
    fn weights(&self, store: &SnapshotStore<'_>, ours: &str) -> Result<BTreeMap<ParamId, HostTensor>> {
        let theirs = &self.state.precision;
        if theirs != ours {
            let message = format!(
                "the checkpoint was made with products in {theirs}, and here they are in {ours}: resume with the --device and \
                 --precision of that run, or start again with --overwrite"
            );
            return Err(Failure::new(exit::CONFIG, message));
        }
        let base = store.base.expect("a run of random weights makes no checkpoint");
        Ok(load_delta(base, store.table, &self.folder.join(WEIGHTS))?)
    }

    /// Restores an identification that has just begun.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn restore_scan<B: Backend>(&self, replica: &Replica<B>, scan: &mut Scan<'_, B>) -> Result<()> {
        let (next, writers) = (self.state.position.step, self.state.world_size);
        if next == 0 {
            return Ok(());
        }
        let mine = match replica.world.rank() {
            rank if writers == replica.world.world_size() => rank..rank + 1,
            0 => 0..writers,
            _ => 0..0,
        };
        let read = |rank| {
            let path = self.folder.join(identify_name(rank, writers));
            input::read(&path).map_err(|e| Failure::new(exit::IO, format!("{}: {e}", path.display())))
        };
        scan.restore(next, &mine.map(read).collect::<Result<Vec<_>>>()?)
    }

    /// The training phase under way; `None` at the start of a phase.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn training<B: Backend>(&self, replica: &Replica<B>) -> Result<Option<TrainingSnapshot>> {
        let Some(progress) = &self.state.progress else { return Ok(None) };
        let writers = self.state.world_size;
        let files: Vec<_> = (0..writers).map(|rank| self.folder.join(optimizer_name(rank, writers))).collect();
        let (rank, world_size) = (replica.world.rank(), replica.world.world_size());
        let states = read_optimizer(&replica.model().table, &files, rank, world_size)?;
        let prepared = read_if_exists(&self.folder.join(PREPARED))?;
        Ok(Some(TrainingSnapshot { progress: progress.clone(), optimizer: states, prepared }))
    }
}

fn read_if_exists(path: &Path) -> Result<Option<Vec<u8>>> {
    match input::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Failure::new(exit::IO, format!("{}: {e}", path.display()))),
    }
}
