//! The routing method on the model's own replies, and on routing traces of them.

use std::path::Path;
use std::sync::Arc;

use moewarden::backend::{Backend, cpu::Cpu};
use moewarden::collective::conformance::on_threads;
use moewarden::config::{RoutingReplies, RunConfig};
use moewarden::data::{Example, MicroBatch, RoutingTraces, TraceShape, TraceUse};
use moewarden::experts::{Method, ReplyCounts, RoutingTokens};
use moewarden::launch::Rank;
use moewarden::model::{PassEnd, Routed};
use moewarden::run::counted::CountedRows;
use moewarden::train::{Replica, Scan, find};
use moewarden::ui::Ui;
use serde_json::{Value, json};

use crate::case::Case;

const ALL_TOKENS: [RoutingTokens; 4] =
    [RoutingTokens::Response, RoutingTokens::Predicting, RoutingTokens::Prompt, RoutingTokens::All];

/// A case whose safe prompts are to be answered with anything but a refusal, as a random model does.
fn open(dir: &Path) -> Case {
    let mut case = Case::open_as_read("olmoe");
    for record in &mut case.session.data.records {
        let (Some(prompt), Some(reply)) = (&record.safe_prompt, &mut record.safe_reply) else { continue };
        reply.ids = [&prompt[..], &[9, 10, 9, 10, 9, 10, 9, 10]].concat();
        reply.loss = (0..reply.ids.len()).map(|t| t >= prompt.len()).collect();
    }
    case.config = RunConfig {
        method: Method::Routing,
        risk_threshold: -1.0,
        routing_replies: RoutingReplies::Own,
        max_new_tokens: Some(5),
        shuffle: true,
        output_dir: dir.to_owned(),
        ..case.config.clone()
    };
    case
}

fn counted(case: &Case, replica: &Replica<Cpu>) -> CountedRows {
    let recipe = case.config.recipe().unwrap();
    CountedRows::of(&case.session, &case.config, &recipe, replica, &Ui::silent()).unwrap().expect("nobody stops it")
}

/// Scores on the model's own replies, as one rank of several.
fn own_scores(case: &Case, tokens: RoutingTokens, rank: &Rank) -> (Vec<f64>, ReplyCounts) {
    let config = RunConfig { routing_tokens: tokens, ..case.config.clone() };
    let run = case.run_as(&config, Arc::new(Cpu::new(1)), rank);
    let rows = counted(case, &run.replica);
    rows.check().unwrap();
    let sampler = rows.sampler(&case.session, &run.recipe);
    let found = find(&run.replica, &run.recipe.identify, sampler, sampler.unsafe_order(0)).unwrap();
    (found.scores.values, rows.counts().expect("own replies"))
}

/// The experts of each token of an example, `[tokens][layers][K]`.
fn routed_experts(replica: &Replica<Cpu>, example: &Example, layers: usize, k: usize) -> Vec<u32> {
    let batch = MicroBatch::of_examples([example]);
    let (b, tokens) = (&*replica.model().backend, example.ids.len());
    let mut experts = vec![0; tokens * layers * k];
    let mut observe = |routed: Routed<'_, Cpu>| {
        let layer = replica.moe_layers().index_of(routed.layer);
        for (t, chosen) in b.expert_ids(routed.routing).chunks(k).enumerate() {
            experts[(t * layers + layer) * k..][..k].copy_from_slice(chosen);
        }
    };
    replica.forward(&replica.inputs(&batch), None, PassEnd::Routers, Some(&mut observe));
    experts
}

#[test]
fn own_replies_that_comply_are_counted_at_any_number_of_ranks() {
    let dir = tempfile::tempdir().unwrap();
    let case = open(dir.path());
    let (one, counts) = own_scores(&case, RoutingTokens::Predicting, &Rank::single(Ui::silent()));
    let rows = case.session.data.records.len();
    assert_eq!(counts.unsafe_complied + counts.unsafe_refused, rows);
    assert!(counts.unsafe_counted > 1 && counts.safe_counted > 1, "{counts}");
    assert!(one.iter().any(|score| score.abs() > 1e-3));
    for ranks in 2..=3 {
        let dir = dir.path().to_owned();
        let several = on_threads(ranks, move |world| {
            own_scores(&open(&dir), RoutingTokens::Predicting, &Rank::new(Arc::new(world), Ui::silent()))
        });
        for (scores, of_rank) in several {
            assert_eq!(of_rank, counts);
            // The order of a few f64 additions differs.
            assert!(scores.iter().zip(&one).all(|(a, b)| (a - b).abs() <= 1e-15), "{ranks} ranks");
        }
    }
}

