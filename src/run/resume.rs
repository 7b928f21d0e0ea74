//! Checkpoints of a run, and going on from the newest whole one.
//!
//! `checkpoints/round_2-expert-step_40/` is named by what comes next: step 41 of the expert phase of round 2. It holds
//!
//! | file | from | what |
//! |---|---|---|
//! | `state.json` | rank 0 | options, position, results so far |
//! | `weights.safetensors` | rank 0 | the weights that changed, as a delta |
//! | `optimizer-R-of-N.safetensors` | each rank | within a training phase: its pieces of masters and moments |
//! | `identify-R-of-N.json` | each rank | within an identification: what it has added up |
//! | `manifest.json` | rank 0 | size and blake3 of all others |
//!
//! The folder is written aside by all ranks, brought to the disk, and renamed, so it is whole or not there. The order of
//! the rows depends on the seed and the round alone, and a phase begins with fresh moments: nothing else makes a run. So a
//! resumed run equals an uninterrupted one, bit for bit with as many ranks; with another number it takes the same steps
//! over the same rows, and differs by the rounding of sums.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::engine::Engine;
use super::identify::ScanState;
use super::outputs::{Outputs, Progressed};
use super::phase::{PhaseRun, SoFar};
use super::replicas;
use super::session::Session;
use crate::backend::Backend;
use crate::checkpoint::{
    AsideDir, Entry, Manifest, clear_left, load_delta, partial_path, read_optimizer, remove, save_delta,
    write_optimizer,
};
use crate::collective::{Collective, all_ok, meanwhile};
use crate::config::{Device, Recompute, RunConfig, Transport};
use crate::exit::{self, Failure, Result};
use crate::files;
use crate::model::Checkpoint;
use crate::report::{Phase, read_json, write_json};
use crate::ui::Ui;

/// The value of [`State::schema`].
const SCHEMA: &str = "moewarden.checkpoint/2";
const WEIGHTS: &str = "weights.safetensors";
const STATE: &str = "state.json";

/// Where a run stands: the phase and the step in it that come next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Position {
    /// From 0.
    pub round: usize,
    /// A phase that the run may not have: then the one after it comes next.
    pub phase: Phase,
    /// Steps (in an identification: micro-batches) of the phase that are done.
    pub step: usize,
}

impl Position {
    /// The beginning of a phase.
    pub fn start(round: usize, phase: Phase) -> Self {
        Self { round, phase, step: 0 }
    }

    /// The name of its checkpoint.
    fn folder(self) -> String {
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

/// What is between two steps of a run; the same on all ranks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    schema: String,
    /// Everything that decides the run, as YAML.
    config: String,
    /// blake3 of everything else that decides the run: the base model's values and small files, and the data.
    inputs: String,
    /// Ranks that wrote it.
    world_size: usize,
    /// Bytes of one element of its activations.
    activation_size: usize,
    /// Ranks for whose number the steps are made: those that began the run.
    pub step_ranks: usize,
    /// What comes next.
    pub position: Position,
    /// Within a training phase: its steps so far.
    pub so_far: Option<SoFar>,
    /// The outputs so far.
    pub outputs: Progressed,
    /// Cross-entropy, alignment loss and held-out loss before the first round.
    pub before: Measured,
}

/// What is measured of a model, without gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Mean cross-entropy of the unsafe prompts with their refusals.
    pub ce_loss: Option<f64>,
    /// The alignment loss.
    pub router_loss: Option<f64>,
    /// Mean cross-entropy of the held-out rows.
    pub held_out_loss: Option<f64>,
}

impl Measured {
    /// An error if a loss is NaN or infinite.
    pub fn check_finite(&self) -> Result<()> {
        let losses = [("refusals", self.ce_loss), ("routers", self.router_loss), ("held-out rows", self.held_out_loss)];
        match losses.iter().find_map(|(what, loss)| loss.filter(|l| !l.is_finite()).map(|l| (what, l))) {
            None => Ok(()),
            Some((what, loss)) => Err(Failure::new(
                exit::NOT_FINITE,
                format!("the loss of the {what} is {loss}: the weights have diverged; lower the learning rates"),
            )),
        }
    }
}

