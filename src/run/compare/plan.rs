//! The plan of a comparison: what is trained, measured and tested, written before the first variant is trained.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use super::evaluate::Evaluations;
use crate::config::{CompareArgs, RunConfig, TemplateKwargs, Variant};
use crate::exit::{self, Context, Failure, Result};
use crate::experts::IdentifyIn;
use crate::input;
use crate::judge::JudgeForm;
use crate::report::{Contrast, Measure, ORIGINAL, read_json, write_json};

/// Name of the file.
const FILE: &str = "compare_plan.json";

/// The content of `compare_plan.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Plan {
    schema: &'static str,
    model_name: String,
    /// blake3 hashes of the files that are read, by path.
    inputs: BTreeMap<String, String>,
    /// Options of the base configuration that decide results.
    options: Value,
    variants: Vec<PlannedVariant>,
    /// Ranks that a step of training is spread over: its batch has micro-batches of each.
    ranks: usize,
    /// What is measured of each variant, and tested.
    pub measures: Vec<Measure>,
    /// Which variants are compared.
    pub contrasts: Vec<Contrast>,
    tests: &'static str,
    correction: &'static str,
    /// Adjusted p up to which a difference is called significant.
    alpha: f64,
    /// Responses have at most so many tokens; null if none are generated.
    max_new_tokens: Option<usize>,
    judge: Option<String>,
    judge_form: Option<JudgeForm>,
    judge_chat_template_kwargs: Option<TemplateKwargs>,
    judge_max_new_tokens: Option<usize>,
    answer_pattern: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize)]
struct PlannedVariant {
    name: String,
    ablation: String,
    method: Option<String>,
    settings: BTreeMap<String, Value>,
}

/// Adjusted p up to which a difference is called significant.
pub const ALPHA: f64 = 0.05;

impl Plan {
    /// The plan of these variants and measures.
    ///
    /// # Errors
    /// An input that cannot be read.
    pub fn new(evaluations: &Evaluations<'_>, variants: &[Variant], measures: Vec<Measure>) -> Result<Self> {
        let (config, args) = (evaluations.config, evaluations.args);
        let files = [config.dataset_path.as_path()].into_iter().chain(config.retain_dataset_path.as_deref());
        let files = files.chain(evaluations.inputs());
        let hash = |path: &Path| {
            let failed = |e| Failure::new(exit::NO_INPUT, format!("{}: cannot be read: {e}", path.display()));
            Ok((path.display().to_string(), format!("blake3:{}", input::hash(path).map_err(failed)?)))
        };
        Ok(Self {
            schema: "moewarden.compare_plan/1",
            model_name: config.model_name.clone(),
            inputs: files.map(hash).collect::<Result<_>>()?,
            options: serde_json::to_value(config.deciding()).expect("options have text keys"),
            variants: variants.iter().map(PlannedVariant::of).collect(),
            ranks: evaluations.started.ranks.world_size(),
            contrasts: if measures.is_empty() { Vec::new() } else { contrasts(variants) },
            measures,
            tests: "two-sided and paired: McNemar's exact test of shares; of means, a permutation test by flipping signs",
            correction: "Holm, over all contrasts and measures",
            alpha: ALPHA,
            max_new_tokens: args.max_new_tokens().filter(|_| evaluations.are_asked_for()),
            judge: args.judge.clone(),
            judge_form: args.judge_form,
            judge_chat_template_kwargs: args.judge_chat_template_kwargs.clone(),
            judge_max_new_tokens: args.judge_max_new_tokens,
            answer_pattern: args.answer_pattern.clone(),
        })
    }

    /// Writes the plan into the output folder. One that is there already, of a comparison that is resumed, has to be the same.
    ///
    /// # Errors
    /// Another plan, and the first field in which it differs; a failed write.
    pub fn write_or_check(&self, dir: &Path) -> Result<()> {
        let path = Self::path(dir);
        if path.exists() { self.check(&path, &[]) } else { Ok(write_json(&path, self)?) }
    }

    /// Refuses another plan in the output folder, as far as this one is known before the first evaluation.
    ///
    /// # Errors
    /// As [`Self::write_or_check`].
    pub fn check_early(&self, dir: &Path) -> Result<()> {
        let path = Self::path(dir);
        if path.exists() { self.check(&path, &["measures", "contrasts"]) } else { Ok(()) }
    }

    /// Refuses another plan in this file, but for the fields `open`.
    fn check(&self, path: &Path, open: &[&str]) -> Result<()> {
        match self.differs_from(path, open)? {
            None => Ok(()),
            Some(difference) => Err(Failure::new(
                exit::CONFIG,
                format!(
                    "{}: {difference} is not that of this comparison: the plan is written before the first variant and does not change; \
                     resume with the same options, or give another --output-dir or --overwrite",
                    path.display()
                ),
            )),
        }
    }

    /// The blake3 hash of the file, which has to hold this plan still.
    ///
    /// # Errors
    /// A file that was changed; one that cannot be read.
    pub fn hash(&self, dir: &Path) -> Result<String> {
        let path = Self::path(dir);
        if let Some(difference) = self.differs_from(&path, &[])? {
            let message = format!("{}: {difference} was changed while the variants were trained", path.display());
            return Err(Failure::new(exit::DATA, message));
        }
        let bytes = input::read(&path).map_err(|e| Failure::new(exit::IO, format!("{}: {e}", path.display())))?;
        Ok(format!("blake3:{}", blake3::hash(&bytes)))
    }

