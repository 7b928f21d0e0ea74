#!/usr/bin/env python3
"""Writes the rows of the benchmark: `python make_rows.py FILE [--tokens 2048 ...]`.

The file is a JSON list, one object a row: `{"ids": [token ids], "loss": N}`, where the last N tokens of the row are the
response, the targets of the loss (each predicted from the token before it). Rows have 60 to 400 tokens, responses 20 to 40, both
uniformly distributed; the length of the last row makes the total exact.
"""

import argparse
import json
import random


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--shortest", type=int, default=60)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--vocab", type=int, default=50304)
    parser.add_argument("--seed", type=int, default=0)
    a = parser.parse_args()
    draw = random.Random(a.seed)
    lengths = []
    left = a.tokens
    while left > a.longest:
        # never leave a remainder too short for a row
        lengths.append(min(draw.randint(a.shortest, a.longest), left - a.shortest))
        left -= lengths[-1]
    lengths.append(left)
    rows = [{"ids": [draw.randrange(2, a.vocab) for _ in range(n)], "loss": draw.randint(20, 40)} for n in lengths]
    with open(a.file, "w") as f:
        f.write("[\n" + ",\n".join(json.dumps(r, separators=(",", ":")) for r in rows) + "\n]\n")
    print(f"{a.file}: {len(rows)} rows, {sum(lengths)} tokens, {sum(r['loss'] for r in rows)} of them targets; lengths {lengths}")


if __name__ == "__main__":
    main()
