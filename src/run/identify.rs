//! `identify`, and the identification of a training round.

use std::sync::Arc;

use super::ablate::verify;
use super::counted::CountedRows;
use super::dense::fit_recipe;
use super::outputs::Outputs;
use super::prepare::LargestPass;
use super::progress::Progress;
use super::session::Session;
use super::{prepare, summary};
use crate::backend::Backend;
use crate::collective::all_ok;
use crate::config::RunConfig;
use crate::exit::{Ended, Result, Stopped};
use crate::launch::{Opened, Rank, Started, memory};
use crate::train::{Decision, DeviceTransport, Identification, Phase, Recipe, Replica, Scan, select};
use crate::ui::Ui;

/// Scores and selects experts; changes no weight.
///
/// # Errors
/// Inputs that cannot be read or are invalid; an output folder or a device that cannot be used; a loss that is not finite; a rank
/// that fails.
pub fn identify(config: &RunConfig, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    let ranks = &started.ranks;
    let recipe = config.recipe_of_identification()?;
    let recipe = ranks.all_ok(fit_recipe(recipe, config, ui))?;
    let session = prepare::open(config, None, &recipe, ranks, ui)?;
    let _lock = prepare::take_output_dir(config, ranks)?;
    prepare::describe(&session, config, ranks, ui)?;
    let (config, device) = (config.clone(), started.device.clone());
    ranks.run(ui, move |rank| match device.open(&config, session.workload(config.batch_size), rank)? {
        Opened::Cpu(cpu) => identify_rank(&session, &config, &recipe, rank, cpu, None),
        Opened::Cuda(cuda, transport) => identify_rank(&session, &config, &recipe, rank, cuda, transport),
    })
}

/// The identification of one rank.
fn identify_rank<B: Backend>(
    session: &Session,
    config: &RunConfig,
    recipe: &Recipe,
    rank: &Rank,
    backend: Arc<B>,
    transport: Option<Arc<dyn DeviceTransport<B>>>,
) -> Result<Ended<()>> {
    let ui = &rank.ui;
    let (predicted_memory, offloaded) = prepare::predict_memory(session, config, recipe, rank, 0, &*backend)?;
    let mut replica = session.replica(backend, transport, rank, offloaded);
    let mut outputs = Outputs::create(session, config, recipe, &replica, ui)?;
    let lost = "stopped by a signal: nothing was saved (only `train` makes checkpoints)";
    let Some(rows) = CountedRows::of(session, config, recipe, &replica, ui)? else {
        return Ok(Ended::Stopped(Stopped::Lost(lost.into())));
    };
    rows.check()?;
    let mut scan = scan_round(session, &rows, recipe, &mut replica, rank.local_world_size, 0, ui)?;
    outputs.start_clock();
    let progress = scan.progress(&replica, ui);
    while let Some(stop) = scan.interval(&replica, &progress)? {
        if stop {
            return Ok(Ended::Stopped(Stopped::Lost(lost.into())));
        }
    }
    let found = scan.finish(&replica, &progress)?;
    outputs.identified(1, &found)?;
    all_ok(&*rank.world, outputs.write_metadata())?;
    summary::selection(&found, session, ui);
    if config.verify > 0
        && let Some(stopped) = verify(session, config, &mut replica, &found, ui)?
    {
        return Ok(Ended::Stopped(stopped));
    }
    ui.result(format_args!("scores and selection: {}", outputs.path("expert_scores.json").display()));
    ui.line(summary::resources(&replica, predicted_memory)?);
    replica.finish();
    Ok(Ended::Done(()))
}

/// The identification of a round under way.
pub(super) struct RoundScan<'a, B: Backend> {
    /// The scoring pass.
    pub pass: Scan<'a, B>,
    recipe: &'a Recipe,
    rows: &'a CountedRows,
    round: usize,
}

