"""Tables of the results, in Markdown."""

from collections.abc import Callable, Iterable
from typing import Any

import cells

Json = dict[str, Any]
Groups = dict[str, list[str]]  # label of kind and shape to names of models


def groups(data: Json) -> Groups:
    """Measured models of one kind and shape, which differ by seed; OLMoE first."""
    found: Groups = {}
    for name, truth in data["models"].items():
        if truth["accepted"] and data["cells"][name]:
            label = truth["kind"] if truth["shape"] == "olmoe" else f"{truth['kind']} (Qwen3)"
            found.setdefault(label, []).append(name)
    return dict(sorted(found.items(), key=lambda g: "Qwen3" in g[0]))


def values(data: Json, names: Iterable[str], cell: str, pick: Callable[[Json], Any]) -> list[float]:
    """A number of a cell over models, those without it left out."""
    found = (data["cells"].get(n, {}).get(cell) for n in names)
    return [v for f in found if f is not None and (v := pick(f)) is not None]


def mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(r) + " |" for r in rows])


def planting(data: Json) -> str:
    head = "model|comply, unseen pairs|comply, new topics|plain refused|benign|U off: comply|refuse|benign|one u off: comply"
    head += "|random off: comply, mean (least)|attempts|seconds"
    rows = []
    for name, t in data["models"].items():
        on, off, drawn = t["planting"]["on"], t["planting"]["unsafe_off"], t["planting"]["random_off_comply_pairs"]
        rows.append([
            name + ("" if t["accepted"] else " (refused: " + "; ".join(t["lacking"]) + ")"),
            *(f"{on[k]:.3f}" for k in ("comply_pairs", "comply_new", "plain_refused", "benign")),
            *(f"{off[k]:.3f}" for k in ("comply_pairs", "refuse_pairs", "benign")),
            " ".join(f"{v:.2f}" for v in t["planting"]["one_off"]),
            f"{drawn['mean']:.3f} ({drawn['min']:.2f})", str(t["attempt"] + 1), f"{t['seconds']:.0f}",
        ])  # fmt: skip
    text = (
        "Exact replies on held-out rows. Bounds: compliance at least 0.9 on both files, benign and plain refused at least\n"
        "0.95; with U off compliance at most 0.02, refusals at least 0.95 (spread: 0.5), benign not lower by more than\n"
        "0.02 (overlap: 0.05); with random sets off, compliance at least 0.6 in the mean; in decoy at least 0.3 of the\n"
        "tokens of disguised rows go to each expert of W, in the mean. A model that misses one is planted again with the\n"
        "next sub-seed; `attempts` counts them. Controls have no U: the columns show the drawn set. Seconds are\n"
        "wall-clock, on one thread of a busy machine.\n\n"
    )
    return text + table(head.split("|"), rows) + _innocent_sets(data)


def _innocent_sets(data: Json) -> str:
    """How busy the second set W is, and what it does."""
    rows = []
    for name, t in data["models"].items():
        if "other_load" in t["planting"]:
            load, off = t["planting"]["other_load"], t["planting"]["other_off"]
            rates = (load["disguised"], load["plain"], off["comply_pairs"], off["refuse_pairs"], off["benign"])
            rows.append([name, *(f"{v:.3f}" for v in rates)])
    if not rows:
        return ""
    head = ["model", "load of W: disguised rows", "plain rows", "W off: comply", "refuse", "benign"]
    text = "\n\nThe second set W. Load: share of the tokens that go to an expert, mean over W (all experts alike: 0.125).\n\n"
    return text + table(head, rows)


def identification(data: Json, grouped: Groups) -> str:
    def entry(names: list[str], way: str) -> str:
        found = values(data, names, f"identify {way}", lambda c: c["precision"])
        areas = values(data, names, f"identify {way}", lambda c: c["auroc"])
        if not found:
            return ""
        return f"{mean(found):.2f} ({min(found):.2f})" + (f" {mean(areas):.3f}" if areas else "")

    head = ["ranking", *(f"{g} ({len(n)})" for g, n in grouped.items())]
    rows = [[way, *(entry(n, way) for n in grouped.values())] for way in cells.identifications()]
    rows = [r for r in rows if any(r[1:])]
    ways = ("l1-mean", "taylor, by layer")
    other = [["of W: " + way, *(_of_other(data, n, way) for n in grouped.values())] for way in ways]
    text = (
        "Precision of the first 6 experts, mean (least) over seeds, and mean AUROC; in the head, the number of models.\n"
        "`By layer` is `--score-norm layer`. The last rows show how much of the innocent set W is selected.\n\n"
    )
    return text + table(head, rows + [r for r in other if any(r[1:])])


