//! The outputs of a run besides its models: log, scores, metadata.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::session::Session;
use crate::backend::Backend;
use crate::checkpoint::Position;
use crate::collective::all_ok;
use crate::config::{LogFormat, RunConfig};
use crate::exit::Result;
use crate::experts::{ExpertId, ExpertScores, Method};
use crate::files;
use crate::report::{
    EventLog, IdentifiedExperts, MetricsLog, MetricsRow, RankingsFile, RetentionLog, RoundGradients, RoundScores,
    ScoresFile, TrainingLog, TrainingMetadata, gradients_pickle, log_line, read_rows, write_json,
};
use crate::train::{Drift, ExpertLoads, Identification, Measured, Phase, Recipe, Replica, RetainRows, StepResult};
use crate::ui::Ui;

/// The outputs so far: what a checkpoint keeps of them, to continue them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct OutputState {
    steps: u64,
    /// Of checkpoints of earlier versions, which do not hold the log itself.
    #[serde(default, skip_serializing)]
    metrics_length: u64,
    scores: ScoresFile,
    /// See [`Outputs::matched`].
    #[serde(default)]
    matched: BTreeMap<usize, RoundScores>,
    training_logs: Vec<TrainingLog>,
    #[serde(default)]
    retention: Option<RetentionLog>,
    /// See [`Outputs::round_weights`]; checkpoints of earlier versions have none.
    #[serde(default)]
    round_weights: BTreeMap<usize, String>,
}

/// The outputs of a run except its models. Every rank holds their state; rank 0 writes them.
pub struct Outputs<'a> {
    config: &'a RunConfig,
    ui: &'a Ui,
    dir: PathBuf,
    /// The open log, on the rank that writes.
    metrics: Option<MetricsLog>,
    /// The event file of `--log tensorboard`, on the rank that writes.
    events: Option<EventLog>,
    step: u64,
    last: Instant,
    scores: ScoresFile,
    /// The gradient method's selection and scores in the rounds (from 1) whose random selection matches or excludes it.
    matched: BTreeMap<usize, RoundScores>,
    metadata: TrainingMetadata,
    /// blake3 of the weights of each complete model that was written for a round (from 1), in the order of its parameters.
    round_weights: BTreeMap<usize, String>,
}

impl OutputState {
    /// Whether these are outputs of a run of this model and recipe that has come to `position`. The error says what does not fit.
    pub fn fits(&self, session: &Session, recipe: &Recipe, position: Position) -> Result<(), String> {
        let (layers, experts) = (&session.model.moe_layers().layers, session.model.num_experts);
        if self.scores.layers != *layers || self.scores.num_experts != experts {
            return Err("its scores are of other layers or experts than the model has".into());
        }
        if position.round > recipe.rounds {
            return Err(format!("it is of round {}, but the run has {}", position.round + 1, recipe.rounds));
        }
        for (round, found) in self.scores.rounds.iter().chain(&self.matched) {
            if *round == 0 || *round > recipe.rounds {
                return Err(format!("it has scores of round {round}, but the run has {}", recipe.rounds));
            }
            for (what, values) in [("scores", &found.scores), ("inclusion", &found.inclusion)] {
                let whole = values.len() == layers.len() && values.iter().all(|row| row.len() == experts);
                if !values.is_empty() && !whole {
                    return Err(format!(
                        "{what} of round {round} are not those of {} layers with {experts} experts",
                        layers.len()
                    ));
                }
            }
            if let Some(id) = found.selected.iter().find(|id| !layers.contains(&id.layer) || id.expert >= experts) {
                return Err(format!(
                    "round {round} selects expert {} of layer {}, which the model lacks",
                    id.expert, id.layer
                ));
            }
            if let Some(from) = found.kept_from.filter(|from| !self.scores.rounds.contains_key(from)) {
                return Err(format!("round {round} keeps the selection of round {from}, which is missing"));
            }
        }
        let needed = if position.phase == Phase::Identify { position.round } else { position.round + 1 };
        match (1..=needed).find(|round| !self.scores.rounds.contains_key(round)) {
            Some(round) if !recipe.selects_each_step() => Err(format!("the scores of round {round} are missing")),
            _ => Ok(()),
        }
    }
}

