//! From options to the recipe of a run. Only this file reads the options `mode`, `schedule`, `finetune-unsafe-experts`,
//! `skip-router-training`, `use-router-consistency-loss` and `selection`: what they mean together is decided here, once.

use std::num::NonZeroUsize;

use super::{Mode, RawOptions, RoutingReplies, RunConfig, Schedule};
use crate::experts::{ExpertId, IdentifyIn, Method, RandomMatch, Rule, Selection, SelectionLimits};
use crate::train::{
    CountedReplies, Divergence, ExpertPhase, GradientScore, Identify, JointPhase, Recipe, Retain, RouterPhase, ScoreBy,
    Trained, Training, Updates,
};

/// The recipe of valid options. `given`: the experts of `--experts`, which are all selected; empty for other methods.
pub(super) fn recipe_of(c: &RunConfig, given: Vec<ExpertId>) -> Recipe {
    let training = training(c);
    let top_k = match c.method {
        Method::Given => given.len(),
        _ if decides_size(c) => 0,
        _ => c.top_k_experts,
    };
    Recipe {
        rounds: c.num_rounds,
        batch_size: c.batch_size,
        shuffle: c.shuffle,
        seed: c.seed,
        identify: Identify {
            by: score_by(c),
            select: c.select,
            limits: SelectionLimits { top_k, per_layer: c.experts_per_layer, layers: c.layers.clone() },
            as_many_as_exist: !selection_matters(&training),
            seed: c.seed,
            bootstrap: if resamples(c) { c.bootstrap } else { 0 },
            once: c.identify == IdentifyIn::Once,
            until: if c.method == Method::Gradient { c.identify_until } else { 0.0 },
            given,
        },
        divergence: divergence(c),
        training,
        retain: c.retain_dataset_path.is_some().then_some(Retain {
            loss: c.retain_loss,
            weight: c.retain_weight,
            routing_weight: c.retain_routing_weight,
        }),
        updates: Updates {
            lr_schedule: c.lr_schedule,
            warmup_steps: c.warmup_steps,
            weight_decay: c.weight_decay,
            max_grad_norm: c.max_grad_norm,
            max_skipped_steps: c.max_skipped_steps,
            check_replicas: c.check_replicas,
        },
        recompute: c.recompute,
    }
}

fn score_by(c: &RunConfig) -> ScoreBy {
    let gradient = GradientScore { score: c.score, per: c.score_per, norm: c.score_norm };
    let tokens = c.routing_tokens;
    let replies = match c.routing_replies {
        RoutingReplies::Target => CountedReplies::Targets,
        RoutingReplies::Own => CountedReplies::Own { max_new_tokens: c.max_new_tokens.unwrap_or(128) },
        RoutingReplies::File(_) => CountedReplies::Traces,
    };
    match c.method {
        Method::Gradient => ScoreBy::Gradient(gradient),
        Method::Routing => ScoreBy::Routing { tokens, threshold: c.risk_threshold, replies },
        Method::EsftToken => ScoreBy::Published { rule: Rule::EsftToken, tokens, replies },
        Method::EsftGate => ScoreBy::Published { rule: Rule::EsftGate, tokens, replies },
        Method::Steermoe => ScoreBy::Published { rule: Rule::SteerMoe, tokens, replies },
        Method::Safex => ScoreBy::Published { rule: Rule::Safex, tokens, replies },
        Method::Random => ScoreBy::Random {
            gradient: computes_gradient_scores(c).then_some(gradient),
            matching: c.random_match,
            exclude_found: c.random_exclude_found,
        },
        Method::Given => ScoreBy::Given,
    }
}

/// Whether a selection is by the scores of micro-batches that can be resampled.
fn resamples(c: &RunConfig) -> bool {
    matches!(c.method, Method::Gradient | Method::Routing) && c.selection == Selection::Global
}

/// Whether the gradient method scores experts, to select them or for the random control.
pub(super) fn computes_gradient_scores(c: &RunConfig) -> bool {
    match c.method {
        Method::Gradient => true,
        Method::Random => c.random_match == RandomMatch::Layer || c.random_exclude_found,
        _ => false,
    }
}

/// Whether the method counts which experts tokens are routed to.
pub(super) fn counts_routing(c: &RunConfig) -> bool {
    c.method == Method::Routing || is_published(c)
}

/// Whether the method is a published rule.
fn is_published(c: &RunConfig) -> bool {
    matches!(score_by(c), ScoreBy::Published { .. })
}

