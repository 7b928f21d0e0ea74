//! `compare`: trains a matrix of methods and ablations from one configuration, and tabulates the results.

use std::path::Path;

use serde::Serialize;

use super::forecast::duration;
use super::report::{Run, loss_curves};
use super::session::Session;
use super::train::{TrainSummary, train};
use crate::config::{CompareArgs, RunConfig, Variant};
use crate::exit::{self, Ended, Result};
use crate::experts::ExpertId;
use crate::files;
use crate::launch::{Started, check_output_dir, prepare_output_dir};
use crate::report::{Overlap, Page, RunSelection, Table, overlap, overlap_tables, write_json};
use crate::ui::Ui;

/// The value of `compare.json`'s schema.
const COMPARE_SCHEMA: &str = "moewarden.compare/1";

/// The content of `compare.json`.
#[derive(Serialize)]
struct Comparison {
    schema: &'static str,
    model_name: String,
    dataset_path: String,
    variants: Vec<Outcome>,
    overlaps: Vec<Pair>,
}

/// A variant: its results, or its error.
#[derive(Serialize)]
struct Outcome {
    name: String,
    folder: String,
    /// Null if the run failed.
    result: Option<Numbers>,
    error: Option<Error>,
}

#[derive(Serialize)]
struct Error {
    exit_code: u8,
    message: String,
}

#[derive(Serialize)]
struct Numbers {
    /// The losses: [before, after] training.
    ce_loss: [Option<f64>; 2],
    router_loss: Option<[f64; 2]>,
    held_out_loss: [Option<f64>; 2],
    /// The selection of the last round.
    selected: Vec<ExpertId>,
    trained_parameters: usize,
    all_parameters: usize,
    seconds: f64,
}

/// The last selections of two variants.
#[derive(Serialize)]
struct Pair {
    a: String,
    b: String,
    common: usize,
    /// `common` as a share of a's selection.
    share: Option<f64>,
    jaccard: Option<f64>,
    spearman: Option<f64>,
}

/// Trains every variant in a folder of its own, then writes `compare.json`, `compare.md` and `compare.html`.
///
/// If a variant fails, its error is reported and the other variants still run: hours of their results would be lost otherwise.
/// The command then ends with the first failure. A signal that stops a run ends the comparison.
///
/// # Errors
/// The first failure of a variant; a failed write.
pub fn compare(config: &RunConfig, args: &CompareArgs, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    // Check the inputs before the outputs of an earlier comparison are removed.
    check_output_dir(config)?;
    Session::open(config, &config.recipe()?, &Ui::silent())?;
    prepare_output_dir(config)?;
    let variants = args.variants(config);
    let mut outcomes = Vec::new();
    let mut first_failure = None;
    for (i, variant) in variants.iter().enumerate() {
        ui.result(format_args!("--- {} ({} of {})", variant.name, i + 1, variants.len()));
        let (result, error) = match train(&of_its_own(variant), started, ui) {
            Ok(Ended::Done(summary)) => (Some(Numbers::of(&summary)), None),
            Ok(Ended::Stopped(stopped)) => return Ok(Ended::Stopped(stopped)),
            Err(failure) => {
                ui.warn(format_args!("{} failed: {failure}", variant.name));
                let error = Error { exit_code: failure.code(), message: failure.to_string() };
                first_failure.get_or_insert(failure.context(format!("the variant {} failed", variant.name)));
                (None, Some(error))
            }
        };
        let (name, folder) = (variant.name.clone(), variant.config.output_dir.display().to_string());
        outcomes.push(Outcome { name, folder, result, error });
    }
    write(config, outcomes, ui)?;
    first_failure.map_or(Ok(Ended::Done(())), Err)
}

/// The configuration of a variant. The folder of the comparison is prepared already, and only variants that had started can be
/// resumed.
fn of_its_own(variant: &Variant) -> RunConfig {
    let resume = variant.config.resume && variant.config.output_dir.is_dir();
    RunConfig { overwrite: false, resume, ..variant.config.clone() }
}

