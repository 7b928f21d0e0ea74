//! `compare`: trains a matrix of methods, ablations and swept options from one configuration, evaluates every variant, and tests the
//! differences.

mod evaluate;
mod finished;
mod page;
mod plan;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;

use evaluate::{Evaluations, primary};
use finished::Cell;
use page::Shown;
use plan::{Plan, chosen};

use super::report::Run;
use super::session::{Base, Session};
use super::train::{TrainSummary, Within, train_within};
use super::{dense, prepare};
use crate::checkpoint::newest_position;
use crate::config::{CompareArgs, RunConfig, Variant};
use crate::data::Dataset;
use crate::exit::{self, Context, Ended, Failure, Result};
use crate::files;
use crate::launch::{Ranks, Started, check_output_dir};
use crate::report::{
    COMPARE_SCHEMA, CompareReport, DistinctSelection, Evaluated, ORIGINAL, Overlap, OverlapReport, RunSelection,
    SelectionReport, TrainingResult, VariantError, VariantReport, distinct_selections, overlap, paired_tests,
    write_json,
};
use crate::train::Training;
use crate::ui::Ui;

/// Trains every variant in a folder of its own and evaluates it, then writes `compare.json`, `compare.md` and `compare.html`.
///
/// If a variant fails, its error is reported and the other variants still run: hours of their results would be lost otherwise.
/// The command then ends with the first failure. A signal that stops a run ends the comparison. All processes of a launch call it; the
/// one with rank 0 writes, and holds the results of evaluations.
///
/// # Errors
/// The first failure of a variant; a failed write.
pub fn compare(config: &RunConfig, args: &CompareArgs, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    let variants = args.variants(config);
    let ranks = &started.ranks;
    let base = ranks.all_ok(check_output_dir(config).map_err(Into::into).and_then(|()| Base::open(config, ui)))?;
    let evaluations = Evaluations { config, base: &base, args, started, ui };
    let (inputs, trained) = ranks.all_ok(check(&variants, &base))?;
    let notes = evaluations.check(&trained)?;
    let _lock = prepare::take_output_dir_keeping(config, &evaluations.all_inputs(), &started.ranks)?;
    if let Some(line) = chosen(config, args) {
        ui.line(line);
    }
    notes.iter().for_each(|note| ui.warn(note));
    ranks.first(|| Plan::new(&evaluations, &variants, Vec::new())?.check_early(&config.output_dir))?;
    let mut evaluated: BTreeMap<String, Evaluated> = BTreeMap::new();
    let mut measures = Vec::new();
    if evaluations.are_asked_for() {
        match evaluations.of(ORIGINAL, &base.dir)? {
            Ended::Stopped(stopped) => return Ok(Ended::Stopped(stopped)),
            Ended::Done(original) => {
                measures = primary(&original);
                evaluated.insert(ORIGINAL.into(), original);
            }
        }
    }
    let plan = ranks.first(|| {
        let plan = Plan::new(&evaluations, &variants, measures)?;
        plan.write_or_check(&config.output_dir)?;
        Ok(plan)
    })?;

    let mut reports = Vec::new();
    let mut first_failure = None;
    for (i, (variant, inputs)) in variants.iter().zip(inputs).enumerate() {
        ui.result(format_args!("--- {} ({} of {})", variant.name, i + 1, variants.len()));
        let mut report = empty_report(variant);
        match run(variant, inputs, &evaluations, evaluated.get(ORIGINAL), &mut report) {
            Ok(Ended::Stopped(stopped)) => return Ok(Ended::Stopped(stopped)),
            Ok(Ended::Done(found)) => _ = evaluated.insert(variant.name.clone(), found),
            Err(failure) => {
                ui.warn(format_args!("{} failed: {failure}", variant.name));
                report.error = Some(VariantError { exit_code: failure.code(), message: failure.to_string() });
                first_failure.get_or_insert(failure.context(format!("the variant {} failed", variant.name)));
                ranks.renew()?;
            }
        }
        reports.push(report);
    }
    let page = Shown { base: args.settings_of(config), notes };
    ranks.first(|| plan.map_or(Ok(()), |plan| write(config, &plan, &evaluated, reports, page, ui)))?;
    first_failure.map_or(Ok(Ended::Done(())), Err)
}

/// Checks the inputs of all variants, before the outputs of an earlier comparison are removed. Returns the hash of the inputs of each
/// variant, and the requests of the rows on which some variant is trained.
fn check(variants: &[Variant], base: &Base) -> Result<(Vec<blake3::Hash>, HashSet<String>)> {
    let ui = &Ui::silent();
    if base.model.is_dense() && !variants.iter().all(Variant::trains_a_dense_model) {
        let message = format!(
            "{} is a dense model, without experts and routers: compare trains it only with --ablations baseline",
            base.dir.display()
        );
        return Err(Failure::new(exit::CONFIG, message));
    }
    let mut trained = HashSet::new();
    let mut of_variant = |variant: &Variant| -> Result<blake3::Hash> {
        let config = &variant.config;
        let recipe = dense::fit_recipe(config.recipe()?, config, ui)?;
        let session = Session::open_on(prepare::opened(config, Some(base), ui)?, config, &recipe, ui)?;
        session.check_weights()?;
        session.check_copied()?;
        if recipe.training != Training::Nothing {
            let retained = session.retain_data().map(|(_, data)| data);
            trained.extend([&session.data].into_iter().chain(retained).flat_map(Dataset::requests));
        }
        session.fingerprint(config)
    };
    let named = |variant: &Variant| of_variant(variant).context(format!("the variant {}", variant.name));
    let inputs = variants.iter().map(named).collect::<Result<_>>()?;
    Ok((inputs, trained))
}

