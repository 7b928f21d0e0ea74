//! What is wrong with a matrix: contradictions, numbers out of range, methods that would train different numbers of parameters.

use super::{Ablation, CompareArgs, Sweep, SweepMode, Variant};
use crate::config::validate::{MOST, inert_options};
use crate::config::{Init, RunConfig, SaveRounds, Schedule};
use crate::experts::{IdentifyIn, Selection};

/// The most variants of a matrix: far more than can be trained.
const MOST_VARIANTS: usize = 1_000;
impl CompareArgs {
    /// Contradictions between the options, each with a remedy.
    pub(in crate::config) fn problems(&self, base: &RunConfig) -> Vec<String> {
        let skips = self.skip_answers == Some(true);
        let measured = base.eval_dataset_path.is_some() || self.benign_dataset_path.is_some();
        let twice = |i: usize| self.sweep[..i].iter().any(|earlier| earlier.option() == self.sweep[i].option());
        let swept_twice = (0..self.sweep.len()).find(|&i| twice(i)).map(|i| self.sweep[i].option());
        let of_judge = [
            self.judge_form.is_some(),
            self.judge_template.is_some(),
            self.judge_chat_template_kwargs.is_some(),
            self.judge_max_new_tokens.is_some(),
        ];
        let rules = [
            (
                self.judge.is_none() && of_judge.iter().any(|given| *given),
                "--judge-form, --judge-template, --judge-chat-template-kwargs and --judge-max-new-tokens need the judge: give --judge",
            ),
            (
                self.judge_chat_template_kwargs.is_some() && self.judge_template.is_some(),
                "--judge-chat-template-kwargs: the file of --judge-template gives these variables, as chat_template_kwargs; leave the option out",
            ),
            (
                self.judge_form.is_some() && self.judge_template.is_some(),
                "--judge-template says how the judge is asked, and so does --judge-form: leave one out",
            ),
            (
                self.judge.is_some() && skips,
                "--judge reads responses, and --skip-answers generates none: leave one out",
            ),
            (
                self.eval_max_new_tokens.is_some() && skips,
                "--eval-max-new-tokens would do nothing: --skip-answers generates no responses; leave it out",
            ),
            (
                self.eval_generation_batch_size.is_some() && skips,
                "--eval-generation-batch-size would do nothing: --skip-answers generates no responses; leave it out",
            ),
            (
                self.answer_pattern.is_some() && self.questions.is_empty(),
                "--answer-pattern would do nothing without --questions; leave it out",
            ),
            (
                base.init == Init::Random && measured,
                "--init random writes no model, so no variant can be evaluated: leave --eval-dataset-path and --benign-dataset-path out",
            ),
            (
                self.drops_models() && base.save_rounds == SaveRounds::Full && base.init == Init::Checkpoint,
                "--drop-models would leave the models of the rounds: give --save-rounds none, or delta, of which `export` makes a model",
            ),
            (
                !measured
                    && (self.judge.is_some()
                        || skips
                        || self.eval_max_new_tokens.is_some()
                        || self.eval_generation_batch_size.is_some()),
                "without rows to evaluate on, options of the evaluation do nothing: give --eval-dataset-path or --benign-dataset-path",
            ),
            (
                !measured && !self.questions.is_empty(),
                "--questions are asked where a variant is evaluated: give --eval-dataset-path or --benign-dataset-path, too",
            ),
            (
                self.unequal_parameters == Some(true) && !self.compares_selections(),
                "--unequal-parameters would do nothing: it is about two or more --methods that select experts; leave it out",
            ),
            (
                self.sweep_mode == Some(SweepMode::OneAtATime) && self.sweep.len() < 2,
                "--sweep-mode would do nothing: it is about two or more --sweep; leave it out",
            ),
        ];
        let wrong = rules.into_iter().filter(|(applies, _)| *applies).map(|(_, message)| message.to_owned());
        let numbers = [
            ("--eval-max-new-tokens", self.eval_max_new_tokens, MOST),
            ("--eval-generation-batch-size", self.eval_generation_batch_size, usize::MAX),
            ("--judge-max-new-tokens", self.judge_max_new_tokens, MOST),
        ];
        let out_of_range = |(option, given, most): (&str, Option<usize>, usize)| match given {
            Some(0) => Some(format!("{option} must be at least 1")),
            Some(n) if n > most => Some(format!("{option} must be at most {most}")),
            _ => None,
        };
        let wrong = wrong.chain(numbers.into_iter().filter_map(out_of_range));
        let swept_twice = swept_twice.map(|option| format!("--sweep {option} is there twice: leave one out"));
        wrong.chain(swept_twice).chain(self.repeated()).collect()
    }

