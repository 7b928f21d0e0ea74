//! How much memory a rank takes, from shapes alone; and how many layers can keep their activations.

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::backend::Backend;
use crate::model::{LayerKind, ModelConfig};

/// When a layer's forward is computed again for its backward instead of being kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Recompute {
    /// Keeps the activations of as many top layers as fit (CPU: in a quarter of the free memory; GPU: in 7/8 of it, less what else
    /// is needed), and recomputes those of the others.
    #[default]
    Auto,
    /// Always: the least memory.
    Always,
    /// Never: the least time.
    Never,
}

/// The memory of one rank, on the host or on its device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryBudget {
    /// Bytes of one element of an activation.
    pub activation_size: usize,
    /// Bytes of one element of the results of grouped products and of SwiGLU.
    pub routed_size: usize,
    /// Maximum number of rows whose logits are in memory at the same time.
    pub logit_rows: usize,
    /// Logits of a row.
    pub vocab_size: usize,
    /// Free bytes.
    pub free: u64,
    /// Free bytes of the host.
    pub host: u64,
    /// The ranks of this machine among whose devices offloaded weights are divided; `None`: they are in the host's memory.
    pub divided: Option<usize>,
    /// Whether this is the memory of a device: weights are copied to it, and not memory-mapped.
    pub device: bool,
}

impl MemoryBudget {
    /// The budget of a rank on `backend`. `free_host`: free bytes of the host for this rank, which count for all where the backend
    /// has no memory of its own.
    pub fn new(backend: &impl Backend, vocab_size: usize, free_host: impl FnOnce() -> u64) -> Self {
        let (own, host) = (backend.free_memory(), free_host());
        Self {
            activation_size: backend.activation_size(),
            routed_size: backend.routed_size(),
            logit_rows: backend.logit_chunk_rows(vocab_size),
            vocab_size,
            free: own.unwrap_or(host),
            host,
            divided: backend.offload_ranks(),
            device: own.is_some(),
        }
    }

    /// Bytes of logits and their gradient that exist at the same time for `rows` tokens.
    pub fn logits(&self, rows: usize) -> u64 {
        (rows.min(self.logit_rows) * self.vocab_size * (4 + self.activation_size)) as u64
    }
}

/// How many layers, counted from the top one, keep their activations for the backward; those below recompute them. Decided
/// once a phase. It changes time and memory, never a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptLayers(pub usize);

impl KeptLayers {
    /// Every layer keeps its activations.
    pub const ALL: Self = Self(usize::MAX);

    /// The lowest layer that keeps its activations, in a model of `layers` layers of which the backward visits those from
    /// `lowest` up.
    pub fn keep_from(self, layers: usize, lowest: usize) -> usize {
        layers - self.0.min(layers.saturating_sub(lowest))
    }

    /// `activations of 4 of 16 layers are kept, the others are recomputed`.
    pub fn describe(self, layers: usize, lowest: usize) -> String {
        let (kept, visited) = (layers - self.keep_from(layers, lowest), layers.saturating_sub(lowest));
        let others = if kept < visited { ", the others are recomputed" } else { "" };
        format!("activations of {kept} of {visited} layers are kept{others}")
    }
}

/// Bytes of activations for one micro-batch of `rows` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activations {
    /// The saved input of one layer.
    pub input: u64,
    /// The activations that one layer keeps so that its backward recomputes nothing.
    pub kept: u64,
    /// Temporaries of the backward of one layer, or of the head.
    pub working: u64,
}

impl Activations {
    /// The figures of the largest layer.
    pub fn predict(config: &ModelConfig, rows: usize, budget: &MemoryBudget) -> Self {
        let (t, size, routed_size) = (rows as u64, budget.activation_size as u64, budget.routed_size as u64);
        let d = config.hidden_size as u64;
        let heads = config.heads.first().expect("a model has layers");
        let (q, kv) = ((heads.queries * heads.dim) as u64, (heads.keys * heads.dim) as u64);
        let norms = if config.qk_norm == crate::model::QkNorm::None { 0 } else { q + kv };
        let attention = 2 * q + 2 * kv + norms;
        // What normalises the probabilities of attention in f32; the CPU computes it again.
        let normaliser = if budget.device { 4 * heads.queries as u64 } else { 0 };
        let routed = config.num_experts_per_tok as u64;
        let f = config.expert_width as u64;
        let shared = config.shared_expert_width.unwrap_or(0) as u64;
        let dense = config.layers.iter().map(|k| if let LayerKind::Dense(w) = k { *w as u64 } else { 0 }).max();
        let gate_up = (routed * 2 * f + 2 * shared).max(2 * dense.unwrap_or(0));
        let other = config.num_experts as u64 + if shared > 0 { d } else { 0 };
        let kept = gate_up * routed_size + (attention + d + other) * size + normaliser;
        // Gathered rows or their gradients [R, D], SwiGLU's output, its gradient and that of its input [R, 4F]; in a dense layer or
        // a shared expert the last two; and a few [T, D].
        let dense = dense.unwrap_or(0).max(shared) * (size + 2 * routed_size);
        let working = (routed * (d + 4 * f) * routed_size).max(dense) + (4 * d + 3 * (q + 2 * kv)) * size;
        Self { input: t * d * size, kept: t * kept, working: (t * working).max(budget.logits(rows)) }
    }

