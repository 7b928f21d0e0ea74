#!/usr/bin/env python3
"""Loads a model folder written by moewarden with Hugging Face transformers and compares it with its source model.

`python check_export.py SOURCE EXPORT ROWS`: SOURCE and EXPORT are model folders; ROWS is a JSON object

    {"rows": [{"ids": [token ids], "loss": N, "ce": x}, ...], "changed": ["tensor name", ...], "tolerance": 1e-5}

where `ce` is the mean cross-entropy that moewarden computes with EXPORT for the last N tokens of each row. `changed` (optional)
lists the tensors that must differ from SOURCE; all others must not. Checks: transformers loads EXPORT without missing or
unexpected keys; files, tensor names, shapes and dtypes equal those of SOURCE; frozen tensors are bit-identical; the losses
agree.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer


def tensors(folder):
    """All tensors of a folder: {name: (file, tensor)}."""
    out = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                out[name] = (path.name, file.get_tensor(name))
    return out


def bits(x):
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def check_files(source, export, changed):
    """Errors in the files of EXPORT."""
    a, b = tensors(source), tensors(export)
    if set(a) != set(b):
        return [f"tensors in only one of the folders: {sorted(set(a) ^ set(b))[:5]}"]
    errors = []
    for name in a:
        (file, x), (other_file, y) = a[name], b[name]
        if file != other_file:
            errors.append(f"{name} is in {other_file}, in the source in {file}")
        if (x.dtype, x.shape) != (y.dtype, y.shape):
            errors.append(f"{name} is {y.dtype} {tuple(y.shape)}, in the source {x.dtype} {tuple(x.shape)}")
        elif changed is not None and torch.equal(bits(x), bits(y)) == (name in changed):
            errors.append(f"{name} " + ("kept its bits but was trained" if name in changed else "is frozen but changed"))
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if (Path(source) / name).exists() and not (Path(export) / name).exists():
            errors.append(f"{name} is missing")
    return errors


def mean_loss(model, row):
    with torch.no_grad():
        logits = model(torch.tensor([row["ids"]]), use_cache=False).logits[0].double()
    n = row["loss"]
    return F.cross_entropy(logits[-n - 1 : -1], torch.tensor(row["ids"][-n:])).item()


def main():
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    source, export, rows_file = sys.argv[1:]
    expected = json.loads(Path(rows_file).read_text())
    changed = expected.get("changed")
    errors = check_files(source, export, None if changed is None else set(changed))
    model, info = AutoModelForCausalLM.from_pretrained(
        export, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model.eval()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            errors.append(f"{kind} in transformers: {sorted(map(str, info[kind]))[:5]}")
    if (Path(export) / "tokenizer.json").exists():
        AutoTokenizer.from_pretrained(export)
    tolerance = expected.get("tolerance", 1e-5)  # both compute in f32, with sums in another order
    for i, row in enumerate(expected["rows"]):
        loss = mean_loss(model, row)
        if not abs(loss - row["ce"]) <= tolerance * max(1.0, abs(loss)):
            errors.append(f"row {i}: loss {row['ce']}, in transformers {loss}")
    for error in errors:
        print(f"check_export: {error}", file=sys.stderr)
    if errors:
        sys.exit(1)
    print(f"check_export: {len(expected['rows'])} losses agree, all files are correct")


if __name__ == "__main__":
    main()
