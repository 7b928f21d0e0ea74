//! The matrix of `compare`: methods, ablations and sweeps.

mod problems;
mod sweep;

use std::collections::BTreeMap;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use sweep::{Setting, combinations};
pub use sweep::{Sweep, SweepMode};

use super::commands::NEW_TOKENS;
use super::raw::heading::{EXPERTS, OPTIMIZER, RETENTION, ROUTERS, TRAINING};
use super::validate::inert_options;
use super::{Mode, RunConfig, TemplateKwargs, recipe};
use crate::experts::Method;
use crate::judge::JudgeForm;

/// Which parameters a run of the matrix trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Ablation {
    /// The selected experts, not the routers.
    ExpertOnly,
    /// The routers, not the experts.
    RouterOnly,
    /// The selected experts and the routers.
    Combined,
    /// No parameter: all weights stay bit-identical.
    Frozen,
    /// All parameters.
    Baseline,
}

/// Options of `compare` in addition to those of a run, as flags and in the YAML file. `Option` and an empty list: not given.
#[derive(Debug, Clone, PartialEq, Default, Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub struct CompareArgs {
    /// Methods to compare, comma-separated [default: gradient,routing,random]
    #[arg(long, value_name = "METHODS", value_delimiter = ',', help_heading = MATRIX)]
    pub methods: Vec<Method>,
    /// Ablations to run for each method, comma-separated; an ablation that does not train selected experts runs once [default:
    /// combined]
    #[arg(long, value_name = "ABLATIONS", value_delimiter = ',', help_heading = MATRIX)]
    pub ablations: Vec<Ablation>,
    /// Values of an option of the runs, such as expert-lr=1e-5,5e-5 (a comma within a value: \\,). Can be given several times
    #[arg(long, value_name = "OPTION=VALUES", help_heading = MATRIX)]
    pub sweep: Vec<Sweep>,
    /// How several sweeps combine [default: grid]
    #[arg(long, help_heading = MATRIX)]
    pub sweep_mode: Option<SweepMode>,
    /// Compare methods that train different numbers of parameters, too
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = MATRIX)]
    pub unequal_parameters: Option<bool>,

    /// Benign requests with their replies: chat rows labelled safe. Each variant is evaluated on them and on --eval-dataset-path
    #[arg(long, value_name = "FILE", help_heading = EVALUATION)]
    pub benign_dataset_path: Option<PathBuf>,
    /// Questions with choices or with one right answer, for each variant: a JSON array or JSONL. Can be given several times
    #[arg(long, value_name = "FILE", help_heading = EVALUATION)]
    pub questions: Vec<PathBuf>,
    /// Regular expression of which the last match in a response (its first group, if it has one) is compared with the right answer
    #[arg(long, value_name = "REGEX", help_heading = EVALUATION)]
    pub answer_pattern: Option<String>,
    /// Generate no responses: only losses, exact replies and questions with choices
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = EVALUATION)]
    pub skip_answers: Option<bool>,
    /// Maximum length of a generated response in tokens [default: 128]
    #[arg(long, value_name = "TOKENS", help_heading = EVALUATION)]
    pub eval_max_new_tokens: Option<usize>,
    /// Responses that are generated together on each rank, with one pass over the weights a token [default: 16]
    #[arg(long, value_name = "RESPONSES", help_heading = EVALUATION)]
    pub eval_generation_batch_size: Option<usize>,
    /// Safety judge that reads the responses: a model folder, or a hub id
    #[arg(long, value_name = "FOLDER|ID", help_heading = EVALUATION)]
    pub judge: Option<String>,
    /// How the judge is asked and how it answers (by default as its family does: qwen3 as qwen3guard, llama as llama-guard)
    #[arg(long, help_heading = EVALUATION)]
    pub judge_form: Option<JudgeForm>,
    /// YAML file with another prompt for the judge and the patterns of its verdicts
    #[arg(long, value_name = "FILE", help_heading = EVALUATION)]
    pub judge_template: Option<PathBuf>,
    /// Variables of the judge's own chat template, as a JSON object such as {"excluded_category_keys": ["S14"]}
    #[arg(long, value_name = "JSON", help_heading = EVALUATION)]
    pub judge_chat_template_kwargs: Option<TemplateKwargs>,
    /// Maximum length of a text of the judge in tokens [default: 128]
    #[arg(long, value_name = "TOKENS", help_heading = EVALUATION)]
    pub judge_max_new_tokens: Option<usize>,
    /// Remove the final model and the checkpoints of a variant once it is evaluated
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", help_heading = EVALUATION)]
    pub drop_models: Option<bool>,
}

