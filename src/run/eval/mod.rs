//! `eval`: answers of a model to unsafe and safe prompts, refusal rates, losses, and routing.

mod answers;
mod drift;
mod judge_prompt;
mod judging;
mod logged;
mod measured;
mod options;
mod questions;

use std::cell::OnceCell;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use regex::Regex;

use answers::{Answering, Asked};
use drift::{Other, OtherOutputs};
use judging::{Judge, Judging};
use logged::Generated;
use options::{DecidingOptions, Machine};
use questions::{AskingQuestions, Questions};

use super::forecast::forward_passes;
use super::generate::Answer;
use super::other_routing::{use_other_routing, weights_sha};
use super::prepare;
use super::session::{Base, Session};
use crate::backend::Backend;
use crate::collective::{all_agree, on_first};
use crate::config::{EvalArgs, RunConfig};
use crate::data::{Dataset, Penalties, Record};
use crate::exit::{Context, Ended, Result, Stopped};
use crate::launch::{Device, Opened, Rank, Started};
use crate::model::OffloadedBelow;
use crate::report::{
    EvalReport, EvalTimes, EvaluatedModel, RoutingDifference, Sampling, TIMES_SCHEMA, cut_off_warning, eval_tables,
    read_json, write_json,
};
use crate::train::{Recipe, Replica};
use crate::ui::Ui;

/// Measures losses and routing, then generates an answer to every prompt (unless `--skip-answers`), and lets a judge read the answers
/// (`--judge`). Writes `eval.json`, `reply_losses.jsonl`, `generations.jsonl`, `questions.jsonl`, `verdicts.jsonl`,
/// `eval_options.json` and `eval_times.json`.
///
/// # Errors
/// Inputs that cannot be read or are invalid; an output folder or a device that cannot be used; an earlier evaluation in the folder
/// that is not the one to continue; numbers that are not finite; a rank that fails.
pub fn eval(args: &EvalArgs, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    eval_on(None, args, started, ui)
}

/// [`eval`] with a model that is open already, where it is the evaluated one or that of `--drift-from`.
///
/// # Errors
/// Those of [`eval`].
pub(super) fn eval_on(base: Option<&Base>, args: &EvalArgs, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    let config = args.run_config()?;
    let inputs = open(base, args, &config, started, ui)?;
    let existed = config.output_dir.is_dir();
    let done = evaluate(inputs, &config, started, ui);
    if done.is_err() && !existed && started.ranks.leads() {
        _ = fs::remove_dir(&config.output_dir); // fails unless it is empty
    }
    done
}

/// A file of questions, with their requests.
pub(super) type Requests = (PathBuf, Vec<String>);

/// Checks the inputs of [`eval_on`], without writing anything. Returns the rows, and the files of questions with their requests.
///
/// # Errors
/// Those of [`eval`] before it begins.
pub(super) fn check_inputs(
    base: Option<&Base>,
    args: &EvalArgs,
    started: &Started,
) -> Result<(Dataset, Vec<Requests>)> {
    let inputs = open(base, args, &args.run_config()?, started, &Ui::silent())?;
    let questions = inputs.questions.as_ref().map(Questions::requests).unwrap_or_default();
    Ok((inputs.session.data, questions))
}

/// What an evaluation reads.
struct Inputs {
    args: EvalArgs,
    recipe: Recipe,
    session: Session,
    model: EvaluatedModel,
    options: DecidingOptions,
    sampling: Sampling,
    questions: Option<Questions>,
    drift_from: Option<Other>,
    judge: Option<Judge>,
}

impl Inputs {
    /// What the model of `--drift-from` computes, before the evaluated model takes its place on the device.
    fn other_outputs<B: Backend>(
        &self,
        backend: &Arc<B>,
        rank: &Rank,
        offloaded: OffloadedBelow,
    ) -> Result<Option<OtherOutputs<B>>> {
        let outputs = |other: &Other| other.outputs(&self.session, &self.recipe, backend.clone(), rank, offloaded);
        self.drift_from.as_ref().map(outputs).transpose()
    }

    /// Where the routed experts of the evaluated model lie, and of the one that decides its routing.
    fn place_experts<B: Backend>(&self, config: &RunConfig, backend: &B, rank: &Rank) -> Result<OffloadedBelow> {
        let (args, session) = (&self.args, &self.session);
        let models = if session.route_as.is_some() { 2 } else { 1 };
        prepare::place_experts(session, config, rank, models, backend, |budget| {
            let of_record = |r: &Record| [&r.unsafe_prompt, &r.safe_prompt].map(|p| p.as_ref().map_or(0, Vec::len));
            let mut prompts: Vec<usize> = session.data.records.iter().flat_map(of_record).collect();
            if args.skip_answers {
                prompts.clear();
            }
            let questions = self.questions.as_ref().map(Questions::longest);
            prompts.extend(questions.into_iter().flat_map(|longest| vec![longest; args.generation_batch_size]));
            let replies = (&*prompts, args.max_new_tokens, args.generation_batch_size);
            forward_passes(session, args.batch_size, replies, budget)
        })
    }

