//! From a scoring pass to the selected experts.

use serde::{Deserialize, Serialize};

use super::expert_load::ExpertLoads;
use super::recipe::{Identify, ScoreBy};
use super::replica::Replica;
use super::scan::{Scan, Scores};
use crate::backend::Backend;
use crate::collective::all_agree;
use crate::data::Sampler;
use crate::exit::Result;
use crate::experts::{
    self, ExpertId, ExpertScores, HowMany, OtherExperts, RandomDraw, RandomMatch, Ranking, ReplyCounts, ScoreNorm,
    Selected, selection_hash,
};

/// What an identification found; the same on all ranks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Identification {
    /// The scores by the chosen method; zeros for a random selection.
    pub scores: ExpertScores,
    /// The experts to train.
    pub selected: Selected,
    /// Micro-batches (or pairs of a safe and an unsafe batch) that counted.
    pub micro_batches: u64,
    /// Mean cross-entropy of each micro-batch in global order, where the method computes one; without those that have no
    /// tokens with loss.
    pub losses: Vec<f64>,
    /// Tokens of the same micro-batches.
    pub tokens: Vec<usize>,
    /// The earlier round (from 1) whose selection this is, if it was kept.
    #[serde(default)]
    pub kept_from: Option<usize>,
    /// The gradient method's selection by [`Self::scores`], which a random selection matches or excludes.
    #[serde(default)]
    pub gradient_selection: Option<Vec<ExpertId>>,
    /// The share of bootstrap resamples in which each expert is selected, `[L · E]`.
    #[serde(default)]
    pub inclusion: Option<Vec<f64>>,
    /// How many experts the scores single out, where they decide the selection.
    #[serde(default)]
    pub how_many: Option<HowMany>,
    /// How many of the model's own replies comply, where they were asked for.
    #[serde(default)]
    pub replies: Option<ReplyCounts>,
    /// Experts that a published rule names besides the selection.
    #[serde(default)]
    pub others: Option<OtherExperts>,
    /// Tokens of each expert in the scoring passes, where the method computes losses.
    #[serde(default)]
    pub loads: ExpertLoads,
    /// A remark for the user.
    #[serde(skip)]
    pub warning: Option<String>,
}

impl Identification {
    /// The mean losses of the first round's scan and of this one, if the latter is below `until` times the former.
    pub fn has_learned(&self, first: &[f64], until: f64) -> Option<[f64; 2]> {
        let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
        let both = [mean(first), mean(&self.losses)];
        (both[1] < until * both[0]).then_some(both) // no losses: NaN, and no
    }

    /// The selection of an earlier round (from 1), kept without scoring anything; the scores are zeros.
    pub fn kept<B: Backend>(replica: &Replica<B>, experts: Vec<ExpertId>, from: usize) -> Self {
        let (layers, num_experts) = (replica.moe_layers().layers.clone(), replica.model().config.num_experts);
        let selected = Selected { requested: experts.len(), experts };
        Self { kept_from: Some(from), ..Self::bare(ExpertScores::zeros(layers, num_experts), selected) }
    }

    /// Scores and a selection, and nothing else.
    fn bare(scores: ExpertScores, selected: Selected) -> Self {
        Self {
            scores,
            selected,
            micro_batches: 0,
            losses: Vec::new(),
            tokens: Vec::new(),
            kept_from: None,
            gradient_selection: None,
            inclusion: None,
            how_many: None,
            replies: None,
            others: None,
            loads: ExpertLoads::default(),
            warning: None,
        }
    }
}

/// Scores these micro-batches without a pause, and selects.
///
/// # Errors
/// A loss that is not finite ([`super::NonFinite`], on all ranks); a selection that is not possible; ranks that differ.
pub fn find<B: Backend>(
    replica: &Replica<B>,
    identify: &Identify,
    sampler: Sampler<'_>,
    micro_batches: Vec<Vec<usize>>,
) -> Result<Identification> {
    let mut scan = Scan::new(replica, identify, sampler, micro_batches)?;
    while let Some(own) = scan.last_interval(replica) {
        for index in own {
            scan.add(replica, index)?;
        }
    }
    select(replica, identify, scan.finish(replica)?)
}

