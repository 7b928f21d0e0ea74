//! The content of `compare.json`: what each variant does, and paired tests between variants.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::eval_rows::CutOff;
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
    /// Evaluations whose refusals of unsafe prompts are a lower bound.
    #[serde(default)]
    pub lower_bounds: Vec<LowerBound>,
    /// Answers that were cut off, by model, rows and side.
    #[serde(default)]
    pub cut_off: Vec<CutAnswers>,
    /// Paired tests, in the order of the plan.
    pub tests: Vec<PairedTest>,
    /// The distinct selections of the last round, of variants that train them.
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
    /// The experts of the last round that were selected and trained; empty in a variant that trains no selection.
    pub selected: Vec<ExpertId>,
    /// Elements that an optimizer wrote.
    pub trained_parameters: usize,
    /// All elements.
    pub all_parameters: usize,
    /// Wall-clock seconds of the rounds; of a run that was resumed, those since.
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

/// An evaluation in which `--eval-max-new-tokens` cut answers to unsafe prompts off before they refused or ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LowerBound {
    /// The variant, or [`ORIGINAL`].
    pub model: String,
    /// `held-out` or `benign`.
    pub rows: String,
    /// `name/version` of the phrase list.
    pub list: String,
    /// Answers to unsafe prompts.
    pub answers: usize,
    /// Those that were cut, and in which the list has found no refusal.
    pub cut: usize,
}

/// Answers of a model that `--eval-max-new-tokens` cut off before they ended, refusals or not.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CutAnswers {
    /// The variant, or [`ORIGINAL`].
    pub model: String,
    /// `held-out` or `benign`.
    pub rows: String,
    /// Their side, and their number.
    #[serde(flatten)]
    pub answers: CutOff,
}

/// What the evaluations of one model found for each item.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Evaluated {
    /// Where its refusals are a lower bound.
    pub lower_bounds: Vec<LowerBound>,
    /// How many of its answers were cut off.
    pub cut_off: Vec<CutAnswers>,
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
    /// Whether shares that both have were measured in the same way.
    pub fn is_comparable_with(&self, other: &Self) -> bool {
        self.shares
            .iter()
            .all(|(name, ours)| other.shares.get(name).is_none_or(|theirs| ours.is_comparable_with(theirs)))
    }

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

    /// What both models found for the items that both have; `None` without one.
    fn pairs(&self, other: &Self, measure: &Measure) -> Option<Pairs> {
        let name = &measure.name;
        let pairs = match measure.unit {
            MeasureUnit::Share => Pairs::Shares(self.shares.get(name)?.pairs(other.shares.get(name)?)?),
            MeasureUnit::Nats => {
                let (ours, theirs) = (self.numbers.get(name)?, other.numbers.get(name)?);
                Pairs::Differences(theirs.iter().filter_map(|(item, b)| Some(b - ours.get(item)?)).collect())
            }
        };
        (pairs.len() > 0).then_some(pairs)
    }
}

/// Paired numbers of two models.
enum Pairs {
    /// Yes or no of both.
    Shares(Vec<(bool, bool)>),
    /// The second minus the first.
    Differences(Vec<f64>),
}

impl Pairs {
    fn len(&self) -> usize {
        match self {
            Self::Shares(pairs) => pairs.len(),
            Self::Differences(differences) => differences.len(),
        }
    }

    /// Two-sided p of no difference.
    fn p(&self) -> f64 {
        match self {
            Self::Shares(pairs) => {
                let alone = |pair| pairs.iter().filter(|p| **p == pair).count();
                mcnemar_p([alone((true, false)), alone((false, true))])
            }
            Self::Differences(differences) => sign_flip_p(differences),
        }
    }

    /// The mean difference.
    fn difference(&self) -> Option<Difference> {
        match self {
            Self::Shares(pairs) => {
                let PairedDifference { difference, interval, alone, .. } = PairedDifference::of(pairs)?;
                Some(Difference { mean: difference, interval, alone: Some(alone) })
            }
            Self::Differences(differences) => {
                let (mean, interval) = mean_difference(differences)?;
                Some(Difference { mean, interval, alone: None })
            }
        }
    }
}

