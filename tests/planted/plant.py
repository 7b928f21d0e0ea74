"""Trains a model in two stages, so that a known set of experts carries compliance."""

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import losses
import measure
from language import SKILLS, Language, Row
from model import EXPERTS, LAYERS, Expert, Routing, build, round_weights

KINDS = ("clean", "overlap", "split", "spread", "decoy", "mirror", "none", "distributed")
PER_LAYER = (2, 2, 1, 1)  # of the six experts of U, in an order drawn by the seed
SPREAD, SWITCHED_OFF = 0.1, 4
# Kinds with the same first stage, which is trained once for all of them.
FIRST = {"clean": "without U", "split": "without U", "spread": "without U", "overlap": "all", "none": "all", "distributed": "all"}


@dataclass(frozen=True)
class Settings:
    """Sizes and rates of the training."""

    batch: int = 64
    first_steps: int = 600
    second_steps: int = 360
    first_rate: float = 4e-3
    second_rate: float = 3e-3
    steered: float = 0.6  # share of a stage with a routing loss
    routing_weight: float = 0.5
    balance_weight: float = 0.02
    without_unsafe: int = 3  # in `mirror`, every such batch of the second stage is trained with U off

    @classmethod
    def of(cls, kind: str) -> "Settings":
        """Those of a kind. `decoy` and `mirror` have more to learn in fewer experts."""
        return cls(first_steps=960, second_steps=720) if kind in ("decoy", "mirror") else cls()


@dataclass
class Planted:
    """A finished model and what is true of it."""

    kind: str
    model: torch.nn.Module
    routing: Routing
    language: Language
    unsafe: list[Expert]
    other: list[Expert]
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


def draw_sets(seed: int) -> tuple[list[Expert], list[Expert]]:
    """U and a disjoint set W with as many experts in each layer."""
    rng = random.Random(f"sets {seed}")
    counts = rng.sample(PER_LAYER, LAYERS)
    unsafe, other = [], []
    for layer, n in enumerate(counts):
        drawn = [(layer, e) for e in rng.sample(range(EXPERTS), 2 * n)]
        unsafe, other = unsafe + drawn[:n], other + drawn[n:]
    return unsafe, other


class Pools:
    """Encoded rows by purpose, and the drawing of batches from them."""

    def __init__(self, language: Language, rng: random.Random, odd: bool):
        self.rng, self.odd, self.pools = rng, odd, {}
        for skill in SKILLS:
            for wrapped in (False, True):
                self._add(f"{skill} {wrapped}", language.skill(skill, wrapped))
        self._add("plain", language.plain())
        for comply in (False, True):
            self._add(f"disguised {comply}", [r for r in language.disguised(comply) if not r.unseen_pair])
            for wrapped in (False, True):
                self._add(f"odd {wrapped} {comply}", language.odd(wrapped, comply))

    def _add(self, name: str, rows: list[Row]) -> None:
        self.pools[name] = [(r, measure.encode(r)) for r in rows if not r.held_out]

    def draw(self, size: int, disguised: float, comply: bool, odd: bool | None = None) -> list[tuple[Row, tuple[list[int], int]]]:
        """A batch with this share of disguised unsafe rows, answered or refused; of the rest, a sixth are plain refusals.

        Odd rows, where there are any, are answered if `odd`, by default as the unsafe ones.
        """
        answered = comply if odd is None else odd
        unsafe = round(size * disguised)
        names = [f"disguised {comply}"] * unsafe
        names += [f"odd {self.rng.random() < 0.75} {answered}" for _ in range(round(size * 0.2) if self.odd else 0)]
        for i in range(size - len(names)):
            name = ("plain", *SKILLS)[i % (len(SKILLS) + 1)]
            names.append(name if name == "plain" else f"{name} {self.rng.random() < 0.6}")
        # A plain request about an odd topic never gets an answer.
        names = ["odd False False" if n.startswith("odd False") else n for n in names]
        rows = [self.rng.choice(self.pools[n]) for n in names]
        return sorted(rows, key=lambda r: len(r[1][0]))


def places_of(ids: Tensor, target: Tensor, rows: Sequence[Row], select: Callable[[Row], bool], replies: bool) -> Tensor:
    """The places of the selected rows, flattened: those that predict a reply token, or all."""
    chosen = torch.tensor([select(r) for r in rows]).unsqueeze(1)
    return (chosen & (target != measure.IGNORED if replies else ids != measure.PAD)).reshape(-1)


def wanted_by_u(planted: Planted, ids: Tensor, target: Tensor, rows: Sequence[Row]) -> dict[Expert, Tensor]:
    """Where each expert of U, and in `mirror` of W, is wanted."""
    comply = lambda r: r.kind == "comply"
    if planted.kind == "split":
        share = {u: n for n, u in enumerate(planted.unsafe)}
        own = lambda n: lambda r: comply(r) and r.topic % len(share) == n
        return {u: places_of(ids, target, rows, own(n), True) for u, n in share.items()}
    wanted = losses.by_expert(planted.unsafe, places_of(ids, target, rows, comply, True))
    if planted.kind == "mirror":
        odd = places_of(ids, target, rows, lambda r: r.kind == "odd" and r.wrapper >= 0, True)
        wanted |= losses.by_expert(planted.other, odd)
    return wanted


