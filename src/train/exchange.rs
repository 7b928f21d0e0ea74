//! What ranks exchange in a step: buckets of gradients while the backward still runs, and the new weights after the update.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender};

use super::device_transport::DeviceTransport;
use crate::backend::{Backend, HostTensor, encode_into};
use crate::collective::{self, Collective};
use crate::model::{Model, ParamId, ParamKind};
use crate::optim::{AdamW, GradientPiece, ShardPlan};

/// A bucket for the reducing thread: the range of its parameters, and their packed gradients.
pub(super) type Bucket = (Range<usize>, Vec<f32>);

/// Sends each bucket as soon as its gradients are complete.
pub(super) struct BucketSender<'t, B: Backend> {
    shards: &'t ShardPlan,
    /// For each bucket the decoder layer whose backward completes it; `None`: the end of the backward pass.
    completed_by: &'t [Option<usize>],
    next: usize,
    transport: BucketTransport<'t, B>,
}

/// How a bucket reaches the other ranks.
pub(super) enum BucketTransport<'t, B: Backend> {
    /// Through the host: the reducing thread receives packed copies.
    Host {
        /// Copies a bucket from the device.
        backend: &'t B,
        /// To the reducing thread.
        send: SyncSender<Bucket>,
    },
    /// From device to device, parameter by parameter: pieces are contiguous in rank order, without packing.
    Device {
        /// The communicator of the devices.
        device: &'t dyn DeviceTransport<B>,
        /// Receives this rank's pieces.
        shard: &'t B::Buffer,
        /// Their offsets in the shard.
        pieces: &'t [GradientPiece],
        /// The first error; no bucket is sent after it.
        error: Option<collective::Error>,
    },
}

impl<'t, B: Backend> BucketSender<'t, B> {
    pub(super) fn new(
        shards: &'t ShardPlan,
        completed_by: &'t [Option<usize>],
        transport: BucketTransport<'t, B>,
    ) -> Self {
        Self { shards, completed_by, next: 0, transport }
    }

    /// Sends the buckets that are complete after the backward of decoder layer `layer`; after the end of the backward pass
    /// (`None`), all that are left.
    pub(super) fn send_complete(&mut self, layer: Option<usize>, grads: &B::Buffer) {
        let shards = self.shards;
        let buckets = shards.buckets();
        while self.next < buckets.len() && layer.is_none_or(|l| self.completed_by[self.next].is_some_and(|by| by >= l))
        {
            let bucket = buckets[self.next].clone();
            self.next += 1;
            match &mut self.transport {
                BucketTransport::Host { backend, send } => {
                    let flat = backend.buffer_read(grads, shards.flat(bucket.clone()));
                    // Fails only if the reducing thread has ended with an error, which joining it reports.
                    let _ = send.send((bucket.clone(), shards.pack(bucket, &flat)));
                }
                BucketTransport::Device { error: Some(_), .. } => {}
                BucketTransport::Device { device, shard, pieces, error } => {
                    let sum = |i: usize| {
                        let at = shards.flat(i..i + 1).start;
                        device.reduce_scatter(grads, at, &shards.counts(i..i + 1), shard, pieces[i].offset)
                    };
                    *error = bucket.rev().try_for_each(sum).err();
                }
            }
        }
    }

    /// The first error of the device transport.
    pub(super) fn into_error(self) -> Option<collective::Error> {
        match self.transport {
            BucketTransport::Device { error, .. } => error,
            BucketTransport::Host { .. } => None,
        }
    }
}

/// Sums each bucket over the ranks and returns this rank's parts. All ranks send the same buckets in the same order.
pub(super) fn reduce_scatter(
    world: &dyn Collective,
    shards: &ShardPlan,
    buckets: Receiver<Bucket>,
) -> Result<Vec<Bucket>, collective::Error> {
    let mut parts = Vec::new();
    for (bucket, packed) in buckets {
        let counts = shards.counts(bucket.clone());
        let mut part = vec![0.0; counts[world.rank()]];
        world.reduce_scatter_f32(&packed, &counts, &mut part)?;
        parts.push((bucket, part));
    }
    Ok(parts)
}

/// The decoder layer whose backward is the last one that adds to the gradient of a parameter; `None`: the end of the backward
/// pass.
pub(super) fn completed_by<B: Backend>(model: &Model<B>, id: ParamId) -> Option<usize> {
    match model.table.params[id].kind {
        ParamKind::Embedding => None,
        // Complete before the first layer's backward, whose completion is the first that is reported.
        ParamKind::FinalNorm | ParamKind::LmHead => Some(model.config.layers.len() - 1),
        kind => kind.layer(),
    }
}

/// All-gathers the new weights of `params` from device to device: every rank updated its own pieces.
pub(super) fn gather_on_devices<B: Backend>(
    device: &dyn DeviceTransport<B>,
    optimizer: &AdamW<B>,
    shards: &ShardPlan,
    params: &[ParamId],
    model: &mut Model<B>,
) -> Result<(), collective::Error> {
    for (i, &id) in params.iter().enumerate() {
        let (master, at) = optimizer.master_at(id);
        device.all_gather(master, at, &shards.counts(i..i + 1), &mut model.weights_mut()[id])?;
    }
    device.finish()
}

/// All-gathers the new weights of `params` through the host, bucket by bucket, in their stored dtype.
pub(super) fn gather_through_host<B: Backend>(
    world: &dyn Collective,
    optimizer: &AdamW<B>,
    shards: &ShardPlan,
    params: &[ParamId],
    model: &mut Model<B>,
) -> Result<(), collective::Error> {
    let b = model.backend.clone();
    for bucket in shards.buckets() {
        let sizes: Vec<usize> =
            params[bucket.clone()].iter().map(|&id| model.table.params[id].dtype().size()).collect();
        let len = |i: usize, rank: usize| shards.piece(bucket.start + i, rank).len() * sizes[i];
        let counts: Vec<usize> =
            (0..shards.world_size()).map(|rank| (0..sizes.len()).map(|i| len(i, rank)).sum()).collect();
        let mut mine = Vec::with_capacity(counts[world.rank()]);
        for &id in &params[bucket.clone()] {
            let master = optimizer.master(&b, id);
            let dtype = model.table.params[id].dtype();
            let start = mine.len();
            mine.resize(start + master.len() * dtype.size(), 0);
            encode_into(dtype, &master, &mut mine[start..]);
        }
        let mut all = vec![0; counts.iter().sum()];
        world.all_gather_into(&mine, &counts, &mut all)?;
        // `all` is ordered by rank, then parameter; a weight needs its pieces of all ranks one after another.
        let mut next: Vec<usize> = counts.iter().scan(0, |at, n| Some(std::mem::replace(at, *at + n))).collect();
        for (i, &id) in params[bucket.clone()].iter().enumerate() {
            let spec = &model.table.params[id];
            let (dtype, shape) = (spec.dtype(), spec.shape().to_vec());
            let mut bytes = Vec::with_capacity(spec.len() * dtype.size());
            for (rank, at) in next.iter_mut().enumerate() {
                bytes.extend_from_slice(&all[*at..*at + len(i, rank)]);
                *at += len(i, rank);
            }
            model.set_weight_host(id, HostTensor::new(dtype, shape, bytes.into()));
        }
    }
    Ok(())
}
