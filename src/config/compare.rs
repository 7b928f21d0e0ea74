//! The matrix of methods and ablations of `compare`.

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};

use super::{Mode, RunConfig, recipe};
use crate::experts::Method;

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

/// Options of `compare` in addition to those of a run.
#[derive(Debug, Clone, PartialEq, Args)]
pub struct CompareArgs {
    /// Methods to compare, comma-separated
    #[arg(long, value_name = "METHODS", value_delimiter = ',', default_value = "gradient,routing,random")]
    pub methods: Vec<Method>,
    /// Ablations to run for each method, comma-separated; an ablation that does not train selected experts runs once
    #[arg(long, value_name = "ABLATIONS", value_delimiter = ',', default_value = "combined")]
    pub ablations: Vec<Ablation>,
}

/// One run of the matrix.
#[derive(Debug, Clone, PartialEq)]
pub struct Variant {
    /// Name of its folder, such as `gradient-combined` or `frozen`.
    pub name: String,
    /// What the run trains.
    pub ablation: Ablation,
    /// The base configuration with this method, this ablation, and the folder `name` in the base's output folder.
    pub config: RunConfig,
}

impl Ablation {
    /// The value of `--ablations`.
    pub fn name(self) -> String {
        self.to_possible_value().expect("no ablation is hidden").get_name().to_owned()
    }

    /// Whether the ablation trains selected experts, so that it depends on the method.
    fn selects(self) -> bool {
        matches!(self, Ablation::ExpertOnly | Ablation::Combined)
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
    /// The runs of the matrix without duplicates; ablations vary slowest.
    pub fn variants(&self, base: &RunConfig) -> Vec<Variant> {
        let mut variants: Vec<Variant> = Vec::new();
        for ablation in &self.ablations {
            for method in if ablation.selects() { &self.methods[..] } else { std::slice::from_ref(&base.method) } {
                let method_name = method.to_possible_value().expect("no method is hidden").get_name().to_owned();
                let ablation_name = ablation.name();
                let name = if ablation.selects() { format!("{method_name}-{ablation_name}") } else { ablation_name };
                if variants.iter().any(|v| v.name == name) {
                    continue;
                }
                let output_dir = base.output_dir.join(&name);
                let config = RunConfig { output_dir, ..ablation.apply(base, *method) };
                variants.push(Variant { name, ablation: *ablation, config });
            }
        }
        variants
    }
}

impl Variant {
    /// Whether a matrix can have a variant of this name.
    pub fn is_name(name: &str) -> bool {
        let all =
            CompareArgs { methods: Method::value_variants().to_vec(), ablations: Ablation::value_variants().to_vec() };
        all.variants(&RunConfig::default()).iter().any(|v| v.name == name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Schedule, validate};
    use crate::experts::Selection;

    #[test]
    fn the_matrix_has_each_cell_once_and_every_cell_is_valid() {
        let args =
            CompareArgs { methods: Method::value_variants().to_vec(), ablations: Ablation::value_variants().to_vec() };
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
}