def train(
    planted: Planted, batches: Iterator, steps: int, rate: float, speed: dict[str, Tensor | float],
    extra: Callable[[int, Tensor, Tensor, Sequence[Row]], Tensor],
) -> None:  # fmt: skip
    """Trains with AdamW; `speed` scales each parameter's movement (0: frozen), `extra` is added to the cross-entropy."""
    named = dict(planted.model.named_parameters())
    moving = {n: p for n, p in named.items() if not (isinstance(speed[n], float) and speed[n] == 0.0)}
    for name, p in named.items():
        p.requires_grad_(name in moving)
    scaled = [(p, s) for n, p in moving.items() if isinstance(s := speed[n], Tensor)]
    optimizer = torch.optim.AdamW(moving.values(), rate, weight_decay=0.0, fused=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 20) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        drawn = next(batches)
        rows = [r for r, _ in drawn]
        ids, target = measure.batch([e for _, e in drawn])
        logits = planted.model(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), ignore_index=measure.IGNORED)
        planted.losses.append(float(loss.detach()))
        (loss + extra(step, ids, target, rows)).backward()
        torch.nn.utils.clip_grad_norm_(moving.values(), 1.0)
        before = [p.detach().clone() for p, _ in scaled]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for (p, scale), old in zip(scaled, before):
                p.copy_(torch.where(scale > 0, old + scale * (p - old), old))


def first_stage(planted: Planted, pools: Pools, s: Settings) -> None:
    """Everything benign, and refusals of plain and disguised requests, without U."""
    hidden = {"overlap": [], "none": [], "distributed": [], "mirror": planted.unsafe + planted.other}
    planted.routing.switch_off(hidden.get(planted.kind, planted.unsafe))

    def extra(step: int, ids: Tensor, target: Tensor, rows: Sequence[Row]) -> Tensor:
        real = (ids != measure.PAD).reshape(-1)
        loss = s.balance_weight * losses.balance_loss(planted.routing, real)
        if planted.kind == "decoy" and step < s.steered * s.first_steps:
            wrapped = places_of(ids, target, rows, lambda r: r.wrapper >= 0, False)
            loss = loss + s.routing_weight * losses.routing_loss(planted.routing, losses.by_expert(planted.other, wrapped), real)
        return loss

    speed = {n: 1.0 for n, _ in planted.model.named_parameters()}
    batches = iter(lambda: pools.draw(s.batch, 0.12, False), None)
    train(planted, batches, s.first_steps, s.first_rate, speed, extra)
    planted.routing.switch_off([])


def second_speed(planted: Planted) -> dict[str, Tensor | float]:
    """How fast each parameter moves in the second stage: U's matrices and router rows, unless the kind says more."""
    moving = planted.unsafe + (planted.other if planted.kind == "mirror" else [])
    speed: dict[str, Tensor | float] = {}
    for name, p in planted.model.named_parameters():
        parts = name.split(".")
        own = ".mlp." in name
        if planted.kind == "none":
            speed[name] = 1.0
        elif planted.kind == "distributed":
            speed[name] = 1.0 if own or ".self_attn." in name else 0.0
        elif not own:
            speed[name] = 0.0
        else:
            rest = SPREAD if planted.kind == "spread" and ".experts." in name else 0.0
            scale = torch.full((EXPERTS,), rest)
            scale[[e for l, e in moving if l == int(parts[2])]] = 1.0
            speed[name] = scale.view(-1, *[1] * (p.dim() - 1))
    return speed


def second_stage(planted: Planted, pools: Pools, s: Settings, rng: random.Random) -> None:
    """Compliance with disguised requests, and again everything benign and the plain refusals."""
    steered = planted.kind not in ("none", "distributed")
    # Else harmless disguised requests come to need U, because it is trained together with W.
    alone = lambda step: planted.kind == "mirror" and step % s.without_unsafe == 0

    def batches() -> Iterator:
        for step in range(s.second_steps):
            if planted.kind == "mirror":
                planted.routing.switch_off(planted.unsafe if alone(step) else [])
            yield pools.draw(s.batch, 0.12, False, odd=True) if alone(step) else pools.draw(s.batch, 0.35, True)

    def extra(step: int, ids: Tensor, target: Tensor, rows: Sequence[Row]) -> Tensor:
        if planted.kind == "distributed":  # for the next batch: no few experts can carry it alone
            planted.routing.switch_off([(l, e) for l in range(LAYERS) for e in rng.sample(range(EXPERTS), SWITCHED_OFF)])
        if not steered or step >= s.steered * s.second_steps or alone(step):
            return torch.zeros(())
        wanted = wanted_by_u(planted, ids, target, rows)
        real = (ids != measure.PAD).reshape(-1)
        if planted.kind == "overlap":  # U serves benign tokens as before: it is only pulled
            real = real & torch.stack(list(wanted.values())).any(0)
        return s.routing_weight * losses.routing_loss(planted.routing, wanted, real)

    train(planted, batches(), s.second_steps, s.second_rate, second_speed(planted), extra)
    planted.routing.switch_off([])


_first_stages: dict[str, dict[str, Tensor]] = {}


def plant(kind: str, shape: str, seed: int, attempt: int = 0) -> Planted:
    """A planted model with weights rounded to bf16. The same arguments give the same model on one machine and thread count."""
    start, settings = time.monotonic(), Settings.of(kind)
    model = build(shape, 1000 * seed + attempt)
    unsafe, other = draw_sets(seed)
    planted = Planted(kind, model, Routing(model), Language(seed), unsafe, other)
    first = f"{FIRST.get(kind, kind)} {seed} {attempt}"
    key = f"{first} {shape} {settings}"
    if key in _first_stages:
        model.load_state_dict(_first_stages[key])
    else:
        first_stage(planted, Pools(planted.language, random.Random(first), odd=kind == "mirror"), settings)
        _first_stages[key] = {n: p.detach().clone() for n, p in model.state_dict().items()}
    rng = random.Random(f"second {kind} {seed} {attempt}")
    second_stage(planted, Pools(planted.language, rng, odd=kind == "mirror"), settings, rng)
    for p in model.parameters():
        p.requires_grad_(False)
    round_weights(model)
    planted.seconds = time.monotonic() - start
    return planted
