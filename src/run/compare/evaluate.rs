//! The evaluations of a comparison: of the model before training and of each variant, with the same options.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use crate::config::{CompareArgs, Device, EvalArgs, Offload, RunConfig};
use crate::data::{Dataset, Record, normalized};
use crate::exit::{self, Ended, Failure, Result};
use crate::launch::Started;
use crate::report::{
    CutAnswers, CutOff, EvalReport, Evaluated, LowerBound, Measure, ORIGINAL, PromptSide, RefusalOnset, drift_by_reply,
    outcomes,
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

    /// Checks everything that the evaluation of the model before training reads, without writing anything. `trained`: the requests on
    /// which variants are trained. Returns what a reader of the outcomes has to know of the rows.
    ///
    /// # Errors
    /// Those of [`eval_on`] before it begins; benign rows without a safe prompt.
    pub fn check(&self, trained: &HashSet<String>) -> Result<Vec<String>> {
        let mut notes = Vec::new();
        for (i, (part, rows)) in self.rows().into_iter().enumerate() {
            let args = self.arguments(ORIGINAL, &self.base.dir, part, rows, i == 0)?;
            let (data, questions) = check_inputs(Some(self.base), &args, self.started)?;
            notes.extend(self.started.ranks.all_ok(notes_on(part, &data, &args.safe_response(), trained))?);
            notes.extend(questions.iter().filter_map(|(path, requests)| note_on_questions(path, requests, trained)));
        }
        Ok(notes)
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
            let named =
                |answers: &CutOff| CutAnswers { model: name.to_owned(), rows: part.to_owned(), answers: *answers };
            found.cut_off.extend(report.cut_off.iter().map(named));
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
            safe_response: Some(c.safe_response.clone()),
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

/// What a reader of the outcomes on these rows has to know.
///
/// # Errors
/// Benign rows without a safe prompt.
fn notes_on(part: &str, data: &Dataset, safe_response: &str, trained: &HashSet<String>) -> Result<Vec<String>> {
    let (path, all) = (data.report.path.display(), data.records.len());
    let count = |is: fn(&Record) -> bool| data.records.iter().filter(|record| is(record)).count();
    let (safe, unsafe_) = (count(|r| r.safe_prompt.is_some()), count(|r| r.unsafe_prompt.is_some()));
    if part == "benign" && safe == 0 {
        let message = format!(
            "{path} holds no row with a safe prompt: over-refusal and drift are measured on these; give --benign-dataset-path chat rows \
             labelled safe\n{}",
            data.report
        );
        return Err(Failure::new(exit::DATA, message));
    }
    let shared = data.requests().filter(|request| trained.contains(request)).count();
    let [to_unsafe, to_safe] = data.report.safe_responses;
    let notes = [
        (shared > 0).then(|| {
            format!(
                "{shared} of {all} {part} rows of {path} have the same request as rows on which variants are trained: outcomes on them \
                 say nothing about unseen requests"
            )
        }),
        (part == "benign" && unsafe_ > 0).then(|| {
            format!("{unsafe_} of {all} benign rows of {path} have an unsafe prompt: its refusal is measured apart, and is no over-refusal")
        }),
        (to_unsafe + to_safe > 0).then(|| {
            format!(
                "{part} rows of {path} lack {to_unsafe} replies to unsafe prompts and {to_safe} to safe ones: measured in their place is \
                 --safe-response {safe_response:?}, for all variants"
            )
        }),
    ];
    Ok(notes.into_iter().flatten().collect())
}

/// What a reader has to know of the answers to the questions of a file.
fn note_on_questions(path: &Path, requests: &[String], trained: &HashSet<String>) -> Option<String> {
    let shared = requests.iter().filter(|request| trained.contains(&normalized(request))).count();
    (shared > 0).then(|| {
        format!(
            "{shared} of {} questions of {} have the same request as rows on which variants are trained: answers to them say nothing \
             about unseen questions",
            requests.len(),
            path.display()
        )
    })
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
