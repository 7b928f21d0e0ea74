//! The gradient plan: what a backward pass does with each parameter's gradient.

use super::ids::{ParamId, ParamKind, Proj};
use super::table::ParamTable;
use crate::backend::{ExpertGrad, GradReduction};

/// Which parameters accumulate at which offset of the flat gradient buffer, or whether the routed experts are scored. No
/// weight gradient is computed for a parameter outside the plan, and nothing at all below the lowest layer in the plan.
#[derive(Debug, Clone)]
pub struct GradPlan {
    slots: Vec<Option<usize>>,
    len: usize,
    score: Option<Scoring>,
    embedding: bool,
    layers: Vec<LayerWants>,
}

#[derive(Debug, Clone, Copy)]
struct Scoring {
    reduction: GradReduction,
    num_experts: usize,
}

/// Which parts of one layer need a gradient.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct LayerWants {
    /// A weight of attention or of the norm before it.
    pub attention: bool,
    /// A routed expert, trained or scored.
    pub experts: bool,
    /// The router, or another parameter of the feed-forward part that is not a routed expert.
    pub feed_forward: bool,
    /// A parameter in a lower layer, or the embedding.
    pub below: bool,
}

impl LayerWants {
    /// Whether the gradient of the hidden state after attention is needed.
    pub(super) fn hidden(self) -> bool {
        self.attention || self.below
    }

    fn any(self) -> bool {
        self.attention || self.experts || self.feed_forward || self.below
    }
}

impl GradPlan {
    /// Scores every routed expert and accumulates no gradient.
    pub fn score(table: &ParamTable, num_layers: usize, num_experts: usize, reduction: GradReduction) -> Self {
        Self::new(table, num_layers, &[], Some(Scoring { reduction, num_experts }))
    }

    /// Accumulates the gradients of these parameters, consecutive in the buffer, in this order.
    pub fn train(table: &ParamTable, num_layers: usize, trainable: &[ParamId]) -> Self {
        Self::new(table, num_layers, trainable, None)
    }

    fn new(table: &ParamTable, num_layers: usize, trainable: &[ParamId], score: Option<Scoring>) -> Self {
        let mut slots = vec![None; table.params.len()];
        let mut len = 0;
        for &id in trainable {
            slots[id] = Some(len);
            len += table.params[id].len();
        }
        let mut embedding = false;
        let mut layers = vec![LayerWants::default(); num_layers];
        for (id, spec) in table.params.iter().enumerate() {
            use ParamKind::*;
            let scored = score.is_some() && matches!(spec.kind, Expert(..));
            if slots[id].is_none() && !scored {
                continue;
            }
            match spec.kind {
                Embedding => embedding = true,
                InputNorm(l) | Q(l) | QBias(l) | K(l) | KBias(l) | V(l) | VBias(l) | O(l) | OBias(l) | QNorm(l)
                | KNorm(l) => layers[l].attention = true,
                Expert(l, ..) => layers[l].experts = true,
                PostNorm(l) | Dense(l, _) | Router(l) | Shared(l, _) | SharedGate(l) => layers[l].feed_forward = true,
                FinalNorm | LmHead => {}
            }
        }
        let mut below = embedding;
        for wants in &mut layers {
            wants.below = below;
            below = wants.any();
        }
        Self { slots, len, score, embedding, layers }
    }

    /// Elements of the gradient buffer.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether nothing accumulates.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Offset of a parameter's gradient in the buffer; `None` for a parameter that does not accumulate.
    pub fn slot(&self, id: ParamId) -> Option<usize> {
        self.slots[id]
    }

    pub(super) fn wants_embedding(&self) -> bool {
        self.embedding
    }

    pub(super) fn layer(&self, layer: usize) -> LayerWants {
        self.layers[layer]
    }

    /// The lowest layer that the backward pass visits; `None` if it visits no layer.
    pub fn lowest_layer(&self) -> Option<usize> {
        if self.embedding { Some(0) } else { self.layers.iter().position(|l| l.any()) }
    }

    /// The plan for one expert's stacked matrices. The index of its score is `layer · num_experts + expert`, where `layer`
    /// counts all decoder layers.
    pub(super) fn expert(&self, layer: usize, expert: usize, stack: &[ParamId]) -> ExpertGrad {
        if let Some(Scoring { reduction, num_experts }) = self.score {
            return ExpertGrad::Score(reduction, layer * num_experts + expert);
        }
        self.accumulate(stack)
    }

    /// The plan for stacked matrices, which are trained together or not at all.
    pub(super) fn accumulate(&self, stack: &[ParamId]) -> ExpertGrad {
        match stack.iter().map(|&id| self.slots[id]).collect::<Option<Vec<_>>>() {
            Some(offsets) => ExpertGrad::Accumulate(offsets),
            None => ExpertGrad::Skip,
        }
    }
}

/// The gate, up and down matrices of one expert, which are trained together or not at all.
pub fn expert_params(table: &ParamTable, layer: usize, expert: usize) -> impl Iterator<Item = ParamId> {
    [Proj::Gate, Proj::Up, Proj::Down]
        .into_iter()
        .filter_map(move |proj| table.id(ParamKind::Expert(layer, expert, proj)))
}