impl Numbers {
    fn of(summary: &TrainSummary) -> Self {
        let (before, after) = (summary.before, summary.after);
        Self {
            ce_loss: [before.ce_loss, after.ce_loss],
            router_loss: before.router_loss.zip(after.router_loss).map(|(b, a)| [b, a]),
            held_out_loss: [before.held_out_loss, after.held_out_loss],
            selected: summary.selected.clone(),
            trained_parameters: summary.trained[0],
            all_parameters: summary.trained[1],
            seconds: summary.seconds,
        }
    }
}

fn write(config: &RunConfig, outcomes: Vec<Outcome>, ui: &Ui) -> Result<()> {
    let runs: Vec<Run> = outcomes
        .iter()
        .filter(|o| o.result.is_some())
        .map(|o| Run::read(Path::new(&o.folder), o.name.clone()))
        .collect::<Result<_>>()?;
    let choices: Vec<RunSelection> = runs.iter().filter_map(Run::choice).collect();
    let mut tables = vec![table(&outcomes)];
    if choices.len() > 1 {
        tables.extend(overlap_tables(&choices));
    }
    let failures = outcomes.iter().filter_map(|o| Some(format!("{} failed: {}", o.name, o.error.as_ref()?.message)));
    let failures: Vec<String> = failures.collect();

    let mut page = Page::new("moewarden compare");
    let mut text = String::from("# moewarden compare\n");
    failures.iter().for_each(|failure| {
        page.text(failure);
        text += &format!("\n{}\n", failure.replace('\n', " "));
    });
    for table in &tables {
        page.table(table);
        text += &markdown(table);
        ui.result(table.to_text());
    }
    loss_curves(&runs).for_each(|svg| page.svg(&svg));

    let comparison = Comparison {
        schema: COMPARE_SCHEMA,
        model_name: config.model_name.clone(),
        dataset_path: config.dataset_path.display().to_string(),
        overlaps: pairs(&choices),
        variants: outcomes,
    };
    let dir = &config.output_dir;
    write_json(dir.join("compare.json"), &comparison)?;
    files::write(dir.join("compare.md"), text)?;
    files::write(dir.join("compare.html"), page.finish())?;
    ui.result(format_args!("comparison: {}", dir.join("compare.html").display()));
    Ok(())
}

fn pairs(choices: &[RunSelection]) -> Vec<Pair> {
    let mut out = Vec::new();
    for (i, a) in choices.iter().enumerate() {
        for b in &choices[i + 1..] {
            let Overlap { common, share, jaccard, spearman } = overlap(a, b);
            out.push(Pair { a: a.name.clone(), b: b.name.clone(), common, share, jaccard, spearman });
        }
    }
    out
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new(
        "Variants: cross-entropy of the refusals (CE), divergence between safe and unsafe prompts (KL), and cross-entropy of \
         the held-out rows, each before → after",
        ["variant", "CE", "KL", "held-out CE", "selected", "trained", "time"],
    );
    let change = |[before, after]: [Option<f64>; 2], digits: usize| match (before, after) {
        (Some(before), Some(after)) => format!("{before:.digits$} → {after:.digits$}"),
        _ => "-".into(),
    };
    for outcome in outcomes {
        let cells = match (&outcome.result, &outcome.error) {
            (Some(n), _) => [
                change(n.ce_loss, 4),
                change(n.router_loss.map_or([None; 2], |both| both.map(Some)), 5),
                change(n.held_out_loss, 4),
                n.selected.len().to_string(),
                format!("{:.2} %", 100.0 * n.trained_parameters as f64 / n.all_parameters as f64),
                duration(n.seconds),
            ],
            (None, error) => {
                let code = error.as_ref().map_or(exit::INTERNAL, |e| e.exit_code);
                [format!("failed ({code})"), "-".into(), "-".into(), "-".into(), "-".into(), "-".into()]
            }
        };
        table.row([outcome.name.clone()].into_iter().chain(cells));
    }
    table
}

fn markdown(table: &Table) -> String {
    let line = |cells: &[String]| {
        format!("| {} |\n", cells.iter().map(|c| c.replace('|', "\\|")).collect::<Vec<_>>().join(" | "))
    };
    let rule = format!("|---|{}\n", "---:|".repeat(table.header.len() - 1));
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    format!("\n{}\n\n{}{rule}{rows}", table.caption, line(&table.header))
}
