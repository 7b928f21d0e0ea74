"""The lower bound of a pass's time: for every product and for attention the larger of FLOP over the GPU's rate and bytes over its
bandwidth, both measured (`cuda_ops --ceilings`); elementwise work, launches and waits cost nothing. No program reaches it."""

import json
import os

HERE = os.path.dirname(os.path.abspath(__file__))
WORD = 2  # bytes of a weight or an activation


def operations(shape, rows, length, trained=None):
    """(FLOP, bytes) of every operation of a micro-batch: of an identification, or of a training step of so many experts."""
    layers, d, vocabulary = (shape[k] for k in ("num_hidden_layers", "hidden_size", "vocab_size"))
    heads, key_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    dim = shape.get("head_dim") or d // heads
    width = shape.get("moe_intermediate_size") or shape["intermediate_size"]
    experts = shape.get("num_experts") or shape["num_local_experts"]
    tokens = rows * length
    routed = tokens * shape["num_experts_per_tok"]
    q, kv = heads * dim, key_heads * dim

    def product(m, n, k, times=1):
        return [(2 * m * n * k, WORD * (m * n + m * k + n * k))] * times

    def attention(products, tensors):
        # A query sees (length + 1) / 2 keys.
        return [(products * tokens * (length + 1) * q, tensors * WORD * tokens * (q + kv))]

    linear = [*product(tokens, q, d), *product(tokens, kv, d, 2), *product(tokens, d, q)]
    weights = min(experts, routed) * 3 * d * width * WORD
    activations = WORD * routed * (2 * d + 3 * width)
    expert_products = (2 * routed * 3 * d * width, weights + activations)
    forward = [*linear, *attention(2, 2), (2 * tokens * d * experts, 0), expert_products]
    # The lowest layer's attention needs no gradient: nothing below its experts is scored or trained.
    backward = [expert_products] * layers + [*linear, *attention(5, 4), (2 * tokens * d * experts, 0)] * (layers - 1)
    share = 1 if trained is None else trained / (layers * experts)
    gradient = [(2 * routed * 3 * d * width * share, activations * share)] * layers
    update = []
    if trained is not None:
        # Gradients are written once; AdamW reads them with master weights and moments, and writes all but the gradients.
        update = [(0, (4 + 4 + 24 + WORD) * 3 * d * width * trained)]
    return forward * layers + product(tokens, vocabulary, d, 2) + backward + gradient + update


def seconds(shape, rows, length, ceilings, trained=None):
    return sum(max(flops / ceilings["flops"], bytes_ / ceilings["bytes"])
               for flops, bytes_ in operations(shape, rows, length, trained))


def shapes():
    with open(f"{HERE}/shapes.json") as f:
        return json.load(f)


if __name__ == "__main__":
    # By the rates of an H200 that earlier estimates assumed.
    assumed = {"flops": 790e12, "bytes": 4.3e12}
    for name, shape in shapes().items():
        for rows, length in ((8, 512), (16, 2048)):
            print(f"{name} {rows}x{length}: {1e3 * seconds(shape, rows, length, assumed):.1f} ms")
