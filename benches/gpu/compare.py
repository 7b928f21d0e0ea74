#!/usr/bin/env python3
"""Compares two output folders of `moewarden train`. `compare.py same A B` requires bit-identical scores and weights;
`compare.py close A B --model SOURCE` the same selection, losses within a relative error of --losses, and weight changes within a
relative error (L2 norm) of --change."""

import argparse
import array
import glob
import hashlib
import json
import os
import struct
import sys


def digest(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def same(a, b):
    names = ["expert_scores.json"] + sorted(os.path.relpath(p, a) for p in glob.glob(f"{a}/final_model/*.safetensors"))
    wrong = [n for n in names if digest(f"{a}/{n}") != digest(f"{b}/{n}")]
    print(f"{len(names) - len(wrong)} of {len(names)} files have the same bits" + "".join(f"; not {n}" for n in wrong))
    return not wrong and len(names) > 1


def tensors(folder):
    """Name -> values, of safetensors files in F32 or BF16."""
    found = {}
    for path in glob.glob(f"{folder}/*.safetensors"):
        with open(path, "rb") as f:
            content = f.read()
        (length,) = struct.unpack("<Q", content[:8])
        for name, t in json.loads(content[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + x for x in t["data_offsets"])
            raw = content[begin:end]
            if t["dtype"] == "BF16":
                raw = b"".join(b"\0\0" + raw[i : i + 2] for i in range(0, len(raw), 2))
            elif t["dtype"] != "F32":
                raise SystemExit(f"{path}: {name} is in {t['dtype']}")
            found[name] = array.array("f", raw)
    return found


def rounds(folder):
    with open(f"{folder}/expert_scores.json") as f:
        return json.load(f)["rounds"]


def metrics(folder):
    with open(f"{folder}/metrics.jsonl") as f:
        return [json.loads(line) for line in f]


def close(a, b, o):
    selected = [[r["selected"] for r in rounds(x).values()] for x in (a, b)]
    good = selected[0] == selected[1]
    print("selection: " + ("the same" if good else f"{selected[0]} and {selected[1]}"))
    rows = [metrics(x) for x in (a, b)]
    losses = [[r["total_loss"] for r in x] for x in rows]
    if len(losses[0]) != len(losses[1]) or not losses[0]:
        print(f"{len(losses[0])} and {len(losses[1])} steps")
        return False
    off = max(abs(x - y) / max(abs(x), 1e-9) for x, y in zip(*losses))
    print(f"losses of {len(losses[0])} steps: within {off:.1e} of themselves (allowed: {o.losses:.0e})")
    good &= off <= o.losses
    before, x, y = tensors(o.model), tensors(f"{a}/final_model"), tensors(f"{b}/final_model")
    if set(x) != set(y) or not set(x) <= set(before):
        print("the models have other tensors")
        return False
    apart = size = 0.0
    for name, start in before.items():
        if x[name] != start or y[name] != start:
            apart += sum((p - q) ** 2 for p, q in zip(x[name], y[name]))
            size += sum((p - q) ** 2 for p, q in zip(x[name], start))
    if size == 0.0:
        print("no weight changed")
        return False
    off = (apart / size) ** 0.5
    print(f"changes of the weights: within {off:.1e} of their size (allowed: {o.change:.0e})")
    return good and off <= o.change


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("how", choices=["same", "close"])
    parser.add_argument("folders", nargs=2)
    parser.add_argument("--model", help="the source's folder")
    parser.add_argument("--losses", type=float, default=1e-4)
    parser.add_argument("--change", type=float, default=1e-2)
    o = parser.parse_args()
    if o.how == "close" and not o.model:
        parser.error("close takes --model")
    sys.exit(0 if (same(*o.folders) if o.how == "same" else close(*o.folders, o)) else 1)


if __name__ == "__main__":
    main()
