//! Whether one model can route as another: the same family and the same sizes.

use super::config::ModelConfig;

/// Two models whose routing cannot be exchanged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the two models must have one family and the same sizes, but {what} is {theirs}, not {ours}")]
pub struct RoutingMismatch {
    /// What differs.
    pub what: &'static str,
    /// Its value in the model that is to be routed.
    pub ours: String,
    /// Its value in the model whose routing or routers are to be used.
    pub theirs: String,
}

/// Checks that `theirs` can give the routing, or the routers, of a model of configuration `ours`.
///
/// # Errors
/// The first difference.
pub fn check_same_routing(ours: &ModelConfig, theirs: &ModelConfig) -> Result<(), RoutingMismatch> {
    fn same<T: PartialEq + std::fmt::Debug>(what: &'static str, ours: &T, theirs: &T) -> Result<(), RoutingMismatch> {
        if ours == theirs {
            return Ok(());
        }
        Err(RoutingMismatch { what, ours: format!("{ours:?}"), theirs: format!("{theirs:?}") })
    }
    same("the family (model_type)", &ours.model_type, &theirs.model_type)?;
    same("the vocabulary size", &ours.vocab_size, &theirs.vocab_size)?;
    same("the hidden size", &ours.hidden_size, &theirs.hidden_size)?;
    same("the number of layers", &ours.layers.len(), &theirs.layers.len())?;
    same("the list of layers with experts", &ours.moe_layers().layers, &theirs.moe_layers().layers)?;
    same("the number of experts", &ours.num_experts, &theirs.num_experts)?;
    same("the number of experts per token", &ours.num_experts_per_tok, &theirs.num_experts_per_tok)?;
    same("the renormalisation of routing weights", &ours.renormalize, &theirs.renormalize)?;
    // The rest of config.json: attention, norms, positions, expert widths.
    same("the configuration", ours, theirs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::ids::tests::config;

    #[test]
    fn the_first_difference_is_named() {
        let ours = config();
        assert_eq!(check_same_routing(&ours, &ours), Ok(()));
        let experts = ModelConfig { num_experts: ours.num_experts + 1, ..ours.clone() };
        let error = check_same_routing(&ours, &experts).unwrap_err();
        assert_eq!(error.what, "the number of experts");
        assert!(error.to_string().contains(&format!("is {}, not {}", ours.num_experts + 1, ours.num_experts)));
        let epsilon = ModelConfig { rms_norm_eps: 0.5, ..ours.clone() };
        assert_eq!(check_same_routing(&ours, &epsilon).unwrap_err().what, "the configuration");
    }
}
