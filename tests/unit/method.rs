//! Router alignment against finite differences and its definitions; selections against reference cases.

use std::sync::Arc;

use moewarden::collective::Collective;
use moewarden::collective::conformance::on_threads;
use moewarden::experts::{ExpertId, ExpertScores, Ranking, SelectionLimits, select};
use moewarden::routers::{KlType, LayerStatistic, SampleSoftmax, alignment, all_reduce, kl_and_gradient};
use proptest::prelude::*;

const KINDS: [KlType; 3] = [KlType::Forward, KlType::Reverse, KlType::Symmetric];

/// Central differences of `f` at `x`.
fn differences(x: &[f64], f: impl Fn(&[f64]) -> f64) -> Vec<f64> {
    (0..x.len())
        .map(|i| {
            // The cube root of the machine epsilon balances truncation error (h²) against cancellation (1e-16/h).
            let h = 6e-6 * x[i].abs().max(1e-2);
            let at = |d: f64| {
                let mut x = x.to_vec();
                x[i] += d;
                f(&x)
            };
            (at(h) - at(-h)) / (2.0 * h)
        })
        .collect()
}

/// Central differences in f64 leave an error of about 1e-10 of the largest entry; 1e-7 allows for steep logarithms.
fn assert_gradient(analytic: &[f64], numeric: &[f64], what: &str) {
    let scale = numeric.iter().fold(1e-3f64, |m, x| m.max(x.abs()));
    for (i, (a, n)) in analytic.iter().zip(numeric).enumerate() {
        assert!((a - n).abs() <= 1e-7 * scale, "{what}[{i}]: {a}, by finite differences {n}");
    }
    assert_eq!(analytic.len(), numeric.len(), "{what}");
}

/// Pseudo-random numbers, the same on every machine.
fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mut x = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) as f64 / (1u64 << 53) as f64
    };
    (0..n).map(|_| next()).collect()
}

#[test]
fn kl_gradients_of_both_sides() {
    let (p, q) = (numbers(1, 8), numbers(2, 8)); // not normalised: the gradient is through the normalisation
    for kind in KINDS {
        let (_, dp, dq) = kl_and_gradient(kind, &p, &q);
        assert_gradient(&dp, &differences(&p, |p| kl_and_gradient(kind, p, &q).0), &format!("{kind:?} dp"));
        assert_gradient(&dq, &differences(&q, |q| kl_and_gradient(kind, &p, q).0), &format!("{kind:?} dq"));
    }
}

#[test]
fn kl_by_hand() {
    // ε shifts each entry by 1e-8 of a quantity of order 1.
    let (p, q) = ([0.5, 0.5], [0.25, 0.75]);
    let forward = 0.5 * (2.0f64).ln() + 0.5 * (2.0f64 / 3.0).ln();
    let reverse = 0.25 * (0.5f64).ln() + 0.75 * (1.5f64).ln();
    for (kind, expected) in
        [(KlType::Forward, forward), (KlType::Reverse, reverse), (KlType::Symmetric, (forward + reverse) / 2.0)]
    {
        let (kl, ..) = kl_and_gradient(kind, &p, &q);
        assert!((kl - expected).abs() < 1e-7, "{kind:?}: {kl}, not {expected}");
    }
}

#[test]
fn sample_logits_gradient() {
    let (lens, experts) = ([3, 1, 5], 4);
    let sums: Vec<f64> = numbers(3, lens.len() * experts).iter().map(|x| 6.0 * (x - 0.5)).collect();
    let dsum: Vec<f64> = numbers(4, experts);
    let loss = |sums: &[f64]| -> f64 {
        let mut statistic = LayerStatistic::zero(experts);
        SampleSoftmax::forward(sums, &lens).add_to(&mut statistic);
        statistic.sum.iter().zip(&dsum).map(|(x, d)| x * d).sum()
    };
    let analytic = SampleSoftmax::forward(&sums, &lens).backward(&dsum);
    assert_gradient(&analytic, &differences(&sums, loss), "segment sums");
}

#[test]
fn sample_logits_weight_samples_not_tokens() {
    let mut statistic = LayerStatistic::zero(2);
    // A sample of 1 token with logits (0, ln 3), and one of 100 tokens with logits (ln 3, 0) each.
    SampleSoftmax::forward(&[0.0, 3f64.ln(), 100.0 * 3f64.ln(), 0.0], &[1, 100]).add_to(&mut statistic);
    let mean = statistic.mean().unwrap();
    assert!(mean.iter().all(|x| (x - 0.5).abs() < 1e-15), "{mean:?}"); // (1/4 + 3/4)/2, a rounding or two
    let none = SampleSoftmax::forward(&[], &[]);
    let mut empty = LayerStatistic::zero(2);
    none.add_to(&mut empty);
    assert_eq!((empty.mean(), none.backward(&[1.0, 2.0])), (None, vec![]));
}

/// The gradient through the whole chain from sums over tokens to the loss, for both sides.
#[test]
fn alignment_gradient() {
    let layers = |seed: u64, weight: f64| -> Vec<LayerStatistic> {
        (0..3)
            .map(|l| LayerStatistic { sum: numbers(seed + l, 5).iter().map(|x| x * weight).collect(), weight })
            .collect()
    };
    let (safe, unsafe_) = (layers(10, 7.0), layers(20, 11.0));
    for kind in KINDS {
        let out = alignment(kind, &safe, &unsafe_).unwrap();
        let mean: f64 = out.per_layer.iter().sum::<f64>() / 3.0;
        assert_eq!(out.loss, mean);
        for l in 0..3 {
            let with = |side: &[LayerStatistic], sum: &[f64]| {
                let mut side = side.to_vec();
                side[l].sum = sum.to_vec();
                side
            };
            let by_safe = differences(&safe[l].sum, |x| alignment(kind, &with(&safe, x), &unsafe_).unwrap().loss);
            let by_unsafe = differences(&unsafe_[l].sum, |x| alignment(kind, &safe, &with(&unsafe_, x)).unwrap().loss);
            assert_gradient(&out.d_safe[l], &by_safe, "safe sum");
            assert_gradient(&out.d_unsafe[l], &by_unsafe, "unsafe sum");
        }
    }
}