/// What a phase under way adds to a checkpoint.
pub enum Within<'a, B: Backend> {
    /// Nothing: a phase has ended.
    Nothing,
    /// What this rank has added up in an identification.
    Identification(Vec<u8>),
    /// A training phase.
    Training(&'a PhaseRun<B>),
}

/// Saves a run, and finds what it saved.
pub struct Checkpoints<'a> {
    session: &'a Session,
    config: &'a RunConfig,
    /// The options that decide results, as YAML.
    decisive: String,
}

/// A checkpoint to go on from.
pub struct Found {
    /// What all ranks have in common.
    pub state: State,
    folder: PathBuf,
}

impl<'a> Checkpoints<'a> {
    /// Those in the run's output folder.
    ///
    /// # Errors
    /// Options that are not text.
    pub fn new(session: &'a Session, config: &'a RunConfig) -> Result<Self> {
        Ok(Self { session, config, decisive: decisive(config)? })
    }

    fn folder(&self) -> PathBuf {
        self.config.output_dir.join("checkpoints")
    }

    /// Saves a run at `position`, after the ranks have proved to each other that they hold the same weights, and removes
    /// all but the newest checkpoints. All ranks take part. Of random weights only the proof is left.
    ///
    /// # Errors
    /// A disk that refuses, ranks that differ.
    pub fn save<B: Backend>(
        &self,
        engine: &Engine<'_, B>,
        position: Position,
        within: Within<'_, B>,
        outputs: &Outputs<'_>,
        before: Measured,
    ) -> Result<()> {
        let world = engine.world.clone();
        let leads = world.rank() == 0;
        replicas::check(engine)?;
        let Some(base) = &self.session.checkpoint else { return Ok(()) };
        world.doing(&format!("saving {}", position.folder()));
        engine.pass_save()?;
        let target = self.folder().join(position.folder());
        let begun = || -> Result<Option<AsideDir>> {
            if !leads {
                return Ok(None);
            }
            outputs.sync()?;
            let aside = AsideDir::create(&target)?;
            clear_left(&self.folder(), &aside)?;
            Ok(Some(aside))
        };
        let aside = all_ok(&*world, begun())?;
        engine.pass_save()?;
        let dir = partial_path(&target)?;
        let own = meanwhile(&*world, || self.write_own(engine, base, &dir, &within))?;
        engine.pass_save()?;
        let entries = serde_json::to_vec(&all_ok(&*world, own)?).expect("names and numbers");
        let all = world.all_gather(&entries)?;
        let finish = |aside: AsideDir| -> Result<()> {
            let state = State {
                schema: SCHEMA.into(),
                config: self.decisive.clone(),
                inputs: self.session.fingerprint(self.config)?.to_string(),
                world_size: world.world_size(),
                activation_size: engine.model.backend.activation_size(),
                step_ranks: engine.step_ranks,
                position,
                so_far: if let Within::Training(run) = &within { Some(run.so_far.clone()) } else { None },
                outputs: outputs.progressed(),
                before,
            };
            write_json(aside.path().join(STATE), &state)?;
            let mut files = BTreeMap::from([(STATE.to_owned(), Entry::of(&aside.path().join(STATE))?)]);
            for entries in &all {
                files.extend(serde_json::from_slice::<BTreeMap<String, Entry>>(entries).expect("written above"));
            }
            Manifest::new(files).write(aside.path())?;
            engine.pass_save()?;
            aside.finish(true)?;
            engine.pass_save()?;
            self.prune(position)
        };
        all_ok(&*world, aside.map_or(Ok(()), finish))
    }

