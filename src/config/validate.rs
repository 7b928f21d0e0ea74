//! Validation of resolved options: ranges, contradictions, options without effect.

use super::{Device, Init, Mode, RunConfig, SaveRounds, Schedule};
use crate::experts::{Method, RandomMatch, Selection};

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
        ("logging-steps", c.logging_steps, 1, "use a large number for few log lines"),
        ("keep-checkpoints", c.keep_checkpoints, 1, "--resume needs one"),
        ("ranks", c.ranks.unwrap_or(1), 1, "use 1 to turn data parallelism off"),
        ("timeout", c.timeout as usize, 1, "0 s would time out at the first collective"),
    ];
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
        (
            "router-consistency-weight",
            c.router_consistency_weight,
            "to train without this loss, use --schedule alternate",
        ),
        ("max-grad-norm", c.max_grad_norm.unwrap_or(1.0), "leave it out for no clipping"),
    ];
    for (option, value, hint) in positive {
        if !(value.is_finite() && value > 0.0) {
            wrong.push(format!("--{option} is {value}, but must be a finite number above 0: {hint}"));
        }
    }
    if !(c.weight_decay.is_finite() && c.weight_decay >= 0.0) {
        wrong.push(format!(
            "--weight-decay is {}, but must be finite and not negative: use 0 to turn weight decay off",
            c.weight_decay
        ));
    }
    if !(-1.0..=1.0).contains(&c.risk_threshold) {
        let hint = "it is the threshold of a difference of two frequencies";
        wrong.push(format!(
            "--risk-threshold is {}, but must be a finite number between -1 and 1: {hint}",
            c.risk_threshold
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
    let joint = c.schedule == Schedule::Joint;
    let cases = [
        (
            c.use_router_consistency_loss && !joint,
            "--use-router-consistency-loss trains experts and routers in one step, but --schedule is alternate: \
             leave out --schedule, or the loss",
        ),
        (
            joint && !c.use_router_consistency_loss,
            "--schedule joint is cross-entropy plus the consistency loss, which --no-use-router-consistency-loss \
             turns off: leave one out",
        ),
        (
            joint && c.skip_router_training,
            "the joint schedule trains the routers, and --skip-router-training leaves them alone: leave one out",
        ),
        (
            joint && c.batch_size < 2,
            "the joint schedule needs safe and unsafe examples in each micro-batch: --batch-size must be at least 2",
        ),
        (
            c.mode != Mode::Selective && !c.finetune_unsafe_experts,
            "--mode baseline and --mode experts train all experts, and --no-finetune-unsafe-experts trains none: \
             leave one out",
        ),
        (
            c.method == Method::Random && c.selection == Selection::PerBatch,
            "random experts are drawn once a round, so that they stay as many as the method they control: \
             use --selection global",
        ),
        (
            c.init == Init::Random && c.resume,
            "--resume goes on from a checkpoint, and a run of --init random makes none: leave one out",
        ),
        (c.overwrite && c.resume, "--overwrite removes the outputs that --resume continues: leave one out"),
    ];
    wrong.extend(cases.into_iter().filter(|(holds, _)| *holds).map(|(_, message)| message.to_owned()));
}

fn texts(c: &RunConfig, wrong: &mut Vec<String>) {
    if c.safe_response.trim().is_empty() {
        wrong.push("--safe-response is empty: give the response that the model is to learn for unsafe prompts".into());
    }
    if c.output_dir.as_os_str().is_empty() {
        wrong.push("--output-dir is empty: give a folder (`.` is the current one)".into());
    }
    let paths = [
        ("model-name", Some(c.model_name.as_ref())),
        ("dataset-path", Some(c.dataset_path.as_path())),
        ("eval-dataset-path", c.eval_dataset_path.as_deref()),
        ("chat-template", c.chat_template.as_deref()),
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

/// Options that ask for something else than their default does, in a run in which they cannot act: (name, why).
pub(super) fn inert(c: &RunConfig) -> Vec<(&'static str, &'static str)> {
    let no_expert_phase = !c.finetune_unsafe_experts;
    let joint = c.schedule == Schedule::Joint;
    let random = c.method == Method::Random;
    let gradient_scores = c.method == Method::Gradient || random && c.random_match == RandomMatch::Layer;
    let random_weights = c.init == Init::Random;
    let no_model = "random weights are not worth writing (--init random)";
    let rules: [(bool, &str, &[&str]); 14] = [
        (!gradient_scores, "it belongs to the gradient method (--method gradient)", &["score", "score-per"]),
        (c.method != Method::Routing, "it belongs to --method routing", &["risk-threshold", "routing-tokens"]),
        (!random, "it belongs to --method random", &["random-match"]),
        (random && c.random_match == RandomMatch::Total, "random experts are not ranked", &["select"]),
        (no_expert_phase, "experts are not trained (--no-finetune-unsafe-experts)", &["expert-lr", "selection"]),
        (
            no_expert_phase && !joint,
            "experts are not trained (--no-finetune-unsafe-experts)",
            &["expert-epochs-per-round"],
        ),
        (c.mode != Mode::Selective, "only --mode selective trains a selection", &["selection"]),
        (
            c.skip_router_training,
            "routers are not trained (--skip-router-training)",
            &["router-lr", "router-epochs-per-round", "router-statistic", "kl-type"],
        ),
        (
            joint,
            "it belongs to the router phase of --schedule alternate",
            &["router-epochs-per-round", "router-statistic", "kl-type"],
        ),
        (c.device == Device::Cpu, "it belongs to GPUs (--device cuda)", &["precision", "transport", "profile"]),
        (
            !joint,
            "it belongs to --use-router-consistency-loss",
            &["router-consistency-weight", "router-consistency-type", "router-consistency-layers", "safe-ratio"],
        ),
        (random_weights && c.save_rounds != SaveRounds::None, no_model, &["save-rounds"]),
        (random_weights && c.save_steps > 0, no_model, &["save-steps"]),
        (random_weights, no_model, &["keep-checkpoints"]),
    ];
    let default = RunConfig::default();
    let mut found: Vec<(&str, &str)> = Vec::new();
    for (_, why, options) in rules.into_iter().filter(|(applies, ..)| *applies) {
        for option in options.iter().filter(|o| !c.same(&default, o)) {
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

    /// [`inert`] panics on a name that is no option.
    #[test]
    fn every_rule_names_options() {
        inert(&RunConfig { schedule: Schedule::Joint, ..RunConfig::default() });
        inert(&RunConfig {
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
