//! The scoring pass: walks the micro-batches of the global order and adds up one score an expert.
//!
//! A scan is a state machine that its caller drives:
//!
//! ```text
//! while let Some(interval) = scan.next_interval(&replica) {
//!     for index in interval { scan.add(&replica, index)?; }      // this rank's micro-batches
//!     if scan.synchronize(&replica)? == Decision::Stop { save(scan.state()); return }
//! }
//! let found = scan.finish(&replica)?;
//! ```

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::recipe::{GradientScore, Identify, ScoreBy};
use super::replica::Replica;
use super::usage::UsageCounter;
use crate::backend::Backend;
use crate::data::{MicroBatch, RoutingTraces, Sampler, Trace};
use crate::exit::{self, Coded, Failure, Result};
use crate::experts::{
    BatchUsage, Bootstrap, ExpertScores, FrequencyAccumulator, RoutingCounts, RoutingTokens, Rule, ScoreAccumulator,
    ScoreNorm, ScorePer, Usage, UsageAccumulator, token_mask,
};
use crate::model::{GradPlan, LossGrads, Observer, PassEnd, Routed, Sinks};
use crate::train::fault::Point;

/// Micro-batches of a rank between two points where ranks synchronize. They wait for each other there; over several micro-batches
/// their work evens out.
const MICRO_BATCHES_PER_INTERVAL: usize = 4;

/// A number of the computation that is not finite, the same on all ranks.
#[derive(Debug, Clone, thiserror::Error)]
#[error(
    "{what} is {value} ({rows}); nothing was updated with it. Lower the learning rate, set --max-grad-norm, or look at these \
     rows with `moewarden check`"
)]
pub struct NonFinite {
    /// `the loss of round 1, expert step 3`.
    pub what: String,
    /// NaN or an infinity.
    pub value: f64,
    /// `rows at lines 3, 7 of rows.jsonl`.
    pub rows: String,
}

impl Coded for NonFinite {
    fn exit_code(&self) -> u8 {
        exit::NOT_FINITE
    }
}

/// A scoring pass under way on one rank.
pub struct Scan<'d, B: Backend> {
    sampler: Sampler<'d>,
    micro_batches: Vec<Vec<usize>>,
    /// Micro-batches of the global order that are done.
    next: usize,
    scorer: Scorer<'d, B>,
}

enum Scorer<'d, B: Backend> {
    Gradient(GradientScorer<B>),
    Routing(RoutingScorer<'d>),
    Usage(UsageScorer<'d>),
    /// A random selection needs no scores.
    None,
}

/// Scores every expert by the gradient of its weights: one backward pass a micro-batch, and no gradient is stored.
struct GradientScorer<B: Backend> {
    plan: GradPlan,
    /// The plan stores no gradient; the backward pass wants a buffer all the same.
    no_grads: B::Buffer,
    reductions: B::Scores,
    /// Whether scores are divided by the tokens routed to an expert, which must then be counted.
    per_token: bool,
    norm: ScoreNorm,
    sums: PartialSums<ScoreAccumulator>,
}

/// Counts how often each expert is among the top K, by forward passes only, or in routing traces.
struct RoutingScorer<'d> {
    tokens: RoutingTokens,
    /// For each record the one with its safe reply.
    partners: Vec<usize>,
    /// The traces of the sampler's records, in place of forward passes.
    traces: Option<&'d RoutingTraces>,
    sums: PartialSums<FrequencyAccumulator>,
}

/// Counts the experts that tokens are routed to, for a published rule.
struct UsageScorer<'d> {
    counter: UsageCounter,
    /// For each record the one with its safe reply; `None`: the rule needs no safe side.
    partners: Option<Vec<usize>>,
    traces: Option<&'d RoutingTraces>,
    sums: PartialSums<UsageAccumulator>,
}

/// What one rank has added up; a checkpoint holds it as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct PartialSums<A> {
    #[serde(rename = "sums")]
    accumulator: A,
    /// (index in the global order, mean loss)
    losses: Vec<(usize, f64)>,
    /// (index in the global order, tokens)
    tokens: Vec<(usize, f64)>,
    /// The same sums of resampled micro-batches, if the run wants them.
    #[serde(default)]
    bootstrap: Option<Bootstrap>,
}

