//! The parameters of a phase on their way through one step: gradients, their sum over ranks, update, new weights.
//!
//! With several ranks the optimizer is sharded (ZeRO stage 1, arXiv 1910.02054): the gradient is reduce-scattered in
//! buckets, so that each rank gets the sum of its own pieces; it updates these, and all ranks gather the new weights in
//! their stored dtype. A bucket leaves as soon as the last backward pass of the step has completed it, while the layers
//! below still compute.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use super::direct::Direct;
use super::engine::Engine;
use crate::backend::{Backend, HostTensor, encode_into};
use crate::collective::{self, Collective};
use crate::exit::Result;
use crate::model::{Forward, GradPlan, Inputs, LossGrads, Model, OnLayer, ParamId, ParamKind, Sinks};
use crate::optim::{AdamW, Error, Gradient, Group, LearningRates, ParamState, ShardPlan, Trainable, clip_factor};

/// Elements after which a bucket is full: 32 MiB of f32, long enough for the network's bandwidth, short enough that the
/// first leaves early. (PyTorch's DistributedDataParallel takes 25 MiB.)
const BUCKET: usize = 8 << 20;

/// Buckets that may wait for the network before the backward pass waits for them: a bound on their memory.
const WAITING: usize = 2;

/// What a phase trains. Each phase begins with fresh moments.
pub struct Trainer<B: Backend> {
    optimizer: AdamW<B>,
    /// What the present step's backward computes.
    pub plan: GradPlan,
    params: Vec<ParamId>,
    /// Elements after which a bucket is full.
    bucket: usize,
    shards: ShardPlan,
    /// For each bucket the decoder layer whose backward completes it; `None`: the end of the pass does.
    complete: Vec<Option<usize>>,
    /// The gradient of this rank's micro-batches, flat.
    grads: B::Buffer,
    /// This rank's pieces of the sum over all ranks. Unused by a rank that is alone, where `grads` is that.
    shard: B::Buffer,
    /// Where they lie.
    pieces: Vec<Gradient>,
    scores: B::Scores,
    /// Whether nothing goes to other ranks.
    alone: bool,
}

/// The global gradient's size.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// L2, over all trained parameters.
    pub value: f64,
    /// The first parameter of which it is not finite.
    pub blame: Option<ParamId>,
}

impl<B: Backend> Trainer<B> {
    /// Trains these parameters.
    pub fn new(engine: &Engine<'_, B>, ids: &[ParamId]) -> Self {
        Self::with_bucket(engine, ids, BUCKET)
    }

    /// The same with buckets of another size.
    pub fn with_bucket(engine: &Engine<'_, B>, ids: &[ParamId], bucket: usize) -> Self {
        let b = &*engine.model.backend;
        let world = &*engine.world;
        let mut trainer = Self {
            optimizer: AdamW::new(world.rank(), world.world_size()),
            plan: GradPlan::train(&engine.model.table, engine.model.config.layers.len(), &[]),
            params: Vec::new(),
            bucket,
            shards: ShardPlan::new([], world.world_size(), bucket),
            complete: Vec::new(),
            grads: b.buffer(0),
            shard: b.buffer(0),
            pieces: Vec::new(),
            scores: b.scores(0),
            alone: world.world_size() == 1 && engine.direct.is_none(),
        };
        trainer.choose(engine, ids);
        trainer
    }

