#!/usr/bin/env python3
"""Training steps of selected experts with PyTorch and Hugging Face transformers, as fast as we could make them.

`python train.py --model DIR --rows FILE --every 16` trains every 16th expert of each layer: a step is the gradient of the mean
cross-entropy of all targets, by micro-batches, and an update by AdamW. Prints one JSON object as identify.py does, whose options
it shares; `seconds` is that of the fastest step.

transformers stores all experts of a layer in one parameter, so gradients of all its experts are computed. A hook adds the
selected slices to f32 gradients of f32 masters and frees the rest; fused AdamW updates the masters, which are copied back. All other
settings are those of identify.py.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM

from identify import batch_of, parser_of, peak_rss, versions


class Masters:
    """f32 masters of every nth expert, with their gradients."""

    def __init__(self, model, every):
        model.requires_grad_(False)
        self.masters, self.places = [], []
        for layer in model.model.layers:
            index = torch.arange(0, layer.mlp.experts.num_experts, every)
            for p in layer.mlp.experts.parameters():
                p.requires_grad_(True)
                master = torch.nn.Parameter(p.detach()[index].float())
                master.grad = torch.zeros_like(master)
                self.masters.append(master)
                self.places.append((p, index))
                p.register_post_accumulate_grad_hook(self.hook(master, index))
        self.optimizer = torch.optim.AdamW(self.masters, lr=5e-5, weight_decay=0.01, fused=True)

    @staticmethod
    def hook(master, index):
        def take(p):
            master.grad += p.grad[index]
            p.grad = None

        return take

    @torch.no_grad()
    def update(self):
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        for (p, index), master in zip(self.places, self.masters):
            p.index_copy_(0, index, master.to(p.dtype))
            master.grad.zero_()


def step(model, batches, targets_of_all, a):
    total = 0.0
    for inputs, where, targets in batches:
        if a.logits == "targets":
            hidden = model.model(**inputs, use_cache=False).last_hidden_state
            logits = model.lm_head(hidden.view(-1, hidden.shape[-1])[where])
        else:
            logits = model(**inputs, use_cache=False).logits
            logits = logits.view(-1, logits.shape[-1])[where]
        loss = F.cross_entropy(logits.float(), targets, reduction="sum") / targets_of_all
        loss.backward()
        total += loss.item()
    return total


def main():
    parser: argparse.ArgumentParser = parser_of(__doc__)
    parser.add_argument("--every", type=int, default=16, help="train every nth expert of each layer")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    transformers.utils.logging.disable_progress_bar()
    with open(a.rows) as f:
        rows = json.load(f)
    model = AutoModelForCausalLM.from_pretrained(
        a.model, dtype=getattr(torch, a.dtype), attn_implementation=a.attention, experts_implementation=a.experts
    )
    model.to(a.device).eval()  # these families have no dropout
    masters = Masters(model, a.every)
    batches = [batch_of(rows[i : i + a.micro_batch], a.layout, a.device) for i in range(0, len(rows), a.micro_batch)]
    tokens, targets = sum(len(r["ids"]) for r in rows), sum(r["loss"] for r in rows)
    times, losses = [], []
    for _ in range(a.repeat):
        begin = time.perf_counter()
        losses.append(step(model, batches, targets, a))
        masters.update()
        times.append(time.perf_counter() - begin)
    print(json.dumps({
        "seconds": round(min(times), 3),
        "tokens_per_second": round(tokens / min(times), 1),
        "all_seconds": [round(t, 3) for t in times],
        "tokens": tokens,
        "computed_tokens": sum(inputs["input_ids"].numel() for inputs, _, _ in batches),
        "micro_batches": len(batches),
        "peak_rss_gib": round(peak_rss() / 2**30, 3),
        "losses": losses,
        "settings": {k: v for k, v in vars(a).items() if k not in ("model", "rows", "scores")},
        "versions": versions(),
    }, indent=1))


if __name__ == "__main__":
    main()
