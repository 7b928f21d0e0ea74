#!/usr/bin/env python3
"""How far `moewarden check` is from what then happens: `python benches/forecast.py [--program FILE] [MODEL ...]`.

For each model, on the CPU, runs `check`, then `identify` and `train` with the same options, and prints the
predicted and the measured peak of resident memory, and the predicted and the measured seconds of the whole command. On a machine that
does other work, the CPU time of the command divided by its threads is the better measurement: it is the last column.

`planted` has the size of the built-in planted model, `peer` is the model of benches/peer, `slice` has two of OLMoE-1B-7B's layers: their
weights are made by `--init random`. `whole` is all of OLMoE-1B-7B, read from a checkpoint of 13.8 GB in bf16 that is written to
`--models`, and kept there; it runs only if it is named.
"""

import argparse
import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from array import array

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE + "/gpu")
import scene  # noqa: E402

# changes of OLMoE-1B-7B's shape; rows, tokens of a row, micro-batch, selected experts
MODELS = {
    "planted": (dict(hidden_size=64, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
                     num_experts=16, num_experts_per_tok=2, vocab_size=32000), 64, (20, 60), 8, 8),
    "peer": (dict(hidden_size=1024, intermediate_size=512, num_hidden_layers=4), 16, (80, 348), 8, 16),
    "slice": (dict(num_hidden_layers=2), 16, (150, 500), 8, 8),
    "whole": ({}, 16, (60, 140), 8, 128),
}
STORED = "whole"
TRAINING = ["--num-rounds", "1", "--expert-epochs-per-round", "1", "--skip-router-training"]
UNITS = {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}


def write_layer(path, tensors, values):
    """A safetensors file of bf16 tensors (name, shape), filled from `values` from a random place on, over and over."""
    draw, header, end = random.Random(path), {}, 0
    for name, shape in tensors:
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    with open(path + ".partial", "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for name, shape in tensors:
            left, start = 2 * math.prod(shape), 2 * draw.randrange(len(values) // 2)
            if name.endswith("norm.weight"):
                f.write(b"\x80\x3f" * (left // 2))  # 1.0
                continue
            while left > 0:
                part = values[start : start + left]
                f.write(part)
                left, start = left - len(part), 0
    os.rename(path + ".partial", path)


def write_checkpoint(folder):
    """OLMoE-1B-7B with random weights, normal with deviation 0.02, of which there are a million different ones."""
    with open(folder + "/config.json") as f:
        c = json.load(f)
    d, width, vocab, draw = c["hidden_size"], c["intermediate_size"], c["vocab_size"], random.Random(1)
    values = array("f", (draw.gauss(0, c["initializer_range"]) for _ in range((1 << 20) + 1)))
    values = array("H", array("H", values.tobytes())[1::2]).tobytes()  # the upper halves: bf16
    ends = [("model.embed_tokens.weight", [vocab, d]), ("lm_head.weight", [vocab, d]), ("model.norm.weight", [d])]
    files = {"ends.safetensors": ends}
    for i in range(c["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        tensors = [(layer + f"self_attn.{x}_proj.weight", [d, d]) for x in "qkvo"]
        tensors += [(layer + f"self_attn.{x}_norm.weight", [d]) for x in "qk"]
        tensors += [(layer + f"{x}_layernorm.weight", [d]) for x in ("input", "post_attention")]
        tensors += [(layer + "mlp.gate.weight", [c["num_experts"], d])]
        for e in range(c["num_experts"]):
            expert = layer + f"mlp.experts.{e}."
            tensors += [(expert + "gate_proj.weight", [width, d]), (expert + "up_proj.weight", [width, d])]
            tensors += [(expert + "down_proj.weight", [d, width])]
        files[f"layer-{i}.safetensors"] = tensors
    for file, tensors in files.items():
        if not os.path.exists(f"{folder}/{file}"):
            write_layer(f"{folder}/{file}", tensors, values)
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in files.items() for name, _ in tensors}}
    with open(folder + "/model.safetensors.index.json", "w") as f:
        json.dump(index, f)


def write_inputs(folder, name):
    """The model's files and rows; their options."""
    change, rows, (shortest, longest), batch, selected = MODELS[name]
    scene.write_model(folder, "OLMoE-1B-7B", False)
    with open(folder + "/config.json") as f:
        config = json.load(f) | change
    with open(folder + "/config.json", "w") as f:
        json.dump(config, f)
    draw = random.Random(0)
    text = lambda n: " ".join(f"w{draw.randrange(len(scene.SPECIAL), scene.WORDS)}" for _ in range(n))
    with open(folder + "/rows.jsonl", "w") as f:
        for _ in range(rows):
            tokens = draw.randint(shortest, longest)
            reply = max(8, tokens // 8)
            ask = lambda n: [{"role": "user", "content": text(n)}]
            row = {"unsafe_messages": ask(tokens - reply), "safe_messages": ask(8), "response": text(reply)}
            f.write(json.dumps(row) + "\n")
    init = ["--init", "random"] if name != STORED else []
    return ["--model", folder, *init, "--dataset", folder + "/rows.jsonl", "--device", "cpu", "--batch-size", str(batch),
            "--top-k-experts", str(selected)]


def predicted(text, command):
    """(bytes, seconds) of a command in the output of `check`."""
    line = re.search(rf"`{command}`: (.*)", text)[1]
    seconds = sum(float(n) * {"h": 3600, "min": 60, "s": 1}[unit] for n, unit in re.findall(r"([\d.]+) (h|min|s)\b", line))
    value, unit = re.search(r"([\d.]+) (B|kB|MB|GB)", line).groups()
    return float(value) * UNITS[unit], seconds


def run(command):
    """(output, seconds, CPU seconds, peak bytes) of a command that must succeed."""
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"{' '.join(command)} failed:\n{out}")
    return out, time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=[n for n in MODELS if n != STORED])
    parser.add_argument("--models", help="folder for the checkpoint of `whole`")
    parser.add_argument("--program", default=HERE + "/../target/release/moewarden")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--option", action="append", default=[], help="one more option of all commands, such as --option=--recompute=always")
    a = parser.parse_args()
    print("| model | command | predicted GB | peak GB | predicted s | s | CPU s / threads |\n|---|---|---|---|---|---|---|")
    for name in a.names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = f"{a.models}/whole" if name == STORED else scratch
            options = write_inputs(folder, name)
            if name == STORED:
                write_checkpoint(folder)
            options += ["--threads", str(a.threads), *a.option]
            forecast, *_ = run([a.program, "check", "--show", "0", *options, *TRAINING])
            for command, more in (("identify", []), ("train", TRAINING)):
                _, seconds, busy, peak = run([a.program, command, "-q", "--output-dir", f"{scratch}/{command}", *options, *more])
                memory, expected = predicted(forecast, command)
                busy /= a.threads
                print(f"| {name} | {command} | {memory / 1e9:.2f} ({100 * memory / peak - 100:+.0f} %) | {peak / 1e9:.2f} | {expected:.1f} "
                      f"| {seconds:.1f} ({100 * expected / seconds - 100:+.0f} %) | {busy:.1f} ({100 * expected / busy - 100:+.0f} %) |", flush=True)


if __name__ == "__main__":
    main()
