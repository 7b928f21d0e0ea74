//! How long a run takes, before it runs: its floating-point work from shapes, at the rate of a short measurement.

use std::fmt;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Dtype, HostTensor};
use crate::data::{Example, Record};
use crate::model::{LayerKind, ModelConfig};
use crate::train::{Recipe, ScoreBy, Trained, Training};

/// Floating-point operations of one token (a multiplication and an addition are two), forward.
///
/// ```text
/// linear     2 Σ_layers D (2 q + 2 kv) + (3 K F D + E D, and 3 D times the width of a shared or dense block)
/// attention  4 Σ_layers (S/2) q             causal, S the mean sequence length seen by a token
/// head       2 D V                          for tokens that carry loss
/// experts    2 Σ_layers 3 K F D             the gradients of the routed experts' weights
/// ```
///
/// A backward to the inputs does the linear part and the head once more, and attention 2.5 times.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenWork {
    linear: f64,
    attention: f64,
    head: f64,
    experts: f64,
}

/// Tokens of some sequences.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Tokens {
    /// All of them.
    pub all: f64,
    /// Those that carry loss.
    pub loss: f64,
    /// Sequences.
    pub sequences: f64,
    /// Σ length², for the token-weighted mean length.
    pub squares: f64,
}

/// The work of a whole run on all ranks, in floating-point operations.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// Scoring.
    pub identify: f64,
    /// Training experts (and routers, in the joint schedule).
    pub experts: f64,
    /// Aligning routers.
    pub routers: f64,
    /// Measuring before and after.
    pub measure: f64,
    /// The passes of the retain rows, those that measure included.
    pub retain: f64,
}

impl Tokens {
    fn of<'a>(lengths: impl Iterator<Item = (usize, usize)> + 'a) -> Self {
        lengths.fold(Self::default(), |sum, (all, loss)| Self {
            all: sum.all + all as f64,
            loss: sum.loss + loss as f64,
            sequences: sum.sequences + 1.0,
            squares: sum.squares + (all * all) as f64,
        })
    }

    fn of_replies<'a>(replies: impl Iterator<Item = &'a Example> + 'a) -> Self {
        Self::of(replies.map(|e| (e.ids.len(), e.loss.iter().filter(|l| **l).count())))
    }

    fn of_prompts<'a>(prompts: impl Iterator<Item = &'a Vec<u32>> + 'a) -> Self {
        Self::of(prompts.map(|p| (p.len(), 0)))
    }

    /// Scales these counts to `sequences` sequences of the same mean length; zero counts stay zero.
    fn like(self, sequences: f64) -> Self {
        let factor = sequences / self.sequences.max(1.0);
        let Self { all, loss, squares, .. } = self;
        Self { all: all * factor, loss: loss * factor, squares: squares * factor, sequences }
    }

    /// The length of the sequence that a token stands in, on average over tokens.
    fn mean_length(&self) -> f64 {
        self.squares / self.all.max(1.0)
    }
}

impl TokenWork {
    /// For sequences of this mean length.
    pub fn new(config: &ModelConfig, length: f64) -> Self {
        let d = config.hidden_size as f64;
        let routed = 3.0 * (config.num_experts_per_tok * config.expert_width) as f64 * d;
        let (mut linear, mut attention, mut experts) = (0.0, 0.0, 0.0);
        for (kind, heads) in config.layers.iter().zip(&config.heads) {
            let (q, kv) = ((heads.queries * heads.dim) as f64, (heads.keys * heads.dim) as f64);
            let seen = (length / 2.0).min(heads.window.unwrap_or(usize::MAX) as f64);
            attention += 4.0 * seen * q;
            linear += 2.0 * d * (2.0 * q + 2.0 * kv);
            linear += 2.0
                * match kind {
                    LayerKind::Dense(width) => 3.0 * d * *width as f64,
                    LayerKind::Moe => {
                        let shared = config.shared_expert_width.map_or(0.0, |width| d * (3 * width + 1) as f64);
                        experts += 2.0 * routed;
                        routed + config.num_experts as f64 * d + shared
                    }
                };
        }
        Self { linear, attention, head: 2.0 * d * config.vocab_size as f64, experts }
    }

    /// A forward pass.
    pub fn forward(&self, t: &Tokens) -> f64 {
        self.routing(t) + t.loss * self.head
    }

