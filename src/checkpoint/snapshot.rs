//! Checkpoints of a run: what `--resume` reads.
//!
//! `checkpoints/round_2-expert-step_40/` is named by its position: step 41 of the expert phase of round 2 comes next.
//!
//! | file | written by | content |
//! |---|---|---|
//! | `state.json` | rank 0 | options, position, results so far |
//! | `metrics.jsonl` | rank 0 | the log so far |
//! | `weights.safetensors` | rank 0 | the weights that changed, as a delta |
//! | `optimizer-R-of-N.safetensors` | each rank | in a training phase: its shard of master weights and moments |
//! | `prepared.bin` | rank 0 | what a training phase computed before its first step: the fixed target of the routers |
//! | `identify-R-of-N.json` | each rank | in an identification: the sums so far |
//! | `manifest.json` | rank 0 | size and blake3 hash of all other files |
//!
//! All ranks write into a temporary folder, which is then synced (fsync) and renamed: a checkpoint is complete or absent. The
//! order of the rows depends only on the seed and the epoch, and a phase begins with zero moments: nothing else is state. So
//! a resumed run equals an uninterrupted one, bit for bit with the same world size; with another world size it takes the same
//! steps over the same rows, and differs by the rounding of sums.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::position::positions;
use super::state::{
    METRICS, PREPARED, SCHEMA, STATE, Snapshot, State, WEIGHTS, identify_name, optimizer_name, precision,
};
use super::{
    AtomicDir, Manifest, ManifestEntry, Position, partial_path, remove, remove_temporaries, save_delta, write_optimizer,
};
use crate::backend::{Backend, Dtype};
use crate::collective::{Collective, all_ok, with_heartbeat};
use crate::exit::{self, Failure, Result};
use crate::files;
use crate::input;
use crate::model::{Checkpoint, ParamTable};
use crate::optim::AdamW;
use crate::quote::quote;
use crate::train::fault::Point;
use crate::train::{Measured, PhaseProgress, Replica, check_replicas};

/// What a checkpoint holds of a phase under way.
pub enum PhaseSnapshot<'p, B: Backend> {
    /// Nothing: a phase has ended.
    Between,
    /// The sums of this rank in an identification ([`state`](crate::train::Scan::state)).
    Identification(Vec<u8>),
    /// A training phase.
    Training {
        /// What the phase carries from step to step.
        progress: &'p PhaseProgress,
        /// This rank's shard of the optimizer state.
        optimizer: &'p AdamW<B>,
        /// What the objective computed before the first step.
        prepared: Option<Vec<u8>>,
    },
}

/// What a run must have in common with a checkpoint that it resumes.
pub struct Identity<'a> {
    /// The options that decide results, as YAML.
    pub options: String,
    /// Rewrites the options of a checkpoint, which another version may have written, for a comparison with [`Self::options`].
    pub comparable: fn(&str) -> String,
    /// blake3 of the other inputs that decide results. Computed on first use: it reads the whole model.
    pub inputs: Box<dyn Fn() -> Result<blake3::Hash> + Send + Sync + 'a>,
    /// The hash of each of them, by names for messages.
    pub named_inputs: Box<dyn Fn() -> Result<BTreeMap<String, String>> + Send + Sync + 'a>,
    /// [`Self::inputs`] as earlier versions computed it.
    pub earlier_inputs: Box<dyn Fn() -> Result<blake3::Hash> + Send + Sync + 'a>,
    /// The model's folder, which errors name.
    pub model: &'a Path,
}

/// The checkpoints of a run.
pub struct SnapshotStore<'a> {
    /// The folder of all checkpoints.
    pub folder: PathBuf,
    /// How many of the newest are kept.
    pub keep: usize,
    /// What a resumed run must have in common with them.
    pub identity: Identity<'a>,
    /// The base model; `None`: its weights are random, and no checkpoint is written.
    pub base: Option<&'a Checkpoint>,
    /// The parameters of the base model.
    pub table: &'a ParamTable,
}

