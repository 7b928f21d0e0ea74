//! The output folder of a run, as it grows.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use super::identify::Identification;
use super::phases::StepResult;
use crate::config::{Mode, RunConfig, Schedule};
use crate::exit::Result;
use crate::experts::Method;
use crate::files;
use crate::report::{
    IdentifiedExperts, MetricsLog, MetricsRow, Phase, RoundGradients, RoundScores, ScoresFile, TrainingLog,
    TrainingMetadata, TrainingStep, gradients_pickle, log_line, write_json,
};
use crate::ui::Ui;

/// Writes everything of SPEC's outputs except the models.
pub struct Outputs<'a> {
    config: &'a RunConfig,
    ui: &'a Ui,
    dir: PathBuf,
    metrics: MetricsLog,
    step: u64,
    last: Instant,
    scores: ScoresFile,
    rounds: Vec<RoundGradients>,
    metadata: TrainingMetadata,
}

impl<'a> Outputs<'a> {
    /// Begins the outputs in the run's folder, which exists.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn create(config: &'a RunConfig, ui: &'a Ui, layers: Vec<usize>, num_experts: usize) -> Result<Self> {
        let dir = config.output_dir.clone();
        files::write(dir.join("config.resolved.yaml"), config.to_yaml()?)?;
        Ok(Self {
            config,
            ui,
            metrics: MetricsLog::create(dir.join("metrics.jsonl"))?,
            dir,
            step: 0,
            last: Instant::now(),
            scores: ScoresFile::new(config.method, config.score, layers, num_experts),
            rounds: Vec::new(),
            metadata: metadata(config),
        })
    }

    /// A path in the run's folder.
    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.dir.join(name)
    }

    /// The clock of the next step starts now.
    pub fn start_clock(&mut self) {
        self.last = Instant::now();
    }

    /// Records an identification: its micro-batches as steps, its scores and its selection. `round` counts from 1.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn identified(&mut self, round: usize, found: &Identification) -> Result<()> {
        let seconds = self.lap() / found.losses.len().max(1) as f64;
        for (loss, tokens) in found.losses.iter().zip(&found.tokens) {
            self.row(MetricsRow {
                phase: Phase::Identify,
                round,
                step: 0,
                ce_loss: Some(*loss),
                router_loss: None,
                total_loss: Some(*loss),
                lr: None,
                grad_norm: None,
                tokens: *tokens as u64,
                seconds,
            })?;
        }
        let scored = self.config.method != Method::Random || found.micro_batches > 0;
        let scores = scored.then_some(&found.scores);
        let experts = &found.selected.experts;
        let gradients: Vec<_> = experts.iter().filter_map(|id| Some((*id, scores?.get(*id)?))).collect();
        self.scores.rounds.insert(round, RoundScores::new(scores, experts, found.micro_batches, found.losses.clone()));
        self.metadata
            .identified_experts_per_round
            .insert(round, IdentifiedExperts { experts: experts.clone(), gradients });
        let all = scores.map_or_else(Vec::new, |s| s.iter().collect());
        self.rounds.push(RoundGradients { round, experts: experts.clone(), gradients: all });
        write_json(self.path("expert_scores.json"), &self.scores)?;
        files::write(self.path("expert_gradients.pkl"), gradients_pickle(&self.rounds))?;
        Ok(())
    }

    /// Records one optimizer step.
    ///
    /// # Errors
    /// A log that cannot be appended to.
    pub fn step(&mut self, phase: Phase, round: usize, result: StepResult) -> Result<()> {
        let seconds = self.lap();
        self.row(MetricsRow {
            phase,
            round,
            step: 0,
            ce_loss: result.ce_loss,
            router_loss: result.router_loss,
            total_loss: Some(result.total_loss),
            lr: Some(result.lr),
            grad_norm: Some(result.grad_norm),
            tokens: result.tokens as u64,
            seconds,
        })
    }

    /// Records the end of a phase.
    pub fn phase_done(&mut self, round: usize, step: TrainingStep, losses: &[f64], num_identified_experts: usize) {
        let loss = (!losses.is_empty()).then(|| losses.iter().sum::<f64>() / losses.len() as f64);
        self.metadata.training_logs.push(TrainingLog { round, step, loss, num_identified_experts });
    }

    /// Writes `training_metadata.json` as it stands.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn write_metadata(&self) -> Result<()> {
        self.metrics.sync()?;
        Ok(write_json(self.path("training_metadata.json"), &self.metadata)?)
    }

    /// What was measured on the held-out rows before and after.
    pub fn held_out(&mut self, before: Option<f64>, after: Option<f64>) {
        self.metadata.held_out_loss = Some([before, after]);
    }

    fn row(&mut self, mut row: MetricsRow) -> Result<()> {
        self.step += 1;
        row.step = self.step;
        self.metrics.write(&row)?;
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

/// What the run trains, in a word.
fn strategy(config: &RunConfig) -> &'static str {
    match (config.schedule, config.finetune_unsafe_experts, config.skip_router_training, config.mode) {
        (_, false, true, _) => "frozen",
        (_, false, false, _) => "router_only",
        (Schedule::Joint, true, false, _) => "joint",
        (_, true, _, Mode::Baseline) => "baseline",
        (_, true, true, _) => "expert_only",
        (Schedule::Alternate, true, false, _) => "combined",
    }
}

fn metadata(config: &RunConfig) -> TrainingMetadata {
    TrainingMetadata {
        model_name: config.model_name.clone(),
        training_strategy: strategy(config).into(),
        num_rounds: config.num_rounds,
        expert_epochs_per_round: config.expert_epochs_per_round,
        router_epochs_per_round: config.router_epochs_per_round,
        top_k_experts: config.top_k_experts,
        batch_size: config.batch_size,
        grad_accum: config.grad_accum,
        world_size: config.ranks,
        expert_lr: config.expert_lr,
        router_lr: config.router_lr,
        weight_decay: config.weight_decay,
        method: config.method,
        score_per: config.score_per,
        selection: config.selection,
        kl_type: config.kl_type,
        router_statistic: config.router_statistic,
        skip_router_training: config.skip_router_training,
        finetune_unsafe_experts: config.finetune_unsafe_experts,
        use_router_consistency_loss: config.use_router_consistency_loss,
        router_consistency_weight: config.router_consistency_weight,
        router_consistency_type: config.router_consistency_type,
        router_consistency_layers: config.router_consistency_layers,
        safe_ratio: config.safe_ratio,
        max_samples: config.max_samples,
        seed: config.seed,
        held_out_loss: None,
        training_logs: Vec::new(),
        identified_experts_per_round: BTreeMap::new(),
    }
}