/// One micro-batch, scored.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ScoredBatch {
    /// Tokens of its forward passes.
    pub tokens: usize,
    /// Its mean loss, where the method computes one.
    pub loss: Option<f64>,
}

/// What the ranks agree on at the end of an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Continue with the next interval.
    Continue,
    /// The stop flag of some rank is set.
    Stop,
}

/// The scores of all ranks.
#[derive(Debug, Clone)]
pub struct Scores {
    /// One score an expert; zeros where nothing was scored.
    pub scores: ExpertScores,
    /// Micro-batches (or pairs of a safe and an unsafe batch) that counted.
    pub micro_batches: u64,
    /// Mean loss of each micro-batch in global order, where the method computes one; without those that have no tokens with
    /// loss.
    pub losses: Vec<f64>,
    /// Tokens of the same micro-batches.
    pub tokens: Vec<usize>,
    /// Scores of resampled micro-batches.
    pub bootstrap: Option<Bootstrap>,
    /// What published rules select from.
    pub usage: Option<UsageAccumulator>,
    /// A remark for the user.
    pub warning: Option<String>,
}

impl<'d, B: Backend> Scan<'d, B> {
    /// A scan of these micro-batches from the first one on.
    ///
    /// # Errors
    /// Rows without a safe reply, where the method compares with safe replies.
    pub fn new(
        replica: &Replica<B>,
        identify: &Identify,
        sampler: Sampler<'d>,
        micro_batches: Vec<Vec<usize>>,
    ) -> Result<Self> {
        let experts = replica.moe_layers().layers.len() * replica.model().config.num_experts;
        let bootstrap = (identify.bootstrap > 0).then(|| Bootstrap::new(identify.seed, identify.bootstrap, experts));
        let scorer = match identify.by {
            ScoreBy::Gradient(score) | ScoreBy::Random { gradient: Some(score), .. } => {
                Scorer::Gradient(GradientScorer::new(replica, score, bootstrap))
            }
            ScoreBy::Routing { tokens, .. } => {
                Scorer::Routing(RoutingScorer::new(replica, sampler, tokens, bootstrap)?)
            }
            ScoreBy::Published { rule, tokens, .. } => Scorer::Usage(UsageScorer {
                counter: UsageCounter { tokens, weights: rule == Rule::EsftGate },
                partners: rule.needs_safe_side().then(|| sampler.reply_partners()).transpose()?,
                traces: None,
                sums: PartialSums::new(UsageAccumulator::default(), None),
            }),
            ScoreBy::Random { gradient: None, .. } | ScoreBy::Given => Scorer::None,
        };
        let next = if matches!(scorer, Scorer::None) { micro_batches.len() } else { 0 };
        Ok(Self { sampler, micro_batches, next, scorer })
    }

    /// Counts in these traces, whose records are those of the sampler, instead of running the model.
    #[must_use]
    pub fn with_traces(mut self, traces: Option<&'d RoutingTraces>) -> Self {
        match &mut self.scorer {
            Scorer::Routing(scorer) => scorer.traces = traces,
            Scorer::Usage(scorer) => scorer.traces = traces,
            Scorer::Gradient(_) | Scorer::None => {}
        }
        self
    }

    /// Resumes after the first `next` micro-batches. `sums`: what ranks had added up ([`Self::state`]): one entry if the world
    /// size is the same, several or none if it has changed.
    ///
    /// # Errors
    /// A state that cannot be read.
    pub fn restore(&mut self, next: usize, sums: &[Vec<u8>]) -> Result<()> {
        self.next = next;
        match &mut self.scorer {
            Scorer::Gradient(scorer) => scorer.sums.restore(sums, ScoreAccumulator::absorb),
            Scorer::Routing(scorer) => scorer.sums.restore(sums, FrequencyAccumulator::absorb),
            Scorer::Usage(scorer) => scorer.sums.restore(sums, UsageAccumulator::absorb),
            Scorer::None => Ok(()),
        }
    }

    /// Micro-batches of the global order that are done.
    pub fn done(&self) -> usize {
        self.next
    }

    /// Micro-batches of the global order that are left.
    pub fn left(&self) -> usize {
        self.micro_batches.len() - self.next
    }

