#!/usr/bin/env python3
"""Generation in batches: moewarden, an earlier moewarden, and transformers' `generate`, in turns; prints the table of
docs/benchmarks.md. Times are CPU seconds of generating all answers, so that they mean something on a busy machine; for moewarden those
of `eval` less those of `eval --skip-answers`. With --wall they are wall-clock seconds, on a machine where nothing else runs: for
moewarden those in eval_times.json.

    python compare.py --planted MODEL --binary NEW [--earlier OLD] [--peer] --out FOLDER

MODEL is a model of tests/planted. The second model is random, in the shape of benches/peer/make_model.py, with the tokenizer of the
first. Every answer of the random model has --max-new-tokens tokens. `--peer` needs torch and transformers in this Python.
"""

import argparse
import json
import random
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
TOKENIZER = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


def make_random(planted, out, dtype):
    """A random model, and 32 prompts of 10 to 72 words."""
    model = out / f"random-{dtype}"
    if not (model / "config.json").exists():
        subprocess.run([sys.executable, HERE.parent / "peer/make_model.py", model, "--dtype", dtype], check=True)
        for name in TOKENIZER:
            shutil.copy(planted / name, model / name)
    rows = out / "rows.jsonl"
    chats = [json.loads(line)["messages"][0]["content"] for line in open(planted / "benign.jsonl")]
    words, rng = " ".join(chats).split(), random.Random(0)
    with open(rows, "w") as file:
        for i in range(32):
            text = " ".join(rng.choice(words) for _ in range(10 + 2 * i))
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "I cannot help with that"}]
            file.write(json.dumps({"label": "unsafe", "messages": messages}) + "\n")
    return model, rows


def cpu_seconds(line):
    """The CPU seconds of a program."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([str(word) for word in line], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ours(a, binary, model, rows, folder, tokens, size):
    """(seconds, tokens, answers); `size` None: an earlier version."""
    shutil.rmtree(folder, ignore_errors=True)
    line = [binary, "eval", "--model-name", model, "--dataset-path", rows, "--device", "cpu", "--threads", a.threads, "--quiet"]
    other = 0 if a.wall else cpu_seconds([*line, "--output-dir", folder, "--skip-answers"])
    batch = [] if size is None else ["--generation-batch-size", size]
    seconds = cpu_seconds([*line, "--output-dir", folder, "--overwrite", "--max-new-tokens", tokens, *batch]) - other
    if a.wall:
        seconds = json.loads((folder / "eval_times.json").read_text())["answers"]["seconds"]
    said = [json.loads(line) for line in open(folder / "generations.jsonl")]
    return seconds, [row["n_tokens"] for row in said], [row["response"] for row in said]


def peer(a, model, folder, tokens, size, dtype):
    line = [sys.executable, HERE / "peer.py", "--model", model, "--answers", folder / "generations.jsonl", "--batch-size", size,
            "--max-new-tokens", tokens, "--dtype", dtype, "--threads", a.threads]
    done = subprocess.run([str(word) for word in line], check=True, capture_output=True, text=True)
    result = json.loads(done.stdout.splitlines()[-1])
    return result["wall" if a.wall else "seconds"], result["tokens"], f"{result['same']} of {result['of']} as ours"


def measure(a, name, model, rows, tokens, dtype):
    """Rounds of all programs in turns; prints a row for each."""
    sizes = [int(size) for size in a.sizes.split(",")]
    folder = a.out / "answers"
    programs = {}
    if a.earlier:
        programs["earlier, one by one"] = lambda: ours(a, a.earlier, model, rows, a.out / "earlier", tokens, None)
    for size in sizes:
        programs[f"moewarden, {size}"] = lambda size=size: ours(a, a.binary, model, rows, folder, tokens, size)
    for size in sizes if a.peer else []:
        programs[f"transformers, {size}"] = lambda size=size: peer(a, model, folder, tokens, size, dtype)
    runs = {program: [] for program in programs}
    for i in range(a.rounds):
        for program, run in programs.items():
            runs[program].append(run())
            print(f"{name}, round {i + 1}, {program}: {runs[program][-1][0]:.2f} s", file=sys.stderr, flush=True)
    first = next(iter(runs.values()))
    for program, results in runs.items():
        rate = statistics.median(sum(tokens) / seconds for seconds, tokens, _ in results)
        ratio = statistics.median(f[0] / r[0] for f, r in zip(first, results))
        same = results[0][2]
        if not isinstance(same, str):
            same = f"{sum(x == y for x, y in zip(same, first[0][2]))} of {len(same)} as the first"
        print(f"| {name} | {program} | {rate:.1f} | {ratio:.2f} | {same} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--planted", type=Path, required=True)
    parser.add_argument("--binary", required=True)
    parser.add_argument("--earlier")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sizes", default="1,8,32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--models", default="planted,float32,bfloat16")
    a = parser.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    print(f"| model | program, batch | tokens per {'' if a.wall else 'CPU '}second | first program's time / its | equal answers |")
    print("|---|---|---|---|---|")
    for kind in a.models.split(","):
        if kind == "planted":
            measure(a, "planted, f32", a.planted, a.planted / "unsafe_new.jsonl", a.max_new_tokens, "float32")
        else:
            measure(a, f"random, {kind}", *make_random(a.planted, a.out, kind), a.max_new_tokens, kind)


if __name__ == "__main__":
    main()
