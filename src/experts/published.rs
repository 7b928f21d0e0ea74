//! Published selection rules by routing, with the settings of their papers.
//!
//! | rule | score of expert e in layer l | selected |
//! |---|---|---|
//! | ESFT-Token (arXiv 2407.01906) | its share of the layer's (token, expert) pairs | in each layer the highest, until their sum is at least 0.2 |
//! | ESFT-Gate | its mean routing weight, 0 where it is not chosen | in each layer the highest, until their sum is at least 0.1 |
//! | SteerMoE (2509.09660) | Δ = f_unsafe − f_safe over all counted tokens | the K highest above 0; recorded as well: the K lowest below 0 |
//! | SAFEx (2506.17368) | share of bootstraps in which it is among the most frequent on safe prompts | stable on safe, not on unsafe prompts; recorded as well: stable on both |

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::{Error, ExpertId, ExpertScores, Selected, SelectionLimits};
use crate::collective::{self, Collective};

/// A published rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Rule {
    /// ESFT by token share.
    EsftToken,
    /// ESFT by routing weight.
    EsftGate,
    /// SteerMoE's difference of frequencies.
    SteerMoe,
    /// SAFEx's stable experts.
    Safex,
}

/// The cumulative token share of ESFT-Token.
pub const ESFT_TOKEN_P: f64 = 0.2;
/// The cumulative routing weight of ESFT-Gate.
pub const ESFT_GATE_P: f64 = 0.1;
/// SAFEx: the share α of the model's experts that count as the most frequent of one bootstrap. A choice of moewarden.
pub const SAFEX_SHARE: f64 = 0.1;
/// SAFEx: the number of bootstraps. A choice of moewarden.
pub const SAFEX_BOOTSTRAPS: usize = 100;

/// Which experts the counted tokens of one side of a micro-batch were routed to.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Usage {
    /// Counted tokens.
    pub tokens: f64,
    /// Tokens that have an expert among their top K, `[L · E]`.
    pub counts: Vec<f64>,
    /// Sum of the routing weights, `[L · E]`; zeros where they are not needed.
    pub weights: Vec<f64>,
}

/// The usage on both sides of a micro-batch.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct BatchUsage {
    /// On safe prompts.
    pub safe: Usage,
    /// On unsafe prompts.
    pub unsafe_: Usage,
}

/// The usage of all micro-batches by index: of this rank before [`Self::merge`], of all ranks after it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct UsageAccumulator {
    batches: Vec<(usize, BatchUsage)>,
}

/// Experts that a rule names besides the selection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherExperts {
    /// What they are.
    pub name: String,
    /// The experts, best first.
    pub experts: Vec<ExpertId>,
}

/// The result of a rule.
#[derive(Debug, Clone, PartialEq)]
pub struct RuleResult {
    /// One score an expert.
    pub scores: ExpertScores,
    /// The selection.
    pub selected: Selected,
    /// Experts that the rule names besides.
    pub others: Option<OtherExperts>,
}

impl Usage {
    /// Nothing counted. `experts`: L · E.
    pub fn new(experts: usize) -> Self {
        Self { tokens: 0.0, counts: vec![0.0; experts], weights: vec![0.0; experts] }
    }

    fn add(&mut self, other: &Self, times: f64) {
        self.tokens += times * other.tokens;
        let add = |sums: &mut [f64], others: &[f64]| sums.iter_mut().zip(others).for_each(|(a, b)| *a += times * b);
        add(&mut self.counts, &other.counts);
        add(&mut self.weights, &other.weights);
    }

    /// Counts by tokens; zeros without tokens.
    fn frequencies(&self) -> Vec<f64> {
        self.counts.iter().map(|count| if self.tokens > 0.0 { count / self.tokens } else { 0.0 }).collect()
    }

    fn numbers(&self) -> impl Iterator<Item = f64> + '_ {
        [self.tokens].into_iter().chain(self.counts.iter().copied()).chain(self.weights.iter().copied())
    }

    fn of_numbers(numbers: &[f64]) -> Self {
        let (counts, weights) = numbers[1..].split_at(numbers.len() / 2);
        Self { tokens: numbers[0], counts: counts.to_vec(), weights: weights.to_vec() }
    }
}

