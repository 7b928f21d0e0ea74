"""Reference implementation of the method with Hugging Face transformers and PyTorch autograd. Slow and simple on purpose: each
row goes through the model separately, without padding, and a micro-batch is the sum over its rows."""

import math

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

KL_TYPES = ("forward", "reverse", "symmetric")
STATISTICS = ("token-probs", "sample-logits")
SCORES = ("l1-mean", "l2", "fisher", "taylor")


class Leaf:
    """A parameter, or the slice `index` of a fused parameter that belongs to one expert."""

    def __init__(self, param, index=()):
        self.param, self.index = param, index

    def value(self):
        return self.param.data[self.index]

    def grad(self):
        if self.param.grad is None:  # no token was routed to it
            return torch.zeros_like(self.value())
        return self.param.grad[self.index]


class Net:
    """A model that records the routing of its last forward pass. Weights are stored as `dtype` and computed with in `compute`;
    the norms and softmaxes of transformers always compute in f32."""

    def __init__(self, folder, dtype, compute):
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
        )
        self.model.eval().to(compute)
        self.dtype = dtype
        self.routing = {}  # layer -> (logits [T, E] in the graph, expert ids [T, K])
        self.margin = math.inf  # smallest gap between the K-th and the next logit, in standard deviations of the logits
        self.blocks = {}
        for layer, decoder in enumerate(self.model.model.layers):
            if hasattr(decoder.mlp, "experts"):
                self.blocks[layer] = decoder.mlp
                decoder.mlp.gate.register_forward_hook(self._hook(layer))
        self.num_experts = next((block.experts.num_experts for block in self.blocks.values()), 0)  # 0: a dense model

    def _hook(self, layer):
        def hook(gate, inputs, outputs):
            logits = F.linear(inputs[0].reshape(-1, inputs[0].shape[-1]), gate.weight)
            ids = outputs[-1]
            self.routing[layer] = (logits, ids)
            k = ids.shape[-1]
            if k < logits.shape[-1]:
                ordered = logits.detach().double().sort(-1, descending=True).values
                gap = (ordered[:, k - 1] - ordered[:, k]).min() / ordered.std()
                self.margin = min(self.margin, gap.item())

        return hook

    def __call__(self, ids):
        """Logits `[T, V]` of one sequence."""
        return self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]

    def leaves(self):
        """All parameters by their names in the fixtures: `layers.L.experts.E.gate|up|down` for the matrices of routed experts,
        the module names of transformers for all others."""
        out = {}
        for name, param in self.model.named_parameters():
            if ".experts." not in name:
                out[name] = Leaf(param)
        for layer, block in self.blocks.items():
            width = block.experts.down_proj.shape[-1]
            for e in range(self.num_experts):
                at = f"layers.{layer}.experts.{e}."
                out[at + "gate"] = Leaf(block.experts.gate_up_proj, (e, slice(0, width)))
                out[at + "up"] = Leaf(block.experts.gate_up_proj, (e, slice(width, 2 * width)))
                out[at + "down"] = Leaf(block.experts.down_proj, (e,))
        return out

    def router_names(self):
        return [f"model.layers.{layer}.mlp.gate.weight" for layer in self.blocks]


def expert_names(experts):
    return [f"layers.{l}.experts.{e}.{m}" for l, e in sorted(experts) for m in ("gate", "up", "down")]


def token_losses(net, example):
    """−log p of each target token of one example, in token order."""
    logits = net(example["ids"])
    at = [t for t, loss in enumerate(example["loss"]) if loss and t > 0]
    rows = torch.tensor([t - 1 for t in at])
    targets = torch.tensor([example["ids"][t] for t in at])
    return F.cross_entropy(logits[rows].double(), targets, reduction="none")


def ce_sum(net, examples):
    """(sum, number) of the token losses of several examples."""
    losses = [token_losses(net, example) for example in examples]
    return sum(l.sum() for l in losses), sum(len(l) for l in losses)


def chunks(items, n):
    return [items[i : i + n] for i in range(0, len(items), n)]


# --- identification -----------------------------------------------------------------------------------------------


