//! The content of `compare.json`: what each variant does, and paired tests between variants.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::paired::Outcomes;
use crate::experts::ExpertId;
use crate::judge::{PairedDifference, Rate, holm, mcnemar_p, mean_difference, sign_flip_p};

/// Value of [`CompareReport::schema`].
pub const COMPARE_SCHEMA: &str = "moewarden.compare/2";

/// The content of `compare.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CompareReport {
    /// [`COMPARE_SCHEMA`].
    pub schema: String,
    /// The model before training.
    pub model_name: String,
    /// The rows that the variants are trained on.
    pub dataset_path: String,
    /// blake3 hash of `compare_plan.json`.
    pub plan: String,
    /// Measures of the model before training by name; empty where nothing is evaluated.
    pub original: BTreeMap<String, Estimate>,
    /// The variants in the order of the matrix.
    pub variants: Vec<VariantReport>,
    /// Paired tests, in the order of the plan.
    pub tests: Vec<PairedTest>,
    /// The distinct selections of the last round.
    pub selections: Vec<SelectionReport>,
    /// Each pair of distinct selections.
    pub overlaps: Vec<OverlapReport>,
}

/// A variant: its results, or its error.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VariantReport {
    /// Its name.
    pub name: String,
    /// The output folder of its training run.
    pub folder: String,
    /// What it trains.
    pub ablation: String,
    /// The method that selects the trained experts; null if none are selected.
    pub method: Option<String>,
    /// The values of the swept options.
    pub settings: BTreeMap<String, Value>,
    /// Null if the run failed.
    pub result: Option<TrainingResult>,
    /// Measures by name.
    pub measures: BTreeMap<String, Estimate>,
    /// Null unless the run or its evaluation failed.
    pub error: Option<VariantError>,
}

/// The results of a training run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingResult {
    /// Cross-entropy of the refusals [before, after] training, in nats a token.
    pub ce_loss: [Option<f64>; 2],
    /// Divergence of the routing between safe and unsafe prompts [before, after] training, in nats.
    pub router_loss: Option<[f64; 2]>,
    /// Cross-entropy of the held-out rows [before, after] training, in nats a token.
    pub held_out_loss: [Option<f64>; 2],
    /// The selection of the last round.
    pub selected: Vec<ExpertId>,
    /// Elements that an optimizer wrote.
    pub trained_parameters: usize,
    /// All elements.
    pub all_parameters: usize,
    /// Wall-clock seconds of the rounds.
    pub seconds: f64,
}

/// Why a variant has no results.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VariantError {
    /// The exit code that the run alone would have ended with.
    pub exit_code: u8,
    /// The message.
    pub message: String,
}

/// Runs that selected the same experts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SelectionReport {
    /// Names of the variants.
    pub variants: Vec<String>,
    /// The experts.
    pub selected: Vec<ExpertId>,
}

/// Two distinct selections, each named by its first variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OverlapReport {
    /// The first variant of one selection.
    pub a: String,
    /// The first variant of the other.
    pub b: String,
    /// |A ∩ B|
    pub common: usize,
    /// `common` as a share of A.
    pub share: Option<f64>,
    /// |A ∩ B| / |A ∪ B|
    pub jaccard: Option<f64>,
    /// Spearman's rank correlation of the scores of all experts.
    pub spearman: Option<f64>,
}

/// What is measured of each variant and tested between variants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Measure {
    /// Its name.
    pub name: String,
    /// What it is a number of.
    pub unit: MeasureUnit,
}

/// The unit of a measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MeasureUnit {
    /// A share of items, 0 to 1.
    Share,
    /// A mean over items, in nats.
    Nats,
}

/// A number with its 95 % interval.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// Share or mean.
    pub value: f64,
    /// Number of items.
    pub of: usize,
    /// Of a share, Wilson's interval; of a mean, by bootstrap over the items. Null where there is none.
    pub interval: Option<[f64; 2]>,
}

/// What the evaluations of one model found for each item.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Evaluated {
    /// Yes or no by measure and item.
    pub shares: Outcomes,
    /// A number by measure and item.
    pub numbers: BTreeMap<String, BTreeMap<String, f64>>,
}

