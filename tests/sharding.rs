//! Each rank keeps its part of the optimizer and no more, and gradients leave while the backward pass is under way.

#[cfg(feature = "mpi")]
#[path = "common/binary.rs"]
mod binary;
#[path = "common/case.rs"]
mod case;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use case::Case;
use moewarden::backend::{Backend, cpu::Cpu};
use moewarden::collective::conformance::on_threads;
use moewarden::model::{GradPlan, LossGrads, ParamId, ParamKind, PassEnd, Sinks};
use moewarden::optim::{LearningRates, ShardPlan};
use moewarden::run::Rank;
use moewarden::run::engine::Engine;
use moewarden::run::memory::TrainedState;
use moewarden::run::trainer::{Passes, Trainer};
use moewarden::ui::Ui;

/// Does `work` on the engine of each of so many ranks.
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
fn a_layer_that_is_done_has_all_its_gradients_and_those_below_have_none() {
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
fn buckets_leave_with_the_last_pass_before_it_ends() {
    // Rank 0 trains; rank 1 has nothing to add and counts what comes from rank 0.
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
            assert_eq!(come.load(Ordering::SeqCst), 0, "a gradient that will still grow has left");
            backward(&engine, &plan, passes, 1, true);
            // The step has not ended; but every gradient is complete, and all but the embedding's are after some layer.
            let start = Instant::now();
            while come.load(Ordering::SeqCst) < all.len() - 1 {
                let come = come.load(Ordering::SeqCst);
                assert!(start.elapsed() < Duration::from_secs(30), "{come} of {} buckets have left", all.len());
                sleep(Duration::from_millis(1));
            }
        });
        ran.unwrap();
    });
}

#[test]
fn the_size_of_buckets_decides_nothing() {
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
fn each_of_four_ranks_keeps_a_quarter_of_the_optimizer() {
    let ranks = on_ranks(4, |engine| {
        let trainer = Trainer::new(&engine, &all_params(&engine));
        (trainer.optimizer().bytes(), engine.model.table.total().elements, engine.model.table.params.len())
    });
    let (_, elements, params) = ranks[0];
    assert_eq!(ranks.iter().map(|(bytes, ..)| bytes).sum::<usize>(), 12 * elements);
    for (bytes, ..) in ranks {
        assert!(bytes.abs_diff(12 * elements / 4) <= 12 * params, "{bytes} of {}", 12 * elements);
        // The prediction has the sum of the gradient beside masters and moments.
        let predicted = TrainedState::predict(elements as u64, 4, 4).sharded as usize;
        assert!(predicted.abs_diff(bytes / 12 * 16) <= 16 * params, "{predicted} predicted");
    }
}

#[cfg(feature = "mpi")]
mod processes {
    use std::fs;

    use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
    use moewarden::model::{Checkpoint, ModelConfig, ParamTable};
    use moewarden::run::memory::{TrainedState, human};

    use super::binary::{self, moewarden, start, write_rows};

    /// Bytes of `12.3 MB`.
    fn bytes(text: &str) -> f64 {
        let (number, unit) = text.trim().split_once(' ').unwrap();
        let power = ["B", "kB", "MB", "GB", "TB"].iter().position(|u| *u == unit).unwrap();
        number.parse::<f64>().unwrap() * 1000f64.powi(power as i32)
    }

    /// Whole processes, by the kernel's count: with one rank, masters and moments take 12 bytes a parameter; of four each has a
    /// quarter of that, and of the gradient's sum, which a single rank needs no room for.
    #[test]
    fn processes_that_share_an_optimizer_are_smaller() {
        let dir = tempfile::tempdir().unwrap();
        let [model, data] = ["model", "rows.json"].map(|name| dir.path().join(name));
        // Few rows of few tokens, many small experts: no bucket is much larger than it has to be.
        let spec = TinySpec {
            vocab_size: 320,
            hidden_size: 256,
            num_layers: 4,
            head_dim: 64,
            num_experts: 64,
            expert_width: 192,
            ..TinySpec::new("olmoe")
        };
        write_random_checkpoint(&model, &spec).unwrap();
        for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            let source = binary::model("olmoe").join(file);
            if source.exists() {
                fs::copy(source, model.join(file)).unwrap();
            }
        }
        write_rows(&data, 4);
        let run = |ranks: usize| {
            let output = dir.path().join(format!("on-{ranks}"));
            let text = format!(
                "train --model-name {} --dataset-path {} --output-dir {} --batch-size 1 --grad-accum {} --num-rounds 1 \
                 --mode baseline --skip-router-training --method random --threads 1 --save-rounds none --save-steps 0",
                model.display(),
                data.display(),
                output.display(),
                4 / ranks,
            );
            let ran = start(moewarden(ranks, text.split_whitespace())).end().ok();
            fs::remove_dir_all(&output).unwrap();
            let line = ran.out.lines().find(|line| line.starts_with("peak memory")).unwrap();
            let peaks: Vec<f64> = line.split_once(": ").unwrap().1.split(", ").map(bytes).collect();
            assert_eq!(peaks.len(), ranks, "{line}");
            (peaks, ran.out)
        };
        let (single, _) = run(1);
        let (four, out) = run(4);
        let elements = ParamTable::build(&ModelConfig::from_dir(&model).unwrap(), &Checkpoint::open(&model).unwrap())
            .unwrap()
            .total()
            .elements;
        let predicted = TrainedState::predict(elements as u64, 4, 4).sharded;
        assert!(out.contains(&format!("1/4 of masters and moments {}", human(predicted))), "{out}");
        // 12 bytes a parameter become 16/4. Up to four buckets of 32 MiB on their way take some of it back: two that wait, the one
        // that is made and the one that is sent.
        let (less, buckets) = (8.0 * elements as f64, 4.0 * f64::from(32 << 20));
        for peak in four {
            let saved = single[0] - peak;
            assert!(saved > less - buckets && saved < 1.1 * less, "{saved} bytes less, not {less}");
        }
    }
}