def identify(net, micro_batches):
    """The mean loss of each micro-batch, and scores[score][per][position of the layer][expert]."""
    shape = (len(net.blocks), net.num_experts)
    sums = {s: {per: torch.zeros(shape, dtype=torch.float64) for per in ("param", "token")} for s in SCORES}
    losses = []
    for batch in micro_batches:
        net.model.zero_grad()
        tokens = torch.zeros(shape)
        total = 0
        count = sum(sum(e["loss"]) for e in batch)
        for example in batch:
            row = token_losses(net, example).sum() / count
            for i, (_, ids) in enumerate(net.routing.values()):
                tokens[i] += torch.bincount(ids.flatten(), minlength=shape[1])
            row.backward()
            total += row.item()
        losses.append(total)
        leaves = net.leaves()
        for i, layer in enumerate(net.blocks):
            for e in range(shape[1]):
                parts = [leaves[n] for n in expert_names([(layer, e)])]
                g = torch.cat([p.grad().flatten() for p in parts]).double()
                w = torch.cat([p.value().flatten() for p in parts]).double()
                fisher = (g * g).mean()
                for s, value in zip(SCORES, (g.abs().mean(), fisher.sqrt(), fisher, (g * w).abs().mean())):
                    sums[s]["param"][i, e] += value
                    if tokens[i, e] > 0:
                        sums[s]["token"][i, e] += value / tokens[i, e]
    return losses, {s: {p: (v / len(micro_batches)).tolist() for p, v in by.items()} for s, by in sums.items()}


def ranked(scores, layers, lowest=False):
    """(score, (layer, expert)) of all experts, from the highest score (or the lowest); ties by (layer, expert)."""
    flat = [(v, (layer, e)) for layer, row in zip(layers, scores) for e, v in enumerate(row)]
    return sorted(flat, key=lambda x: (x[0] if lowest else -x[0], x[1]))


def select(scores, layers, k, cap=None, lowest=False):
    """The `k` selected experts in order of rank, at most `cap` in a layer; and the smallest relative gap between the scores of a
    selected and another expert (exact ties do not count: the order of (layer, expert) decides them)."""
    taken, used = [], dict.fromkeys(layers, 0)
    margin = math.inf
    for value, (layer, e) in ranked(scores, layers, lowest):
        if len(taken) < k and (cap is None or used[layer] < cap):
            taken.append((value, (layer, e)))
            used[layer] += 1
    chosen = [x for _, x in taken]
    for value, x in ranked(scores, layers, lowest):
        if x not in chosen:
            for other, y in taken:
                # an expert of a layer at its cap competes only with experts of the same layer
                if value != other and (cap is None or used[x[0]] < cap or y[0] == x[0]):
                    margin = min(margin, abs(value - other) / max(abs(value), abs(other)))
    return chosen, margin


def frequencies(net, examples, tokens):
    """Routing frequencies [layer, expert] of one side of a batch, over its `response`, `prompt` or `all` tokens."""
    count, hits = 0, torch.zeros(len(net.blocks), net.num_experts, dtype=torch.float64)
    with torch.no_grad():
        for example in examples:
            net(example["ids"])
            mask = torch.tensor(example["loss"])
            mask = {"response": mask, "prompt": ~mask, "all": torch.ones_like(mask)}[tokens]
            count += int(mask.sum())
            for i, (_, ids) in enumerate(net.routing.values()):
                hits[i] += torch.bincount(ids[mask].flatten(), minlength=net.num_experts)
    return hits / count


# --- routers ------------------------------------------------------------------------------------------------------


def statistic(net, rows, kind):
    """By layer, a distribution over the experts, averaged over the tokens of `rows`."""
    by_layer = {layer: [] for layer in net.blocks}
    for ids in rows:
        net(ids)
        for layer, (logits, _) in net.routing.items():
            by_layer[layer].append(logits.double())
    return {layer: distribution(samples, kind) for layer, samples in by_layer.items()}


def distribution(samples, kind):
    if kind == "token-probs":
        return torch.cat(samples).softmax(-1).mean(0)
    return torch.stack([logits.mean(0).softmax(-1) for logits in samples]).mean(0)


