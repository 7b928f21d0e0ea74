//! AdamW with f32 master weights, with state only for the trained parameters.

use std::collections::BTreeMap;
use std::ops::Range;

use super::{Error, piece};
use crate::backend::{AdamwStep, Backend};
use crate::model::ParamId;

/// The group of parameters that share a learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LrGroup {
    /// Weights of routed experts.
    Expert,
    /// Router weights.
    Router,
    /// All other parameters.
    Other,
}

/// The learning rate of each group in one step, including the schedule's factor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LearningRates {
    /// For [`LrGroup::Expert`].
    pub expert: f64,
    /// For [`LrGroup::Router`].
    pub router: f64,
    /// For [`LrGroup::Other`].
    pub other: f64,
}

impl LearningRates {
    /// All rates multiplied by the schedule's factor.
    pub fn scaled(&self, factor: f64) -> Self {
        Self { expert: self.expert * factor, router: self.router * factor, other: self.other * factor }
    }

    fn of(&self, group: LrGroup) -> f64 {
        match group {
            LrGroup::Expert => self.expert,
            LrGroup::Router => self.router,
            LrGroup::Other => self.other,
        }
    }
}

/// A parameter to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trainable {
    /// The parameter.
    pub param: ParamId,
    /// Number of elements.
    pub len: usize,
    /// Learning-rate group.
    pub group: LrGroup,
}

/// The position of the gradient of this rank's piece of a parameter in a step's gradient buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GradientPiece {
    /// The parameter.
    pub param: ParamId,
    /// Element offset in the buffer.
    pub offset: usize,
}

/// The optimizer state of this rank's piece of a parameter, on the host: saved in a checkpoint to resume within a
/// phase.
#[derive(Debug, Clone, PartialEq)]
pub struct ParamState {
    /// The parameter.
    pub param: ParamId,
    /// Number of updates so far.
    pub step: u64,
    /// Master weights: f32 values, before rounding to the stored dtype.
    pub master: Vec<f32>,
    /// First moment, the running mean of gradients.
    pub m: Vec<f32>,
    /// Second moment, the running mean of squared gradients.
    pub v: Vec<f32>,
}

/// State of the parameters of one [`AdamW::add`] call: three flat buffers with the same layout.
struct Slab<B: Backend> {
    master: B::Buffer,
    m: B::Buffer,
    v: B::Buffer,
}

/// The position of a parameter's state.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Slot {
    slab: usize,
    /// Range in the slab's buffers, as long as this rank's piece of the parameter.
    range: Range<usize>,
    group: LrGroup,
    step: u64,
}

/// AdamW (Loshchilov & Hutter, arXiv 1711.05101, as in PyTorch):
///
/// ```text
/// m ← β₁m + (1−β₁)g    v ← β₂v + (1−β₂)g²
/// w ← w − lr·λ·w − lr · m/(1−β₁ᵗ) / (√(v/(1−β₂ᵗ)) + ε)        β = 0.9, 0.999; ε = 1e-8
/// ```
///
/// Weight decay λ is decoupled; the divisors 1−βᵗ are the bias correction. Master weights w are f32 whatever the stored
/// dtype: in bf16, an update by 1e-5 of a weight would be lost to rounding. There is state only for added parameters
/// (12 bytes per element), and only for this rank's [`piece`] of each. A parameter without a gradient in a step is not
/// touched (no decay, no momentum, no step count), so t is the parameter's own number of updates.
pub struct AdamW<B: Backend> {
    rank: usize,
    world_size: usize,
    slabs: Vec<Slab<B>>,
    slots: BTreeMap<ParamId, Slot>,
}

impl<B: Backend> AdamW<B> {
    const BETAS: (f64, f64) = (0.9, 0.999);
    const EPS: f64 = 1e-8;

    /// The optimizer of one rank, without parameters.
    pub fn new(rank: usize, world_size: usize) -> Self {
        Self { rank, world_size, slabs: Vec::new(), slots: BTreeMap::new() }
    }