    /// A forward pass that ends before the head.
    pub fn routing(&self, t: &Tokens) -> f64 {
        t.all * (self.linear + self.attention)
    }

    /// The gradients of all activations.
    pub fn backward_inputs(&self, t: &Tokens) -> f64 {
        t.all * (self.linear + 2.5 * self.attention) + t.loss * self.head
    }

    /// The gradients of all routed experts' weights.
    pub fn backward_experts(&self, t: &Tokens) -> f64 {
        t.all * self.experts
    }

    /// The gradients of all weights.
    fn backward_weights(&self, t: &Tokens) -> f64 {
        t.all * self.linear + t.loss * self.head
    }
}

impl Forecast {
    /// The work of a run over `records`. `recomputed`: the share of the layers that recompute their forward. Assumes that a
    /// backward reaches the lowest layer, though it stops earlier where no expert of that layer is selected.
    pub fn new(recipe: &Recipe, model: &ModelConfig, records: &[Record], recomputed: f64) -> Self {
        let unsafe_replies = Tokens::of_replies(records.iter().filter_map(|r| r.unsafe_reply.as_ref()));
        let safe_replies = Tokens::of_replies(records.iter().filter_map(|r| r.safe_reply.as_ref()));
        let unsafe_prompts = Tokens::of_prompts(records.iter().filter_map(|r| r.unsafe_prompt.as_ref()));
        // Each unsafe prompt is compared with one safe prompt, however many safe prompts there are.
        let safe_prompts = Tokens::of_prompts(records.iter().filter_map(|r| r.safe_prompt.as_ref()));
        let safe_prompts = match safe_prompts.all > 0.0 {
            true => safe_prompts.like(unsafe_prompts.sequences),
            false => safe_prompts,
        };
        let work = |t: &Tokens| TokenWork::new(model, t.mean_length());
        let forward = |t: &Tokens| work(t).forward(t);
        let again = |t: &Tokens| recomputed * work(t).routing(t);
        let there_and_back = |t: &Tokens| forward(t) + again(t) + work(t).backward_inputs(t);
        let all_experts = (model.moe_layers().count() * model.num_experts).max(1) as f64;
        let selected = recipe.identify.expected_size(model.moe_layers().count(), model.num_experts);
        let weights = |t: &Tokens| match recipe.trained() {
            None => 0.0,
            Some(Trained::SelectedExperts) => work(t).backward_experts(t) * (selected as f64 / all_experts).min(1.0),
            Some(Trained::AllExperts) => work(t).backward_experts(t),
            Some(Trained::Everything) => work(t).backward_weights(t),
        };
        let rounds = recipe.rounds as f64;
        let gradients = there_and_back(&unsafe_replies) + work(&unsafe_replies).backward_experts(&unsafe_replies);
        // (passes over the unsafe replies in the run, work of one)
        let (passes, a_pass) = match &recipe.training {
            Training::Nothing | Training::Routers(_) => (0.0, 0.0),
            Training::Experts(phase) | Training::Alternate(phase, _) => {
                (rounds * phase.epochs as f64, there_and_back(&unsafe_replies) + weights(&unsafe_replies))
            }
            Training::Joint(phase) => {
                // Safe examples in proportion to the unsafe ones, however many there are in the data.
                let ratio = phase.safe_ratio / (1.0 - phase.safe_ratio);
                let both = |t: &Tokens| there_and_back(t) + weights(t);
                let safe = safe_replies.like(ratio * unsafe_replies.sequences);
                (rounds * phase.epochs as f64, both(&unsafe_replies) + both(&safe))
            }
        };
        let routers = recipe.router_phase().map_or(0.0, |phase| {
            rounds * phase.epochs as f64 * (forward(&safe_prompts) + there_and_back(&unsafe_prompts))
        });
        let identification = match recipe.identify.by {
            ScoreBy::Gradient(_) | ScoreBy::Random { gradient: Some(_), .. } => gradients,
            ScoreBy::Random { gradient: None, .. } | ScoreBy::Given => 0.0,
            ScoreBy::Published { rule, .. } if !rule.needs_safe_side() => {
                work(&unsafe_replies).routing(&unsafe_replies)
            }
            ScoreBy::Routing { .. } | ScoreBy::Published { .. } => {
                [unsafe_replies, safe_replies.like(unsafe_replies.sequences)]
                    .iter()
                    .map(|side| work(side).routing(side))
                    .sum()
            }
        };
        // A run that selects at each step scores each step's own batch: in each pass the whole data.
        let scans = match recipe.selects_each_step() {
            true => passes,
            false if recipe.identify.keeps_first_selection() => 1.0,
            false => rounds,
        };
        let pairs = if safe_prompts.all > 0.0 { forward(&safe_prompts) + forward(&unsafe_prompts) } else { 0.0 };
        Self {
            identify: scans * identification,
            experts: passes * a_pass,
            routers,
            measure: 2.0 * (forward(&unsafe_replies) + forward(&safe_replies) + pairs),
            retain: 0.0,
        }
    }

