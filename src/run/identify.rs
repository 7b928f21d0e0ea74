//! Finding experts: a scoring pass over the data, by the method asked for, and the selection.

use std::ops::ControlFlow;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::engine::Engine;
use super::fault::Point;
use super::progress::Progress;
use crate::backend::Backend;
use crate::collective::all_agree;
use crate::config::RunConfig;
use crate::data::{self, MicroBatch};
use crate::exit::{self, Failure, Result};
use crate::experts::{
    self, ExpertId, ExpertScores, FrequencyAccumulator, Method, Pool, RandomMatch, Rank, RoutingCounts,
    ScoreAccumulator, ScorePer, Selected, selection_hash, token_mask,
};
use crate::model::{GradPlan, LossGrads, Observer, PassEnd, Sinks};

/// Micro-batches of a rank between two moments at which an identification may pause. Ranks wait for each other there; over
/// several micro-batches their work evens out.
const BETWEEN_PAUSES: usize = 4;

/// What an identification found. All ranks hold the same.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Identification {
    /// By the method asked for; zero everywhere for the random one.
    pub scores: ExpertScores,
    /// The experts to train.
    pub selected: Selected,
    /// Micro-batches (or safe and unsafe batches) that counted.
    pub micro_batches: u64,
    /// Mean cross-entropy of each micro-batch in global order, where the method computes one; those without loss tokens
    /// are left out.
    pub losses: Vec<f64>,
    /// The same micro-batches' tokens.
    pub tokens: Vec<usize>,
}

/// Scores of gradients, and what came with them.
struct Scored {
    scores: ExpertScores,
    micro_batches: u64,
    losses: Vec<f64>,
    tokens: Vec<usize>,
}

impl Scored {
    fn select(self, selected: Selected) -> Identification {
        let Self { scores, micro_batches, losses, tokens } = self;
        Identification { scores, selected, micro_batches, losses, tokens }
    }
}

/// The choices of a round that chooses at every step: mean scores over all micro-batches, and every expert that was ever
/// chosen, the most often chosen first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Choices {
    sum: Option<Identification>,
    /// By expert, ascending.
    times: Vec<(ExpertId, usize)>,
}

impl Choices {
    /// Adds one step's choice.
    pub fn add(&mut self, found: Identification) {
        for id in &found.selected.experts {
            match self.times.binary_search_by_key(id, |(id, _)| *id) {
                Ok(i) => self.times[i].1 += 1,
                Err(i) => self.times.insert(i, (*id, 1)),
            }
        }
        let weight = found.micro_batches as f64;
        match &mut self.sum {
            None => {
                let mut found = found;
                found.scores.values.iter_mut().for_each(|s| *s *= weight);
                self.sum = Some(found);
            }
            Some(sum) => {
                for (total, score) in sum.scores.values.iter_mut().zip(&found.scores.values) {
                    *total += score * weight;
                }
                sum.micro_batches += found.micro_batches;
                sum.losses.extend(found.losses);
                sum.tokens.extend(found.tokens);
            }
        }
    }

    /// What the round found; `None` if no step chose.
    pub fn finish(&self) -> Option<Identification> {
        let mut found = self.sum.clone()?;
        let batches = found.micro_batches as f64;
        found.scores.values.iter_mut().for_each(|s| *s /= batches);
        let mut times = self.times.clone();
        times.sort_by_key(|(id, times)| (std::cmp::Reverse(*times), *id));
        let experts: Vec<_> = times.into_iter().map(|(id, _)| id).collect();
        found.selected = Selected { asked: experts.len(), experts };
        Some(found)
    }
}

/// A scoring pass under way on one rank.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Scan<A> {
    sums: A,
    /// (place in the global order, mean loss)
    losses: Vec<(usize, f64)>,
    /// (place in the global order, tokens)
    tokens: Vec<(usize, f64)>,
}

/// Sums of one kind of score on one rank.
trait Sums: Serialize + DeserializeOwned {
    /// Adds those of another rank.
    fn absorb(&mut self, other: &Self);
}

impl Sums for ScoreAccumulator {
    fn absorb(&mut self, other: &Self) {
        ScoreAccumulator::absorb(self, other);
    }
}

impl Sums for FrequencyAccumulator {
    fn absorb(&mut self, other: &Self) {
        FrequencyAccumulator::absorb(self, other);
    }
}

/// Where a scoring pass stands: what a checkpoint keeps of it.
#[derive(Debug, Clone, Default)]
pub struct ScanState {
    /// Micro-batches of the global order that are done.
    pub next: usize,
    /// What this rank has added up, as bytes; of several ranks where their number has changed, of none at the beginning.
    pub sums: Vec<Vec<u8>>,
}