    /// The lowest decoder layer that the backward visits; `None` without a backward.
    pub fn lowest_layer(&self) -> Option<usize> {
        match &self.scorer {
            Scorer::Gradient(scorer) => scorer.plan.lowest_layer(),
            Scorer::Routing(_) | Scorer::Usage(_) | Scorer::None => None,
        }
    }

    /// This rank's micro-batches of the next interval; `None` at the end. All ranks get intervals at the same time.
    pub fn next_interval(&mut self, replica: &Replica<B>) -> Option<Vec<usize>> {
        let size = replica.world.world_size();
        self.interval(replica, MICRO_BATCHES_PER_INTERVAL * size)
    }

    /// The same in one interval for all that is left: without synchronization in between.
    pub fn last_interval(&mut self, replica: &Replica<B>) -> Option<Vec<usize>> {
        let left = self.left();
        self.interval(replica, left)
    }

    fn interval(&mut self, replica: &Replica<B>, len: usize) -> Option<Vec<usize>> {
        if self.left() == 0 {
            return None;
        }
        let (rank, size) = (replica.world.rank(), replica.world.world_size());
        replica.world.set_activity(&format!("identification, micro-batches from {}", self.next));
        let first = self.next;
        self.next = self.micro_batches.len().min(first + len);
        Some((first..self.next).filter(|i| i % size == rank).collect())
    }

    /// Scores the micro-batch with this index in the global order.
    ///
    /// # Errors
    /// An injected fault.
    pub fn add(&mut self, replica: &Replica<B>, index: usize) -> Result<ScoredBatch> {
        replica.visit_unchanged(Point::Batch)?;
        let records = &self.micro_batches[index];
        Ok(match &mut self.scorer {
            Scorer::Gradient(scorer) => scorer.add(replica, index, &self.sampler.pack_unsafe(records)),
            Scorer::Routing(scorer) => scorer.add(replica, self.sampler, index, records),
            Scorer::Usage(scorer) => scorer.add(replica, self.sampler, index, records),
            Scorer::None => ScoredBatch::default(),
        })
    }

    /// Synchronizes the ranks at the end of an interval: they agree whether to continue. After the last interval there is
    /// nothing to agree on. A loss that is not finite ends the scan: [`Self::finish`] then names it on all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn synchronize(&mut self, replica: &Replica<B>) -> Result<Decision> {
        if self.left() == 0 {
            return Ok(Decision::Continue);
        }
        let finite = match &self.scorer {
            Scorer::Gradient(scorer) => scorer.sums.losses.iter().all(|(_, loss)| loss.is_finite()),
            _ => true,
        };
        let [stop, not_finite] = replica.any([replica.stop.is_set(), !finite])?;
        if not_finite {
            self.next = self.micro_batches.len();
            return Ok(Decision::Continue);
        }
        Ok(if stop { Decision::Stop } else { Decision::Continue })
    }

    /// What this rank has added up, as JSON, for [`Self::restore`].
    pub fn state(&self) -> Vec<u8> {
        match &self.scorer {
            Scorer::Gradient(scorer) => scorer.sums.to_json(),
            Scorer::Routing(scorer) => scorer.sums.to_json(),
            Scorer::Usage(scorer) => scorer.sums.to_json(),
            Scorer::None => Vec::new(),
        }
    }

    /// Sums over all ranks; the means are the scores.
    ///
    /// # Errors
    /// A loss that is not finite ([`NonFinite`]); nothing to score; those of the collective.
    pub fn finish(self, replica: &Replica<B>) -> Result<Scores> {
        match self.scorer {
            Scorer::Gradient(scorer) => scorer.finish(replica, self.sampler, &self.micro_batches),
            Scorer::Routing(scorer) => scorer.finish(replica),
            Scorer::Usage(scorer) => scorer.finish(replica, self.micro_batches.len()),
            Scorer::None => Ok(Scores::zeros(replica)),
        }
    }
}

impl Scores {
    fn of(scores: ExpertScores, micro_batches: u64) -> Self {
        Self {
            scores,
            micro_batches,
            losses: Vec::new(),
            tokens: Vec::new(),
            bootstrap: None,
            usage: None,
            warning: None,
        }
    }

    fn zeros<B: Backend>(replica: &Replica<B>) -> Self {
        let (layers, num_experts) = (replica.moe_layers().layers.clone(), replica.model().config.num_experts);
        Self::of(ExpertScores::zeros(layers, num_experts), 0)
    }
}

