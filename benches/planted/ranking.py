"""How well a ranking of experts finds a known set."""

from collections.abc import Sequence

Expert = tuple[int, int]


def precision(selected: Sequence[Expert], truth: Sequence[Expert]) -> float:
    """Share of the first |truth| selected experts that are in the truth."""
    first = [tuple(e) for e in selected[: len(truth)]]
    return len(set(first) & {tuple(t) for t in truth}) / len(truth)


def auroc(scores: Sequence[Sequence[float]], truth: Sequence[Expert]) -> float | None:
    """Probability that an expert of the truth scores higher than another one; ties count one half."""
    if not scores:
        return None
    wanted = {tuple(t) for t in truth}
    inside, outside = [], []
    for layer, row in enumerate(scores):
        for expert, score in enumerate(row):
            (inside if (layer, expert) in wanted else outside).append(score)
    better = sum((a > b) + 0.5 * (a == b) for a in inside for b in outside)
    return better / (len(inside) * len(outside))


def gap(scores: Sequence[Sequence[float]], size: int) -> tuple[float, float] | None:
    """Share of the total score in the first `size` experts, and the ratio of the last of them to the next."""
    values = sorted((max(v, 0.0) for row in scores for v in row), reverse=True)
    if not values or sum(values) <= 0 or values[size] <= 0:
        return None
    return sum(values[:size]) / sum(values), values[size - 1] / values[size]
