//! The evaluations of a comparison: of the model before training and of each variant, with the same options.

use std::fs;
use std::path::{Path, PathBuf};

use crate::config::{CompareArgs, Device, EvalArgs, Offload, RunConfig};
use crate::exit::{self, Ended, Failure, Result};
use crate::launch::Started;
use crate::report::{EvalReport, Evaluated, Measure, ORIGINAL, drift_by_reply, outcomes};
use crate::run::eval::{check_inputs, eval};
use crate::run::refusals::LISTS;
use crate::ui::Ui;

/// How the models of a comparison are evaluated.
pub struct Evaluations<'a> {
    pub config: &'a RunConfig,
    pub args: &'a CompareArgs,
    pub started: &'a Started,
    pub ui: &'a Ui,
}

impl Evaluations<'_> {
    /// Names and files of the rows.
    fn rows(&self) -> Vec<(&'static str, &Path)> {
        let rows = [("held-out", &self.config.eval_dataset_path), ("benign", &self.args.benign_dataset_path)];
        rows.into_iter().filter_map(|(name, path)| Some((name, path.as_deref()?))).collect()
    }

    /// Rows that variants are also trained on, one sentence a file.
    pub fn trained_on(&self) -> Vec<String> {
        let same = |a: &Path, b: &Path| {
            a == b || fs::canonicalize(a).ok().zip(fs::canonicalize(b).ok()).is_some_and(|(a, b)| a == b)
        };
        let trained = [Some(&self.config.dataset_path), self.config.retain_dataset_path.as_ref()];
        let is_trained = |path: &Path| trained.iter().flatten().any(|other| same(path, other));
        let rows = self.rows().into_iter().filter(|(_, path)| is_trained(path));
        rows.map(|(part, path)| {
            format!("{} holds {part} rows on which variants are trained, too: outcomes on them say nothing about unseen requests", path.display())
        })
        .collect()
    }

    /// Whether models are evaluated.
    pub fn are_asked_for(&self) -> bool {
        !self.rows().is_empty()
    }

    /// Files that the evaluations read.
    pub fn inputs(&self) -> Vec<&Path> {
        let files = self.args.questions.iter().chain(&self.args.judge_template).map(PathBuf::as_path);
        self.rows().into_iter().map(|(_, path)| path).chain(files).collect()
    }

    /// Checks everything that the evaluation of a model reads, without writing anything.
    ///
    /// # Errors
    /// Those of [`eval`] before it begins.
    pub fn check(&self, model: &Path) -> Result<()> {
        for (i, (part, rows)) in self.rows().into_iter().enumerate() {
            check_inputs(&self.arguments(ORIGINAL, model, part, rows, i == 0)?, self.started)?;
        }
        Ok(())
    }

    /// Evaluates a model into `evaluations/NAME`; nothing where no rows are given.
    ///
    /// # Errors
    /// Those of [`eval`].
    pub fn of(&self, name: &str, model: &Path) -> Result<Ended<Evaluated>> {
        let mut found = Evaluated::default();
        for (i, (part, rows)) in self.rows().into_iter().enumerate() {
            let args = self.arguments(name, model, part, rows, i == 0)?;
            self.ui.line(format_args!("evaluating {name} on the {part} rows"));
            if let Ended::Stopped(stopped) = eval(&args, self.started, &self.ui.without_results())? {
                return Ok(Ended::Stopped(stopped));
            }
            let dir = &args.output_dir;
            let mut torn = |line| self.ui.warn(line);
            let all = outcomes(dir, &EvalReport::read(&dir.join("eval.json"))?, &mut torn)?;
            // Questions have the names of their files.
            let of_rows = |what: &str| what.starts_with("unsafe prompts: ") || what.starts_with("safe prompts: ");
            let named = |what: String| if of_rows(&what) { format!("{part}, {what}") } else { what };
            found.shares.extend(all.into_iter().map(|(what, measured)| (named(what), measured)));
            let drift = drift_by_reply(dir)?;
            if !drift.is_empty() {
                found.numbers.insert(format!("{part}, safe prompts: KL from the original model"), drift);
            }
        }
        Ok(Ended::Done(found))
    }

    fn arguments(&self, name: &str, model: &Path, part: &str, rows: &Path, asks: bool) -> Result<EvalArgs> {
        let (c, args) = (self.config, self.args);
        let model = model.to_str().ok_or_else(|| {
            let message = format!("{}: the path is not UTF-8; give another --output-dir", model.display());
            Failure::new(exit::CONFIG, message)
        })?;
        let output_dir = c.output_dir.join("evaluations").join(name).join(part);
        let default = EvalArgs::of(model.to_owned(), rows);
        Ok(EvalArgs {
            chat_template: c.chat_template.clone(),
            chat_template_kwargs: Some(c.chat_template_kwargs.clone()),
            drift_from: (part == "benign").then(|| c.model_name.clone()),
            questions: if asks { args.questions.clone() } else { Vec::new() },
            answer_pattern: args.answer_pattern.clone().filter(|_| asks),
            max_samples: c.max_samples,
            max_length: c.max_length,
            long_rows: c.long_rows,
            keep_failed: c.keep_failed,
            batch_size: c.batch_size,
            skip_answers: args.max_new_tokens().is_none(),
            max_new_tokens: args.max_new_tokens().unwrap_or(default.max_new_tokens),
            judge: args.judge.clone(),
            judge_form: args.judge_form,
            judge_template: args.judge_template.clone(),
            resume: c.resume && output_dir.is_dir(),
            output_dir,
            device: c.device,
            precision: c.precision,
            offload: if c.device == Device::Cpu { Offload::Auto } else { c.offload },
            shard_frozen: c.shard_frozen && c.device != Device::Cpu,
            ranks: c.ranks,
            threads: c.threads,
            timeout: c.timeout,
            ..default
        })
    }
}

/// The measures that are drawn and tested: of the refusals by phrase lists only those by the first list. The answers to unsafe
/// prompts come first, then benign rows.
pub fn primary(evaluated: &Evaluated) -> Vec<Measure> {
    let first = format!("refused, {}", LISTS[0].id());
    let is_primary = |name: &str| !name.contains("prompts: refused, ") || name.ends_with(&first);
    let mut measures: Vec<Measure> = evaluated.measures().into_iter().filter(|m| is_primary(&m.name)).collect();
    let order = ["held-out, unsafe prompts: ", "benign, ", "held-out, "];
    measures.sort_by_key(|m| order.iter().position(|start| m.name.starts_with(start)).unwrap_or(order.len()));
    measures
}
