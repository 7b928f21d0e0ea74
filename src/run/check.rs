//! `check`: finds the errors that a run would end with before its first step, and predicts its memory and time. Loads
//! no weights and writes nothing.

use std::fmt::Write;
use std::thread::available_parallelism;

use super::forecast::{Forecast, MemoryForecast, measure_rate, probe_name};
use super::session::Session;
use crate::backend::cpu::Cpu;
use crate::config::{CheckArgs, RunConfig};
use crate::data::{Sample, loss_mask_samples};
use crate::exit::Result;
use crate::launch::{Device, Opened, Rank, catch_panic, check_output_dir, memory};
use crate::train::Recipe;
use crate::train::memory::MemoryBudget;
use crate::ui::Ui;

/// Opens model, tokenizer and data, prints a summary and samples of the loss mask, and predicts memory and time.
///
/// # Errors
/// The error with which the run would end before its first step.
pub fn check(config: &RunConfig, args: &CheckArgs, ui: &Ui) -> Result<()> {
    let recipe = config.recipe()?;
    let session = Session::open(config, &recipe, ui)?;
    session.check_sides(&recipe)?;
    check_output_dir(config)?;
    ui.result(session.describe());
    for sample in loss_mask_samples(&session.data, &session.tokenizer, args.show) {
        ui.result(format_sample(&sample, ui.colors_results()));
    }
    let trained = recipe.trained_elements(&session.table, &session.model).at_once;
    let total = session.table.total().elements;
    let share = 100.0 * trained as f64 / total as f64;
    ui.result(format_args!("training at most {trained} of {total} parameters at once ({share:.2} %)"));
    let device = Device::find(config, ui)?;
    let ranks = config.ranks.unwrap_or_else(|| device.ranks());
    let rank = Rank { local_world_size: ranks, ..Rank::single(ui.clone()) };
    device.check(config, ranks)?;
    let budget = match catch_panic(|| device.open(config, session.workload(config.batch_size), &rank))? {
        Opened::Cpu(cpu) => memory::budget(&*cpu, ranks, session.model.vocab_size),
        Opened::Cuda(cuda, _) => {
            let budget = memory::budget(&*cuda, ranks, session.model.vocab_size);
            MemoryBudget { free: budget.free / device.sharing(ranks) as u64, ..budget }
        }
    };
    let forecast = MemoryForecast::new(&session, &recipe, trained, ranks, budget);
    ui.result(forecast.describe(&session, ranks, budget));
    let layers = session.model.layers.len();
    let recomputed = (layers - forecast.kept_layers) as f64 / layers as f64;
    forecast_time(&session, config, &recipe, recomputed, ranks, budget.device, ui);
    ui.result(format_args!("ready: `moewarden train` can run with these options"));
    Ok(())
}

/// Predicts the time of the run on the CPU of this machine. `recomputed`: the share of the layers that recompute their forward.
fn forecast_time(
    session: &Session,
    config: &RunConfig,
    recipe: &Recipe,
    recomputed: f64,
    ranks: usize,
    on_device: bool,
    ui: &Ui,
) {
    let records = &session.data.records;
    let mut forecast = Forecast::new(recipe, &session.model, records, recomputed);
    if let Some(rows) = session.retain_records() {
        forecast = forecast.with_retain_rows(recipe, &session.model, records, rows);
    }
    // Ranks share the cores of one machine, so more ranks do not add compute.
    let cores = available_parallelism().map_or(1, usize::from);
    let threads = if config.threads == 0 { cores } else { config.threads.saturating_mul(ranks).min(cores) };
    let dtype = session.table.params[0].dtype();
    let rate = measure_rate(&Cpu::new(threads), dtype);
    ui.result(forecast.at(rate));
    ui.result(format_args!(
        "  assumes that everything runs at the {:.0} GFLOP/s of a dense matrix product, {} over {dtype:?} weights, just \
         measured on {threads} CPU threads; small batches and small experts run slower{}",
        rate / 1e9,
        probe_name(),
        if on_device { ", a GPU runs much faster" } else { "" },
    ));
}

/// A conversation with its loss tokens in green, or without colours between ⟦ and ⟧. Control characters are escaped.
fn format_sample(sample: &Sample, colors: bool) -> String {
    let (open, close) = if colors { ("\x1b[1;32m", "\x1b[0m") } else { ("⟦", "⟧") };
    let side = if sample.is_unsafe { "unsafe" } else { "safe" };
    let loss = sample.tokens.iter().filter(|(_, loss)| *loss).count();
    let mut out = format!("line {}, {side} side, {loss} of {} tokens with loss:\n", sample.line, sample.tokens.len());
    for run in sample.tokens.chunk_by(|a, b| a.1 == b.1) {
        let text: String = run.iter().map(|(text, _)| text.as_str()).collect();
        let text = escape_control(&text);
        let _ = match run[0].1 {
            true => write!(out, "{open}{text}{close}"),
            false => write!(out, "{text}"),
        };
    }
    out
}

/// Escapes control characters except line feeds and tabs, which could change the state of the terminal.
fn escape_control(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.extend(c.escape_default()),
            c => out.push(c),
        }
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