    /// How many layers keep their activations, in a model of `layers` layers of which the backward visits those from `lowest`
    /// up, where `forwards` forward passes wait for their backward at the same time.
    pub fn kept_layers(
        &self,
        recompute: Recompute,
        layers: usize,
        lowest: usize,
        budget: &MemoryBudget,
        forwards: usize,
    ) -> KeptLayers {
        let visited = layers.saturating_sub(lowest);
        KeptLayers(match recompute {
            Recompute::Never => return KeptLayers::ALL,
            // The backward visits the top layer first: keeping its activations costs no more than recomputing them.
            Recompute::Always => 1,
            Recompute::Auto => (self.available(visited, budget, forwards) / self.kept.max(1)).max(1) as usize,
        })
    }

    /// Bytes for the activations that a forward pass keeps. On the host, other programs and the pages of memory-mapped
    /// weights need memory too: a quarter of what is free. A device belongs to the run: what nothing else needs, less an
    /// eighth of what is free for fragmentation.
    fn available(&self, visited: usize, budget: &MemoryBudget, forwards: usize) -> u64 {
        if !budget.device {
            return budget.free / 4;
        }
        let others = self.working.saturating_add(forwards as u64 * visited as u64 * self.input);
        (budget.free - budget.free / 8).saturating_sub(others) / forwards.max(1) as u64
    }

    /// Peak of passes that keep as little as `recompute` allows, where `forwards` forward passes wait for their backward at the
    /// same time.
    pub fn least(&self, recompute: Recompute, layers: usize, forwards: usize) -> u64 {
        let keep_from = if recompute == Recompute::Never { 0 } else { layers.saturating_sub(1) };
        let waiting = self.peak(layers, 0, keep_from) - self.working;
        waiting.saturating_mul(forwards as u64).saturating_add(self.working)
    }

    /// Peak of one forward and backward.
    pub fn peak(&self, layers: usize, lowest: usize, keep_from: usize) -> u64 {
        let visited = layers.saturating_sub(lowest) as u64;
        let kept = layers.saturating_sub(keep_from).max(1) as u64;
        visited * self.input + kept * self.kept + self.working
    }
}

/// Bytes that training adds on one rank.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TrainedState {
    /// The gradient in f32 and the new weights, replicated on every rank.
    pub whole: u64,
    /// This rank's shard of master weights, two moments and the summed gradient, in f32.
    pub sharded: u64,
}

impl TrainedState {
    /// For `trained` elements of `weight` bytes each.
    pub fn predict(trained: u64, weight: u64, world_size: usize) -> Self {
        let sharded = if world_size == 1 { 12 * trained } else { (16 * trained).div_ceil(world_size as u64) };
        Self { whole: trained * (4 + weight), sharded }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_kept_from_the_top_as_memory_allows() {
        let a = Activations { input: 10, kept: 100, working: 50 };
        let host = |free| MemoryBudget {
            activation_size: 4,
            routed_size: 4,
            logit_rows: 0,
            vocab_size: 8,
            free,
            host: free,
            divided: None,
            device: false,
        };
        let from = |recompute, lowest, budget: &MemoryBudget, forwards| {
            a.kept_layers(recompute, 16, lowest, budget, forwards).keep_from(16, lowest)
        };
        assert_eq!(from(Recompute::Never, 4, &host(0), 1), 4);
        assert_eq!(from(Recompute::Always, 4, &host(u64::MAX), 1), 15);
        assert_eq!(from(Recompute::Auto, 4, &host(4 * 350), 1), 13);
        assert_eq!(from(Recompute::Auto, 4, &host(0), 1), 15);
        assert_eq!(from(Recompute::Auto, 16, &host(u64::MAX / 2), 1), 16);
        // A device: 7/8 of it less 50 and 12 inputs of 10 are 3 layers of 100; with two forward passes in flight, one layer each.
        let device = |free| MemoryBudget { device: true, ..host(free) };
        assert_eq!(from(Recompute::Auto, 4, &device(544), 1), 13);
        assert_eq!(from(Recompute::Auto, 4, &device(544), 2), 15);
        assert_eq!(from(Recompute::Auto, 4, &device(0), 1), 15);
        assert_eq!(KeptLayers::ALL.keep_from(16, 4), 4);
        assert!(a.peak(16, 0, 15) < a.peak(16, 0, 8));
        assert_eq!(a.least(Recompute::Auto, 16, 1), a.peak(16, 0, 15));
        assert_eq!(a.least(Recompute::Never, 16, 2), 2 * (a.peak(16, 0, 0) - 50) + 50);
    }
}