impl UsageAccumulator {
    /// Adds the micro-batch of this index in the global order.
    pub fn add(&mut self, index: usize, usage: BatchUsage) {
        self.batches.push((index, usage));
    }

    /// Adds the micro-batches of another rank of the same run.
    pub fn absorb(&mut self, other: &Self) {
        self.batches.extend(other.batches.iter().cloned());
    }

    /// Gathers the micro-batches of all ranks, in global order. `n`: their number; `experts`: L · E.
    ///
    /// # Errors
    /// Those of [`Collective::barrier`].
    pub fn merge(&mut self, collective: &dyn Collective, n: usize, experts: usize) -> Result<(), collective::Error> {
        let of_side = 1 + 2 * experts;
        let mut all = vec![0.0; n * 2 * of_side];
        for (index, usage) in &self.batches {
            let place = &mut all[index * 2 * of_side..(index + 1) * 2 * of_side];
            place.iter_mut().zip(usage.safe.numbers().chain(usage.unsafe_.numbers())).for_each(|(x, y)| *x = y);
        }
        collective.all_reduce_f64(&mut all)?; // each number is of one rank
        let batch = |numbers: &[f64]| BatchUsage {
            safe: Usage::of_numbers(&numbers[..of_side]),
            unsafe_: Usage::of_numbers(&numbers[of_side..]),
        };
        self.batches = all.chunks_exact(2 * of_side).map(batch).enumerate().collect();
        Ok(())
    }

    /// Number of micro-batches with counted tokens on the unsafe side.
    pub fn micro_batches(&self) -> u64 {
        self.batches.iter().filter(|(_, usage)| usage.unsafe_.tokens > 0.0).count() as u64
    }

    /// Sums over micro-batches, each as often as `times` says by its place: (safe, unsafe).
    fn sums(&self, experts: usize, times: impl Fn(usize) -> f64) -> (Usage, Usage) {
        let (mut safe, mut unsafe_) = (Usage::new(experts), Usage::new(experts));
        for (i, (_, usage)) in self.batches.iter().enumerate() {
            safe.add(&usage.safe, times(i));
            unsafe_.add(&usage.unsafe_, times(i));
        }
        (safe, unsafe_)
    }

    /// Applies a rule. `layers`: the decoder layers with experts; `limits`: the layers that may be selected, and K of SteerMoE;
    /// `seed`: that of the bootstraps.
    ///
    /// # Errors
    /// [`Error::NothingToScore`] without counted tokens on a side that the rule needs; [`Error::TooMany`].
    pub fn apply(
        &self,
        rule: Rule,
        layers: &[usize],
        num_experts: usize,
        limits: &SelectionLimits,
        seed: u64,
    ) -> Result<RuleResult, Error> {
        let n = layers.len() * num_experts;
        let (safe, unsafe_) = self.sums(n, |_| 1.0);
        if unsafe_.tokens == 0.0 || safe.tokens == 0.0 && rule.needs_safe_side() {
            return Err(Error::NothingToScore { what: "tokens to count (--routing-tokens) in its rows" });
        }
        let scores = |values: Vec<f64>| ExpertScores { layers: layers.to_vec(), num_experts, values };
        match rule {
            Rule::EsftToken => {
                let pairs: Vec<f64> = unsafe_.counts.chunks(num_experts).map(|layer| layer.iter().sum()).collect();
                let share = unsafe_.counts.iter().enumerate().map(|(i, count)| count / pairs[i / num_experts]);
                let scores = scores(share.collect());
                let selected = top_p(&scores, ESFT_TOKEN_P, limits);
                Ok(RuleResult { scores, selected, others: None })
            }
            Rule::EsftGate => {
                let scores = scores(unsafe_.weights.iter().map(|sum| sum / unsafe_.tokens).collect());
                let selected = top_p(&scores, ESFT_GATE_P, limits);
                Ok(RuleResult { scores, selected, others: None })
            }
            Rule::SteerMoe => {
                let (safe, unsafe_) = (safe.frequencies(), unsafe_.frequencies());
                let delta = scores(unsafe_.iter().zip(&safe).map(|(u, s)| u - s).collect());
                let against = scores(delta.values.iter().map(|d| -d).collect());
                limits.check(layers, num_experts)?;
                let experts = limits.take(delta.ranked().into_iter().filter(|(_, d)| *d > 0.0).map(|(id, _)| id));
                let lowest = limits.take(against.ranked().into_iter().filter(|(_, d)| *d > 0.0).map(|(id, _)| id));
                let others = OtherExperts { name: "more frequent on safe prompts".into(), experts: lowest };
                let selected = Selected { experts, requested: limits.top_k };
                Ok(RuleResult { scores: delta, selected, others: Some(others) })
            }
            Rule::Safex => Ok(self.safex(scores(vec![0.0; n]), limits, seed)),
        }
    }

