//! One optimizer step: the gradient of this rank's micro-batches, its sum over all ranks, the update, the new weights.
//!
//! With several ranks the optimizer is sharded (ZeRO stage 1, arXiv 1910.02054). The gradient is reduce-scattered in buckets,
//! so that each rank gets the sum of its own pieces; it updates these pieces, and all ranks all-gather the new weights in
//! their stored dtype. A bucket is sent as soon as the last backward pass of the step has completed it, while the layers
//! below still compute.

use std::ops::Range;
use std::sync::mpsc::sync_channel;
use std::thread;

use super::exchange::{
    BucketSender, BucketTransport, completed_by, gather_on_devices, gather_through_host, reduce_scatter,
};
use super::recipe::Updates;
use super::replica::Replica;
use super::retention::RetainStep;
use super::step_backward::StepBackward;
use crate::backend::Backend;
use crate::collective;
use crate::model::{Forward, GradPlan, Inputs, Model, Observer, ParamId, ParamKind, PassEnd};
use crate::optim::{
    AdamW, Error, GradientPiece, LearningRates, LrGroup, ParamState, ShardPlan, Trainable, clip_factor,
};

/// Elements after which a bucket is full: 32 MiB of f32, long enough to use the network's bandwidth, short enough that the
/// first bucket is sent early. (PyTorch's DistributedDataParallel takes 25 MiB.)
const BUCKET: usize = 8 << 20;

/// Buckets that may wait for the network before the backward pass blocks: a bound on their memory.
const QUEUED_BUCKETS: usize = 2;

/// The optimizer of a phase and the buffers of its gradients. Each phase begins with zero moments.
pub struct Trainer<B: Backend> {
    optimizer: AdamW<B>,
    /// Which gradients the backward of the present step computes.
    pub plan: GradPlan,
    params: Vec<ParamId>,
    bucket_size: usize,
    shards: ShardPlan,
    /// For each bucket the decoder layer whose backward completes it; `None`: the end of the backward pass.
    completed_by: Vec<Option<usize>>,
    /// The gradient of this rank's micro-batches, flat.
    grads: B::Buffer,
    /// This rank's pieces of the sum over all ranks. Unused where nothing is exchanged: there `grads` is the sum.
    shard: B::Buffer,
    /// Offsets of the pieces in the shard.
    pieces: Vec<GradientPiece>,
    /// Empty: a backward pass needs score buffers, but training scores nothing.
    scores: B::Scores,
    /// Whether gradients are exchanged with other ranks (or, for tests, with itself).
    exchanges: bool,
    /// The retain rows of the present step, whose passes follow those of the objective.
    retain: Option<RetainStep<B>>,
    /// What they summed up to on this rank.
    retained: [f64; 2],
}

/// The global gradient norm.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Norm {
    /// L2 norm over all trained parameters.
    pub value: f64,
    /// The first parameter whose gradient is not finite.
    pub not_finite: Option<ParamId>,
}

impl<B: Backend> Trainer<B> {
    /// A trainer of the parameters `ids`.
    pub fn new(replica: &Replica<B>, ids: &[ParamId]) -> Self {
        Self::with_bucket_size(replica, ids, BUCKET)
    }

    /// A trainer with buckets of another size, in elements.
    pub fn with_bucket_size(replica: &Replica<B>, ids: &[ParamId], bucket_size: usize) -> Self {
        let b = &*replica.model().backend;
        let world = &*replica.world;
        let mut trainer = Self {
            optimizer: AdamW::new(world.rank(), world.world_size()),
            plan: GradPlan::train(&replica.model().table, replica.model().config.layers.len(), &[]),
            params: Vec::new(),
            bucket_size,
            shards: ShardPlan::new([], world.world_size(), bucket_size),
            completed_by: Vec::new(),
            grads: b.buffer(0),
            shard: b.buffer(0),
            pieces: Vec::new(),
            scores: b.scores(0),
            exchanges: world.world_size() > 1 || replica.transport.is_some(),
            retain: None,
            retained: [0.0; 2],
        };
        trainer.set_trainable(replica, ids);
        trainer
    }