const MATRIX: &str = "Matrix";
const EVALUATION: &str = "Evaluation of each variant";

/// One run of the matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// Name of its folder: `gradient-combined`, `frozen`, or with swept options `gradient-combined,expert-lr=1e-5`.
    pub name: String,
    /// What the run trains.
    pub ablation: Ablation,
    /// The values of the swept options that do something in this run.
    pub settings: BTreeMap<String, Value>,
    /// The base configuration with this method, this ablation, these settings, and the folder `name` in the base's output folder.
    pub config: RunConfig,
}

/// The longest name of a variant in bytes: temporary names of its files and folders need room, too.
const LONGEST_NAME: usize = 200;

impl Ablation {
    /// The value of `--ablations`.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no ablation is hidden").get_name().to_owned()
    }

    /// Whether the ablation trains selected experts, so that it depends on the method.
    fn selects(self) -> bool {
        matches!(self, Ablation::ExpertOnly | Ablation::Combined)
    }

    /// Whether an option with this heading changes neither what the ablation trains nor how it is evaluated.
    fn ignores(self, option: &str, heading: &str) -> bool {
        let of_training = [TRAINING, OPTIMIZER, ROUTERS, RETENTION].contains(&heading);
        let of_rows_to_train_on =
            ["dataset-path", "retain-dataset-path", "safe-response", "loss-on", "shuffle", "seed"];
        match self {
            Self::ExpertOnly | Self::Combined => false,
            // The selection is made, but not trained.
            Self::RouterOnly | Self::Baseline => heading == EXPERTS || ["identify", "identify-until"].contains(&option),
            Self::Frozen => heading == EXPERTS || of_training || of_rows_to_train_on.contains(&option),
        }
    }

    /// `base` with this ablation and this method. The joint schedule is kept only if experts and routers both train.
    pub fn apply(self, base: &RunConfig, method: Method) -> RunConfig {
        let (experts, routers) = match self {
            Ablation::ExpertOnly => (Some(Mode::Selective), Some(false)),
            Ablation::RouterOnly => (None, Some(true)),
            Ablation::Combined => (Some(Mode::Selective), Some(true)),
            Ablation::Frozen => (None, Some(false)),
            Ablation::Baseline => (Some(Mode::Baseline), None),
        };
        recipe::variant(base, method, experts, routers)
    }
}

impl CompareArgs {
    /// Each option as given here, or else as given in `fallback`.
    pub(super) fn or(self, fallback: Self) -> Self {
        fn list<T>(ours: Vec<T>, theirs: Vec<T>) -> Vec<T> {
            if ours.is_empty() { theirs } else { ours }
        }
        Self {
            methods: list(self.methods, fallback.methods),
            ablations: list(self.ablations, fallback.ablations),
            sweep: list(self.sweep, fallback.sweep),
            sweep_mode: self.sweep_mode.or(fallback.sweep_mode),
            unequal_parameters: self.unequal_parameters.or(fallback.unequal_parameters),
            benign_dataset_path: self.benign_dataset_path.or(fallback.benign_dataset_path),
            questions: list(self.questions, fallback.questions),
            answer_pattern: self.answer_pattern.or(fallback.answer_pattern),
            skip_answers: self.skip_answers.or(fallback.skip_answers),
            eval_max_new_tokens: self.eval_max_new_tokens.or(fallback.eval_max_new_tokens),
            eval_generation_batch_size: self.eval_generation_batch_size.or(fallback.eval_generation_batch_size),
            judge: self.judge.or(fallback.judge),
            judge_form: self.judge_form.or(fallback.judge_form),
            judge_template: self.judge_template.or(fallback.judge_template),
            judge_chat_template_kwargs: self.judge_chat_template_kwargs.or(fallback.judge_chat_template_kwargs),
            judge_max_new_tokens: self.judge_max_new_tokens.or(fallback.judge_max_new_tokens),
            drop_models: self.drop_models.or(fallback.drop_models),
        }
    }

    /// The options with the methods and the ablations that are compared by default.
    pub(super) fn with_defaults(mut self) -> Self {
        if self.methods.is_empty() {
            self.methods = vec![Method::Gradient, Method::Routing, Method::Random];
        }
        if self.ablations.is_empty() {
            self.ablations = vec![Ablation::Combined];
        }
        self
    }

    /// The most tokens of a response; `None` if none are generated.
    pub fn max_new_tokens(&self) -> Option<usize> {
        (self.skip_answers != Some(true)).then(|| self.eval_max_new_tokens.unwrap_or(NEW_TOKENS))
    }

