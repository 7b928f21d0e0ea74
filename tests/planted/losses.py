"""Losses on router logits, with which planting decides who computes what."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import softplus

from model import EXPERTS, LAYERS, TOP_K, Expert, Routing

MARGIN = 1.0


def steer(logits: Tensor, off: Tensor, layer: int, wanted: dict[Expert, Tensor], places: Tensor) -> Tensor:
    """Moves each expert of `wanted` in this layer into the top K at its places (a mask), and out of the top K at all others.

    The rival is the lowest of the other experts' logits that makes room for the experts wanted at that place. It gets no
    gradient. Without experts in this layer: 0.
    """
    mine = {e: mask for (l, e), mask in wanted.items() if l == layer}
    if not mine:
        return logits.new_zeros(())
    others = (logits + off).detach().clone()
    others[:, list(mine)] = -torch.inf
    ranked = others.topk(TOP_K, dim=-1).values
    number = torch.stack(list(mine.values())).sum(0).clamp(max=TOP_K)  # of experts wanted at a place
    inside = ranked.gather(1, (TOP_K - number.clamp(min=1)).unsqueeze(1)).squeeze(1)
    outside = ranked.gather(1, (TOP_K - 1 - number).clamp(min=0).unsqueeze(1)).squeeze(1)
    total = logits.new_zeros(())
    for expert, mask in mine.items():
        pull = softplus(inside - logits[:, expert] + MARGIN)
        push = softplus(logits[:, expert] - outside + MARGIN)
        for term, where in ((pull, mask & places), (push, ~mask & places)):
            total = total + (term * where).sum() / where.sum().clamp(min=1)
    return total


def balance(logits: Tensor, off: Tensor, places: Tensor) -> Tensor:
    """Experts times the dot product of their shares of tokens and mean probabilities: smallest when all are used alike."""
    probs = torch.softmax(logits + off, -1)[places]
    chosen = torch.zeros_like(probs).scatter_(1, probs.topk(TOP_K, -1).indices, 1.0 / TOP_K)
    return EXPERTS * (chosen.mean(0) * probs.mean(0)).sum()


def routing_loss(routing: Routing, wanted: dict[Expert, Tensor], places: Tensor) -> Tensor:
    """The sum over layers of `steer`."""
    return sum((steer(routing.logits[l], routing.off[l], l, wanted, places) for l in range(LAYERS)), torch.zeros(()))


def balance_loss(routing: Routing, places: Tensor) -> Tensor:
    """The mean over layers of `balance`."""
    return sum((balance(routing.logits[l], routing.off[l], places) for l in range(LAYERS)), torch.zeros(())) / LAYERS


def by_expert(experts: Sequence[Expert], mask: Tensor) -> dict[Expert, Tensor]:
    """The same places for all experts."""
    return {u: mask for u in experts}