    /// From the next step on trains these; others keep their value and their moments until they are chosen again.
    pub fn choose(&mut self, engine: &Engine<'_, B>, ids: &[ParamId]) {
        let (b, model, world) = (&*engine.model.backend, &engine.model, &*engine.world);
        let rank = world.rank();
        let old = (self.plan.len(), self.shards.shard_len(rank));
        self.optimizer.add(b, model.weights(), &trainables(model, ids));
        self.plan = GradPlan::train(&model.table, model.config.layers.len(), ids);
        self.params = ids.to_vec();
        let lens = ids.iter().map(|&id| model.table.params[id].value.len());
        self.shards = ShardPlan::new(lens, world.world_size(), self.bucket);
        let layer = |&id: &ParamId| completed_by(model, id);
        self.complete =
            self.shards.buckets().iter().map(|bucket| lowest(ids[bucket.clone()].iter().map(layer))).collect();
        let mut offset = 0;
        self.pieces = (0..ids.len())
            .map(|i| {
                let piece = Gradient { param: ids[i], offset };
                offset += self.shards.piece(i, rank).len();
                piece
            })
            .collect();
        // An old buffer goes before the new one comes.
        if self.plan.len() != old.0 {
            self.grads = b.buffer(0);
            self.grads = b.buffer(self.plan.len());
        }
        if !self.alone && self.shards.shard_len(rank) != old.1 {
            self.shard = b.buffer(0);
            self.shard = b.buffer(self.shards.shard_len(rank));
        }
    }

    /// Runs this rank's backward passes of a step by `run`, and adds up the gradients of all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn accumulate<T>(
        &mut self,
        engine: &Engine<'_, B>,
        run: impl FnOnce(&mut Passes<'_, B>) -> T,
    ) -> Result<T, collective::Error> {
        let (b, world) = (&*engine.model.backend, &*engine.world);
        b.buffer_clear(&mut self.grads);
        if engine.poisoned {
            b.buffer_write(&mut self.grads, 0, &[f32::NAN]);
        }
        let Self { plan, shards, complete, grads, shard, pieces, scores, alone, .. } = self;
        if *alone {
            return Ok(run(&mut Passes { plan, grads, scores, leaving: None }));
        }
        if let Some(direct) = &engine.direct {
            let way = Way::Direct { direct: &**direct, shard, pieces, failed: None };
            let leaving = Leaving { shards, complete, next: 0, way };
            let mut passes = Passes { plan, grads, scores, leaving: Some(leaving) };
            let out = run(&mut passes);
            passes.leave(None);
            if let Some(Leaving { way: Way::Direct { failed: Some(error), .. }, .. }) = passes.leaving {
                return Err(error);
            }
            direct.finish()?;
            return Ok(out);
        }
        thread::scope(|scope| {
            let (send, receive) = sync_channel(WAITING);
            let reduced = scope.spawn(|| reduce_scatter(world, shards, receive));
            let leaving = Leaving { shards, complete, next: 0, way: Way::Host { backend: b, send } };
            let mut passes = Passes { plan, grads, scores, leaving: Some(leaving) };
            let out = run(&mut passes);
            passes.leave(None);
            drop(passes); // and with it the sending end: no more buckets will come
            let parts = reduced.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (bucket, part) in parts {
                b.buffer_write(shard, shards.shard_start(bucket.start, world.rank()), &part);
            }
            Ok(out)
        })
    }

