"""The table of cases: model family, special options of its configuration and files, and kind of data rows."""

# Small enough to commit, with dimensions that differ, so that swapped dimensions are detected.
SMALL = dict(layers=2, experts=6, top_k=2, vocab=304, rows=6)
FULL = dict(layers=3, experts=8, top_k=2, vocab=320, rows=8)


def case(family, about, rows, shape=SMALL, config=None, **files):
    """Keys of `files`: dtype; fused (one tensor a layer for all experts); shard (maximum bytes of a file); old_rope
    (rope keys of transformers 4); full (all training runs); gradients (writes the gradients of all parameters to a file);
    baseline (False: no `baseline` run, because AdamW would amplify the rounding noise of gradients that are zero)."""
    return dict(family=family, about=about, rows=rows, shape=shape, config=config or {}, files=files)


DENSE = ("qwen3", "llama", "mistral")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

CASES = {
    # each family with all results
    "olmoe": case("olmoe", "norms over the whole width; no renormalisation", "goal", FULL, full=True, gradients=True),
    "mixtral": case("mixtral", "always renormalises; grouped queries", "prompt", FULL, full=True),
    "qwen3_moe": case("qwen3_moe", "norms per head; head_dim is not D/H", "verdict", FULL, dict(norm_topk_prob=True), full=True),
    "qwen2_moe": case("qwen2_moe", "shared expert with its gate; biases of q, k, v", "pair", FULL, full=True, gradients=True),
    # routing
    "olmoe_k1": case("olmoe", "one expert a token, not renormalised", "goal", SMALL | dict(top_k=1)),
    "mixtral_k1": case("mixtral", "one expert a token, renormalised: cross-entropy gives its router no gradient", "prompt", SMALL | dict(top_k=1), baseline=False),
    "mixtral_kall": case("mixtral", "every token visits every expert", "prompt", SMALL | dict(experts=4, top_k=4)),
    "qwen3_raw": case("qwen3_moe", "norm_topk_prob false", "pair", SMALL | dict(top_k=3), dict(norm_topk_prob=False)),
    # attention
    "olmoe_clip": case("olmoe", "clip_qkv that bites, attention biases, norm_topk_prob true", "goal", config=dict(clip_qkv=0.6, attention_bias=True, norm_topk_prob=True)),
    "mixtral_window": case("mixtral", "sliding window of 12", "prompt", config=dict(sliding_window=12)),
    "qwen3_window": case("qwen3_moe", "sliding window of 9 in all layers, attention biases", "verdict", config=dict(use_sliding_window=True, sliding_window=9, max_window_layers=2, attention_bias=True)),
    "qwen2_window": case("qwen2_moe", "sliding window of 10 in the layers that layer_types names: every second below max_window_layers", "pair", SMALL | dict(layers=3, experts=4), dict(use_sliding_window=True, sliding_window=10, max_window_layers=2)),
    "qwen2_plain": case("qwen2_moe", "qkv_bias false, norm_topk_prob true, dynamic rope (rows stay below max_position_embeddings) in the old spelling", "pair", config=dict(qkv_bias=False, norm_topk_prob=True, rope_parameters={"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 2.0}), old_rope=True),
    # rotary embeddings
    "olmoe_linear": case("olmoe", "rope scaling linear in the old spelling with the key `type`; sharded files", "goal", config=dict(rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}), old_rope=True, shard=60_000),
    "qwen3_yarn": case("qwen3_moe", "rope scaling yarn; f16 weights", "verdict", config=dict(rope_parameters=YARN), dtype="float16"),
    "mixtral_yarn": case("mixtral", "rope scaling yarn with all its knobs", "prompt", config=dict(head_dim=8, rope_parameters=YARN | {"beta_fast": 24.0, "beta_slow": 2.0, "attention_factor": 1.2})),
    "mixtral_llama3": case("mixtral", "rope scaling llama3; bf16 weights in sharded files", "prompt", config=dict(head_dim=8, rope_parameters=LLAMA3), dtype="bfloat16", shard=40_000),
    # layers
    "qwen3_dense": case("qwen3_moe", "mlp_only_layers: the first layer is dense", "verdict", SMALL | dict(layers=3, experts=4), dict(mlp_only_layers=[0], norm_topk_prob=True)),
    "qwen3_sparse": case("qwen3_moe", "decoder_sparse_step 2: layers 1 and 3 route; tied embeddings", "verdict", SMALL | dict(layers=4, experts=4), dict(decoder_sparse_step=2, tie_word_embeddings=True, norm_topk_prob=True)),
    # dense families
    "dense_qwen3": case("qwen3", "dense; norms per head; head_dim is not D/H; a window of 9 from the second layer; tied embeddings", "verdict", config=dict(head_dim=12, use_sliding_window=True, sliding_window=9, max_window_layers=1, tie_word_embeddings=True)),
    "dense_llama": case("llama", "dense; rope scaling llama3; bf16 weights", "goal", config=dict(head_dim=8, rope_parameters=LLAMA3), dtype="bfloat16"),
    "dense_llama_bias": case("llama", "dense; biases of attention; rope scaling linear in the old spelling; as many key as query heads; tied embeddings", "pair", config=dict(attention_bias=True, num_key_value_heads=4, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}, tie_word_embeddings=True), old_rope=True),
    "dense_mistral": case("mistral", "dense; sliding window of 12; rope scaling yarn", "prompt", config=dict(sliding_window=12, head_dim=8, rope_parameters=YARN)),
    # files
    "olmoe_fused": case("olmoe", "experts fused on disk; labelled chat rows, one early reply without loss", "chat", fused=True),
    "olmoe_bf16": case("olmoe", "bf16 weights: computed in f32 over the stored values, trained through f32 masters", "goal", dtype="bfloat16"),
    "mixtral_fused": case("mixtral", "experts fused on disk, sharded, tied embeddings", "prompt", config=dict(tie_word_embeddings=True), fused=True, shard=60_000),
    "qwen2_fused": case("qwen2_moe", "experts fused on disk in bf16", "pair", fused=True, dtype="bfloat16"),
}


def config_of(c):
    """Keyword arguments of the family's configuration class."""
    s = c["shape"]
    out = dict(
        vocab_size=s["vocab"], hidden_size=32, num_hidden_layers=s["layers"], num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, initializer_range=0.15,
    )
    if c["family"] in DENSE:
        return out | dict(intermediate_size=40) | c["config"]
    out |= dict(num_experts_per_tok=s["top_k"]) | {
        "olmoe": dict(num_experts=s["experts"], intermediate_size=16, num_key_value_heads=4, pad_token_id=0),
        "mixtral": dict(num_local_experts=s["experts"], intermediate_size=16),
        "qwen3_moe": dict(num_experts=s["experts"], moe_intermediate_size=16, intermediate_size=40, head_dim=12),
        "qwen2_moe": dict(
            num_experts=s["experts"], moe_intermediate_size=16, intermediate_size=40, shared_expert_intermediate_size=24
        ),
    }[c["family"]]
    return out | c["config"]
