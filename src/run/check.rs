//! `check`: finds the errors that a run would end with before its first step, and predicts its memory and time. Writes
//! nothing.

use std::fmt::Write;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use super::dense::fit_recipe;
use super::forecast::{Forecast, MemoryForecast, Rates, Sizes, Tokens, duration};
use super::prepare;
use super::session::Session;
use super::train::snapshots;
use crate::backend::cpu::Cpu;
use crate::config::{CheckArgs, Init, RunConfig};
use crate::data::{Sample, loss_mask_samples};
use crate::exit::{Failure, Result};
use crate::launch::memory::human;
use crate::launch::{Device, Opened, Rank, catch_panic, check_output_dir, memory};
use crate::quote;
use crate::train::memory::MemoryBudget;
use crate::train::{Recipe, TrainedElements, Training};
use crate::ui::Ui;

/// Opens model, tokenizer and data, prints a summary and samples of the loss mask, and predicts memory and time.
///
/// # Errors
/// The error with which the run would end before its first step.
pub fn check(config: &RunConfig, args: &CheckArgs, ui: &Ui) -> Result<()> {
    let recipe = fit_recipe(config.recipe()?, config, ui)?;
    let session = Session::open(config, &recipe, ui)?;
    session.check_sides(&recipe)?;
    session.check_copied()?;
    check_output_dir(config)?;
    ui.result(session.describe());
    // What the program takes without weights and activations: itself, tokenizer and data. Mapped weights count once they are read.
    let process = memory::peak_resident();
    let loading = check_weights(&session, args, ui)?;
    for sample in loss_mask_samples(&session.data, &session.tokenizer, args.show) {
        ui.result(format_sample(&sample, ui.colors_results()));
    }
    let trained = recipe.trained_elements(&session.table, &session.model);
    let total = session.table.total().elements;
    let share = 100.0 * trained.at_once as f64 / total as f64;
    ui.result(format_args!("training at most {} of {total} parameters at once ({share:.2} %)", trained.at_once));
    let device = Device::find(config, ui)?;
    let ranks = config.ranks.unwrap_or_else(|| device.ranks());
    let rank = Rank { local_world_size: ranks, ..Rank::single(ui.clone()) };
    snapshots::check(&session, config, &recipe, &rank)?;
    device.check(config, ranks)?;
    // Of several ranks only this one is here: there is none to divide experts with.
    let alone = RunConfig { shard_frozen: false, ..config.clone() };
    let opened = catch_panic(|| device.open(&alone, session.workload(config.batch_size), &rank))?;
    let budget = match &opened {
        Opened::Cpu(cpu) => memory::budget(&**cpu, ranks, session.model.vocab_size),
        Opened::Cuda(cuda, _) => {
            let budget = memory::budget(&**cuda, ranks, session.model.vocab_size);
            let divided = (config.shard_frozen && ranks > 1).then_some(ranks);
            if config.shard_frozen && ranks == 1 {
                ui.warn("--shard-frozen does nothing with one rank");
            }
            MemoryBudget { free: budget.free / device.sharing(ranks) as u64, divided, ..budget }
        }
    };
    let place = |trained, rank: &Rank| {
        let placement = MemoryForecast::place_experts(&session, config, &recipe, trained, ranks, budget);
        prepare::agree_on_placement(placement, &session.table, &budget, rank)
    };
    let placement = place(trained.at_once, &rank)?;
    let forecast = MemoryForecast::new(&session, config, &recipe, trained.at_once, ranks, budget, placement);
    ui.result(forecast.describe(&session, ranks, budget));
    if let (Opened::Cuda(cuda, _), true) = (&opened, placement.on_host() > 0)
        && let Some(rate) = catch_panic(|| cuda.measure_bus().map_err(Failure::from))?
    {
        placement.describe_bus(rate, ranks).into_iter().for_each(|bus| ui.result(bus));
    }
    forecast.check(&budget, ranks, config.force)?;
    if let Some(problem) = recipe.updates.warm_up_problem(most_steps(&session, &recipe)) {
        ui.warn(format_args!("in a training phase {problem}"));
    }
    let layers = session.model.layers.len();
    let recomputed = (layers - forecast.kept_layers) as f64 / layers as f64;
    let time = forecast_time(&session, config, &recipe, recomputed, &trained);
    // A device does not hold the program.
    let process = if budget.device { 0 } else { process };
    // Ranks share the cores of one machine, so more ranks do not add compute.
    let cores = available_parallelism().map_or(1, usize::from);
    let threads = if config.threads == 0 { cores } else { config.threads.saturating_mul(ranks).min(cores) };
    let cpu = match opened {
        Opened::Cpu(cpu) => Cpu::new(threads).with_products(cpu.products().copied()),
        Opened::Cuda(..) => Cpu::new(threads),
    };
    let rates = Rates::measure(&cpu, &session.model, sizes(&session, config, &recipe), &time.total());
    ui.result(format_args!("time a rank: {}", time.at(&rates)));
    ui.result(format_args!(
        "  at rates just measured with the operations of a layer on {} CPU threads, {:.0} GFLOP/s on average{}",
        cpu.threads(),
        rates.average(&time.total()) / 1e9,
        if budget.device { "; a GPU runs much faster" } else { "" },
    ));
    let placed = place(0, &Rank::single(Ui::silent()))?;
    let identification = MemoryForecast::new(&session, config, &recipe, 0, ranks, budget, placed);
    for (command, memory, time) in
        [("identify", identification, time.of_identification(&recipe)), ("train", forecast, time)]
    {
        let memory = human(memory.peak().saturating_add(process));
        let seconds = duration(loading.as_secs_f64() + time.seconds(&rates));
        ui.result(format_args!("`{command}`: {memory} a rank, {seconds}"));
    }
    ui.result(format_args!("ready: `moewarden train` can run with these options"));
    Ok(())
}

