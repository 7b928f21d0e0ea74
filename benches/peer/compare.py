#!/usr/bin/env python3
"""Compares identification by moewarden and by PyTorch on the same checkpoint and the same rows.

`python benches/peer/compare.py --rounds 5` builds the benchmark in release mode, creates the model and rows if they are missing
(benches/peer/README.md), runs the programs in turns A B C A B C ..., each in its own process, and prints medians and the medians of
the ratios within a round. Needs torch and transformers in this Python. Use an otherwise idle machine.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
PEERS = {
    "peer, padded": ["--layout", "padded", "--logits", "all"],
    "peer, packed": [],
}


def ours(a, threads):
    out = subprocess.run(
        [a.bench, a.model, a.rows, "--threads", str(threads), "--repeat", str(a.repeat), "--scores", a.data + "/ours.json"],
        check=True, capture_output=True, text=True,
    ).stdout
    passes = [float(x) for x in re.findall(r"pass \d+: ([\d.]+) s", out)]
    return min(passes), float(re.findall(r"peak RSS ([\d.]+) GiB", out)[-1])


def peer(a, threads, options, name):
    scores = f"{a.data}/{name.split()[-1]}.json"
    out = subprocess.run(
        [sys.executable, HERE + "/identify.py", "--model", a.model, "--rows", a.rows, "--threads", str(threads),
         "--repeat", str(a.repeat), "--scores", scores, *options],
        check=True, capture_output=True, text=True,
    ).stdout
    result = json.loads(out[out.index("{"):])
    return result["seconds"], result["peak_rss_gib"]


def agreement(a):
    mine = json.load(open(a.data + "/ours.json"))
    lines = []
    for name in PEERS:
        other = json.load(open(f"{a.data}/{name.split()[-1]}.json"))
        flat = [(x, y) for r, s in zip(mine["scores"], other["scores"]) for x, y in zip(r, s)]
        top = max(abs(y) for _, y in flat)
        lines.append(f"{name}: scores differ by at most {max(abs(x - y) for x, y in flat) / top:.1e} of the largest, "
                     f"losses by {max(abs(x - y) for x, y in zip(mine['losses'], other['losses'])):.1e}")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="/tmp/moewarden-bench", help="folder for the model and the rows (2.1 GB)")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeat", type=int, default=3, help="passes per process; the fastest counts")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    os.makedirs(a.data, exist_ok=True)
    a.model, a.rows = a.data + "/model", f"{a.data}/rows-{a.tokens}.json"
    if not os.path.exists(a.model + "/config.json"):
        subprocess.run([sys.executable, HERE + "/make_model.py", a.model], check=True)
    if not os.path.exists(a.rows):
        subprocess.run([sys.executable, HERE + "/make_rows.py", a.rows, "--tokens", str(a.tokens)], check=True)
    build = subprocess.run(
        ["cargo", "bench", "--bench", "identify", "--no-run"], cwd=HERE + "/../..", check=True, capture_output=True, text=True
    )
    a.bench = os.path.join(HERE, "../..", re.search(r"\((\S*identify-\w+)\)", build.stderr).group(1))

    programs = {"moewarden": lambda: ours(a, a.threads)}
    for name, options in PEERS.items():
        programs[name] = lambda name=name, options=options: peer(a, a.threads, options, name)
    runs = {name: [] for name in programs}
    for i in range(a.rounds):
        for name, run in programs.items():
            runs[name].append(run())
            print(f"round {i + 1} {name}: {runs[name][-1][0]:.2f} s, {runs[name][-1][1]:.2f} GiB", flush=True)

    import torch
    import transformers

    print(f"\ntorch {torch.__version__}, transformers {transformers.__version__}, {a.threads} threads, {platform.processor() or platform.machine()}")
    print("| program | median s | tokens/s | peak RSS, GiB | its time / ours | our memory / its |")
    print("|---|---|---|---|---|---|")
    memory = statistics.median(m for _, m in runs["moewarden"])
    for name, results in runs.items():
        seconds = statistics.median(s for s, _ in results)
        ratio = statistics.median(s / o for (s, _), (o, _) in zip(results, runs["moewarden"]))
        rss = statistics.median(m for _, m in results)
        print(f"| {name} | {seconds:.2f} | {a.tokens / seconds:.0f} | {rss:.2f} | {ratio:.2f} | {memory / rss:.2f} |")
    print("\n".join(agreement(a)))


if __name__ == "__main__":
    main()
