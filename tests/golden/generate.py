#!/usr/bin/env python3
"""Writes the fixtures of this folder: `python generate.py [CASE ...]`. README.md describes their content.
`python generate.py --noise [CASE ...]` writes nothing: it computes the cases again in f32 and prints the differences.

Needs torch and transformers (5.17); the tests that read the fixtures need neither.
"""

import json
import math
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM, OlmoeConfig, OlmoeForCausalLM
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

import method
import texts
from cases import CASES, config_of

HERE = Path(__file__).parent
TOKENIZERS = HERE / "tokenizers"
CLASSES = {
    "olmoe": (OlmoeConfig, OlmoeForCausalLM),
    "mixtral": (MixtralConfig, MixtralForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
    "qwen2_moe": (Qwen2MoeConfig, Qwen2MoeForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
BATCH, JOINT_BATCH, TOP_K = 3, 4, 5
EXPERT_LR, ROUTER_LR, CONSISTENCY_WEIGHT = 2e-3, 1e-3, 0.1
# Minimum gap between the K-th and the next logit of a router (in standard deviations of the logits), and minimum relative gap
# between scores at the selection. With a smaller gap, another order of summation could choose other experts, so another seed
# is taken. The same for the gap between the two highest logits in greedy decoding, in standard deviations of the logits.
GREEDY_MARGIN, GREEDY_PROMPTS, GREEDY_TOKENS = 1e-5, 50, 12
ROUTING_MARGIN, SELECTION_MARGIN = 1e-5, 1e-3


# --- the checkpoint -----------------------------------------------------------------------------------------------


def write_model(folder, c, seed):
    """Writes a random model of the case, with tokenizer and configuration, to `folder`; returns the tokenizer."""
    torch.manual_seed(seed)
    config_class, model_class = CLASSES[c["family"]]
    files = c["files"]
    tok = texts.tokenizer(c["family"], c["shape"]["vocab"])
    config = config_class(**config_of(c), bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id)
    model = model_class(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # norms and biases that differ from 1 and 0; routers with well separated logits
            p.normal_(0.0, 0.3 if "mlp.gate.weight" in name else config.initializer_range)
            if name.endswith("norm.weight") or "layernorm" in name:
                p.add_(1.0)
    dtype = getattr(torch, files.get("dtype", "float32"))
    model.to(dtype).save_pretrained(
        folder, max_shard_size=files.get("shard", "5GB"), save_original_format=not files.get("fused", False)
    )
    # cover both places of a chat template: chat_template.jinja and tokenizer_config.json
    tok.save_pretrained(folder, save_jinja_files=c["family"] in ("olmoe", "qwen3_moe", "qwen3", "llama"))
    if files.get("old_rope"):
        path = folder / "config.json"
        stored = json.loads(path.read_text())
        rope = stored.pop("rope_parameters")
        stored["rope_theta"] = rope.pop("rope_theta")
        rope["type"] = rope.pop("rope_type")
        stored["rope_scaling"] = rope
        path.write_text(json.dumps(stored, indent=2, sort_keys=True) + "\n")
    return tok


def share_tokenizer(folder, c):
    """Replaces a model's tokenizer.json by a link to the one in tokenizers/, which is written if it is missing."""
    own, shared = folder / "tokenizer.json", TOKENIZERS / texts.tokenizer_name(c["family"], c["shape"]["vocab"])
    TOKENIZERS.mkdir(exist_ok=True)
    if not shared.exists():
        shared.write_bytes(own.read_bytes())
    elif shared.read_bytes() != own.read_bytes():
        sys.exit(f"{own} differs from {shared}: delete {TOKENIZERS} and generate all cases")
    own.unlink()
    own.symlink_to(Path("../..") / TOKENIZERS.name / shared.name)


def disk_name(name, c):
    """The name in the checkpoint of a tensor outside of the routed experts."""
    if c["family"] == "mixtral" and not c["files"].get("fused"):
        return name.replace(".mlp.gate.", ".block_sparse_moe.gate.")
    return name


def check_names(folder, net, c):
    """Checks that each tensor with the same name in fixtures and checkpoint exists there, with the value in memory."""
    stored = {}
    for file in sorted(folder.glob("*.safetensors")):
        stored |= load_file(file)
    for name, leaf in net.leaves().items():
        if not leaf.index:
            assert torch.equal(stored[disk_name(name, c)].float(), leaf.value().float()), name


# --- the data -----------------------------------------------------------------------------------------------------


def render(tok, messages, prompt=False):
    plain = [{k: m[k] for k in ("role", "content")} for m in messages]
    return tok.apply_chat_template(plain, tokenize=False, add_generation_prompt=prompt)


def example(tok, messages):
    """Token ids and loss mask: an assistant turn carries loss after the rendered prefix, which ends with a generation prompt."""
    text = render(tok, messages)
    spans = []
    for i, m in enumerate(messages):
        if m["role"] == "assistant" and m.get("loss", True):
            before = render(tok, messages[:i], prompt=True)
            whole = render(tok, messages[: i + 1])
            assert whole.startswith(before) and text.startswith(whole)
            spans.append((len(before), len(whole)))
    encoded = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    loss = []
    for start, end in encoded["offset_mapping"]:
        inside = [a <= start < b for a, b in spans]
        assert all(a <= start or end <= a for a, b in spans), "a token straddles the edge of a reply"
        loss.append(any(inside))
    return {"ids": encoded["input_ids"], "loss": loss}


def records(tok, rows):
    out = []
    for row in rows:
        record = {"row": row["row"]}
        for side in ("unsafe", "safe"):
            if side not in row:
                continue
            # the messages of a chat row include the reply
            whole = row[side] if row["reply"] is None else row[side] + [texts.assistant(row["reply"])]
            record[side + "_reply"] = example(tok, whole)
            text = render(tok, whole[:-1], prompt=True)
            record[side + "_prompt"] = tok(text, add_special_tokens=False)["input_ids"]
        out.append(record)
    return out


# --- results of the method ----------------------------------------------------------------------------------------


def digest(x):
    """Three sums that identify a tensor: Σ|x|, sqrt(Σx²), Σ x_i cos(i) over the flat index i."""
    x = x.detach().double().flatten()
    ramp = torch.arange(len(x), dtype=torch.float64).cos()
    return [x.abs().sum().item(), x.square().sum().sqrt().item(), (x * ramp).sum().item()]


class Case:
    def __init__(self, name, folder, seed, compute=torch.float64):
        self.c, self.folder, self.compute = CASES[name], folder, compute
        self.full = self.c["files"].get("full", False)
        self.margin = math.inf
        self.tok = write_model(folder / "model", self.c, seed)
        stored, rows = texts.rows(self.c["rows"], self.c["shape"]["rows"])
        (folder / "data.json").write_text(json.dumps(stored, indent=1) + "\n")
        self.stored = stored
        self.records = records(self.tok, rows)
        self.unsafe = [r["unsafe_reply"] for r in self.records if "unsafe_reply" in r]
        self.safe = [r["safe_reply"] for r in self.records if "safe_reply" in r]
        self.pairs = [(r["safe_prompt"], r["unsafe_prompt"]) for r in self.records if len(r) == 5]
        self.batches = method.chunks(self.unsafe, BATCH)

    def net(self):
        dtype = getattr(torch, self.c["files"].get("dtype", "float32"))
        net = method.Net(self.folder / "model", dtype, self.compute)
        self.nets.append(net)
        return net

    def expectations(self):
        self.nets = []
        net = self.net()
        check_names(self.folder / "model", net, self.c)
        if not net.blocks:
            return self.dense_expectations(net)
        layers = list(net.blocks)
        losses, scores = method.identify(net, self.batches)
        chosen, margin = method.select(scores["l1-mean"]["param"], layers, TOP_K)
        capped, capped_margin = method.select(scores["l1-mean"]["param"], layers, TOP_K, cap=2)
        lowest, lowest_margin = method.select(scores["l1-mean"]["param"], layers, TOP_K, lowest=True)
        self.chosen, self.layers = chosen, layers
        self.selection_margin = min(margin, capped_margin, lowest_margin)
        out = {
            "schema": "moewarden.golden/1",
            "about": self.c["about"],
            "model_type": self.c["family"],
            "options": {
                "batch_size": BATCH, "joint_batch_size": JOINT_BATCH, "top_k_experts": TOP_K, "expert_lr": EXPERT_LR,
                "router_lr": ROUTER_LR, "router_consistency_weight": CONSISTENCY_WEIGHT, "safe_ratio": 0.5,
                "weight_decay": 0.01,
            },
            "layers": layers,
            "num_experts": net.num_experts,
            "rows_read": len(self.stored),
            "records": [compact(r) for r in self.records],
            "losses": losses,
            "losses_on_all_tokens": self.losses_on_all(net),
            "forward": self.forward(net),
            "scores": scores,
            "selection": {"highest": chosen, "at_most_2_per_layer": capped, "lowest": lowest},
            "routing": self.routing(net),
            "router_kl": self.router_kl(net),
            "gradients": self.gradients(net),
            "training": self.training(),
        }
        self.margin = min(n.margin for n in self.nets)
        return out

    def dense_expectations(self, net):
        """Of a model without experts: what does not concern routing, and greedy answers."""
        losses = []
        with torch.no_grad():
            for batch in self.batches:
                total, count = method.ce_sum(net, batch)
                losses.append((total / count).item())
        self.chosen, self.selection_margin = [], math.inf
        greedy, margin = self.greedy(net)
        out = {
            "schema": "moewarden.golden/1",
            "about": self.c["about"],
            "model_type": self.c["family"],
            "options": {"batch_size": BATCH, "joint_batch_size": JOINT_BATCH, "top_k_experts": TOP_K, "expert_lr": EXPERT_LR,
                        "router_lr": ROUTER_LR, "router_consistency_weight": CONSISTENCY_WEIGHT, "safe_ratio": 0.5, "weight_decay": 0.01},
            "layers": [],
            "num_experts": 0,
            "rows_read": len(self.stored),
            "records": [compact(r) for r in self.records],
            "losses": losses,
            "losses_on_all_tokens": self.losses_on_all(net),
            "forward": self.forward(net),
            "gradients": self.gradients(net),
            "selection": {"highest": []},
            "training": [self.baseline()],
            "greedy": greedy,
        }
        self.margin = math.inf if margin > GREEDY_MARGIN else 0.0
        return out

    def greedy(self, net):
        """Prompts of random tokens, and what `generate` of transformers continues them with; and the smallest gap between the two
        highest logits on the way."""
        draw = random.Random(17)
        end = self.tok.eos_token_id
        out, margin = [], math.inf
        for _ in range(GREEDY_PROMPTS):
            prompt = [draw.randrange(5, self.c["shape"]["vocab"]) for _ in range(draw.randrange(2, 25))]
            with torch.no_grad():
                ids = net.model.generate(
                    torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
                    max_new_tokens=GREEDY_TOKENS, eos_token_id=end, pad_token_id=end,
                )[0].tolist()
                logits = net(ids).double()[len(prompt) - 1 : -1]
            top = logits.topk(2).values
            margin = min(margin, ((top[:, 0] - top[:, 1]) / logits.std(-1)).min().item())
            out.append({"prompt": prompt, "answer": [i for i in ids[len(prompt):] if i != end]})
        return out, margin

    def losses_on_all(self, net):
        """Losses with every token a target except the first of a row, which no token precedes."""
        out = []
        with torch.no_grad():
            for batch in self.batches:
                total, count = method.ce_sum(net, [e | {"loss": [True] * len(e["ids"])} for e in batch])
                out.append((total / count).item())
        return out

    def forward(self, net):
        """Results of one forward pass over the first unsafe reply."""
        first = self.unsafe[0]
        with torch.no_grad():
            logits = net(first["ids"])
            experts = {l: ids.sort(-1).values.tolist() for l, (_, ids) in net.routing.items()}
            return {
                "token_losses": method.token_losses(net, first).tolist(),
                "logits": digest(logits),
                "last_logits": logits[-1, :8].tolist(),
                "experts_of_last_token": [ids[-1] for ids in experts.values()],
                "router_logits": [digest(logits) for logits, _ in net.routing.values()],
            }

    def routing(self, net):
        if not self.pairs:
            return None
        out = {}
        for tokens in ("response", "prompt", "all"):
            sides = [
                [method.frequencies(net, batch, tokens) for batch in method.chunks(side, BATCH)]
                for side in (self.unsafe, self.safe)
            ]
            risk = sum(u - s for u, s in zip(*sides)) / len(sides[0])
            out[tokens] = {
                "unsafe": [f.tolist() for f in sides[0]],
                "safe": [f.tolist() for f in sides[1]],
                "risk_difference": risk.tolist(),
            }
        return out

    def router_kl(self, net):
        """The router loss of each micro-batch of prompt pairs."""
        if not self.pairs:
            return None
        out = {}
        with torch.no_grad():
            for stat in method.STATISTICS:
                out[stat] = {kind: [] for kind in method.KL_TYPES}
                for batch in method.chunks(self.pairs, BATCH):
                    p = method.statistic(net, [safe for safe, _ in batch], stat)
                    q = method.statistic(net, [unsafe for _, unsafe in batch], stat)
                    for kind in method.KL_TYPES:
                        out[stat][kind].append(method.router_loss(p, q, kind).item())
        return out

    def gradients(self, net):
        """Gradients of the mean cross-entropy of the first micro-batch with respect to all parameters."""
        net.model.zero_grad()
        total, count = method.ce_sum(net, self.batches[0])
        (total / count).backward()
        grads = {self.stored_name(n): leaf.grad().float().contiguous().clone() for n, leaf in net.leaves().items()}
        if self.c["files"].get("gradients"):
            save_file(grads, self.folder / "gradients.safetensors")
        return {n: digest(g) for n, g in grads.items()}

    def stored_name(self, name):
        return disk_name(name, self.c)

    # --- training

    def phase(self, name, groups, steps, options, keep=False):
        """Trains a fresh copy of the model; `groups` and `steps` are functions of it."""
        net = self.net()
        before = {n: leaf.value().clone() for n, leaf in net.leaves().items()}
        log = method.train(net, groups(net), steps(net), options)
        trained = [n for names, _ in groups(net) for n in names]
        leaves = net.leaves()
        for n, old in before.items():
            assert n in trained or torch.equal(old, leaves[n].value()), f"{n} is frozen but changed"
        with torch.no_grad():
            total, count = method.ce_sum(net, self.unsafe)
            after = (total / count).item()
        if keep:
            values = {self.stored_name(n): leaves[n].value().float().contiguous().clone() for n in trained}
            save_file(values, self.folder / f"{name}.safetensors")
        change = {self.stored_name(n): digest(leaves[n].value() - before[n]) for n in trained}
        return {"name": name, "options": options, "steps": log, "loss_after": after, "change": change}

    def baseline(self):
        """The run that trains every parameter."""
        def everything(net):
            return [(list(net.leaves()), EXPERT_LR)]

        return self.phase("baseline", everything, lambda net: method.expert_steps(net, self.batches, 1), {"phase": "expert", "mode": "baseline"})

    def training(self):
        def chosen(_):
            return [(method.expert_names(self.chosen), EXPERT_LR)]

        def routers(net):
            return [(net.router_names(), ROUTER_LR)]

        def all_experts(net):
            return [(method.expert_names([(l, e) for l in net.blocks for e in range(net.num_experts)]), EXPERT_LR)]

        def both(net):
            return [(method.expert_names(self.chosen), EXPERT_LR), (net.router_names(), ROUTER_LR)]

        def on_experts(accum=1, epochs=1):
            return lambda net: method.expert_steps(net, self.batches, accum) * epochs

        def on_routers(kind, stat):
            return lambda net: method.router_steps(net, method.chunks(self.pairs, BATCH), kind, stat)

        def jointly(kind, scope):
            def steps(net):
                layers = self.layers if scope == "all" else sorted({l for l, _ in self.chosen})
                batches = method.joint_batches(self.safe, self.unsafe, JOINT_BATCH, 0.5)
                return method.joint_steps(net, batches, kind, CONSISTENCY_WEIGHT, layers)

            return steps

        def expert(name, groups=chosen, keep=False, **options):
            steps = on_experts(options.get("grad_accum", 1), options.get("expert_epochs_per_round", 1))
            return self.phase(name, groups, steps, {"phase": "expert"} | options, keep)

        def router(name, kind, stat):
            options = {"phase": "router", "kl_type": kind, "router_statistic": stat}
            return self.phase(name, routers, on_routers(kind, stat), options)

        def joint(name, kind, scope, keep=False):
            options = {"phase": "joint", "router_consistency_type": kind, "router_consistency_layers": scope}
            return self.phase(name, both, jointly(kind, scope), options, keep)

        runs = [
            expert("experts", keep=self.full),
            joint("joint", "symmetric", "all", keep=self.full),
        ]
        if self.c["files"].get("baseline", True):
            runs.append(self.baseline())
        if self.pairs:
            runs.append(router("routers", "forward", "token-probs"))
        if self.full:
            runs += [
                expert("experts_accum", grad_accum=2),
                expert("experts_clip", max_grad_norm=0.05),
                expert("experts_linear", lr_schedule="linear", warmup_steps=2, expert_epochs_per_round=2),
                expert("experts_cosine", lr_schedule="cosine", warmup_steps=1, expert_epochs_per_round=2),
                expert("all_experts", all_experts, mode="experts"),
                router("routers_reverse", "reverse", "token-probs"),
                router("routers_sample", "symmetric", "sample-logits"),
                joint("joint_unsafe_only", "forward", "unsafe_only"),
            ]
        return runs


def compact(record):
    """A record with its loss masks as half-open ranges."""
    out = {}
    for key, value in record.items():
        if isinstance(value, dict):
            edges = [i for i in range(len(value["loss"]) + 1) if (value["loss"] + [False])[i] != ([False] + value["loss"])[i]]
            value = {"ids": value["ids"], "loss": [edges[i : i + 2] for i in range(0, len(edges), 2)]}
        out[key] = value
    return out


def rounded(x):
    if isinstance(x, float):
        assert math.isfinite(x)
        return float(f"{x:.9g}")
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, (list, tuple)) else x


def write_json(path, value):
    """Writes JSON with one line for each entry of the outer object, and for each record and training run."""
    def line(v):
        return json.dumps(v, separators=(",", ":"))

    lines = []
    for key, v in rounded(value).items():
        if key in ("records", "training", "greedy"):
            lines.append(f'"{key}":[\n' + ",\n".join(line(x) for x in v) + "\n]")
        else:
            lines.append(f'"{key}":{line(v)}')
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(a, b, path=()):
    """(path, |a − b|, scale) of each number in two structures of the same form; the scale is the largest number of its list."""
    if isinstance(a, dict):
        for k in a:
            yield from differences(a[k], b[k], path + (k,))
    elif isinstance(a, list):
        numbers = [abs(x) for x in a if isinstance(x, float)]
        for x, y in zip(a, b, strict=True):
            if isinstance(x, float):
                yield path, abs(x - y), max(numbers)
            else:
                yield from differences(x, y, path)
    elif isinstance(a, float):
        yield path, abs(a - b), abs(a)
    else:
        assert a == b, path


def noise(name):
    """Computes a case in f32 and prints the largest differences from the stored numbers, relative to the scale."""
    scratch = Path(tempfile.mkdtemp())
    stored = json.loads((HERE / name / "expect.json").read_text())
    case = Case(name, scratch, int(stored["seed"]), torch.float32)
    again = json.loads(json.dumps(rounded(case.expectations() | {"seed": stored["seed"]})))
    worst = {}
    for path, difference, scale in differences(stored, again):
        key = path[0] if path[0] != "training" else "training " + path[-2 if len(path) > 1 else -1]
        if difference > 0:
            worst[key] = max(worst.get(key, (0, None)), (difference / max(scale, 1e-12), path))
    for key, (value, path) in sorted(worst.items()):
        print(f"{name}: {key}: {value:.1e} at {'.'.join(map(str, path))}", flush=True)
    shutil.rmtree(scratch)


def generate(name):
    folder = HERE / name
    for seed in range(1000, 1040):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        case = Case(name, folder, seed)
        expect = case.expectations()
        if case.margin > ROUTING_MARGIN and case.selection_margin > SELECTION_MARGIN:
            write_json(folder / "expect.json", expect | {"seed": seed})
            share_tokenizer(folder / "model", case.c)
            size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
            print(f"{name}: seed {seed}, routing margin {case.margin:.1e}, {size / 1e3:.0f} kB", flush=True)
            return
    sys.exit(f"{name}: no seed gives a model with sufficient routing and selection margins")


if __name__ == "__main__":
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    arguments = sys.argv[1:]
    work = noise if arguments[:1] == ["--noise"] else generate
    for name in [a for a in arguments if a != "--noise"] or CASES:
        work(name)
