#!/usr/bin/env python3
"""Identification and training of selected experts on one GPU with PyTorch and transformers, as fast as we could make them.

`python gpu.py --model OLMoE-1B-7B --task identify --rows 8 --length 512` makes random bf16 weights in the published sizes
(benches/gpu/shapes.json), runs the task on random tokens and prints one JSON object: tokens/s (of the median step after the
warm-up), peak memory, versions. A model that does not fit gives {"oom": true, ...}. `--device cpu --tiny` is a functional test.

What makes it fast and small: `grouped_mm` experts and SDPA without a mask (no row is padded); only expert weights require a
gradient; a hook consumes each gradient as soon as it is complete, and frees it; head and loss run in chunks of rows, forward and
backward together. If a pass runs out of memory, it is repeated with activation recomputation.

identify: the L1 norm of each expert's gradient. train: transformers stores all experts of a layer in one parameter, so gradients of
all its experts are computed; fused AdamW updates f32 masters of the selected slices, which are copied back. Layers without a
selected expert require no gradient.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SHAPES = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../gpu/shapes.json")
TINY = dict(hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=8, num_local_experts=8, num_experts_per_tok=2, vocab_size=500)
CHUNK = 4096  # rows per chunk of the head


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="a name of benches/gpu/shapes.json")
    parser.add_argument("--task", choices=["identify", "train"], required=True)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=6, help="measured steps")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--share", type=float, default=0.0625, help="share of the experts that is trained")
    parser.add_argument("--selected", help="expert_scores.json of moewarden: train its selection instead")
    parser.add_argument("--recompute", choices=["auto", "always", "never"], default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a toy model of the same family")
    return parser.parse_args()


def build(a):
    with open(SHAPES) as f:
        shape = json.load(f)[a.model]
    shape.pop("architectures"), shape.pop("dtype")
    theta = shape.pop("rope_theta")
    if a.tiny:
        shape |= {k: v for k, v in TINY.items() if k in shape}
    config = AutoConfig.for_model(shape.pop("model_type"), **shape)
    config.rope_parameters = {"rope_type": "default", "rope_theta": theta}
    with torch.device(a.device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm")
    return model.requires_grad_(False)


def experts_of(model):
    return [(i, layer.mlp.experts) for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]


def forward_backward(model, ids):
    """Forward and backward of the mean cross-entropy over all positions except the first; returns the loss."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    rows = hidden.detach()[:, :-1].reshape(-1, hidden.shape[-1])
    targets = ids[:, 1:].reshape(-1)
    grad, loss = torch.empty_like(rows), torch.zeros((), device=ids.device)
    for at in range(0, len(rows), CHUNK):
        x = rows[at : at + CHUNK].requires_grad_()
        part = F.cross_entropy(model.lm_head(x).float(), targets[at : at + CHUNK], reduction="sum") / len(rows)
        part.backward()
        grad[at : at + CHUNK] = x.grad
        loss += part.detach()
    full = torch.zeros_like(hidden)
    full[:, :-1] = grad.view(hidden.shape[0], -1, hidden.shape[-1])
    hidden.backward(full)
    return loss


class Identify:
    """Σ |gradient| by layer and expert. Nothing synchronises with the GPU until the sums are read."""

    def __init__(self, model, a):
        experts = experts_of(model)
        self.sums = torch.zeros(len(experts), experts[0][1].num_experts, device=a.device)
        self.model, self.trained = model, None
        for row, (_, module) in enumerate(experts):
            for p in module.parameters():
                p.requires_grad_(True)
                p.register_post_accumulate_grad_hook(self.hook(row))

    def hook(self, row):
        def reduce(p):
            self.sums[row] += torch.linalg.vector_norm(p.grad, ord=1, dim=(1, 2), dtype=torch.float32)
            p.grad = None

        return reduce

    def step(self, ids):
        return forward_backward(self.model, ids)

    def finish(self):
        return float(self.sums.sum())


class Train:
    """AdamW on f32 masters of the selected experts."""

    def __init__(self, model, a):
        experts = experts_of(model)
        n = experts[0][1].num_experts
        chosen = self.chosen(a, [i for i, _ in experts], n)
        self.model, self.trained = model, sum(map(len, chosen.values()))
        self.masters, self.places = [], []
        for layer, module in experts:
            index = torch.tensor(chosen.get(layer, []), device=a.device, dtype=torch.long)
            if not len(index):
                continue
            for p in module.parameters():
                p.requires_grad_(True)
                master = torch.nn.Parameter(p.detach()[index].float())
                self.masters.append(master)
                self.places.append((p, index))
                p.register_post_accumulate_grad_hook(self.hook(master, index))
        self.optimizer = torch.optim.AdamW(self.masters, lr=5e-5, weight_decay=0.01, fused=True)

    @staticmethod
    def chosen(a, layers, n):
        if a.selected:
            with open(a.selected) as f:
                rounds = json.load(f)["rounds"]
            pairs = rounds[max(rounds, key=int)]["selected"]
        else:  # evenly spread
            count = max(1, round(a.share * len(layers) * n))
            pairs = [(layers[i % len(layers)], i // len(layers) * 7 % n) for i in range(count)]
        chosen = {}
        for layer, expert in pairs:
            chosen.setdefault(layer, []).append(expert)
        return chosen

    @staticmethod
    def hook(master, index):
        def take(p):
            master.grad = p.grad[index].float()
            p.grad = None

        return take

    def step(self, ids):
        loss = forward_backward(self.model, ids)
        self.optimizer.step()
        with torch.no_grad():
            for (p, index), master in zip(self.places, self.masters):
                p.index_copy_(0, index, master.to(p.dtype))
                master.grad = None
        return loss

    def finish(self):
        return None


def measure(model, a, recompute):
    if recompute:
        model.train()  # checkpointing is active in train mode only; these families have no dropout
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.eval()
    cuda = a.device != "cpu"
    task = (Identify if a.task == "identify" else Train)(model, a)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(a.warmup + a.steps):
        ids = torch.randint(4, min(32000, model.config.vocab_size), (a.rows, a.length), generator=generator).to(a.device)
        begin = time.perf_counter()
        loss = task.step(ids)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    measured = seconds[a.warmup :]
    median = statistics.median(measured)
    return {
        "tokens_per_second": round(a.rows * a.length / median, 1), "seconds": median, "all_seconds": seconds,
        "trained_experts": task.trained, "loss": float(loss), "sum": task.finish(),
    }


def main():
    a = parse()
    cuda = a.device != "cpu"
    if cuda and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no GPU")
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    result = {
        "model": a.model, "task": a.task, "rows": a.rows, "length": a.length, "oom": False,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version(),
                     "gpu": torch.cuda.get_device_name() if cuda else "none"},
    }
    # Each attempt builds a new model: a failed attempt leaves hooks and partial gradients behind.
    for recompute in {"auto": [False, True], "always": [True], "never": [False]}[a.recompute]:
        model = None
        try:
            model = build(a)
            result["parameters"] = sum(p.numel() for p in model.parameters())
            result |= measure(model, a, recompute) | {"recompute": recompute, "oom": False}
        except torch.OutOfMemoryError as error:
            result |= {"oom": True, "message": str(error).splitlines()[0]}
        if cuda:
            result["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            result["peak_reserved_gib"] = round(torch.cuda.max_memory_reserved() / 2**30, 2)
        if not result["oom"] or "parameters" not in result:
            break  # done, or not even the weights fit
        del model
        gc.collect()  # hooks and tasks refer to each other
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
