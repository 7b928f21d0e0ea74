//! What a run does under every combination of the options that decide it, against `recipes.txt`.
//!
//! Of each valid combination the table holds: options without effect, the strategy's name, the phases of a round with their
//! steps and the parameters that they train, elements by kind and at once, the safe sides of the data that are needed, forward
//! passes at once, how many experts a selection of 10000 among 48 has, and the forecast of the four parts of a run. The table was
//! written by the code before there was a recipe; nine forecasts of runs that select at each step were wrong in it: they counted
//! no identification, or the work of the gradient method for the routing method.

use std::fmt::Write;
use std::sync::Arc;

use crate::case::golden_dir;
use moewarden::backend::cpu::Cpu;
use moewarden::config::{Mode, RunConfig, Schedule, options_without_effect};
use moewarden::experts::{ExpertId, Method, RandomMatch, RoutingTokens, Score, ScoreNorm, ScorePer, Select, Selection};
use moewarden::launch::Rank;
use moewarden::model::ParamId;
use moewarden::routers::{ConsistencyLayers, KlType, Statistic};
use moewarden::run::forecast::Forecast;
use moewarden::run::session::Session;
use moewarden::train::{
    ExpertCrossEntropy, JointConsistency, PhasePlan, Recipe, Replica, RouterAlignment, TrainingPhase, router_params,
};
use moewarden::ui::Ui;

const TABLE: &str = include_str!("recipes.txt");

/// Options away from their defaults, so that each of them that has no effect is named.
fn with_other_values(c: &RunConfig) -> RunConfig {
    RunConfig {
        score: Score::L2,
        score_per: ScorePer::Token,
        score_norm: ScoreNorm::Layer,
        experts: Some("experts.json".into()),
        risk_threshold: 0.25,
        routing_tokens: RoutingTokens::All,
        select: Select::Lowest,
        bootstrap: 7,
        identify_until: 0.5,
        expert_lr: 1.0,
        router_lr: 1.0,
        router_statistic: Statistic::SampleLogits,
        kl_type: KlType::Reverse,
        router_consistency_weight: 0.5,
        router_consistency_type: KlType::Reverse,
        router_consistency_layers: ConsistencyLayers::UnsafeOnly,
        safe_ratio: 0.25,
        ..c.clone()
    }
}

/// The number of parameters, and a hash of their ids.
fn parameters(ids: &[ParamId]) -> String {
    let mut hash = blake3::Hasher::new();
    for id in ids {
        hash.update(&(*id as u64).to_le_bytes());
    }
    format!("{}:{}", &hash.finalize().to_hex()[..8], ids.len())
}

/// Steps of a phase, and the parameters that it trains.
fn phase(plan: PhasePlan<'_>, recipe: &Recipe, session: &Session, replica: &Replica<Cpu>) -> Option<(usize, String)> {
    let selected: Vec<ExpertId> = [(0, 1), (1, 3)].map(ExpertId::from).to_vec();
    let (identify, sampler, table) = (&recipe.identify, session.sampler(recipe), &session.table);
    Some(match plan {
        PhasePlan::Identify => return None,
        PhasePlan::Expert(phase) => {
            let ids = phase.trained.params(table, &selected);
            let objective = ExpertCrossEntropy { phase, identify, sampler, selected };
            (TrainingPhase::new(objective, &recipe.updates, 0, replica).total_steps(), parameters(&ids))
        }
        PhasePlan::Router(phase) => {
            let objective = RouterAlignment::new(phase, sampler).unwrap();
            let steps = TrainingPhase::new(objective, &recipe.updates, 0, replica).total_steps();
            (steps, parameters(&router_params(table)))
        }
        PhasePlan::Joint(phase) => {
            let ids = phase.params(table, &selected);
            let objective = JointConsistency::new(phase, identify, sampler, selected).unwrap();
            (TrainingPhase::new(objective, &recipe.updates, 0, replica).total_steps(), parameters(&ids))
        }
    })
}

