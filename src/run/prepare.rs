//! Before the first step of `train` and `identify`: open the inputs, lock the output folder, say what will happen.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::forecast::{ExpertPlacement, MemoryForecast, room_for_passes};
use super::session::{Base, Session};
use crate::backend::Backend;
use crate::collective::all_ok;
use crate::config::{Offload, RunConfig};
use crate::exit::{self, Failure, Result};
use crate::launch::{Existing, LOCK_FILE, OutputLock, Rank, Ranks, check_output_dir, memory, prepare_dir_keeping};
use crate::model::{OffloadedBelow, ParamTable};
use crate::train::memory::{Activations, KeptLayers, MemoryBudget};
use crate::train::{Phase, Recipe, TrainedElements};
use crate::ui::Ui;

/// Opens and checks the inputs, in all processes, and verifies that they are the same everywhere. `base`: a model that is open
/// already; it is used if it is that of the run.
pub(super) fn open(
    config: &RunConfig,
    base: Option<&Base>,
    recipe: &Recipe,
    ranks: &Ranks,
    ui: &Ui,
) -> Result<Arc<Session>> {
    let own = || {
        check_output_dir(config)?;
        let session = Session::open_on(opened(config, base, ui)?, config, recipe, ui)?;
        session.check_sides(recipe)?;
        session.check_weights()?;
        Ok(Arc::new(session))
    };
    let session = ranks.all_ok(own())?;
    if let Some(world) = ranks.other_processes() {
        session.agree(config, world)?;
    }
    Ok(session)
}

/// The model of a run: `base`, if it is that one, or opened.
pub(super) fn opened(config: &RunConfig, base: Option<&Base>, ui: &Ui) -> Result<Base> {
    base.filter(|base| base.is_of(config)).map_or_else(|| Base::open(config, ui), |base| Ok(base.clone()))
}

/// Prepares the output folder, locks it for this run, and verifies that all ranks see the same folder.
pub(super) fn take_output_dir(config: &RunConfig, ranks: &Ranks) -> Result<Option<OutputLock>> {
    take_output_dir_keeping(config, &[], ranks)
}

/// [`take_output_dir`] for a command that reads `more` besides the inputs in its options.
pub(super) fn take_output_dir_keeping(config: &RunConfig, more: &[&Path], ranks: &Ranks) -> Result<Option<OutputLock>> {
    let existing = Existing::of(config.overwrite, config.resume);
    let own = || {
        if !ranks.leads() {
            return Ok(None);
        }
        check_output_dir(config)?;
        let lock = OutputLock::take(&config.output_dir)?;
        prepare_dir_keeping(&config.output_dir, existing, &[config.inputs(), more.to_vec()].concat())?;
        Ok(Some(lock))
    };
    let lock = ranks.all_ok(own())?;
    if let Some(world) = ranks.other_processes() {
        let holder = lock.as_ref().map_or_else(String::new, |lock| lock.holder.clone());
        let shared = world.all_gather(holder.as_bytes())?.swap_remove(0);
        ranks.all_ok(await_lock(config, &shared))?;
    }
    Ok(lock)
}

