//! Selection of the experts to train, by score or at random.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::score::experts_of;
use super::{Error, ExpertId, ExpertScores, Select};

/// The limits of a selection: how many experts, and from which layers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectionLimits {
    /// Number of experts to select.
    pub top_k: usize,
    /// Maximum number of experts per layer (`--experts-per-layer`).
    pub per_layer: Option<usize>,
    /// The decoder layers to select from, inclusive (`--layers`).
    pub layers: Option<RangeInclusive<usize>>,
}

/// How experts are ranked by score.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Ranking {
    /// The end of the ranking that is selected.
    pub select: Select,
    /// Only experts with a score above this qualify (the routing method's `--risk-threshold`).
    pub threshold: Option<f64>,
}

/// The selected experts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Selected {
    /// Best first; for a random selection ordered by (layer, expert).
    pub experts: Vec<ExpertId>,
    /// The requested number of experts. Larger than `experts.len()` if too few qualified under a threshold.
    #[serde(rename = "asked")]
    pub requested: usize,
}

impl Selected {
    /// How many fewer experts were selected than requested.
    pub fn shortfall(&self) -> usize {
        self.requested - self.experts.len()
    }
}

impl SelectionLimits {
    pub(super) fn allows_layer(&self, layer: usize) -> bool {
        self.layers.as_ref().is_none_or(|range| range.contains(&layer))
    }

    /// Maximum number of experts that can be selected, for a model with the MoE layers `layers` of `num_experts`
    /// experts each.
    pub fn available(&self, layers: &[usize], num_experts: usize) -> usize {
        let each = self.per_layer.unwrap_or(num_experts).min(num_experts);
        layers.iter().filter(|l| self.allows_layer(**l)).count() * each
    }

    /// Checks that `top_k` experts can be selected, for a model with the MoE layers `layers` of `num_experts` experts
    /// each.
    ///
    /// # Errors
    /// [`Error::TooMany`], which names the options that limit the selection.
    pub fn check(&self, layers: &[usize], num_experts: usize) -> Result<(), Error> {
        let available = self.available(layers, num_experts);
        if self.top_k <= available {
            return Ok(());
        }
        let mut limit = String::new();
        if let Some(range) = &self.layers {
            limit += &format!("; --layers {}-{} restricts the layers", range.start(), range.end());
        }
        if let Some(cap) = self.per_layer {
            limit += &format!("; --experts-per-layer {cap} limits each layer");
        }
        Err(Error::TooMany { requested: self.top_k, available, layers: layers.len(), num_experts, limit })
    }

    /// The first `top_k` of `candidates` that are in an allowed layer and do not exceed the limit per layer.
    pub(super) fn take(&self, candidates: impl IntoIterator<Item = ExpertId>) -> Vec<ExpertId> {
        let mut taken_of_layer = BTreeMap::<usize, usize>::new();
        let cap = self.per_layer.unwrap_or(usize::MAX);
        let mut is_under_cap = |id: &ExpertId| {
            let taken = taken_of_layer.entry(id.layer).or_default();
            *taken += 1;
            *taken <= cap
        };
        candidates.into_iter().filter(|id| self.allows_layer(id.layer) && is_under_cap(id)).take(self.top_k).collect()
    }
}

/// Selects by score: the `top_k` best experts over all allowed layers together; ties by (layer, expert).
///
/// Under a threshold, fewer may qualify. [`Select::Lowest`] is a control: it selects as many experts as
/// [`Select::Highest`] would, so that the two differ only in the end of the ranking.
///
/// # Errors
/// [`Error::NotFinite`] if a score is NaN or infinite; [`Error::TooMany`] if fewer than `top_k` experts can be
/// selected.
pub fn select(scores: &ExpertScores, limits: &SelectionLimits, ranking: &Ranking) -> Result<Selected, Error> {
    if let Some((id, value)) = scores.iter().find(|(_, value)| !value.is_finite()) {
        return Err(Error::NotFinite { id, value });
    }
    limits.check(&scores.layers, scores.num_experts)?;
    let ranked = scores.ranked();
    let qualifies = |value: f64| ranking.threshold.is_none_or(|threshold| value > threshold);
    let highest = limits.take(ranked.iter().filter(|(_, value)| qualifies(*value)).map(|(id, _)| *id));
    let experts = match ranking.select {
        Select::Highest => highest,
        Select::Lowest => {
            let mut ascending: Vec<_> = scores.iter().collect();
            ascending.sort_by(|(_, a), (_, b)| a.total_cmp(b));
            let limits = SelectionLimits { top_k: highest.len(), ..limits.clone() };
            limits.take(ascending.into_iter().map(|(id, _)| id))
        }
    };
    Ok(Selected { experts, requested: limits.top_k })
}

/// What a random selection takes from the gradient method's selection.
#[derive(Debug, Clone, Copy, Default)]
pub struct RandomDraw<'s> {
    /// Draws as many experts from each layer as this selection has there, in place of `top_k` over all layers.
    pub matched: Option<&'s [ExpertId]>,
    /// Experts that are not drawn.
    pub excluded: &'s [ExpertId],
}