/// Trains and evaluates a variant, unless that is done.
fn run(
    variant: &Variant,
    inputs: blake3::Hash,
    evaluations: &Evaluations<'_>,
    original: Option<&Evaluated>,
    report: &mut VariantReport,
) -> Result<Ended<Evaluated>> {
    let (started, ui) = (evaluations.started, evaluations.ui);
    let ranks = &started.ranks;
    let config = of_its_own(variant, ranks)?;
    let exactly =
        (variant.method().is_some() && evaluations.args.needs_equal_parameters()).then_some(config.top_k_experts);
    let cell = Cell { config: &config, inputs, exactly, evaluations };
    if variant.config.resume {
        let mut kept = None;
        let is_kept = || {
            kept = cell.kept(original)?;
            Ok(kept.is_some())
        };
        if ranks.decide(is_kept)? {
            let Some((results, found)) = kept else { return Ok(Ended::Done(Evaluated::default())) };
            *report = results;
            return Ok(Ended::Done(found));
        }
    }
    match train_within(&config, &Within { base: Some(evaluations.base), exactly }, started, ui)? {
        Ended::Stopped(stopped) => return Ok(Ended::Stopped(stopped)),
        Ended::Done(summary) => report.result = Some(result_of(variant, &summary)),
    }
    let evaluated = evaluations.of(&variant.name, &config.output_dir.join("final_model"))?;
    if let Ended::Done(found) = &evaluated {
        report.measures = found.estimates();
        ranks.first(|| cell.keep(report))?;
    }
    Ok(evaluated)
}

/// The configuration of a variant. The folder of the comparison is prepared already, and only variants that had started can be
/// resumed; one without a checkpoint, whose models were dropped, say, is begun anew.
fn of_its_own(variant: &Variant, ranks: &Ranks) -> Result<RunConfig> {
    let dir = &variant.config.output_dir;
    let started = variant.config.resume && ranks.decide(|| Ok(dir.is_dir()))?;
    let resume = started && ranks.decide(|| Ok(newest_position(&dir.join("checkpoints")).is_some()))?;
    Ok(RunConfig { overwrite: started && !resume, resume, ..variant.config.clone() })
}

fn empty_report(variant: &Variant) -> VariantReport {
    VariantReport {
        name: variant.name.clone(),
        folder: variant.config.output_dir.display().to_string(),
        ablation: variant.ablation.name(),
        method: variant.method().map(|method| method.name()),
        settings: variant.settings.clone(),
        result: None,
        measures: BTreeMap::new(),
        error: None,
    }
}

fn result_of(variant: &Variant, summary: &TrainSummary) -> TrainingResult {
    let (before, after) = (summary.before, summary.after);
    TrainingResult {
        ce_loss: [before.ce_loss, after.ce_loss],
        router_loss: before.router_loss.zip(after.router_loss).map(|(b, a)| [b, a]),
        held_out_loss: [before.held_out_loss, after.held_out_loss],
        selected: if variant.method().is_some() { summary.selected.clone() } else { Vec::new() },
        trained_parameters: summary.trained[0],
        all_parameters: summary.trained[1],
        seconds: summary.seconds,
    }
}

/// Tests the differences, and writes all results.
fn write(
    config: &RunConfig,
    plan: &Plan,
    evaluated: &BTreeMap<String, Evaluated>,
    variants: Vec<VariantReport>,
    shown: Shown,
    ui: &Ui,
) -> Result<()> {
    let dir = &config.output_dir;
    let trained = variants.iter().filter(|variant| variant.result.is_some());
    let runs: Vec<Run> = trained.map(|v| Run::read(Path::new(&v.folder), v.name.clone())).collect::<Result<_>>()?;
    // Other runs select experts, too, and do not train them.
    let trains = |choice: &RunSelection| variants.iter().any(|v| v.name == choice.name && v.method.is_some());
    let choices: Vec<RunSelection> = runs.iter().filter_map(Run::choice).filter(trains).collect();
    let selections = distinct_selections(&choices);
    let report = CompareReport {
        schema: COMPARE_SCHEMA.into(),
        model_name: config.model_name.clone(),
        dataset_path: config.dataset_path.display().to_string(),
        plan: plan.hash(dir)?,
        original: evaluated.get(ORIGINAL).map(Evaluated::estimates).unwrap_or_default(),
        cut_off: evaluated.values().flat_map(|found| found.cut_off.clone()).collect(),
        lower_bounds: evaluated.values().flat_map(|found| found.lower_bounds.clone()).collect(),
        tests: paired_tests(evaluated, &plan.contrasts, &plan.measures),
        overlaps: overlaps(&selections),
        selections: selections
            .iter()
            .map(|s| SelectionReport { variants: s.runs.clone(), selected: s.first.selected.clone() })
            .collect(),
        variants,
    };
    write_json(dir.join("compare.json"), &report)?;
    let page = page::Content { report: &report, measures: &plan.measures, selections: &selections, runs: &runs, shown };
    files::write(dir.join("compare.md"), page.markdown())?;
    files::write(dir.join("compare.html"), page.html())?;
    page.print(ui);
    ui.result(format_args!("comparison: {}", dir.join("compare.html").display()));
    Ok(())
}

fn overlaps(selections: &[DistinctSelection]) -> Vec<OverlapReport> {
    let mut out = Vec::new();
    for (i, a) in selections.iter().enumerate() {
        for b in &selections[i + 1..] {
            let Overlap { common, share, jaccard, spearman } = overlap(&a.first, &b.first);
            out.push(OverlapReport { a: a.runs[0].clone(), b: b.runs[0].clone(), common, share, jaccard, spearman });
        }
    }
    out
}
