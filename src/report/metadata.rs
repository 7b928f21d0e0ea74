//! `training_metadata.json`: options, losses and selections of a run. Existing scripts for the method read it, so its
//! keys must stay.

use std::collections::BTreeMap;

use serde::ser::SerializeMap;
use serde::{Deserialize, Serialize, Serializer};

use crate::experts::{ExpertId, Method, Score, ScorePer, Selection};
use crate::optim::LrSchedule;
use crate::routers::{ConsistencyLayers, KlType, Statistic};

/// The content of `training_metadata.json`. Fields without a description are the options of the same names.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[allow(missing_docs)] // docs/options.md describes the options
pub struct TrainingMetadata {
    pub model_name: String,
    /// What the run trains: `combined`, `joint`, `expert_only`, `router_only`, `baseline` or `frozen`.
    pub training_strategy: String,
    pub num_rounds: usize,
    pub expert_epochs_per_round: usize,
    pub router_epochs_per_round: usize,
    pub top_k_experts: usize,
    pub batch_size: usize,
    pub grad_accum: usize,
    /// Number of ranks at the start of the run.
    pub world_size: usize,
    pub expert_lr: f64,
    pub router_lr: f64,
    pub weight_decay: f64,
    pub lr_schedule: LrSchedule,
    pub warmup_steps: usize,
    pub max_grad_norm: Option<f64>,
    pub mode: String,
    pub schedule: String,
    pub method: Method,
    pub score: Score,
    pub score_per: ScorePer,
    pub selection: Selection,
    pub kl_type: KlType,
    pub router_statistic: Statistic,
    pub skip_router_training: bool,
    pub finetune_unsafe_experts: bool,
    pub use_router_consistency_loss: bool,
    pub router_consistency_weight: f64,
    pub router_consistency_type: KlType,
    pub router_consistency_layers: ConsistencyLayers,
    pub safe_ratio: f64,
    pub max_samples: usize,
    pub seed: u64,
    /// Mean cross-entropy of the refusals of all unsafe rows, before the first round and after the last; null until the
    /// run has ended.
    pub ce_loss: Option<[Option<f64>; 2]>,
    /// Divergence of the routing between safe and unsafe prompts, before and after; null if the data have prompts of
    /// one side only.
    pub router_loss: Option<[Option<f64>; 2]>,
    /// Mean cross-entropy of the held-out rows, before and after; null without held-out rows.
    pub held_out_loss: Option<[Option<f64>; 2]>,
    /// One entry for each finished phase.
    pub training_logs: Vec<TrainingLog>,
    /// Selections by round, from 1.
    pub identified_experts_per_round: BTreeMap<usize, IdentifiedExperts>,
}

/// A finished phase.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainingLog {
    /// Round, from 1.
    pub round: usize,
    /// The phase.
    pub step: TrainingStep,
    /// Mean of the losses of its steps; null without steps.
    pub loss: Option<f64>,
    /// Number of experts selected in the round.
    pub num_identified_experts: usize,
}

/// A training phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TrainingStep {
    /// Training of experts.
    Expert,
    /// Alignment of routers.
    Router,
    /// Joint training of experts and routers.
    Joint,
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
        let metadata = TrainingMetadata {
            model_name: "m \"quoted\"".into(),
            training_strategy: "alternate".into(),
            num_rounds: 1,
            expert_epochs_per_round: 1,
            router_epochs_per_round: 1,
            top_k_experts: 12,
            batch_size: 8,
            grad_accum: 1,
            world_size: 2,
            expert_lr: 5e-5,
            router_lr: 1e-4,
            weight_decay: 0.01,
            lr_schedule: LrSchedule::Constant,
            warmup_steps: 0,
            max_grad_norm: None,
            mode: "selective".into(),
            schedule: "alternate".into(),
            method: Method::Gradient,
            score: Score::L1Mean,
            score_per: ScorePer::Param,
            selection: Selection::Global,
            kl_type: KlType::Forward,
            router_statistic: Statistic::TokenProbs,
            skip_router_training: false,
            finetune_unsafe_experts: true,
            use_router_consistency_loss: false,
            router_consistency_weight: 0.1,
            router_consistency_type: KlType::Symmetric,
            router_consistency_layers: ConsistencyLayers::UnsafeOnly,
            safe_ratio: 0.5,
            max_samples: 128,
            seed: 42,
            ce_loss: None,
            router_loss: None,
            held_out_loss: None,
            training_logs: vec![
                TrainingLog { round: 1, step: TrainingStep::Expert, loss: Some(2.5), num_identified_experts: 12 },
                TrainingLog { round: 1, step: TrainingStep::Router, loss: None, num_identified_experts: 12 },
            ],
            identified_experts_per_round: BTreeMap::from([(1, IdentifiedExperts { experts: best_first, gradients })]),
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
        assert_eq!(value["kl_type"], "forward");
        assert_eq!((&value["score"], &value["lr_schedule"]), (&"l1-mean".into(), &"constant".into()));
        assert!(value["max_grad_norm"].is_null());
        let router = serde_json::json!({"round": 1, "step": "router", "loss": null, "num_identified_experts": 12});
        assert_eq!(value["training_logs"][1], router);
        let round = &value["identified_experts_per_round"]["1"];
        assert_eq!(round["experts"][0], serde_json::json!([3, 11]));
        let gradients: Vec<_> = round["gradients"].as_object().unwrap().iter().collect();
        assert_eq!(gradients.len(), 12, "all selected experts");
        assert_eq!((gradients[0].0.as_str(), gradients[11].0.as_str()), ("L3_E11", "L3_E0"), "best first");
    }
}