impl<'a> Outputs<'a> {
    /// Starts the outputs in the run's folder, which exists.
    ///
    /// # Errors
    /// A failed write.
    pub fn create<B: Backend>(
        session: &Session,
        config: &'a RunConfig,
        recipe: &Recipe,
        replica: &Replica<B>,
        ui: &'a Ui,
    ) -> Result<Self> {
        let layers = session.model.moe_layers().layers.clone();
        let scores = ScoresFile {
            score_norm: (config.method == Method::Gradient).then_some(config.score_norm),
            ..ScoresFile::new(config.method, config.score, layers, session.model.num_experts)
        };
        let state = OutputState {
            steps: 0,
            metrics_length: 0,
            scores,
            matched: BTreeMap::new(),
            training_logs: Vec::new(),
            retention: None,
            round_weights: BTreeMap::new(),
        };
        Self::resume(config, recipe, replica, ui, state, None)
    }

    /// Continues the outputs of a checkpoint, which holds `log`.
    ///
    /// # Errors
    /// A log that is shorter than at the checkpoint of an earlier version; a failed write.
    pub fn resume<B: Backend>(
        config: &'a RunConfig,
        recipe: &Recipe,
        replica: &Replica<B>,
        ui: &'a Ui,
        state: OutputState,
        log: Option<Vec<u8>>,
    ) -> Result<Self> {
        let world = &*replica.world;
        let dir = config.output_dir.clone();
        let OutputState { steps, metrics_length, scores, matched, training_logs, retention, round_weights } = state;
        let open = || -> Result<Option<MetricsLog>> {
            if world.rank() != 0 {
                return Ok(None);
            }
            files::write(dir.join("config.resolved.yaml"), config.to_yaml()?)?;
            let path = dir.join("metrics.jsonl");
            let so_far = log.map_or_else(|| MetricsLog::head(&path, metrics_length), Ok)?;
            let (log, damaged) = MetricsLog::resume(&path, &so_far)?;
            if damaged {
                ui.warn(format_args!(
                    "{} was changed since the checkpoint, which holds it: it is written again",
                    path.display()
                ));
            }
            Ok(Some(log))
        };
        let metrics = all_ok(world, open())?;
        let log_events = config.log == Some(LogFormat::Tensorboard) && metrics.is_some();
        let open = || -> Result<EventLog> {
            let folder = dir.join("tensorboard");
            let rows = || Ok(read_rows(&dir.join("metrics.jsonl"))?.rows);
            let (events, damaged) = EventLog::resume(&folder, steps, rows)?;
            if damaged {
                ui.warn(format_args!(
                    "the event files in {} lack steps before the checkpoint: they are written again from metrics.jsonl",
                    folder.display()
                ));
            }
            Ok(events)
        };
        let events = all_ok(world, log_events.then(open).transpose())?;
        let metadata = TrainingMetadata::new(config, recipe.strategy(), replica.step_world_size);
        let metadata = TrainingMetadata { training_logs, retention, ..metadata };
        let (step, last) = (steps, Instant::now());
        let outputs = Self { config, ui, metrics, events, dir, step, last, scores, matched, metadata, round_weights };
        // What was lost or damaged since then is written again.
        let again = || if outputs.scores.rounds.is_empty() { Ok(()) } else { outputs.write_scores() };
        all_ok(world, again())?;
        Ok(outputs)
    }

    /// Whether this rank writes.
    fn writes(&self) -> bool {
        self.metrics.is_some()
    }

    /// Steps of the whole run so far.
    pub fn steps(&self) -> u64 {
        self.step
    }

    /// The newest round's selection; empty before the first.
    pub fn last_selection(&self) -> Vec<ExpertId> {
        self.scores.rounds.last_key_value().map_or_else(Vec::new, |(_, r)| r.selected.clone())
    }

    /// The newest round's selection and the round (from 1) that made it; `None` before the first.
    pub fn selection_to_keep(&self) -> Option<(usize, Vec<ExpertId>)> {
        let (round, last) = self.scores.rounds.last_key_value()?;
        Some((last.kept_from.unwrap_or(*round), last.selected.clone()))
    }