/// Waits until this rank sees the lock of rank 0: network file systems show new files with a delay.
fn await_lock(config: &RunConfig, holder: &[u8]) -> Result<()> {
    const TRIES: usize = 300;
    let path = config.output_dir.join(LOCK_FILE);
    for _ in 0..TRIES {
        if std::fs::read(&path).is_ok_and(|bytes| bytes == holder) {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Err(Failure::new(
        exit::CANNOT_CREATE,
        format!(
            "this rank does not see the files of rank 0 in {}: give an --output-dir on a file system that all machines share",
            config.output_dir.display()
        ),
    ))
}

/// Prints options, inputs and ranks.
pub(super) fn describe(session: &Session, config: &RunConfig, ranks: &Ranks, ui: &Ui) -> Result<()> {
    ui.line(format_args!("options:\n{}", config.to_yaml()?.trim_end()));
    ui.line(session.describe());
    if ranks.world_size() > 1 {
        ui.line(format_args!("ranks: {} ({} on this machine)", ranks.world_size(), ranks.local_world_size()));
    }
    Ok(())
}

/// Prints what will be trained.
pub(super) fn describe_trained(session: &Session, recipe: &Recipe, ui: &Ui) {
    let total = session.table.total().elements;
    let TrainedElements { experts, routers, others, .. } = recipe.trained_elements(&session.table, &session.model);
    let kinds = [("experts", experts), ("routers", routers), ("others", others)]
        .map(|(kind, elements)| format!("{kind} {elements} ({:.2} %)", 100.0 * elements as f64 / total as f64));
    let when = if recipe.selects_each_step() { ", reselected at every step" } else { "" };
    ui.line(format_args!("trained parameters, of {total}: {}{when}", kinds.join(", ")));
    if recipe.router_phase().is_some() {
        ui.warn(
            "the router phase is part of the published recipe, but on models with planted unsafe experts (docs/truth.md) it alone \
             raised refusals by less than 0.01 at --router-lr 1e-4, and at 1e-3 by 0.20, with 7.0 points fewer benign answers right: \
             compare with --skip-router-training (in `compare`: --ablations expert-only), or with --router-last-tokens 1 --router-target round-start (0.52 and 2.2)",
        );
    }
}

/// Prints the predicted memory of a rank that trains at most `trained` elements at once. Returns it in bytes, and which experts lie in
/// the host's memory, the same on all ranks.
///
/// # Errors
/// Far more than is free on some rank, without `--force`.
pub(super) fn predict_memory<B: Backend>(
    session: &Session,
    config: &RunConfig,
    recipe: &Recipe,
    rank: &Rank,
    trained: usize,
    backend: &B,
) -> Result<(u64, OffloadedBelow)> {
    let budget = memory::budget(backend, rank.local_world_size, session.model.vocab_size);
    let world_size = rank.world.world_size();
    warn_of_dense(session, config, &budget, &rank.ui);
    let placement = MemoryForecast::place_experts(session, config, recipe, trained, world_size, budget);
    let placement = agree_on_placement(placement, &session.table, &budget, rank)?;
    let forecast = MemoryForecast::new(session, config, recipe, trained, world_size, budget, placement);
    rank.ui.line(forecast.describe(session, world_size, budget));
    all_ok(&*rank.world, forecast.check(&budget, rank.local_world_size, config.force))?;
    Ok((forecast.peak(), placement.below))
}

/// Where routed experts lie in a run of forward passes only, the same on all ranks, and prints it. `passes`: the bytes that they need;
/// `models`: how many of the session's size are loaded at the same time.
///
/// # Errors
/// More pinned memory than the host of some rank has free, without `--force`.
pub(super) fn place_experts<B: Backend>(
    session: &Session,
    config: &RunConfig,
    rank: &Rank,
    models: u64,
    backend: &B,
    passes: impl FnOnce(&MemoryBudget) -> u64,
) -> Result<OffloadedBelow> {
    let budget = memory::budget(backend, rank.local_world_size, session.model.vocab_size);
    warn_of_dense(session, config, &budget, &rank.ui);
    let needs = room_for_passes(passes(&budget));
    let placement = ExpertPlacement::plan(config.offload, &session.table, models, needs, &budget);
    let placement = agree_on_placement(placement, &session.table, &budget, rank)?;
    if let Some(placement) = placement.describe() {
        rank.ui.line(placement);
    }
    all_ok(&*rank.world, placement.check(&budget, rank.local_world_size, config.force))?;
    Ok(placement.below)
}

/// Without a device the option is refused, or warned of, before.
fn warn_of_dense(session: &Session, config: &RunConfig, budget: &MemoryBudget, ui: &Ui) {
    let given = [("--offload host", config.offload == Offload::Host), ("--shard-frozen", config.shard_frozen)];
    for (option, _) in given.into_iter().filter(|(_, given)| *given && budget.device && session.model.is_dense()) {
        ui.warn(format_args!(
            "{option} does nothing: a dense model has no routed experts, and all its weights are on the GPU"
        ));
    }
}

/// The placement of the rank that offloads the most: ranks write trained experts together. If some host has no memory for that, all
/// experts stay on the devices, where they may.
pub(super) fn agree_on_placement(
    placement: ExpertPlacement,
    table: &ParamTable,
    budget: &MemoryBudget,
    rank: &Rank,
) -> Result<ExpertPlacement> {
    let all = rank.world.all_gather(&(placement.below.0 as u64).to_le_bytes())?;
    let below = all.iter().filter_map(|bytes| Some(u64::from_le_bytes(bytes.as_slice().try_into().ok()?))).max();
    let placement = placement.at_least(OffloadedBelow(below.unwrap_or(0) as usize), table);
    let all = rank.world.all_gather(&[u8::from(placement.exceeds_host(budget)), u8::from(placement.may_stay)])?;
    let exceeds = all.iter().any(|rank| rank.first() == Some(&1));
    let may_stay = all.iter().all(|rank| rank.get(1) == Some(&1));
    if !(exceeds && may_stay) {
        return Ok(placement);
    }
    rank.ui.warn(ALL_STAY);
    Ok(placement.all_on_device())
}

/// Where [`ExpertPlacement::may_stay`] decides.
const ALL_STAY: &str = "all experts stay on the GPU, whose memory is nearly full by the forecast: the host has too little \
    memory to pin those that may not fit. If the GPU's memory does not suffice, use a smaller --batch-size, or a machine with more memory";

/// The passes of a phase that need the most memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct LargestPass {
    /// Tokens of the largest packed batch.
    pub rows: usize,
    /// The lowest decoder layer that the backward visits.
    pub lowest: usize,
    /// Forward passes that wait for their backward at the same time.
    pub forwards: usize,
}

/// Decides how many layers keep their activations in a phase of a round (from 0), and prints it.
pub(super) fn kept_layers(
    session: &Session,
    recipe: &Recipe,
    budget: &MemoryBudget,
    largest: LargestPass,
    (round, phase): (usize, Phase),
    ui: &Ui,
) -> KeptLayers {
    let LargestPass { rows, lowest, forwards } = largest;
    let layers = session.model.layers.len();
    let activations = Activations::predict(&session.model, rows, budget);
    let kept = activations.kept_layers(recipe.recompute, layers, lowest, budget, forwards);
    ui.line(format_args!("round {} {}: {}", round + 1, phase.label(), kept.describe(layers, lowest)));
    kept
}
