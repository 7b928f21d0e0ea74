//! Validation of resolved options: ranges, contradictions, options without effect.

use super::{Device, Init, Offload, RoutingReplies, RunConfig, SaveRounds, recipe};
use crate::data::is_blank;
use crate::experts::Method;

/// The most resamples of a bootstrap.
const MAX_RESAMPLES: usize = 100_000;

/// The most of what is repeated: far more than can be run, and few enough to count.
pub(super) const MOST: usize = 10_000_000;

/// All values out of range and all contradictions, each with a remedy.
pub(super) fn problems(c: &RunConfig) -> Vec<String> {
    let mut wrong = Vec::new();
    counts(c, &mut wrong);
    numbers(c, &mut wrong);
    contradictions(c, &mut wrong);
    texts(c, &mut wrong);
    wrong
}

fn counts(c: &RunConfig, wrong: &mut Vec<String>) {
    if c.bootstrap > MAX_RESAMPLES {
        wrong.push(format!(
            "--bootstrap is {}, but must be at most {MAX_RESAMPLES}: each resample takes 8 bytes an expert",
            c.bootstrap
        ));
    }
    let at_least = [
        ("max-samples", c.max_samples, 1, "to use all rows, give a number above their number"),
        ("max-length", c.max_length, 2, "the first token of an example is never predicted"),
        ("batch-size", c.batch_size, 1, "a micro-batch needs an example"),
        ("grad-accum", c.grad_accum, 1, "use 1 to turn accumulation off"),
        ("top-k-experts", c.top_k_experts, 1, "to train no expert, use --no-finetune-unsafe-experts"),
        ("experts-per-layer", c.experts_per_layer.unwrap_or(1), 1, "leave it out for no limit"),
        ("num-rounds", c.num_rounds, 1, "to score or evaluate without training, use `identify` or `eval`"),
        (
            "expert-epochs-per-round",
            c.expert_epochs_per_round,
            1,
            "to train no expert, use --no-finetune-unsafe-experts",
        ),
        ("router-epochs-per-round", c.router_epochs_per_round, 1, "to train no router, use --skip-router-training"),
        ("max-new-tokens", c.max_new_tokens.unwrap_or(1), 1, "a reply has at least one token"),
        ("generation-batch-size", c.generation_batch_size, 1, "use 1 to generate one reply at a time"),
        ("logging-steps", c.logging_steps, 1, "use a large number for few log lines"),
        ("keep-checkpoints", c.keep_checkpoints, 1, "--resume needs one"),
        ("ranks", c.ranks.unwrap_or(1), 1, "use 1 to turn data parallelism off"),
        ("timeout", c.timeout as usize, 1, "0 s would time out at the first collective"),
    ];
    let repeated = [
        ("num-rounds", c.num_rounds),
        ("expert-epochs-per-round", c.expert_epochs_per_round),
        ("router-epochs-per-round", c.router_epochs_per_round),
        ("grad-accum", c.grad_accum),
        ("warmup-steps", c.warmup_steps),
        ("verify", c.verify),
        ("max-new-tokens", c.max_new_tokens.unwrap_or(1)),
    ];
    for (option, value) in repeated.into_iter().filter(|(_, value)| *value > MOST) {
        wrong.push(format!("--{option} is {value}, but must be at most {MOST}"));
    }
    for (option, value, least, hint) in at_least {
        if value < least {
            wrong.push(format!("--{option} is {value}, but must be at least {least}: {hint}"));
        }
    }
}

fn numbers(c: &RunConfig, wrong: &mut Vec<String>) {
    let positive = [
        ("expert-lr", c.expert_lr, "to train no expert, use --no-finetune-unsafe-experts"),
        ("router-lr", c.router_lr, "to train no router, use --skip-router-training"),
        ("max-grad-norm", c.max_grad_norm.unwrap_or(1.0), "leave it out for no clipping"),
    ];
    for (option, value, hint) in positive {
        if !(value.is_finite() && value > 0.0) {
            wrong.push(format!("--{option} is {value}, but must be a finite number above 0: {hint}"));
        }
    }
    let not_negative = [
        ("weight-decay", c.weight_decay, "use 0 to turn weight decay off"),
        ("router-consistency-weight", c.router_consistency_weight, "use 0 to train without this loss"),
    ];
    for (option, value, hint) in not_negative {
        if !(value.is_finite() && value >= 0.0) {
            wrong.push(format!("--{option} is {value}, but must be finite and not negative: {hint}"));
        }
    }
    for (option, weight) in [("retain-weight", c.retain_weight), ("retain-routing-weight", c.retain_routing_weight)] {
        if !(weight.is_finite() && weight >= 0.0) {
            let hint = "use 0 to train without this loss";
            wrong.push(format!("--{option} is {weight}, but must be finite and not negative: {hint}"));
        }
    }
    if !(-1.0..=1.0).contains(&c.risk_threshold) {
        let hint = "it is the threshold of a difference of two frequencies";
        wrong.push(format!(
            "--risk-threshold is {}, but must be a finite number between -1 and 1: {hint}",
            c.risk_threshold
        ));
    }
    if !(0.0..=1.0).contains(&c.identify_until) {
        let hint = "it is a share of the first round's loss; use 0 to select anew in every round";
        wrong.push(format!(
            "--identify-until is {}, but must be a finite number between 0 and 1: {hint}",
            c.identify_until
        ));
    }
    if !(c.safe_ratio > 0.0 && c.safe_ratio < 1.0) {
        let hint = "the divergence needs safe and unsafe examples in each batch";
        wrong.push(format!(
            "--safe-ratio is {}, but must be a finite number between 0 and 1, both excluded: {hint}",
            c.safe_ratio
        ));
    }
    if let Some(layers) = c.layers.as_ref().filter(|l| l.is_empty()) {
        let (first, last) = layers.clone().into_inner();
        wrong.push(format!("--layers {first}-{last} is an empty range: write the lower one first, {last}-{first}"));
    }
}

