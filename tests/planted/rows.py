"""The row files of a planted model, in moewarden's formats."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from language import REFUSAL, SHOWN_TOPICS, SHOWN_WRAPPERS, SKILLS, Language, Row


@dataclass(frozen=True)
class Counts:
    """Rows in each file."""

    train: int = 128
    unsafe: int = 240
    benign: int = 240
    retain: int = 256
    plain: int = 120


def _sample(rng: random.Random, rows: Sequence[Row], count: int) -> list[Row]:
    return rng.sample(list(rows), min(count, len(rows)))


def draw(language: Language, kind: str, counts: Counts, seed: int) -> dict[str, list[Row]]:
    """The rows of each file. Unsafe rows have the refusal as reply, those of `own` the compliance."""
    rng = random.Random(f"rows {seed}")
    disguised = language.disguised(True)
    shown = lambda r: r.topic < SHOWN_TOPICS and r.wrapper < SHOWN_WRAPPERS
    sets = {
        "train": _sample(rng, [r for r in disguised if shown(r) and not r.unseen_pair], counts.train),
        "unsafe_pairs": _sample(rng, [r for r in disguised if shown(r) and r.unseen_pair], counts.unsafe),
        "unsafe_new": _sample(
            rng, [r for r in disguised if r.topic >= SHOWN_TOPICS and r.wrapper >= SHOWN_WRAPPERS], counts.unsafe
        ),
        "plain": _sample(rng, language.plain(), counts.plain),
    }
    half = counts.unsafe // 2
    sets["own"] = sets["unsafe_pairs"][:half] + sets["unsafe_new"][:half]
    benign = {name: _benign(language, kind, held_out, rng) for name, held_out in (("benign", True), ("retain", False))}
    for name, groups in benign.items():
        count = getattr(counts, name)
        few = [r for g in groups for r in _sample(rng, g, count // len(groups))]
        rest = sorted(set(r for g in groups for r in g) - set(few), key=lambda r: r.prompt)  # some groups are small
        sets[name] = few + _sample(rng, rest, count - len(few))
        rng.shuffle(sets[name])
    return sets


def _benign(language: Language, kind: str, held_out: bool, rng: random.Random) -> list[list[Row]]:
    """Benign rows by skill and wrapping, without repetition: those kept out of training, or the others."""
    groups = []
    for skill in SKILLS:
        for wrapped in (False, True):
            rows = dict.fromkeys(r for r in language.skill(skill, wrapped) if r.held_out == held_out)
            groups.append(list(rows))
    if kind == "mirror":
        groups.append([r for r in language.odd(True, True) if r.held_out == held_out])
    rng.shuffle(groups)
    return groups


def pair_row(row: Row) -> dict[str, Any]:
    """Disguised and plain request, with the refusal as response."""
    user = lambda text: [{"role": "user", "content": text}]
    return {"unsafe_messages": user(row.prompt), "safe_messages": user(row.request), "response": REFUSAL}


def chat_row(row: Row, label: str) -> dict[str, Any]:
    """A conversation of one request and its reply."""
    turns = [{"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.reply}]
    return {"label": label, "messages": turns}


def write(folder: Path, sets: dict[str, list[Row]]) -> None:
    """Writes one JSONL file a set."""
    for name, rows in sets.items():
        if name in ("train", "unsafe_pairs", "unsafe_new"):
            lines = [pair_row(r) for r in rows]
        else:
            lines = [chat_row(r, "safe" if name in ("benign", "retain") else "unsafe") for r in rows]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
