//! `eval`: answers of a model to unsafe and safe prompts, refusal rates, losses, and routing.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use super::generate::{Answer, Prompt, answers, batches, check_cache};
use super::other_routing::{use_other_routing, weights_sha};
use super::progress::Progress;
use super::refusals::LISTS;
use super::session::Session;
use crate::backend::Backend;
use crate::config::{EvalArgs, RunConfig};
use crate::data::{Example, Message, Record, Sides};
use crate::exit::{self, Failure, Result};
use crate::files::AtomicFile;
use crate::judge::{Rate, wilson};
use crate::launch::{Device, Existing, Opened, Rank, catch_panic, prepare_dir_keeping};
use crate::model::Model;
use crate::report::{
    EVAL_SCHEMA, EvalReport, EvaluatedModel, ExactRate, GENERATION_SCHEMA, GenerationRow, GenerationSpeed, MeanLoss,
    PromptSide, RefusalRate, RoutingDifference, Sampling, eval_tables, write_json,
};
use crate::train::{Recipe, Replica, Scan, alignment_by_layer, example_losses, mean_of};
use crate::ui::Ui;

/// How many experts with the largest risk differences are listed.
const TOP_EXPERTS: usize = 10;

/// Measures losses and routing, then generates an answer to every prompt (unless `--skip-answers`). Writes `eval.json` and `generations.jsonl`.
///
/// # Errors
/// Any failure; then no output is written.
pub fn eval(args: &EvalArgs, ui: &Ui) -> Result<()> {
    let config = args.run_config()?;
    let recipe = config.recipe_of_evaluation()?;
    let mut session = Session::open_any(&config, [Sides::default(); 2], ui)?;
    let generated = if args.skip_answers { 0 } else { args.max_new_tokens };
    session.model.check_length(args.max_length.saturating_add(generated))?;
    let mut model = evaluated(&session);
    model.other_routing = use_other_routing(&mut session, args)?;
    let mut inputs = config.inputs();
    inputs.extend(model.other_routing.iter().map(|other| &*other.path));
    let existed = config.output_dir.is_dir();
    prepare_dir_keeping(&config.output_dir, Existing::of(args.overwrite, false), &inputs)?;
    let done = evaluate(args, &config, &recipe, &session, &model, ui);
    if done.is_err() && !existed {
        _ = fs::remove_dir(&config.output_dir); // fails unless it is empty
    }
    done
}

/// Evaluates into the prepared output folder.
fn evaluate(
    args: &EvalArgs,
    config: &RunConfig,
    recipe: &Recipe,
    session: &Session,
    model: &EvaluatedModel,
    ui: &Ui,
) -> Result<()> {
    session.check_weights()?;
    ui.line(session.describe());
    if let Some(other) = &model.other_routing {
        ui.line(format_args!("  {other}"));
    }
    let (device, rank) = (Device::find(config, ui)?, Rank::single(ui.clone()));
    let evaluation = Evaluation { args, output_dir: &config.output_dir, recipe, session, model, ui };
    catch_panic(|| match device.open(config, session.workload(config.batch_size), &rank)? {
        Opened::Cpu(cpu) => evaluation.run(&session.replica(cpu, None, &rank)),
        Opened::Cuda(cuda, transport) => evaluation.run(&session.replica(cuda, transport, &rank)),
    })
}

/// The inputs of an evaluation.
struct Evaluation<'a> {
    args: &'a EvalArgs,
    output_dir: &'a Path,
    recipe: &'a Recipe,
    session: &'a Session,
    model: &'a EvaluatedModel,
    ui: &'a Ui,
}