/// A moment at which a scoring pass may pause.
pub struct Pause<'p> {
    /// Micro-batches of the global order that are done.
    pub next: usize,
    /// Whether some rank was asked to save and leave.
    pub stop: bool,
    /// Gives what this rank has added up.
    pub sums: &'p dyn Fn() -> Vec<u8>,
}

/// Is shown each pause; what it answers, the same on all ranks, decides whether the pass goes on.
pub type OnPause<'a, B> = &'a mut dyn FnMut(&Engine<'_, B>, Pause<'_>) -> Result<ControlFlow<()>>;

/// A scoring pass: over which micro-batches, from where on, and who is shown its pauses (`None`: it has none).
struct Passing<'a, B: Backend> {
    micro_batches: &'a [Vec<usize>],
    from: ScanState,
    on_pause: Option<OnPause<'a, B>>,
    bar: &'a Progress<'a>,
}

/// The pool that the options describe. A selection that trains nothing (mode `baseline`, routers alone) is made for
/// comparison, and takes what there is where there are fewer experts than asked for.
pub fn pool(config: &RunConfig, layers: &[usize], num_experts: usize) -> Pool {
    let mut pool =
        Pool { top_k: config.top_k_experts, per_layer: config.experts_per_layer, layers: config.layers.clone() };
    if !config.trains_selection() {
        pool.top_k = pool.top_k.min(pool.available(layers, num_experts));
    }
    pool
}