    /// The size of the gradient that [`Self::accumulate`] left; all ranks get the same.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn norm(&self, engine: &Engine<'_, B>) -> Result<Norm, collective::Error> {
        let (b, world) = (&*engine.model.backend, &*engine.world);
        let reduced = if self.alone { &self.grads } else { &self.shard };
        let sum = |i: usize| {
            let (start, len) = (self.pieces[i].offset, self.shards.piece(i, world.rank()).len());
            b.sum_squares(reduced, start..start + len)
        };
        let mut squares: Vec<f64> = (0..self.pieces.len()).map(sum).collect();
        world.all_reduce_f64(&mut squares)?;
        let blame = squares.iter().position(|s| !s.is_finite()).map(|i| self.params[i]);
        Ok(Norm { value: squares.iter().sum::<f64>().sqrt(), blame })
    }

    /// One AdamW update at these rates, with the gradient clipped by the options; then all ranks hold the new weights.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn update(
        &mut self,
        engine: &mut Engine<'_, B>,
        rates: &LearningRates,
        norm: f64,
    ) -> Result<(), collective::Error> {
        let config = engine.config;
        let scale = clip_factor(norm, config.max_grad_norm);
        let b = engine.model.backend.clone();
        let grads = if self.alone { &self.grads } else { &self.shard };
        let weights = engine.model.weights_mut();
        self.optimizer.step(&b, weights, grads, &self.pieces, rates, config.weight_decay, scale);
        if !self.alone {
            self.exchange(engine)?;
        }
        engine.touched.extend(&self.params);
        Ok(())
    }

    /// Gathers the new weights of all ranks' pieces, in their stored dtype.
    fn exchange(&self, engine: &mut Engine<'_, B>) -> Result<(), collective::Error> {
        let b = engine.model.backend.clone();
        if let Some(direct) = engine.direct.clone() {
            for (i, &id) in self.params.iter().enumerate() {
                let (master, at) = self.optimizer.master_at(id);
                direct.all_gather(master, at, &self.shards.counts(i..i + 1), &mut engine.model.weights_mut()[id])?;
            }
            return direct.finish();
        }
        for bucket in self.shards.buckets() {
            let sizes: Vec<usize> = self.params[bucket.clone()]
                .iter()
                .map(|&id| engine.model.table.params[id].value.dtype.size())
                .collect();
            let len = |i: usize, rank: usize| self.shards.piece(bucket.start + i, rank).len() * sizes[i];
            let counts: Vec<usize> =
                (0..self.shards.world_size()).map(|rank| (0..sizes.len()).map(|i| len(i, rank)).sum()).collect();
            let mut mine = Vec::with_capacity(counts[engine.world.rank()]);
            for &id in &self.params[bucket.clone()] {
                let master = self.optimizer.master(&b, id);
                let dtype = engine.model.table.params[id].value.dtype;
                let start = mine.len();
                mine.resize(start + master.len() * dtype.size(), 0);
                encode_into(dtype, &master, &mut mine[start..]);
            }
            let mut all = vec![0; counts.iter().sum()];
            engine.world.all_gather_into(&mine, &counts, &mut all)?;
            // Rank by rank in `all`, parameter by parameter in the model.
            let mut next: Vec<usize> = counts.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect();
            for (i, &id) in self.params[bucket.clone()].iter().enumerate() {
                let old = &engine.model.table.params[id].value;
                let (dtype, shape) = (old.dtype, old.shape.clone());
                let mut bytes = Vec::with_capacity(old.bytes.len());
                for (rank, at) in next.iter_mut().enumerate() {
                    bytes.extend_from_slice(&all[*at..*at + len(i, rank)]);
                    *at += len(i, rank);
                }
                engine.model.set_weight_host(id, HostTensor::new(dtype, shape, bytes.into()));
            }
        }
        Ok(())
    }

    /// The optimizer's state, this rank's part.
    pub fn optimizer(&self) -> &AdamW<B> {
        &self.optimizer
    }

    /// Puts back what [`AdamW::export`] gave, for a parameter that may or may not be trained in the next step.
    ///
    /// # Errors
    /// A state that does not fit this model.
    pub fn import(&mut self, engine: &Engine<'_, B>, state: &ParamState) -> Result<(), Error> {
        let (b, model) = (&*engine.model.backend, &engine.model);
        self.optimizer.add(b, model.weights(), &trainables(model, &[state.param]));
        self.optimizer.import(b, state)
    }
}

/// One step's backward passes on this rank.
pub struct Passes<'t, B: Backend> {
    plan: &'t GradPlan,
    grads: &'t mut B::Buffer,
    scores: &'t mut B::Scores,
    leaving: Option<Leaving<'t, B>>,
}

impl<B: Backend> Passes<'_, B> {
    /// The gradients of one pass are added to the step's; the summed cross-entropy, if the pass went to the loss. With
    /// the `last` pass of the step, buckets begin to leave.
    pub fn backward(
        &mut self,
        model: &Model<B>,
        inputs: &Inputs<B>,
        forward: Forward<B>,
        loss: LossGrads<'_>,
        last: bool,
    ) -> Option<f64> {
        let leaving = &mut self.leaving;
        let mut done = |layer: usize, grads: &B::Buffer| {
            if let Some(leaving) = leaving {
                leaving.leave(Some(layer), grads);
            }
        };
        let done: Option<OnLayer<'_, B>> = if last { Some(&mut done) } else { None };
        model.backward(
            inputs,
            forward,
            loss,
            &mut Sinks { plan: self.plan, grads: self.grads, scores: self.scores, done },
        )
    }

    fn leave(&mut self, layer: Option<usize>) {
        if let Some(leaving) = &mut self.leaving {
            leaving.leave(layer, self.grads);
        }
    }
}