#[test]
fn traces_of_the_own_replies_give_the_same_scores() {
    let dir = tempfile::tempdir().unwrap();
    let case = open(dir.path());
    let replica = case.run(&case.config, 1).replica;
    let rows = counted(&case, &replica);
    let config = &replica.model().config;
    let (layers, k) = (config.moe_layers().layers.len(), config.num_experts_per_tok);
    let sampler = rows.sampler(&case.session, &case.config.recipe().unwrap());
    // One row as base64, the next as lists, as the two servers send them.
    let mut lines = String::new();
    for (i, record) in sampler.data.records.iter().enumerate() {
        for (side, reply) in [("comply", &record.unsafe_reply), ("safe", &record.safe_reply)] {
            let Some(example) = reply else { continue };
            let experts = routed_experts(&replica, example, layers, k);
            let mut row = json!({
                "id": i, "verdict": side, "shape": [example.ids.len(), layers, k],
                "prompt_tokens": example.loss.iter().filter(|loss| !**loss).count(),
            });
            row["routed_experts"] = if i % 2 == 0 {
                use base64::Engine;
                let bytes: Vec<u8> = experts.iter().flat_map(|expert| expert.to_le_bytes()).collect();
                json!(base64::engine::general_purpose::STANDARD.encode(bytes))
            } else {
                let tokens = experts.chunks(layers * k).map(|token| json!(token.chunks(k).collect::<Vec<_>>()));
                Value::Array(tokens.collect())
            };
            lines += &format!("{row}\n");
        }
    }
    let path = dir.path().join("traces.jsonl");
    std::fs::write(&path, lines).unwrap();
    let shape = TraceShape { layers, num_experts: config.num_experts, top_k: k };
    let traces =
        RoutingTraces::read(&path, shape, TraceUse { prompt_tokens: usize::MAX, both_verdicts: true }).unwrap();
    for tokens in ALL_TOKENS {
        let config = RunConfig {
            routing_tokens: tokens,
            routing_replies: RoutingReplies::File(path.clone()),
            ..case.config.clone()
        };
        let run = case.run(&config, 1);
        let sampler = moewarden::data::Sampler { data: &traces.data, path: &path, ..sampler };
        let scan = Scan::new(&run.replica, &run.recipe.identify, sampler, sampler.unsafe_order(0)).unwrap();
        let mut scan = scan.with_traces(Some(&traces));
        while let Some(own) = scan.last_interval(&run.replica) {
            own.into_iter().for_each(|index| _ = scan.add(&run.replica, index).unwrap());
        }
        let counted = scan.finish(&run.replica).unwrap().scores.values;
        let (own, _) = own_scores(&case, tokens, &Rank::single(Ui::silent()));
        assert!(own.iter().any(|score| score.abs() > 1e-3), "{tokens:?}");
        assert!(own.iter().zip(&counted).all(|(a, b)| (a - b).abs() <= 1e-12), "{tokens:?}: {own:?} and {counted:?}");
    }
}

#[test]
fn refusals_of_the_model_itself_are_not_counted() {
    let dir = tempfile::tempdir().unwrap();
    // As read, the safe prompts are to be refused too, which a random model does not do.
    let mut case = open(dir.path());
    case.session.data = Case::open_as_read("olmoe").session.data;
    let rows = counted(&case, &case.run(&case.config, 1).replica);
    let counts = rows.counts().unwrap();
    assert_eq!((counts.unsafe_counted, counts.safe_counted, counts.safe_refused), (0, 0, 0));
    let error = rows.check().unwrap_err();
    assert_eq!(error.code(), moewarden::exit::DATA);
    assert!(error.to_string().contains("nothing to count") && error.to_string().contains("comply"), "{error}");
}
