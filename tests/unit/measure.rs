//! Losses of single examples: they add up, they do not depend on the world size, and an example is exact where greedy decoding
//! gives it.

use std::sync::Arc;

use moewarden::backend::cpu::Cpu;
use moewarden::collective::conformance::on_threads;
use moewarden::data::Example;
use moewarden::launch::Rank;
use moewarden::report::{GenerationSpeed, Sampling};
use moewarden::run::generate::{Prompt, answers};
use moewarden::train::{Measured, alignment_by_layer, divergence_of_prompts, example_losses, mean_of};
use moewarden::ui::Ui;

use crate::case::Case;

#[test]
fn examples_of_greedy_answers_are_exact_and_others_are_not() {
    let case = Case::open("olmoe");
    let replica = case.session.replica(Arc::new(Cpu::new(2)), None, &Rank::single(Ui::silent()), Default::default());
    let sampling = Sampling::greedy(6);
    let mut examples = Vec::new();
    for record in &case.session.data.records {
        let Some(prompt) = &record.unsafe_prompt else { continue };
        let asked = [Prompt { ids: prompt, index: 0 }];
        let said =
            answers(replica.model(), &asked, &[], &sampling, &mut GenerationSpeed::default(), |_, _| {}).unwrap();
        let said = &said[0].ids;
        let ids = [&prompt[..], said].concat();
        let loss = (0..ids.len()).map(|t| t >= prompt.len()).collect();
        examples.push(Example { ids, loss });
        examples.extend(record.unsafe_reply.clone());
    }
    assert!(examples.len() > 6);
    let refs: Vec<&Example> = examples.iter().collect();
    let mut tokens = 0;
    let losses = example_losses(&replica, &refs, 3, |batch| tokens += batch.ids.len()).unwrap();
    assert_eq!(tokens, examples.iter().map(|e| e.ids.len()).sum::<usize>());
    let exact: Vec<bool> = losses.iter().map(|loss| loss.exact).collect();
    assert_eq!(exact, (0..examples.len()).map(|i| i % 2 == 0).collect::<Vec<_>>());
    for (loss, example) in losses.iter().zip(&examples) {
        assert_eq!(loss.tokens, example.loss.iter().filter(|l| **l).count());
        let alone = example_losses(&replica, &[example], 1, |_| {}).unwrap()[0];
        assert!((alone.sum - loss.sum).abs() < 1e-5 * loss.sum && alone.exact == loss.exact, "{alone:?} {loss:?}");
    }
    let refusals: Vec<_> = losses.iter().skip(1).step_by(2).copied().collect();
    let all: f64 = refusals.iter().map(|loss| loss.sum).sum();
    let tokens: usize = refusals.iter().map(|loss| loss.tokens).sum();
    assert_eq!(mean_of(&refusals), Some(all / tokens as f64));
    assert!(mean_of(&[]).is_none());
    let empty = Example { ids: vec![1, 2], loss: vec![false, false] };
    let none = example_losses(&replica, &[&empty], 1, |_| {}).unwrap()[0];
    assert_eq!((none.sum, none.tokens, none.exact, none.mean()), (0.0, 0, false, 0.0));
}

/// What is measured on the whole data must not depend on how many ranks measure it: the divergence of the routers is a mean over
/// micro-batches, not over the global batches of the steps.
#[test]
fn the_measured_losses_do_not_depend_on_the_world_size() {
    let measured = |rank: &Rank| {
        let case = Case::open("olmoe");
        let run = case.run_as(&case.config, Arc::new(Cpu::new(1)), rank);
        Measured::of(&run.replica, run.sampler(), Some(&case.session.data), run.recipe.divergence).unwrap()
    };
    let one = measured(&Rank::single(Ui::silent()));
    assert!(one.router_loss.is_some_and(|loss| loss > 0.0), "{one:?}");
    for ranks in 2..=3 {
        for found in on_threads(ranks, move |world| measured(&Rank::new(Arc::new(world), Ui::silent()))) {
            assert_eq!(found.router_loss, one.router_loss, "{ranks} ranks");
            // The order of a few f64 additions differs.
            let pairs = [
                (found.ce_loss, one.ce_loss),
                (found.safe_loss, one.safe_loss),
                (found.held_out_loss, one.held_out_loss),
            ];
            for (found, one) in pairs {
                assert_eq!(found.is_some(), one.is_some());
                assert!((found.unwrap_or(0.0) - one.unwrap_or(0.0)).abs() < 1e-14, "{ranks} ranks: {found:?} {one:?}");
            }
        }
    }
}

/// Of one micro-batch it is that of training, which the reference has; and neither the batch size nor the ranks change a bit of it.
#[test]
fn the_divergence_of_all_prompts_does_not_depend_on_the_batch_size() {
    let found = |rank: &Rank, batch_size: usize| {
        let mut case = Case::open("olmoe");
        case.session.data.records.retain(|r| r.safe_prompt.is_some() && r.unsafe_prompt.is_some());
        let run = case.run_as(&case.config, Arc::new(Cpu::new(1)), rank);
        let records = &case.session.data.records;
        assert!(records.len() > 2);
        let mut sampler = run.sampler();
        sampler.batch_size = records.len();
        let one_batch = alignment_by_layer(&run.replica, sampler, run.recipe.divergence).unwrap();
        let all = divergence_of_prompts(&run.replica, records, batch_size, run.recipe.divergence).unwrap().unwrap();
        sampler.batch_size = 1;
        (one_batch, all, alignment_by_layer(&run.replica, sampler, run.recipe.divergence).unwrap())
    };
    let (one_batch, all, by_row) = found(&Rank::single(Ui::silent()), 1);
    for ((one, all), by_row) in one_batch.iter().zip(&all).zip(&by_row) {
        assert!((one - all).abs() < 1e-9 && *all > 0.0, "{one} {all}");
        assert!((by_row - all).abs() > 1e-4 * all, "the mean over micro-batches is another number: {by_row} {all}");
    }
    for batch_size in [2, 3, 100] {
        assert_eq!(found(&Rank::single(Ui::silent()), batch_size).1, all, "micro-batches of {batch_size}");
    }
    for (_, other, _) in on_threads(2, move |world| found(&Rank::new(Arc::new(world), Ui::silent()), 2)) {
        assert_eq!(other, all, "2 ranks");
    }
}
