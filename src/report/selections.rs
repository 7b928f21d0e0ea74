//! Compares the expert selections of several runs: which are distinct, and how far they overlap.

use std::collections::HashSet;

use super::Table;
use crate::experts::{ExpertId, ExpertScores};

/// The experts that one run selected, and their scores.
#[derive(Debug, Clone, PartialEq)]
pub struct RunSelection {
    /// Name of the run, for tables.
    pub name: String,
    /// The selected experts.
    pub selected: Vec<ExpertId>,
    /// The scores of all experts; `None` for a random selection.
    pub scores: Option<ExpertScores>,
}

/// How similar the selections A and B of two runs are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Overlap {
    /// |A ∩ B|
    pub common: usize,
    /// |A ∩ B| / |A|; `None` if A is empty.
    pub share: Option<f64>,
    /// |A ∩ B| / |A ∪ B|; `None` if both are empty.
    pub jaccard: Option<f64>,
    /// Spearman's rank correlation of the scores of all experts; `None` if a run has no scores, if the models have
    /// other layers or numbers of experts, or if all scores of a run are equal.
    pub spearman: Option<f64>,
}

/// Compares the selections of runs A and B.
pub fn overlap(a: &RunSelection, b: &RunSelection) -> Overlap {
    let (in_a, in_b): (HashSet<_>, HashSet<_>) = (a.selected.iter().collect(), b.selected.iter().collect());
    let (common, union) = (in_a.intersection(&in_b).count(), in_a.union(&in_b).count());
    let ratio = |n: usize, d: usize| (d > 0).then(|| n as f64 / d as f64);
    let spearman = match (&a.scores, &b.scores) {
        (Some(x), Some(y)) if x.layers == y.layers && x.num_experts == y.num_experts => spearman(&x.values, &y.values),
        _ => None,
    };
    Overlap { common, share: ratio(common, in_a.len()), jaccard: ratio(common, union), spearman }
}

/// Spearman's rank correlation: Pearson's correlation of the ranks, with equal values sharing the mean of their ranks.
/// `None` if `x` or `y` is constant or empty.
///
/// # Panics
/// If the lengths differ.
pub fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    assert_eq!(x.len(), y.len(), "x and y are pairs of values");
    let (x, y) = (ranks(x), ranks(y));
    let mean = (x.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| (a - mean) * (b - mean)).sum() };
    let deviations = (product(&x, &x) * product(&y, &y)).sqrt();
    (deviations > 0.0).then(|| product(&x, &y) / deviations)
}

/// Ranks of values, from 0; equal values share the mean of their ranks.
fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*a].total_cmp(&values[*b]));
    let mut out = vec![0.0; values.len()];
    let mut first = 0;
    for tied in order.chunk_by(|a, b| values[*a] == values[*b]) {
        let rank = first as f64 + (tied.len() as f64 - 1.0) / 2.0;
        tied.iter().for_each(|i| out[*i] = rank);
        first += tied.len();
    }
    out
}

/// Runs that selected the same experts.
#[derive(Debug, Clone, PartialEq)]
pub struct DistinctSelection {
    /// Names of the runs.
    pub runs: Vec<String>,
    /// The first run's selection and scores.
    pub first: RunSelection,
}

/// The distinct selections of the runs, in the order of the first run that made each. Runs without a selected expert have none.
pub fn distinct_selections(runs: &[RunSelection]) -> Vec<DistinctSelection> {
    let mut found: Vec<(HashSet<ExpertId>, DistinctSelection)> = Vec::new();
    for run in runs.iter().filter(|run| !run.selected.is_empty()) {
        let set: HashSet<ExpertId> = run.selected.iter().copied().collect();
        match found.iter_mut().find(|(earlier, _)| *earlier == set) {
            Some((_, selection)) => selection.runs.push(run.name.clone()),
            None => found.push((set, DistinctSelection { runs: vec![run.name.clone()], first: run.clone() })),
        }
    }
    found.into_iter().map(|(_, selection)| selection).collect()
}

/// The most selections of which all overlaps are shown.
const MOST_SHOWN: usize = 24;

