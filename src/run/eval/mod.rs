//! `eval`: answers of a model to unsafe and safe prompts, refusal rates, losses, and routing.

mod answers;
mod judge_prompt;
mod judging;
mod logged;
mod options;
mod questions;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use answers::Answering;
use judging::{Judge, Judging};
use logged::Generated;
use options::DecidingOptions;
use questions::{AskingQuestions, Questions};

use super::other_routing::{use_other_routing, weights_sha};
use super::prepare;
use super::progress::Progress;
use super::session::Session;
use crate::backend::Backend;
use crate::collective::{all_agree, on_first};
use crate::config::{EvalArgs, RunConfig};
use crate::data::{Example, Record, Sides};
use crate::exit::{self, Ended, Failure, Result, Stopped};
use crate::experts::RoutingTokens;
use crate::judge::Rate;
use crate::launch::{Opened, Rank, Ranks, Started};
use crate::report::{
    EVAL_SCHEMA, EvalReport, EvalTimes, EvaluatedModel, ExactRate, MeanLoss, PromptSide, RoutingDifference, Sampling,
    TIMES_SCHEMA, cut_off_warning, eval_tables, write_json,
};
use crate::train::{DeviceTransport, Recipe, Replica, alignment_by_layer, example_losses, mean_of, risk_differences};
use crate::ui::Ui;

/// How many experts with the largest risk differences are listed.
const TOP_EXPERTS: usize = 10;

/// Measures losses and routing, then generates an answer to every prompt (unless `--skip-answers`), and lets a judge read the answers
/// (`--judge`). Writes `eval.json`, `generations.jsonl`, `verdicts.jsonl`, `eval_options.json` and `eval_times.json`.
///
/// # Errors
/// Inputs that cannot be read or are invalid; an output folder or a device that cannot be used; an earlier evaluation in the folder
/// that is not the one to continue; numbers that are not finite; a rank that fails.
pub fn eval(args: &EvalArgs, started: &Started, ui: &Ui) -> Result<Ended<()>> {
    let ranks = &started.ranks;
    let config = args.run_config()?;
    let inputs = open(args, &config, ranks, started.device.kind(), ui)?;
    let existed = config.output_dir.is_dir();
    let done = evaluate(inputs, &config, started, ui);
    if done.is_err() && !existed && ranks.leads() {
        _ = fs::remove_dir(&config.output_dir); // fails unless it is empty
    }
    done
}

/// What an evaluation reads.
struct Inputs {
    args: EvalArgs,
    recipe: Recipe,
    session: Session,
    model: EvaluatedModel,
    options: DecidingOptions,
    questions: Option<Questions>,
    judge: Option<Judge>,
}

/// Opens and checks the inputs, in all processes, and verifies that they are the same everywhere.
fn open(args: &EvalArgs, config: &RunConfig, ranks: &Ranks, device: &str, ui: &Ui) -> Result<Inputs> {
    let own = || {
        let recipe = config.recipe_of_evaluation()?;
        let mut session = Session::open_any(config, [Sides::default(); 2], ui)?;
        let generated = if args.skip_answers { 0 } else { args.max_new_tokens };
        session.model.check_length(args.max_length.saturating_add(generated))?;
        let questions = Questions::open(args, &session.tokenizer)?;
        session.model.check_length(questions.as_ref().map_or(0, Questions::longest))?;
        session.check_weights()?;
        let mut model = evaluated(&session);
        model.other_routing = use_other_routing(&mut session, args)?;
        let options = DecidingOptions::of(args, &session, &model, questions.as_ref().map(Questions::hash), device)?;
        let judge = Judge::open(args)?;
        Ok(Inputs { args: args.clone(), recipe, session, model, options, questions, judge })
    };
    let inputs = ranks.all_ok(own())?;
    if let Some(world) = ranks.other_processes() {
        inputs.session.agree(config, world)?;
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
        let evaluation = Evaluation { inputs: &inputs, output_dir: &config.output_dir, ui: &rank.ui };
        let session = &inputs.session;
        match device.open(&config, session.workload(config.batch_size), rank)? {
            Opened::Cpu(cpu) => evaluation.run(rank, cpu, None),
            Opened::Cuda(cuda, transport) => evaluation.run(rank, cuda, transport),
        }
    })
}

/// An evaluation on one rank.
struct Evaluation<'a> {
    inputs: &'a Inputs,
    output_dir: &'a Path,
    ui: &'a Ui,
}

