//! Random sets of experts that are matched to a selection by layer and by load.

use std::collections::BTreeSet;

use clap::ValueEnum;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::experts::{ExpertId, ExpertScores};

/// What random sets have in common with the selection, besides their size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Matching {
    /// Each expert is replaced by one of its layer with a similar number of tokens.
    #[default]
    LayerLoad,
    /// Each expert is replaced by one of its layer.
    Layer,
    /// Nothing.
    None,
}

/// Draws random sets in place of a selection.
#[derive(Debug)]
pub struct RandomSets<'a> {
    /// The selection.
    pub selected: &'a BTreeSet<ExpertId>,
    /// Tokens routed to each expert.
    pub loads: &'a ExpertScores,
    /// What the sets have in common with the selection.
    pub matching: Matching,
    /// Experts that each layer must have left.
    pub left: usize,
    /// The seed.
    pub seed: u64,
}

/// No set of the wanted size leaves each layer enough experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no random set of {size} experts was found that leaves each layer {left} experts")]
pub struct NoRandomSet {
    size: usize,
    left: usize,
}

/// At least this many candidates, and at least a quarter of them, are near in load.
const NEAREST: usize = 12;
/// Draws of a set of any experts until one leaves each layer enough.
const TRIES: usize = 10_000;

impl RandomSets<'_> {
    /// Set number `index`. It depends on the seed, the index, the selection, and (with [`Matching::LayerLoad`]) the loads.
    ///
    /// # Errors
    /// [`NoRandomSet`], only with [`Matching::None`].
    pub fn draw(&self, index: usize) -> Result<BTreeSet<ExpertId>, NoRandomSet> {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(index as u64);
        if self.matching != Matching::None {
            let mut set = BTreeSet::new();
            for &replaced in self.selected {
                let candidates = self.candidates(replaced, &set);
                set.insert(candidates[rng.random_range(0..candidates.len())]);
            }
            return Ok(set);
        }
        for _ in 0..TRIES {
            let set = self.any(&mut rng);
            if self.leaves_enough(&set) {
                return Ok(set);
            }
        }
        Err(NoRandomSet { size: self.selected.len(), left: self.left })
    }

    /// The experts by which `replaced` may be replaced in a set that holds `taken` already.
    fn candidates(&self, replaced: ExpertId, taken: &BTreeSet<ExpertId>) -> Vec<ExpertId> {
        let free = |expert| {
            let id = ExpertId { layer: replaced.layer, expert };
            (!taken.contains(&id)).then_some(id)
        };
        let free: Vec<ExpertId> = (0..self.loads.num_experts).filter_map(free).collect();
        let (inside, mut candidates): (Vec<_>, Vec<_>) = free.into_iter().partition(|id| self.selected.contains(id));
        if candidates.is_empty() {
            candidates = inside;
        }
        if self.matching == Matching::LayerLoad {
            let load = |id: ExpertId| self.loads.get(id).unwrap_or_default() + 1.0;
            let distance = |id: ExpertId| (load(id) / load(replaced)).ln().abs();
            candidates.sort_by(|a, b| distance(*a).total_cmp(&distance(*b))); // stable: ties by number
            candidates.truncate(NEAREST.max(candidates.len().div_ceil(4)));
        }
        candidates
    }

    /// A set of any experts, of those outside the selection where they suffice.
    fn any(&self, rng: &mut ChaCha8Rng) -> BTreeSet<ExpertId> {
        let all = self.loads.iter().map(|(id, _)| id);
        let (inside, outside): (Vec<_>, Vec<_>) = all.partition(|id| self.selected.contains(id));
        let mut set = BTreeSet::new();
        for mut pool in [outside, inside] {
            while set.len() < self.selected.len() && !pool.is_empty() {
                set.insert(pool.swap_remove(rng.random_range(0..pool.len())));
            }
        }
        set
    }

    fn leaves_enough(&self, set: &BTreeSet<ExpertId>) -> bool {
        let of_layer = |layer: &usize| set.iter().filter(|id| id.layer == *layer).count();
        self.loads.layers.iter().all(|layer| of_layer(layer) + self.left <= self.loads.num_experts)
    }
}

#[cfg(test)]
mod tests {
    use super::super::statistics::permutation_p;
    use super::super::statistics::tests::ks_p;
    use super::*;