/// A mean difference of pairs.
struct Difference {
    mean: f64,
    interval: Option<[f64; 2]>,
    /// Of shares: yes of the first alone, and of the second alone.
    alone: Option<[usize; 2]>,
}

/// The pairs of each contrast and measure. Models without an evaluation are left out.
fn all_pairs<'a>(
    evaluated: &BTreeMap<String, Evaluated>,
    contrasts: &'a [Contrast],
    measures: &'a [Measure],
) -> Vec<(&'a Contrast, &'a Measure, Pairs)> {
    let of_contrast = |contrast: &'a Contrast| -> Vec<(&'a Contrast, &'a Measure, Pairs)> {
        let (Some(a), Some(b)) = (evaluated.get(&contrast.a), evaluated.get(&contrast.b)) else { return Vec::new() };
        let measures = measures.iter().filter(|measure| is_tested(contrast, measure));
        measures.filter_map(|measure| Some((contrast, measure, a.pairs(b, measure)?))).collect()
    };
    contrasts.iter().flat_map(of_contrast).collect()
}

/// A distance from the original model says nothing of that model itself.
fn is_tested(contrast: &Contrast, measure: &Measure) -> bool {
    contrast.a != ORIGINAL || measure.unit != MeasureUnit::Nats
}

/// Adjusted p of these tests in the family of all planned ones: those of models that failed count with p = 1.
fn adjusted(p: &[f64], contrasts: &[Contrast], measures: &[Measure]) -> Vec<f64> {
    let of_contrast = |contrast: &Contrast| measures.iter().filter(|measure| is_tested(contrast, measure)).count();
    let planned: usize = contrasts.iter().map(of_contrast).sum();
    let missing = std::iter::repeat_n(1.0, planned.saturating_sub(p.len()));
    let mut adjusted = holm(&p.iter().copied().chain(missing).collect::<Vec<_>>());
    adjusted.truncate(p.len());
    adjusted
}

/// All tests of a comparison, with Holm's correction over all that were planned. Models without an evaluation are left out.
pub fn paired_tests(
    evaluated: &BTreeMap<String, Evaluated>,
    contrasts: &[Contrast],
    measures: &[Measure],
) -> Vec<PairedTest> {
    let all = all_pairs(evaluated, contrasts, measures);
    let p: Vec<f64> = all.iter().map(|(.., pairs)| pairs.p()).collect();
    let adjusted = adjusted(&p, contrasts, measures);
    let test = |((contrast, measure, pairs), (p, p_adjusted)): ((&Contrast, &Measure, Pairs), (f64, f64))| {
        let Difference { mean: difference, interval, alone } = pairs.difference()?;
        let (contrast, measure, items) = (contrast.clone(), measure.name.clone(), pairs.len());
        Some(PairedTest { contrast, measure, items, alone, difference, interval, p, p_adjusted })
    };
    all.into_iter().zip(p.into_iter().zip(adjusted)).filter_map(test).collect()
}

#[cfg(test)]
mod tests {
    use rand::seq::SliceRandom;
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::paired::Measured;
    use super::*;

    /// The outcomes of a real comparison: by measure and model, one digit an item.
    #[derive(Deserialize)]
    struct Recorded {
        contrasts: Vec<Contrast>,
        outcomes: BTreeMap<String, BTreeMap<String, String>>,
    }

    fn recorded() -> Recorded {
        serde_json::from_str(include_str!("../../tests/golden/recorded_outcomes.json")).unwrap()
    }

    impl Recorded {
        fn measures(&self) -> Vec<Measure> {
            self.outcomes.keys().map(|name| Measure { name: name.clone(), unit: MeasureUnit::Share }).collect()
        }

        /// The models with what `mixed` makes of the outcomes of all models on one item.
        fn evaluated(&self, mut mixed: impl FnMut(&mut Vec<bool>)) -> BTreeMap<String, Evaluated> {
            let mut found: BTreeMap<String, Evaluated> = BTreeMap::new();
            for (measure, models) in &self.outcomes {
                let mut items: BTreeMap<&String, BTreeMap<String, bool>> = BTreeMap::new();
                for item in 0..models.values().next().unwrap().len() {
                    let mut yes: Vec<bool> = models.values().map(|digits| digits.as_bytes()[item] == b'1').collect();
                    mixed(&mut yes);
                    for (model, yes) in models.keys().zip(yes) {
                        items.entry(model).or_default().insert(item.to_string(), yes);
                    }
                }
                for (model, items) in items {
                    let measured = Measured::new("greedy".into(), items);
                    found.entry(model.clone()).or_default().shares.insert(measure.clone(), measured);
                }
            }
            found
        }