    /// With the passes of `rows`, the retain rows of the run: as many in each step as it has examples.
    #[must_use]
    pub fn with_retain_rows(self, recipe: &Recipe, model: &ModelConfig, data: &[Record], rows: &[Record]) -> Self {
        let Some(goal) = recipe.retain else { return self };
        let all = Tokens::of_replies(rows.iter().filter_map(|r| r.safe_reply.as_ref()));
        let work = |t: &Tokens| TokenWork::new(model, t.mean_length());
        // The divergence makes the base's logits too.
        let with_base = |t: &Tokens| work(t).forward(t) + t.loss * work(t).head;
        let rounds = recipe.rounds as f64;
        // Outputs of the base model once, then a measurement before the first round and after each.
        let measured = work(&all).forward(&all) + (rounds + 1.0) * with_base(&all);
        let count = |has: fn(&Record) -> bool| data.iter().filter(|r| has(r)).count() as f64;
        let (replies, prompts) = (count(|r| r.unsafe_reply.is_some()), count(|r| r.unsafe_prompt.is_some()));
        let in_training = match &recipe.training {
            Training::Nothing => 0.0,
            Training::Experts(phase) => phase.epochs as f64 * replies,
            Training::Routers(phase) => phase.epochs as f64 * prompts,
            Training::Alternate(experts, routers) => experts.epochs as f64 * replies + routers.epochs as f64 * prompts,
            Training::Joint(phase) => phase.epochs as f64 * replies / (1.0 - phase.safe_ratio),
        };
        let trains = goal.weight > 0.0 || goal.routing_weight > 0.0;
        let trained = all.like(if trains { rounds * in_training } else { 0.0 });
        let retain = measured + with_base(&trained) + work(&trained).backward_inputs(&trained);
        Self { retain, ..self }
    }

    /// The work of all phases.
    pub fn total(&self) -> f64 {
        self.identify + self.experts + self.routers + self.measure + self.retain
    }

    /// The durations in text. `rate`: floating-point operations a second of all ranks together.
    pub fn at(&self, rate: f64) -> impl fmt::Display {
        let Self { identify, experts, routers, measure, retain } = *self;
        let seconds = |work: f64| duration(work / rate);
        let retain = if retain > 0.0 { format!(", retain rows {}", seconds(retain)) } else { String::new() };
        format!(
            "time a rank: {} in all: identification {}, experts {}, routers {}, measuring {}{retain} ({:.2} TFLOP)",
            seconds(self.total()),
            seconds(identify),
            seconds(experts),
            seconds(routers),
            seconds(measure),
            self.total() / 1e12,
        )
    }
}

/// `[rows, width]` times `[width, width]`: the product of the measurement, 1.07 GFLOP.
const PROBE: (usize, usize) = (512, 1024);

/// Operations a second of a dense product over weights of this type, measured in at most a few tenths of a second.
pub fn measure_rate<B: Backend>(backend: &B, dtype: Dtype) -> f64 {
    let (rows, width) = PROBE;
    let x = backend.upload(rows, width, &vec![0.5; rows * width]);
    let bytes = vec![0; width * width * dtype.size()];
    let w = backend.weight(HostTensor { dtype, shape: vec![width, width], bytes: bytes.into() });
    let work = (2 * rows * width * width) as f64;
    let product = || {
        let start = Instant::now();
        drop(backend.download(&backend.linear(&x, &w, None)));
        start.elapsed()
    };
    // The first one also warms up; where it was slow, it is the measurement.
    let mut best = product();
    let mut spent = best;
    while spent < Duration::from_millis(150) {
        let took = product();
        spent += took;
        best = best.min(took);
    }
    work / best.as_secs_f64().max(1e-9)
}