    /// The losses of the first round's scan; empty before it, and where the method computes none.
    pub fn first_losses(&self) -> &[f64] {
        self.scores.rounds.get(&1).map_or(&[], |first| &first.losses)
    }

    /// Syncs the log to disk (fsync), and returns what a checkpoint keeps of the outputs, and the log so far.
    ///
    /// # Errors
    /// A failed write.
    pub fn synced_state(&self) -> Result<(OutputState, Vec<u8>)> {
        let log = self.metrics.as_ref().map(MetricsLog::so_far).transpose()?;
        let state = OutputState {
            steps: self.step,
            metrics_length: 0,
            scores: self.scores.clone(),
            matched: self.matched.clone(),
            training_logs: self.metadata.training_logs.clone(),
            retention: self.metadata.retention.clone(),
            round_weights: self.round_weights.clone(),
        };
        Ok((state, log.unwrap_or_default()))
    }

    fn sync(&self) -> Result<()> {
        Ok(self.metrics.as_ref().map_or(Ok(()), MetricsLog::sync)?)
    }

    /// A path in the run's folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    /// Starts the clock of the next step.
    pub fn start_clock(&mut self) {
        self.last = Instant::now();
    }

    /// Does not count the last `time` in the duration of the next step.
    pub fn skip_time(&mut self, time: Duration) {
        self.last += time;
    }

    /// Records an identification: its micro-batches as steps, its scores and its selection. `round` counts from 1.
    ///
    /// # Errors
    /// A failed write.
    pub fn identified(&mut self, round: usize, found: &Identification) -> Result<()> {
        let lines = found.losses.len();
        let seconds = self.lap() / lines.max(1) as f64;
        for (i, (loss, tokens)) in found.losses.iter().zip(&found.tokens).enumerate() {
            let counted = i + 1 == lines && !found.loads.is_empty();
            self.row(MetricsRow {
                phase: Phase::Identify,
                round,
                step: 0,
                ce_loss: Some(*loss),
                router_loss: None,
                retain_loss: None,
                retain_routing_loss: None,
                total_loss: Some(*loss),
                lr: None,
                grad_norm: None,
                tokens: *tokens as u64,
                seconds,
                timed_together: Some(lines),
                expert_load: None,
                phase_load: counted.then(|| found.loads.clone()),
                skipped: false,
            })?;
        }
        let num_experts = self.scores.num_experts;
        let scores = (found.micro_batches > 0).then_some(&found.scores);
        let experts = &found.selected.experts;
        let of_round = RoundScores::new(scores, experts, found.micro_batches, found.losses.clone());
        self.scores.rounds.insert(
            round,
            RoundScores {
                kept_from: found.kept_from,
                inclusion: found
                    .inclusion
                    .iter()
                    .flat_map(|all| all.chunks(num_experts))
                    .map(<[f64]>::to_vec)
                    .collect(),
                how_many: found.how_many.clone(),
                own_replies: found.replies,
                others: found.others.clone(),
                ..of_round
            },
        );
        if let Some(experts) = &found.gradient_selection {
            self.matched.insert(round, RoundScores::new(Some(&found.scores), experts, 0, Vec::new()));
        }
        self.write_scores()
    }

