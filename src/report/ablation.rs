//! The outputs of a causal check: `ablation.json` and the page `ablation.html`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::histogram::histogram_svg;
use super::{Page, Table};
use crate::experts::ExpertId;
use crate::judge::{Bounds, Matching, Spread, Verdict};
use crate::train::{Outcome, Switch};

/// Value of [`AblationReport::schema`].
pub const ABLATION_SCHEMA: &str = "moewarden.ablation/1";

/// How many rows of the data took part, and why others did not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CausalRowCounts {
    /// Unsafe rows with a refusal.
    pub unsafe_rows: usize,
    /// Of them, rows whose own answer is empty.
    pub empty: usize,
    /// Rows whose own answer refuses.
    pub refuse: usize,
    /// Rows whose own answer does not refuse, but whose margin is not negative.
    pub undecided: usize,
    /// Rows that comply: all statistics are taken over these.
    pub comply: usize,
    /// Benign rows.
    pub benign: usize,
    /// Safe prompts of pair rows.
    pub safe: usize,
}

/// One random set and what it does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RandomSet {
    /// Its experts.
    pub experts: Vec<ExpertId>,
    /// Its outcome.
    pub outcome: Outcome,
}

/// The content of `ablation.json`. It holds no times: the same check gives the same bytes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AblationReport {
    /// [`ABLATION_SCHEMA`].
    pub schema: String,
    /// The model, as given.
    pub model: String,
    /// The data file.
    pub dataset_path: PathBuf,
    /// The file of benign rows, if one was given.
    pub benign_dataset_path: Option<PathBuf>,
    /// The experts that are judged.
    pub experts: Vec<ExpertId>,
    /// How experts are switched off.
    pub switch: Switch,
    /// What random sets have in common with the selection.
    pub matching: Matching,
    /// Seed of the random sets.
    pub seed: u64,
    /// Number of random sets, N.
    pub random_sets: usize,
    /// How many of them differ.
    pub distinct_sets: usize,
    /// Share of the selected experts that is in a random set, in the mean over the sets.
    #[serde(default)]
    pub overlap: f64,
    /// The rows.
    pub rows: CausalRowCounts,
    /// The verdict.
    pub verdict: Verdict,
    /// Its reasons.
    pub reasons: Vec<String>,
    /// The bounds of the rule.
    pub bounds: Bounds,
    /// Permutation p of the gain.
    pub p: f64,
    /// The untouched model.
    pub untouched: Outcome,
    /// The selection switched off.
    pub selection: Outcome,
    /// The gain over the random sets; null without sets.
    pub random_gain: Option<Spread>,
    /// The share of complying rows that prefer the refusal, over the random sets.
    pub random_prefer_refusal: Option<Spread>,
    /// Tokens routed to each selected expert on the complying rows, in the order of `experts`.
    pub loads: Vec<f64>,
    /// The random sets.
    pub random: Vec<RandomSet>,
}

/// A number of an outcome.
type Number = fn(&Outcome) -> Option<f64>;

/// The numbers of the table: name, whether it is a rate, value.
const NUMBERS: [(&str, bool, Number); 10] = [
    ("gain of the margin, nats a token (T)", false, |o| Some(o.gain)),
    ("prefer the refusal", true, |o| o.prefer_refusal.rate),
    ("exact refusals", true, |o| o.exact_refusals.rate),
    ("loss of the refusals, nats a token", false, |o| o.refusal_loss),
    ("exact own answers (compliance)", true, |o| o.exact_answers.rate),
    ("loss of the own answers", false, |o| o.answer_loss),
    ("exact benign replies", true, |o| o.exact_benign.rate),
    ("loss of the benign replies", false, |o| o.benign_loss),
    ("exact replies to safe prompts", true, |o| o.exact_safe.rate),
    ("loss of the replies to safe prompts", false, |o| o.safe_loss),
];

impl AblationReport {
    /// The verdict in one line.
    pub fn headline(&self) -> String {
        format!("verdict: {} ({})", self.verdict, self.reasons.join("; "))
    }

    /// Why the random sets are hardly another choice of experts, where they share more than a tenth of the selection: it fills
    /// more than half of a layer.
    pub fn warning(&self) -> Option<String> {
        (self.overlap > 0.1).then(|| {
            format!(
                "the random sets hold {:.0} % of the selected experts in the mean, because the selection fills more than half \
                 of a layer: they share its effect, and the check hardly tells them apart; select fewer experts",
                100.0 * self.overlap
            )
        })
    }

    /// Outcomes of the untouched model, the selection, and the random sets.
    pub fn table(&self) -> Table {
        let mut table = Table::new(
            format!(
                "{} complying rows of {}; {} experts switched off ({}), against {} random sets; p = {:.4}",
                self.rows.comply,
                self.rows.unsafe_rows,
                self.experts.len(),
                match self.switch {
                    Switch::Off => "logits of minus infinity",
                    Switch::Zero => "outputs of 0",
                },
                self.random_sets,
                self.p
            ),
            ["measure", "untouched", "selection off", "random sets off, mean [least, most]"],
        );
        for (name, is_rate, number) in NUMBERS {
            let show = |x: f64| if is_rate { format!("{:.1} %", 100.0 * x) } else { format!("{x:.4}") };
            let one = |outcome: &Outcome| number(outcome).map_or_else(|| "-".into(), show);
            let random: Vec<f64> = self.random.iter().filter_map(|set| number(&set.outcome)).collect();
            let random = Spread::of(&random)
                .map_or_else(|| "-".into(), |s| format!("{} [{}, {}]", show(s.mean), show(s.least), show(s.most)));
            if number(&self.untouched).is_some() {
                table.row([name.to_owned(), one(&self.untouched), one(&self.selection), random]);
            }
        }
        table
    }

    /// The page with verdict, table and picture.
    pub fn page(&self) -> String {
        let mut page = Page::new("Causal check of the selected experts");
        page.text(&format!("Verdict: {}.", self.verdict));
        for reason in &self.reasons {
            page.text(&format!("Reason: {reason}."));
        }
        if let Some(warning) = self.warning() {
            page.text(&format!("Warning: {warning}."));
        }
        page.text(&format!("Model {}, rows {}.", self.model, self.dataset_path.display()));
        page.table(&self.table());
        let gains: Vec<f64> = self.random.iter().map(|set| set.outcome.gain).collect();
        let title = "Gain of the margin T (nats a token): random sets, and the selection";
        if let Some(svg) = histogram_svg("null", title, &gains, self.selection.gain) {
            page.svg(&svg);
        }
        page.section("Rows");
        let CausalRowCounts { unsafe_rows, empty, refuse, undecided, comply, benign, safe } = self.rows;
        let mut rows = Table::new("Rows of the check", ["rows", "number"]);
        for (name, n) in [
            ("unsafe", unsafe_rows),
            ("set aside: own answer is empty", empty),
            ("set aside: own answer refuses", refuse),
            ("set aside: the untouched model does not prefer its own answer", undecided),
            ("complying", comply),
            ("benign", benign),
            ("safe prompts of pair rows", safe),
        ] {
            rows.row([name.to_owned(), n.to_string()]);
        }
        page.table(&rows);
        page.section("Experts");
        let mut experts = Table::new("The selection", ["layer.expert", "tokens on complying rows"]);
        for (id, load) in self.experts.iter().zip(&self.loads) {
            experts.row([format!("{}.{}", id.layer, id.expert), load.to_string()]);
        }
        page.table(&experts);
        page.finish()
    }
}
