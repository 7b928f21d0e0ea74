#!/usr/bin/env python3
"""Writes `retention.json` of a case: training runs with retain rows, which are the case's safe replies, in f64.

    python tests/golden/retention.py [CASE ...]

Independent of moewarden: the base model is a second copy of the model, run again for every step. README.md describes the result.
"""

import json
import sys
from pathlib import Path

import torch

import generate
import method

HERE = Path(__file__).parent
CASES = ["qwen2_moe", "olmoe"]
RUNS = [
    {"phase": "expert", "retain_loss": "ce", "retain_weight": 0.7},
    {"phase": "expert", "retain_loss": "kl", "retain_weight": 2.0},
    {"phase": "expert", "retain_loss": "kl", "retain_weight": 1.5, "retain_routing_weight": 3.0, "grad_accum": 2},
    {"phase": "expert", "retain_loss": "kl", "retain_weight": 1.0, "retain_routing_weight": 0.5, "mode": "baseline"},
    {"phase": "expert", "retain_loss": "kl", "retain_weight": 0.0, "retain_routing_weight": 4.0},
    {"phase": "router", "retain_loss": "kl", "retain_weight": 1.0, "retain_routing_weight": 0.5},
]


def example(record, side):
    """A reply with its loss mask as a list."""
    loss = [False] * len(record[side]["ids"])
    for start, end in record[side]["loss"]:
        loss[start:end] = [True] * (end - start)
    loss[0] = False
    return {"ids": record[side]["ids"], "loss": loss}


def predictions(net, row):
    """Logits of the places whose next token carries loss, and router logits of all places by layer."""
    logits = net(row["ids"])
    places = [t - 1 for t, loss in enumerate(row["loss"]) if loss]
    return logits[places].double(), [z.double() for z, _ in net.routing.values()]


def kl(base, logits):
    """KL(softmax(base) ‖ softmax(logits)) by row."""
    p = base.softmax(-1)
    return (p * (base.log_softmax(-1) - logits.log_softmax(-1))).sum(-1)


def retention(net, base, rows, kind):
    """(loss of the replies, divergence of the routing), each a mean over the batch."""
    replies, routing = [], []
    for row in rows:
        with torch.no_grad():
            base_logits, base_routers = predictions(base, row)
        logits, routers = predictions(net, row)
        if kind == "ce":
            targets = torch.tensor([row["ids"][t] for t, loss in enumerate(row["loss"]) if loss])
            replies.append(torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
        else:
            replies.append(kl(base_logits, logits))
        routing.append(torch.stack([kl(b, z) for b, z in zip(base_routers, routers)]))
    return torch.cat(replies).mean(), torch.cat(routing, -1).mean()


def run(folder, expect, options):
    o = expect["options"]
    net, base = (method.Net(folder / "model", torch.float32, torch.float64) for _ in range(2))
    records = expect["records"]
    unsafe = [example(r, "unsafe_reply") for r in records if "unsafe_reply" in r]
    retain = [example(r, "safe_reply") for r in records if "safe_reply" in r]
    pairs = [(r["safe_prompt"], r["unsafe_prompt"]) for r in records]
    weight, routing_weight = options["retain_weight"], options.get("retain_routing_weight", 0.0)
    size = o["batch_size"] * options.get("grad_accum", 1)
    if options["phase"] == "router":
        steps, groups = method.chunks(pairs, size), [(net.router_names(), o["router_lr"])]
    else:
        names = list(net.leaves())
        if options.get("mode") != "baseline":
            names = method.expert_names([tuple(x) for x in expect["selection"]["highest"]])
        steps, groups = method.chunks(unsafe, size), [(names, o["expert_lr"])]
    at = 0

    def step(batch):
        def go():
            nonlocal at
            rows = [retain[(at + i) % len(retain)] for i in range(len(batch))]
            at += len(batch)
            if options["phase"] == "router":
                with torch.no_grad():
                    target = method.statistic(net, [safe for safe, _ in batch], "token-probs")
                own = method.router_loss(target, method.statistic(net, [u for _, u in batch], "token-probs"), "forward")
            else:
                total, count = method.ce_sum(net, batch)
                own = total / count
            replies, routing = retention(net, base, rows, options["retain_loss"])
            loss = own + weight * replies + routing_weight * routing
            loss.backward()
            entry = {"own_loss": own.item(), "total_loss": loss.item()}
            if weight > 0:
                entry["retain_loss"] = replies.item()
            if routing_weight > 0:
                entry["retain_routing_loss"] = routing.item()
            return entry

        return go

    before = {n: leaf.value().clone() for n, leaf in net.leaves().items()}
    log = method.train(net, groups, [step(batch) for batch in steps], {"weight_decay": o["weight_decay"]})
    trained = [n for names, _ in groups for n in names]
    change = {n: generate.digest(net.leaves()[n].value() - before[n]) for n in trained}
    return {"options": options, "steps": log, "change": change, "drift": drift(net, base, retain)}


def drift(net, base, rows):
    """The distance from the base model over all rows."""
    with torch.no_grad():
        both = [(predictions(base, row), predictions(net, row)) for row in rows]
    replies = torch.cat([kl(b[0], n[0]) for b, n in both])
    same = torch.cat([b[0].argmax(-1) == n[0].argmax(-1) for b, n in both])
    routing = torch.stack([torch.cat([kl(b[1][i], n[1][i]) for b, n in both]).mean() for i in range(len(net.blocks))])
    k = next(iter(net.routing.values()))[1].shape[-1]
    def overlap(i):
        shares = []
        for b, n in both:
            for x, y in zip(b[1][i].topk(k).indices.tolist(), n[1][i].topk(k).indices.tolist()):
                shares.append(len(set(x) & set(y)) / k)
        return sum(shares) / len(shares)
    with torch.no_grad():
        total, count = method.ce_sum(net, rows)
    layers = [overlap(i) for i in range(len(net.blocks))]
    return {
        "kl": replies.mean().item(), "top1_agreement": same.double().mean().item(), "ce_loss": (total / count).item(),
        "routing_kl": routing.mean().item(), "expert_overlap": sum(layers) / len(layers),
        "layers": [{"routing_kl": r.item(), "expert_overlap": o} for r, o in zip(routing, layers)],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    generate.logging.disable_progress_bar()
    for name in sys.argv[1:] or CASES:
        expect = json.loads((HERE / name / "expect.json").read_text())
        runs = [run(HERE / name, expect, options) for options in RUNS]
        generate.write_json(HERE / name / "retention.json", {"schema": "moewarden.golden.retention/1", "training": runs})
        print(name, flush=True)