    /// Writes the scores, rankings and selections of all rounds so far.
    fn write_scores(&self) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        write_json(self.path("expert_scores.json"), &self.scores)?;
        let gradient = (self.config.score, self.config.score_norm);
        write_json(self.path("rankings.json"), &RankingsFile::new(&self.scores, gradient, &self.matched))?;
        let rounds: Vec<_> = self
            .rounds()
            .map(|(round, selected, all)| RoundGradients {
                round,
                experts: selected.to_vec(),
                gradients: all.map_or_else(Vec::new, |s| s.iter().collect()),
            })
            .collect();
        files::write(self.path("expert_gradients.pkl"), gradients_pickle(&rounds))?;
        Ok(())
    }

    /// Number, selection and scores of each round.
    fn rounds(&self) -> impl Iterator<Item = (usize, &[ExpertId], Option<ExpertScores>)> {
        self.scores.rounds.iter().map(|(round, r)| (*round, &r.selected[..], self.scores.scores(*round)))
    }

    /// Records one optimizer step; after the last one of a phase also the loads of the phase.
    ///
    /// # Errors
    /// A failed write.
    pub fn step(
        &mut self,
        phase: Phase,
        round: usize,
        result: &StepResult,
        phase_load: Option<&ExpertLoads>,
    ) -> Result<()> {
        let seconds = self.lap();
        self.row(MetricsRow {
            phase,
            round,
            step: 0,
            ce_loss: result.ce_loss,
            router_loss: result.router_loss,
            retain_loss: result.retain_loss,
            retain_routing_loss: result.retain_routing_loss,
            total_loss: Some(result.total_loss),
            lr: Some(result.lr),
            grad_norm: Some(result.grad_norm),
            tokens: result.tokens as u64,
            seconds,
            timed_together: None,
            expert_load: (!result.loads.is_empty()).then(|| result.loads.balance()),
            phase_load: phase_load.filter(|loads| !loads.is_empty()).cloned(),
            skipped: result.skipped.is_some(),
        })
    }

    /// Records the end of a phase.
    pub fn phase_done(&mut self, round: usize, step: Phase, losses: &[f64], num_identified_experts: usize) {
        let loss = (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64);
        self.metadata.training_logs.push(TrainingLog { round, step, loss, num_identified_experts });
    }

    /// Records the retain rows, before their first measurement.
    pub fn start_retention(&mut self, rows: &RetainRows<'_>) {
        let [loss_tokens, tokens] = rows.tokens();
        self.metadata.retention = Some(RetentionLog { rows: rows.len(), loss_tokens, tokens, drift: Vec::new() });
    }

    /// Records the distance from the base model: before training, then after each round.
    pub fn drifted(&mut self, drift: Drift) {
        self.metadata.retention.as_mut().expect("retention has started").drift.push(drift);
    }

    /// Writes the present state of `training_metadata.json`.
    ///
    /// # Errors
    /// A failed write.
    pub fn write_metadata(&self) -> Result<()> {
        if !self.writes() {
            return Ok(());
        }
        self.sync()?;
        let identified = self.rounds().map(|(round, selected, all)| {
            let score = |id: &ExpertId| Some((*id, all.as_ref()?.get(*id)?));
            let gradients = selected.iter().filter_map(score).collect();
            (round, IdentifiedExperts { experts: selected.to_vec(), gradients })
        });
        let metadata = TrainingMetadata { identified_experts_per_round: identified.collect(), ..self.metadata.clone() };
        Ok(write_json(self.path("training_metadata.json"), &metadata)?)
    }

    /// Records the hash of the weights that were written for a round (from 1).
    pub fn round_written(&mut self, round: usize, weights: String) {
        self.round_weights.insert(round, weights);
    }

    /// The hash of the weights that were written for a round (from 1), if it is known.
    pub fn weights_of_round(&self, round: usize) -> Option<&str> {
        self.round_weights.get(&round).map(String::as_str)
    }

    /// Records the losses before the first round and after the last one.
    pub fn measured(&mut self, before: &Measured, after: &Measured) {
        let both = |loss: fn(&Measured) -> Option<f64>| {
            let both = [loss(before), loss(after)];
            both.iter().any(Option::is_some).then_some(both)
        };
        self.metadata.ce_loss = both(|m| m.ce_loss);
        self.metadata.safe_loss = both(|m| m.safe_loss);
        self.metadata.router_loss = both(|m| m.router_loss);
        self.metadata.held_out_loss = both(|m| m.held_out_loss);
    }

    fn row(&mut self, mut row: MetricsRow) -> Result<()> {
        self.step += 1;
        row.step = self.step;
        if let Some(metrics) = &mut self.metrics {
            metrics.write(&row)?;
        }
        if let Some(events) = &mut self.events {
            events.write(&row)?;
        }
        if self.step.is_multiple_of(self.config.logging_steps as u64) {
            self.ui.line(log_line(&row));
        }
        Ok(())
    }

    fn lap(&mut self) -> f64 {
        let now = Instant::now();
        let seconds = (now - self.last).as_secs_f64();
        self.last = now;
        seconds
    }
}