def divergence(p, q, kind):
    """KL divergence between p (safe) and q (unsafe), summed over the experts."""
    p, q = ((x + 1e-8) / (x + 1e-8).sum() for x in (p, q))
    forward, reverse = (p * (p / q).log()).sum(), (q * (q / p).log()).sum()
    return {"forward": forward, "reverse": reverse, "symmetric": (forward + reverse) / 2}[kind]


def router_loss(safe, unsafe, kind, layers=None):
    layers = list(safe) if layers is None else layers
    return sum(divergence(safe[l], unsafe[l], kind) for l in layers) / len(layers)


# --- training -----------------------------------------------------------------------------------------------------


def schedule_factor(step, steps, schedule, warmup):
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "linear":
        return (steps - step) / (steps - warmup)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return 1.0


def train(net, groups, losses, options):
    """Trains one phase with AdamW. `groups` = [(parameter names, learning rate)]; `losses` has one closure a step, which calls
    backward and returns the entries to log. Master weights are f32; the model uses them rounded to its stored dtype."""
    leaves = net.leaves()
    masters = {n: torch.nn.Parameter(leaves[n].value().float().clone()) for names, _ in groups for n in names}
    optimizer = torch.optim.AdamW(
        [{"params": [masters[n] for n in names], "lr": lr} for names, lr in groups],
        betas=(0.9, 0.999), eps=1e-8, weight_decay=options.get("weight_decay", 0.01), foreach=False,
    )
    log = []
    for s, loss in enumerate(losses):
        net.model.zero_grad()
        entry = loss()
        for name, master in masters.items():
            master.grad = leaves[name].grad().float().clone()
        limit = options.get("max_grad_norm") or math.inf
        entry["grad_norm"] = torch.nn.utils.clip_grad_norm_(list(masters.values()), limit, foreach=False).item()
        factor = schedule_factor(s, len(losses), options.get("lr_schedule", "constant"), options.get("warmup_steps", 0))
        for group, (_, lr) in zip(optimizer.param_groups, groups):
            group["lr"] = lr * factor
        entry["lr_factor"] = factor
        optimizer.step()
        with torch.no_grad():
            for name, master in masters.items():
                leaves[name].value().copy_(master.to(net.dtype))
        log.append(entry)
    return log


def expert_steps(net, micro_batches, accum):
    """Mean cross-entropy over the loss tokens of all micro-batches of a step."""

    def step(batches):
        examples = [e for batch in batches for e in batch]

        def run():
            total, count = ce_sum(net, examples)
            (total / count).backward()
            return {"ce_loss": (total / count).item()}

        return run

    return [step(batches) for batches in chunks(micro_batches, accum)]


def router_steps(net, pair_batches, kind, stat):
    """Router alignment: a forward pass of the safe prompts without gradient, and one of the unsafe prompts with gradient."""

    def step(pairs):
        def run():
            with torch.no_grad():
                target = statistic(net, [safe for safe, _ in pairs], stat)
            loss = router_loss(target, statistic(net, [unsafe for _, unsafe in pairs], stat), kind)
            loss.backward()
            return {"router_loss": loss.item()}

        return run

    return [step(pairs) for pairs in pair_batches]


def joint_batches(safe, unsafe, size, ratio):
    """Batches of round(size · ratio) safe and the rest unsafe examples, both in order; a half rounds up."""
    n = math.floor(size * ratio + 0.5)
    return list(zip(chunks(safe, n), chunks(unsafe, size - n), strict=True))


def joint_steps(net, batches, kind, weight, layers):
    """Cross-entropy of all examples plus the weighted divergence between the safe and the unsafe part of the batch, from one
    forward pass."""

    def step(halves):
        def run():
            total, count, stats = 0, 0, []
            for half in halves:
                by_layer = {layer: [] for layer in net.blocks}
                for example in half:
                    losses = token_losses(net, example)
                    total, count = total + losses.sum(), count + len(losses)
                    for layer, (logits, _) in net.routing.items():
                        by_layer[layer].append(logits.double())
                stats.append({layer: distribution(samples, "token-probs") for layer, samples in by_layer.items()})
            ce, kl = total / count, router_loss(*stats, kind, layers)
            (ce + weight * kl).backward()
            return {"ce_loss": ce.item(), "router_loss": kl.item(), "total_loss": (ce + weight * kl).item()}

        return run

    return [step(halves) for halves in batches]