impl Evaluation<'_> {
    fn run<B: Backend>(&self, replica: &Replica<B>) -> Result<()> {
        let Self { args, output_dir, session, model, ui, .. } = *self;
        let sampling = Sampling {
            temperature: args.temperature,
            top_p: args.top_p,
            max_new_tokens: args.max_new_tokens,
            seed: args.seed,
        };

        let (ce_unsafe, exact_unsafe) = self.losses(replica, PromptSide::Unsafe, |r| r.unsafe_reply.as_ref())?;
        let (ce_safe, exact_safe) = self.losses(replica, PromptSide::Safe, |r| r.safe_reply.as_ref())?;
        let routing = self.routing_difference(replica)?;
        let clock = Instant::now();
        let (refusals, generation) = match args.skip_answers {
            true => (Vec::new(), None),
            false => {
                let (refusals, speed) = self.answer_all(replica.model(), model, &sampling)?;
                ui.line(format_args!("answers: {speed}"));
                (refusals, Some(speed))
            }
        };
        let report = EvalReport {
            schema: EVAL_SCHEMA.into(),
            model: model.clone(),
            dataset_path: args.dataset_path.clone(),
            rows: session.data.records.len(),
            sampling,
            ce_unsafe,
            ce_safe,
            exact: [exact_unsafe, exact_safe].into_iter().flatten().collect(),
            refusals,
            routing,
            seconds: clock.elapsed().as_secs_f64(),
            generation,
        };
        write_json(output_dir.join("eval.json"), &report)?;
        show_routing(&report.routing, ui);
        for table in eval_tables(&[(args.model_name.clone(), report)]) {
            ui.result(table.to_text().trim_end());
        }
        if !args.skip_answers {
            ui.result(format_args!("answers: {}", output_dir.join("generations.jsonl").display()));
        }
        Ok(())
    }

    /// The mean loss of the replies of one side, and how many of them the model would give to the last token; `None` without
    /// replies.
    fn losses<B: Backend>(
        &self,
        replica: &Replica<B>,
        side: PromptSide,
        reply: impl Fn(&Record) -> Option<&Example>,
    ) -> Result<(MeanLoss, Option<ExactRate>)> {
        let Self { args, recipe, session, .. } = *self;
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
        let Self { recipe, session, ui, .. } = *self;
        let sampler = session.sampler(recipe);
        let mut out = RoutingDifference::default();
        if session.data.has_both_prompts() {
            let by_layer = alignment_by_layer(replica, sampler, recipe.divergence)?;
            out.divergence_by_layer = session.model.moe_layers().layers.iter().copied().zip(by_layer).collect();
        }
        if session.data.has_both_replies() {
            let mut scan = Scan::new(replica, &recipe.identify, sampler, sampler.unsafe_order(0))?;
            let progress = Progress::new(ui, scan.left(), "routing");
            while let Some(own) = scan.last_interval(replica) {
                for index in own {
                    progress.step(scan.add(replica, index)?.tokens, "");
                }
            }
            let found = scan.finish(replica)?;
            if let Some(warning) = found.warning {
                progress.warn(warning);
            }
            out.risk_difference_top = found.scores.ranked().into_iter().take(TOP_EXPERTS).collect();
        }
        Ok(out)
    }

    /// Answers the prompts of both sides, writes every answer, and counts refusals.
    fn answer_all<B: Backend>(
        &self,
        model: &Model<B>,
        evaluated: &EvaluatedModel,
        sampling: &Sampling,
    ) -> Result<(Vec<RefusalRate>, GenerationSpeed)> {
        let Self { output_dir, session, .. } = *self;
        let asked: Vec<_> = session.data.records.iter().flat_map(prompts_of).collect();
        let (said, speed) = self.generate(model, &asked, sampling)?;
        let template_sha = blake3_name(session.tokenizer.template_digest());
        let path = output_dir.join("generations.jsonl");
        let mut file = AtomicFile::create(&path)?;
        // (answers, refusals by list) of each side
        let mut counts: BTreeMap<PromptSide, (usize, Vec<usize>)> = BTreeMap::new();
        for (prompt, said) in asked.iter().zip(said) {
            let response = session.tokenizer.decode(&said.ids);
            let verdicts: Vec<bool> = LISTS.iter().map(|list| list.is_refusal(&response)).collect();
            let (answers, refused) = counts.entry(prompt.side).or_insert_with(|| (0, vec![0; LISTS.len()]));
            *answers += 1;
            refused.iter_mut().zip(&verdicts).for_each(|(n, refusal)| *n += usize::from(*refusal));
            let side = if prompt.side == PromptSide::Unsafe { "unsafe" } else { "safe" };
            let row = GenerationRow {
                schema: GENERATION_SCHEMA,
                id: format!("{}-{side}", prompt.line),
                behavior_id: prompt.line.to_string(),
                category: prompt.side,
                messages: prompt.messages,
                prompt_text: session.tokenizer.token_texts(prompt.ids).concat(),
                response,
                finish_reason: said.finish,
                n_tokens: said.ids.len(),
                sampling,
                model: evaluated,
                template_sha: &template_sha,
                proxy: LISTS.iter().map(|list| list.id()).zip(verdicts).collect(),
            };
            let mut line = serde_json::to_vec(&row).expect("a row has string keys");
            line.push(b'\n');
            file.write_all(&line).map_err(|source| crate::files::Error::Write { path: path.clone(), source })?;
        }
        file.commit()?;
        let rates = counts.into_iter().flat_map(|(side, (answers, refused))| {
            LISTS.iter().zip(refused).map(move |(list, refused)| RefusalRate {
                list: list.id(),
                side,
                refused,
                answers,
                rate: refused as f64 / answers as f64,
                interval: wilson(refused, answers),
            })
        });
        Ok((rates.collect(), speed))
    }

    /// The answers to the prompts, in their order.
    fn generate<B: Backend>(
        &self,
        model: &Model<B>,
        asked: &[Asked<'_>],
        sampling: &Sampling,
    ) -> Result<(Vec<Answer>, GenerationSpeed)> {
        let Self { args, session, ui, .. } = *self;
        let lengths: Vec<usize> = asked.iter().map(|prompt| prompt.ids.len()).collect();
        let batches = batches(&lengths, args.generation_batch_size);
        ui.line(format_args!("answers: {}", check_cache(model, &lengths, &batches, sampling.max_new_tokens)?));
        let progress = Progress::new(ui, asked.len(), "answers");
        let mut speed = GenerationSpeed { batch_size: args.generation_batch_size, ..GenerationSpeed::default() };
        let mut said = vec![None; asked.len()];
        for batch in &batches {
            let prompts: Vec<_> = batch.iter().map(|&i| Prompt { ids: asked[i].ids, index: i as u64 }).collect();
            let done = |i: usize, ids: &[u32]| progress.step(prompts[i].ids.len() + ids.len(), "");
            let found = answers(model, &prompts, session.tokenizer.eos_ids(), sampling, &mut speed, done)?;
            batch.iter().zip(found).for_each(|(&i, answer)| said[i] = Some(answer));
        }
        Ok((said.into_iter().map(|answer| answer.expect("each prompt is in a batch")).collect(), speed))
    }
}

/// One prompt to answer.
struct Asked<'a> {
    line: usize,
    side: PromptSide,
    ids: &'a [u32],
    messages: &'a [Message],
}

impl<'a> Asked<'a> {
    fn new(line: usize, side: PromptSide, ids: Option<&'a Vec<u32>>, messages: &'a [Message]) -> Option<Self> {
        Some(Self { line, side, ids: ids?, messages })
    }
}

fn prompts_of(r: &Record) -> impl Iterator<Item = Asked<'_>> {
    let unsafe_ = Asked::new(r.line, PromptSide::Unsafe, r.unsafe_prompt.as_ref(), &r.unsafe_messages);
    let safe = Asked::new(r.line, PromptSide::Safe, r.safe_prompt.as_ref(), &r.safe_messages);
    unsafe_.into_iter().chain(safe)
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

fn blake3_name(hash: blake3::Hash) -> String {
    format!("blake3:{hash}")
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