    /// Adds parameters, in this order: allocates zero moments and copies the master weights from `weights`, which is
    /// indexed by [`ParamId`]. Parameters that were added before keep their state.
    pub fn add(&mut self, backend: &B, weights: &[B::Weight], params: &[Trainable]) {
        let new: Vec<_> = params.iter().filter(|p| !self.slots.contains_key(&p.param)).collect();
        if new.is_empty() {
            return;
        }
        let piece = |p: &Trainable| piece(p.len, self.rank, self.world_size);
        let total = new.iter().map(|p| piece(p).len()).sum();
        let buffer = || backend.buffer(total);
        let mut slab = Slab { master: buffer(), m: buffer(), v: buffer() };
        let mut start = 0;
        for p in new {
            let piece = piece(p);
            let range = start..start + piece.len();
            start = range.end;
            backend.read_weight(&weights[p.param], piece, &mut slab.master, range.start);
            let slot = Slot { slab: self.slabs.len(), range, group: p.group, step: 0 };
            assert!(self.slots.insert(p.param, slot).is_none(), "parameter {} is added twice", p.param);
        }
        self.slabs.push(slab);
    }

    /// Updates this rank's pieces of the parameters in `gradients`. `grads` is multiplied by `grad_scale` first. With a
    /// world size of 1 this writes `weights` too. With more ranks, each has the new master weights of its pieces
    /// ([`Self::master`]), which the ranks still have to all-gather.
    ///
    /// # Panics
    /// If a parameter was not added.
    #[allow(clippy::too_many_arguments)]
    pub fn step(
        &mut self,
        backend: &B,
        weights: &mut [B::Weight],
        grads: &B::Buffer,
        gradients: &[GradientPiece],
        lrs: &LearningRates,
        weight_decay: f64,
        grad_scale: f64,
    ) {
        for GradientPiece { param, .. } in gradients {
            self.slots.get_mut(param).unwrap_or_else(|| panic!("parameter {param} was not added")).step += 1;
        }
        let mut weights: Vec<Option<&mut B::Weight>> = weights.iter_mut().map(Some).collect();
        for span in spans(&self.slots, gradients) {
            let Slab { master, m, v } = &mut self.slabs[span.slab];
            let step = AdamwStep {
                lr: lrs.of(span.group),
                beta1: Self::BETAS.0,
                beta2: Self::BETAS.1,
                eps: Self::EPS,
                weight_decay,
                step: span.step,
                grad_scale: grad_scale as f32,
            };
            if self.world_size > 1 {
                backend.adamw(master, m, v, span.at, grads, span.grad_at, &step);
                continue;
            }
            let written = gradients[span.gradients].iter().map(|GradientPiece { param, .. }| {
                let weight = weights[*param].take().unwrap_or_else(|| panic!("two gradients of parameter {param}"));
                (self.slots[param].range.clone(), weight)
            });
            backend.adamw_weights(master, m, v, span.at, grads, span.grad_at, &step, written.collect());
        }
    }

    /// Copies the master weights of this rank's piece of an added parameter to the host.
    pub fn master(&self, backend: &B, param: ParamId) -> Vec<f32> {
        let (master, at) = self.master_at(param);
        backend.buffer_read(master, at)
    }

    /// The buffer and range of the master weights of this rank's piece of an added parameter.
    pub fn master_at(&self, param: ParamId) -> (&B::Buffer, Range<usize>) {
        let slot = &self.slots[&param];
        (&self.slabs[slot.slab].master, slot.range.clone())
    }

    /// Bytes of this rank's optimizer state.
    pub fn bytes(&self) -> usize {
        self.slots.values().map(|slot| 3 * size_of::<f32>() * slot.range.len()).sum()
    }

    /// (parameter, number of updates, elements of this rank's piece) for every added parameter, ascending.
    pub fn layout(&self) -> Vec<(ParamId, u64, usize)> {
        self.slots.iter().map(|(param, slot)| (*param, slot.step, slot.range.len())).collect()
    }

