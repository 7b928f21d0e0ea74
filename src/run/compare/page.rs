//! The results of a comparison as a page, as Markdown and on the terminal: outcomes as pictures first, then tables.

use std::collections::BTreeMap;

use serde_json::Value;

use super::plan::ALPHA;
use crate::exit;
use crate::report::{
    CompareReport, CutAnswers, DistinctSelection, Estimate, Group, LowerBound, Measure, MeasureUnit, Named, ORIGINAL,
    Page, Positions, Table, VariantReport, dots_svg, overlap_table, points_svg,
};
use crate::run::forecast::duration;
use crate::run::report::{Run, loss_curves};
use crate::ui::Ui;

/// The most tests that the page lists, if no more are significant.
const MOST_TESTS: usize = 60;
/// The most runs whose losses can be told apart in one drawing.
const MOST_CURVES: usize = 12;

/// What is shown.
pub struct Content<'a> {
    pub report: &'a CompareReport,
    /// The measures that are drawn and tested.
    pub measures: &'a [Measure],
    pub selections: &'a [DistinctSelection],
    /// The finished runs.
    pub runs: &'a [Run],
    pub shown: Shown,
}

/// What else is shown.
pub struct Shown {
    /// The values of the swept options in the base configuration.
    pub base: BTreeMap<String, Value>,
    /// What a reader has to know of the outcomes.
    pub notes: Vec<String>,
}

