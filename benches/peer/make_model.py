#!/usr/bin/env python3
"""Writes a random OLMoE checkpoint for the benchmark: `python make_model.py DIR [--layers 4 ...]`.

Values are drawn as in an untrained model (normal, 0.02), so routing is nearly uniform, as it usually is after training with a
load-balancing loss; every expert receives tokens.
"""

import argparse

import torch
from transformers import OlmoeConfig, OlmoeForCausalLM
from transformers.utils import logging


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--expert-width", type=int, default=512)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    logging.disable_progress_bar()
    torch.manual_seed(a.seed)
    config = OlmoeConfig(
        vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.expert_width, num_hidden_layers=a.layers,
        num_attention_heads=a.heads, num_key_value_heads=a.heads, num_experts=a.experts, num_experts_per_tok=a.top_k,
        max_position_embeddings=4096, eos_token_id=0, pad_token_id=1,
    )
    model = OlmoeForCausalLM(config).to(getattr(torch, a.dtype))
    model.save_pretrained(a.dir)
    print(f"{a.dir}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters in {a.dtype}")


if __name__ == "__main__":
    main()
