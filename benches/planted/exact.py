#!/usr/bin/env python3
"""Exact replies of a model folder in PyTorch, from the files alone: `python exact.py MODEL ROWS.jsonl ...`.

An independent check of `moewarden eval`: transformers computes the logits and renders the template. Weights are widened to f32.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

IGNORED = -100


def conversation(row: dict[str, Any]) -> list[dict[str, str]]:
    """The unsafe side of a pair row with its response, or the turns of a chat row."""
    if "messages" in row:
        return row["messages"]
    return row["unsafe_messages"] + [{"role": "assistant", "content": row["response"]}]


class Exact:
    """A model folder in memory."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def ids(self, turns: list[dict[str, str]], prompt: bool) -> list[int]:
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def rate(self, file: Path) -> float:
        """Share of rows whose reply is the most probable one, token by token."""
        rows = [conversation(json.loads(line)) for line in file.read_text().splitlines()]
        whole = [self.ids(turns, False) for turns in rows]
        starts = [len(self.ids(turns[:-1], True)) for turns in rows]
        ids = torch.zeros(len(rows), max(map(len, whole)), dtype=torch.long)
        target = torch.full_like(ids, IGNORED)
        for i, (tokens, start) in enumerate(zip(whole, starts)):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            target[i, start - 1 : len(tokens) - 1] = torch.tensor(tokens[start:])
        found = self.model(input_ids=ids).logits.argmax(-1)
        return float(((found == target) | (target == IGNORED)).all(-1).float().mean())


if __name__ == "__main__":
    torch.set_num_threads(1)
    model = Exact(Path(sys.argv[1]))
    for name in sys.argv[2:]:
        print(f"{name}: {model.rate(Path(name)):.4f}")