    /// The state of every added parameter, ascending, for a checkpoint within a phase. (Between phases no state is
    /// saved, because each phase starts with zero moments.) The iterator copies one parameter at a time.
    pub fn export<'a>(&'a self, backend: &'a B) -> impl Iterator<Item = ParamState> + 'a {
        self.slots.iter().map(move |(param, slot)| {
            let Slab { master, m, v } = &self.slabs[slot.slab];
            let read = |buffer| backend.buffer_read(buffer, slot.range.clone());
            ParamState { param: *param, step: slot.step, master: read(master), m: read(m), v: read(v) }
        })
    }

    /// Restores a state from [`Self::export`]. The parameter must have been added.
    ///
    /// # Errors
    /// [`Error::State`] if the parameter was not added or its piece has another length.
    pub fn import(&mut self, backend: &B, state: &ParamState) -> Result<(), Error> {
        let fault = |reason: String| Error::State { param: state.param, reason };
        let slot = self.slots.get_mut(&state.param).ok_or_else(|| fault("it is not trained".into()))?;
        for (what, values) in [("master weights", &state.master), ("m", &state.m), ("v", &state.v)] {
            if values.len() != slot.range.len() {
                return Err(fault(format!("{what} of {} elements, not {}", values.len(), slot.range.len())));
            }
        }
        let Slab { master, m, v } = &mut self.slabs[slot.slab];
        backend.buffer_write(master, slot.range.start, &state.master);
        backend.buffer_write(m, slot.range.start, &state.m);
        backend.buffer_write(v, slot.range.start, &state.v);
        slot.step = state.step;
        Ok(())
    }
}

/// One call of [`Backend::adamw`]: parameters that are adjacent in the state and in the gradient, with the same group
/// and step.
#[derive(Debug, PartialEq, Eq)]
struct Span {
    /// Indices of their gradients.
    gradients: Range<usize>,
    slab: usize,
    at: Range<usize>,
    grad_at: usize,
    group: LrGroup,
    step: u64,
}

/// Merges adjacent gradients into as few [`Span`]s as possible, keeping their order.
fn spans(slots: &BTreeMap<ParamId, Slot>, gradients: &[GradientPiece]) -> Vec<Span> {
    let mut out: Vec<Span> = Vec::new();
    for (i, GradientPiece { param, offset }) in gradients.iter().enumerate() {
        let slot = &slots[param];
        match out.last_mut() {
            Some(last)
                if (last.slab, last.group, last.step) == (slot.slab, slot.group, slot.step)
                    && last.at.end == slot.range.start
                    && last.grad_at + last.at.len() == *offset =>
            {
                last.at.end = slot.range.end;
                last.gradients.end = i + 1;
            }
            _ => out.push(Span {
                gradients: i..i + 1,
                slab: slot.slab,
                at: slot.range.clone(),
                grad_at: *offset,
                group: slot.group,
                step: slot.step,
            }),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_parameters_are_merged() {
        let slot = |slab, range, group, step| Slot { slab, range, group, step };
        let slots = BTreeMap::from([
            (3, slot(0, 0..4, LrGroup::Expert, 1)),
            (4, slot(0, 4..6, LrGroup::Expert, 1)),
            (5, slot(0, 6..9, LrGroup::Expert, 2)),
            (6, slot(0, 9..10, LrGroup::Router, 2)),
            (7, slot(1, 0..5, LrGroup::Router, 2)),
        ]);
        let gradient = |(param, offset)| GradientPiece { param, offset };
        let gradients = [(3, 10), (4, 14), (5, 16), (6, 19), (7, 20)].map(gradient);
        let span = |gradients, slab, at, grad_at, group, step| Span { gradients, slab, at, grad_at, group, step };
        let expected = [
            span(0..2, 0, 0..6, 10, LrGroup::Expert, 1),
            span(2..3, 0, 6..9, 16, LrGroup::Expert, 2),  // different step
            span(3..4, 0, 9..10, 19, LrGroup::Router, 2), // different group
            span(4..5, 1, 0..5, 20, LrGroup::Router, 2),  // different slab
        ];
        assert_eq!(spans(&slots, &gradients), expected);
        let with_gap = [(3, 10), (4, 15)].map(gradient);
        assert_eq!(spans(&slots, &with_gap).len(), 2);
    }
}