    /// Warns of prompts that are there several times: their answers are not independent of each other.
    fn warn_of_repeated(&self, ui: &Ui) {
        let asked = self.asked();
        let distinct = asked.iter().map(|asked| asked.ids).collect::<HashSet<_>>().len();
        if distinct < asked.len() {
            ui.warn(format_args!(
                "{} of {} prompts repeat an earlier one: the intervals of this evaluation take all answers as independent of each other, \
                 and are too narrow. `report` and `compare` count a repeated prompt once",
                asked.len() - distinct,
                asked.len()
            ));
        }
    }

    /// The prompts to answer.
    fn asked(&self) -> Vec<Asked<'_>> {
        if self.args.skip_answers { Vec::new() } else { answers::asked(&self.session.data.records) }
    }
}

/// Opens and checks the inputs, in all processes, and verifies that they are the same everywhere.
fn open(base: Option<&Base>, args: &EvalArgs, config: &RunConfig, started: &Started, ui: &Ui) -> Result<Inputs> {
    let (ranks, device) = (&started.ranks, &started.device);
    let own = || {
        let recipe = config.recipe_of_evaluation()?;
        let mut session = Session::open_to_evaluate(prepare::opened(config, base, ui)?, config, ui)?;
        let generated = if args.skip_answers { 0 } else { args.max_new_tokens };
        session.model.check_length(args.max_length.saturating_add(generated))?;
        let questions = Questions::open(args, &session.tokenizer, ui)?;
        session.model.check_length(questions.as_ref().map_or(0, Questions::longest))?;
        session.check_weights()?;
        let mut model = evaluated(&session);
        model.other_routing = use_other_routing(&mut session, args)?;
        let machine = Machine {
            device: device.kind(),
            number_format: device.number_format(args.precision, session.stored_dtype())?,
        };
        let drift_from = Other::open(&session, args, base, ui)?;
        let hash = drift_from.as_ref().map(Other::sha);
        let answers_nothing = args.skip_answers && questions.is_none();
        let penalties = if answers_nothing { Penalties::default() } else { session.tokenizer.penalties()? };
        let options = DecidingOptions::of(
            args,
            &session,
            &model,
            questions.as_ref().map(Questions::hash),
            hash,
            &machine,
            penalties,
        )?;
        let judge = Judge::open(args, device)?;
        if let Some(note) = judge.as_ref().and_then(Judge::note) {
            ui.warn(note);
        }
        let sampling = Sampling {
            temperature: args.temperature,
            top_p: args.top_p,
            max_new_tokens: args.max_new_tokens,
            seed: args.seed,
            penalties,
        };
        let inputs =
            Inputs { args: args.clone(), recipe, session, model, options, sampling, questions, drift_from, judge };
        if base.is_none() {
            inputs.warn_of_repeated(ui);
        }
        if let Some(judge) = &inputs.judge {
            judge.check(&inputs.asked(), args.max_new_tokens, ui)?;
        }
        Ok((inputs, machine))
    };
    let (inputs, machine) = ranks.all_ok(own())?;
    if let Some(world) = ranks.other_processes() {
        inputs.session.agree(config, world)?;
        all_agree(world, "number format of matrix products (--precision)", machine.number_format.as_bytes())?;
        all_agree(world, "evaluation", &inputs.options.to_bytes())?;
        judging::agree(inputs.judge.as_ref(), world)?;
    }
    Ok(inputs)
}