impl<B: Backend> Engine<'_, B> {
    /// The global order of identification in `round` (from 0): micro-batches of records with an unsafe reply.
    pub fn identify_order(&self, round: usize) -> Vec<Vec<usize>> {
        let records = self.unsafe_replies();
        let order = data::order(records.len(), self.config.shuffle, self.config.seed, round as u64);
        let order: Vec<_> = order.into_iter().map(|i| records[i]).collect();
        data::micro_batches(&order, self.config.batch_size)
    }

    /// Scores the whole set and selects. `round` counts from 0.
    ///
    /// # Errors
    /// See [`Self::find`].
    pub fn identify(&self, round: usize, bar: &Progress<'_>) -> Result<Identification> {
        self.find(&self.identify_order(round), round, bar)
    }

    /// The same from `from` on, with pauses; `None` if it was paused for good.
    ///
    /// # Errors
    /// See [`Self::find`], and those of `on_pause`.
    pub fn identify_from(
        &self,
        round: usize,
        from: ScanState,
        bar: &Progress<'_>,
        on_pause: OnPause<'_, B>,
    ) -> Result<Option<Identification>> {
        let order = self.identify_order(round);
        self.find_in(Passing { micro_batches: &order, from, on_pause: Some(on_pause), bar }, round)
    }

    /// Scores these micro-batches by the method asked for and selects; `round` decides the draw of the random one.
    ///
    /// # Errors
    /// A loss that is not finite, a selection that cannot be made, ranks that differ.
    pub fn find(&self, micro_batches: &[Vec<usize>], round: usize, bar: &Progress<'_>) -> Result<Identification> {
        let passing = Passing { micro_batches, from: ScanState::default(), on_pause: None, bar };
        Ok(self.find_in(passing, round)?.expect("a pass without pauses ends"))
    }

    fn find_in(&self, passing: Passing<'_, B>, round: usize) -> Result<Option<Identification>> {
        let config = self.config;
        let layers = self.moe_layers().layers;
        let num_experts = self.model.config.num_experts;
        let rank = Rank { select: config.select, threshold: None };
        let pool = pool(config, &layers, num_experts);
        let found = match config.method {
            Method::Gradient => {
                let Some(scored) = self.score_gradients(passing)? else { return Ok(None) };
                let selected = experts::select(&scored.scores, &pool, &rank)?;
                scored.select(selected)
            }
            Method::Routing => {
                let Some((scores, micro_batches)) = self.score_routing_in(passing)? else { return Ok(None) };
                let rank = Rank { threshold: Some(config.risk_threshold), ..rank };
                let selected = experts::select(&scores, &pool, &rank)?;
                Identification { selected, scores, micro_batches, losses: Vec::new(), tokens: Vec::new() }
            }
            Method::Random => {
                // The control knows the gradient method's selection only where it is to match it.
                let (scores, gradient) = match config.random_match {
                    RandomMatch::Total => {
                        let values = vec![0.0; layers.len() * num_experts];
                        (ExpertScores { layers: layers.clone(), num_experts, values }, None)
                    }
                    RandomMatch::Layer => {
                        let Some(scored) = self.score_gradients(passing)? else { return Ok(None) };
                        let selected = experts::select(&scored.scores, &pool, &rank)?;
                        (scored.scores, Some(selected.experts))
                    }
                };
                let selected = experts::random(
                    &layers,
                    num_experts,
                    &pool,
                    config.random_match,
                    gradient.as_deref(),
                    config.seed,
                    round as u64,
                )?;
                Identification { selected, scores, micro_batches: 0, losses: Vec::new(), tokens: Vec::new() }
            }
        };
        all_agree(&*self.world, "selection of experts", &selection_hash(&found.selected.experts))?;
        Ok(Some(found))
    }

    /// Walks this rank's micro-batches; `None` if it was paused for good.
    fn scan<A: Sums>(
        &self,
        passing: Passing<'_, B>,
        nothing: A,
        mut add: impl FnMut(&mut Scan<A>, usize, &[usize]),
    ) -> Result<Option<Scan<A>>> {
        let Passing { micro_batches, from, mut on_pause, .. } = passing;
        let mut scan = Scan { sums: nothing, losses: Vec::new(), tokens: Vec::new() };
        for (i, bytes) in from.sums.iter().enumerate() {
            let other: Scan<A> = serde_json::from_slice(bytes).map_err(|e| {
                Failure::new(exit::DATA, format!("the scores so far in the checkpoint cannot be read: {e}"))
            })?;
            if i == 0 {
                scan = other; // not added to zeros: -0.0 stays what it is
                continue;
            }
            scan.sums.absorb(&other.sums);
            scan.losses.extend(other.losses);
            scan.tokens.extend(other.tokens);
        }
        let (rank, size) = (self.world.rank(), self.world.world_size());
        let mut next = from.next;
        while next < micro_batches.len() {
            self.world.doing(&format!("identification, micro-batches from {next}"));
            let until = match on_pause {
                Some(_) => micro_batches.len().min(next + BETWEEN_PAUSES * size),
                None => micro_batches.len(),
            };
            for index in (next..until).filter(|i| i % size == rank) {
                if let Some(fault) = &self.fault {
                    fault.pass(Point::Batch)?;
                }
                add(&mut scan, index, &micro_batches[index]);
            }
            next = until;
            let Some(on_pause) = on_pause.as_mut().filter(|_| next < micro_batches.len()) else { continue };
            let finite = scan.losses.iter().all(|(_, loss)| loss.is_finite());
            let mut flags = [self.stop.is_asked(), !finite].map(|flag| f64::from(u8::from(flag)));
            self.world.all_reduce_f64(&mut flags)?;
            if flags[1] > 0.0 {
                break; // the caller, who has the losses of all ranks, says which it was
            }
            let sums = || serde_json::to_vec(&scan).expect("sums are numbers");
            if on_pause(self, Pause { next, stop: flags[0] > 0.0, sums: &sums })?.is_break() {
                return Ok(None);
            }
        }
        Ok(Some(scan))
    }

    /// One backward a micro-batch with the plan "score every expert": no expert gradient is ever stored.
    fn score_gradients(&self, passing: Passing<'_, B>) -> Result<Option<Scored>> {
        let (b, model) = (&*self.model.backend, &self.model);
        let config = self.config;
        let (depth, num_experts) = (model.config.layers.len(), model.config.num_experts);
        let layers = self.moe_layers().layers;
        let params = 3 * model.config.hidden_size * model.config.expert_width;
        let plan = GradPlan::score(&model.table, depth, num_experts, config.score.moment());
        let nothing = ScoreAccumulator::new(config.score, config.score_per, layers.clone(), num_experts, params);
        let mut grads = b.buffer(0);
        let mut scores = b.scores(depth * num_experts);
        // Only scores per token count tokens, and then rows without loss would miss from the last layer's counts.
        let per_token = config.score_per == ScorePer::Token;
        let end = PassEnd::Loss { all_rows: per_token };
        let (micro_batches, bar) = (passing.micro_batches, passing.bar);
        let scanned = self.scan(passing, nothing, |scan, index, records| {
            let batch = self.pack_unsafe(records);
            let targets = batch.targets.len();
            if targets == 0 {
                bar.step(0, "");
                return;
            }
            let inputs = self.inputs(&batch);
            let mut counts = vec![0; layers.len() * num_experts];
            let mut observe = |routed: crate::model::Routed<'_, B>| {
                let row = layers.binary_search(&routed.layer).expect("a layer that routes");
                let tokens = b.tokens_per_expert(routed.dispatch);
                counts[row * num_experts..(row + 1) * num_experts].copy_from_slice(&tokens);
            };
            let observer: Option<Observer<'_, B>> = if per_token { Some(&mut observe) } else { None };
            let forward = self.forward(&inputs, Some(&plan), end, observer);
            let mut sinks = Sinks { plan: &plan, grads: &mut grads, scores: &mut scores, done: None };
            let loss_grads = LossGrads { ce_scale: 1.0 / targets as f32, routers: &[] };
            let sum = model.backward(&inputs, forward, loss_grads, &mut sinks).expect("a pass to the loss");
            let loss = sum / targets as f64;
            let all = b.scores_take(&mut scores);
            let moments: Vec<_> =
                layers.iter().flat_map(|l| all[l * num_experts..(l + 1) * num_experts].iter().copied()).collect();
            scan.sums.add(&moments, &counts, targets);
            scan.losses.push((index, loss));
            scan.tokens.push((index, batch.ids.len() as f64));
            bar.step(batch.ids.len(), format!("loss {loss:.4}"));
        })?;
        let Some(Scan { sums: mut total, losses, tokens }) = scanned else { return Ok(None) };
        total.merge(&*self.world)?;
        let all_losses = self.gather_by_index(micro_batches.len(), &losses)?;
        // Here, and not where a loss arises: all ranks see all losses, and leave together.
        for (index, (loss, records)) in all_losses.iter().zip(micro_batches).enumerate() {
            self.check_finite(*loss, &format!("the loss of micro-batch {index} of the identification"), records)?;
        }
        let all_tokens = self.gather_by_index(micro_batches.len(), &tokens)?;
        let counted = all_losses.into_iter().zip(all_tokens).filter(|(_, tokens)| *tokens > 0.0);
        let (losses, tokens) = counted.map(|(loss, tokens)| (loss, tokens as usize)).unzip();
        Ok(Some(Scored { micro_batches: total.micro_batches(), scores: total.finish()?, losses, tokens }))
    }

    /// Risk differences of routing frequencies; forward passes alone. A batch is a micro-batch's unsafe replies against
    /// the safe replies of the same records, or, where safe rows stand alone, against as many of those in turn.
    ///
    /// # Errors
    /// Data without safe replies; those of the collective.
    pub fn score_routing(&self, micro_batches: &[Vec<usize>], bar: &Progress<'_>) -> Result<(ExpertScores, u64)> {
        let passing = Passing { micro_batches, from: ScanState::default(), on_pause: None, bar };
        Ok(self.score_routing_in(passing)?.expect("a pass without pauses ends"))
    }

    fn score_routing_in(&self, passing: Passing<'_, B>) -> Result<Option<(ExpertScores, u64)>> {
        let safe = self.safe_partners(|r| r.safe_reply.is_some()).ok_or_else(|| {
            Failure::new(
                exit::CONFIG,
                "--method routing compares safe with unsafe prompts, and the data hold no safe ones: add rows with \
                 the label safe, or take --method gradient",
            )
        })?;
        let layers = self.moe_layers().layers;
        let nothing = FrequencyAccumulator::new(layers.clone(), self.model.config.num_experts);
        let bar = passing.bar;
        let scanned = self.scan(passing, nothing, |scan, _, records| {
            let partners: Vec<_> = records.iter().map(|&r| safe[r]).collect();
            let (safe, unsafe_) = (self.pack_safe(&partners), self.pack_unsafe(records));
            scan.sums.add(&self.count_routing(&safe, &layers), &self.count_routing(&unsafe_, &layers));
            bar.step(safe.ids.len() + unsafe_.ids.len(), "");
        })?;
        let Some(Scan { sums: mut total, .. }) = scanned else { return Ok(None) };
        total.merge(&*self.world)?;
        let (batches, skipped) = (total.batches(), total.skipped());
        if skipped > 0 {
            bar.warn(format_args!(
                "{skipped} of {} batches have no token of --routing-tokens on one side and do not count",
                batches + skipped,
            ));
        }
        Ok(Some((total.finish()?, batches)))
    }

    fn count_routing(&self, batch: &MicroBatch, layers: &[usize]) -> RoutingCounts {
        let b = &*self.model.backend;
        let mask = token_mask(self.config.routing_tokens, &batch.is_response);
        let mut counts = RoutingCounts::new(mask, layers.len(), self.model.config.num_experts);
        let mut observe = |routed: crate::model::Routed<'_, B>| {
            let row = layers.binary_search(&routed.layer).expect("a layer that routes");
            counts.add_layer(row, &b.expert_ids(routed.routing));
        };
        self.forward(&self.inputs(batch), None, PassEnd::Routers, Some(&mut observe));
        counts
    }

    /// For each record the one whose safe side goes with its unsafe side: itself if it has both, else the safe-only
    /// records in turn, or where there are none, all records with a safe side in turn. `None` if no record has one.
    pub fn safe_partners(&self, has_safe: impl Fn(&data::Record) -> bool) -> Option<Vec<usize>> {
        let records = &self.data.records;
        let safe: Vec<_> = (0..records.len()).filter(|&i| has_safe(&records[i])).collect();
        let alone: Vec<_> = safe.iter().copied().filter(|&i| records[i].unsafe_prompt.is_none()).collect();
        let mut next = if alone.is_empty() { &safe } else { &alone }.iter().copied().cycle();
        (0..records.len()).map(|i| if has_safe(&records[i]) { Some(i) } else { next.next() }).collect()
    }
}