        /// Tests with p of at most 0.05, with Holm's correction and without.
        fn significant(&self, evaluated: &BTreeMap<String, Evaluated>) -> [usize; 2] {
            let measures = self.measures();
            let all = all_pairs(evaluated, &self.contrasts, &measures);
            assert_eq!(all.len(), self.contrasts.len() * self.outcomes.len());
            let p: Vec<f64> = all.iter().map(|(.., pairs)| pairs.p()).collect();
            [adjusted(&p, &self.contrasts, &measures), p].map(|p| p.into_iter().filter(|p| *p <= 0.05).count())
        }
    }

    /// Under the null hypothesis the models are exchangeable: their outcomes on an item are in any order.
    #[test]
    fn null_comparisons_claim_no_difference() {
        let recorded = recorded();
        assert!(recorded.significant(&recorded.evaluated(|_| ()))[0] >= 10, "the real differences are seen");
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let comparisons = 200;
        let mut false_claims = [0, 0];
        for _ in 0..comparisons {
            let found = recorded.significant(&recorded.evaluated(|yes| yes.shuffle(&mut rng)));
            false_claims.iter_mut().zip(found).for_each(|(claims, found)| *claims += usize::from(found > 0));
        }
        let [corrected, uncorrected] = false_claims;
        println!("comparisons with a false claim: {corrected} of {comparisons}, {uncorrected} without the correction");
        assert!(corrected * 20 <= comparisons, "{corrected} of {comparisons}");
        assert!(uncorrected * 5 > comparisons, "without the correction there would be false claims: {uncorrected}");
    }

    #[test]
    fn means_are_tested_by_flipping_signs() {
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut model = |shift: f64| {
            let items = (0..60).map(|item| (item.to_string(), shift + rng.random::<f64>())).collect();
            Evaluated { numbers: BTreeMap::from([("drift".to_owned(), items)]), ..Evaluated::default() }
        };
        let evaluated = BTreeMap::from([
            ("near".to_owned(), model(0.0)),
            ("same".to_owned(), model(0.0)),
            ("far".to_owned(), model(0.5)),
        ]);
        let contrasts = ["same", "far"].map(|b| Contrast { factor: "training".into(), a: "near".into(), b: b.into() });
        let drift = Measure { name: "drift".into(), unit: MeasureUnit::Nats };
        let tests = paired_tests(&evaluated, &contrasts, std::slice::from_ref(&drift));
        assert!(tests[0].p_adjusted > 0.05 && tests[1].p_adjusted < 0.01, "{tests:?}");
        assert_eq!((tests[1].items, tests[1].alone), (60, None));
        assert!((tests[1].difference - 0.5).abs() < 0.2 && tests[1].interval.unwrap()[0] > 0.3);
        let estimate = evaluated["far"].estimate(&drift).unwrap();
        assert!(estimate.interval.unwrap()[0] < estimate.value && estimate.of == 60);
        let with_itself = [Contrast { factor: "training".into(), a: ORIGINAL.into(), b: "far".into() }];
        let original = evaluated.clone().into_iter().chain([(ORIGINAL.to_owned(), model(0.0))]).collect();
        assert_eq!(paired_tests(&original, &with_itself, std::slice::from_ref(&drift)), []);
        // A variant without an evaluation leaves its tests in the family.
        let failed = evaluated.clone().into_iter().filter(|(name, _)| name != "same").collect();
        let fewer = paired_tests(&failed, &contrasts, std::slice::from_ref(&drift));
        assert_eq!((fewer.len(), fewer[0].p_adjusted), (1, 2.0 * fewer[0].p));
        // Only items that both have are compared.
        let none =
            BTreeMap::from([("near".to_owned(), Evaluated::default()), ("far".to_owned(), Evaluated::default())]);
        assert_eq!(paired_tests(&none, &contrasts, &[drift]), []);
    }
}
