//! `training_metadata.json`: options, losses and selections of a run. Existing scripts for the method read it, so its
//! keys must stay.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use crate::experts::ExpertId;
use crate::train::{Drift, Phase};

/// The options in the file, by their names there: those of the command line, with underscores.
const OPTIONS: [&str; 39] = [
    "model_name",
    "num_rounds",
    "expert_epochs_per_round",
    "router_epochs_per_round",
    "top_k_experts",
    "batch_size",
    "grad_accum",
    "expert_lr",
    "router_lr",
    "weight_decay",
    "lr_schedule",
    "warmup_steps",
    "max_grad_norm",
    "mode",
    "schedule",
    "method",
    "score",
    "score_per",
    "score_norm",
    "selection",
    "identify",
    "identify_until",
    "kl_type",
    "router_statistic",
    "router_last_tokens",
    "router_target",
    "skip_router_training",
    "finetune_unsafe_experts",
    "use_router_consistency_loss",
    "router_consistency_weight",
    "router_consistency_type",
    "router_consistency_layers",
    "safe_ratio",
    "retain_dataset_path",
    "retain_loss",
    "retain_weight",
    "retain_routing_weight",
    "max_samples",
    "seed",
];

/// The content of `training_metadata.json`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TrainingMetadata {
    /// Options of the run, at the top level of the file.
    #[serde(flatten)]
    pub options: Map<String, Value>,
    /// What the run trains: `combined`, `joint`, `expert_only`, `router_only`, `baseline` or `frozen`.
    pub training_strategy: String,
    /// World size that the run was started with.
    pub world_size: usize,
    /// Mean cross-entropy of the refusals of all unsafe rows, before the first round and after the last; null until the
    /// run has ended.
    pub ce_loss: Option<[Option<f64>; 2]>,
    /// Mean cross-entropy of the replies to the safe prompts, before and after; null without such rows.
    pub safe_loss: Option<[Option<f64>; 2]>,
    /// Divergence of the routing between safe and unsafe prompts, before and after; null if the data have prompts of
    /// one side only.
    pub router_loss: Option<[Option<f64>; 2]>,
    /// Mean cross-entropy of the held-out rows, before and after; null without held-out rows.
    pub held_out_loss: Option<[Option<f64>; 2]>,
    /// The retain rows, and the distance from the base model on them; absent without retain rows.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retention: Option<RetentionLog>,
    /// One entry for each finished phase.
    pub training_logs: Vec<TrainingLog>,
    /// Selections by round, from 1.
    pub identified_experts_per_round: BTreeMap<usize, IdentifiedExperts>,
}

impl TrainingMetadata {
    /// The metadata of a run before its first phase. `options`: all options by their names on the command line.
    ///
    /// # Panics
    /// If an option of the file is missing.
    pub fn new(options: &impl Serialize, strategy: &str, world_size: usize) -> Self {
        let all = serde_json::to_value(options).expect("options have string keys");
        let option = |name: &str| {
            let value = all.get(name.replace('_', "-")).unwrap_or_else(|| panic!("there is no option {name}"));
            (name.to_owned(), value.clone())
        };
        Self {
            options: OPTIONS.into_iter().map(option).collect(),
            training_strategy: strategy.into(),
            world_size,
            ce_loss: None,
            safe_loss: None,
            router_loss: None,
            held_out_loss: None,
            retention: None,
            training_logs: Vec::new(),
            identified_experts_per_round: BTreeMap::new(),
        }
    }
}

/// The retain rows, and the distance from the base model on them.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RetentionLog {
    /// Number of rows.
    pub rows: usize,
    /// Their tokens with loss.
    pub loss_tokens: usize,
    /// All their tokens.
    pub tokens: usize,
    /// Before the first round, then after each round.
    pub drift: Vec<Drift>,
}

/// A finished phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingLog {
    /// Round, from 1.
    pub round: usize,
    /// The training phase.
    pub step: Phase,
    /// Mean of the losses of its steps; null without steps.
    pub loss: Option<f64>,
    /// Number of experts selected in the round.
    pub num_identified_experts: usize,
}

/// All experts selected in a round, and their scores.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct IdentifiedExperts {
    /// Best first.
    pub experts: Vec<ExpertId>,
    /// Scores of `experts`, in the same order, under keys `L0_E1` (layer, expert); empty for a random selection without
    /// scores.
    #[serde(serialize_with = "by_expert_name")]
    pub gradients: Vec<(ExpertId, f64)>,
}

fn by_expert_name<S: Serializer>(gradients: &[(ExpertId, f64)], serializer: S) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(Some(gradients.len()))?;
    for (id, value) in gradients {
        map.serialize_entry(&format!("L{}_E{}", id.layer, id.expert), value)?;
    }
    map.end()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::write_json;

    #[test]
    fn keys_of_the_file() {
        let best_first: Vec<ExpertId> = (0..12).map(|e| (3, 11 - e).into()).collect();
        let gradients = best_first.iter().enumerate().map(|(i, id)| (*id, 1.0 - i as f64 / 16.0)).collect();
        let options = OPTIONS.map(|name| (name.replace('_', "-"), Value::from(name)));
        let metadata = TrainingMetadata {
            training_logs: vec![
                TrainingLog { round: 1, step: Phase::Expert, loss: Some(2.5), num_identified_experts: 12 },
                TrainingLog { round: 1, step: Phase::Router, loss: None, num_identified_experts: 12 },
            ],
            identified_experts_per_round: BTreeMap::from([(1, IdentifiedExperts { experts: best_first, gradients })]),
            ..TrainingMetadata::new(&BTreeMap::from(options), "combined", 2)
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("training_metadata.json");
        write_json(&path, &metadata).unwrap();
        let value: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for name in "model_name training_strategy num_rounds top_k_experts batch_size expert_lr router_lr kl_type \
                     skip_router_training max_samples training_logs identified_experts_per_round"
            .split_whitespace()
        {
            assert!(value.get(name).is_some(), "{name} is missing");
        }
        assert!(OPTIONS.iter().all(|name| value[name] == *name), "each option has its own value: {value}");
        assert_eq!((&value["training_strategy"], &value["world_size"]), (&"combined".into(), &2.into()));
        let router = serde_json::json!({"round": 1, "step": "router", "loss": null, "num_identified_experts": 12});
        assert_eq!(value["training_logs"][1], router);
        let round = &value["identified_experts_per_round"]["1"];
        assert_eq!(round["experts"][0], serde_json::json!([3, 11]));
        let gradients: Vec<_> = round["gradients"].as_object().unwrap().iter().collect();
        assert_eq!(gradients.len(), 12, "all selected experts");
        assert_eq!((gradients[0].0.as_str(), gradients[11].0.as_str()), ("L3_E11", "L3_E0"), "best first");
    }
}