/// Evaluates into the output folder.
fn evaluate(inputs: Inputs, config: &RunConfig, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    let ranks = &started.ranks;
    let other = inputs.model.other_routing.iter().map(|other| &*other.path);
    let judge = inputs.judge.iter().map(|judge| &*judge.model.path);
    let files = inputs.args.questions.iter().chain(&inputs.args.judge_template).map(|path| &**path);
    let more: Vec<&Path> = other.chain(judge).chain(files).collect();
    let _lock = prepare::take_output_dir_keeping(config, &more, ranks)?;
    let begin = || {
        if ranks.leads() {
            inputs.options.check(&config.output_dir)?;
            inputs.options.write(&config.output_dir)?;
        }
        Ok(())
    };
    ranks.all_ok(begin())?;
    ui.line(inputs.session.describe());
    if inputs.judge.is_none() && config.output_dir.join(judging::FILE).exists() {
        ui.warn(format_args!("{} holds verdicts of a judge, which are left out without --judge", judging::FILE));
    }
    if let Some(other) = &inputs.model.other_routing {
        ui.line(format_args!("  {other}"));
    }
    let (config, device, inputs) = (config.clone(), started.device.clone(), Arc::new(inputs));
    ranks.run(ui, move |rank| {
        let asked = inputs.asked();
        let evaluation = Evaluation::new(&inputs, &asked, &config.output_dir, &rank.ui);
        let session = &inputs.session;
        let answered = match device.open(&config, session.workload(config.batch_size), rank)? {
            Opened::Cpu(cpu) => {
                let other = inputs.other_outputs(&cpu, rank, OffloadedBelow::default())?;
                evaluation.run(rank, session.replica(cpu, None, rank, OffloadedBelow::default()), other)
            }
            Opened::Cuda(cuda, transport) => {
                let offloaded = inputs.place_experts(&config, &*cuda, rank)?;
                let other = inputs.other_outputs(&cuda, rank, offloaded)?;
                evaluation.run(rank, session.replica(cuda, transport, rank, offloaded), other)
            }
        };
        // By now the evaluated model is freed.
        let mut results = match answered? {
            Ended::Done(results) => results,
            Ended::Stopped(stopped) => return Ok(Ended::Stopped(stopped)),
        };
        if let Some(judge) = &inputs.judge {
            let judged = evaluation.judge(judge, &device, &config, rank, &mut results).context(evaluation.kept());
            if let Ended::Stopped(stopped) = judged? {
                return Ok(Ended::Stopped(stopped));
            }
        }
        evaluation.show(results.report);
        Ok(Ended::Done(()))
    })
}

/// An evaluation on one rank.
struct Evaluation<'a> {
    inputs: &'a Inputs,
    answering: Answering<'a>,
    output_dir: &'a Path,
    ui: &'a Ui,
}

/// What is known of the evaluated model.
struct Results {
    report: EvalReport,
    times: EvalTimes,
    /// The answers to the prompts.
    said: Vec<Answer>,
}