impl Content<'_> {
    /// The page.
    pub fn html(&self) -> String {
        let mut page = Page::new("moewarden compare");
        page.text(&self.summary());
        self.failures().iter().for_each(|failure| page.text(failure));
        if !self.measures.is_empty() {
            page.section("Outcomes");
            page.text("Dots with 95 % intervals; the dashed line is the model before training.");
            self.shown.notes.iter().for_each(|note| page.text(note));
            self.lower_bounds().iter().for_each(|note| page.text(note));
            if !self.shown.base.is_empty() {
                page.text(&format!(
                    "Of variants that differ in swept options alone, the drawings show the base configuration ({}), or else the first.",
                    self.shown.base.iter().map(|(option, value)| format!("{option}={}", plain(value))).collect::<Vec<_>>().join(", ")
                ));
            }
            page.grid(&self.dots());
            page.table(&self.outcomes());
            self.cut_off().iter().for_each(|table| page.table(table));
            let trained = self.against_trained();
            if !trained.is_empty() {
                page.section("Outcomes against trained parameters");
                page.grid(&trained);
            }
            for option in self.shown.base.keys() {
                let drawings = self.against(option);
                if !drawings.is_empty() {
                    page.section(&format!("Outcomes against {option}"));
                    page.grid(&drawings);
                }
            }
            page.section("Paired tests");
            page.text(TESTS);
            page.text(&self.num_significant());
            page.table(&self.tests());
        }
        page.section("Training");
        page.table(&self.training());
        match self.runs.len() {
            ..=MOST_CURVES => loss_curves(self.runs).for_each(|svg| page.svg(&svg)),
            n => page.text(&format!(
                "Losses over the steps of {n} runs are too many for a drawing: `moewarden report` draws those of chosen folders."
            )),
        }
        if let Some(table) = overlap_table(self.selections) {
            page.section("Trained selections of the last round");
            page.table(&table);
        }
        page.finish()
    }

    /// The tables in Markdown.
    pub fn markdown(&self) -> String {
        let mut text = format!("# moewarden compare\n\n{}\n", self.summary());
        self.failures().iter().for_each(|failure| text += &format!("\n{}\n", failure.replace('\n', " ")));
        if !self.measures.is_empty() {
            let notes = self.shown.notes.iter().cloned().chain(self.lower_bounds());
            notes.for_each(|note| text += &format!("\n{note}\n"));
            let tests = format!("{TESTS} {}", self.num_significant());
            text += &markdown(&self.outcomes());
            self.cut_off().iter().for_each(|table| text += &markdown(table));
            text += &format!("\n{tests}\n{}", markdown(&self.tests()));
        }
        text += &markdown(&self.training());
        overlap_table(self.selections).iter().for_each(|table| text += &markdown(table));
        text
    }

    /// Prints the tables of outcomes and losses, and how many tests are significant.
    pub fn print(&self, ui: &Ui) {
        if !self.measures.is_empty() {
            ui.result(self.outcomes().to_text());
            self.lower_bounds().iter().for_each(|note| ui.warn(note));
            ui.result(self.num_significant() + "\n");
        }
        ui.result(self.training().to_text());
    }

    fn significant(&self) -> usize {
        self.report.tests.iter().filter(|test| test.p_adjusted <= ALPHA).count()
    }

    fn num_significant(&self) -> String {
        let (significant, all) = (self.significant(), self.report.tests.len());
        format!("{significant} of {all} paired tests are significant at {ALPHA} after Holm's correction.")
    }

    /// Where refusals are a lower bound, with the evaluation that cuts the most answers off.
    fn lower_bounds(&self) -> Option<String> {
        let found = &self.report.lower_bounds;
        let most = found.iter().rev().max_by_key(|bound| bound.cut)?;
        let how_many = if found.len() == 1 { "one evaluation".into() } else { format!("{} evaluations", found.len()) };
        let LowerBound { model, rows, cut, answers, list } = most;
        Some(format!(
            "Refusals of unsafe prompts are a lower bound in {how_many} (compare.json: lower_bounds): --eval-max-new-tokens cuts answers off \
             before they refuse or end. The most in that of {model} on the {rows} rows: {cut} of {answers}, without a refusal by {list}."
        ))
    }

    fn summary(&self) -> String {
        let CompareReport { model_name, dataset_path, variants, plan, .. } = self.report;
        let n = variants.len();
        format!(
            "{n} variants of {model_name}, trained on {dataset_path}. The plan of measures and tests (compare_plan.json, {plan}) was \
             written before the first variant was trained."
        )
    }

    fn failures(&self) -> Vec<String> {
        let failed = |v: &VariantReport| Some(format!("{} failed: {}", v.name, v.error.as_ref()?.message));
        self.report.variants.iter().filter_map(failed).collect()
    }

    /// Of the variants of each kind, the one with the settings of the base configuration, or else the first.
    fn representatives(&self) -> Vec<&VariantReport> {
        let variants = &self.report.variants;
        let is_base = |v: &VariantReport| v.settings.iter().all(|(option, value)| self.shown.base[option] == *value);
        let first_of_kind = |v: &VariantReport| variants.iter().find(|other| kind(other) == kind(v));
        let base_of_kind = |v: &VariantReport| variants.iter().find(|other| kind(other) == kind(v) && is_base(other));
        let stands_for_its_kind =
            |v: &&VariantReport| base_of_kind(v).or_else(|| first_of_kind(v)).is_some_and(|found| found.name == v.name);
        variants.iter().filter(stands_for_its_kind).collect()
    }

    /// One drawing a measure, with one dot for each kind of variant.
    fn dots(&self) -> Vec<String> {
        let drawing = |(i, measure): (usize, &Measure)| {
            let named = |label: &str, estimate: Option<&Estimate>| {
                Some(Named { label: label.to_owned(), estimate: *estimate? })
            };
            let original = self.report.original.get(&measure.name);
            let shown = self.representatives();
            let variants = shown.iter().map(|v| named(&kind(v), v.measures.get(&measure.name)));
            let rows: Vec<Named> = [named(ORIGINAL, original)].into_iter().chain(variants).flatten().collect();
            dots_svg(&format!("dots-{i}"), &measure.name, measure.unit, &rows, original.map(|e| e.value))
        };
        self.measures.iter().enumerate().filter_map(drawing).collect()
    }

    /// One drawing a measure, over the number of trained parameters; none if all variants trained equally many. Of the variants of a
    /// kind that trained equally many, it shows one.
    fn against_trained(&self) -> Vec<String> {
        let share = |v: &VariantReport| {
            let result = v.result.as_ref().filter(|result| result.trained_parameters > 0)?;
            Some(result.trained_parameters as f64 / result.all_parameters as f64)
        };
        let mut shown: Vec<&VariantReport> = Vec::new();
        for variant in self.representatives().into_iter().chain(&self.report.variants).filter(|v| share(v).is_some()) {
            if shown.iter().all(|other| kind(other) != kind(variant) || share(other) != share(variant)) {
                shown.push(variant);
            }
        }
        let mut shares: Vec<f64> = shown.iter().filter_map(|v| share(v)).collect();
        shares.sort_by(f64::total_cmp);
        shares.dedup();
        if shares.len() < 2 {
            return Vec::new();
        }
        // Shares span orders of magnitude.
        let label = |share: f64| format!("{:.3}", 100.0 * share).trim_end_matches('0').trim_end_matches('.').to_owned();
        let ticks = shares.iter().map(|share| (share.log10(), format!("{} %", label(*share)))).collect();
        let positions = Positions { label: "trained parameters (logarithmic)".into(), ticks };
        let mut kinds: Vec<String> = Vec::new();
        shown.iter().map(|v| kind(v)).for_each(|kind| {
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        });
        let drawing = |(i, measure): (usize, &Measure)| {
            let point = |v: &&VariantReport| {
                let named = Named { label: v.name.clone(), estimate: *v.measures.get(&measure.name)? };
                Some((share(v)?.log10(), named))
            };
            let group = |label: &String| {
                let points = shown.iter().filter(|v| kind(v) == *label).filter_map(point).collect();
                Group { label: label.clone(), points: ascending(points) }
            };
            let groups: Vec<Group> = kinds.iter().map(group).filter(|group| !group.points.is_empty()).collect();
            points_svg(&format!("trained-{i}"), &measure.name, measure.unit, &positions, &groups)
        };
        self.measures.iter().enumerate().filter_map(drawing).collect()
    }

    /// One drawing a measure, over the values of a swept option; none if no two variants differ in it alone.
    fn against(&self, option: &str) -> Vec<String> {
        let mut values: Vec<&Value> = Vec::new();
        self.report.variants.iter().filter_map(|v| v.settings.get(option)).for_each(|value| {
            if !values.contains(&value) {
                values.push(value);
            }
        });
        let numbers: Option<Vec<f64>> = values.iter().map(|value| value.as_f64()).collect();
        let logarithmic = numbers.as_deref().is_some_and(span_a_magnitude);
        let place = |value: &Value| match value.as_f64().filter(|_| numbers.is_some()) {
            Some(number) if logarithmic => number.log10(),
            Some(number) => number,
            None => values.iter().position(|other| *other == value).unwrap_or_default() as f64,
        };
        let mut ticks: Vec<(f64, String)> = values.iter().map(|value| (place(value), plain(value))).collect();
        ticks.sort_by(|a, b| a.0.total_cmp(&b.0));
        let scale = if logarithmic { " (logarithmic)" } else { "" };
        let positions = Positions { label: format!("{option}{scale}"), ticks };
        let groups = self.groups_of(option);
        let drawing = |(i, measure): (usize, &Measure)| {
            let point = |v: &&VariantReport| {
                let named = Named { label: v.name.clone(), estimate: *v.measures.get(&measure.name)? };
                Some((place(&v.settings[option]), named))
            };
            let group = |(label, of): &(String, Vec<&VariantReport>)| Group {
                label: label.clone(),
                points: ascending(of.iter().filter_map(point).collect()),
            };
            points_svg(
                &format!("{option}-{i}"),
                &measure.name,
                measure.unit,
                &positions,
                &groups.iter().map(group).filter(|group| group.points.len() > 1).collect::<Vec<_>>(),
            )
        };
        self.measures.iter().enumerate().filter_map(drawing).collect()
    }

    /// Variants that differ in this option alone, named by what tells them from the other groups.
    fn groups_of(&self, option: &str) -> Vec<(String, Vec<&VariantReport>)> {
        let mut groups: Vec<(String, BTreeMap<&String, &Value>, Vec<&VariantReport>)> = Vec::new();
        for variant in self.report.variants.iter().filter(|variant| variant.settings.contains_key(option)) {
            let others: BTreeMap<_, _> = variant.settings.iter().filter(|(name, _)| *name != option).collect();
            let same = |(of, settings, _): &&mut (String, _, _)| *of == kind(variant) && *settings == others;
            match groups.iter_mut().find(same) {
                Some((.., group)) => group.push(variant),
                None => groups.push((kind(variant), others, vec![variant])),
            }
        }
        groups.retain(|(.., group)| group.len() > 1);
        let name = |(kind, settings, _): &(String, BTreeMap<&String, &Value>, _)| {
            let alike = || groups.iter().filter(|(of, ..)| of == kind);
            let telling =
                settings.iter().filter(|(name, value)| alike().any(|(_, of, _)| of.get(*name) != Some(*value)));
            kind.clone() + &telling.map(|(name, value)| format!(", {name}={}", plain(value))).collect::<String>()
        };
        groups.iter().map(|group| (name(group), group.2.clone())).collect()
    }

    fn outcomes(&self) -> Table {
        let header = ["variant".to_owned()].into_iter().chain(self.measures.iter().map(|m| m.name.clone()));
        let mut table = Table::new("Outcomes with 95 % intervals", header.chain(["trained".into()]));
        let cells = |found: &BTreeMap<String, Estimate>| -> Vec<String> {
            let cell = |m: &Measure| found.get(&m.name).map_or_else(|| "-".into(), |e| e.describe(m.unit));
            self.measures.iter().map(cell).collect()
        };
        let row = |name: &str, cells: Vec<String>, trained: String| {
            [name.to_owned()].into_iter().chain(cells).chain([trained]).collect::<Vec<_>>()
        };
        table.row(row(ORIGINAL, cells(&self.report.original), "-".into()));
        for variant in &self.report.variants {
            table.row(row(&variant.name, cells(&variant.measures), trained(variant)));
        }
        table
    }

    /// The answers that were cut off, one row for each model; `None` if all ended.
    fn cut_off(&self) -> Option<Table> {
        let all = &self.report.cut_off;
        let of = |cut: &CutAnswers| format!("{}, {} prompts", cut.rows, cut.answers.side.name());
        let mut columns: Vec<String> = Vec::new();
        for column in all.iter().map(of) {
            if !columns.contains(&column) {
                columns.push(column);
            }
        }
        let models = [ORIGINAL].into_iter().chain(self.report.variants.iter().map(|v| &*v.name));
        let header = ["variant".to_owned()].into_iter().chain(columns.iter().cloned());
        let mut table = Table::new("Answers that --eval-max-new-tokens cut off before they ended", header);
        for model in models.filter(|model| all.iter().any(|cut| cut.model == *model)) {
            let cell = |column: &String| {
                let found = all.iter().find(|cut| cut.model == *model && of(cut) == *column);
                found.map_or_else(|| "-".into(), |cut| format!("{} of {}", cut.answers.cut_off, cut.answers.answers))
            };
            table.row([model.to_owned()].into_iter().chain(columns.iter().map(cell)));
        }
        all.iter().any(|cut| cut.answers.cut_off > 0).then_some(table)
    }

    fn tests(&self) -> Table {
        let mut tests: Vec<_> = self.report.tests.iter().collect();
        tests.sort_by(|a, b| a.p_adjusted.total_cmp(&b.p_adjusted).then(a.p.total_cmp(&b.p)));
        let (all, shown) = (tests.len(), self.significant().max(MOST_TESTS));
        let caption = match all {
            _ if all <= shown => "All tests, the smallest p first".to_owned(),
            _ => format!(
                "The {shown} tests of {all} with the smallest p, all significant ones among them; the others are in compare.json"
            ),
        };
        let header = ["a → b", "measure", "b − a", "p", "p by Holm", "items", "a alone", "b alone", "differ in"];
        let mut table = Table::new(caption, header);
        for test in tests.into_iter().take(shown) {
            let unit = test.alone.map_or(MeasureUnit::Nats, |_| MeasureUnit::Share);
            let alone = |i: usize| test.alone.map_or_else(|| "-".into(), |alone| alone[i].to_string());
            let difference = Estimate { value: test.difference, of: test.items, interval: test.interval };
            table.row([
                format!("{} → {}", test.contrast.a, test.contrast.b),
                test.measure.clone(),
                difference.describe(unit),
                short(test.p),
                short(test.p_adjusted),
                test.items.to_string(),
                alone(0),
                alone(1),
                test.contrast.factor.clone(),
            ]);
        }
        table
    }

    fn training(&self) -> Table {
        let mut table = Table::new(
            "Training: cross-entropy of the refusals (CE), divergence between safe and unsafe prompts (KL), and cross-entropy of the \
             held-out rows, each before → after",
            ["variant", "CE", "KL", "held-out CE", "selected", "trained", "time"],
        );
        let change = |[before, after]: [Option<f64>; 2], digits: usize| match (before, after) {
            (Some(before), Some(after)) => format!("{before:.digits$} → {after:.digits$}"),
            _ => "-".into(),
        };
        for variant in &self.report.variants {
            let cells = match &variant.result {
                Some(n) => [
                    change(n.ce_loss, 4),
                    change(n.router_loss.map_or([None; 2], |both| both.map(Some)), 5),
                    change(n.held_out_loss, 4),
                    if variant.method.is_some() { n.selected.len().to_string() } else { "-".into() },
                    trained(variant),
                    duration(n.seconds),
                ],
                None => {
                    let code = variant.error.as_ref().map_or(exit::INTERNAL, |e| e.exit_code);
                    [format!("failed ({code})"), "-".into(), "-".into(), "-".into(), "-".into(), "-".into()]
                }
            };
            table.row([variant.name.clone()].into_iter().chain(cells));
        }
        table
    }
}