fn contradictions(c: &RunConfig, wrong: &mut Vec<String>) {
    let cases = [
        (
            c.init == Init::Random && c.resume,
            "--resume needs a checkpoint, but a run with --init random saves no checkpoint: leave one out",
        ),
        (
            c.shard_frozen && c.offload != Offload::Auto,
            "--shard-frozen and --offload place the same experts: leave --offload out to divide them among GPUs",
        ),
        (c.overwrite && c.resume, "--overwrite deletes the outputs that --resume continues: leave one out"),
    ];
    let cases = recipe::contradictions(c).into_iter().chain(cases);
    wrong.extend(cases.filter(|(holds, _)| *holds).map(|(_, message)| message.to_owned()));
}

fn texts(c: &RunConfig, wrong: &mut Vec<String>) {
    if is_blank(&c.safe_response) {
        wrong.push("--safe-response is empty: give the response that the model is to learn for unsafe prompts".into());
    }
    if c.output_dir.as_os_str().is_empty() {
        wrong.push("--output-dir is empty: give a folder (`.` is the current one)".into());
    }
    let paths = [
        ("model-name", Some(c.model_name.as_ref())),
        ("dataset-path", Some(c.dataset_path.as_path())),
        ("eval-dataset-path", c.eval_dataset_path.as_deref()),
        ("retain-dataset-path", c.retain_dataset_path.as_deref()),
        ("chat-template", c.chat_template.as_deref()),
        ("experts", c.experts.as_deref()),
        ("routing-replies", c.routing_replies.path()),
        ("output-dir", Some(c.output_dir.as_path())),
    ];
    for (option, path) in paths {
        if path.is_some_and(|p| p.starts_with("~")) {
            let hint =
                "the shell expands `~` only at the start of an argument, and never in a file: write the path out";
            wrong.push(format!("--{option} begins with `~`: {hint}"));
        }
    }
}

/// Options with a value other than the default that have no effect in this run: (name, reason).
pub fn options_without_effect(c: &RunConfig) -> Vec<(&'static str, &'static str)> {
    let default = RunConfig::default();
    inert_options(c).into_iter().filter(|(option, _)| !c.same(&default, option)).collect()
}

/// Refuses an option that has no effect.
pub fn would_do_nothing(option: &str, why: &str) -> String {
    format!("--{option} would do nothing: {why}; leave it out")
}

/// Options that have no effect in this run, whatever their value: (name, reason).
pub(super) fn inert_options(c: &RunConfig) -> Vec<(&'static str, &'static str)> {
    let random = c.method == Method::Random;
    let given = c.method == Method::Given;
    let gradient_scores = recipe::computes_gradient_scores(c);
    let random_weights = c.init == Init::Random;
    let no_model = "a run with --init random saves no model and no checkpoint";
    let own_replies = recipe::counts_routing(c) && c.routing_replies == RoutingReplies::Own;
    let mut rules: Vec<(bool, &str, &[&str])> = vec![
        (!gradient_scores, "only --method gradient uses it", &["score", "score-per", "score-norm"]),
        (c.method != Method::Routing, "only --method routing uses it", &["risk-threshold"]),
        (
            !recipe::counts_routing(c),
            "only --method routing and the published rules use it",
            &["routing-tokens", "routing-replies"],
        ),
        (
            recipe::decides_size(c),
            "this --method decides itself how many experts it selects",
            &["top-k-experts", "experts-per-layer", "select"],
        ),
        (c.method == Method::Steermoe, "--method steermoe selects from the top", &["select"]),
        (
            !own_replies && c.verify == 0,
            "only --routing-replies own and --verify use it",
            &["max-new-tokens", "generation-batch-size"],
        ),
        (!random, "only --method random uses it", &["random-match", "random-exclude-found"]),
        (random && !gradient_scores, "--method random does not rank experts", &["select"]),
        (!given, "only --method given uses it", &["experts"]),
        (
            given,
            "--method given selects the experts of --experts",
            &["top-k-experts", "experts-per-layer", "layers", "select"],
        ),
    ];
    rules.extend(recipe::no_effect(c));
    rules.extend([
        (
            c.device == Device::Cpu,
            "only GPUs use it (--device cuda)",
            &["transport", "profile", "offload", "shard-frozen"][..],
        ),
        (random_weights && c.save_rounds != SaveRounds::None, no_model, &["save-rounds"]),
        (random_weights && c.save_steps > 0, no_model, &["save-steps"]),
        (random_weights, no_model, &["keep-checkpoints"]),
    ]);
    let mut found: Vec<(&str, &str)> = Vec::new();
    for (_, why, options) in rules.into_iter().filter(|(applies, ..)| *applies) {
        for option in options {
            if found.iter().all(|(earlier, _)| earlier != option) {
                found.push((option, why));
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Mode, Schedule};

    /// [`options_without_effect`] panics on an unknown name.
    #[test]
    fn every_rule_names_options() {
        options_without_effect(&RunConfig { schedule: Schedule::Joint, ..RunConfig::default() });
        options_without_effect(&RunConfig {
            method: Method::Random,
            finetune_unsafe_experts: false,
            mode: Mode::Baseline,
            skip_router_training: true,
            device: Device::Cpu,
            init: Init::Random,
            ..RunConfig::default()
        });
    }
}
