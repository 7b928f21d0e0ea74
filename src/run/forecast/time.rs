//! How long a run takes, before it runs: its work from shapes, at rates that are measured just before.

use std::fmt;

use super::rates::Rates;
use super::work::{Kind, TokenWork, Tokens, Work};
use crate::data::{Example, Record};
use crate::model::ModelConfig;
use crate::train::{Recipe, ScoreBy, Trained, TrainedElements, Training};

/// The work of a whole run on all ranks.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Forecast {
    /// Scoring.
    pub identify: Work,
    /// Training experts (and routers, in the joint schedule).
    pub experts: Work,
    /// Aligning routers.
    pub routers: Work,
    /// Measuring before and after.
    pub measure: Work,
    /// The passes of the retain rows, those that measure included.
    pub retain: Work,
    /// The model's own replies on which routing is counted.
    pub replies: Work,
    /// The causal check of `--verify`.
    pub verify: Work,
    /// Making random weights.
    pub start: Work,
}

pub(super) fn of_replies<'a>(replies: impl Iterator<Item = &'a Example> + 'a) -> Tokens {
    Tokens::of(replies.map(|e| (e.ids.len(), e.loss.iter().filter(|l| **l).count())))
}

fn of_prompts<'a>(prompts: impl Iterator<Item = &'a Vec<u32>> + 'a) -> Tokens {
    Tokens::of(prompts.map(|p| (p.len(), 0)))
}

/// Scoring passes over the data. A run that selects at each step scores each step's own batch: in each pass the whole data.
fn scans(recipe: &Recipe) -> f64 {
    let epochs = match &recipe.training {
        Training::Experts(phase) | Training::Alternate(phase, _) => phase.epochs,
        Training::Joint(phase) => phase.epochs,
        Training::Nothing | Training::Routers(_) => 1,
    };
    match recipe.selects_each_step() {
        true => (recipe.rounds * epochs) as f64,
        false if recipe.identify.keeps_first_selection() => 1.0,
        false => recipe.rounds as f64,
    }
}

impl Forecast {
    /// The work of a run over `records`. `recomputed`: the share of the layers that recompute their forward. Assumes that a
    /// backward reaches the lowest layer, though it stops earlier where no expert of that layer is selected.
    pub fn new(
        recipe: &Recipe,
        model: &ModelConfig,
        records: &[Record],
        recomputed: f64,
        trained: &TrainedElements,
    ) -> Self {
        let unsafe_replies = of_replies(records.iter().filter_map(|r| r.unsafe_reply.as_ref()));
        let safe_replies = of_replies(records.iter().filter_map(|r| r.safe_reply.as_ref()));
        let unsafe_prompts = of_prompts(records.iter().filter_map(|r| r.unsafe_prompt.as_ref()));
        // Each unsafe prompt is compared with one safe prompt, however many safe prompts there are.
        let safe_prompts = of_prompts(records.iter().filter_map(|r| r.safe_prompt.as_ref()));
        let safe_prompts = match safe_prompts.all > 0.0 {
            true => safe_prompts.like(unsafe_prompts.sequences),
            false => safe_prompts,
        };
        let work = |t: &Tokens| TokenWork::new(model, t.mean_length());
        let forward = |t: &Tokens| work(t).forward(t);
        let routing = |t: &Tokens| work(t).routing(t);
        let everything = recipe.trained() == Some(Trained::Everything);
        let there_and_back = |t: &Tokens, whole: bool| {
            work(t).hidden(t) + work(t).recomputed(t) * recomputed + work(t).backward_inputs(t, whole)
        };
        let all_experts = (model.moe_layers().count() * model.num_experts).max(1) as f64;
        let selected = recipe.identify.expected_size(model.moe_layers().count(), model.num_experts);
        let weights = |t: &Tokens| match recipe.trained() {
            None => Work::default(),
            Some(Trained::SelectedExperts) => work(t).backward_experts(t, (selected as f64 / all_experts).min(1.0)),
            Some(Trained::AllExperts) => work(t).backward_experts(t, 1.0),
            Some(Trained::Everything) => work(t).backward_weights(t),
        };
        let rounds = recipe.rounds as f64;
        let gradients = there_and_back(&unsafe_replies, false) + work(&unsafe_replies).backward_scores(&unsafe_replies);
        let update = |sequences: f64, grad_accum: usize, elements: usize| {
            let micro_batches = (sequences / recipe.batch_size as f64).ceil();
            Work::of(Kind::Update, (micro_batches / grad_accum as f64).ceil() * elements as f64)
        };
        // (passes over the unsafe replies in the run, work of one)
        let (passes, a_pass) = match &recipe.training {
            Training::Nothing | Training::Routers(_) => (0.0, Work::default()),
            Training::Experts(phase) | Training::Alternate(phase, _) => {
                let updates = update(
                    unsafe_replies.sequences,
                    phase.grad_accum,
                    if everything { trained.at_once } else { trained.experts },
                );
                let pass = there_and_back(&unsafe_replies, everything) + weights(&unsafe_replies) + updates;
                (rounds * phase.epochs as f64, pass)
            }
            Training::Joint(phase) => {
                // Safe examples in proportion to the unsafe ones, however many there are in the data.
                let ratio = phase.safe_ratio / (1.0 - phase.safe_ratio);
                let both = |t: &Tokens| there_and_back(t, everything) + weights(t);
                let safe = safe_replies.like(ratio * unsafe_replies.sequences);
                let updates = update(unsafe_replies.sequences + safe.sequences, phase.grad_accum, trained.at_once);
                (rounds * phase.epochs as f64, both(&unsafe_replies) + both(&safe) + updates)
            }
        };
        let routers = recipe.router_phase().map_or_else(Work::default, |phase| {
            let unsafe_side = routing(&unsafe_prompts)
                + work(&unsafe_prompts).recomputed(&unsafe_prompts) * recomputed
                + work(&unsafe_prompts).backward_inputs(&unsafe_prompts, false);
            let updates = update(unsafe_prompts.sequences, 1, trained.routers);
            (routing(&safe_prompts) + unsafe_side + updates) * (rounds * phase.epochs as f64)
        });
        let identification = match recipe.identify.by {
            ScoreBy::Gradient(_) | ScoreBy::Random { gradient: Some(_), .. } => gradients,
            ScoreBy::Random { gradient: None, .. } | ScoreBy::Given => Work::default(),
            ScoreBy::Published { rule, .. } if !rule.needs_safe_side() => routing(&unsafe_replies),
            ScoreBy::Routing { .. } | ScoreBy::Published { .. } => {
                routing(&unsafe_replies) + routing(&safe_replies.like(unsafe_replies.sequences))
            }
        };
        let pairs = match safe_prompts.all > 0.0 {
            true => routing(&safe_prompts) + routing(&unsafe_prompts),
            false => Work::default(),
        };
        Self {
            identify: identification * scans(recipe),
            experts: a_pass * passes,
            routers,
            measure: (forward(&unsafe_replies) + forward(&safe_replies) + pairs) * 2.0,
            ..Self::default()
        }
    }

