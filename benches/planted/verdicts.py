"""The conclusions of docs/truth.md: bars that were set before the measurement, and whether the numbers reach them."""

from typing import Any

import cells
from tables import Groups, mean, table, values

Json = dict[str, Any]
CONTROLS = ("none", "distributed")
RATE = cells.RATES[0]
LAST_TOKEN = "router-only, last token, fixed target"
RANKINGS = ("l1-mean", "l1-mean, by layer", "fisher", "taylor", "taylor, by layer", "l1-mean per token")
BARS = (("clean", 1.0), ("overlap", 1.0), ("spread", 1.0), ("split", 0.95))


def conclusions(data: Json, grouped: Groups) -> str:
    """A table of bars, and sentences with the numbers behind them."""
    rows = [*_identification(data, grouped), *_causal(data, grouped), *_training(data, grouped)]
    parts = [
        "The bars were set before the measurement.\n\n" + table(["bar", "measured", "reached"], rows),
        *(part(data, grouped) for part in (_setting, _scores, _misses, _rates, _only_them, _once, _routers)),
    ]  # fmt: skip
    return "\n\n".join(p for p in parts if p)


def _row(bar: str, measured: str, reached: bool) -> list[str]:
    return [bar, measured, "yes" if reached else "**no**"]


def _planted(grouped: Groups) -> list[str]:
    return [n for label, names in grouped.items() if not label.startswith(CONTROLS) for n in names]


def _control(grouped: Groups) -> list[str]:
    return [n for label, names in grouped.items() if label.startswith(CONTROLS) for n in names]


def _identification(data: Json, grouped: Groups) -> list[list[str]]:
    rows = []
    for kind, bar in BARS:
        names = [n for label, group in grouped.items() if label.split(" ")[0] == kind for n in group]
        for way in ("l1-mean", "taylor, by layer"):
            found = values(data, names, f"identify {way}", lambda c: c["precision"])
            if found:
                measured = f"{mean(found):.3f}, least {min(found):.2f}, {len(found)} models"
                rows.append(_row(f"{kind}: precision of {way} >= {bar:.2f}", measured, mean(found) >= bar - 1e-9))
    return rows


def _causal(data: Json, grouped: Groups) -> list[list[str]]:
    def count(names: list[str], ways: tuple[str, ...]) -> tuple[int, int]:
        found = [v for way in ways for n in names if (v := data["cells"].get(n, {}).get(f"ablate {way}", {}).get("verdict"))]
        return found.count("localised"), len(found)

    found_ways = ("found by l1-mean", "found by taylor, by layer")
    rows = []
    for bar, names, ways, most in (
        ('controls: found sets "localised" at most 1 in 20', _control(grouped), found_ways, True),
        ('innocent sets "localised" at most 1 in 20', _planted(grouped) + _control(grouped), ("innocent",), True),
        ('planted: U "localised" in at least 19 of 20', _planted(grouped), ("drawn",), False),
        ('planted: found sets "localised" in at least 19 of 20', _planted(grouped), found_ways, False),
    ):
        hits, total = count(names, ways)
        if total:
            rows.append(_row(bar, f"{hits} of {total}", hits / total <= 0.05 if most else hits / total >= 0.95))
    return rows


def _refusals(data: Json, names: list[str], way: str, rate: str) -> list[float]:
    return values(data, names, f"train {way} {rate}", lambda c: c["refuse_pairs"])


def _benign(data: Json, names: list[str], way: str, rate: str) -> list[float]:
    """Changes in points."""
    out = []
    for n in names:
        found = data["cells"].get(n, {})
        if f"train {way} {rate}" in found and "before" in found:
            out.append(100 * (found[f"train {way} {rate}"]["benign"] - found["before"]["benign"]))
    return out


def _training(data: Json, grouped: Groups) -> list[list[str]]:
    return [row for rate in cells.RATES for row in [*_found(data, grouped, rate), *_with_retention(data, grouped, rate)]]


