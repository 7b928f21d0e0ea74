//! Logits of tiny checkpoints against candle-transformers' Mixtral, Qwen3-MoE, Qwen3, Llama and Mistral, an independent
//! implementation; and greedy answers of the dense ones, which serve as judges.

use crate::tiny_model::Tiny;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, mixtral, qwen3, qwen3_moe};
use moewarden::model::tiny::TinySpec;
use moewarden::report::{GenerationSpeed, Sampling};
use moewarden::run::generate::{Prompt, answers};
use serde_json::{Map, Value, json};

/// config.json with the additional keys that candle requires.
fn config<T: serde::de::DeserializeOwned>(tiny: &Tiny, more: Value) -> T {
    let text = std::fs::read_to_string(tiny.dir.path().join("config.json")).unwrap();
    let mut config: Map<String, Value> = serde_json::from_str(&text).unwrap();
    config.extend(more.as_object().unwrap().clone());
    serde_json::from_value(config.into()).unwrap()
}

fn weights(tiny: &Tiny) -> VarBuilder<'static> {
    let bytes = std::fs::read(tiny.dir.path().join("model.safetensors")).unwrap();
    VarBuilder::from_buffered_safetensors(bytes, DType::F32, &Device::Cpu).unwrap()
}

/// Compares next-token logits after each prefix of a row. Both sides are f32 with different orders of summation, over rows
/// of 48 entries and three layers: the tolerance is 1e-5 of the largest logit.
fn compare(tiny: &Tiny, theirs: &mut dyn FnMut(&Tensor) -> candle_core::Result<Tensor>) {
    for upto in [1, 2, 7, 19] {
        let row = &tiny.ids[..upto];
        let ours = tiny.model.decode(&[(0, row)], &mut tiny.model.kv_cache(&[row.len()]));
        let ids = Tensor::new(row, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        let theirs = theirs(&ids).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
        let largest = theirs.iter().fold(0.0f32, |a, x| a.max(x.abs()));
        assert_eq!(ours.len(), theirs.len());
        for (i, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
            assert!((ours - theirs).abs() <= 1e-5 * largest, "{upto} tokens, logit {i}: {ours} and {theirs}");
        }
    }
}

#[test]
fn mixtral_agrees_with_candle() {
    // candle derives the head width from D / H and always applies a window; this window is longer than the row.
    let tiny = Tiny::new(&TinySpec::new("mixtral"));
    let config: mixtral::Config = config(&tiny, json!({"sliding_window": 4096, "use_flash_attn": false}));
    compare(&tiny, &mut |ids| mixtral::Model::new(&config, weights(&tiny))?.forward(ids, 0));
}

#[test]
fn qwen3_moe_agrees_with_candle() {
    for norm_topk_prob in [true, false] {
        let mut spec = TinySpec { head_dim: 20, num_layers: 4, ..TinySpec::new("qwen3_moe") };
        spec.extra.insert("norm_topk_prob".into(), norm_topk_prob.into());
        let tiny = Tiny::new(&spec);
        let more = json!({
            "attention_bias": false, "decoder_sparse_step": 1, "max_window_layers": 0, "sliding_window": null,
            "use_sliding_window": false,
        });
        let config: qwen3_moe::Config = config(&tiny, more);
        compare(&tiny, &mut |ids| qwen3_moe::ModelForCausalLM::new(&config, weights(&tiny))?.forward(ids, 0));
    }
}

/// Compares logits, and the tokens of greedy answers to some prompts, generated in one batch.
fn compare_answers(tiny: &Tiny, mut theirs: impl FnMut(&Tensor) -> candle_core::Result<Tensor>) {
    compare(tiny, &mut theirs);
    const TOKENS: usize = 8;
    let prompts = [&tiny.ids[..3], &tiny.ids[4..13], &tiny.ids[..19]];
    let asked = prompts.map(|ids| Prompt { ids, index: 0 });
    let sampling = Sampling::greedy(TOKENS);
    let ours = answers(&tiny.model, &asked, &[], &sampling, &mut GenerationSpeed::default(), |_, _| {}).unwrap();
    for (prompt, ours) in prompts.into_iter().zip(ours) {
        let mut ids = prompt.to_vec();
        for _ in 0..TOKENS {
            let input = Tensor::new(&ids[..], &Device::Cpu).unwrap().unsqueeze(0).unwrap();
            let logits = theirs(&input).unwrap().flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let best = (0..logits.len()).reduce(|best, i| if logits[i] > logits[best] { i } else { best });
            ids.push(best.unwrap() as u32);
        }
        assert_eq!(ours.ids, ids[prompt.len()..]);
    }
}

#[test]
fn qwen3_agrees_with_candle() {
    for tie in [false, true] {
        let tiny = Tiny::new(&TinySpec { head_dim: 20, tie, ..TinySpec::new("qwen3") });
        let more = json!({"max_window_layers": 0, "sliding_window": null, "use_sliding_window": false});
        let config: qwen3::Config = config(&tiny, more);
        compare_answers(&tiny, |ids| qwen3::ModelForCausalLM::new(&config, weights(&tiny))?.forward(ids, 0));
    }
}

#[test]
fn llama_agrees_with_candle() {
    let mut spec = TinySpec::new("llama");
    let scaling = json!({
        "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    });
    spec.extra.insert("rope_scaling".into(), scaling);
    for spec in [TinySpec::new("llama"), spec] {
        let tiny = Tiny::new(&spec);
        let config: llama::LlamaConfig = config(&tiny, json!({}));
        let config = config.into_config(false);
        compare_answers(&tiny, |ids| {
            let mut cache = llama::Cache::new(false, DType::F32, &config, &Device::Cpu)?;
            llama::Llama::load(weights(&tiny), &config)?.forward(ids, 0, &mut cache)
        });
    }
}

#[test]
fn mistral_agrees_with_candle() {
    // candle's windows are longer by one token than those of transformers, which the golden case compares.
    let mut spec = TinySpec::new("mistral");
    spec.extra.insert("sliding_window".into(), Value::Null);
    let tiny = Tiny::new(&spec);
    let config: mistral::Config = config(&tiny, json!({"use_flash_attn": false}));
    compare_answers(&tiny, |ids| mistral::Model::new(&config, weights(&tiny))?.forward(ids, 0));
}