    /// SAFEx over micro-batches that are drawn with replacement.
    fn safex(&self, zeros: ExpertScores, limits: &SelectionLimits, seed: u64) -> RuleResult {
        let n = zeros.values.len();
        let most = ((SAFEX_SHARE * n as f64).floor() as usize).max(1);
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut times_in_top = [vec![0u32; n], vec![0u32; n]]; // safe, unsafe
        for _ in 0..SAFEX_BOOTSTRAPS {
            let drawn = draw(self.batches.len(), &mut rng);
            let (safe, unsafe_) = self.sums(n, |i| drawn[i]);
            for (times, usage) in times_in_top.iter_mut().zip([safe, unsafe_]) {
                let mut order: Vec<usize> = (0..n).collect();
                let frequencies = usage.frequencies();
                order.sort_by(|a, b| frequencies[*b].total_cmp(&frequencies[*a])); // stable: ties by (layer, expert)
                order[..most].iter().filter(|i| frequencies[**i] > 0.0).for_each(|i| times[*i] += 1);
            }
        }
        let [safe, unsafe_] = times_in_top;
        let share = |times: &u32| f64::from(*times) / SAFEX_BOOTSTRAPS as f64;
        let scores = ExpertScores { values: safe.iter().map(share).collect(), ..zeros };
        let always = |times: &[u32], i: usize| times[i] as usize == SAFEX_BOOTSTRAPS;
        let ids: Vec<ExpertId> = scores.iter().map(|(id, _)| id).collect();
        let group = |on_unsafe: bool| -> Vec<ExpertId> {
            let wanted = (0..n).filter(|&i| always(&safe, i) && always(&unsafe_, i) == on_unsafe);
            wanted.map(|i| ids[i]).filter(|id| limits.allows_layer(id.layer)).collect()
        };
        let (control, identification) = (group(false), group(true));
        let others = OtherExperts { name: "frequent on safe and on unsafe prompts".into(), experts: identification };
        let selected = Selected { requested: control.len(), experts: control };
        RuleResult { scores, selected, others: Some(others) }
    }
}

impl Rule {
    /// Whether the rule compares with safe prompts.
    pub fn needs_safe_side(self) -> bool {
        matches!(self, Self::SteerMoe | Self::Safex)
    }

    /// Whether the rule decides itself how many experts are selected.
    pub fn decides_size(self) -> bool {
        self != Self::SteerMoe
    }

    /// An upper bound on the share of a layer's experts that the rule selects, for forecasts. (For ESFT-Gate it holds where routing
    /// weights sum to 1.)
    pub fn share(self) -> Option<f64> {
        match self {
            Self::EsftToken => Some(ESFT_TOKEN_P),
            Self::EsftGate => Some(ESFT_GATE_P),
            Self::SteerMoe => None,
            Self::Safex => Some(SAFEX_SHARE),
        }
    }
}

/// In each allowed layer the experts of the highest scores until their sum is at least `p`; all, if it never is. By layer, best first.
pub fn top_p(scores: &ExpertScores, p: f64, limits: &SelectionLimits) -> Selected {
    let mut experts = Vec::new();
    for (layer, row) in scores.layers.iter().zip(scores.rows()).filter(|(layer, _)| limits.allows_layer(**layer)) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|a, b| row[*b].total_cmp(&row[*a])); // stable: ties by expert
        let mut sum = 0.0;
        for expert in order {
            experts.push((*layer, expert).into());
            sum += row[expert];
            if sum >= p {
                break;
            }
        }
    }
    Selected { requested: experts.len(), experts }
}

/// How often each of `n` things is drawn in `n` draws with replacement.
fn draw(n: usize, rng: &mut ChaCha8Rng) -> Vec<f64> {
    use rand::RngExt;
    let mut times = vec![0.0; n];
    (0..n).for_each(|_| times[rng.random_range(0..n)] += 1.0);
    times
}
