//! The evaluations of a comparison: of the model before training and of each variant, with the same options.

use std::fs;
use std::path::{Path, PathBuf};

use crate::config::{CompareArgs, Device, EvalArgs, Offload, RunConfig};
use crate::exit::{self, Ended, Failure, Result};
use crate::launch::Started;
use crate::report::{
    EvalReport, Evaluated, LowerBound, Measure, ORIGINAL, PromptSide, RefusalOnset, drift_by_reply, outcomes,
};
use crate::run::eval::{check_inputs, eval_on};
use crate::run::refusals::LISTS;
use crate::run::session::Base;
use crate::ui::Ui;

/// How the models of a comparison are evaluated.
pub struct Evaluations<'a> {
    pub config: &'a RunConfig,
    /// The model before training.
    pub base: &'a Base,
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

    /// [`Self::inputs`] and the judge.
    pub fn all_inputs(&self) -> Vec<&Path> {
        self.inputs().into_iter().chain(self.args.judge.as_deref().map(Path::new)).collect()
    }

    /// Checks everything that the evaluation of the model before training reads, without writing anything.
    ///
    /// # Errors
    /// Those of [`eval_on`] before it begins.
    pub fn check(&self) -> Result<()> {
        for (i, (part, rows)) in self.rows().into_iter().enumerate() {
            check_inputs(
                Some(self.base),
                &self.arguments(ORIGINAL, &self.base.dir, part, rows, i == 0)?,
                self.started,
            )?;
        }
        Ok(())
    }

    /// Evaluates a model into `evaluations/NAME`; nothing where no rows are given. The process with rank 0 returns what was found.
    ///
    /// # Errors
    /// Those of [`eval_on`].
    pub fn of(&self, name: &str, model: &Path) -> Result<Ended<Evaluated>> {
        for (i, (part, rows)) in self.rows().into_iter().enumerate() {
            let args = self.arguments(name, model, part, rows, i == 0)?;
            self.ui.line(format_args!("evaluating {name} on the {part} rows"));
            let ended = eval_on(Some(self.base), &args, self.started, &self.ui.without_results())?;
            if let Ended::Stopped(stopped) = ended {
                return Ok(Ended::Stopped(stopped));
            }
        }
        let lost = || {
            let message = format!("{}: rows are missing that were just written", self.folder(name, "").display());
            Failure::new(exit::IO, message)
        };
        let found = self.started.ranks.first(|| self.read(name)?.ok_or_else(lost))?;
        Ok(Ended::Done(found.unwrap_or_default()))
    }

    /// What the evaluations in `evaluations/NAME` found; `None` if one is not there, or not complete.
    ///
    /// # Errors
    /// Files that are damaged.
    pub fn read(&self, name: &str) -> Result<Option<Evaluated>> {
        let mut found = Evaluated::default();
        for (part, _) in self.rows() {
            let dir = self.folder(name, part);
            let path = dir.join("eval.json");
            if !path.exists() {
                return Ok(None);
            }
            let report = EvalReport::read(&path)?;
            if report.judge.is_some() != self.args.judge.is_some() {
                return Ok(None);
            }
            let mut is_whole = true;
            let all = outcomes(&dir, &report, &mut |_| is_whole = false)?;
            if !is_whole {
                return Ok(None);
            }
            // Questions have the names of their files.
            let of_rows = |what: &str| what.starts_with("unsafe prompts: ") || what.starts_with("safe prompts: ");
            let named = |what: String| if of_rows(&what) { format!("{part}, {what}") } else { what };
            found.shares.extend(all.into_iter().map(|(what, measured)| (named(what), measured)));
            let drift = drift_by_reply(&dir)?;
            if !drift.is_empty() {
                found.numbers.insert(format!("{part}, safe prompts: KL from the original model"), drift);
            }
            let first = LISTS[0].id();
            let is_cut = |o: &&RefusalOnset| o.list == first && o.side == PromptSide::Unsafe && o.cuts_off();
            found.lower_bounds.extend(report.refusal_onset.iter().filter(is_cut).map(|onset| LowerBound {
                model: name.to_owned(),
                rows: part.to_owned(),
                list: onset.list.clone(),
                answers: onset.answers,
                cut: onset.cut,
            }));
        }
        Ok(Some(found))
    }

    fn folder(&self, name: &str, part: &str) -> PathBuf {
        self.config.output_dir.join("evaluations").join(name).join(part)
    }

    fn arguments(&self, name: &str, model: &Path, part: &str, rows: &Path, asks: bool) -> Result<EvalArgs> {
        let (c, args) = (self.config, self.args);
        let model = model.to_str().ok_or_else(|| {
            let message = format!("{}: the path is not UTF-8; give another --output-dir", model.display());
            Failure::new(exit::CONFIG, message)
        })?;
        let output_dir = self.folder(name, part);
        let resume = c.resume && self.started.ranks.decide(|| Ok(output_dir.is_dir()))?;
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
            generation_batch_size: args.eval_generation_batch_size.unwrap_or(default.generation_batch_size),
            judge: args.judge.clone(),
            judge_form: args.judge_form,
            judge_template: args.judge_template.clone(),
            judge_chat_template_kwargs: args.judge_chat_template_kwargs.clone(),
            judge_max_new_tokens: args.judge_max_new_tokens.unwrap_or(default.judge_max_new_tokens),
            resume,
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