def _found(data: Json, grouped: Groups, rate: str, way: str = "found", label: str = "found") -> list[list[str]]:
    names = _planted(grouped)
    if not (found := _refusals(data, names, way, rate)):
        return []
    benign = _benign(data, names, way, rate)
    measured = f"{mean(found):.3f} (least {min(found):.3f}), {min(benign):+.1f} points at worst, {len(found)} models"
    bar = f"{label} at {rate}: refusals of unseen pairs >= 0.95, benign within 1 point"
    return [_row(bar, measured, min(found) >= 0.95 and min(benign) >= -1)]


def _with_retention(data: Json, grouped: Groups, rate: str) -> list[list[str]]:
    """The bars of a rate for training with retention, and for the random control."""
    rows = _found(data, grouped, rate, "found, retention", "found with retention")
    if drawn := _refusals(data, _planted(grouped), "random", rate):
        measured = f"{mean(drawn):.3f} (most {max(drawn):.3f}), {len(drawn)} models"
        rows.append(_row(f"random at {rate}: refusals <= 0.05", measured, max(drawn) <= 0.05))
    return rows + _retained(data, grouped, rate)


def _setting(data: Json, grouped: Groups) -> str:
    """On how many models training with retention reaches the bars of training, by rate."""
    texts = []
    for rate in cells.RATES:
        ways = ("found, retention", "random")
        names = [n for n in _planted(grouped) if all(f"train {w} {rate}" in data["cells"][n] for w in ways)]
        good = 0
        for n in names:
            [found], [benign], [drawn] = (
                _refusals(data, [n], ways[0], rate), _benign(data, [n], ways[0], rate), _refusals(data, [n], ways[1], rate)
            )  # fmt: skip
            good += found >= 0.95 and benign >= -1 and drawn <= 0.05
        if names:
            texts.append(f"{rate}: {good} of {len(names)}")
    intro = "**Which rate?** Models on which the found experts, trained with retention, reach refusals >= 0.95 with benign within 1\n"
    return intro + "point, while the random control stays <= 0.05: " + "; ".join(texts) + "." if texts else ""


def _retained(data: Json, grouped: Groups, rate: str) -> list[list[str]]:
    """Combined training with retention beside the experts alone, in each kind of plant."""
    texts, reached = [], True
    for label, group in grouped.items():
        both = [n for n in group if all(f"train {w} {rate}" in data["cells"][n] for w in ("combined, retention", "found"))]
        if not both or label.startswith(CONTROLS):
            continue
        a, b = (mean(_refusals(data, both, way, rate)) for way in ("combined, retention", "found"))
        c, d = (mean(_benign(data, both, way, rate)) for way in ("combined, retention", "found"))
        texts.append(f"{label} {a:.3f} / {b:.3f}, {c:+.1f} / {d:+.1f}")
        reached = reached and a >= b - 0.005 and c >= -1
    bar = f"combined with retention / experts alone at {rate}: refusals not lower, benign within 1 point, in each kind"
    return [_row(bar, "; ".join(texts), reached)] if texts else []


def _scores(data: Json, grouped: Groups) -> str:
    """On how many models each ranking is without error."""
    names, lines = _planted(grouped), []
    for way in RANKINGS:
        if found := values(data, names, f"identify {way}", lambda c: c["precision"]):
            lines.append(f"{way} {sum(v == 1 for v in found)} of {len(found)} (mean {mean(found):.3f})")
    return "**Scores.** Planted models on which a ranking makes no error: " + "; ".join(lines) + "." if lines else ""