/// What the tests are, for a reader.
const TESTS: &str = "Each variant is compared with the model before training, and with the first variant that differs from it in one \
                     factor only, on the same rows. Shares: McNemar's exact test; means: permutation test by flipping signs; both \
                     two-sided. Holm's correction is over all tests of this comparison: a p by Holm of at most 0.05 is significant.";

/// `gradient combined`, `frozen`.
fn kind(variant: &VariantReport) -> String {
    variant.method.as_ref().map_or_else(|| variant.ablation.clone(), |method| format!("{method} {}", variant.ablation))
}

/// Whether the largest number is ten times the smallest, as of learning rates and weights, or more.
fn span_a_magnitude(numbers: &[f64]) -> bool {
    let (low, high) = numbers.iter().fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(*x), high.max(*x)));
    // 3e-4 is less than 10 times 3e-5 by the last bit.
    low > 0.0 && high >= 9.999 * low
}

/// A value without quotation marks.
fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn trained(variant: &VariantReport) -> String {
    let share = |n: &crate::report::TrainingResult| 100.0 * n.trained_parameters as f64 / n.all_parameters as f64;
    variant.result.as_ref().map_or_else(|| "-".into(), |n| format!("{:.2} %", share(n)))
}

fn ascending(mut points: Vec<(f64, Named)>) -> Vec<(f64, Named)> {
    points.sort_by(|a, b| a.0.total_cmp(&b.0));
    points
}

/// Four digits of a probability.
fn short(p: f64) -> String {
    if p >= 1e-4 { format!("{p:.4}") } else { format!("{p:.1e}") }
}

fn markdown(table: &Table) -> String {
    let line = |cells: &[String]| {
        format!("| {} |\n", cells.iter().map(|c| c.replace('|', "\\|")).collect::<Vec<_>>().join(" | "))
    };
    let rule = format!("|---|{}\n", "---:|".repeat(table.header.len() - 1));
    let rows: String = table.rows.iter().map(|row| line(row)).collect();
    format!("\n{}\n\n{}{rule}{rows}", table.caption, line(&table.header))
}

#[cfg(test)]
mod tests;