/// The columns of a combination after its options.
fn answers(config: &RunConfig, session: &Session, replica: &Replica<Cpu>) -> String {
    let recipe = match config.recipe() {
        Ok(recipe) => recipe,
        Err(moewarden::config::ConfigError::Invalid(problems)) => return format!(" | {}", problems.len()),
        Err(other) => panic!("{other}"),
    };
    let mut out = String::from(" | 0");
    let no_effect = options_without_effect(&with_other_values(config));
    let list = |parts: Vec<String>| parts.join(",");
    write!(out, " | {}", list(no_effect.into_iter().map(|(option, _)| option.to_owned()).collect())).unwrap();
    write!(out, " | {}", recipe.strategy()).unwrap();
    let phases = recipe.phases();
    let name = |plan: &PhasePlan<'_>| format!("{:?}", plan.phase()).to_lowercase();
    write!(out, " | {}", list(phases.iter().map(name).collect())).unwrap();
    let trained: Vec<_> = phases.iter().filter_map(|plan| phase(*plan, &recipe, session, replica)).collect();
    write!(out, " | {}", list(trained.iter().map(|(steps, _)| steps.to_string()).collect())).unwrap();
    write!(out, " | {}", list(trained.into_iter().map(|(_, parameters)| parameters).collect())).unwrap();
    let n = recipe.trained_elements(&session.table, &session.model);
    write!(out, " | {},{},{} | {}", n.experts, n.routers, n.others, n.at_once).unwrap();
    let needed = recipe.needed_sides();
    let sides = [("prompts", needed.safe_prompts), ("replies", needed.safe_examples || needed.safe_replies)];
    write!(out, " | {}", list(sides.iter().filter(|(_, needed)| *needed).map(|(side, _)| (*side).into()).collect()))
        .unwrap();
    write!(out, " | {}", recipe.forwards_at_once(usize::MAX)).unwrap();
    let many = RunConfig { top_k_experts: 10_000, ..config.clone() }.recipe().unwrap();
    let layers = &session.model.moe_layers().layers;
    write!(out, " | {}", many.identify.limits_for(layers, session.model.num_experts).top_k).unwrap();
    let f = Forecast::new(&recipe, &session.model, &session.data.records, 0.5, &n);
    let [identify, experts, routers, measure] = [f.identify, f.experts, f.routers, f.measure].map(|work| work.flops());
    write!(out, " | {identify:.6e} {experts:.6e} {routers:.6e} {measure:.6e}").unwrap();
    out
}

#[test]
fn every_combination_of_options_is_in_the_table() {
    let dir = golden_dir().join("olmoe");
    let base = RunConfig {
        model_name: dir.join("model").to_str().unwrap().into(),
        dataset_path: dir.join("data.json"),
        top_k_experts: 6,
        num_rounds: 2,
        batch_size: 4,
        grad_accum: 3,
        expert_epochs_per_round: 2,
        router_epochs_per_round: 5,
        ..RunConfig::default()
    };
    let session = Session::open(&base, &base.recipe().unwrap(), &Ui::silent()).unwrap();
    let replica = session.replica(Arc::new(Cpu::new(1)), None, &Rank::single(Ui::silent()), Default::default());
    let methods = [
        (Method::Gradient, RandomMatch::Total),
        (Method::Routing, RandomMatch::Total),
        (Method::Random, RandomMatch::Total),
        (Method::Random, RandomMatch::Layer),
    ];
    let mut table = format!("{}\n", TABLE.lines().next().unwrap());
    for mode in [Mode::Selective, Mode::Baseline, Mode::Experts] {
        for schedule in [Schedule::Alternate, Schedule::Joint] {
            for switches in 0..16 {
                for (method, random_match) in methods {
                    let config = RunConfig {
                        mode,
                        schedule,
                        finetune_unsafe_experts: switches & 8 == 0,
                        skip_router_training: switches & 4 != 0,
                        use_router_consistency_loss: switches & 2 != 0,
                        selection: if switches & 1 == 0 { Selection::Global } else { Selection::PerBatch },
                        method,
                        random_match,
                        ..base.clone()
                    };
                    let options = serde_json::to_value(&config).unwrap();
                    let columns = TABLE.split(" | ").next().unwrap().split(' ');
                    let values = columns.map(|option| match &options[option] {
                        serde_json::Value::String(text) => text.clone(),
                        other => other.to_string(),
                    });
                    let values: Vec<_> = values.collect();
                    writeln!(table, "{}{}", values.join(" "), answers(&config, &session, &replica)).unwrap();
                }
            }
        }
    }
    if std::env::var_os("MOEWARDEN_BLESS").is_some() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/unit/recipes.txt");
        std::fs::write(path, &table).unwrap();
    }
    for (i, (ours, theirs)) in table.lines().zip(TABLE.lines()).enumerate() {
        assert_eq!(ours, theirs, "line {} of recipes.txt (MOEWARDEN_BLESS=1 writes it anew)", i + 1);
    }
    assert_eq!(table.lines().count(), TABLE.lines().count());
}
