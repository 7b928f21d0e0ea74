//! Interventions on the routing of the whole model: experts that are switched off, for causal tests.
//!
//! An intervention applies to every forward pass and to decoding, until it is cleared. It changes no weight. It is for forward
//! passes only: a backward pass does not take the change into account.

use std::collections::BTreeSet;

use super::config::ModelConfig;
use crate::backend::Backend;
use crate::exit::{self, Coded};

/// A change of the routing in all forward passes; experts are (decoder layer, expert).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Intervention {
    /// The router logits of these experts are −∞ before softmax and top-K: other experts take their place, and weights are
    /// renormalised where the family does so. Observers see logits of −∞ and the routing that results; their probabilities
    /// are 0. (Where fewer than K other experts have a probability above 0 in f32, one of these may fill the place, with
    /// weight 0.)
    SwitchedOff(BTreeSet<(usize, usize)>),
    /// Tokens are routed as usual, and the routing weights of these experts are 0: their output vanishes, and nothing takes
    /// their place. Observers see the usual logits and choice of experts.
    ZeroOutput(BTreeSet<(usize, usize)>),
}

/// Why an intervention is impossible.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InterventionError {
    /// A layer without a router, or an expert beyond the last one.
    #[error("the model has no expert {expert} in layer {layer}")]
    NoSuchExpert {
        /// Number of the decoder layer.
        layer: usize,
        /// Number of the expert in its layer.
        expert: usize,
    },
    /// A token needs K experts.
    #[error(
        "with {off} of {experts} experts of layer {layer} switched off, {left} are left, but each token needs {needed}"
    )]
    TooFewLeft {
        /// Number of the decoder layer.
        layer: usize,
        /// Experts to be switched off.
        off: usize,
        /// E
        experts: usize,
        /// Experts that are left.
        left: usize,
        /// K
        needed: usize,
    },
}

impl Coded for InterventionError {
    fn exit_code(&self) -> u8 {
        exit::CONFIG
    }
}

/// What an intervention does in one layer, on the backend.
pub(super) enum LayerIntervention<B: Backend> {
    /// Logits of −∞.
    SwitchedOff(B::Indices),
    /// Routing weights of 0.
    ZeroOutput(B::Indices),
}

impl<B: Backend> LayerIntervention<B> {
    /// Changes the router's logits, before the routing.
    pub(super) fn change_logits(&self, b: &B, logits: &mut B::Tensor) {
        if let Self::SwitchedOff(experts) = self {
            b.fill_columns(logits, experts, f32::NEG_INFINITY);
        }
    }

    /// Changes the routing that the logits gave.
    pub(super) fn change_routing(&self, b: &B, routing: &mut B::Routing) {
        if let Self::ZeroOutput(experts) = self {
            b.zero_routing_weights(routing, experts);
        }
    }
}

impl Intervention {
    fn experts(&self) -> &BTreeSet<(usize, usize)> {
        match self {
            Self::SwitchedOff(experts) | Self::ZeroOutput(experts) => experts,
        }
    }

    /// The change of each decoder layer, on the backend.
    ///
    /// # Errors
    /// Experts that the model does not have; a layer with fewer than K experts left.
    pub(super) fn by_layer<B: Backend>(
        &self,
        b: &B,
        config: &ModelConfig,
    ) -> Result<Vec<Option<LayerIntervention<B>>>, InterventionError> {
        let (num_experts, needed) = (config.num_experts, config.num_experts_per_tok);
        let mut by_layer: Vec<Vec<u32>> = vec![Vec::new(); config.layers.len()];
        for &(layer, expert) in self.experts() {
            if expert >= num_experts || !config.moe_layers().layers.contains(&layer) {
                return Err(InterventionError::NoSuchExpert { layer, expert });
            }
            by_layer[layer].push(expert as u32);
        }
        let changes = by_layer.iter().enumerate().map(|(layer, experts)| {
            if experts.is_empty() {
                return Ok(None);
            }
            Ok(Some(match self {
                Self::SwitchedOff(_) if num_experts - experts.len() < needed => {
                    let (off, left) = (experts.len(), num_experts - experts.len());
                    return Err(InterventionError::TooFewLeft { layer, off, experts: num_experts, left, needed });
                }
                Self::SwitchedOff(_) => LayerIntervention::SwitchedOff(b.indices(experts)),
                Self::ZeroOutput(_) => LayerIntervention::ZeroOutput(b.indices(experts)),
            }))
        });
        changes.collect()
    }
}
