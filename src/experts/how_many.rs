//! How many experts the scores themselves single out.

use serde::{Deserialize, Serialize};

use super::{ExpertScores, Selected, SelectionLimits};

/// The smallest drop between two neighbours of a ranking that names a number of experts. On ten small models with planted experts,
/// the largest drop was 2.4 to 6.9 in nine and 1.48 in one; in a model without planted experts it was 1.26.
const CLEAR_DROP: f64 = 1.5;
/// The share of resamples above which an expert's selection is stable.
pub const STABLE: f64 = 0.9;

/// How the scores fall over the ranking, and which number of experts that suggests.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct HowMany {
    /// The share of the total score that the selected experts have; `None` where scores can be negative or all are 0.
    pub share: Option<f64>,
    /// The share if all experts had the same score.
    pub share_of_equal_scores: f64,
    /// The largest drop of the ranking; `None` where scores can be negative, or too few are above 0.
    pub largest_drop: Option<Drop>,
    /// How many of the ranking's first experts were selected in at least 90 % of the bootstrap resamples; `None` without a
    /// bootstrap.
    pub stable: Option<usize>,
    /// The suggested `--top-k-experts`: the place of the largest drop if that is clear.
    pub suggested: Option<usize>,
}

/// A drop between two neighbours of the ranking.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Drop {
    /// The number of experts before it, k.
    pub after: usize,
    /// `s[k] / s[k+1]`
    pub ratio: f64,
}

impl HowMany {
    /// Of the ranking within the layers of `limits`. The drop is looked for at 2 ≤ k ≤ n/4, n the number of experts there.
    /// `inclusion`: see [`super::Bootstrap::inclusion`].
    pub fn of(scores: &ExpertScores, selected: &Selected, limits: &SelectionLimits, inclusion: Option<&[f64]>) -> Self {
        let mut ranked = scores.ranked();
        ranked.retain(|(id, _)| limits.allows_layer(id.layer));
        let never_negative = scores.values.iter().all(|value| *value >= 0.0);
        let total: f64 = ranked.iter().map(|(_, value)| value).sum();
        let of_selected: f64 = selected.experts.iter().filter_map(|id| scores.get(*id)).sum();
        let places = 2..=ranked.len() / 4;
        let drops = places.filter(|k| ranked.get(*k).is_some_and(|(_, next)| *next > 0.0)).map(|after| {
            let [(_, last), (_, next)] = [ranked[after - 1], ranked[after]];
            Drop { after, ratio: last / next }
        });
        // The first of equal drops.
        let largest = drops.fold(None, |best: Option<Drop>, drop| match best {
            Some(best) if best.ratio >= drop.ratio => Some(best),
            _ => Some(drop),
        });
        let largest_drop = largest.filter(|_| never_negative);
        let share_in = |values: &[f64], id| {
            let like =
                ExpertScores { layers: scores.layers.clone(), num_experts: scores.num_experts, values: values.into() };
            like.get(id)
        };
        let stable = inclusion.map(|inclusion| {
            let shares: Vec<_> = ranked.iter().map(|(id, _)| share_in(inclusion, *id).unwrap_or_default()).collect();
            shares.iter().take_while(|share| **share >= STABLE).count()
        });
        Self {
            share: (never_negative && total > 0.0).then(|| of_selected / total),
            share_of_equal_scores: selected.experts.len() as f64 / ranked.len().max(1) as f64,
            largest_drop,
            stable,
            suggested: largest_drop.filter(|drop| drop.ratio >= CLEAR_DROP).map(|drop| drop.after),
        }
    }

