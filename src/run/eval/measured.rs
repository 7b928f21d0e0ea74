//! What an evaluation measures of the replies in the data: losses, exact replies, drift, and routing.

use super::drift::OtherOutputs;
use super::{Evaluation, Inputs, answers};
use crate::backend::Backend;
use crate::collective::on_first;
use crate::data::{Example, Record};
use crate::exit::{self, Failure, Result};
use crate::experts::RoutingTokens;
use crate::files;
use crate::judge::Rate;
use crate::report::{
    DriftReport, EVAL_SCHEMA, EvalReport, ExactRate, MeanLoss, PromptSide, REPLY_LOSS_SCHEMA, REPLY_LOSSES,
    ReplyLossRow, RoutingDifference, json_lines,
};
use crate::run::progress::Progress;
use crate::train::{Replica, divergence_of_prompts, example_losses, mean_of, risk_differences};

/// How many experts with the largest risk differences are listed.
const TOP_EXPERTS: usize = 10;

impl Evaluation<'_> {
    /// Losses and routing.
    pub(super) fn measure<B: Backend>(
        &self,
        replica: &Replica<B>,
        other: Option<OtherOutputs<B>>,
    ) -> Result<EvalReport> {
        let Inputs { args, session, model, sampling, .. } = self.inputs;
        let mut rows = Vec::new();
        let (ce_unsafe, exact_unsafe) =
            self.losses(replica, PromptSide::Unsafe, |r| r.unsafe_reply.as_ref(), &mut rows)?;
        let (ce_safe, exact_safe) = self.losses(replica, PromptSide::Safe, |r| r.safe_reply.as_ref(), &mut rows)?;
        let drift = self.drift(replica, other, &mut rows)?;
        if !rows.is_empty() {
            let path = self.output_dir.join(REPLY_LOSSES);
            on_first(&*replica.world, || Ok(files::write(path, json_lines(&rows))?))?;
        }
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
            cut_off: Vec::new(),
            refusal_onset: Vec::new(),
            routing: self.routing_difference(replica)?,
            drift,
            questions: Vec::new(),
            judge: None,
        })
    }

    /// The distance from the model of `--drift-from`; adds that of each row to those of `rows` that are of safe prompts.
    fn drift<B: Backend>(
        &self,
        replica: &Replica<B>,
        other: Option<OtherOutputs<B>>,
        rows: &mut [ReplyLossRow],
    ) -> Result<Option<DriftReport>> {
        let Inputs { recipe, session, drift_from, .. } = self.inputs;
        let Some((from, outputs)) = drift_from.as_ref().zip(other) else { return Ok(None) };
        let (report, by_row) = from.measure(session, recipe, replica, &outputs)?;
        let safe = rows.iter_mut().filter(|row| row.side == PromptSide::Safe);
        safe.zip(by_row).for_each(|(row, drift)| row.drift = drift.per_token());
        Ok(Some(report))
    }

    /// The mean loss of the replies of one side, and how many of them the model would give to the last token; `None` without
    /// replies. Adds the replies to `rows`.
    fn losses<B: Backend>(
        &self,
        replica: &Replica<B>,
        side: PromptSide,
        reply: impl Fn(&Record) -> Option<&Example>,
        rows: &mut Vec<ReplyLossRow>,
    ) -> Result<(MeanLoss, Option<ExactRate>)> {
        let Inputs { recipe, session, .. } = self.inputs;
        let names = answers::row_names(&session.data.records);
        let replies = names.iter().zip(&session.data.records).filter_map(|(name, r)| Some((name, reply(r)?)));
        let (names, examples): (Vec<&String>, Vec<&Example>) = replies.unzip();
        let losses = example_losses(replica, &examples, recipe.batch_size, |_| {})?;
        let mean = mean_of(&losses);
        if let Some(mean) = mean.filter(|mean| !mean.is_finite()) {
            let Inputs { args, session, .. } = self.inputs;
            let (data, model) = (session.data.report.path.display(), &args.model_name);
            let message =
                format!("the mean cross-entropy of {data} is {mean}: the weights of {model} are damaged, or overflow");
            return Err(Failure::new(exit::NOT_FINITE, message));
        }
        let named = names.into_iter().zip(examples).zip(&losses);
        rows.extend(named.map(|((name, example), loss)| ReplyLossRow {
            schema: REPLY_LOSS_SCHEMA.into(),
            id: format!("{name}-{}", side.name()),
            side,
            digest: format!("blake3:{}", blake3::hash(format!("{example:?}").as_bytes())),
            tokens: loss.tokens,
            loss: loss.sum,
            exact: loss.exact,
            drift: None,
        }));
        let tokens = losses.iter().map(|loss| loss.tokens).sum();
        let exact = Rate::of(losses.iter().filter(|loss| loss.tokens > 0).map(|loss| loss.exact));
        let [to_unsafe, to_safe] = session.data.report.safe_responses;
        let safe_responses = if side == PromptSide::Unsafe { to_unsafe } else { to_safe };
        let exact = (exact.of > 0).then_some(ExactRate { side, exact, safe_responses });
        Ok((MeanLoss { mean, tokens }, exact))
    }

    /// How the routing of safe and of unsafe prompts differs, where the data hold both.
    fn routing_difference<B: Backend>(&self, replica: &Replica<B>) -> Result<RoutingDifference> {
        let (Inputs { recipe, session, .. }, ui) = (self.inputs, self.ui);
        let sampler = session.sampler(recipe);
        let mut out = RoutingDifference::default();
        if session.model.is_dense() {
            return Ok(out);
        }
        let (records, batch_size) = (&session.data.records, recipe.batch_size);
        if let Some(by_layer) = divergence_of_prompts(replica, records, batch_size, recipe.divergence)? {
            out.divergence_by_layer = session.model.moe_layers().layers.iter().copied().zip(by_layer).collect();
        }
        if session.data.has_both_replies() {
            let (micro_batches, tokens) = (sampler.unsafe_order(0), RoutingTokens::Prompt);
            let own = micro_batches.len().div_ceil(replica.world.world_size());
            let progress = Progress::new(ui, own, "routing");
            let scores =
                risk_differences(replica, sampler, tokens, &micro_batches, |tokens| progress.step(tokens, ""))?;
            out.risk_difference_top = scores.ranked().into_iter().take(TOP_EXPERTS).collect();
        }
        Ok(out)
    }
}
