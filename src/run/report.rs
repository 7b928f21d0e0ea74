//! `report`: finished runs as one self-contained HTML page, heat maps as SVG files, and tables on the terminal.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::config::ReportArgs;
use crate::exit::{self, Failure, Result};
use crate::experts::{ExpertScores, ScoreNorm};
use crate::files;
use crate::launch::{Existing, prepare_dir_keeping};
use crate::meter::{Meter, Unit};
use crate::quote::cut;
use crate::report::{
    self, Cells, EvalReport, MetricsRow, Page, RankingsFile, RetentionLog, RoundScores, RunSelection, ScoresFile,
    Series, Table, curve_svg, cut_off_warning, distinct_selections, drift_tables, eval_tables, heatmap_svg, outcomes,
    overlap_table, paired_table, read_json, read_rows, rerouting_table, standalone,
};
use crate::train::{ExpertLoads, Phase};
use crate::ui::Ui;

/// Maximum number of selected experts listed for a run.
const TOP_EXPERTS: usize = 10;

/// The files of a run that are read.
const OF_A_RUN: [&str; 5] =
    ["expert_scores.json", "metrics.jsonl", "training_metadata.json", "rankings.json", "eval.json"];

/// Characters of a run's name.
const NAME: usize = 100;

/// The content of an output folder of `train`, `identify` or `eval`.
pub(super) struct Run {
    pub name: String,
    pub scores: Option<ScoresFile>,
    pub metrics: Vec<MetricsRow>,
    /// What is missing of the losses.
    note: Option<String>,
    /// What is missing or means nothing of the scores and metadata.
    remarks: Vec<String>,
    metadata: Value,
    rankings: Option<RankingsFile>,
    eval: Option<EvalReport>,
}

/// Reads runs and writes `report.html` and a heat map of each round's scores.
///
/// # Errors
/// A folder without anything to report, or with an invalid file; an output folder that is in use.
pub fn report(args: &ReportArgs, ui: &Ui) -> Result<()> {
    let names = names(&args.runs.iter().map(|run| run.as_path()).collect::<Vec<_>>());
    let runs: Vec<Run> = args.runs.iter().zip(names).map(|(dir, name)| Run::read(dir, name)).collect::<Result<_>>()?;
    let inputs: Vec<&Path> = args.runs.iter().map(|run| run.as_path()).collect();
    prepare_dir_keeping(&args.output_dir, Existing::of(args.overwrite, false), &inputs)?;

    let mut page = Page::new("moewarden report");
    let add = |page: &mut Page, table: &Table| {
        if !table.rows.is_empty() {
            page.table(table);
            ui.result(table.to_text());
        }
    };
    let trained: Vec<&Run> = runs.iter().filter(|run| run.eval.is_none() || run.scores.is_some()).collect();
    page.section("Runs");
    add(&mut page, &summary(&trained));
    runs.iter().flat_map(|run| &run.remarks).for_each(|text| note(&mut page, text, ui));
    losses(&mut page, &runs, ui);
    let retained: Vec<_> = runs.iter().filter_map(|run| Some((run.name.clone(), run.retention()?))).collect();
    if !retained.is_empty() {
        page.section("Drift");
        drift_tables(&retained).iter().for_each(|table| add(&mut page, table));
    }
    let evals: Vec<(String, EvalReport)> =
        runs.iter().filter_map(|run| Some((run.name.clone(), run.eval.clone()?))).collect();
    if !evals.is_empty() {
        page.section("Evaluations");
        eval_tables(&evals).iter().for_each(|table| add(&mut page, table));
        for (name, eval) in &evals {
            if let Some(warning) = cut_off_warning(&eval.refusal_onset) {
                let warning = format!("{name}: {warning}");
                page.text(&warning);
                ui.warn(warning);
            }
        }
        add(&mut page, &rerouting_table(&evals));
        let mut torn = Vec::new();
        add(&mut page, &paired(&args.runs, &runs, &mut |line| torn.push(line))?);
        torn.iter().for_each(|line| note(&mut page, line, ui));
    }
    let choices: Vec<RunSelection> = runs.iter().filter_map(Run::choice).collect();
    if let Some(table) = overlap_table(&distinct_selections(&choices)) {
        page.section("Comparison of the last selections");
        add(&mut page, &table);
    }
    for (i, run) in runs.iter().enumerate() {
        let Some(scores) = &run.scores else { continue };
        page.section(&run.name);
        heatmaps(&mut page, i, run, scores, &args.output_dir)?;
        load_maps(&mut page, i, run, scores);
        let rankings = run.rankings.as_ref().map_or_else(Vec::new, RankingsFile::selections);
        overlap_table(&distinct_selections(&rankings)).iter().for_each(|table| page.table(table));
        top_experts(scores).iter().for_each(|table| page.table(table));
        for (round, found) in &scores.rounds {
            let how_many = found.how_many.as_ref().filter(|_| found.kept_from.is_none());
            for line in how_many.iter().flat_map(|h| h.describe().lines().map(str::to_owned).collect::<Vec<_>>()) {
                page.text(&format!("Round {round}: {line}"));
            }
        }
    }
    let path = args.output_dir.join("report.html");
    files::write(&path, page.finish())?;
    ui.result(format_args!("report: {}", path.display()));
    Ok(())
}