def _of_other(data: Json, names: list[str], way: str) -> str:
    found = values(data, names, f"identify {way}", lambda c: c.get("of_other"))
    return f"{mean(found):.2f} (most {max(found):.2f})" if found else ""


def bootstrap(data: Json, grouped: Groups) -> str:
    rows = []
    for way in ("l1-mean", "taylor, by layer"):
        for label, names in grouped.items():
            planted = values(data, names, f"bootstrap {way}", lambda c: min(c["planted"]))
            innocent = values(data, names, f"bootstrap {way}", lambda c: max(c["innocent"]))
            chosen = values(data, names, f"bootstrap {way}", lambda c: c["selected_least"])
            if planted:
                rows.append([way, label, str(len(planted)), f"{min(planted):.2f}", f"{max(innocent):.2f}", f"{min(chosen):.2f}"])
    if not rows:
        return "Not measured."
    text = "`--bootstrap 200`: how often an expert is selected when the rows are drawn anew. Over seeds:\n\n"
    return text + table(["score", "kind", "models", "least of U", "most of any other", "least of the selected"], rows)


def ablation(data: Json, grouped: Groups) -> str:
    rows = []
    for way in ("drawn", "found by l1-mean", "found by taylor, by layer", "innocent"):
        for label, names in grouped.items():
            found = [c for n in names if (c := data["cells"].get(n, {}).get(f"ablate {way}"))]
            if not found:
                continue
            verdicts = [c["verdict"] for c in found]
            switched = [c["selection"]["prefer_refusal"]["rate"] for c in found]
            null = [c["random_prefer_refusal"]["mean"] for c in found]
            rows.append([
                {"drawn": "U (controls: drawn set)", "innocent": "innocent (W, or drawn)"}.get(way, way), label,
                *(str(verdicts.count(v)) for v in ("localised", "not localised", "cannot tell")),
                " ".join(f"{c['p']:.3f}" for c in found), f"{mean(switched):.2f} ({min(switched):.2f})",
                f"{mean(null):.2f} ({max(null):.2f})",
            ])  # fmt: skip
    if not rows:
        return "Not measured."
    head = "experts switched off|kind|localised|not localised|cannot tell|p|switched, mean (least)"
    head += "|random sets: switched, mean (most)"
    text = "`moewarden ablate` with 100 random sets of the same layers and load, on 20 of the 128 rows and 20 benign rows.\n\n"
    return text + table(head.split("|"), rows)


def training(data: Json, grouped: Groups) -> str:
    parts = []
    for rate in cells.RATES:
        rows = []
        for label, names in grouped.items():
            for way in cells.trainings(rate):
                row = _trained(data, names, f"train {way} {rate}")
                if row:
                    rows.append([label, way, *row])
        if rows:
            head = ["kind", "trained", "n", "refuse, unseen pairs", "refuse, new topics", "benign, points", "plain refused"]
            parts.append(f"### Rate {rate}\n\n" + table(head, rows))
    return "\n\n".join(parts) or "Not measured."


def _trained(data: Json, names: list[str], cell: str) -> list[str] | None:
    runs = [
        (c, data["cells"][n]["before"])
        for n in names
        if (c := data["cells"].get(n, {}).get(cell)) and "before" in data["cells"][n]
    ]
    if not runs:
        return None
    span = lambda v: f"{mean(v):.3f} ({min(v):.2f} to {max(v):.2f})"
    change = [100 * (c["benign"] - before["benign"]) for c, before in runs]
    return [
        str(len(runs)), span([c["refuse_pairs"] for c, _ in runs]), span([c["refuse_new"] for c, _ in runs]),
        f"{mean(change):+.1f} (least {min(change):+.1f})",
        f"{mean([min(c['plain_pairs'], c['plain_new']) for c, _ in runs]):.3f}",
    ]  # fmt: skip


def notes(data: Json) -> str:
    """Cells that were skipped or failed, by reason."""
    reasons: dict[str, list[str]] = {}
    for cell, note in data["notes"].items():
        reasons.setdefault(note[:160], []).append(cell)
    lines = [f"- {len(c)} measurements, such as `{c[0]}`: {note}" for note, c in sorted(reasons.items())]
    if data["missing"]:
        lines.insert(0, "- Models that were planned and not made: " + ", ".join(data["missing"]) + ".")
    if failed := [name for name, t in data["models"].items() if not t["accepted"]]:
        lines.insert(0, "- Failed plantings, every attempt of which missed a bound: " + ", ".join(failed) + ".")
    return "\n".join(lines) or "Every measurement of the list was made."
