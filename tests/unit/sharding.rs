//! Each rank holds only its shard of the optimizer state, and gradients are sent during the backward pass.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::case::Case;
use moewarden::backend::{Backend, cpu::Cpu};
use moewarden::collective::conformance::on_threads;
use moewarden::model::{GradPlan, LossGrads, ParamId, ParamKind, PassEnd, Sinks};
use moewarden::optim::{LearningRates, ShardPlan};
use moewarden::run::Rank;
use moewarden::run::engine::Engine;
use moewarden::run::memory::TrainedState;
use moewarden::run::trainer::{Passes, Trainer};
use moewarden::ui::Ui;

/// Runs `work` with an engine on each of `ranks` ranks.
fn on_ranks<T: Send + 'static>(ranks: usize, work: impl Fn(Engine<'_, Cpu>) -> T + Send + Sync + 'static) -> Vec<T> {
    let case = Arc::new(Case::open("olmoe"));
    on_threads(ranks, move |world| {
        let rank = Rank::new(Arc::new(world), Ui::silent());
        work(case.session.engine(&case.config, Arc::new(Cpu::new(1)), None, &rank))
    })
}

fn all_params(engine: &Engine<'_, Cpu>) -> Vec<ParamId> {
    (0..engine.model.table.params.len()).collect()
}

const END: PassEnd = PassEnd::Loss { all_rows: false };
const LOSS: LossGrads<'static> = LossGrads { ce_scale: 0.01, routers: &[] };

/// A backward pass of one record.
fn backward(engine: &Engine<'_, Cpu>, plan: &GradPlan, passes: &mut Passes<'_, Cpu>, record: usize, last: bool) {
    let inputs = engine.inputs(&engine.pack_unsafe(&[record]));
    let forward = engine.forward(&inputs, Some(plan), END, None);
    passes.backward(&engine.model, &inputs, forward, LOSS, last);
}

#[test]
fn a_finished_layer_has_all_its_gradients_and_lower_layers_have_none() {
    on_ranks(1, |engine| {
        let (model, b) = (&engine.model, &*engine.model.backend);
        let trainer = Trainer::new(&engine, &all_params(&engine));
        let plan = &trainer.plan;
        let inputs = engine.inputs(&engine.pack_unsafe(&[0, 1, 2]));
        let forward = engine.forward(&inputs, Some(plan), END, None);
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
                let range = start..start + spec.value.len();
                let is_complete = match spec.kind {
                    ParamKind::Embedding => false,
                    ParamKind::FinalNorm | ParamKind::LmHead => true,
                    kind => kind.layer().unwrap() >= *layer,
                };
                let expected = if is_complete { &end[range.clone()] } else { &vec![0.0; range.len()] };
                assert_eq!(&then[range], expected, "{} when layer {layer} is done", spec.name());
            }
        }
        assert!(end.iter().filter(|x| **x != 0.0).count() > end.len() / 2);
    });
}

#[test]
fn buckets_are_sent_during_the_last_backward_pass() {
    // Rank 0 trains; rank 1 contributes zeros and counts the buckets from rank 0.
    let come = AtomicUsize::new(0);
    on_ranks(2, move |engine| {
        let all = all_params(&engine);
        if engine.world.rank() == 1 {
            let lens = all.iter().map(|&id| engine.model.table.params[id].value.len());
            let shards = ShardPlan::new(lens, 2, 1);
            for bucket in shards.buckets() {
                let counts = shards.counts(bucket.clone());
                let zeros = vec![0.0; counts.iter().sum()];
                engine.world.reduce_scatter_f32(&zeros, &counts, &mut vec![0.0; counts[1]]).unwrap();
                come.fetch_add(1, Ordering::SeqCst);
            }
            return;
        }
        let mut trainer = Trainer::with_bucket(&engine, &all, 1); // a bucket for each parameter
        let plan = trainer.plan.clone();
        let ran = trainer.accumulate(&engine, |passes| {
            backward(&engine, &plan, passes, 0, false);
            sleep(Duration::from_millis(100));
            assert_eq!(come.load(Ordering::SeqCst), 0, "an unfinished gradient was sent");
            backward(&engine, &plan, passes, 1, true);
            // The step has not ended, but every gradient is complete, and all except the embedding's belong to a finished layer.
            let start = Instant::now();
            while come.load(Ordering::SeqCst) < all.len() - 1 {
                let come = come.load(Ordering::SeqCst);
                assert!(start.elapsed() < Duration::from_secs(30), "{come} of {} buckets were sent", all.len());
                sleep(Duration::from_millis(1));
            }
        });
        ran.unwrap();
    });
}

#[test]
fn results_do_not_depend_on_the_bucket_size() {
    let weights = |bucket: usize| {
        let ranks = on_ranks(2, move |mut engine| {
            let mut trainer = Trainer::with_bucket(&engine, &all_params(&engine), bucket);
            for step in 0..2 {
                let (plan, rank) = (trainer.plan.clone(), engine.world.rank());
                trainer.accumulate(&engine, |passes| backward(&engine, &plan, passes, 2 * step + rank, true)).unwrap();
                let norm = trainer.norm(&engine).unwrap().value;
                trainer.update(&mut engine, &LearningRates { expert: 1e-3, router: 1e-3, other: 1e-3 }, norm).unwrap();
            }
            all_params(&engine).into_iter().map(|id| engine.model.weight_host(id).bytes.to_vec()).collect::<Vec<_>>()
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
fn each_of_four_ranks_holds_a_quarter_of_the_optimizer_state() {
    let ranks = on_ranks(4, |engine| {
        let trainer = Trainer::new(&engine, &all_params(&engine));
        (trainer.optimizer().bytes(), engine.model.table.total().elements, engine.model.table.params.len())
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
