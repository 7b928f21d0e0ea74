//! Tiny random models of every family on the CPU backend, with random token ids.

use std::sync::Arc;

use moewarden::backend::cpu::Cpu;
use moewarden::backend::{Backend, Packing};
use moewarden::model::tiny::{TinySpec, write_random_checkpoint};
use moewarden::model::{
    Checkpoint, ForwardOptions, GradPlan, Inputs, LossGrads, Model, ParamId, ParamTable, PassEnd, Sinks,
};
use serde_json::json;

/// A model and two packed sequences of tokens.
pub struct Tiny {
    pub dir: tempfile::TempDir,
    pub model: Model<Cpu>,
    pub ids: Vec<u32>,
    pub packing: Packing,
    pub loss_rows: Vec<u32>,
    pub targets: Vec<u32>,
}

fn spec(family: &str, extra: serde_json::Value) -> TinySpec {
    TinySpec {
        vocab_size: 60,
        hidden_size: 24,
        num_layers: 2,
        head_dim: 6,
        num_experts: 4,
        expert_width: 10,
        // Large weights, so that no gradient is lost in the rounding of the loss.
        std: 0.25,
        extra: extra.as_object().cloned().expect("keys of config.json"),
        ..TinySpec::new(family)
    }
}

/// The dense families, with their optional features.
pub fn dense_specs() -> Vec<(&'static str, TinySpec)> {
    let windows = json!({"use_sliding_window": true, "sliding_window": 5, "max_window_layers": 1});
    vec![
        ("qwen3", TinySpec { tie: true, ..spec("qwen3", windows) }),
        ("llama", spec("llama", json!({"attention_bias": true}))),
        ("mistral", spec("mistral", json!({"sliding_window": 5}))),
    ]
}

/// Every family with experts with its defaults, and variants with the optional features of a family.
pub fn specs() -> Vec<(&'static str, TinySpec)> {
    vec![
        ("olmoe", spec("olmoe", json!({}))),
        ("olmoe, clipped", spec("olmoe", json!({"clip_qkv": 0.9, "attention_bias": true, "norm_topk_prob": true}))),
        ("mixtral", spec("mixtral", json!({"sliding_window": 5}))),
        ("qwen3_moe", spec("qwen3_moe", json!({"norm_topk_prob": true, "attention_bias": true}))),
        ("qwen3_moe, dense", TinySpec { tie: true, ..spec("qwen3_moe", json!({"mlp_only_layers": [0]})) }),
        ("qwen2_moe", spec("qwen2_moe", json!({}))),
    ]
}

impl Tiny {
    pub fn new(spec: &TinySpec) -> Self {
        let dir = tempfile::tempdir().expect("a folder");
        let config = write_random_checkpoint(dir.path(), spec).expect("a model");
        let checkpoint = Checkpoint::open(dir.path()).expect("a checkpoint");
        let table = ParamTable::build(&config, &checkpoint).expect("its parameters");
        let model = Model::new(Arc::new(Cpu::new(1)), config, table);
        // 11 and 8 tokens; the later part of each sequence is the target.
        let ids: Vec<u32> = (0..19u32).map(|i| (i * i * 7 + i * 13 + 5) % spec.vocab_size as u32).collect();
        let packing = Packing::of_lengths([11, 8]);
        let loss_rows: Vec<u32> = (4..10).chain(13..18).collect();
        let targets = loss_rows.iter().map(|r| ids[*r as usize + 1]).collect();
        Self { dir, model, ids, packing, loss_rows, targets }
    }

    pub fn all(&self) -> Vec<ParamId> {
        (0..self.model.table.params.len()).collect()
    }

    pub fn inputs(&self) -> Inputs<Cpu> {
        Inputs::new(&self.model, &self.ids, &self.packing, &self.loss_rows, &self.targets)
    }

    pub fn plan(&self, ids: &[ParamId]) -> GradPlan {
        GradPlan::train(&self.model.table, self.model.config.layers.len(), ids)
    }

    /// Mean cross-entropy, and the experts that each token of each layer chose.
    pub fn loss(&self) -> (f64, Vec<u32>) {
        let mut chosen = Vec::new();
        let b = &*self.model.backend;
        let mut observe = |routed: moewarden::model::Routed<'_, Cpu>| chosen.extend(b.expert_ids(routed.routing));
        let inputs = self.inputs();
        let forward = self.model.forward(&inputs, nothing_kept(PassEnd::Loss { all_rows: true }), Some(&mut observe));
        let loss = self.model.loss(&inputs, &forward) / self.targets.len() as f64;
        (loss, chosen)
    }

    /// The mean cross-entropy and its gradients with respect to these parameters. The forward pass saves nothing for layers
    /// below the lowest with a gradient, so a backward pass that reached them would panic.
    pub fn gradients(&self, ids: &[ParamId]) -> (f64, Vec<Vec<f32>>) {
        let scale = (1.0 / self.targets.len() as f64) as f32;
        let end = PassEnd::Loss { all_rows: false };
        let (loss, gradients) = self.backward(ids, end, LossGrads { ce_scale: scale, routers: &[] });
        (loss.expect("a pass to the loss") / self.targets.len() as f64, gradients)
    }

    pub fn backward(&self, ids: &[ParamId], end: PassEnd, grads: LossGrads<'_>) -> (Option<f64>, Vec<Vec<f32>>) {
        let b = &*self.model.backend;
        let plan = self.plan(ids);
        let lowest = plan.lowest_layer().unwrap_or(self.model.config.layers.len());
        let inputs = self.inputs();
        let forward = self.model.forward(&inputs, ForwardOptions { lowest, keep_from: lowest, end }, None);
        let (mut buffer, mut scores) = (b.buffer(plan.len()), b.scores(0));
        let mut sinks = Sinks { plan: &plan, grads: &mut buffer, scores: &mut scores, done: None };
        let loss = self.model.backward(&inputs, forward, grads, &mut sinks);
        let read = |id: &ParamId| {
            let at = plan.slot(*id).expect("a slot");
            b.buffer_read(&buffer, at..at + self.model.table.params[*id].len())
        };
        (loss, ids.iter().map(read).collect())
    }
}

/// Options of a forward pass without a backward pass.
pub fn nothing_kept(end: PassEnd) -> ForwardOptions {
    ForwardOptions { lowest: usize::MAX, keep_from: usize::MAX, end }
}