/// Begins the identification of `round` (from 0): a scoring pass over these rows.
pub(super) fn scan_round<'a, B: Backend>(
    session: &'a Session,
    rows: &'a CountedRows,
    recipe: &'a Recipe,
    replica: &mut Replica<B>,
    local_world_size: usize,
    round: usize,
    ui: &Ui,
) -> Result<RoundScan<'a, B>> {
    let sampler = rows.sampler(session, recipe);
    let pass =
        Scan::new(replica, &recipe.identify, sampler, sampler.unsafe_order(round))?.with_traces(session.traces());
    if let Some(lowest) = pass.lowest_layer() {
        let budget = memory::budget(&*replica.model().backend, local_world_size, session.model.vocab_size);
        let largest = LargestPass { rows: session.longest_batch(recipe.batch_size), lowest, forwards: 1 };
        replica.kept = prepare::kept_layers(session, recipe, &budget, largest, (round, Phase::Identify), ui);
    }
    Ok(RoundScan { pass, recipe, rows, round })
}

impl<B: Backend> RoundScan<'_, B> {
    /// A progress bar over the micro-batches of this rank that are left.
    pub(super) fn progress<'u>(&self, replica: &Replica<B>, ui: &'u Ui) -> Progress<'u> {
        let left = self.pass.left().div_ceil(replica.world.world_size());
        Progress::new(ui, left, format!("round {} identify", self.round + 1))
    }

    /// Scores this rank's micro-batches of the next interval; `None` at the end. `Some(true)`: some rank was asked to stop.
    pub(super) fn interval(&mut self, replica: &Replica<B>, progress: &Progress<'_>) -> Result<Option<bool>> {
        let Some(own) = self.pass.next_interval(replica) else { return Ok(None) };
        for index in own {
            let scored = self.pass.add(replica, index)?;
            progress.step(scored.tokens, scored.loss.map_or_else(String::new, |loss| format!("loss {loss:.4}")));
        }
        Ok(Some(self.pass.synchronize(replica)? == Decision::Stop))
    }

    /// Sums over all ranks, and selects.
    pub(super) fn finish(self, replica: &Replica<B>, progress: &Progress<'_>) -> Result<Identification> {
        let identify = &self.recipe.identify;
        let found = select(replica, identify, self.pass.finish(replica)?)?;
        let found = Identification { replies: self.rows.counts(), ..found };
        if let Some(warning) = &found.warning {
            progress.warn(warning);
        }
        if found.selected.shortfall() > 0 {
            let (selected, requested) = (found.selected.experts.len(), found.selected.requested);
            progress.warn(match identify.threshold() {
                Some(threshold) => {
                    format!("only {selected} of {requested} experts qualify (--risk-threshold {threshold})")
                }
                None => format!("only {selected} of {requested} experts have a score above 0"),
            });
        } else if found.selected.experts.is_empty() && !replica.model().config.is_dense() {
            progress.warn("the rule selects no expert on these rows");
        }
        if let Some(doubt) = scores_say_nothing(&found) {
            progress.warn(doubt);
        }
        Ok(found)
    }
}

/// Why the scores say nothing about the experts, if all of them are equal.
fn scores_say_nothing(found: &Identification) -> Option<String> {
    if found.micro_batches == 0 {
        return None; // random, given, or kept
    }
    let scores: Vec<f64> = found.scores.iter().map(|(_, score)| score).collect();
    let first = *scores.first()?;
    if scores.len() < 2 || scores.iter().any(|score| *score != first) {
        return None;
    }
    let selected = match found.selected.experts.len() {
        0 => "no expert is selected".to_owned(),
        n => format!("the selection of {n} experts is arbitrary (the first by layer and number)"),
    };
    Some(format!(
        "all {} scores are {first}: these rows and this model tell no expert from another, and {selected}. Are the weights zero, or do \
         all tokens of the rows get the same routing and no gradient? Do not train these experts",
        scores.len()
    ))
}