    /// Of `identify` with the same options: one scoring pass.
    #[must_use]
    pub fn of_identification(self, recipe: &Recipe) -> Self {
        let Self { replies, verify, start, .. } = self;
        Self { identify: self.identify * (1.0 / scans(recipe)), replies, verify, start, ..Self::default() }
    }

    /// With held-out rows, which are measured before and after.
    #[must_use]
    pub fn with_held_out(self, model: &ModelConfig, rows: &[Record]) -> Self {
        let replies = of_replies(rows.iter().filter_map(|r| r.unsafe_reply.as_ref()));
        let forward = TokenWork::new(model, replies.mean_length()).forward(&replies);
        Self { measure: self.measure + forward * 2.0, ..self }
    }

    /// With `elements` of random weights, which every rank makes.
    #[must_use]
    pub fn with_random_weights(self, elements: usize) -> Self {
        Self { start: Work::of(Kind::Random, elements as f64), ..self }
    }

    /// With the passes of `rows`, the retain rows of the run: as many in each step as it has examples.
    #[must_use]
    pub fn with_retain_rows(self, recipe: &Recipe, model: &ModelConfig, data: &[Record], rows: &[Record]) -> Self {
        let Some(goal) = recipe.retain else { return self };
        let all = of_replies(rows.iter().filter_map(|r| r.safe_reply.as_ref()));
        let work = |t: &Tokens| TokenWork::new(model, t.mean_length());
        // The divergence makes the base's logits too.
        let with_base = |t: &Tokens| work(t).forward(t) + work(t).logits(t);
        let rounds = recipe.rounds as f64;
        // Outputs of the base model once, then a measurement before the first round and after each.
        let measured = work(&all).forward(&all) + with_base(&all) * (rounds + 1.0);
        let count = |has: fn(&Record) -> bool| data.iter().filter(|r| has(r)).count() as f64;
        let (replies, prompts) = (count(|r| r.unsafe_reply.is_some()), count(|r| r.unsafe_prompt.is_some()));
        let in_training = match &recipe.training {
            Training::Nothing => 0.0,
            Training::Experts(phase) => phase.epochs as f64 * replies,
            Training::Routers(phase) => phase.epochs as f64 * prompts,
            Training::Alternate(experts, routers) => experts.epochs as f64 * replies + routers.epochs as f64 * prompts,
            Training::Joint(phase) => phase.epochs as f64 * phase.examples(replies),
        };
        let trains = goal.weight > 0.0 || goal.routing_weight > 0.0;
        let trained = all.like(if trains { rounds * in_training } else { 0.0 });
        let retain = measured + with_base(&trained) + work(&trained).backward_inputs(&trained, true);
        Self { retain, ..self }
    }