/// Whether the method decides itself how many experts are selected.
pub(super) fn decides_size(c: &RunConfig) -> bool {
    matches!(score_by(c), ScoreBy::Published { rule, .. } if rule.decides_size())
}

fn divergence(c: &RunConfig) -> Divergence {
    let last_tokens = NonZeroUsize::new(c.router_last_tokens);
    Divergence { statistic: c.router_statistic, last_tokens, kl: c.kl_type }
}

fn training(c: &RunConfig) -> Training {
    let trained = match c.mode {
        Mode::Selective => Trained::SelectedExperts,
        Mode::Experts => Trained::AllExperts,
        Mode::Baseline => Trained::Everything,
    };
    // Without a selection to train there is none to make at each step.
    let selection = if c.mode == Mode::Selective { c.selection } else { Selection::Global };
    let experts = ExpertPhase {
        trained,
        selection,
        epochs: c.expert_epochs_per_round,
        grad_accum: c.grad_accum,
        lr: c.expert_lr,
    };
    let routers = RouterPhase {
        epochs: c.router_epochs_per_round,
        divergence: divergence(c),
        target: c.router_target,
        lr: c.router_lr,
    };
    match (c.schedule, c.finetune_unsafe_experts, !c.skip_router_training) {
        (Schedule::Joint, finetune, _) => Training::Joint(JointPhase {
            trained: finetune.then_some(trained),
            selection,
            epochs: c.expert_epochs_per_round,
            grad_accum: c.grad_accum,
            safe_ratio: c.safe_ratio,
            weight: c.router_consistency_weight,
            kl: c.router_consistency_type,
            layers: c.router_consistency_layers,
            expert_lr: c.expert_lr,
            router_lr: c.router_lr,
        }),
        (Schedule::Alternate, true, true) => Training::Alternate(experts, routers),
        (Schedule::Alternate, true, false) => Training::Experts(experts),
        (Schedule::Alternate, false, true) => Training::Routers(routers),
        (Schedule::Alternate, false, false) => Training::Nothing,
    }
}

/// Whether the selection decides what is trained, or, in the joint phase, which layers are in the consistency loss.
fn selection_matters(training: &Training) -> bool {
    match training {
        Training::Experts(phase) | Training::Alternate(phase, _) => phase.trained == Trained::SelectedExperts,
        Training::Joint(phase) => phase.trained.is_none_or(|trained| trained == Trained::SelectedExperts),
        Training::Nothing | Training::Routers(_) => false,
    }
}

/// Whether the options ask for the router phase. (They need not be valid yet.)
pub(super) fn asks_for_router_phase(c: &RunConfig) -> bool {
    c.schedule == Schedule::Alternate && !c.skip_router_training
}

/// Adds the options that those of one source imply. The joint schedule and the consistency loss are two names of one thing: if
/// a source gives one, the other follows.
pub(super) fn imply(given: &RawOptions, implied: &mut RawOptions) {
    match (given.schedule, given.use_router_consistency_loss) {
        (None, Some(used)) => implied.schedule = Some(if used { Schedule::Joint } else { Schedule::Alternate }),
        (Some(schedule), None) => implied.use_router_consistency_loss = Some(schedule == Schedule::Joint),
        _ => {}
    }
}

/// `base` with another method, which trains the experts of a mode (`None`: no experts) and routers or not (`None`: as `base`).
/// The joint schedule is kept only if experts and routers both train.
pub(super) fn variant(base: &RunConfig, method: Method, experts: Option<Mode>, routers: Option<bool>) -> RunConfig {
    let routers = routers.unwrap_or(!base.skip_router_training);
    let joint = base.schedule == Schedule::Joint && experts.is_some() && routers;
    RunConfig {
        method,
        mode: experts.unwrap_or(Mode::Selective),
        finetune_unsafe_experts: experts.is_some(),
        skip_router_training: !routers,
        schedule: if joint { Schedule::Joint } else { Schedule::Alternate },
        use_router_consistency_loss: joint,
        // Random and given experts are the same in all rounds; published rules select on the whole data set.
        selection: match method {
            Method::Gradient | Method::Routing => base.selection,
            _ => Selection::Global,
        },
        ..base.clone()
    }
}

