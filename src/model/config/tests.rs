use serde_json::{Value, json};

use super::*;
use crate::exit::{self, Coded};

/// A configuration of this family with these keys and the defaults of all others.
fn config(model_type: &str, extra: Value) -> Result<ModelConfig, Error> {
    let mut object = extra;
    object["model_type"] = model_type.into();
    from_text(&object.to_string())
}

fn from_text(text: &str) -> Result<ModelConfig, Error> {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), text).unwrap();
    ModelConfig::from_dir(dir.path())
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    config.heads.iter().map(|heads| heads.window).collect()
}

#[test]
fn missing_keys_get_the_defaults_of_transformers() {
    let olmoe = config("olmoe", json!({})).unwrap();
    assert_eq!((olmoe.vocab_size, olmoe.hidden_size, olmoe.layers.len()), (50304, 2048, 16));
    assert_eq!((olmoe.num_experts, olmoe.num_experts_per_tok, olmoe.expert_width), (64, 8, 2048));
    assert_eq!(olmoe.heads[0], Heads { queries: 16, keys: 16, dim: 128, window: None });
    assert!(!olmoe.renormalize && !olmoe.qkv_bias && !olmoe.o_bias && olmoe.clip_qkv.is_none());

    let mixtral = config("mixtral", json!({})).unwrap();
    assert!(mixtral.renormalize && mixtral.qk_norm == QkNorm::None);
    assert_eq!(mixtral.heads[0].keys, 8);
    assert_eq!(config("mixtral", json!({"num_key_value_heads": null})).unwrap().heads[0].keys, 32);
    for key in ["num_experts_per_tok", "hidden_size", "num_attention_heads"] {
        let error = config("mixtral", json!({ key: null })).unwrap_err().to_string();
        assert!(error.contains(key) && error.contains("null is no number"), "{error}");
    }
    let error = config("mixtral", json!({"is_causal": false})).unwrap_err().to_string();
    assert!(error.contains("is_causal"), "{error}");

    let qwen3 = config("qwen3_moe", json!({"head_dim": 128})).unwrap();
    assert_eq!((qwen3.heads[0].dim, qwen3.qk_norm, qwen3.shared_expert_width), (128, QkNorm::PerHead, None));

    let dense =
        [("qwen3", 151936, 32, 128, 22016), ("llama", 32000, 32, 128, 11008), ("mistral", 32000, 8, 128, 14336)];
    for (model_type, vocab, keys, dim, width) in dense {
        let config = config(model_type, json!({})).unwrap();
        assert!(config.is_dense() && config.layers == [LayerKind::Dense(width); 32], "{model_type}");
        assert_eq!((config.vocab_size, config.hidden_size), (vocab, 4096), "{model_type}");
        let window = (model_type == "mistral").then_some(4096);
        assert_eq!(config.heads[31], Heads { queries: 32, keys, dim, window }, "{model_type}");
    }
    assert_eq!(
        config("qwen3", json!({"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8}))
            .unwrap()
            .heads[0]
            .dim,
        128
    );
    assert_eq!(config("llama", json!({"hidden_size": 1024, "num_attention_heads": 16})).unwrap().heads[0].dim, 64);

    let qwen2 = config("qwen2_moe", json!({})).unwrap();
    assert_eq!((qwen2.qkv_bias, qwen2.o_bias, qwen2.shared_expert_width), (true, false, Some(5632)));
}

#[test]
fn both_names_of_the_expert_count_are_read() {
    for model_type in ["olmoe", "mixtral", "qwen3_moe", "qwen2_moe"] {
        for key in ["num_experts", "num_local_experts"] {
            assert_eq!(config(model_type, json!({key: 17})).unwrap().num_experts, 17, "{model_type} {key}");
        }
    }
}

#[test]
fn biases_follow_the_family() {
    let both = config("qwen3_moe", json!({"attention_bias": true})).unwrap();
    assert!(both.qkv_bias && both.o_bias);
    assert!(!config("qwen2_moe", json!({"qkv_bias": false, "attention_bias": true})).unwrap().qkv_bias);
    for model_type in ["mixtral", "mistral"] {
        assert!(!config(model_type, json!({"attention_bias": true})).unwrap().qkv_bias, "{model_type}");
    }
    for model_type in ["qwen3", "llama"] {
        let both = config(model_type, json!({"attention_bias": true})).unwrap();
        assert!(both.qkv_bias && both.o_bias, "{model_type}");
    }
}

#[test]
fn windows_follow_the_family() {
    let layers = |extra: Value| {
        let mut extra = extra;
        extra["num_hidden_layers"] = 4.into();
        extra
    };
    let of = |family, extra| windows(&config(family, layers(extra)).unwrap());
    let w = Some(7);
    assert_eq!(of("mixtral", json!({"sliding_window": 7})), [w; 4]);
    assert_eq!(of("qwen3_moe", json!({"sliding_window": 7})), [None; 4]);
    assert_eq!(of("qwen3_moe", json!({"sliding_window": 7, "use_sliding_window": true})), [w; 4]);
    assert_eq!(of("qwen2_moe", json!({"sliding_window": 0})), [None; 4]);
    let used = json!({"sliding_window": 7, "use_sliding_window": true});
    assert_eq!(of("qwen2_moe", used.clone()), [w, None, w, None]);
    let mut below = used.clone();
    below["max_window_layers"] = 2.into();
    assert_eq!(of("qwen2_moe", below), [w, None, None, None]);
    let mut typed = used;
    typed["layer_types"] = json!(["full_attention", "full_attention", "sliding_attention", "full_attention"]);
    assert_eq!(of("qwen2_moe", typed.clone()), [None, None, w, None]);
    assert_eq!(of("qwen3", typed), [None, None, w, None]);
    assert_eq!(of("qwen3", json!({"sliding_window": 7, "max_window_layers": 2})), [None; 4]);
    for (border, wanted) in [(0, [w; 4]), (3, [None, None, None, w]), (4, [None; 4])] {
        let extra = json!({"sliding_window": 7, "use_sliding_window": true, "max_window_layers": border});
        assert_eq!(of("qwen3", extra), wanted);
    }
    assert_eq!(of("mistral", json!({"sliding_window": 7})), [w; 4]);
    assert_eq!(of("mistral", json!({"sliding_window": null})), [None; 4]);
    assert_eq!(of("mistral", json!({})), [Some(4096); 4]);
}

#[test]
fn dense_layers_follow_list_and_step() {
    let extra =
        json!({"num_hidden_layers": 6, "decoder_sparse_step": 2, "mlp_only_layers": [3], "intermediate_size": 9});
    let config = config("qwen3_moe", extra).unwrap();
    assert_eq!(*config.moe_layers(), MoeLayers { layers: vec![1, 5], depth: 6 });
    assert_eq!((config.moe_layers().count(), config.moe_layers().index_of(5)), (2, 1));
    assert_eq!(config.layers[3], LayerKind::Dense(9));
}

#[test]
fn sequences_beyond_the_limit_of_rope_are_refused() {
    let limited = config("mixtral", json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}})).unwrap();
    limited.check_length(131072).unwrap();
    let error = limited.check_length(131073).unwrap_err();
    assert!(error.to_string().contains("131072"), "{error}");
    config("mixtral", json!({})).unwrap().check_length(usize::MAX).unwrap();
}