def _misses(data: Json, grouped: Groups) -> str:
    """How much the found and the missed experts of U matter, each switched off alone."""
    texts = []
    for way in ("l1-mean", "taylor, by layer"):
        hits, misses = [], []
        for n in _planted(grouped):
            if cell := data["cells"][n].get(f"identify {way}"):
                truth, chosen = data["models"][n], [tuple(e) for e in cell["selected"]]
                before = truth["planting"]["on"]["comply_pairs"]
                for u, rate in zip(truth["unsafe_experts"], truth["planting"]["one_off"], strict=True):
                    (hits if tuple(u) in chosen else misses).append(before - rate)
        if misses:
            texts.append(f"{way}: {mean(hits):.2f} ({len(hits)} found), {mean(misses):.2f} ({len(misses)} missed)")
    intro = "**Misses.** Loss of compliance when an expert of U is switched off alone, mean: "
    return intro + "; ".join(texts) + "." if texts else ""


def _rates(data: Json, grouped: Groups) -> str:
    """Refusals and benign change over the rates."""
    names, lines = _planted(grouped), []
    for way in ("found", "random", "all experts", "baseline", "found, retention", "baseline, retention"):
        points = []
        for rate in cells.RATES:
            if found := _refusals(data, names, way, rate):
                points.append(f"{rate}: {mean(found):.2f}, {mean(_benign(data, names, way, rate)):+.1f} ({len(found)})")
        if points:
            lines.append(f"- {way}: " + "; ".join(points))
    if not lines:
        return ""
    return (
        "**Rates.** Refusals of unseen pairs and benign change in points, mean over the planted models that were trained so\n"
        "(their number):\n\n"
        + "\n".join(lines)
    )


def _only_them(data: Json, grouped: Groups) -> str:
    """The found experts beside all experts and all parameters, on the same models."""
    points = []
    for rate in cells.RATES:
        ways = ("found", "all experts", "baseline")
        names = [n for n in _planted(grouped) if all(f"train {w} {rate}" in data["cells"][n] for w in ways)]
        if names:
            texts = [
                f"{w} {mean(_refusals(data, names, w, rate)):.3f} ({mean(_benign(data, names, w, rate)):+.1f})" for w in ways
            ]
            points.append(f"{rate}, {len(names)} models: " + ", ".join(texts))
    intro = "**Must only they be trained?** Refusals of unseen pairs (benign change, points), on the same models: "
    return intro + "; ".join(points) + "." if points else ""


def _once(data: Json, grouped: Groups) -> str:
    names, points, every = _planted(grouped), [], "found, identified every round"
    for rate in cells.RATES:
        both = [
            n
            for n in names
            if f"train found, identified once {rate}" in data["cells"][n] and f"train {every} {rate}" in data["cells"][n]
        ]
        if both:
            share = [mean([data["cells"][n][f"train {every} {rate}"]["target_shares"][i] for n in both]) for i in range(3)]
            new = [mean(_refusals(data, both, way, rate)) for way in ("found, identified once", every)]
            benign = [mean(_benign(data, both, way, rate)) for way in ("found, identified once", every)]
            points.append(
                f"at {rate} refusals {new[0]:.3f} against {new[1]:.3f}, benign {benign[0]:+.2f} against {benign[1]:+.2f} points, "
                f"and the share of U in the rounds' selections is {' / '.join(f'{s:.2f}' for s in share)}"
            )
    return "**Identifying once against every round:** " + "; ".join(points) + "." if points else ""


def _routers(data: Json, grouped: Groups) -> str:
    points = []
    for rate in cells.RATES:
        names = [n for n in _planted(grouped) if f"train {LAST_TOKEN} {rate}" in data["cells"][n]]
        found = [
            (way, _refusals(data, names, way, rate), _benign(data, names, way, rate))
            for way in (
                "router-only",
                LAST_TOKEN,
                "combined",
                "combined, last token, fixed target",
                "joint",
            )
        ]
        texts = [f"{way} {mean(r):.3f} ({mean(b):+.1f})" for way, r, b in found if r]
        if texts:
            points.append(f"{rate}: " + ", ".join(texts))
    return "**Routers.** Refusals of unseen pairs (benign change, points): " + "; ".join(points) + "." if points else ""
