#!/usr/bin/env python3
"""Writes the inputs of `moewarden --init random`, and rows of exact lengths: `scene.py FOLDER --model OLMoE-1B-7B`.

FOLDER gets config.json with the published sizes (shapes.json), a tokenizer of 32,000 whole words and a chat template; and for each
`--batch ROWSxLENGTH:BATCHES` a file `ROWSxLENGTH.json` with ROWS * BATCHES rows of LENGTH random tokens, of which all except the first
seven carry loss.
"""

import argparse
import json
import os
import random

HERE = os.path.dirname(os.path.abspath(__file__))
SPECIAL = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]
WORDS = 32000  # the smallest of the vocabularies
TEMPLATE = """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|> ' + m['content'] + ' <|end|> ' }}\
{% else %}{{ '<|user|> ' + m['content'] + ' ' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"""
PROMPT = 5  # words, in addition to three special tokens
TINY = dict(hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, num_experts=8, num_local_experts=8, num_experts_per_tok=2)


def write_model(folder, name, tiny):
    os.makedirs(folder, exist_ok=True)
    with open(f"{HERE}/shapes.json") as f:
        shape = json.load(f)[name]
    if tiny:
        shape |= {k: v for k, v in TINY.items() if k in shape}
    words = SPECIAL + [f"w{i}" for i in range(len(SPECIAL), WORDS)]
    added = [dict(id=i, content=s, single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
             for i, s in enumerate(SPECIAL)]
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {w: i for i, w in enumerate(words)}, "unk_token": "<|pad|>"},
    }
    # The class says that tokenizer.json is to be taken as it is, whatever the family's own class would make of it.
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE, "bos_token": "<|end|>",
              "eos_token": "<|end|>", "pad_token": "<|pad|>"}
    files = {"config.json": shape, "tokenizer.json": tokenizer, "tokenizer_config.json": config}
    for file, content in files.items():
        with open(f"{folder}/{file}", "w") as f:
            json.dump(content, f)


def write_rows(path, rows, length, seed=0):
    draw = random.Random(seed)
    text = lambda n: " ".join(f"w{draw.randrange(len(SPECIAL), WORDS)}" for _ in range(n))
    ask = lambda: [{"role": "user", "content": text(PROMPT)}]
    made = [{"unsafe_messages": ask(), "safe_messages": ask(), "response": text(length - PROMPT - 3)} for _ in range(rows)]
    with open(path, "w") as f:
        json.dump(made, f)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", action="append", default=[], metavar="ROWSxLENGTH:BATCHES")
    parser.add_argument("--tiny", action="store_true", help="a toy of the same family")
    a = parser.parse_args()
    write_model(a.folder, a.model, a.tiny)
    for batch in a.batch:
        size, batches = batch.split(":")
        rows, length = map(int, size.split("x"))
        write_rows(f"{a.folder}/{size}.json", rows * int(batches), length)


if __name__ == "__main__":
    main()
