#!/usr/bin/env python3
"""Identification with PyTorch and Hugging Face transformers, as fast as we could make it: the peer of the benchmark.

`python identify.py --model DIR --rows FILE` scores every expert by the mean |gradient| of the micro-batches' mean
cross-entropy and prints one JSON object: seconds and tokens/s of the pass (excluding loading), peak memory, settings.

What makes it fast (README.md lists the settings tried): the `grouped_mm` experts of transformers 5; SDPA; only expert weights
require a gradient, so the backward pass stops at the lowest experts; the head is computed only for rows that predict a target; rows
are packed without padding, with positions that restart at each row; a hook reduces each weight's gradient as soon as it is complete
and frees it, so that the gradients of two layers never exist at the same time.
"""

import argparse
import json
import platform
import resource
import time

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM


def parser_of(doc):
    """The options of all peers on these rows."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--rows", required=True, help="a file of make_rows.py")
    parser.add_argument("--micro-batch", type=int, default=8, help="rows in one forward and backward")
    parser.add_argument("--experts", choices=["grouped_mm", "eager", "batched_mm"], default="grouped_mm")
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--layout", choices=["packed", "padded"], default="packed")
    parser.add_argument("--logits", choices=["targets", "all"], default="targets")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=1, help="passes; the fastest counts, the first is the warm-up")
    return parser


def parse():
    parser = parser_of(__doc__)
    parser.add_argument("--scores", help="write losses and scores to this JSON file")
    return parser.parse_args()


def batch_of(rows, layout, device):
    """Model inputs, the flat positions that predict a target, and the targets."""
    longest = max(len(r["ids"]) for r in rows)
    ids, mask, positions, where, targets = [], [], [], [], []
    for r in rows:
        pad = 0 if layout == "packed" else longest - len(r["ids"])
        start, n = len(ids), len(r["ids"])
        where += range(start + n - r["loss"] - 1, start + n - 1)
        targets += r["ids"][n - r["loss"] :]
        ids += r["ids"] + [0] * pad
        mask += [1] * n + [0] * pad
        positions += range(n)
    shape = (1, -1) if layout == "packed" else (len(rows), longest)
    inputs = {"input_ids": torch.tensor(ids, device=device).view(shape)}
    if layout == "packed":
        # transformers derives the row boundaries from the positions, and masks attention across them
        inputs["position_ids"] = torch.tensor(positions, device=device).view(shape)
    else:
        inputs["attention_mask"] = torch.tensor(mask, device=device).view(shape)
    return inputs, torch.tensor(where, device=device), torch.tensor(targets, device=device)


class Scores:
    """Mean |gradient| by layer and expert, summed over micro-batches."""

    def __init__(self, model):
        self.layers = [i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts")]
        experts = [model.model.layers[i].mlp.experts for i in self.layers]
        self.sums = torch.zeros(len(experts), experts[0].num_experts, dtype=torch.float64)
        model.requires_grad_(False)
        for row, module in enumerate(experts):
            size = sum(p[0].numel() for p in module.parameters())
            for p in module.parameters():
                p.requires_grad_(True)
                p.register_post_accumulate_grad_hook(self.hook(row, size))

    def hook(self, row, size):
        def reduce(p):
            # reads the gradient once, without materialising |g|
            total = torch.linalg.vector_norm(p.grad, ord=1, dim=(1, 2), dtype=torch.float32)
            self.sums[row] += total.double().cpu() / size
            p.grad = None

        return reduce


def open_inputs(a):
    """Rows, model, micro-batches."""
    torch.set_num_threads(a.threads)
    transformers.utils.logging.disable_progress_bar()
    with open(a.rows) as f:
        rows = json.load(f)
    model = AutoModelForCausalLM.from_pretrained(
        a.model, dtype=getattr(torch, a.dtype), attn_implementation=a.attention, experts_implementation=a.experts
    )
    model.to(a.device).eval()  # these families have no dropout
    batches = [batch_of(rows[i : i + a.micro_batch], a.layout, a.device) for i in range(0, len(rows), a.micro_batch)]
    return rows, model, batches


def loss_of(model, batch, a, reduction="mean"):
    inputs, where, targets = batch
    if a.logits == "targets":
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden.view(-1, hidden.shape[-1])[where])
    else:
        logits = model(**inputs, use_cache=False).logits
        logits = logits.view(-1, logits.shape[-1])[where]
    return F.cross_entropy(logits.float(), targets, reduction=reduction)


def one_pass(model, batches, a):
    losses = []
    for batch in batches:
        loss = loss_of(model, batch, a)
        loss.backward()
        losses.append(loss.item())
    return losses


def measured(a, rows, batches, times):
    """What every peer prints of its passes."""
    tokens = sum(len(r["ids"]) for r in rows)
    return {
        "seconds": round(min(times), 3),
        "tokens_per_second": round(tokens / min(times), 1),
        "all_seconds": [round(t, 3) for t in times],
        "tokens": tokens,
        "computed_tokens": sum(inputs["input_ids"].numel() for inputs, _, _ in batches),
        "micro_batches": len(batches),
        "peak_rss_gib": round(peak_rss() / 2**30, 3),
        "settings": {k: v for k, v in vars(a).items() if k not in ("model", "rows", "scores")},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
    }


def peak_rss():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main():
    a = parse()
    rows, model, batches = open_inputs(a)
    scores = Scores(model)
    loaded = peak_rss()
    times, cpu = [], []
    for _ in range(a.repeat):
        scores.sums.zero_()
        begin, begin_cpu = time.perf_counter(), time.process_time()
        losses = one_pass(model, batches, a)
        if a.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
    result = measured(a, rows, batches, times) | {
        "cpu_seconds": round(min(cpu), 3),  # of all threads: distinguishes a busy machine from a slow program
        "peak_rss_loaded_gib": round(loaded / 2**30, 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "losses": losses,
    }
    if a.device != "cpu":
        result["peak_gpu_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
    print(json.dumps(result, indent=1))
    if a.scores:
        with open(a.scores, "w") as f:
            json.dump({"layers": scores.layers, "losses": losses, "scores": (scores.sums / len(batches)).tolist()}, f)


if __name__ == "__main__":
    main()
