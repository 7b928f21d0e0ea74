"""Exact replies of a model in PyTorch: the check of what moewarden measures itself."""

import random
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from language import Row, vocabulary
from model import TOP_K, Expert, Routing

PAD, END, USER, ASSISTANT = range(4)
IGNORED = -100
IDS = {word: i for i, word in enumerate(vocabulary())}


def encode(row: Row) -> tuple[list[int], int]:
    """Token ids of a row, and the place of its first reply token."""
    prompt = [USER, *(IDS[w] for w in row.prompt.split()), ASSISTANT]
    return prompt + [IDS[w] for w in row.reply.split()] + [END], len(prompt)


def batch(encoded: Sequence[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    """Padded token ids, and for each place the token to predict there, or IGNORED outside of replies."""
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(encoded), width), PAD)
    target = torch.full((len(encoded), width), IGNORED)
    for i, (tokens, start) in enumerate(encoded):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        target[i, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
    return ids, target


@torch.no_grad()
def exact(model: torch.nn.Module, rows: Sequence[Row], size: int = 256) -> float:
    """Share of rows whose greedy reply is the target to the last token; by teacher forcing, which finds the same rows."""
    right = 0
    for start in range(0, len(rows), size):
        ids, target = batch([encode(r) for r in rows[start : start + size]])
        found = model(input_ids=ids).logits.argmax(-1)
        right += int(((found == target) | (target == IGNORED)).all(-1).sum())
    return right / max(len(rows), 1)


def rates(model: torch.nn.Module, routing: Routing, sets: dict[str, list[Row]], off: Iterable[Expert] = ()) -> dict[str, float]:
    """Exact rates by set of rows, with these experts switched off."""
    routing.switch_off(list(off))
    out = {name: round(exact(model, rows), 4) for name, rows in sets.items()}
    routing.switch_off([])
    return out


@torch.no_grad()
def load(model: torch.nn.Module, routing: Routing, rows: Sequence[Row], experts: Sequence[Expert]) -> float:
    """Share of the rows' tokens that go to an expert, mean over these experts. All alike: K / E."""
    ids, _ = batch([encode(r) for r in rows])
    model(input_ids=ids)
    real = (ids != PAD).reshape(-1)
    shares = [(routing.logits[l][real].topk(TOP_K, -1).indices == e).any(-1).float().mean() for l, e in experts]
    return round(float(torch.stack(shares).mean()), 4)


def random_sets(count: int, like: Sequence[Expert], apart: Sequence[Expert], experts: int, seed: int) -> list[list[Expert]]:
    """Sets with as many experts in each layer as `like`, none of `apart` among them."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        drawn = []
        for layer in sorted({l for l, _ in like}):
            free = [(layer, e) for e in range(experts) if (layer, e) not in set(apart)]
            drawn += rng.sample(free, sum(l == layer for l, _ in like))
        out.append(drawn)
    return out