impl<'a> Evaluation<'a> {
    fn new(inputs: &'a Inputs, asked: &'a [Asked<'a>], output_dir: &'a Path, ui: &'a Ui) -> Self {
        let Inputs { args, session, model, sampling, .. } = inputs;
        let path = output_dir.join(answers::FILE);
        let (batch_size, found) = (args.generation_batch_size, asked.iter().map(|_| OnceCell::new()).collect());
        let answering = Answering { session, model, sampling, asked, batch_size, path, ui, found };
        Self { inputs, answering, output_dir, ui }
    }

    /// Measures the model, lets it answer, and writes what was found.
    fn run<B: Backend>(
        &self,
        rank: &Rank,
        replica: Replica<B>,
        other: Option<OtherOutputs<B>>,
    ) -> Result<Ended<Results>> {
        let args = &self.inputs.args;
        let mut report = self.measure(&replica, other)?;
        let mut times = EvalTimes { schema: TIMES_SCHEMA.into(), answers: None, questions: None, verdicts: None };
        let mut said = Vec::new();
        if !args.skip_answers && !self.answering.asked.is_empty() {
            match self.answering.answers(&replica)? {
                Generated::Stopped { answers, of } => return Ok(Ended::Stopped(stopped(answers, of, answers::FILE))),
                Generated::All(found, took) => (said, times.answers) = (found, Some(took)),
            }
            report.refusals = self.answering.refusals(&said);
            report.refusal_onset = self.answering.onsets(&said);
            report.cut_off = self.answering.cut_off(&said);
        }
        if let Some(questions) = &self.inputs.questions {
            let asking = AskingQuestions {
                questions,
                tokenizer: &self.inputs.session.tokenizer,
                batch_size: args.batch_size,
                generation_batch_size: args.generation_batch_size,
                path: self.output_dir.join(questions::FILE),
                ui: self.ui,
            };
            match asking.ask(&replica)? {
                Generated::Stopped { answers, of } => {
                    return Ok(Ended::Stopped(stopped(answers, of, questions::FILE)));
                }
                Generated::All(found, took) => (report.questions, times.questions) = (found, Some(took)),
            }
        }
        replica.finish();
        let results = Results { report, times, said };
        // Before the judge, too: whatever happens to it, these results are there.
        on_first(&*rank.world, || self.write(&results))?;
        Ok(Ended::Done(results))
    }

    /// Lets the judge read the answers, and writes the results once more, with its verdicts.
    fn judge(
        &self,
        judge: &Judge,
        device: &Device,
        config: &RunConfig,
        rank: &Rank,
        results: &mut Results,
    ) -> Result<Ended<()>> {
        let responses: Vec<&str> =
            results.said.iter().enumerate().map(|(i, said)| self.answering.response(i, said)).collect();
        let judging = Judging {
            judge,
            asked: self.answering.asked,
            responses: &responses,
            batch_size: self.answering.batch_size,
            path: self.output_dir.join(judging::FILE),
            ui: self.ui,
        };
        let found = match judge.device(device, config, rank)? {
            Opened::Cpu(cpu) => judging.verdicts(cpu, rank)?,
            Opened::Cuda(cuda, _) => judging.verdicts(cuda, rank)?,
        };
        let (rows, took) = match found {
            Generated::Stopped { answers, of } => return Ok(Ended::Stopped(stopped(answers, of, judging::FILE))),
            Generated::All(rows, took) => (rows, took),
        };
        (results.report.judge, results.times.verdicts) = (Some(judging.report(&rows)), Some(took));
        on_first(&*rank.world, || {
            self.answering.write(&results.said, Some((&*judge.model.sha, &rows[..])))?;
            self.write(results)
        })?;
        Ok(Ended::Done(()))
    }

    /// What to do if the judge fails.
    fn kept(&self) -> String {
        format!(
            "the judge failed; the answers and eval.json without its verdicts are in {}, and the same command with --resume, with \
             another judge or --judge-template too, generates no answer again",
            self.output_dir.display()
        )
    }

    /// Writes the times, then the report: where that is, the evaluation is complete.
    fn write(&self, Results { report, times, .. }: &Results) -> Result<()> {
        if times.answers.is_some() || times.questions.is_some() {
            let path = self.output_dir.join("eval_times.json");
            let earlier: Option<EvalTimes> = if path.exists() { read_json(&path).ok() } else { None };
            let times = earlier.map_or_else(|| times.clone(), |earlier| times.clone().or_those_of(&earlier));
            write_json(path, &times)?;
        }
        Ok(write_json(self.output_dir.join("eval.json"), report)?)
    }

    /// Prints the results.
    fn show(&self, report: EvalReport) {
        let (args, ui) = (&self.inputs.args, self.ui);
        show_routing(&report.routing, ui);
        let warning = cut_off_warning(&report.refusal_onset);
        for table in eval_tables(&[(args.model_name.clone(), report)]) {
            ui.result(table.to_text().trim_end());
        }
        if let Some(warning) = warning {
            ui.warn(warning);
        }
        if !self.answering.asked.is_empty() {
            ui.result(format_args!("answers: {}", self.output_dir.join(answers::FILE).display()));
        }
    }
}

fn evaluated(session: &Session) -> EvaluatedModel {
    let in_a_run = |dir: &Path| dir.parent().is_some_and(|run| run.join("training_metadata.json").is_file());
    EvaluatedModel {
        path: session.dir.clone(),
        sha: weights_sha(&session.table),
        variant: if in_a_run(&session.dir) { "tuned" } else { "base" }.into(),
        other_routing: None,
    }
}

/// Compiles a pattern of the user; the error is one line.
fn pattern(source: &str) -> std::result::Result<Regex, String> {
    Regex::new(source).map_err(|e| {
        // The library draws the pattern with a mark below it, and says in the last line what is wrong.
        let text = e.to_string();
        let why = text.lines().last().unwrap_or_default().trim_start_matches("error: ");
        format!("the pattern {source:?} does not compile: {why}")
    })
}

fn stopped(rows: usize, of: usize, file: &str) -> Stopped {
    Stopped::Saved(format!("{rows} of {of} rows are in {file}: the same command with --resume continues"))
}

fn show_routing(routing: &RoutingDifference, ui: &Ui) {
    if !routing.divergence_by_layer.is_empty() {
        let layers: Vec<_> =
            routing.divergence_by_layer.iter().map(|(layer, kl)| format!("{layer}: {kl:.5}")).collect();
        ui.line(format_args!("divergence of routing by layer: {}", layers.join(", ")));
    }
    if !routing.risk_difference_top.is_empty() {
        let experts: Vec<_> = routing
            .risk_difference_top
            .iter()
            .map(|(id, d)| format!("layer {} expert {} {d:+.3}", id.layer, id.expert))
            .collect();
        ui.line(format_args!("largest risk differences (unsafe - safe): {}", experts.join(", ")));
    }
}