/// Selects `top_k` experts uniformly at random, without replacement. The draw depends only on `seed`, the limits and
/// `draw`.
///
/// # Errors
/// [`Error::TooMany`] if fewer than `top_k` experts can be selected; [`Error::TooFewLeft`] if that is so because of the
/// excluded ones.
pub fn select_random(
    layers: &[usize],
    num_experts: usize,
    limits: &SelectionLimits,
    draw: RandomDraw<'_>,
    seed: u64,
) -> Result<Selected, Error> {
    limits.check(layers, num_experts)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut shuffled = |layers: &[usize]| {
        let mut candidates: Vec<_> = experts_of(layers, num_experts).collect();
        candidates.shuffle(&mut rng);
        candidates.retain(|id| !draw.excluded.contains(id));
        candidates
    };
    let too_few = |requested, available, layer| Err(Error::TooFewLeft { requested, available, layer });
    let mut experts = match draw.matched {
        None => {
            let drawn = limits.take(shuffled(layers));
            if drawn.len() < limits.top_k {
                return too_few(limits.top_k, drawn.len(), None);
            }
            drawn
        }
        Some(matched) => {
            let mut counts = BTreeMap::<usize, usize>::new();
            for id in matched {
                *counts.entry(id.layer).or_default() += 1;
            }
            let mut drawn = Vec::new();
            for (layer, count) in counts {
                let candidates = shuffled(&[layer]);
                if candidates.len() < count {
                    return too_few(count, candidates.len(), Some(layer));
                }
                drawn.extend(candidates.into_iter().take(count));
            }
            drawn
        }
    };
    experts.sort_unstable();
    Ok(Selected { experts, requested: limits.top_k })
}