impl SnapshotStore<'_> {
    /// Saves a run at `position` and removes all but the newest checkpoints. First the ranks verify that they hold the same
    /// weights; with random weights nothing is written. All ranks take part; rank 0 calls `outputs`, which syncs the
    /// outputs and returns what is needed to continue them, and the log so far.
    ///
    /// # Errors
    /// A failed write; ranks that differ.
    pub fn save<B: Backend, O: Serialize>(
        &self,
        replica: &Replica<B>,
        position: Position,
        phase: &PhaseSnapshot<'_, B>,
        outputs: impl FnOnce() -> Result<(O, Vec<u8>)>,
        before: Measured,
    ) -> Result<()> {
        let world = replica.world.clone();
        let leads = world.rank() == 0;
        check_replicas(replica)?;
        let Some(base) = self.base else { return Ok(()) };
        world.set_activity(&format!("saving {}", position.folder()));
        replica.visit_unchanged(Point::Save)?;
        let target = self.folder.join(position.folder());
        let begin = || -> Result<Option<(AtomicDir, O, Vec<u8>)>> {
            if !leads {
                return Ok(None);
            }
            let (outputs, metrics) = outputs()?;
            let aside = AtomicDir::create(&target)?;
            remove_temporaries(&self.folder, &aside)?;
            Ok(Some((aside, outputs, metrics)))
        };
        let begun = all_ok(&*world, begin())?;
        replica.visit_unchanged(Point::Save)?;
        let dir = partial_path(&target)?;
        let own = with_heartbeat(&*world, || self.write_own(replica, base, &dir, phase))?;
        replica.visit_unchanged(Point::Save)?;
        let entries = serde_json::to_vec(&all_ok(&*world, own)?).expect("names and numbers");
        let all = world.all_gather(&entries)?;
        let finish = |(aside, outputs, metrics): (AtomicDir, O, Vec<u8>)| -> Result<()> {
            let state = State {
                schema: SCHEMA.into(),
                config: self.identity.options.clone(),
                inputs: (self.identity.inputs)()?.to_string(),
                named_inputs: (self.identity.named_inputs)()?,
                world_size: world.world_size(),
                precision: precision(replica),
                activation_size: 0,
                step_world_size: replica.step_world_size,
                position,
                progress: match phase {
                    PhaseSnapshot::Training { progress, .. } => Some((*progress).clone()),
                    _ => None,
                },
                outputs,
                before,
            };
            let mut json = serde_json::to_vec_pretty(&state).expect("a state has string keys");
            json.push(b'\n');
            let mut files = BTreeMap::new();
            for (name, bytes) in [(STATE, json), (METRICS, metrics)] {
                let path = aside.path().join(name);
                files::write(&path, bytes)?;
                files.insert(name.to_owned(), ManifestEntry::of(&path)?);
            }
            for entries in &all {
                files
                    .extend(serde_json::from_slice::<BTreeMap<String, ManifestEntry>>(entries).expect("written above"));
            }
            Manifest::new(files).write(aside.path())?;
            replica.visit_unchanged(Point::Save)?;
            aside.finish(true)?;
            replica.visit_unchanged(Point::Save)?;
            self.prune(position)
        };
        all_ok(&*world, begun.map_or(Ok(()), finish))
    }

    /// Writes the files of this rank, and hashes them.
    fn write_own<B: Backend>(
        &self,
        replica: &Replica<B>,
        base: &Checkpoint,
        dir: &Path,
        phase: &PhaseSnapshot<'_, B>,
    ) -> Result<BTreeMap<String, ManifestEntry>> {
        let (rank, world_size) = (replica.world.rank(), replica.world.world_size());
        let mut names = Vec::new();
        match phase {
            PhaseSnapshot::Between => {}
            PhaseSnapshot::Identification(sums) => {
                let name = identify_name(rank, world_size);
                files::write(dir.join(&name), sums)?;
                names.push(name);
            }
            PhaseSnapshot::Training { optimizer, prepared, .. } => {
                let name = optimizer_name(rank, world_size);
                let states = optimizer.export(&replica.model().backend);
                write_optimizer(self.table, &optimizer.layout(), states, &dir.join(&name))?;
                names.push(name);
                if let Some(bytes) = prepared.as_ref().filter(|_| rank == 0) {
                    files::write(dir.join(PREPARED), bytes)?;
                    names.push(PREPARED.into());
                }
            }
        }
        if rank == 0 {
            save_delta(base, self.table, &replica.changed(), &dir.join(WEIGHTS))?;
            names.push(WEIGHTS.into());
        }
        names.into_iter().map(|name| Ok((name.clone(), ManifestEntry::of(&dir.join(&name))?))).collect()
    }

    /// Removes all but the newest checkpoints up to `position`, and those after it, which belong to an abandoned course of the
    /// run.
    fn prune(&self, position: Position) -> Result<()> {
        let (past, future): (Vec<_>, Vec<_>) = self.list().into_iter().partition(|(at, _)| *at <= position);
        let old = past.into_iter().rev().skip(self.keep);
        for (_, path) in old.chain(future) {
            remove(&path)?;
        }
        Ok(())
    }

    /// All checkpoints, oldest first.
    fn list(&self) -> Vec<(Position, PathBuf)> {
        let mut found: Vec<_> = positions(&self.folder).collect();
        found.sort();
        found
    }

    /// The newest undamaged checkpoint; `None` if there is none at all. `fits` says whether a state belongs to the model and the
    /// recipe, and `skipped` is told of each checkpoint that is damaged or does not fit.
    ///
    /// # Errors
    /// Checkpoints that are all damaged; one of other options or other inputs.
    pub fn newest<O: DeserializeOwned>(
        &self,
        fits: impl Fn(&State<O>) -> Result<(), String>,
        mut skipped: impl FnMut(&Path, Failure),
    ) -> Result<Option<Snapshot<O>>> {
        let found = self.list();
        let any = !found.is_empty();
        for (_, folder) in found.into_iter().rev() {
            let verified = Manifest::verify(&folder).map_err(Failure::from).and_then(|()| self.read(&folder));
            match verified {
                Ok(snapshot) => {
                    self.check_identity(&snapshot.state)?;
                    // Of the same options and inputs, so what does not fit was changed afterwards, hash included.
                    match snapshot.check_form().and_then(|()| fits(&snapshot.state)) {
                        Ok(()) => return Ok(Some(snapshot)),
                        Err(message) => {
                            let message = format!("{}: {message}", folder.join(STATE).display());
                            skipped(&folder, Failure::new(exit::DATA, message));
                        }
                    }
                }
                Err(failure) => skipped(&folder, failure),
            }
        }
        if any {
            let message =
                format!("all checkpoints in {} are damaged; start again with --overwrite", self.folder.display());
            return Err(Failure::new(exit::DATA, message));
        }
        Ok(None)
    }

    /// [`Self::newest`] for all ranks: rank 0 verifies the hashes, the others read what it chose.
    ///
    /// # Errors
    /// Those of [`Self::newest`]; a folder that a rank cannot read.
    pub fn agree_on_newest<O: DeserializeOwned + Send>(
        &self,
        world: &dyn Collective,
        fits: impl Fn(&State<O>) -> Result<(), String> + Send,
        skipped: impl FnMut(&Path, Failure) + Send,
    ) -> Result<Option<Snapshot<O>>> {
        world.set_activity("the choice of a checkpoint");
        let newest = || if world.rank() == 0 { self.newest(fits, skipped) } else { Ok(None) };
        let found = all_ok(world, with_heartbeat(world, newest)?)?;
        let name = found.as_ref().and_then(|found| found.folder.file_name()?.to_str()).unwrap_or_default();
        let chosen = world.all_gather(name.as_bytes())?.swap_remove(0);
        let chosen = String::from_utf8_lossy(&chosen).into_owned();
        let read = || match found {
            Some(_) => Ok(found),
            None if chosen.is_empty() => Ok(None),
            None => self.read(&self.folder.join(&chosen)).map(Some),
        };
        all_ok(world, read())
    }

    fn read<O: DeserializeOwned>(&self, folder: &Path) -> Result<Snapshot<O>> {
        let path = folder.join(STATE);
        let text = input::read(&path).map_err(|e| Failure::new(exit::NO_INPUT, format!("{}: {e}", path.display())))?;
        let mut state: State<O> = serde_json::from_slice(&text).map_err(|e| {
            Failure::new(exit::DATA, format!("{} is damaged: {}", path.display(), input::json_problem(&e)))
        })?;
        if state.schema != SCHEMA {
            return Err(Failure::new(exit::DATA, format!("its schema is {}, not {SCHEMA:?}", quote(&state.schema))));
        }
        if state.precision.is_empty() {
            let earlier = if state.activation_size == 2 { Dtype::Bf16 } else { Dtype::F32 };
            state.precision = format!("{earlier:?}");
        }
        Ok(Snapshot { state, folder: folder.into() })
    }

    fn check_identity<O>(&self, state: &State<O>) -> Result<()> {
        let config = (self.identity.comparable)(&state.config);
        if config != self.identity.options {
            let mut differ = config.lines().zip(self.identity.options.lines()).filter(|(a, b)| a != b);
            let (theirs, ours) = differ.next().unwrap_or(("other options", "these"));
            return Err(Failure::new(
                exit::CONFIG,
                format!(
                    "the checkpoint was made with {}, not {}: resume with its config.resolved.yaml",
                    quote(theirs),
                    quote(ours)
                ),
            ));
        }
        let has = |inputs: blake3::Hash| state.inputs == inputs.to_string();
        if !has((self.identity.inputs)()?) && !has((self.identity.earlier_inputs)()?) {
            let (theirs, ours) = (&state.named_inputs, (self.identity.named_inputs)()?);
            let names: BTreeSet<_> = theirs.keys().chain(ours.keys()).map(String::as_str).collect();
            let changed: Vec<_> = names.into_iter().filter(|name| theirs.get(*name) != ours.get(*name)).collect();
            let changed = match theirs.is_empty() {
                true => "the model or the data".into(),
                false => changed.join(", "),
            };
            let message = format!(
                "other inputs than when the checkpoint was made: {changed} (the model is {}). Put back what was there, or start again with \
                 --overwrite",
                self.identity.model.display()
            );
            return Err(Failure::new(exit::CONFIG, message));
        }
        Ok(())
    }
}