impl<'d> UsageScorer<'d> {
    /// The unsafe replies of a micro-batch, and the safe replies of their partners where the rule needs them.
    fn add<B: Backend>(
        &mut self,
        replica: &Replica<B>,
        sampler: Sampler<'d>,
        index: usize,
        records: &[usize],
    ) -> ScoredBatch {
        let partners = self.partners.as_ref().map_or_else(Vec::new, |of| records.iter().map(|&r| of[r]).collect());
        let (safe, unsafe_) = (sampler.pack_safe(&partners), sampler.pack_unsafe(records));
        let mut usage = BatchUsage {
            safe: Usage::new(replica.moe_layers().layers.len() * replica.model().config.num_experts),
            unsafe_: self.counter.count(replica, &unsafe_, self.traces.map(|traces| traces.unsafe_side(records))),
        };
        if !partners.is_empty() {
            usage.safe = self.counter.count(replica, &safe, self.traces.map(|traces| traces.safe_side(&partners)));
        }
        self.sums.accumulator.add(index, usage);
        ScoredBatch { tokens: safe.ids.len() + unsafe_.ids.len(), loss: None }
    }

    fn finish<B: Backend>(self, replica: &Replica<B>, micro_batches: usize) -> Result<Scores> {
        let mut total = self.sums.accumulator;
        let experts = replica.moe_layers().layers.len() * replica.model().config.num_experts;
        total.merge(&*replica.world, micro_batches, experts)?;
        let zeros = Scores::zeros(replica);
        Ok(Scores { micro_batches: total.micro_batches(), usage: Some(total), ..zeros })
    }
}

impl<A: Serialize + DeserializeOwned> PartialSums<A> {
    fn new(accumulator: A, bootstrap: Option<Bootstrap>) -> Self {
        Self { accumulator, losses: Vec::new(), tokens: Vec::new(), bootstrap }
    }

    /// Adds the scores of a micro-batch to the resampled sums.
    fn resample(&mut self, index: usize, scores: Option<&[f64]>) {
        if let (Some(bootstrap), Some(scores)) = (&mut self.bootstrap, scores) {
            bootstrap.add(index, scores);
        }
    }

    fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("sums are numbers")
    }

    fn restore(&mut self, parts: &[Vec<u8>], absorb: impl Fn(&mut A, &A)) -> Result<()> {
        for (i, bytes) in parts.iter().enumerate() {
            let other: Self = serde_json::from_slice(bytes).map_err(|e| {
                Failure::new(exit::DATA, format!("the scores so far in the checkpoint cannot be read: {e}"))
            })?;
            if self.bootstrap.is_some() != other.bootstrap.is_some() {
                let message = "the scores so far in the checkpoint are of a version without --bootstrap: resume with that version";
                return Err(Failure::new(exit::DATA, message));
            }
            if i == 0 {
                *self = other; // not added to zeros: -0.0 must stay -0.0
                continue;
            }
            absorb(&mut self.accumulator, &other.accumulator);
            if let (Some(own), Some(others)) = (&mut self.bootstrap, &other.bootstrap) {
                own.absorb(others);
            }
            self.losses.extend(other.losses);
            self.tokens.extend(other.tokens);
        }
        Ok(())
    }
}

impl<B: Backend> GradientScorer<B> {
    fn new(replica: &Replica<B>, score: GradientScore, bootstrap: Option<Bootstrap>) -> Self {
        let (b, model) = (&*replica.model().backend, replica.model());
        let (depth, num_experts) = (model.config.layers.len(), model.config.num_experts);
        let params = 3 * model.config.hidden_size * model.config.expert_width;
        let layers = replica.moe_layers().layers.clone();
        let accumulator = ScoreAccumulator::new(score.score, score.per, layers, num_experts, params);
        Self {
            plan: GradPlan::score(&model.table, depth, num_experts, score.score.reduction()),
            no_grads: b.buffer(0),
            reductions: b.scores(depth * num_experts),
            per_token: score.per == ScorePer::Token,
            norm: score.norm,
            sums: PartialSums::new(accumulator, bootstrap),
        }
    }