    /// Whether the models of a variant are removed once it is evaluated.
    pub fn drops_models(&self) -> bool {
        self.drop_models == Some(true)
    }

    /// Whether the numbers of trained parameters have to be equal: several methods select the experts that are trained.
    pub fn needs_equal_parameters(&self) -> bool {
        self.compares_selections() && self.unequal_parameters != Some(true)
    }

    /// Whether several methods select the experts that are trained.
    fn compares_selections(&self) -> bool {
        let selects = self.ablations.iter().any(|ablation| ablation.selects());
        selects && self.methods.iter().any(|method| *method != self.methods[0])
    }

    /// The runs of the matrix without duplicates: ablations vary slowest, settings fastest.
    pub fn variants(&self, base: &RunConfig) -> Vec<Variant> {
        let combinations = combinations(&self.sweep, self.sweep_mode.unwrap_or_default());
        let mut variants: Vec<Variant> = Vec::new();
        for ablation in &self.ablations {
            for method in if ablation.selects() { &self.methods[..] } else { std::slice::from_ref(&base.method) } {
                for settings in &combinations {
                    let variant = self.variant(base, *ablation, *method, settings);
                    let same = |other: &Variant| {
                        RunConfig { output_dir: variant.config.output_dir.clone(), ..other.config.clone() }
                            == variant.config
                    };
                    // In a sweep of one option at a time, the base configuration comes once for each sweep.
                    if !variants.iter().any(|other| other.ablation == *ablation && same(other)) {
                        variants.push(variant);
                    }
                }
            }
        }
        variants
    }

    /// The run with these settings; those that would do nothing in it keep the value of the base configuration.
    fn variant(&self, base: &RunConfig, ablation: Ablation, method: Method, settings: &[&Setting]) -> Variant {
        let with = |settings: &[&Setting]| {
            let swept = settings.iter().fold(base.clone(), |config, setting| setting.apply(config));
            ablation.apply(&swept, method)
        };
        let inert = inert_options(&with(settings));
        let does_something = |option: &str, heading: &str| {
            inert.iter().all(|(inert, _)| *inert != option) && !ablation.ignores(option, heading)
        };
        let effective: Vec<&Setting> =
            settings.iter().copied().filter(|s| does_something(&s.option, &s.heading)).collect();
        let mut name = ablation.name();
        if ablation.selects() {
            name = format!("{}-{name}", method.name());
        }
        effective.iter().for_each(|setting| name += &format!(",{}", setting.folder_name()));
        let config = RunConfig { output_dir: base.output_dir.join(&name), ..with(&effective) };
        let mut settings = self.settings_of(&config);
        let inert = self.sweep.iter().filter(|sweep| !does_something(sweep.option(), sweep.heading()));
        inert.for_each(|sweep| _ = settings.remove(sweep.option()));
        Variant { name, ablation, settings, config }
    }

    /// The values of the swept options in a configuration.
    pub fn settings_of(&self, config: &RunConfig) -> BTreeMap<String, Value> {
        let values = serde_json::to_value(config).expect("options have text keys");
        self.sweep.iter().map(|sweep| (sweep.option().to_owned(), values[sweep.option()].clone())).collect()
    }
}

impl Variant {
    /// The method that selects the trained experts; `None` if the run trains none that are selected.
    pub fn method(&self) -> Option<Method> {
        self.ablation.selects().then_some(self.config.method)
    }

    /// Whether it can train a model without experts and routers.
    pub fn trains_a_dense_model(&self) -> bool {
        self.ablation == Ablation::Baseline
    }

    /// Whether its name is too long for a folder.
    pub(super) fn has_long_name(&self) -> bool {
        self.name.len() > LONGEST_NAME
    }

