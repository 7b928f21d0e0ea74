#!/usr/bin/env python3
"""Strong and weak scaling of identification and training on 1 and 2 ranks of one CPU thread each, over threads and MPI.

`python benches/scaling/measure.py --binary target/release/moewarden --rounds 5` (a release build with `--features mpi`).
Writes a random OLMoE-like model (23 M parameters) and rows into --data, runs the programs in turns A B C A B C, and prints medians of
the seconds that the runs log (metrics.jsonl: without loading), and of the efficiencies within a round. Use an otherwise idle machine
with two cores.
"""

import argparse
import json
import os
import random
import shutil
import statistics
import struct
import subprocess

HERE = os.path.dirname(os.path.abspath(__file__))
TOKENIZER = os.path.join(HERE, "../../tests/golden/olmoe/model")
SHAPE = dict(hidden_size=512, intermediate_size=256, num_hidden_layers=4, num_experts=12, num_experts_per_tok=4,
             num_attention_heads=8, num_key_value_heads=8)


def write_model(folder, seed=0):
    """Writes a random f32 checkpoint without torch."""
    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("model.safetensors"))
    config = json.load(open(f"{folder}/config.json")) | SHAPE
    json.dump(config, open(f"{folder}/config.json", "w"))
    d, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    for l in range(config["num_hidden_layers"]):
        p = f"model.layers.{l}."
        shapes |= {p + n + ".weight": (d,) for n in
                   ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")}
        shapes |= {p + f"self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
        shapes[p + "mlp.gate.weight"] = (config["num_experts"], d)
        for e in range(config["num_experts"]):
            shapes |= {p + f"mlp.experts.{e}.{n}.weight": s for n, s in
                       (("gate_proj", (f, d)), ("up_proj", (f, d)), ("down_proj", (d, f)))}
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = random.Random(seed)
    # One long block of normal values, read from random offsets: random enough for a benchmark, and fast.
    block = struct.pack("<100000f", *(rng.gauss(0, 0.02) for _ in range(100000)))
    ones = struct.pack("<f", 1.0)
    with open(f"{folder}/model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            if len(shape) == 1:
                out.write(ones * shape[0])  # a norm
                continue
            left = 4 * shape[0] * shape[1]
            while left:
                start = 4 * rng.randrange(50000)
                left -= out.write(block[start:][:left])


def write_rows(path, n, seed=1):
    rng = random.Random(seed)
    words = "tell me how the baker opens pantry at midnight in a play of three acts and what they say".split()
    rows = []
    for _ in range(n):
        text = lambda k: " ".join(rng.choice(words) for _ in range(k))
        rows.append({"unsafe_messages": [{"role": "user", "content": text(60)}],
                     "safe_messages": [{"role": "user", "content": text(60)}],
                     "response": "I will not help with that."})
    json.dump(rows, open(path, "w"))


def run(a, name, ranks, mpi, rows, accum):
    out = f"{a.data}/out"
    shutil.rmtree(out, ignore_errors=True)
    command = [a.binary, "--quiet", "train", "--model-name", f"{a.data}/model", "--dataset-path", rows, "--output-dir", out,
               "--threads", "1", "--batch-size", "2", "--grad-accum", str(accum), "--top-k-experts", "12", "--num-rounds", "1",
               "--max-length", "512", "--max-samples", "10000", "--skip-router-training", "--save-rounds", "none"]
    env = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    command = ["mpirun", "-n", str(ranks), *command] if mpi else command + ["--ranks", str(ranks)]
    subprocess.run(command, check=True, env=env, capture_output=True)
    phases = {}
    for line in open(f"{out}/metrics.jsonl"):
        row = json.loads(line)
        phases.setdefault(row["phase"], []).append(row)
    return {phase: (sum(r["seconds"] for r in rows), sum(r["tokens"] for r in rows)) for phase, rows in phases.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="target/release/moewarden")
    parser.add_argument("--data", default="/tmp/moewarden-scaling")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    a = parser.parse_args()
    os.makedirs(a.data, exist_ok=True)
    if not os.path.isdir(f"{a.data}/model"):
        write_model(f"{a.data}/model")
    half, whole = f"{a.data}/half.json", f"{a.data}/whole.json"
    write_rows(half, a.rows // 2)
    write_rows(whole, a.rows)
    # 8 micro-batches a step in total; the one-rank baseline of weak scaling has 4, as each rank of the two-rank runs.
    runs = {
        "1 rank, all rows": (1, False, whole, 8),
        "2 threads, all rows": (2, False, whole, 4),
        "2 processes (MPI), all rows": (2, True, whole, 4),
        "1 rank, half of the rows": (1, False, half, 4),
    }
    seconds = {name: [] for name in runs}
    for _ in range(a.rounds):
        for name, (ranks, mpi, rows, accum) in runs.items():
            seconds[name].append(run(a, name, ranks, mpi, rows, accum))
    for phase in ("identify", "expert"):
        times = {name: [s[phase][0] for s in all_] for name, all_ in seconds.items()}
        tokens = {name: all_[0][phase][1] for name, all_ in seconds.items()}
        print(f"\n{phase}\n\n| run | median s | tokens/s | strong: of twice one rank | weak: of half the rows on one |")
        print("|---|---|---|---|---|")
        for name, (ranks, *_) in runs.items():
            median = statistics.median(times[name])
            cells = ["", ""]
            if ranks == 2:
                strong = [x / (2 * y) for x, y in zip(times["1 rank, all rows"], times[name])]
                weak = [x / y for x, y in zip(times["1 rank, half of the rows"], times[name])]
                cells = [f"{100 * statistics.median(e):.0f} % ({100 * min(e):.0f} to {100 * max(e):.0f})" for e in (strong, weak)]
            print(f"| {name} | {median:.2f} | {tokens[name] / median:.0f} | {cells[0]} | {cells[1]} |")


if __name__ == "__main__":
    main()