    /// The files that this rank contributes, with their hashes.
    fn write_own<B: Backend>(
        &self,
        engine: &Engine<'_, B>,
        base: &Checkpoint,
        dir: &Path,
        within: &Within<'_, B>,
    ) -> Result<BTreeMap<String, Entry>> {
        let (rank, world_size) = (engine.world.rank(), engine.world.world_size());
        let mut names = Vec::new();
        match within {
            Within::Nothing => {}
            Within::Identification(sums) => {
                let name = identify_name(rank, world_size);
                files::write(dir.join(&name), sums)?;
                names.push(name);
            }
            Within::Training(run) => {
                let (name, optimizer) = (optimizer_name(rank, world_size), run.trainer.optimizer());
                let states = optimizer.export(&engine.model.backend);
                write_optimizer(&self.session.table, &optimizer.layout(), states, &dir.join(&name))?;
                names.push(name);
            }
        }
        if rank == 0 {
            save_delta(base, &self.session.table, &engine.changed(), &dir.join(WEIGHTS))?;
            names.push(WEIGHTS.into());
        }
        names.into_iter().map(|name| Ok((name.clone(), Entry::of(&dir.join(&name))?))).collect()
    }

    /// Removes all but the newest checkpoints up to `position`, and those after it, which the run has left behind.
    fn prune(&self, position: Position) -> Result<()> {
        let found = self.found();
        let (past, future): (Vec<_>, Vec<_>) = found.into_iter().partition(|(at, _)| *at <= position);
        let old = past.into_iter().rev().skip(self.config.keep_checkpoints);
        for (_, path) in old.chain(future) {
            remove(&path)?;
        }
        Ok(())
    }

    /// All checkpoints, oldest first.
    fn found(&self) -> Vec<(Position, PathBuf)> {
        let entries = fs::read_dir(self.folder()).into_iter().flatten().flatten();
        let mut found: Vec<_> = entries
            .filter_map(|entry| Some((Position::of_folder(entry.file_name().to_str()?)?, entry.path())))
            .collect();
        found.sort();
        found
    }

    /// The newest whole checkpoint; `None` where there is none at all. Says which were passed over and why.
    ///
    /// # Errors
    /// Checkpoints of which none is whole; one of other options or other data.
    pub fn newest(&self, ui: &Ui) -> Result<Option<Found>> {
        let found = self.found();
        let any = !found.is_empty();
        for (_, folder) in found.into_iter().rev() {
            let whole = Manifest::verify(&folder).map_err(Failure::from).and_then(|()| self.read(&folder));
            match whole {
                Ok(found) => {
                    self.check_same(&found.state)?;
                    ui.line(format_args!("resuming from {}", folder.display()));
                    return Ok(Some(found));
                }
                Err(failure) => ui.warn(format_args!("checkpoint {} is passed over: {failure}", folder.display())),
            }
        }
        if any {
            let message =
                format!("no checkpoint of {} is whole; start again with --overwrite", self.folder().display());
            return Err(Failure::new(exit::DATA, message));
        }
        Ok(None)
    }

    /// [`Self::newest`] for all ranks: rank 0 looks at every bit, the others read what it chose.
    ///
    /// # Errors
    /// Those of [`Self::newest`]; a folder that a rank cannot read.
    pub fn agree_on_newest(&self, world: &dyn Collective, ui: &Ui) -> Result<Option<Found>> {
        world.doing("the choice of a checkpoint");
        let newest = || if world.rank() == 0 { self.newest(ui) } else { Ok(None) };
        let found = all_ok(world, meanwhile(world, newest)?)?;
        let name = found.as_ref().and_then(|found| found.folder.file_name()?.to_str()).unwrap_or_default();
        let chosen = world.all_gather(name.as_bytes())?.swap_remove(0);
        let chosen = String::from_utf8_lossy(&chosen).into_owned();
        let read = || match &found {
            Some(_) => Ok(found),
            None if chosen.is_empty() => Ok(None),
            None => self.read(&self.folder().join(&chosen)).map(Some),
        };
        all_ok(world, read())
    }

    fn read(&self, folder: &Path) -> Result<Found> {
        let state: State = read_json(&folder.join(STATE))?;
        if state.schema != SCHEMA {
            return Err(Failure::new(exit::DATA, format!("its schema is {:?}, not {SCHEMA:?}", state.schema)));
        }
        Ok(Found { state, folder: folder.into() })
    }

