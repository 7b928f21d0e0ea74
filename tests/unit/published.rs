//! Published selection rules: ESFT's on recorded scores, all of them on small usages and on a golden model.

use std::path::Path;
use std::sync::Arc;

use moewarden::backend::cpu::Cpu;
use moewarden::collective::conformance::on_threads;
use moewarden::config::RunConfig;
use moewarden::experts::{
    BatchUsage, ESFT_TOKEN_P, ExpertId, ExpertScores, Method, Rule, RuleResult, SelectionLimits, Usage,
    UsageAccumulator, top_p,
};
use moewarden::launch::Rank;
use moewarden::train::Identification;
use moewarden::ui::Ui;
use serde_json::Value;

use crate::case::Case;

const LIMITS: SelectionLimits = SelectionLimits { top_k: 2, per_layer: None, layers: None };

/// Scores and experts that the authors of ESFT recorded; the file names their source.
#[test]
fn esft_by_tokens_selects_the_experts_of_its_authors() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/unit/esft_intent.json");
    let recorded: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let layers = recorded["layers"].as_array().unwrap();
    let number = |layer: &Value| layer["layer"].as_u64().unwrap() as usize;
    let numbers = |value: &Value| value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect::<Vec<_>>();
    let scores = ExpertScores {
        layers: layers.iter().map(number).collect(),
        num_experts: 64,
        values: layers.iter().flat_map(|layer| numbers(&layer["token_scores"])).collect(),
    };
    let theirs: Vec<ExpertId> = layers
        .iter()
        .flat_map(|layer| numbers(&layer["selected"]).into_iter().map(|e| (number(layer), e as usize).into()))
        .collect();
    assert_eq!(top_p(&scores, ESFT_TOKEN_P, &LIMITS).experts, theirs);
    let some = SelectionLimits { layers: Some(2..=16), ..LIMITS };
    let in_range: Vec<_> = theirs.into_iter().filter(|id| (2..=16).contains(&id.layer)).collect();
    assert_eq!(top_p(&scores, ESFT_TOKEN_P, &some).experts, in_range);
}

/// One layer (number 3) of five experts; each micro-batch has 10 tokens a side. Weights are a tenth of the counts.
fn apply(rule: Rule, batches: &[([f64; 5], [f64; 5])]) -> RuleResult {
    let usage = |counts: [f64; 5]| Usage {
        tokens: 10.0,
        counts: counts.to_vec(),
        weights: counts.iter().map(|count| count / 10.0).collect(),
    };
    let mut all = UsageAccumulator::default();
    for (i, (safe, unsafe_)) in batches.iter().enumerate() {
        all.add(i, BatchUsage { safe: usage(*safe), unsafe_: usage(*unsafe_) });
    }
    all.apply(rule, &[3], 5, &LIMITS, 1).unwrap()
}

fn experts(of: &[ExpertId]) -> Vec<usize> {
    of.iter().map(|id| id.expert).collect()
}

#[test]
fn each_rule_by_its_formula() {
    let batches = [([8.0, 0.0, 2.0, 5.0, 5.0], [1.0, 9.0, 4.0, 3.0, 3.0]); 2];
    // Two experts a token: 40 pairs on the unsafe side.
    let token = apply(Rule::EsftToken, &batches);
    let near = |found: &[f64], wanted: &[f64]| found.iter().zip(wanted).all(|(a, b)| (a - b).abs() < 1e-15);
    assert!(near(&token.scores.values, &[0.05, 0.45, 0.2, 0.15, 0.15]));
    assert_eq!((experts(&token.selected.experts), token.others), (vec![1], None));
    // Weights 0.1, 0.9, ... of 10 tokens a batch: the mean is a hundredth of the count.
    let gate = apply(Rule::EsftGate, &batches);
    assert!(near(&gate.scores.values, &[0.01, 0.09, 0.04, 0.03, 0.03]));
    assert_eq!(experts(&gate.selected.experts), [1, 2]);

    let steer = apply(Rule::SteerMoe, &batches);
    assert!(near(&steer.scores.values, &[-0.7, 0.9, 0.2, -0.2, -0.2]));
    assert_eq!(experts(&steer.selected.experts), [1, 2]);
    assert_eq!(experts(&steer.others.unwrap().experts), [0, 3], "ties by expert");

    // One of five experts is the most frequent of a bootstrap: expert 0 on safe prompts, expert 1 on unsafe ones.
    let safex = apply(Rule::Safex, &batches);
    assert_eq!((experts(&safex.selected.experts), safex.scores.values[0]), (vec![0], 1.0));
    assert_eq!(experts(&safex.others.unwrap().experts), [0; 0]);
    let both = apply(Rule::Safex, &[([8.0, 0.0, 2.0, 5.0, 5.0], [9.0, 1.0, 4.0, 3.0, 3.0]); 2]);
    assert_eq!((experts(&both.selected.experts), experts(&both.others.unwrap().experts)), (vec![], vec![0]));
    // Not stable: the most frequent expert is 0 in one micro-batch and 3 in the other.
    let unstable = [
        ([8.0, 0.0, 2.0, 5.0, 5.0], [1.0, 9.0, 4.0, 3.0, 3.0]),
        ([5.0, 0.0, 2.0, 8.0, 5.0], [1.0, 9.0, 4.0, 3.0, 3.0]),
    ];
    let found = apply(Rule::Safex, &unstable);
    assert_eq!(experts(&found.selected.experts), [0; 0]);
    assert!(found.scores.values[0] > 0.2 && found.scores.values[0] < 1.0);
}

fn found(case: &str, method: Method, batch_size: usize, rank: &Rank) -> Identification {
    let case = Case::open_as_read(case);
    let config = RunConfig { method, batch_size, top_k_experts: 3, risk_threshold: -1.0, ..case.config.clone() };
    case.run_as(&config, Arc::new(Cpu::new(1)), rank).identify()
}

#[test]
fn a_model_is_scored_by_the_rules_at_any_number_of_ranks() {
    let alone = || Rank::single(Ui::silent());
    for method in [Method::EsftToken, Method::EsftGate, Method::Steermoe, Method::Safex] {
        let one = found("olmoe", method, 1, &alone());
        assert!(method == Method::Safex || !one.selected.experts.is_empty(), "{method:?}");
        for ranks in 2..=3 {
            let several =
                on_threads(ranks, move |world| found("olmoe", method, 1, &Rank::new(Arc::new(world), Ui::silent())));
            for other in several {
                assert_eq!((&other.scores, &other.selected, &other.others), (&one.scores, &one.selected, &one.others));
            }
        }
    }
    // One micro-batch: the mean of differences is the difference of means.
    let (steer, routing) =
        (found("olmoe", Method::Steermoe, 99, &alone()), found("olmoe", Method::Routing, 99, &alone()));
    let same = steer.scores.values.iter().zip(&routing.scores.values).all(|(a, b)| (a - b).abs() < 1e-15);
    assert!(same, "{:?} and {:?}", steer.scores.values, routing.scores.values);
    // Shares of a layer sum to 1; routing weights do in Mixtral, which renormalises them, and not in OLMoE.
    let sums = |case: &str, method| -> Vec<f64> {
        found(case, method, 2, &alone()).scores.rows().map(|layer| layer.iter().sum()).collect()
    };
    assert!(sums("olmoe", Method::EsftToken).iter().all(|sum| (sum - 1.0).abs() < 1e-12));
    assert!(sums("mixtral", Method::EsftGate).iter().all(|sum| (sum - 1.0).abs() < 1e-9));
    assert!(sums("olmoe", Method::EsftGate).iter().all(|sum| *sum > 0.1 && *sum < 0.99));
}
