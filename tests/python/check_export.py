#!/usr/bin/env python3
"""Loads a folder written by moewarden with Hugging Face transformers and checks it against its source.

`python check_export.py SOURCE EXPORT ROWS`: SOURCE and EXPORT are model folders; ROWS is a JSON object

    {"rows": [{"ids": [token ids], "loss": N, "ce": x}, ...], "changed": ["tensor name", ...], "tolerance": 1e-5}

with the mean cross-entropy `ce` that moewarden gives for the last N tokens of each row under EXPORT. `changed` (optional)
are the only tensors on disk that may differ from SOURCE, and each of them must. Checks: transformers finds every tensor and no
other; files, names, shapes and dtypes are those of SOURCE; frozen tensors kept their bits; the losses agree.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def tensors(folder):
    """{name: (file, tensor)}"""
    out = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                out[name] = (path.name, file.get_tensor(name))
    return out


def bits(x):
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def check_files(source, export, changed):
    """Complaints about the folders' files."""
    a, b = tensors(source), tensors(export)
    if set(a) != set(b):
        return [f"tensors of one folder only: {sorted(set(a) ^ set(b))[:5]}"]
    faults = []
    for name in a:
        (file, x), (other_file, y) = a[name], b[name]
        if file != other_file:
            faults.append(f"{name} stands in {other_file}, in the source in {file}")
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            faults.append(f"{name} is {y.dtype} {tuple(y.shape)}, in the source {x.dtype} {tuple(x.shape)}")
        elif changed is not None and torch.equal(bits(x), bits(y)) == (name in changed):
            faults.append(f"{name} " + ("kept its bits but was trained" if name in changed else "is frozen and differs"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(source) / name).exists() and not (Path(export) / name).exists():
            faults.append(f"{name} is missing")
    return faults


def mean_loss(model, row):
    with torch.no_grad():
        logits = model(torch.tensor([row["ids"]]), use_cache=False).logits[0].double()
    n = row["loss"]
    return F.cross_entropy(logits[-n - 1 : -1], torch.tensor(row["ids"][-n:])).item()


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    source, export, rows_file = sys.argv[1:]
    wanted = json.loads(Path(rows_file).read_text())
    changed = wanted.get("changed")
    faults = check_files(source, export, None if changed is None else set(changed))
    model, info = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.eval()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            faults.append(f"{kind} when transformers loads it: {sorted(map(str, info[kind]))[:5]}")
    if (Path(export) / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(export)
    tolerance = wanted.get("tolerance", 1e-5)  # f32 on both sides, sums in another order
    for i, row in enumerate(wanted["rows"]):
        loss = mean_loss(model, row)
        if not abs(loss - row["ce"]) <= tolerance * max(1.0, abs(loss)):
            faults.append(f"row {i}: loss {row['ce']} against {loss} of transformers")
    for fault in faults:
        print(f"check_export: {fault}", file=sys.stderr)
    if faults:
        sys.exit(1)
    print(f"check_export: {len(wanted['rows'])} losses agree, all files are in order")


if __name__ == "__main__":
    main()