#[test]
fn no_loss_without_layers_or_tokens() {
    let some = [LayerStatistic { sum: vec![1.0, 1.0], weight: 2.0 }];
    let none = [LayerStatistic::zero(2)];
    assert!(alignment(KlType::Forward, &some, &some).is_some());
    assert!(alignment(KlType::Forward, &some, &none).is_none());
    assert!(alignment(KlType::Forward, &none, &some).is_none());
    assert!(alignment(KlType::Forward, &[], &[]).is_none());
}

#[test]
fn ranks_compute_the_loss_of_the_global_batch() {
    let rows: Arc<Vec<Vec<f64>>> = Arc::new((0..12).map(|t| numbers(100 + t, 4)).collect());
    let losses: Vec<f64> = (1..=4)
        .map(|world| {
            let rows = rows.clone();
            let of_ranks = on_threads(world, move |c| {
                let mut sides = vec![LayerStatistic::zero(4); 2];
                for (t, row) in rows.iter().enumerate().filter(|(t, _)| t % world == c.rank()) {
                    sides[usize::from(t % 3 == 0)].add(row, 1.0);
                }
                all_reduce(&mut sides, &c).unwrap();
                assert_eq!((sides[0].weight, sides[1].weight), (8.0, 4.0));
                alignment(KlType::Symmetric, &sides[..1], &sides[1..]).unwrap().loss
            });
            assert!(of_ranks.iter().all(|loss| *loss == of_ranks[0]), "all ranks hold the same bits");
            of_ranks[0]
        })
        .collect();
    for loss in &losses {
        // The order of eight f64 additions differs.
        assert!((loss - losses[0]).abs() <= 1e-13 * losses[0], "{losses:?}");
    }
}

/// Pairs of unnormalised distributions, which may contain zeros.
fn pair() -> impl Strategy<Value = (Vec<f64>, Vec<f64>)> {
    let entry = || prop_oneof![4 => 0.0f64..1.0, 1 => Just(0.0)];
    (2usize..20).prop_flat_map(move |n| {
        let side = || {
            proptest::collection::vec(entry(), n).prop_map(|mut x| {
                x[0] += 0.1;
                x
            })
        };
        (side(), side())
    })
}

proptest! {
    #[test]
    fn kl_is_a_divergence((p, q) in pair()) {
        let value = |kind, p: &[f64], q: &[f64]| kl_and_gradient(kind, p, q).0;
        for kind in KINDS {
            prop_assert!(value(kind, &p, &q) >= 0.0);
            // Exactly 0 at the minimum: u/u is 1 and ln 1 is 0.
            let (kl, dp, dq) = kl_and_gradient(kind, &p, &p);
            prop_assert!(kl == 0.0 && dp.iter().chain(&dq).all(|d| *d == 0.0), "{kl} {dp:?} {dq:?}");
        }
        prop_assert_eq!(value(KlType::Reverse, &p, &q), value(KlType::Forward, &q, &p));
        let half = 0.5 * (value(KlType::Forward, &p, &q) + value(KlType::Reverse, &p, &q));
        prop_assert_eq!(value(KlType::Symmetric, &p, &q), half);
    }

    #[test]
    fn kl_ignores_the_scale_of_its_arguments((p, q) in pair(), scale in 0.5f64..2.0) {
        // ε is added before the normalisation: it changes entries of 0.01 or more by at most 1e-6 of their value.
        let q: Vec<f64> = q.iter().map(|x| x + 0.01).collect();
        let scaled: Vec<f64> = q.iter().map(|x| x * scale).collect();
        let (a, b) = (kl_and_gradient(KlType::Forward, &p, &q).0, kl_and_gradient(KlType::Forward, &p, &scaled).0);
        prop_assert!((a - b).abs() < 1e-5, "{} {}", a, b);
    }
}

/// Cases computed by an independent implementation, if the shared folder has them.
#[test]
fn selections_of_the_reference_cases() {
    let shared = crate::shared::shared();
    let Ok(cases) = std::fs::read_dir(shared.join("goldens")) else {
        println!("skipped: {} has no reference cases", shared.display());
        return;
    };
    let mut checked = 0;
    for case in cases {
        let path = case.unwrap().path().join("expect.json");
        let expect: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let rows: Vec<Vec<f64>> = serde_json::from_value(expect["scores"].clone()).unwrap();
        let selected: Vec<ExpertId> = serde_json::from_value(expect["selected"].clone()).unwrap();
        let scores = ExpertScores {
            layers: serde_json::from_value(expect["layers"].clone()).unwrap(),
            num_experts: rows[0].len(),
            values: rows.concat(),
        };
        let pool = SelectionLimits { top_k: selected.len(), per_layer: None, layers: None };
        assert_eq!(select(&scores, &pool, &Ranking::default()).unwrap().experts, selected, "{}", path.display());
        checked += 1;
    }
    assert!(checked > 0, "{} is empty", shared.display());
}