impl Evaluation<'_> {
    /// Measures the model and lets it answer; then frees it, and lets the judge read the answers.
    fn run<B: Backend>(
        &self,
        rank: &Rank,
        backend: Arc<B>,
        transport: Option<Arc<dyn DeviceTransport<B>>>,
    ) -> Result<Ended<()>> {
        let Inputs { args, session, model, judge, .. } = self.inputs;
        let sampling = Sampling {
            temperature: args.temperature,
            top_p: args.top_p,
            max_new_tokens: args.max_new_tokens,
            seed: args.seed,
        };
        let asked = if args.skip_answers { Vec::new() } else { answers::asked(&session.data.records) };
        let path = self.output_dir.join(answers::FILE);
        let batch_size = args.generation_batch_size;
        let answering = Answering { session, model, sampling: &sampling, batch_size, path, ui: self.ui };
        let replica = session.replica(backend.clone(), transport, rank);
        let mut report = self.measure(&replica, &sampling)?;
        let mut times = EvalTimes { schema: TIMES_SCHEMA.into(), answers: None, questions: None, verdicts: None };
        let mut said = Vec::new();
        if !args.skip_answers {
            match answering.answers(&replica, &asked)? {
                Generated::Stopped { answers, of } => return Ok(Ended::Stopped(stopped(answers, of, answers::FILE))),
                Generated::All(found, took) => (said, times.answers) = (found, Some(took)),
            }
            report.refusals = answering.refusals(&asked, &said);
            report.refusal_onset = answering.onsets(&asked, &said);
        }
        if let Some(questions) = &self.inputs.questions {
            let asking = AskingQuestions {
                questions,
                tokenizer: &session.tokenizer,
                batch_size: args.batch_size,
                generation_batch_size: batch_size,
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
        drop(replica);
        if let Some(judge) = judge {
            let responses: Vec<String> = said.iter().map(|answer| session.tokenizer.decode(&answer.ids)).collect();
            let path = self.output_dir.join(judging::FILE);
            let judging = Judging { judge, asked: &asked, responses: &responses, batch_size, path, ui: self.ui };
            match judging.verdicts(backend, rank)? {
                Generated::Stopped { answers, of } => return Ok(Ended::Stopped(stopped(answers, of, judging::FILE))),
                Generated::All(rows, took) => {
                    (report.judge, times.verdicts) = (Some(judging.report(&rows)), Some(took));
                    let verdicts = Some((&*judge.model.sha, &rows[..]));
                    on_first(&*rank.world, || answering.write(&asked, &said, verdicts))?;
                }
            }
        }
        on_first(&*rank.world, || self.write(&report, &times))?;
        self.show(report);
        Ok(Ended::Done(()))
    }

    /// Losses and routing.
    fn measure<B: Backend>(&self, replica: &Replica<B>, sampling: &Sampling) -> Result<EvalReport> {
        let Inputs { args, session, model, .. } = self.inputs;
        let (ce_unsafe, exact_unsafe) = self.losses(replica, PromptSide::Unsafe, |r| r.unsafe_reply.as_ref())?;
        let (ce_safe, exact_safe) = self.losses(replica, PromptSide::Safe, |r| r.safe_reply.as_ref())?;
        Ok(EvalReport {
            schema: EVAL_SCHEMA.into(),
            model: model.clone(),
            dataset_path: args.dataset_path.clone(),
            rows: session.data.records.len(),
            sampling: sampling.clone(),
            ce_unsafe,
            ce_safe,
            exact: [exact_unsafe, exact_safe].into_iter().flatten().collect(),
            refusals: Vec::new(),
            refusal_onset: Vec::new(),
            routing: self.routing_difference(replica)?,
            questions: Vec::new(),
            judge: None,
        })
    }

    /// Writes the times, then the report: where that is, the evaluation is complete.
    fn write(&self, report: &EvalReport, times: &EvalTimes) -> Result<()> {
        if times.answers.is_some() || times.questions.is_some() {
            write_json(self.output_dir.join("eval_times.json"), times)?;
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
        if !args.skip_answers {
            ui.result(format_args!("answers: {}", self.output_dir.join(answers::FILE).display()));
        }
    }

    /// The mean loss of the replies of one side, and how many of them the model would give to the last token; `None` without
    /// replies.
    fn losses<B: Backend>(
        &self,
        replica: &Replica<B>,
        side: PromptSide,
        reply: impl Fn(&Record) -> Option<&Example>,
    ) -> Result<(MeanLoss, Option<ExactRate>)> {
        let Inputs { args, recipe, session, .. } = self.inputs;
        let examples: Vec<&Example> = session.data.records.iter().filter_map(reply).collect();
        let losses = example_losses(replica, &examples, recipe.batch_size, |_| {})?;
        let mean = mean_of(&losses);
        if let Some(mean) = mean.filter(|mean| !mean.is_finite()) {
            return Err(Failure::new(
                exit::NOT_FINITE,
                format!(
                    "the mean cross-entropy of {} is {mean}: the weights of {} are damaged, or overflow",
                    args.dataset_path.display(),
                    args.model_name
                ),
            ));
        }
        let tokens = losses.iter().map(|loss| loss.tokens).sum();
        let exact = Rate::of(losses.iter().filter(|loss| loss.tokens > 0).map(|loss| loss.exact));
        Ok((MeanLoss { mean, tokens }, (exact.of > 0).then_some(ExactRate { side, exact })))
    }

    /// How the routing of safe and of unsafe prompts differs, where the data hold both.
    fn routing_difference<B: Backend>(&self, replica: &Replica<B>) -> Result<RoutingDifference> {
        let (Inputs { recipe, session, .. }, ui) = (self.inputs, self.ui);
        let sampler = session.sampler(recipe);
        let mut out = RoutingDifference::default();
        if session.model.is_dense() {
            return Ok(out);
        }
        if session.data.has_both_prompts() {
            let by_layer = alignment_by_layer(replica, sampler, recipe.divergence)?;
            out.divergence_by_layer = session.model.moe_layers().layers.iter().copied().zip(by_layer).collect();
        }
        if session.data.has_both_replies() {
            let (micro_batches, tokens) = (sampler.unsafe_order(0), RoutingTokens::Prompt);
            let own = micro_batches.len().div_ceil(replica.world.world_size());
            let progress = Progress::new(ui, own, "routing");
            let (scores, warning) =
                risk_differences(replica, sampler, tokens, &micro_batches, |tokens| progress.step(tokens, ""))?;
            if let Some(warning) = warning {
                progress.warn(warning);
            }
            out.risk_difference_top = scores.ranked().into_iter().take(TOP_EXPERTS).collect();
        }
        Ok(out)
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