impl Run {
    /// Reads the files that exist in the folder.
    pub fn read(dir: &Path, name: String) -> Result<Self> {
        const GIVE: &str = "give output folders of `moewarden train`, `identify` or `eval`";
        if !dir.is_dir() {
            let is_of_a_run = dir.file_name().is_some_and(|name| OF_A_RUN.iter().any(|known| *known == name));
            let what = match dir.exists() {
                true if is_of_a_run => "is a file of a run: give the folder that it is in".to_owned(),
                true => format!("is a file, not a folder: {GIVE}"),
                false => format!("does not exist (is the path right?): {GIVE}"),
            };
            return Err(Failure::new(exit::NO_INPUT, format!("{} {what}", dir.display())));
        }
        let bytes = OF_A_RUN.iter().map(|name| size(&dir.join(name))).sum();
        let meter = &Meter::start(format!("reading {}", dir.display()), Unit::Bytes, bytes);
        let [scores_path, log, metadata_path, rankings, eval] = OF_A_RUN.map(|name| dir.join(name));
        let scores = existing(meter, &scores_path, ScoresFile::read)?;
        let metrics = existing(meter, &log, read_rows)?;
        let metadata = existing(meter, &metadata_path, read_json)?.unwrap_or(Value::Null);
        let rankings = existing(meter, &rankings, RankingsFile::read)?;
        let eval = existing(meter, &eval, EvalReport::read)?;
        if scores.is_none() && eval.is_none() {
            let what = if dir.join("compare.json").exists() {
                "its page is compare.html; give the folders of its variants, or those in evaluations"
            } else if dir.join("ablation.json").exists() {
                "its page is ablation.html, which is that of `moewarden ablate`"
            } else {
                GIVE
            };
            let message = format!("{} holds neither expert_scores.json nor eval.json: {what}", dir.display());
            return Err(Failure::new(exit::NO_INPUT, message));
        }
        let note = match &metrics {
            _ if scores.is_none() => None,
            None => Some(format!("{} is missing: the page has no losses of {name}", log.display())),
            Some(found) if found.torn.is_some() => found.torn.clone(),
            // An identification without scores (random) has no rows; its metadata say that nothing was trained.
            Some(found)
                if found.rows.is_empty() && metadata["training_logs"].as_array().is_none_or(|t| !t.is_empty()) =>
            {
                Some(format!("{} is empty: the page has no losses of {name}", log.display()))
            }
            Some(_) => None,
        };
        let mut remarks = Vec::new();
        if let Some(scores) = &scores {
            remarks.extend(remark_on_metadata(&metadata_path, &metadata));
            remarks.extend(remarks_on_scores(&scores_path, scores));
        }
        let metrics = metrics.map_or_else(Vec::new, |found| found.rows);
        Ok(Self { name, scores, metrics, note, remarks, metadata, rankings, eval })
    }

    /// The last round's selection and scores.
    pub fn choice(&self) -> Option<RunSelection> {
        let scores = self.scores.as_ref()?;
        let (round, last) = scores.rounds.last_key_value()?;
        Some(RunSelection {
            name: self.name.clone(),
            selected: last.selected.clone(),
            scores: scores.scores_of_selection(*round),
        })
    }

    /// The distance from the original model on the retain rows, of a run that had some.
    fn retention(&self) -> Option<RetentionLog> {
        serde_json::from_value(self.metadata["retention"].clone()).ok()
    }

