"""Writes docs/truth.md from the results: every number in it was measured in this run of the bench."""

from typing import Any

import tables
import verdicts
from setup_text import INTRODUCTION, LIMITS, TRAINING

Json = dict[str, Any]


def document(data: Json) -> str:
    """The whole page."""
    groups = tables.groups(data)
    parts = [
        INTRODUCTION,
        f"Measured with {data['program']}, on a CPU.",
        "## Conclusions\n\n" + verdicts.conclusions(data, groups),
        "## Planting\n\n" + tables.planting(data),
        "## Identification\n\n" + tables.identification(data, groups),
        "## Inclusion probabilities\n\n" + tables.bootstrap(data, groups),
        "## Causal check\n\n" + tables.ablation(data, groups),
        "## Training\n\n" + TRAINING + "\n\n" + tables.training(data, groups),
        "## What was not measured\n\n" + tables.notes(data),
        LIMITS,
    ]
    return "\n\n".join(p.strip() for p in parts) + "\n"