    /// Whether a matrix can have a variant of this name.
    pub fn is_name(name: &str) -> bool {
        let all = CompareArgs {
            methods: Method::value_variants().to_vec(),
            ablations: Ablation::value_variants().to_vec(),
            ..CompareArgs::default()
        };
        let mut parts = name.split(',');
        let kind = parts.next().unwrap_or_default();
        let values = serde_json::to_value(RunConfig::default()).expect("options have text keys");
        let is_setting = |part: &str| part.split_once('=').is_some_and(|(option, _)| values.get(option).is_some());
        all.variants(&RunConfig::default()).iter().any(|v| v.name == kind) && parts.all(is_setting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Schedule, validate};
    use crate::experts::Selection;
    use crate::routers::KlType;

    #[test]
    fn the_matrix_has_each_cell_once_and_every_cell_is_valid() {
        let args = CompareArgs {
            methods: Method::value_variants().to_vec(),
            ablations: Ablation::value_variants().to_vec(),
            ..CompareArgs::default()
        };
        let joint = RunConfig {
            schedule: Schedule::Joint,
            use_router_consistency_loss: true,
            selection: Selection::PerBatch,
            ..RunConfig::default()
        };
        for base in [RunConfig::default(), joint] {
            let base = RunConfig { experts: Some("experts.json".into()), ..base };
            let variants = args.variants(&base);
            let names: Vec<_> = variants.iter().map(|v| v.name.as_str()).collect();
            assert_eq!(
                names,
                [
                    "gradient-expert-only",
                    "routing-expert-only",
                    "random-expert-only",
                    "given-expert-only",
                    "esft-token-expert-only",
                    "esft-gate-expert-only",
                    "steermoe-expert-only",
                    "safex-expert-only",
                    "router-only",
                    "gradient-combined",
                    "routing-combined",
                    "random-combined",
                    "given-combined",
                    "esft-token-combined",
                    "esft-gate-combined",
                    "steermoe-combined",
                    "safex-combined",
                    "frozen",
                    "baseline"
                ]
            );
            for v in &variants {
                assert_eq!(validate::problems(&v.config), Vec::<String>::new(), "{}", v.name);
                assert_eq!(v.config.output_dir, base.output_dir.join(&v.name));
            }
            let frozen = &variants[17].config;
            assert!(!frozen.finetune_unsafe_experts && frozen.skip_router_training);
            assert_eq!(variants[18].config.mode, Mode::Baseline);
        }
    }

    fn names(args: &CompareArgs, base: &RunConfig) -> Vec<String> {
        args.variants(base).into_iter().map(|variant| variant.name).collect()
    }

    #[test]
    fn a_swept_option_varies_only_the_runs_in_which_it_does_something() {
        let sweep = ["expert-lr=1e-5,1e-4", "kl-type=forward,reverse"].map(|text| text.parse().unwrap()).to_vec();
        let ablations = vec![Ablation::ExpertOnly, Ablation::RouterOnly, Ablation::Frozen];
        let args = CompareArgs { methods: vec![Method::Gradient], ablations, sweep, ..CompareArgs::default() };
        // Nor does one that changes what is selected, but not trained.
        let selecting = CompareArgs { sweep: vec!["top-k-experts=2,4".parse().unwrap()], ..args.clone() };
        let ablations = vec![Ablation::Baseline, Ablation::Frozen, Ablation::RouterOnly];
        let selecting = CompareArgs { ablations, ..selecting };
        assert_eq!(names(&selecting, &RunConfig::default()), ["baseline", "frozen", "router-only"]);
        let wanted = [
            "gradient-expert-only,expert-lr=1e-5",
            "gradient-expert-only,expert-lr=1e-4",
            "router-only,kl-type=forward",
            "router-only,kl-type=reverse",
            "frozen",
        ];
        let base = RunConfig::default();
        assert_eq!(names(&args, &base), wanted);
        assert!(wanted.iter().all(|name| Variant::is_name(name)) && !Variant::is_name("frozen,none=1"));
        let variants = args.variants(&base);
        let setting = |option: &str, value: Value| BTreeMap::from([(option.to_owned(), value)]);
        assert_eq!(variants[0].settings, setting("expert-lr", 1e-5.into()));
        assert_eq!(variants[3].settings, setting("kl-type", "reverse".into()));
        assert_eq!(variants[4].settings, BTreeMap::new());
        assert_eq!(variants[1].config.expert_lr, 1e-4);
    }

    #[test]
    fn one_at_a_time_the_base_configuration_comes_once() {
        let base = RunConfig {
            schedule: Schedule::Joint,
            use_router_consistency_loss: true,
            router_consistency_weight: 0.1,
            router_consistency_type: KlType::Forward,
            ..RunConfig::default()
        };
        let sweep = ["router-consistency-weight=0.1,1", "router-consistency-type=forward,reverse"];
        let args = CompareArgs {
            methods: vec![Method::Gradient],
            ablations: vec![Ablation::Combined],
            sweep: sweep.map(|text| text.parse().unwrap()).to_vec(),
            sweep_mode: Some(SweepMode::OneAtATime),
            ..CompareArgs::default()
        };
        assert_eq!(
            names(&args, &base),
            [
                "gradient-combined,router-consistency-weight=0.1",
                "gradient-combined,router-consistency-weight=1",
                "gradient-combined,router-consistency-type=reverse",
            ]
        );
        let grid = CompareArgs { sweep_mode: None, ..args };
        assert_eq!(grid.variants(&base).len(), 4);
    }
}