/// Reads all weights, as the run does before its first step: they must be finite. Returns the time it took.
fn check_weights(session: &Session, args: &CheckArgs, ui: &Ui) -> Result<Duration> {
    if session.checkpoint.is_none() {
        return Ok(Duration::ZERO); // random weights
    }
    let size = human(session.table.total().bytes as u64);
    if args.skip_weights {
        ui.result(format_args!("weights: not read (--skip-weights); a run refuses NaN and infinite ones"));
        return Ok(Duration::ZERO);
    }
    let clock = Instant::now();
    session.check_weights()?;
    let elapsed = clock.elapsed();
    let seconds = duration(elapsed.as_secs_f64());
    ui.result(format_args!("weights: all are finite ({size}, read in {seconds}; --skip-weights leaves this out)"));
    Ok(elapsed)
}

/// Predicts the work of the run. `recomputed`: the share of the layers that recompute their forward.
fn forecast_time(
    session: &Session,
    config: &RunConfig,
    recipe: &Recipe,
    recomputed: f64,
    trained: &TrainedElements,
) -> Forecast {
    let (model, records) = (&session.model, &session.data.records);
    let mut forecast = Forecast::new(recipe, model, records, recomputed, trained);
    if let Some(rows) = session.retain_records() {
        forecast = forecast.with_retain_rows(recipe, model, records, rows);
    }
    if let Some(held_out) = &session.held_out {
        forecast = forecast.with_held_out(model, &held_out.records);
    }
    forecast = forecast.with_own_replies(session, config, recipe);
    match config.init {
        Init::Random => forecast.with_random_weights(session.table.total().elements),
        Init::Checkpoint => forecast,
    }
}

/// Steps that no training phase exceeds: those with all replies on one rank.
fn most_steps(session: &Session, recipe: &Recipe) -> usize {
    let replies = session.data.records.iter().flat_map(|r| [&r.unsafe_reply, &r.safe_reply]).flatten().count();
    let steps_on = |examples: usize, epochs: usize, grad_accum: usize| {
        epochs * examples.div_ceil(recipe.batch_size).div_ceil(grad_accum)
    };
    let steps = |epochs: usize, grad_accum: usize| steps_on(replies, epochs, grad_accum);
    let experts = match &recipe.training {
        Training::Nothing => return usize::MAX,
        Training::Routers(_) => 0,
        Training::Experts(phase) | Training::Alternate(phase, _) => steps(phase.epochs, phase.grad_accum),
        // Safe examples are repeated until they are this share.
        Training::Joint(phase) => {
            let examples = (replies as f64 / (1.0 - phase.safe_ratio)).ceil() as usize;
            steps_on(examples, phase.epochs, phase.grad_accum)
        }
    };
    experts.max(recipe.router_phase().map_or(0, |phase| steps(phase.epochs, 1)))
}

/// The sizes of a micro-batch of unsafe replies.
fn sizes(session: &Session, config: &RunConfig, recipe: &Recipe) -> Sizes {
    let replies = || session.data.records.iter().filter_map(|r| r.unsafe_reply.as_ref());
    let t = Tokens::of(replies().map(|e| (e.ids.len(), e.loss.iter().filter(|l| **l).count())));
    let batches = (t.sequences / recipe.batch_size as f64).ceil().max(1.0);
    Sizes {
        rows: (t.all / batches) as usize,
        length: t.mean_length() as usize,
        loss_rows: (t.loss / batches) as usize,
        generated: config.generation_batch_size.min(session.data.records.len()),
        dtype: session.workload(recipe.batch_size).stored,
    }
}

/// A conversation with its loss tokens in green, or without colours between ⟦ and ⟧. Control characters are escaped.
fn format_sample(sample: &Sample, colors: bool) -> String {
    let (open, close) = if colors { ("\x1b[1;32m", "\x1b[0m") } else { ("⟦", "⟧") };
    let side = if sample.is_unsafe { "unsafe" } else { "safe" };
    let loss = sample.tokens.iter().filter(|(_, loss)| *loss).count();
    let mut out = format!("line {}, {side} side, {loss} of {} tokens with loss:\n", sample.line, sample.tokens.len());
    for run in sample.tokens.chunk_by(|a, b| a.1 == b.1) {
        let text: String = run.iter().map(|(text, _)| text.as_str()).collect();
        let text = quote::lines(&text); // without characters that could change the state of the terminal
        let _ = match run[0].1 {
            true => write!(out, "{open}{text}{close}"),
            false => write!(out, "{text}"),
        };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_tokens_are_marked() {
        let token = |text: &str, loss| (text.to_owned(), loss);
        let tokens = vec![token("<user>\x1b[2J", false), token("hi\n", false), token("No", true), token(".", true)];
        let sample = Sample { line: 7, is_unsafe: true, tokens };
        let plain = format_sample(&sample, false);
        assert_eq!(plain, "line 7, unsafe side, 2 of 4 tokens with loss:\n<user>\\u{1b}[2Jhi\n⟦No.⟧");
        let colored = format_sample(&sample, true);
        assert!(colored.ends_with("\x1b[1;32mNo.\x1b[0m") && colored.contains("\\u{1b}[2J"), "{colored}");
    }
}
