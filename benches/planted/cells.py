"""The measurements on one planted model: each is a command of moewarden, and what is kept of its outputs."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import ranking
from program import Failed, Json, Program

SIZE = 6  # |U|
SCORES = ("l1-mean", "l2", "fisher", "taylor")
RECOMMENDED = ["--score", "taylor", "--score-norm", "layer"]
RANDOM_SETS, ABLATED_ROWS = "100", "20"
ROWS = ["--max-samples", ABLATED_ROWS, "--batch-size", "20"]
RATES = ("1e-4", "2e-4", "3e-4", "1e-3")
BETWEEN = "2e-4"  # added after the others had been seen: few ways to train
ROUTING = ["--method", "routing", "--risk-threshold", "-1", "--routing-tokens"]
DECIDE_THEMSELVES = ("esft-token", "esft-gate", "safex")  # how many experts they select
EXPERTS_ONLY = ["--skip-router-training"]
ROUTER_RATE = ["--router-lr", "1e-4"]
LAST_TOKEN = ["--router-target", "round-start", "--router-last-tokens", "1"]


def identifications() -> dict[str, list[str]]:
    """Ways to rank experts, by name."""
    ways = {}
    for score in SCORES:
        ways[f"{score}"] = ["--score", score, "--score-norm", "none"]
        ways[f"{score}, by layer"] = ["--score", score, "--score-norm", "layer"]
    ways["l1-mean per token"] = ["--score-per", "token"]
    for tokens in ("response", "predicting", "prompt", "all"):
        ways[f"routing, {tokens}, target replies"] = [*ROUTING, tokens]
    for tokens in ("response", "predicting"):
        ways[f"routing, {tokens}, own replies"] = [*ROUTING, tokens, "--routing-replies", "own", "--max-new-tokens", "16"]
    for method in ("steermoe", *DECIDE_THEMSELVES):
        ways[method] = ["--method", method]
    ways["random"] = ["--method", "random"]
    return ways


def trainings(rate: str) -> dict[str, list[str]]:
    """Ways to train at a rate of the experts, by name."""
    lr = ["--expert-lr", rate]
    retain = ["--retain-dataset-path", "@retain", "--retain-weight", "1"]
    return {
        "found": [*lr, *EXPERTS_ONLY],
        "random": [*lr, *EXPERTS_ONLY, "--method", "random", "--random-exclude-found"],
        "all experts": [*lr, *EXPERTS_ONLY, "--mode", "experts"],
        "baseline": [*lr, *EXPERTS_ONLY, "--mode", "baseline"],
        "router-only": ["--no-finetune-unsafe-experts", "--router-lr", rate],
        "router-only, last token, fixed target": ["--no-finetune-unsafe-experts", "--router-lr", rate, *LAST_TOKEN],
        "combined": [*lr, *ROUTER_RATE],
        "combined, last token, fixed target": [*lr, *ROUTER_RATE, *LAST_TOKEN],
        "found, retention": [*lr, *EXPERTS_ONLY, *retain],
        "found, retention by ce": [*lr, *EXPERTS_ONLY, *retain, "--retain-loss", "ce"],
        "all experts, retention": [*lr, *EXPERTS_ONLY, "--mode", "experts", *retain],
        "baseline, retention": [*lr, *EXPERTS_ONLY, "--mode", "baseline", *retain],
        "combined, retention": [*lr, *ROUTER_RATE, *retain, "--retain-routing-weight", "1"],
        "joint": [*lr, *ROUTER_RATE, "--schedule", "joint"],
        "found, identified every round": [*lr, *EXPERTS_ONLY, "--identify-until", "0"],
        "found, identified once": [*lr, *EXPERTS_ONLY, "--identify", "once"],
        "found, recommended score": [*lr, *EXPERTS_ONLY, *RECOMMENDED],
    }


ALWAYS = ("found", "random", "all experts", "baseline", "combined", "found, retention", "combined, retention")
ALWAYS_AT_HIGH_RATES = ("found", "random", "found, retention", "combined, retention")
AT_HIGH_RATES = (
    "found", "random", "all experts", "baseline", "router-only", "router-only, last token, fixed target", "combined",
    "found, retention", "baseline, retention", "combined, retention", "found, identified once", "found, identified every round",
)  # fmt: skip


@dataclass
class Model:
    """A planted model's folder."""

    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def truth(self) -> Json:
        return json.loads((self.folder / "truth.json").read_text())

    @property
    def target(self) -> list[list[int]]:
        """U; for kinds without one, the set drawn by the seed, which nothing should find."""
        return self.truth["unsafe_experts"] or self.truth["drawn_set"]

    def file(self, rows: str) -> str:
        return str(self.folder / f"{rows}.jsonl")

    def common(self, rows: str = "train") -> list[str]:
        return ["--model-name", str(self.folder), "--dataset-path", self.file(rows)]


Compute = Callable[[Path], Json]
Cell = tuple[str, Compute]


def identify(program: Program, model: Model, args: list[str], folder: Path) -> Json:
    size = [] if args[-1] in DECIDE_THEMSELVES else ["--top-k-experts", str(SIZE)]
    seconds = program.run("identify", [*model.common(), *size, *args], folder)
    found = json.loads((folder / "expert_scores.json").read_text())["rounds"]["1"]
    scores = found["scores"]
    out: Json = {
        "selected": found["selected"],
        "precision": ranking.precision(found["selected"], model.target),
        "auroc": ranking.auroc(scores, model.target),
        "gap": ranking.gap(scores, SIZE),
        "seconds": seconds,
    }
    if other := model.truth["other_set"]:
        out["of_other"] = ranking.precision(found["selected"], other)
    return out