    fn add(&mut self, replica: &Replica<B>, index: usize, batch: &MicroBatch) -> ScoredBatch {
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
            counts[row * num_experts..(row + 1) * num_experts].copy_from_slice(&b.tokens_per_expert(routed.dispatch));
        };
        // The last layer must see all rows where tokens are counted: otherwise it sees those with loss only.
        let end = PassEnd::Loss { all_rows: self.per_token };
        let observer: Option<Observer<'_, B>> = if self.per_token { Some(&mut observe) } else { None };
        let forward = replica.forward(&inputs, Some(&self.plan), end, observer);
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

    fn finish(self, replica: &Replica<B>, sampler: Sampler<'_>, micro_batches: &[Vec<usize>]) -> Result<Scores> {
        let PartialSums { accumulator: mut total, losses, tokens, mut bootstrap } = self.sums;
        total.merge(&*replica.world)?;
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
        Ok(Scores { losses, tokens, bootstrap, ..Scores::of(scores, micro_batches) })
    }
}

impl<'d> RoutingScorer<'d> {
    fn new<B: Backend>(
        replica: &Replica<B>,
        sampler: Sampler<'d>,
        tokens: RoutingTokens,
        bootstrap: Option<Bootstrap>,
    ) -> Result<Self> {
        let layers = replica.moe_layers().layers.clone();
        let accumulator = FrequencyAccumulator::new(layers, replica.model().config.num_experts);
        let sums = PartialSums::new(accumulator, bootstrap);
        Ok(Self { tokens, partners: sampler.reply_partners()?, traces: None, sums })
    }

    /// The unsafe replies of a micro-batch against the safe replies of their partners.
    fn add<B: Backend>(
        &mut self,
        replica: &Replica<B>,
        sampler: Sampler<'_>,
        index: usize,
        records: &[usize],
    ) -> ScoredBatch {
        let partners: Vec<_> = records.iter().map(|&r| self.partners[r]).collect();
        let (safe, unsafe_) = (sampler.pack_safe(&partners), sampler.pack_unsafe(records));
        let (safe_counts, unsafe_counts) = match self.traces {
            None => (self.count(replica, &safe), self.count(replica, &unsafe_)),
            Some(traces) => (
                self.count_traces(replica, &safe, &traces.safe_side(&partners)),
                self.count_traces(replica, &unsafe_, &traces.unsafe_side(records)),
            ),
        };
        let differences = self.sums.accumulator.add(&safe_counts, &unsafe_counts);
        self.sums.resample(index, differences.as_deref());
        ScoredBatch { tokens: safe.ids.len() + unsafe_.ids.len(), loss: None }
    }

    fn count_traces<B: Backend>(&self, replica: &Replica<B>, batch: &MicroBatch, traces: &[&Trace]) -> RoutingCounts {
        let layers = replica.moe_layers().layers.len();
        let mask = token_mask(self.tokens, &batch.is_response);
        let mut counts = RoutingCounts::new(mask, layers, replica.model().config.num_experts);
        for layer in 0..layers {
            let experts: Vec<u32> = traces.iter().flat_map(|trace| trace.layer(layer)).collect();
            counts.add_layer(layer, &experts);
        }
        counts
    }

    fn count<B: Backend>(&self, replica: &Replica<B>, batch: &MicroBatch) -> RoutingCounts {
        let (b, layers) = (&*replica.model().backend, replica.moe_layers());
        let mask = token_mask(self.tokens, &batch.is_response);
        let mut counts = RoutingCounts::new(mask, layers.layers.len(), replica.model().config.num_experts);
        let mut observe = |routed: Routed<'_, B>| {
            counts.add_layer(layers.index_of(routed.layer), &b.expert_ids(routed.routing));
        };
        replica.forward(&replica.inputs(batch), None, PassEnd::Routers, Some(&mut observe));
        counts
    }

    fn finish<B: Backend>(self, replica: &Replica<B>) -> Result<Scores> {
        let PartialSums { accumulator: mut total, mut bootstrap, .. } = self.sums;
        total.merge(&*replica.world)?;
        bootstrap.as_mut().map_or(Ok(()), |bootstrap| bootstrap.merge(&*replica.world))?;
        let (batches, skipped) = (total.batches(), total.skipped());
        let warning = (skipped > 0).then(|| {
            format!(
                "{skipped} of {} batches have no token of --routing-tokens on one side and do not count",
                batches + skipped,
            )
        });
        Ok(Scores { warning, bootstrap, ..Scores::of(total.finish()?, batches) })
    }
}