/// The distinct selections with the number of experts that each pair has in common, each pair once. Empty if there are fewer than two.
pub fn overlap_table(selections: &[DistinctSelection]) -> Option<Table> {
    let n = selections.len();
    if n < 2 {
        return None;
    }
    let ranked = "ρ: Spearman's rank correlation of the scores of all experts";
    let numbers = |shown: usize| (2..=shown).map(|i| i.to_string());
    let (caption, shown) = match n {
        ..=MOST_SHOWN => {
            (format!("Distinct selections, and the Jaccard index |A ∩ B| / |A ∪ B| of each pair. {ranked}"), n)
        }
        _ => (format!("Distinct selections (overlaps of more than {MOST_SHOWN} are not shown)"), 1),
    };
    let header = ["selection of".to_owned(), "experts".into()].into_iter().chain(numbers(shown));
    let mut table = Table::new(caption, header);
    for (i, a) in selections.iter().enumerate() {
        let cell = |j: usize| match j > i {
            true => describe(&overlap(&a.first, &selections[j].first)),
            false => String::new(),
        };
        let name = format!("{}: {}", i + 1, a.runs.join(", "));
        table.row([name, a.first.selected.len().to_string()].into_iter().chain((1..shown).map(cell)));
    }
    Some(table)
}

/// `0.333`, or with the rank correlation of the scores `0.333, ρ 0.871`.
fn describe(overlap: &Overlap) -> String {
    let jaccard = overlap.jaccard.map_or_else(|| "-".to_owned(), |x| format!("{x:.3}"));
    overlap.spearman.map_or_else(|| jaccard.clone(), |rho| format!("{jaccard}, ρ {rho:.3}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(name: &str, selected: &[(usize, usize)], values: Option<[f64; 4]>) -> RunSelection {
        let scores = values.map(|v| ExpertScores { layers: vec![0, 1], num_experts: 2, values: v.to_vec() });
        RunSelection { name: name.into(), selected: selected.iter().map(|id| (*id).into()).collect(), scores }
    }

    #[test]
    fn overlap_of_selections() {
        let a = run("a", &[(0, 0), (0, 1), (1, 0), (1, 1)], Some([4.0, 3.0, 2.0, 1.0]));
        let b = run("b", &[(1, 1), (0, 0)], Some([1.0, 2.0, 3.0, 4.0]));
        let expected = Overlap { common: 2, share: Some(0.5), jaccard: Some(0.5), spearman: Some(-1.0) };
        assert_eq!(overlap(&a, &b), expected);
        assert_eq!(overlap(&b, &a).share, Some(1.0), "the share refers to the first run");
        let none = run("none", &[], None);
        let expected = Overlap { common: 0, share: None, jaccard: Some(0.0), spearman: None };
        assert_eq!(overlap(&none, &a), expected);
        assert_eq!(overlap(&none, &none).jaccard, None);
    }

    #[test]
    fn rank_correlation() {
        let close = |x: Option<f64>, y: f64| assert!((x.unwrap() - y).abs() < 1e-15, "{x:?}, not {y}"); // one rounding
        close(spearman(&[1.0, 10.0, 100.0], &[-3.0, 0.0, 7.0]), 1.0);
        // No ties: 1 - 6 Σd² / (n (n² - 1)), d = 0, 1, 1, 0.
        close(spearman(&[1.0, 2.0, 3.0, 4.0], &[1.0, 3.0, 2.0, 4.0]), 0.8);
        // Ties share ranks: (0.5, 0.5, 2) with (0, 1, 2).
        close(spearman(&[5.0, 5.0, 6.0], &[1.0, 2.0, 3.0]), 1.5 / (1.5f64 * 2.0).sqrt());
        assert_eq!(spearman(&[1.0, 1.0], &[1.0, 2.0]), None);
        assert_eq!(spearman(&[], &[]), None);
    }

    #[test]
    fn each_pair_of_distinct_selections_comes_once() {
        let runs = [
            run("gradient", &[(0, 0), (0, 1)], Some([4.0, 3.0, 2.0, 1.0])),
            run("gradient again", &[(0, 1), (0, 0)], None),
            run("random", &[(0, 1)], None),
            run("none", &[], None),
            run("routing", &[(1, 1), (0, 1)], Some([1.0, 2.0, 3.0, 4.0])),
        ];
        let found = distinct_selections(&runs);
        let table = overlap_table(&found).unwrap();
        assert_eq!(table.header, ["selection of", "experts", "2", "3"]);
        assert_eq!(table.rows[0], ["1: gradient, gradient again", "2", "0.500", "0.333, ρ -1.000"]);
        assert_eq!(table.rows[1], ["2: random", "1", "", "0.500"]);
        assert_eq!(table.rows[2], ["3: routing", "2", "", ""]);
        assert_eq!(overlap_table(&distinct_selections(&runs[..2])), None);
        let many: Vec<_> = (0..30).map(|i| run(&i.to_string(), &[(0, i)], None)).collect();
        let table = overlap_table(&distinct_selections(&many)).unwrap();
        assert_eq!((table.header.len(), table.rows.len()), (2, 30));
    }
}