    /// Options of the runs that the matrix decides in all variants, with the reason: whatever value they have does nothing.
    pub(in crate::config) fn decided(&self, base: &RunConfig) -> Vec<(&str, &'static str)> {
        let trained = "--ablations says what each variant trains";
        let baseline = self.ablations.contains(&Ablation::Baseline);
        let jointly = baseline || self.ablations.contains(&Ablation::Combined);
        let is_joint = base.schedule == Schedule::Joint;
        let rules = [
            (true, "method", "--methods says which methods are compared"),
            (true, "mode", trained),
            (true, "finetune-unsafe-experts", trained),
            // All parameters are trained with a router phase, or without.
            (!baseline, "skip-router-training", trained),
            (is_joint && !jointly, "schedule", "no ablation trains experts and routers"),
            (is_joint && !jointly, "use-router-consistency-loss", "no ablation trains experts and routers"),
        ];
        let rules = rules.into_iter().filter(|(applies, ..)| *applies).map(|(_, option, why)| (option, why));
        // One at a time, the others have the values of the base; and it has to have rows.
        let is_grid = self.sweep_mode.unwrap_or_default() == SweepMode::Grid;
        let swept = self.sweep.iter().map(Sweep::option).filter(|option| is_grid && *option != "dataset-path");
        rules.chain(swept.map(|option| (option, "--sweep gives its values"))).collect()
    }

    /// Values that are there twice.
    fn repeated(&self) -> Vec<String> {
        let named = |option: &str, names: Vec<String>| {
            let twice = (0..names.len()).filter(|&i| names[..i].contains(&names[i]));
            twice.map(|i| format!("--{option} has {} twice: leave one out", names[i])).collect::<Vec<_>>()
        };
        [
            named("methods", self.methods.iter().map(|method| method.name()).collect()),
            named("ablations", self.ablations.iter().map(|ablation| ablation.name()).collect()),
        ]
        .concat()
    }

    /// Why the matrix is too large to be trained; `None` if it is not.
    pub(in crate::config) fn too_many(&self) -> Option<String> {
        let sizes = self.sweep.iter().map(Sweep::num_values);
        let settings = match self.sweep_mode.unwrap_or_default() {
            SweepMode::Grid => sizes.fold(1usize, usize::saturating_mul),
            SweepMode::OneAtATime => sizes.sum::<usize>().max(1),
        };
        let all = settings.saturating_mul(self.methods.len()).saturating_mul(self.ablations.len());
        (all > MOST_VARIANTS)
            .then(|| format!("the matrix has up to {all} variants, but at most {MOST_VARIANTS}: sweep fewer values"))
    }

    /// Why methods that select `top-k-experts` each would still train different numbers of parameters.
    pub(in crate::config) fn why_unequal(&self, base: &RunConfig) -> Option<&'static str> {
        match base {
            _ if !self.needs_equal_parameters() => None,
            RunConfig { selection: Selection::PerBatch, .. } => Some(
                "--selection per-batch selects at every step, so that methods train different numbers of parameters over a run: \
                      give --selection global, or --unequal-parameters",
            ),
            RunConfig { num_rounds: 2.., identify: IdentifyIn::EveryRound, .. } => Some(
                "--identify every-round selects anew in each round, so that methods train different numbers of parameters over a \
                      run: give --identify once, or --unequal-parameters",
            ),
            _ => None,
        }
    }

    /// Sweeps of an option that does nothing in any of the runs, with the reason.
    pub(in crate::config) fn inert_sweeps(&self, variants: &[Variant]) -> Vec<String> {
        let why = |option: &str, variant: &Variant| {
            let inert = inert_options(&variant.config);
            inert.into_iter().find(|(name, _)| *name == option).map(|(_, why)| why)
        };
        let inert = |sweep: &Sweep| {
            let reasons: Option<Vec<_>> = variants.iter().map(|variant| why(sweep.option(), variant)).collect();
            let reason = *reasons?.first()?;
            Some(format!("--sweep {} would do nothing: {reason}; leave it out", sweep.option()))
        };
        self.sweep.iter().filter_map(inert).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::Method;

    #[test]
    fn methods_that_cannot_train_equally_many_parameters_are_refused() {
        let base = RunConfig { num_rounds: 2, ..RunConfig::default() };
        let args = CompareArgs::default().with_defaults();
        assert!(args.why_unequal(&base).unwrap().contains("--identify once"));
        assert!(args.why_unequal(&RunConfig { num_rounds: 1, ..base.clone() }).is_none());
        assert!(args.why_unequal(&RunConfig { identify: IdentifyIn::Once, ..base.clone() }).is_none());
        let one = CompareArgs { methods: vec![Method::Random], ..args.clone() };
        assert!(one.why_unequal(&base).is_none());
        let waived = CompareArgs { unequal_parameters: Some(true), ..args.clone() };
        assert!(waived.why_unequal(&base).is_none());
        let per_batch = RunConfig { num_rounds: 1, selection: Selection::PerBatch, ..base };
        assert!(args.why_unequal(&per_batch).unwrap().contains("--selection global"));
    }
}