    fn check_same(&self, state: &State) -> Result<()> {
        if state.config != self.decisive {
            let mut differ = state.config.lines().zip(self.decisive.lines()).filter(|(a, b)| a != b);
            let (theirs, ours) = differ.next().unwrap_or(("other options", "these"));
            return Err(Failure::new(
                exit::CONFIG,
                format!("the checkpoint was made with `{theirs}`, not `{ours}`: resume with its config.resolved.yaml"),
            ));
        }
        if state.inputs != self.session.fingerprint(self.config)?.to_string() {
            return Err(Failure::new(
                exit::CONFIG,
                format!(
                    "the model {} or the data have changed since the checkpoint was made: put back what was there, or \
                     start again with --overwrite",
                    self.session.dir.display()
                ),
            ));
        }
        Ok(())
    }
}

impl Found {
    /// Where it is.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Puts the weights into the engine.
    ///
    /// # Errors
    /// A delta that does not fit the model.
    pub fn load_weights<B: Backend>(&self, session: &Session, engine: &mut Engine<'_, B>) -> Result<()> {
        let (theirs, ours) = (self.state.activation_size, engine.model.backend.activation_size());
        if theirs != ours {
            let message = format!(
                "the checkpoint was made with activations of {} bits, and here they have {}: resume with the --device and \
                 --precision of that run, or start again with --overwrite",
                8 * theirs,
                8 * ours
            );
            return Err(Failure::new(exit::CONFIG, message));
        }
        engine.step_ranks = self.state.step_ranks;
        let base = session.checkpoint.as_ref().expect("a run of random weights makes no checkpoint");
        let weights = load_delta(base, &session.table, &self.folder.join(WEIGHTS))?;
        engine.touched = weights.keys().copied().collect();
        for (id, value) in weights {
            engine.model.set_weight_host(id, value);
        }
        Ok(())
    }

    /// Where an identification goes on on this rank.
    ///
    /// # Errors
    /// A file that cannot be read.
    pub fn scan<B: Backend>(&self, engine: &Engine<'_, B>) -> Result<ScanState> {
        let (next, writers) = (self.state.position.step, self.state.world_size);
        if next == 0 {
            return Ok(ScanState::default());
        }
        let mine = match engine.world.rank() {
            rank if writers == engine.world.world_size() => rank..rank + 1,
            0 => 0..writers,
            _ => 0..0,
        };
        let read = |rank| {
            let path = self.folder.join(identify_name(rank, writers));
            fs::read(&path).map_err(|e| Failure::new(exit::IO, format!("{}: {e}", path.display())))
        };
        Ok(ScanState { next, sums: mine.map(read).collect::<Result<_>>()? })
    }

    /// Brings a training phase that has just begun to where it was.
    ///
    /// # Errors
    /// A state that does not fit.
    pub fn restore<B: Backend>(&self, engine: &Engine<'_, B>, run: &mut PhaseRun<B>) -> Result<()> {
        let Some(so_far) = &self.state.so_far else { return Ok(()) };
        run.so_far = so_far.clone();
        let writers = self.state.world_size;
        let files: Vec<_> = (0..writers).map(|rank| self.folder.join(optimizer_name(rank, writers))).collect();
        let (rank, world_size) = (engine.world.rank(), engine.world.world_size());
        for state in read_optimizer(&engine.model.table, &files, rank, world_size)? {
            run.trainer.import(engine, &state)?;
        }
        Ok(())
    }
}

fn identify_name(rank: usize, world_size: usize) -> String {
    format!("identify-{rank}-of-{world_size}.json")
}

fn optimizer_name(rank: usize, world_size: usize) -> String {
    format!("optimizer-{rank}-of-{world_size}.safetensors")
}

/// The options that decide results, as YAML; the others are set to their defaults.
pub fn decisive(config: &RunConfig) -> Result<String> {
    let default = RunConfig::default();
    let config = RunConfig {
        overwrite: false,
        resume: false,
        output_dir: PathBuf::new(),
        threads: 0,
        ranks: None,
        device: Device::Auto,
        transport: Transport::Auto,
        profile: false,
        recompute: Recompute::Auto,
        logging_steps: 1,
        save_steps: default.save_steps,
        keep_checkpoints: default.keep_checkpoints,
        check_replicas: default.check_replicas,
        timeout: default.timeout,
        ..config.clone()
    };
    Ok(config.to_yaml()?)
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