    /// Trains `ids` from the next step on. Other parameters keep their value, and their moments until they are trained again.
    pub fn set_trainable(&mut self, replica: &Replica<B>, ids: &[ParamId]) {
        let (b, model, world) = (&*replica.model().backend, replica.model(), &*replica.world);
        let rank = world.rank();
        let old = (self.plan.len(), self.shards.shard_len(rank));
        self.optimizer.add(b, model.weights(), &trainables(model, ids));
        self.plan = GradPlan::train(&model.table, model.config.layers.len(), ids);
        self.params = ids.to_vec();
        let lens = ids.iter().map(|&id| model.table.params[id].len());
        self.shards = ShardPlan::new(lens, world.world_size(), self.bucket_size);
        let completed = |&id: &ParamId| completed_by(model, id);
        self.completed_by =
            self.shards.buckets().iter().map(|bucket| last_of(ids[bucket.clone()].iter().map(completed))).collect();
        let mut offset = 0;
        self.pieces = (0..ids.len())
            .map(|i| {
                let piece = GradientPiece { param: ids[i], offset };
                offset += self.shards.piece(i, rank).len();
                piece
            })
            .collect();
        // Free the old buffer before the new one is allocated.
        if self.plan.len() != old.0 {
            self.grads = b.buffer(0);
            self.grads = b.buffer(self.plan.len());
        }
        if self.exchanges && self.shards.shard_len(rank) != old.1 {
            self.shard = b.buffer(0);
            self.shard = b.buffer(self.shards.shard_len(rank));
        }
    }

    /// A forward pass that keeps what the backward of this step reads.
    pub fn forward(
        &self,
        replica: &Replica<B>,
        inputs: &Inputs<B>,
        end: PassEnd,
        observer: Option<Observer<'_, B>>,
    ) -> Forward<B> {
        replica.forward(inputs, Some(&self.plan), end, observer)
    }

    /// Sets the retain rows of the next [`Self::accumulate`].
    pub(super) fn set_retain(&mut self, retain: Option<RetainStep<B>>) {
        self.retain = retain;
    }

    /// The retain rows of the last step, and their sums on this rank.
    pub(super) fn take_retained(&mut self) -> Option<(RetainStep<B>, [f64; 2])> {
        Some((self.retain.take()?, self.retained))
    }