#[test]
fn invalid_values_name_their_key() {
    let cases = [
        ("olmoe", "num_experts", json!({"num_experts": 0}), exit::DATA),
        ("olmoe", "num_experts_per_tok", json!({"num_experts": 4, "num_experts_per_tok": 5}), exit::DATA),
        ("mixtral", "num_key_value_heads", json!({"num_key_value_heads": 5}), exit::DATA),
        ("mixtral", "num_attention_heads", json!({"hidden_size": 100}), exit::DATA),
        ("mixtral", "head_dim", json!({"head_dim": 7}), exit::DATA),
        ("olmoe", "head_dim", json!({"head_dim": 64}), exit::DATA),
        ("olmoe", "hidden_size", json!({"hidden_size": 1e30}), exit::DATA),
        ("olmoe", "hidden_size", json!({"hidden_size": -1}), exit::DATA),
        ("olmoe", "intermediate_size", json!({"num_experts": 1 << 28, "intermediate_size": 1 << 28}), exit::DATA),
        ("olmoe", "num_hidden_layers", json!({"num_hidden_layers": 1 << 28}), exit::DATA),
        ("olmoe", "rms_norm_eps", json!({"rms_norm_eps": -1e-5}), exit::DATA),
        ("olmoe", "hidden_act", json!({"hidden_act": "gelu"}), exit::CONFIG),
        ("olmoe", "sliding_window", json!({"sliding_window": 9}), exit::CONFIG),
        ("llama", "sliding_window", json!({"sliding_window": 9}), exit::CONFIG),
        ("llama", "mlp_bias", json!({"mlp_bias": true}), exit::CONFIG),
        ("mixtral", "sliding_window", json!({"sliding_window": 0}), exit::DATA),
        ("qwen3_moe", "mlp_only_layers", json!({"mlp_only_layers": [24]}), exit::DATA),
        ("qwen3_moe", "mlp_only_layers", json!({"num_hidden_layers": 1, "mlp_only_layers": [0]}), exit::DATA),
        ("qwen3_moe", "decoder_sparse_step", json!({"decoder_sparse_step": 0}), exit::DATA),
        ("qwen2_moe", "layer_types", json!({"layer_types": ["full_attention"]}), exit::DATA),
    ];
    for (model_type, key, extra, code) in cases {
        let error = config(model_type, extra).unwrap_err();
        assert_eq!(error.exit_code(), code, "{error}");
        assert!(error.to_string().contains(&format!("config.json: {key}: ")), "{error} does not name {key}");
    }
}

#[test]
fn an_unknown_family_lists_the_known_ones() {
    for text in [r#"{"model_type": "gemma"}"#, "{}"] {
        let error = from_text(text).unwrap_err();
        assert_eq!(error.exit_code(), exit::CONFIG);
        assert!(error.to_string().contains("olmoe, mixtral, qwen3_moe, qwen2_moe, qwen3, llama, mistral"), "{error}");
    }
}

#[test]
fn an_invalid_file_is_bad_data() {
    for text in ["", "[]", "{", r#"{"model_type": "olmoe", "rope_theta": NaN}"#, r#"{"a": 1, "a": 2}"#] {
        assert_eq!(from_text(text).unwrap_err().exit_code(), exit::DATA, "{text}");
    }
    assert_eq!(ModelConfig::from_dir(Path::new("/no/such")).unwrap_err().exit_code(), exit::NO_INPUT);
}