    fn path(dir: &Path) -> PathBuf {
        dir.join(FILE)
    }

    /// The first field, but for the fields `open`, in which the plan in the file differs, with its value in the file and here.
    fn differs_from(&self, path: &Path, open: &[&str]) -> Result<Option<String>> {
        let theirs: Value = read_json(path).context("reading the plan of the comparison")?;
        let ours = serde_json::to_value(self).expect("a plan has text keys");
        let mut fields = ours.as_object().into_iter().flatten().filter(|(field, _)| !open.contains(&&***field));
        let differs = fields.find(|(field, value)| theirs[field.as_str()] != **value);
        Ok(differs.map(|(field, value)| difference(field, &theirs[field.as_str()], value)))
    }
}

/// How a field of the plan differs: of options and inputs the first that does.
fn difference(field: &str, theirs: &Value, ours: &Value) -> String {
    let (Some(was), Some(now)) = (theirs.as_object(), ours.as_object()) else {
        let short = !theirs.is_array() && !ours.is_array();
        return if short { format!("`{field}` ({theirs}, not {ours})") } else { format!("`{field}`") };
    };
    let differs = |name: &&String| was.get(*name) != now.get(*name);
    let Some(name) = now.keys().chain(was.keys()).find(differs) else { return format!("`{field}`") };
    let text = |of: &Map<String, Value>| of.get(name).map_or_else(|| "nothing".to_owned(), Value::to_string);
    let option = if field == "options" { "--" } else { "" };
    format!("`{field}`, {option}{name} ({}, not {}),", text(was), text(now))
}

impl PlannedVariant {
    fn of(variant: &Variant) -> Self {
        Self {
            name: variant.name.clone(),
            ablation: variant.ablation.name(),
            method: variant.method().map(|method| method.name()),
            settings: variant.settings.clone(),
        }
    }
}

/// Each variant with the model before training, and with the first variant that differs from it in one factor only: the method, the
/// ablation, or one swept option.
fn contrasts(variants: &[Variant]) -> Vec<Contrast> {
    let mut found = Vec::new();
    for (i, b) in variants.iter().enumerate() {
        found.push(Contrast { factor: "training".into(), a: ORIGINAL.into(), b: b.name.clone() });
        let factors = ["ablation", "method"].into_iter().chain(b.settings.keys().map(String::as_str));
        for factor in factors {
            let first = variants[..i].iter().find(|a| differ_only_in(factor, a, b));
            let contrast = |a: &Variant| Contrast { factor: factor.into(), a: a.name.clone(), b: b.name.clone() };
            found.extend(first.map(contrast));
        }
    }
    found
}

/// Whether two variants differ in this factor and in no other. An option that does nothing in one of them is no difference, and
/// neither is the method of one that selects nothing.
fn differ_only_in(factor: &str, a: &Variant, b: &Variant) -> bool {
    let differ = |name: &str| match name {
        "ablation" => a.ablation != b.ablation,
        "method" => a.method().is_some_and(|of_a| b.method().is_some_and(|of_b| of_a != of_b)),
        option => a.settings.get(option).is_some_and(|of_a| b.settings.get(option).is_some_and(|of_b| of_a != of_b)),
    };
    let factors = ["ablation", "method"].into_iter().chain(a.settings.keys().map(String::as_str));
    factors.into_iter().all(|name| differ(name) == (name == factor))
}

/// The values of the base configuration that this command chooses itself, in a sentence; `None` if it chose none.
pub fn chosen(config: &RunConfig, args: &CompareArgs) -> Option<String> {
    let once = config.identify == IdentifyIn::Once && config.num_rounds > 1;
    (once && args.needs_equal_parameters()).then(|| {
        "experts are identified once a run, so that every method trains equally many parameters over all rounds"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Ablation;
    use crate::experts::Method;

    #[test]
    fn variants_are_compared_with_the_first_that_differs_in_one_factor() {
        let args = CompareArgs {
            methods: vec![Method::Gradient, Method::Random],
            ablations: vec![Ablation::ExpertOnly, Ablation::Frozen],
            sweep: vec!["expert-lr=1e-5,1e-4".parse().unwrap()],
            ..CompareArgs::default()
        };
        let variants = args.variants(&RunConfig { expert_lr: 1e-5, ..RunConfig::default() });
        let found: Vec<_> =
            contrasts(&variants).into_iter().map(|c| format!("{}: {} / {}", c.factor, c.a, c.b)).collect();
        let [g5, g4, r5, r4] = ["gradient", "random"]
            .map(|method| ["1e-5", "1e-4"].map(|lr| format!("{method}-expert-only,expert-lr={lr}")))
            .concat()
            .try_into()
            .unwrap();
        let wanted = [
            format!("training: original / {g5}"),
            format!("training: original / {g4}"),
            format!("expert-lr: {g5} / {g4}"),
            format!("training: original / {r5}"),
            format!("method: {g5} / {r5}"),
            format!("training: original / {r4}"),
            format!("method: {g4} / {r4}"),
            format!("expert-lr: {r5} / {r4}"),
            "training: original / frozen".into(),
            format!("ablation: {g5} / frozen"),
        ];
        assert_eq!(found, wanted);
    }
}
