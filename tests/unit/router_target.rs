//! The fixed target of the router phase: the routing of the safe prompts before the first step.

use crate::case::Case;
use moewarden::config::RunConfig;
use moewarden::routers::{RouterTarget, Statistic};
use moewarden::train::StepResult;

/// Steps of a router phase of two epochs.
fn steps(case: &Case, router_target: RouterTarget, router_statistic: Statistic, last_tokens: usize) -> Vec<StepResult> {
    let config = RunConfig {
        router_target,
        router_statistic,
        router_last_tokens: last_tokens,
        router_epochs_per_round: 2,
        router_lr: 1e-2,
        ..case.config.clone()
    };
    case.run(&config, 1).run_phase("router", &[])
}

#[test]
fn the_target_stays_where_it_was_before_the_first_step() {
    let case = Case::open("olmoe");
    for statistic in [Statistic::TokenProbs, Statistic::SampleLogits] {
        for last_tokens in [0, 1] {
            let current = steps(&case, RouterTarget::Current, statistic, last_tokens);
            let fixed = steps(&case, RouterTarget::RoundStart, statistic, last_tokens);
            assert_eq!(current.len(), fixed.len());
            let losses = |steps: &[StepResult]| steps.iter().map(|step| step.total_loss).collect::<Vec<_>>();
            let (current_losses, fixed_losses) = (losses(&current), losses(&fixed));
            // Nothing has moved before the first step. Sums of single prompts round differently.
            assert!((fixed_losses[0] - current_losses[0]).abs() < 1e-9, "{fixed_losses:?}, {current_losses:?}");
            let differ = fixed_losses[1..].iter().zip(&current_losses[1..]).filter(|(a, b)| (**a - **b).abs() > 1e-6);
            assert_eq!(differ.count(), fixed.len() - 1, "{fixed_losses:?}, {current_losses:?}");
            assert!(fixed.iter().zip(&current).all(|(a, b)| a.tokens < b.tokens), "the safe forward pass is saved");
        }
    }
}

#[test]
fn the_last_tokens_of_all_prompts_are_all_tokens() {
    let case = Case::open("olmoe");
    let loss = |last| steps(&case, RouterTarget::Current, Statistic::TokenProbs, last)[0].total_loss;
    assert!((loss(1000) - loss(0)).abs() < 1e-9, "all tokens, in one range a prompt");
    assert!((loss(1) - loss(0)).abs() > 1e-6, "the last token alone is another statistic");
}