    /// Computes the gradient of a step: `passes` runs the backward passes of this rank, those of the retain rows
    /// follow, and the gradients of all ranks are summed.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn accumulate<T>(
        &mut self,
        replica: &Replica<B>,
        passes: impl FnOnce(&mut StepBackward<'_, B>) -> T,
    ) -> Result<T, collective::Error> {
        let (b, world) = (&*replica.model().backend, &*replica.world);
        b.buffer_clear(&mut self.grads);
        if replica.inject_nan {
            b.buffer_write(&mut self.grads, 0, &[f32::NAN]);
        }
        let Self { plan, shards, completed_by, grads, shard, pieces, scores, exchanges, retain, retained, .. } = self;
        let more_follow = retain.as_ref().is_some_and(RetainStep::has_passes);
        let passes = |step: &mut StepBackward<'_, B>| {
            let out = passes(step);
            step.more_follow = false;
            if let Some(retain) = retain {
                *retained = retain.backward(step);
            }
            out
        };
        if !*exchanges {
            return Ok(passes(&mut StepBackward { replica, plan, grads, scores, sender: None, more_follow }));
        }
        if let Some(device) = &replica.transport {
            let transport = BucketTransport::Device { device: &**device, shard, pieces, error: None };
            let sender = BucketSender::new(shards, completed_by, transport);
            let mut step = StepBackward { replica, plan, grads, scores, sender: Some(sender), more_follow };
            let out = passes(&mut step);
            step.send_complete(None);
            if let Some(error) = step.sender.and_then(BucketSender::into_error) {
                return Err(error);
            }
            device.finish()?;
            return Ok(out);
        }
        thread::scope(|scope| {
            let (send, receive) = sync_channel(QUEUED_BUCKETS);
            let reduced = scope.spawn(|| reduce_scatter(world, shards, receive));
            let sender = BucketSender::new(shards, completed_by, BucketTransport::Host { backend: b, send });
            let mut step = StepBackward { replica, plan, grads, scores, sender: Some(sender), more_follow };
            let out = passes(&mut step);
            step.send_complete(None);
            drop(step); // closes the channel: the reducing thread ends
            let parts = reduced.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            for (bucket, part) in parts {
                b.buffer_write(shard, shards.shard_start(bucket.start, world.rank()), &part);
            }
            Ok(out)
        })
    }

    /// The norm of the gradient that [`Self::accumulate`] left; the same on all ranks.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn norm(&self, replica: &Replica<B>) -> Result<Norm, collective::Error> {
        let (b, world) = (&*replica.model().backend, &*replica.world);
        let summed = self.summed();
        let part = |i: usize| {
            let (start, len) = (self.pieces[i].offset, self.shards.piece(i, world.rank()).len());
            start..start + len
        };
        let parts: Vec<Range<usize>> = (0..self.pieces.len()).map(part).collect();
        let mut squares = b.sums_of_squares(summed, &parts);
        world.all_reduce_f64(&mut squares)?;
        let not_finite = squares.iter().position(|s| !s.is_finite()).map(|i| self.params[i]);
        Ok(Norm { value: squares.iter().sum::<f64>().sqrt(), not_finite })
    }

    /// This rank's pieces of the summed gradient.
    fn summed(&self) -> &B::Buffer {
        if self.exchanges { &self.shard } else { &self.grads }
    }

    /// One AdamW update at these rates, with the gradient clipped to `max_grad_norm`; afterwards all ranks hold the new
    /// weights.
    ///
    /// # Errors
    /// Those of the collective.
    pub fn update(
        &mut self,
        replica: &mut Replica<B>,
        rates: &LearningRates,
        norm: f64,
        updates: &Updates,
    ) -> Result<(), collective::Error> {
        let scale = clip_factor(norm, updates.max_grad_norm);
        let Self { optimizer, shards, params, pieces, grads, shard, exchanges, .. } = self;
        let summed = if *exchanges { &*shard } else { &*grads };
        let (world, transport) = (replica.world.clone(), replica.transport.clone());
        replica.update(params, |model| {
            let b = model.backend.clone();
            optimizer.step(&b, model.weights_mut(), summed, pieces, rates, updates.weight_decay, scale);
            match transport {
                _ if !*exchanges => Ok(()),
                Some(device) => gather_on_devices(&*device, optimizer, shards, params, model),
                None => gather_through_host(&*world, optimizer, shards, params, model),
            }
        })
    }

    /// This rank's shard of the optimizer state.
    pub fn optimizer(&self) -> &AdamW<B> {
        &self.optimizer
    }

    /// Restores the state that [`AdamW::export`] gave, of a parameter that may or may not be trained in the next step.
    ///
    /// # Errors
    /// A state that does not fit this model.
    pub fn import(&mut self, replica: &Replica<B>, state: &ParamState) -> Result<(), Error> {
        let (b, model) = (&*replica.model().backend, replica.model());
        self.optimizer.add(b, model.weights(), &trainables(model, &[state.param]));
        self.optimizer.import(b, state)
    }
}

/// When the last of these gradients is complete: the lowest layer, or the end of the pass (`None`).
fn last_of(layers: impl Iterator<Item = Option<usize>>) -> Option<usize> {
    layers.reduce(|a, b| Some(a?.min(b?))).flatten()
}

fn trainables<B: Backend>(model: &Model<B>, ids: &[ParamId]) -> Vec<Trainable> {
    let trainable = |&param: &ParamId| {
        let spec = &model.table.params[param];
        let group = match spec.kind {
            ParamKind::Expert(..) => LrGroup::Expert,
            ParamKind::Router(_) => LrGroup::Router,
            _ => LrGroup::Other,
        };
        Trainable { param, len: spec.len(), group }
    };
    ids.iter().map(trainable).collect()
}