/// The product that [`measure_rate`] measures, in text.
pub fn probe_name() -> String {
    let (rows, width) = PROBE;
    format!("[{rows}, {width}] times [{width}, {width}]")
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
    use crate::backend::{Heads, Rope};
    use crate::config::{Mode, RunConfig};
    use crate::experts::{Method, RandomMatch, Selection};
    use crate::model::{MoeLayers, QkNorm};

    /// allenai/OLMoE-1B-7B-0125-Instruct.
    fn olmoe() -> ModelConfig {
        ModelConfig {
            model_type: "olmoe".into(),
            vocab_size: 50304,
            hidden_size: 2048,
            layers: vec![LayerKind::Moe; 16],
            moe_layers: MoeLayers::of(&[LayerKind::Moe; 16]),
            heads: vec![Heads { queries: 16, keys: 16, dim: 128, window: None }; 16],
            num_experts: 64,
            num_experts_per_tok: 8,
            expert_width: 1024,
            renormalize: false,
            shared_expert_width: None,
            qk_norm: QkNorm::WholeWidth,
            clip_qkv: None,
            qkv_bias: false,
            o_bias: false,
            tie_word_embeddings: false,
            rms_norm_eps: 1e-5,
            rope: Rope { inv_freq: vec![1.0; 64], scale: 1.0 },
            rope_limit: None,
        }
    }

    #[test]
    fn work_of_a_known_model() {
        // By hand, GFLOP a token at 512 tokens with loss on all: linear 2.1517, head 0.2060, attention 0.0336, experts' dW
        // 1.6106. Compared to the second decimal.
        let t = Tokens { all: 1.0, loss: 1.0, sequences: 1.0 / 512.0, squares: 512.0 };
        let work = TokenWork::new(&olmoe(), t.mean_length());
        let close = |found: f64, wanted: f64| assert!((found / 1e9 - wanted).abs() < 0.01, "{found} is not {wanted}e9");
        close(work.forward(&t), 2.39);
        let identification = work.forward(&t) + work.backward_inputs(&t) + work.backward_experts(&t);
        close(identification, 6.44);
        close(work.forward(&t) + work.backward_inputs(&t) + work.backward_experts(&t) / 16.0, 4.93);
    }

    #[test]
    fn a_window_bounds_attention() {
        let mut config = olmoe();
        let whole = TokenWork::new(&config, 4096.0);
        config.heads.iter_mut().for_each(|h| h.window = Some(512));
        let windowed = TokenWork::new(&config, 4096.0);
        assert_eq!(windowed.attention * 4.0, whole.attention, "512 of 2048 positions on average");
        assert_eq!(windowed.linear, whole.linear);
    }

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
            Forecast::new(&recipe, &olmoe(), std::slice::from_ref(&record), 0.0)
        };
        let base = of(|_| ());
        assert!([base.identify, base.experts, base.routers, base.measure].iter().all(|work| *work > 0.0));
        assert_eq!(of(|c| c.skip_router_training = true), Forecast { routers: 0.0, ..base });
        assert_eq!(of(|c| c.finetune_unsafe_experts = false), Forecast { experts: 0.0, ..base });
        assert!(of(|c| c.mode = Mode::Experts).experts > base.experts);
        assert_eq!(of(|c| c.num_rounds = 6).identify, 2.0 * base.identify);
        // Routing counts need no backward; a random selection needs no pass, except with --random-match layer.
        let routing = of(|c| c.method = Method::Routing).identify;
        assert!(0.0 < routing && routing < base.identify, "{routing} of {}", base.identify);
        // It is drawn in the first of three rounds.
        let random = |matching| Forecast { identify: if matching { base.identify / 3.0 } else { 0.0 }, ..base };
        assert_eq!(of(|c| c.method = Method::Random), random(false));
        let matched = of(|c| (c.method, c.random_match) = (Method::Random, RandomMatch::Layer));
        assert_eq!(matched, random(true));
        let per_batch = of(|c| (c.selection, c.expert_epochs_per_round) = (Selection::PerBatch, 2));
        assert_eq!(per_batch.identify, 2.0 * base.identify);
    }

    #[test]
    fn durations_in_text() {
        let cases = [(0.004, "0.00 s"), (9.4, "9.40 s"), (75.2, "75 s"), (200.0, "3 min 20 s"), (9000.0, "2 h 30 min")];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }
}