    /// The numbers with their reasons, one a line.
    pub fn describe(&self) -> String {
        let mut lines = Vec::new();
        if let Some(share) = self.share {
            lines.push(format!(
                "the selected experts have {share:.3} of the total score (equal scores would give {:.3})",
                self.share_of_equal_scores
            ));
        }
        if let Some(Drop { after, ratio }) = self.largest_drop {
            lines.push(match self.suggested {
                Some(k) => format!(
                    "the largest drop of the scores, by a factor of {ratio:.2}, is after {after} experts: it suggests \
                     --top-k-experts {k}"
                ),
                None => format!(
                    "no clear drop: the largest, after {after} experts, is by a factor of {ratio:.2}, less than {CLEAR_DROP}; \
                     the scores name no natural number of experts"
                ),
            });
        }
        if let Some(stable) = self.stable {
            let first = match stable {
                0 => "not even the first expert of the ranking is".to_owned(),
                1 => "only the first expert of the ranking is".to_owned(),
                n => format!("the first {n} experts of the ranking are"),
            };
            lines.push(format!("{first} selected in at least {:.0} % of the bootstrap resamples", 100.0 * STABLE));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(layers: Option<std::ops::RangeInclusive<usize>>) -> SelectionLimits {
        SelectionLimits { top_k: 3, per_layer: None, layers }
    }

    /// Two layers of eight experts with these highest scores, in order, and 1 for all others.
    fn scores(highest: &[f64]) -> ExpertScores {
        let mut values = highest.to_vec();
        values.resize(16, 1.0);
        ExpertScores { layers: vec![0, 2], num_experts: 8, values }
    }

    fn first(n: usize) -> Selected {
        Selected { experts: (0..n).map(|e| (0, e).into()).collect(), requested: n }
    }

    #[test]
    fn a_clear_drop_suggests_its_place() {
        let scores = scores(&[9.0, 8.0, 6.0]);
        let found = HowMany::of(&scores, &first(3), &limits(None), None);
        assert_eq!(found.share, Some(23.0 / 36.0));
        assert_eq!(found.share_of_equal_scores, 3.0 / 16.0);
        assert_eq!(found.largest_drop, Some(Drop { after: 3, ratio: 6.0 }));
        assert_eq!((found.suggested, found.stable), (Some(3), None));
        assert!(found.describe().contains("0.639 of the total score (equal scores would give 0.188)"));
        assert!(found.describe().contains("by a factor of 6.00, is after 3 experts: it suggests --top-k-experts 3"));
        let of_last_layer = HowMany::of(&scores, &first(0), &limits(Some(2..=2)), None);
        assert_eq!(of_last_layer.largest_drop, Some(Drop { after: 2, ratio: 1.0 }), "the first of equal drops");
    }

    #[test]
    fn no_clear_drop_is_said() {
        // After one expert there is a drop by 9, but a single expert is not looked for.
        let found = HowMany::of(&scores(&[13.0, 1.45, 1.45, 1.45]), &first(3), &limits(None), None);
        assert_eq!(found.largest_drop, Some(Drop { after: 4, ratio: 1.45 }));
        assert_eq!(found.suggested, None);
        assert!(found.describe().contains("no clear drop") && found.describe().contains("no natural number"));
        // Neither is one beyond a quarter of all experts.
        assert_eq!(HowMany::of(&scores(&[9.0; 5]), &first(3), &limits(None), None).suggested, None);
    }

    #[test]
    fn stable_experts_are_counted_from_the_top() {
        let mut inclusion = vec![0.0; 16];
        inclusion[..5].copy_from_slice(&[1.0, 0.9, 0.89, 1.0, 0.2]);
        let found = HowMany::of(&scores(&[9.0, 8.0, 6.0, 5.0]), &first(4), &limits(None), Some(&inclusion));
        assert_eq!(found.stable, Some(2));
        assert!(found.describe().contains("the first 2 experts of the ranking are selected in at least 90 %"));
    }

    #[test]
    fn differences_have_no_share_and_no_drop() {
        let mut scores = scores(&[9.0, 8.0, 6.0]);
        scores.values[15] = -0.5;
        let found = HowMany::of(&scores, &first(3), &limits(None), None);
        assert_eq!((found.share, found.largest_drop, found.suggested), (None, None, None));
        let zeros = ExpertScores { layers: vec![0], num_experts: 8, values: vec![0.0; 8] };
        let found = HowMany::of(&zeros, &first(1), &limits(None), None);
        assert_eq!((found.share, found.largest_drop), (None, None));
        assert_eq!(found.describe(), "");
    }
}