    /// The work of all phases.
    pub fn total(&self) -> Work {
        let Self { identify, experts, routers, measure, retain, replies, verify, start } = *self;
        start + replies + identify + verify + experts + routers + measure + retain
    }

    /// The seconds of the whole run.
    pub fn seconds(&self, rates: &Rates) -> f64 {
        rates.seconds(&self.total())
    }

    /// The durations of its parts in text. `rates`: of all ranks together.
    pub fn at(&self, rates: &Rates) -> impl fmt::Display {
        let Self { identify, experts, routers, measure, retain, replies, verify, start } = self;
        let seconds = |work: &Work| duration(rates.seconds(work));
        let if_any = |what: &str, work: &Work| match *work == Work::default() {
            true => String::new(),
            false => format!(", {what} {}", seconds(work)),
        };
        format!(
            "identification {}, experts {}, routers {}, measuring {}{}{}{}{} ({:.2} TFLOP)",
            seconds(identify),
            seconds(experts),
            seconds(routers),
            seconds(measure),
            if_any("retain rows", retain),
            if_any("own replies at most", replies),
            if_any("causal check at most", verify),
            if_any("random weights", start),
            self.total().flops() / 1e12,
        )
    }
}

/// `3 min 20 s`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        0..10 => format!("{seconds:.2} s"),
        10..120 => format!("{whole} s"),
        120..7200 => format!("{} min {} s", whole / 60, whole % 60),
        _ => format!("{} h {} min", whole / 3600, whole % 3600 / 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Mode, RunConfig};
    use crate::experts::{Method, RandomMatch, Selection};
    use crate::run::forecast::work::tests::olmoe;

    #[test]
    fn phases_that_do_not_run_cost_nothing() {
        let reply = Example { ids: vec![0; 40], loss: [vec![false; 30], vec![true; 10]].concat() };
        let record = Record {
            line: 1,
            request: String::new(),
            unsafe_reply: Some(reply.clone()),
            safe_reply: Some(reply),
            unsafe_prompt: Some(vec![0; 30]),
            safe_prompt: Some(vec![0; 20]),
            unsafe_messages: vec![],
            safe_messages: vec![],
        };
        let of = |change: fn(&mut RunConfig)| {
            let mut config = RunConfig::default();
            change(&mut config);
            let recipe = config.recipe().expect("options without contradictions");
            let trained = TrainedElements { experts: 4, routers: 2, others: 0, at_once: 4 };
            Forecast::new(&recipe, &olmoe(), std::slice::from_ref(&record), 0.0, &trained)
        };
        let base = of(|_| ());
        assert!([base.identify, base.experts, base.routers, base.measure].iter().all(|work| work.flops() > 0.0));
        assert_eq!(of(|c| c.skip_router_training = true), Forecast { routers: Work::default(), ..base });
        assert_eq!(of(|c| c.finetune_unsafe_experts = false), Forecast { experts: Work::default(), ..base });
        assert!(of(|c| c.mode = Mode::Experts).experts.flops() > base.experts.flops());
        assert_eq!(of(|c| c.num_rounds = 6).identify, base.identify * 2.0);
        // Routing counts need no backward; a random selection needs no pass, except with --random-match layer.
        let routing = of(|c| c.method = Method::Routing).identify;
        let (routing, gradient) = (routing.flops(), base.identify.flops());
        assert!(0.0 < routing && routing < gradient, "{routing} of {gradient}");
        // It is drawn in the first of three rounds.
        let once = of(|c| c.num_rounds = 1).identify;
        let random = |matching| Forecast { identify: if matching { once } else { Work::default() }, ..base };
        assert_eq!(of(|c| c.method = Method::Random), random(false));
        let matched = of(|c| (c.method, c.random_match) = (Method::Random, RandomMatch::Layer));
        assert_eq!(matched, random(true));
        let per_batch = of(|c| (c.selection, c.expert_epochs_per_round) = (Selection::PerBatch, 2));
        assert_eq!(per_batch.identify, base.identify * 2.0);
    }

    #[test]
    fn durations_in_text() {
        let cases = [(0.004, "0.00 s"), (9.4, "9.40 s"), (75.2, "75 s"), (200.0, "3 min 20 s"), (9000.0, "2 h 30 min")];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }
}
