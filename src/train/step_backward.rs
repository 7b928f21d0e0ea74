//! The forward and backward passes of one training step on this rank: those of the objective, then those of the retain rows.

use super::exchange::BucketSender;
use super::replica::Replica;
use crate::backend::Backend;
use crate::model::{
    BaseHead, Forward, GradPlan, Inputs, LossGrads, Model, Observer, OnLayer, PassEnd, RouterGrad, Sinks,
};

/// The backward passes of one step on this rank.
pub struct StepBackward<'t, B: Backend> {
    pub(super) replica: &'t Replica<B>,
    pub(super) plan: &'t GradPlan,
    pub(super) grads: &'t mut B::Buffer,
    /// Empty: training scores nothing.
    pub(super) scores: &'t mut B::Scores,
    /// Sends complete buckets to the other ranks; `None`: nothing is exchanged.
    pub(super) sender: Option<BucketSender<'t, B>>,
    /// Whether passes follow those of the objective: then none of these is the step's last one.
    pub(super) more_follow: bool,
}

impl<'t, B: Backend> StepBackward<'t, B> {
    /// A forward pass that keeps what the backward of this step reads.
    pub fn forward(&self, inputs: &Inputs<B>, end: PassEnd, observer: Option<Observer<'_, B>>) -> Forward<B> {
        self.replica.forward(inputs, Some(self.plan), end, observer)
    }

    /// Adds the gradients of one pass to those of the step. Returns the summed cross-entropy if the pass went to the loss.
    /// During the `last` pass of the step, complete buckets are sent.
    pub fn backward(
        &mut self,
        inputs: &Inputs<B>,
        forward: Forward<B>,
        loss: LossGrads<'_>,
        last: bool,
    ) -> Option<f64> {
        self.run(last, |model, sinks| model.backward(inputs, forward, loss, sinks))
    }

    /// As [`Self::backward`], for `scale` times the divergence from the base model: see [`Model::backward_kl`].
    pub(super) fn backward_kl(
        &mut self,
        inputs: &Inputs<B>,
        forward: Forward<B>,
        base: &BaseHead<'_, B>,
        scale: f32,
        routers: &[Option<RouterGrad>],
        last: bool,
    ) -> f64 {
        self.run(last, |model, sinks| model.backward_kl(inputs, forward, base, scale, routers, sinks))
    }

    fn run<T>(&mut self, last: bool, pass: impl FnOnce(&Model<B>, &mut Sinks<'_, B>) -> T) -> T {
        let sender = &mut self.sender;
        let mut layer_done = |layer: usize, grads: &B::Buffer| {
            if let Some(sender) = sender {
                sender.send_complete(Some(layer), grads);
            }
        };
        let done: Option<OnLayer<'_, B>> = if last && !self.more_follow { Some(&mut layer_done) } else { None };
        let sinks = &mut Sinks { plan: self.plan, grads: self.grads, scores: self.scores, done };
        pass(self.replica.model(), sinks)
    }

    /// The model.
    pub(super) fn replica(&self) -> &'t Replica<B> {
        self.replica
    }

    /// Sends the buckets that are complete after the backward of this layer; after the end (`None`), all that are left.
    pub(super) fn send_complete(&mut self, layer: Option<usize>) {
        if let Some(sender) = &mut self.sender {
            sender.send_complete(layer, self.grads);
        }
    }
}