/// A hash of the selected experts in order, by which ranks check that they selected the same.
pub fn selection_hash(experts: &[ExpertId]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for id in experts {
        hasher.update(&(id.layer as u64).to_le_bytes());
        hasher.update(&(id.expert as u64).to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::exit::Coded;

    fn pool(top_k: usize) -> SelectionLimits {
        SelectionLimits { top_k, per_layer: None, layers: None }
    }

    fn scores() -> ExpertScores {
        // Layer 0: 0.9 0.2 0.9; layer 2: 0.5 0.95 0.1.
        ExpertScores { layers: vec![0, 2], num_experts: 3, values: vec![0.9, 0.2, 0.9, 0.5, 0.95, 0.1] }
    }

    fn ids(selected: &Selected) -> Vec<(usize, usize)> {
        selected.experts.iter().map(|id| (*id).into()).collect()
    }

    fn highest(limits: &SelectionLimits) -> Vec<(usize, usize)> {
        ids(&select(&scores(), limits, &Ranking::default()).unwrap())
    }

    #[test]
    fn the_ranking_is_over_all_layers() {
        assert_eq!(highest(&pool(3)), [(2, 1), (0, 0), (0, 2)]);
        assert_eq!(highest(&pool(0)), []);
    }

    #[test]
    fn caps_and_ranges() {
        assert_eq!(highest(&SelectionLimits { per_layer: Some(1), ..pool(2) }), [(2, 1), (0, 0)]);
        assert_eq!(highest(&SelectionLimits { layers: Some(0..=1), ..pool(2) }), [(0, 0), (0, 2)]);
        assert_eq!(highest(&SelectionLimits { layers: Some(1..=9), per_layer: Some(2), ..pool(2) }), [(2, 1), (2, 0)]);
    }

    #[test]
    fn the_lowest_match_the_number_of_the_highest_above_a_threshold() {
        let threshold = Some(0.9);
        let high = select(&scores(), &pool(4), &Ranking { select: Select::Highest, threshold }).unwrap();
        assert_eq!((ids(&high), high.shortfall()), (vec![(2, 1)], 3), "0.9 is not above 0.9");
        let low = select(&scores(), &pool(4), &Ranking { select: Select::Lowest, threshold }).unwrap();
        assert_eq!(ids(&low), [(2, 2)], "the control has as many experts as the selection");
        let low = select(&scores(), &pool(4), &Ranking { select: Select::Lowest, threshold: None }).unwrap();
        assert_eq!(ids(&low), [(2, 2), (0, 1), (2, 0), (0, 0)]);
    }

    #[test]
    fn too_many_names_the_limits() {
        let pool = SelectionLimits { top_k: 3, per_layer: Some(2), layers: Some(1..=5) };
        let error = select(&scores(), &pool, &Ranking::default()).unwrap_err();
        assert_eq!(error.exit_code(), crate::exit::CONFIG);
        let text = error.to_string();
        for part in [
            "--top-k-experts is 3",
            "2 experts can be selected",
            "2 MoE layers",
            "3 experts each",
            "--layers 1-5",
            "--experts-per-layer 2",
        ] {
            assert!(text.contains(part), "{part} not in: {text}");
        }
        let error = select_random(&[0, 1], 4, &self::pool(9), RandomDraw::default(), 1).unwrap_err();
        assert!(matches!(error, Error::TooMany { requested: 9, available: 8, .. }));
    }

    #[test]
    fn a_nan_score_is_an_error() {
        let mut broken = scores();
        broken.values[4] = f64::NAN;
        let error = select(&broken, &pool(1), &Ranking::default()).unwrap_err();
        assert_eq!(error.exit_code(), crate::exit::NOT_FINITE);
        assert!(error.to_string().contains("expert 1 of layer 2"), "{error}");
    }

    #[test]
    fn random_is_fixed_by_the_seed() {
        let layers: Vec<_> = (0..16).collect();
        let draw = |seed| {
            let drawn = select_random(&layers, 64, &pool(100), RandomDraw::default(), seed).unwrap();
            assert_eq!(drawn.experts.len(), 100);
            assert!(drawn.experts.is_sorted_by(|a, b| a < b), "distinct, in order");
            drawn.experts
        };
        assert_eq!(draw(42), draw(42));
        assert_ne!(draw(42), draw(43));
    }

    #[test]
    fn random_can_match_the_layers() {
        let gradient: Vec<ExpertId> = [(2, 1), (0, 0), (2, 0)].map(Into::into).to_vec();
        let matched = RandomDraw { matched: Some(&gradient), excluded: &[] };
        let draws = (0..50).map(|seed| {
            let drawn = select_random(&[0, 2], 8, &pool(3), matched, seed).unwrap();
            let of = |layer| drawn.experts.iter().filter(|id| id.layer == layer).count();
            assert_eq!((of(0), of(2)), (1, 2));
            drawn.experts
        });
        let all: std::collections::BTreeSet<_> = draws.flatten().collect();
        assert_eq!(all.len(), 16, "by 50 seeds every expert is drawn");
    }

    #[test]
    fn random_can_exclude_experts() {
        let found: Vec<ExpertId> = [(2, 1), (0, 0), (2, 0)].map(Into::into).to_vec();
        let mut drawn = std::collections::BTreeSet::new();
        for seed in 0..50 {
            for matched in [None, Some(&found[..])] {
                let selected =
                    select_random(&[0, 2], 4, &pool(3), RandomDraw { matched, excluded: &found }, seed).unwrap();
                assert_eq!(selected.experts.len(), 3);
                drawn.extend(selected.experts);
            }
        }
        assert_eq!(drawn.len(), 5, "all but the excluded: {drawn:?}");

        let draw = |matched, top_k| {
            select_random(&[0, 2], 3, &pool(top_k), RandomDraw { matched, excluded: &found }, 1).unwrap_err()
        };
        let error = draw(Some(&found[..]), 3);
        assert_eq!(error, Error::TooFewLeft { requested: 2, available: 1, layer: Some(2) });
        assert_eq!(error.exit_code(), crate::exit::CONFIG);
        assert!(
            error.to_string().contains("only 1 experts in layer 2, but the random control draws 2 there"),
            "{error}"
        );
        assert_eq!(draw(None, 4), Error::TooFewLeft { requested: 4, available: 3, layer: None });
    }

    #[test]
    fn the_hash_depends_on_order_and_identity() {
        let a: Vec<ExpertId> = vec![(1, 2).into(), (3, 4).into()];
        let b: Vec<ExpertId> = vec![(3, 4).into(), (1, 2).into()];
        let c: Vec<ExpertId> = vec![(1, 2).into(), (4, 3).into()];
        assert_eq!(selection_hash(&a), selection_hash(&a.clone()));
        assert_ne!(selection_hash(&a), selection_hash(&b));
        assert_ne!(selection_hash(&a), selection_hash(&c));
    }

    proptest! {
        #[test]
        fn selections_hold_the_best(
            values in proptest::collection::vec(0u8..20, 24),
            top_k in 0usize..=12,
            cap in proptest::option::of(3usize..=6),
        ) {
            let scores = ExpertScores {
                layers: vec![1, 2, 5, 9],
                num_experts: 6,
                values: values.iter().map(|v| f64::from(*v)).collect(),
            };
            let pool = SelectionLimits { per_layer: cap, ..pool(top_k) };
            let chosen = select(&scores, &pool, &Ranking::default()).unwrap().experts;
            prop_assert_eq!(chosen.len(), top_k);
            let key = |id: &ExpertId| (-scores.get(*id).unwrap() as i64, *id);
            prop_assert!(chosen.is_sorted_by_key(key));
            let worst = chosen.last().map(key);
            for (id, _) in scores.iter().filter(|(id, _)| !chosen.contains(id)) {
                let in_layer = chosen.iter().filter(|c| c.layer == id.layer).count();
                // An expert that was not selected is worse than all selected ones, or its layer is full.
                prop_assert!(worst.is_none_or(|worst| key(&id) > worst) || cap == Some(in_layer));
            }
        }
    }
}