    /// A value of the metadata as text; `-` if it is missing.
    fn metadata(&self, key: &str) -> String {
        match &self.metadata[key] {
            Value::Null => "-".into(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        }
    }
}

/// Says that metadata are missing.
fn remark_on_metadata(path: &Path, metadata: &Value) -> Option<String> {
    let what = match metadata {
        Value::Null => "is missing, as in a run that has not ended",
        found if found["training_strategy"].is_null() => "holds no metadata of a run",
        _ => return None,
    };
    Some(format!("{} {what}: the page has no strategy, losses before and after, and drift of it", path.display()))
}

/// Says that nothing was selected, or that scores mean nothing. A dense model has no experts.
fn remarks_on_scores(path: &Path, scores: &ScoresFile) -> Vec<String> {
    let path = path.display();
    if scores.layers.is_empty() {
        return Vec::new();
    }
    if scores.rounds.is_empty() {
        return vec![format!("{path} has no rounds: nothing was scored or selected")];
    }
    let of_round = |(&round, found): (&usize, &RoundScores)| {
        let zero = scores.scores(round).is_some_and(|all| all.values.iter().all(|score| *score == 0.0));
        [
            found.selected.is_empty().then(|| format!("{path}: round {round} selects no experts")),
            zero.then(|| {
                format!("{path}: all scores of round {round} are 0, so its selection says nothing about the experts")
            }),
        ]
    };
    scores.rounds.iter().flat_map(of_round).flatten().collect()
}

/// Adds the curves of losses, and what is missing of them; nothing where neither is there.
fn losses(page: &mut Page, runs: &[Run], ui: &Ui) {
    let curves: Vec<String> = loss_curves(runs).collect();
    let mut notes = runs.iter().filter_map(|run| run.note.as_ref()).peekable();
    if curves.is_empty() && notes.peek().is_none() {
        return;
    }
    page.section("Losses");
    curves.iter().for_each(|svg| page.svg(svg));
    notes.for_each(|text| note(page, text, ui));
}

/// A warning that the page holds, too.
fn note(page: &mut Page, text: &str, ui: &Ui) {
    ui.warn(text);
    page.text(&format!("Warning: {text}."));
}

/// Reads a file if it exists.
fn existing<T>(meter: &Meter, path: &Path, read: impl FnOnce(&Path) -> Result<T, report::Error>) -> Result<Option<T>> {
    let found = path.exists().then(|| read(path)).transpose()?;
    meter.add(size(path) as usize);
    Ok(found)
}

/// The bytes of a file; 0 if it does not exist.
fn size(path: &Path) -> u64 {
    path.metadata().map_or(0, |file| file.len())
}

/// The paired differences of the evaluations from the first; `warn` hears of torn files.
fn paired(dirs: &[PathBuf], runs: &[Run], warn: &mut dyn FnMut(String)) -> Result<Table> {
    let evals = dirs.iter().zip(runs).filter_map(|(dir, run)| Some((dir, &run.name, run.eval.as_ref()?)));
    let outcomes = evals.map(|(dir, name, eval)| Ok((name.clone(), outcomes(dir, eval, warn)?)));
    Ok(paired_table(&outcomes.collect::<Result<Vec<_>>>()?))
}

/// The names of the folders, or their full paths if the names are not unique; each as one line of limited length.
fn names(dirs: &[&Path]) -> Vec<String> {
    let short = |dir: &Path| dir.file_name().map(|name| name.to_string_lossy().into_owned());
    let distinct: HashSet<_> = dirs.iter().map(|dir| short(dir)).collect();
    let unique = distinct.len() == dirs.len() && !distinct.contains(&None);
    let name = |dir: &&Path| short(dir).filter(|_| unique).unwrap_or_else(|| dir.display().to_string());
    let names: Vec<String> = dirs.iter().map(|dir| cut(&name(dir), NAME)).collect();
    if names.iter().collect::<HashSet<_>>().len() == names.len() {
        return names;
    }
    names.iter().zip(1..).map(|(name, i)| format!("{i}: {name}")).collect()
}

/// A table of the runs: method, strategy, number of selected experts, losses before and after.
fn summary(runs: &[&Run]) -> Table {
    let mut table = Table::new(
        "Losses over all rows, before the first round → after the last",
        ["run", "method", "strategy", "rounds", "selected", "cross-entropy", "safe prompts", "divergence", "held-out"],
    );
    for run in runs {
        let scores = run.scores.as_ref();
        // A dense model has no experts, of which the method would select some.
        let scored = scores.filter(|scores| !scores.layers.is_empty());
        let method = scored.map_or_else(|| "-".into(), |s| format!("{:?}", s.method).to_lowercase());
        let rounds = scores.map_or(0, |s| s.rounds.len());
        let selected = run.choice().map_or(0, |c| c.selected.len());
        let before_and_after = |name: &str| {
            let format_loss = |x: &Value| x.as_f64().map_or_else(|| "-".into(), |x| format!("{x:.4}"));
            let both: Vec<String> = run.metadata[name].as_array().into_iter().flatten().map(format_loss).collect();
            if both.is_empty() { "-".into() } else { both.join(" → ") }
        };
        table.row([
            run.name.clone(),
            method,
            run.metadata("training_strategy"),
            rounds.to_string(),
            selected.to_string(),
            before_and_after("ce_loss"),
            before_and_after("safe_loss"),
            before_and_after("router_loss"),
            before_and_after("held_out_loss"),
        ]);
    }
    table
}

/// Charts over the steps of training, one for each kind of loss that a run has and one for the load of the experts, with one line for each run.
pub(super) fn loss_curves(runs: &[Run]) -> impl Iterator<Item = String> {
    let series = |loss: fn(&MetricsRow) -> Option<f64>| -> Vec<Series> {
        let trained = |row: &&MetricsRow| row.phase != Phase::Identify;
        // Identifications have lines of their own in the log: counted are the steps, so that runs with and without can be compared.
        // A phase without this loss interrupts the line.
        let points = |run: &Run| {
            let steps = run.metrics.iter().filter(trained).zip(1..);
            steps.map(|(row, step)| (f64::from(step), loss(row).unwrap_or(f64::NAN))).collect()
        };
        runs.iter().map(|run| Series { label: run.name.clone(), points: points(run) }).collect()
    };
    let ce = curve_svg(
        "ce",
        "Cross-entropy of the refusals during training (nats per token)",
        "training step",
        &series(|r| r.ce_loss),
    );
    let title = "Divergence of the routing during alignment (nats)";
    let kl = curve_svg("kl", title, "training step", &series(|r| r.router_loss));
    // The mean over the layers.
    let variation = |row: &MetricsRow| {
        let cv = &row.expert_load.as_ref()?.cv;
        (!cv.is_empty()).then(|| cv.iter().sum::<f64>() / cv.len() as f64)
    };
    let title = "Load of the experts during training: coefficient of variation, mean over the layers (0: all equal)";
    let load = curve_svg("load", title, "training step", &series(variation));
    [ce, kl, load].into_iter().flatten()
}

/// Adds a heat map of each round to the page, and writes it as a file.
fn heatmaps(page: &mut Page, index: usize, run: &Run, scores: &ScoresFile, dir: &Path) -> Result<()> {
    // The number before it keeps the names of files apart; the whole name could be longer than a file system takes.
    let file_name = run.name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' });
    let file_name: String = file_name.take(NAME).collect();
    for (round, found) in &scores.rounds {
        let kept = found.kept_from.map_or_else(String::new, |from| format!(", selection of round {from}"));
        let title = format!("{}, round {round}: {}{kept}", run.name, score_name(scores));
        // Without scores (random selection), all scores are drawn as 0, with the selected experts framed.
        let values = scores
            .scores(*round)
            .or_else(|| scores.scores_of_selection(*round))
            .unwrap_or_else(|| ExpertScores::zeros(scores.layers.clone(), scores.num_experts));
        let id = format!("run-{index}-round-{round}");
        let svg = heatmap_svg(&id, &title, Cells::Scores, &values, &found.selected, &found.inclusion);
        page.svg(&svg);
        files::write(dir.join(format!("heatmap-{}-{file_name}-round-{round}.svg", index + 1)), standalone(&svg))?;
    }
    Ok(())
}

/// Adds a heat map of the tokens of each expert for each kind of phase, of the last round that had it.
fn load_maps(page: &mut Page, index: usize, run: &Run, scores: &ScoresFile) {
    let mut last: Vec<(&MetricsRow, &ExpertLoads)> = Vec::new();
    for row in &run.metrics {
        let Some(loads) = &row.phase_load else { continue };
        last.retain(|(earlier, _)| earlier.phase != row.phase);
        last.push((row, loads));
    }
    for (row, loads) in last.into_iter().filter(|(_, loads)| loads.fits(&scores.layers, scores.num_experts)) {
        let (round, phase) = (row.round, row.phase.name());
        let values = loads.counts.iter().flatten().map(|tokens| *tokens as f64).collect();
        let values = ExpertScores { layers: loads.layers.clone(), num_experts: scores.num_experts, values };
        let selected = scores.rounds.get(&round).map_or(&[][..], |found| &found.selected);
        let id = format!("run-{index}-load-{}", row.step);
        let title = format!("{}, round {round}, {phase}: tokens of each expert", run.name);
        page.svg(&heatmap_svg(&id, &title, Cells::Tokens, &values, selected, &[]));
    }
}

/// The method, and its score if it has a choice of scores: `gradient (l1-mean)`.
fn score_name(scores: &ScoresFile) -> String {
    let method = format!("{:?}", scores.method).to_lowercase();
    match scores.score {
        Some(score) => {
            let score = serde_json::to_value(score).ok().and_then(|v| v.as_str().map(str::to_owned));
            let norm = if scores.score_norm == Some(ScoreNorm::Layer) { ", divided by the layer's sum" } else { "" };
            format!("{method} ({}{norm})", score.unwrap_or_default())
        }
        None => method,
    }
}

/// The best of the experts that the last round selected, with their scores and the share of resamples that select them; `None` without rounds.
fn top_experts(scores: &ScoresFile) -> Option<Table> {
    let (round, last) = scores.rounds.last_key_value()?;
    let values = scores.scores_of_selection(*round);
    let caption = match last.selected.len() {
        0 => format!("No experts were selected in round {round}"),
        n if n <= TOP_EXPERTS => format!("Experts selected in round {round}"),
        n => format!("The first {TOP_EXPERTS} of {n} experts selected in round {round}"),
    };
    let mut table = Table::new(caption, ["rank", "layer", "expert", "score", "inclusion"]);
    for (i, id) in last.selected.iter().take(TOP_EXPERTS).enumerate() {
        let score = values.as_ref().and_then(|v| v.get(*id)).map_or_else(|| "-".into(), |x| format!("{x:.4e}"));
        let share = last.inclusion_of(&scores.layers, *id).map_or_else(|| "-".into(), |p| format!("{p:.2}"));
        table.row([(i + 1).to_string(), id.layer.to_string(), id.expert.to_string(), score, share]);
    }
    Some(table)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::{ExpertId, Method, Score};

    #[test]
    fn names_are_unique() {
        let paths = |dirs: &[&'static str]| names(&dirs.iter().map(Path::new).collect::<Vec<_>>());
        assert_eq!(paths(&["out/a", "out/b/"]), ["a", "b"]);
        assert_eq!(paths(&["x/run", "y/run"]), ["x/run", "y/run"]);
        assert_eq!(paths(&["..", "a"]), ["..", "a"]);
        assert_eq!(paths(&["out/a\nb\u{9b}c"]), ["a\\nb\\u{9b}c"]);
        let long = "x".repeat(100);
        let cut = format!("{long}… (1 more characters)");
        let twins = [format!("{long}a"), format!("{long}b")];
        let twins: Vec<&Path> = twins.iter().map(Path::new).collect();
        assert_eq!(names(&twins), [format!("1: {cut}"), format!("2: {cut}")]);
    }

    #[test]
    fn the_caption_counts_the_listed_experts() {
        let table = |selected: usize| {
            let mut scores = ScoresFile::new(Method::Gradient, Score::L1Mean, vec![0], 16);
            let experts: Vec<ExpertId> = (0..selected).map(|expert| (0, expert).into()).collect();
            scores.rounds.insert(2, RoundScores::new(None, &experts, 1, vec![]));
            let table = top_experts(&scores).unwrap();
            (table.caption, table.rows.len())
        };
        assert_eq!(table(0), ("No experts were selected in round 2".into(), 0));
        assert_eq!(table(8), ("Experts selected in round 2".into(), 8));
        assert_eq!(table(10), ("Experts selected in round 2".into(), 10));
        assert_eq!(table(12), ("The first 10 of 12 experts selected in round 2".into(), 10));
        assert_eq!(top_experts(&ScoresFile::new(Method::Gradient, Score::L1Mean, vec![0], 16)), None);
    }
}
