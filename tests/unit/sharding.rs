//! Each rank holds only its shard of the optimizer state, and gradients are sent during the backward pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::case::{Case, CaseRun};
use moewarden::backend::{Backend, cpu::Cpu};
use moewarden::collective::conformance::on_threads;
use moewarden::launch::Rank;
use moewarden::model::{LossGrads, ParamId, ParamKind, PassEnd, Sinks};
use moewarden::optim::{LearningRates, ShardPlan};
use moewarden::train::memory::TrainedState;
use moewarden::train::{StepBackward, Trainer};
use moewarden::ui::Ui;

/// Runs `work` on each of `ranks` ranks.
fn on_ranks<T: Send + 'static>(ranks: usize, work: impl Fn(CaseRun<'_, Cpu>) -> T + Send + Sync + 'static) -> Vec<T> {
    let case = Arc::new(Case::open("olmoe"));
    on_threads(ranks, move |world| {
        let rank = Rank::new(Arc::new(world), Ui::silent());
        work(case.run_as(&case.config, Arc::new(Cpu::new(1)), &rank))
    })
}

fn all_params(run: &CaseRun<'_, Cpu>) -> Vec<ParamId> {
    (0..run.model().table.params.len()).collect()
}

const END: PassEnd = PassEnd::Loss { all_rows: false };
const LOSS: LossGrads<'static> = LossGrads { ce_scale: 0.01, routers: &[] };

/// A backward pass of one record.
fn backward(run: &CaseRun<'_, Cpu>, step: &mut StepBackward<'_, Cpu>, record: usize, last: bool) {
    let inputs = run.replica.inputs(&run.sampler().pack_unsafe(&[record]));
    let forward = step.forward(&inputs, END, None);
    step.backward(&inputs, forward, LOSS, last);
}

#[test]
fn gradients_are_complete_layer_by_layer() {
    on_ranks(1, |run| {
        let (model, b) = (run.model(), &*run.model().backend);
        let trainer = Trainer::new(&run.replica, &all_params(&run));
        let plan = &trainer.plan;
        let inputs = run.replica.inputs(&run.sampler().pack_unsafe(&[0, 1, 2]));
        let forward = run.replica.forward(&inputs, Some(plan), END, None);
        let (mut grads, mut scores) = (b.buffer(plan.len()), b.scores(0));
        let mut done = Vec::new();
        let mut observe =
            |layer: usize, grads: &<Cpu as Backend>::Buffer| done.push((layer, b.buffer_read(grads, 0..plan.len())));
        let mut sinks = Sinks { plan, grads: &mut grads, scores: &mut scores, done: Some(&mut observe) };
        model.backward(&inputs, forward, LOSS, &mut sinks);
        let end = b.buffer_read(&grads, 0..plan.len());

        let layers = model.config.layers.len();
        assert_eq!(done.iter().map(|(layer, _)| *layer).collect::<Vec<_>>(), (0..layers).rev().collect::<Vec<_>>());
        for (layer, then) in &done {
            for (id, spec) in model.table.iter() {
                let start = plan.slot(id).unwrap();
                let range = start..start + spec.len();
                let is_complete = match spec.kind {
                    ParamKind::Embedding => false,
                    ParamKind::FinalNorm | ParamKind::LmHead => true,
                    kind => kind.layer().unwrap() >= *layer,
                };
                let expected = if is_complete { &end[range.clone()] } else { &vec![0.0; range.len()] };
                assert_eq!(&then[range], expected, "{} after layer {layer}", spec.name());
            }
        }
        assert!(end.iter().filter(|x| **x != 0.0).count() > end.len() / 2);
    });
}

#[test]
fn buckets_are_sent_during_the_last_backward_pass() {
    // Rank 0 trains; rank 1 contributes zeros and counts the buckets that arrive.
    let arrived = AtomicUsize::new(0);
    on_ranks(2, move |run| {
        let all = all_params(&run);
        if run.replica.world.rank() == 1 {
            let lens = all.iter().map(|&id| run.model().table.params[id].len());
            let shards = ShardPlan::new(lens, 2, 1);
            for bucket in shards.buckets() {
                let counts = shards.counts(bucket.clone());
                let zeros = vec![0.0; counts.iter().sum()];
                run.replica.world.reduce_scatter_f32(&zeros, &counts, &mut vec![0.0; counts[1]]).unwrap();
                arrived.fetch_add(1, Ordering::SeqCst);
            }
            return;
        }
        let mut trainer = Trainer::with_bucket_size(&run.replica, &all, 1); // a bucket for each parameter
        let ran = trainer.accumulate(&run.replica, |passes| {
            backward(&run, passes, 0, false);
            sleep(Duration::from_millis(100));
            assert_eq!(arrived.load(Ordering::SeqCst), 0, "a bucket was sent before its gradients were complete");
            backward(&run, passes, 1, true);
            // Inside the step, all buckets but that of the embedding (whose gradient completes after the last layer)
            // arrive.
            let start = Instant::now();
            while arrived.load(Ordering::SeqCst) < all.len() - 1 {
                let arrived = arrived.load(Ordering::SeqCst);
                assert!(start.elapsed() < Duration::from_secs(30), "{arrived} of {} buckets have arrived", all.len());
                sleep(Duration::from_millis(1));
            }
        });
        ran.unwrap();
    });
}

#[test]
fn results_do_not_depend_on_the_bucket_size() {
    let weights = |bucket: usize| {
        let ranks = on_ranks(2, move |mut run| {
            let mut trainer = Trainer::with_bucket_size(&run.replica, &all_params(&run), bucket);
            for step in 0..2 {
                let rank = run.replica.world.rank();
                trainer.accumulate(&run.replica, |passes| backward(&run, passes, 2 * step + rank, true)).unwrap();
                let norm = trainer.norm(&run.replica).unwrap().value;
                let rates = LearningRates { expert: 1e-3, router: 1e-3, other: 1e-3 };
                let updates = run.recipe.updates.clone();
                trainer.update(&mut run.replica, &rates, norm, &updates).unwrap();
            }
            all_params(&run).into_iter().map(|id| run.model().weight_host(id).bytes.to_vec()).collect::<Vec<_>>()
        });
        assert!(ranks[0] == ranks[1], "both ranks have the same weights");
        ranks.into_iter().next().unwrap()
    };
    let expected = weights(usize::MAX);
    for bucket in [1, 1000, 30_000] {
        assert!(weights(bucket) == expected, "buckets of {bucket}");
    }
}

#[test]
fn each_of_four_ranks_keeps_a_quarter_of_the_optimizer() {
    let ranks = on_ranks(4, |run| {
        let trainer = Trainer::new(&run.replica, &all_params(&run));
        (trainer.optimizer().bytes(), run.model().table.total().elements, run.model().table.params.len())
    });
    let (_, elements, params) = ranks[0];
    assert_eq!(ranks.iter().map(|(bytes, ..)| bytes).sum::<usize>(), 12 * elements);
    for (bytes, ..) in ranks {
        assert!(bytes.abs_diff(12 * elements / 4) <= 12 * params, "{bytes} of {}", 12 * elements);
        // The prediction also counts the gradient sum, not only masters and moments.
        let predicted = TrainedState::predict(elements as u64, 4, 4).sharded as usize;
        assert!(predicted.abs_diff(bytes / 12 * 16) <= 16 * params, "{predicted} predicted");
    }
}
