//! Checkpoints at the ends of rounds, and continuing from the newest whole one.
//!
//! A round begins with fresh moments and its order of rows depends on the seed and its number alone, so the weights that
//! changed, the log's length and the results so far are all there is to a run between two rounds: a resumed run equals an
//! uninterrupted one bit for bit.
//!
//! `checkpoints/round_N/` holds `weights.safetensors` (a delta) and `state.json`, which names the blake3 hash of the
//! former. The folder is written aside and renamed, so it is whole or not there.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::engine::Engine;
use super::outputs::Progressed;
use super::session::Session;
use crate::backend::Backend;
use crate::checkpoint::{AsideDir, load_delta, save_delta};
use crate::config::{Device, Recompute, RunConfig};
use crate::exit::{self, Failure, Result};
use crate::report::{read_json, write_json};
use crate::ui::Ui;

/// The value of [`State::schema`].
const SCHEMA: &str = "moewarden.checkpoint/1";
const WEIGHTS: &str = "weights.safetensors";
const STATE: &str = "state.json";

/// Checkpoints that are kept: the newest, and one more in case the disk damages it.
const KEPT: usize = 2;

/// A run between two rounds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    schema: String,
    /// Everything that decides the run, as YAML.
    config: String,
    /// blake3 of everything else that decides the run: the base model's values and small files, and the data.
    inputs: String,
    /// Rounds that are done.
    pub rounds_done: usize,
    /// blake3 of `weights.safetensors`.
    weights: String,
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

/// Saves a run after `rounds_done` rounds, and removes checkpoints older than the newest two.
///
/// # Errors
/// A disk that refuses.
pub fn save<B: Backend>(
    session: &Session,
    engine: &Engine<'_, B>,
    rounds_done: usize,
    outputs: Progressed,
    before: Measured,
) -> Result<()> {
    let config = engine.config;
    let target = folder(config).join(format!("round_{rounds_done}"));
    let aside = AsideDir::create(&target)?;
    let weights = aside.path().join(WEIGHTS);
    save_delta(&session.checkpoint, &session.table, &engine.changed(), &weights)?;
    let state = State {
        schema: SCHEMA.into(),
        config: decisive(config)?,
        inputs: inputs(session, config)?,
        rounds_done,
        weights: hash_file(&weights)?,
        outputs,
        before,
    };
    write_json(aside.path().join(STATE), &state)?;
    aside.finish(true)?;
    let old = saved(config).into_iter().rev().skip(KEPT);
    for (_, path) in old {
        fs::remove_dir_all(&path)
            .map_err(|e| Failure::new(exit::IO, format!("{}: cannot be removed: {e}", path.display())))?;
    }
    Ok(())
}

/// Puts the newest whole checkpoint's weights into the engine; its state. `None` where there is none at all. Says which
/// checkpoints were passed over and why.
///
/// # Errors
/// A checkpoint of other options or other data; checkpoints of which none is whole.
pub fn load<B: Backend>(session: &Session, engine: &mut Engine<'_, B>, ui: &Ui) -> Result<Option<State>> {
    let config = engine.config;
    let found = saved(config);
    let any = !found.is_empty();
    for (round, path) in found.into_iter().rev() {
        let state = match whole(&path) {
            Ok(state) => state,
            Err(failure) => {
                ui.warn(format_args!("checkpoint {} is passed over: {failure}", path.display()));
                continue;
            }
        };
        check_same(&state, session, config)?;
        let weights = load_delta(&session.checkpoint, &session.table, &path.join(WEIGHTS))?;
        engine.touched = weights.keys().copied().collect::<BTreeSet<_>>();
        for (id, value) in weights {
            engine.model.set_weight_host(id, value);
        }
        ui.line(format_args!("resuming after round {round}: {}", path.display()));
        return Ok(Some(state));
    }
    if any {
        return Err(Failure::new(
            exit::DATA,
            format!("no checkpoint of {} is whole; start again with --overwrite", folder(config).display()),
        ));
    }
    Ok(None)
}

fn whole(path: &Path) -> Result<State> {
    let state: State = read_json(&path.join(STATE))?;
    if state.schema != SCHEMA {
        return Err(Failure::new(exit::DATA, format!("its schema is {:?}, not {SCHEMA:?}", state.schema)));
    }
    if hash_file(&path.join(WEIGHTS))? != state.weights {
        return Err(Failure::new(exit::DATA, format!("{WEIGHTS} is damaged: its hash is not the one in {STATE}")));
    }
    Ok(state)
}

fn check_same(state: &State, session: &Session, config: &RunConfig) -> Result<()> {
    let ours = decisive(config)?;
    if state.config != ours {
        let mut differ = state.config.lines().zip(ours.lines()).filter(|(a, b)| a != b);
        let (theirs, ours) = differ.next().unwrap_or(("other options", "these"));
        return Err(Failure::new(
            exit::CONFIG,
            format!("the checkpoint was made with `{theirs}`, not `{ours}`: resume with its config.resolved.yaml"),
        ));
    }
    if state.inputs != inputs(session, config)? {
        return Err(Failure::new(
            exit::CONFIG,
            format!(
                "the model {} or the data have changed since the checkpoint was made: put back what was there, or start again \
                 with --overwrite",
                session.dir.display()
            ),
        ));
    }
    Ok(())
}

/// blake3 over the base model's parameters, its configuration and tokenizer, and the files of rows and template.
fn inputs(session: &Session, config: &RunConfig) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    for spec in &session.table.params {
        hasher.update_rayon(&spec.value.bytes);
    }
    let names = ["config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"];
    let model = names.iter().map(|name| session.dir.join(name)).filter(|path| path.is_file());
    let files = [Some(&config.dataset_path), config.eval_dataset_path.as_ref(), config.chat_template.as_ref()];
    for path in model.chain(files.into_iter().flatten().cloned()) {
        hasher.update(hash_file(&path)?.as_bytes());
    }
    Ok(hasher.finalize().to_string())
}

/// The options that decide results, as YAML; the others are set to their defaults.
fn decisive(config: &RunConfig) -> Result<String> {
    let config = RunConfig {
        overwrite: false,
        resume: false,
        output_dir: PathBuf::new(),
        threads: 0,
        device: Device::Auto,
        recompute: Recompute::Auto,
        logging_steps: 1,
        ..config.clone()
    };
    Ok(config.to_yaml()?)
}

fn folder(config: &RunConfig) -> PathBuf {
    config.output_dir.join("checkpoints")
}

/// (rounds done, folder) of each checkpoint, oldest first.
fn saved(config: &RunConfig) -> Vec<(usize, PathBuf)> {
    let entries = fs::read_dir(folder(config)).into_iter().flatten().flatten();
    let mut found: Vec<_> = entries
        .filter_map(|entry| {
            let round = entry.file_name().to_str()?.strip_prefix("round_")?.parse().ok()?;
            Some((round, entry.path()))
        })
        .collect();
    found.sort_unstable();
    found
}

fn hash_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_mmap_rayon(path)
        .map_err(|e| Failure::new(exit::NO_INPUT, format!("{}: cannot be read: {e}", path.display())))?;
    Ok(hasher.finalize().to_string())
}