    fn loads(layers: usize, experts: usize) -> ExpertScores {
        let values = (0..layers * experts).map(|i| (10 * (i % experts)) as f64).collect();
        ExpertScores { layers: (0..layers).collect(), num_experts: experts, values }
    }

    fn set(experts: &[(usize, usize)]) -> BTreeSet<ExpertId> {
        experts.iter().map(|&id| id.into()).collect()
    }

    fn per_layer(set: &BTreeSet<ExpertId>) -> Vec<usize> {
        set.iter().map(|id| id.layer).collect()
    }

    #[test]
    fn sets_have_the_size_and_layers_of_the_selection_and_none_of_its_experts() {
        let (selected, loads) = (set(&[(0, 3), (2, 0), (2, 7)]), loads(3, 8));
        for matching in [Matching::LayerLoad, Matching::Layer, Matching::None] {
            let sets = RandomSets { selected: &selected, loads: &loads, matching, left: 2, seed: 1 };
            let drawn: Vec<_> = (0..200).map(|i| sets.draw(i).unwrap()).collect();
            assert!(drawn.iter().all(|s| s.len() == 3 && s.is_disjoint(&selected)), "{matching:?}");
            let layers_fit = drawn.iter().all(|s| per_layer(s) == [0, 2, 2]);
            assert_eq!(layers_fit, matching != Matching::None, "{matching:?}");
            assert!(drawn.iter().collect::<BTreeSet<_>>().len() > 40, "{matching:?}");
            assert_eq!(drawn[7], sets.draw(7).unwrap(), "by seed and index alone");
            assert_ne!(drawn, (0..200).map(|i| RandomSets { seed: 2, ..sets }.draw(i).unwrap()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn by_load_the_nearest_twelve_or_quarter_replace_an_expert() {
        let (selected, loads) = (set(&[(1, 10)]), loads(2, 64));
        let sets = RandomSets { selected: &selected, loads: &loads, matching: Matching::LayerLoad, left: 0, seed: 5 };
        let found: BTreeSet<usize> = (0..400).map(|i| sets.draw(i).unwrap().first().unwrap().expert).collect();
        // 63 candidates, so the nearest 16 by ratio: more above than below.
        assert_eq!(found, (5..=21).filter(|e| *e != 10).collect());
    }

    #[test]
    fn where_a_layer_is_too_small_the_rest_is_drawn_from_the_selection() {
        let (selected, loads) = (set(&[(0, 0), (0, 1), (0, 2)]), loads(1, 4));
        for matching in [Matching::LayerLoad, Matching::Layer, Matching::None] {
            let sets = RandomSets { selected: &selected, loads: &loads, matching, left: 1, seed: 1 };
            for index in 0..20 {
                let drawn = sets.draw(index).unwrap();
                assert!(drawn.len() == 3 && drawn.contains(&(0, 3).into()), "{drawn:?}");
            }
        }
        let none = RandomSets { selected: &selected, loads: &loads, matching: Matching::None, left: 2, seed: 1 };
        assert!(none.draw(0).unwrap_err().to_string().contains("leaves each layer 2 experts"));
    }

    /// The null hypothesis in full: a selection at random, and a statistic that adds up unequal effects of its experts.
    #[test]
    fn p_of_random_selections_is_uniform() {
        let mut rng = ChaCha8Rng::seed_from_u64(11);
        let mut loads = loads(4, 32);
        let mut p = Vec::new();
        for run in 0..200 {
            loads.values.iter_mut().for_each(|load| *load = (rng.random::<f64>() * 1000.0).round());
            let effects: Vec<f64> = (0..4 * 32).map(|_| rng.random::<f64>().powi(4)).collect();
            let of = |set: &BTreeSet<ExpertId>| set.iter().map(|id| effects[id.layer * 32 + id.expert]).sum::<f64>();
            let mut selected = BTreeSet::new();
            while selected.len() < 6 {
                let id: ExpertId = (rng.random_range(0..4), rng.random_range(0..32)).into();
                selected.insert(id);
            }
            let sets =
                RandomSets { selected: &selected, loads: &loads, matching: Matching::LayerLoad, left: 2, seed: run };
            let random: Vec<f64> = (0..199).map(|i| of(&sets.draw(i).unwrap())).collect();
            p.push(permutation_p(of(&selected), &random));
        }
        assert!(ks_p(p.clone()) > 0.05, "{}", ks_p(p));
    }
}