/// Contradictions between these options: (whether there is one, the message).
pub(super) fn contradictions(c: &RunConfig) -> Vec<(bool, &'static str)> {
    let joint = c.schedule == Schedule::Joint;
    vec![
        (
            c.use_router_consistency_loss && !joint,
            "--use-router-consistency-loss trains experts and routers in one step, but --schedule is alternate: \
             leave one out",
        ),
        (
            joint && !c.use_router_consistency_loss,
            "--schedule joint is cross-entropy plus the consistency loss, which --no-use-router-consistency-loss \
             turns off: leave one out",
        ),
        (
            joint && c.skip_router_training,
            "--schedule joint trains the routers, but --skip-router-training does not: leave one out",
        ),
        (
            joint && c.batch_size < 2,
            "--schedule joint needs safe and unsafe examples in each micro-batch: --batch-size must be at least 2",
        ),
        (
            c.mode != Mode::Selective && !c.finetune_unsafe_experts,
            "--mode baseline and --mode experts train all experts, but --no-finetune-unsafe-experts trains no expert: \
             leave one out",
        ),
        (
            c.method == Method::Random && c.selection == Selection::PerBatch,
            "--method random draws its experts once a run, to match the count of the gradient method: \
             use --selection global",
        ),
        (
            counts_routing(c) && c.routing_replies != RoutingReplies::Target && c.selection == Selection::PerBatch,
            "--routing-replies own and routing traces are of the whole data set: use --selection global",
        ),
        (
            is_published(c) && c.selection == Selection::PerBatch,
            "this --method selects by the routing of the whole data set: use --selection global",
        ),
        (
            c.method == Method::EsftGate && matches!(c.routing_replies, RoutingReplies::File(_)),
            "--method esft-gate needs routing weights, which routing traces do not hold: use --method esft-token",
        ),
        (
            c.method == Method::Given && c.selection == Selection::PerBatch,
            "--method given has the same experts in all steps: use --selection global",
        ),
        (
            c.method == Method::Given && c.experts.is_none(),
            "--method given needs the file of the experts: give --experts FILE",
        ),
    ]
}

/// Options that have no effect because of these options: (whether the rule applies, why, names of the options).
pub(super) fn no_effect(c: &RunConfig) -> Vec<(bool, &'static str, &'static [&'static str])> {
    let no_expert_phase = !c.finetune_unsafe_experts;
    let joint = c.schedule == Schedule::Joint;
    let nothing_trained = no_expert_phase && !joint && c.skip_router_training;
    const RETAIN: &[&str] = &["retain-loss", "retain-weight", "retain-routing-weight"];
    let in_rounds: &[&str] = &["identify", "identify-until"];
    vec![
        (
            !resamples(c),
            "only scores of the whole data, by --method gradient or routing, are resampled",
            &["bootstrap"],
        ),
        (c.num_rounds == 1, "there is only one round (--num-rounds 1)", in_rounds),
        (c.selection == Selection::PerBatch, "--selection per-batch selects at every step", in_rounds),
        (c.method == Method::Random, "--method random draws its experts once a run", in_rounds),
        (c.method == Method::Given, "--method given has the same experts in all rounds", in_rounds),
        (c.method == Method::Routing, "only --method gradient computes the loss", &["identify-until"]),
        (c.identify == IdentifyIn::Once, "only --identify every-round uses it", &["identify-until"]),
        (c.retain_dataset_path.is_none(), "only --retain-dataset-path uses it", RETAIN),
        (nothing_trained, "nothing is trained, so nothing drifts", &["retain-dataset-path"]),
        (nothing_trained, "nothing is trained, so nothing drifts", RETAIN),
        (c.retain_weight == 0.0, "--retain-weight is 0", &["retain-loss"]),
        (no_expert_phase, "experts are not trained (--no-finetune-unsafe-experts)", &["expert-lr", "selection"]),
        (
            no_expert_phase && !joint,
            "experts are not trained (--no-finetune-unsafe-experts)",
            &["expert-epochs-per-round"],
        ),
        (
            c.finetune_unsafe_experts && c.mode == Mode::Selective && c.selection == Selection::PerBatch,
            "the selection changes at each step",
            &["verify"],
        ),
        (c.mode != Mode::Selective, "only --mode selective trains selected experts", &["selection"]),
        (
            c.skip_router_training,
            "routers are not trained (--skip-router-training)",
            &[
                "router-lr",
                "router-epochs-per-round",
                "router-statistic",
                "router-last-tokens",
                "router-target",
                "kl-type",
            ],
        ),
        (
            joint,
            "only the router phase of --schedule alternate uses it",
            &["router-epochs-per-round", "router-statistic", "router-last-tokens", "router-target", "kl-type"],
        ),
        (
            !joint,
            "only --use-router-consistency-loss uses it",
            &["router-consistency-weight", "router-consistency-type", "router-consistency-layers", "safe-ratio"],
        ),
    ]
}