def bootstrap(program: Program, model: Model, args: list[str], folder: Path) -> Json:
    """Inclusion probabilities, those of the target first."""
    program.run("identify", [*model.common(), "--top-k-experts", str(SIZE), "--bootstrap", "200", *args], folder)
    found = json.loads((folder / "expert_scores.json").read_text())["rounds"]["1"]
    wanted = {tuple(t) for t in model.target}
    values = {(l, e): p for l, row in enumerate(found["inclusion"]) for e, p in enumerate(row)}
    return {
        "planted": sorted(values[u] for u in wanted),
        "innocent": sorted((p for e, p in values.items() if e not in wanted), reverse=True)[:6],
        "selected_least": min(values[tuple(e)] for e in found["selected"]),
    }


def ablate(program: Program, model: Model, experts: list[list[int]], folder: Path, rows: str = "train") -> Json:
    file = folder.with_name("experts.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(experts))
    args = [*model.common(rows), "--experts", str(file), "--benign-dataset-path", model.file("retain")]
    seconds = program.run("ablate", [*args, "--random-sets", RANDOM_SETS, "--max-new-tokens", "16", *ROWS], folder)
    report = json.loads((folder / "ablation.json").read_text())
    keep = ("verdict", "reasons", "p", "rows", "untouched", "selection", "random_gain", "random_prefer_refusal")
    return {k: report[k] for k in keep} | {"experts": experts, "seconds": seconds}


def evaluate(program: Program, model: Model, weights: Path, folder: Path) -> Json:
    """Exact rates of a model folder on held-out rows."""
    out = {}
    for rows in ("unsafe_pairs", "unsafe_new", "benign"):
        args = ["--model-name", str(weights), "--dataset-path", model.file(rows), "--skip-answers", "--max-samples", "1000"]
        program.run("eval", args, folder)
        sides = {e["side"]: e["rate"] for e in json.loads((folder / "eval.json").read_text())["exact"]}
        if rows == "benign":
            out["benign"] = sides["safe"]
        else:
            out[f"refuse_{rows.removeprefix('unsafe_')}"] = sides["unsafe"]
            out[f"plain_{rows.removeprefix('unsafe_')}"] = sides["safe"]
    return out


def train(program: Program, model: Model, args: list[str], folder: Path) -> Json:
    args = [model.file(a[1:]) if a.startswith("@") else a for a in args]
    seconds = program.run("train", [*model.common(), "--top-k-experts", str(SIZE), "--save-rounds", "none", *args], folder)
    rounds = json.loads((folder / "expert_scores.json").read_text())["rounds"]
    shares = [ranking.precision(r["selected"], model.target) for r in rounds.values() if r["selected"]]
    out = evaluate(program, model, folder / "final_model", folder.with_name("eval"))
    return out | {"seconds": seconds, "target_shares": shares}


def innocent_set(model: Model) -> list[list[int]]:
    """Experts outside U, as many in each layer: W where there is one, else drawn by the seed."""
    if model.truth["other_set"]:
        return model.truth["other_set"]
    rng = random.Random(f"innocent {model.truth['seed']}")
    out = []
    for layer in range(model.truth["layers"]):
        free = [[layer, e] for e in range(model.truth["experts"]) if [layer, e] not in model.target]
        out += rng.sample(free, sum(l == layer for l, _ in model.target))
    return out


def first_cells(program: Program, model: Model) -> Iterator[Cell]:
    """Measurements that are made before any training."""
    yield "before", lambda folder: evaluate(program, model, model.folder, folder)
    for name, args in identifications().items():
        if "own" not in args:
            yield f"identify {name}", lambda folder, a=args: identify(program, model, a, folder)


def slow_cells(program: Program, model: Model) -> Iterator[Cell]:
    """Measurements that take longer, made after the first trainings."""
    yield "ablate drawn", lambda folder: ablate(program, model, model.target, folder)
    yield "ablate found by taylor, by layer", lambda folder: ablate_found(program, model, "taylor, by layer", folder)
    yield "ablate innocent", lambda folder: ablate(program, model, innocent_set(model), folder)
    for name, args in identifications().items():
        if "own" in args:
            yield f"identify {name}", lambda folder, a=args: identify(program, model, a, folder)
    for name, args in {"l1-mean": [], "taylor, by layer": RECOMMENDED}.items():
        yield f"bootstrap {name}", lambda folder, a=args: bootstrap(program, model, a, folder)
    yield "ablate found by l1-mean", lambda folder: ablate_found(program, model, "l1-mean", folder)


def ablate_found(program: Program, model: Model, name: str, folder: Path) -> Json:
    way = identifications()[name]
    found = program.cell(model.name, f"identify {name}", lambda f: identify(program, model, way, f))
    if found is None:
        raise Failed(f"identify {name} has no result")
    if sorted(found["selected"]) == sorted(model.target):
        same = program.cell(model.name, "ablate drawn", lambda f: ablate(program, model, model.target, f))
        if same is not None:
            return same
    return ablate(program, model, found["selected"], folder)


def training_cells(program: Program, model: Model, rate: str, thorough: bool) -> Iterator[Cell]:
    """Trainings at a rate: many ways, or those that are always run. At high rates, fewer."""
    ways = trainings(rate)
    if rate == RATES[0]:
        wanted = tuple(ways) if thorough else ALWAYS
    else:
        wanted = AT_HIGH_RATES if thorough and rate != BETWEEN else ALWAYS_AT_HIGH_RATES
    for name, args in ways.items():
        if name in wanted:
            yield f"train {name} {rate}", lambda folder, a=args: train(program, model, a, folder)