/// Selects experts by these scores; all ranks verify that they select the same ones.
///
/// # Errors
/// Scores that are not finite; fewer experts than requested; ranks whose selections differ.
pub fn select<B: Backend>(replica: &Replica<B>, identify: &Identify, scored: Scores) -> Result<Identification> {
    let layers = &replica.moe_layers().layers;
    let num_experts = replica.model().config.num_experts;
    let limits = identify.limits_for(layers, num_experts);
    let ranking = Ranking { select: identify.select, threshold: identify.threshold() };
    let Scores { mut scores, mut micro_batches, mut losses, mut tokens, mut loads, bootstrap, usage, warning } = scored;
    let mut gradient_selection = None;
    let mut others = None;
    let selected = match identify.by {
        ScoreBy::Gradient(_) | ScoreBy::Routing { .. } => experts::select(&scores, &limits, &ranking)?,
        ScoreBy::Random { gradient, matching, exclude_found } => {
            let found = gradient.map(|_| experts::select(&scores, &limits, &ranking)).transpose()?.map(|s| s.experts);
            // The scores served to match the layers or to exclude experts; they did not decide which ones are drawn.
            (micro_batches, losses, tokens, loads) = (0, Vec::new(), Vec::new(), ExpertLoads::default());
            let draw = RandomDraw {
                matched: found.as_deref().filter(|_| matching == RandomMatch::Layer),
                excluded: found.as_deref().filter(|_| exclude_found).unwrap_or_default(),
            };
            let drawn = experts::select_random(layers, num_experts, &limits, draw, identify.seed)?;
            gradient_selection = found;
            drawn
        }
        ScoreBy::Published { rule, .. } => {
            let usage = usage.expect("the scan of a published rule counts usage");
            let found = usage.apply(rule, layers, num_experts, &limits, identify.seed)?;
            (scores, others) = (found.scores, found.others);
            found.selected
        }
        ScoreBy::Given => Selected { experts: identify.given.clone(), requested: identify.given.len() },
    };
    all_agree(&*replica.world, "selection of experts", &selection_hash(&selected.experts))?;
    let norm = match identify.by {
        ScoreBy::Gradient(score) => score.norm,
        _ => ScoreNorm::None,
    };
    let resampled = bootstrap.map(|bootstrap| {
        bootstrap.inclusion(&scores, |resample| experts::select(&norm.apply(resample), &limits, &ranking))
    });
    let inclusion = resampled.transpose()?;
    let by_scores = matches!(identify.by, ScoreBy::Gradient(_) | ScoreBy::Routing { .. });
    let how_many = by_scores.then(|| HowMany::of(&scores, &selected, &limits, inclusion.as_deref()));
    Ok(Identification {
        scores,
        selected,
        micro_batches,
        losses,
        tokens,
        kept_from: None,
        gradient_selection,
        inclusion,
        how_many,
        replies: None,
        others,
        loads,
        warning,
    })
}

/// The selections of a round that selects at each step: mean scores over all micro-batches, and every expert that was
/// selected at some step, the most often selected first.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct StepSelections {
    sum: Option<Identification>,
    /// How often each expert was selected, ascending by expert.
    times: Vec<(ExpertId, usize)>,
}

impl StepSelections {
    /// Adds the selection of one step.
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
                sum.loads.add(&found.loads);
            }
        }
    }

    /// The result for the round; `None` if no step selected.
    pub fn finish(&self) -> Option<Identification> {
        let mut found = self.sum.clone()?;
        let batches = found.micro_batches as f64;
        found.scores.values.iter_mut().for_each(|s| *s /= batches);
        let mut times = self.times.clone();
        times.sort_by_key(|(id, times)| (std::cmp::Reverse(*times), *id));
        let experts: Vec<_> = times.into_iter().map(|(id, _)| id).collect();
        found.selected = Selected { requested: experts.len(), experts };
        Some(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_scan_below_the_share_of_the_first_loss_has_learned() {
        let found = |losses: &[f64]| Identification {
            micro_batches: losses.len() as u64,
            losses: losses.to_vec(),
            ..Identification::bare(ExpertScores::zeros(vec![0], 1), Selected { experts: vec![], requested: 0 })
        };
        let first = [3.0, 5.0];
        assert_eq!(found(&[0.25, 0.5]).has_learned(&first, 0.1), Some([4.0, 0.375]));
        assert_eq!(found(&[0.4]).has_learned(&first, 0.1), None, "not below");
        assert_eq!(found(&[0.0]).has_learned(&first, 0.0), None, "0 turns it off");
        assert_eq!(found(&[]).has_learned(&[], 0.1), None, "a method without losses");
    }
}