/// Buckets on their way to the other ranks.
struct Leaving<'t, B: Backend> {
    shards: &'t ShardPlan,
    complete: &'t [Option<usize>],
    next: usize,
    way: Way<'t, B>,
}

/// How they go.
enum Way<'t, B: Backend> {
    /// To the thread that reduces them.
    Host { backend: &'t B, send: SyncSender<(Range<usize>, Vec<f32>)> },
    /// From device to device, parameter by parameter: pieces lie in rank order there, and need no packing.
    Direct {
        direct: &'t dyn Direct<B>,
        shard: &'t B::Buffer,
        pieces: &'t [Gradient],
        failed: Option<collective::Error>,
    },
}

impl<B: Backend> Leaving<'_, B> {
    /// Sends the buckets that are complete after decoder layer `layer`; all that are left after the end (`None`).
    fn leave(&mut self, layer: Option<usize>, grads: &B::Buffer) {
        let shards = self.shards;
        let buckets = shards.buckets();
        while self.next < buckets.len() && layer.is_none_or(|l| self.complete[self.next].is_some_and(|by| by >= l)) {
            let bucket = buckets[self.next].clone();
            self.next += 1;
            match &mut self.way {
                Way::Host { backend, send } => {
                    let flat = backend.buffer_read(grads, shards.flat(bucket.clone()));
                    // It fails only when the other end has met an error, which is found when that thread is joined.
                    let _ = send.send((bucket.clone(), shards.pack(bucket, &flat)));
                }
                Way::Direct { failed: Some(_), .. } => {}
                Way::Direct { direct, shard, pieces, failed } => {
                    let sum = |i: usize| {
                        let at = shards.flat(i..i + 1).start;
                        direct.reduce_scatter(grads, at, &shards.counts(i..i + 1), shard, pieces[i].offset)
                    };
                    *failed = bucket.rev().try_for_each(sum).err();
                }
            }
        }
    }
}

/// Sums each bucket over the ranks; this rank's parts. All ranks send the same buckets in the same order.
#[allow(clippy::type_complexity)]
fn reduce_scatter(
    world: &dyn Collective,
    shards: &ShardPlan,
    buckets: Receiver<(Range<usize>, Vec<f32>)>,
) -> Result<Vec<(Range<usize>, Vec<f32>)>, collective::Error> {
    let mut parts = Vec::new();
    for (bucket, packed) in buckets {
        let counts = shards.counts(bucket.clone());
        let mut part = vec![0.0; counts[world.rank()]];
        world.reduce_scatter_f32(&packed, &counts, &mut part)?;
        parts.push((bucket, part));
    }
    Ok(parts)
}

/// The decoder layer whose backward is the last that adds to the gradient of a parameter; `None`: the end of the pass.
fn completed_by<B: Backend>(model: &Model<B>, id: ParamId) -> Option<usize> {
    match model.table.params[id].kind {
        ParamKind::Embedding => None,
        // Before the first layer; the callback of that layer is the first that comes.
        ParamKind::FinalNorm | ParamKind::LmHead => Some(model.config.layers.len() - 1),
        kind => kind.layer(),
    }
}

/// The lowest of these; `None` if one is.
fn lowest(layers: impl Iterator<Item = Option<usize>>) -> Option<usize> {
    layers.reduce(|a, b| Some(a?.min(b?))).flatten()
}

fn trainables<B: Backend>(model: &Model<B>, ids: &[ParamId]) -> Vec<Trainable> {
    let trainable = |&param: &ParamId| {
        let spec = &model.table.params[param];
        let group = match spec.kind {
            ParamKind::Expert(..) => Group::Expert,
            ParamKind::Router(_) => Group::Router,
            _ => Group::Other,
        };
        Trainable { param, len: spec.value.len(), group }
    };
    ids.iter().map(trainable).collect()
}
