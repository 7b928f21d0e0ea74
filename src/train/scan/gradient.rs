//! Scores from gradients.

use super::sums::{NonFinite, PartialSums, ScoredBatch, Scores};
use crate::backend::Backend;
use crate::data::{MicroBatch, Sampler};
use crate::exit::Result;
use crate::experts::{Bootstrap, ScoreAccumulator, ScoreNorm, ScorePer};
use crate::model::{GradPlan, LossGrads, PassEnd, Routed, Sinks};
use crate::train::expert_load::ExpertLoads;
use crate::train::recipe::GradientScore;
use crate::train::replica::Replica;

/// Scores every expert by the gradient of its weights: one backward pass a micro-batch, and no gradient is stored.
pub(super) struct GradientScorer<B: Backend> {
    pub(super) plan: GradPlan,
    /// The plan stores no gradient; the backward pass wants a buffer all the same.
    no_grads: B::Buffer,
    reductions: B::Scores,
    /// Whether scores are divided by the tokens routed to an expert, which must then be counted.
    per_token: bool,
    norm: ScoreNorm,
    pub(super) sums: PartialSums<ScoreAccumulator>,
}

impl<B: Backend> GradientScorer<B> {
    pub(super) fn new(replica: &Replica<B>, score: GradientScore, bootstrap: Option<Bootstrap>) -> Self {
        let (b, model) = (&*replica.model().backend, replica.model());
        let (depth, num_experts) = (model.config.layers.len(), model.config.num_experts);
        let params = 3 * model.config.hidden_size * model.config.expert_width;
        let layers = replica.moe_layers().layers.clone();
        let loads = ExpertLoads::new(&layers, num_experts);
        let accumulator = ScoreAccumulator::new(score.score, score.per, layers, num_experts, params);
        Self {
            plan: GradPlan::score(&model.table, depth, num_experts, score.score.reduction()),
            no_grads: b.buffer(0),
            reductions: b.scores(depth * num_experts),
            per_token: score.per == ScorePer::Token,
            norm: score.norm,
            sums: PartialSums { loads, ..PartialSums::new(accumulator, bootstrap) },
        }
    }

    pub(super) fn add(&mut self, replica: &Replica<B>, index: usize, batch: &MicroBatch) -> ScoredBatch {
        let loss_tokens = batch.targets.len();
        if loss_tokens == 0 {
            return ScoredBatch::default();
        }
        let (b, model, layers) = (&*replica.model().backend, replica.model(), replica.moe_layers());
        let num_experts = model.config.num_experts;
        let inputs = replica.inputs(batch);
        let mut counts = vec![0; layers.layers.len() * num_experts];
        let mut observe = |routed: Routed<'_, B>| {
            let row = layers.index_of(routed.layer);
            let tokens = b.tokens_per_expert(routed.dispatch);
            self.sums.loads.add_layer(row, &tokens);
            counts[row * num_experts..(row + 1) * num_experts].copy_from_slice(&tokens);
        };
        // The last layer must see all rows where tokens are counted: otherwise it sees those with loss only.
        let end = PassEnd::Loss { all_rows: self.per_token };
        let forward = replica.forward(&inputs, Some(&self.plan), end, Some(&mut observe));
        let mut sinks = Sinks { plan: &self.plan, grads: &mut self.no_grads, scores: &mut self.reductions, done: None };
        // The plan makes the backend reduce each expert's weight gradient to one number, tile by tile, in
        // `Backend::grouped_linear_backward_weight`.
        let loss_grads = LossGrads { ce_scale: 1.0 / loss_tokens as f32, routers: &[] };
        let sum = model.backward(&inputs, forward, loss_grads, &mut sinks).expect("a pass to the loss");
        let loss = sum / loss_tokens as f64;

        let all = b.scores_take(&mut self.reductions);
        let of_layer = |l: &usize| all[l * num_experts..(l + 1) * num_experts].iter().copied();
        let reductions: Vec<_> = layers.layers.iter().flat_map(of_layer).collect();
        let scores = self.sums.accumulator.add(&reductions, &counts, loss_tokens);
        self.sums.resample(index, scores.as_deref());
        self.sums.losses.push((index, loss));
        self.sums.tokens.push((index, batch.ids.len() as f64));
        ScoredBatch { tokens: batch.ids.len(), loss: Some(loss) }
    }

    pub(super) fn finish(
        self,
        replica: &Replica<B>,
        sampler: Sampler<'_>,
        micro_batches: &[Vec<usize>],
    ) -> Result<Scores> {
        let PartialSums { accumulator: mut total, losses, tokens, mut loads, mut bootstrap } = self.sums;
        total.merge(&*replica.world)?;
        loads.all_reduce(&*replica.world)?;
        bootstrap.as_mut().map_or(Ok(()), |bootstrap| bootstrap.merge(&*replica.world))?;
        let all_losses = replica.gather_by_index(micro_batches.len(), &losses)?;
        // Checked here and not where a loss is computed: all ranks see all losses, and end together.
        for (index, (&value, records)) in all_losses.iter().zip(micro_batches).enumerate() {
            if !value.is_finite() {
                let what = format!("the loss of micro-batch {index} of the identification");
                return Err(NonFinite { what, value, rows: sampler.describe_rows(records) }.into());
            }
        }
        let all_tokens = replica.gather_by_index(micro_batches.len(), &tokens)?;
        let counted = all_losses.into_iter().zip(all_tokens).filter(|(_, tokens)| *tokens > 0.0);
        let (losses, tokens) = counted.map(|(loss, tokens)| (loss, tokens as usize)).unzip();
        let micro_batches = total.micro_batches();
        let scores = self.norm.apply(total.finish()?);
        Ok(Scores { losses, tokens, loads, bootstrap, ..Scores::of(scores, micro_batches) })
    }
}