/// Two models to be compared, and in what they differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contrast {
    /// `training`, `method`, `ablation`, or the name of a swept option.
    pub factor: String,
    /// Name of the variant that is compared with, or [`ORIGINAL`].
    pub a: String,
    /// Name of the variant.
    pub b: String,
}

/// The name of the model before training.
pub const ORIGINAL: &str = "original";

/// A paired test of one measure between two models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PairedTest {
    /// The models.
    #[serde(flatten)]
    pub contrast: Contrast,
    /// Name of the measure.
    pub measure: String,
    /// Items that both have.
    pub items: usize,
    /// Of a share: yes of a alone, and of b alone.
    pub alone: Option<[usize; 2]>,
    /// b minus a.
    pub difference: f64,
    /// Its 95 % interval by bootstrap over the items; null where resampling changes nothing.
    pub interval: Option<[f64; 2]>,
    /// Two-sided, by McNemar's exact test, or of a mean by flipping signs.
    pub p: f64,
    /// Holm's adjusted p over all tests of the comparison.
    pub p_adjusted: f64,
}

impl Evaluated {
    /// The measures.
    pub fn measures(&self) -> Vec<Measure> {
        let measure = |name: &String, unit| Measure { name: name.clone(), unit };
        let shares = self.shares.keys().map(|name| measure(name, MeasureUnit::Share));
        shares.chain(self.numbers.keys().map(|name| measure(name, MeasureUnit::Nats))).collect()
    }

    /// A measure with its interval; `None` without items.
    pub fn estimate(&self, measure: &Measure) -> Option<Estimate> {
        match measure.unit {
            MeasureUnit::Share => {
                let rate = Rate::of(self.shares.get(&measure.name)?.answers());
                Some(Estimate { value: rate.rate?, of: rate.of, interval: Some(rate.interval) })
            }
            MeasureUnit::Nats => {
                let values: Vec<f64> = self.numbers.get(&measure.name)?.values().copied().collect();
                let (value, interval) = mean_difference(&values)?;
                Some(Estimate { value, of: values.len(), interval })
            }
        }
    }

    /// All measures with their intervals.
    pub fn estimates(&self) -> BTreeMap<String, Estimate> {
        self.measures().iter().filter_map(|m| Some((m.name.clone(), self.estimate(m)?))).collect()
    }

    /// Tests a measure on the items that both have; `None` without one. Not yet adjusted.
    fn test(&self, other: &Self, contrast: &Contrast, measure: &Measure) -> Option<PairedTest> {
        let (items, alone, difference, interval, p) = match measure.unit {
            MeasureUnit::Share => {
                let pairs = self.shares.get(&measure.name)?.pairs(other.shares.get(&measure.name)?)?;
                let found = PairedDifference::of(&pairs)?;
                (found.of, Some(found.alone), found.difference, found.interval, mcnemar_p(found.alone))
            }
            MeasureUnit::Nats => {
                let (ours, theirs) = (self.numbers.get(&measure.name)?, other.numbers.get(&measure.name)?);
                let differences: Vec<f64> = theirs.iter().filter_map(|(item, b)| Some(b - ours.get(item)?)).collect();
                let (mean, interval) = mean_difference(&differences)?;
                (differences.len(), None, mean, interval, sign_flip_p(&differences))
            }
        };
        let (contrast, measure) = (contrast.clone(), measure.name.clone());
        Some(PairedTest { contrast, measure, items, alone, difference, interval, p, p_adjusted: p })
    }
}

/// All tests of a comparison, with Holm's correction over the whole family. Models without an evaluation are left out.
pub fn paired_tests(
    evaluated: &BTreeMap<String, Evaluated>,
    contrasts: &[Contrast],
    measures: &[Measure],
) -> Vec<PairedTest> {
    let of_contrast = |contrast: &Contrast| -> Vec<PairedTest> {
        let (Some(a), Some(b)) = (evaluated.get(&contrast.a), evaluated.get(&contrast.b)) else { return Vec::new() };
        measures.iter().filter_map(|measure| a.test(b, contrast, measure)).collect()
    };
    let mut tests: Vec<PairedTest> = contrasts.iter().flat_map(of_contrast).collect();
    let adjusted = holm(&tests.iter().map(|test| test.p).collect::<Vec<_>>());
    tests.iter_mut().zip(adjusted).for_each(|(test, p)| test.p_adjusted = p);
    tests
}
